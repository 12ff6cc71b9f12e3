"""hcmen-compile and the TensorRT backend from end to end, over a TensorRT and a CUDA that keep the documented contract.

What is `both` holds for TensorRT-RTX too; test_tensorrt_rtx.py has what holds for it alone.

The fakes (tests/helpers/fake_tensorrt.py, fake_cuda.py) run the very graph that the parser was given, so that parity is
computed and can fail. What they cannot say is whether TensorRT builds these graphs: that takes TensorRT (tests/gpu).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from helpers import fake_tensorrt
from helpers.command import run
from helpers.fake_cuda import FakeCuda
from helpers.fake_tensorrt import MODULES, OPS, VERSIONS, compile_main, compiled, machine
from helpers.processes import loaded_after

import hcmen.runtime.backends.cuda
import hcmen.runtime.backends.flavour
import hcmen.runtime.commands.doctor_tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.clip import write_clip
from hcmen.base.engines import read_engines
from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.base.inputs import Inputs
from hcmen.base.trust import made_key, signature
from hcmen.base.typed import as_typed
from hcmen.export.engine_options import Options, profile_shapes
from hcmen.export.tensorrt import Compiler
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRT
from hcmen.runtime.backends.flavour import parsed_version
from hcmen.runtime.backends.options import BACKENDS
from hcmen.runtime.backends.tensorrt import TrtBackend
from hcmen.runtime.commands.doctor_rows import Row
from hcmen.runtime.commands.doctor_tensorrt import tensorrt_rows
from hcmen.runtime.commands.run import main as run_main

both = pytest.mark.parametrize("flavour", list(MODULES), indirect=True)


@pytest.fixture
def flavour(request) -> str:
    """Which TensorRT the machine of a test has."""
    return str(getattr(request, "param", "tensorrt"))


@pytest.fixture
def trt(monkeypatch, tmp_path, flavour) -> Any:
    return machine(monkeypatch, tmp_path, flavour=flavour)


@pytest.fixture
def cuda(trt) -> FakeCuda:
    return trt.cuda


def clip_file(folder: Path, inputs: Inputs, seed: int = 0, text: int = 5) -> Path:
    rng = np.random.default_rng(seed)
    steps = {"text": text, "audio": 5, "vision": 5}
    arrays = {m: rng.normal(size=(n, inputs.modality(m).features)).astype(np.float32) for m, n in steps.items()}
    write_clip(folder / f"clip{seed}.npz", arrays)
    return folder / f"clip{seed}.npz"


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "precision", "plugin"),
    [("10.3.0", "fp32", "library"), ("10.13.3.9", "fp16", "library"), ("11.4.0.106", "fp32", "function")],
)
def test_compile_then_run(micro_bundle, monkeypatch, tmp_path, version, precision, plugin):
    trt = machine(monkeypatch, tmp_path, version)
    arguments = ("--variant", "full", "--variant", "audio_only", "--precision", precision, "--plugin", plugin)
    done = compiled(micro_bundle, *arguments, "--format", "json")
    assert done.code == 0, done.err
    bundle = read_bundle(micro_bundle)
    records = read_engines(bundle)
    assert [r.engine.file for r in records] == [
        f"engines/{v}.{precision}.sm87.trt{version}.engine" for v in ("audio_only", "full")
    ]
    atol, rtol = {"fp32": (1e-4, 1e-4), "fp16": (2e-2, 1e-2)}[precision]
    for r in records:
        assert (r.parity["passed"], r.parity["atol"], r.parity["rtol"]) == (True, atol, rtol)
        # The scores of this random model are several units, and its bound has a relative part.
        assert r.parity["outputs"]["score"]["max_abs"] > 0
        assert r.parity["outputs"]["score"]["required_atol"] <= atol
        assert r.plugin == plugin
        side = json.loads((micro_bundle / f"{r.engine.file}.json").read_text())
        assert side["sha256"] == r.engine.sha256
        assert side["build"]["profiles"][1]["audio"][2][0] == 32
    assert json.loads(done.out)["engines"][0]["fresh"] is True
    assert trt.cuda.alive == {}
    for graph, plan in trt.built:
        assert "TF32" not in plan["flags"]
        assert any(n.domain == "hcmen" for n in graph.graph.node) == (plugin == "library")
        assert not graph.functions
        loops = {a.g.name for n in graph.graph.node for a in n.attribute if a.name == "body"}
        assert loops == ({"selective_scan_block"} if plugin == "function" else set())
        halves = {t.name for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
        assert bool(halves) == (precision == "fp16")

    model = load(micro_bundle, backend="tensorrt")
    clip = clip_file(tmp_path, bundle.manifest.inputs)
    got, expected = model(str(clip)), load(micro_bundle)(str(clip))
    assert (got.backend, got.kernels) == ("tensorrt", "native" if plugin == "library" else "functions")
    assert abs(got.score - expected.score) <= atol + rtol * abs(expected.score)
    assert (got.score != expected.score) or precision == "fp32"
    assert [t.passed for t in model.self_test(["full", "audio_only"])] == [True, True]


def test_an_engine_beyond_the_bound_is_not_written(micro_bundle, trt, cuda):
    trt.bias_of = {"modality_weights": 1.2e-4}  # beyond 1e-4 + 1e-4 w for weights below 1
    line = refused(micro_bundle, 1)
    assert line.startswith("error: parity failed for the fp32 engine of 'full', nothing was written: modality_weights")
    assert read_engines(read_bundle(micro_bundle)) == ()
    assert cuda.alive == {}
    trt.bias_of, trt.noise = {}, float("nan")
    assert "NaN" in refused(micro_bundle, 1, "--precision", "fp16")
    trt.bias_of, trt.noise = {"modality_weights": 0.8e-4}, 0.0
    assert compiled(micro_bundle, "--variant", "full").code == 0


def test_aot_plugins_are_prepared_and_registered_before_the_graph_is_parsed(micro_bundle, monkeypatch, tmp_path):
    """With a stand-in for hcmen/mamba/trt_aot.py, which is tested on its own: what is asked of it, and when."""
    trt = machine(monkeypatch, tmp_path, "10.13.3.9")
    asked: list[Any] = []

    def register(sm: int) -> None:
        asked.append(("register", sm))
        trt.creators |= {(op, "1", "hcmen"): object() for op in OPS}

    stand_in = SimpleNamespace(prepare=lambda model: asked.append(("prepare", len(model.functions))), register=register)
    monkeypatch.setitem(sys.modules, "hcmen.mamba.trt_aot", stand_in)
    (tmp_path / "libhcmen_trt.so").unlink()
    done = compiled(micro_bundle, "--variant", "full", "--plugin", "aot", "--precision", "fp16")
    assert done.code == 0, done.err
    assert asked == [("prepare", 0), ("register", 87)]
    (record,) = read_engines(read_bundle(micro_bundle))
    assert record.plugin == "aot"
    model = load(micro_bundle, backend="tensorrt")  # without the plugin library
    assert model.kernels("full") == "native"
    assert all(t.passed for t in model.self_test(["full"]))


def test_what_is_there_is_kept_unless_it_was_built_in_another_way(micro_bundle, trt):
    """By what TensorRT-RTX has not: what both have is tested with the real builder, in tests/tensorrt_rtx."""

    def builds(*arguments: object) -> int:
        before, done = len(trt.built), compiled(micro_bundle, "--variant", "text_only", *arguments)
        assert done.code == 0, done.err
        assert ("is there already" in done.err) == (len(trt.built) == before)
        return len(trt.built) - before

    for changed in ((), ("--version-compatible",), ("--plugin", "function")):
        assert [builds(*changed) for _ in range(2)] == [1, 0]
    (record,) = read_engines(read_bundle(micro_bundle))
    (micro_bundle / record.engine.file).write_bytes(b"damaged")
    assert builds("--plugin", "function") == 1


def test_options_reach_the_builder(micro_bundle, monkeypatch, tmp_path):
    trt = machine(monkeypatch, tmp_path, "10.16.1.11", FakeCuda(sm=90))
    done = compiled(
        micro_bundle,
        *("--variant", "vision_only", "--workspace", 64, "--max-batch", 5, "--opt-batch", 3),
        *("--version-compatible", "--hardware-compatible"),
    )
    assert done.code == 0, done.err
    ((_, plan),) = trt.built
    assert (plan["limits"], plan["level"]) == ({"WORKSPACE": 64 << 20}, "AMPERE_PLUS")
    assert plan["embedded"] == [str((tmp_path / "libhcmen_trt.so").resolve())]
    assert [p["vision"] for p in plan["profiles"]] == [
        ((1, 1, 4), (1, 8, 4), (1, 16, 4)),
        ((1, 1, 4), (3, 8, 4), (5, 16, 4)),
    ]
    assert plan["profiles"][1]["vision_length"] == ((1,), (3,), (5,))
    (record,) = read_engines(read_bundle(micro_bundle))
    assert record.plugin_embedded
    # Another GPU and a later TensorRT take it, without the plugin library; an older TensorRT does not.
    machine(monkeypatch, tmp_path, "11.4.0.106", FakeCuda(sm=120)).libraries.clear()
    assert all(t.passed for t in load(micro_bundle, backend="tensorrt").self_test(["vision_only"]))
    for version, sm, problem in (
        ("10.3.0", 90, r"made by TensorRT 10\.16\.1\.11, this machine has 10\.3\.0"),
        ("10.16.1.11", 75, "made for a GPU of sm 90, this one has sm 75"),
    ):
        machine(monkeypatch, tmp_path, version, FakeCuda(sm=sm))
        with pytest.raises(BackendError, match=problem):
            load(micro_bundle, backend="tensorrt").kernels("vision_only")


def test_profiles_of_single_clips_only(micro_bundle):
    bundle = read_bundle(micro_bundle)
    (profile,) = profile_shapes(bundle, bundle.variant("text_only"), 1, 1)
    assert profile == {"text": ((1, 1, 6), (1, 5, 6), (1, 10, 6)), "text_length": ((1,), (1,), (1,))}


def test_timing_cache(micro_bundle, trt, tmp_path):
    cache = tmp_path / "timings"
    arguments = ("--variant", "full", "--force", "--timing-cache")
    assert compiled(micro_bundle, *arguments, cache).code == 0
    assert cache.read_bytes() == b"timings 10.3.0 sm87 full"
    before = cache.stat().st_mtime_ns
    assert compiled(micro_bundle, *arguments, cache).code == 0
    assert cache.stat().st_mtime_ns == before  # nothing new was learnt
    for content in (b"timings 8.6 sm72", b"broken"):
        cache.write_bytes(content)
        done = compiled(micro_bundle, *arguments, cache)
        assert done.code == 0
        assert any(line.startswith(f"warning: {cache}: not a timing cache of this GPU") for line in done.lines)
        assert cache.read_bytes() == b"timings 10.3.0 sm87 full"
    assert compiled(micro_bundle, *arguments, tmp_path / "no" / "cache").code == 2


def test_a_bundle_without_our_ops_needs_no_plugin(bundle, trt):
    trt.libraries.clear()
    done = compiled(bundle, "--variant", "full")
    assert done.code == 0, done.err
    assert read_engines(read_bundle(bundle))[0].plugin == "none"
    assert load(bundle, backend="tensorrt").kernels("full") == "standard"


def test_the_compiler_from_python(micro_bundle, trt):
    built = Compiler(read_bundle(micro_bundle), Options(precision="fp16")).compile("text_missing")
    assert built.fresh
    assert built.test is not None
    assert built.test.passed
    (micro_bundle / "text_missing.onnx").write_bytes(b"x")
    again = Compiler(read_bundle(micro_bundle), Options(precision="fp16", force=True))
    with pytest.raises(CorruptFileError):
        again.compile("text_missing")


# --- what goes wrong while compiling ----------------------------------------------------------------------------------


class Machine(SimpleNamespace):
    """What something is provoked with: bundle, trt, patch (pytest's monkeypatch), folder (with the plugin library)."""

    @property
    def plugins(self) -> Path:
        return self.folder / "libhcmen_trt.so"

    @property
    def engines(self) -> Path:
        return self.bundle / "engines"

    @property
    def engine(self) -> Path:
        return next(self.engines.glob("full.*.engine"))

    def gpu(self, version: str | None = None, **changes: int) -> None:
        changes = {"sm": self.trt.cuda.sm, **changes}
        machine(self.patch, self.folder, version, FakeCuda(**changes), self.trt.flavour)

    def without(self, module: str) -> None:
        self.patch.setitem(sys.modules, module, None)

    def elsewhere(self) -> None:
        self.patch.setattr(hcmen.runtime.backends.flavour.platform, "machine", lambda: "riscv64")

    def no_runtime(self) -> None:
        self.patch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([]))

    def library(self, *ops: str) -> None:
        fake_tensorrt.plugin_file(self.folder, self.trt, ops)

    def unloaded(self) -> None:
        self.patch.setattr(hcmen.runtime.backends.flavour.TrtModule, "load_plugins", lambda self, path: None)

    def knob(self, **values: Any) -> None:
        vars(self.trt).update(values)


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


