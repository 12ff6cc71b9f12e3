"""From a checkpoint folder to a bundle whose parity with the eager model is measured and recorded."""

from __future__ import annotations

import datetime
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hcmen
from hcmen.base.console import Console
from hcmen.base.errors import CheckFailed, InputError, unknown_name
from hcmen.base.files import read_small, refused
from hcmen.base.manifest import PRECISIONS
from hcmen.base.modalities import VARIANTS, Variant
from hcmen.base.records import MOST_MANIFEST_BYTES
from hcmen.export.card import CARD, card
from hcmen.export.report import failure, figure, table
from hcmen.export.trained import trained
from hcmen.media.tokenizer_file import checked_tokenizer

if TYPE_CHECKING:
    from onnx import ModelProto

    from hcmen.base.clip import Clip
    from hcmen.base.inputs import Inputs
    from hcmen.base.manifest import Manifest
    from hcmen.export.kept import Kept
    from hcmen.export.reduced import LabelledData, Reduced
    from hcmen.export.trained import Trained

__all__ = ["INT8_SLACK", "export_bundle"]


INT8_SLACK = 1e-3
"""What is added to the bound of int8 graphs, for kernels that round a value to the step beside ours."""


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    variants: Sequence[Variant] | None = None,
    *,
    precision: str = "fp32",
    data: Path | None = None,
    console: Console | None = None,
    force: bool = False,
) -> Manifest:
    """Writes the bundle of a checkpoint folder and returns its manifest, measured parity included.

    Where a bundle of the same checkpoint and precision is there, its other variants stay.

    Args:
        checkpoint, bundle: the folders. variants: which graphs; all that the model serves if None.
        precision: one of hcmen.base.manifest.PRECISIONS.
        data: an MMSA file or folder that judges fp16 and int8; what the checkpoint was trained on if None.
        force: replace a folder at `bundle` that is no bundle, or a bundle whose variants cannot stay (kept.py).

    Raises:
        InputError, CorruptFileError: the checkpoint is missing or damaged, the model lacks a modality of a variant, or
            something else is at `bundle`, such as the bundle of another checkpoint; the data is missing, does not fit,
            or is not needed; a weight is beyond float16.
        BackendError: a graph cannot be exported or run here.
        CheckFailed: a graph differs from the eager model by more than the bound; nothing is written.
        OSError: the bundle cannot be written.
    """
    from hcmen.base.bundle import write_manifest, writing_bundle
    from hcmen.export.kept import kept_of
    from hcmen.export.parity import parity_clips
    from hcmen.export.variants import export_variant
    from hcmen.training.checkpoint import load_checkpoint

    console = console or Console(verbosity=-1)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "fp32" and data is not None:
        raise InputError(f"--data {data} judges --precision fp16 and int8, fp32 needs none: leave it out")
    model, about = load_checkpoint(checkpoint)
    inputs = model.config.inputs
    variants = inputs.variants if variants is None else variants
    for variant in variants:
        if variant not in inputs.variants:
            raise InputError(
                f"{checkpoint}: was trained on {' and '.join(inputs.modalities)}, and '{variant.name}' needs "
                f"{' and '.join(variant.present)}",
                fix=f"choose from {', '.join(v.name for v in inputs.variants)}",
            )
    training = trained(checkpoint, about)
    kept = kept_of(
        bundle,
        variants,
        checkpoint_sha256=about["weights"]["sha256"],
        precision=precision,
        inputs=model.config.inputs,
        force=force,
        note=console.note,
    )
    labelled = None if precision == "fp32" else _labelled(checkpoint, about, model, data, console)
    clips = parity_clips(model.config.inputs, _recorded_clips(checkpoint, model))
    with writing_bundle(bundle, force=force) as folder:
        if model.config.inputs.text_tokens is not None:
            _copy_tokenizer(checkpoint, folder, kept, console)
        graphs = {}
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] tracing {variant.name}")
            graphs[variant] = export_variant(model, variant)
        (folder / "golden").mkdir()
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] eager outputs of {variant.name}, in float32 and float64")
            _write_golden(model, variant, clips, folder)
        kept.copy_golden(folder)

        def manifest_of(parity: Mapping[str, Mapping[str, Any]]) -> Manifest:
            return _manifest(model, about, training, folder, precision, parity)

        if labelled is None:
            made = {v.name: graph for v, graph in graphs.items()}
            parity = _measured(folder, made, kept, len(clips), manifest_of, console)
        else:
            from hcmen.export.reduced import Reduced

            reduced = Reduced(model, graphs, precision, labelled, console)
            parity = _judged(folder, model, graphs, kept, reduced, labelled, clips, manifest_of, console)
        manifest = manifest_of(parity)
        if not all(p["passed"] for p in parity.values()):
            console.block(table(manifest))
            raise CheckFailed(failure(precision, parity))
        write_manifest(folder, manifest)
        (folder / CARD).write_text(card(manifest, training), encoding="utf-8")
        kept.check_unchanged()
        kept.let_go()
    return manifest


