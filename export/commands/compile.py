"""`hcmen-compile`: TensorRT engines of a bundle, on the device that will run them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hcmen.base.console import Choice, Console, VariantChoice, command
from hcmen.base.engines import PRECISIONS
from hcmen.base.errors import HcmenError, InputError
from hcmen.base.modalities import variant_named
from hcmen.base.records import MANIFEST_FILE
from hcmen.base.shipped import BUNDLE, DEMO, chosen_bundle
from hcmen.base.tables import fitted, screen_width
from hcmen.base.typed import as_typed, from_here

if TYPE_CHECKING:
    from hcmen.base.bundle import Bundle
    from hcmen.export.tensorrt import Built

__all__ = ["main"]

_EPILOG = (
    "An engine runs on the GPU model and the TensorRT version that built it: run this on every device. "
    "Exit codes: 0 ok, 1 parity failed, 2 bad input, 3 TensorRT, GPU or plugin missing, 5 a corrupt file."
)


@command(
    "hcmen-compile",
    epilog=_EPILOG,
    examples=("hcmen-compile --precision fp16", "hcmen-compile --bundle build/bundle --variant text_only"),
    groups={
        "What is compiled": ("named", "variants", "precision", "force"),
        "Engine": ("plugin", "max_batch", "opt_batch", "version_compatible", "hardware_compatible"),
        "Building": ("workspace", "timing_cache"),
    },
)
@click.argument("bundle", required=False, type=click.Path(path_type=Path), metavar="")
@click.option(
    "--bundle",
    "named",
    type=click.Path(path_type=Path),
    help="The folder that hcmen-export wrote.  [default: build/bundle, first a copy of the demo's]",
)
@click.option(
    "--variant",
    "variants",
    type=VariantChoice(),
    multiple=True,
    help="A variant to compile; repeatable. Default: all in the bundle.",
)
@click.option(
    "--precision",
    type=Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="What the engine computes in; its graphs are float32 ones.",
)
@click.option(
    "--plugin",
    type=Choice(["library", "aot", "function"]),
    default="library",
    show_default=True,
    help="What runs the hcmen ops: libhcmen_trt.so; kernels embedded in the engine (TensorRT 10.9 on); or standard "
    "operators, slow, with no plugin.",
)
@click.option(
    "--workspace", type=click.IntRange(min=1), metavar="MIB", help="Most scratch memory of a kernel. Default: no limit."
)
@click.option("--max-batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Most clips in one run.")
@click.option(
    "--opt-batch", type=click.IntRange(1, 4096), help="Clips in one run to tune for. Default: a quarter of the most."
)
@click.option("--version-compatible", is_flag=True, help="Let later versions of TensorRT load the engine too.")
@click.option("--hardware-compatible", is_flag=True, help="Let other GPUs from sm 80 on load it too; not on a Jetson.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="A file that makes the next build faster."
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
def main(
    console: Console,
    bundle: Path | None,
    named: Path | None,
    variants: tuple[str, ...],
    precision: str,
    plugin: str,
    workspace: int | None,
    max_batch: int,
    opt_batch: int | None,
    version_compatible: bool,
    hardware_compatible: bool,
    timing_cache: Path | None,
    force: bool,
) -> None:
    """Compiles the graphs of a bundle to TensorRT engines, for this GPU and this TensorRT.

    Without --bundle it is build/bundle, and where nothing is there the demo's is copied to it first.
    Every engine scores the golden set before it is kept. One that is further from the eager model than the bound allows
    is not written, and the exit code is 1. Needs no PyTorch.
    """
    from hcmen.base.bundle import read_bundle
    from hcmen.export.tensorrt import Compiler, Options

    options = Options(
        precision=precision,
        plugin=plugin,
        workspace_bytes=None if workspace is None else workspace << 20,
        max_batch=max_batch,
        opt_batch=opt_batch,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        timing_cache=timing_cache,
        force=force,
    )
    if bundle is not None and named is not None:
        raise InputError(f"{bundle} and --bundle {named} were given, expected one bundle: leave one out")
    bundle = chosen_bundle(named or bundle, console.note)
    opened = read_bundle(bundle)
    if opened.manifest.precision != "fp32":
        raise InputError(
            f"{bundle}: its graphs are {opened.manifest.precision}, engines of either precision are made from float32 "
            f"ones: compile a bundle of {as_typed('hcmen-export', '--precision', 'fp32')}"
        )
    chosen = [variant_named(name).name for name in dict.fromkeys(variants)] or list(opened.manifest.variants)
    for name in chosen:
        opened.variant(name)
    compiler = Compiler(opened, options, console)
    if bundle == DEMO / "bundle":
        # Engines lie in the bundle, and this one in the package.
        bundle = _copied(opened, console)
        compiler = Compiler(read_bundle(bundle), options, console)
    console.note(f"TensorRT {compiler.tensorrt.version}, GPU of sm {compiler.cuda.sm}, CUDA {compiler.cuda.runtime}")
    built: list[Built] = []
    for i, name in enumerate(chosen, 1):
        console.note(f"[{i}/{len(chosen)}] {name} {precision}")
        try:
            built.append(compiler.compile(name))
        except HcmenError:
            if built:
                console.note(f"{len(built)} of {len(chosen)} engines were written before this:")
                console.block("\n".join(_table(built)))
            raise
        if not built[-1].fresh:
            console.note(f"  {built[-1].record.engine.file} is there already; --force builds it again")
    console.emit(
        {
            "bundle": str(bundle),
            "engines": [{**b.record.to_json(), "fresh": b.fresh, "seconds": round(b.seconds, 3)} for b in built],
        },
        "\n".join([*_table(built), "", f"Next: {_next(bundle, chosen, opened, precision)}"]),
    )


def _copied(opened: Bundle, console: Console) -> Path:
    """Copies the verified files of a bundle, and its card, to build/bundle."""
    from hcmen.base.bundle import writing_bundle

    names = [record.file for record in opened.records()]
    with writing_bundle(BUNDLE) as folder:
        opened.verify()
        for name in (*names, MANIFEST_FILE, "README.md"):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(opened.path / name, folder / name)
    console.note(f"{BUNDLE}: a copy of the demo's bundle, for its engines")
    return BUNDLE


def _next(bundle: Path, compiled: Sequence[str], opened: Bundle, precision: str) -> str:
    """What to type next: the golden set through the engines."""
    variant = [] if len(compiled) == len(opened.manifest.variants) else ["--variant", compiled[0]]
    engines = ["--backend", "tensorrt", "--precision", precision]
    return as_typed("hcmen-run", "--self-test", "--bundle", from_here(bundle), *variant, *engines)


def _table(built: Sequence[Built]) -> list[str]:
    rows = [("variant", "engine", "size", "build", "max |difference|", "parity")]
    for b in built:
        score = b.record.parity["outputs"]["score"]
        build = f"{b.seconds:.1f} s" if b.fresh else "was there"
        size = f"{b.record.engine.bytes / 1024:.0f} KiB"
        rows.append((b.record.variant, b.record.engine.file, size, build, f"{score['max_abs']:.1e}", "ok"))
    return fitted(rows, screen_width(), least=("build", "size", "engine"))
