"""From the eager model to ONNX: one graph per variant, one weights file for all of them.

The exporter traces the model that trains; there is no second copy of it. A variant's graph is the trace of the forward
pass without the absent modalities, so what served them is never in the graph. The scan and the convolution appear as
one node each (domain `hcmen`), with a model-local function of standard ops beside them, so that the file runs with our
library and without it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from hcmen.base.clip import TEXT_TOKENS
from hcmen.base.errors import BackendError, reason_of
from hcmen.base.inputs import TensorSpec
from hcmen.base.modalities import Variant
from hcmen.base.op import OPSET
from hcmen.mamba.functions import add_functions
from hcmen.mamba.graph import fold, tidy
from hcmen.models.contract import heard_by

__all__ = ["export_variant"]


class _Positional(nn.Module):
    """The model with the graph's flat list of inputs: features of the present modalities, then their lengths.

    Text tokens have no length of their own, their attention mask has it.
    """

    def __init__(self, model: Any, variant: Variant) -> None:
        super().__init__()
        self.model = model
        self.present = variant.present
        self.heard = heard_by(model, variant.present)
        self.measured = _measured(model, variant)
        self.outputs = [tensor.name for tensor in model.config.inputs.outputs]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(self.present)
        features = dict(zip(self.present, inputs[:count], strict=True))
        lengths = dict(zip(self.measured, inputs[count:], strict=True))
        if self.present != self.measured:
            lengths["text"] = features["text"][:, 1].sum(dim=1)
        heard = {m: features[m] for m in self.heard}
        prediction = self.model(heard, {m: lengths[m] for m in heard})
        outputs = {name: getattr(prediction, name) for name in self.outputs}
        for m in self.present:
            if m not in heard:  # TensorRT drops an input that no node takes
                outputs["score"] = outputs["score"] + 0.0 * features[m][:, 0, 0] + 0.0 * lengths[m]
        return tuple(outputs.values())


def _measured(model: Any, variant: Variant) -> tuple[str, ...]:
    """The present modalities that come with a length."""
    return tuple(m for m in variant.present if m != "text" or model.config.inputs.text_tokens is None)


def export_variant(model: Any, variant: Variant) -> onnx.ModelProto:
    """The graph of one variant, weights inside, with dynamic batch and time.

    Inputs: `m` float32 [batch, m_time, features] for each present modality m, then `m_length` int64 [batch]. A text of
    tokens is `text_tokens` int64 [batch, 3, text_time] alone.
    Outputs: those that the model's configuration names, `score` [batch] and `modality_weights` [batch, 3] among them.

    Raises:
        BackendError: PyTorch or the ONNX checker refuses the model.
    """
    model = model.eval()
    wrapper = _Positional(model, variant).eval()
    batch = torch.export.Dim("batch")
    inputs: list[Tensor] = []
    dynamic: list[dict[int, torch.export.Dim]] = []
    # Two samples of at least two steps: sizes of 0 and 1 would be burnt into the graph by the tracer.
    measured = _measured(model, variant)
    names = []
    for m in variant.present:
        sizes = model.config.inputs.modality(m)
        steps, time = max(2, sizes.max_steps), torch.export.Dim(f"{m}_time")
        if m in measured:
            names.append(m)
            inputs.append(torch.zeros(2, steps, sizes.features))
            dynamic.append({0: batch, 1: time})
        else:
            names.append(TEXT_TOKENS)
            inputs.append(torch.ones(2, 3, steps, dtype=torch.int64))
            dynamic.append({0: batch, 2: time})
    names += [f"{m}_length" for m in measured]
    inputs += [torch.full((2,), 2, dtype=torch.int64) for _ in measured]
    dynamic += [{0: batch} for _ in measured]
    try:
        with torch.no_grad(), _quiet():
            program = torch.onnx.export(
                wrapper,
                tuple(inputs),
                input_names=names,
                output_names=list(wrapper.outputs),
                dynamic_shapes=(tuple(dynamic),),
                opset_version=OPSET,
                dynamo=True,
                optimize=True,
                verbose=False,
            )
    except Exception as error:
        reason = reason_of(error, 300)
        raise BackendError(f"PyTorch {torch.__version__} could not export '{variant.name}': {reason}") from error
    assert program is not None
    fold(program.model)
    proto = tidy(program.model_proto, variant.name)
    _check_sizes(proto, model.config.inputs.of_variant(variant.name))
    add_functions(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the exported graph of '{variant.name}' is not valid ONNX: {error}") from error
    return proto


def _check_sizes(proto: onnx.ModelProto, expected: Sequence[TensorSpec]) -> None:
    """Refuses a graph in which the tracer has fixed a size that is to be free, as `len(x)` in a model makes it do."""
    wanted = {tensor.name: tensor.shape for tensor in expected}
    for value in proto.graph.input:
        found = [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
        for got, name in zip(found, wanted[value.name], strict=True):
            if isinstance(name, str) and isinstance(got, int):
                raise BackendError(
                    f"the graph of '{proto.graph.name}' takes {value.name} {found}, expected "
                    f"{list(wanted[value.name])}: the model fixes {name}; take sizes from x.shape, not from len(x)"
                )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch.onnx's progress prints and its warnings about itself out of our output."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
