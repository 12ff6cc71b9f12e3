"""The ONNX Runtime backend: sessions on the CPU provider, with the kernels of libhcmen_ops.so when they are found.

onnxruntime is imported when the first backend is made and not before. Without the kernel library a graph still gives
the right numbers, through the function of standard ops that every model carries, only many times slower; the backend
then warns and `kernels` says so.

A graph is loaded from memory that was verified, and its weights are given to ONNX Runtime as arrays of one verified
buffer (`SessionOptions.add_external_initializers`). No file is opened and no path of the graph's is followed: what was
hashed is what runs. ONNX Runtime copies each weight once per session, and lets go of the copy where it packs the weight
for a matrix product, which is most of them. The other way, `add_initializer`, copies nothing, but there constant
folding reads the values from the file after all (seen in 1.17 and 1.20, on graphs with inlined functions).
"""

from __future__ import annotations

import functools
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.bundle import OP_DOMAIN
from hcmen.errors import BackendError, CorruptFileError, HcmenError
from hcmen.runtime.compare import SCORE_ATOL, SCORE_RTOL
from hcmen.runtime.graph import read_graph
from hcmen.runtime.library import library_path

__all__ = ["FUNCTIONS", "NATIVE", "STANDARD", "OrtBackend", "OrtSession", "import_onnxruntime", "physical_cores"]

NATIVE = "native"
"""The hcmen ops ran on the kernels of libhcmen_ops.so."""
FUNCTIONS = "functions"
"""The hcmen ops ran through the model's own functions of standard ops: right, and slow."""
STANDARD = "standard"
"""The graph uses no hcmen op."""


class OrtSession:
    """One graph, ready to run. kernels: NATIVE, FUNCTIONS or STANDARD. Several threads may run it at once."""

    tolerance = (SCORE_ATOL, SCORE_RTOL)

    def __init__(self, session: Any, kernels: str, where: str):
        self.kernels = kernels
        self._session = session
        self._where = where
        self._outputs = [o.name for o in session.get_outputs()]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name.

        Raises:
            BackendError: ONNX Runtime refused to run; the message has its reason.
        """
        try:
            values = self._session.run(self._outputs, dict(inputs))
        except Exception as error:
            raise BackendError(f"{self._where}: ONNX Runtime could not run it: {_reason(error)}") from error
        return dict(zip(self._outputs, values, strict=True))


class OrtBackend:
    """Makes sessions. threads: worker threads of each session, the physical cores by default.

    library: use the kernel library when it is found; False leaves it out, for tests and comparisons.
    """

    name = "ort"
    _providers: Sequence[Any] = ("CPUExecutionProvider",)

    def __init__(self, threads: int | None = None, *, library: bool = True):
        self._ort = import_onnxruntime()
        self.threads = threads or physical_cores()
        self.version: str = self._ort.__version__
        self.providers = ", ".join(self._ort.get_available_providers())
        self.library: Path | None = None
        self.library_problem: str | None = "left out on request"
        if library:
            try:
                self.library = self._library_path()
                self._options(self.library)
                self.library_problem = None
            except HcmenError as error:
                self.library, self.library_problem = None, str(error)

    def session(self, model: bytes, weights: NDArray[np.uint8], weights_file: str, where: str) -> OrtSession:
        """A session for one verified graph.

        Args:
            model: the content of the .onnx file. weights: the content of the weights file.
            weights_file: the name under which the graph knows the weights. where: what to call the graph in messages.

        Raises:
            CorruptFileError: the graph is damaged or reaches outside the bundle.
            BackendError: this ONNX Runtime is too old for it.
        """
        graph = read_graph(model, weights_file, len(weights), where)
        kernels = STANDARD
        if OP_DOMAIN in graph.domains:
            kernels = NATIVE if self.library is not None else FUNCTIONS
            if kernels == FUNCTIONS:
                warnings.warn(
                    f"running without the kernel library, right but many times slower: {self.library_problem}",
                    RuntimeWarning,
                    stacklevel=2,
                )
        options = self._options(self.library)
        try:
            values = [self._ort.OrtValue.ortvalue_from_numpy(t.view(weights)) for t in graph.external]
            options.add_external_initializers([t.name for t in graph.external], values)
            session = self._ort.InferenceSession(model, options, providers=list(self._providers))
        except Exception as error:
            raise _load_error(error, where, self.version) from error
        return self._session(session, kernels, where)

    def _library_path(self) -> Path:
        return library_path()

    def _session(self, session: Any, kernels: str, where: str) -> OrtSession:
        return OrtSession(session, kernels, where)

    def _options(self, library: Path | None) -> Any:
        """Session options; raises BackendError when ONNX Runtime refuses the kernel library."""
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # every failure comes back as an exception; the log would repeat it on stderr
        if library is not None:
            try:
                options.register_custom_ops_library(str(library))
            except Exception as error:
                raise BackendError(f"ONNX Runtime {self.version} refused {library}: {_reason(error)}") from error
        return options


def import_onnxruntime() -> Any:
    """The module onnxruntime; raises BackendError when it is missing or damaged."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendError(
            f"{error.name} is not installed, and the backend 'ort' needs it: pip install 'hcmen[cpu]'"
        ) from error
    except ImportError as error:
        raise BackendError(f"onnxruntime does not load ({_reason(error)}): install it again") from error
    if not hasattr(onnxruntime, "InferenceSession"):
        raise BackendError(
            "onnxruntime is damaged, as it is when onnxruntime and onnxruntime-gpu were both installed: "
            "remove both, then install one"
        )
    return onnxruntime


# What ONNX Runtime says when the model is sound and it is itself too old, or a kernel is missing.
_TOO_OLD = re.compile(
    r"IR version|[Oo]pset \d+ is under development|is not a registered function|NOT_IMPLEMENTED"
    r"|No Op registered|Could not find an implementation"
)


def _load_error(error: Exception, where: str, version: str) -> HcmenError:
    reason = _reason(error)
    if _TOO_OLD.search(reason):
        return BackendError(f"{where}: ONNX Runtime {version} cannot load it ({reason}): upgrade onnxruntime")
    return CorruptFileError(f"{where}: ONNX Runtime refused it ({reason}): copy or export the bundle again")


def _reason(error: BaseException) -> str:
    """The error's text on one line of bearable length."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : ", "", text)
    return text if len(text) <= 400 else text[:397] + "..."


@functools.cache
def physical_cores() -> int:
    """How many physical cores this process may use: its CPU affinity and its cgroup's quota are respected."""
    allowed = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    cores = set()
    for cpu in allowed:
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add(((topology / "physical_package_id").read_text(), (topology / "core_id").read_text()))
        except OSError:
            cores.add((str(cpu), ""))
    count = len(cores)
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, -(-int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count)
