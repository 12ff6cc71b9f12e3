"""hcmen-compile and the TensorRT backend from end to end, over a TensorRT and a CUDA that keep the documented contract.

The fakes (tests/helpers/fake_tensorrt.py, fake_cuda.py) run the very graph that the parser was given, so that parity is
computed and can fail. What they cannot say is whether TensorRT builds these graphs: that takes TensorRT (tests/gpu).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import fake_tensorrt
from helpers.command import run
from helpers.fake_cuda import FakeCuda
from helpers.fake_tensorrt import compiled, machine
from helpers.small_bundle import clip_arrays

import hcmen.runtime.backends.cuda
import hcmen.runtime.backends.flavour
import hcmen.runtime.commands.doctor_tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.clip import write_clip
from hcmen.base.engines import read_engines
from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.base.inputs import Inputs
from hcmen.export.tensorrt import Compiler, Options, profile_shapes
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRT
from hcmen.runtime.backends.flavour import parsed_version
from hcmen.runtime.backends.tensorrt import TrtBackend
from hcmen.runtime.commands.doctor_rows import Row
from hcmen.runtime.commands.doctor_tensorrt import tensorrt_rows
from hcmen.runtime.commands.run import main as run_main


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(sm=87)


@pytest.fixture
def trt(monkeypatch, tmp_path, cuda) -> Any:
    """A machine with TensorRT 10.3, a GPU of sm 87 and the plugin library."""
    return machine(monkeypatch, tmp_path, "10.3.0", cuda)


def clip_file(folder: Path, inputs: Inputs, seed: int = 0, **steps: int) -> Path:
    rng = np.random.default_rng(seed)
    arrays = {
        m: rng.normal(size=(steps.get(m, 5), inputs.modality(m).features)).astype(np.float32)
        for m in ("text", "audio", "vision")
    }
    write_clip(folder / f"clip{seed}.npz", arrays)
    return folder / f"clip{seed}.npz"


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.0.106"])
@pytest.mark.parametrize(("precision", "plugin"), [("fp32", "library"), ("fp16", "library"), ("fp32", "function")])
def test_compile_then_run(micro_bundle, monkeypatch, tmp_path, cuda, version, precision, plugin):
    trt = machine(monkeypatch, tmp_path, version, cuda)
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
    assert cuda.alive == {}
    for graph, plan in trt.built:
        assert not plan["tf32"]
        scans = [n for n in graph.graph.node if n.domain == "hcmen"]
        assert bool(scans) == (plugin == "library")
        assert not graph.functions
        halves = {t.name for t in graph.graph.initializer if t.data_type == onnx.TensorProto.FLOAT16}
        assert bool(halves) == (precision == "fp16")

    model = load(micro_bundle, backend="tensorrt")
    reference = load(micro_bundle)
    clip = clip_file(tmp_path, bundle.manifest.inputs)
    got, expected = model(str(clip)), reference(str(clip))
    assert (got.backend, got.kernels) == ("tensorrt", "native" if plugin == "library" else "functions")
    assert abs(got.score - expected.score) <= atol + rtol * abs(expected.score)
    if precision == "fp16":
        assert got.score != expected.score
    assert [t.passed for t in model.self_test(["full", "audio_only"])] == [True, True]


def test_an_engine_beyond_the_bound_is_not_written(micro_bundle, trt, cuda):
    trt.bias_of = {"modality_weights": 1.2e-4}  # beyond 1e-4 + 1e-4 w for weights below 1
    done = compiled(micro_bundle, "--variant", "full")
    assert done.code == 1
    assert done.lines[-1].startswith("error: parity failed for the fp32 engine of 'full', nothing was written:")
    assert "modality_weights" in done.lines[-1]
    assert not list(micro_bundle.glob("engines/*.engine*"))
    assert read_engines(read_bundle(micro_bundle)) == ()
    assert cuda.alive == {}
    trt.bias_of = {"modality_weights": 0.8e-4}
    assert compiled(micro_bundle, "--variant", "full").code == 0


def test_nan_fails_parity(micro_bundle, trt):
    trt.noise = float("nan")
    done = compiled(micro_bundle, "--variant", "full", "--precision", "fp16")
    assert done.code == 1
    assert "NaN" in done.lines[-1]


def test_tf32_would_fail_the_bound(micro_bundle, trt, monkeypatch):
    """So the flag that compile clears is one that matters to this test bench."""
    monkeypatch.setattr(trt.IBuilderConfig, "clear_flag", lambda self, flag: None)
    assert compiled(micro_bundle, "--variant", "full").code == 1


def test_aot_plugins_are_prepared_and_registered_before_the_graph_is_parsed(micro_bundle, monkeypatch, tmp_path, cuda):
    """With a stand-in for hcmen/mamba/trt_aot.py, which is tested on its own: what is asked of it, and when."""
    trt = machine(monkeypatch, tmp_path, "10.13.3.9", cuda)
    asked: list[Any] = []

    def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
        asked.append(("prepare", len(model.functions)))
        return model

    def register(sm: int) -> None:
        asked.append(("register", sm))
        for op in fake_tensorrt.OPS:
            trt.registry._creators[(op, "1", "hcmen")] = object()

    monkeypatch.setitem(sys.modules, "hcmen.mamba.trt_aot", SimpleNamespace(prepare=prepare, register=register))
    (tmp_path / "libhcmen_trt.so").unlink()
    done = compiled(micro_bundle, "--variant", "full", "--plugin", "aot", "--precision", "fp16")
    assert done.code == 0, done.err
    assert asked == [("prepare", 0), ("register", 87)]
    (record,) = read_engines(read_bundle(micro_bundle))
    assert record.plugin == "aot"
    model = load(micro_bundle, backend="tensorrt")  # without the plugin library
    assert model.kernels("full") == "native"
    assert all(t.passed for t in model.self_test(["full"]))


def test_what_is_there_is_kept_until_force_or_another_export(micro_bundle, trt):
    assert compiled(micro_bundle, "--variant", "text_only").code == 0
    again = compiled(micro_bundle, "--variant", "text_only")
    assert again.code == 0
    assert len(trt.built) == 1
    assert "is there already" in again.err
    assert compiled(micro_bundle, "--variant", "text_only", "--force").code == 0
    assert compiled(micro_bundle, "--variant", "text_only", "--version-compatible").code == 0
    assert len(trt.built) == 3
    (record,) = read_engines(read_bundle(micro_bundle))
    assert record.version_compatible
    (micro_bundle / record.engine.file).write_bytes(b"damaged")
    assert compiled(micro_bundle, "--variant", "text_only", "--version-compatible").code == 0
    assert len(trt.built) == 4
    for changed in (("--max-batch", 8), ("--max-batch", 8, "--opt-batch", 5), ("--plugin", "function")):
        built = len(trt.built)
        for _ in range(2):
            assert compiled(micro_bundle, "--variant", "text_only", *changed).code == 0
        assert len(trt.built) == built + 1


def test_options_reach_the_builder(micro_bundle, monkeypatch, tmp_path):
    cuda = FakeCuda(sm=90)
    trt = machine(monkeypatch, tmp_path, "10.16.1.11", cuda)
    done = compiled(
        micro_bundle,
        *("--variant", "vision_only", "--workspace", 64, "--max-batch", 5, "--opt-batch", 3),
        *("--version-compatible", "--hardware-compatible"),
    )
    assert done.code == 0, done.err
    ((_, plan),) = trt.built
    assert plan["workspace"] == 64 << 20
    assert plan["embedded"]
    assert plan["any_ampere"]
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
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(sm=90))
    with pytest.raises(BackendError, match=r"made by TensorRT 10\.16\.1\.11, this machine has 10\.3\.0"):
        load(micro_bundle, backend="tensorrt").kernels("vision_only")
    machine(monkeypatch, tmp_path, "10.16.1.11", FakeCuda(sm=75))
    with pytest.raises(BackendError, match="made for a GPU of sm 90, this one has sm 75"):
        load(micro_bundle, backend="tensorrt").kernels("vision_only")


def test_profiles_of_single_clips_only(micro_bundle):
    bundle = read_bundle(micro_bundle)
    (profile,) = profile_shapes(bundle, bundle.variant("text_only"), 1, 1)
    assert profile == {"text": ((1, 1, 6), (1, 5, 6), (1, 10, 6)), "text_length": ((1,), (1,), (1,))}


def test_timing_cache(micro_bundle, trt, tmp_path):
    cache = tmp_path / "timings"
    assert compiled(micro_bundle, "--variant", "full", "--timing-cache", cache).code == 0
    assert cache.read_bytes() == b"timings 10.3.0 sm87 full"
    before = cache.stat().st_mtime_ns
    assert compiled(micro_bundle, "--variant", "full", "--timing-cache", cache, "--force").code == 0
    assert cache.stat().st_mtime_ns == before  # nothing new was learnt
    for content in (b"timings 8.6 sm72", b"broken"):
        cache.write_bytes(content)
        done = compiled(micro_bundle, "--variant", "full", "--timing-cache", cache, "--force")
        assert done.code == 0
        assert any(line.startswith(f"warning: {cache}: not a timing cache of this GPU") for line in done.lines)
        assert cache.read_bytes() == b"timings 10.3.0 sm87 full"
    done = compiled(micro_bundle, "--variant", "full", "--timing-cache", tmp_path / "no" / "cache", "--force")
    assert done.code == 2
    assert len(done.lines[-1].splitlines()) == 1


def test_a_bundle_without_our_ops_needs_no_plugin(bundle, monkeypatch, tmp_path, cuda):
    trt = machine(monkeypatch, tmp_path, "10.3.0", cuda)
    trt.libraries.clear()
    done = compiled(bundle, "--variant", "full")
    assert done.code == 0, done.err
    assert read_engines(read_bundle(bundle))[0].plugin == "none"
    write_clip(tmp_path / "clip.npz", clip_arrays(1))
    result = load(bundle, backend="tensorrt")(str(tmp_path / "clip.npz"))
    assert result.kernels == "standard"


# --- what goes wrong while compiling ----------------------------------------------------------------------------------


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


def test_no_tensorrt(micro_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    line = refused(micro_bundle, 3)
    assert "tensorrt is not installed" in line
    assert "pip install 'hcmen[tensorrt]'" in line
    assert "python3-libnvinfer" in line


def test_no_onnx(micro_bundle, trt, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install 'onnx" in refused(micro_bundle, 3)


def test_too_old_a_tensorrt(micro_bundle, monkeypatch, tmp_path, cuda):
    machine(monkeypatch, tmp_path, "8.6.1", cuda)
    assert "TensorRT is 8.6.1, expected 10.3 or later" in refused(micro_bundle, 3)


@pytest.mark.parametrize(
    ("devices", "error", "text"),
    [(0, 0, "no CUDA device is there"), (0, 100, "no CUDA device is there"), (0, 35, "the driver is missing or older")],
)
def test_no_gpu(micro_bundle, monkeypatch, tmp_path, devices, error, text):
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(devices=devices, error=error))
    assert text in refused(micro_bundle, 3)


def test_no_cuda_runtime(micro_bundle, trt, monkeypatch):
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([]))
    assert "libcudart was not found" in refused(micro_bundle, 3)


def test_no_plugin_library(micro_bundle, trt, tmp_path):
    (tmp_path / "libhcmen_trt.so").unlink()
    line = refused(micro_bundle, 3)
    assert "libhcmen_trt.so was not found in" in line
    assert "--plugin function" in line


def test_a_plugin_library_that_does_not_load(micro_bundle, trt):
    trt.libraries.clear()
    line = refused(micro_bundle, 3)
    assert "no plugin hcmen::SelectiveScan version 1 in it (" in line
    assert "file too short" in line  # the loader's own words


def test_a_plugin_library_of_another_version(micro_bundle, trt, tmp_path):
    fake_tensorrt.plugin_file(tmp_path, trt, ["SelectiveScan"])
    assert "no plugin hcmen::CausalConv1d version 1 in it" in refused(micro_bundle, 3)


def test_what_the_parser_says_is_told_with_its_node(micro_bundle, trt, monkeypatch):
    monkeypatch.setattr(hcmen.runtime.backends.flavour.TrtModule, "load_plugins", lambda self, path: None)
    line = refused(micro_bundle, 3)
    assert "full.onnx: TensorRT 10.3.0 cannot take the graph: " in line
    assert "CausalConv1d node '" in line
    assert "Plugin not found" in line


def test_a_failed_build(micro_bundle, trt):
    trt.build_error = "Error Code 10: Could not find any implementation for node /scan"
    assert "could not build the engine: Error Code 10: Could not find any" in refused(micro_bundle, 3)


def test_out_of_memory(micro_bundle, trt):
    trt.build_error = "Error Code 2: OutOfMemory (Requested size was 1073741824 bytes.)"
    line = refused(micro_bundle, 3)
    assert "1024 of 1024 MiB of the GPU are free" in line
    assert "--workspace" in line


def test_no_memory_for_the_buffers(micro_bundle, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(room=1000))
    assert "cudaMalloc: the GPU has no memory left" in refused(micro_bundle, 3)


def test_no_memory_for_the_context(micro_bundle, trt):
    trt.context_error = "out of memory"
    assert "no execution context (out of memory)" in refused(micro_bundle, 3)


def test_a_failed_run(micro_bundle, trt, cuda):
    trt.execute_error = "Error Code 1: Cuda Runtime (misaligned address)"
    assert "TensorRT refused to run (Error Code 1: Cuda Runtime" in refused(micro_bundle, 3)
    assert cuda.alive == {}


def test_wrong_options(micro_bundle, trt):
    assert "expected 1 to max_batch" in refused(micro_bundle, 2, "--max-batch", 4, "--opt-batch", 5)
    assert "did you mean 'fp16'" in compiled(micro_bundle, "--precision", "f16").err
    assert "has no AOT plugins" in refused(micro_bundle, 3, "--plugin", "aot")
    assert "untried" in refused(micro_bundle, 2, "--plugin", "aot", "--version-compatible")
    assert compiled(micro_bundle, "--variant", "ful").code == 2
    assert compiled(micro_bundle.parent / "none").code == 2


def test_hardware_compatible_on_an_old_gpu(micro_bundle, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(sm=75))
    assert "start at 80" in refused(micro_bundle, 3, "--hardware-compatible")


def test_a_damaged_bundle(micro_bundle, trt):
    weights = micro_bundle / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    assert "weights.bin" in refused(micro_bundle, 5)


def test_an_engines_folder_that_cannot_be_written(micro_bundle, trt):
    (micro_bundle / "engines").write_text("in the way")
    assert f"remove {micro_bundle / 'engines'} and run hcmen-compile again" in refused(micro_bundle, 5)


def test_a_link_in_the_place_of_the_engines_folder(micro_bundle, trt, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (micro_bundle / "engines").symlink_to(tmp_path / "elsewhere")
    assert "a link" in refused(micro_bundle, 5)
    assert not list((tmp_path / "elsewhere").glob("*.engine"))


# --- running ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def ready(micro_bundle, trt) -> Path:
    """A bundle with an fp32 engine of "full"."""
    assert compiled(micro_bundle, "--variant", "full", "--max-batch", 4).code == 0
    return micro_bundle


def scored(bundle: Path, clip: Path, *arguments: object):
    return run(run_main, clip, "--bundle", bundle, "--backend", "tensorrt", *arguments)


def test_hcmen_run(ready, tmp_path):
    clip = clip_file(tmp_path, read_bundle(ready).manifest.inputs)
    done = scored(ready, clip, "--self-test", "--variant", "full", "--format", "json")
    assert done.code == 0, done.err
    data = json.loads(done.out)
    assert data["backend"]["name"] == "tensorrt"
    assert data["self_test"]["full"]["passed"]
    reference = load(ready)(str(clip))
    assert data["results"][0]["score"] == pytest.approx(reference.score, abs=1e-6)


def test_batches_graphs_and_large_batches(ready, cuda):
    """Sizes in any order, again and again, in more kinds than graphs are kept, and batches beyond the engine's."""
    model, reference = load(ready, backend="tensorrt"), load(ready)
    config = model.inputs
    rng = np.random.default_rng(0)

    def inputs(batch: int, steps: int) -> dict[str, np.ndarray]:
        made: dict[str, np.ndarray] = {}
        for m in ("text", "audio", "vision"):
            made[m] = rng.normal(size=(batch, steps, config.modality(m).features)).astype(np.float32)
            made[f"{m}_length"] = rng.integers(1, steps + 1, batch)
        return made

    sizes = [(1, 3), (2, 5), (4, 10), (7, 4), (1, 3), (3, 1), (1, 3), (9, 2), (2, 5), (2, 5), (1, 10)]
    sizes += [(1, t) for t in range(1, 11)] * 3
    for batch, steps in sizes:
        feeds = inputs(batch, steps)
        got, expected = model.run("full", feeds), reference.run("full", feeds)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name], atol=1e-6, rtol=1e-6, err_msg=f"{batch} x {steps}")
    assert cuda.calls.count("cudaGraphLaunch") > 10
    assert len(cuda.executables) <= 8
    assert cuda.graphs == {}
    session = model._session("full")
    session.close()
    assert cuda.alive == {}


