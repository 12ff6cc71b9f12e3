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

import ctypes
import functools
import importlib.util
import inspect
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import hcmen.runtime
from hcmen.errors import BackendError, InputError, shown

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = [
    "CONV_NAMES",
    "SCAN_NAMES",
    "ConvSwitches",
    "Kernel",
    "Nvcc",
    "Nvrtc",
    "PtxCompiler",
    "ScanSwitches",
    "conv_kernel",
    "prepare",
    "register",
    "scan_kernel",
]

DOMAIN = "hcmen"
THREADS = 128
# Outputs of a convolution that one thread computes in a row.
STEPS = 8
# States that a thread keeps at most, with the inputs of a few steps, without spilling registers.
_MOST_STATES = 16
_WARP = 32
MOST_STATES = _WARP * _MOST_STATES
_MOST_WIDTH = 32

_SCAN_INPUTS = ("u", "delta", "A", "B", "C", "D", "delta_bias")
_CONV_INPUTS = ("x", "weight", "bias")
_SHARED = {"u", "delta", "B", "C", "z", "x"}
"""Inputs of the type that docs/op.md calls T; all others are float32."""


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


def _name(stem: str, switches: ScanSwitches | ConvSwitches) -> str:
    return stem + "".join(key.title().replace("_", "") for key, on in asdict(switches).items() if on)


_ON_OFF = (False, True)
SCAN_NAMES = {
    switches: _name("SelectiveScanAot", switches)
    for switches in (ScanSwitches(*each) for each in itertools.product(_ON_OFF, repeat=4))
}
CONV_NAMES = {
    switches: _name("CausalConv1dAot", switches)
    for switches in (ConvSwitches(*each) for each in itertools.product(_ON_OFF, repeat=2))
}


# --- kernels --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """One kernel of trt_aot.cu.

    name: its entry point. macros: what it is compiled for. rows: blocks for each batch element, for a convolution
    threads for each run of `STEPS` outputs.
    """

    name: str
    macros: tuple[tuple[str, int | str], ...]
    rows: int

    @property
    def options(self) -> tuple[str, ...]:
        """The macros as options of a compiler."""
        return tuple(f"-D{name}={value}" for name, value in self.macros)


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
        InputError: a wider kernel than it serves.
    """
    if not 1 <= width <= _MOST_WIDTH:
        raise InputError(f"an AOT convolution has width {width}, expected 1 to {_MOST_WIDTH}: use --plugin library")
    return _kernel("conv", switches, {"HALF": half, "CHANNEL": channel, "WIDTH": width, "STEPS": STEPS}, channel)


def _kernel(kind: str, switches: ScanSwitches | ConvSwitches, sizes: dict[str, int], rows: int) -> Kernel:
    flags = {key.upper(): int(on) for key, on in asdict(switches).items()}
    macros = {**flags, **{key: int(value) for key, value in sizes.items()}}
    # Two modules of an engine may not show the same name for different code.
    name = "_".join(["hcmen_aot", kind, *(f"{key.lower()}{value}" for key, value in macros.items())])
    pairs = {"KERNEL": name, "THREADS": THREADS, **macros}
    return Kernel(name, tuple((f"HCMEN_{key}", value) for key, value in pairs.items()), rows)


# --- PTX ------------------------------------------------------------------------------------------------------------


class PtxCompiler(Protocol):
    """What turns trt_aot.cu into PTX.

    where: the file that does it. version: of its CUDA. architectures: the compute capabilities it knows, 87 for 8.7.
    """

    where: str
    version: tuple[int, int]
    architectures: tuple[int, ...]

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        """The kernel for that compute capability and later ones; raises BackendError."""
        ...


def sources() -> tuple[Path, Path]:
    """trt_aot.cu, and the header with the arithmetic that it includes.

    Raises:
        BackendError: they are not where this package was installed.
    """
    kernel = Path(__file__).with_name("trt_aot.cu")
    headers = [Path(folder) / "csrc" / "scan_step.h" for folder in hcmen.runtime.__path__]
    for header in headers:
        if kernel.is_file() and header.is_file():
            return kernel, header
    raise BackendError(f"{kernel} or {headers[0]} is missing: install hcmen again, or use --plugin library")


