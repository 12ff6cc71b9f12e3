"""Mixing: lambdas and labels by hand, plans against loops in float64, absence, determinism, nothing exported."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.micro import MICRO

from hcmen.base.modalities import MODALITIES, variant_named
from hcmen.data import MultimodalDataset
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.export.variants import export_variant
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.mixing import Manifold, Mixture, Mixup, MSMix, Plan, Samples, make_mixing, mix
from hcmen.training.command import load_checkpoint
from hcmen.training.config import MIXES, TrainConfig
from hcmen.training.trainer import Trainer

TRAIN = TrainConfig(epochs=2, batch_size=10)
METHODS = [name for name in MIXES if name != "none"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> MultimodalDataset:
    return dataset_from_mmsa(make_synthetic(MICRO.inputs, (24, 12, 12)), "synthetic", MICRO.inputs)


def tokens(batch: int, seed: int = 0, absent: float = 0.0) -> Samples:
    """Random tokens in float64; each modality missing with probability `absent`, never all of a sample."""
    rng = np.random.default_rng(seed)
    present = rng.random((batch, 3)) >= absent
    present[~present.any(axis=1), rng.integers(3)] = True
    values = {m: torch.from_numpy(rng.standard_normal((batch, 4, 8))) for m in MODALITIES}
    return Samples(values, torch.from_numpy(present), torch.from_numpy(rng.uniform(-3, 3, batch)))


def clips(batch: int, seed: int = 0, absent: float = 0.0) -> Samples:
    """Ragged features, zero padded, of as many steps as the longest."""
    base, rng = tokens(batch, seed, absent), np.random.default_rng(seed)
    values, lengths = {}, {}
    for m in MODALITIES:
        length = rng.integers(1, 12, batch)
        x = rng.standard_normal((batch, length.max(), 5))
        x[np.arange(length.max()) >= length[:, None]] = 0.0
        values[m], lengths[m] = torch.from_numpy(x), torch.from_numpy(length)
    return Samples(values, base.present, base.labels, lengths)


def method(name: str, **changes) -> torch.nn.Module:
    torch.manual_seed(0)
    train = dataclasses.replace(TRAIN, **{"mix": name, "powmix_probability": 1.0, **changes})
    made = make_mixing(MICRO, train.mixing)
    assert made is not None
    return made.double()


def samples_for(made: torch.nn.Module, batch: int, seed: int = 0, absent: float = 0.0) -> Samples:
    return (clips if made.of_features else tokens)(batch, seed, absent)


def mixed_by_loops(plan: Plan, samples: Samples) -> list[dict]:
    """What `mix` promises, one mixture and one modality at a time."""
    result = []
    for rows, shares in zip(plan.rows.tolist(), plan.shares.tolist(), strict=True):
        has = [i for i in range(3) if all(bool(samples.present[r, i]) for r in rows)]
        if not has:
            continue
        label_shares = [sum(shares[n][i] for i in has) / len(has) for n in range(len(rows))]
        one = {
            "present": [i in has for i in range(3)],
            "label": sum(w * float(samples.labels[r]) for w, r in zip(label_shares, rows, strict=True)),
            "label_shares": label_shares,
        }
        for i, m in enumerate(MODALITIES):
            x = samples.values[m].numpy()
            one[m] = sum(shares[n][i] * x[r] for n, r in enumerate(rows)) if i in has else np.zeros_like(x[0])
            if samples.lengths is not None:
                one[f"{m}_length"] = max(int(samples.lengths[m][r]) for r in rows)
        result.append(one)
    return result


# --- carrying a plan out ----------------------------------------------------------------------------------------------


def test_a_mixture_by_hand() -> None:
    """Two samples that share text and audio, shares 0.7 and 0.2: the label has 0.45 of the first."""
    present = torch.tensor([[True, True, True], [True, True, False]])
    values = {m: torch.tensor([[[1.0]], [[3.0]]]) for m in MODALITIES}
    plan = Plan(torch.tensor([[0, 1]]), torch.tensor([[[0.7, 0.2, 0.9], [0.3, 0.8, 0.1]]]))
    found = mix(plan, Samples(values, present, torch.tensor([2.0, -1.0])))
    assert found is not None
    assert found.values["text"].item() == pytest.approx(0.7 * 1 + 0.3 * 3)
    assert found.values["audio"].item() == pytest.approx(0.2 * 1 + 0.8 * 3)
    assert found.values["vision"].item() == 0.0
    assert found.present.tolist() == [[True, True, False]]
    assert found.label_shares[0].tolist() == pytest.approx([0.45, 0.55])
    assert found.labels.item() == pytest.approx(0.45 * 2 - 0.55)


@pytest.mark.parametrize("make", [tokens, clips])
@pytest.mark.parametrize("parts", [2, 3, 5])
def test_mix_equals_loops(make, parts: int) -> None:
    samples, rng = make(7, parts, 0.4), np.random.default_rng(parts)
    rows = torch.from_numpy(rng.integers(0, 7, (40, parts)))
    plan = Plan(rows, torch.from_numpy(rng.dirichlet(np.ones(parts), (40, 3))).transpose(1, 2))
    expected = mixed_by_loops(plan, samples)
    assert 0 < len(expected) < 40, "some mixtures have no modality, some do"
    found = mix(plan, samples)
    assert found is not None
    assert len(found.labels) == len(expected)
    for k, one in enumerate(expected):
        assert found.present[k].tolist() == one["present"]
        assert float(found.labels[k]) == pytest.approx(one["label"], rel=1e-12, abs=1e-14)
        np.testing.assert_allclose(found.label_shares[k], one["label_shares"], rtol=1e-12)
        for m in MODALITIES:
            np.testing.assert_allclose(found.values[m][k], one[m], rtol=1e-12, atol=1e-14)
            if samples.lengths is not None:
                assert found.lengths is not None
                assert int(found.lengths[m][k]) == one[f"{m}_length"]


def test_nothing_in_common_makes_no_mixture() -> None:
    samples = tokens(2)._replace(present=torch.tensor([[True, False, False], [False, True, True]]))
    assert mix(Plan(torch.tensor([[0, 1]]), torch.full((1, 2, 3), 0.5)), samples) is None
    for name in METHODS:
        made = method(name)
        x = samples_for(made, 2)._replace(present=samples.present)
        for seed in range(20):
            found = made(x, np.random.default_rng(seed))
            # A permutation may leave both samples in place; they are then mixed with themselves alone.
            assert found is None or (found.rows[:, 0] == found.rows[:, 1]).all()


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_modality_is_never_read(name: str) -> None:
    made = method(name)
    samples = samples_for(made, 9, 1, 0.4)
    changed = samples._replace(
        values={
            m: torch.where(samples.present[:, i, None, None], x, x + 1e3)
            for i, (m, x) in enumerate(samples.values.items())
        }
    )
    before, after = (made(s, np.random.default_rng(0)) for s in (samples, changed))
    assert before is not None
    assert after is not None
    assert torch.equal(before.labels, after.labels)
    assert all(torch.equal(before.values[m], after.values[m]) for m in MODALITIES)


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_of_one_is_not_mixed(name: str) -> None:
    made = method(name)
    samples = samples_for(made, 1)
    assert made(samples, np.random.default_rng(0)) is None
    assert float(made.teach(samples)) == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_draws_are_those_of_the_generator(name: str) -> None:
    made = method(name)
    samples = samples_for(made, 8)
    state = torch.random.get_rng_state()
    first, again, other = (made(samples, np.random.default_rng(seed)) for seed in ((4, 0, 1, 2), (4, 0, 1, 2), 5))
    assert torch.equal(state, torch.random.get_rng_state())
    assert torch.equal(first.labels, again.labels)
    assert all(torch.equal(first.values[m], again.values[m]) for m in MODALITIES)
    assert first.labels.shape != other.labels.shape or not torch.equal(first.labels, other.labels)


# --- the methods ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Mixup, Manifold])
def test_mixup_is_one_permutation_and_one_lambda(kind) -> None:
    made = kind(dataclasses.replace(TRAIN, mix_alpha=0.7).mixing)
    samples = samples_for(made, 11)
    plan = made.plan(samples, np.random.default_rng(3))
    generator = np.random.default_rng(3)
    partner, share = generator.permutation(11), generator.beta(0.7, 0.7)
    assert plan.rows[:, 0].tolist() == list(range(11))
    assert plan.rows[:, 1].tolist() == partner.tolist()
    assert (plan.shares[:, 0] == share).all()
    assert (plan.shares[:, 1] == 1 - share).all()
    found = made(samples, np.random.default_rng(3))
    y = samples.labels.numpy()
    np.testing.assert_allclose(found.labels, share * y + (1 - share) * y[partner], rtol=1e-12)


def test_mixup_is_as_long_as_the_longer_and_goes_on_over_zeros() -> None:
    values = {m: torch.tensor([[[1.0], [1.0], [1.0]], [[5.0], [0.0], [0.0]]]) for m in MODALITIES}
    lengths = {m: torch.tensor([3, 1]) for m in MODALITIES}
    samples = Samples(values, torch.ones(2, 3, dtype=torch.bool), torch.tensor([1.0, 2.0]), lengths)
    found = mix(Plan(torch.tensor([[0, 1]]), torch.tensor([0.25, 0.75]).view(1, 2, 1).expand(1, 2, 3)), samples)
    assert found.values["audio"].flatten().tolist() == [0.25 * 1 + 0.75 * 5, 0.25, 0.25]
    assert found.lengths["audio"].tolist() == [3]


def test_powmix_shares_are_dirichlet_and_differ_between_modalities() -> None:
    made = method("powmix", powmix_parts=4, mix_alpha=0.8, powmix_ratio=2.0)
    samples = tokens(9)
    counts = set()
    shares = []
    for seed in range(400):
        plan = made.plan(samples, np.random.default_rng(seed))
        counts.add(len(plan.rows))
        assert all(len(set(row)) == 4 for row in plan.rows.tolist())
        torch.testing.assert_close(plan.shares.sum(dim=1), torch.ones(len(plan.rows), 3).double())
        assert (plan.shares >= 0).all()
        shares.append(plan.shares[:, 0])
    assert counts == set(range(1, 19)), "as many as twice the batch"
    drawn = torch.cat(shares).numpy()
    # Of Dirichlet(a, a, a, a): mean 1/4, variance (1/4)(3/4) / (4 a + 1); modalities independent.
    assert drawn.mean() == pytest.approx(0.25, abs=0.01)
    assert drawn.var() == pytest.approx(0.1875 / (4 * 0.8 + 1), rel=0.05)
    assert abs(np.corrcoef(drawn.T) - np.eye(3)).max() < 0.06


def test_powmix_is_on_at_its_probability_and_takes_small_batches() -> None:
    made = method("powmix", powmix_probability=0.3)
    on = [made.plan(tokens(4), np.random.default_rng((9, seed))) is not None for seed in range(2000)]
    assert np.mean(on) == pytest.approx(0.3, abs=0.04)
    assert method("powmix", powmix_parts=3).plan(tokens(2), np.random.default_rng(0)).rows.shape[1] == 2


# --- ms-mix -----------------------------------------------------------------------------------------------------------


def similarity_by_loops(samples: Samples, same_sign: bool) -> dict[tuple[int, int], float]:
    """{(i, j): mean cosine over shared modalities} for the ordered pairs that may be mixed."""
    result = {}
    for i, j in itertools.permutations(range(len(samples.labels)), 2):
        found = []
        for c, m in enumerate(MODALITIES):
            if samples.present[i, c] and samples.present[j, c]:
                a, b = (samples.values[m][k].numpy().mean(axis=0) for k in (i, j))
                found.append(float(a @ b / math.sqrt((a @ a) * (b @ b))))
        opposite = float(samples.labels[i]) * float(samples.labels[j]) < 0
        if found and not (same_sign and opposite):
            result[i, j] = sum(found) / len(found)
    return result


@pytest.mark.parametrize("same_sign", [False, True])
@pytest.mark.parametrize("absent", [0.0, 0.5])
def test_similarity_equals_loops(same_sign: bool, absent: float) -> None:
    made, samples = method("ms-mix", mix_same_sign=same_sign), tokens(9, 2, absent)
    expected = similarity_by_loops(samples, same_sign)
    found, comparable = made.similarity(samples)
    assert {tuple(pair) for pair in comparable.nonzero().tolist()} == set(expected)
    assert torch.equal(found, found.T)  # or a threshold would hold for one order of a pair alone
    for pair, value in expected.items():
        assert float(found[pair]) == pytest.approx(value, rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("threshold", [0.0, 0.4, 0.7, 0.95, 1.0])
@pytest.mark.parametrize("same_sign", [False, True])
def test_pairs_are_candidates_and_else_the_most_similar(threshold: float, same_sign: bool) -> None:
    made = method("ms-mix", mix_similarity=threshold, mix_same_sign=same_sign)
    for seed in range(30):
        samples = tokens(7, seed, 0.5)
        allowed = similarity_by_loops(samples, same_sign)
        plan = made.plan(samples, np.random.default_rng(seed))
        low, high = min(allowed.values()), max(allowed.values())
        candidates = {pair for pair, s in allowed.items() if (s - low) / (high - low) > threshold}
        if len(candidates) < 7:
            upper = sorted((pair for pair in allowed if pair[0] < pair[1]), key=lambda pair: -allowed[pair])
            candidates = set(upper[:14])
        pairs = [tuple(row) for row in plan.rows.tolist()]
        assert set(pairs) <= candidates
        assert len(set(pairs)) == len(pairs) == min(7, len(candidates))


def test_alike_samples_have_no_range_to_scale_by() -> None:
    samples = tokens(3)
    same = samples._replace(values={m: x[:1].expand(3, -1, -1) for m, x in samples.values.items()})
    plan = method("ms-mix").plan(same, np.random.default_rng(0))
    assert sorted(plan.rows.tolist()) == [[0, 1], [0, 2], [1, 2]]


def test_lambda_by_hand() -> None:
    """|I| of 2 and 1: the first weighs 2/3; with a draw of 0.4 the lambda is their mean."""
    made, samples = method("ms-mix"), tokens(2)
    made.intensity = lambda m, _: torch.tensor({"text": [-2.0, 1.0], "audio": [0.0, 0.0], "vision": [0.0, 3.0]}[m])
    found = made.shares(samples, torch.tensor([[0, 1], [1, 0]]), torch.tensor([0.4, 0.4]).double())
    expected = [[(0.4 + 2 / 3) / 2, 0.45, 0.2], [(0.4 + 1 / 3) / 2, 0.45, 0.7]]
    np.testing.assert_allclose(found, expected, rtol=2e-6)


@pytest.mark.parametrize("limit", [1.0, 3.0])
def test_lambda_is_always_a_share(limit: float) -> None:
    made, rng = method("ms-mix"), np.random.default_rng(0)
    samples = tokens(64)
    hostile = [0.0, -0.0, limit, -limit, 1e-300, -1e-300, 1e-6, np.nextafter(limit, 0)]
    for _ in range(200):
        drawn = {
            m: torch.from_numpy(np.where(rng.random(64) < 0.5, rng.choice(hostile, 64), rng.uniform(-limit, limit, 64)))
            for m in MODALITIES
        }
        made.intensity = lambda m, _, drawn=drawn: drawn[m]
        pairs = torch.from_numpy(rng.integers(0, 64, (64, 2)))
        base = torch.from_numpy(rng.choice([0.0, 1.0, *rng.random(5)], 64))
        found = made.shares(samples, pairs, base)
        assert bool(((found >= 0) & (found <= 1)).all())


@pytest.mark.parametrize("name", METHODS)
def test_shares_and_labels_stay_within_what_they_are_made_of(name: str) -> None:
    made = method(name, mix_alpha=0.05)
    for seed in range(60):
        samples = samples_for(made, 8, seed, 0.3)
        found = made(samples, np.random.default_rng(seed))
        if found is None:
            continue
        assert bool((found.label_shares >= 0).all())
        torch.testing.assert_close(found.label_shares.sum(dim=1), torch.ones(len(found.labels)).double())
        parts = samples.labels[found.rows]
        assert bool((found.labels >= parts.amin(dim=1) - 1e-12).all())
        assert bool((found.labels <= parts.amax(dim=1) + 1e-12).all())
        assert bool(found.present.any(dim=1).all())


def test_an_intensity_sees_no_other_sample() -> None:
    made, samples = method("ms-mix"), tokens(5)
    for m in MODALITIES:
        before = made.intensity(m, samples)
        assert float(before.detach().std()) > 1e-3
        assert bool((before.abs() < 3).all())
        for k in range(5):
            x = samples.values[m].clone()
            x[k] = -7.0 * x[k] + 1.0
            after = made.intensity(m, samples._replace(values={**samples.values, m: x}))
            assert [j for j in range(5) if float(before[j].detach()) != float(after[j].detach())] == [k]


@pytest.mark.parametrize(("label_min", "label_max", "limit"), [(-3.0, 3.0, 3.0), (-1.0, 1.0, 1.0), (-1.0, 2.0, 2.0)])
def test_intensities_have_the_label_range(label_min: float, label_max: float, limit: float) -> None:
    torch.manual_seed(0)
    made = MSMix(dataclasses.replace(MICRO, label_min=label_min, label_max=label_max), TRAIN.mixing).double()
    assert made.limit == limit
    samples = tokens(50)
    with torch.no_grad():
        for predictor in made.predictors.values():
            predictor.out.weight.mul_(1e3)
        found = torch.cat([made.intensity(m, samples) for m in MODALITIES])
    assert 0.99 * limit < float(found.abs().max()) <= limit


@pytest.mark.parametrize("absent", [0.0, 0.6])
def test_intensity_loss_equals_loops(absent: float) -> None:
    made, samples = method("ms-mix"), tokens(6, 4, absent)
    losses = []
    for c, m in enumerate(MODALITIES):
        rows = [i for i in range(6) if samples.present[i, c]]
        assert len(rows) >= 2
        y = np.exp([abs(float(samples.labels[i])) / 3 for i in rows])
        found = made.intensity(m, samples).detach().numpy()
        intensity = np.exp([abs(found[i]) / 3 for i in rows])
        y, intensity = y / y.sum(), intensity / intensity.sum()
        losses.append(sum(p * math.log(p / q) for p, q in zip(y, intensity, strict=True)))
    assert made.teach(samples).item() == pytest.approx(np.mean(losses), rel=1e-10)


def test_intensities_can_be_learned() -> None:
    """Descending on the loss makes |I| rise and fall with |y|."""
    made, samples = method("ms-mix"), tokens(16)
    optimiser = torch.optim.Adam(made.parameters(), lr=3e-2)
    for _ in range(150):
        optimiser.zero_grad()
        made.teach(samples).backward()
        optimiser.step()
    for m in MODALITIES:
        found = made.intensity(m, samples).abs().detach()
        assert np.corrcoef(found, samples.labels.abs())[0, 1] > 0.9


def test_gradients_are_finite_and_reach_predictors_and_tokens() -> None:
    made = method("ms-mix")
    samples = tokens(7, 0, 0.3)
    values = {m: x.clone().requires_grad_() for m, x in samples.values.items()}
    made.teach(samples._replace(values=values)).backward()
    for x in (*made.parameters(), *values.values()):
        assert x.grad is not None
        assert bool(torch.isfinite(x.grad).all())
        assert float(x.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", METHODS)
def test_mixtures_pass_gradients_on_to_what_they_are_made_of(name: str) -> None:
    made = method(name)
    samples = samples_for(made, 6)
    values = {m: x.clone().requires_grad_() for m, x in samples.values.items()}
    found: Mixture = made(samples._replace(values=values), np.random.default_rng(0))
    sum(x.square().sum() for x in found.values.values()).backward()
    for x in values.values():
        touched = x.grad.abs().sum(dim=(1, 2)) > 0
        assert set(touched.nonzero()[:, 0].tolist()) == set(found.rows.flatten().tolist())


# --- in training ------------------------------------------------------------------------------------------------------


def numbers(folder: Path) -> tuple[bytes, dict[str, bytes], list[dict]]:
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    state = safetensors.torch.load((folder / "last.safetensors").read_bytes())
    return (
        (folder / "checkpoint.safetensors").read_bytes(),
        {name: x.numpy().tobytes() for name, x in state.items()},
        [{k: v for k, v in record.items() if k != "seconds"} for record in log],
    )


@pytest.mark.parametrize(("name", "aux"), [*((name, "none") for name in METHODS), ("powmix", "polarity")])
def test_a_resumed_run_is_the_same_bit_for_bit(name: str, aux: str, tmp_path: Path, dataset: MultimodalDataset) -> None:
    train = dataclasses.replace(TRAIN, epochs=3, mix=name, aux=aux)
    whole = Trainer(MICRO, train, dataset, tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    whole.run()
    (tmp_path / "broken").mkdir()

    class Stop(Exception):
        pass

    def stop(progress) -> None:
        if (progress.epoch, progress.step) == (2, 2):
            raise Stop

    with pytest.raises(Stop):
        Trainer(MICRO, train, dataset, tmp_path / "broken").run(stop)
    again = Trainer(MICRO, train, dataset, tmp_path / "broken")
    again.resume()
    assert len(again.history) == 1
    again.run()
    assert numbers(tmp_path / "broken") == numbers(tmp_path / "whole")
    assert any(record["mix_loss"] > 0 for record in whole.history)


@pytest.mark.parametrize("name", METHODS)
def test_the_checkpoint_is_that_of_a_plain_model(name: str, tmp_path: Path, dataset: MultimodalDataset) -> None:
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, mix=name, aux="polarity"), dataset, tmp_path)
    before = {key: p.detach().clone() for key, p in trainer._parameters.items()}
    trainer.run()
    saved = safetensors.torch.load((tmp_path / "checkpoint.safetensors").read_bytes())
    assert saved.keys() == HCMEN(MICRO).state_dict().keys()
    state = safetensors.torch.load((tmp_path / "last.safetensors").read_bytes())
    learned = [key for key in before if key.startswith(("mixing/", "polarity/"))]
    assert {key.split("/")[0] for key in learned} == ({"mixing", "polarity"} if name == "ms-mix" else {"polarity"})
    for key in learned:
        assert not torch.equal(state[key], before[key]), f"{key} was not trained"
    record = trainer.history[0]
    weights = {
        "task_loss": 1.0,
        "alignment_loss": 0.01,
        "mix_loss": 0.7,
        "intensity_loss": 0.5,
        "polarity_loss": 0.1,
        "polarity_mix_loss": 0.07,
    }
    assert record["loss"] == pytest.approx(sum(w * record[term] for term, w in weights.items()), rel=1e-4)
    assert (record["intensity_loss"] > 0) == (name == "ms-mix")
    assert record["polarity_loss"] > 0


def test_an_exported_graph_knows_nothing_of_mixing(tmp_path: Path, dataset: MultimodalDataset) -> None:
    nodes, tensors = [], []
    for folder, changes in (("with", {"mix": "ms-mix", "aux": "polarity"}), ("without", {})):
        (tmp_path / folder).mkdir()
        Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, **changes), dataset, tmp_path / folder).run()
        graph = export_variant(load_checkpoint(tmp_path / folder)[0], variant_named("text_missing")).graph
        nodes.append([(n.op_type, n.domain, list(n.input), list(n.output)) for n in graph.node])
        tensors.append([(x.name, x.data_type, list(x.dims)) for x in graph.initializer])
    assert nodes[0] == nodes[1]
    assert tensors[0] == tensors[1]


def test_mixing_moves_the_weights_and_none_leaves_them(tmp_path: Path, dataset: MultimodalDataset) -> None:
    """Each method is another run; a method that mixes nothing (probability 0) is the run without."""
    found = {}
    for name, changes in (*((name, {}) for name in MIXES), ("off", {"mix": "powmix", "powmix_probability": 0.0})):
        (tmp_path / name).mkdir()
        train = dataclasses.replace(TRAIN, epochs=1, **{"mix": name, **changes})
        Trainer(MICRO, train, dataset, tmp_path / name).run()
        found[name] = (tmp_path / name / "checkpoint.safetensors").read_bytes()
    assert found["off"] == found["none"]
    assert len(set(found.values())) == len(MIXES)


def test_a_last_batch_of_one_trains_on(tmp_path: Path, dataset: MultimodalDataset) -> None:
    for name in METHODS:
        train = dataclasses.replace(TRAIN, epochs=1, batch_size=23, mix=name, aux="polarity")
        trainer = Trainer(MICRO, train, dataset, tmp_path)
        trainer.run()
        assert math.isfinite(trainer.history[0]["loss"])
