"""The old name of hcmen.base.library."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.base.library")
