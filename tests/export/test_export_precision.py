"""Bundles of float16 and int8: the graphs, what the gates of an export let through, and what a device makes of them."""

from __future__ import annotations

import collections
import copy
import dataclasses
import json
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from helpers import small_bundle
from helpers.command import run
from helpers.micro import MICRO
from onnx import ModelProto, TensorProto, helper, numpy_helper

import hcmen.export.commands.export as command
import hcmen.export.reduced as reduced
import hcmen.export.variants as variants
from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.errors import CheckFailed, CorruptFileError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.manifest import Manifest
from hcmen.base.modalities import Variant, variant_named
from hcmen.base.selfcheck import operators_run
from hcmen.base.typed import as_typed
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.synthetic import make_synthetic
from hcmen.export import int8
from hcmen.export.commands.compile import main as compile_main
from hcmen.export.float16 import half_weights
from hcmen.export.int8 import activation_ranges, linear_layers, quantised, weight_key, with_layers_of
from hcmen.export.parity import golden_cases, parity_clips
from hcmen.export.reduced import LabelledData, moved
from hcmen.export.triton import write_repository
from hcmen.export.weights import embedded_model
from hcmen.mamba.graph import ALIGNMENT_BYTES, share_weights
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder_config import TextEncoderConfig
from hcmen.runtime import load
from hcmen.runtime.backends import Ort
from hcmen.runtime.backends.ort import OrtBackend, OrtSession
from hcmen.runtime.golden import read_golden
from hcmen.training.checkpoint import save_checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import predict

TEXT_ONLY = variant_named("text_only")
SAMPLES = {"train": 40, "valid": 24, "test": 4}


@pytest.fixture(autouse=True)
def shallow(monkeypatch):
    """The models here are small: int8 is for products of every depth but that of the step sizes, which is 1."""
    monkeypatch.setattr(int8, "LEAST_DEPTH", 3)


def session(model: ModelProto, *, library: bool = True) -> OrtSession:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*without the kernel library.*", RuntimeWarning)
        backend = OrtBackend(Ort(threads=1), library=library)
        return backend.session(model.SerializeToString(), np.zeros(0, np.uint8), "weights.bin", model.graph.name)


def constants(model: ModelProto) -> dict[str, np.ndarray]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def producers(model: ModelProto) -> dict[str, onnx.NodeProto]:
    return {name: node for node in model.graph.node for name in node.output}


# --- the graphs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def opened(micro_bundle) -> Bundle:
    return read_bundle(micro_bundle)


def cases(bundle: Bundle, variant: str) -> list[dict[str, np.ndarray]]:
    return read_golden(bundle.read(bundle.variant(variant).golden), variant)


def golden_inputs(bundle: Bundle, variant: str) -> list[dict[str, np.ndarray]]:
    return [{t.name: case[t.name] for t in bundle.variant(variant).inputs} for case in cases(bundle, variant)]


def int8_graph(bundle: Bundle, variant: str) -> ModelProto:
    graph = embedded_model(bundle, variant)
    return quantised(graph, activation_ranges(graph, golden_inputs(bundle, variant)))[0]


@pytest.fixture(scope="module")
def int8_full(tmp_path_factory):
    """The float32 graph of all modalities, its int8 form and its golden inputs."""
    from helpers.micro import micro_bundle_at

    bundle = read_bundle(micro_bundle_at(tmp_path_factory.mktemp("micro")))
    before = int8.LEAST_DEPTH
    int8.LEAST_DEPTH = 3
    try:
        return embedded_model(bundle, "full"), int8_graph(bundle, "full"), golden_inputs(bundle, "full")
    finally:
        int8.LEAST_DEPTH = before