def test_where_nothing_can_be_captured(ready, trt, cuda):
    trt.allow_capture = False
    cuda.calls.clear()
    model = load(ready, backend="tensorrt")
    with pytest.warns(RuntimeWarning, match="runs without CUDA graphs") as caught:
        assert all(t.passed for _ in range(3) for t in model.self_test(["full"]))
    assert len(caught) == 1
    assert "cudaGraphLaunch" not in cuda.calls


def test_threads_take_turns(ready, tmp_path):
    model = load(ready, backend="tensorrt")
    clips = [str(clip_file(tmp_path, model.inputs, seed, text=seed % 4 + 1)) for seed in range(8)]
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
        np.testing.assert_allclose(got[i], expected, atol=1e-6)


def test_memory_is_given_back_with_the_model(ready, cuda):
    model = load(ready, backend="tensorrt")
    list(model.self_test(["full"]))
    list(model.self_test(["full"]))
    assert cuda.alive
    del model
    assert cuda.alive == {}


def test_sizes_beyond_the_engine(ready):
    model = load(ready, backend="tensorrt")
    config = model.inputs
    feeds: dict[str, np.ndarray] = {}
    for m in ("text", "audio", "vision"):
        feeds[m] = np.zeros((1, config.modality(m).max_steps + 1, config.modality(m).features), np.float32)
        feeds[f"{m}_length"] = np.ones(1, np.int64)
    with pytest.raises(InputError, match=r"got text \[1, 11, 6\].*expected text \[1, 1, 6\] to \[4, 10, 6\]"):
        model.run("full", feeds)
    with pytest.raises(InputError, match="got inputs text, expected"):
        model.run("full", {"text": feeds["text"]})
    with pytest.raises(InputError, match="input 'text' is float64, expected float32"):
        model.run("full", feeds | {"text": feeds["text"].astype(np.float64)})
    feeds = {name: x[:, :1] if x.ndim == 3 else x for name, x in feeds.items()} | {"text_length": np.ones(2, np.int64)}
    with pytest.raises(InputError, match=r"batches of \[1, 2\]"):
        model.run("full", feeds)


