"""Micro-batches, bfloat16, devices, settings by name, and runs that are killed at any moment."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.micro import MICRO
from helpers.ranks import environment
from torch import nn

import hcmen.data.synthetic
from hcmen.base import metrics
from hcmen.base.errors import BackendError, InputError
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.evaluation.command import main as evaluate_main
from hcmen.mamba import native, scan
from hcmen.mamba.scan import causal_conv1d, causal_conv1d_ref, selective_scan, selective_scan_ref
from hcmen.models.hcmen.losses import AlignmentLoss
from hcmen.training import command as train
from hcmen.training import report
from hcmen.training.checkpoint import load_checkpoint, load_state
from hcmen.training.config import TrainConfig, train_setting
from hcmen.training.device import choose_device
from hcmen.training.evaluate import predict_variants
from hcmen.training.presets import Preset
from hcmen.training.trainer import Trainer

SAMPLES = (24, 12, 16)
# The last batch has 4 samples; three micro-batches of it have 2, 1 and 1.
TRAIN = TrainConfig(epochs=3, batch_size=10, learning_rate=1e-3)
SINGLE = dataclasses.replace(TRAIN, alignment_weight=0.0)
STILL = dataclasses.replace(MICRO, dropout=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "preset_named", lambda name: Preset("tiny", "for tests", MICRO, TRAIN))
    monkeypatch.setitem(hcmen.data.synthetic.SAMPLES, "tiny", SAMPLES)


@pytest.fixture(scope="module")
def dataset():
    return dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs)


def command(*arguments: Any) -> int:
    return train.main.main([*map(str, arguments)], standalone_mode=False)


def trained(folder: Path, dataset: Any, config: TrainConfig, model: Any = STILL) -> Trainer:
    folder.mkdir(exist_ok=True)
    trainer = Trainer(model, config, dataset, folder)
    trainer.run()
    return trainer


# --- micro-batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pieces", [2, 3, 10])
def test_micro_batches_make_the_run_of_the_whole_batch(pieces: int, tmp_path: Path, dataset) -> None:
    """With polarity as well, which like the task is a mean over samples. 24 samples: batches of 10, 10 and 4."""
    config = dataclasses.replace(SINGLE, aux="polarity")
    whole = trained(tmp_path / "whole", dataset, config)
    parts = trained(tmp_path / "parts", dataset, dataclasses.replace(config, micro_batches=pieces))
    for one, other in zip(whole.history, parts.history, strict=True):
        for name in ("loss", *whole.objective.weights, "validation_mae"):
            assert one[name] == pytest.approx(other[name], abs=1e-6, rel=1e-6), name
        assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
    for name, p in whole._parameters.items():
        torch.testing.assert_close(parts._parameters[name], p, atol=3e-6, rtol=1e-5)


def test_micro_batches_weigh_by_samples(tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 2, 1 and 1 samples: each sample counts alike, which pieces of equal weight would not give."""
    trainer = Trainer(STILL, dataclasses.replace(SINGLE, micro_batches=3), dataset, tmp_path)
    sizes: list[int] = []
    losses: list[float] = []
    whole = trainer._losses

    def watched(epoch: int, step: int, split: Any, indices: Any, *rest: Any) -> Any:
        terms = whole(epoch, step, split, indices, *rest)
        sizes.append(len(indices))
        losses.append(float(terms["loss"].detach()))
        return terms

    monkeypatch.setattr(trainer, "_losses", watched)
    monkeypatch.setattr(trainer._optimiser, "step", lambda: None)
    found = trainer._step(1, 0, dataset.splits["train"], np.arange(4))["loss"]
    assert sizes == [2, 1, 1]
    assert found == pytest.approx((2 * losses[0] + losses[1] + losses[2]) / 4, rel=1e-6)
    assert found != pytest.approx(sum(losses) / 3, rel=1e-3)


