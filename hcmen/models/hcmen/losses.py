"""HCMEN's own training losses: alignment of tokens across modalities, polarity as a second task.

Glossary (batch b, tokens n, width d)
    X   [b, n, d]   source tokens, which learn
    Y   [b, n, d]   target tokens, of the clean view and detached: they only say where to go
    W   [d, d]      learned bilinear form, the identity at first

The alignment loss is an InfoNCE bound on mutual information (arXiv 1807.03748) between token sets, in the fine-grained
form of FMFN, where a sample pair is scored by its matching tokens. Ours differs on purpose: both directions instead of
one, one temperature (CLIP's 0.07) for tokens and samples instead of 0.01 and a raw factor, no token-by-token weight
matrices, and samples for which a side is wholly absent take no part.

Everything here that learns lives in `AlignmentLoss` and `PolarityLoss`, outside the model: no export can reach it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hcmen.base.modalities import MODALITIES
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import Outputs

__all__ = ["AlignmentLoss", "PolarityLoss", "decoupled_cross_entropy", "polarity", "token_info_nce"]

TEMPERATURE = 0.07


class AlignmentLoss(nn.Module):
    """Pulls the tokens of one sample together across modalities, away from those of other samples.

    Source, from the corrupted view      Target, from the clean view      Taught
    P_m, for every modality m            H_m                              a proxy stands in for what is missing
    H_audio, H_vision                    H_text                           modalities share one token space
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = min(config.alignment_tokens, config.tokens)
        there = config.inputs.modalities
        proxied = there if config.proxies and len(there) > 1 else ()
        aligned = [m for m in ("audio", "vision") if m in there and "text" in there]
        self.pairs = [("proxy", m, m) for m in proxied] + [("tokens", m, "text") for m in aligned]
        self.forms = nn.ParameterDict(
            {f"{kind}_{m}": nn.Parameter(torch.eye(config.width)) for kind, m, _ in self.pairs}
        )

    def forward(self, clean: Outputs, corrupted: Outputs) -> Tensor:
        """The mean over the pairs above that at least two samples of the batch have; 0 if there is none."""
        losses = []
        for kind, m, target in self.pairs:
            source = (corrupted.proxies if kind == "proxy" else corrupted.tokens).get(m)
            if source is None or target not in clean.tokens:
                continue
            rows = _has_source(kind, m, corrupted.present) & clean.present[:, MODALITIES.index(target)]
            # With a single sample there is nothing to tell it from: its loss is zero whatever the tokens are.
            if int(rows.sum()) < 2:
                continue
            losses.append(
                token_info_nce(
                    self._pool(source[rows]), self._pool(clean.tokens[target][rows]), self.forms[f"{kind}_{m}"]
                )
            )
        return torch.stack(losses).mean() if losses else clean.score.new_zeros(())

    def _pool(self, x: Tensor) -> Tensor:
        """[b, L, d] -> [b, n, d], means of neighbouring tokens: the cost of the loss is quadratic in n."""
        return F.adaptive_avg_pool1d(x.transpose(1, 2), self.tokens).transpose(1, 2)


def _has_source(kind: str, m: str, present: Tensor) -> Tensor:
    """Per sample, whether the tokens of `m` are there; a proxy is there if a modality to make it from is."""
    columns = [i for i, other in enumerate(MODALITIES) if (other == m) == (kind == "tokens")]
    return present[:, columns].any(dim=1)


def token_info_nce(source: Tensor, target: Tensor, form: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Symmetric InfoNCE between token sets; no gradient reaches `target`.

    Tokens are scaled to unit length; G[a, i, b, j] = x_ai^T W y_bj. From X to Y, every source token collects G over the
    target tokens of sample b with weights softmax_j(G / temperature), and the sample's score collects these over i in
    the same way: the best matches decide. From Y to X the roles are exchanged. Each direction is the cross-entropy of
    picking the own sample among the batch from scores / temperature; the loss is their mean.

    Args:
        source, target: [b, n, d], row a of both is one sample. form: [d, d].
        temperature: below 1 sharpens both choices.

    Returns:
        A scalar, about log(b) for tokens that do not match.
    """
    x, y = F.normalize(source, dim=-1), F.normalize(target.detach(), dim=-1)
    similarity = torch.einsum("aid,bjd->abij", x @ form, y)
    forward = _soft_max(_soft_max(similarity, temperature), temperature)
    backward = _soft_max(_soft_max(similarity.transpose(2, 3), temperature), temperature)
    own = torch.arange(len(x), device=x.device)
    return 0.5 * (F.cross_entropy(forward / temperature, own) + F.cross_entropy(backward.T / temperature, own))


def _soft_max(x: Tensor, temperature: float) -> Tensor:
    """Mean over the last axis, weighted towards the largest entries."""
    return (x * (x / temperature).softmax(dim=-1)).sum(dim=-1)


class PolarityLoss(nn.Module):
    """An auxiliary head that tells negative, neutral and positive apart, from what the score is made of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head = nn.Linear(config.width, 3)

    def forward(self, clean: Outputs, corrupted: Outputs, labels: Tensor) -> Tensor:
        """Cross-entropy of the label's polarity in nats, averaged over both views."""
        classes = polarity(labels)
        return 0.5 * sum(F.cross_entropy(self.head(view.pooled), classes) for view in (clean, corrupted))

    def mixed(self, mixed: Outputs, class_weights: Tensor, decoupled_weight: float) -> Tensor:
        """Decoupled Mixup (arXiv 2203.10761): mixed cross-entropy + decoupled_weight * the decoupled term.

        Args:
            mixed: the model's outputs for k mixtures.
            class_weights: [k, 3], what share of each mixture's label each polarity has; rows sum to one.
            decoupled_weight: eta of the paper.
        """
        logits = self.head(mixed.pooled)
        both = F.cross_entropy(logits, class_weights)
        return both + decoupled_weight * decoupled_cross_entropy(logits, class_weights)


def polarity(labels: Tensor) -> Tensor:
    """Class of each label: 0 negative, 1 neutral (exactly zero), 2 positive."""
    return torch.sign(labels).long() + 1


def decoupled_cross_entropy(logits: Tensor, class_weights: Tensor) -> Tensor:
    """Cross-entropy of the class that dominates a mixture, its partners' classes taken out of the softmax.

    A confident choice of the dominant class is thus not held against its partner. Mixtures within one class have no
    partner, those without a class above one half no dominant class: they take no part. With every sample's share,
    rather than a pair's lambda, the rule also covers mixtures of more than two.

    Args:
        logits: [k, c]. class_weights: [k, c], rows sum to one.

    Returns:
        A scalar, the mean over the mixtures that take part; 0 if there are none.
    """
    share, dominant = class_weights.max(dim=1)
    own = F.one_hot(dominant, logits.shape[1]).bool()
    partners = (class_weights > 0) & ~own
    rows = (share > 0.5) & partners.any(dim=1)
    if not bool(rows.any()):
        return logits.new_zeros(())
    return F.cross_entropy(logits.masked_fill(partners, -torch.inf)[rows], dominant[rows])
