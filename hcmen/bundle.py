"""The old name of hcmen.base.bundle and hcmen.base.manifest."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.base.manifest", "hcmen.base.bundle")
