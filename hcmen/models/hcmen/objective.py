"""What HCMEN is trained with: the objective of every kind, alignment of its tokens, and polarity as a second task.

task + alignment_weight * alignment + mix_weight * mix + intensity_weight * intensity
     + polarity_weight * (polarity + mix_weight * polarity_mix)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from hcmen.models.contract import Step
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.losses import AlignmentLoss, PolarityLoss, polarity
from hcmen.models.hcmen.model import Outputs
from hcmen.models.mixing import Mixture
from hcmen.models.objective import Objective

__all__ = ["HCMENObjective"]


class HCMENObjective(Objective):
    """As `Objective`, with alignment, and polarity where the run has that head."""

    def __init__(self, config: ModelConfig, train: Any) -> None:
        super().__init__(config, train)
        self.alignment = AlignmentLoss(config)
        self.polarity = PolarityLoss(config) if train.aux == "polarity" else None

    @property
    def weights(self) -> dict[str, float]:
        """The factor of each term, in the order in which they are added up."""
        train = self.train_config
        return {
            "task_loss": 1.0,
            "alignment_loss": train.alignment_weight,
            "mix_loss": train.mix_weight,
            "intensity_loss": train.intensity_weight,
            "polarity_loss": train.polarity_weight,
            "polarity_mix_loss": train.polarity_weight * train.mix_weight,
        }

    def of_views(self, step: Step) -> dict[str, Tensor]:
        """Alignment and polarity of the two views."""
        terms = {}
        if self.train_config.alignment_weight:
            terms["alignment_loss"] = self.alignment(step.clean, step.corrupted)
        if self.polarity is not None:
            terms["polarity_loss"] = self.polarity(step.clean, step.corrupted, step.labels)
        return terms

    def of_mixtures(self, step: Step, mixture: Mixture, mixed: Outputs) -> dict[str, Tensor]:
        """Polarity of the mixtures, whose label has a share of each polarity."""
        if self.polarity is None:
            return {}
        classes = F.one_hot(polarity(step.labels), 3).to(mixture.label_shares.dtype)
        shares = (mixture.label_shares[..., None] * classes[mixture.rows]).sum(dim=1)
        return {"polarity_mix_loss": self.polarity.mixed(mixed, shares, self.train_config.decoupled_weight)}
