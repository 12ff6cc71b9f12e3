"""HCMEN: a sentiment score from text, audio and vision that keeps working when a modality is missing.

Reconstructed from the abstract of arXiv 2507.23444 and the code of its siblings; the README lists which choice comes
from where. `HCMEN.forward` reads like the paper's three parts:

    1. hierarchical unimodal modelling   features -> H_m   local detail (CNN), global context (Mamba), L tokens
    2. cross-modal enhancement           H -> P_m, E_m     proxies from the other modalities' mixed tokens
    3. multimodal mix-up fusion          E -> score        gated sum, CNN-Mamba backbone, head

`encode` is part 1 and `fuse` parts 2 and 3, so that training can put other tokens in between
(hcmen/models/mixing.py).

Glossary (batch b, L tokens, width d)
    H_m   [b, L, d]   tokens of modality m
    M_m   [b, L, d]   mixed tokens for target m: convex sum of the H_k of the other modalities that are present
    P_m   [b, L, d]   proxy of m, generated from M_m
    E_m   [b, L, d]   enhanced tokens: H_m and what P_m adds to it, or P_m itself where m is absent

A model has a stream for each modality that its configuration names, three as a rule. With one alone there is nothing
to enhance and nothing to weigh: part 2 and the gate are left out.

Presence. A modality may be absent in two ways: statically, when it is not among the features (an exported variant:
everything that served it is left out), or per sample, when `present` says so (training). Both give the same numbers.
`Presence` below is that knowledge: True, False, or a boolean tensor [b].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.base.errors import InputError, unknown_name
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES
from hcmen.models.contract import MASKED, Prediction, uncalibrated
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.layers import AttentionPooling, BiMambaBlock, CNNBlock, Skip, widened, without_autocast
from hcmen.models.text_encoder import TextEncoder

__all__ = ["HCMEN", "Outputs"]

Presence = bool | Tensor

_PLACES = {m: place for place, m in enumerate(reversed(MODALITIES))}
"""The bit of each modality in `Variant.number`."""


class Outputs(NamedTuple):
    """A prediction and what the training losses look at; proxies exist where some other modality is in the features.

    modality_weights are the fusion gate; that of an absent modality is its proxy's, which is made from those that are
    there, and that of one that the model lacks is 0. pooled [batch, d] is what the head scores.
    """

    score: Tensor
    modality_weights: Tensor
    tokens: dict[str, Tensor]
    proxies: dict[str, Tensor]
    present: Tensor
    pooled: Tensor


class ModalityEncoder(nn.Module):
    """Part 1 for one modality: features [b, t, f] -> tokens [b, L, d]."""

    def __init__(self, features: FeatureConfig, config: ModelConfig) -> None:
        super().__init__()
        self.features = features.features
        self.register_buffer("mean", torch.zeros(features.features))
        self.register_buffer("std", torch.ones(features.features))
        self.input_norm = nn.LayerNorm(features.features)
        self.projection = nn.Linear(features.features, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.local = _local(config)
        self.context = _context(config)
        self.pool = AttentionPooling(config.width, config.tokens)

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1], device=x.device) < length[:, None]
        x = (x - self.mean) / self.std
        x = self.dropout(self.projection(self.input_norm(x)))
        x = self.local(x, mask)
        x = self.context(x, mask)
        return self.pool(x, mask)


class HCMEN(nn.Module):
    """The model. `config` fixes every size; see presets.py for those of each data set."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d = config.width

        encoder, there = config.text_encoder, config.inputs.modalities
        self.text_encoder = TextEncoder(encoder, config.modality("text").features) if encoder else None
        self.encoders = nn.ModuleDict({m: ModalityEncoder(config.modality(m), config) for m in there})

        self.streams, several = there, len(there) > 1
        proxied = there if config.proxies and several else ()
        self.proxies = nn.ModuleDict({m: nn.Sequential(_local(config), _context(config)) for m in proxied})
        self.mix_logits = nn.ParameterDict({m: nn.Parameter(torch.zeros(len(there) - 1)) for m in proxied})
        # exp of it scales the cosine similarity; CLIP's initial temperature 0.07 and its ceiling of 100.
        self.log_similarity_scale = nn.ParameterDict(
            {m: nn.Parameter(torch.tensor(math.log(1 / 0.07))) for m in proxied}
        )

        self.absent_tokens = nn.ParameterDict({m: nn.Parameter(0.02 * torch.randn(d)) for m in there if several})
        self.gate = nn.Linear(len(there) * d, len(there)) if several else None
        self.backbone = nn.ModuleList(
            nn.Sequential(_local(config), _context(config)) for _ in range(config.backbone_depth)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, 1)
        self.register_buffer("calibration", uncalibrated() if config.calibrated else None)
        self._heard = list(range(8))  # the last column, for what is decided when a graph is made
        self.register_load_state_dict_post_hook(lambda model, _: model.calibrate(model.calibration))

    def forward(
        self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor], present: Tensor | None = None
    ) -> Prediction:
        """Scores a batch.

        Args:
            features: per modality float32 [batch, m_time, m_features], zero padded at the end. A modality that is not
                among the keys is absent for the whole batch. With a text encoder, text is its tokens int64
                [batch, 3, text_time], or what it made of them.
            lengths: per modality int64 [batch], how many steps are real.
            present: bool [batch, 3] in the order of MODALITIES, which modalities each sample has; None means all
                that `features` holds. At least one per row.

        Raises:
            InputError: no modality, an unknown one, or a shape that does not fit the configuration.
        """
        outputs = self.fuse(self.encode(features, lengths), present)
        return Prediction(outputs.score, outputs.modality_weights)

    def encode(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Part 1, hierarchical unimodal modelling: H_m [batch, L, d] of every modality in `features`.

        Raises:
            InputError: no modality, an unknown one, or a shape that does not fit the configuration.
        """
        self._check(features, lengths)
        features = self.embed(features)
        return {m: self.encoders[m](features[m], lengths[m]) for m in self.encoders if m in features}

    def embed(self, features: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`features` with text tokens turned into text features float32 [batch, text_time, text_features]."""
        text = features.get("text")
        if self.text_encoder is None or text is None or text.is_floating_point():
            return features
        return {**features, "text": self.text_encoder(text)}

    def fuse(self, tokens: Mapping[str, Tensor], present: Tensor | None = None) -> Outputs:
        """Parts 2 and 3, from the tokens H_m [batch, L, d] of one modality or more.

        A modality that is not among the keys is absent for the whole batch, and `present` is as in `forward`.

        Raises:
            InputError: `present` is not bool [batch, 3].
        """
        batch = next(iter(tokens.values())).shape[0]
        if present is not None and (present.dtype != torch.bool or present.shape != (batch, len(MODALITIES))):
            raise InputError(
                f"present is {present.dtype} {list(present.shape)}, expected torch.bool [{batch}, {len(MODALITIES)}]"
            )
        # At least one is there in every row, so the only one is.
        sure = present is None or len(tokens) == 1
        presence: dict[str, Presence] = {
            m: (True if sure else present[:, i]) if m in tokens else False for i, m in enumerate(MODALITIES)
        }
        calibrated = self.calibration is not None and not self.training
        if calibrated:
            presence = self._listened(presence)
            tokens = {m: x for m, x in tokens.items() if presence[m] is not False}
        # Part 2: cross-modal enhancement
        proxies = {
            m: self.proxies[m](mixed) for m in self.proxies if (mixed := self._mix(m, tokens, presence)) is not None
        }
        enhanced = {m: self._enhance(m, tokens, proxies, presence) for m in self.streams}
        # Part 3: multimodal mix-up fusion
        weights = self._gate(tokens, presence)
        fused = sum(weights[:, i, None, None] * enhanced[m] for i, m in enumerate(self.streams))
        for block in self.backbone:
            fused = block(fused)
        pooled = self.norm(widened(fused)).amax(dim=1)
        with without_autocast(pooled):
            score = self.head(pooled)[:, 0]
        if calibrated:
            scale, shift, _ = self.calibration[_number(presence)].unbind(dim=-1)
            score = score * scale + shift
        return Outputs(
            score, self._of_all(weights), dict(tokens), proxies, self._presence_tensor(presence, score), pooled
        )

    def set_normalisation(self, statistics: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Stores mean and standard deviation [features] per modality; the model applies them to raw features.

        A feature that never varies (std 0) is only centred.

        Raises:
            InputError: a size does not fit, or a number is not finite or negative.
        """
        for m, (mean, std) in statistics.items():
            encoder = self.encoders[m]
            std = np.where(np.asarray(std) == 0, 1.0, std)
            for name, values in (("mean", mean), ("std", std)):
                fits = np.shape(values) == (encoder.features,) and np.isfinite(values).all()
                if not fits or (name == "std" and np.min(values) < 0):
                    raise InputError(
                        f"{name} of {m} has shape {list(np.shape(values))}, expected {encoder.features} finite numbers"
                        + (", none negative" if name == "std" else "")
                    )
                getattr(encoder, name).copy_(torch.from_numpy(np.asarray(values, dtype=np.float32)))

    def normalisation(self) -> dict[str, dict[str, list[float]]]:
        """{m: {"mean", "std"}} as `set_normalisation` stored them, 0 and 1 before."""
        return {m: {key: getattr(e, key).tolist() for key in ("mean", "std")} for m, e in self.encoders.items()}

    # --- part 2 -----------------------------------------------------------------------------------------------------

    def _mix(self, target: str, tokens: Mapping[str, Tensor], presence: Mapping[str, Presence]) -> Tensor | None:
        """M_m, or None where no other modality is in the features."""
        others = [m for m in self.streams if m != target]
        sources = [(i, m) for i, m in enumerate(others) if m in tokens]
        if not sources:
            return None
        logits = self.mix_logits[target][[i for i, _ in sources]]
        there = [presence[m] for _, m in sources]
        if all(p is True for p in there):
            weights = logits.softmax(dim=0)
            return sum(weights[j] * tokens[m] for j, (_, m) in enumerate(sources))
        batch = tokens[sources[0][1]].shape[0]
        mask = torch.stack([_expand(p, batch, logits) for p in there], dim=1)
        weights = logits.expand(batch, -1).masked_fill(~mask, MASKED).softmax(dim=1)
        return sum(weights[:, j, None, None] * tokens[m] for j, (_, m) in enumerate(sources))

    def _enhance(
        self,
        target: str,
        tokens: Mapping[str, Tensor],
        proxies: Mapping[str, Tensor],
        presence: Mapping[str, Presence],
    ) -> Tensor:
        """E_m: H_m with its proxy's matching content added; P_m where m is absent; H_m where nothing else is there.

        Without proxies: H_m, or the learned absent token [d] where m is absent.
        """
        if not self.config.proxies:
            return _choose(presence[target], lambda: tokens[target], lambda: self.absent_tokens[target])
        others = [presence[m] for m in self.streams if m != target]
        company = _any(others)
        return _choose(
            presence[target],
            lambda: _choose(
                company,
                lambda: self._add_matching(target, tokens[target], proxies[target]),
                lambda: tokens[target],
            ),
            lambda: proxies[target],
        )

    def _add_matching(self, target: str, tokens: Tensor, proxy: Tensor) -> Tensor:
        """H + relu(softmax(s cos(H, P)) - 1/L) P: every token takes from the proxy tokens that match it best.

        TF-Mamba keeps the entries above 1/L as they are. That rule jumps at 1/L, so a last-bit difference between two
        runtimes could move the score by more than any parity bound; subtracting 1/L is its continuous form.
        """
        scale = self.log_similarity_scale[target].exp().clamp(max=100.0)
        cosine = _unit(tokens) @ _unit(proxy).transpose(1, 2)
        similarity = (scale * widened(cosine)).softmax(dim=-1)
        return tokens + F.relu(similarity - 1.0 / self.config.tokens) @ proxy

    # --- part 3 -----------------------------------------------------------------------------------------------------

    def _gate(self, tokens: Mapping[str, Tensor], presence: Mapping[str, Presence]) -> Tensor:
        """Weights [b, streams], from the mean token of each modality or its learned absent token.

        The linear layer is applied modality by modality, statically absent ones first: what those contribute is a
        constant that the exporter folds into the bias.
        """
        if self.gate is None:
            (only,) = tokens.values()
            return only.new_ones(only.shape[0], 1)
        d = self.config.width
        columns = {m: self.gate.weight[:, i * d : (i + 1) * d] for i, m in enumerate(self.streams)}
        logits = self.gate.bias
        for m in sorted(self.streams, key=lambda m: presence[m] is not False):
            logits = logits + _choose(
                presence[m],
                lambda m=m: F.linear(tokens[m].mean(dim=1), columns[m]),
                lambda m=m: F.linear(self.absent_tokens[m], columns[m]),
            )
        return widened(logits).softmax(dim=-1)

    # --- calibration ------------------------------------------------------------------------------------------------

    def calibrate(self, table: Tensor | None) -> None:
        """Takes up what validation showed of each set of modalities; None leaves a model as it is.

        Args:
            table: [8, 3], by `Variant.number`: scale and shift of the score, and the number of the set that is listened
                to: this one, or a part of it that is listened to itself.

        Raises:
            ValueError: the last column says something else.
        """
        if table is None:
            return
        heard = table[:, 2].tolist()
        if not all(n in range(8) and int(n) & ~i == 0 and heard[int(n)] == n for i, n in enumerate(heard)):
            raise ValueError(f"{heard} is listened to of the sets of modalities, expected a part of each")
        self.calibration = table.to(self.head.weight.device)
        self._heard = [int(n) for n in heard]

    def heard(self, present: Sequence[str]) -> tuple[str, ...]:
        """What is listened to of the modalities that are present, in axis order; see `calibrate`."""
        return tuple(m for m, there in self._listened({m: m in present for m in MODALITIES}).items() if there)

    def _listened(self, presence: Mapping[str, Presence]) -> dict[str, Presence]:
        """`presence` without what is not listened to."""
        number = _number(presence)
        heard = self._heard[number] if isinstance(number, int) else self.calibration[number, 2].long()
        return {m: (heard >> _PLACES[m] & 1) == 1 for m in MODALITIES}

    def _of_all(self, weights: Tensor) -> Tensor:
        """Weights [b, streams] as those of all three modalities [b, 3]."""
        if len(self.streams) == len(MODALITIES):
            return weights
        none = torch.zeros_like(weights[:, 0])
        columns = dict(zip(self.streams, weights.unbind(dim=1), strict=True))
        return torch.stack([columns.get(m, none) for m in MODALITIES], dim=1)

    # --- checks -----------------------------------------------------------------------------------------------------

    def _check(self, features: Mapping[str, Tensor], lengths: Mapping[str, Tensor]) -> None:
        if not features:
            raise InputError(f"no modality is present: at least one of {', '.join(MODALITIES)} is needed")
        batch = None
        for m, x in features.items():
            if m not in MODALITIES:
                raise unknown_name("modality", m, MODALITIES)
            expected = self.config.modality(m).features
            if m == "text" and self.text_encoder is not None and not x.is_floating_point():
                if x.dtype != torch.int64 or x.dim() != 3 or x.shape[1] != 3 or x.shape[2] < 1:
                    raise InputError(
                        f"text tokens are {x.dtype} {list(x.shape)}, expected torch.int64 [batch, 3, time >= 1]"
                    )
            elif x.dim() != 3 or x.shape[2] != expected or x.shape[1] < 1:
                raise InputError(f"{m} has shape {list(x.shape)}, expected [batch, time, {expected}] with time >= 1")
            batch = x.shape[0] if batch is None else batch
            if m not in lengths:
                raise InputError(f"{m} has no length: lengths holds {', '.join(lengths) or 'nothing'}")
            if x.shape[0] != batch or lengths[m].shape != (batch,):
                raise InputError(
                    f"{m} has batch {x.shape[0]} and lengths {list(lengths[m].shape)}, expected batch {batch}"
                )

    @staticmethod
    def _presence_tensor(presence: Mapping[str, Presence], like: Tensor) -> Tensor:
        return torch.stack([_expand(presence[m], like.shape[0], like) for m in MODALITIES], dim=1)


def _number(presence: Mapping[str, Presence]) -> int | Tensor:
    """`Variant.number` of what is there: of each sample, or of all where no sample lacks what another has."""
    number: int | Tensor = 0
    for m, place in _PLACES.items():
        there = presence[m]
        number = number + ((there.long() if isinstance(there, Tensor) else int(there)) << place)
    return number


def _local(config: ModelConfig) -> nn.Module:
    return CNNBlock(config.width, config.dropout) if config.cnn else Skip()


def _context(config: ModelConfig) -> nn.Module:
    return BiMambaBlock(config.width, config.states, config.expand, config.conv_width) if config.mamba else Skip()


def _expand(presence: Presence, batch: int, like: Tensor) -> Tensor:
    """`presence` as a boolean tensor [batch]."""
    if isinstance(presence, Tensor):
        return presence
    return torch.full((batch,), presence, dtype=torch.bool, device=like.device)


def _any(presence: list[Presence]) -> Presence:
    if any(p is True for p in presence):
        return True
    tensors = [p for p in presence if isinstance(p, Tensor)]
    return torch.stack(tensors).any(dim=0) if tensors else False


def _choose(condition: Presence, yes: Callable[[], Tensor], no: Callable[[], Tensor]) -> Tensor:
    """`yes()` where the condition holds, else `no()`; a branch that no sample takes is not built."""
    if condition is True:
        return yes()
    if condition is False:
        return no()
    chosen = yes()
    return torch.where(condition.view(-1, *[1] * (chosen.dim() - 1)), chosen, no())


def _unit(x: Tensor) -> Tensor:
    x = widened(x)
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-6)
