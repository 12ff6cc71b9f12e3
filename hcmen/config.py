"""The old name of hcmen.base.inputs, the models' configurations, hcmen.training.config and hcmen.training.presets."""

from hcmen.base.moved import moved

__getattr__ = moved(
    __name__,
    "hcmen.base.inputs",
    "hcmen.models.hcmen.config",
    "hcmen.models.text_encoder_config",
    "hcmen.training.config",
    "hcmen.training.presets",
)
