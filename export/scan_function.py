"""The old name of hcmen.mamba.functions."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.mamba.functions")
