"""`hcmen-compile`: engines of a bundle, of TensorRT on the device that will run them, of TensorRT-RTX anywhere."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hcmen.base.console import Choice, Console, VariantChoice, command
from hcmen.base.engines import FLAVOURS, PRECISIONS
from hcmen.base.errors import HcmenError, InputError, shown
from hcmen.base.modalities import variant_named
from hcmen.base.records import MANIFEST_FILE
from hcmen.base.shipped import BUNDLE, DEMO, chosen_bundle
from hcmen.base.tables import fitted, screen_width
from hcmen.base.typed import as_typed, from_here

if TYPE_CHECKING:
    from hcmen.base.bundle import Bundle
    from hcmen.export.engine_options import Options
    from hcmen.export.tensorrt import Built, Compiler
    from hcmen.runtime.backends.flavour import Flavour

__all__ = ["main"]


class _Targets(click.ParamType):
    name = "SM,..."

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if not isinstance(value, str):
            return tuple(value)  # type: ignore[arg-type]
        # int() takes other digits than these, underscores and signs.
        if re.fullmatch(r" *[0-9]{1,9} *(, *[0-9]{1,9} *)*", value):
            return tuple(map(int, value.split(",")))
        self.fail(f"{shown(value)}, expected compute capabilities, such as 86,89,120", param, ctx)


_MOST_CLIPS = 32

_EPILOG = (
    "An engine of TensorRT runs on the GPU model and the version that built it: run this on every device. One of "
    "TensorRT-RTX is built on any machine, without a GPU, and runs on every GPU of --target. "
    "Exit codes: 0 ok, 1 parity failed, 2 bad input, 3 TensorRT, GPU or plugin missing, 5 a corrupt file."
)


@command(
    "hcmen-compile",
    epilog=_EPILOG,
    examples=(
        "hcmen-compile --precision fp16",
        "hcmen-compile --backend tensorrt-rtx --target 86,89,120",
        "hcmen-compile --onnx model.onnx --size batch=1:4:8 --size time=16:64:512 --out model.engine",
    ),
    groups={
        "What is compiled": ("named", "variants", "precision", "force"),
        "Engine": (
            "backend",
            "targets",
            "plugin",
            "max_batch",
            "opt_batch",
            "profiles",
            "version_compatible",
            "hardware_compatible",
        ),
        "Building": ("workspace", "timing_cache"),
        "A foreign graph": ("onnx_file", "out", "sizes"),
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
    "--backend",
    type=Choice(list(FLAVOURS)),
    default="tensorrt",
    show_default=True,
    help="Which TensorRT builds them, and will run them.",
)
@click.option(
    "--target",
    "targets",
    type=_Targets(),
    default=(),
    help="With tensorrt-rtx: compute capabilities of the GPUs that an engine is for.  [default: all from 80 on]",
)
@click.option(
    "--plugin",
    type=Choice(["library", "aot", "function"]),
    help="What runs the hcmen ops: libhcmen_trt.so; kernels embedded in the engine (TensorRT 10.9 on); or standard "
    "operators, with no plugin.  [default: library; with tensorrt-rtx function, its only one]",
)
@click.option(
    "--workspace", type=click.IntRange(min=1), metavar="MIB", help="Most scratch memory of a kernel. Default: no limit."
)
@click.option(
    "--max-batch", type=click.IntRange(1, 4096), default=_MOST_CLIPS, show_default=True, help="Most clips in one run."
)
@click.option(
    "--opt-batch", type=click.IntRange(1, 4096), help="Clips in one run to tune for. Default: a quarter of the most."
)
@click.option(
    "--profiles",
    type=click.IntRange(1, 2),
    help="1: one for all batches; 2: one more for single clips, at twice the size.  [default: 2; with tensorrt-rtx 1]",
)
@click.option("--version-compatible", is_flag=True, help="Let later versions of TensorRT load the engine too.")
@click.option("--hardware-compatible", is_flag=True, help="Let other GPUs from sm 80 on load it too; not on a Jetson.")
@click.option(
    "--timing-cache", type=click.Path(path_type=Path, dir_okay=False), help="A file that makes the next build faster."
)
@click.option(
    "--onnx",
    "onnx_file",
    metavar="FILE.onnx",
    help="A file such as hcmen-export-mamba writes, in the place of a bundle. Its engine is not scored: nobody has "
    "golden outputs of it.",
)
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Where the engine of --onnx is put.")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="NAME=LEAST:BEST:MOST",
    help="Of an open size of --onnx; repeatable. NAME=N is one size alone.",
)
@click.option("--force", is_flag=True, help="Build again what is there already.")
def main(
    console: Console,
    bundle: Path | None,
    named: Path | None,
    variants: tuple[str, ...],
    precision: str,
    backend: str,
    targets: tuple[int, ...],
    plugin: str | None,
    workspace: int | None,
    max_batch: int,
    opt_batch: int | None,
    profiles: int | None,
    version_compatible: bool,
    hardware_compatible: bool,
    timing_cache: Path | None,
    onnx_file: str | None,
    out: Path | None,
    sizes: tuple[str, ...],
    force: bool,
) -> None:
    """Compiles the graphs of a bundle to TensorRT engines, for this GPU, or with tensorrt-rtx for those of --target.

    Without --bundle it is build/bundle, and where nothing is there the demo's is copied to it first.
    An engine of TensorRT scores the golden set before it is kept. One that is further from the eager model than the
    bound allows is not written, and the exit code is 1. One of TensorRT-RTX scores it where it is first run.
    Needs no PyTorch.
    """
    from hcmen.base.bundle import read_bundle
    from hcmen.export.engine_options import Options
    from hcmen.export.tensorrt import Compiler
    from hcmen.runtime.backends.flavour import FLAVOUR_OF

    options = Options(
        precision=precision,
        targets=targets,
        plugin=plugin,
        profiles=profiles,
        workspace_bytes=None if workspace is None else workspace << 20,
        max_batch=max_batch,
        opt_batch=opt_batch,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        timing_cache=timing_cache,
        force=force,
    )
    if onnx_file is not None:
        for option, given in (("--bundle", named or bundle), ("--variant", variants), ("--profiles", profiles)):
            if given:
                raise InputError(f"{option} is of bundles, and --onnx names a file: leave it out")
        if opt_batch is not None or max_batch != _MOST_CLIPS:
            raise InputError("--max-batch and --opt-batch are of bundles: say --size batch=LEAST:BEST:MOST")
        _compile_file(console, onnx_file, out, sizes, options, FLAVOUR_OF[backend])
        return
    if out is not None or sizes:
        raise InputError(f"{'--size' if sizes else '--out'} is of a foreign graph: name it by --onnx, or leave it out")
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
    compiler = Compiler(opened, options, console, FLAVOUR_OF[backend])
    if bundle == DEMO / "bundle":
        # Engines lie in the bundle, and this one in the package.
        bundle = _copied(opened, console)
        compiler = Compiler(read_bundle(bundle), options, console, FLAVOUR_OF[backend])
    console.note(_what_builds(compiler))
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
            "engines": [
                {
                    **b.record.to_json(),
                    "fresh": b.fresh,
                    "seconds": round(b.seconds, 3),
                    "weights_bytes": b.weights_bytes,
                }
                for b in built
            ],
        },
        "\n".join([*_table(built), "", *_next(bundle, chosen, opened, compiler, precision)]),
    )


def _compile_file(
    console: Console, path: str, out: Path | None, sizes: Sequence[str], options: Options, flavour: Flavour
) -> None:
    """`--onnx`: the engine of one file."""
    from hcmen.export.foreign_engine import compile_file, parse_spans
    from hcmen.export.tensorrt import GraphCompiler

    if out is None:
        raise InputError("--onnx without --out", "where the engine goes")
    if out.exists() and not options.force:
        raise InputError(f"{out}: something is there already", "another --out, or --force")
    spans = parse_spans(sizes)
    compiler = GraphCompiler(options, console, flavour)
    made = compile_file(compiler, path, out, spans)
    builder = f"{flavour.title} {compiler.tensorrt.version}"
    sm = ", ".join(map(str, compiler.capabilities))
    console.emit(
        {
            "onnx": path,
            "engine": str(out),
            "bytes": made.bytes,
            "seconds": round(made.seconds, 3),
            "precision": options.precision,
            "backend": flavour.name,
            "version": compiler.tensorrt.version,
            "capabilities": list(compiler.capabilities),
            "plugin": made.plugin,
            "profile": {name: [list(shape) for shape in shapes] for name, shapes in made.profile.items()},
            "parity": {"measured": False},
        },
        f"{out}: {made.bytes / 1024:.0f} KiB, {options.precision}, {builder}, sm {sm}, built in {made.seconds:.1f} s\n"
        f"hcmen ops: {made.plugin}. Parity is not measured: compare the engine with {path} on inputs of your own.",
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


def _what_builds(compiler: Compiler) -> str:
    builder = f"{compiler.flavour.title} {compiler.tensorrt.version}"
    sm = ", ".join(map(str, compiler.capabilities))
    if compiler.cuda is None:
        return f"{builder}, for GPUs of sm {sm}; parity is measured where an engine is first run"
    return f"{builder}, GPU of sm {sm}, CUDA {compiler.cuda.runtime}"


def _next(bundle: Path, compiled: Sequence[str], opened: Bundle, compiler: Compiler, precision: str) -> list[str]:
    """What to type next: the golden set through the engines."""
    variant = [] if len(compiled) == len(opened.manifest.variants) else ["--variant", compiled[0]]
    engines = ["--backend", compiler.flavour.name, "--precision", precision]
    typed = as_typed("hcmen-run", "--self-test", "--bundle", from_here(bundle), *variant, *engines)
    if compiler.cuda is not None:
        return [f"Next: {typed}"]
    return ["On another machine add --trust-engines. Next, where such a GPU is:", f"  {typed}"]


def _table(built: Sequence[Built]) -> list[str]:
    rows = [("variant", "engine", "size", "of weights", "build", "max |difference|", "parity")]
    for b in built:
        parity, size = b.record.parity, b.record.engine.bytes
        measured = (
            (f"{parity['outputs']['score']['max_abs']:.1e}", "ok") if "outputs" in parity else ("", "not measured")
        )
        build = f"{b.seconds:.1f} s" if b.fresh else "was there"
        weights = f"{size / b.weights_bytes:.0f}x" if b.weights_bytes else ""
        rows.append((b.record.variant, b.record.engine.file, f"{size / 1024:.0f} KiB", weights, build, *measured))
    return fitted(rows, screen_width(), least=("of weights", "build", "size", "engine"))
