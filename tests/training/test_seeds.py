"""hcmen-train --seeds: whole runs, each the one that --seed makes; mean and deviation; what stops does not stop all."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.command import run
from helpers.micro import MICRO
from helpers.micro_runs import PROGRAM, SAMPLES, command, make_micro, on_one_thread, result

from hcmen.base.errors import InputError
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.evaluation.command import main as evaluate
from hcmen.training.checkpoint import load_checkpoint
from hcmen.training.seeds import several_report, several_text
from hcmen.training.trainer import Trainer

SEEDS = (1, 12, 7)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from on_one_thread(monkeypatch)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three seeds; not to be changed."""
    folder = tmp_path_factory.mktemp("seeds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_micro(patch)
        assert command("--seeds", ",".join(map(str, SEEDS)), "--out", folder, "--threads", 1, "-q") == 0
    return folder


def process(*arguments: Any, change: str) -> subprocess.CompletedProcess[str]:
    program = PROGRAM.format(change=change)
    line = [sys.executable, "-c", program, "--threads", "1", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=400)


def trees(folder: Path) -> dict[str, Any]:
    return {f"seed-{seed}": result(folder / f"seed-{seed}") for seed in SEEDS}


@pytest.mark.parametrize("seed", SEEDS)
def test_each_run_is_that_of_the_seed_alone(several: Path, tmp_path: Path, seed: int) -> None:
    alone = tmp_path / "alone"
    assert command("--seed", seed, "--out", alone, "-q") == 0
    assert result(several / f"seed-{seed}") == result(alone)
    reports = [json.loads((f / "report.json").read_text()) for f in (alone, several / f"seed-{seed}")]
    assert reports[0].pop("checkpoint") != reports[1].pop("checkpoint")
    assert reports[0] == reports[1]
    assert {p.name for p in alone.iterdir()} == {p.name for p in (several / f"seed-{seed}").iterdir()}


def test_runs_on_one_file_are_those_of_each_seed_alone(tmp_path: Path) -> None:
    """The data is read once, and no run leaves anything of itself in it."""
    write_synthetic(tmp_path / "set.pkl", make_synthetic(MICRO.inputs, SAMPLES, 1))
    assert command("--data", tmp_path / "set.pkl", "--seeds", "3,4", "--out", tmp_path / "run", "-q") == 0
    assert command("--data", tmp_path / "set.pkl", "--seed", 4, "--out", tmp_path / "alone", "-q") == 0
    assert result(tmp_path / "run" / "seed-4") == result(tmp_path / "alone")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["test"]["full"]["floor"]["mae"]["deviation"] == 0.0
    assert report["test"]["full"]["hcmen"]["mae"]["deviation"] > 0.0


def test_mean_and_deviation_are_over_the_runs(several: Path) -> None:
    report = json.loads((several / "report.json").read_text())
    single = [json.loads((several / f"seed-{seed}" / "report.json").read_text()) for seed in SEEDS]
    assert report["seeds"] == list(SEEDS)
    assert report["failed"] == {}
    assert report["validation_mae"]["runs"] == [r["validation_mae"] for r in single]
    assert len(report["test"]) == 7
    for variant, models in report["test"].items():
        assert models.keys() == {"hcmen", "floor", "linear"}
        for who, measures in models.items():
            for measure, found in measures.items():
                values = [r["test"][variant][who][measure] for r in single]
                assert found["runs"] == values
                mean = sum(values) / 3
                assert found["mean"] == pytest.approx(mean)
                assert found["deviation"] == pytest.approx(math.sqrt(sum((v - mean) ** 2 for v in values) / 2))


def test_the_table_says_mean_and_deviation_by_hand() -> None:
    def report(mae: float, failed: bool = False) -> dict[str, Any]:
        measures = {"mae": mae, "corr": 0.5, "acc2_non0": mae / 10}
        models = {"hcmen": measures, "floor": {**measures, "mae": 2.0}, "linear": measures}
        dataset = {"name": "x.pkl", "label_min": -3.0, "label_max": 3.0, "samples": {"test": 16}}
        return {"checkpoint": f"r/{mae}", "validation_mae": mae, "dataset": dataset, "test": {"full": models}}

    text = several_text(
        several_report({5: report(1.0), 6: report(2.0), 9: report(6.0)}, {8: "the loss is nan"}), "hcmen"
    )
    rows = [line.split("  ") for line in text.splitlines()]
    full = [cell.strip() for row in rows if row[0] == "full" for cell in row[1:] if cell.strip()]
    # Deviation of 1, 2, 6: ((4 + 1 + 9) / 2) ** 0.5. What is the same in every run has none.
    assert full[:4] == ["3.000 ± 2.646", "2.000", "3.000 ± 2.646", "0.500"]
    assert full[6] == "30.0% ± 26.5%"
    assert "3 seeds (5, 6, 9), validation MAE 3.000 ± 2.646" in text
    assert "seed 8 is left out: the loss is nan" in text
    one = several_text(several_report({5: report(1.0)}, {}), "hcmen")
    assert "±" not in one
    narrow = several_text(several_report({5: report(1.0), 6: report(2.0)}, {}), "hcmen", 60)
    assert max(map(len, narrow.splitlines())) <= 60
    assert "left out in 60 columns: " in narrow


def test_one_seed(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--seeds", "12", "--out", tmp_path, "-q") == 0
    assert result(tmp_path / "seed-12") == result(several / "seed-12")
    assert "1 seed (12)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seeds", "5,6,5"), "seed 5 is there twice"),
        (("--seeds", "05,5"), "seed 5 is there twice"),
        (("--seeds", ""), "'' is no seed, expected numbers from 0 to 4294967295"),
        (("--seeds", "1 2"), "'1 2' is no seed"),
        (("--seeds", "1,-2"), "'-2' is no seed"),
        (("--seeds", "1,4294967296"), "'4294967296' is no seed"),
        (("--seeds", "1," + "9" * 5000), "is no seed"),
        (("--seeds", "1,2", "--seed", 3), "--seeds and --seed exclude each other"),
        (("--seeds", "1,2", "--set", "seed=3"), "--seeds and --seed exclude each other"),
    ],
)
def test_what_is_no_list_of_seeds(
    tmp_path: Path, arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "out").exists()


