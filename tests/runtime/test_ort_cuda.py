"""The backend ort-cuda without a GPU: what it says when something is missing, and, over a real ONNX Runtime that takes
the CPU for the device and runs the emulated kernels, that its bindings and its choice of buffers give right numbers.
"""

from __future__ import annotations

import importlib.util
import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from helpers import emulated
from helpers.command import run
from helpers.emulated import CSRC, EMULATION, KERNELS
from helpers.op_cases import ScanCase, scan_arrays, scan_oracle

import hcmen.runtime.backends.ort as ort_module
import hcmen.runtime.backends.ort_cuda as module
from hcmen.base.cuda_library import load_cuda_library
from hcmen.base.errors import BackendError
from hcmen.mamba.one_node import scan_model
from hcmen.runtime import load
from hcmen.runtime.backends import OrtCuda
from hcmen.runtime.backends.ort_cuda import OrtCudaBackend
from hcmen.runtime.commands.run import main

NO_WEIGHTS = np.zeros(0, np.uint8)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    path = tmp_path_factory.mktemp("cuda") / "libhcmen_ops_cuda.so"
    flags = ["-O1", "-shared", "-fPIC", '-DHCMEN_ORT_PROVIDER="CPUExecutionProvider"', "-Wl,-z,nodelete"]
    built = emulated.build(path, flags, [*KERNELS, CSRC / "ort_cuda_ops.cc", EMULATION / "control.cc"])
    assert built.returncode == 0, built.stderr
    return path


class Stand:
    """onnxruntime with a CUDA provider that is the CPU; `calls` tells what was asked of it."""

    def __init__(self, *, falls_back: bool = False):
        self.calls: list[str] = []
        calls = self.calls

        class Session(onnxruntime.InferenceSession):
            def __init__(self, model: bytes, options: Any, providers: list[Any]):
                (name, provider_options), second = providers
                assert (name, second) == ("CUDAExecutionProvider", "CPUExecutionProvider")
                calls.append(f"session {json.dumps(provider_options)}")
                super().__init__(model, options, providers=["CPUExecutionProvider"])

            def get_providers(self) -> list[str]:
                return ["CPUExecutionProvider"] if falls_back else ["CUDAExecutionProvider", "CPUExecutionProvider"]

            def io_binding(self) -> Binding:
                return Binding(self)

            def run_with_iobinding(self, binding: Any, run_options: Any = None) -> None:
                try:
                    number = run_options.get_run_config_entry("gpu_graph_id")
                except RuntimeError:  # not set
                    number = None
                calls.append(f"run {number}")
                super().run_with_iobinding(binding, run_options)

        class Binding(onnxruntime.IOBinding):
            def bind_output(self, name: str, device: str, number: int) -> None:  # type: ignore[override]
                assert device == "cuda"
                super().bind_output(name, "cpu")

        class Value:
            @staticmethod
            def ortvalue_from_numpy(x: Any, device: str = "cpu", number: int = 0) -> Any:
                calls.append(f"to {device}")
                # A device has memory of its own.
                return onnxruntime.OrtValue.ortvalue_from_numpy(x if device == "cpu" else x.copy())

            @staticmethod
            def ortvalue_from_shape_and_type(shape: Any, dtype: Any, device: str, number: int) -> Any:
                assert device == "cuda"
                return onnxruntime.OrtValue.ortvalue_from_shape_and_type(shape, dtype)

        self.module = types.SimpleNamespace(
            **{k: v for k, v in vars(onnxruntime).items() if not k.startswith("__")}
            | {
                "__version__": onnxruntime.__version__,
                "InferenceSession": Session,
                "OrtValue": Value,
                "get_available_providers": lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
            }
        )


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch, library: Path) -> Stand:
    made = Stand()
    use(monkeypatch, made, library)
    return made


def use(monkeypatch: pytest.MonkeyPatch, made: Stand, library: Path) -> None:
    monkeypatch.setattr(ort_module, "import_onnxruntime", lambda: made.module)
    monkeypatch.setattr(module, "device_problem", lambda: None)
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(library))
    load_cuda_library.cache_clear()


# --- numbers --------------------------------------------------------------------------------------------------------


def feeds_of(time: int, seed: int) -> dict[str, Any]:
    return scan_arrays(ScanCase(2, time, 6, 4, None, seed=seed))


def check(session: Any, feeds: dict[str, Any]) -> None:
    got = session.run(feeds)
    for name, want in zip(("y", "last_state"), scan_oracle(ScanCase(), feeds), strict=True):
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-5)


@pytest.fixture
def model() -> bytes:
    made = scan_model(6, 4, delta_softplus=True, gated=True, stateful=True)
    return bytes(made.SerializeToString())


def test_a_session_binds_inputs_and_outputs_on_the_device(stand, model):
    session = OrtCudaBackend().session(model, NO_WEIGHTS, "weights.bin", "graph")
    assert session.kernels == "native"
    check(session, feeds_of(9, 0))
    check(session, feeds_of(5, 1))
    assert stand.calls.count("to cuda") == 2 * 9
    assert [c for c in stand.calls if c.startswith("run")] == ["run None"] * 2
    assert 'session {"device_id": "0", "use_tf32": "0"}' in stand.calls


