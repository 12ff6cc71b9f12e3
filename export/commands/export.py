"""The command hcmen-export."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hcmen.base.console import Choice, Console, VariantChoice, command
from hcmen.base.manifest import PRECISIONS
from hcmen.base.modalities import variant_named
from hcmen.base.shipped import BUNDLE, chosen_checkpoint
from hcmen.base.tables import screen_width
from hcmen.base.typed import as_typed, from_here
from hcmen.export.bundle import export_bundle
from hcmen.export.report import table

__all__ = ["main"]


@command(
    "hcmen-export",
    examples=(
        "hcmen-export --variant audio_missing",
        "hcmen-export --checkpoint build/train --bundle build/bundle",
        "hcmen-export --precision int8 --data mosi.pkl",
    ),
    groups={
        "What is exported": ("checkpoint", "variants", "precision", "data"),
        "Where to": ("bundle", "force", "triton", "triton_root"),
    },
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="The folder that hcmen-train wrote.  [default: build/train if it is there, else the demo's]",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Where the bundle is put, whole or not at all.  [default: build/bundle, or build/bundle-PRECISION]",
)
@click.option(
    "--variant",
    "variants",
    type=VariantChoice(),
    multiple=True,
    help="A variant to export; repeatable. What else a bundle of this checkpoint has stays.  [default: all it serves]",
)
@click.option(
    "--precision",
    type=Choice(list(PRECISIONS)),
    default="fp32",
    show_default=True,
    help="Of the graphs and weights. fp16: weights stored in half the bytes. int8: linear layers multiply integers.",
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
@click.option(
    "--force",
    is_flag=True,
    help="Replace what is at --bundle or --triton, even if it is of another checkpoint or something else.",
)
def main(
    console: Console,
    checkpoint: Path | None,
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
    chosen = [variant_named(name) for name in dict.fromkeys(variants)] or None
    checkpoint = chosen_checkpoint(checkpoint, console.note)
    bundle = bundle or (BUNDLE if precision == "fp32" else BUNDLE.with_name(f"{BUNDLE.name}-{precision}"))
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
        table(manifest, screen_width())
        + f"\n\nBundle: {bundle}\nNext:   {_next(checkpoint, bundle)}"
        + ("" if models is None else f"\nTriton: {triton}, {len(models)} models, to be mounted at {triton_root}"),
    )


def _next(checkpoint: Path, bundle: Path) -> str:
    """What to type next: it scores a clip that training left beside the checkpoint, or else the golden set."""
    clip = next(iter(sorted((checkpoint / "clips").glob("*.npz"))), None)
    return as_typed("hcmen-run", "--self-test" if clip is None else from_here(clip), "--bundle", from_here(bundle))


def _write_triton(bundle: Path, target: Path, server_root: str, force: bool) -> list[str]:
    from hcmen.base.bundle import read_bundle
    from hcmen.export.triton import write_repository

    return write_repository(read_bundle(bundle), target, server_root=server_root, force=force)