# --- stopped, resumed, failed -----------------------------------------------------------------------------------------

KILLED = """
step = training.Trainer._step
def _step(self, epoch, number, *rest):
    if (self.train_config.seed, epoch, number) == (12, 2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, epoch, number, *rest)
training.Trainer._step = _step
"""
DIVERGES = """
import torch
objective = training.Trainer._losses
def _losses(self, epoch, *rest):
    found = objective(self, epoch, *rest)
    if self.train_config.seed == 12 and epoch == EPOCH:
        found["loss"] = found["loss"] * float("nan")
    return found
training.Trainer._losses = _losses
"""


def test_a_stopped_call_goes_on(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    assert process("--seeds", "1,12,7", "--out", folder, change=KILLED).returncode == -signal.SIGKILL
    assert not (folder / "report.json").exists()
    assert not list((folder / "seed-7").iterdir())
    ended = (folder / "seed-1" / "checkpoint.safetensors").stat().st_mtime_ns
    for refused, message in (
        (("--seeds", "1,12"), "--seeds is 1,12, the runs in .* have 1,12,7"),
        (("--seed", 1), "--seed is 1, .* has the runs of several"),
        (("--epochs", 9), "--epochs is 9, the run in .* has 3"),
    ):
        assert command("--out", folder, "--resume", *refused) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert re.search(message, error)
    assert command("--out", folder, "--resume") == 0
    assert "resuming after epoch 1 of 3" in capsys.readouterr().err
    assert (folder / "seed-1" / "checkpoint.safetensors").stat().st_mtime_ns == ended
    assert trees(folder) == trees(several)
    reports = [json.loads((f / "report.json").read_text()) for f in (folder, several)]
    assert all(len(r.pop("checkpoints")) == 3 for r in reports)
    assert reports[0] == reports[1]


@pytest.mark.parametrize("epoch", [1, 2])
def test_a_seed_that_diverges_does_not_stop_the_others(several: Path, tmp_path: Path, epoch: int) -> None:
    folder = tmp_path / "run"
    arguments = ("--seeds", "1,12,7", "--out", folder)
    done = process(*arguments, change=DIVERGES.replace("EPOCH", str(epoch)))
    assert done.returncode == 1, done.stderr
    assert "1 of 3 seeds did not come to their end: seed 12: the loss is nan in epoch" in done.stderr.splitlines()[-1]
    assert "2 seeds (1, 7)" in done.stdout
    assert "seed 12 is left out: the loss is nan" in " ".join(done.stdout.split())
    report = json.loads((folder / "report.json").read_text())
    assert report["seeds"] == [1, 7]
    assert list(report["failed"]) == ["12"]
    for seed in (1, 7):
        assert result(folder / f"seed-{seed}") == result(several / f"seed-{seed}")
    # Where it no longer diverges, as on another machine, what is left of the call is one more --resume.
    assert command("--out", folder, "--resume", "-q") == 0
    assert trees(folder) == trees(several)
    assert json.loads((folder / "report.json").read_text())["failed"] == {}


def test_no_seed_that_comes_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def losses(self: Trainer, *rest: Any) -> Any:
        found = before(self, *rest)
        return {**found, "loss": found["loss"] * math.inf}

    before = Trainer._losses
    monkeypatch.setattr(Trainer, "_losses", losses)
    assert command("--seeds", "1,2", "--out", tmp_path, "-q") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "2 of 2 seeds did not come to their end" in err
    assert not (tmp_path / "report.json").exists()


def test_nothing_is_written_over(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "run"))
    for arguments in (("--seeds", "1,2"), ()):
        assert command("--out", folder, *arguments) == 2
        assert "of a run already: --resume it, start over with --force" in capsys.readouterr().err
    assert trees(folder) == trees(several)
    # A folder of one seed that is there already, of a call without --seeds.
    shutil.copytree(several / "seed-7", tmp_path / "other" / "seed-7")
    assert command("--out", tmp_path / "other", "--seeds", "1,7") == 2
    assert f"{tmp_path / 'other' / 'seed-7'}: holds checkpoint.safetensors" in capsys.readouterr().err
    # With --force nothing of the old seeds is left.
    (folder / "seed-1" / "mine.txt").write_text("kept")
    assert command("--out", folder, "--seeds", "12", "--force", "-q") == 0
    assert {p.name for p in folder.iterdir()} == {"run.json", "report.json", "seed-1", "seed-12"}
    assert [p.name for p in (folder / "seed-1").iterdir()] == ["mine.txt"]
    # One run in the place of several.
    assert command("--out", folder, "--seed", "12", "--force", "-q") == 0
    assert result(folder) == result(several / "seed-12")
    assert not (folder / "seed-12").exists()


