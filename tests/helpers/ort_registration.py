"""Looks at what an operator library registers, through a table of functions of ours in place of ONNX Runtime's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

_pointer, _size = ctypes.c_void_p, ctypes.c_size_t
# Places in a CustomOp, in pointers after its version: runtime/csrc/ort_abi.h.
FIELDS = {
    "GetName": (1, ctypes.CFUNCTYPE(ctypes.c_char_p, _pointer)),
    "GetExecutionProviderType": (2, ctypes.CFUNCTYPE(ctypes.c_char_p, _pointer)),
    "GetInputType": (3, ctypes.CFUNCTYPE(ctypes.c_int, _pointer, _size)),
    "GetInputTypeCount": (4, ctypes.CFUNCTYPE(_size, _pointer)),
    "GetOutputType": (5, ctypes.CFUNCTYPE(ctypes.c_int, _pointer, _size)),
    "GetOutputTypeCount": (6, ctypes.CFUNCTYPE(_size, _pointer)),
    "GetInputMemoryType": (11, ctypes.CFUNCTYPE(ctypes.c_int, _pointer, _size)),
}


def registered(path: Path) -> tuple[list[tuple[str, int]], list[str]]:
    """What RegisterCustomOps hands to a table of functions of ours: (domain, operator's address), and marks set."""
    functions: list[Any] = []
    table = (_pointer * 300)()
    operators: list[tuple[str, int]] = []
    domains: dict[int, str] = {}
    marks: list[str] = []
    status = ctypes.c_void_p

    def put(position: int, result: Any, *arguments: Any) -> Any:
        def wrap(function: Any) -> Any:
            functions.append(ctypes.CFUNCTYPE(result, *arguments)(function))
            table[position] = ctypes.cast(functions[-1], _pointer)
            return function

        return wrap

    @put(26, status, ctypes.c_char_p, ctypes.POINTER(_pointer))
    def create_domain(name, out):
        domains[len(domains) + 1] = name.decode()
        out[0] = len(domains)

    @put(27, status, _pointer, _pointer)
    def add_operator(domain, operator):
        operators.append((domains[domain], operator))

    @put(28, status, _pointer, _pointer)
    def add_domain(options, domain):
        assert (options, domain) == (77, 1)

    @put(130, status, _pointer, ctypes.c_char_p, ctypes.c_char_p)
    def add_entry(options, key, value):
        marks.append(key.decode())

    @put(237, status, _pointer, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int))
    def has_entry(options, key, out):
        out[0] = key.decode() in marks

    versions: list[int] = []

    @ctypes.CFUNCTYPE(_pointer, ctypes.c_uint32)
    def get_api(version):
        versions.append(version)
        return ctypes.addressof(table)

    base = (_pointer * 2)(ctypes.cast(get_api, _pointer), None)
    register = ctypes.CDLL(str(path)).RegisterCustomOps
    register.restype, register.argtypes = _pointer, [_pointer, _pointer]
    for _ in range(2):
        assert register(77, ctypes.addressof(base)) is None
    assert versions[0] == 16
    # The library keeps the table for as long as the process lives.
    _KEPT.append((table, functions, get_api))
    return operators, marks


_KEPT: list[Any] = []


def describe(operator: int) -> dict[str, Any]:
    """An operator, asked through the functions in its structure."""
    members = ctypes.cast(operator, ctypes.POINTER(_pointer))
    assert ctypes.cast(operator, ctypes.POINTER(ctypes.c_uint32))[0] == 16
    ask = {name: kind(members[1 + place]) for name, (place, kind) in FIELDS.items()}
    inputs = ask["GetInputTypeCount"](operator)
    return {
        "name": ask["GetName"](operator).decode(),
        "provider": ask["GetExecutionProviderType"](operator).decode(),
        "inputs": inputs,
        "outputs": ask["GetOutputTypeCount"](operator),
        "first": ask["GetInputType"](operator, 0),
        "memory": {ask["GetInputMemoryType"](operator, i) for i in range(inputs)},
    }


def check_registration(path: Path) -> None:
    operators, marks = registered(path)
    assert marks == ["custom_op.hcmen.cuda.registered"]
    assert {domain for domain, _ in operators} == {"hcmen"}
    described = [describe(address) for _, address in operators]
    assert {d["provider"] for d in described} == {"CUDAExecutionProvider"}
    # Nothing is asked for in host memory.
    assert all(d["memory"] == {0} for d in described)
    for name, inputs, outputs in (("SelectiveScan", 9, 2), ("CausalConv1d", 4, 2)):
        mine = [d for d in described if d["name"] == name]
        assert {(d["inputs"], d["outputs"]) for d in mine} == {(inputs, outputs)}
        assert {1, 10} <= {d["first"] for d in mine}, "float32 and float16"
