"""The missing-modality protocols: what they hide, for every setting, and that nothing but seed and index decides it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hcmen.base import metrics
from hcmen.base.errors import InputError
from hcmen.base.modalities import MODALITIES, VARIANTS
from hcmen.data import Split
from hcmen.data.protocols import PROTOCOLS, Protocol, Setting, apply_setting, batches, protocol_named
from hcmen.data.published import PUBLISHED, published_for, real_name

STEPS = {"text": 11, "audio": 23, "vision": 17}


def make_split(samples: int, padding: int = 0, seed: int = 0) -> Split:
    """Ragged samples without a zero in their valid steps; lengths of 1 and of the maximum are among them."""
    rng = np.random.default_rng(seed)
    lengths = {m: rng.integers(1, t + 1, samples) for m, t in STEPS.items()}
    for m, t in STEPS.items():
        lengths[m][0], lengths[m][-1] = t, 1
    features = {}
    for m, t in STEPS.items():
        x = rng.uniform(0.5, 1.0, (samples, t + padding, 3)).astype(np.float32)
        x[np.arange(t + padding) >= lengths[m][:, None]] = 0.0
        features[m] = x
    return Split(features, lengths, np.zeros(samples, np.float32), [str(i) for i in range(samples)])


SPLIT = make_split(60)
ALL = [(p, s) for p in PROTOCOLS.values() for s in p.settings]
NAMES = [f"{p.name}-{s.name}" for p, s in ALL]


def uniform(seed: int, m: str, sample: int, length: int) -> np.ndarray:
    """The documented draw, in (0, 1]: stream 4, seed, place of the modality, index of the sample."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([4, seed, MODALITIES.index(m), sample])))
    return 1.0 - generator.random(length)


@pytest.mark.parametrize(("protocol", "setting"), ALL, ids=NAMES)
@pytest.mark.parametrize("seed", [0, 12345])
def test_steps_follow_the_rule_step_by_step(protocol: Protocol, setting: Setting, seed: int) -> None:
    keep = protocol.apply(SPLIT, seed)[setting.name].keep
    for m, rate in zip(MODALITIES, setting.rates, strict=True):
        for sample in range(len(SPLIT)):
            length = int(SPLIT.lengths[m][sample])
            noise = uniform(seed, m, sample, length)
            for step in range(STEPS[m]):
                valid = step < length
                framed = m == "text" and step in (0, length - 1)
                assert keep[m][sample, step] == (valid and (framed or noise[step] > rate))


def test_the_rates_are_the_named_ones() -> None:
    split = make_split(1500)
    for r, masks in zip(range(10), PROTOCOLS["intra"].apply(split, 3).values(), strict=True):
        for m in ("audio", "vision"):
            assert masks.dropped_steps[m] == pytest.approx(r / 10, abs=0.02)
        # First and last steps of texts of 1 to 11 steps never go.
        free = np.maximum(split.lengths["text"] - 2, 0).sum() / split.lengths["text"].sum()
        assert masks.dropped_steps["text"] == pytest.approx(r / 10 * free, abs=0.02)
        assert masks.missing_rate == 0.0
    found = PROTOCOLS["imbalanced"].apply(split, 3)
    assert list(found)[:6] == ["text_poor", "audio_poor", "vision_poor", "text_rich", "audio_rich", "vision_rich"]
    assert found["audio_poor"].dropped_steps["audio"] == pytest.approx(0.8, abs=0.02)
    assert found["audio_poor"].dropped_steps["vision"] == pytest.approx(0.2, abs=0.02)
    assert found["audio_rich"].dropped_steps["audio"] == pytest.approx(0.2, abs=0.02)
    assert found["audio_rich"].dropped_steps["vision"] == pytest.approx(0.8, abs=0.02)


def test_a_higher_rate_hides_more_of_the_same() -> None:
    for low, high in itertools.pairwise(PROTOCOLS["intra"].apply(SPLIT, 1).values()):
        for m in MODALITIES:
            assert not (high.keep[m] & ~low.keep[m]).any()
            assert high.keep[m].sum() < low.keep[m].sum()
    for low, high in itertools.pairwise(PROTOCOLS["random_mr"].apply(SPLIT, 1).values()):
        assert not (high.present & ~low.present).any()
        assert high.present.sum() < low.present.sum()


def test_one_setting_alone_is_the_same_as_among_others() -> None:
    for protocol, setting in ALL:
        assert apply_setting(setting, SPLIT, 9).digest == protocol.apply(SPLIT, 9)[setting.name].digest


