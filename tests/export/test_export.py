"""What an export promises: the seven graphs, their weights, their parity, and nothing half-written."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import hcmen.export.parity as parity
from hcmen.base.bundle import read_bundle
from hcmen.base.clip import Clip, batch_clips, write_clip
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.export.bundle import export_bundle
from hcmen.export.report import table
from hcmen.export.variants import export_variant
from hcmen.mamba.graph import share_weights
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import HCMEN
from hcmen.runtime import load
from hcmen.training.checkpoint import save_checkpoint
from hcmen.training.config import TrainConfig

CONFIG = ModelConfig(
    FeatureConfig(9, 12), FeatureConfig(5, 21), FeatureConfig(7, 17), width=16, tokens=4, states=3, expand=2
)


def make_model(config: ModelConfig = CONFIG) -> HCMEN:
    """A model no two of whose weights are equal, so that a tensor tells where it comes from."""
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    rng = np.random.default_rng(0)
    model.set_normalisation(
        {
            m: (rng.normal(size=config.modality(m).features), rng.uniform(0.5, 2, config.modality(m).features))
            for m in MODALITIES
        }
    )
    return model


def make_checkpoint(folder: Path, model: HCMEN) -> Path:
    folder.mkdir(parents=True)
    save_checkpoint(folder, model, TrainConfig(), epoch=3, validation={}, dataset={"name": "test"})
    return folder


def random_clip(seed: int, config: ModelConfig = CONFIG) -> Clip:
    rng = np.random.default_rng(seed)
    return Clip(
        f"clip {seed}",
        {
            m: rng.normal(size=(rng.integers(1, config.modality(m).max_steps + 1), config.modality(m).features)).astype(
                np.float32
            )
            for m in MODALITIES
        },
    )


@pytest.fixture(scope="module")
def model() -> HCMEN:
    return make_model()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model):
    """The checkpoint and the bundle of all seven variants."""
    root = tmp_path_factory.mktemp("export")
    checkpoint = make_checkpoint(root / "train", model)
    (checkpoint / "clips").mkdir()
    for i in range(3):
        write_clip(checkpoint / "clips" / f"{i}.npz", random_clip(i).features)
    export_bundle(checkpoint, root / "bundle")
    return checkpoint, root / "bundle"


@pytest.fixture(scope="module")
def graphs(exported) -> dict[str, onnx.ModelProto]:
    return {v.name: onnx.load(str(exported[1] / f"{v.name}.onnx")) for v in VARIANTS}


def contents(graph: onnx.ModelProto) -> set[tuple]:
    """Every constant of a graph, as its sorted numbers: a transposed weight is still that weight."""
    tensors = [onnx.numpy_helper.to_array(t) for t in graph.graph.initializer]
    tensors += [onnx.numpy_helper.to_array(a.t) for n in graph.graph.node for a in n.attribute if a.HasField("t")]
    return {tuple(np.sort(t.ravel())) for t in tensors if t.size > 1}


def folded(module) -> dict[str, np.ndarray]:
    """A module's parameters as the exporter folds them: in_proj cut in two, out_proj halved, all else as it is."""
    parameters = {n: p.detach().numpy() for n, p in module.named_parameters() if p.numel() > 1}
    for name in [n for n in parameters if n.endswith("in_proj.weight")]:
        u, z = np.split(parameters.pop(name), 2)
        parameters |= {f"{name}[u]": u, f"{name}[z]": z}
    return {n: 0.5 * p if n.endswith("out_proj.weight") else p for n, p in parameters.items()}


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_graph_has_nothing_of_an_absent_modality(graphs, model, variant):
    graph = graphs[variant.name]
    assert {i.name for i in graph.graph.input} == {*variant.present, *(f"{m}_length" for m in variant.present)}
    there = contents(graph)
    # What serves modality m alone: its encoder; its proxy when m is the only one present; the logits that mix for it.
    for m in MODALITIES:
        encoder = folded(model.encoders[m])
        found = {n for n, p in encoder.items() if tuple(np.sort(p.ravel())) in there}
        if m in variant.present:
            # A_log becomes A, and the queries of the pooling become one with the weight of its keys.
            gone = {n for n in encoder if n.endswith(("A_log", "A_b_log", "pool.queries", "pool.key.weight"))}
            assert set(encoder) - found == gone
        else:
            assert found == set()
        proxy = [p.detach().numpy() for p in model.proxies[m].parameters() if p.numel() > 1]
        used = any(tuple(np.sort(p.ravel())) in there for p in proxy)
        assert used == (variant.present != (m,))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_every_node_and_weight_is_needed(graphs, variant):
    """No output hangs loose, and the scans are those of the present encoders, the proxies in use, and the backbone."""
    graph = graphs[variant.name].graph
    needed = {o.name for o in graph.output}
    for node in reversed(graph.node):
        assert needed & set(node.output), f"{node.op_type} {node.name} leads to no output"
        needed |= set(node.input)
    assert {t.name for t in graph.initializer} <= needed
    ops = collections.Counter(n.op_type for n in graph.node if n.domain == "hcmen")
    proxies = 3 if len(variant.present) > 1 else 2
    blocks = len(variant.present) + proxies + CONFIG.backbone_depth
    assert ops == {"SelectiveScan": 2 * blocks, "CausalConv1d": 2 * blocks}