def test_an_int8_graph_is_whole_valid_and_runs_without_the_library(int8_full):
    graph, made, inputs = int8_full
    onnx.checker.check_model(made, full_check=True)
    assert (made.ir_version, [(o.domain, o.version) for o in made.opset_import]) == (
        graph.ir_version,
        [(o.domain, o.version) for o in graph.opset_import],
    )
    assert list(made.functions) == list(graph.functions)  # one file still runs everywhere
    assert (list(made.graph.input), list(made.graph.output)) == (list(graph.graph.input), list(graph.graph.output))
    fast, slow = session(made), session(made, library=False)
    assert (fast.kernels, slow.kernels) == ("native", "functions")
    for batch in inputs:
        for name, values in fast.run(batch).items():
            np.testing.assert_allclose(values, slow.run(batch)[name], rtol=1e-5, atol=1e-5)


def test_every_linear_layer_is_int8_and_nothing_else_is(int8_full):
    graph, made, _ = int8_full
    of, producer = constants(made), producers(made)
    layers = linear_layers(graph)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    assert {kinds[name] for name in layers} == {"MatMul", "Conv"}
    assert len(layers) > 40
    integer = set()
    for node in made.graph.node:
        sources = [producer.get(name) for name in node.input]
        if [s.op_type if s else "" for s in sources[:2]] == ["DequantizeLinear"] * 2:
            integer.add(node.name)
            weights, scale, zero = (of[name] for name in sources[1].input)
            assert weights.dtype == zero.dtype == np.int8
            assert not zero.any()
            # Two products of uint8 and these fit into 16 bits, which is what AVX2 adds them in.
            assert np.abs(weights.astype(int)).max() == 64
            assert np.iinfo(np.int16).max >= 2 * 255 * 64
            assert scale.shape == (weights.shape[1 if node.op_type == "MatMul" else 0],)
            assert of[sources[0].input[2]].dtype == np.uint8
    assert integer == set(layers)
    # Residuals, norms and scans read what they read before, not what was rounded for a product beside them.
    rounded = {n.output[0] for n in made.graph.node if n.op_type == "DequantizeLinear"}
    before = {n.name: list(n.input) for n in graph.graph.node}
    outputs = {n.output[0] for n in graph.graph.node if n.op_type == "Conv" and n.name in layers}
    for node in made.graph.node:
        if node.name in before and node.name not in layers:
            for now, then in zip(node.input, before[node.name], strict=True):
                assert now == then or (now in rounded and then in outputs), node.name