def test_a_sample_does_not_depend_on_the_others_nor_on_the_padding() -> None:
    setting = PROTOCOLS["intra"].settings[5]
    whole, wide = apply_setting(setting, SPLIT, 2), apply_setting(setting, make_split(60, padding=7), 2)
    head = Split(
        {m: x[:20] for m, x in SPLIT.features.items()},
        {m: n[:20] for m, n in SPLIT.lengths.items()},
        SPLIT.labels[:20],
        SPLIT.ids[:20],
    )
    part = apply_setting(setting, head, 2)
    for m in MODALITIES:
        np.testing.assert_array_equal(part.keep[m], whole.keep[m][:20])
        np.testing.assert_array_equal(wide.keep[m][:, : STEPS[m]], whole.keep[m])
        assert not wide.keep[m][:, STEPS[m] :].any()
    assert wide.digest == whole.digest


def test_a_seed_gives_the_same_masks_again_and_another_gives_others() -> None:
    for protocol, setting in ALL:
        first, again, other = (protocol.apply(SPLIT, seed)[setting.name].digest for seed in (5, 5, 6))
        assert first == again
        drawn = any(setting.rates) or setting.missing_rate or any(setting.missing_rates)
        assert (first != other) == bool(drawn)


def test_digests_tell_settings_apart() -> None:
    for protocol in PROTOCOLS.values():
        digests = [masks.digest for masks in protocol.apply(SPLIT, 0).values()]
        assert len(set(digests)) == len(digests)
    # Known for good: a change of the draw would silently end comparability with results on disk.
    assert PROTOCOLS["intra"].apply(SPLIT, 0)["r=0.5"].digest[:16] == "38491e705a94ee84"
    assert PROTOCOLS["random_mr"].apply(SPLIT, 0)["MR=0.5"].digest[:16] == "266e350c0363d22f"


def test_the_seven_sets() -> None:
    found = PROTOCOLS["fixed"].apply(SPLIT, 0)
    assert list(found) == [v.name for v in VARIANTS]
    for v in VARIANTS:
        assert (found[v.name].present == v.mask).all()
        assert found[v.name].variants == (v,)
        assert found[v.name].missing_rate == pytest.approx(len(v.absent) / 3)
        assert not any(found[v.name].dropped_steps.values())
    six, seven = PROTOCOLS["fixed"].averages
    assert set(six.settings) == {v.name for v in VARIANTS} - {"full"}
    assert set(seven.settings) == {v.name for v in VARIANTS}


@pytest.mark.parametrize("samples", [1, 2, 7, 61, 686])
def test_random_sets_hit_the_rate_and_leave_something(samples: int) -> None:
    found = PROTOCOLS["random_mr"].apply(make_split(samples), 4)
    assert list(found) == [f"MR=0.{k}" for k in range(8)]
    for k, masks in enumerate(found.values()):
        assert masks.present.any(axis=1).all()
        by_hand = 1 - sum(sum(row) for row in masks.present.tolist()) / (3 * samples)
        assert masks.missing_rate == pytest.approx(by_hand)
        # At least one modality stays, so no rate is above two thirds.
        assert abs(masks.missing_rate - min(k / 10, 2 / 3)) <= 1 / (3 * samples)


def test_random_sets_favour_no_modality() -> None:
    for masks in list(PROTOCOLS["random_mr"].apply(make_split(3000), 0).values())[1:]:
        missing = 1 - masks.present.mean(axis=0)
        np.testing.assert_allclose(missing, masks.missing_rate, atol=0.04)


def joint(rates: tuple[float, ...]) -> dict[tuple[bool, ...], float]:
    """The probability of each set of missing modalities, by bisection for what the three together are worth.

    Written from the definition: independent given that not all three are missing, with the shares asked for.
    """
    low, high = 0.0, 1.0 - 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        if np.prod([r * (1 - middle) + middle for r in rates]) > middle:
            low = middle
        else:
            high = middle
    odds = [r * (1 - low) + low for r in rates]
    found = {}
    for missing in itertools.product((False, True), repeat=3):
        if not all(missing):
            found[missing] = np.prod([q if gone else 1 - q for q, gone in zip(odds, missing, strict=True)]) / (1 - low)
    return found


SHARES = [s for s in PROTOCOLS["imbalanced"].settings if any(s.missing_rates)]


