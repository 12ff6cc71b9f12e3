"""The TensorRT plugins without TensorRT: built against its headers, and run by the program of runtime/csrc/trt_test.cc.

helpers/trt_wheels.py says where the headers come from.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from hcmen.base.op import CAUSAL_CONV1D, SELECTIVE_SCAN, STATE_SPACE_DUAL
from helpers import emulated
from helpers.dual_cases import DualCase, dual_arrays
from helpers.op_cases import Arrays, ConvCase, ScanCase, conv_arrays, conv_state_shape, scan_arrays
from helpers.trt_wheels import include_folders

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "runtime" / "csrc"
PLUGINS = [SOURCES / name for name in ("trt_plugin.cc", "trt_fields.cc", "trt_log.cc")]
INCLUDES = include_folders()


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


@dataclass(frozen=True)
class Build:
    """What was built against one version: the program, the plugins over CPU kernels, and, with nvcc, the real ones."""

    version: str
    include: Path
    test: Path
    host: Path
    cuda: Path | None

    @property
    def system_includes(self) -> list[str]:
        """Options for a compiler."""
        cache = (self.test.parents[2] / "CMakeCache.txt").read_text()
        cuda = re.search(r"^HCMEN_CUDA_INCLUDE_DIR:PATH=(.+)$", cache, re.M)
        assert cuda
        return ["-isystem", str(self.include), "-isystem", cuda[1]]

    @property
    def libraries(self) -> list[Path]:
        return [self.host] + ([self.cuda] if self.cuda else [])

    def check(self, library: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs the program and expects it to be content."""
        result = run([str(self.test), str(library), *arguments], **environment)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        assert result.stdout.endswith(" checks, 0 failures\n")
        assert not result.stdout.endswith("\n0 checks, 0 failures\n")
        return result


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two processes of one test run build in one folder after the other."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def build(include: Path, name: str, *options: str) -> Build:
    """Builds against the headers in `include`; the kernels stay from build to build."""
    cmake = shutil.which("cmake")
    if cmake is None:
        pytest.skip("cmake is not installed")
    if not (include / "NvInferRuntimePlugin.h").is_file():
        pytest.fail(f"TENSORRT_INCLUDE_DIR names {include}, expected a folder with NvInferRuntimePlugin.h in it")
    folder = ROOT / "build" / name
    with _alone(folder):
        return _built(cmake, folder, include, options)


def _built(cmake: str, folder: Path, include: Path, options: Sequence[str]) -> Build:
    # Makefiles, whatever the default: they list their targets in the form looked for below.
    settings = [
        "-G",
        "Unix Makefiles",
        "-DHCMEN_TESTS=ON",
        f"-DTENSORRT_INCLUDE_DIR={include}",
        "-DCMAKE_BUILD_TYPE=Release",
        # As PTX too, for whatever GPU is here.
        f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('HCMEN_CUDA_ARCHITECTURES', '80')}",
        *options,
    ]
    configured = run([cmake, "-S", str(SOURCES), "-B", str(folder), *settings])
    if "cuda_runtime_api.h: install" in configured.stderr:
        pytest.skip("the headers of TensorRT need cuda_runtime_api.h, of the CUDA toolkit")
    assert configured.returncode == 0, configured.stdout[-2000:] + configured.stderr[-2000:]
    targets = ["hcmen_trt_host", "hcmen_trt_test"]
    cuda = "... hcmen_trt\n" in run([cmake, "--build", str(folder), "--target", "help"]).stdout
    if cuda:
        targets.append("hcmen_trt")
    made = run([cmake, "--build", str(folder), "--parallel", "2", "--target", *targets])
    assert made.returncode == 0, made.stdout[-3000:] + made.stderr[-3000:]
    assert "warning:" not in made.stderr, made.stderr[-3000:]
    kept = folder / "of" / include.resolve().as_posix().strip("/").replace("/", "_")
    kept.mkdir(parents=True, exist_ok=True)
    for file in ["hcmen_trt_test", "libhcmen_trt_host.so", *(["libhcmen_trt.so"] if cuda else [])]:
        shutil.copy2(folder / file, kept / file)
    program = kept / "hcmen_trt_test"
    version = run([str(program), str(kept / "libhcmen_trt_host.so"), "contract"]).stdout.partition("\n")[0]
    assert version.startswith("TensorRT headers ")
    return Build(
        version.rpartition(" ")[2],
        include,
        program,
        kept / "libhcmen_trt_host.so",
        kept / "libhcmen_trt.so" if cuda else None,
    )


