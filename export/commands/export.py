"""The command hcmen-export."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import click

from hcmen.base.console import Choice, Console, VariantChoice, command
from hcmen.base.errors import InputError
from hcmen.base.manifest import PRECISIONS
from hcmen.base.modalities import variant_named
from hcmen.base.shipped import BUNDLE, chosen_checkpoint
from hcmen.base.tables import aligned, screen_width
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
        "hcmen-export --onnx model.onnx --size time=256 --precision fp16 --out half.onnx",
    ),
    groups={
        "What is exported": ("checkpoint", "variants", "precision", "data"),
        "Where to": ("bundle", "force", "triton", "triton_root"),
        "A foreign graph": ("onnx_file", "out", "sizes", "ranges", "calibrate", "tolerance"),
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
    "--onnx",
    "onnx_file",
    metavar="FILE.onnx",
    help="A file such as hcmen-export-mamba writes, whose weights become fp16 or int8; not a checkpoint's.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE.onnx", help="Where the file made of --onnx goes.")
@click.option(
    "--size", "sizes", multiple=True, metavar="NAME=N", help="Of an open size of --onnx; repeatable. A batch is 1."
)
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="INPUT=A..B",
    help="Of the random whole numbers of an input. Default: the rows of the table it looks up, or 0..1.",
)
@click.option(
    "--calibrate",
    type=click.Path(path_type=Path),
    metavar="FILE.npz",
    help="Arrays by input name: what int8 takes its ranges from, and what the file is judged on. Default: random ones.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0),
    metavar="SHARE",
    help="By how much of its largest number an output of --onnx may move.  [default: 2e-2 with fp16, any with int8]",
)
@click.option(
    "--force",
    is_flag=True,
    help="Replace what is at --bundle, --triton or --out, even if it is of another checkpoint or something else.",
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
    onnx_file: str | None,
    out: Path | None,
    sizes: tuple[str, ...],
    ranges: tuple[str, ...],
    calibrate: Path | None,
    tolerance: float | None,
    force: bool,
) -> None:
    """Exports a trained checkpoint: one ONNX graph per variant, shared weights, golden outputs, a manifest.

    Every graph is run and compared with the eager PyTorch model before the bundle is put in place; if one is further
    away than the bound allows, nothing is written and the exit code is 1. fp16 and int8 must also leave the mean
    absolute error on the validation split where it is, within 0.5 % and 1 % of itself.

    A foreign graph, --onnx, has neither: it is told how far the outputs move, with the library and without.
    """
    if onnx_file is not None:
        bundles = {"--checkpoint": checkpoint, "--bundle": bundle, "--variant": variants or None}
        _refuse({**bundles, "--data": data, "--triton": triton}, "is of bundles, and --onnx names a file: leave it out")
        _reduce(console, onnx_file, out, precision, sizes, ranges, calibrate, tolerance, force)
        return
    foreign = {"--out": out, "--size": sizes or None, "--range": ranges or None}
    _refuse({**foreign, "--calibrate": calibrate, "--tolerance": tolerance}, "is of a foreign graph: name it by --onnx")
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


def _refuse(given: Mapping[str, object], why: str) -> None:
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} {why}")


def _reduce(
    console: Console,
    path: str,
    out: Path | None,
    precision: str,
    sizes: Sequence[str],
    ranges: Sequence[str],
    calibrate: Path | None,
    tolerance: float | None,
    force: bool,
) -> None:
    """`--onnx`: the file in the precision, and how far its outputs moved."""
    from hcmen.export.foreign_precision import reduce_file
    from hcmen.runtime.foreign import parse_ranges, parse_sizes

    if precision == "fp32":
        raise InputError("--onnx without --precision", "fp16 or int8: the file is float32 as it is")
    if out is None:
        raise InputError("--onnx without --out", "where the new file goes")
    if out.exists() and not force:
        raise InputError(f"{out}: something is there already", "another --out, or --force")
    if calibrate is not None and (sizes or ranges):
        raise InputError("--calibrate brings its own inputs: leave out --size and --range")
    numbers, spans = parse_sizes(sizes), parse_ranges(ranges)
    found = reduce_file(path, out, precision, sizes=numbers, ranges=spans, calibrate=calibrate, tolerance=tolerance)
    ways = list(next(iter(found.moved.values()), {}))
    rows = [["output moves by", *ways]] + [
        [name, *(f"{moved[way]:.1e}" for way in ways)] for name, moved in found.moved.items()
    ]
    inputs = "random inputs" if calibrate is None else str(calibrate)
    size = f"{found.before} bytes before, {found.after} after ({found.after / found.before:.0%})"
    layers = f"; {len(found.layers)} weights are multiplied as integers" if precision == "int8" else ""
    told = [*aligned(rows), "", f"of its largest number, on {inputs}; {size}{layers}", f"File: {out}"]
    if precision == "int8" and tolerance is None:
        console.note("no bound was named: whether this is near enough is yours to judge (--tolerance)")
    console.emit(
        {
            "onnx": path,
            "out": str(out),
            "precision": precision,
            "inputs": inputs,
            "bytes_before": found.before,
            "bytes_after": found.after,
            "outputs": found.moved,
            "int8_weights": found.layers,
        },
        "\n".join(told),
    )


def _next(checkpoint: Path, bundle: Path) -> str:
    """What to type next: it scores a clip that training left beside the checkpoint, or else the golden set."""
    clip = next(iter(sorted((checkpoint / "clips").glob("*.npz"))), None)
    return as_typed("hcmen-run", "--self-test" if clip is None else from_here(clip), "--bundle", from_here(bundle))


def _write_triton(bundle: Path, target: Path, server_root: str, force: bool) -> list[str]:
    from hcmen.base.bundle import read_bundle
    from hcmen.export.triton import write_repository

    return write_repository(read_bundle(bundle), target, server_root=server_root, force=force)
