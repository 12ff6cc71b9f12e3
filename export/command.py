"""`hcmen-export`: from a checkpoint folder to a bundle whose parity with the eager model is measured and recorded."""

from __future__ import annotations

import datetime
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hcmen
from hcmen.bundle import PRECISIONS
from hcmen.errors import CheckFailed, CorruptFileError, InputError, reason_of, unknown_name
from hcmen.files import read_small
from hcmen.modalities import VARIANTS, Variant, variant_named
from hcmen.runtime.cli import Choice, Console, aligned, command

if TYPE_CHECKING:
    from onnx import ModelProto

    from hcmen.bundle import Manifest
    from hcmen.clip import Clip
    from hcmen.export.reduced import LabelledData, Reduced
    from hcmen.model import HCMEN

__all__ = ["INT8_SLACK", "export_bundle", "main"]

INT8_SLACK = 1e-3
"""What is added to the bound of int8 graphs, for kernels that round a value to the step beside ours."""


@command("hcmen-export")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    default=Path("build/train"),
    show_default=True,
    help="The folder that hcmen-train wrote.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Where the bundle is put, whole or not at all.  [default: build/bundle, or build/bundle-PRECISION]",
)
@click.option("--variant", "variants", multiple=True, help="A variant to export; repeatable. Default: all seven.")
@click.option(
    "--precision",
    type=Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="fp16: weights stored in half the bytes. int8: linear layers multiply integers.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="MMSA data file (.pkl) that judges fp16 and int8; what the checkpoint was trained on if not given.",
)
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    help="Also write a model repository for Triton Inference Server into this folder.",
)
@click.option(
    "--triton-root", default="/models", show_default=True, help="The path under which the server sees that folder."
)
@click.option("--force", is_flag=True, help="Replace a folder at --bundle or --triton even if it is something else.")
def main(
    console: Console,
    checkpoint: Path,
    bundle: Path | None,
    variants: tuple[str, ...],
    precision: str,
    data: Path | None,
    triton: Path | None,
    triton_root: str,
    force: bool,
) -> None:
    """Exports a trained checkpoint: one ONNX graph per variant, shared weights, golden outputs, a manifest.

    Every graph is run and compared with the eager PyTorch model before the bundle is put in place; if one is further
    away than the bound allows, nothing is written and the exit code is 1. fp16 and int8 must also leave the mean
    absolute error on the validation split where it is, within 0.5 % and 1 % of itself.
    """
    # Threads that spin while they wait make each other wait on shared cores; read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    chosen = [variant_named(name) for name in dict.fromkeys(variants)] or list(VARIANTS)
    bundle = bundle or Path("build/bundle" if precision == "fp32" else f"build/bundle-{precision}")
    manifest = export_bundle(checkpoint, bundle, chosen, precision=precision, data=data, console=console, force=force)
    models = _write_triton(bundle, triton, triton_root, force) if triton is not None else None
    rows = {name: v.parity for name, v in manifest.variants.items()}
    console.emit(
        {
            "bundle": str(bundle),
            "precision": precision,
            "variants": {
                name: {"bytes": manifest.variants[name].graph.bytes, "parity": dict(parity)}
                for name, parity in rows.items()
            },
            "weights_bytes": manifest.weights.bytes,
            **({} if models is None else {"triton": {"repository": str(triton), "models": models}}),
        },
        _table(manifest)
        + f"\n\nBundle: {bundle}\nNext:   hcmen-run CLIP.npz --bundle {bundle}"
        + ("" if models is None else f"\nTriton: {triton}, {len(models)} models, to be mounted at {triton_root}"),
    )


def _write_triton(bundle: Path, target: Path, server_root: str, force: bool) -> list[str]:
    from hcmen.bundle import read_bundle
    from hcmen.export.triton import write_repository

    return write_repository(read_bundle(bundle), target, server_root=server_root, force=force)