def test_precision_is_chosen(ready, trt, tmp_path):
    clip = clip_file(tmp_path, read_bundle(ready).manifest.inputs)
    done = scored(ready, clip, "--precision", "fp16")
    assert done.code == 3
    assert "no fp16 engine for variant 'full': run hcmen-compile" in done.lines[-1]
    assert compiled(ready, "--variant", "full", "--precision", "fp16").code == 0
    sessions = {p: TrtBackend(TensorRT(p)).open(read_bundle(ready), "full").precision for p in ("fp32", "fp16", None)}
    assert sessions == {"fp32": "fp32", "fp16": "fp16", None: "fp16"}
    assert scored(ready, clip, "--precision", "int8").code == 2
    assert scored(ready, clip, "--threads", 2).code == 2
    assert run(run_main, clip, "--bundle", ready, "--precision", "fp16").code == 2


def said(bundle: Path, clip: Path, code: int) -> str:
    done = scored(bundle, clip)
    assert done.code == code, done.err
    assert len(done.lines) == 1
    return done.lines[0]


@pytest.fixture
def clip(ready, tmp_path) -> Path:
    return clip_file(tmp_path, read_bundle(ready).manifest.inputs)


def test_no_engine(micro_bundle, trt, tmp_path):
    clip = clip_file(tmp_path, read_bundle(micro_bundle).manifest.inputs)
    line = said(micro_bundle, clip, 3)
    assert f"no engine for variant 'full': run hcmen-compile {micro_bundle} --variant full on this device" in line


