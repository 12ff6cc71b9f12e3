"""hcmen-train: reproducible, resumable bit for bit after any kind of end, choosing on validation, files whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.micro import MICRO
from helpers.micro_runs import PROGRAM, SAMPLES, TRAIN, command, make_micro, result

from hcmen.base import metrics
from hcmen.base.clip import read_clip
from hcmen.base.errors import CheckFailed, CorruptFileError, HcmenError, InputError
from hcmen.base.modalities import VARIANTS, variant_named
from hcmen.data import MultimodalDataset
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.losses import AlignmentLoss
from hcmen.training.checkpoint import load_state, save_state
from hcmen.training.command import load_checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import predict, predict_variants
from hcmen.training.optimiser import learning_rate_at
from hcmen.training.trainer import Trainer, feature_statistics

OUTPUTS = {
    "checkpoint.safetensors",
    "config.json",
    "last.safetensors",
    "log.jsonl",
    "curves.png",
    "clips",
    "report.json",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def micro(monkeypatch: pytest.MonkeyPatch) -> None:
    make_micro(monkeypatch)


@pytest.fixture(scope="module")
def dataset():
    return dataset_from_mmsa(make_synthetic(MICRO.inputs, SAMPLES), "synthetic", MICRO.inputs)


def process(*arguments: Any, change: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(change=change), "--threads", "1", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=400,
    )


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, in a process of its own."""
    folder = tmp_path_factory.mktemp("reference") / "train"
    done = process("--out", folder)
    assert done.returncode == 0, done.stderr
    assert all(json.loads(line)["best"] for line in (folder / "log.jsonl").read_text().splitlines())
    return folder


# --- reproducible, resumable ------------------------------------------------------------------------------------------


def test_two_runs_are_identical(reference: Path, tmp_path: Path) -> None:
    assert command("--out", tmp_path / "again", "-q") == 0
    assert result(tmp_path / "again") == result(reference)
    assert {p.name for p in reference.iterdir()} == OUTPUTS


def test_validation_clips_lie_beside_the_checkpoint(reference: Path, dataset: MultimodalDataset) -> None:
    """They are what the model was validated on, in the form that hcmen-run and hcmen-export read."""
    model, _ = load_checkpoint(reference)
    clips = [read_clip(path, model.config.inputs) for path in sorted((reference / "clips").iterdir())]
    split = dataset.splits["valid"]
    assert len(clips) == min(20, len(split))
    for i, clip in enumerate(clips):
        for m, x in clip.features.items():
            assert np.array_equal(x, split.features[m][i, : split.lengths[m][i]])
        assert clip.variant.name == "full"


def test_another_seed_is_another_run(reference: Path, tmp_path: Path) -> None:
    assert command("--out", tmp_path, "--seed", 1, "-q") == 0
    assert result(tmp_path)["checkpoint"] != result(reference)["checkpoint"]


ENDS = {
    "SIGKILL in the middle of an epoch": """
step = training.Trainer._step
def _step(self, epoch, number, *rest):
    if (epoch, number) == (2, 1):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, epoch, number, *rest)
training.Trainer._step = _step
""",
    "SIGKILL between checkpoint and state": """
save = checkpoint.save_state
def save_state(folder, tensors, state):
    if len(state["history"]) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(folder, tensors, state)
checkpoint.save_state = save_state
""",
    "SIGKILL between weights and config": """
write = checkpoint.write_json
def write_json(path, data):
    if data["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, data)
checkpoint.write_json = write_json
""",
    "SIGKILL half-way through a file": """
replace = os.replace
def half(old, new):
    if str(new).endswith("last.safetensors") and os.path.exists(new):
        os.truncate(old, 1000)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(old, new)
os.replace = half
""",
    "SIGINT in the middle of an epoch": """
step = training.Trainer._step
def _step(self, epoch, number, *rest):
    if (epoch, number) == (2, 1):
        os.kill(os.getpid(), signal.SIGINT)
    return step(self, epoch, number, *rest)
training.Trainer._step = _step
""",
    "SIGINT while files are written": """
save = checkpoint.save_state
def save_state(folder, tensors, state):
    if len(state["history"]) == 2:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1.5)  # as a slow disk does; a process that does not answer is ended after 1 s
    save(folder, tensors, state)
checkpoint.save_state = save_state
""",
}


