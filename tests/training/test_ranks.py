"""Training in two processes over gloo: the run of one process, and one end for both.

What two processes may differ in from one is rounding: sums over a batch come in another order. Everything runs without
dropout, whose draws are each process's own.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.micro import MICRO
from helpers.ranks import Done, environment, free_port, run

import hcmen.data.synthetic
from hcmen.base.errors import InputError
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.models.hcmen.losses import AlignmentLoss
from hcmen.training import command as train
from hcmen.training import ranks
from hcmen.training import trainer as training
from hcmen.training.checkpoint import load_state
from hcmen.training.config import TrainConfig
from hcmen.training.presets import Preset
from hcmen.training.ranks import Ranks
from hcmen.training.trainer import Trainer

MODEL = dataclasses.replace(MICRO, dropout=0.0)
# Odd numbers, which two cannot share evenly; the last batch is a single sample, of which one process has none.
SAMPLES = (23, 11, 8)
# At ten times the learning rate these 9 steps amplify rounding a thousandfold: weights that differ by 3e-8 at first
# make loss curves that differ by 2e-4, in one process as well. Here it stays at 1e-6.
TRAIN = TrainConfig(epochs=3, batch_size=11, learning_rate=1e-3, alignment_weight=0.1)

CASES: dict[str, dict[str, Any]] = {
    "alignment": {},
    "manifold": {"mix": "manifold", "aux": "polarity"},
    "ms-mix": {"mix": "ms-mix"},
    "mixup": {"mix": "mixup"},
    "powmix": {"mix": "powmix", "powmix_probability": 1.0},
    "micro-batches": {"mix": "ms-mix", "micro_batches": 3},
}

# The log level is what hcmen-train sets, before it loads torch.
HEAD = f"""
import dataclasses, hashlib, json, os, signal, sys
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
from pathlib import Path
import numpy as np, torch
from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig
from hcmen.training.presets import Preset
from hcmen.training.config import TrainConfig
from hcmen.data import synthetic
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.training import checkpoint, command as train, trainer as training
from hcmen.base.errors import InputError
from hcmen.training.ranks import joined

rank = int(os.environ.get("RANK", "0"))
micro = Preset("tiny", "for tests", {MODEL!r}, {TRAIN!r})
train.preset_named = lambda name: micro
synthetic.SAMPLES["tiny"] = {SAMPLES!r}
"""

ALL_CASES = f"""{HEAD}
data = dataset_from_mmsa(synthetic.make_synthetic(micro.model.inputs, {SAMPLES!r}), "synthetic", micro.model.inputs)
with joined("cpu") as ranks:
    for name, changes in {CASES!r}.items():
        out = Path(sys.argv[1]) / name
        if rank == 0:
            out.mkdir()
        trainer = training.Trainer(
            micro.model, dataclasses.replace(micro.train, **changes), data, out, ranks=ranks
        )
        trainer.run()
        weights = b"".join(p.detach().numpy().tobytes() for p in trainer._parameters.values())
        print(name, hashlib.sha256(weights).hexdigest())
"""

COMMAND = f"""{HEAD}
{{change}}
train.main.main(sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "preset_named", lambda name: Preset("tiny", "for tests", MODEL, TRAIN))
    monkeypatch.setitem(hcmen.data.synthetic.SAMPLES, "tiny", SAMPLES)


@pytest.fixture(scope="module")
def dataset():
    return dataset_from_mmsa(make_synthetic(MODEL.inputs, SAMPLES), "synthetic", MODEL.inputs)


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(got: Path, expected: Path, bound: float = 2e-5) -> None:
    """Loss curves and weights within `bound`, well below the 1e-4 that is promised."""
    for one, other in zip(log(got), log(expected), strict=True):
        for name in ("validation_mae", *(key for key in other if key.endswith("loss"))):
            assert one[name] == pytest.approx(other[name], abs=bound, rel=bound), (one["epoch"], name)
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)
        assert one["best"] == other["best"]
    for file in ("checkpoint.safetensors", "last.safetensors"):
        mine, theirs = (safetensors.torch.load((f / file).read_bytes()) for f in (got, expected))
        assert mine.keys() == theirs.keys()
        for name in mine:
            if "exp_avg" not in name:
                torch.testing.assert_close(mine[name], theirs[name], atol=bound, rtol=bound)