def test_another_gpu(ready, clip, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(sm=110))
    assert "made for a GPU of sm 87, this one has sm 110: run hcmen-compile" in said(ready, clip, 3)


def test_another_tensorrt(ready, clip, monkeypatch, tmp_path, cuda):
    machine(monkeypatch, tmp_path, "10.7.0", cuda)
    assert "made by TensorRT 10.3.0, this machine has 10.7.0: run hcmen-compile" in said(ready, clip, 3)


def test_another_machine(ready, clip, monkeypatch):
    monkeypatch.setattr(hcmen.runtime.backends.flavour.platform, "machine", lambda: "riscv64")
    assert "this machine is riscv64" in said(ready, clip, 3)


def test_another_export(ready, clip):
    index = ready / "engines" / "manifest.json"
    data = json.loads(index.read_text())
    data["engines"][0]["graph_sha256"] = "0" * 64
    index.write_text(json.dumps(data))
    assert "made from another export than the one in this bundle" in said(ready, clip, 3)


def test_an_altered_engine(ready, clip):
    (path,) = ready.glob("engines/*.engine")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    line = said(ready, clip, 5)
    assert "sha256" in line
    assert "hcmen-compile --force" in line


def test_a_vanished_engine(ready, clip):
    (path,) = ready.glob("engines/*.engine")
    path.unlink()
    assert "missing from the bundle: compile it again" in said(ready, clip, 5)


