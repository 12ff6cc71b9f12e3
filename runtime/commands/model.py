"""The options by which hcmen-run and hcmen-follow open a bundle."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console
from hcmen.runtime.backends.options import BACKENDS

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["MODEL_OPTIONS", "model_options", "opened_model"]

MODEL_OPTIONS = ("bundle", "backend", "cuda_graph", "precision", "threads")
"""Those of `model_options` that say what runs, for the headings of a help."""


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """Adds the options that `opened_model` takes."""
    for option in (
        click.option("--clean", is_flag=True, help="Set NaN and infinity in clips to zero instead of refusing them."),
        click.option("--threads", type=int, help="Worker threads. Default: the physical cores."),
        click.option(
            "--precision",
            type=Choice(["fp32", "fp16"]),
            help="With tensorrt: which engines of hcmen-compile are taken. Other backends have the bundle's precision.",
        ),
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
        click.option("--bundle", default="build/bundle", show_default=True, help="The folder that hcmen-export wrote."),
    ):
        function = option(function)
    return function


def opened_model(console: Console, bundle: str, cuda_graph: bool, **options: Any) -> Predictor:
    """The model that the options name.

    Args:
        options: as of `Predictor`, `backend` among them; None for what was not said.

    Raises:
        InputError, CorruptFileError, BackendError: as `Predictor` and `read_bundle`.
    """
    from hcmen.base.bundle import read_bundle
    from hcmen.runtime.predictor import Predictor

    model = Predictor(read_bundle(bundle), cuda_graph=cuda_graph or None, **options)
    console.detail(
        f"bundle {bundle}, backend {model.backend.name} {model.backend.version}, {model.backend.threads} threads"
    )
    return model
