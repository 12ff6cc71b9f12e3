"""`--plugin aot`: the hcmen ops as kernels inside a TensorRT engine, which then needs no plugin library to run.

TensorRT from 10.9 on takes a plugin that is described in Python while an engine is built: what the outputs are, and a
kernel as PTX with its launch. The kernel goes into the engine; neither Python nor a library is there when it runs.

    prepare(model)   gives every hcmen node the name that such a plugin is found by
    register(sm)     registers the plugins, in the process that parses the model

One kernel for every kind of node (`trt_aot.cu`), compiled by NVRTC or nvcc for the GPU at hand, with all that is known
when the engine is built as constants; batch and time come as integers at run time. There is one kernel per node and no
workspace, so a scan walks through time in order: the plugin library is faster where sequences are long and batches
small.

The operators are renamed because such a plugin has a fixed number of inputs and outputs, and because its attributes are
best baked into its name: TensorRT's own Python code before 11 cannot read an integer attribute with NumPy 2.4 or later,
nor, in 10.9, any other kind. So there is one plugin without attributes for each set of switches, `SCAN_NAMES` and
`CONV_NAMES`.

PyTorch is never imported; `prepare` needs onnx, `register` TensorRT's Python package.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from hcmen.base.errors import BackendError, InputError, shown
from hcmen.base.op import CAUSAL_CONV1D, DOMAIN, PARSER_ATTRIBUTES, SELECTIVE_SCAN, Attribute, Tensor
from hcmen.mamba.ptx import Kernel, PtxCompiler, checked_architecture, driver_version, ptx_compiler, sources

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = [
    "CONV_NAMES",
    "SCAN_NAMES",
    "ConvSwitches",
    "ScanSwitches",
    "conv_kernel",
    "prepare",
    "register",
    "scan_kernel",
]

THREADS = 128
# Outputs of a convolution that one thread computes in a row.
STEPS = 8
# States that a thread keeps at most, with the inputs of a few steps, without spilling registers.
_MOST_STATES = 16
_WARP = 32
MOST_STATES = _WARP * _MOST_STATES
_MOST_WIDTH = 32


@dataclass(frozen=True)
class ScanSwitches:
    """The attributes of a SelectiveScan node that decide what it computes."""

    delta_softplus: bool
    reverse: bool
    gated: bool
    stateful: bool


@dataclass(frozen=True)
class ConvSwitches:
    """The attributes of a CausalConv1d node that decide what it computes."""

    silu: bool
    reverse: bool
    stateful: bool


def _name(stem: str, switches: ScanSwitches | ConvSwitches) -> str:
    return stem + "".join(key.title().replace("_", "") for key, on in asdict(switches).items() if on)


_ON_OFF = (False, True)
SCAN_NAMES = {
    switches: _name("SelectiveScanAot", switches)
    for switches in (ScanSwitches(*each) for each in itertools.product(_ON_OFF, repeat=4))
}
CONV_NAMES = {
    switches: _name("CausalConv1dAot", switches)
    for switches in (ConvSwitches(*each) for each in itertools.product(_ON_OFF, repeat=3))
}


# --- kernels --------------------------------------------------------------------------------------------------------


def scan_kernel(switches: ScanSwitches, *, channel: int, state: int, group: int, half: bool) -> Kernel:
    """The kernel of a SelectiveScan node.

    Raises:
        InputError: more states than it serves, or groups that do not divide the channels.
    """
    if not 1 <= state <= MOST_STATES:
        raise InputError(f"an AOT scan has {state} states, expected 1 to {MOST_STATES}: use --plugin library")
    if channel < 1 or group < 1 or channel % group:
        raise InputError(f"an AOT scan has {channel} channels in {group} groups, expected groups that divide them")
    lanes = 1
    # Four states for a thread; more where a warp is not enough for that.
    while lanes < _WARP and lanes * 4 < state:
        lanes *= 2
    sizes = {"CHANNEL": channel, "STATE": state, "GROUP": group, "LANES": lanes}
    return _kernel("scan", switches, {"HALF": half, **sizes}, -(-channel // (THREADS // lanes)))


def conv_kernel(switches: ConvSwitches, *, channel: int, width: int, half: bool) -> Kernel:
    """The kernel of a CausalConv1d node.

    Raises:
        InputError: a wider kernel than it serves, or a state of a width of 1.
    """
    if not 1 <= width <= _MOST_WIDTH:
        raise InputError(f"an AOT convolution has width {width}, expected 1 to {_MOST_WIDTH}: use --plugin library")
    if switches.stateful and width == 1:
        raise InputError("an AOT convolution with a state has width 1, expected at least 2")
    return _kernel("conv", switches, {"HALF": half, "CHANNEL": channel, "WIDTH": width, "STEPS": STEPS}, channel)


def _kernel(kind: str, switches: ScanSwitches | ConvSwitches, sizes: dict[str, int], rows: int) -> Kernel:
    flags = {key.upper(): int(on) for key, on in asdict(switches).items()}
    macros = {**flags, **{key: int(value) for key, value in sizes.items()}}
    # Two modules of an engine may not show the same name for different code.
    name = "_".join(["hcmen_aot", kind, *(f"{key.lower()}{value}" for key, value in macros.items())])
    pairs: dict[str, int | str] = {"KERNEL": name, "THREADS": THREADS, **macros}
    return Kernel(name, tuple((f"HCMEN_{key}", value) for key, value in pairs.items()), rows)


# --- the model ------------------------------------------------------------------------------------------------------


def prepare(model: ModelProto) -> ModelProto:
    """Renames the hcmen nodes of `model`, in place, to the plugins that `register` registers, and completes them.

    Its model-local functions must be gone (`strip_functions`). What comes out is for TensorRT alone.

    Returns:
        `model`.

    Raises:
        InputError: a function of this domain is left, or a node is not as docs/op.md says.
    """
    from onnx import helper

    left = [function.name for function in model.functions if function.domain == DOMAIN]
    if left:
        raise InputError(f"the model still carries the function '{left[0]}': take it out with strip_functions")
    kinds: dict[str, Any] = {
        SELECTIVE_SCAN.name: (SELECTIVE_SCAN, ScanSwitches, SCAN_NAMES),
        CAUSAL_CONV1D.name: (CAUSAL_CONV1D, ConvSwitches, CONV_NAMES),
    }
    for node in _nodes(model.graph.node):
        if node.domain != DOMAIN:
            continue
        if node.op_type not in kinds:
            raise InputError(f"node '{node.name}': {DOMAIN}::{node.op_type} has no AOT kernel: use --plugin library")
        op, switches, names = kinds[node.op_type]
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        values = {attribute.name: _is_on(node, given, attribute) for attribute in op.attributes}
        _expect_counts(node, len(op.inputs_with(values)), len(op.outputs_with(values)))
        node.op_type = names[switches(*values.values())]
        del node.attribute[:]
        # "aot": this plugin or none, whatever the network's flags.
        final: dict[str, Any] = {"aot": 1, **PARSER_ATTRIBUTES}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in final.items())
    return model


def _nodes(nodes: Any) -> Iterator[NodeProto]:
    """Every node, those of subgraphs included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _is_on(node: NodeProto, given: dict[str, Any], attribute: Attribute) -> bool:
    """Whether an attribute is other than its default."""
    choices = [choice.encode() if isinstance(choice, str) else choice for choice in attribute.choices]
    value = given.get(attribute.name, choices[0])
    if value not in choices or isinstance(value, float):
        raise InputError(
            f"{node.op_type} '{node.name}': attribute '{attribute.name}' is {shown(value)}, "
            f"expected {' or '.join(map(str, attribute.choices))}"
        )
    return bool(value != choices[0])