def _table(manifest: Manifest) -> str:
    if manifest.precision != "fp32":
        return _reduced_table(manifest)
    header = ("variant", "graph", "cases", "max |difference|", "mean", "p99", "cosine", "NaN", "parity")
    lines = [header]
    for name, v in manifest.variants.items():
        score = v.parity["outputs"]["score"]
        lines.append(
            (
                name,
                f"{v.graph.bytes / 1024:.0f} KiB",
                str(v.parity["cases"]),
                _figure(score["max_abs"]),
                _figure(score["mean_abs"]),
                _figure(score["p99_abs"]),
                _figure(score["cosine"], ".9f"),
                str(score["nan"]),
                "ok" if v.parity["passed"] else "FAILED",
            )
        )
    weights = f"weights.bin {manifest.weights.bytes / 1024:.0f} KiB, shared by all variants"
    return "\n".join([*aligned(lines), "", weights])


def _reduced_table(manifest: Manifest) -> str:
    """What a precision costs and gains, beside float32."""
    header = (
        *("variant", "graph + weights", "of fp32", "latency", "of fp32", "max |difference|"),
        *("MAE eager", f"MAE {manifest.precision}", "moved", "parity"),
    )
    lines, slower = [header], []
    for name, v in manifest.variants.items():
        size, time, metric = v.parity["bytes"], v.parity["latency"], v.parity["metric"]
        if time["slower"]:
            slower.append(name)
        lines.append(
            (
                name,
                f"{size['got'] / 1024:.0f} KiB",
                f"{size['got'] / size['fp32']:.0%}",
                f"{time['got_ms']:.2f} ms",
                f"{time['ratio']:.2f} x",
                _figure(v.parity["max_abs"]),
                f"{metric['eager']:.4f}",
                _figure(metric["got"], ".4f"),
                _figure(metric["change"], "+.2%"),
                "ok" if v.parity["passed"] else "FAILED",
            )
        )
    first = next(iter(manifest.variants.values())).parity
    kept = {name for v in manifest.variants.values() for name in v.parity["layers"]["kept_in_float"]}
    notes = [
        f"weights.bin {manifest.weights.bytes / 1024:.0f} KiB, shared by all variants",
        f"Latency: processor time of one full-length clip on one thread, medians of "
        f"{first['latency']['turns']} turns with float32. MAE: {first['metric']['clips']} validation clips.",
    ]
    if kept:
        notes.append(f"Left in float, since {manifest.precision} moved the MAE too far: {', '.join(sorted(kept))}")
    if slower:
        notes.append(f"{manifest.precision} is slower than fp32 on this machine for {', '.join(slower)}.")
    return "\n".join([*aligned(lines), "", *notes])


def _figure(value: float | None, form: str = ".1e") -> str:
    """A figure of a parity report; there is none where NaN left nothing to measure."""
    return "none" if value is None else format(value, form)


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    variants: Sequence[Variant] = VARIANTS,
    *,
    precision: str = "fp32",
    data: Path | None = None,
    console: Console | None = None,
    force: bool = False,
) -> Manifest:
    """Writes the bundle of a checkpoint folder and returns its manifest, measured parity included.

    Args:
        checkpoint, bundle: the folders. variants: which graphs.
        precision: one of hcmen.bundle.PRECISIONS.
        data: an MMSA file or folder that judges fp16 and int8; what the checkpoint was trained on if None.
        force: replace a folder at `bundle` that is no bundle, too.

    Raises:
        InputError, CorruptFileError: the checkpoint is missing or damaged, or something else is at `bundle`; the data
            is missing, does not fit, or is not needed; a weight is beyond float16.
        BackendError: a graph cannot be exported or run here.
        CheckFailed: a graph differs from the eager model by more than the bound; nothing is written.
        OSError: the bundle cannot be written.
    """
    from hcmen.bundle import write_manifest, writing_bundle
    from hcmen.checkpoint import load_checkpoint
    from hcmen.export.parity import parity_clips
    from hcmen.export.to_onnx import export_variant

    console = console or Console(verbosity=-1)
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    if precision == "fp32" and data is not None:
        raise InputError(f"--data {data} judges --precision fp16 and int8, fp32 needs none: leave it out")
    model, about = load_checkpoint(checkpoint)
    labelled = None if precision == "fp32" else _labelled(checkpoint, about, model, data, console)
    clips = parity_clips(model.config, _recorded_clips(checkpoint, model))
    with writing_bundle(bundle, force=force) as folder:
        graphs = {}
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] tracing {variant.name}")
            graphs[variant] = export_variant(model, variant)
        (folder / "golden").mkdir()
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] eager outputs of {variant.name}, in float32 and float64")
            _write_golden(model, variant, clips, folder)
        if model.config.text_encoder is not None:
            _copy_tokenizer(checkpoint, folder, console)

        def manifest_of(parity: Mapping[str, Mapping[str, Any]]) -> Manifest:
            return _manifest(model, about, checkpoint, folder, precision, parity)

        if labelled is None:
            parity = _measured(folder, {v.name: graph for v, graph in graphs.items()}, len(clips), manifest_of, console)
        else:
            from hcmen.export.reduced import Reduced

            reduced = Reduced(model, graphs, precision, labelled, console)
            parity = _judged(folder, model, graphs, reduced, labelled, clips, manifest_of, console)
        manifest = manifest_of(parity)
        if not all(p["passed"] for p in parity.values()):
            console.block(_table(manifest))
            raise CheckFailed(_failure(precision, parity))
        write_manifest(folder, manifest)
    return manifest


