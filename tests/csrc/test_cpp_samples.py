"""samples/cpp compiles as its comments say and runs without Python: the operators alone, and a whole model."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import onnxruntime
import pytest
import torch
from helpers.small_lm import Mamba1, SmallLM

from hcmen.base.library import library_path
from hcmen.mamba.exporting import export
from hcmen.runtime.mamba import Stepper

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = ROOT / "samples" / "cpp"
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


def compiled(compiler: str, *arguments: str | Path) -> None:
    command = shutil.which(compiler)
    if command is None:
        pytest.skip(f"there is no {compiler}")
    made = subprocess.run([command, *WARNINGS, *map(str, arguments)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


def run(program: Path, *arguments: str | Path, library: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library)}
    return subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, env=environment)


def test_a_layer_in_c(tmp_path: Path) -> None:
    """All steps at once and one by one give the same bits; the sample itself exits with 1 if they do not."""
    library = library_path()
    headers = ROOT / "runtime" / "csrc"
    program = tmp_path / "stream"
    compiled("cc", "-std=c11", "-I", headers, SAMPLES / "stream.c", library, "-lm", "-o", program)
    done = run(program, library=library.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "100 steps at once and one by one differ by 0," in done.stdout


def test_a_language_model_in_cpp(tmp_path: Path) -> None:
    """The same tokens as the runtime in Python, with the library and without."""
    headers = [folder for folder in os.environ.get("HCMEN_ORT_INCLUDE_DIR", "").split(":") if folder]
    if not headers:
        pytest.skip("HCMEN_ORT_INCLUDE_DIR names no folder of onnxruntime_cxx_api.h (Debian 13: libonnxruntime-dev)")
    (shared,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (tmp_path / name).symlink_to(shared)
    program = tmp_path / "generate"
    compiled(
        "c++",
        *("-std=c++17", *(x for folder in headers for x in ("-I", folder)), SAMPLES / "generate.cc"),
        *("-L", tmp_path, "-lonnxruntime", "-o", program),
    )
    model = SmallLM(Mamba1, Mamba1).eval()
    path = tmp_path / "model.onnx"
    export(model, torch.randint(0, 29, (2, 5)), path, states=True, verify=False)

    stepper, given, wanted = Stepper(path), [5, 17, 3], []
    for _ in range(12):
        logits = stepper.feed(**{stepper.inputs[0].name: torch.tensor([given]).numpy()})
        given = [int(logits[stepper.outputs[0].name][0, -1].argmax())]
        wanted += given
    for library in (str(library_path()), "-"):
        done = run(program, path, library, "12", "5", "17", "3", library=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == list(map(str, wanted))
        assert "12 tokens" in done.stderr
    for arguments, code in (((path, "-", "12"), 2), ((tmp_path / "none.onnx", "-", "12", "5"), 1)):
        done = run(program, *arguments, library=tmp_path)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1
