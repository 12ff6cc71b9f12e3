"""Finds and loads `libhcmen_ops.so`, the C++ kernels, for ONNX Runtime (as a path) and for PyTorch (through ctypes).

The library is searched along `hcmen.__path__`: in an editable install it lies in site-packages while this file lies in
the checkout, so the folder of this file is not a place to rely on.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hcmen
from hcmen.base.errors import BackendError
from hcmen.base.op import CAUSAL_CONV1D, SELECTIVE_SCAN, STATE_SPACE_DUAL, Operator

__all__ = [
    "ConvArguments",
    "ConvGradients",
    "DualArguments",
    "DualGradients",
    "ScanArguments",
    "ScanGradients",
    "library_folders",
    "library_isa",
    "library_path",
    "load_library",
]

LIBRARY_NAME = "libhcmen_ops.so"
LIBRARY_VERSION = 2
"""HCMEN_OPS_VERSION of runtime/csrc/selective_scan.h."""

_i32, _i64, _f32, _pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


def _arguments(op: Operator) -> list[tuple[str, Any]]:
    """The fields of a kernel's arguments: sizes, switches, which tensors are wide, then inputs and outputs.

    `reserved` fills up what else the compiler would.
    """
    integers = ["dtype", *(name for name in op.switches if name not in op.numbers), *op.wide]
    if (len(integers) + len(op.numbers)) % 2:
        integers.append("reserved")
    return [
        *((name, _i64) for name in op.sizes),
        *((name, _i32) for name in integers),
        *((name, _f32) for name in op.numbers),
        *((tensor.name, _pointer) for tensor in (*op.inputs, *op.outputs)),
    ]


def _gradients(op: Operator) -> list[tuple[str, Any]]:
    """The fields of a kernel's gradients: those given, of outputs, then those wanted, of inputs."""
    return [(f"d{tensor.name}", _pointer) for tensor in (*op.outputs, *op.inputs)]


class ScanArguments(ctypes.Structure):
    """`hcmen_scan` of runtime/csrc/selective_scan.h."""

    _fields_ = _arguments(SELECTIVE_SCAN)


class ScanGradients(ctypes.Structure):
    """`hcmen_scan_grad` of runtime/csrc/selective_scan.h."""

    _fields_ = _gradients(SELECTIVE_SCAN)


class ConvArguments(ctypes.Structure):
    """`hcmen_conv` of runtime/csrc/causal_conv1d.h."""

    _fields_ = _arguments(CAUSAL_CONV1D)


class ConvGradients(ctypes.Structure):
    """`hcmen_conv_grad` of runtime/csrc/causal_conv1d.h."""

    _fields_ = _gradients(CAUSAL_CONV1D)


class DualArguments(ctypes.Structure):
    """`hcmen_dual` of runtime/csrc/state_space_dual.h."""

    _fields_ = _arguments(STATE_SPACE_DUAL)


class DualGradients(ctypes.Structure):
    """`hcmen_dual_grad` of runtime/csrc/state_space_dual.h."""

    _fields_ = _gradients(STATE_SPACE_DUAL)


_FUNCTIONS = {
    "hcmen_selective_scan_forward": (ScanArguments,),
    "hcmen_selective_scan_backward": (ScanArguments, ScanGradients),
    "hcmen_causal_conv1d_forward": (ConvArguments,),
    "hcmen_causal_conv1d_backward": (ConvArguments, ConvGradients),
    "hcmen_state_space_dual_forward": (DualArguments,),
    "hcmen_state_space_dual_backward": (DualArguments, DualGradients),
}
# The rest of the C interface: argument types and result.
_OTHERS: dict[str, tuple[Sequence[Any], Any]] = {
    "hcmen_ops_version": ((), ctypes.c_int),
    "hcmen_ops_isa": ((), ctypes.c_char_p),
    "hcmen_ops_problem": ((), ctypes.c_char_p),
    "hcmen_exp_loop": ((_i64,), _i64),
    "hcmen_evaluate": ((ctypes.c_int, _pointer, _pointer, _i64), ctypes.c_int),
}


def library_folders() -> list[Path]:
    """Where a shared library of this package may lie."""
    return [Path(folder) / "base" for folder in hcmen.__path__]


def install_advice(again: str = "install the package with a C++17 compiler present") -> str:
    """What puts the files of this package in their place: `again`, or building a frozen application anew."""
    if getattr(sys, "frozen", False):
        return "build the application again with pyinstaller --collect-binaries hcmen --collect-data hcmen"
    return again


def library_path() -> Path:
    """The absolute path of the shared library.

    Raises:
        BackendError: it is in none of the places searched; the message lists them.
    """
    places = [folder / LIBRARY_NAME for folder in library_folders()]
    for place in places:
        if place.is_file():
            return place.resolve()
    tried = ", ".join(str(p.parent) for p in places)
    raise BackendError(f"{LIBRARY_NAME} was not found in {tried}: {install_advice()}")


@functools.cache
def load_library() -> ctypes.CDLL:
    """The library with the signatures of its C functions declared. Those over structures return 0 on success.

    Raises:
        BackendError: it is missing, cannot be loaded, is of another version of this package, or the environment
            variable HCMEN_ISA asks for an instruction set that cannot be had.
    """
    path = library_path()
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendError(
            f"{path} cannot be loaded ({error}): {install_advice('reinstall the package on this machine')}"
        ) from error
    signatures: dict[str, tuple[Sequence[Any], Any]] = {**_OTHERS}
    for name, structures in _FUNCTIONS.items():
        signatures[name] = ([*(ctypes.POINTER(s) for s in structures), ctypes.c_int], ctypes.c_int)
    for name, (arguments, result) in signatures.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            fix = install_advice("reinstall the package")
            raise BackendError(f"{path} has no {name}: it is from another version, {fix}") from None
        function.argtypes = arguments
        function.restype = result
    version = library.hcmen_ops_version()
    if version != LIBRARY_VERSION:
        raise BackendError(
            f"{path} has version {version}, expected {LIBRARY_VERSION}: {install_advice('reinstall the package')}"
        )
    problem = library.hcmen_ops_problem()
    if problem is not None:
        raise BackendError(problem.decode())
    return library


def library_isa() -> str:
    """The instruction set the kernels use on this machine: "avx512", "avx2" or "baseline", on 64-bit ARM "neon".

    Raises:
        BackendError: as `load_library`.
    """
    name: bytes = load_library().hcmen_ops_isa()
    return name.decode()