@pytest.mark.parametrize("end", ENDS)
def test_a_resumed_run_ends_as_if_uninterrupted(reference: Path, tmp_path: Path, end: str) -> None:
    folder = tmp_path / "train"
    broken = process("--out", folder, change=ENDS[end])
    assert broken.returncode == {"SIGKILL": -signal.SIGKILL, "SIGINT": 130}[end.split()[0]]
    # Ctrl-C while files are written lets them be finished.
    assert len(json.loads(_state_text(folder))["history"]) == (2 if end == "SIGINT while files are written" else 1)
    if end == "SIGKILL between weights and config":
        with pytest.raises(CorruptFileError, match=r"half of a write that was killed: .*hcmen-train --resume"):
            load_checkpoint(folder)
    else:
        load_checkpoint(folder)
    if "SIGINT" in end:
        assert broken.stderr.splitlines()[-1] == "error: interrupted"
        assert broken.stdout == ""
    assert command("--out", folder, "--resume", "-q") == 0
    assert result(folder) == result(reference)
    assert {p.name for p in folder.iterdir()} == OUTPUTS


def _state_text(folder: Path) -> str:
    content = (folder / "last.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size])["__metadata__"]["state"]


def test_resuming_a_finished_run_prints_the_table_again(reference: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = result(reference)
    assert command("--out", reference, "--resume", "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["epoch"] == json.loads(before["config"])["epoch"]
    assert result(reference) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--epochs", 9), "--epochs is 9, the run in .* has 3"),
        (("--seed", 5), "--seed is 5, the run in .* has 0"),
        (("--learning-rate", 1.0), r"--learning-rate is 1.0, the run in .* has 0.001"),
        (("--data", "other.pkl"), r"--data is .*other.pkl, the run in .* has None"),
        (("--force",), "--resume and --force exclude each other"),
    ],
)
def test_resuming_with_other_settings_is_refused(
    reference: Path, arguments: tuple[Any, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = result(reference)
    assert command("--out", reference, "--resume", *arguments) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(message, error)
    assert result(reference) == before


def test_mixing_and_its_resumption_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    arguments = ("--mix", "ms-mix", "--aux", "polarity", "-q")
    assert command("--out", whole, *arguments) == 0
    assert process("--out", broken, *arguments, change=ENDS["SIGKILL in the middle of an epoch"]).returncode == -9
    for option, value, had in (("--mix", "mixup", "ms-mix"), ("--aux", "none", "polarity")):
        capsys.readouterr()
        assert command("--out", broken, "--resume", option, value) == 2
        assert f"{option} is {value}, the run in {broken} has {had}" in capsys.readouterr().err
    assert command("--out", broken, "--resume", "-q") == 0
    assert result(broken) == result(whole)
    assert load_checkpoint(whole)[1]["train"]["mix"] == "ms-mix"
    assert command("--out", tmp_path, "--mix", "ms-mx") == 2
    assert "did you mean 'ms-mix'?" in capsys.readouterr().err


def test_a_run_of_a_version_with_fewer_settings_goes_on(reference: Path, tmp_path: Path) -> None:
    folder = tmp_path / "train"
    process("--out", folder, change=ENDS["SIGKILL in the middle of an epoch"])
    tensors, state = load_state(folder)
    for part, new in (("model", ("proxies", "cnn", "mamba")), ("train", ("mix", "mix_weight", "mix_alpha", "aux"))):
        for name in new:
            del state[part][name]
    save_state(folder, tensors, state)
    assert command("--out", folder, "--resume", "-q") == 0
    assert result(folder) == result(reference)


def test_resuming_on_other_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "set.pkl"
    write_synthetic(path, make_synthetic(MICRO.inputs, SAMPLES, 1))
    assert command("--out", tmp_path / "train", "--data", path, "-q") == 0
    write_synthetic(path, make_synthetic(MICRO.inputs, SAMPLES, 2))
    assert command("--out", tmp_path / "train", "--resume") == 2
    assert "was trained with other data" in capsys.readouterr().err


def test_nothing_to_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", tmp_path, "--resume") == 2
    assert "holds no last.safetensors to resume from: run without --resume" in capsys.readouterr().err
    (tmp_path / "last.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{broken")
    assert command("--out", tmp_path, "--resume") == 5
    assert "start over with --force" in capsys.readouterr().err


# --- the loop ---------------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_the_best_on_validation(tmp_path: Path, dataset) -> None:
    Trainer(MICRO, dataclasses.replace(TRAIN, epochs=5, learning_rate=3e-2), dataset, tmp_path).run()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    best = min(log, key=lambda r: r["validation_mae"])
    assert best is not log[-1], "nothing to choose from: the last epoch is the best"
    model, config = load_checkpoint(tmp_path)
    assert not model.training
    assert config["epoch"] == best["epoch"]
    assert [r["best"] for r in log] == [
        r["validation_mae"] < min([math.inf, *(p["validation_mae"] for p in log[:i])]) for i, r in enumerate(log)
    ]
    # The number that chose it: the mean over the seven variants, which anyone can take again.
    split = dataset.splits["valid"]
    again = {v.name: metrics.mae(split.labels, predict(model, split, v)) for v in VARIANTS}
    assert config["validation"]["mae_by_variant"] == pytest.approx(again, rel=1e-6)
    assert config["validation"]["mae"] == pytest.approx(np.mean(list(again.values())), rel=1e-6)


def test_config_says_all_that_the_contract_names(reference: Path, dataset) -> None:
    model, config = load_checkpoint(reference)
    assert config["schema_version"] == 1
    assert ModelConfig.from_json(config["model"]) == MICRO
    assert TrainConfig.from_json(config["train"]) == TRAIN
    for m, (mean, std) in feature_statistics(dataset.splits["train"]).items():
        np.testing.assert_allclose(config["normalisation"][m]["mean"], mean, rtol=1e-6)
        np.testing.assert_allclose(config["normalisation"][m]["std"], std, rtol=1e-6)
        np.testing.assert_array_equal(np.float32(config["normalisation"][m]["std"]), model.encoders[m].std.numpy())
    assert config["dataset"]["samples"] == dict(zip(("train", "valid", "test"), SAMPLES, strict=True))
    assert (config["dataset"]["label_min"], config["dataset"]["label_max"]) == (-3.0, 3.0)
    assert config["versions"]["torch"] == torch.__version__


def test_statistics_are_those_of_the_valid_steps(dataset) -> None:
    split = dataset.splits["train"]
    for m, (mean, std) in feature_statistics(split).items():
        frames = np.concatenate([x[:n] for x, n in zip(split.features[m], split.lengths[m], strict=True)])
        np.testing.assert_allclose(mean, frames.mean(axis=0, dtype=np.float64), rtol=1e-12)
        np.testing.assert_allclose(std, frames.std(axis=0, dtype=np.float64), rtol=1e-12)


def test_learning_rate_rises_then_falls() -> None:
    config = TrainConfig(learning_rate=1.0, warmup_fraction=0.2)
    rates = [learning_rate_at(config, step, 50) for step in range(50)]
    assert rates[:10] == pytest.approx([0.1 * k for k in range(1, 11)])
    assert rates[10] == pytest.approx(1.0)
    assert rates[30] == pytest.approx(0.5)
    assert rates[49] == pytest.approx(0.5 * (1 + math.cos(math.pi * 39 / 40)))
    assert learning_rate_at(dataclasses.replace(config, warmup_fraction=0.0), 0, 50) == 1.0
    assert learning_rate_at(dataclasses.replace(config, warmup_fraction=1.0), 49, 50) == 1.0


def test_what_is_not_decayed(dataset, tmp_path: Path) -> None:
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, weight_decay=0.5), dataset, tmp_path)
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decay = {names.get(id(p)): g["weight_decay"] for g in trainer._optimiser.param_groups for p in g["params"]}
    assert set(names.values()) < set(decay)
    for name, value in decay.items():
        if name is None:
            continue
        kind = name.rsplit(".", 1)[-1]
        free = kind in ("bias", "A_log", "A_b_log", "D", "D_b") or "norm" in name
        if free or kind in ("in_proj.weight",) or name.endswith(("projection.weight", "mixer.out_proj.weight")):
            assert value == (0.0 if free else 0.5), name


def test_gradients_reach_every_parameter_and_are_clipped(
    dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, gradient_clip_norm=0.01), dataset, tmp_path)
    trainer.model.train()
    monkeypatch.setattr(trainer._optimiser, "step", lambda: None)
    trainer._step(1, 0, dataset.splits["train"], np.arange(24))
    gradients = {name: p.grad for name, p in trainer._parameters.items()}
    assert all(g is not None and bool(g.abs().sum() > 0) for g in gradients.values()), gradients
    total = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
    assert total == pytest.approx(0.01, rel=1e-3)


