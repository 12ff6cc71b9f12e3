"""How a bundle is run: one class of options per backend, light to import.

    from hcmen.runtime.backends import Ort

    model = load("build/bundle", backend=Ort(threads=2))

A backend's name stands for its options as they are by default, and the options may be keywords beside the name:
`load("build/bundle", backend="ort", threads=2)` is the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from hcmen.base.errors import InputError, unknown_name

__all__ = ["BACKENDS", "Options", "Ort", "OrtCuda", "TensorRT", "TensorRTRTX", "backend_options", "runs_engines"]


@dataclass(frozen=True)
class Ort:
    """ONNX Runtime on the CPU.

    threads: worker threads per session, 1 to 1024; None for the physical cores.
    prepack: whether every session lays the weights out for its kernels (True: faster) or all share one mapped copy
        (False: smaller). None packs where weights are large or not float32; see runtime/backends/ort.py.
    spin: whether threads of a session that has nothing to do keep a core busy for a while before they sleep. That is
        faster where cores are idle; docs/environment.md has what it costs.
    map: whether sessions map the weights file where ONNX Runtime can (1.23 on). A mapped file that is cut short ends
        the process. None maps where nobody but the user and root may write the file; False reads it.

    Raises:
        InputError: a thread count out of range.
    """

    name: ClassVar[str] = "ort"
    threads: int | None = None
    prepack: bool | None = None
    spin: bool = True
    map: bool | None = None

    def __post_init__(self) -> None:
        _check_threads(self.threads)


@dataclass(frozen=True)
class OrtCuda:
    """ONNX Runtime on a CUDA device.

    threads: of the host, which only queues work. cuda_graph: record each graph once per input shape and replay it.

    Raises:
        InputError: a thread count out of range.
    """

    name: ClassVar[str] = "ort-cuda"
    threads: int | None = None
    cuda_graph: bool = False

    def __post_init__(self) -> None:
        _check_threads(self.threads)


@dataclass(frozen=True)
class TensorRT:
    """The engines that hcmen-compile made on this device.

    precision: which engines, "fp32" or "fp16"; None for fp16 where it was compiled, else fp32.
    cuda_graph: capture input shapes that come again, and replay them. An engine of plugin "function" never does.
    trust_engines: run engines that this user did not compile on this machine too. An engine is native code.
    """

    name: ClassVar[str] = "tensorrt"
    precision: str | None = None
    cuda_graph: bool = True
    trust_engines: bool = False


@dataclass(frozen=True)
class TensorRTRTX(TensorRT):
    """The engines that hcmen-compile made with TensorRT for RTX, on any machine, for GPUs of this one's kind.

    precision, trust_engines: as of `TensorRT`. cuda_graph: TensorRT for RTX captures each input shape and replays it.
    specialization: what kernels run a size that comes for the first time: "lazy" for general ones while those of that
        size are compiled beside the run, "eager" to wait for these, "none" for general ones always.

    Raises:
        InputError: no such specialization.
    """

    name: ClassVar[str] = "tensorrt-rtx"
    specialization: str = "lazy"

    def __post_init__(self) -> None:
        if self.specialization not in SPECIALIZATIONS:
            raise unknown_name("specialization", self.specialization, SPECIALIZATIONS)


SPECIALIZATIONS = ("lazy", "eager", "none")

Options = Ort | OrtCuda | TensorRT | TensorRTRTX
BACKENDS: Mapping[str, type[Options]] = {made.name: made for made in (Ort, OrtCuda, TensorRT, TensorRTRTX)}
"""name -> options."""


def runs_engines(backend: str) -> bool:
    """Whether the backend of that name runs what hcmen-compile made."""
    return issubclass(BACKENDS.get(backend, Ort), TensorRT)


def backend_options(backend: str | Options, keywords: Mapping[str, Any]) -> Options:
    """The options that `backend` stands for, with the keywords beside it.

    Args:
        backend: a name of `BACKENDS`, "auto", which is "ort", or the options themselves.
        keywords: option -> value, beside a name alone; None stands for the default.

    Raises:
        InputError: no such backend, an option that it does not have, or a value that cannot be used.
        TypeError: no backend has an option of that name.
    """
    given = {option: value for option, value in keywords.items() if value is not None}
    if not isinstance(backend, str):
        if type(backend) not in BACKENDS.values():
            names = ", ".join(made.__name__ for made in BACKENDS.values())
            raise InputError(f"backend is of type {type(backend).__name__}, expected a name or one of {names}")
        if given:
            raise InputError(f"{next(iter(given))} was given beside {backend}: give it to {type(backend).__name__}")
        return backend
    made = BACKENDS.get("ort" if backend == "auto" else backend)
    if made is None:
        raise unknown_name("backend", backend, ("auto", *BACKENDS))
    has = {name: {field.name for field in fields(options)} for name, options in BACKENDS.items()}
    for option, value in list(given.items()):
        homes = [f"'{name}'" for name, options in has.items() if option in options]
        if not homes:
            raise TypeError(f"no backend has an option {option!r}")
        if option in has[made.name]:
            continue
        if (option, value) not in (("cuda_graph", False), ("trust_engines", False)):  # which say what is so
            raise InputError(
                f"{option} is an option of the backend {_listed(homes)}, got backend '{backend}': leave it out"
            )
        del given[option]
    return made(**given)


def _listed(names: Sequence[str]) -> str:
    """ "a", "a or b", "a, b or c"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _check_threads(threads: int | None) -> None:
    if threads is not None and not 1 <= threads <= 1024:
        raise InputError(f"threads is {threads}, expected 1 to 1024")
