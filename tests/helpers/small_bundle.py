"""A small bundle made by hand, with the onnx package and without PyTorch, and its meaning in NumPy.

Per present modality m: mean over the valid steps, times a weight vector -> contribution c_m; score = sum of c_m + bias;
modality_weights = softmax of c_m over the present modalities, 0 for the absent. Standard operators only, all weights in
weights.bin, so that the runtime can be tested before and apart from the model, the exporter and the kernels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from hcmen.base.bundle import Bundle, file_record, write_manifest, writing_bundle
from hcmen.base.engines import EngineRecord
from hcmen.base.inputs import FeatureConfig, Inputs
from hcmen.base.manifest import Manifest, ModelRecord, VariantRecord
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.base.records import FileRecord

INPUTS = Inputs(FeatureConfig(6, 12), FeatureConfig(3, 20), FeatureConfig(4, 15))
BIAS = 0.25


def weights() -> dict[str, np.ndarray]:
    """modality -> weight vector [features]."""
    rng = np.random.default_rng(7)
    return {m: rng.normal(size=INPUTS.modality(m).features).astype(np.float32) for m in MODALITIES}


def clip_arrays(seed: int = 0, present: tuple[str, ...] = MODALITIES, **lengths: int) -> dict[str, np.ndarray]:
    """Features of one random clip; `text=3` fixes a length."""
    rng = np.random.default_rng(seed)
    arrays = {}
    for m in present:
        sizes = INPUTS.modality(m)
        steps = lengths.get(m, int(rng.integers(1, sizes.max_steps + 1)))
        arrays[m] = rng.normal(size=(steps, sizes.features)).astype(np.float32)
    return arrays


def expected(features: Mapping[str, np.ndarray], variant: str) -> tuple[float, np.ndarray]:
    """(score, modality_weights [3]) of one clip, in float64."""
    present = variant_named(variant).present
    w = weights()
    c = np.array([np.mean(features[m].astype(np.float64), axis=0) @ w[m].astype(np.float64) for m in present])
    soft = np.exp(c - c.max())
    soft /= soft.sum()
    full = np.zeros(3)
    full[[MODALITIES.index(m) for m in present]] = soft
    return float(c.sum() + BIAS), full


def graph(variant: str, *, domain: str = "", location: str = "weights.bin") -> ModelProto:
    """The graph of `variant`; weight vectors of all modalities lie one after the other in `location`."""
    present = variant_named(variant).present
    nodes, initializers, contributions = [], [], []
    offset = 0
    where = {}
    for m in MODALITIES:
        where[m] = offset
        offset += INPUTS.modality(m).features * 4

    def constant(name: str, value: np.ndarray) -> str:
        initializers.append(numpy_helper.from_array(value, name))
        return name

    zero, one = constant("zero", np.array(0, np.int64)), constant("one", np.array(1, np.int64))
    axis1, axis2 = constant("axis1", np.array([1], np.int64)), constant("axis2", np.array([2], np.int64))
    for m in present:
        n = INPUTS.modality(m).features
        tensor = TensorProto(name=f"{m}.weight", data_type=TensorProto.FLOAT, dims=[n, 1], data_location=1)
        for key, value in (("location", location), ("offset", str(where[m])), ("length", str(4 * n))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
        initializers.append(tensor)
        add = lambda op, inputs, out, **k: nodes.append(helper.make_node(op, inputs, [out], **k))  # noqa: E731
        add("Shape", [m], f"{m}.time1", start=1, end=2)
        add("Squeeze", [f"{m}.time1"], f"{m}.time")
        add("Range", [zero, f"{m}.time", one], f"{m}.steps")
        add("Unsqueeze", [f"{m}_length", axis1], f"{m}.l1")
        add("Less", [f"{m}.steps", f"{m}.l1"], f"{m}.valid")
        add("Cast", [f"{m}.valid"], f"{m}.mask", to=TensorProto.FLOAT)
        add("Unsqueeze", [f"{m}.mask", axis2], f"{m}.mask3")
        add("Mul", [m, f"{m}.mask3"], f"{m}.masked")
        add("ReduceSum", [f"{m}.masked", axis1], f"{m}.sum", keepdims=0)
        add("Cast", [f"{m}.l1"], f"{m}.count", to=TensorProto.FLOAT)
        add("Div", [f"{m}.sum", f"{m}.count"], f"{m}.mean")
        add("MatMul", [f"{m}.mean", f"{m}.weight"], f"{m}.c", domain=domain)
        contributions.append(f"{m}.c")
    place = np.zeros((len(present), 3), np.float32)
    for row, m in enumerate(present):
        place[row, MODALITIES.index(m)] = 1
    constant("place", place)
    constant("bias", np.array(BIAS, np.float32))
    nodes += [
        helper.make_node("Concat", contributions, ["c"], axis=1),
        helper.make_node("ReduceSum", ["c", axis1], ["total"], keepdims=0),
        helper.make_node("Add", ["total", "bias"], ["score"]),
        helper.make_node("Softmax", ["c"], ["soft"], axis=1),
        helper.make_node("MatMul", ["soft", "place"], ["modality_weights"]),
    ]
    types = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
    made = helper.make_graph(
        nodes,
        variant,
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in INPUTS.of_variant(variant)],
        [helper.make_tensor_value_info(t.name, types[t.dtype], t.shape) for t in INPUTS.outputs],
        initializers,
    )
    opsets = [helper.make_opsetid("", 19), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=opsets, ir_version=9)


def golden(variant: str, cases: int = 4) -> dict[str, np.ndarray]:
    """The content of golden/<variant>.npz: ragged batches of 1, 2, 3, ... clips with the NumPy outputs."""
    from hcmen.base.clip import Clip, batch_clips

    arrays: dict[str, np.ndarray] = {}
    present = variant_named(variant).present
    for i in range(cases):
        clips = [Clip(f"{i}.{j}", clip_arrays(100 * i + j, present)) for j in range(i + 1)]
        answers = [expected(c.features, variant) for c in clips]
        outputs = {
            "score": np.array([a[0] for a in answers], np.float32),
            "modality_weights": np.array([a[1] for a in answers], np.float32),
        }
        for name, value in {**batch_clips(clips, present), **outputs}.items():
            arrays[f"{i:03d}/{name}"] = value
    return arrays


def manifest(folder: Path, names: tuple[str, ...], **changes: Any) -> Manifest:
    """The manifest of the files that lie in `folder`."""
    fields: dict[str, Any] = {
        "inputs": INPUTS,
        "model": ModelRecord("by hand", {"bias": BIAS}),
        "normalisation": {
            m: {"mean": (0.0,) * INPUTS.modality(m).features, "std": (1.0,) * INPUTS.modality(m).features}
            for m in MODALITIES
        },
        "weights": file_record(folder / "weights.bin", folder),
        "variants": {
            name: VariantRecord(
                graph=file_record(folder / f"{name}.onnx", folder),
                golden=file_record(folder / "golden" / f"{name}.npz", folder),
                inputs=INPUTS.of_variant(name),
                outputs=INPUTS.outputs,
                parity={"passed": True, "atol": 1e-5, "rtol": 1e-5, "cases": 4, "clips": 10, "outputs": {}},
            )
            for name in names
        },
        "versions": {"hcmen": "0.1.0", "numpy": np.__version__},
        "source": {"checkpoint_sha256": "0" * 64, "epoch": 1},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return Manifest(**{**fields, **changes})


def make_bundle(
    path: Path,
    names: tuple[str, ...] = tuple(v.name for v in VARIANTS),
    *,
    graphs: Mapping[str, ModelProto] | None = None,
    scale: float = 1.0,
    **changes: Any,
) -> Path:
    """Writes the bundle to `path`.

    Args:
        graphs: replaces graphs by name. scale: multiplies the weights on disk; the golden set stays as it was, so that
            any scale but 1 makes a bundle whose self-test fails. changes: fields of the manifest.
    """
    w = weights()
    with writing_bundle(path) as folder:
        (folder / "weights.bin").write_bytes(b"".join((w[m] * np.float32(scale)).tobytes() for m in MODALITIES))
        (folder / "golden").mkdir()
        for name in names:
            proto = (graphs or {}).get(name) or graph(name)
            (folder / f"{name}.onnx").write_bytes(proto.SerializeToString())
            np.savez(folder / "golden" / f"{name}.npz", **golden(name))
        write_manifest(folder, manifest(folder, names, **changes))
    return path


def engine_record(bundle: Bundle, content: bytes, variant: str = "full", **changes: Any) -> EngineRecord:
    """The record of an engine with that content, of `variant` as `bundle` has it; `changes`: of its other fields."""
    fields = {
        "variant": variant,
        "precision": "fp16",
        "capabilities": (87,),
        "tensorrt": "10.3.0",
        "machine": "aarch64",
        "plugin": "library",
        "plugin_embedded": False,
        "version_compatible": False,
        "hardware_compatible": True,
        "max_batch": 32,
        "opt_batch": 8,
        "graph_sha256": bundle.manifest.variants[variant].graph.sha256,
        "weights_sha256": bundle.manifest.weights.sha256,
        "created": "2026-01-01T00:00:00+00:00",
        "parity": {"passed": True},
        "flavour": "tensorrt",
        **changes,
    }
    parts = ("variant", "precision", "capabilities", "tensorrt", "flavour")
    name = EngineRecord.file_name(*(fields[key] for key in parts))
    return EngineRecord(engine=FileRecord(name, hashlib.sha256(content).hexdigest(), len(content)), **fields)