Provoke = Callable[[Machine], Any]
# What is wrong (options, where it begins with --), exit code, how it is provoked, what the line says.
REFUSALS: list[tuple[str, int, Provoke, str]] = [
    ("no TensorRT", 3, lambda m: m.without("tensorrt"), r"not installed.*pip install 'hcmen\[tensorrt\]'.*python3-lib"),
    ("no onnx", 3, lambda m: m.without("onnx"), "pip install 'onnx"),
    ("an old TensorRT", 3, lambda m: m.gpu("8.6.1"), r"TensorRT is 8\.6\.1, expected 10\.3 or later"),
    ("no GPU", 3, lambda m: m.gpu(devices=0), "no CUDA device is there"),
    ("no GPU, CUDA says", 3, lambda m: m.gpu(error=100), "no CUDA device is there"),
    ("an old driver", 3, lambda m: m.gpu(error=35), "the driver is missing or older"),
    ("trouble of CUDA's", 3, lambda m: m.gpu(error=999), r"libcudart\.so\.12: error 999"),
    ("no CUDA runtime", 3, lambda m: m.no_runtime(), "libcudart was not found"),
    ("no plugins", 3, lambda m: m.plugins.unlink(), r"libhcmen_trt\.so was not found in.*--plugin function"),
    # The loader's own words.
    ("no library", 3, lambda m: m.trt.libraries.clear(), r"no plugin hcmen::SelectiveScan version 1 in it \(.*too sh"),
    ("another library", 3, lambda m: m.library(OPS[0]), r"::CausalConv1d version 1 in it \(it has no such creator\)"),
    ("no creators", 3, lambda m: m.unloaded(), r"full\.onnx: TensorRT 10\.3\.0 cannot take.* node '.*Plugin not fo"),
    ("a large build", 3, lambda m: m.knob(build_error="OutOfMemory"), "1024 of 1024 MiB of the GPU.*--workspace"),
    ("no memory for buffers", 3, lambda m: m.gpu(room=1000), "cudaMalloc: the GPU has no memory left"),
    ("no memory to run", 3, lambda m: m.knob(context_error="out of it"), r"no execution context \(out of it\)"),
    ("a failed run", 3, lambda m: m.knob(execute_error="Error 1"), r"TensorRT refused to run \(Error 1\)"),
    ("--max-batch 4 --opt-batch 5", 2, lambda m: None, "expected 1 to max_batch"),
    ("--plugin aot", 3, lambda m: None, "has no AOT plugins"),
    ("--plugin aot --version-compatible", 2, lambda m: None, "untried"),
    ("--precision f16", 2, lambda m: None, "did you mean 'fp16'"),
    ("--variant ful", 2, lambda m: None, "did you mean 'full'"),
    ("--hardware-compatible", 3, lambda m: m.gpu(sm=75), "start at 80"),
    ("damaged weights", 5, lambda m: flip(m.bundle / "weights.bin", 100), r"weights\.bin"),
    ("a file in the way", 5, lambda m: m.engines.touch(), "remove .*engines and run .*hcmen-compile --bundle .*micro$"),
    ("a link in the way", 5, lambda m: m.engines.symlink_to(m.folder), "a link"),
]


