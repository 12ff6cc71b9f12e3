"""The old name of hcmen.base.inputs, hcmen.models.hcmen.config, hcmen.training.config and hcmen.training.presets."""

from hcmen.base.moved import moved

__getattr__ = moved(
    __name__, "hcmen.base.inputs", "hcmen.models.hcmen.config", "hcmen.training.config", "hcmen.training.presets"
)
