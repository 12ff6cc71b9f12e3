"""What a model has to be, so that training, evaluation, export, parity and benchmarks need not know which one it is.

    module(config)                         `Model`       in hcmen/models/registry.py by its kind
    module.encode(features, lengths)       {m: tokens [batch, L, width]} of every modality m in the features
    module.fuse(tokens, present)           outputs, a NamedTuple of tensors and dicts of tensors, batch first
    module(features, lengths, present)     `Prediction`, with every output of `config.inputs.outputs`

features: {m: float32 [batch, time, features]}, zero padded at the end; text may be token ids int64 [batch, 3, time].
lengths: {m: int64 [batch]}, the steps that are real. present: bool [batch, 3] in the order of MODALITIES, at least one
a row; None is all that the features hold. A modality that is not among the features is absent for the whole batch. Both
ways of being absent give the same numbers, and no number depends on the padding or on the other rows of its batch.

module(config) also works within torch.device("meta"), where tensors have shapes and no values (held.py).

Torch is for the type checker alone: settings of training are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from hcmen.base.inputs import Inputs

__all__ = ["MASKED", "Config", "MixingConfig", "Model", "Prediction", "Step", "heard_by", "uncalibrated"]

MASKED = -1e4
"""For logits that shall not count: far below any real one, yet inside float16; exp of it is zero in both formats."""

Statistics = Mapping[str, "tuple[np.ndarray, np.ndarray]"]


class Prediction(NamedTuple):
    """score [batch] in label units; modality_weights [batch, 3] in the order of MODALITIES, which sum to one."""

    score: Tensor
    modality_weights: Tensor


class Config(Protocol):
    """A frozen dataclass. kind: in the registry. width: of every token; mixing that learns needs it."""

    kind: ClassVar[str]

    @property
    def width(self) -> int: ...

    @property
    def inputs(self) -> Inputs:
        """What the model takes and gives."""
        ...

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` reads back."""
        ...

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Config:
        """Reads what `to_json` wrote; raises InputError."""
        ...


def uncalibrated() -> Tensor:
    """The calibration that changes nothing: [8, 3], a row for each `Variant.number`.

    Columns: scale and shift of the score of these modalities, and the number of the set that is listened to in their
    place: their own, or a part of it that is listened to itself.
    """
    import torch  # which the configurations, for which this file is read too, do without

    return torch.tensor([[1.0, 0.0, number] for number in range(8)])


def heard_by(model: Model, present: Sequence[str]) -> tuple[str, ...]:
    """What `model` listens to of the modalities that are present: all, where its kind knows no calibration."""
    return tuple(model.heard(present) if hasattr(model, "heard") else present)


class Model(Protocol):
    """An nn.Module. One whose text is tokens has a `text_encoder`, a hcmen.models.text_encoder.TextEncoder.

    One whose scores are calibrated has a buffer `calibration`, a table as `uncalibrated` makes it, takes up another by
    `calibrate(table)`, and says by `heard(present)` what it listens to of the modalities that are present.
    """

    config: Config

    def encode(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As the head of this file says; raises InputError where a shape does not fit the configuration."""
        ...

    def fuse(self, tokens: Mapping[str, Tensor], present: Tensor | None = None) -> Any:
        """As the head of this file says; the outputs have score, modality_weights, tokens and present."""
        ...

    def set_normalisation(self, statistics: Statistics) -> None:
        """Stores mean and standard deviation [features] per modality; the model applies them to raw features."""
        ...

    def normalisation(self) -> dict[str, dict[str, list[float]]]:
        """{m: {"mean", "std"}} as the model applies it, for every modality; 0 and 1 where nothing was stored."""
        ...

    def __call__(
        self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor], present: Tensor | None = None
    ) -> Prediction: ...


class Step(NamedTuple):
    """What an objective sees of a micro-batch.

    model: for what is asked of it beyond its outputs. clean, corrupted: its outputs for the two views. labels [batch].
    generator: makes the generator of this step's draws.
    features: makes the corrupted view's features and lengths. outputs: the model's for other values: features with
    their lengths, or tokens without (None), and presence. agree: the first process's tensors, in all processes.
    """

    model: Any
    clean: Any
    corrupted: Any
    labels: Tensor
    generator: Callable[[], np.random.Generator]
    features: Callable[[], tuple[dict[str, Tensor], dict[str, Tensor]]]
    outputs: Callable[[Mapping[str, Tensor], Mapping[str, Tensor] | None, Tensor], Any]
    agree: Callable[[Sequence[Tensor] | None], Sequence[Tensor] | None]


@dataclass(frozen=True)
class MixingConfig:
    """How samples are mixed: the settings of a training run that mixing.py reads; see hcmen.training.config."""

    mix: str
    mix_alpha: float
    mix_similarity: float
    mix_same_sign: bool
    powmix_ratio: float
    powmix_parts: int
    powmix_probability: float