def refused(bundle: Path, code: int, *arguments: object) -> str:
    """The one error line of a compile that ends with `code` and leaves no engine."""
    done = compiled(bundle, "--variant", "full", *arguments)
    assert done.code == code, done.err
    errors = [line for line in done.lines if line.startswith("error:")]
    assert len(errors) == 1
    assert done.lines[-1] == errors[0]
    assert done.out == ""
    assert not list(bundle.glob("engines/*.engine*"))
    return errors[0]


@pytest.mark.parametrize(("what", "code", "provoke", "text"), REFUSALS, ids=[each[0] for each in REFUSALS])
def test_what_cannot_be_compiled_is_refused(micro_bundle, trt, monkeypatch, tmp_path, what, code, provoke, text):
    provoke(Machine(bundle=micro_bundle, trt=trt, patch=monkeypatch, folder=tmp_path))
    line = refused(micro_bundle, code, *(what.split() if what.startswith("--") else ()))
    assert re.search(text, line), line
    assert trt.cuda.alive == {}


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(micro_bundle, trt, flavour) -> Path:
    """A bundle with an fp32 engine of "full"."""
    assert compiled(micro_bundle, "--variant", "full", "--max-batch", 4, "--backend", flavour).code == 0
    return micro_bundle


@pytest.fixture
def clip(ready, tmp_path) -> Path:
    return clip_file(tmp_path, read_bundle(ready).manifest.inputs)


