"""`hcmen-run`: what it prints, where, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import types

import numpy as np
import pytest
from helpers.command import run
from helpers.small_bundle import clip_arrays, expected, make_bundle

from hcmen.base.clip import write_clip
from hcmen.base.errors import CheckFailed
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.runtime.commands.run import main


@pytest.fixture
def clip(tmp_path):
    """A clip with all modalities."""
    write_clip(tmp_path / "full.npz", clip_arrays(1))
    return tmp_path / "full.npz"


def test_text_has_one_row_per_clip_and_nothing_on_stderr(shared_bundle, tmp_path, clip):
    write_clip(tmp_path / "no_audio.npz", clip_arrays(2, ("text", "vision")))
    done = run(main, clip, tmp_path / "no_audio.npz", "--bundle", shared_bundle)
    assert (done.code, done.err) == (0, "")
    header, _, first, second = done.out.splitlines()
    assert header.split() == ["clip", "variant", "score", "text", "audio", "vision", "time"]
    score, weights = expected(clip_arrays(1), "full")
    scale = "of -3 (negative) to 3 (positive)"
    assert first.split()[:2] == [str(clip), "full"]
    assert f" {score:+.2f} {scale} " in first
    assert [int(w[:-1]) for w in first.partition(scale)[2].split()[:3]] == pytest.approx(100 * weights, abs=0.5001)
    score, _ = expected(clip_arrays(2, ("text", "vision")), "audio_missing")
    assert second.split()[1:3] == ["audio_missing", f"{score:+.2f}"]
    rest = second.partition(scale)[2].split()
    assert rest[1] == "-"
    assert re.fullmatch(r"\d+\.\d ms, first call", " ".join(rest[3:]))
    for line, name in ((first, " full "), (second, " audio_missing ")):  # aligned
        assert line.index(name) + 1 == header.index("variant")


def test_json_carries_every_field(shared_bundle, clip):
    done = run(main, clip, "--bundle", shared_bundle, "--format", "json", "--variant", "vision_missing", "--threads", 1)
    assert done.code == 0
    assert done.lines == [f"note: {clip}: variant 'vision_missing' ignores vision, which the clip has"]
    answer = json.loads(done.out)
    (result,) = answer["results"]
    score, weights = expected(clip_arrays(1), "vision_missing")
    assert result["score"] == pytest.approx(score, abs=2e-6)
    assert list(result["modality_weights"]) == list(MODALITIES)
    np.testing.assert_allclose(list(result["modality_weights"].values()), weights, atol=2e-6)
    assert result["latency_ms"] > 0
    assert result["first_call"] is True
    assert (result["label_min"], result["label_max"]) == (-3.0, 3.0)
    assert result["label"] == ("positive" if result["score"] > 0 else "negative")
    told = {k: result[k] for k in ("clip", "variant", "backend", "kernels", "ignored", "cleaned", "batch_size")}
    assert told == {
        "clip": str(clip),
        "variant": "vision_missing",
        "backend": "ort",
        "kernels": "standard",
        "ignored": ["vision"],
        "cleaned": {},
        "batch_size": 1,
    }
    assert answer["schema_version"] == 1
    assert answer["bundle"] == str(shared_bundle)
    assert answer["backend"]["name"] == "ort"
    assert answer["backend"]["threads"] == 1
    assert answer["errors"] == []


def test_a_folder_stands_for_its_clips_in_order_and_not_for_folders_below(shared_bundle, tmp_path):
    folder = tmp_path / "clips"
    (folder / "deep.npz").mkdir(parents=True)
    for name in ("b", "a", "10", "9"):
        write_clip(folder / f"{name}.npz", clip_arrays(1))
    write_clip(folder / "deep.npz" / "x.npz", clip_arrays(1))
    (folder / "notes.txt").write_text("not a clip")
    done = run(main, folder, "--bundle", shared_bundle, "--format", "json")
    assert (done.code, done.err) == (0, "")
    names = [os.path.basename(r["clip"]) for r in json.loads(done.out)["results"]]
    assert names == ["10.npz", "9.npz", "a.npz", "b.npz"]
    assert {r["batch_size"] for r in json.loads(done.out)["results"]} == {4}


def test_bad_clips_are_named_and_the_others_scored(shared_bundle, tmp_path, clip):
    (tmp_path / "cut.npz").write_bytes(clip.read_bytes()[:200])
    np.savez(tmp_path / "wrong.npz", text=np.zeros((3, 7), np.float32))
    arguments = [clip, tmp_path / "wrong.npz", tmp_path / "cut.npz", tmp_path / "none.npz", clip]
    done = run(main, *arguments, "--bundle", shared_bundle, "--format", "json")
    assert done.code == 5  # the gravest
    answer = json.loads(done.out)
    assert [r["clip"] for r in answer["results"]] == [str(clip), str(clip)]
    assert [(os.path.basename(e["clip"]), e["exit_code"]) for e in answer["errors"]] == [
        ("wrong.npz", 2),
        ("cut.npz", 5),
        ("none.npz", 2),
    ]
    assert done.lines == [f"error: {e['error']}" for e in answer["errors"]]
    done = run(main, *arguments[3:], "--bundle", shared_bundle)
    assert (done.code, len(done.lines), len(done.out.splitlines())) == (2, 1, 3)


def test_notes_are_one_line_per_kind_and_quiet_silences_them(shared_bundle, tmp_path):
    for i in range(5):
        arrays = clip_arrays(i)
        arrays["text"][0, 0] = np.nan
        write_clip(tmp_path / f"{i}.npz", arrays)
    arguments = [tmp_path, "--bundle", shared_bundle, "--variant", "text_only", "--clean"]
    done = run(main, *arguments)
    assert done.code == 0
    assert done.lines == [
        f"note: {tmp_path}/0.npz and 4 more clips: variant 'text_only' ignores audio and vision, which the clip has",
        f"note: {tmp_path}/0.npz and 4 more clips: 5 NaN or infinite values were set to zero",
    ]
    assert run(main, *arguments, "-q").err == ""


def test_verbose_tells_what_runs(shared_bundle, clip):
    done = run(main, clip, "--bundle", shared_bundle, "-v", "--threads", 2)
    assert re.match(rf"bundle {shared_bundle}, backend ort \d+\.\d+\.\d+\S*, 2 threads$", done.lines[0])


def test_self_test_reports_every_variant_and_needs_no_clip(shared_bundle):
    done = run(main, "--self-test", "--bundle", shared_bundle)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0] == "self-test: 7 of 7 variants passed"
    assert len(done.out.splitlines()) == 1 + 7
    assert max(map(len, done.out.splitlines())) <= 80
    done = run(main, "--self-test", "--bundle", shared_bundle, "-v")
    assert len(done.out.splitlines()) == 1 + 2 * 7
    done = run(main, "--self-test", "--bundle", shared_bundle, "--variant", "text_only", "--format", "json")
    answer = json.loads(done.out)
    assert list(answer["self_test"]) == ["text_only"]
    assert answer["self_test"]["text_only"]["passed"] is True
    assert answer["self_test"]["text_only"]["cases"] == 4
    assert answer["self_test"]["text_only"]["outputs"]["score"]["failed"] == 0


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_failed_self_test_prints_its_report_and_exits_1(tmp_path, form):
    bundle = make_bundle(tmp_path / "b", ("full", "audio_only"), scale=1.01)
    done = run(main, "--self-test", "--bundle", bundle, "--format", form)
    assert done.code == 1
    assert len(done.lines) == 1
    assert done.lines[0].startswith("error: self-test failed for full, audio_only: score of 'full' FAILED in ")
    if form == "json":
        report = json.loads(done.out)["self_test"]["full"]
        assert report["passed"] is False
        assert report["outputs"]["score"]["required_atol"] > 1e-5
    else:
        assert done.out.startswith("self-test: 0 of 2 variants passed")


def test_clips_and_self_test_go_together(shared_bundle, clip):
    answer = json.loads(run(main, clip, "--self-test", "--bundle", shared_bundle, "--format", "json").out)
    assert len(answer["results"]) == 1
    assert len(answer["self_test"]) == 7


def test_a_score_that_is_no_number_exits_1(tmp_path, clip, shared_bundle, monkeypatch):
    from hcmen.runtime.backends.ort import OrtSession

    monkeypatch.setattr(
        OrtSession,
        "run",
        lambda self, inputs: {"score": np.array([np.inf]), "modality_weights": np.zeros((1, 3))},
    )
    done = run(main, clip, "--bundle", shared_bundle)
    assert (done.code, done.out, len(done.lines)) == (1, "", 1)
    assert "gave score inf" in done.err


# --- --check, with NumPy in the eager model's place -----------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch, tmp_path):
    """A checkpoint folder whose eager model is the NumPy twin, off by `offset`."""
    parity = types.ModuleType("hcmen.export.parity")
    parity.offset = 0.0

    def eager_outputs(checkpoint, variant, inputs):
        assert checkpoint == tmp_path / "train"
        present = variant_named(variant).present
        rows = [
            expected({m: inputs[m][i, : inputs[f"{m}_length"][i]] for m in present}, variant)
            for i in range(len(inputs[present[0]]))
        ]
        return {
            "score": np.array([r[0] + parity.offset for r in rows], np.float32),
            "modality_weights": np.array([r[1] for r in rows], np.float32),
        }

    parity.eager_outputs = eager_outputs
    monkeypatch.setitem(sys.modules, "hcmen.export.parity", parity)
    (tmp_path / "train").mkdir()
    return parity


def test_check_gives_both_scores_and_the_report(eager, shared_bundle, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    present = [VARIANTS[i % 3].present for i in range(8)]
    for i, p in enumerate(present):
        write_clip(folder / f"{i}.npz", clip_arrays(i, p))
    (folder / "3.npz").write_bytes(b"")  # a bad clip must not shift the eager scores
    arguments = [folder, "--bundle", shared_bundle, "--check", "--checkpoint", tmp_path / "train"]
    done = run(main, *arguments, "--format", "json")
    assert done.code == 5
    answer = json.loads(done.out)
    for i, result in zip((0, 1, 2, 4, 5, 6, 7), answer["results"], strict=True):
        assert result["eager_score"] == pytest.approx(expected(clip_arrays(i, present[i]), VARIANTS[i % 3].name)[0])
        assert result["score"] == pytest.approx(result["eager_score"], abs=2e-6)
    assert {v: c["passed"] for v, c in answer["check"].items()} == {v.name: True for v in VARIANTS[:3]}
    assert answer["check"]["full"]["outputs"]["score"]["elements"] == 2
    (folder / "3.npz").unlink()
    done = run(main, *arguments)
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[0].split()[2:4] == ["score", "eager"]
    assert "check against the eager model: 3 of 3 variants passed" in done.out


def test_a_failed_check_prints_its_report_and_exits_1(eager, shared_bundle, clip, tmp_path):
    eager.offset = 1e-3
    done = run(main, clip, "--bundle", shared_bundle, "--check", "--checkpoint", tmp_path / "train")
    assert done.code == 1
    assert len(done.lines) == 1
    assert done.lines[0].startswith("error: check failed for full: score of 'full' FAILED in 1 of 1: max 1.00e-03")
    assert "check against the eager model: 0 of 1 variants passed" in done.out


def test_an_error_of_the_eager_model_is_one_line(eager, shared_bundle, clip, tmp_path):
    def fail(*_: object) -> None:
        raise CheckFailed("the eager model is off")

    eager.eager_outputs = fail
    done = run(main, clip, "--bundle", shared_bundle, "--check", "--checkpoint", tmp_path / "train")
    assert (done.code, done.err, done.out) == (1, "error: the eager model is off\n", "")


def test_check_refuses_another_checkpoint(eager, shared_bundle, clip, tmp_path):
    (tmp_path / "train" / "checkpoint.safetensors").write_bytes(b"another")
    done = run(main, clip, "--bundle", shared_bundle, "--check", "--checkpoint", tmp_path / "train")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "not the checkpoint that" in done.err


def test_check_without_torch_points_to_the_self_test(eager, shared_bundle, clip, tmp_path, monkeypatch):
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "torch" else find_spec(name, *a))
    done = run(main, clip, "--bundle", shared_bundle, "--check", "--checkpoint", tmp_path / "train")
    assert (done.code, len(done.lines)) == (3, 1)
    assert "pip install 'hcmen[train]', or use --self-test" in done.err


def test_check_against_the_real_eager_model(tmp_path):
    """From a checkpoint to a checked score, on the real model and its real graphs; then with other weights."""
    import torch

    from hcmen.base.inputs import FeatureConfig
    from hcmen.export.bundle import export_bundle
    from hcmen.models.hcmen.config import ModelConfig
    from hcmen.models.hcmen.model import HCMEN
    from hcmen.training.checkpoint import save_checkpoint
    from hcmen.training.config import TrainConfig

    config = ModelConfig(
        FeatureConfig(6, 12), FeatureConfig(3, 20), FeatureConfig(4, 15), width=8, tokens=4, states=4, expand=2
    )
    torch.manual_seed(0)
    folders = tmp_path / "train", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
        save_checkpoint(folder, HCMEN(config).eval(), TrainConfig(), epoch=1, validation={}, dataset={"name": "test"})
    export_bundle(folders[0], tmp_path / "bundle", [variant_named("text_only")])
    for i in range(3):
        write_clip(tmp_path / f"{i}.npz", clip_arrays(i))
    arguments = [*(tmp_path / f"{i}.npz" for i in range(3)), "--bundle", tmp_path / "bundle"]
    arguments += ["--variant", "text_only", "--check", "--self-test", "--format", "json", "-q", "--checkpoint"]
    done = run(main, *arguments, folders[0])
    assert (done.code, done.err) == (0, "")
    answer = json.loads(done.out)
    for result in answer["results"]:
        assert result["kernels"] == "native"
        assert abs(result["score"] - result["eager_score"]) <= 1e-5 + 1e-5 * abs(result["eager_score"])
    assert len({r["eager_score"] for r in answer["results"]}) == 3
    assert answer["check"]["text_only"]["passed"] is True
    assert answer["self_test"]["text_only"]["passed"] is True
    done = run(main, *arguments, folders[1])
    assert (done.code, len(done.lines)) == (2, 1)


# --- the process ----------------------------------------------------------------------------------------------------


def test_the_installed_command_scores_a_clip(shared_bundle, clip):
    command = os.path.join(os.path.dirname(sys.executable), "hcmen-run")
    done = subprocess.run([command, clip, "--bundle", shared_bundle], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "full" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_reader_that_goes_away_is_no_error_of_ours(shared_bundle, tmp_path, clip):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    for i in range(1000):  # more than a pipe holds
        (folder / f"{i}.npz").symlink_to(clip)
    command = f"'{sys.executable}' -c 'from hcmen.runtime.commands.run import main; main()' '{folder}'"
    done = subprocess.run(
        ["bash", "-c", f"{command} --bundle '{shared_bundle}' | head -n 1; echo ${{PIPESTATUS[0]}}"],
        # Unbuffered, Python itself takes a cut write for a whole one and never learns of the closed pipe.
        env={**os.environ, "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "141"
    assert done.stderr == ""


def child(words: list[str], stdout: int, unbuffered: bool) -> subprocess.CompletedProcess[str]:
    """The command with that for its stdout; what is buffered is written when the interpreter ends, or not at all."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"} | (
        {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    )
    command = [sys.executable, "-m", "hcmen", *words]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=env)


PRINTS = {
    "a score": ["run", "CLIP", "--quiet", "--bundle", "BUNDLE"],
    "a self-test": ["run", "--self-test", "--quiet", "--bundle", "BUNDLE"],
    "a report": ["doctor", "--quiet", "--bundle", "BUNDLE"],
    "a help": ["run", "--help"],
    "the home's help": ["--help"],
    "a version": ["export", "--version"],
}


@pytest.mark.parametrize("unbuffered", [False, True], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("words", PRINTS.values(), ids=PRINTS)
def test_a_full_stdout_is_one_line_and_a_closed_one_is_none(shared_bundle, clip, words, unbuffered):
    words = [{"CLIP": str(clip), "BUNDLE": str(shared_bundle)}.get(word, word) for word in words]
    with open("/dev/full", "w") as full:
        done = child(words, full.fileno(), unbuffered)
    assert (done.returncode, done.stderr.splitlines()) == (
        2,
        ["error: no space left on device, free some space or choose another place"],
    )
    unread, pipe = os.pipe()
    os.close(unread)
    done = child(words, pipe, unbuffered)
    os.close(pipe)
    assert (done.returncode, done.stderr) == (141, "")
