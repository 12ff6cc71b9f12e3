"""The options by which hcmen-run and hcmen-follow open a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Console

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["model_options", "opened_model", "time_limit_option"]


def time_limit_option(function: Callable[..., None]) -> Callable[..., None]:
    """Adds --time-limit, for `Predictor`."""
    told = "How long loading a graph, and each run of it, may take. Default: no limit."
    return click.option("--time-limit", type=float, metavar="SECONDS", help=told)(function)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that `opened_model` takes."""
    for option in (
        click.option("--clean", is_flag=True, help="Set NaN and infinity in clips to zero instead of refusing them."),
        time_limit_option,
        click.option(
            "--no-map",
            is_flag=True,
            help="Read the weights instead of mapping them: for a bundle that may be cut short while it runs.",
        ),
        click.option("--threads", type=int, help="Worker threads. Default: the physical cores."),
        click.option("--precision", help="fp32 or fp16: which engines of hcmen-compile the backend tensorrt takes."),
        click.option(
            "--cuda-graph", is_flag=True, help="With ort-cuda: record a graph once per input shape, then replay it."
        ),
        click.option(
            "--backend",
            default="auto",
            show_default=True,
            help="auto, ort, ort-cuda or tensorrt; a named one never falls back.",
        ),
        click.option("--bundle", default="build/bundle", show_default=True, help="The folder that hcmen-export wrote."),
    ):
        function = option(function)
    return function


def opened_model(console: Console, bundle: str, cuda_graph: bool, no_map: bool, **options: Any) -> Predictor:
    """The model that the options name.

    Args:
        options: as of `Predictor`, `backend` among them; None for what was not said.

    Raises:
        InputError, CorruptFileError, BackendError: as `Predictor` and `read_bundle`.
    """
    from hcmen.base.bundle import read_bundle
    from hcmen.runtime.predictor import Predictor

    model = Predictor(read_bundle(bundle), cuda_graph=cuda_graph or None, map=False if no_map else None, **options)
    console.detail(
        f"bundle {bundle}, backend {model.backend.name} {model.backend.version}, {model.backend.threads} threads"
    )
    return model
