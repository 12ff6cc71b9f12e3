"""The old name of hcmen.models.hcmen.model."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.models.hcmen.model")