def test_views_are_the_sample_and_its_corruption(dataset, tmp_path: Path) -> None:
    """With nothing to drop and no dropout both views agree; with everything dropped the presence says so."""
    still = dataclasses.replace(MICRO, dropout=0.0)
    nothing = dataclasses.replace(TRAIN, modality_drop_probability=0.0, step_drop_probability=0.0)
    trainer = Trainer(still, nothing, dataset, tmp_path)
    clean, corrupted = trainer._views(1, dataset.splits["train"], np.arange(10))
    torch.testing.assert_close(clean.score, corrupted.score, rtol=1e-5, atol=1e-6)
    always = dataclasses.replace(TRAIN, modality_drop_probability=1.0)
    trainer = Trainer(still, always, dataset, tmp_path)
    clean, corrupted = trainer._views(1, dataset.splits["train"], np.arange(10))
    assert clean.present.all()
    assert not corrupted.present.all(dim=1).any()
    # Each sample's score is what the model says when the absent modalities are not there at all.
    split = dataset.splits["train"]
    present = {v.mask: v for v in VARIANTS}
    corrupted_again = dataclasses.replace(always, step_drop_probability=0.0)
    trainer = Trainer(still, corrupted_again, dataset, tmp_path)
    _, corrupted = trainer._views(1, split, np.arange(10))
    for row in range(10):
        variant = present[tuple(corrupted.present[row].tolist())]
        assert predict(trainer.model, split, variant)[row] == pytest.approx(
            float(corrupted.score[row].detach()), abs=1e-5
        )


