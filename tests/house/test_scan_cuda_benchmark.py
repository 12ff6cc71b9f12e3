"""benchmarks/scan_cuda.py without a device: the kernels emulated on the host, tensors of the CPU, CUDA's graphs and
events in a few lines. What is looked at is which rows are written when something fails, never a time.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import emulated

from hcmen.base.errors import BackendError

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = ["--batch", "1,2", "--channel", "8", "--time", "20", "--dtype", "float32"]


class Event:
    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self) -> None: ...

    def elapsed_time(self, other: Event) -> float:
        return 1.0


class Graph:
    def replay(self) -> None: ...


@pytest.fixture(scope="module")
def modules() -> Iterator[tuple[ModuleType, ModuleType]]:
    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    sys.path.insert(0, str(BENCHMARKS))
    import scan_cuda
    import scan_cuda_timing

    yield scan_cuda, scan_cuda_timing
    sys.path.remove(str(BENCHMARKS))


class Benchmark:
    """main() over the stand-ins. lost: every wait for the device fails."""

    def __init__(self, modules: tuple[ModuleType, ModuleType], folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.benchmark, self.timing = modules
        self.out, self.lost = folder / "scan.json", False
        self.patch = monkeypatch.setattr
        properties = SimpleNamespace(name="host", L2_cache_size=1 << 10, total_memory=1 << 16, multi_processor_count=1)
        for name, stand_in in {
            "is_available": lambda: True,
            "get_device_properties": lambda device: properties,
            "synchronize": self.wait,
            "empty_cache": lambda: None,
            "current_stream": lambda: SimpleNamespace(cuda_stream=None),
            "_sleep": lambda cycles: None,
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": lambda graph: contextlib.nullcontext(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        library = emulated.kernels_library()
        monkeypatch.setattr(self.timing, "load_cuda_library", lambda: library)
        monkeypatch.setattr(self.timing, "DEVICE", "cpu")
        monkeypatch.setattr(self.timing, "MOST_CALLS", 2)
        monkeypatch.setattr(self.timing, "host_us", lambda run, sets: 1.0)
        monkeypatch.setattr(self.timing, "mamba_ssm", lambda case: None)
        monkeypatch.setattr(self.timing, "mamba_ssm_backward", lambda case, dy: None)

    def wait(self) -> None:
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore of it")

    def fails(self, name: str, error: Exception, when: Callable[..., bool] = lambda *a, **k: True) -> None:
        """The function `name` of the timing module raises, where `when` says so of its arguments."""
        kept = getattr(self.timing, name)

        def failing(*arguments: Any, **more: Any) -> Any:
            if when(*arguments, **more):
                raise error
            return kept(*arguments, **more)

        self.patch(self.timing, name, failing)

    def __call__(self, *options: str) -> tuple[int, list[dict[str, Any]]]:
        code = self.benchmark.main([*SMALL, "--out", str(self.out), *options])
        assert [p.name for p in self.out.parent.iterdir()] == ["scan.json"]
        return code, next(self.data()[name] for name in ("cases", "tuned") if name in self.data())

    def data(self) -> dict[str, Any]:
        return dict(json.loads(self.out.read_text(encoding="utf-8")))


@pytest.fixture
def benchmark(modules, tmp_path, monkeypatch) -> Benchmark:
    return Benchmark(modules, tmp_path, monkeypatch)


MEMORY = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nmore of it")
TOLD = {"out_of_memory": "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB."}


def test_every_case_has_a_row(benchmark):
    code, rows = benchmark()
    assert code == 0
    assert [(r["batch"], r["channel"], r["time"], r["state"], r["dtype"]) for r in rows] == [
        (1, 8, 20, 16, "float32"),
        (2, 8, 20, 16, "float32"),
    ]
    for row in rows:
        assert row["agrees"]
        assert 0 < row["disagreement"]["ours"] < 1e-6
        assert set(row["times"]) == {"ours", "nothing", "copy"}
        assert all("median_us" in t for t in row["times"].values())
        assert row["over_nothing"] == 1.0


def test_gradients_and_ways_have_rows(benchmark):
    code, rows = benchmark("--backward")
    assert (code, [r["direction"] for r in rows]) == (0, ["backward", "backward"])
    code, rows = benchmark("--tune")
    assert code == 0
    assert {"the rule", "lanes=2 chunk=-1 time_warps=4"} <= {r["way"] for r in rows[0]["ranked"]}
    code, rows = benchmark("--tune", "--backward")
    assert (code, {r["way"] for r in rows[0]["ranked"]}) == (0, {"the rule", "chunk=-1", "chunk=8", "chunk=16"})


def test_a_wrong_output_is_a_failure(benchmark, capsys):
    benchmark.patch(benchmark.timing, "AGREEMENT", {"float32": 0.0})
    code, rows = benchmark()
    assert (code, [r["agrees"] for r in rows]) == (1, [False, False])
    assert "OFF {'ours'" in capsys.readouterr().out


def test_a_case_without_memory_costs_itself_alone(benchmark):
    benchmark.fails("Case", MEMORY, lambda batch, *more: batch == 1)
    code, rows = benchmark()
    assert code == 1
    assert TOLD.items() <= rows[0].items()
    assert rows[1]["agrees"]


@pytest.mark.parametrize("error", [MEMORY, BackendError("hcmen_cuda: CUDA failed (invalid argument)")])
@pytest.mark.parametrize(("function", "options"), [("ours", []), ("ours_backward", ["--backward"])])
def test_ours_without_a_workspace_is_noted(benchmark, function, options, error):
    benchmark.fails(function, error, lambda case, *more, **wish: case.sizes["batch"] == 1)
    code, rows = benchmark(*options)
    assert code == 1
    assert benchmark.timing.why(error).items() <= rows[0].items()
    assert "median_us" in rows[1]["times"]["ours"]


@pytest.mark.parametrize("name", ["copy", "mamba_ssm", "disagreement"])
def test_what_stands_beside_ours_may_fail(benchmark, name):
    # The first copy is that of the device's bandwidth.
    benchmark.fails(name, MEMORY, lambda *arguments: name != "copy" or arguments[0] != (1 << 16) // 8)
    code, rows = benchmark()
    assert code == 0
    for row in rows:
        assert "median_us" in row["times"]["ours"]
        assert (row["disagreement"] if name == "disagreement" else row["times"][name]) == TOLD
        assert ("agrees" in row) == (name != "disagreement")


def test_a_kernel_of_mamba_ssm_of_another_version_is_noted(benchmark):
    def incompatible(i: int) -> None:
        raise TypeError("fwd(): incompatible function arguments")

    benchmark.patch(benchmark.timing, "mamba_ssm", lambda case: incompatible)
    benchmark.patch(benchmark.timing, "mamba_ssm_backward", lambda case, dy: incompatible)
    told = {"failed": "TypeError: fwd(): incompatible function arguments"}
    for options in ([], ["--backward"]):
        code, rows = benchmark(*options)
        assert (code, rows[0]["times"]["mamba_ssm"]) == (0, told)
        assert "median_us" in rows[0]["times"]["ours"]


def test_an_empty_kernel_that_fails_is_noted(benchmark):
    def fails(i: int) -> None:
        raise RuntimeError("no")

    benchmark.patch(benchmark.timing, "nothing", lambda: fails)
    code, rows = benchmark()
    assert (code, rows[0]["times"]["nothing"]) == (0, {"failed": "RuntimeError: no"})
    assert "over_nothing" not in rows[0]


def test_a_time_of_the_host_that_fails_is_noted(benchmark):
    benchmark.fails("host_us", RuntimeError("no"))
    code, rows = benchmark()
    assert (code, rows[0]["host_us"]) == (0, {"ours": {"failed": "RuntimeError: no"}})
    assert "median_us" in rows[0]["times"]["ours"]


@pytest.mark.parametrize(("name", "options"), [("randn_like", []), ("randn", ["--tune"])])
def test_no_memory_for_the_gradient_of_the_output_is_noted(benchmark, name, options):
    kept = getattr(torch, name)

    def full(*arguments: Any, **more: Any) -> torch.Tensor:
        shape = arguments[0].shape if isinstance(arguments[0], torch.Tensor) else arguments[0]
        if shape == (1, 20, 8):  # y of the first case; a case's own tensors have their sizes one by one
            raise MEMORY
        return kept(*arguments, **more)

    benchmark.patch(torch, name, full)
    code, rows = benchmark("--backward", *options)
    assert code == 1
    assert TOLD.items() <= rows[0].items()
    assert "ranked" in rows[1] or "median_us" in rows[1]["times"]["ours"]


def test_a_refused_way_is_noted(benchmark, capsys):
    code, rows = benchmark("--ways", "lanes=3;chunk=8")
    assert code == 0
    for row in rows:
        found = {r["way"]: r for r in row["ranked"]}
        assert set(found) == {"the rule", "lanes=3", "chunk=8"}
        assert "refused batch" in found["lanes=3"]["refused"]
        assert "median_us" in found["chunk=8"]
    assert "lanes=3 InputError" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--tune"], ["--tune", "--backward"], ["--ways", "chunk=8;chunk=4"]])
def test_a_way_without_memory_costs_itself_alone(benchmark, options):
    name = "ours_backward" if "--backward" in options else "ours"
    benchmark.fails(name, MEMORY, lambda *arguments, **wish: wish.get("steps_per_chunk") == 8)
    code, rows = benchmark(*options)
    assert code == 0
    for row in rows:
        assert [r["way"] for r in row["ranked"] if "out_of_memory" in r] == [
            r["way"] for r in row["ranked"] if "median_us" not in r
        ]
    if options != ["--tune"]:  # which tries no chunk of 8
        assert any("out_of_memory" in r for r in rows[0]["ranked"])


def test_a_way_that_fails_is_a_failure(benchmark):
    error = BackendError("hcmen_cuda: CUDA failed (invalid argument)")
    benchmark.fails("ours", error, lambda case, **wish: bool(wish))
    assert benchmark("--ways", "chunk=8")[0] == 1


def test_the_rule_that_fails_is_noted(benchmark):
    benchmark.fails("ours", MEMORY, lambda case, **wish: not wish and case.sizes["batch"] == 1)
    code, rows = benchmark("--tune")
    assert code == 1
    assert TOLD.items() <= rows[0].items()
    assert "ranked" in rows[1]


def test_a_lost_device_ends_it(benchmark, capsys):
    def fatal(case: Any) -> Any:
        benchmark.lost = True
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    benchmark.patch(benchmark.timing, "mamba_ssm", fatal)
    code, rows = benchmark()
    assert code == 1
    assert len(rows) == 1
    words = "CUDA error: an illegal memory access was encountered"
    assert rows[0]["failed"] == f"mamba_ssm: RuntimeError: {words}; then the device answers no more: {words}"
    assert benchmark.data()["not_measured"] == [["float32", 2, 8, 20]]
    assert benchmark.data()["lost"] == rows[0]["failed"]
    assert "1 cases were not measured" in capsys.readouterr().out


def test_no_case_begins_after_the_time(benchmark):
    kept = benchmark.timing.run_case

    def slow(*arguments: Any) -> Any:
        now = benchmark.benchmark.clock.monotonic()
        benchmark.patch(benchmark.benchmark.clock, "monotonic", lambda: now + 1000)
        return kept(*arguments)

    benchmark.patch(benchmark.timing, "run_case", slow)
    code, rows = benchmark("--seconds", "500")
    assert (code, len(rows)) == (0, 1)
    assert benchmark.data()["not_measured"] == [["float32", 2, 8, 20]]


def test_the_result_is_whole_at_every_moment(benchmark, monkeypatch):
    """Also where the writing is stopped half way."""
    written = []

    def half(path: Path, text: str, **more: Any) -> int:
        with path.open("w") as file:
            if len(written) == 1 and text:  # the first case's
                file.write(text[: len(text) // 2])
                raise KeyboardInterrupt
            written.extend([text] if text else [])
            return file.write(text)

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        benchmark()
    assert benchmark.data()["cases"] == []


def test_a_result_that_cannot_be_written_is_a_failure(benchmark, monkeypatch, capsys):
    kept = Path.write_text

    def full(path: Path, text: str, **more: Any) -> int:
        if "cases" in text:
            raise OSError(28, "No space left on device")
        return kept(path, text, **more)

    monkeypatch.setattr(Path, "write_text", full)
    assert benchmark.benchmark.main([*SMALL, "--out", str(benchmark.out)]) == 1
    shown = capsys.readouterr()
    assert "scan.json cannot be written: No space left on device" in shown.err
    assert shown.out.count(" us, ") == 2


def test_a_device_without_memory_for_a_copy_is_told(benchmark, capsys):
    benchmark.fails("copy", MEMORY)
    assert benchmark.benchmark.main(SMALL) == 3
    assert capsys.readouterr().err == f"nothing was measured: {TOLD['out_of_memory'].partition(': ')[2]}\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--batch", "abc"], "'abc' is no list of whole numbers from 1"),
        (["--batch", "0"], "'0' is no list of whole numbers from 1"),
        (["--batch", "-5"], "'-5' is no list of whole numbers from 1"),
        (["--time", ""], "'' is no list of whole numbers from 1"),
        (["--channel", "1,,2"], "'1,,2' is no list of whole numbers from 1"),
        (["--channel", "99999999999"], "to 2147483647"),
        (["--dtype", "float64"], "'float64' is no list of float32 and float16"),
        (["--ways", "foo=1"], "'foo=1' is not NAME=NUMBER with a name among lanes, time_warps"),
        (["--ways", "lanes=x"], "'lanes=x' is not NAME=NUMBER"),
        (["--ways", "lanes"], "'lanes' is not NAME=NUMBER"),
        (["--ways", "lanes=4294967297"], "'lanes=4294967297' is not NAME=NUMBER"),
        (["--ways", "lanes=1;"], "a way is empty"),
        (["--ways", "lanes=1", "--backward"], "--ways is for the forward scan"),
        (["--seconds", "nan"], "'nan' is no number of seconds above 0"),
        (["--seconds", "-1"], "'-1' is no number of seconds above 0"),
        (["--out", "nowhere/scan.json"], "--out is 'nowhere/scan.json', expected a file to write: No such"),
        (["--out", "."], "--out is '.', expected a file to write: it is a folder"),
        (["--out", "/proc/scan.json"], "--out is '/proc/scan.json', expected a file to write"),
    ],
)
def test_wrong_options_are_told_in_one_line(modules, tmp_path, monkeypatch, capsys, options, told):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        modules[0].main(options)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1


def test_options_need_no_torch():
    """-S: a Python without any package."""
    command = [sys.executable, "-S", str(BENCHMARKS / "scan_cuda.py")]
    assert subprocess.run([*command, "--help"], stdout=subprocess.DEVNULL).returncode == 0
    assert subprocess.run([*command, "--batch", "x"], stderr=subprocess.DEVNULL).returncode == 2
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "No module named 'torch': nothing was measured\n")