def test_cuda_graphs_have_buffers_and_a_number_for_each_shape(stand, model):
    session = OrtCudaBackend(OrtCuda(cuda_graph=True), device=1).session(model, NO_WEIGHTS, "weights.bin", "graph")
    for seed, time in enumerate((9, 9, 5, 9, 5, 5)):
        check(session, feeds_of(time, seed))
    # The first run of a shape is apart; the others replay its graph.
    assert [c for c in stand.calls if c.startswith("run")] == [f"run {n}" for n in (-1, 1, -1, 1, 2, 2)]
    assert 'session {"device_id": "1", "use_tf32": "0", "enable_cuda_graph": "1"}' in stand.calls


def test_results_are_the_callers_own(stand, model):
    session = OrtCudaBackend(OrtCuda(cuda_graph=True)).session(model, NO_WEIGHTS, "weights.bin", "graph")
    first = feeds_of(9, 0)
    session.run(first)
    kept = session.run(first)["y"]
    copy = kept.copy()
    session.run(feeds_of(9, 1))
    np.testing.assert_array_equal(kept, copy)


def test_no_more_shapes_are_recorded_than_there_is_room_for(stand, model, monkeypatch):
    monkeypatch.setattr(module, "_MOST_GRAPHS", 1)
    session = OrtCudaBackend(OrtCuda(cuda_graph=True)).session(model, NO_WEIGHTS, "weights.bin", "graph")
    for time in (3, 4, 4, 3):
        check(session, feeds_of(time, time))
    assert [c for c in stand.calls if c.startswith("run")] == [f"run {n}" for n in (-1, -1, -1, 1)]


def test_a_whole_bundle(stand, shared_bundle):
    for arguments in ((), ("--cuda-graph",)):
        done = run(
            main, "--bundle", shared_bundle, "--backend", "ort-cuda", *arguments, "--self-test", "--format", "json"
        )
        assert (done.code, done.err) == (0, "")
        answer = json.loads(done.out)
        assert answer["backend"]["name"] == "ort-cuda"
        assert all(v["passed"] for v in answer["self_test"].values())
    assert load(shared_bundle, backend="ort-cuda").backend.name == "ort-cuda"


# --- refusals -------------------------------------------------------------------------------------------------------


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_package_without_the_provider(monkeypatch):
    providers = [p for p in onnxruntime.get_available_providers() if p != module.PROVIDER]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    with pytest.raises(BackendError) as error:
        OrtCudaBackend()
    assert "has no CUDA provider (it has" in one_line(error)
    assert "pip install 'hcmen[gpu]'" in one_line(error)


def test_no_device(monkeypatch, stand):
    monkeypatch.setattr(module, "device_problem", lambda: "the CUDA driver sees no device")
    with pytest.raises(BackendError) as error:
        OrtCudaBackend()
    assert one_line(error).startswith("the CUDA driver sees no device, and the backend 'ort-cuda' needs one")


def test_no_library(monkeypatch, stand, tmp_path):
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", str(tmp_path / "none.so"))
    with pytest.raises(BackendError) as error:
        OrtCudaBackend()
    assert "HCMEN_CUDA=ON" in one_line(error)
    (tmp_path / "none.so").write_bytes(b"not a library")
    with pytest.raises(BackendError) as error:
        OrtCudaBackend()
    assert "refused" in one_line(error)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (209, "the device is sm_86, the library has code for 75, 90, 120: build the library for 86: docs/cuda.md"),
        (35, "the driver serves CUDA 12.2, the library was built with 13.0: update the driver, or build the library"),
    ],
)
def test_a_library_that_does_not_serve_the_device(stand, library, shared_bundle, error, words):
    """Said before anything is run, by the command too."""
    with emulated.troubled(emulated.load(library), error, 12020):
        with pytest.raises(BackendError) as told:
            OrtCudaBackend()
        done = run(main, "--bundle", shared_bundle, "--backend", "ort-cuda", "--self-test")
    assert words in one_line(told)
    assert (done.code, done.err.count("\n")) == (3, 1)
    assert words in done.err


def test_a_runtime_that_falls_back(monkeypatch, library, model):
    use(monkeypatch, Stand(falls_back=True), library)
    with pytest.raises(BackendError) as error:
        OrtCudaBackend().session(model, NO_WEIGHTS, "weights.bin", "graph")
    assert one_line(error).startswith("graph: ONNX Runtime")
    assert "fell back to CPUExecutionProvider" in one_line(error)


@pytest.mark.parametrize("pip", [False, True])
def test_cuda_of_pip_is_loaded_before_a_session_is_made(monkeypatch, stand, model, capsys, pip):
    def preload() -> None:
        print("Failed to load libcufft.so.12")
        stand.calls.append("preload")

    stand.module.preload_dlls = preload
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if pip and name == "nvidia" else None)
    OrtCudaBackend().session(model, NO_WEIGHTS, "weights.bin", "graph")
    assert [call.split()[0] for call in stand.calls] == ["preload"] * pip + ["session"]
    assert capsys.readouterr().out == ""


def test_a_run_that_fails_says_why(stand, model):
    feeds = feeds_of(5, 0)
    feeds["delta"] = feeds["delta"][:, :3]
    for graph in (False, True):
        session = OrtCudaBackend(OrtCuda(cuda_graph=graph)).session(model, NO_WEIGHTS, "weights.bin", "graph")
        with pytest.raises(BackendError, match="input 'delta' has shape") as error:
            session.run(feeds)
        assert ("without cuda_graph it may run" in one_line(error)) == graph


def test_the_command_exits_with_3(monkeypatch, shared_bundle):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    done = run(main, "--bundle", shared_bundle, "--backend", "ort-cuda", "--self-test")
    assert done.code == 3
    assert done.err.count("\n") == 1
    assert "hcmen[gpu]" in done.err