@pytest.mark.parametrize("setting", SHARES, ids=[s.name for s in SHARES])
def test_each_modality_goes_missing_as_often_as_asked(setting: Setting) -> None:
    samples = 3000
    masks = apply_setting(setting, make_split(samples), 1)
    missing = [tuple(not there for there in row) for row in masks.present.tolist()]
    assert (True, True, True) not in missing
    expected = joint(setting.missing_rates)
    assert sum(expected.values()) == pytest.approx(1.0, abs=1e-6)
    for i, (m, rate) in enumerate(zip(MODALITIES, setting.missing_rates, strict=True)):
        # The reference itself, and the draw to four standard deviations.
        assert sum(p for sets, p in expected.items() if sets[i]) == pytest.approx(rate, abs=1e-6)
        share = sum(sets[i] for sets in missing) / samples
        assert masks.missing_shares[m] == pytest.approx(share)
        assert share == pytest.approx(rate, abs=4 * (rate * (1 - rate) / samples) ** 0.5)
    for sets, p in expected.items():
        assert missing.count(sets) / samples == pytest.approx(p, abs=4 * (p * (1 - p) / samples) ** 0.5)
    assert not any(masks.dropped_steps.values())


def test_which_modalities_are_missing_depends_on_seed_and_index_alone() -> None:
    names = [s.name for s in SHARES]
    assert names == [f"{m}_{often}_missing" for often in ("often", "seldom") for m in MODALITIES]
    for setting in SHARES:
        whole = apply_setting(setting, SPLIT, 3).present
        np.testing.assert_array_equal(apply_setting(setting, make_split(17, seed=5), 3).present, whole[:17])
        assert (apply_setting(setting, SPLIT, 4).present != whole).any()
    # Known for good, as above.
    assert PROTOCOLS["imbalanced"].apply(SPLIT, 0)["text_often_missing"].digest[:16] == "e47ec7a0af6970ce"


def test_rates_that_leave_hardly_anything_are_reached() -> None:
    masks = apply_setting(Setting("x", missing_rates=(0.9, 0.6, 0.4)), make_split(3000), 0)
    assert masks.present.any(axis=1).all()
    np.testing.assert_allclose(list(masks.missing_shares.values()), (0.9, 0.6, 0.4), atol=0.036)
    always = apply_setting(Setting("x", missing_rates=(1.0, 0.0, 0.5)), make_split(500), 0).present
    assert not always[:, 0].any()
    assert always[:, 1].all()


@pytest.mark.parametrize("size", [1, 7, 60, 1000])
@pytest.mark.parametrize(
    ("protocol", "setting"),
    [("intra", "r=0.5"), ("random_mr", "MR=0.4"), ("imbalanced", "audio_often_missing")],
)
def test_batches_hold_every_sample_once_as_the_masks_leave_it(protocol: str, setting: str, size: int) -> None:
    masks = PROTOCOLS[protocol].apply(SPLIT, 0)[setting]
    seen = []
    for batch in batches(SPLIT, masks, size):
        assert len(batch.rows) <= size
        assert set(batch.features) == set(batch.lengths) == set(batch.variant.present)
        for i, row in enumerate(batch.rows):
            seen.append(int(row))
            assert batch.variant.mask == tuple(masks.present[row])
            for m in batch.variant.present:
                t = batch.features[m].shape[1]
                assert t == max(batch.lengths[m])
                assert batch.lengths[m][i] == SPLIT.lengths[m][row]
                for step in range(t):
                    expected = SPLIT.features[m][row, step] if masks.keep[m][row, step] else np.zeros(3)
                    np.testing.assert_array_equal(batch.features[m][i, step], expected)
                assert batch.features[m].dtype == np.float32
                assert batch.features[m].flags.c_contiguous
    assert sorted(seen) == list(range(60))


def test_names_and_averages_are_sound() -> None:
    assert list(PROTOCOLS) == ["intra", "fixed", "random_mr", "imbalanced"]
    for protocol in PROTOCOLS.values():
        names = [s.name for s in protocol.settings]
        assert len(set(names)) == len(names)
        assert all(set(a.settings) <= set(names) for a in protocol.averages)
    assert len(PROTOCOLS["intra"].averages[0].settings) == 10
    with pytest.raises(InputError, match="did you mean 'intra'"):
        protocol_named("intro")


@pytest.mark.parametrize(
    "wrong",
    [
        {"rates": (0.1, 0.2)},
        {"rates": (0.1, 0.2, 1.2)},
        {"present": (False, False, False)},
        {"missing_rate": -0.1},
        {"missing_rate": 0.3, "present": (True, True, False)},
        {"missing_rates": (0.5, 0.5)},
        {"missing_rates": (0.5, 0.5, -0.1)},
        {"missing_rates": (0.9, 0.9, 0.2)},
        {"missing_rates": (0.5, 0.5, 0.5), "missing_rate": 0.3},
        {"missing_rates": (0.5, 0.5, 0.5), "present": (True, True, False)},
    ],
)
def test_impossible_settings_are_refused(wrong: dict) -> None:
    with pytest.raises(InputError):
        Setting("x", **wrong)