def scored(bundle: Path, clip: Path, *arguments: object, backend: str = "tensorrt"):
    return run(run_main, clip, "--bundle", bundle, "--backend", backend, *arguments)


@both
def test_hcmen_run(ready, clip, flavour, cuda):
    done = scored(ready, clip, "--self-test", "--variant", "full", "--format", "json", backend=flavour)
    assert (done.code, done.err) == (0, "")
    data = json.loads(done.out)
    assert data["backend"] == {"name": flavour, "version": VERSIONS[flavour], "threads": 1}
    assert cuda.alive == {}  # the command closes what it opened
    assert data["self_test"]["full"]["passed"]
    assert data["results"][0]["score"] == pytest.approx(load(ready)(str(clip)).score, rel=1e-6)


def feeds_of(inputs: Inputs, batch: int, steps: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray] = {}
    for m in ("text", "audio", "vision"):
        made[m] = rng.normal(size=(batch, steps, inputs.modality(m).features)).astype(np.float32)
        made[f"{m}_length"] = rng.integers(1, steps + 1, batch)
    return made


@both
def test_batches_graphs_and_large_batches(ready, cuda, flavour):
    """Sizes in any order, again and again, in more kinds than graphs are kept, and batches beyond the engine's."""
    model, reference = load(ready, backend=flavour), load(ready)
    sizes = [(1, 3), (2, 5), (4, 10), (7, 4), (1, 3), (3, 1), (1, 3), (9, 2), (2, 5), (2, 5), (1, 10)]
    sizes += [(1, t) for t in range(1, 11)] * 3
    for i, (batch, steps) in enumerate(sizes):
        feeds = feeds_of(model.inputs, batch, steps, i)
        got, expected = model.run("full", feeds), reference.run("full", feeds)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-5, rtol=1e-5, err_msg=f"{batch} x {steps}")
    if flavour == "tensorrt":
        assert cuda.calls.count("cudaGraphLaunch") > 10
        assert cuda.alive["executable"] <= 8
    else:  # which captures graphs itself
        assert "cudaStreamBeginCapture" not in cuda.calls
    assert "graph" not in cuda.alive
    model._session("full").close()
    assert cuda.alive == {}


