"""What holds for the backend of TensorRT-RTX alone, over the fakes: first openings, compiled code, and which GPUs.

What holds for both is in test_tensorrt.py. The real bindings and libraries are tried where they are installed.
"""

from __future__ import annotations

import fcntl
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import bindings as real
from helpers.command import Outcome, open_folder, run, without_privileges
from helpers.fake_cuda import FakeCuda
from helpers.fake_tensorrt import compiled, machine
from helpers.micro import micro_bundle_at, micro_clip
from helpers.processes import loaded_after
from helpers.small_bundle import make_bundle

import hcmen.base.console
import hcmen.runtime.backends.cuda
import hcmen.runtime.backends.kept_code
import hcmen.runtime.backends.tensorrt_rtx
import hcmen.runtime.commands.doctor_tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.engines import read_engines
from hcmen.base.errors import BackendError, CheckFailed
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRT, TensorRTRTX
from hcmen.runtime.backends.flavour import TENSORRT_RTX, TrtModule
from hcmen.runtime.benchmark.command import main as bench_main
from hcmen.runtime.benchmark.machine import versions
from hcmen.runtime.commands.doctor_rows import Row
from hcmen.runtime.commands.doctor_tensorrt import tensorrt_rows
from hcmen.runtime.commands.run import main as run_main

RTX = "tensorrt-rtx"
Provoke = Callable[[Any], Any]


@pytest.fixture
def trt(monkeypatch, tmp_path) -> Any:
    return machine(monkeypatch, tmp_path, flavour=RTX)


@pytest.fixture
def cuda(trt) -> FakeCuda:
    return trt.cuda


@pytest.fixture
def ready(micro_bundle, trt) -> Path:
    """A bundle with an fp32 engine of "full", never opened."""
    assert compiled(micro_bundle, "--variant", "full", "--max-batch", 4, "--backend", RTX).code == 0
    return micro_bundle


@pytest.fixture
def clip(ready, tmp_path) -> Path:
    return micro_clip(tmp_path)


def scored(bundle: Path, *arguments: object) -> Outcome:
    return run(run_main, *arguments, "--bundle", bundle, "--backend", RTX)


def results(bundle: Path) -> list[Path]:
    """The kept results of the golden set."""
    return sorted((bundle / "engines").glob("*.parity.json"))


def ran(cuda: FakeCuda, bundle: Path) -> bool:
    """Whether opening "full" runs anything."""
    cuda.calls.clear()
    with load(bundle, backend=RTX) as model:
        assert model.kernels("full") == "functions"
    return "cudaMemcpyAsync" in cuda.calls


# --- the golden set on the first opening ------------------------------------------------------------------------------


def test_the_first_opening_runs_the_golden_set_and_the_index_stays(ready, cuda):
    index = (ready / "engines" / "manifest.json").read_bytes()
    (record,) = read_engines(read_bundle(ready))
    assert record.parity == {"measured": False}
    assert [ran(cuda, ready) for _ in range(2)] == [True, False]
    (file,) = results(ready)
    assert file.name.startswith(f"{Path(record.engine.file).name}.")
    told = json.loads(file.read_text())
    assert told["key"] == {
        "engine_sha256": record.engine.sha256,
        "golden_sha256": read_bundle(ready).variant("full").golden.sha256,
        "gpu": "Ada",
        "sm": 89,
        "driver": "580.65, CUDA 12.8",
        "tensorrt": "1.7.1.116",
    }
    assert (told["passed"], told["atol"], told["rtol"]) == (True, 1e-4, 1e-4)
    assert told["outputs"]["score"]["failed"] == 0
    assert (ready / "engines" / "manifest.json").read_bytes() == index
    read_bundle(ready).verify()
    assert cuda.alive == {}


def test_it_runs_twice_before_anything_is_served(ready, cuda, trt):
    """As hcmen-compile does for TensorRT: sizes that come again may run in another way."""
    waits: list[int] = []
    real_run = cuda.cudaStreamSynchronize

    def counted(stream: int) -> int:
        waits.append(stream)
        trt.bias_of = {"score": 1.0} if len(waits) > 10 else {}
        return real_run(stream)

    cuda.cudaStreamSynchronize = counted  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="the golden set of 'full' fails"):
        load(ready, backend=RTX).kernels("full")
    assert len(waits) > 14  # seven cases, twice