class Nvrtc:
    """NVIDIA's run-time compiler, a library that works without a GPU.

    Args:
        path: its file; None looks for pip's nvidia-cuda-nvrtc, the dynamic loader's, and CUDA's usual folder.

    Raises:
        BackendError: there is none.
    """

    def __init__(self, path: str | None = None):
        for candidate in [path] if path else _nvrtc_candidates():
            try:
                # It looks for its other half by name alone, which finds what is loaded already.
                beside = Path(candidate).parent.glob("libnvrtc-builtins.so.*") if os.sep in candidate else ()
                for builtins in beside:
                    ctypes.CDLL(str(builtins))
                self._library = ctypes.CDLL(candidate)
                self._version = self._library.nvrtcVersion
            except (OSError, AttributeError):
                continue
            self.where = candidate
            break
        else:
            raise BackendError(f"{path or 'libnvrtc'} cannot be loaded: pip install nvidia-cuda-nvrtc")
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = tuple(known)

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        source, header = (path.read_bytes() for path in sources())
        program = ctypes.c_void_p()
        names = (ctypes.c_char_p * 1)(b"scan_step.h")
        headers = (ctypes.c_char_p * 1)(header)
        self._call("nvrtcCreateProgram", ctypes.byref(program), source, b"trt_aot.cu", 1, headers, names)
        try:
            given = (f"--gpu-architecture=compute_{architecture}", "--std=c++17", *kernel.options)
            options = (ctypes.c_char_p * len(given))(*(option.encode() for option in given))
            if self._library.nvrtcCompileProgram(program, len(given), options) != 0:
                log = self._text(program, "ProgramLog").strip().splitlines()
                error = next((line for line in log if "error" in line), log[0] if log else "no log")
                raise BackendError(f"NVRTC {_dotted(self.version)} cannot compile {kernel.name}: {error}")
            return self._text(program, "PTX")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.value.decode()

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            reason = self._library.nvrtcGetErrorString(status).decode()
            raise BackendError(f"{name} failed with {reason} ({self.where}): install another CUDA")


def _nvrtc_candidates() -> Iterator[str]:
    """Where NVRTC may be, the newest of each place first."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(root) for root in (spec.submodule_search_locations or [] if spec else [])]
    wheels = [path for root in folders for path in (*root.glob("cu[0-9]*/lib"), *root.glob("cuda_nvrtc/lib"))]
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "lib64"]
    for folder in (*wheels, *toolkits):
        # Not the builtins, nor pip's alternative build.
        found = [path for path in folder.glob("libnvrtc.so.*") if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]
        yield from map(str, sorted(found, key=lambda path: int(path.suffix[1:]), reverse=True))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class Nvcc:
    """nvcc on PATH.

    Raises:
        BackendError: there is none, or it does not work.
    """

    def __init__(self) -> None:
        found = shutil.which("nvcc")
        if found is None:
            raise BackendError("nvcc is not on PATH: install the CUDA toolkit, or pip install nvidia-cuda-nvrtc")
        self.where = found
        match = re.search(r"release (\d+)\.(\d+)", self._run("--version"))
        if match is None:
            raise BackendError(f"{found} does not tell its version: install the CUDA toolkit again")
        self.version = (int(match[1]), int(match[2]))
        listed = re.findall(r"compute_(\d+)\b", self._run("--list-gpu-arch"))
        self.architectures = tuple(sorted(int(number) for number in listed))

    def ptx(self, kernel: Kernel, architecture: int) -> str:
        source, header = sources()
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "kernel.ptx"
            target_option = f"-arch=compute_{architecture}"
            self._run(
                *("--ptx", "--std=c++17", target_option, f"-I{header.parent}", *kernel.options),
                *(str(source), "-o", str(target)),
            )
            return target.read_text()

    def _run(self, *arguments: str) -> str:
        done = subprocess.run([self.where, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
            error = next((line for line in lines if "error" in line), lines[0])
            raise BackendError(f"{self.where} failed: {error}")
        return done.stdout


def _compiler() -> PtxCompiler:
    """NVRTC, else nvcc: the same compiler in two forms."""
    try:
        return Nvrtc()
    except BackendError as error:
        try:
            return Nvcc()
        except BackendError:
            raise error from None


def _driver_version() -> tuple[int, int] | None:
    """The newest CUDA that the driver here serves; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)) != 0 or version.value == 0:
        return None
    return version.value // 1000, version.value % 1000 // 10