def test_graphs_are_readable_by_old_runtimes_and_say_nothing_of_this_machine(exported, graphs):
    for name, graph in graphs.items():
        assert graph.ir_version <= 9
        versions = {o.domain: o.version for o in graph.opset_import}
        assert versions == {"": 19, "hcmen": 1}
        assert {f.name for f in graph.functions} == {"SelectiveScan", "CausalConv1d"}
        onnx.checker.check_model(str(exported[1] / f"{name}.onnx"), full_check=True)
        text = (exported[1] / f"{name}.onnx").read_bytes()
        assert b".py" not in text
        assert b"/" + Path(__file__).parts[1].encode() not in text
        for node in graph.graph.node:
            assert "" not in node.input, "an absent input must be left out: TensorRT takes no empty ones"


def test_every_tensor_is_on_disk_once(exported, graphs, model):
    """Each content has one place in weights.bin whatever the number of graphs that use it, and none is left over."""
    weights = (exported[1] / "weights.bin").read_bytes()
    places: dict[bytes, set[int]] = {}
    covered = 0
    for name in graphs:
        raw = onnx.load(str(exported[1] / f"{name}.onnx"), load_external_data=False)
        for tensor in raw.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                assert len(onnx.numpy_helper.to_array(tensor).tobytes()) < 128
                continue
            entry = {e.key: e.value for e in tensor.external_data}
            offset, length = int(entry["offset"]), int(entry["length"])
            assert entry["location"] == "weights.bin"
            assert offset % 64 == 0
            key = weights[offset : offset + length] + bytes(str((tensor.data_type, list(tensor.dims))), "ascii")
            if key not in places:
                covered += length
            places.setdefault(key, set()).add(offset)
    assert all(len(p) == 1 for p in places.values())
    assert len(weights) - covered < 64 * (len(places) + 1)
    # One model's worth of numbers, not seven.
    assert len(weights) < 1.3 * 4 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
def test_parity_on_clips_the_export_never_saw(exported, model, variant, library):
    """One file, two ways to run it, both within the bound of the eager model; batches and lengths are free."""
    options = onnxruntime.SessionOptions()
    if library:
        from hcmen.base.library import library_path

        options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(
        str(exported[1] / f"{variant.name}.onnx"), options, providers=["CPUExecutionProvider"]
    )
    for seeds in ((100,), (101, 102, 103), range(104, 121)):
        inputs = batch_clips([random_clip(s) for s in seeds], variant.present)
        score, weights = session.run(["score", "modality_weights"], inputs)
        eager = parity._run(model, variant, inputs)
        np.testing.assert_allclose(score, eager["score"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(weights, eager["modality_weights"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"proxies": False}, "vision_missing"),
        ({"cnn": False}, "audio_missing"),
        ({"mamba": False}, "full"),
        ({"proxies": False, "cnn": False, "mamba": False}, "text_only"),
    ],
    ids=["without proxies", "without CNN", "without Mamba", "without any"],
)
def test_ablated_models_are_exported_too(changes, name):
    ablated, variant = make_model(dataclasses.replace(CONFIG, **changes)), variant_named(name)
    proto = export_variant(ablated, variant)
    assert any(n.domain == "hcmen" for n in proto.graph.node) == ablated.config.mamba
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for seeds in ((100,), (101, 102, 103)):
        inputs = batch_clips([random_clip(s) for s in seeds], variant.present)
        eager = parity._run(ablated, variant, inputs)
        score, weights = session.run(["score", "modality_weights"], inputs)
        np.testing.assert_allclose(score, eager["score"], atol=1e-5, rtol=1e-5)
        np.testing.assert_allclose(weights, eager["modality_weights"], atol=1e-5, rtol=1e-5)