def altered(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    def alter(file: Path) -> None:
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return alter


def linked(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


@pytest.mark.parametrize(
    "change",
    [
        altered(lambda d: d.update(passed=False)),
        altered(lambda d: d.update(passed=1)),
        altered(lambda d: d["key"].update(gpu="Blackwell")),
        altered(lambda d: d.pop("key")),
        lambda f: f.write_text("[]"),
        lambda f: f.write_text("["),
        lambda f: f.write_bytes(b"\xff"),
        lambda f: f.write_text("[" * 100_000),
        linked,
        Path.unlink,
    ],
)
def test_anything_but_a_kept_pass_is_measured_again(ready, cuda, change):
    assert ran(cuda, ready)
    (file,) = results(ready)
    before = file.read_bytes()
    change(file)
    assert [ran(cuda, ready) for _ in range(2)] == [True, False]
    assert file.read_bytes() == before
    assert not file.is_symlink()


@pytest.mark.parametrize("what", ["gpu", "driver", "sm", "engine"])
def test_another_device_measures_for_itself(ready, cuda, monkeypatch, tmp_path, what):
    assert ran(cuda, ready)
    if what == "engine":
        again = ("--variant", "full", "--max-batch", 4, "--backend", RTX, "--precision", "fp16")
        assert compiled(ready, *again).code == 0
    elif what == "sm":
        cuda = machine(monkeypatch, tmp_path, cuda=FakeCuda(sm=120), flavour=RTX).cuda
    else:
        named = ("580.65", "Blackwell") if what == "gpu" else ("590.1", "Ada")
        monkeypatch.setattr(hcmen.runtime.backends.cuda, "driver_and_gpu", lambda: named)
    assert [ran(cuda, ready) for _ in range(2)] == [True, False]
    assert len(results(ready)) == 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("arguments", [("CLIP",), ("--self-test",), ("CLIP", "--self-test")])
def test_an_engine_beyond_the_bound_serves_nothing(ready, clip, trt, cuda, precision, arguments):
    assert compiled(ready, "--variant", "full", "--precision", precision, "--backend", RTX, "--force").code == 0
    trt.bias_of = {"modality_weights": 0.5}
    words = [clip if word == "CLIP" else word for word in arguments]
    done = scored(ready, *words, "--variant", "full", "--precision", precision, "--format", "json")
    assert (done.code, done.out) == (1, "")
    (line,) = done.lines
    assert re.match(
        r"error: \S+full\.\S+\.engine: the golden set of 'full' fails on this Ada: modality_weights FAI", line
    )
    advice = {"fp16": "with --precision fp32", "fp32": "or use another backend"}[precision]
    assert re.search(rf"max 5\.00e-01, .*: compile it again on any machine,? {advice}$", line), line
    assert results(ready) == []
    assert cuda.alive == {}
    trt.bias_of, trt.noise = {}, float("nan")
    done = scored(ready, *words, "--variant", "full")
    assert done.code == 1
    assert "NaN" in done.lines[-1]
    trt.noise = 0.0
    assert scored(ready, *words, "--variant", "full").code == 0


def test_a_bundle_that_cannot_be_written_is_measured_each_time(trt, cuda, monkeypatch):
    with open_folder() as folder:
        bundle = micro_bundle_at(folder / "bundle")
        assert compiled(bundle, "--variant", "full", "--variant", "text_only", "--backend", RTX).code == 0
        for path in (bundle, bundle / "engines"):
            path.chmod(0o555)
        with without_privileges():
            for _ in range(2):
                done = scored(bundle, "--self-test", "--variant", "full")
                assert done.code == 0, done.err
                (line,) = done.lines
                assert line.startswith(
                    f"warning: {bundle / 'engines'}: permission denied: the golden set runs whenever"
                )
        for path in (bundle, bundle / "engines"):
            path.chmod(0o755)
        assert results(bundle) == []


def test_a_lock_that_somebody_holds_keeps_nobody_from_running(ready, cuda):
    with (ready / "engines" / ".lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert [ran(cuda, ready) for _ in range(2)] == [True, False]


def test_compiling_again_drops_the_results_of_the_engine_before(ready, cuda):
    assert compiled(ready, "--variant", "text_only", "--backend", RTX).code == 0
    with load(ready, backend=RTX) as model:
        model.kernels("full")
        model.kernels("text_only")
    assert len(results(ready)) == 2
    assert compiled(ready, "--variant", "full", "--max-batch", 4, "--backend", RTX).code == 0  # is there already
    assert len(results(ready)) == 2
    assert compiled(ready, "--variant", "full", "--backend", RTX, "--force").code == 0
    (other,) = results(ready)
    assert other.name.startswith("text_only.")
    assert ran(cuda, ready)


def test_a_run_beyond_the_time_limit_leaves_the_session_to_it(ready, cuda, monkeypatch):
    real_run, told = cuda.cudaStreamSynchronize, threading.Event()

    def slow(stream: int) -> int:
        told.wait(60)
        return real_run(stream)

    monkeypatch.setattr(hcmen.base.console, "end_at_once", lambda: None)
    cuda.cudaStreamSynchronize = slow  # type: ignore[method-assign]
    # A busy machine takes more than a second to load it.
    with pytest.raises(BackendError, match=r"running it took more than 5 s"):
        load(ready, backend=RTX, time_limit=5).kernels("full")
    told.set()
    assert results(ready) == []
    until = time.monotonic() + 30
    while cuda.alive and time.monotonic() < until:
        time.sleep(0.05)
        gc.collect()  # the error's traceback has the session
    assert cuda.alive == {}  # nothing was freed under the run, and all when it ended


def test_a_signal_ends_a_command_while_an_engine_is_loaded_and_compiled(ready, clip, monkeypatch):
    """Then TensorRT calls Python back to log, and drops what is raised there. Later runs answer as ever."""
    heard: list[Any] = []
    real = FakeCuda.cudaStreamSynchronize

    def heeded(self: FakeCuda, stream: int) -> int:
        heard.append(signal.getsignal(signal.SIGINT))
        return real(self, stream)

    monkeypatch.setattr(FakeCuda, "cudaStreamSynchronize", heeded)
    assert scored(ready, clip, "--variant", "full").code == 0
    assert heard[0] is signal.SIG_DFL
    assert callable(heard[-1])
    assert heard[-1] is not signal.SIG_DFL


# --- what is compiled on the GPU --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "strategies"),
    [
        (TensorRTRTX(), ("WHOLE_GRAPH_CAPTURE", "LAZY")),
        (TensorRTRTX(cuda_graph=False, specialization="eager"), ("DISABLED", "EAGER")),
        (TensorRTRTX(specialization="none"), ("WHOLE_GRAPH_CAPTURE", "NONE")),
    ],
)
def test_options_reach_the_runtime_configuration(ready, trt, options, strategies):
    with load(ready, backend=options) as model:
        assert all(t.passed for t in model.self_test(["full"]))
    assert {(graph, specialization) for _, graph, specialization in trt.jit} == {strategies}


def test_code_is_compiled_once_for_all_processes(ready, clip, trt, cuda):
    assert scored(ready, "--self-test", "--variant", "full").code == 0
    first = len(trt.jit)
    assert first > 0
    for expected in (first + 1, first + 1):  # the clip's own size is kept when the command ends
        assert scored(ready, clip, "--variant", "full").code == 0
        assert len(trt.jit) == expected
    assert ran(cuda, ready) is False


@pytest.mark.parametrize("what", ["gpu", "driver", "engine"])
def test_what_was_compiled_for_another_is_not_taken(ready, trt, cuda, monkeypatch, what):
    assert ran(cuda, ready)
    if what == "engine":
        assert compiled(ready, "--variant", "full", "--backend", RTX, "--force", "--max-batch", 8).code == 0
    else:
        named = ("580.65", "Blackwell") if what == "gpu" else ("590.1", "Ada")
        monkeypatch.setattr(hcmen.runtime.backends.cuda, "driver_and_gpu", lambda: named)
    trt.jit.clear()
    assert ran(cuda, ready)
    assert len(trt.jit) > 0


def test_code_of_another_environment_is_begun_anew(ready, clip, trt, tmp_path):
    assert scored(ready, clip, "--variant", "full").code == 0
    (kept,) = (tmp_path / "cache" / "hcmen" / "tensorrt-rtx").iterdir()
    good = kept.read_bytes()
    one = hcmen.runtime.backends.kept_code.KeptCode({})
    one.name = kept.name
    one.write(b"rtx 1.6 sm89\n")
    done = scored(ready, clip, "--variant", "full")
    assert done.code == 0
    assert done.lines == [f"warning: {kept}: of another environment, or damaged: compiled code is kept anew"]
    assert len(kept.read_bytes()) < len(good)  # the golden set did not run again
    os.truncate(kept, 10)
    done = scored(ready, clip, "--variant", "full")
    assert (done.code, done.lines) == (0, [f"warning: {kept}: damaged: compiled code is kept anew"])
    assert scored(ready, clip, "--variant", "full").err == ""


def test_without_a_place_or_a_cache_it_runs_all_the_same(ready, clip, trt, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    done = scored(ready, clip, "--variant", "full")
    assert done.code == 0
    assert len(done.lines) == 1
    assert done.lines[0].startswith("warning: this user has no home folder, so that compiled code is not kept")
    trt.cache_error = True
    done = scored(ready, clip, "--variant", "full")
    assert (done.code, done.err) == (0, "")


# --- which device, which engine ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sm", [75, 87, 90, 100, 103, 110])
def test_a_gpu_without_kernels_is_told_before_anything_is_opened(ready, clip, monkeypatch, tmp_path, sm):
    cuda = machine(monkeypatch, tmp_path, cuda=FakeCuda(sm=sm), flavour=RTX).cuda
    done = scored(ready, clip)
    assert done.code == 3
    assert done.lines == [
        f"error: TensorRT-RTX 1.7.1.116 has no kernels for this GPU, of sm {sm}, expected one of sm 80, 86, 89, 120, "
        "121: use --backend tensorrt, or ort-cuda"
    ]
    assert not {"cudaStreamCreateWithFlags", "cudaMalloc"} & set(cuda.calls)


def unfit(**changes: Any) -> Provoke:
    def provoke(m: Any) -> None:
        vars(m.trt).update(changes)

    return provoke


UNFIT: list[tuple[str, int, Provoke, str]] = [
    ("another version", 3, lambda m: m.gpu("1.6.1.120"), r"made by TensorRT-RTX 1\.7\.1\.116, this machine has 1\.6"),
    ("an older version", 3, lambda m: m.gpu("1.3.0"), r"TensorRT-RTX is 1\.3\.0, expected 1\.4 or later"),
    ("no module", 3, lambda m: m.none(), r"tensorrt_rtx_bindings is not installed, .*: pip install 'hcmen\[rtx\]'"),
    ("another library", 3, lambda m: m.library("1.6.1.120"), r"1\.7\.1\.116 and its library is 1\.6\.1\.120, expected"),
    ("a nameless library", 3, lambda m: m.library(None), r"unknown, .*: pip install tensorrt-rtx-cu13-libs==1\.7"),
    ("no driver", 3, lambda m: m.gpu(error=35), "the driver is missing or older"),
    ("no CUDA", 3, lambda m: m.no_cuda(), "libcudart was not found"),
    ("no memory to run", 3, unfit(context_error="out of it"), r"no execution context \(out of it\)"),
    ("no run", 3, unfit(execute_error="an illegal address"), r"TensorRT-RTX refused to run \(an illegal address\): "),
    ("an old driver", 3, unfit(invalid=4), r"cannot run the engine here \(the NVIDIA driver is too old for it\): "),
    ("little memory", 3, unfit(invalid=16), "too little memory for it.: close what else uses the GPU, or compile"),
    ("another format", 3, unfit(invalid=1 | 32), r"by another version and .*: compile it again on any machine$"),
    (
        "no CUDA in it",
        3,
        unfit(invalid=64 | 4),
        "the NVIDIA driver or CUDA does not work and the NVIDIA .*see .*hcmen-d",
    ),
    ("no reason", 3, unfit(invalid=1 << 20), r"TensorRT-RTX 1\.7\.1\.116 cannot run the engine here \(no reason"),
    (
        "engines of TensorRT alone",
        3,
        lambda m: m.tensorrts(),
        "no engine for variant 'full': run .*--backend tensorrt-",
    ),
]


class Machine:
    """What something is provoked with."""

    def __init__(self, bundle: Path, trt: Any, patch: pytest.MonkeyPatch, folder: Path):
        self.bundle, self.trt, self.patch, self.folder = bundle, trt, patch, folder

    def gpu(self, version: str = "1.7.1.116", **changes: int) -> None:
        machine(self.patch, self.folder, version, FakeCuda(**{"sm": 89, **changes}), RTX)

    def none(self) -> None:
        self.patch.setitem(sys.modules, "tensorrt_rtx_bindings", None)

    def library(self, version: str | None) -> None:
        self.patch.setattr(hcmen.runtime.backends.tensorrt_rtx, "library_version", lambda: version)

    def no_cuda(self) -> None:
        self.patch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([]))

    def tensorrts(self) -> None:
        for path in (self.bundle / "engines").iterdir():
            path.unlink()
        machine(self.patch, self.folder, cuda=self.trt.cuda)
        assert compiled(self.bundle, "--variant", "full").code == 0


@pytest.mark.parametrize(("what", "code", "provoke", "text"), UNFIT, ids=[each[0] for each in UNFIT])
def test_what_cannot_be_run_is_told_in_one_line(ready, clip, trt, monkeypatch, tmp_path, what, code, provoke, text):
    provoke(Machine(ready, trt, monkeypatch, tmp_path))
    done = scored(ready, clip)
    assert done.code == code, done.err
    (line,) = done.lines
    assert re.search(text, line), line


def test_engines_of_both_lie_beside_one_bundle(ready, clip, trt, cuda, monkeypatch, tmp_path):
    assert ran(cuda, ready)
    kept = results(ready)
    tensorrt = machine(monkeypatch, tmp_path, cuda=cuda)
    assert compiled(ready, "--variant", "full", "--max-batch", 4).code == 0
    assert compiled(ready, "--variant", "full", "--max-batch", 4, "--force").code == 0
    assert len(read_engines(read_bundle(ready))) == 2
    assert results(ready) == kept
    scores = {b: load(ready, backend=b)(str(clip)).score for b in ("tensorrt", RTX, "ort")}
    assert scores["tensorrt"] == pytest.approx(scores["ort"], rel=1e-5)
    assert scores[RTX] == pytest.approx(scores["ort"], rel=1e-5)
    assert tensorrt.recorded
    assert compiled(ready, "--variant", "full", "--max-batch", 4, "--backend", RTX, "--force").code == 0
    assert {r.flavour for r in read_engines(read_bundle(ready))} == {"tensorrt", RTX}
    assert load(ready, backend=TensorRT()).kernels("full") == "native"


def test_a_forked_child_is_told(ready, trt):
    model = load(ready, backend=RTX)
    model.kernels("full")
    model.after_fork()
    with pytest.raises(BackendError, match="the backend 'tensorrt-rtx' was opened before this process was forked"):
        model.kernels("full")


def test_the_benchmark_measures_it_and_names_its_version(ready, clip, tmp_path):
    few = ("--variant", "full", "--rounds", 1, "--calls", 1, "--warmup", 0, "--loads", 1, "--clip", clip)
    out = tmp_path / "report.json"
    done = run(bench_main, ready, "--backend", RTX, "--precision", "fp32", *few, "--out", out)
    assert done.code == 0, done.err
    data = json.loads(out.read_text())
    assert [(r["engine"], r["precision"], r["status"]) for r in data["rows"]] == [(RTX, "fp32", "ok")]
    assert versions(["tensorrt-rtx-cu13-bindings"]).items() <= data["machine"]["versions"].items()
    done = run(bench_main, ready, "--backend", "ort", "--precision", "fp32", *few)
    assert done.code == 2
    assert "--backend tensorrt or tensorrt-rtx" in done.lines[-1]


# --- the doctor -------------------------------------------------------------------------------------------------------


def examined(bundle: Path, monkeypatch) -> dict[str, Row]:
    monkeypatch.setattr(hcmen.runtime.commands.doctor_tensorrt, "find_driver", lambda: "580.65, Ada")
    return {r.name: r for r in tensorrt_rows(str(bundle))}


def test_the_doctor_runs_what_is_there(ready, trt, cuda, monkeypatch):
    found = examined(ready, monkeypatch)
    assert list(found)[-2:] == [RTX, f"{RTX} engines"]
    detail = "1.7.1.116, builds for GPUs of sm 80, 86, 89, 120, 121; sm 89 is here"
    assert (found[RTX].status, found[RTX].detail) == ("ok", detail)
    engines = found[f"{RTX} engines"]
    assert (engines.status, engines.detail) == ("ok", "1, each as listed; golden set passed for full fp32")
    assert cuda.alive == {}
    trt.bias_of = {"score": 1.0}
    for path in (*results(ready), *results(ready)):
        path.unlink(missing_ok=True)
    engines = examined(ready, monkeypatch)[f"{RTX} engines"]
    assert engines.status == "FAILED"
    assert "the golden set of 'full' fails on this Ada: score" in engines.detail


def test_the_doctor_where_rtx_serves_no_gpu_or_is_not_there(ready, trt, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, cuda=FakeCuda(sm=90), flavour=RTX)
    found = examined(ready, monkeypatch)
    assert found[RTX].status == "info"
    assert found[RTX].detail.endswith("use --backend tensorrt, or ort-cuda")
    not_run = "1, each as listed; not run, needs a GPU and TensorRT-RTX"
    assert found[f"{RTX} engines"].detail == not_run
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([]))
    found = examined(ready, monkeypatch)
    assert (found[RTX].status, found[f"{RTX} engines"].detail) == ("ok", not_run)
    monkeypatch.setattr(hcmen.runtime.backends.tensorrt_rtx, "library_version", lambda: "1.6.1.120")
    found = examined(ready, monkeypatch)
    assert found[RTX].status == "FAILED"
    assert found[RTX].fix == "pip install tensorrt-rtx-cu13-libs==1.7.1.116"
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    found = examined(ready, monkeypatch)
    assert found[RTX].status == "info"
    assert found[RTX].detail.startswith("not installed")
    assert found[f"{RTX} engines"].status == "ok"


# --- the wheels themselves --------------------------------------------------------------------------------------------


def with_path(folder: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A process that finds modules in `folder` first."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)


LOAD = """
import sys
from hcmen.base.errors import HcmenError
from hcmen.runtime import load
try:
    load(sys.argv[1], backend="tensorrt-rtx")
except HcmenError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture
def wheels() -> None:
    """Skips where the wheels are not installed."""
    try:
        real.rtx_dump("1.7.1.116")
    except real.Unavailable as error:
        pytest.skip(str(error))


def test_bindings_of_another_version_than_their_library_never_run(wheels, shared_bundle):
    """They would end the process: 1.4's, over the library of 1.7, crash at the first engine."""
    try:
        folder = real.unpacked("tensorrt_rtx_cu13_bindings==1.4.0.76")
    except real.Unavailable as error:
        pytest.skip(str(error))
    done = with_path(folder, LOAD, shared_bundle)
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(
        r"tensorrt_rtx_bindings is 1\.4\.0\.76 and its library is [\d.]+, expected the same version of both: "
        r"pip install tensorrt-rtx-cu13-libs==1\.4\.0\.76\n",
        done.stdout,
    ), done.stdout


def test_bindings_without_their_library(wheels, shared_bundle, tmp_path):
    (tmp_path / "tensorrt_rtx_libs.py").write_text("raise ImportError\n")
    done = with_path(tmp_path, LOAD, shared_bundle)
    assert done.returncode == 3, done.stderr
    assert done.stdout.startswith(
        "tensorrt_rtx_bindings does not load (libtensorrt_rtx.so.1: cannot open shared object"
    )
    assert done.stdout.endswith("): install it again: pip install 'hcmen[rtx]'\n")
    assert len(done.stdout.splitlines()) == 1


def test_the_installed_library_tells_its_version(wheels):
    module = TENSORRT_RTX.load_module()
    assert hcmen.runtime.backends.tensorrt_rtx.library_version() == module.__version__


def test_what_the_real_bindings_say_of_a_file_that_is_no_engine(wheels):
    tensorrt = TrtModule(TENSORRT_RTX)
    for plan in (b"", b"x" * 1000, memoryview(np.zeros(1000, np.uint8))):
        with pytest.raises(BackendError, match=r"^here: TensorRT-RTX [\d.]+ cannot run the engine here \(it is no eng"):
            tensorrt.deserialize(plan, "here")


def test_what_the_real_bindings_say_of_an_engine_without_a_driver(wheels, shared_bundle, tmp_path):
    """They name no reason of their own: it is in the log."""
    if hcmen.runtime.backends.cuda.find_driver() is not None:
        pytest.skip("there is a driver")
    bundle = make_bundle(tmp_path / "bundle", ("text_only",))
    assert compiled(bundle, "--backend", RTX).code == 0
    (record,) = read_engines(read_bundle(bundle))
    with pytest.raises(
        BackendError, match=r"cannot run the engine here \(Error reading CUDA GPU properties: .* driver .*"
    ):
        TrtModule(TENSORRT_RTX).deserialize((bundle / record.engine.file).read_bytes(), "here")


def test_running_needs_neither_onnx_nor_torch(wheels, shared_bundle):
    loaded = loaded_after(
        f"""
        import sys
        {LOAD.strip().replace(chr(10), chr(10) + "        ").replace("sys.exit(error.exit_code)", "pass")}
        """,
        str(shared_bundle),
    )
    assert "tensorrt_rtx_bindings" in loaded
    assert loaded.isdisjoint({"onnx", "torch", "onnxruntime", "tensorrt"})