def test_force_leaves_folders_that_are_runs_of_their_own(several: Path, tmp_path: Path) -> None:
    for seed in (1, 7):
        shutil.copytree(several / f"seed-{seed}", tmp_path / f"seed-{seed}")
    assert command("--out", tmp_path, "--force", "--seed", 3, "-q") == 0
    for seed in (1, 7):
        assert result(tmp_path / f"seed-{seed}") == result(several / f"seed-{seed}")


def test_what_there_is_not_to_resume(several: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", tmp_path, "--resume", "--seeds", "1,2") == 2
    assert "run.json: no such file" in capsys.readouterr().err
    folder = Path(shutil.copytree(several, tmp_path / "run"))
    (folder / "run.json").write_text('{"schema_version": 1, "model": {}, "train": {}, "seeds": [1, 1]}')
    assert command("--out", folder, "--resume") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


# --- for whoever reads them -------------------------------------------------------------------------------------------


def test_hcmen_eval_takes_the_folder_as_its_runs(several: Path, tmp_path: Path) -> None:
    arguments = ("--no-pictures", "--protocol", "fixed", "--threads", 1)
    done = run(evaluate, *arguments, "--checkpoint", several, "--out", tmp_path / "folder")
    assert done.code == 0, done.err
    each = [word for seed in SEEDS for word in ("--checkpoint", several / f"seed-{seed}")]
    assert run(evaluate, *arguments, *each, "--out", tmp_path / "each").code == 0
    reports = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("folder", "each")]
    for key in ("source", "protocols", "floor"):
        assert reports[0][key] == reports[1][key]
    assert [r["training_seed"] for r in reports[0]["source"]["runs"]] == list(SEEDS)


def test_hcmen_eval_leaves_out_what_did_not_come_to_its_end(several: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(several, tmp_path / "run"))
    (folder / "seed-12" / "report.json").unlink()
    arguments = ("--no-pictures", "--protocol", "fixed", "--threads", 1, "--out", tmp_path / "out")
    done = run(evaluate, *arguments, "--checkpoint", folder)
    assert done.code == 0, done.err
    assert f"{folder}: seed 12 did not come to its end and is left out" in done.err
    for seed in SEEDS:
        (folder / f"seed-{seed}" / "report.json").unlink(missing_ok=True)
    done = run(evaluate, *arguments, "--checkpoint", folder)
    assert done.code == 2
    assert "no run in it has come to its end" in done.err


def test_the_folder_is_no_checkpoint_and_says_so(several: Path) -> None:
    with pytest.raises(InputError, match="holds the runs of several seeds, expected one of them, such as seed-1"):
        load_checkpoint(several)