def _labelled(
    checkpoint: Path, about: Mapping[str, Any], model: HCMEN, data: Path | None, console: Console
) -> LabelledData:
    from hcmen.data.trained_on import dataset_of
    from hcmen.export.reduced import LabelledData

    return LabelledData(dataset_of(checkpoint, about, model.config, data, console.note, "judging"))


def _measured(
    folder: Path,
    graphs: Mapping[str, ModelProto],
    clips: int,
    manifest_of: Callable[[Mapping[str, Mapping[str, Any]]], Manifest],
    console: Console,
) -> dict[str, dict[str, Any]]:
    """Writes graphs and weights into `folder`; what they say to the golden set there, against the eager model."""
    from hcmen.bundle import write_manifest
    from hcmen.export.to_onnx import share_weights

    share_weights(graphs, folder)
    # The runtime reads nothing that no manifest lists, so the graphs are measured under a first one.
    unmeasured = manifest_of({name: {"passed": False} for name in graphs})
    if unmeasured.precision == "int8":
        # Its bound is what this measures: until then as wide as scores are.
        widest = {"passed": False, "atol": unmeasured.label_range[1] - unmeasured.label_range[0], "rtol": 0.0}
        unmeasured = manifest_of(dict.fromkeys(graphs, widest))
    write_manifest(folder, unmeasured)
    parity = {}
    for i, (name, report) in enumerate(_measure(folder, clips), 1):
        parity[name] = report
        worst = _figure(report["outputs"]["score"]["max_abs"])
        console.note(f"[{i}/{len(graphs)}] parity of {name}: largest score difference {worst}")
    return parity


