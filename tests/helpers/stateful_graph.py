"""A model with states as a graph of any batch and time."""

from __future__ import annotations

from pathlib import Path

import torch

from hcmen.mamba.functions import add_functions
from hcmen.mamba.states import StatefulModel


def write_graph(made: StatefulModel, path: Path) -> Path:
    """Exports `made` as it is, with functions and metadata and nothing else."""
    sizes = {name: torch.export.Dim(name) for name in ("batch", "time")}
    axes = tuple({axis: sizes[name] for axis, name in each.items()} for each in made.dynamic_axes())
    model = torch.onnx.export(
        made,
        made.example,
        dynamo=True,
        opset_version=19,
        dynamic_shapes=(axes,),
        input_names=list(made.graph_inputs),
        output_names=list(made.graph_outputs),
        verbose=False,
    ).model_proto
    model.ir_version = 9
    add_functions(model)
    made.mark(model)
    path.write_bytes(model.SerializeToString())
    return path
