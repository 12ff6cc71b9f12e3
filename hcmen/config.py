"""The old name of hcmen.base.config, hcmen.training.config and hcmen.training.presets."""

from hcmen.base.moved import moved

__getattr__ = moved(__name__, "hcmen.base.config", "hcmen.training.config", "hcmen.training.presets")