def test_a_quantised_product_against_numpy(int8_full):
    """Every integer product of the graph, by its definition in float64 and int64, from the input it really had."""
    _, made, inputs = int8_full
    of, producer = constants(made), producers(made)
    products = [n for n in made.graph.node if n.op_type == "MatMul" and producer.get(n.input[1]) is not None]
    products = [n for n in products if producer[n.input[1]].op_type == "DequantizeLinear"][:6]
    shown = copy.deepcopy(made)
    seen = {n.name: (producer[producer[n.input[0]].input[0]].input[0], n.output[0]) for n in products}
    for name in {name for pair in seen.values() for name in pair}:
        shown.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    got = session(shown).run(inputs[4])
    for node in products:
        x, y = (got[name].astype(np.float64) for name in seen[node.name])
        scale, zero = (of[name] for name in producer[node.input[0]].input[1:])
        weights, scales, _ = (of[name] for name in producer[node.input[1]].input)
        # ONNX: round half to even, then the zero point, then saturate.
        q = np.clip(np.rint(x.astype(np.float32) / scale) + int(zero), 0, 255).astype(np.int64) - int(zero)
        expected = (q @ weights.astype(np.int64)) * (np.float64(scale) * scales)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_score_depends_neither_on_its_batch_nor_on_padding(opened, int8_full):
    """Ranges are those of the export, so an outlier in a batch mate changes nothing; with dynamic ones it would."""
    _, made, inputs = int8_full
    loaded = session(made)
    batch = {name: x.copy() for name, x in inputs[-1].items()}
    together = loaded.run(batch)
    for x in batch.values():
        if x.dtype == np.float32:
            x[1] *= 50
    beside_an_outlier = loaded.run(batch)
    for name, values in together.items():
        np.testing.assert_allclose(beside_an_outlier[name][0], values[0], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(beside_an_outlier[name][2:], values[2:], rtol=1e-6, atol=1e-6)
    alone = {name: x[:1] for name, x in inputs[-1].items()}
    cut = {
        name: x[:, : int(alone[f"{name}_length"][0])] if f"{name}_length" in alone else x for name, x in alone.items()
    }
    np.testing.assert_allclose(loaded.run(cut)["score"], together["score"][:1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["fp16", "int8"])
def test_all_variants_share_one_copy_of_each_weight(opened, tmp_path, form):
    def narrow(name: str) -> ModelProto:
        graph = embedded_model(opened, name)
        if form == "fp16":
            return half_weights(graph)
        return quantised(graph, activation_ranges(graph, golden_inputs(opened, name)[:2]))[0]

    names = ("full", "text_missing", "audio_only", "text_only")
    made = {name: narrow(name) for name in names}
    assert narrow("full").SerializeToString(deterministic=True) == made["full"].SerializeToString(deterministic=True)
    large = {name: [x for x in constants(m).values() if x.nbytes >= 128] for name, m in made.items()}
    distinct = {weight_key(x): x.nbytes for arrays in large.values() for x in arrays}
    share_weights(made, tmp_path)
    size = (tmp_path / "weights.bin").stat().st_size
    assert sum(distinct.values()) <= size <= sum(distinct.values()) + len(distinct) * ALIGNMENT_BYTES
    # The graph of all modalities holds every weight of the others, though each was calibrated by itself.
    kind = np.float16 if form == "fp16" else np.int8
    keys = {name: {weight_key(x) for x in arrays if x.dtype == kind} for name, arrays in large.items()}
    assert len(keys["full"]) > {"fp16": 10, "int8": 5}[form]  # of its products few are deep enough for int8
    assert set().union(*keys.values()) == keys["full"]


def test_layers_go_back_to_float(int8_full):
    """Of a product and a convolution nothing is left in int8; with all layers back the scores are those of float16."""
    graph, made, inputs = int8_full
    weights, layers = constants(graph), linear_layers(graph)
    kinds = {node.name: node.op_type for node in graph.graph.node}
    chosen = [next(w for n, w in layers.items() if kinds[n] == kind) for kind in ("MatMul", "Conv")]
    part = with_layers_of(made, graph, [weight_key(weights[w]) for w in chosen])
    onnx.checker.check_model(part, full_check=True)
    assert sum(n.op_type == "DequantizeLinear" for n in made.graph.node) > sum(
        n.op_type == "DequantizeLinear" for n in part.graph.node
    )
    for name in chosen:
        np.testing.assert_array_equal(constants(part)[name], weights[name])
        assert f"{name}_quantized" not in constants(part)
    back = with_layers_of(made, graph, [weight_key(weights[w]) for w in layers.values()])
    assert not {"QuantizeLinear", "DequantizeLinear"} & {n.op_type for n in back.graph.node}
    expected, got = session(graph), session(back)
    for batch in inputs:
        np.testing.assert_allclose(got.run(batch)["score"], expected.run(batch)["score"], rtol=1e-2, atol=5e-3)


def test_calibration_that_meets_no_numbers(opened):
    graph = embedded_model(opened, "text_only")
    bad = golden_inputs(opened, "text_only")[0]
    bad["text"] = np.full_like(bad["text"], np.nan)
    with pytest.raises(CheckFailed, match="calibration clips, expected finite numbers"):
        activation_ranges(graph, [bad])


def test_float16_weights_are_widened_once(opened):
    """Half the bytes, float32 products, and no Cast of a weight in a run: ONNX Runtime folds them when it loads."""
    graph = embedded_model(opened, "text_only")
    made = half_weights(graph)
    onnx.checker.check_model(made, full_check=True)
    assert list(made.functions) == list(graph.functions)
    halves = {name: x for name, x in constants(made).items() if x.dtype == np.float16}
    assert halves
    assert {name.removesuffix("_float16") for name in halves} == {
        name
        for name, x in constants(graph).items()
        if x.size >= 64 and any(name in n.input and n.op_type in ("MatMul", "Gemm", "Conv") for n in graph.graph.node)
    }
    for name, x in halves.items():
        np.testing.assert_array_equal(x, constants(graph)[name.removesuffix("_float16")].astype(np.float16))
    import onnxruntime

    from hcmen.base.library import library_path

    batch = golden_inputs(opened, "text_only")[1]
    ran = [operators_run(onnxruntime, m.SerializeToString(), batch, library_path()) for m in (graph, made)]
    assert ran[0][1] == ran[1][1]
    np.testing.assert_allclose(ran[1][0][0], ran[0][0][0], rtol=1e-2, atol=2e-2)
    assert np.abs(ran[1][0][0] - ran[0][0][0]).max() > 0


def test_a_weight_beyond_float16():
    weight = np.full((32, 32), 1e6, np.float32)
    with pytest.raises(InputError, match=r"'w' holds 1e\+06, float16 ends at 65504: export with --precision fp32"):
        half_weights(one_node("MatMul", weight))


def one_node(op: str, weight: np.ndarray) -> ModelProto:
    """y = |x @ w|, or the rows x of w."""
    rows = op == "Gather"
    sizes = (TensorProto.INT64, ["n"]) if rows else (TensorProto.FLOAT, ["n", len(weight)])
    nodes = (
        [helper.make_node(op, ["w", "x"], ["y"], "node")]
        if rows
        # The last product before an output stays in float: Abs stands between the two.
        else [helper.make_node(op, ["x", "w"], ["p"], "node"), helper.make_node("Abs", ["p"], ["y"], "abs")]
    )
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", *sizes)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", weight.shape[1]])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_a_table_has_a_scale_per_row():
    """Rows of very different size, one of zeros: each is within half a step of its own largest value."""
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(100, 24)) * np.logspace(-6, 6, 100)[:, None]).astype(np.float32)
    table[7] = 0
    made, keys = quantised(one_node("Gather", table), {})
    assert keys == [weight_key(table)]
    assert constants(made)["w_quantized"].dtype == np.int8
    assert "w" not in constants(made)
    rows = np.array([3, 99, 7, 0])
    got = session(made).run({"x": rows})["y"]
    bound = np.abs(table[rows]).max(axis=1, keepdims=True) / 254 * 1.001
    assert (np.abs(got - table[rows]) <= bound).all()
    assert not got[2].any()


