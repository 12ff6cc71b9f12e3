"""tests/gpu/run.py on a machine without a GPU: its suites are found and sorted into passed, failed and skipped, and the
package it lays out imports. What the suites test is seen only on a device; here their files are collected and skip.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from hcmen.base.cuda_library import device_problem

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    sys.path.insert(0, str(GPU))
    try:
        spec = importlib.util.spec_from_file_location("gpu_run", GPU / "run.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["gpu_run"] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(GPU))


def test_every_file_is_in_a_suite(runner):
    named = {name for suite in runner.SUITES for name in suite.tests}
    assert named == {p.name for p in GPU.glob("test_*.py")}
    assert len({s.name for s in runner.SUITES}) == len(runner.SUITES)


@pytest.mark.skipif(device_problem() is None, reason="there is a device")
def test_without_a_device_nothing_is_run(runner, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runner, "device_architecture", lambda: None)
    assert runner.main(["--folder", str(tmp_path), "--out", str(tmp_path / "gpu.json")]) == 3
    assert "no CUDA device: nothing was run" in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_an_unknown_suite_is_named(runner, capsys):
    with pytest.raises(SystemExit):
        runner.main(["--only", "kernels,nonsense"])
    assert "no suite 'nonsense': choose from functions, kernels" in capsys.readouterr().err


def test_results_are_sorted_and_written(runner, tmp_path, monkeypatch, capsys):
    """Suites of our own, over a library that is not one."""
    (tmp_path / "test_mixed.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='x')\n"
        "def test_left_out(): pass\n"
    )
    (tmp_path / "test_none.py").write_text(
        "import pytest\npytestmark = pytest.mark.skip(reason='x')\ndef test_a(): pass\n"
    )
    (tmp_path / "test_import.py").write_text(
        "import hcmen, hcmen.mamba.scan, hcmen.mamba.one_node, hcmen.runtime.backends.ort_cuda, helpers.device, os\n"
        "def test_from_the_checkout():\n"
        "    assert hcmen.__version__\n"
        "    assert os.environ['HCMEN_CUDA_LIBRARY'] == '/library.so'\n"
    )
    Suite = runner.Suite

    def python(code):
        return (sys.executable, "-c", code)

    stubborn = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    suites = [
        Suite("mixed", "", 1, (), ["test_mixed.py"]),
        Suite("none", "", 1, (), ["test_none.py"]),
        Suite("import", "", 1, (), ["test_import.py"]),
        Suite("absent", "", 2, (runner._program("no-such-program"),), command=("true",)),
        Suite("right", "", 2, (), command=python("open('r.json', 'w').write('[1]')"), result="r.json"),
        Suite("wrong", "", 2, (), command=python("print('why'); raise SystemExit(9)")),
        Suite(
            "hung", "", 2, (), command=python(f"import time; print('began'); {stubborn}; time.sleep(60)"), timeout_s=2
        ),
        Suite("crashed", "", 2, (), command=python("import os; os.kill(os.getpid(), 11)")),
        Suite("late", "", 3, (), command=python("print(1)"), least_s=10**6),
    ]
    monkeypatch.setattr(runner, "SUITES", suites)
    monkeypatch.setattr(runner, "HERE", tmp_path)
    monkeypatch.setattr(runner, "device_architecture", lambda: 90)
    monkeypatch.setattr(runner, "build", lambda folder, architectures, **options: (Path("/library.so"), []))
    monkeypatch.setenv("HCMEN_CUDA_LIBRARY", "")
    monkeypatch.setattr(runner, "build_probe", lambda folder, architecture: Path("/probe"))
    written = []
    monkeypatch.setattr(
        runner, "_write", lambda *state, write=runner._write: (written.append(list(state[1])), write(*state))
    )
    out = tmp_path / "results"
    assert runner.main(["--folder", str(tmp_path / "work"), "--out", str(out)]) == 1
    data = json.loads((out / "gpu.json").read_text(encoding="utf-8"))
    found = {name: r["status"] for name, r in data["suites"].items()}
    assert found == {
        "build": "passed",
        "mixed": "FAILED",
        "none": "skipped",
        "import": "passed",
        "absent": "skipped",
        "right": "passed",
        "wrong": "FAILED",
        "hung": "FAILED",
        "crashed": "FAILED",
        "late": "skipped",
    }
    # A run that is cut short keeps what went before.
    assert [len(names) for names in written] == [1, 4, 9, 10]
    assert data["suites"]["right"]["result"] == [1]
    assert data["suites"]["hung"]["reason"] == "stopped after 2 s"
    assert "began" in data["suites"]["hung"]["output_tail"]
    assert data["suites"]["hung"]["seconds"] < 30
    assert data["suites"]["crashed"]["reason"] == "ended by SIGSEGV"
    assert "it takes at least 1000000" in data["suites"]["late"]["reason"]
    assert "why" in (out / "gpu.log").read_text(encoding="utf-8")
    assert [data["suites"]["mixed"][k] for k in ("passed", "failed", "not_run")] == [1, 1, 1]
    assert data["suites"]["absent"]["reason"] == "no-such-program is not on the path"
    assert not data["passed"]
    shown = capsys.readouterr()
    assert "3 passed, 4 failed, 3 skipped" in shown.out
    assert "--- wrong ---" in shown.err


def test_the_suites_files_import(tmp_path, runner):
    """On a machine without a device every case of them skips, with the reason."""
    if device_problem() is None:
        pytest.skip("there is a device, and tests/gpu/run.py runs them")
    site = runner.lay_out(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "HCMEN_CUDA_LIBRARY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT / "tests")])
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(GPU)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " skipped" in done.stdout.splitlines()[-1]
    assert "passed" not in done.stdout.splitlines()[-1]
    assert "failed" not in done.stdout