def test_terms_over_a_batch_see_a_micro_batch(tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    align = AlignmentLoss.forward

    def watched(self: Any, clean: Any, corrupted: Any) -> Any:
        seen.append(len(clean.score))
        return align(self, clean, corrupted)

    monkeypatch.setattr(AlignmentLoss, "forward", watched)
    config = dataclasses.replace(TRAIN, epochs=1, micro_batches=3, mix="powmix", powmix_probability=1.0)
    trainer = Trainer(STILL, config, dataset, tmp_path)
    drawn: list[Any] = []
    plan = trainer.objective.mixing.plan
    monkeypatch.setattr(
        trainer.objective.mixing, "plan", lambda samples, generator: drawn.append(plan(samples, generator)) or drawn[-1]
    )
    trainer.run()
    assert seen == [4, 3, 3, 4, 3, 3, 2, 1, 1]
    # Micro-batches of one step draw their mixtures anew; single samples have none.
    assert len(drawn) == 7
    assert not torch.equal(drawn[1].shares[:1], drawn[2].shares[:1])


# --- bfloat16 ---------------------------------------------------------------------------------------------------------


def test_what_is_bfloat16_and_what_is_not(tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, precision="bf16", mix="ms-mix"), dataset, tmp_path)
    dtypes: dict[str, set[Any]] = {}

    def note(name: str, *tensors: Any) -> None:
        dtypes.setdefault(name, set()).update(x.dtype for x in tensors)

    for module in trainer.model.modules():
        kind = type(module).__name__
        if isinstance(module, (nn.Linear, nn.LayerNorm)) and module is not trainer.model.head:
            module.register_forward_hook(lambda m, i, o, kind=kind: note(kind, *(i if kind == "LayerNorm" else ()), o))
    trainer.model.head.register_forward_hook(lambda m, i, o: note("head", *i, o))
    softmax, op = torch.Tensor.softmax, torch.ops.hcmen.selective_scan
    monkeypatch.setattr(torch.Tensor, "softmax", lambda x, *a, **k: note("softmax", x) or softmax(x, *a, **k))
    scanned = native._scan_arguments
    monkeypatch.setattr(native, "_scan_arguments", lambda *a: note("scan", *a[0][:7]) or scanned(*a))
    monkeypatch.setattr(scan, "selective_scan_ref", lambda *_, **__: pytest.fail("the slow scan ran"))
    trainer.model.train()
    trainer._step(1, 0, dataset.splits["train"], np.arange(10))
    assert op is torch.ops.hcmen.selective_scan
    assert dtypes == {
        "Linear": {torch.bfloat16},
        **{name: {torch.float32} for name in ("LayerNorm", "head", "softmax", "scan")},
    }
    assert {p.grad.dtype for p in trainer._parameters.values()} == {torch.float32}