def numbers(folder: Path) -> Any:
    """Everything a run leaves, bit for bit, without times."""
    tensors, state = load_state(folder)
    records = [{k: v for k, v in record.items() if k != "seconds"} for record in (*state["history"], *log(folder))]
    return (
        (folder / "checkpoint.safetensors").read_bytes(),
        {k: x.numpy().tobytes() for k, x in tensors.items()},
        records,
    )


def errors(done: list[Done]) -> list[str]:
    """The error lines of all processes together."""
    return [line for d in done for line in d.err.splitlines() if line.startswith("error:")]


# --- the same run -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Done]]:
    """All cases, by two processes."""
    folder = tmp_path_factory.mktemp("two")
    done = run(2, ALL_CASES, folder)
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    return folder, done


@pytest.mark.parametrize("case", CASES)
def test_two_processes_make_the_run_of_one(case: str, two: tuple[Path, list[Done]], tmp_path: Path, dataset) -> None:
    Trainer(MODEL, dataclasses.replace(TRAIN, **CASES[case]), dataset, tmp_path).run()
    assert_same_run(two[0] / case, tmp_path)
    on = {
        "alignment_loss": True,
        "mix_loss": case != "alignment",
        "intensity_loss": case in ("ms-mix", "micro-batches"),
    }
    for record in log(tmp_path):
        assert {name: record[name] > 0 for name in on} == on
    # A run that did not learn would agree too.
    first, last = (log(tmp_path)[i]["task_loss"] for i in (0, -1))
    assert abs(first - last) > 1e-3


def test_both_processes_end_with_the_same_weights(two: tuple[Path, list[Done]]) -> None:
    said = [d.out for d in two[1]]
    assert said[0] == said[1]
    assert len(set(said[0].split())) == 2 * len(CASES)


def test_losses_that_saw_a_share_only_would_be_noticed(
    two: tuple[Path, list[Done]], tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound above tells the batch's InfoNCE from that of halves, which is what averaging gradients alone gives."""
    whole = AlignmentLoss.forward

    def halves(self: Any, clean: Any, corrupted: Any) -> Any:
        n = len(clean.score) // 2
        parts = [
            whole(self, training._rows(clean, rows), training._rows(corrupted, rows))
            for rows in (slice(None, n), slice(n, None))
        ]
        return sum(parts) / 2

    monkeypatch.setattr(AlignmentLoss, "forward", halves)
    Trainer(MODEL, TRAIN, dataset, tmp_path).run()
    with pytest.raises(AssertionError):
        assert_same_run(two[0] / "alignment", tmp_path, 1e-2)


def test_shares_are_neighbours_and_even() -> None:
    for count, world in ((11, 2), (1, 2), (0, 3), (7, 3), (2, 5)):
        parts = [np.arange(count)[Ranks(None, rank, world).share(count)] for rank in range(world)]
        assert np.concatenate(parts).tolist() == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_dropout_differs_between_processes_and_the_first_is_as_alone() -> None:
    seeds = [training._torch_seed(0, epoch, rank) for epoch in (1, 2) for rank in range(4)]
    assert len(set(seeds)) == len(seeds)
    assert training._torch_seed(3, 5, 0) == int(np.random.SeedSequence((3, 3, 5)).generate_state(1)[0])


# --- one end for both -------------------------------------------------------------------------------------------------

# Done by the processes in one another's presence, one scenario after the other: what is changed, arguments.
ENDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "nothing": ("", ()),
    "input error in the second": (
        "if rank == 1: at(2, 1, lambda: (_ for _ in ()).throw(InputError('the file has gone')))",
        (),
    ),
    "full disk in the first": ("checkpoint.save_state = full", ()),
    "Ctrl-C in the second": ("if rank == 1: at(2, 1, lambda: os.kill(os.getpid(), signal.SIGINT))", ()),
    "Ctrl-C in both": ("at(2, 0, lambda: os.kill(os.getpid(), signal.SIGINT))", ()),
    "a loss that is none": ("poison = True", ("--learning-rate", "1e30")),
    "other data": ("if rank == 1: synthetic.SAMPLES['tiny'] = (25, 11, 8)", ()),
    "a folder with a run": ("(Path(out) / 'config.json').parent.mkdir(); (Path(out) / 'config.json').touch()", ()),
    "nothing to resume": ("", ("--resume",)),
    "a wrong option": ("", ("--epochs", "x")),
    "a wrong setting": ("", ("--set", "epoch=1")),
}