EMULATED = """
import sys
import numpy as np, onnxruntime
folder, out = sys.argv[1:]
x = np.load(f"{folder}/x.npy")
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
for name in ("ours", "all_bits"):
    session = onnxruntime.InferenceSession(f"{folder}/{name}.onnx", options, ["CPUExecutionProvider"])
    np.save(f"{folder}/{name}_{out}.npy", session.run(None, {"x": x})[0])
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator runs this interpreter, which is for x86-64")
@pytest.mark.skipif(
    shutil.which("qemu-x86_64") is None,
    reason="qemu-x86_64 is not installed: apt-get install qemu-user, as `make test-all` does where root runs it",
)
def test_a_processor_with_avx2_and_without_vnni_computes_the_same(tmp_path, monkeypatch):
    """Haswell adds two products of uint8 and int8 in 16 bits, which saturate: 8-bit weights are far off there."""
    from onnxruntime.quantization import quant_utils

    rng = np.random.default_rng(0)
    weight = rng.choice([-1.0, 1.0, 0.9], size=(64, 48)).astype(np.float32)
    x = rng.choice([3.0, 2.9, -0.1], size=(20, 64)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    graph, ranges = one_node("MatMul", weight), {"x": (-0.1, 3.0)}
    onnx.save(quantised(graph, ranges)[0], tmp_path / "ours.onnx")
    wide = (np.array(-127, np.int8), np.array(127, np.int8))
    monkeypatch.setitem(quant_utils.ONNX_INT_TYPE_REDUCED_RANGE, TensorProto.INT8, wide)
    onnx.save(quantised(graph, ranges)[0], tmp_path / "all_bits.onnx")
    for name, emulator in (("here", []), ("haswell", ["qemu-x86_64", "-cpu", "Haswell"])):
        command = [*emulator, sys.executable, "-c", EMULATED, tmp_path, name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    got = {p.stem: np.load(p) for p in tmp_path.glob("*_*.npy")}
    expected = np.abs(x @ weight)
    np.testing.assert_allclose(got["ours_haswell"], got["ours_here"], rtol=1e-6)
    np.testing.assert_allclose(got["ours_here"], expected, atol=0.02 * expected.max())
    assert np.abs(got["all_bits_haswell"] - expected).max() > 0.2 * expected.max()


# --- the export -----------------------------------------------------------------------------------------------------


def make_checkpoint(folder: Path, config: ModelConfig = MICRO, *, dataset: str = "synthetic") -> tuple[Path, HCMEN]:
    """A checkpoint of a random model, whose config.json says that it was trained on a small synthetic set."""
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.head.weight.mul_(6.0)
    folder.mkdir(parents=True)
    about = {"name": dataset, "label_min": -3.0, "label_max": 3.0, "samples": SAMPLES, "cleaned": {}}
    save_checkpoint(folder, model, TrainConfig(seed=0), epoch=0, validation={}, dataset=about)
    return folder, model


@pytest.fixture(scope="module")
def traced() -> ModelProto:
    """The graph of text alone of the model that `make_checkpoint` makes; tracing is what takes time in an export."""
    with tempfile.TemporaryDirectory() as folder:
        return variants.export_variant(make_checkpoint(Path(folder) / "train")[1], TEXT_ONLY)


@pytest.fixture
def train(tmp_path, traced, monkeypatch) -> Path:
    """A checkpoint folder; exporting its text alone takes the graph that was traced before."""
    trace = variants.export_variant

    def export_variant(model: HCMEN, variant: Variant) -> ModelProto:
        return copy.deepcopy(traced) if variant == TEXT_ONLY else trace(model, variant)

    monkeypatch.setattr(variants, "export_variant", export_variant)
    monkeypatch.chdir(tmp_path)
    return make_checkpoint(tmp_path / "train")[0]


def exported(train: Path, *more: object):
    return run(command.main, "--checkpoint", train, "--variant", "text_only", *more)


def test_an_int8_export_from_end_to_end(train, tmp_path):
    """The bundle lands in a place of its own, states what was measured, and a device holds itself to that."""
    done = exported(train, "--precision", "int8", "--format", "json")
    assert done.code == 0, done.err
    bundle = read_bundle(tmp_path / "build" / "bundle-int8")
    report = json.loads(done.out)
    parity = bundle.variant("text_only").parity
    assert report["precision"] == bundle.manifest.precision == "int8"
    assert report["variants"]["text_only"]["parity"] == parity
    metric = parity["metric"]
    assert (metric["metric"], metric["clips"], metric["bound"], metric["passed"]) == ("mae", 24, 0.01, True)
    assert 0 < abs(metric["change"]) <= 0.01

    # The same numbers by hand: the labels of the synthetic set, the eager model's scores, the bundle's scores.
    data = LabelledData(dataset_from_mmsa(make_synthetic(MICRO.inputs, (40, 24, 4), 0), "synthetic", MICRO.inputs))
    device = load(bundle.path)
    got = np.concatenate([device.run("text_only", b)["score"] for b in data.validation(TEXT_ONLY)])
    assert metric["got"] == pytest.approx(np.abs(got - data.valid.labels).mean(), rel=1e-6)
    _, model = make_checkpoint(tmp_path / "again")
    eager = predict(model, data.valid, TEXT_ONLY)
    assert metric["eager"] == pytest.approx(np.abs(eager - data.valid.labels).mean(), rel=1e-6)
    assert metric["eager"] * (1 + metric["change"]) == pytest.approx(metric["got"], rel=1e-6)
    seen = max(metric["max_abs"], *(o["max_abs"] for o in parity["outputs"].values()))
    assert device.tolerance("text_only") == (parity["atol"], 0.0) == (pytest.approx(2 * seen + 1e-3), 0.0)
    (test,) = device.self_test()
    assert test.passed
    assert test.outputs["score"].atol == parity["atol"]
    layers = parity["layers"]["quantised"]
    assert {"encoders.text.context.mixer.in_proj[:8]", "encoders.text.context.mixer.out_proj"} <= set(layers)
    assert not [name for name in layers if name.startswith("val_")]
    assert "backbone.0.0.conv" in layers
    assert parity["layers"]["kept_in_float"] == []

    # The whole in one file, as Triton takes it.
    write_repository(bundle, tmp_path / "triton")
    whole = onnx.load(tmp_path / "triton" / "hcmen_text_only" / "1" / "model.onnx")
    batch = golden_inputs(bundle, "text_only")[3]
    np.testing.assert_array_equal(session(whole).run(batch)["score"], device.run("text_only", batch)["score"])

    # Engines are made from float32 graphs alone.
    refused = run(compile_main, bundle.path)
    assert refused.code == 2
    assert "its graphs are int8" in refused.err
    assert len(refused.lines) == 1

    table = exported(train, "--precision", "int8")
    assert table.code == 0
    assert "MAE int8" in table.out
    assert "0.01" not in table.err
    assert as_typed("hcmen-run", "--self-test", "--bundle", "build/bundle-int8") in table.out


def test_a_float16_export(train, tmp_path):
    done = exported(train, "--precision", "fp16", "--bundle", "half", "--format", "json")
    assert done.code == 0, done.err
    bundle = read_bundle(tmp_path / "half")
    parity = bundle.variant("text_only").parity
    assert bundle.manifest.precision == "fp16"
    assert (parity["atol"], parity["rtol"]) == (2e-2, 1e-2)
    assert parity["metric"]["bound"] == 0.005
    assert parity["metric"]["passed"]
    device = load(bundle.path)
    assert device.tolerance("text_only") == (2e-2, 1e-2)
    assert all(t.passed for t in device.self_test())
    assert exported(train, "--bundle", "single").code == 0
    assert bundle.manifest.weights.bytes < read_bundle(tmp_path / "single").manifest.weights.bytes


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_variant_that_stays_keeps_what_was_judged_of_it(train, tmp_path, precision):
    assert exported(train, "--precision", precision, "--bundle", "b").code == 0
    before = read_bundle(tmp_path / "b").manifest
    more = ("--precision", precision, "--bundle", "b", "--variant", "audio_only")
    done = run(command.main, "--checkpoint", train, *more)
    assert done.code == 0, done.err
    after = read_bundle(tmp_path / "b").manifest
    assert list(after.variants) == ["text_only", "audio_only"]
    assert after.variants["text_only"].parity == before.variants["text_only"].parity
    assert after.variants["text_only"].golden == before.variants["text_only"].golden
    assert all(t.passed for t in load(tmp_path / "b").self_test())


def test_float32_stays_what_it_was(train, tmp_path):
    done = exported(train)
    assert done.code == 0, done.err
    manifest = read_bundle(tmp_path / "build" / "bundle").manifest
    parity = manifest.variants["text_only"].parity
    assert manifest.precision == "fp32"
    assert (parity["atol"], parity["rtol"]) == (1e-5, 1e-5)
    assert set(parity) == {"passed", "atol", "rtol", "cases", "clips", "outputs"}


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_metric_that_moves_too_far_writes_nothing(train, tmp_path, monkeypatch, precision):
    (tmp_path / "old").mkdir()
    small_bundle.make_bundle(tmp_path / "old")
    before = (tmp_path / "old" / "manifest.json").read_bytes()
    monkeypatch.setitem(reduced.MOST_MOVED, precision, 1e-12)
    done = exported(train, "--precision", precision, "--bundle", "old", "--quiet", "--force")
    assert done.code == 1
    assert f"{precision} moves the MAE of text_only too far: of 'text_only' by" in done.lines[-1]
    assert "24 validation clips, allowed 0.0%; no bundle was written: use --precision" in done.lines[-1]
    assert (tmp_path / "old" / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["old", "train"]


def test_an_output_beyond_the_bound_of_float16(train, tmp_path, monkeypatch):
    """The labels may not notice what the golden set does."""
    monkeypatch.setitem(reduced.MOST_MOVED, "fp16", 1.0)
    real = reduced.half_weights

    def coarse(model: ModelProto) -> ModelProto:
        made = real(model)
        for tensor in made.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT16:
                values = numpy_helper.to_array(tensor)
                tensor.CopyFrom(numpy_helper.from_array(values * np.float16(1.3), tensor.name))
        return made

    monkeypatch.setattr(reduced, "half_weights", coarse)
    done = exported(train, "--precision", "fp16", "--quiet")
    assert done.code == 1
    assert "parity failed for text_only" in done.lines[-1]
    assert not (tmp_path / "build").exists() or not any((tmp_path / "build").iterdir())


def test_the_most_sensitive_layer_goes_back_to_float(train, tmp_path, monkeypatch, traced):
    """A layer whose range is nonsense spoils the scores; left in float, the others pass, and the manifest says so."""
    weights = constants(traced)
    layers = linear_layers(traced)
    readers = collections.Counter(n.input[0] for n in traced.graph.node if n.name in layers)
    # The last square one that shares its input with no other: `out_proj` of the backbone, a step from the score.
    alone = [n for n in traced.graph.node if n.name in layers and readers[n.input[0]] == 1]
    node = [n for n in alone if weights[layers[n.name]].shape == (8, 8)][-1]
    real = reduced.activation_ranges

    def nonsense(model: ModelProto, batches: object) -> dict[str, tuple[float, float]]:
        return {**real(model, batches), node.input[0]: (-1e4, 1e4)}

    monkeypatch.setattr(reduced, "activation_ranges", nonsense)
    done = exported(train, "--precision", "int8")
    assert done.code == 0, done.err
    kept = read_bundle(tmp_path / "build" / "bundle-int8").variant("text_only").parity["layers"]["kept_in_float"]
    assert len(kept) == 1
    assert kept[0] in done.out
    assert "Left in float" in done.out
    assert "measuring which layers to leave in float" in done.err


def test_data_is_asked_for_where_none_can_be_had(tmp_path):
    train, _ = make_checkpoint(tmp_path / "train", dataset="/gone/mosi.pkl")
    for more, told in (
        (("--precision", "int8"), "was trained on /gone/mosi.pkl, which is not there: name the data with --data"),
        (("--precision", "int8", "--data", tmp_path / "no.pkl"), "no.pkl"),
        (("--data", tmp_path / "no.pkl"), "fp32 needs none: leave it out"),
        (("--precision", "int4"), "int4"),
    ):
        done = run(command.main, "--checkpoint", train, "--bundle", tmp_path / "bundle", *more)
        assert done.code == 2, done.err
        assert told in done.lines[-1]
        assert not (tmp_path / "bundle").exists()


def test_what_moved_says():
    labels = np.array([1.0, 2.0, 3.0, 4.0], np.float32)
    eager = np.array([1.5, 2.5, 2.5, 4.5])  # MAE 0.5
    report = moved(labels, eager, np.array([1.5, 2.5, 2.5, 4.516], np.float32), "int8", "some data")
    assert report["eager"] == 0.5
    assert report["got"] == pytest.approx(0.504)
    assert report["passed"]
    assert report["change"] == pytest.approx(0.008, rel=1e-4)
    assert report["max_abs"] == pytest.approx(0.016, rel=1e-4)
    assert not moved(labels, eager, np.array([1.5, 2.5, 2.5, 4.516]), "fp16")["passed"]
    # Better is moved, too: a precision shall not be chosen for the noise of its rounding.
    assert not moved(labels, eager, labels + 0.45, "int8")["passed"]
    broken = moved(labels, eager, np.array([np.nan, 2.5, 2.5, np.inf]), "int8")
    assert (broken["passed"], broken["nan"], broken["got"], broken["change"]) == (False, 2, None, None)
    json.dumps(broken, allow_nan=False)
    exact = moved(labels, labels, labels, "int8")
    assert exact["passed"]
    assert exact["change"] == 0
    assert not moved(labels, labels, eager, "int8")["passed"]


def test_calibration_sees_whole_clips_and_short_ones():
    data = LabelledData(dataset_from_mmsa(make_synthetic(MICRO.inputs, (40, 24, 4), 0), "synthetic", MICRO.inputs))
    batches = list(data.calibration(TEXT_ONLY))
    whole, cut = (np.concatenate([b["text_length"] for b in half]) for half in (batches[:3], batches[3:]))
    assert len(whole) == len(cut) == 40
    assert (cut <= whole).all()
    assert (cut < whole).any()
    assert cut.min() >= 1
    for batch in batches:
        for row, n in zip(batch["text"], batch["text_length"], strict=True):
            assert not row[n:].any()


# --- a text encoder -------------------------------------------------------------------------------------------------


def test_a_text_encoder_is_int8_too(tmp_path):
    """Its products, and its tables with a scale per word."""
    encoder = TextEncoderConfig(vocabulary=1100, layers=1, heads=2, intermediate=64, positions=32)
    config = dataclasses.replace(MICRO, text=FeatureConfig(32, 10), text_encoder=encoder)
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    graph = variants.export_variant(model, TEXT_ONLY)
    clips = parity_clips(config.inputs)
    pairs = golden_cases(model, TEXT_ONLY, clips)
    made, keys = quantised(graph, activation_ranges(graph, [inputs for inputs, _ in pairs]))
    onnx.checker.check_model(made, full_check=True)
    names = reduced._layer_names(model)
    found = {names.get(key, key) for key in keys}
    for part in ("query", "key", "value", "output", "intermediate", "word"):
        assert any(name.startswith("text_encoder.") and part in name for name in found), (part, sorted(found))
    words = [x for x in constants(made).values() if x.shape == (1100, 32)]
    assert [x.dtype for x in words] == [np.int8]
    stored = {t.name: numpy_helper.to_array(t).nbytes for t in made.graph.initializer}
    assert sum(stored.values()) < 0.4 * sum(x.nbytes for x in constants(graph).values())
    loaded = session(made)
    differences = np.concatenate([loaded.run(inputs)["score"] - outputs["score"] for inputs, outputs in pairs])
    scores = np.concatenate([outputs["score"] for _, outputs in pairs])
    assert 0 < np.sqrt(np.mean(differences**2)) < 0.3 * scores.std()


# --- the manifest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"atol": "wide"}, "'variants.full.parity.atol' is a string, expected a number"),
        ({"atol": True}, "expected a number"),
        ({"atol": -0.1}, "'variants.full.parity.atol' is -0.1, expected 0 to 6"),
        ({"atol": 6.5}, "'variants.full.parity.atol' is 6.5, expected 0 to 6"),
        ({"rtol": 1e30}, "'variants.full.parity.rtol' is 1e+30, expected 0 to 1"),
        ({"rtol": [0.1]}, "'variants.full.parity.rtol' is a list, expected a number"),
        ({"atol": None}, "'variants.full.parity.atol' is null, expected a number"),
        ({}, "key 'variants.full.parity.atol' is missing"),
    ],
)
def test_an_int8_manifest_that_would_excuse_anything(shared_bundle, change, told):
    data = json.loads((shared_bundle / "manifest.json").read_text())
    data["precision"] = "int8"
    for record in data["variants"].values():
        record["parity"] |= {"atol": 0.1, "rtol": 0.0}
    assert Manifest.from_json(data).precision == "int8"
    parity = data["variants"]["full"]["parity"]
    if not change:
        del parity["atol"]
    parity |= change
    with pytest.raises(CorruptFileError) as raised:
        Manifest.from_json(data)
    assert told in str(raised.value)


def test_a_precision_that_nobody_knows(shared_bundle):
    data = json.loads((shared_bundle / "manifest.json").read_text())
    data["precision"] = "int4"
    with pytest.raises(CorruptFileError, match="'precision' is 'int4', expected fp32 or fp16 or int8"):
        Manifest.from_json(data)