def test_where_nothing_can_be_captured(ready, trt, cuda):
    trt.allow_capture = False
    cuda.calls.clear()
    model = load(ready, backend="tensorrt")
    with pytest.warns(RuntimeWarning, match="runs without CUDA graphs") as caught:
        assert all(t.passed for _ in range(3) for t in model.self_test(["full"]))
    assert len(caught) == 1
    assert "cudaGraphLaunch" not in cuda.calls
    assert cuda.alive
    del model
    assert cuda.alive == {}  # with the model


@both
def test_threads_take_turns(ready, tmp_path, flavour):
    model = load(ready, backend=flavour)
    clips = [str(clip_file(tmp_path, model.inputs, seed, seed % 4 + 1)) for seed in range(8)]
    expected = [load(ready)(c).score for c in clips]
    got: dict[int, list[float]] = {}

    def work(i: int) -> None:
        got[i] = [model(c).score for c in clips]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_allclose(got[i], expected, rtol=1e-5, atol=1e-5)


@both
def test_a_session_that_was_closed_refuses_to_run_and_one_that_runs_is_left_to_it(ready, cuda, flavour, monkeypatch):
    model = load(ready, backend=flavour)
    session, feeds = model._session("full"), feeds_of(model.inputs, 1, 2)
    waiting, closed = threading.Event(), threading.Event()
    real_wait, got = cuda.cudaStreamSynchronize, []

    def slow(stream: int) -> int:
        waiting.set()
        assert closed.wait(30)
        return real_wait(stream)

    cuda.cudaStreamSynchronize = slow
    runner = threading.Thread(target=lambda: got.append(session.run(feeds)))
    runner.start()
    assert waiting.wait(30)
    model.close()
    assert cuda.alive
    closed.set()
    runner.join()
    assert np.isfinite(got[0]["score"]).all()
    session.close()
    assert cuda.alive == {}
    with pytest.raises(InputError, match=r"full\..*\.engine: this model was closed: load it again"):
        session.run(feeds)