def emulated_plugins(built: Build) -> Path:
    """The plugins with the CUDA sources themselves, compiled for the host (tests/emulation)."""
    flags = ["-fvisibility=hidden", "-Wno-error", "-ldl", *built.system_includes]
    return emulated.kept("libhcmen_trt_emulated.so", flags, PLUGINS)


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return tool is not None and run([tool, "--list-gpus"]).stdout.startswith("GPU ")


# --- cases ------------------------------------------------------------------------------------------------------------

Case = ScanCase | ConvCase | DualCase


def enqueue(
    built: Build,
    library: Path,
    mode: str,
    cases: Sequence[tuple[Case, Case]],
    folder: Path,
    **environment: str,
) -> list[list[np.ndarray]]:
    """What the plugins of `library` compute of `cases`, each with the largest sizes that its workspace is for.

    The program also runs its own calls of `enqueue` that are to be refused.
    """
    given, results = folder / f"{mode}.cases", folder / f"{mode}.results"
    with given.open("wb") as file:
        file.write(_number(len(cases)))
        for case, largest in cases:
            file.write(_case(case, largest))
    assert built.check(library, mode, str(given), str(results), **environment).stderr == ""
    data = results.read_bytes()
    found, at = [], 0
    for case, _ in cases:
        arrays = []
        for _, dtype, shape in _tensors(case)[1]:
            count = int(np.prod(shape))
            arrays.append(np.frombuffer(data, dtype, count, at).reshape(shape))
            at += arrays[-1].nbytes
        found.append(arrays)
    assert at == len(data)
    return found


def _number(value: int) -> bytes:
    return struct.pack("<q", value)


def _text(value: str) -> bytes:
    return _number(len(value)) + value.encode()


def _arrays(case: Case) -> Arrays:
    if isinstance(case, DualCase):
        return dual_arrays(case)
    return scan_arrays(case) if isinstance(case, ScanCase) else conv_arrays(case)


def _tensors(case: Case) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[tuple[str, str, tuple[int, ...]]]]:
    """Inputs and outputs: name, dtype, shape."""
    inputs = [(name, str(x.dtype), x.shape) for name, x in _arrays(case).items()]
    outputs: list[tuple[str, str, tuple[int, ...]]] = [("y", case.dtype, inputs[0][2])]
    if case.stateful:
        shapes = {
            ScanCase: lambda: (case.batch, case.channel, case.state),
            ConvCase: lambda: conv_state_shape(case),
            DualCase: lambda: case.states,
        }
        outputs.append(("last_state", "float32", shapes[type(case)]()))
    return inputs, outputs


def _case(case: Case, largest: Case) -> bytes:
    """A case as trt_test_enqueue.cc reads it."""
    ops = {ScanCase: SELECTIVE_SCAN, ConvCase: CAUSAL_CONV1D, DualCase: STATE_SPACE_DUAL}
    op = ops[type(case)]
    parts = [_text(op.name), _number(len(case.attributes))]
    for name, value in case.attributes.items():
        word, real = value if isinstance(value, str) else "", isinstance(value, float)
        number = int(np.float32(value).view(np.int32)) if real else 0 if word else int(value)
        parts += [_text(name), _text(word), _number(real), _number(number)]
    inputs, outputs = _tensors(case)
    most = {name: shape for side in _tensors(largest) for name, _, shape in side}
    shared = {tensor.name for tensor in (*op.inputs, *op.outputs) if tensor.shared}
    parts += [_number(case.dtype == "float16"), _number(len(inputs)), _number(len(inputs) + len(outputs))]
    for name, _, shape in (*inputs, *outputs):
        parts += [_text(name), _number(name in shared)]
        for sizes in (shape, most[name]):
            parts += [_number(len(sizes)), *map(_number, sizes)]
    return b"".join([*parts, *(np.ascontiguousarray(x).tobytes() for x in _arrays(case).values())])