def _expect_counts(node: NodeProto, inputs: int, outputs: int) -> None:
    if len(node.input) != inputs or len(node.output) != outputs or not all((*node.input, *node.output)):
        raise InputError(
            f"{node.op_type} '{node.name}' has {len(node.input)} inputs and {len(node.output)} outputs, expected "
            f"{inputs} and {outputs}, none of them unnamed (docs/op.md)"
        )


# --- the plugins ----------------------------------------------------------------------------------------------------

_registered_for: int | None = None


def register(sm: int, compiler: PtxCompiler | None = None) -> PtxCompiler:
    """Registers the plugins with the TensorRT of this process, with kernels for GPUs of compute capability `sm`.

    Registering again for the same GPU means once.

    Args:
        sm: 87 for 8.7. Kernels are PTX, which later GPUs of the same machine could run too.
        compiler: None for NVRTC, or nvcc where there is no NVRTC.

    Returns:
        The compiler.

    Raises:
        BackendError: TensorRT is missing or older than 10.9, there is no compiler, or it is newer than the driver.
    """
    global _registered_for
    try:
        import tensorrt as trt
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise BackendError(
            f"TensorRT 10.9 or later is needed for --plugin aot ({error}): use --plugin library"
        ) from error
    if not hasattr(trtp, "aot_impl"):
        raise BackendError(
            f"TensorRT {trt.__version__} has no AOT plugins, expected 10.9 or later: use --plugin library"
        )
    compiler = compiler or ptx_compiler()
    architecture = checked_architecture(compiler, sm, driver_version())
    if _registered_for is not None:
        if _registered_for != architecture:
            raise BackendError(
                f"AOT plugins are registered for compute capability {_registered_for / 10:.1f} already, not "
                f"{architecture / 10:.1f}: use another process"
            )
        return compiler
    sources()
    ptx = functools.cache(lambda kernel: compiler.ptx(kernel, architecture))
    for scan in SCAN_NAMES:
        _register_scan(trt, trtp, ptx, scan)
    for conv in CONV_NAMES:
        _register_conv(trt, trtp, ptx, conv)
    _registered_for = architecture
    return compiler


