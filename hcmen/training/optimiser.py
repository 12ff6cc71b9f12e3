"""How a training's steps are taken: the optimiser, and its learning rate over the run."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from hcmen.training.config import TrainConfig

__all__ = ["learning_rate_at", "make_optimiser"]

# How the names of the text encoder's parameters begin.
_TEXT_ENCODER = "model/text_encoder."


def learning_rate_at(config: TrainConfig, step: int, total: int) -> float:
    """Learning rate of optimiser step `step` of `total`: a linear rise, then half a cosine down towards zero."""
    rise = round(config.warmup_fraction * total)
    if step < rise:
        return config.learning_rate * (step + 1) / rise
    return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * (step - rise) / max(1, total - rise)))


def make_optimiser(parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; biases, norms and scalars, and what the scan's layers mark (A_log, D), are not decayed.

    A group's `share` is its part of the learning rate.
    """
    groups = []
    for ours, share in ((True, 1.0), (False, config.text_encoder_learning_rate / config.learning_rate)):
        own = [p for name, p in parameters.items() if name.startswith(_TEXT_ENCODER) != ours and p.requires_grad]
        kept = [p for p in own if p.dim() < 2 or getattr(p, "_no_weight_decay", False)]
        chosen = {id(p) for p in kept}
        decayed = [p for p in own if id(p) not in chosen]
        groups += [
            {"params": part, "weight_decay": decay, "share": share}
            for part, decay in ((decayed, config.weight_decay), (kept, 0.0))
            if part
        ]
    return torch.optim.AdamW(groups, lr=config.learning_rate)