SCENARIOS = f"""{HEAD}
import contextlib, io
ENDS = {ENDS!r}
root, ports = sys.argv[1], sys.argv[2:]
step, save = training.Trainer._step, checkpoint.save_state

def at(epoch, number, action):
    def changed(self, e, n, *rest):
        if (e, n) == (epoch, number):
            action()
        return step(self, e, n, *rest)
    training.Trainer._step = changed

def full(folder, tensors, state):
    if len(state["history"]) == 2:
        raise InputError("no space left")
    save(folder, tensors, state)

for (name, (change, arguments)), port in zip(ENDS.items(), ports):
    os.environ["MASTER_PORT"] = port
    out = f"{{root}}/{{name}}"
    training.Trainer._step, checkpoint.save_state, synthetic.SAMPLES["tiny"] = step, save, {SAMPLES!r}
    if rank == 0 or "mkdir" not in change:
        exec(change)
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = train.main.main(["--out", out, "--threads", "1", *arguments], standalone_mode=False)
    sys.__stdout__.write(json.dumps({{"code": code, "out": stdout.getvalue(), "err": stderr.getvalue()}}) + "\\n")
    sys.__stdout__.flush()
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Done]]]:
    """How each scenario ended in both processes."""
    folder = tmp_path_factory.mktemp("ends")
    done = run(2, SCENARIOS, folder, *(free_port() for _ in ENDS))
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    said = [[Done(**json.loads(line)) for line in d.out.splitlines()] for d in done]
    return folder, {name: [one[i] for one in said] for i, name in enumerate(ENDS)}


GONE = (3, "another process of this run has ended or does not answer .*: see what stopped it, then go on with --resume")
SILENT = (2, "")


def same(code: int, message: str) -> tuple[tuple[int, str], tuple[int, str]]:
    return (code, message), (code, message)


@pytest.mark.parametrize(
    ("end", "expected"),
    [
        ("input error in the second", (GONE, (2, "the file has gone"))),
        ("full disk in the first", ((2, "no space left"), GONE)),
        ("Ctrl-C in the second", (GONE, (130, "interrupted"))),
        ("Ctrl-C in both", same(130, "interrupted")),
        ("a loss that is none", same(1, r"the (loss|gradient) is (nan|inf) in epoch 1, step .*there is no checkpoint")),
        ("other data", same(2, "process 1 has other data than process 0: give every process of a run the same")),
        ("a folder with a run", ((2, "holds config.json of a run already: --resume it"), GONE)),
        ("nothing to resume", same(2, "holds no last.safetensors to resume from")),
        ("a wrong option", ((2, "'x' is not a valid integer"), SILENT)),
        ("a wrong setting", ((2, "--set epoch=1: unknown training setting 'epoch': did you mean 'epochs'?"), SILENT)),
    ],
)
def test_an_end_of_one_ends_both(end: str, expected: tuple[tuple[int, str], ...], ended: Any) -> None:
    """Each with its own exit code and at most one line of error."""
    for done, (code, message) in zip(ended[1][end], expected, strict=True):
        assert (done.code, done.out) == (code, "")
        found = errors([done])
        assert len(found) == bool(message), found
        assert re.search(message, found[0] if found else "")
    # Nothing else either, besides what the first says of its progress.
    assert all(line.startswith("error:") for line in ended[1][end][1].err.splitlines())


def test_the_first_alone_talks_and_writes(ended: Any) -> None:
    folder, ends = ended
    first, second = ends["nothing"]
    assert (first.code, second.code) == (0, 0)
    assert first.out.startswith("test split, 8 samples")
    assert [line for line in first.err.splitlines() if line.startswith("epoch 3/3: ")]
    assert (second.out, second.err) == ("", "")
    assert len(list((folder / "nothing" / "clips").iterdir())) == 11
    assert not list(folder.rglob("*.tmp"))


def test_what_was_interrupted_goes_on_in_one_process(ended: Any) -> None:
    folder, _ = ended
    for end in ("Ctrl-C in the second", "full disk in the first"):
        assert len(log(folder / end)) == 1
        assert train.main.main(["--out", str(folder / end), "--resume", "-q"], standalone_mode=False) == 0
        assert_same_run(folder / end, folder / "nothing")


KILL = """
step = training.Trainer._step
def changed(self, epoch, number, *rest):
    if rank == {victim} and (epoch, number) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, epoch, number, *rest)