@pytest.mark.parametrize(
    ("name", "samples", "real"),
    [
        ("/data/MOSI/Processed/unaligned_50.pkl", 686, "mosi"),
        ("mosei_aligned.pkl", 4659, "mosei"),
        ("D:/CH-SIMS/unaligned_39.pkl", 457, "sims"),
        ("simsv2.pkl", 457, None),
        ("simsv2.pkl", 1034, "simsv2"),
        ("mosi.pkl", 400, None),
        ("synthetic_mosi.pkl", 686, None),
        ("synthetic", 686, None),
        ("mosaic.pkl", 686, None),
    ],
)
def test_only_a_real_set_is_taken_for_one(name: str, samples: int, real: str | None) -> None:
    scale = (-1.0, 1.0) if "sims" in name.lower() else (-3.0, 3.0)
    assert real_name(name, samples, *scale) == real
    for other in ((-4.0, 4.0), (-3.0, 2.0), (scale[1], scale[0])):
        assert real_name(name, samples, *other) is None, "errors on another scale are not comparable"


def test_published_numbers_name_source_selection_and_features() -> None:
    for row in PUBLISHED:
        assert row.source
        assert row.selection
        assert row.features
        protocol = PROTOCOLS[row.protocol]
        assert row.point in [x.name for x in (*protocol.settings, *protocol.averages)]
        measures = metrics.scores([1.0, -0.5], [0.5, 0.5], "sims" if row.dataset.startswith("sims") else "mosi")
        assert row.scores
        assert set(row.scores) <= set(measures), row
        assert all(0 < v < 1 for k, v in row.scores.items() if k not in ("mae",)), row
        assert 0.2 < row.scores.get("mae", 1.0) < 1.5
    assert {row.dataset for row in PUBLISHED} == {"mosi", "mosei", "sims", "simsv2"}
    chosen = [r for r in published_for("mosi") if r.model == "TCMR"]
    assert [(r.scores["acc2_non0"], r.selection) for r in chosen] == [(0.7201, "validation split at r = 0.5")]


def test_published_numbers_of_whole_modalities() -> None:
    def found(dataset: str, protocol: str, point: str, model: str) -> list[dict[str, float]]:
        return [
            dict(r.scores) for r in published_for(dataset) if (r.protocol, r.point, r.model) == (protocol, point, model)
        ]

    assert found("mosi", "fixed", "full", "MulT") == [
        {"acc7": 0.3691, "acc2_non0": 0.8098, "f1_non0": 0.8095, "mae": 0.880, "corr": 0.702}
    ]
    assert found("simsv2", "fixed", "full", "MulT")[0]["acc5"] == 0.5481
    # With text missing it names the commonest class of the test set for every sample: 62.85 and 71.02 % of MOSEI.
    assert found("mosei", "fixed", "text_missing", "LNLN") == [
        {"acc2_non0": 0.6285, "acc2_has0": 0.7102, "corr": 0.156}
    ]
    six = [s.name for s in PROTOCOLS["fixed"].settings if not all(s.present)]
    for dataset in ("mosi", "mosei"):
        singles = [found(dataset, "fixed", name, "HRLF")[0]["f1_non0"] for name in six]
        # The paper's average is that of its six sets: no column went astray.
        mean = found(dataset, "fixed", "mean_of_six", "HRLF")[0]["f1_non0"]
        assert np.mean(singles) == pytest.approx(mean, abs=6e-5)
    assert found("mosi", "random_mr", "mean_of_seven", "LNLN") == [{"acc7": 0.342, "mae": 0.978, "corr": 0.627}]


def test_what_cannot_be_compared_is_left_out_or_says_so() -> None:
    for row in PUBLISHED:
        if row.model in ("HRLF", "CorrKD", "GCNet", "CyIN", "IMDer") or "CyIN" in row.source:
            assert row.features.startswith("not comparable")
        if row.model == "ALMT" or (row.model == "LNLN" and row.source.startswith("LNLN, t")):
            assert not any(name.startswith("f1") for name in row.scores)
        if row.dataset == "sims" and row.point == "full" and row.model in ("MulT", "Self-MM"):
            assert "f1" not in row.scores