@both
def test_inputs_that_the_engine_cannot_take(ready, flavour):
    model = load(ready, backend=flavour)
    feeds = feeds_of(model.inputs, 1, 1)
    long = feeds | {"text": np.zeros((1, 11, 6), np.float32)}
    for given, message in (
        (long, r"got text \[1, 11, 6\].*expected text \[1, 1, 6\] to \[4, 10, 6\]"),
        ({"text": feeds["text"]}, "got inputs text, expected"),
        (feeds | {"text": feeds["text"].astype(np.float64)}, "input 'text' is float64, expected float32"),
        (feeds | {"text_length": np.ones(2, np.int64)}, r"batches of \[1, 2\]"),
    ):
        with pytest.raises(InputError, match=message):
            model.run("full", given)


@both
def test_precision_is_chosen(ready, clip, flavour):
    done = scored(ready, clip, "--precision", "fp16", backend=flavour)
    assert done.code == 3
    assert f"no fp16 engine for variant 'full': run {as_typed('hcmen-compile')} --bundle" in done.lines[-1]
    assert compiled(ready, "--variant", "full", "--precision", "fp16", "--backend", flavour).code == 0
    made = cast("type[TensorRT]", BACKENDS[flavour])
    sessions = {p: TrtBackend(made(p)).open(read_bundle(ready), "full").precision for p in ("fp32", "fp16", None)}
    assert sessions == {"fp32": "fp32", "fp16": "fp16", None: "fp16"}
    assert scored(ready, clip, "--precision", "int8", backend=flavour).code == 2
    assert scored(ready, clip, "--threads", 2, backend=flavour).code == 2
    assert run(run_main, clip, "--bundle", ready, "--precision", "fp16").code == 2


def index(change: Callable[[Any, Any], Any]) -> Provoke:
    """Has `change` done to the index and its first engine."""

    def provoke(m: Machine) -> None:
        path = m.engines / "manifest.json"
        data = json.loads(path.read_text())
        change(data, data["engines"][0])
        path.write_text(json.dumps(data))

    return provoke


