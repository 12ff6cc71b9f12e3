"""benchmarks/peer_lnln.py without LNLN: what both models are given, the choices, the table, going on after a stop."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "peer_lnln.py"
sys.path.insert(0, str(SCRIPT.parent))

import peer_lnln  # noqa: E402

from hcmen.base import metrics  # noqa: E402
from hcmen.data.mmsa import dataset_from_mmsa  # noqa: E402
from hcmen.data.protocols import PROTOCOLS, Masks  # noqa: E402
from hcmen.data.synthetic import make_synthetic  # noqa: E402
from hcmen.training.presets import preset_named  # noqa: E402

TINY = preset_named("tiny").model
DATA = make_synthetic(TINY.inputs, (40, 9, 17), 3)


def test_dropped_words_become_unknown_and_nothing_else_changes() -> None:
    tokens = np.zeros((2, 3, 6), np.int64)
    tokens[0, 0], tokens[0, 1] = [101, 1001, 1002, 1003, 1004, 102], 1
    tokens[1, 0, :3], tokens[1, 1, :3] = [101, 1005, 102], 1
    before = tokens.copy()
    keep = np.array([[1, 0, 1, 0, 1, 1], [1, 0, 1, 0, 0, 0]], dtype=bool)
    got = peer_lnln.masked_ids(tokens, keep)
    assert got[0].tolist() == [[101, 100, 1002, 100, 1004, 102], [1] * 6, [0] * 6]
    assert got[1].tolist() == [[101, 100, 102, 0, 0, 0], [1, 1, 1, 0, 0, 0], [0] * 6]
    np.testing.assert_array_equal(tokens, before)


@pytest.mark.parametrize("rate", ["r=0.0", "r=0.5", "r=0.9"])
def test_ids_are_hidden_where_the_protocol_hides_steps(rate: str) -> None:
    split = dataset_from_mmsa(DATA, "synthetic", TINY.inputs).splits["test"]
    mask = PROTOCOLS["intra"].apply(split, 0)[rate]
    stored = DATA["test"]["text_bert"]
    got = peer_lnln.masked_ids(stored, mask.keep["text"])
    hidden = 0
    for i in range(len(split)):
        length = int(stored[i, 1].sum())
        assert got[i, 0, 0] == 101
        assert got[i, 0, length - 1] == 102
        assert not got[i, 0, length:].any()
        for step in range(1, length - 1):
            dropped = not mask.keep["text"][i, step]
            assert got[i, 0, step] == (100 if dropped else stored[i, 0, step])
            hidden += dropped
    assert bool(hidden) == (rate != "r=0.0")
    np.testing.assert_array_equal(got[:, 1:], stored[:, 1:])


def test_standardised_by_the_training_split_alone() -> None:
    scaled = peer_lnln.standardised(DATA)
    for m in ("audio", "vision"):
        frames = np.concatenate(
            [x[:n] for x, n in zip(scaled["train"][m], DATA["train"][f"{m}_lengths"], strict=True)]
        ).astype(np.float64)
        np.testing.assert_allclose(frames.mean(axis=0), 0.0, atol=1e-5)
        np.testing.assert_allclose(frames.std(axis=0), 1.0, rtol=1e-5)
        first = np.concatenate(
            [x[:n] for x, n in zip(DATA["train"][m], DATA["train"][f"{m}_lengths"], strict=True)]
        ).astype(np.float64)
        n = DATA["test"][f"{m}_lengths"][4]
        expected = (DATA["test"][m][4, :n] - first.mean(axis=0)) / first.std(axis=0)
        np.testing.assert_allclose(scaled["test"][m][4, :n], expected, rtol=1e-4, atol=1e-5)
        assert not scaled["test"][m][4, n:].any()
        assert scaled["test"][m].dtype == np.float32
    assert scaled["valid"]["text_bert"] is DATA["valid"]["text_bert"]


def test_the_bert_is_one_that_transformers_reads(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for name in ("a", "b"):
        peer_lnln.write_bert(tmp_path / name)
    words = (tmp_path / "a" / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert [words.index(w) for w in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")] == [0, 100, 101, 102]
    assert len(set(words)) == len(words) > max(int(DATA[s]["text_bert"][:, 0].max()) for s in DATA)
    one, two = (transformers.BertModel.from_pretrained(tmp_path / name).eval() for name in ("a", "b"))
    tokens = torch.from_numpy(DATA["test"]["text_bert"][:2].astype(np.int64))
    with torch.no_grad():
        outputs = [bert(tokens[:, 0], tokens[:, 1], tokens[:, 2]).last_hidden_state for bert in (one, two)]
    assert outputs[0].shape == (2, TINY.text.max_steps, 64)
    assert torch.equal(*outputs)


def test_heads_are_set_wherever_they_stand() -> None:
    config = {"heads": 8, "a": {"heads": 8, "depth": 2, "b": {"heads": 4}}, "c": 8}
    peer_lnln._set_all(config, "heads", 2)
    assert config == {"heads": 2, "a": {"heads": 2, "depth": 2, "b": {"heads": 2}}, "c": 8}


# --- which runs -------------------------------------------------------------------------------------------------------


def run(model: str, rate: float, seed: int = 0, mae: float = 1.0, data: str = "raw") -> dict[str, Any]:
    curve = [
        {"epoch": e, "loss": 2.0, "validation_mae": mae + 0.1 * (2 - e), "seconds": 8.0, "processor_seconds": 6.0}
        for e in (1, 2)
    ]
    return {
        "model": model,
        "learning_rate": rate,
        "input": data,
        "seed": seed,
        "epoch": 2,
        "validation_mae": mae,
        "parameters": {"all": 123456, "text_encoder": 789},
        "processor_seconds_per_epoch": 6.0,
        "test": {"mae": [0.5 + 0.1 * k + seed for k in range(10)], "acc2": [0.9 - 0.05 * k for k in range(10)]},
        "curve": curve,
    }


def keys(runs: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["learning_rate"], r["input"], r["seed"]) for r in runs]


def test_settings_are_tried_with_one_seed_and_the_best_run_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_lnln, "LEARNING_RATES", {"lnln": (0.1, 0.2, 0.3)})
    runs: list[dict[str, Any]] = []
    assert keys(peer_lnln.next_runs(runs, "lnln", [4, 5, 6])) == [(r, "raw", 4) for r in (0.1, 0.2, 0.3)]
    runs += [run("lnln", 0.1, 4, 1.2), run("lnln", 0.2, 4, 1.1)]
    assert keys(peer_lnln.next_runs(runs, "lnln", [4, 5, 6])) == [(0.3, "raw", 4)]
    # The other input is tried at the best rate, and loses here.
    runs.append(run("lnln", 0.3, 4, 1.3))
    assert keys(peer_lnln.next_runs(runs, "lnln", [4, 5, 6])) == [(0.2, "standardised", 4)]
    runs.append(run("lnln", 0.2, 4, 1.15, "standardised"))
    assert keys(peer_lnln.next_runs(runs, "lnln", [4, 5, 6])) == [(0.2, "raw", 5), (0.2, "raw", 6)]
    # A lucky run of other settings with a later seed is none of the chosen ones.
    runs += [run("lnln", 0.2, 5, 1.4), run("lnln", 0.1, 5, 0.1), run("lnln", 0.2, 6, 1.4), run("hcmen", 0.2, 5, 0.1)]
    assert peer_lnln.next_runs(runs, "lnln", [4, 5, 6]) == []
    assert [(r["learning_rate"], r["seed"], r["model"]) for r in peer_lnln.chosen(runs, "lnln", 4)] == [
        (0.2, 4, "lnln"),
        (0.2, 5, "lnln"),
        (0.2, 6, "lnln"),
    ]


class Drifting:
    """A model whose error is |epoch - 3|, 0.1 label units per dropped share on top: the third epoch is the best."""

    def __init__(self, labels: dict[str, np.ndarray]) -> None:
        self.labels = labels
        self.model = torch.nn.Linear(1, 1)
        self.text_encoder = torch.nn.Linear(1, 1, bias=False)

    def run(self, on_epoch: Any) -> None:
        for epoch in range(1, 6):
            with torch.no_grad():
                self.model.weight.fill_(epoch)
            on_epoch(epoch, 1.0 / epoch, 2.0, 1.5 + epoch)

    def predict(self, split: str, mask: Masks) -> np.ndarray:
        return self.labels[split] + abs(float(self.model.weight.detach()) - 3) + 0.1 * mask.dropped_steps["audio"]


def test_the_epoch_is_the_one_that_validation_chooses() -> None:
    dataset = dataset_from_mmsa(DATA, "synthetic", TINY.inputs)
    intra = PROTOCOLS["intra"]
    validation = {k: v for k, v in intra.apply(dataset.splits["valid"], 1).items() if k in peer_lnln.CHOOSING}
    test = intra.apply(dataset.splits["test"], 0)
    material = peer_lnln.Material({}, dataset, validation, test, {}, Path())
    model = Drifting({name: split.labels.astype(np.float64) for name, split in dataset.splits.items()})
    said: list[str] = []
    found = peer_lnln.one_run(model, material, said.append)
    assert found["epoch"] == 3
    shares = [m.dropped_steps["audio"] for m in validation.values()]
    assert len(shares) == 4
    assert found["validation_mae"] == pytest.approx(0.1 * statistics.fmean(shares))
    assert [c["epoch"] for c in found["curve"]] == [1, 2, 3, 4, 5]
    assert [round(c["validation_mae"] - found["validation_mae"], 6) for c in found["curve"]] == [2, 1, 0, 1, 2]
    # Of the third epoch's weights, not of the last one's.
    assert found["test"]["mae"] == pytest.approx([0.1 * m.dropped_steps["audio"] for m in test.values()])
    truth = dataset.splits["test"].labels
    assert found["test"]["acc2"][0] == metrics.scores(truth, truth, "mosi")["acc2_non0"] == 1.0
    assert found["parameters"] == {"all": 2, "text_encoder": 1}
    assert found["processor_seconds_per_epoch"] == 4.5
    assert len(said) == 5


# --- files ------------------------------------------------------------------------------------------------------------

SETTINGS = {
    "samples": [640, 120, 400],
    "epochs": 2,
    "batch_size": 32,
    "heads": 2,
    "seeds": [0, 1],
    "threads": 1,
    "choosing": ["r=0.0"],
}


def results(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"settings": SETTINGS, "floor": {"mae": 1.51, "acc2": 0.521}, "runs": runs}


def rows(page: str, columns: int) -> dict[str, list[str]]:
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells if len(row) == columns}


def test_the_table() -> None:
    runs = [run("hcmen", 1e-3, 0, 1.0), run("hcmen", 1e-3, 1, 1.1), run("hcmen", 2e-3, 0, 1.2)]
    both = results([*runs, run("lnln", 4e-4, 0, 1.3)])
    page = peer_lnln.table(both)
    assert "LNLN with 2 attention heads" in page
    found = rows(page, 7)
    deviation = f"{2**-0.5:.3f}"
    assert found["steps dropped"] == ["HCMEN: MAE", "LNLN: MAE", "floor: MAE"] + [
        f"{x}: Acc-2 %" for x in ("HCMEN", "LNLN", "floor")
    ]
    assert found["r=0.3"] == [f"1.300 ± {deviation}", "0.800", "1.510", "75.0 ± 0.0", "75.0", "52.1"]
    assert found["mean of the ten"] == [f"1.450 ± {deviation}", "0.950", "1.510", "67.5 ± 0.0", "67.5", "52.1"]
    assert list(found) == ["steps dropped", "---", *(f"r=0.{k}" for k in range(10)), "mean of the ten"]
    about = rows(page, 9)
    assert about["HCMEN"] == ["0, 1", "0.001", "raw", "2, 2", "123,456", "789", "6.00", "0.2"]
    assert "| HCMEN | 0.002 | raw | 2 | 1.2000 |" in page
    assert "seconds per epoch" not in page
    timed = {"threads": 1, "seconds_per_epoch": {"hcmen": [1.0, 2.0, 2.0], "lnln": [4.0, 9.0, 10.0]}}
    assert "HCMEN 2.00 s, LNLN 9.00 s, LNLN takes 4.5 times as long (4.0 to 5.0)" in peer_lnln.table(
        {**both, "timing": timed}
    )
    # One model alone, as long as the other has no run.
    assert rows(peer_lnln.table(results(runs)), 5)["r=0.0"] == [f"1.000 ± {deviation}", "1.510", "90.0 ± 0.0", "52.1"]


def test_results_are_added_by_whoever_comes(tmp_path: Path) -> None:
    out = tmp_path / "new" / "peer.json"
    for rate in (1e-3, 2e-3):
        with peer_lnln.results_file(out, SETTINGS, results([])) as found:
            found["runs"].append(run("hcmen", rate))
    assert [r["learning_rate"] for r in json.loads(out.read_bytes())["runs"]] == [1e-3, 2e-3]
    assert out.with_suffix(".md").read_text(encoding="utf-8") == peer_lnln.table(json.loads(out.read_bytes()))
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    for wrong in ({"epochs": 3}, {"seeds": [0]}, {"seeds": [1, 0, 2]}):
        with (
            pytest.raises(SystemExit, match="choose another --out"),
            peer_lnln.results_file(out, {**SETTINGS, **wrong}, results([])),
        ):
            pass
    with peer_lnln.results_file(out, {**SETTINGS, "seeds": [0, 1, 2]}, results([])) as found:
        found["runs"].append(run("hcmen", 1e-3, 2))
    kept = json.loads(out.read_bytes())
    assert kept["settings"]["seeds"] == [0, 1, 2]
    assert len(kept["runs"]) == 3


def test_a_run_is_done_once(tmp_path: Path) -> None:
    out = tmp_path / "peer.json"
    wanted = {k: v for k, v in run("hcmen", 1e-3).items() if k in ("model", "learning_rate", "input", "seed")}
    done: list[Any] = []

    def opened() -> Any:
        return peer_lnln.results_file(out, SETTINGS, results([]))

    def do(what: dict[str, Any]) -> dict[str, Any]:
        done.append(what)
        # Another process that comes meanwhile has to leave it alone.
        assert not peer_lnln._done_here(out, wanted, do, opened)
        return {k: v for k, v in run("hcmen", 1e-3).items() if k not in wanted}

    for _ in range(2):
        assert peer_lnln._done_here(out, wanted, do, opened)
    assert done == [wanted]
    assert json.loads(out.read_bytes())["runs"] == [run("hcmen", 1e-3)]


def test_a_folder_that_is_no_checkout(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--lnln", str(tmp_path), "--out", str(tmp_path / "x.json")],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("expected a checkout of Haoyu-ha/LNLN: give its folder")
    assert not (tmp_path / "x.json").exists()
