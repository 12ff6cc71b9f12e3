"""tests/gpu/run.py on a machine without a GPU, over a stand-in for the driver and suites of our own: whatever they do
and whatever stops the run, its two files tell. What the suites test is seen only on a device; here they skip.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import emulated

from hcmen.base import cuda_library
from hcmen.base.cuda_library import device_problem

ROOT = Path(__file__).resolve().parents[2]
GPU = ROOT / "tests" / "gpu"
COMPILER = shutil.which(os.environ.get("CC", "cc"))
DRIVER = """
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = what == 75 ? 9 : 0; return 0; }
"""


@pytest.fixture(scope="module")
def gpu_modules() -> Iterator[None]:
    """tests/gpu as a folder to import from, as run.py has it."""
    sys.path.insert(0, str(GPU))
    yield
    sys.path.remove(str(GPU))


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a machine with a device 9.0 and without nvcc, and a library that has every function."""
    if COMPILER is None:
        pytest.skip("there is no C compiler")
    folder = tmp_path_factory.mktemp("machine")
    functions = "".join(f"int {name}(void) {{ return 0; }}\n" for name in cuda_library._FUNCTIONS)
    version = f"hcmen_cuda_ops_version(void) {{ return {cuda_library.LIBRARY_VERSION}; }}"
    library = functions.replace("hcmen_cuda_ops_version(void) { return 0; }", version)
    for name, source in (("libcuda.so.1", DRIVER), ("library.so", library)):
        command = [COMPILER, "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / name)]
        subprocess.run(command, input=source, text=True, check=True)
    smi = folder / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Stand-in, 1.0, 1 MiB, 9.0'\n")
    smi.chmod(0o755)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HCMEN", "PYTEST"))}
    paths = {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "LD_LIBRARY_PATH": str(folder)}
    return {**kept, **paths, "CUDACXX": "/nowhere/nvcc", "LIBRARY": str(folder / "library.so")}


class Run:
    """run.py as a process, with suites of our own: `suites` is Python, in which `py(code)` is a command."""

    def __init__(self, folder: Path, machine: dict[str, str], suites: str, *options: str):
        self.out, self.folder = folder / "out", folder
        script = folder / "runner.py"
        script.write_text(
            f"import sys\nsys.path.insert(0, {str(GPU)!r})\n"
            "import run, running, suites\nfrom suites import Suite, program\n"
            "def py(code): return (sys.executable, '-c', code)\n"
            f"{textwrap.dedent(suites)}\nsuites.SUITES[:] = SUITES\nsys.exit(run.main(sys.argv[1:]))\n"
        )
        command = [sys.executable, str(script), "--folder", str(folder / "work"), "--out", str(self.out)]
        command += ["--library", machine["LIBRARY"], *options]
        self.process = subprocess.Popen(
            command, env=machine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder
        )

    def wait(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=120)
        return self.process.returncode, out, err

    def suites(self) -> dict[str, Any]:
        return dict(json.loads((self.out / "gpu.json").read_text(encoding="utf-8"))["suites"])

    def until(self, name: str, **wanted: Any) -> dict[str, Any]:
        """Waits until the suite's row in gpu.json has these entries."""
        for _ in range(600):
            if (self.out / "gpu.json").exists():
                row = dict(self.suites().get(name, {}))
                if wanted.items() <= row.items():
                    return row
            time.sleep(0.05)
        raise AssertionError((wanted, self.suites()))


def test_every_file_is_in_a_suite(gpu_modules):
    from suites import SUITES

    assert {name for suite in SUITES for name in suite.tests} == {p.name for p in GPU.glob("test_*.py")}
    assert len({s.name for s in SUITES}) == len(SUITES)
    assert [s.stage for s in SUITES] == sorted(s.stage for s in SUITES)


@pytest.mark.skipif(device_problem() is None, reason="there is a device")
def test_without_a_device_nothing_is_run(tmp_path):
    command = [sys.executable, str(GPU / "run.py"), "--folder", str(tmp_path / "a"), "--out", str(tmp_path / "b")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == "the driver shows no CUDA device: nothing was run\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--only", "kernels,nonsense"], "no suite 'nonsense': choose from functions, kernels"),
        (["--only", ""], "no suite '': choose from functions, kernels"),
        (["--seconds", "nan"], "'nan' is no number of seconds above 0"),
        (["--seconds", "inf"], "'inf' is no number of seconds above 0"),
        (["--seconds", "-1"], "'-1' is no number of seconds above 0"),
        (["--seconds", "abc"], "'abc' is no number of seconds above 0"),
        (["--library", "nowhere.so"], "--library is 'nowhere.so', which is no file"),
        (["--out", "file"], "expected a folder to write into"),
        (["--folder", "/proc/nowhere"], "--folder is '/proc/nowhere', expected a folder to write into"),
    ],
)
def test_wrong_options_are_told_in_one_line(tmp_path, machine, options, told):
    (tmp_path / "file").write_text("")
    command = [sys.executable, str(GPU / "run.py"), "--folder", str(tmp_path / "work"), *options]
    done = subprocess.run(command, env=machine, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_the_machine_lacks_is_named(tmp_path, machine):
    """The suites themselves, over a driver that has a device and nothing else."""
    command = [sys.executable, str(GPU / "run.py"), "--folder", str(tmp_path), "--library", machine["LIBRARY"]]
    command += ["--only", "functions,autograd,scan_tune", "--seconds", "90"]
    done = subprocess.run(command, env=machine, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    data = json.loads((tmp_path / "results" / "gpu.json").read_text(encoding="utf-8"))
    assert data["complete"]
    assert data["passed"]
    assert {name: r.get("reason") for name, r in data["suites"].items()} == {
        "build": f"built elsewhere, taken as it stands: {machine['LIBRARY']}",
        "probe": "nvcc is needed: put it on the path, or name it in CUDACXX",
        "functions": "the probe was not built",
        "autograd": "PyTorch has no CUDA",
        "scan_tune": "PyTorch has no CUDA",
    }
    assert data["suites"]["functions"]["status"] == "skipped"


def test_results_are_sorted_and_written(tmp_path, machine):
    (tmp_path / "test_mixed.py").write_text(
        "import pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2, 'so it is'\n"
        "@pytest.mark.skip(reason='x')\n"
        "def test_left_out(): pass\n"
        "@pytest.fixture\n"
        "def broken(): yield; raise OSError('on the way out')\n"
        "def test_ends_badly(broken): pass\n"
    )
    (tmp_path / "test_none.py").write_text(
        "import pytest\npytestmark = pytest.mark.skip(reason='x')\ndef test_a(): pass\n"
    )
    (tmp_path / "test_import.py").write_text(
        "import hcmen, hcmen.mamba.scan, hcmen.mamba.one_node, hcmen.runtime.backends.ort_cuda, helpers.device, os\n"
        "def test_from_the_checkout():\n"
        "    assert hcmen.__version__\n"
        f"    assert os.environ['HCMEN_CUDA_LIBRARY'] == {machine['LIBRARY']!r}\n"
    )
    (tmp_path / "test_unreadable.py").write_text("import no_such_module\n")
    (tmp_path / "test_crash.py").write_text(
        "import os\ndef test_fine(): pass\ndef test_fatal(): os.kill(os.getpid(), 11)\ndef test_never(): pass\n"
    )
    run = Run(
        tmp_path,
        machine,
        f"""
        running.MOST_OUTPUT = 1 << 20
        stubborn = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('began'); time.sleep(60)"
        here = {str(tmp_path)!r}
        right = "import sys; open('r.json', 'w').write(sys.argv[1])"
        refusal = "=========.*(Device not supported)"
        SUITES = [
            Suite("mixed", "", 1, (), [here + "/test_mixed.py"]),
            Suite("none", "", 1, (), [here + "/test_none.py"]),
            Suite("import", "", 1, (), [here + "/test_import.py"]),
            Suite("unreadable", "", 1, (), [here + "/test_unreadable.py"]),
            Suite("segfault", "", 1, (), [here + "/test_crash.py"]),
            Suite("absent", "", 2, (program("no-such-program"),), command=("true",)),
            Suite("right", "", 2, (), command=(*py(right), "{{seconds}}"), result="r.json"),
            Suite("silent", "", 2, (), command=py("pass"), result="s.json"),
            Suite("half", "", 2, (), command=py("open('h.json', 'w').write('[1')"), result="h.json"),
            Suite("large", "", 2, (), command=py("open('l.json', 'w').write(str([1] * 10**6))"), result="l.json"),
            Suite("wrong", "", 2, (), command=py("print('why'); raise SystemExit(9)")),
            Suite("hung", "", 2, (), command=py(stubborn), timeout_s=2),
            Suite("flood", "", 2, (), command=py("while True: print('x' * 1000)")),
            Suite("refused", "", 2, (), command=py("print('========= Error: Device not supported. Please')"),
                  refused=refusal),
            Suite("found", "", 2, (), command=py("print('========= Device not supported'); raise SystemExit(9)"),
                  refused=refusal),
            Suite("unknown", "", 2, (), command=py("import os; os.kill(os.getpid(), 40)")),
            Suite("unstartable", "", 2, (), command=("/no/such/program",)),
            Suite("late", "", 3, (), command=py("print(1)"), least_s=10**6),
        ]
        """,
    )
    code, out, err = run.wait()
    assert code == 1
    data = json.loads((run.out / "gpu.json").read_text(encoding="utf-8"))
    suites = data["suites"]
    assert data["complete"]
    assert not data["passed"]
    assert data["machine"]["devices"] == ["Stand-in, 1.0, 1 MiB, 9.0"]
    status = {name: r["status"] for name, r in suites.items()}
    assert {name for name, s in status.items() if s == "passed"} == {"build", "import", "right", "large"}
    assert {name for name, s in status.items() if s == "skipped"} == {"probe", "none", "absent", "refused", "late"}
    assert suites["build"]["reason"] == f"built elsewhere, taken as it stands: {machine['LIBRARY']}"
    assert suites["probe"]["reason"].startswith("nvcc is needed")
    assert suites["right"]["result"] == 60  # of 120, so that a case that began can end
    assert suites["large"]["result_left_out"] == "3000000 bytes, expected at most 1048576"
    assert suites["silent"]["reason"] == suites["half"]["reason"] == "it ended well and wrote no result"
    assert suites["hung"]["reason"] == "stopped after 2 s"
    assert "began" in suites["hung"]["output_tail"]
    assert suites["hung"]["seconds"] < 30
    assert suites["flood"]["reason"] == "stopped, it had printed more than 1 MiB"
    assert suites["unknown"]["reason"] == "ended by signal 40"
    assert suites["unstartable"]["reason"].startswith("it does not start: ")
    assert suites["refused"]["reason"] == "Error: Device not supported"
    assert "it takes at least 1000000" in suites["late"]["reason"]
    assert suites["absent"]["reason"] == "no-such-program is not on the path"
    assert [suites["mixed"][k] for k in ("passed", "failed", "not_run")] == [1, 2, 1]
    assert [f["case"].split("::")[-1] for f in suites["mixed"]["failures"]] == ["test_wrong", "test_ends_badly"]
    assert "so it is" in suites["mixed"]["failures"][0]["why"]
    assert "no_such_module" in suites["unreadable"]["failures"][0]["why"]
    assert suites["segfault"]["reason"] == "ended by SIGSEGV"
    assert suites["segfault"]["passed"] == 1
    assert [case.split("::")[-1] for case in suites["segfault"]["begun"]] == ["test_fatal"]
    assert "why" in (run.out / "gpu.log").read_text(encoding="utf-8")
    assert sum(p.stat().st_size for p in run.out.iterdir()) < 16 << 20
    assert "4 passed, 11 failed, 5 skipped" in out
    assert "--- wrong ---" in err


def test_every_stage_gets_its_part_of_the_time(tmp_path, machine):
    run = Run(
        tmp_path,
        machine,
        """
        hang = py("import time; print('began', flush=True); time.sleep(60)")
        SUITES = [Suite(f"s{n}", "", n, (), command=hang, share=10 * n, least_s=0) for n in (1, 2, 3)]
        SUITES.append(Suite("absent", "", 4, (program("no-such-program"),), command=hang, share=10**6))
        """,
        "--seconds",
        "9",
    )
    started = time.monotonic()
    assert run.wait()[0] == 1
    assert time.monotonic() - started < 9
    assert json.loads((run.out / "gpu.json").read_text(encoding="utf-8"))["complete"]
    seconds = [run.suites()[f"s{n}"]["seconds"] for n in (1, 2, 3)]
    assert seconds[0] < seconds[1] < seconds[2]
    assert (run.out / "gpu.log").read_text(encoding="utf-8").count("began") == 3


def test_eight_minutes_are_enough_for_every_stage(gpu_modules):
    """Also where every suite before it takes all that it may."""
    from run import RESERVE_S, parts
    from suites import SUITES

    left = 480 - RESERVE_S - 30  # the library and PyTorch's import
    for stage, part in parts(SUITES).items():
        suites = [s for s in SUITES if s.stage == stage]
        seconds = {s.name: min(s.timeout_s, left * part) for s in suites}
        assert all(0.6 * s.share <= seconds[s.name] <= s.timeout_s for s in suites), seconds
        left -= max(seconds.values())
    assert left >= -1e-6


def test_without_time_nothing_has_passed(tmp_path, machine):
    run = Run(tmp_path, machine, 'SUITES = [Suite("one", "", 1, (), command=py("print(1)"))]', "--seconds", "1")
    assert run.wait()[0] == 1
    assert run.suites()["build"]["status"] == "FAILED"
    assert run.suites()["one"]["status"] == "skipped"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_leaves_the_cases_that_ended(tmp_path, machine, number):
    hangs = (
        f"import os, pathlib, time\npathlib.Path({str(tmp_path)!r}, f'pid-{{os.getpid()}}').touch()\ntime.sleep(100)\n"
    )
    test = f"def test_fine(): pass\ndef test_hangs():\n{textwrap.indent(hangs, '    ')}"
    (tmp_path / "test_slow.py").write_text(test)
    (tmp_path / "bench.py").write_text(f"open('b.json', 'w').write('[1]')\n{hangs}")
    run = Run(
        tmp_path,
        machine,
        f"""
        here = {str(tmp_path)!r}
        SUITES = [
            Suite("first", "", 1, (), command=py("print('done')")),
            Suite("slow", "", 1, (), [here + "/test_slow.py"]),
            Suite("bench", "", 1, (), command=(sys.executable, here + "/bench.py"), result="b.json"),
            Suite("next", "", 2, (), command=py("print('done')")),
        ]
        """,
    )
    pids: list[int] = []
    try:
        row = run.until("slow", passed=1)
        assert row["status"] == "running"
        assert row["begun"][0].endswith("test_slow.py::test_hangs")
        assert run.until("bench", result=[1])["status"] == "running"
        assert run.until("first", status="passed")
        for _ in range(600):
            pids = [int(p.name.removeprefix("pid-")) for p in tmp_path.glob("pid-*")]
            if len(pids) == 2:
                break
            time.sleep(0.05)
        run.process.send_signal(number)
        code, _, _ = run.wait()
        suites = run.suites()
        assert (suites["first"]["status"], suites["slow"]["passed"], suites["bench"]["result"]) == ("passed", 1, [1])
        if number == signal.SIGKILL:
            assert code == -signal.SIGKILL
            assert suites["slow"]["status"] == suites["bench"]["status"] == "running"
            return
        assert code == 128 + number
        assert len(pids) == 2
        assert not any(Path("/proc", str(pid)).exists() for pid in pids)
        assert suites["slow"]["status"] == suites["bench"]["status"] == "FAILED"
        assert suites["slow"]["reason"] == suites["next"]["reason"] == f"stopped by {number.name}"
        assert not json.loads((run.out / "gpu.json").read_text(encoding="utf-8"))["complete"]
    finally:
        run.process.kill()
        run.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def test_it_goes_on_where_nobody_reads(tmp_path, machine):
    run = Run(tmp_path, machine, 'SUITES = [Suite("one", "", 1, (), command=py("print(1)"))]')
    assert run.process.stdout is not None
    run.process.stdout.close()
    assert run.process.wait(60) == 0
    assert run.suites()["one"]["status"] == "passed"
    assert run.process.stderr is not None
    assert run.process.stderr.read() == ""
    run.process.stderr.close()


def test_preparing_leaves_earlier_results(tmp_path, machine):
    run = Run(tmp_path, machine, "SUITES = []", "--prepare")
    code, out, err = run.wait()
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith(f"HCMEN_CUDA_LIBRARY={machine['LIBRARY']}")
    assert not list(run.out.iterdir())


def test_a_library_that_does_not_load_is_a_failure(tmp_path, machine):
    (tmp_path / "text.so").write_text("x")
    suites = 'SUITES = [Suite("one", "", 1, (suites.library,), command=py("print(1)"))]'
    code, _, err = Run(tmp_path, {**machine, "LIBRARY": str(tmp_path / "text.so")}, suites).wait()
    assert code == 1
    assert "text.so cannot be loaded" in err
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text(encoding="utf-8"))["suites"]
    assert rows["build"]["status"] == "FAILED"
    assert rows["one"]["reason"] == "there is no libhcmen_ops_cuda.so"


def test_what_the_sanitizers_watch_tells_every_case(gpu_modules, tmp_path, monkeypatch):
    """Over the kernels on the host."""
    import sanitize

    if emulated.compiler() is None:
        pytest.skip("there is no C++ compiler")
    monkeypatch.setattr(sanitize, "DeviceKernels", lambda: emulated.Kernels(emulated.kernels_library()))
    sanitize.main(str(tmp_path / "memcheck.json"))
    found = json.loads((tmp_path / "memcheck.json").read_text(encoding="utf-8"))
    assert found["done"] == len(sanitize.SCANS) + len(sanitize.DUALS) + 2 * len(sanitize.CONVS)
    assert found["last"] == "2x30x130 w7 float16 silu stateful"


def test_cases_of_several_workers_are_counted(tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_w.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('i', range(6))\n"
        "def test_fine(i): pass\n"
        "def test_fatal(): os._exit(3)\n"
    )
    environment = {**os.environ, "HCMEN_GPU_CASES": str(tmp_path / "cases"), "PYTHONPATH": str(ROOT / "tests")}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "helpers.gpu_cases", "-n", "2"]
    subprocess.run([*command, str(tmp_path)], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)
    found = json.loads((tmp_path / "cases").read_text(encoding="utf-8"))
    assert (found["passed"], found["failed"], found["not_run"]) == (6, 1, 0)
    assert found["failures"][0]["case"].endswith("test_w.py::test_fatal")