def _checked_architecture(compiler: PtxCompiler, sm: int, driver: tuple[int, int] | None) -> int:
    """The compute capability to compile for: the GPU's own, or the newest before it that the compiler knows."""
    if driver is not None and compiler.version > driver:
        raise BackendError(
            f"{compiler.where} is of CUDA {_dotted(compiler.version)}, but the driver reads PTX up to CUDA "
            f"{_dotted(driver)}: pip install 'nvidia-cuda-nvrtc=={_dotted(driver)}.*', or use --plugin library"
        )
    older = [known for known in compiler.architectures if known <= sm]
    if not older:
        raise BackendError(
            f"{compiler.where} compiles for compute capability {min(compiler.architectures) / 10:.1f} and later, "
            f"this GPU has {sm / 10:.1f}: use an older CUDA"
        )
    return max(older)


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


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
    for node in _nodes(model.graph.node):
        if node.domain != DOMAIN:
            continue
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "SelectiveScan":
            scan = ScanSwitches(*(_flag(node, given, field.name) for field in fields(ScanSwitches)))
            _expect_counts(node, len(_scan_inputs(scan)), 1 + scan.stateful)
            name = SCAN_NAMES[scan]
        elif node.op_type == "CausalConv1d":
            _expect_counts(node, len(_CONV_INPUTS), 1)
            activation = given.get("activation", b"none")
            if activation not in (b"none", b"silu"):
                raise InputError(
                    f"CausalConv1d '{node.name}': attribute 'activation' is {shown(activation)}, expected none or silu"
                )
            name = CONV_NAMES[ConvSwitches(activation == b"silu", _flag(node, given, "reverse"))]
        else:
            raise InputError(f"node '{node.name}': {DOMAIN}::{node.op_type} has no AOT kernel: use --plugin library")
        node.op_type = name
        del node.attribute[:]
        # "aot": this plugin or none, whatever the network's flags.
        final = {"aot": 1, "plugin_namespace": DOMAIN, "plugin_version": "1"}
        node.attribute.extend(helper.make_attribute(key, value) for key, value in final.items())
    return model


def _scan_inputs(switches: ScanSwitches) -> tuple[str, ...]:
    """The inputs of a node, in order."""
    return (*_SCAN_INPUTS, *(("z",) * switches.gated), *(("initial_state",) * switches.stateful))


def _nodes(nodes: Any) -> Iterator[NodeProto]:
    """Every node, those of subgraphs included."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _nodes(graph.node)


def _flag(node: NodeProto, given: dict[str, Any], name: str) -> bool:
    value = given.get(name, 0)
    if value not in (0, 1) or isinstance(value, float):
        raise InputError(f"{node.op_type} '{node.name}': attribute '{name}' is {shown(value)}, expected 0 or 1")
    return bool(value)


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
    compiler = compiler or _compiler()
    architecture = _checked_architecture(compiler, sm, _driver_version())
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

    plugin = _Plugin(SCAN_NAMES[switches], _scan_inputs(switches), 1 + switches.stateful, describe, kernel, blocks)
    _define(trtp, ptx, plugin)


def _register_conv(trt: Any, trtp: Any, ptx: Callable[[Kernel], str], switches: ConvSwitches) -> None:
    def describe(inputs: dict[str, Any]) -> tuple[Any, ...]:
        return (inputs["x"].like(),)

    def kernel(inputs: dict[str, Any]) -> Kernel:
        return conv_kernel(
            switches,
            channel=_known(inputs["x"], 2, "the channels of 'x'"),
            width=_known(inputs["weight"], 1, "the width of 'weight'"),
            half=inputs["x"].dtype == trt.DataType.HALF,
        )

    def blocks(kernel: Kernel, batch: Any, time: Any) -> Any:
        return trtp.cdiv(batch * trtp.cdiv(time, STEPS) * kernel.rows, THREADS)

    _define(trtp, ptx, _Plugin(CONV_NAMES[switches], _CONV_INPUTS, 1, describe, kernel, blocks))


@dataclass(frozen=True)
class _Plugin:
    """What one plugin is made of, over descriptions of its inputs by name.

    describe: the descriptions of its outputs. kernel: what to compile. blocks: how many to launch, as an expression of
    batch and time.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: int
    describe: Callable[[dict[str, Any]], tuple[Any, ...]]
    kernel: Callable[[dict[str, Any]], Kernel]
    blocks: Callable[[Kernel, Any, Any], Any]


def _define(trtp: Any, ptx: Callable[[Kernel], str], plugin: _Plugin) -> None:
    """Registers one. TensorRT reads names and types of parameters from signatures, which are made here."""
    tensors = [(name, trtp.TensorDesc) for name in plugin.inputs]
    described = tuple[(trtp.TensorDesc,) * plugin.outputs]  # type: ignore[misc,valid-type]
    count = len(plugin.inputs)

    def register_function(*inputs: Any) -> Any:
        return plugin.describe(dict(zip(plugin.inputs, inputs, strict=True)))

    def autotune_function(*tensors: Any) -> Any:
        types = ["FP32|FP16" if name in _SHARED else "FP32" for name in plugin.inputs]
        types += ["FP32|FP16", "FP32"][: plugin.outputs]
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR")]

    def aot_function(*values: Any) -> Any:
        inputs = dict(zip(plugin.inputs, values[:count], strict=True))
        kernel = plugin.kernel(inputs)
        batch, time = (inputs[plugin.inputs[0]].shape_expr[axis] for axis in (0, 1))
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