def test_the_runtime_scores_a_raw_clip_as_the_eager_model_does(exported, model, tmp_path):
    clip = random_clip(55)
    write_clip(tmp_path / "clip.npz", clip.features)
    result = load(exported[1])(str(tmp_path / "clip.npz"))
    eager = parity._run(model, variant_named("full"), batch_clips([clip]))
    np.testing.assert_allclose(result.score, eager["score"][0], atol=1e-5, rtol=1e-5)


def test_manifest_and_golden_set_hold_what_was_measured(exported):
    bundle = read_bundle(exported[1])
    bundle.verify()
    manifest = bundle.manifest
    assert list(manifest.variants) == [v.name for v in VARIANTS]
    assert manifest.source["epoch"] == 3
    assert manifest.model.kind == CONFIG.kind
    assert dict(manifest.model.config) == CONFIG.to_json()
    assert manifest.inputs == CONFIG.inputs
    for name, record in manifest.variants.items():
        assert record.parity["passed"] is True
        assert record.parity["clips"] >= 16
        score = record.parity["outputs"]["score"]
        assert set(score) >= {"max_abs", "mean_abs", "p99_abs", "cosine", "nan", "worst", "required_atol", "failed"}
        assert 0 < score["max_abs"] < 1e-5
        golden = np.load(exported[1] / record.golden.file)
        batches = {k.partition("/")[0] for k in golden.files}
        sizes = [len(golden[f"{b}/score"]) for b in batches]
        assert 1 in sizes
        assert max(sizes) > 1
        for m in variant_named(name).present:
            lengths = np.concatenate([golden[f"{b}/{m}_length"] for b in batches])
            assert {1, CONFIG.modality(m).max_steps} <= set(lengths.tolist())
            assert len(set(lengths.tolist())) > 5


def test_golden_outputs_are_checked_against_float64(model, monkeypatch):
    variant = variant_named("audio_only")
    clips = parity.parity_clips(CONFIG.inputs)
    monkeypatch.setattr(parity, "SCORE_ATOL", 1e-12)
    monkeypatch.setattr(parity, "SCORE_RTOL", 0.0)
    with pytest.raises(CheckFailed, match="from float64 on score of 'audio_only'"):
        parity.golden_cases(model, variant, clips)


def test_recorded_clips_are_used_and_fitted():
    recorded = [random_clip(1), random_clip(2)]
    clips = parity.parity_clips(CONFIG.inputs, recorded)
    assert len(clips) >= 16
    for i, clip in enumerate(clips):
        for m in MODALITIES:
            source = recorded[i % 2].features[m]
            assert np.array_equal(clip.features[m][: len(source)], source[: len(clip.features[m])])
    lengths = [len(c.features["audio"]) for c in clips]
    assert lengths[:2] == [1, CONFIG.audio.max_steps]


def test_one_variant_alone(exported, tmp_path):
    manifest = export_bundle(exported[0], tmp_path / "bundle", [variant_named("vision_only")])
    assert list(manifest.variants) == ["vision_only"]
    files = sorted(p.relative_to(tmp_path / "bundle").as_posix() for p in (tmp_path / "bundle").rglob("*.*"))
    assert files == ["README.md", "golden/vision_only.npz", "manifest.json", "vision_only.onnx", "weights.bin"]
    assert (tmp_path / "bundle" / "weights.bin").stat().st_size < (exported[1] / "weights.bin").stat().st_size
    with pytest.raises(InputError, match="'full' is not in this bundle, it has vision_only"):
        read_bundle(tmp_path / "bundle").variant("full")