def test_both_files_are_bounded(gpu_modules, tmp_path):
    import running

    state = running.State(tmp_path, tmp_path, {})
    for i in range(20):
        state.results[f"s{i}"] = {"status": "passed", "seconds": 1, "result": ["x" * (running.MOST_RESULT - 10)]}
        with (tmp_path / f"s{i}.log").open("wb") as log:
            log.write(b"head")
            log.truncate(1 << 32)  # a hole: it takes no disk, and reading it would take minutes
    started = time.monotonic()
    state.write(complete=True)
    assert time.monotonic() - started < 5
    assert (tmp_path / "gpu.json").stat().st_size <= running.MOST_JSON
    assert (tmp_path / "gpu.log").stat().st_size <= running.MOST_LOG
    assert running.MOST_JSON + running.MOST_LOG + max(running.MOST_JSON, running.MOST_LOG) < 16 << 20
    suites = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["suites"]
    kept = [name for name, r in suites.items() if "result" in r]
    assert len(kept) == 4
    assert all("result_left_out" in r for name, r in suites.items() if name not in kept)
    assert "result" in state.results["s0"]


def test_libraries_of_packages_go_behind_what_is_there(gpu_modules, tmp_path, monkeypatch):
    import run

    for folder in ("nvidia/cu13/lib", "nvidia/cudnn/lib", "nvidia/cu13/bin"):
        (tmp_path / folder).mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    environment = {"LD_LIBRARY_PATH": "/mine", "PATH": "/bin"}
    run.find_more(environment)
    assert environment["LD_LIBRARY_PATH"] == f"/mine:{tmp_path}/nvidia/cu13/lib:{tmp_path}/nvidia/cudnn/lib"
    assert environment["PATH"] == f"/bin:{run.TOOL_FOLDERS[0]}:{run.TOOL_FOLDERS[1]}:{tmp_path}/nvidia/cu13/bin"


def test_the_suites_files_import(gpu_modules, tmp_path):
    """On a machine without a device every case of them skips, with the reason."""
    import run

    if device_problem() is None:
        pytest.skip("there is a device, and tests/gpu/run.py runs them")
    site = run.lay_out(tmp_path)
    environment = {k: v for k, v in os.environ.items() if k != "HCMEN_CUDA_LIBRARY"}
    environment["PYTHONPATH"] = os.pathsep.join([str(site), str(ROOT / "tests")])
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(GPU)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:]
    assert " skipped" in done.stdout.splitlines()[-1]
    assert "passed" not in done.stdout.splitlines()[-1]
    assert "failed" not in done.stdout
