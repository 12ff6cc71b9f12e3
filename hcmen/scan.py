"""The old name of hcmen.mamba.scan."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.mamba.scan")