def test_predictions_do_not_depend_on_the_batch(reference: Path, dataset) -> None:
    model, _ = load_checkpoint(reference)
    split = dataset.splits["test"]
    for variant in (variant_named("full"), variant_named("audio_only")):
        np.testing.assert_allclose(predict(model, split, variant, 3), predict(model, split, variant), atol=1e-5)
    assert list(predict_variants(model, split)) == [v.name for v in VARIANTS]


def test_it_learns(tmp_path: Path, dataset) -> None:
    """Without corruption and dropout even this model can learn two dozen samples by heart."""
    plain = dataclasses.replace(
        TRAIN, epochs=25, learning_rate=2e-2, modality_drop_probability=0.0, step_drop_probability=0.0
    )
    trainer = Trainer(dataclasses.replace(MICRO, dropout=0.0), plain, dataset, tmp_path)
    trainer.run()
    assert trainer.history[-1]["task_loss"] < 0.3 * trainer.history[0]["task_loss"]


def test_without_alignment_nothing_is_computed_for_it(tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AlignmentLoss, "forward", lambda *_: pytest.fail("the alignment loss was computed"))
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, alignment_weight=0.0), dataset, tmp_path)
    trainer.run()
    assert trainer.history[0]["alignment_loss"] == 0.0


def test_a_last_batch_of_one(tmp_path: Path, dataset) -> None:
    Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, batch_size=23), dataset, tmp_path).run()
    Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, batch_size=1), dataset, tmp_path).run()
    trainer = Trainer(MICRO, dataclasses.replace(TRAIN, epochs=1, batch_size=1), dataset, tmp_path)
    trainer.resume()  # the alignment forms have never had a gradient


