"""The command hcmen-export-mamba."""

from __future__ import annotations

import os
from pathlib import Path

import click

from hcmen.base.console import Console, command
from hcmen.base.errors import InputError

__all__ = ["main"]

_EPILOG = (
    "The file runs in ONNX Runtime as it is, and with libhcmen_ops.so on fused kernels. docs/op.md says more. Exit "
    "codes: 0 ok, 1 the file is not what the model is, or a size that was asked for cannot be open, 2 usage or bad "
    "input, 3 a library or package is missing, or PyTorch cannot export the model, 5 an unsafe checkpoint. Nothing is "
    "written but with 0."
)


@command(
    "hcmen-export-mamba",
    epilog=_EPILOG,
    examples=(
        "hcmen-export-mamba --factory mypackage.model:make --input f32[2,256,64] --dynamic 0=batch,1=time --out m.onnx",
        "hcmen-export-mamba --hf state-spaces/mamba-130m-hf --states --out lm.onnx",
    ),
    groups={
        "The model": ("factory", "checkpoint", "hub"),
        "Its inputs": ("inputs", "dynamic", "states", "last_step"),
        "The file": ("out", "force", "functions"),
        "The check": ("verify", "tolerance", "times"),
    },
)
@click.option(
    "--factory",
    metavar="MODULE:NAME",
    help="A function or class that makes the model when it is called without arguments; found in this folder, too.",
)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="Its weights: .safetensors, or what torch.save wrote, of which tensors alone are read.",
)
@click.option("--hf", "hub", metavar="NAME", help="A model of transformers: a folder, or its name in the hub.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="TYPE[SIZES]",
    help="An example input; repeatable, in the order of the arguments: f32[2,256,64]; i64[2,16:0..99], whole numbers "
    "from 0 to 99; ids=i64[2,16] by the argument's name. Types: f32, f16, f64, i32, i64, u8, bool.",
)
@click.option(
    "--dynamic",
    multiple=True,
    metavar="AXIS=NAME,...",
    help="Sizes that shall be open, of all inputs or, as NAME:0=batch, of one; repeatable. none: no size.  "
    "[default: auto, all that can be]",
)
@click.option("--states", is_flag=True, help="States in and out, for causal models that run step by step.")
@click.option("--last-step", is_flag=True, help="With --states: outputs of the last step alone.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where the file is put, NAME.onnx.")
@click.option("--force", is_flag=True, help="Replace what is at --out.")
@click.option("--functions/--no-functions", default=True, help="Whether it runs without the library.  [default: yes]")
@click.option(
    "--verify/--no-verify",
    default=True,
    help="Run the file beside the model, at other sizes, too.  [default: yes]",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    default=1e-5,
    show_default=True,
    help="Of the largest value of an output; or 3 times what float32 costs the model itself, if that is more.",
)
@click.option("--times", is_flag=True, help="Measure one call on the example, in eager PyTorch and in ONNX Runtime.")
def main(
    console: Console,
    factory: str | None,
    checkpoint: Path | None,
    hub: str | None,
    inputs: tuple[str, ...],
    dynamic: tuple[str, ...],
    states: bool,
    last_step: bool,
    out: Path,
    force: bool,
    functions: bool,
    verify: bool,
    tolerance: float,
    times: bool,
) -> None:
    """Exports anybody's Mamba model to one ONNX file, and checks the file against the model.

    Every size of the inputs that the model leaves open is open in the file, and the report says which line of the model
    fixes each other one.
    """
    if (factory is None) == (hub is None):
        raise InputError("the model is named " + ("twice" if factory else "nowhere"), "--factory or --hf")
    if last_step and not states:
        raise InputError("--last-step without --states", fix="give both")
    if checkpoint is not None and factory is None:
        raise InputError("--checkpoint with --hf", fix="name the folder that has the weights, as --hf FOLDER")
    # Threads that spin while they wait make each other wait on shared cores; read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    from hcmen.export.foreign import example, from_factory, from_hub, load_weights, parse_dynamic
    from hcmen.mamba.exporting import check_target, export
    from hcmen.mamba.stand_ins.hook import shim

    check_target(out, force)
    asked = parse_dynamic(dynamic)
    torch.manual_seed(0)
    with shim():
        model = from_factory(factory) if factory is not None else from_hub(str(hub))
        if checkpoint is not None:
            load_weights(model, checkpoint)
        report = export(
            model,
            example(inputs, model),
            out,
            dynamic=asked,
            states=states,
            last_step=last_step,
            functions=functions,
            verify=verify,
            tolerance=tolerance,
            overwrite=force,
            times=times,
            note=console.note,
        )
    console.emit(report.as_dict(), str(report))
