"""hcmen.models.hcmen.losses against loops in float64."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.losses import (
    TEMPERATURE,
    AlignmentLoss,
    PolarityLoss,
    decoupled_cross_entropy,
    polarity,
    token_info_nce,
)
from hcmen.models.hcmen.model import Outputs
from hcmen.models.objective import task_loss

CONFIG = ModelConfig(
    FeatureConfig(4, 8),
    FeatureConfig(3, 8),
    FeatureConfig(3, 8),
    width=6,
    tokens=8,
    states=2,
    expand=1,
    alignment_tokens=4,
)


def soft_max(values: list[float], temperature: float) -> float:
    top = max(values)
    weights = [math.exp((v - top) / temperature) for v in values]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def info_nce_by_loops(x: np.ndarray, y: np.ndarray, form: np.ndarray, temperature: float) -> float:
    """The formula of `token_info_nce`, one number at a time."""
    batch, n, _ = x.shape
    x = x / np.linalg.norm(x, axis=-1, keepdims=True)
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    g = lambda a, i, b, j: float(x[a, i] @ form @ y[b, j])  # noqa: E731
    towards_y = [
        [
            soft_max([soft_max([g(a, i, b, j) for j in range(n)], temperature) for i in range(n)], temperature)
            for b in range(batch)
        ]
        for a in range(batch)
    ]
    towards_x = [
        [
            soft_max([soft_max([g(a, i, b, j) for i in range(n)], temperature) for j in range(n)], temperature)
            for a in range(batch)
        ]
        for b in range(batch)
    ]
    total = 0.0
    for scores in (towards_y, towards_x):
        for own, row in enumerate(scores):
            logits = [s / temperature for s in row]
            top = max(logits)
            total += top + math.log(sum(math.exp(v - top) for v in logits)) - logits[own]
    return total / (2 * batch)


@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 1, 2), (2, 1, 3), (3, 4, 5), (7, 3, 6)])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_info_nce_equals_loops(batch: int, tokens: int, width: int, temperature: float) -> None:
    generator = np.random.default_rng(batch)
    x, y = generator.standard_normal((2, batch, tokens, width))
    form = np.eye(width) + 0.3 * generator.standard_normal((width, width))
    found = token_info_nce(*(torch.from_numpy(a) for a in (x, y, form)), temperature)
    assert float(found) == pytest.approx(info_nce_by_loops(x, y, form, temperature), rel=1e-10, abs=1e-12)


def test_info_nce_is_not_symmetric_in_a_skewed_form() -> None:
    """The oracle tells W from its transpose, so the loss has W on the right side."""
    generator = np.random.default_rng(0)
    x, y = generator.standard_normal((2, 4, 3, 5))
    form = generator.standard_normal((5, 5))
    assert abs(info_nce_by_loops(x, y, form, 0.07) - info_nce_by_loops(x, y, form.T, 0.07)) > 0.01


def test_matching_tokens_have_a_low_loss_and_others_log_batch() -> None:
    x = torch.eye(6)[:, None].double()
    assert float(token_info_nce(x, x, torch.eye(6).double())) < 1e-4
    same = torch.ones(6, 2, 6).double()
    assert float(token_info_nce(same, same, torch.eye(6).double())) == pytest.approx(math.log(6))


def outputs(batch: int, seed: int, present: list[list[bool]] | None = None) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> dict[str, torch.Tensor]:
        return {
            m: torch.randn(
                batch, CONFIG.tokens, CONFIG.width, generator=generator, dtype=torch.float64, requires_grad=True
            )
            for m in ("text", "audio", "vision")
        }

    there = torch.tensor(present) if present is not None else torch.ones(batch, 3, dtype=torch.bool)
    score = torch.randn(batch, generator=generator, dtype=torch.float64, requires_grad=True)
    return Outputs(score, torch.zeros(batch, 3), tokens(), tokens(), there, torch.zeros(batch, CONFIG.width))


def pool(x: torch.Tensor) -> np.ndarray:
    batch, length, width = x.shape
    return x.detach().numpy().reshape(batch, 4, length // 4, width).mean(axis=2)


PRESENT = [
    [True, True, True],
    [True, True, True],
    [False, True, True],
    [True, False, False],
    [False, False, True],
]


def test_alignment_drops_pairs_with_an_absent_side() -> None:
    clean, corrupted = outputs(5, 0), outputs(5, 1, PRESENT)
    loss = AlignmentLoss(CONFIG).double()
    # A proxy needs a modality other than its own, tokens need their own.
    pairs = [
        (corrupted.proxies["text"], clean.tokens["text"], [0, 1, 2, 4]),
        (corrupted.proxies["audio"], clean.tokens["audio"], [0, 1, 2, 3, 4]),
        (corrupted.proxies["vision"], clean.tokens["vision"], [0, 1, 2, 3]),
        (corrupted.tokens["audio"], clean.tokens["text"], [0, 1, 2]),
        (corrupted.tokens["vision"], clean.tokens["text"], [0, 1, 2, 4]),
    ]
    expected = np.mean(
        [info_nce_by_loops(pool(x)[rows], pool(y)[rows], np.eye(6), TEMPERATURE) for x, y, rows in pairs]
    )
    assert loss(clean, corrupted).item() == pytest.approx(expected, rel=1e-10)


def test_an_absent_target_drops_the_pair() -> None:
    clean = outputs(4, 0, [[False, True, True]] * 3 + [[True, True, True]])
    corrupted = outputs(4, 1)
    pairs = [(corrupted.proxies[m], clean.tokens[m]) for m in ("audio", "vision")]
    expected = np.mean([info_nce_by_loops(pool(x), pool(y), np.eye(6), TEMPERATURE) for x, y in pairs])
    assert AlignmentLoss(CONFIG).double()(clean, corrupted).item() == pytest.approx(expected, rel=1e-10)


def test_absent_samples_do_not_move_the_loss() -> None:
    clean, corrupted = outputs(5, 0), outputs(5, 1, PRESENT)
    loss = AlignmentLoss(CONFIG).double()
    before = loss(clean, corrupted).item()
    with torch.no_grad():
        corrupted.tokens["audio"][3] += 7.0
        corrupted.tokens["audio"][4] -= 3.0
        corrupted.proxies["text"][3] *= -2.0
    assert loss(clean, corrupted).item() == before


def test_gradients_reach_sources_and_forms_and_never_targets() -> None:
    clean, corrupted = outputs(5, 0), outputs(5, 1, PRESENT)
    loss = AlignmentLoss(CONFIG).double()
    loss(clean, corrupted).backward()
    assert all(x.grad is None for x in (*clean.tokens.values(), *clean.proxies.values(), clean.score))
    # Text tokens of the corrupted view are no source; everything else learns, the forms included.
    assert corrupted.tokens["text"].grad is None
    for x in (corrupted.tokens["audio"], corrupted.tokens["vision"], *corrupted.proxies.values()):
        assert x.grad is not None
        assert float(x.grad.abs().sum()) > 0
    assert float(corrupted.tokens["audio"].grad[3].abs().sum()) == 0
    for form in loss.forms.values():
        assert float(form.grad.abs().sum()) > 0


@pytest.mark.parametrize("present", [None, [[True, False, False]]])
def test_a_batch_of_one_has_nothing_to_align(present: list[list[bool]] | None) -> None:
    found = AlignmentLoss(CONFIG).double()(outputs(1, 0), outputs(1, 1, present))
    assert float(found) == 0.0


def test_gradient_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(2, 3, 2, 4, generator=generator, dtype=torch.float64)
    form = torch.eye(4, dtype=torch.float64)
    x.requires_grad_()
    form.requires_grad_()
    assert torch.autograd.gradcheck(lambda a, w: token_info_nce(a, y, w), (x, form))


def test_task_loss_averages_both_views() -> None:
    clean, corrupted = outputs(3, 0), outputs(3, 1)
    labels = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    expected = np.mean([np.square(v.score.detach().numpy() - labels.numpy()).mean() for v in (clean, corrupted)])
    found = task_loss(clean, corrupted, labels)
    assert found.item() == pytest.approx(expected)
    found.backward()
    assert clean.score.grad is not None
    assert corrupted.score.grad is not None


def test_pooled_tokens_never_outnumber_the_tokens() -> None:
    few = ModelConfig(
        FeatureConfig(4, 8), FeatureConfig(3, 8), FeatureConfig(3, 8), width=6, tokens=2, alignment_tokens=8
    )
    assert AlignmentLoss(few).tokens == 2


def test_without_proxies_only_tokens_are_aligned() -> None:
    config = dataclasses.replace(CONFIG, proxies=False)
    loss = AlignmentLoss(config).double()
    assert set(loss.forms) == {"tokens_audio", "tokens_vision"}
    clean, corrupted = (outputs(4, seed)._replace(proxies={}) for seed in (0, 1))
    pairs = [(corrupted.tokens[m], clean.tokens["text"]) for m in ("audio", "vision")]
    expected = np.mean([info_nce_by_loops(pool(x), pool(y), np.eye(6), TEMPERATURE) for x, y in pairs])
    assert loss(clean, corrupted).item() == pytest.approx(expected, rel=1e-10)


def decoupled_by_loops(logits: np.ndarray, shares: np.ndarray) -> float:
    losses = []
    for z, w in zip(logits, shares, strict=True):
        dominant = [c for c in range(len(w)) if w[c] > 0.5]
        partners = [c for c in range(len(w)) if w[c] > 0 and c not in dominant]
        if dominant and partners:
            others = [c for c in range(len(w)) if c not in partners]
            losses.append(math.log(sum(math.exp(z[c]) for c in others)) - z[dominant[0]])
    return sum(losses) / len(losses) if losses else 0.0


def test_polarity_classes() -> None:
    assert polarity(torch.tensor([-3.0, -0.2, 0.0, -0.0, 0.1, 2.0])).tolist() == [0, 0, 1, 1, 2, 2]


def test_decoupled_term_by_hand() -> None:
    """Negative at 0.7 with positive: the softmax is over negative and neutral alone."""
    logits = torch.tensor([[1.0, 0.5, 9.0]])
    found = decoupled_cross_entropy(logits, torch.tensor([[0.7, 0.0, 0.3]]))
    assert float(found) == pytest.approx(math.log(math.exp(1.0) + math.exp(0.5)) - 1.0, rel=1e-6)


@pytest.mark.parametrize("shares", [[1.0, 0.0, 0.0], [0.5, 0.0, 0.5], [0.4, 0.3, 0.3]])
def test_one_class_and_no_dominant_class_are_skipped(shares: list[float]) -> None:
    logits = torch.tensor([[1.0, -2.0, 0.5]], requires_grad=True)
    assert float(decoupled_cross_entropy(logits, torch.tensor([shares]))) == 0.0
    more = torch.tensor([[0.3, 1.0, 2.0]])
    both = decoupled_cross_entropy(torch.cat([logits, more]), torch.tensor([shares, [0.1, 0.0, 0.9]]))
    assert float(both.detach()) == pytest.approx(math.log(math.exp(1.0) + math.exp(2.0)) - 2.0, rel=1e-6)


def test_mixed_polarity_equals_loops() -> None:
    generator = np.random.default_rng(0)
    shares = generator.dirichlet(np.full(3, 0.6), 30)
    shares[:10] = np.eye(3)[generator.integers(0, 3, 10)]
    shares[10:20, 1] = 0.0
    shares /= shares.sum(axis=1, keepdims=True)
    torch.manual_seed(0)
    loss = PolarityLoss(CONFIG).double()
    pooled = torch.from_numpy(generator.standard_normal((30, CONFIG.width))).requires_grad_()
    logits = loss.head(pooled).detach().numpy()
    log_softmax = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(shares * log_softmax).sum(axis=1).mean() + 0.3 * decoupled_by_loops(logits, shares)
    found = loss.mixed(outputs(30, 0)._replace(pooled=pooled), torch.from_numpy(shares), 0.3)
    assert found.item() == pytest.approx(expected, rel=1e-10)
    found.backward()
    for x in (pooled, *loss.parameters()):
        assert bool(torch.isfinite(x.grad).all())
        assert float(x.grad.abs().sum()) > 0


def test_polarity_loss_averages_both_views() -> None:
    generator = np.random.default_rng(1)
    labels = torch.tensor([1.0, -2.0, 0.0, 0.4], dtype=torch.float64)
    torch.manual_seed(0)
    loss = PolarityLoss(CONFIG).double()
    views = [
        outputs(4, seed)._replace(pooled=torch.from_numpy(generator.standard_normal((4, CONFIG.width))))
        for seed in (0, 1)
    ]
    terms = []
    for view in views:
        z = loss.head(view.pooled).detach().numpy()
        terms += [math.log(np.exp(z[i]).sum()) - z[i, c] for i, c in enumerate([2, 0, 1, 2])]
    assert loss(*views, labels).item() == pytest.approx(np.mean(terms), rel=1e-10)
