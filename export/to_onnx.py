"""From the eager HCMEN to ONNX: one graph per variant, one weights file for all of them.

The exporter traces the model that trains; there is no second copy of it. A variant's graph is the trace of the forward
pass without the absent modalities, so what served them is never in the graph. The scan and the convolution appear as
one node each (domain `hcmen`), with a model-local function of standard ops beside them, so that the file runs with our
library and without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx
import onnxscript.optimizer
import torch
from onnxscript import ir
from torch import Tensor, nn

from hcmen.clip import TEXT_TOKENS
from hcmen.errors import BackendError, reason_of
from hcmen.export.scan_function import add_functions
from hcmen.modalities import Variant
from hcmen.model import HCMEN

__all__ = ["IR_VERSION", "OPSET", "export_variant", "share_weights"]

# The newest that ONNX Runtime 1.17 reads, the oldest runtime that is supported.
OPSET = 19
IR_VERSION = 9

_FOLD_ANY_SIZE = 1 << 40

# Tensors of at least this size go to the shared file. Smaller ones (axes, scalars) stay in the graph, where shape
# inference and constant folding of every runtime find them.
EXTERNAL_MINIMUM_BYTES = 128
# ONNX Runtime maps external data by page; 64 also keeps every tensor on a cache line.
ALIGNMENT_BYTES = 64


class _Positional(nn.Module):
    """The model with the graph's flat list of inputs: features of the present modalities, then their lengths.

    Text tokens have no length of their own, their attention mask has it.
    """

    def __init__(self, model: HCMEN, variant: Variant) -> None:
        super().__init__()
        self.model = model
        self.present = variant.present
        self.measured = _measured(model, variant)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        count = len(self.present)
        features = dict(zip(self.present, inputs[:count], strict=True))
        lengths = dict(zip(self.measured, inputs[count:], strict=True))
        if self.present != self.measured:
            lengths["text"] = features["text"][:, 1].sum(dim=1)
        prediction = self.model(features, lengths)
        return prediction.score, prediction.modality_weights


def _measured(model: HCMEN, variant: Variant) -> tuple[str, ...]:
    """The present modalities that come with a length."""
    return tuple(m for m in variant.present if m != "text" or model.text_encoder is None)


def export_variant(model: HCMEN, variant: Variant) -> onnx.ModelProto:
    """The graph of one variant, weights inside, with dynamic batch and time.

    Inputs: `m` float32 [batch, m_time, features] for each present modality m, then `m_length` int64 [batch]. With a
    text encoder the text is `text_tokens` int64 [batch, 3, text_time] alone.
    Outputs: `score` float32 [batch], `modality_weights` float32 [batch, 3].

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
        config = model.config.modality(m)
        steps, time = max(2, config.max_steps), torch.export.Dim(f"{m}_time")
        if m in measured:
            names.append(m)
            inputs.append(torch.zeros(2, steps, config.features))
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
                output_names=["score", "modality_weights"],
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
    _fold(program.model)
    proto = _tidy(program.model_proto, variant)
    add_functions(proto)
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"the exported graph of '{variant.name}' is not valid ONNX: {error}") from error
    return proto


def _fold(model: ir.Model) -> None:
    """Computes now what depends on weights alone: transposes, halves and -exp(A_log), whatever their size.

    The exporter's own folding stops at tensors of 8 KiB. ONNX Runtime would do the rest at every start, and keep copies
    of its own that no other session shares.
    """
    onnxscript.optimizer.optimize(model, input_size_limit=_FOLD_ANY_SIZE, output_size_limit=_FOLD_ANY_SIZE)


def _tidy(exported: onnx.ModelProto, variant: Variant) -> onnx.ModelProto:
    """Drops what tracing leaves behind (stack traces with local paths, shapes of every inner tensor, unused weights)
    and states the versions."""
    proto = onnx.ModelProto()
    proto.CopyFrom(exported)
    proto.ir_version = IR_VERSION
    proto.producer_name, proto.producer_version = "hcmen", ""
    proto.graph.name = variant.name
    proto.graph.doc_string = ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    del proto.graph.value_info[:]
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.initializer):
        value.doc_string = ""
        del value.metadata_props[:]
    used = {name for node in proto.graph.node for name in node.input} | {o.name for o in proto.graph.output}
    kept = [tensor for tensor in proto.graph.initializer if tensor.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    return proto


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


def share_weights(models: Mapping[str, onnx.ModelProto], folder: Path, weights_name: str = "weights.bin") -> None:
    """Writes `folder/<name>.onnx` for every model and one `folder/<weights_name>` that all of them refer to.

    Tensors are told apart by dtype, shape and content, so a weight that several graphs use, under whatever name, is on
    disk once. The models are changed in place: their large tensors become references.
    """
    offsets: dict[tuple[int, tuple[int, ...], bytes], int] = {}
    with (folder / weights_name).open("wb") as weights:
        for proto in models.values():
            for tensor in proto.graph.initializer:
                content = onnx.numpy_helper.to_array(tensor).tobytes()
                if len(content) < EXTERNAL_MINIMUM_BYTES:
                    continue
                key = (tensor.data_type, tuple(tensor.dims), hashlib.sha256(content).digest())
                if key not in offsets:
                    weights.write(b"\0" * (-weights.tell() % ALIGNMENT_BYTES))
                    offsets[key] = weights.tell()
                    weights.write(content)
                _refer(tensor, weights_name, offsets[key], len(content))
    for name, proto in models.items():
        (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))


def _refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Makes `tensor` a reference into the file `location`."""
    kept = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    kept.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        kept.external_data.add(key=key, value=value)
    tensor.CopyFrom(kept)
