"""The instructions of the CUDA kernels, as tests/gpu/sass.py counts them: on code made up here, and on nvcc's."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURE = 90


@pytest.fixture(scope="module")
def sass() -> Iterator[ModuleType]:
    modules = {}
    for name in ("build", "sass"):  # in this order: the second imports the first
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "gpu" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules["sass"]
    for name in modules:
        del sys.modules[name]


def _code(*lines: str) -> list[tuple[int, str]]:
    return [(16 * i, line) for i, line in enumerate(lines)]


# A tile's loop, 0x10 to 0xf0, around a round's, 0x40 to 0xd0, and a loop of shuffles in that, 0xa0 to 0xb0.
TILES = _code(
    "MOV R1, R2",
    "LDG.E R4, [R2.64]",
    "ISETP.GE.AND P0, PT, R1, R3, PT",
    "@P0 BRA 0xe0",
    "MUFU.EX2 R5, R4",  # 0x40
    "@P1 BRA 0x80",
    "LDG.E R6, [R2.64]",  # a full round
    "BRA 0xa0",
    "@P2 LDG.E R6, [R2.64]",  # 0x80: the last one, with more to do
    "MOV R6, RZ",
    "SHFL.BFLY PT, R6, R6, 0x1, 0x1f",  # 0xa0
    "@P3 BRA 0xa0",
    "LDS.128 R8, [R7]",
    "@P4 BRA 0x40",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "@!P0 BRA 0x10",
    "EXIT",
    "BRA 0x110",
)


def test_counting(sass: ModuleType) -> None:
    round_, tile = sass.count(TILES)
    # 0x40 to 0x70, 0xa0 to 0xd0; and around it 0x10 to 0x30, 0xe0, 0xf0.
    assert (round_.instructions, round_.special, round_.shuffles, round_.shared, round_.memory) == (8, 1, 1, 1, 1)
    assert (tile.instructions, tile.special, tile.memory) == (5, 0, 1)
    assert (round_.static, tile.static, round_.bytes) == (10, 5, 18 * 16)
    straight = _code("MUFU.EX2 R0, R1", "@P0 BRA 0x30", "STG.E [R2.64], R0", "EXIT", "BRA 0x40")
    assert sass.count(straight)[0].instructions == 4
    assert sass.count(straight)[1].instructions == 0


def test_bounds(sass: ModuleType) -> None:
    """By hand: 32 channels of 8 steps on one multiprocessor of 1 GHz."""
    device = sass.Device("one", 1, 1e9, 1e9)
    case = sass.Case(1, 32, 8, "float32", 1, 1, 16, 8, 1)
    loop, rest = sass.Loop(400, 40, 0, 0, 0, 0, 0), sass.Loop(100, 0, 0, 0, 0, 0, 0)
    moved = 4 * 8 * (4 * 32 + 32) + 4 * 32 * 18
    found = sass.bounds(device, case, {"scan_forward_kernel<float, 16, 1, 0>": (loop, rest)})
    assert found == {"issue_us": 0.23, "special_us": 0.16, "memory_us": round(moved / 1e3, 2)}


def test_kernels_stay_short(sass: ModuleType, tmp_path: Path) -> None:
    """What a round of four steps costs one warp, and what registers leave of a multiprocessor."""
    build = sys.modules["build"]
    if build.find_nvcc() is None or sass.find_tools() is None:
        pytest.skip("there is no nvcc, or no cuobjdump and nvdisasm")
    library, kernels = build.build(ROOT / "build" / "cuda test", [ARCHITECTURE])
    ptxas = {k.name: k for k in kernels}
    counted = sass.counts(library, ARCHITECTURE)
    # Instructions of a round and of a tile, special functions of a round, registers: at most.
    limits = {
        "scan_forward_kernel<float, 16, 1, 0>": (630, 75, 76, 128),
        "scan_forward_kernel<half, 16, 1, 0>": (645, 80, 76, 128),
        "scan_forward_kernel<float, 16, 1, 1>": (440, 75, 68, 128),
        "scan_forward_kernel<half, 16, 1, 1>": (450, 80, 68, 128),
        "scan_forward_kernel<float, 8, 2, 0>": (360, 75, 38, 128),
        "scan_forward_kernel<half, 8, 2, 0>": (370, 80, 38, 128),
        "scan_forward_kernel<float, 12, 1, 0>": (530, 75, 60, 168),
    }
    for name, (instructions, tile_instructions, special, registers) in limits.items():
        round_, tile = counted[name]
        assert round_.special == special, name
        assert round_.instructions <= instructions, name
        assert tile.instructions <= tile_instructions, name
        assert round_.memory == (8 if name.endswith("1>") or "8, 2" in name else 16), name
        assert ptxas[name].registers <= registers, name
    for name in counted:
        if "backward" not in name:
            assert (ptxas[name].spill_bytes, ptxas[name].stack_bytes) == (0, 0), name


def test_the_document_is_of_these_kernels(sass: ModuleType) -> None:
    """docs/results/cuda_sass.json has all cases of the benchmark, each with three bounds on each device."""
    document = json.loads((ROOT / "docs" / "results" / "cuda_sass.json").read_text())
    assert len(document["cases"]) == 36
    for case in document["cases"]:
        assert case["kernel"] in document["kernels"]
        for device in document["devices"]:
            assert all(value > 0 for value in case[device["name"]].values())