# --- when something goes wrong ----------------------------------------------------------------------------------------


def test_a_loss_that_is_none_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(MICRO, TRAIN, dataset, tmp_path)
    step = trainer._step

    def poisoned(epoch: int, number: int, split: Any, indices: Any) -> Any:
        if (epoch, number) == (2, 1):
            with torch.no_grad():
                trainer.model.head.bias.fill_(float("nan"))
        return step(epoch, number, split, indices)

    monkeypatch.setattr(trainer, "_step", poisoned)
    with pytest.raises(CheckFailed, match="the loss is nan in epoch 2, step 2: the checkpoint of epoch 1 is kept") as e:
        trainer.run()
    assert "try a lower --learning-rate than 0.001" in str(e.value)
    assert load_checkpoint(tmp_path)[1]["epoch"] == 1


def test_a_learning_rate_far_too_high(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", tmp_path, "--learning-rate", 1e30) == 1
    error = capsys.readouterr().err.splitlines()
    assert "there is no checkpoint; try a lower --learning-rate" in error[-1]
    assert not list(tmp_path.iterdir())


def test_a_folder_with_a_run_is_not_written_over(
    reference: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("precious")
    assert command("--out", tmp_path) == 2
    assert "holds config.json of a run already: --resume it, start over with --force" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "precious"
    assert command("--out", tmp_path, "--force", "-q") == 0
    assert result(tmp_path) == result(reference)


def test_out_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert command("--out", tmp_path / "file" / "train") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "expected a folder that can be written: choose another --out" in error[0]


def test_a_limit_on_the_size_of_files(tmp_path: Path) -> None:
    """The kernel itself refuses the write half-way."""
    done = process("--out", tmp_path, change="import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))")
    assert done.returncode == 2
    assert "bytes were to be written: choose another --out" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_last_good_epoch(
    reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[int] = []

    def full(file: int) -> None:
        written.append(file)
        if len(written) > 4:  # an epoch writes four files
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert command("--out", tmp_path) == 2
    assert "no space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert {p.name for p in tmp_path.iterdir()} == OUTPUTS - {"curves.png", "clips", "report.json"}
    assert load_checkpoint(tmp_path)[1]["epoch"] == 1
    assert command("--out", tmp_path, "--resume", "-q") == 0
    assert result(tmp_path) == result(reference)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "config.json").unlink(), InputError, "config.json: no such file"),
        (lambda f: (f / "checkpoint.safetensors").unlink(), InputError, "checkpoint.safetensors: no such file"),
        (lambda f: (f / "config.json").write_text("{"), CorruptFileError, "config.json: not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), CorruptFileError, "schema_version is None, expected 1"),
        (lambda f: _edit(f, schema_version=2), CorruptFileError, "schema_version is 2, expected 1"),
        (lambda f: _edit(f, model=None), CorruptFileError, "does not describe checkpoint.safetensors"),
        (lambda f: _edit(f, weights=None), CorruptFileError, "does not describe"),
        (lambda f: _edit(f, weights={}), CorruptFileError, "lacks 'sha256'"),
        (lambda f: _edit_model(f, width=16), CorruptFileError, "does not describe checkpoint.safetensors"),
        (lambda f: _edit_model(f, widht=16), CorruptFileError, "unknown config key 'widht'"),
        (lambda f: _flip(f / "checkpoint.safetensors"), CorruptFileError, "altered, truncated"),
        (lambda f: _truncate(f / "checkpoint.safetensors"), CorruptFileError, "altered, truncated"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    reference: Path, tmp_path: Path, damage: Any, error: type[HcmenError], message: str
) -> None:
    for name in ("checkpoint.safetensors", "config.json"):
        (tmp_path / name).write_bytes((reference / name).read_bytes())
    load_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(error, match=message) as found:
        load_checkpoint(tmp_path)
    assert "\n" not in str(found.value)


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_model(folder: Path, **changes: Any) -> None:
    _edit(folder, model={**json.loads((folder / "config.json").read_text())["model"], **changes})


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"expected a checkpoint: run .*hcmen-train"):
        load_checkpoint(tmp_path / "nowhere")


def test_data_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--data", tmp_path / "nothing.pkl", "--out", tmp_path / "out") == 2
    (tmp_path / "bad.pkl").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    assert command("--data", tmp_path / "bad.pkl", "--out", tmp_path / "out") == 5
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "'os.system'" in errors[1]
    assert not list((tmp_path / "out").iterdir())


# --- the command ------------------------------------------------------------------------------------------------------


def test_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_synthetic(MICRO.inputs, SAMPLES)
    data["train"]["audio"][0, 0, 0] = -np.inf
    write_synthetic(tmp_path / "set.pkl", data)
    assert command("--data", tmp_path / "set.pkl", "--out", tmp_path / "out", "--threads", 1) == 0
    out, err = capsys.readouterr()
    assert "audio: 1 stored values were NaN or infinite and count as 0" in err
    assert [line for line in err.splitlines() if line.startswith("epoch 3/3: loss ")]
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows if row and row[0] in {v.name for v in VARIANTS}] == [v.name for v in VARIANTS]
    assert all(len(row) == 10 for row in rows if row and row[0] in {v.name for v in VARIANTS})
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_json_output(tmp_path: Path, dataset, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--out", tmp_path, "--format", "json", "--quiet") == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert err == ""
    assert report["schema_version"] == 1
    model, _ = load_checkpoint(tmp_path)
    truth = dataset.splits["test"].labels
    for v in VARIANTS:
        found = report["test"][v.name]
        assert found["hcmen"] == pytest.approx(metrics.scores(truth, predict(model, dataset.splits["test"], v)))
        assert found["floor"]["mae"] == pytest.approx(np.abs(truth - dataset.splits["train"].labels.mean()).mean())
        assert set(found["linear"]) == set(found["hcmen"]) == set(found["floor"])


def test_help_is_light() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, hcmen.training.command\n"
            "code = hcmen.training.command.main.main(['--help'], standalone_mode=False)\n"
            "heavy = {'torch', 'numpy', 'matplotlib', 'rich', 'safetensors'} & set(sys.modules)\n"
            "sys.exit(f'{code} {heavy}' if code or heavy else 0)",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for option in ("--data", "--preset", "--epochs", "--out", "--resume", "--force", "--threads", "--format"):
        assert option in done.stdout


@pytest.mark.parametrize(
    ("behind", "said"),
    [
        ([], "every variant"),
        (["a", "b", "c"], "no variant"),
        (["a", "b"], "one of three variants: c"),
        (["a"], "every variant but a"),
    ],
)
def test_the_summary_names_the_shorter_list_of_variants(behind, said):
    from hcmen.training.report import _beaten

    assert _beaten(["a", "b", "c"], behind) == said
