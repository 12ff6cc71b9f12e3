"""hcmen-eval: the same numbers from a checkpoint and a bundle, honest averages, whole files, one line for bad input."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import small_bundle
from helpers.command import Outcome, open_folder, run, without_privileges
from helpers.micro import MICRO
from helpers.processes import loaded_after

import hcmen.evaluation.command
from hcmen.base import metrics
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.data import MultimodalDataset, Split
from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
from hcmen.data.protocols import PROTOCOLS, Masks
from hcmen.data.published import published_for
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.evaluation.command import main, write_together
from hcmen.evaluation.robustness import Run, csv_text, markdown, published_rows, run_scores, summarise, text
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import HCMEN
from hcmen.training.checkpoint import save_checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import predict, predict_masked
from hcmen.training.presets import preset_named

SAMPLES = (24, 12, 16)
EXPORTED = ("full", "audio_only")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset() -> MultimodalDataset:
    return dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs)


def make_model(seed: int, config: ModelConfig = MICRO) -> HCMEN:
    """Random weights, large enough for scores that differ."""
    torch.manual_seed(seed)
    model = HCMEN(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


def make_checkpoint(folder: Path, seed: int = 0, name: str = "synthetic", **about: Any) -> Path:
    folder.mkdir(parents=True)
    sizes = dict(zip(("train", "valid", "test"), SAMPLES, strict=True))
    described = about or {"name": name, "label_min": -3.0, "label_max": 3.0, "samples": sizes}
    save_checkpoint(folder, make_model(seed), TrainConfig(seed=seed), epoch=2, validation={}, dataset=described)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return [make_checkpoint(root / str(seed), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "micro.pkl"
    write_synthetic(path, make_synthetic(MICRO.inputs, SAMPLES, seed=7))
    return path


@pytest.fixture(scope="module")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that fits the hand-made bundle."""
    rng = np.random.default_rng(0)
    data: dict[str, dict[str, Any]] = {}
    for name, count in (("train", 4), ("valid", 3), ("test", 13)):
        data[name] = {"regression_labels": rng.uniform(-3, 3, count).astype(np.float32)}
        for m in MODALITIES:
            sizes = small_bundle.INPUTS.modality(m)
            data[name][m] = rng.normal(size=(count, sizes.max_steps, sizes.features)).astype(np.float32)
            data[name][f"{m}_lengths"] = rng.integers(1, sizes.max_steps + 1, count)
    path = tmp_path_factory.mktemp("small") / "data.pkl"
    write_synthetic(path, data)
    return path