def test_a_linked_engine(ready, clip, tmp_path):
    (path,) = ready.glob("engines/*.engine")
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert "a link" in said(ready, clip, 5)


def test_an_engine_that_tensorrt_refuses(ready, clip):
    """Listed with its sha256, and yet no engine: as one built by a broken TensorRT would be."""
    (path,) = ready.glob("engines/*.engine")
    path.write_bytes(b"fake plan\0" + bytes(100))
    index = ready / "engines" / "manifest.json"
    data = json.loads(index.read_text())
    import hashlib

    data["engines"][0] |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    index.write_text(json.dumps(data))
    assert "TensorRT 10.3.0 refused the engine (Magic tag does not match)" in said(ready, clip, 3)


def test_an_engine_of_another_graph(ready, clip, trt):
    assert compiled(ready, "--variant", "audio_only").code == 0
    index = ready / "engines" / "manifest.json"
    data = json.loads(index.read_text())
    audio, full = data["engines"]
    full |= {k: audio[k] for k in ("sha256", "bytes")}
    index.write_text(json.dumps(data))
    (ready / full["file"]).write_bytes((ready / audio["file"]).read_bytes())
    assert "tensor 'text' is not there, expected input float32 [-1, -1, 6]" in said(ready, clip, 5)


def test_the_plugin_library_is_needed_to_run_too(ready, clip, monkeypatch, tmp_path, cuda):
    machine(monkeypatch, tmp_path, "10.3.0", cuda)
    (tmp_path / "libhcmen_trt.so").unlink()
    assert "libhcmen_trt.so was not found in" in said(ready, clip, 3)


