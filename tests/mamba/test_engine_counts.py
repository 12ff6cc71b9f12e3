"""Kernel launches counted in the builder's list of layers, and the results that benchmarks/engines.py keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
# One SelectiveScan in blocks, batch 1: 9 kernels around a loop over 7 blocks a turn and one over what is left of them.
LOG = (Path(__file__).parent / "layers_of_a_scan.txt").read_text()


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import engines
    import launches

    yield engines, launches
    sys.path.remove(str(ROOT / "benchmarks"))


def counted(modules: tuple[ModuleType, ModuleType], log: str, *turns: int) -> list[int]:
    launches = modules[1]
    return [launches.launches(layers, turns) for layers in launches.layers_of(log)]


@pytest.mark.parametrize(("blocks", "kernels"), [(0, 9), (1, 11), (6, 21), (7, 16), (8, 18), (14, 23), (32, 45)])
def test_loops_count_as_often_as_they_turn(modules: Any, blocks: int, kernels: int) -> None:
    """Seven blocks are 7 kernels, one alone is 2."""
    assert counted(modules, LOG, blocks) == [kernels]


def test_profiles_count_apart(modules: Any) -> None:
    both = LOG + LOG.replace("_myl1", "_myl3").replace("output.1", "output [profile 1].1")
    assert counted(modules, both, 32) == [45, 45]


def test_a_loop_of_known_length_needs_no_input(modules: Any) -> None:
    limit = "host^ONNXTRT_extractDimensionReshape_output.1__mye20385_myl1"
    for blocks, kernels in ((7, 16), (32, 45)):
        assert counted(modules, LOG.replace(limit, f"__d^{blocks}i32_myl1")) == [kernels]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ("LayerType: kgen", "LayerType: novelty", "say whether that launches a kernel"),
        ("LayerType: ShapeHostToDevice", "LayerType: Reformat", "say whether that launches a kernel"),
        ("Layers:", "", "loops over 1 lengths, expected 2"),
        ("{ Name: __d^7i32_myl1, ", "{ Name: __d^6i32_myl1, ", None),
        ("LayerType: add, Inputs: [ { Name: __mye21106", "LayerType: sub, Inputs: [ { Name: __mye21106", "0 additions"),
        ("LayerType: div", "LayerType: sub", "which it may not meet"),
    ],
)
def test_what_is_not_understood_is_refused(modules: Any, old: str, new: str, why: str | None) -> None:
    assert old in LOG
    changed = LOG.replace(old, new)
    if why is None:  # seven blocks and six are both understood
        assert counted(modules, changed, 32) == [9 + 5 * 7 + 2 * 2]
        return
    with pytest.raises(ValueError, match=why):
        counted(modules, changed, *([32] if old != "Layers:" else [32, 8]))


def test_a_log_without_layers_is_refused(modules: Any) -> None:
    with pytest.raises(ValueError, match=r"ProfilingVerbosity\.DETAILED"):
        modules[1].layers_of("VERBOSE: nothing")


def test_activation_memory_is_that_of_each_profile(modules: Any) -> None:
    log = "INFO: Total Activation Memory: 8627712 bytes\nx\nINFO: Total Activation Memory: 0 bytes\n"
    assert modules[1].activation_bytes(log) == [8627712, 0]


# --- what is kept -----------------------------------------------------------------------------------------------------

HELD = ROOT / "docs" / "results" / "tensorrt_rtx.json"


@pytest.fixture(scope="module")
def held() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(HELD.read_text())
    return found


def test_the_file_has_every_build_and_its_circumstances(modules: Any, held: dict[str, Any]) -> None:
    engines = modules[0]
    rows, cpu = engines.standing(HELD)
    assert list(rows) == engines.cases()
    assert held["schema_version"] == 1
    assert "counted" in held["note"]
    assert "no launch was timed" in held["note"]
    assert {"cpu", "versions", "date", "command", "load_average_1min"} <= set(held["machine"])
    assert held["builder"]["name"] == "TensorRT-RTX"
    assert (held["block"], held["node"]) == (16, {"channels": 512, "states": 12, "width": 4, "steps": 500})
    for case, row in rows.items():
        if "error" in row:
            assert row["error"].strip(), case
            continue
        profiles = 2 if case.profiles == "both" else 1
        assert set(row) == {
            *("layers", "launches", "activation_bytes", "engine_bytes", "weights_bytes", "engine_over_weights"),
            *("seconds", "peak_mib"),
        }
        assert len(row["launches"]) == len(row["activation_bytes"]) == profiles
        assert row["engine_over_weights"] == round(row["engine_bytes"] / row["weights_bytes"], 2)
        assert min(row["launches"]) >= 1
    assert [(r["channels"], r["steps"], r["states"]) for r in cpu] == engines.CPU_SIZES
    assert all(r["n"] >= 100 and r["threads"] == 1 and r["blocks_ms"] > r["scan_ms"] > 0 for r in cpu)


def test_blocks_build_in_both_precisions_and_launch_least(modules: Any) -> None:
    rows, _ = modules[0].standing(HELD)
    for case, row in rows.items():
        if case.body == "blocks" and case.target is None:
            assert "error" not in row, case
    for case, row in rows.items():
        if case.body == "scan" and "error" not in row:
            blocks = rows[modules[0].dataclasses.replace(case, body="blocks")]
            assert all(b < s for b, s in zip(blocks["launches"], row["launches"], strict=True)), case
