"""hcmen-train --log: what a run says of itself elsewhere, and that no log costs a training anything."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.micro import MICRO
from helpers.micro_runs import PROGRAM, SAMPLES, TRAIN, command, make_micro, on_one_thread, result

from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.training import command as train
from hcmen.training import loggers
from hcmen.training.loggers import Loggers, WeightsAndBiases
from hcmen.training.trainer import Trainer


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from on_one_thread(monkeypatch)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run without a log leaves."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    with pytest.MonkeyPatch.context() as patch:
        make_micro(patch)
        assert command("--out", folder, "--threads", 1, "-q") == 0
    return result(folder)


class Heard:
    """A logger that keeps what it is told, and may fail."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, Any]] = []
        self.fails = fails

    def _hear(self, what: str, value: Any) -> None:
        self.calls.append((what, value))
        if what == self.fails:
            raise OSError(28, "No space left on device")

    def start(self, config: Mapping[str, Any]) -> None:
        self._hear("start", config)

    def epoch(self, record: Mapping[str, Any]) -> None:
        self._hear("epoch", record)

    def end(self, report: Mapping[str, Any] | None) -> None:
        self._hear("end", report)


def heard(monkeypatch: pytest.MonkeyPatch, fails: str = "") -> Heard:
    """Has --log tensorboard be a logger that keeps what it is told."""
    logger = Heard(fails)
    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", lambda: logger)
    return logger


# --- what any logger is told ------------------------------------------------------------------------------------------