def test_a_graph_that_differs_is_not_written(exported, tmp_path, monkeypatch):
    """The exporter checks the graph, not its own word: a changed weight in the graph stops the export."""

    def tampered(model, variant):
        proto = export_variant(model, variant)
        for tensor in proto.graph.initializer:
            values = onnx.numpy_helper.to_array(tensor)
            if tensor.name.endswith("head.bias"):
                tensor.CopyFrom(onnx.numpy_helper.from_array(values + np.float32(1e-4), tensor.name))
        return proto

    monkeypatch.setattr("hcmen.export.variants.export_variant", tampered)
    with pytest.raises(CheckFailed, match=r"parity failed for text_only: score of 'text_only' is off by 1\.0e-04") as e:
        export_bundle(exported[0], tmp_path / "bundle", [variant_named("text_only")])
    assert "\n" not in str(e.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_export_leaves_the_old_bundle(exported, tmp_path, monkeypatch):
    variant = [variant_named("vision_only")]
    export_bundle(exported[0], tmp_path / "bundle", variant)
    before = {p: p.read_bytes() for p in (tmp_path / "bundle").rglob("*") if p.is_file()}

    def full_disk(*_):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr("hcmen.mamba.graph.share_weights", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_bundle(exported[0], tmp_path / "bundle", variant)
    assert {p: p.read_bytes() for p in (tmp_path / "bundle").rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_killed_export_leaves_no_bundle_and_the_next_one_cleans_up(exported, tmp_path):
    arguments = [sys.executable, "-m", "hcmen.export.commands.export", "--checkpoint", str(exported[0])]
    code = "import sys; from hcmen.export.commands.export import main; main()"
    arguments = [sys.executable, "-c", code, "--checkpoint", str(exported[0]), "--bundle", str(tmp_path / "bundle")]
    process = subprocess.Popen([*arguments, "--variant", "audio_only"], stderr=subprocess.DEVNULL)
    for _ in range(600):
        if any(p.name.startswith(".bundle.tmp-") for p in tmp_path.iterdir()):
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "bundle").exists()
    export_bundle(exported[0], tmp_path / "bundle", [variant_named("audio_only")])
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]
    read_bundle(tmp_path / "bundle").verify()


def run(*arguments, **environment) -> subprocess.CompletedProcess:
    code = "import sys; from hcmen.export.commands.export import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def test_command_line_answers_in_json(exported, tmp_path):
    done = run(*("--checkpoint", exported[0], "--bundle", tmp_path / "b", "--variant", "text_only", "--format", "json"))
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    assert answer["variants"]["text_only"]["parity"]["passed"] is True
    assert "tracing text_only" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--variant", "audio_mising"], 2, "did you mean 'audio_missing'"),
        (["--checkpoint", "{tmp}/nothing"], 2, "nothing"),
        (["--checkpoint", "{tmp}/damaged"], 5, "sha256"),
        (["--bundle", "{tmp}/occupied"], 2, "is no bundle"),
        (["--bundle", "{tmp}/file"], 2, "a file is there"),
        (["--bundle", "/proc/hcmen/bundle"], 2, "/proc/hcmen"),
    ],
)
def test_bad_arguments_end_with_one_line(exported, tmp_path, arguments, code, message):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("checkpoint.safetensors", "config.json"):
        content = (exported[0] / name).read_bytes()
        (damaged / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if name.startswith("check") else content)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    before = sorted(tmp_path.rglob("*"))
    defaults = ["--checkpoint", str(exported[0]), "--bundle", str(tmp_path / "bundle"), "--variant", "text_only"]
    done = run(*defaults, *(a.format(tmp=tmp_path) for a in arguments))
    assert done.returncode == code
    assert done.stdout == ""
    errors = done.stderr.strip().splitlines()
    assert len(errors) == 1, done.stderr
    assert message in errors[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_share_weights_tells_tensors_apart_by_shape_and_type(tmp_path):
    """Equal bytes of another shape or type are another tensor; equal ones under two names are the same."""
    a = np.arange(64, dtype=np.float32)
    arrays = {"a": a, "b": a.copy(), "c": a.reshape(8, 8), "d": a.view(np.int32)}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", [n], [f"{n}_out"]) for n in arrays],
        "g",
        [],
        [
            onnx.helper.make_tensor_value_info(f"{n}_out", onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for n, x in arrays.items()
        ],
        [onnx.numpy_helper.from_array(x, n) for n, x in arrays.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 19)], ir_version=9)
    share_weights({"one": model}, tmp_path)
    assert (tmp_path / "weights.bin").stat().st_size == 3 * 256
    session = onnxruntime.InferenceSession(str(tmp_path / "one.onnx"), providers=["CPUExecutionProvider"])
    for got, expected in zip(session.run(None, {}), arrays.values(), strict=True):
        assert np.array_equal(got, expected)
        assert got.dtype == expected.dtype


def test_the_table_names_every_variant(exported):
    text = table(read_bundle(exported[1]).manifest)
    assert all(v.name in text for v in VARIANTS)
    assert "FAILED" not in text