def test_no_tensorrt_to_run(ready, clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "tensorrt is not installed" in said(ready, clip, 3)


def test_no_memory_to_run(ready, clip, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "10.3.0", FakeCuda(sm=87, room=1000))
    assert "the GPU has no memory left (" in said(ready, clip, 3)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda d: d.update(schema_version=2), 2),
        (lambda d: d.update(more=1), 5),
        (lambda d: d["engines"].append(d["engines"][0]), 5),
        (lambda d: d["engines"][0].update(file="../full.engine"), 5),
        (lambda d: d["engines"][0].update(file="engines/other.engine"), 5),
        (lambda d: d["engines"][0].update(sm="87"), 5),
        (lambda d: d["engines"][0].update(precision="int8"), 5),
        (lambda d: d["engines"][0].update(sha256="xyz"), 5),
        (lambda d: d["engines"][0].pop("plugin"), 5),
    ],
)
def test_an_altered_index(ready, clip, change, code):
    index = ready / "engines" / "manifest.json"
    data = json.loads(index.read_text())
    change(data)
    index.write_text(json.dumps(data))
    assert str(index) in said(ready, clip, code)


def test_a_truncated_index(ready, clip):
    index = ready / "engines" / "manifest.json"
    index.write_bytes(index.read_bytes()[:50])
    assert "not valid JSON" in said(ready, clip, 5)


