"""`hcmen-export`: from a checkpoint folder to a bundle whose parity with the eager model is measured and recorded."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import hcmen
from hcmen.errors import CheckFailed, CorruptFileError
from hcmen.modalities import VARIANTS, Variant, variant_named
from hcmen.runtime.cli import Console, aligned, command

if TYPE_CHECKING:
    from hcmen.bundle import Manifest
    from hcmen.clip import Clip
    from hcmen.model import HCMEN

__all__ = ["export_bundle", "main"]


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
    default=Path("build/bundle"),
    show_default=True,
    help="Where the bundle is put, whole or not at all.",
)
@click.option("--variant", "variants", multiple=True, help="A variant to export; repeatable. Default: all seven.")
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
    bundle: Path,
    variants: tuple[str, ...],
    triton: Path | None,
    triton_root: str,
    force: bool,
) -> None:
    """Exports a trained checkpoint: one ONNX graph per variant, shared weights, golden outputs, a manifest.

    Every graph is run and compared with the eager PyTorch model before the bundle is put in place; if one is further
    away than the bound allows, nothing is written and the exit code is 1.
    """
    # Threads that spin while they wait make each other wait on shared cores; read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    chosen = [variant_named(name) for name in dict.fromkeys(variants)] or list(VARIANTS)
    manifest = export_bundle(checkpoint, bundle, chosen, console=console, force=force)
    models = _write_triton(bundle, triton, triton_root, force) if triton is not None else None
    rows = {name: v.parity for name, v in manifest.variants.items()}
    console.emit(
        {
            "bundle": str(bundle),
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


def _figure(value: float | None, form: str = ".1e") -> str:
    """A figure of a parity report; there is none where NaN left nothing to measure."""
    return "none" if value is None else format(value, form)


def export_bundle(
    checkpoint: Path,
    bundle: Path,
    variants: Sequence[Variant] = VARIANTS,
    *,
    console: Console | None = None,
    force: bool = False,
) -> Manifest:
    """Writes the bundle of a checkpoint folder and returns its manifest, measured parity included.

    Raises:
        InputError, CorruptFileError: the checkpoint is missing or damaged, or something else is at `bundle`.
        BackendError: a graph cannot be exported or run here.
        CheckFailed: a graph differs from the eager model by more than the bound; nothing is written.
        OSError: the bundle cannot be written.
    """
    from hcmen.bundle import file_record, write_manifest, writing_bundle
    from hcmen.checkpoint import load_checkpoint
    from hcmen.export.parity import parity_clips
    from hcmen.export.to_onnx import export_variant, share_weights

    console = console or Console(verbosity=-1)
    model, about = load_checkpoint(checkpoint)
    clips = parity_clips(model.config, _recorded_clips(checkpoint, model))
    with writing_bundle(bundle, force=force) as folder:
        graphs = {}
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] tracing {variant.name}")
            graphs[variant.name] = export_variant(model, variant)
        share_weights(graphs, folder)
        (folder / "golden").mkdir()
        for i, variant in enumerate(variants, 1):
            console.note(f"[{i}/{len(variants)}] eager outputs of {variant.name}, in float32 and float64")
            _write_golden(model, variant, clips, folder)
        if model.config.text_encoder is not None:
            _copy_tokenizer(checkpoint, folder, console)
        # The runtime reads nothing that no manifest lists, so the graphs are measured under a first one.
        weights = file_record(folder / "weights.bin", folder)
        unmeasured = {v.name: {"passed": False} for v in variants}
        write_manifest(folder, _manifest(model, about, checkpoint, folder, weights, unmeasured))
        parity = {}
        for i, (name, report) in enumerate(_measure(folder, len(clips)), 1):
            parity[name] = report
            worst = _figure(report["outputs"]["score"]["max_abs"])
            console.note(f"[{i}/{len(variants)}] parity of {name}: largest score difference {worst}")
        manifest = _manifest(model, about, checkpoint, folder, weights, parity)
        failed = [name for name, p in parity.items() if not p["passed"]]
        if failed:
            console.block(_table(manifest))
            raise CheckFailed(_failure(failed, parity))
        write_manifest(folder, manifest)
    return manifest


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
    content = source.read_bytes()
    try:
        json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CorruptFileError(f"{source}: not JSON ({str(error)[:100]}): train again, or restore the file") from error
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
    from hcmen.runtime.compare import SCORE_ATOL, SCORE_RTOL

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*parity .* failed at export", RuntimeWarning)
        for test in load(folder).self_test():
            yield (
                test.variant,
                {
                    "passed": test.passed,
                    "atol": SCORE_ATOL,
                    "rtol": SCORE_RTOL,
                    "cases": test.cases,
                    "clips": clips,
                    "outputs": {name: comparison.to_json() for name, comparison in test.outputs.items()},
                },
            )


def _failure(failed: Sequence[str], parity: Mapping[str, Any]) -> str:
    """The line that tells of the worst output; NaN is worse than any difference."""

    def severity(place: tuple[str, str]) -> float:
        required = parity[place[0]]["outputs"][place[1]]["required_atol"]
        return math.inf if required is None else float(required)

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


def _manifest(
    model: HCMEN,
    about: Mapping[str, Any],
    checkpoint: Path,
    folder: Path,
    weights: Any,
    parity: Mapping[str, Mapping[str, Any]],
) -> Manifest:
    import numpy as np
    import onnx
    import torch

    from hcmen.bundle import Manifest, VariantRecord, expected_inputs, expected_outputs, file_record
    from hcmen.export.to_onnx import IR_VERSION, OPSET

    content = (checkpoint / "checkpoint.safetensors").read_bytes()
    tokenizer = folder / "tokenizer.json"
    return Manifest(
        model=model.config,
        label_range=(model.config.label_min, model.config.label_max),
        normalisation={
            m: {key: tuple(getattr(encoder, key).tolist()) for key in ("mean", "std")}
            for m, encoder in model.encoders.items()
        },
        weights=weights,
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
        source={"checkpoint_sha256": hashlib.sha256(content).hexdigest(), "epoch": about.get("epoch")},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        opset=OPSET,
        ir_version=IR_VERSION,
        tokenizer=file_record(tokenizer, folder) if tokenizer.is_file() else None,
    )
