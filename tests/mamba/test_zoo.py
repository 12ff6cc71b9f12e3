"""Other people's models, exported and verified: what benchmarks/mamba_zoo.py does, where the index has their code."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build" / "zoo"
sys.path.insert(0, str(ROOT / "benchmarks"))

import zoo_table  # noqa: E402
from zoo import FAMILIES, language, registry  # noqa: E402

import hcmen.mamba  # noqa: E402
from hcmen.base.library import library_path  # noqa: E402
from hcmen.mamba.scan import implementation  # noqa: E402

TRANSFORMERS = [name for name, family in FAMILIES.items() if family.source == "transformers"]
OF_THE_INDEX = [name for name, family in FAMILIES.items() if not family.folders and family.source != "transformers"]
BRING = "python tests/all/run.py --bring"


def test_there_are_as_many_families_as_are_promised() -> None:
    assert len(FAMILIES) >= 27
    assert len(TRANSFORMERS) == 10
    assert {"MambaVision", "mamba.py"} == set(OF_THE_INDEX)


def test_what_is_absent_is_one_line_that_says_what_to_bring(tmp_path: Path) -> None:
    family = FAMILIES["Vim"]
    assert family.missing(tmp_path) == (
        f"no {tmp_path}/Vim/vim: git clone https://github.com/hustvl/Vim {tmp_path}/Vim"
    )
    # Another repository that it needs has an address of its own.
    (tmp_path / "MedMamba").mkdir()
    told = FAMILIES["MedMamba"].missing(tmp_path)
    assert told == f"no {tmp_path}/mamba: git clone https://github.com/state-spaces/mamba {tmp_path}/mamba"


def test_what_is_no_longer_needed_is_no_longer_stood_in_for() -> None:
    with registry.stand_ins(("not_to_be_found",)):
        module = importlib.import_module("not_to_be_found.deep")
        assert module.Anything.at_all(1, b=2) is not None
    for name in ("not_to_be_found", "not_to_be_found.deep"):
        sys.modules.pop(name)
    assert importlib.util.find_spec("not_to_be_found") is None


def test_a_package_without_its_init(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("raise SystemExit")
    (tmp_path / "part.py").write_text("from . import other\nvalue = other.value + 1\n")
    (tmp_path / "other.py").write_text("value = 1\n")
    registry.bare_package("bare_for_this_test", tmp_path)
    assert importlib.import_module("bare_for_this_test.part").value == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_family_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is held to the model on the plain reference by this test itself, at a length that export never saw."""
    monkeypatch.setattr(language, "TOKENS", (2, 24))
    family, path = FAMILIES[name], tmp_path / "model.onnx"
    torch.manual_seed(0)
    with hcmen.mamba.shim():
        model, inputs = family.build(tmp_path)
        report = hcmen.mamba.export(model, inputs, path, dynamic=tuple(family.dynamic))
        ids = torch.randint(0, language.WORDS, (3, 37))
        with torch.no_grad(), implementation("ref"):
            want = model(ids)
    assert report.verified
    assert {size.name for size in report.sizes} == {"batch", "time"}
    assert sum(sum(modules.values()) for modules in report.sites.values()) >= 2
    for library in (False, True):
        options = onnxruntime.SessionOptions()
        if library:
            options.register_custom_ops_library(str(library_path()))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (got,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
        error = float((torch.from_numpy(got) - want).abs().max() / want.abs().max())
        assert error <= 1e-5, f"library {library}"


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_THE_INDEX)
def test_a_family_of_the_index(name: str, tmp_path: Path) -> None:
    """In a process of its own, as the benchmark runs it: it imports packages that are not in this environment."""
    if not PACKAGES.is_dir():
        pytest.skip(f"no {PACKAGES.relative_to(ROOT)}: {BRING}")
    out = tmp_path / "row.json"
    command = [sys.executable, "-m", "zoo.measure", name, "--repos", str(tmp_path), "--packages", str(PACKAGES)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "benchmarks"), "CUDA_VISIBLE_DEVICES": ""}
    command += ["--seconds", "0", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row: dict[str, Any] = json.loads(out.read_bytes())
    if row["state"] == "absent":
        pytest.skip(f"{row['reason']}, or {BRING}")
    assert row["state"] == "done", row
    assert max(row["errors"]["library"], row["errors"]["functions"]) <= row["errors"]["bound"]
    wanted = {size for axes in FAMILIES[name].dynamic for size in axes.values()}
    assert wanted <= set(row["open_sizes"])
    assert row["sites"]["SelectiveScan"] >= 2
    assert {"eager_reference", "eager", "scan", "library"} == row["ms"].keys()


def test_the_table_tells_what_was_not_exported_and_why() -> None:
    ms = {
        way: {"median": value, "least": value, "n": 5}
        for way, value in zip(zoo_table.WAYS, (400, 40, 20, 2.5), strict=True)
    }
    common = {"source": "https://github.com/a/b", "stand_ins": ["x"], "note": "", "what": "B", "refused": None}
    good = {
        **common,
        "name": "A",
        "commit": "0123456789abcdef",
        "state": "done",
        "ms": ms,
        "times_scan": 8.0,
        "parameters": 10**6,
        "nodes": 7,
        "nodes_traced": 70,
        "open_sizes": ["batch"],
        "sites": {"SelectiveScan": 4},
        "operators": {"hcmen.SelectiveScan": 2, "MatMul": 5},
        "fixed": [
            "'height' (axis 2 of 'x') is fixed to 8 by A/b.py:57 (n); 'width' (axis 3 of 'x') is fixed to 8 by b.py:57"
        ],
        "errors": {"name": "y", "library": 1e-7, "functions": 3e-7, "float64": 1e-7, "bound": 1e-5},
    }
    bad = {**common, "name": "C", "commit": None, "state": "failed", "reason": "no ONNX for it"}
    summary = {"families": 2, "done": 1, "slower_than_scan": [], "median_times_scan": 8.0}
    machine = {"cpu": "CPU", "logical_cores": 2, "date": "today", "versions": {"torch": "2", "onnxruntime": "1"}}
    text = zoo_table.tables({"families": [good, bad], "summary": summary, "machine": machine})
    (row,) = [line for line in text.splitlines() if line.startswith("| [A](https://github.com/a/b/tree/0123456789)")]
    assert [cell.strip() for cell in row.split("|")[2:-1]] == [
        *("2 / 0 / 0", "7", "batch", "3.0e-07", "1.0e-05"),
        *("400", "40", "20", "2.5", "8.0"),
    ]
    assert "| C | no ONNX for it |" in text
    assert "height and width fixed by b.py:57; stand-ins for x |" in text
    assert "1 of 2 families" in text
