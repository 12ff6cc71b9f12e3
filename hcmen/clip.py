"""The old name of hcmen.base.clip."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.base.clip")