def _judged(
    folder: Path,
    model: HCMEN,
    graphs: Mapping[Variant, ModelProto],
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
    from hcmen.evaluate import predict
    from hcmen.export.reduced import TIMED_TURNS, moved, side_by_side
    from hcmen.runtime import load

    eager = {v: predict(model, labelled.valid, v) for v in graphs}
    order: list[str] = []
    keep: list[str] = []
    while True:
        made = reduced.graphs(keep)
        size = {v: {"got": made[v.name].ByteSize(), "fp32": graph.ByteSize()} for v, graph in graphs.items()}
        parity = _measured(folder, made, len(clips), manifest_of, console)
        device = load(folder)
        for variant in graphs:
            report = parity[variant.name]
            got = _validation_scores(device, variant, labelled)
            metric = moved(labelled.valid.labels, eager[variant], got, reduced.precision, labelled.name)
            console.note(f"MAE of {variant.name}: {_figure(metric['change'], '+.2%')} of {metric['eager']:.4f}")
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


def _bound(report: dict[str, Any], model: HCMEN) -> None:
    """Gives an int8 record the bound that devices are held to: twice the largest difference that was seen here."""
    seen = [report["metric"]["max_abs"], *(o["max_abs"] for o in report["outputs"].values())]
    widest = model.config.label_max - model.config.label_min
    wanted = math.inf if None in seen else 2 * max(seen) + INT8_SLACK
    report |= {"passed": report["passed"] and wanted <= widest, "atol": min(wanted, widest), "rtol": 0.0}


def _recorded_clips(checkpoint: Path, model: HCMEN) -> list[Clip]:
    """The validation clips that training left beside the checkpoint; none is fine."""
    from hcmen.clip import read_clip

    return [read_clip(path, model.config) for path in sorted((checkpoint / "clips").glob("*.npz"))]


def _copy_tokenizer(checkpoint: Path, folder: Path, console: Console) -> None:
    """Copies the tokenizer that training left beside the checkpoint; without one the bundle takes token ids alone."""
    source = checkpoint / "tokenizer.json"
    if not source.is_file():
        console.warn(f"{source}: missing, so this bundle will take token ids and no words (hcmen-run --text)")
        return
    content = read_small(source)
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(
            f"{source}: not JSON ({reason_of(error, 100)}): train again, or restore the file"
        ) from error
    (folder / "tokenizer.json").write_bytes(content)


def _write_golden(model: HCMEN, variant: Variant, clips: Sequence[Clip], folder: Path) -> None:
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


def _failure(precision: str, parity: Mapping[str, Any]) -> str:
    """The line that tells of the worst output; NaN is worse than any difference."""
    moved_far = [v for v, p in parity.items() if not p["passed"] and not p.get("metric", {"passed": True})["passed"]]
    if moved_far:
        return _metric_failure(precision, moved_far, parity)

    def severity(place: tuple[str, str]) -> float:
        required = parity[place[0]]["outputs"][place[1]]["required_atol"]
        return math.inf if required is None else float(required)

    failed = [name for name, p in parity.items() if not p["passed"]]
    name, output = max(((v, o) for v in failed for o in parity[v]["outputs"]), key=severity)
    report = parity[name]["outputs"][output]
    where = f"parity failed for {', '.join(failed)}: {output} of '{name}' is"
    if report["nan"]:
        worst = report["worst"]
        return f"{where} {worst['got']} at {worst['index']}, expected {worst['expected']}; no bundle was written"
    return (
        f"{where} off by {report['max_abs']:.1e} at {report['worst']['index']}, "
        f"it would pass with atol {report['required_atol']:.1e}; no bundle was written"
    )


def _metric_failure(precision: str, failed: Sequence[str], parity: Mapping[str, Any]) -> str:
    """The line that tells of the variant whose mean absolute error moved furthest."""
    change = {v: parity[v]["metric"]["change"] for v in failed}
    name = max(failed, key=lambda v: math.inf if change[v] is None else abs(change[v]))
    metric = parity[name]["metric"]
    advice = "use --precision fp32" if precision == "fp16" else "use --precision fp16 or fp32"
    if metric["nan"]:
        what = f"{metric['nan']} of {metric['clips']} scores of '{name}' are NaN or infinite in {precision}"
        return f"{what}, expected numbers; no bundle was written: {advice}"
    how_far = f"{metric['change']:+.2%}, {metric['eager']:.4f} to {metric['got']:.4f}"
    return (
        f"{precision} moves the MAE of {', '.join(failed)} too far: of '{name}' by {how_far} on {metric['clips']} "
        f"validation clips, allowed {metric['bound']:.1%}; no bundle was written: {advice}"
    )


def _manifest(
    model: HCMEN,
    about: Mapping[str, Any],
    checkpoint: Path,
    folder: Path,
    precision: str,
    parity: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    import numpy as np
    import onnx
    import torch

    from hcmen.bundle import Manifest, VariantRecord, expected_inputs, expected_outputs, file_record
    from hcmen.export.to_onnx import IR_VERSION, OPSET

    tokenizer = folder / "tokenizer.json"
    return Manifest(
        model=model.config,
        label_range=(model.config.label_min, model.config.label_max),
        normalisation={
            m: {key: tuple(getattr(encoder, key).tolist()) for key in ("mean", "std")}
            for m, encoder in model.encoders.items()
        },
        weights=file_record(folder / "weights.bin", folder),
        precision=precision,
        variants={
            name: VariantRecord(
                graph=file_record(folder / f"{name}.onnx", folder),
                golden=file_record(folder / "golden" / f"{name}.npz", folder),
                inputs=expected_inputs(model.config, name),
                outputs=expected_outputs(),
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
