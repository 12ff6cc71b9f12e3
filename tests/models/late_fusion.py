"""Late fusion of mean frames: the least that a model can be, and all that has to be written for another kind of one."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hcmen.base.inputs import FeatureConfig, Inputs
from hcmen.base.modalities import MODALITIES
from hcmen.models.contract import Prediction
from hcmen.models.objective import Objective
from hcmen.models.registry import Kind


@dataclasses.dataclass(frozen=True)
class LateFusionConfig:
    text: FeatureConfig
    audio: FeatureConfig
    vision: FeatureConfig
    width: int = 4
    kind: ClassVar[str] = "late-fusion"

    @property
    def inputs(self) -> Inputs:
        return Inputs(self.text, self.audio, self.vision, label_min_means="against", label_max_means="in favour")

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> LateFusionConfig:
        return cls(**{key: FeatureConfig(**x) if key in MODALITIES else x for key, x in data.items()})


class Outputs(NamedTuple):
    score: Tensor
    modality_weights: Tensor
    tokens: dict[str, Tensor]
    present: Tensor


class LateFusion(nn.Module):
    """Every modality says a score and how much it counts; a softmax over those that are there weighs them."""

    def __init__(self, config: LateFusionConfig) -> None:
        super().__init__()
        self.config = config
        sizes = {m: config.inputs.modality(m).features for m in MODALITIES}
        for m, n in sizes.items():
            self.register_buffer(f"mean_{m}", torch.zeros(n))
            self.register_buffer(f"std_{m}", torch.ones(n))
        self.token = nn.ModuleDict({m: nn.Linear(n, config.width) for m, n in sizes.items()})
        self.says = nn.ModuleDict({m: nn.Linear(config.width, 2) for m in MODALITIES})

    def encode(self, features: dict[str, Tensor], lengths: dict[str, Tensor]) -> dict[str, Tensor]:
        tokens = {}
        for m in (m for m in MODALITIES if m in features):
            x = (features[m] - getattr(self, f"mean_{m}")) / getattr(self, f"std_{m}")
            real = torch.arange(x.shape[1], device=x.device) < lengths[m][:, None]
            tokens[m] = self.token[m]((x * real[..., None]).sum(dim=1) / lengths[m][:, None])[:, None]
        return tokens

    def fuse(self, tokens: dict[str, Tensor], present: Tensor | None = None) -> Outputs:
        columns = [MODALITIES.index(m) for m in tokens]
        said = torch.stack([self.says[m](x[:, 0].tanh()) for m, x in tokens.items()], dim=1)
        place = torch.eye(len(MODALITIES), device=said.device)[columns].to(said.dtype)
        counts = said[..., 1]
        if present is not None:
            counts = counts.masked_fill(~present[:, columns], -1e4)
        weights = counts.softmax(dim=1)
        if present is None:
            present = (place.sum(dim=0) > 0).expand(said.shape[0], -1)
        return Outputs((weights * said[..., 0]).sum(dim=1), weights @ place, dict(tokens), present)

    def forward(
        self, features: dict[str, Tensor], lengths: dict[str, Tensor], present: Tensor | None = None
    ) -> Prediction:
        return Prediction(*self.fuse(self.encode(features, lengths), present)[:2])

    def set_normalisation(self, statistics: dict[str, Any]) -> None:
        for m, (mean, std) in statistics.items():
            getattr(self, f"mean_{m}").copy_(torch.as_tensor(mean))
            getattr(self, f"std_{m}").copy_(torch.as_tensor(std).clamp(min=1e-6))

    def normalisation(self) -> dict[str, dict[str, list[float]]]:
        return {m: {key: getattr(self, f"{key}_{m}").tolist() for key in ("mean", "std")} for m in MODALITIES}


KIND = Kind(LateFusionConfig.kind, "Late fusion", LateFusionConfig, LateFusion, Objective)