# --- the doctor -------------------------------------------------------------------------------------------------------


def examined(bundle: Path, monkeypatch) -> dict[str, Row]:
    monkeypatch.setattr(hcmen.runtime.commands.doctor_tensorrt, "find_driver", lambda: "560.35, Orin")
    return {r.name: r for r in tensorrt_rows(str(bundle))}


def test_the_doctor_finds_everything_in_order(ready, monkeypatch):
    found = examined(ready, monkeypatch)
    assert [r.status for r in found.values()] == ["info", "ok", "ok", "ok", "ok"]
    assert found["nvidia driver"].detail == "560.35, Orin"
    assert found["gpu"].detail.startswith("sm 87, driver for CUDA 12.8, runtime 12.6 (libcudart.so.12), 102")
    assert found["tensorrt"].detail == "10.3.0"
    assert found["engines"].detail == "1, each as listed; golden set passed for full fp32"


def test_the_doctor_finds_a_wrong_engine(ready, trt, monkeypatch):
    trt.noise = 1.0
    row = examined(ready, monkeypatch)["engines"]
    assert (row.status, row.fix) == ("FAILED", "run hcmen-compile on this device again")
    assert "the golden set fails for 'full' in fp32" in row.detail


def test_the_doctor_finds_engines_of_another_device(ready, monkeypatch, tmp_path):
    machine(monkeypatch, tmp_path, "10.7.0", FakeCuda(sm=87))
    row = examined(ready, monkeypatch)["engines"]
    assert row.status == "FAILED"
    assert "1 of 1 do not fit: " in row.detail
    assert "made by TensorRT 10.3.0" in row.detail