def test_bfloat16_follows_float32(tmp_path: Path, dataset) -> None:
    """Two digits, over a few steps; validation and checkpoint are float32."""
    # At the full learning rate a few steps amplify rounding to 2 % of a loss by themselves.
    config = dataclasses.replace(TRAIN, mix="manifold", aux="polarity", learning_rate=TRAIN.learning_rate / 10)
    single = trained(tmp_path / "fp32", dataset, config)
    half = trained(tmp_path / "bf16", dataset, dataclasses.replace(config, precision="bf16"))
    for one, other in zip(single.history, half.history, strict=True):
        for name in ("loss", "task_loss", "alignment_loss", "mix_loss", "polarity_loss", "validation_mae"):
            assert other[name] != one[name]
            assert other[name] == pytest.approx(one[name], rel=2e-2), name
    model, config_json = load_checkpoint(tmp_path / "bf16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert config_json["train"]["precision"] == "bf16"
    split = dataset.splits["valid"]
    again = {name: metrics.mae(split.labels, scores) for name, scores in predict_variants(model, split).items()}
    assert config_json["validation"]["mae_by_variant"] == pytest.approx(again, rel=1e-6)


def test_bfloat16_learns(tmp_path: Path, dataset) -> None:
    changes: dict[str, Any] = {"modality_drop_probability": 0.0, "step_drop_probability": 0.0, "precision": "bf16"}
    config = dataclasses.replace(TRAIN, epochs=25, learning_rate=2e-2, **changes)
    history = trained(tmp_path, dataset, config).history
    assert history[-1]["task_loss"] < 0.3 * history[0]["task_loss"]


@pytest.mark.parametrize("reverse", [False, True])
def test_operations_take_bfloat16_and_compute_in_float32(reverse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the reference on the same bfloat16 numbers, which widens them too: equal but for the last rounding."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()

    data = {
        **{name: normal(2, 9, 6) for name in ("u", "delta", "z")},
        **{name: normal(2, 9, 3) for name in ("B", "C")},
        "A": normal(6, 3, dtype=torch.float32),
        **{name: normal(6, dtype=torch.float32) for name in ("D", "delta_bias")},
    }
    data["A"] = (-data["A"].abs()).detach().requires_grad_()
    found = []
    for function in (selective_scan_ref, selective_scan):
        if function is selective_scan:
            monkeypatch.setattr(scan, "selective_scan_ref", lambda *_, **__: pytest.fail("the slow scan ran"))
        y, last = function(**data, delta_softplus=True, reverse=reverse, return_last_state=True)
        assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
        gradients = torch.autograd.grad(y.float().square().sum() + last.sum(), list(data.values()))
        assert [g.dtype for g in gradients] == [x.dtype for x in data.values()]
        found.append((y, last, *gradients))
    for want, got in zip(*([x.detach().float() for x in part] for part in found), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2 * float(want.abs().max()))
    x, weight, bias = normal(2, 9, 6), normal(6, 4, dtype=torch.float32), normal(6, dtype=torch.float32)
    pairs = [f(x, weight, bias, reverse=reverse) for f in (causal_conv1d_ref, causal_conv1d)]
    assert pairs[1].dtype == torch.bfloat16
    torch.testing.assert_close(pairs[1].float(), pairs[0].float(), rtol=8e-3, atol=1e-3)


# --- killed at any moment ---------------------------------------------------------------------------------------------

# One process loads everything and forks a child for every attempt; a child is killed at the n-th of its moments, which
# are before and after every step, flush and rename. Moment 0 never comes.
KILLED = f"""
import json, os, signal, sys
from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig
from hcmen.training.presets import Preset
from hcmen.training.config import TrainConfig
from hcmen.data import synthetic
from hcmen.training import command as train, trainer as training
import matplotlib.pyplot, torch._dynamo

torch.set_num_threads(1)
train.preset_named = lambda name: Preset("tiny", "for tests", {MICRO!r}, {TRAIN!r})
synthetic.SAMPLES["tiny"] = {SAMPLES!r}

def attempt(arguments, moment):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    passed = 0
    def passes():
        nonlocal passed
        passed += 1
        if passed == moment:
            os.kill(os.getpid(), signal.SIGKILL)
    def watched(function):
        def around(*rest):
            passes()
            result = function(*rest)
            passes()
            return result
        return around
    training.Trainer._step, os.fsync, os.replace = map(watched, (training.Trainer._step, os.fsync, os.replace))
    code = 70
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = train.main.main(arguments, standalone_mode=False)
    finally:
        os._exit(code)

for out, arguments, moments in json.loads(sys.argv[1]):
    codes = []
    for moment in moments:
        begun = os.path.exists(os.path.join(out, "last.safetensors"))
        # What was killed before its first state is begun anew.
        codes.append(attempt(["--out", out, "-q", *(["--resume"] if begun else ["--force", *arguments])], moment))
        if codes[-1] == 0:
            break
    print(json.dumps(codes), flush=True)
"""

SETTINGS: dict[str, tuple[str, ...]] = {
    "plain": ("--epochs", "2"),
    "micro-batches and mixing": ("--micro-batches", "3", "--mix", "ms-mix"),
    "bfloat16": ("--precision", "bf16", "--micro-batches", "2", "--aux", "polarity"),
}
# Three steps of an epoch are 6 moments, and its four files 16 more.
EVERY = tuple(range(6, 24, 2))


def left(folder: Path) -> Any:
    """Everything a run leaves, without times and pictures."""
    tensors, state = load_state(folder)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert log == state["history"]
    timeless = [{k: v for k, v in record.items() if k != "seconds"} for record in log]
    files = {name: (folder / name).read_bytes() for name in ("checkpoint.safetensors", "config.json")}
    return (
        files,
        {k: x.numpy().tobytes() for k, x in tensors.items()},
        timeless,
        sorted(p.name for p in folder.iterdir()),
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """Exit codes of every attempt, per folder: whole runs, runs killed again and again, and at every moment."""
    root = tmp_path_factory.mktemp("killed")
    work = {name: (arguments, [0]) for name, arguments in SETTINGS.items()}
    for i, (name, arguments) in enumerate(SETTINGS.items()):
        draw = random.Random(i)
        work[f"{name}, broken"] = (arguments, [draw.randint(1, 30) for _ in range(9)] + [0])
    for moment in EVERY:
        work[f"moment {moment}"] = (SETTINGS["plain"], [moment, 0])
    orders = [(str(root / name), arguments, moments) for name, (arguments, moments) in work.items()]
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(orders)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return root, dict(zip(work, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(name: str, killed: Any) -> None:
    root, codes = killed
    assert codes[name] == [0]
    *broken, last = codes[f"{name}, broken"]
    assert (broken, last) == ([-9] * len(broken), 0)
    assert len(broken) >= 3
    assert left(root / f"{name}, broken") == left(root / name)


@pytest.mark.parametrize("moment", EVERY)
def test_a_run_that_is_killed_at_any_moment_between_two_epochs(moment: int, killed: Any) -> None:
    root, codes = killed
    assert codes[f"moment {moment}"] == [-9, 0]
    assert left(root / f"moment {moment}") == left(root / "plain")


# --- settings by name -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("mix_alpha=0.5", ("mix_alpha", 0.5)),
        ("mix_alpha=2", ("mix_alpha", 2.0)),
        (" weight_decay = 1e-3 ", ("weight_decay", 1e-3)),
        ("powmix_parts=4", ("powmix_parts", 4)),
        ("mix_same_sign=True", ("mix_same_sign", True)),
        ("mix_same_sign=false", ("mix_same_sign", False)),
        ("aux=polarity", ("aux", "polarity")),
    ],
)
def test_settings_have_the_type_of_their_field(text: str, expected: Any) -> None:
    found = train_setting(text)
    assert found == expected
    assert type(found[1]) is type(expected[1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mix_alpha", "'mix_alpha' is no setting, expected name=value"),
        ("mix_alhpa=1", "unknown training setting 'mix_alhpa': did you mean 'mix_alpha'?"),
        ("x=1", "unknown training setting 'x': choose from epochs, batch_size"),
        ("powmix_parts=2.5", "powmix_parts is '2.5', expected a whole number"),
        ("mix_alpha=nan", "mix_alpha is 'nan', expected a finite number"),
        ("mix_alpha=", "mix_alpha is '', expected a finite number"),
        ("mix_same_sign=1", "mix_same_sign is '1', expected true or false"),
    ],
)
def test_settings_that_are_none(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        train_setting(text)
    assert command("--out", tmp_path / "out", "--set", text) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_settings_reach_the_run_and_bind_its_resumption(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = ("--set", "modality_drop_probability=0.25", "--set", "max_step_drop_rate=0.5", "--set", "epochs=1")
    assert command("--out", tmp_path, "-q", *changes) == 0
    found = load_checkpoint(tmp_path)[1]["train"]
    assert (found["modality_drop_probability"], found["max_step_drop_rate"], found["epochs"]) == (0.25, 0.5, 1)
    assert command("--out", tmp_path, "-q", "--resume", *changes) == 0
    for arguments, message in (
        (("--set", "max_step_drop_rate=0.6"), f"--set max_step_drop_rate is 0.6, the run in {tmp_path} has 0.5: leave"),
        (("--precision", "bf16"), f"--precision is bf16, the run in {tmp_path} has fp32"),
        (("--set", "micro_batches=2"), f"--micro-batches is 2, the run in {tmp_path} has 1"),
    ):
        capsys.readouterr()
        assert command("--out", tmp_path, "--resume", *arguments) == 2
        assert message in capsys.readouterr().err


def test_settings_out_of_range_or_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (("--set", "max_step_drop_rate=1.5"), "max_step_drop_rate is 1.5, expected 0 to 1"),
        (("--set", "precision=fp16"), "precision is 'fp16', expected one of fp32, bf16"),
        (("--micro-batches", 11), "micro_batches is 11, expected at most the batch_size of 10"),
        (("--epochs", 2, "--set", "epochs=3"), "epochs is given twice, as 2 and as 3: give it once"),
    ):
        assert command("--out", tmp_path / "out", *arguments) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1
        assert message in error
    assert command("--out", tmp_path / "out", "-q", "--epochs", 1, "--set", "epochs=1") == 0


def test_curves_show_the_terms_that_are_on(tmp_path: Path, dataset) -> None:
    for changes, extra in (
        ({}, set()),
        ({"mix": "ms-mix"}, {"mixtures: error", "intensity: nats"}),
        (
            {"mix": "manifold", "aux": "polarity"},
            {"mixtures: error", "polarity: nats", "polarity of mixtures: nats"},
        ),
    ):
        history = trained(tmp_path, dataset, dataclasses.replace(TRAIN, epochs=2, **changes)).history
        drawn = report._drawn_terms(history)
        assert set(drawn) == {"task: error", "alignment: nats", *extra}
        assert drawn["task: error"] == [r["task_loss"] for r in history]
    assert set(report._drawn_terms(trained(tmp_path, dataset, SINGLE).history)) == {"task: error"}


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_named_gpu_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    with pytest.raises(BackendError, match="device cuda was asked for"):
        choose_device("cuda")
    with pytest.raises(InputError, match="unknown device 'gpu': choose from auto, cpu, cuda"):
        choose_device("gpu")
    assert command("--out", tmp_path / "out", "--device", "cuda") == 3
    assert command("--out", tmp_path, "-q", "--epochs", 1, "--device", "cpu") == 0
    capsys.readouterr()
    arguments = ["--checkpoint", str(tmp_path), "--out", str(tmp_path / "eval"), "--no-pictures", "--device"]
    assert evaluate_main.main([*arguments, "cuda"], standalone_mode=False) == 3
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "choose --device cpu, or install a PyTorch with CUDA" in error
    assert (
        evaluate_main.main(["--bundle", str(tmp_path), "--device", "cpu", "--no-pictures"], standalone_mode=False) == 2
    )
    assert "--device cpu is for checkpoints" in capsys.readouterr().err


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(BackendError, match="process 2 of this machine has no GPU of its own, there are 2"):
        choose_device("cuda", 2)


def test_the_state_is_read_back_whatever_the_device(tmp_path: Path, dataset) -> None:
    """Optimiser moments go where their parameters are, the step count stays on the CPU."""
    first = trained(tmp_path, dataset, dataclasses.replace(TRAIN, epochs=1))
    again = Trainer(STILL, dataclasses.replace(TRAIN, epochs=1), dataset, tmp_path)
    again.resume()
    for name, p in again._parameters.items():
        mine, theirs = again._optimiser.state[p], first._optimiser.state[first._parameters[name]]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    stored = safetensors.torch.load((tmp_path / "last.safetensors").read_bytes())
    assert all(x.dtype == torch.float32 for x in stored.values())