def listed(m: Machine, content: bytes) -> None:
    """An engine of that content, as the index says it should be, signed by this user."""

    def signed(_: Any, entry: Any) -> None:
        entry.update(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        del entry["signature"]
        entry["signature"] = signature(made_key(), entry)

    m.engine.write_bytes(content)
    index(signed)(m)


def of_another_graph(m: Machine) -> None:
    assert compiled(m.bundle, "--variant", "audio_only", "--backend", m.trt.flavour).code == 0
    content = next(m.engines.glob("audio_only.*.engine")).read_bytes()
    index(lambda d, _: d["engines"].pop(0))(m)
    listed(m, content)


def linked(m: Machine) -> None:
    path = m.engine
    path.unlink()
    path.symlink_to("gone")


INDEX = r"engines/manifest\.json"
# For every TensorRT.
UNFIT: list[tuple[str, int, Provoke, str]] = [
    (
        "no engine",
        3,
        index(lambda d, e: d.update(engines=[])),
        "no engine for variant 'full': run .*compile .* on",
    ),
    ("another export", 3, index(lambda d, e: e.update(graph_sha256="0" * 64)), "made from another export than the on"),
    (
        "an altered engine",
        5,
        lambda m: flip(m.engine, -1),
        r"sha256.*: compile it again with .* --force --bundle \S*micro(| --backend tensorrt-rtx)$",
    ),
    (
        "a vanished engine",
        5,
        lambda m: m.engine.unlink(),
        "missing from the bundle: compile it again with .*-compile",
    ),
    ("an engine linked to nothing", 5, linked, "a link to what is not there, expected a file: compile it again"),
    ("another graph", 5, of_another_graph, r"tensor 'text' is not there, expected input float32 \[-1, -1, 6\]"),
    ("no memory", 3, lambda m: m.gpu(room=1000), r"the GPU has no memory left \("),
    ("the future", 2, index(lambda d, e: d.update(schema_version=2)), INDEX),
    ("an unknown key", 5, index(lambda d, e: d.update(more=1)), INDEX),
    ("an engine twice", 5, index(lambda d, e: d["engines"].append(e)), INDEX),
    ("a path out", 5, index(lambda d, e: e.update(file="../full.engine")), INDEX),
    ("another name", 5, index(lambda d, e: e.update(file="engines/other.engine")), INDEX),
    ("an unknown precision", 5, index(lambda d, e: e.update(precision="int8")), INDEX),
    ("no sha256", 5, index(lambda d, e: e.update(sha256="xyz")), INDEX),
    ("a missing key", 5, index(lambda d, e: e.pop("plugin")), INDEX),
    ("a cut index", 5, lambda m: os.truncate(m.engines / "manifest.json", 50), f"{INDEX}: not valid JSON"),
]
UNFIT_TENSORRT: list[tuple[str, int, Provoke, str]] = [
    ("another GPU", 3, lambda m: m.gpu(sm=110), "made for a GPU of sm 87, this one has sm 110: run .*hcmen-compile"),
    ("another TensorRT", 3, lambda m: m.gpu("10.7.0"), r"made by TensorRT 10\.3\.0, this machine has 10\.7\.0: run"),
    ("another machine", 3, lambda m: m.elsewhere(), "this machine is riscv64"),
    ("no engine in it", 3, lambda m: listed(m, b"fake plan"), r"10\.3\.0 refused the engine \(Magic tag does not "),
    ("no plugins", 3, lambda m: (m.gpu(), m.plugins.unlink()), r"libhcmen_trt\.so was not found in"),
    ("no TensorRT", 3, lambda m: m.without("tensorrt"), "tensorrt is not installed"),
    ("another type", 5, index(lambda d, e: e.update(sm="87")), INDEX),
]


@both
@pytest.mark.parametrize(("what", "code", "provoke", "text"), UNFIT, ids=[each[0] for each in UNFIT])
def test_what_no_tensorrt_can_run_is_told_in_one_line(
    ready, clip, trt, monkeypatch, tmp_path, what, code, provoke, text, flavour
):
    provoke(Machine(bundle=ready, trt=trt, patch=monkeypatch, folder=tmp_path))
    done = scored(ready, clip, backend=flavour)
    assert done.code == code, done.err
    (line,) = done.lines
    assert re.search(text, line), line


@pytest.mark.parametrize(("what", "code", "provoke", "text"), UNFIT_TENSORRT, ids=[u[0] for u in UNFIT_TENSORRT])
def test_what_cannot_be_run_is_told_in_one_line(ready, clip, trt, monkeypatch, tmp_path, what, code, provoke, text):
    provoke(Machine(bundle=ready, trt=trt, patch=monkeypatch, folder=tmp_path))
    done = scored(ready, clip)
    assert done.code == code, done.err
    (line,) = done.lines
    assert re.search(text, line), line


# --- the doctor -------------------------------------------------------------------------------------------------------


def examined(bundle: Path, monkeypatch) -> dict[str, Row]:
    monkeypatch.setattr(hcmen.runtime.commands.doctor_tensorrt, "find_driver", lambda: "560.35, Orin")
    return {r.name: r for r in tensorrt_rows(str(bundle))}


def test_the_doctor_finds_everything_in_order(ready, monkeypatch):
    found = examined(ready, monkeypatch)
    assert [r.status for r in found.values()][:5] == ["info", "ok", "ok", "ok", "ok"]
    assert found["nvidia driver"].detail == "560.35, Orin"
    assert found["gpu"].detail.startswith("sm 87, driver for CUDA 12.8, runtime 12.6 (libcudart.so.12), 102")
    assert found["tensorrt"].detail == "10.3.0"
    assert found["engines"].detail == "1, each as listed; golden set passed for full fp32"


@pytest.mark.parametrize(
    ("provoke", "texts", "fix"),
    [
        (lambda m: m.knob(noise=1.0), ["the golden set fails for 'full' in fp32"], "{run}"),
        (lambda m: m.gpu("10.7.0"), ["1 of 1 do not fit: ", "made by TensorRT 10.3.0"], "{run}"),
        (lambda m: m.engine.write_bytes(b"x"), ["1 bytes, the manifest says"], "{run} --force"),
    ],
)
def test_the_doctor_finds_engines_that_are_wrong(ready, trt, monkeypatch, tmp_path, provoke, texts, fix):
    provoke(Machine(bundle=ready, trt=trt, patch=monkeypatch, folder=tmp_path))
    row = examined(ready, monkeypatch)["engines"]
    compiling = as_typed("hcmen-compile", "--bundle", ready)
    assert (row.status, row.fix) == ("FAILED", fix.format(run=f"run on this device: {compiling}"))
    assert all(text in row.detail for text in texts)


def test_the_doctor_on_a_machine_with_parts_missing(ready, trt, monkeypatch, tmp_path):
    trt.libraries.clear()
    trt.creators.clear()
    assert examined(ready, monkeypatch)["tensorrt plugins"].status == "FAILED"
    (tmp_path / "libhcmen_trt.so").unlink()
    assert examined(ready, monkeypatch)["tensorrt plugins"].status == "info"
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("old", FakeCuda(error=35))]))
    found = examined(ready, monkeypatch)
    assert (found["gpu"].status, found["tensorrt"].status) == ("FAILED", "ok")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = examined(ready, monkeypatch)
    assert found["tensorrt"].status == "info"
    assert found["engines"].detail == "1, each as listed; not run, needs a GPU and TensorRT"
    (ready / "manifest.json").unlink()
    assert examined(ready, monkeypatch)["engines"].status == "skipped"