def test_a_logger_is_told_what_the_files_say(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = heard(monkeypatch)
    assert command("--log", "tensorboard", "--log", "tensorboard", "--out", tmp_path, "-q") == 0
    assert [what for what, _ in logger.calls] == ["start", "epoch", "epoch", "epoch", "end"]
    config = json.loads((tmp_path / "config.json").read_text())
    start = logger.calls[0][1]
    assert (start["out"], start["group"], start["resumed_after"]) == (str(tmp_path), None, 0)
    assert {key: start[key] for key in ("kind", "model", "train", "run")} == {
        key: config[key] for key in ("kind", "model", "train", "run")
    }
    assert [r for _, r in logger.calls[1:-1]] == [
        json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()
    ]
    assert logger.calls[-1][1]["test"].keys() == json.loads((tmp_path / "report.json").read_text())["test"].keys()
    assert result(tmp_path) == plain, "a log changes nothing"


def test_the_runs_of_several_seeds_are_runs_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = heard(monkeypatch)
    assert command("--log", "tensorboard", "--seeds", "1,2", "--out", tmp_path / "both", "-q") == 0
    starts = [value for what, value in logger.calls if what == "start"]
    assert [Path(s["out"]).name for s in starts] == ["seed-1", "seed-2"]
    assert {s["group"] for s in starts} == {"both"}
    assert sum(what == "end" and value is not None for what, value in logger.calls) == 2


def test_a_training_that_fails_ends_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = heard(monkeypatch)
    before = Trainer._losses
    monkeypatch.setattr(Trainer, "_losses", lambda *a: {k: x * float("nan") for k, x in before(*a).items()})
    assert command("--log", "tensorboard", "--out", tmp_path, "-q") == 1
    assert [(what, value) for what, value in logger.calls if what != "start"] == [("end", None)]


@pytest.mark.parametrize("fails", ["start", "epoch", "end"])
def test_a_logger_that_fails_costs_one_warning(
    plain: dict[str, Any],
    tmp_path: Path,
    fails: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    logger = heard(monkeypatch, fails)
    assert command("--log", "tensorboard", "--out", tmp_path, "-q") == 0
    assert capsys.readouterr().err.splitlines() == [
        "warning: the log of tensorboard ends here (OSError: [Errno 28] No space left on device); the training goes on"
    ]
    assert sum(what == fails for what, _ in logger.calls) == 1
    assert logger.calls[-1][0] == fails
    assert result(tmp_path) == plain


def test_a_logger_cannot_change_the_run(tmp_path: Path, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    class Rude(Heard):
        def epoch(self, record: Any) -> None:
            record["validation"].clear()
            record["best"] = None
            torch.manual_seed(0)

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Rude)
    assert command("--log", "tensorboard", "--out", tmp_path, "-q") == 0
    assert result(tmp_path) == plain


def test_ctrl_c_is_no_failure_of_a_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = heard(monkeypatch)
    logger.epoch = lambda record: (_ for _ in ()).throw(KeyboardInterrupt)  # type: ignore[method-assign]
    assert command("--log", "tensorboard", "--out", tmp_path, "-q") == 130
    assert logger.calls[-1] == ("end", None)


def test_from_python(tmp_path: Path) -> None:
    dataset = dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs)
    mine, told = Heard(), list[str]()
    both = Loggers({"mine": mine, "broken": Heard("epoch")}, told.append)
    trainer = Trainer(MICRO, TRAIN, dataset, tmp_path)
    both.start({"out": str(tmp_path), "resumed_after": 0})
    trainer.run(on_epoch=both.epoch)
    both.end({"test": {}})
    both.end(None)
    assert [record["epoch"] for what, record in mine.calls if what == "epoch"] == [1, 2, 3]
    assert [what for what, _ in mine.calls].count("end") == 1
    assert len(told) == 1
    assert told[0].startswith("the log of broken ends here")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_what_is_not_installed_is_said_before_the_training(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == name or m.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not there
    assert command("--log", name, "--out", tmp_path / "run") == 3
    assert capsys.readouterr().err.splitlines() == [f"error: {name} is not installed: pip install 'hcmen[{name}]'"]
    assert not list((tmp_path / "run").iterdir())


def test_what_is_no_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--log", "tensorbord", "--out", tmp_path) == 2
    assert "did you mean 'tensorboard'?" in capsys.readouterr().err
    assert set(loggers.LOGGERS) == {"tensorboard", "wandb"}
    assert train.main.params


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard itself reads of a run: {tag: [(step, value)]}."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def of_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The same, by log.jsonl and report.json."""
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    expected: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        values = {k: v for k, v in record.items() if k not in ("epoch", "best", "validation")}
        values |= {f"validation/{name}": value for name, value in record["validation"].items()}
        for name, value in values.items():
            expected.setdefault(name, []).append((record["epoch"], value))
    for variant, models in json.loads((folder / "report.json").read_text())["test"].items():
        for who, measures in models.items():
            expected |= {f"test/{variant}/{who}/{m}": [(len(records), v)] for m, v in measures.items()}
    return expected


def check(folder: Path) -> None:
    found, expected = scalars(folder), of_log(folder)
    assert found.keys() == expected.keys()
    for tag, values in expected.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in values]
        assert [v for _, v in found[tag]] == pytest.approx([v for _, v in values], rel=1e-6)


def test_tensorboard_has_every_number_of_the_log(tmp_path: Path, plain: dict[str, Any]) -> None:
    pytest.importorskip("tensorboard")
    assert command("--log", "tensorboard", "--out", tmp_path, "-q") == 0
    check(tmp_path)
    assert result(tmp_path) == plain
    # A run from the start has nothing of the one before.
    assert command("--log", "tensorboard", "--out", tmp_path, "--force", "--epochs", 1, "-q") == 0
    check(tmp_path)
    assert command("--out", tmp_path, "--force", "-q") == 0
    assert not list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_goes_on_in_the_same_log(tmp_path: Path, plain: dict[str, Any]) -> None:
    """Also where an epoch was logged that the state does not have."""
    pytest.importorskip("tensorboard")
    change = """
save = checkpoint.save_state
def save_state(folder, tensors, state):
    if len(state["history"]) == 2:
        from hcmen.training.loggers import TensorBoard
        ahead = TensorBoard()
        ahead.start({"out": str(folder), "resumed_after": 1})
        ahead.epoch({**state["history"][-1], "loss": 99.0})
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, tensors, state)
checkpoint.save_state = save_state
"""
    line = [sys.executable, "-c", PROGRAM.format(change=change), "--threads", "1", "--log", "tensorboard"]
    assert subprocess.run([*line, "--out", tmp_path], capture_output=True, timeout=400).returncode == -9
    assert scalars(tmp_path)["loss"][-1] == (2, 99.0)
    time.sleep(1.1)  # TensorBoard reads files by the second in their names; a command takes longer to start
    assert command("--resume", "--log", "tensorboard", "--out", tmp_path, "-q") == 0
    check(tmp_path)
    assert result(tmp_path) == plain


def test_a_full_disk_ends_the_log_alone(tmp_path: Path) -> None:
    """The kernel refuses what TensorBoard's own thread writes; the files of the run lie elsewhere."""
    pytest.importorskip("tensorboard")
    change = """
from tensorboard.summary.writer import record_writer
write = record_writer.RecordWriter.write
def full(self, data):
    if b"validation" in data:
        raise OSError(28, "No space left on device")
    write(self, data)
record_writer.RecordWriter.write = full
"""
    line = [sys.executable, "-c", PROGRAM.format(change=change), "--threads", "1", "--log", "tensorboard", "-q"]
    done = subprocess.run([*line, "--out", tmp_path], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"warning: the log of tensorboard ends here \(OSError: .*No space left on device\); the training goes on\n",
        done.stderr,
    ), done.stderr
    assert (tmp_path / "report.json").exists()


# --- W&B, by a stand-in that has what is used of it -------------------------------------------------------------------


class FakeWandb(types.ModuleType):
    """Keeps what it is asked for. init raises for modes in `unreachable`."""

    def __init__(self, unreachable: tuple[str | None, ...] = ()) -> None:
        super().__init__("wandb")
        self.unreachable = unreachable
        self.in_use: str | None = None
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished: list[int] = []
        self.summary: dict[str, float] = {}

    def Settings(self, **options: Any) -> Any:
        return types.SimpleNamespace(base_url="https://wandb.example:8080/path", **options)

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        assert options["id"] != self.in_use, "as wandb itself: run ID in use"
        if options["mode"] in self.unreachable:
            self.in_use = options["id"]
            raise RuntimeError("no answer from the server")
        return self

    def teardown(self) -> None:
        self.in_use = None

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


@pytest.fixture
def no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def fake_wandb(monkeypatch: pytest.MonkeyPatch, unreachable: tuple[str | None, ...] = ()) -> FakeWandb:
    fake = FakeWandb(unreachable)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_wandb_is_told_every_number(
    tmp_path: Path, plain: dict[str, Any], no_key: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = fake_wandb(monkeypatch), tmp_path / "run"
    assert command("--log", "wandb", "--out", out, "-q") == 0
    assert result(out) == plain
    expected = of_log(out)
    test = {name: values[0][1] for name, values in expected.items() if name.startswith("test/")}
    assert fake.summary == pytest.approx(test, nan_ok=True)
    for i, (step, values) in enumerate(fake.logged):
        assert step == i + 1
        assert values == {name: found[i][1] for name, found in expected.items() if name not in test}
    assert fake.finished == [0]
    (init,) = fake.inits
    assert (init["mode"], init["project"], init["name"], init["dir"]) == ("offline", "hcmen", "run", str(out))
    assert init["settings"].console == "off"
    assert init["config"]["train"]["epochs"] == 3
    # Gone on with under the same name; begun again under another.
    assert command("--log", "wandb", "--out", out, "--resume", "-q") == 0
    assert fake.inits[1]["id"] == init["id"]
    assert command("--log", "wandb", "--out", out, "--force", "-q") == 0
    assert fake.inits[2]["id"] != init["id"]


@pytest.mark.parametrize(
    ("environment", "netrc", "mode"),
    [
        ({}, "", "offline"),
        ({"WANDB_MODE": "online"}, "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", None),
        ({"WANDB_MODE": "offline"}, "", None),
        ({"WANDB_API_KEY": "0" * 40}, "", None),
        ({"WANDB_API_KEY": "0" * 40, "WANDB_MODE": "offline"}, "", None),
        ({}, "machine wandb.example login user password 0000", None),
        ({}, "machine other.example login user password 0000", "offline"),
        ({}, "not a netrc", "offline"),
    ],
)
def test_nobody_is_asked_for_a_key(
    tmp_path: Path,
    no_key: None,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    netrc: str,
    mode: str | None,
) -> None:
    """Where there is none the run is offline, whatever else is said; else W&B's own variables decide."""
    fake = fake_wandb(monkeypatch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / "netrc").write_text(netrc + "\n")
        (tmp_path / "netrc").chmod(0o600)
    WeightsAndBiases().start({"out": str(tmp_path), "group": None, "resumed_after": 0})
    assert [init["mode"] for init in fake.inits] == [mode]


def test_a_server_that_does_not_answer_leaves_an_offline_run(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    fake = fake_wandb(monkeypatch, unreachable=(None,))
    assert command("--log", "wandb", "--out", tmp_path / "a", "-q") == 0
    assert [init["mode"] for init in fake.inits] == [None, "offline"]
    assert capsys.readouterr().err.splitlines() == [
        "warning: W&B does not answer (no answer from the server): the run is logged offline, send it with wandb sync"
    ]
    assert len(fake.logged) == 3
    fake = fake_wandb(monkeypatch, unreachable=(None, "offline"))
    assert command("--log", "wandb", "--out", tmp_path / "b", "-q") == 0
    assert "the log of wandb ends here (RuntimeError: no answer" in capsys.readouterr().err
    assert fake.logged == []


@pytest.mark.parametrize("content", [b"", b"../../etc", b"0" * 4096, b"ABCDEF01\n", b"0123abcd"])
def test_a_name_of_a_run_that_is_none_is_replaced(
    tmp_path: Path, no_key: None, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    fake = fake_wandb(monkeypatch)
    (tmp_path / "wandb_id.txt").write_bytes(content)
    WeightsAndBiases().start({"out": str(tmp_path), "group": None, "resumed_after": 2})
    assert re.fullmatch("[0-9a-f]{8}", fake.inits[0]["id"])
    assert (tmp_path / "wandb_id.txt").read_text() == f"{fake.inits[0]['id']}\n"