def _register_scan(trt: Any, trtp: Any, ptx: Callable[[Kernel], str], switches: ScanSwitches) -> None:
    def describe(inputs: dict[str, Any]) -> tuple[Any, ...]:
        u, A = inputs["u"], inputs["A"]
        if not switches.stateful:
            return (u.like(),)
        states = (u.shape_expr[0], u.shape_expr[2], A.shape_expr[1])
        return u.like(), trtp.from_shape_expr(states, trt.DataType.FLOAT)

    def kernel(inputs: dict[str, Any]) -> Kernel:
        return scan_kernel(
            switches,
            channel=_known(inputs["u"], 2, "the channels of 'u'"),
            state=_known(inputs["A"], 1, "the states of 'A'"),
            group=_known(inputs["B"], 2, "the groups of 'B'") if inputs["B"].ndim == 4 else 1,
            half=inputs["u"].dtype == trt.DataType.HALF,
        )

    def blocks(kernel: Kernel, batch: Any, time: Any) -> Any:
        return batch * kernel.rows

    given = asdict(switches)
    tensors = SELECTIVE_SCAN.inputs_with(given), SELECTIVE_SCAN.outputs_with(given)
    _define(trtp, ptx, _Plugin(SCAN_NAMES[switches], *tensors, describe, kernel, blocks))


def _register_conv(trt: Any, trtp: Any, ptx: Callable[[Kernel], str], switches: ConvSwitches) -> None:
    def describe(inputs: dict[str, Any]) -> tuple[Any, ...]:
        states = [inputs["initial_state"].like()] if switches.stateful else []
        return inputs["x"].like(), *states

    def kernel(inputs: dict[str, Any]) -> Kernel:
        return conv_kernel(
            switches,
            channel=_known(inputs["x"], 2, "the channels of 'x'"),
            width=_known(inputs["weight"], 1, "the width of 'weight'"),
            half=inputs["x"].dtype == trt.DataType.HALF,
        )

    def blocks(kernel: Kernel, batch: Any, time: Any) -> Any:
        return trtp.cdiv(batch * trtp.cdiv(time, STEPS) * kernel.rows, THREADS)

    given = asdict(switches)
    tensors = CAUSAL_CONV1D.inputs_with(given), CAUSAL_CONV1D.outputs_with(given)
    _define(trtp, ptx, _Plugin(CONV_NAMES[switches], *tensors, describe, kernel, blocks))


@dataclass(frozen=True)
class _Plugin:
    """What one plugin is made of, over descriptions of its inputs by name.

    describe: the descriptions of its outputs. kernel: what to compile. blocks: how many to launch, as an expression of
    batch and time.
    """

    name: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    describe: Callable[[dict[str, Any]], tuple[Any, ...]]
    kernel: Callable[[dict[str, Any]], Kernel]
    blocks: Callable[[Kernel, Any, Any], Any]


def _define(trtp: Any, ptx: Callable[[Kernel], str], plugin: _Plugin) -> None:
    """Registers one. TensorRT reads names and types of parameters from signatures, which are made here."""
    names = [tensor.name for tensor in plugin.inputs]
    tensors = [(name, trtp.TensorDesc) for name in names]
    described = tuple[(trtp.TensorDesc,) * len(plugin.outputs)]  # type: ignore[misc,valid-type]

    def register_function(*inputs: Any) -> Any:
        return plugin.describe(dict(zip(names, inputs, strict=True)))

    def autotune_function(*tensors: Any) -> Any:
        types = ["FP32|FP16" if tensor.shared else "FP32" for tensor in (*plugin.inputs, *plugin.outputs)]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR")]

    def aot_function(*values: Any) -> Any:
        inputs = dict(zip(names, values[: len(names)], strict=True))
        kernel = plugin.kernel(inputs)
        batch, time = (inputs[names[0]].shape_expr[axis] for axis in (0, 1))
        launch = trtp.KernelLaunchParams()
        launch.grid_x = plugin.blocks(kernel, batch, time)
        launch.block_x = THREADS
        integers = trtp.SymIntExprs(2)
        integers[0], integers[1] = trtp.SymInt32(batch), trtp.SymInt32(time)
        return kernel.name, ptx(kernel), launch, integers

    outputs = ("outputs", described)
    _sign(register_function, tensors, described)
    _sign(autotune_function, [*tensors, outputs], list[trtp.AutoTuneCombination])
    returned = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]
    _sign(aot_function, [*tensors, outputs, ("tactic", int)], returned)
    name = f"{DOMAIN}::{plugin.name}"
    trtp.register(name)(register_function)
    trtp.autotune(name)(autotune_function)
    trtp.aot_impl(name)(aot_function)


def _sign(function: Any, parameters: list[tuple[str, Any]], returns: Any) -> None:
    either = inspect.Parameter.POSITIONAL_OR_KEYWORD
    function.__signature__ = inspect.Signature(
        [inspect.Parameter(name, either, annotation=annotation) for name, annotation in parameters],
        return_annotation=returns,
    )


def _known(desc: Any, axis: int, what: str) -> int:
    """A size that a kernel has as a constant."""
    size = desc.shape_expr[axis]
    if not size.is_constant:
        raise InputError(f"{what} change from call to call, expected a constant: use --plugin library")
    return int(size.constant_value())