def test_the_doctor_finds_a_damaged_engine(ready, monkeypatch):
    (path,) = ready.glob("engines/*.engine")
    path.write_bytes(b"x")
    row = examined(ready, monkeypatch)["engines"]
    assert (row.status, row.fix) == ("FAILED", "run hcmen-compile on this device, with --force")


def test_the_doctor_on_a_machine_with_parts_missing(ready, trt, monkeypatch, tmp_path):
    trt.libraries.clear()
    trt.registry._creators.clear()
    assert examined(ready, monkeypatch)["tensorrt plugins"].status == "FAILED"
    (tmp_path / "libhcmen_trt.so").unlink()
    assert examined(ready, monkeypatch)["tensorrt plugins"].status == "info"
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("old", FakeCuda(error=35))]))
    found = examined(ready, monkeypatch)
    assert found["gpu"].status == "FAILED"
    assert found["tensorrt"].status == "ok"
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    found = examined(ready, monkeypatch)
    assert found["tensorrt"].status == "info"
    assert found["engines"].detail == "1, each as listed; not run, needs a GPU and TensorRT"
    (ready / "manifest.json").unlink()
    assert examined(ready, monkeypatch)["engines"].status == "skipped"


# --- apart from PyTorch -----------------------------------------------------------------------------------------------


def test_compile_and_run_without_torch(micro_bundle, tmp_path):
    """In a process where importing PyTorch, or what only PyTorch's part needs, fails."""
    script = """
        import sys
        from pathlib import Path

        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in ("torch", "onnxscript", "safetensors", "matplotlib", "rich"):
                    raise ImportError(f"{name} must not be imported")

        sys.meta_path.insert(0, Refuse())
        sys.path.insert(0, sys.argv[1])
        import hcmen.runtime.backends.cuda, hcmen.runtime.backends.flavour
        from helpers import fake_tensorrt
        from helpers.command import run
        from helpers.fake_cuda import FakeCuda

        cuda = FakeCuda()
        trt = sys.modules["tensorrt"] = fake_tensorrt.make("10.3.0", cuda)
        hcmen.runtime.backends.cuda._libraries = lambda: iter([("fake", cuda)])
        folder = Path(sys.argv[3])
        fake_tensorrt.plugin_file(folder, trt)
        hcmen.runtime.backends.flavour.library_folders = lambda: [folder]
        from hcmen.export.commands.compile import main
        done = run(main, sys.argv[2], "--variant", "full", "--precision", "fp16")
        assert done.code == 0, done.err
        from hcmen.runtime import load
        assert all(t.passed for t in load(sys.argv[2], backend="tensorrt").self_test(["full"]))
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(script),
            str(Path(__file__).parents[1]),
            str(micro_bundle),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_help_and_refusal_import_nothing_heavy():
    script = (
        "import sys; from hcmen.export.commands.compile import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    )
    script += (
        "print([m for m in ('onnx', 'numpy', 'tensorrt', 'torch', 'onnxruntime') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "--hardware-compatible" in done.stdout
    assert set(json.loads(done.stderr.replace("'", '"'))) <= {"numpy"}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("10.3.0", (10, 3, 0)), ("10.13.3.9.post1", (10, 13, 3, 9)), ("11.4.0.106", (11, 4, 0, 106)), ("dev", ())],
)
def test_versions(text, numbers):
    assert parsed_version(text) == numbers


def test_the_compiler_from_python(micro_bundle, trt):
    built = Compiler(read_bundle(micro_bundle), Options(precision="fp16")).compile("text_missing")
    assert built.fresh
    assert built.test is not None
    assert built.test.passed
    (micro_bundle / "text_missing.onnx").write_bytes(b"x")
    again = Compiler(read_bundle(micro_bundle), Options(precision="fp16", force=True))
    with pytest.raises(CorruptFileError):
        again.compile("text_missing")