training.Trainer._step = changed
"""


def test_a_killed_process_ends_the_other_and_the_run_goes_on(ended: Any, tmp_path: Path) -> None:
    """Two go on as if nothing had been, bit for bit."""
    done = run(2, COMMAND.format(change=KILL.format(victim=0)), "--out", tmp_path / "train", "-q")
    assert [d.code for d in done] == [-9, 3]
    assert len(done[1].err.splitlines()) == 1, done[1].err
    assert "error: another process of this run has ended or does not answer (" in done[1].err
    assert "go on with --resume" in done[1].err
    assert len(load_state(tmp_path / "train")[1]["history"]) == 1
    done = run(2, COMMAND.format(change=""), "--out", tmp_path / "train", "--resume", "-q")
    assert [d.code for d in done] == [0, 0], [d.err for d in done]
    assert numbers(tmp_path / "train") == numbers(ended[0] / "nothing")


def test_torchrun_is_told_who_failed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the file that its agent reads; a summary without it blames whoever it polls first."""
    monkeypatch.setattr(ranks, "_join", lambda device: Ranks(None, 1, 2))
    monkeypatch.setattr(ranks, "end_at_once", lambda: None)
    monkeypatch.setattr(ranks, "_leave", lambda: None)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    with warnings.catch_warnings(), pytest.raises(InputError, match="has gone"), ranks.joined("cpu"):
        raise InputError("the file has gone")
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"] == "InputError: the file has gone"


# --- torchrun ---------------------------------------------------------------------------------------------------------


def torchrun(folder: Path, change: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command under torchrun; its own words are about the workers, ours are lines with "error:"."""
    script = folder / "command.py"
    script.write_text(COMMAND.format(change=change))
    return subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *(str(script), "--out", str(folder / "train"), "--format", "json", *arguments),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )


def test_torchrun_finishes_what_one_process_began(ended: Any, tmp_path: Path, dataset) -> None:
    class Stop(Exception):
        pass

    def stop(progress: Any) -> None:
        if (progress.epoch, progress.step) == (2, 1):
            raise Stop

    folder = tmp_path / "train"
    folder.mkdir()
    with pytest.raises(Stop):
        Trainer(MODEL, TRAIN, dataset, folder, {"preset": "tiny", "data": None}).run(stop)
    done = torchrun(tmp_path, "", "--resume")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["test"]["full"]["hcmen"]["mae"] > 0
    assert_same_run(folder, ended[0] / "nothing")


def test_torchrun_and_a_killed_process(ended: Any, tmp_path: Path) -> None:
    """One process finishes the run."""
    done = torchrun(tmp_path, KILL.format(victim=1))
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, done.stderr
    # torchrun stops the others as well, and either may come first.
    assert "another process of this run has ended" in lines[0] or lines[0] == "error: terminated"
    assert train.main.main(["--out", str(tmp_path / "train"), "--resume", "-q"], standalone_mode=False) == 0
    assert_same_run(tmp_path / "train", ended[0] / "nothing")