def _labelled(
    checkpoint: Path, about: Mapping[str, Any], model: Any, data: Path | None, console: Console
) -> LabelledData:
    from hcmen.data.trained_on import dataset_of
    from hcmen.export.reduced import LabelledData

    return LabelledData(dataset_of(checkpoint, about, model.config.inputs, data, console.note, "judging"))


def _measured(
    folder: Path,
    graphs: Mapping[str, ModelProto],
    kept: Kept,
    clips: int,
    manifest_of: Callable[[Mapping[str, Mapping[str, Any]]], Manifest],
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Writes graphs and weights into `folder`; what they say to the golden set there, against the eager model.

    The graphs that stay are run as well, since their weights have moved; their records stay as they were.
    """
    from hcmen.base.bundle import write_manifest
    from hcmen.mamba.graph import share_weights

    every = {**graphs, **kept.graphs()}
    # In one order, so that a bundle made variant by variant is the one that is made at once.
    share_weights({v.name: every[v.name] for v in VARIANTS if v.name in every}, folder)
    # The runtime reads nothing that no manifest lists, so the graphs are measured under a first one.
    unmeasured = manifest_of({**{name: {"passed": False} for name in graphs}, **kept.parity})
    if unmeasured.precision == "int8":
        # Its bound is what this measures: until then as wide as scores are.
        widest = {"passed": False, "atol": _label_width(unmeasured.inputs), "rtol": 0.0}
        unmeasured = manifest_of({**dict.fromkeys(graphs, widest), **kept.parity})
    write_manifest(folder, unmeasured)
    parity = {}
    for i, (name, report) in enumerate(_measure(folder, clips), 1):
        worst = figure(report["outputs"]["score"]["max_abs"])
        console.note(f"[{i}/{len(every)}] parity of {name}: largest score difference {worst}")
        if name in kept.names and not report["passed"]:
            raise CheckFailed(
                f"{kept.target}: '{name}', which would stay, no longer agrees with its golden set (largest score "
                f"difference {worst}): export all variants (leave --variant out)"
            )
        parity[name] = dict(kept.parity[name]) if name in kept.names else report
    return parity


def _judged(
    folder: Path,
    model: Any,
    graphs: Mapping[Variant, ModelProto],
    kept: Kept,
    reduced: Reduced,
    labelled: LabelledData,
    clips: Sequence[Clip],
    manifest_of: Callable[[Mapping[str, Mapping[str, Any]]], Manifest],
    console: Console,
) -> dict[str, dict[str, Any]]:
    """As `_measured`, for a reduced precision: judged by labelled data too, and timed beside float32.

    Where int8 moves the mean absolute error too far, the layers that move scores most go back to float: the first, the
    first two, four, and so on, up to half of them.
    """
    from hcmen.export.reduced import TIMED_TURNS, moved, side_by_side
    from hcmen.runtime import load
    from hcmen.training.evaluate import predict

    eager = {v: predict(model, labelled.valid, v) for v in graphs}
    order: list[str] = []
    keep: list[str] = []
    while True:
        made = reduced.graphs(keep)
        size = {v: {"got": made[v.name].ByteSize(), "fp32": graph.ByteSize()} for v, graph in graphs.items()}
        parity = _measured(folder, made, kept, len(clips), manifest_of, console)
        device = load(folder)
        for variant in graphs:
            report = parity[variant.name]
            got = _validation_scores(device, variant, labelled)
            metric = moved(labelled.valid.labels, eager[variant], got, reduced.precision, labelled.name)
            console.note(f"MAE of {variant.name}: {figure(metric['change'], '+.2%')} of {metric['eager']:.4f}")
            differences = [report["outputs"]["score"]["max_abs"], metric["max_abs"]]
            report |= {
                "passed": report["passed"] and metric["passed"],
                "max_abs": None if None in differences else max(differences),
                "metric": metric,
                "bytes": size[variant],
                "layers": reduced.layers(variant, keep),
            }
        failed = [v for v in graphs if not parity[v.name]["metric"]["passed"]]
        if not failed or reduced.precision != "int8":
            break
        if not order:
            worst = max(failed, key=lambda v: abs(parity[v.name]["metric"]["change"] or math.inf))
            console.note(f"int8 moves the MAE of {worst.name} too far, measuring which layers to leave in float")
            order = reduced.by_sensitivity(worst)
        if 2 * len(keep) > len(order) // 2:
            break
        keep = order[: max(1, 2 * len(keep))]
    made = reduced.graphs(keep)
    for i, (variant, graph) in enumerate(graphs.items(), 1):
        console.note(f"[{i}/{len(graphs)}] timing {variant.name} beside float32")
        latency = side_by_side(made[variant.name], graph, clips[1], variant)
        parity[variant.name]["latency"] = {
            "fp32_ms": 1e3 * latency.other,
            "got_ms": 1e3 * latency.seconds,
            "ratio": latency.ratio,
            "slower": latency.slower,
            "threads": 1,
            "turns": TIMED_TURNS,
        }
        if reduced.precision == "int8":
            _bound(parity[variant.name], model)
    return parity


def _validation_scores(device: Any, variant: Variant, labelled: LabelledData) -> Any:
    import numpy as np

    return np.concatenate([device.run(variant.name, inputs)["score"] for inputs in labelled.validation(variant)])


def _label_width(inputs: Inputs) -> float:
    return inputs.label_max - inputs.label_min


def _bound(report: dict[str, Any], model: Any) -> None:
    """Gives an int8 record the bound that devices are held to: twice the largest difference that was seen here."""
    seen = [report["metric"]["max_abs"], *(o["max_abs"] for o in report["outputs"].values())]
    widest = _label_width(model.config.inputs)
    wanted = math.inf if None in seen else 2 * max(seen) + INT8_SLACK
    report |= {"passed": report["passed"] and wanted <= widest, "atol": min(wanted, widest), "rtol": 0.0}


def _recorded_clips(checkpoint: Path, model: Any) -> list[Clip]:
    """The validation clips that training left beside the checkpoint; none is fine."""
    from hcmen.base.clip import read_clip

    return [read_clip(path, model.config.inputs) for path in sorted((checkpoint / "clips").glob("*.npz"))]


def _copy_tokenizer(checkpoint: Path, folder: Path, kept: Kept, console: Console) -> None:
    """Copies the tokenizer that training left beside the checkpoint; without one the bundle takes token ids alone."""
    source = checkpoint / "tokenizer.json"
    if not os.path.lexists(source):
        there = kept.tokenizer()
        if there is not None:
            (folder / "tokenizer.json").write_bytes(there)
            return
        console.warn(f"{source}: missing, so this bundle will take token ids and no words (hcmen-run --text)")
        return
    fix = "train again, or restore the file"
    with refused(source, "a tokenizer", fix):
        content = read_small(source, MOST_MANIFEST_BYTES)
    checked_tokenizer(content, str(source), fix)
    (folder / "tokenizer.json").write_bytes(content)


def _write_golden(model: Any, variant: Variant, clips: Sequence[Clip], folder: Path) -> None:
    import numpy as np

    from hcmen.export.parity import golden_cases

    cases = enumerate(golden_cases(model, variant, clips))
    arrays = {f"{i:03d}/{name}": array for i, case in cases for part in case for name, array in part.items()}
    np.savez_compressed(folder / "golden" / f"{variant.name}.npz", **arrays)


def _measure(folder: Path, clips: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Runs every graph on its golden inputs as a device would; the parity record of each variant."""
    from hcmen.runtime import load

    device = load(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*parity .* failed at export", RuntimeWarning)
        for test in device.self_test():
            atol, rtol = device.tolerance(test.variant)
            yield (
                test.variant,
                {
                    "passed": test.passed,
                    "atol": atol,
                    "rtol": rtol,
                    "cases": test.cases,
                    "clips": clips,
                    "outputs": {name: comparison.to_json() for name, comparison in test.outputs.items()},
                },
            )


def _manifest(
    model: Any,
    about: Mapping[str, Any],
    training: Trained,
    folder: Path,
    precision: str,
    parity: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    import numpy as np
    import onnx
    import torch

    from hcmen.base.bundle import file_record
    from hcmen.base.manifest import Manifest, ModelRecord, VariantRecord
    from hcmen.base.op import IR_VERSION, OPSET

    tokenizer, inputs = folder / "tokenizer.json", model.config.inputs
    return Manifest(
        inputs=inputs,
        model=ModelRecord(model.config.kind, model.config.to_json()),
        scores=training.scores,
        normalisation={
            m: {key: tuple(values) for key, values in found.items()} for m, found in model.normalisation().items()
        },
        weights=file_record(folder / "weights.bin", folder),
        precision=precision,
        front_ends=training.front_ends,
        variants={
            name: VariantRecord(
                graph=file_record(folder / f"{name}.onnx", folder),
                golden=file_record(folder / "golden" / f"{name}.npz", folder),
                inputs=inputs.of_variant(name),
                outputs=inputs.outputs,
                parity=report,
            )
            for name, report in parity.items()
        },
        versions={
            "hcmen": hcmen.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "numpy": np.__version__,
        },
        source={"checkpoint_sha256": about["weights"]["sha256"], "epoch": about.get("epoch")},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        opset=OPSET,
        ir_version=IR_VERSION,
        tokenizer=file_record(tokenizer, folder) if tokenizer.is_file() else None,
    )