@pytest.fixture(scope="module")
def exported(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real bundle of a few variants."""
    from hcmen.export.bundle import export_bundle

    folder = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(checkpoints[0], folder, [variant_named(name) for name in EXPORTED])
    return folder


def evaluated(*arguments: Any) -> Outcome:
    return run(main, "--no-pictures", *arguments)


def report_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def settings_of(report: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(p, s["name"]): s["scores"] for p, part in report["protocols"].items() for s in part["settings"]}


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", list(PROTOCOLS))
def test_a_score_is_that_of_the_sample_alone_with_its_steps_zeroed(dataset: MultimodalDataset, protocol: str) -> None:
    model, split = make_model(0), dataset.splits["test"]
    masks = list(PROTOCOLS[protocol].apply(split, 3).values())[3]
    got = predict_masked(model, split, masks, 5)
    for i in range(len(split)):
        features, lengths = {}, {}
        for k, m in enumerate(MODALITIES):
            if not masks.present[i, k]:
                continue
            n = int(split.lengths[m][i])
            x = split.features[m][i, :n].copy()
            x[~masks.keep[m][i, :n]] = 0.0
            features[m], lengths[m] = torch.from_numpy(x)[None], torch.tensor([n])
        with torch.inference_mode():
            assert got[i] == pytest.approx(float(model(features, lengths).score), abs=1e-5)


def test_scores_do_not_depend_on_the_batch_size(dataset: MultimodalDataset) -> None:
    model, split = make_model(0), dataset.splits["test"]
    model.train()
    counted: list[int] = []
    for protocol in PROTOCOLS.values():
        masks = list(protocol.apply(split, 0).values())[2]
        whole = predict_masked(model, split, masks, 100, counted.append)
        for size in (1, 3):
            np.testing.assert_allclose(predict_masked(model, split, masks, size), whole, atol=1e-5)
    assert sum(counted) == len(PROTOCOLS) * len(split)
    assert model.training


def test_a_fixed_set_is_the_variant(dataset: MultimodalDataset) -> None:
    model, split = make_model(0), dataset.splits["test"]
    for name, masks in PROTOCOLS["fixed"].apply(split, 0).items():
        np.testing.assert_allclose(
            predict_masked(model, split, masks), predict(model, split, variant_named(name)), atol=1e-6
        )


def test_checkpoint_and_exported_bundle_agree(
    exported: Path, checkpoints: list[Path], dataset: MultimodalDataset
) -> None:
    """Every setting of every protocol, on the samples whose variant was exported."""
    split = dataset.splits["test"]
    model = make_model(0)
    judged = hcmen.evaluation.command._bundle(
        exported, checkpoints[:1], None, "test", 1, None, 5, hcmen.evaluation.command.Console(verbosity=-1)
    )
    there = [list(variant_named(name).mask) for name in EXPORTED]
    compared = set()
    for protocol in PROTOCOLS.values():
        for masks in protocol.apply(split, 1).values():
            rows = [row if row in there else [True] * 3 for row in masks.present.tolist()]
            masks = Masks(masks.keep, masks.lengths, np.array(rows))
            got = judged.score(masks, lambda samples: None)
            np.testing.assert_allclose(got, predict_masked(model, split, masks), atol=1e-5)
            assert np.ptp(got) > 0.01
            compared |= {v.name for v in masks.variants}
    assert compared == set(EXPORTED)


def test_every_sample_goes_to_the_graph_of_its_own_variant(
    shared_bundle: Path, small_data: Path, tmp_path: Path
) -> None:
    """All seven graphs, all protocols, through the command, against the hand-made bundle's meaning in NumPy."""
    done = evaluated("--bundle", shared_bundle, "--data", small_data, "--batch-size", 4, "--out", tmp_path)
    assert done.code == 0, done.err
    split = read_mmsa(small_data, small_bundle.INPUTS).splits["test"]
    report = report_of(tmp_path)
    found = settings_of(report)
    for protocol in PROTOCOLS.values():
        for name, masks in protocol.apply(split, 0).items():
            expected = []
            for i in range(len(split)):
                variant = next(v for v in VARIANTS if v.mask == tuple(masks.present[i]))
                clip = {
                    m: (split.features[m][i] * masks.keep[m][i, :, None])[: split.lengths[m][i]]
                    for m in variant.present
                }
                expected.append(small_bundle.expected(clip, variant.name)[0])
            mae = float(np.mean(np.abs(np.array(expected) - split.labels)))
            assert found[protocol.name, name]["mae"]["mean"] == pytest.approx(mae, abs=1e-5)
    run_info = report["source"]["runs"][0]
    assert report["source"]["kind"] == "bundle"
    assert set(run_info["kernels"]) == {v.name for v in VARIANTS}
    assert run_info["backend"] == "ort"


# --- averages, deviation, floor ---------------------------------------------------------------------------------------


def constant_runs(values: list[float]) -> tuple[list[Run], Split]:
    """Runs whose every score is a constant, on four samples: two positive, one zero, one negative."""
    truth = np.array([2.0, 1.0, 0.0, -3.0], np.float32)
    split = Split(
        {m: np.ones((4, 3, 2), np.float32) for m in MODALITIES},
        {m: np.full(4, 3) for m in MODALITIES},
        truth,
        list("abcd"),
    )
    masks = {p.name: p.apply(split, 0) for p in PROTOCOLS.values()}
    runs = [
        run_scores(lambda mask, v=v: np.full(4, v), masks, truth, [1.0, 1.0, -1.0, 1.0], "mosi", "x") for v in values
    ]
    return runs, split


def test_constant_predictions_by_hand() -> None:
    runs, _ = constant_runs([1.0])
    scores = runs[0].scores["intra"]["r=0.0"]
    assert scores["mae"] == pytest.approx((1 + 0 + 1 + 4) / 4)
    assert scores["corr"] == 0.0
    assert scores["acc7"] == pytest.approx(1 / 4)
    assert scores["acc2_has0"] == pytest.approx(3 / 4)
    assert scores["acc2_non0"] == pytest.approx(2 / 3)
    # Truth first: the positive class (weight 2/3) has F1 2*2/(2+3); swapped it would be the same times 1.5.
    assert scores["f1_non0"] == pytest.approx(2 / 3 * 4 / 5)
    floor = runs[0].floor
    assert floor["mae"] == pytest.approx((1.5 + 0.5 + 0.5 + 3.5) / 4)
    assert floor["acc2_non0"] == pytest.approx(2 / 3)
    assert floor["f1_non0"] == pytest.approx(2 / 3 * 4 / 5)


def test_mean_and_deviation_over_runs_by_hand() -> None:
    assert metrics.spread([1.0, 2.0, 6.0]) == {
        "mean": 3.0,
        "deviation": pytest.approx(7**0.5),  # ((4 + 1 + 9) / 2) ** 0.5
        "runs": [1.0, 2.0, 6.0],
    }
    assert metrics.spread([4.0])["deviation"] is None
    runs, _ = constant_runs([1.0, 0.0])
    report = summarise(runs, list(PROTOCOLS.values()))
    mae = report["protocols"]["fixed"]["settings"][0]["scores"]["mae"]
    assert mae == {"mean": 1.5, "deviation": 0.0, "runs": [1.5, 1.5]}
    acc = report["protocols"]["fixed"]["settings"][0]["scores"]["acc7"]
    assert acc["runs"] == [0.25, 0.25]
    report = summarise(constant_runs([1.0, 3.0])[0], list(PROTOCOLS.values()))
    mae = report["protocols"]["fixed"]["settings"][0]["scores"]["mae"]
    assert mae["runs"] == [1.5, pytest.approx(3.0)]
    assert mae["mean"] == pytest.approx(2.25)
    assert mae["deviation"] == pytest.approx(1.5 / 2**0.5)


def test_averages_are_over_the_settings_they_name() -> None:
    runs, _ = constant_runs([0.0])
    for k, scores in enumerate(runs[0].scores["fixed"].values()):
        scores["mae"] = float(k)  # full 0, the incomplete sets 1 to 6
    for k, scores in enumerate(runs[0].scores["intra"].values()):
        scores["mae"] = float(k * k)
    report = summarise(runs, list(PROTOCOLS.values()))
    averages = {
        (p, a["name"]): a["scores"]["mae"]["mean"]
        for p in report["protocols"]
        for a in report["protocols"][p]["averages"]
    }
    assert averages["fixed", "mean_of_six"] == pytest.approx(3.5)
    assert averages["fixed", "mean_of_seven"] == pytest.approx(3.0)
    assert averages["intra", "mean_of_rates"] == pytest.approx(28.5)
    labels = [a["about"] for a in report["protocols"]["fixed"]["averages"]]
    assert labels == ["mean of the six incomplete sets", "mean of all seven sets"]


def test_a_nan_score_fails_the_run(dataset: MultimodalDataset) -> None:
    split = dataset.splits["test"]
    masks = {"fixed": PROTOCOLS["fixed"].apply(split, 0)}
    with pytest.raises(CheckFailed, match=r"run x: 16 of 16 scores are NaN .* setting full"):
        run_scores(lambda mask: np.full(16, np.nan), masks, split.labels, split.labels, "mosi", "run x")


# --- the command ------------------------------------------------------------------------------------------------------


def test_everything_is_written(checkpoints: list[Path], tmp_path: Path) -> None:
    done = run(main, "--checkpoint", checkpoints[0], "--out", tmp_path, "--threads", 1)
    assert done.code == 0, done.err
    names = {"results.json", "results.csv", "results.md", "missing_rate.png", "fixed_sets.png"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert all((tmp_path / n).read_bytes().startswith(b"\x89PNG") for n in names if n.endswith(".png"))
    report = report_of(tmp_path)
    assert report["schema_version"] == 1
    assert {"cpu", "logical_cores"} <= report["machine"].keys()
    assert {"hcmen", "numpy", "torch"} <= report["versions"].keys()
    assert report["source"]["runs"][0]["training_seed"] == 0
    assert report["published"] == []
    test = dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs).splits["test"]
    for name, protocol in PROTOCOLS.items():
        masks = protocol.apply(test, 0)
        for setting in report["protocols"][name]["settings"]:
            assert setting["mask_sha256"] == [masks[setting["name"]].digest]
            assert setting["missing_rate"] == pytest.approx(masks[setting["name"]].missing_rate)
            assert setting["scores"].keys() == report["floor"].keys() == metrics.scores([1, -1], [1, 1]).keys()
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    settings = sum(len(p.settings) + len(p.averages) for p in PROTOCOLS.values())
    assert len(rows) == settings * len(report["floor"])
    by_key = {(r["protocol"], r["setting"], r["measure"]): r for r in rows}
    for (protocol, setting), scores in settings_of(report).items():
        row = by_key[protocol, setting, "mae"]
        assert float(row["mean"]) == scores["mae"]["mean"]
        assert float(row["floor"]) == report["floor"]["mae"]
    page = (tmp_path / "results.md").read_text()
    for words in ("mean of the ten rates", "mean of the six incomplete sets", "mean of all seven sets", "MR=0.7"):
        assert words in page
        assert words in done.out
    assert "Acc-5 (floor)" in page
    assert "![" in page


def test_several_seeds(checkpoints: list[Path], data_file: Path, tmp_path: Path) -> None:
    arguments = [x for c in checkpoints for x in ("--checkpoint", c)]
    done = evaluated(*arguments, "--data", data_file, "--protocol", "fixed", "--out", tmp_path, "--seed", 5)
    assert done.code == 0, done.err
    split = read_mmsa(data_file, MICRO.inputs).splits["test"]
    by_hand = [
        float(np.mean(np.abs(predict(make_model(seed), split, variant_named("audio_only")) - split.labels)))
        for seed in range(3)
    ]
    found = settings_of(report_of(tmp_path))["fixed", "audio_only"]["mae"]
    assert found["runs"] == pytest.approx(by_hand, abs=1e-6)
    mean = sum(by_hand) / 3
    assert found["mean"] == pytest.approx(mean, abs=1e-6)
    assert found["deviation"] == pytest.approx((sum((x - mean) ** 2 for x in by_hand) / 2) ** 0.5, abs=1e-6)
    assert " ± " in done.out
    assert set(report_of(tmp_path)["protocols"]) == {"fixed"}


def test_json_on_stdout_is_the_report(checkpoints: list[Path], tmp_path: Path) -> None:
    done = evaluated(
        *("--checkpoint", checkpoints[0], "--protocol", "fixed", "--format", "json", "-q", "--out", tmp_path)
    )
    assert done.code == 0
    assert done.err == ""
    assert json.loads(done.out) == report_of(tmp_path)


def test_batch_size_changes_nothing_and_an_older_evaluation_is_replaced(
    checkpoints: list[Path], tmp_path: Path
) -> None:
    assert run(main, "--checkpoint", checkpoints[0], "--protocol", "fixed", "--out", tmp_path).code == 0
    first = report_of(tmp_path)
    assert (tmp_path / "fixed_sets.png").exists()
    (tmp_path / "notes.txt").write_text("mine")
    for size in (1, 3):
        done = evaluated("--checkpoint", checkpoints[0], "--protocol", "fixed", "--batch-size", size, "--out", tmp_path)
        assert done.code == 0
        again = report_of(tmp_path)
        assert again["protocols"]["fixed"]["mask_sha256"] == first["protocols"]["fixed"]["mask_sha256"]
        for key, scores in settings_of(first).items():
            assert settings_of(again)[key]["mae"]["mean"] == pytest.approx(scores["mae"]["mean"], abs=1e-5)
    # No picture of another evaluation beside these numbers, and nothing of anybody else's is touched.
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.csv", "results.md", "notes.txt"}


def test_published_numbers_stand_beside_ours_for_a_real_set_only(
    checkpoints: list[Path], data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = hcmen.evaluation.command.evaluate(checkpoints[:1], data=data_file, protocols=["intra"])
    assert report["published"] == []
    assert "published" not in text(report)
    monkeypatch.setattr("hcmen.data.published._TEST_SAMPLES", {"mosi": SAMPLES[2]})
    real = tmp_path / "MOSI" / "unaligned_50.pkl"
    real.parent.mkdir()
    os.link(data_file, real)
    report = hcmen.evaluation.command.evaluate(checkpoints[:1], data=real, protocols=["intra"])
    assert report["published"] == published_rows(r for r in published_for("mosi") if r.protocol == "intra")
    for page in (text(report), markdown(report)):
        assert "validation split at r = 0.5" in page
        assert "test split at r = 0.5, one checkpoint per measure" in page
        assert "TCMR, table 1" in page
        assert "72.0" in page
    assert "TCMR" not in csv_text(report)
    report = hcmen.evaluation.command.evaluate(checkpoints[:1], data=real, protocols=["fixed", "imbalanced"])
    ours = settings_of(report)["fixed", "text_missing"]["mae"]["mean"]
    table = [line.split(" | ") for line in markdown(report).splitlines() if line.startswith("| text_missing | ")]
    # Below the row of all our measures: ours again, then the two that have something to say on this set.
    assert [row[1] for row in table[1:]] == ["hcmen (here)", "LNLN", "HRLF"]
    assert f"{ours:.3f}" in table[1]
    assert {"1.427", "0.075", "52.2", "49.0", "MMSA's files"} <= set(table[2])
    assert {"75.6", "not comparable: GloVe, COVAREP 74, FACET 35, aligned"} <= set(table[3])
    assert {r["protocol"] for r in report["published"]} == {"fixed"}
    # All of it is of the test split.
    assert hcmen.evaluation.command.evaluate(checkpoints[:1], data=real, split="valid")["published"] == []


def test_tables_for_a_paper_are_written_where_asked_for(checkpoints: list[Path], tmp_path: Path) -> None:
    arguments = ("--checkpoint", checkpoints[0], "--protocol", "fixed", "--out", tmp_path)
    done = evaluated(*arguments, "--latex")
    assert done.code == 0, done.err
    assert "results.tex" in done.out
    page = (tmp_path / "results.tex").read_text()
    for name, scores in settings_of(report_of(tmp_path)).items():
        assert f"{name[1].replace('_', chr(92) + '_')} & {scores['mae']['mean']:.3f} & " in page
    assert evaluated(*arguments).code == 0
    assert not (tmp_path / "results.tex").exists(), "a table of another evaluation beside these numbers"


# --- data that lacks modalities, labels on other scales ---------------------------------------------------------------


def lacking(folder: Path, there: tuple[str, ...], name: str = "set.pkl", scale: float = 1.0) -> tuple[Path, Path]:
    """A checkpoint of a model with these modalities alone, and such data."""
    data = make_synthetic(MICRO.inputs, SAMPLES, seed=7)
    for split in data.values():
        for m in set(MODALITIES) - set(there):
            del split[m], split[f"{m}_lengths"]
        split["regression_labels"] = split["regression_labels"] * np.float32(scale)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    write_synthetic(folder / name, data)
    absent: dict[str, Any] = dict.fromkeys(set(MODALITIES) - set(there))
    config = dataclasses.replace(MICRO, **absent, label_min=-3.0 * scale, label_max=3.0 * scale)
    (folder / "train").mkdir()
    described = {"name": str(folder / name), "label_min": -3.0 * scale, "label_max": 3.0 * scale, "samples": {}}
    model = make_model(0, config)
    save_checkpoint(folder / "train", model, TrainConfig(), epoch=1, validation={}, dataset=described)
    return folder / "train", folder / name


def test_one_modality_has_nothing_to_go_missing(tmp_path: Path) -> None:
    checkpoint, data = lacking(tmp_path, ("text",))
    done = run(main, "--checkpoint", checkpoint, "--out", tmp_path / "out", "--latex")
    assert done.code == 0, done.err
    for name in ("random_mr", "imbalanced"):
        assert any(f"protocol '{name}' is left out" in line and "text alone" in line for line in done.lines)
        assert f"protocol {name} is left out: " in done.out
    report = report_of(tmp_path / "out")
    assert set(report["left_out"]) == {"random_mr", "imbalanced"}
    assert report["dataset"]["modalities"] == ["text"]
    assert [s["name"] for s in report["protocols"]["fixed"]["settings"]] == ["text_only"]
    assert report["protocols"]["fixed"]["averages"] == []
    split = read_mmsa(data, dataclasses.replace(MICRO.inputs, audio=None, vision=None)).splits["test"]
    model = make_model(0, dataclasses.replace(MICRO, audio=None, vision=None))
    expected = metrics.mae(split.labels, predict(model, split, variant_named("text_only")))
    found = settings_of(report)
    assert found["fixed", "text_only"]["mae"]["mean"] == pytest.approx(expected)
    assert found["intra", "r=0.0"]["mae"]["mean"] == pytest.approx(expected)
    for setting in report["protocols"]["intra"]["settings"]:
        assert set(setting["dropped_steps"]) == set(setting["rates"]) == {"text"}
    with open(tmp_path / "out" / "results.csv", newline="") as file:
        row = next(csv.DictReader(file))
    assert (row["text_steps_dropped"], row["audio_steps_dropped"]) == ("0.0", "")
    refused(
        evaluated("--checkpoint", checkpoint, "--protocol", "random_mr", "-q", "--out", tmp_path / "none"),
        *(2, "no protocol is left", "the data has text alone", "choose --protocol intra or fixed"),
    )


def test_a_bundle_of_some_modalities_lacks_nothing(tmp_path: Path) -> None:
    from hcmen.export.bundle import export_bundle

    checkpoint, data = lacking(tmp_path, ("text", "vision"))
    export_bundle(checkpoint, tmp_path / "bundle")
    arguments = ("--data", data, "--threads", 1)
    done = evaluated("--bundle", tmp_path / "bundle", *arguments, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert evaluated("--checkpoint", checkpoint, *arguments, "--out", tmp_path / "b").code == 0
    bundle, eager = (report_of(tmp_path / name) for name in ("a", "b"))
    assert [s["name"] for s in bundle["protocols"]["fixed"]["settings"]] == [
        "audio_missing",
        "text_only",
        "vision_only",
    ]
    assert bundle["left_out"] == eager["left_out"] == {}
    for key, scores in settings_of(eager).items():
        assert settings_of(bundle)[key]["mae"]["mean"] == pytest.approx(scores["mae"]["mean"], abs=1e-5)


def test_labels_on_another_scale(tmp_path: Path) -> None:
    checkpoint, data = lacking(tmp_path, MODALITIES, scale=2.0)
    done = evaluated("--checkpoint", checkpoint, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    report = report_of(tmp_path / "out")
    assert (report["dataset"]["family"], report["dataset"]["label_max"]) == ("range", 6.0)
    assert report["floor"].keys() == {"mae", "corr", "acc2_has0", "f1_has0", "acc2_non0", "f1_non0"}
    labels = read_mmsa(data, dataclasses.replace(MICRO.inputs, label_min=-6.0, label_max=6.0)).splits
    mean = labels["train"].labels.astype(np.float64).mean()
    assert report["floor"]["mae"] == pytest.approx(np.abs(labels["test"].labels - mean).mean())
    assert "Acc-2 and F1 tell labels below 0 from those above it; Non0 leaves 0 itself out" in " ".join(
        done.out.split()
    )
    assert run(main, "--checkpoint", checkpoint, "--protocol", "fixed", "--out", tmp_path / "drawn").code == 0


@pytest.mark.parametrize(
    ("there", "scale", "protocols"),
    [(MODALITIES, 1.0, {"intra", "fixed"}), (("text",), 1.0, {"fixed"}), (MODALITIES, 4 / 3, set())],
)
def test_published_numbers_are_of_the_same_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: tuple[str, ...], scale: float, protocols: set[str]
) -> None:
    """Not on another scale; without a modality the same sets alone."""
    monkeypatch.setattr("hcmen.data.published._TEST_SAMPLES", {"mosi": SAMPLES[2]})
    checkpoint, data = lacking(tmp_path, there, "MOSI/unaligned_50.pkl", scale)
    report = hcmen.evaluation.command.evaluate([checkpoint], data=data, protocols=["intra", "fixed"])
    assert {row["protocol"] for row in report["published"]} == protocols
    if there == ("text",):
        assert "text_missing" not in {cell for line in markdown(report).splitlines() for cell in line.split(" | ")}


# --- bad input --------------------------------------------------------------------------------------------------------


def refused(done: Outcome, code: int, *words: str) -> None:
    assert done.code == code, done.err
    assert done.out == ""
    errors = [line for line in done.lines if not line.startswith("no --data")]
    assert len(errors) == 1, done.err
    assert errors[0].startswith("error: ")
    for word in words:
        assert word in errors[0]


def test_bad_input_is_one_line(
    checkpoints: list[Path], exported: Path, data_file: Path, tmp_path: Path, shared_bundle: Path
) -> None:
    one, out = checkpoints[0], tmp_path / "out"
    refused(evaluated("--checkpoint", tmp_path / "no", "--out", out), 2, "no such file", "hcmen-train")
    refused(evaluated("--bundle", tmp_path / "no", "--data", data_file, "--out", out), 2, str(tmp_path / "no"))
    refused(evaluated("--checkpoint", one, "--data", tmp_path / "no.pkl", "--out", out), 2, "no.pkl")
    refused(evaluated("--checkpoint", one, "--protocol", "intro", "--out", out), 2, "did you mean 'intra'")
    refused(evaluated("--checkpoint", one, "--checkpoint", one, "--out", out), 2, "same weights", "once")
    refused(evaluated("--bundle", exported, "--out", out), 2, "--data", "--checkpoint")
    lacking = evaluated("--bundle", exported, "--data", data_file, "--protocol", "fixed", "--out", out)
    refused(lacking, 2, "no variant 'text_missing'", "protocol 'fixed'", "export all variants")
    refused(evaluated("--bundle", shared_bundle, "--checkpoint", one, "--out", out), 2, "was exported from checkpoint")
    refused(
        evaluated("--bundle", exported, "--checkpoint", one, "--checkpoint", one, "--out", out), 2, "at most the one"
    )
    assert not any(out.iterdir())
    fine = evaluated("--bundle", exported, "--data", data_file, "--protocol", "intra", "--out", out)
    assert fine.code == 0, fine.err


def test_data_of_another_preset(checkpoints: list[Path], tmp_path: Path) -> None:
    write_synthetic(tmp_path / "tiny.pkl", make_synthetic(preset_named("tiny").model.inputs, (2, 2, 2)))
    done = evaluated("--checkpoint", checkpoints[0], "--data", tmp_path / "tiny.pkl", "--out", tmp_path / "out")
    refused(done, 2, "text has 32 features per step, expected 6", "another data set")


def test_checkpoints_that_do_not_say_what_they_were_trained_on(tmp_path: Path, data_file: Path) -> None:
    vague = make_checkpoint(tmp_path / "vague", label="none")
    refused(evaluated("--checkpoint", vague, "--out", tmp_path), 5, "does not say", "--data")
    assert evaluated("--checkpoint", vague, "--data", data_file, "--protocol", "fixed", "--out", tmp_path).code == 0
    moved = make_checkpoint(tmp_path / "moved", name="/gone/mosi.pkl")
    refused(evaluated("--checkpoint", moved, "--out", tmp_path), 2, "/gone/mosi.pkl", "--data")
    here = make_checkpoint(tmp_path / "here", seed=1, name=str(data_file))
    assert evaluated("--checkpoint", here, "--protocol", "fixed", "--out", tmp_path).code == 0
    assert report_of(tmp_path)["dataset"]["name"] == str(data_file)
    other = make_checkpoint(tmp_path / "other", seed=2)
    refused(evaluated("--checkpoint", here, "--checkpoint", other, "--out", tmp_path), 2, "same data", "--data")


def test_an_altered_checkpoint(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "train")
    weights = folder / "checkpoint.safetensors"
    content = weights.read_bytes()
    for altered, told in ((content + b"x", "bytes"), (content[:-1] + bytes([content[-1] ^ 1]), "sha256")):
        weights.write_bytes(altered)
        refused(evaluated("--checkpoint", folder, "--out", tmp_path / "out"), 5, told, "altered")


def test_a_place_that_cannot_be_written(checkpoints: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(evaluated("--checkpoint", checkpoints[0], "--out", tmp_path / "file"), 2, "choose another --out")
    with open_folder() as folder:
        checkpoint = shutil.copytree(checkpoints[0], folder / "train")
        folder.chmod(0o555)
        with without_privileges():
            refused(evaluated("--checkpoint", checkpoint, "--out", folder / "out"), 2, "choose another --out")


def test_files_are_written_all_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_together(tmp_path, {"a": b"old a", "b": b"old b", "c": b"old c"})
    synced: list[int] = []

    def full_disk(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        with pytest.raises(InputError, match="no space left on device"):
            write_together(tmp_path, {"a": b"new a", "b": b"new b"}, ("a", "b", "c"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "old a", "b": "old b", "c": "old c"}
    write_together(tmp_path, {"a": b"new a", "b": b"new b"}, ("a", "b", "c"))
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"a": "new a", "b": "new b"}
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="folder is a folder"):
        write_together(tmp_path, {"a": b"newer", "folder": b"x"})
    assert (tmp_path / "a").read_text() == "new a"


def test_a_bundle_is_judged_without_torch(shared_bundle: Path, small_data: Path, tmp_path: Path) -> None:
    loaded = loaded_after(
        "from hcmen.evaluation.command import main; main()",
        *("--bundle", str(shared_bundle), "--data", str(small_data), "--out", str(tmp_path), "--no-pictures"),
    )
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"torch", "matplotlib", "safetensors"})
    assert report_of(tmp_path)["source"]["kind"] == "bundle"


def test_the_names_of_the_protocols_on_the_command_line_are_those_there_are() -> None:
    assert tuple(PROTOCOLS) == hcmen.evaluation.command._NAMES
    from hcmen.evaluation.plots import PICTURES

    assert tuple(PICTURES) == hcmen.evaluation.command._PICTURES
