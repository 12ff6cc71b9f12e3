"""Sample mixing: new training samples out of several of a batch, with labels in between.

Every method is a `Mixing` that plans which samples to mix in which shares; one function carries a plan out. So the
rules on what may be mixed hold for all of them:

    - A modality is mixed where all samples of a mixture have it, and absent from the mixture otherwise. Mixtures that
      would have no modality are not made.
    - The label is the mean, over the modalities that the mixture has, of the shares times the labels.

    method     what is mixed     samples, and their shares
    mixup      padded features   one permutation of the batch, one lambda ~ Beta(alpha, alpha) (arXiv 1710.09412)
    manifold   tokens H_m        the same (arXiv 1806.05236)
    ms-mix     tokens H_m        alike ones, each modality by how strong a sentiment it shows (`MSMix`)
    powmix     tokens H_m        some at a time, Dirichlet shares drawn per modality (`PowMix`)

Glossary (samples b, mixtures k, samples per mixture n)
    rows     int64 [k, n]     which samples each mixture is made of
    shares   [k, n, 3]        how much of each, per modality in the order of MODALITIES; non-negative, one in sum over n
    I_m      [b]              intensity: how strong a sentiment modality m shows, in label units

Draws come from the generator that the caller makes from (seed, epoch, step). What learns lives here, outside the model:
no checkpoint and no export can reach it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.base.modalities import MODALITIES
from hcmen.models.contract import Config, MixingConfig

__all__ = [
    "IntensityPredictor",
    "MSMix",
    "Manifold",
    "Mixing",
    "Mixture",
    "Mixup",
    "Plan",
    "PowMix",
    "Samples",
    "make_mixing",
    "mix",
]


class Samples(NamedTuple):
    """What there is to mix, features or tokens.

    values: {m: [b, time or L, features or d]}, features zero padded at the end. present: bool [b, 3]. labels: [b].
    lengths: {m: int64 [b]} of features; tokens have none.
    """

    values: Mapping[str, Tensor]
    present: Tensor
    labels: Tensor
    lengths: Mapping[str, Tensor] | None = None


class Plan(NamedTuple):
    """rows int64 [k, n], shares [k, n, 3] as in the glossary, before presence is looked at."""

    rows: Tensor
    shares: Tensor


class Mixture(NamedTuple):
    """Samples made by mixing.

    values, lengths, present, labels: as in `Samples`, for the k' <= k mixtures that have a modality. Values of absent
    modalities are zero. rows, label_shares: [k', n], what the label is made of; label_shares sum to one over n.
    """

    values: dict[str, Tensor]
    lengths: dict[str, Tensor] | None
    present: Tensor
    labels: Tensor
    rows: Tensor
    label_shares: Tensor


class Mixing(nn.Module, ABC):
    """One method.

    Attributes:
        of_features: whether it mixes the features that go into the model, rather than the tokens of its first part.
    """

    of_features: ClassVar[bool] = False

    def forward(
        self,
        samples: Samples,
        generator: np.random.Generator,
        agree: Callable[[Plan | None], Plan | None] = lambda plan: plan,
    ) -> Mixture | None:
        """Mixtures of `samples`; None where nothing can be mixed, as with a single sample.

        `agree` may put another plan, of the same samples, in the place of the one found.
        """
        if len(samples.labels) < 2:
            return None
        plan = agree(self.plan(samples, generator))
        return None if plan is None else mix(plan, samples)

    @abstractmethod
    def plan(self, samples: Samples, generator: np.random.Generator) -> Plan | None:
        """Which of at least two samples to mix, in which shares; None for no mixtures in this step."""

    def teach(self, samples: Samples) -> Tensor:
        """The loss of what the method itself learns; 0 where that is nothing."""
        return samples.labels.new_zeros(())


def make_mixing(model: Config, train: MixingConfig) -> Mixing | None:
    """The method that `train.mix` names, None for none."""
    if train.mix == "none":
        return None
    if train.mix == "ms-mix":
        return MSMix(model, train)
    return {"mixup": Mixup, "manifold": Manifold, "powmix": PowMix}[train.mix](train)


def mix(plan: Plan, samples: Samples) -> Mixture | None:
    """Carries a plan out; None if no mixture has a modality.

    Features of unequal length: the mixture is as long as its longest part, and a shorter part goes on as the zero
    frames of its padding. Zero frames are what a dropped step looks like (hcmen/data/missing.py), so the model knows
    them as "nothing here". Cutting to the shortest part instead would lose what the label rests on.
    """
    present = samples.present[plan.rows].all(dim=1)
    some = present.any(dim=1)
    if not bool(some.any()):
        return None
    rows, present = plan.rows[some], present[some]
    shares = plan.shares[some] * present[:, None]
    values, lengths = {}, {}
    for m, x in samples.values.items():
        share = shares[..., MODALITIES.index(m)].to(x.dtype)
        values[m] = sum(share[:, i, None, None] * x[rows[:, i]] for i in range(rows.shape[1]))
        if samples.lengths is not None:
            lengths[m] = samples.lengths[m][rows].amax(dim=1)
    label_shares = (shares.sum(dim=2) / present.sum(dim=1, keepdim=True)).to(samples.labels.dtype)
    labels = (label_shares * samples.labels[rows]).sum(dim=1)
    return Mixture(values, lengths if samples.lengths is not None else None, present, labels, rows, label_shares)


class Manifold(Mixing):
    """Every sample with the one that a permutation gives it; one lambda for the batch, the modalities and the label."""

    def __init__(self, train: MixingConfig) -> None:
        super().__init__()
        self.alpha = train.mix_alpha

    def plan(self, samples: Samples, generator: np.random.Generator) -> Plan:
        """lambda ~ Beta(alpha, alpha). A sample that the permutation leaves in place is its own mixture."""
        b = len(samples.labels)
        partner = generator.permutation(b)
        share = _two(torch.full((b, len(MODALITIES)), generator.beta(self.alpha, self.alpha), dtype=torch.float64))
        return _plan(np.stack([np.arange(b), partner], axis=1), share, samples)


class Mixup(Manifold):
    """`Manifold` on the features."""

    of_features = True


class PowMix(Mixing):
    """Our reading of PowMix (arXiv 2312.12334), whose abstract is all that was seen: no formula, no code.

    varying number of examples   n = 1 .. ratio * b mixtures, n drawn anew in every step, so a mixture may be one of few
    mixing factors               Dirichlet(alpha) shares of `parts` different samples (fewer where the batch is smaller)
    anisotropic mixing           shares drawn separately for every modality
    dynamic mixing               on with `probability` in each step
    cross-modal label mixing     the label follows the mean of the shares over modalities
    """

    def __init__(self, train: MixingConfig) -> None:
        super().__init__()
        self.alpha, self.ratio = train.mix_alpha, train.powmix_ratio
        self.parts, self.probability = train.powmix_parts, train.powmix_probability

    def plan(self, samples: Samples, generator: np.random.Generator) -> Plan | None:
        """As the class says; None in the steps that are off."""
        if generator.random() >= self.probability:
            return None
        b = len(samples.labels)
        count = int(generator.integers(1, max(1, round(self.ratio * b)), endpoint=True))
        parts = min(self.parts, b)
        rows = np.stack([generator.choice(b, parts, replace=False) for _ in range(count)])
        shares = generator.dirichlet(np.full(parts, self.alpha), (count, len(MODALITIES)))
        return _plan(rows, torch.from_numpy(shares).transpose(1, 2), samples)


class MSMix(Mixing):
    """MS-Mix, without the defects of its released code.

    1. Which samples (SASS, `similarity` and `pairs`): those whose tokens are alike. Labels have no say, unless
       `same_sign` asks that no positive sample is mixed with a negative one.
    2. In which shares (SIG, `shares`): lambda_m = (lambda + |I_m,i| / (|I_m,i| + |I_m,j|)) / 2, lambda ~ Beta(alpha,
       alpha) per pair. The released code either scales |I| by the batch's range, which makes a sample's share depend on
       the rest of its batch and gives its weakest none, or leaves I signed, and lambda is any number; plain magnitudes
       have neither fault. Shares are constants to the losses: a lambda that could move would make labels easy.
    3. What intensity means (SAL, `teach`): KL(Y || I_m) from the softmax over the batch of |y| to that of |I_m|, each
       divided by the largest label, mean over the modalities, a factor of TrainConfig.intensity_weight and no other.
       It teaches magnitudes alone, as in the paper, and reaches the encoders through the tokens.

    Everything looks at tokens pooled to their mean [b, d]: an intensity never sees another sample.
    """

    def __init__(self, model: Config, train: MixingConfig) -> None:
        super().__init__()
        self.alpha, self.threshold, self.same_sign = train.mix_alpha, train.mix_similarity, train.mix_same_sign
        self.limit = max(abs(model.inputs.label_min), abs(model.inputs.label_max))
        self.predictors = nn.ModuleDict(
            {m: IntensityPredictor(model.width, self.limit) for m in model.inputs.modalities}
        )

    def plan(self, samples: Samples, generator: np.random.Generator) -> Plan | None:
        """Up to b pairs; None if no two samples may be mixed."""
        with torch.no_grad():
            similarity, comparable = self.similarity(samples)
            pairs = self.pairs(similarity.cpu().numpy(), comparable.cpu().numpy(), generator)
            if not len(pairs):
                return None
            base = torch.from_numpy(generator.beta(self.alpha, self.alpha, len(pairs)))
            device = samples.labels.device
            shares = self.shares(samples, torch.from_numpy(pairs).to(device), base.to(device))
            return _plan(pairs, _two(shares), samples)

    def similarity(self, samples: Samples) -> tuple[Tensor, Tensor]:
        """Cosine similarity of pooled tokens [b, b], the mean over the modalities that both samples have.

        And a bool [b, b]: whether the two may be mixed, for which they share a modality and are not one and the same.
        """
        b = len(samples.labels)
        total, count = (torch.zeros(b, b, dtype=torch.float64, device=samples.labels.device) for _ in range(2))
        for m, x in samples.values.items():
            unit = F.normalize(x.double().mean(dim=1), dim=1)
            there = samples.present[:, MODALITIES.index(m)]
            both = there[:, None] & there
            total, count = total + torch.where(both, unit @ unit.T, 0.0), count + both
        comparable = (count > 0) & ~torch.eye(b, dtype=torch.bool, device=count.device)
        if self.same_sign:
            comparable &= samples.labels[:, None] * samples.labels >= 0
        mean = total / count.clamp(min=1)
        return (mean + mean.T) / 2, comparable  # some matrix products differ from their transposes in the last bit

    def pairs(
        self, similarity: npt.NDArray[np.float64], comparable: npt.NDArray[np.bool_], generator: np.random.Generator
    ) -> npt.NDArray[np.int64]:
        """At most b pairs [k, 2], drawn from those above the threshold, or from the 2 b most similar if these are few.

        Similarities are first scaled such that the least similar pair has 0 and the most similar one 1.
        """
        b = len(similarity)
        if not comparable.any():
            return np.zeros((0, 2), dtype=np.int64)
        low, high = similarity[comparable].min(), similarity[comparable].max()
        scaled = (similarity - low) / (high - low) if high > low else np.zeros_like(similarity)
        candidates = np.argwhere(comparable & (scaled > self.threshold))
        if len(candidates) < b:
            above = np.argwhere(np.triu(comparable))
            order = np.argsort(-similarity[above[:, 0], above[:, 1]], kind="stable")
            candidates = above[order[: 2 * b]]
        return candidates[generator.choice(len(candidates), min(b, len(candidates)), replace=False)]

    def shares(self, samples: Samples, pairs: Tensor, base: Tensor) -> Tensor:
        """lambda_m [k, 3], the share of the first sample of each pair; `base` [k] is the part that is drawn."""
        lambdas = []
        for m in MODALITIES:
            if m not in samples.values:
                lambdas.append(base)
                continue
            # Where neither shows any intensity they share alike.
            magnitude = self.intensity(m, samples).abs().double() + 1e-6
            first, second = magnitude[pairs].unbind(dim=1)
            lambdas.append((0.5 * (base + first / (first + second))).clamp(0.0, 1.0))
        return torch.stack(lambdas, dim=1)

    def intensity(self, m: str, samples: Samples) -> Tensor:
        """I_m [b]; what it says of samples without the modality means nothing."""
        found: Tensor = self.predictors[m](samples.values[m].mean(dim=1))
        return found

    def teach(self, samples: Samples) -> Tensor:
        """SAL, over the modalities that at least two samples have: for one, both distributions are the same."""
        losses = []
        for m in samples.values:
            rows = samples.present[:, MODALITIES.index(m)]
            if int(rows.sum()) < 2:
                continue
            target = (samples.labels[rows].abs() / self.limit).log_softmax(dim=0)
            found = (self.intensity(m, samples)[rows].abs() / self.limit).log_softmax(dim=0)
            losses.append((target.exp() * (target - found)).sum())
        return torch.stack(losses).mean() if losses else samples.labels.new_zeros(())


class IntensityPredictor(nn.Module):
    """Pooled tokens [b, d] -> intensity [b] in (-limit, limit).

    The released code attends over a single token, which is linear layers: here they are, with the residual and the
    norm that follow them there.
    """

    def __init__(self, width: int, limit: float) -> None:
        super().__init__()
        self.limit = limit
        self.hidden = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [b, d] -> [b]."""
        return self.limit * torch.tanh(self.out(self.norm(x + self.hidden(x))))[:, 0]


def _two(first: Tensor) -> Tensor:
    """Shares [k, 2, 3] of two samples from that of the first [k, 3]."""
    return torch.stack([first, 1.0 - first], dim=1)


def _plan(rows: npt.NDArray[np.int64], shares: Tensor, samples: Samples) -> Plan:
    device = samples.labels.device
    return Plan(torch.from_numpy(rows).to(device), shares.to(device))
