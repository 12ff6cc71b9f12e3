"""The options by which hcmen-run and hcmen-follow open a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console
from hcmen.runtime.backends.options import BACKENDS, runs_engines

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["MODEL_OPTIONS", "model_options", "opened_model", "time_limit_option", "trust_engines_option"]

MODEL_OPTIONS = ("bundle", "backend", "cuda_graph", "precision", "threads", "no_map", "time_limit", "trust_engines")
"""Those of `model_options` that say what runs, for the headings of a help."""


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
        click.option(
            "--precision",
            type=Choice(["fp32", "fp16"]),
            help="With tensorrt and tensorrt-rtx: which engines of hcmen-compile are taken. Other backends have the "
            "bundle's precision.",
        ),
        trust_engines_option(),
        click.option(
            "--cuda-graph", is_flag=True, help="With ort-cuda: record a graph once per input shape, then replay it."
        ),
        click.option(
            "--backend",
            type=Choice(["auto", *BACKENDS]),
            default="auto",
            show_default=True,
            help="What runs the graphs; a named one never falls back.",
        ),
        click.option(
            "--bundle",
            help="The folder that hcmen-export wrote.  [default: build/bundle if it is there, else the demo's]",
        ),
    ):
        function = option(function)
    return function


def trust_engines_option() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The option of every command that opens engines."""
    return click.option(
        "--trust-engines",
        is_flag=True,
        help="With tensorrt and tensorrt-rtx: run engines that this user did not compile here too. They are native "
        "code.",
    )


def opened_model(
    console: Console, bundle: str | None, cuda_graph: bool, no_map: bool, trust_engines: bool, **options: Any
) -> Predictor:
    """The model that the options name.

    Args:
        options: as of `Predictor`, `backend` among them; None for what was not said.

    Raises:
        InputError, CorruptFileError, BackendError: as `Predictor` and `read_bundle`.
    """
    from hcmen.base.bundle import read_bundle
    from hcmen.base.shipped import chosen_bundle
    from hcmen.runtime.predictor import Predictor

    model = Predictor(
        read_bundle(chosen_bundle(bundle, console.note)),
        cuda_graph=cuda_graph or None,
        map=False if no_map else None,
        trust_engines=trust_engines or None,
        **options,
    )
    if runs_engines(model.backend.name):
        # What was compiled on the GPU meanwhile is kept for the next run.
        click.get_current_context().call_on_close(model.close)
    backend = model.backend
    console.detail(f"bundle {model.bundle.path}, backend {backend.name} {backend.version}, {backend.threads} threads")
    return model