# --- apart from PyTorch -----------------------------------------------------------------------------------------------


def test_compile_and_run_without_torch(micro_bundle, tmp_path):
    loaded = loaded_after(
        """
        import sys
        from pathlib import Path
        sys.path.insert(0, sys.argv[1])
        import pytest
        from helpers.fake_tensorrt import compiled, machine
        from hcmen.runtime import load
        machine(pytest.MonkeyPatch(), Path(sys.argv[3]))
        done = compiled(sys.argv[2], "--variant", "full", "--precision", "fp16")
        assert done.code == 0, done.err
        assert all(t.passed for t in load(sys.argv[2], backend="tensorrt").self_test(["full"]))
        """,
        *(str(Path(__file__).parents[1]), str(micro_bundle), str(tmp_path)),
    )
    assert {"onnx", "tensorrt"} < loaded
    assert loaded.isdisjoint({"torch", "onnxscript", "safetensors", "matplotlib", "rich"})


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.3.0", (10, 3, 0)), ("10.13.3.9.post1", (10, 13, 3, 9)), ("11.4.0.106", (11, 4, 0, 106)), ("dev", ())],
)
def test_versions(text, numbers):
    assert parsed_version(text) == numbers


def test_without_a_bundle_the_demo_is_copied_for_its_engines(monkeypatch, tmp_path):
    from hcmen.base.shipped import BUNDLE, DEMO

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    monkeypatch.chdir(tmp_path)
    before = contents(DEMO / "bundle")
    refused = run(compile_main, "--variant", "audio_only", "--opt-batch", "99")
    assert refused.code == 2
    assert not BUNDLE.exists()
    machine(monkeypatch, tmp_path, "10.13.3.9")
    done = run(compile_main, "--variant", "audio_only", "--precision", "fp16")
    assert done.code == 0, done.err
    assert contents(DEMO / "bundle") == before
    made = contents(BUNDLE)
    assert before.items() <= made.items()
    assert {name.split("/")[0] for name in made.keys() - before.keys()} == {"engines"}
    last = done.out.splitlines()[-1]
    arguments = [
        "--self-test",
        "--bundle",
        "build/bundle",
        "--variant",
        "audio_only",
        "--backend",
        "tensorrt",
        "--precision",
        "fp16",
    ]
    assert last.endswith(as_typed("hcmen-run", *arguments))
    assert run(run_main, *arguments).code == 0
