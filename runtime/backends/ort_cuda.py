"""The backend `ort-cuda`: ONNX Runtime's CUDA provider with the kernels of libhcmen_ops_cuda.so.

It runs on the device or not at all: what is missing is a `BackendError` that says what to do, and a session that ONNX
Runtime would quietly run on the CPU is refused. Inputs are copied to the device once and outputs back once, through IO
binding; nothing else crosses.

With `cuda_graph` each input shape gets buffers of its own, whose addresses stay, and a graph number of its own: the
first run finds the shapes of the outputs, the next ones record the graph, and all later ones replay it. This needs
every node of a model on the device.

tests/runtime/test_ort_cuda.py runs it over a runtime that takes the CPU for the device, tests/gpu on one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.cuda_library import call, cuda_library_path, device_problem, load_cuda_library
from hcmen.base.errors import BackendError
from hcmen.runtime.backends.options import Ort, OrtCuda
from hcmen.runtime.backends.ort import OrtBackend, OrtSession, _reason

__all__ = ["PROVIDER", "OrtCudaBackend", "OrtCudaSession"]

PROVIDER = "CUDAExecutionProvider"
_MOST_GRAPHS = 32
"""Input shapes that are kept recorded, each with buffers on the device; others run without."""


class OrtCudaBackend(OrtBackend):
    """Makes sessions on a CUDA device.

    device: the device's number.

    Raises:
        BackendError: the CUDA provider, the device or the kernel library is missing, or the library does not serve the
            device or its driver.
    """

    name = "ort-cuda"
    _maps = False  # weights end up on the device

    def __init__(self, options: OrtCuda | None = None, *, device: int = 0):
        options = options or OrtCuda()
        self.device, self.cuda_graph = device, options.cuda_graph
        super().__init__(Ort(options.threads), library=False)
        available = self._ort.get_available_providers()
        if PROVIDER not in available:
            raise BackendError(
                f"onnxruntime {self.version} has no CUDA provider (it has {', '.join(available)}), and the backend "
                "'ort-cuda' needs it: pip uninstall -y onnxruntime, then pip install 'hcmen[gpu]'"
            )
        problem = device_problem()
        if problem is not None:
            raise BackendError(f"{problem}, and the backend 'ort-cuda' needs one: check nvidia-smi, or use 'ort'")
        _load_cuda_of_pip(self._ort)
        self.library, self.library_problem = self._library_path(), None
        self._options(self.library)
        if device == 0:  # the one that the library begins with
            call(load_cuda_library(), "warm")
        # TF32 is the default there. It keeps 10 bits of a product's factors: scores miss the float32 bound.
        provider = {"device_id": str(device), "use_tf32": "0"}
        if self.cuda_graph:
            provider["enable_cuda_graph"] = "1"
        self._providers = ((PROVIDER, provider), "CPUExecutionProvider")

    def _library_path(self) -> Path:
        return cuda_library_path()

    def _session(self, session: Any, kernels: str, where: str) -> OrtSession:
        # Without CUDA's or cuDNN's libraries ONNX Runtime makes a session on the CPU, with a line in its log.
        running = session.get_providers()
        if PROVIDER not in running:
            raise BackendError(
                f"{where}: ONNX Runtime {self.version} fell back to {', '.join(running)}: install the CUDA and cuDNN "
                "versions that it was built for (pip install 'onnxruntime-gpu[cuda,cudnn]'), or use the backend 'ort'"
            )
        return OrtCudaSession(self._ort, session, kernels, where, self.device, self.cuda_graph)


def _load_cuda_of_pip(ort: Any) -> None:
    """Loads CUDA and cuDNN from pip's packages, where no loader looks and ONNX Runtime does when it is asked."""
    preload = getattr(ort, "preload_dlls", None)  # from 1.21 on
    if preload is None or importlib.util.find_spec("nvidia") is None:
        return
    # It prints what it misses, where a command's result goes. What is missing shows when a session is made.
    with contextlib.redirect_stdout(io.StringIO()):
        preload()


class _Recorded:
    """Buffers on the device for one set of input shapes, and the number of their graph."""

    def __init__(self, number: int, binding: Any, inputs: dict[str, Any]):
        self.number, self.binding, self.inputs = number, binding, inputs


class OrtCudaSession(OrtSession):
    """One graph on a device. Several threads may run it at once; with CUDA graphs they wait for each other."""

    def __init__(self, ort: Any, session: Any, kernels: str, where: str, device: int, cuda_graph: bool):
        super().__init__(ort, session, kernels, where)
        self._device, self._cuda_graph = device, cuda_graph
        self._recorded: dict[tuple[Any, ...], _Recorded] = {}
        self._lock = threading.Lock()

    def _run(self, inputs: Mapping[str, NDArray[Any]], options: Any) -> dict[str, NDArray[Any]]:
        try:
            if not self._cuda_graph:
                return self._once(inputs, options)
            with self._lock:
                return self._replay(inputs, options)
        except Exception as error:
            hint = "; without cuda_graph it may run" if self._cuda_graph else ""
            raise BackendError(f"{self._where}: ONNX Runtime could not run it: {_reason(error)}{hint}") from error

    def _on_device(self, x: NDArray[Any]) -> Any:
        return self._ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(x), "cuda", self._device)

    def _once(self, inputs: Mapping[str, NDArray[Any]], options: Any) -> dict[str, NDArray[Any]]:
        binding = self._session.io_binding()
        for name, x in inputs.items():
            binding.bind_ortvalue_input(name, self._on_device(x))
        for name in self._outputs:
            binding.bind_output(name, "cuda", self._device)
        return self._run_bound(binding, options)

    def _run_bound(self, binding: Any, options: Any) -> dict[str, NDArray[Any]]:
        self._session.run_with_iobinding(binding, options)
        # The copy waits for the device.
        return dict(zip(self._outputs, binding.copy_outputs_to_cpu(), strict=True))

    def _replay(self, inputs: Mapping[str, NDArray[Any]], options: Any) -> dict[str, NDArray[Any]]:
        def numbered(number: int) -> Any:
            options.add_run_config_entry("gpu_graph_id", str(number))  # -1: neither record nor replay
            return options

        key = tuple(sorted((name, x.shape, x.dtype.str) for name, x in inputs.items()))
        recorded = self._recorded.get(key)
        if recorded is not None:
            for name, x in inputs.items():
                recorded.inputs[name].update_inplace(np.ascontiguousarray(x))
            return self._run_bound(recorded.binding, numbered(recorded.number))
        outputs = self._once(inputs, numbered(-1))
        if len(self._recorded) < _MOST_GRAPHS:
            binding = self._session.io_binding()
            held = {name: self._on_device(x) for name, x in inputs.items()}
            for name, value in held.items():
                binding.bind_ortvalue_input(name, value)
            for name, x in outputs.items():
                place = self._ort.OrtValue.ortvalue_from_shape_and_type(list(x.shape), x.dtype, "cuda", self._device)
                binding.bind_ortvalue_output(name, place)
            self._recorded[key] = _Recorded(len(self._recorded) + 1, binding, held)
        return outputs
