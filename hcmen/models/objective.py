"""The objective that any kind of model can be trained with: the error of the score, and mixtures of samples.

    task + mix_weight * mix + intensity_weight * intensity

A kind with more to learn extends `Objective`. What learns in it is among its children, outside the model: no export can
reach it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.models.contract import Config, Step
from hcmen.models.mixing import Mixture, Plan, Samples, make_mixing

__all__ = ["ERRORS", "Objective", "task_loss"]

ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"squared": F.mse_loss, "absolute": F.l1_loss}
"""The mean error of scores, by what `TrainConfig.loss` calls it."""


def task_loss(clean: Any, corrupted: Any, labels: Tensor, loss: str = "squared") -> Tensor:
    """Mean error of the score, averaged over the clean and the corrupted view of each sample."""
    error = ERRORS[loss]
    return 0.5 * (error(clean.score, labels) + error(corrupted.score, labels))


class Objective(nn.Module):
    """The terms of the loss, and what learns in them.

    Args:
        config: the model's. train: the run's settings, a hcmen.training.config.TrainConfig.
    """

    def __init__(self, config: Config, train: Any) -> None:
        super().__init__()
        self.train_config = train
        self.mixing = make_mixing(config, train.mixing)

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term, in the order in which they are added up."""
        return {
            "task_loss": 1.0,
            "mix_loss": self.train_config.mix_weight,
            "intensity_loss": self.train_config.intensity_weight,
        }

    def forward(self, step: Step) -> dict[str, Tensor]:
        """The terms of the loss before weighting, 0 for those that are off or have nothing to go by; and "loss"."""
        task = task_loss(step.clean, step.corrupted, step.labels, self.train_config.loss)
        terms = {**dict.fromkeys(self.weights, task.new_zeros(())), "task_loss": task}
        terms |= self.of_views(step)
        if self.mixing is not None:
            samples = Samples(step.corrupted.tokens, step.corrupted.present, step.labels)
            if self.mixing.of_features:
                features, lengths = step.features()
                samples = Samples(self.mixable(step.model, features), step.corrupted.present, step.labels, lengths)
            if self.train_config.intensity_weight:
                terms["intensity_loss"] = self.mixing.teach(samples)
            mixture = self.mixing(samples, step.generator(), lambda plan: _agreed(step, plan))
            if mixture is not None:
                mixed = step.outputs(mixture.values, mixture.lengths, mixture.present)
                terms["mix_loss"] = ERRORS[self.train_config.loss](mixed.score, mixture.labels)
                terms |= self.of_mixtures(step, mixture, mixed)
        terms["loss"] = sum(weight * terms[name] for name, weight in self.weights.items())
        return terms

    def of_views(self, step: Step) -> dict[str, Tensor]:
        """A kind's own terms of the two views."""
        return {}

    def of_mixtures(self, step: Step, mixture: Mixture, mixed: Any) -> dict[str, Tensor]:
        """A kind's own terms of the mixtures and the model's outputs for them."""
        return {}

    def mixable(self, model: Any, features: dict[str, Tensor]) -> dict[str, Tensor]:
        """`features` as numbers that can be mixed: token ids become what the model makes of them."""
        text = features.get("text")
        if text is None or text.is_floating_point():
            return features
        return {**features, "text": model.text_encoder(text)}


def _agreed(step: Step, plan: Plan | None) -> Plan | None:
    """The plan of the first process: similarities that differ in their last bits may pair other samples."""
    found: Sequence[Tensor] | None = step.agree(plan)
    return None if found is None else Plan(*found)
