"""One real node through ONNX Runtime, checked against numpy: what `hcmen-doctor` runs, without `onnx` and torch.

The model is hcmen/base/selfcheck.onnx, a SelectiveScan node with its model-local function, written by
`python -m hcmen.mamba.one_node`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.errors import BackendError, CheckFailed, reason_of
from hcmen.base.op import SELECTIVE_SCAN, STATE_SPACE_DUAL

__all__ = [
    "TOLERANCE",
    "SelfCheck",
    "dual_inputs",
    "operators_run",
    "run_selfcheck",
    "selective_scan_numpy",
    "selfcheck_inputs",
    "state_space_dual_numpy",
]

MODEL = Path(__file__).with_name("selfcheck.onnx")
CONV_MODEL = Path(__file__).with_name("selfcheck_conv.onnx")
DUAL_MODEL = Path(__file__).with_name("selfcheck_dual.onnx")
# Of the largest output, in float32: docs/op.md.
TOLERANCE = 1e-6

Array = NDArray[Any]


@dataclass(frozen=True)
class SelfCheck:
    """What ran, and how far from numpy's float64 it was."""

    operators: tuple[str, ...]  # that ran, each once
    error: float  # the largest absolute error of an output over the largest absolute value of that output

    @property
    def kernel(self) -> bool:
        """Whether the kernel of the operator library ran, rather than the model-local function."""
        return SELECTIVE_SCAN.name in self.operators


def selective_scan_numpy(
    u: Array,
    delta: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    delta_bias: Array,
    z: Array | None = None,
    initial_state: Array | None = None,
    *,
    delta_softplus: bool = False,
    reverse: bool = False,
) -> tuple[Array, Array]:
    """The selective scan in float64, step by step; shapes and meaning as in docs/op.md.

    Returns:
        y [batch, time, channel] and the last state [batch, channel, state], both float64.
    """
    u, delta, A, B, C, D = (np.asarray(x, np.float64) for x in (u, delta, A, B, C, D))
    batch, time, channel = u.shape
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    B, C = (np.repeat(x, channel // x.shape[2], axis=2) for x in (B, C))
    step = delta + delta_bias
    if delta_softplus:
        step = np.where(step > 20.0, step, np.logaddexp(0.0, step))
    state = np.zeros((batch, channel, A.shape[1])) if initial_state is None else np.asarray(initial_state, np.float64)
    y = np.zeros_like(u)
    for t in reversed(range(time)) if reverse else range(time):
        state = np.exp(step[:, t, :, None] * A) * state + (step[:, t] * u[:, t])[..., None] * B[:, t]
        y[:, t] = (state * C[:, t]).sum(-1)
    y += u * D
    if z is not None:
        gate = np.asarray(z, np.float64)
        y *= gate / (1.0 + np.exp(-gate))
    return y, state


def selfcheck_inputs(batch: int = 2, time: int = 9, channel: int = 8, state: int = 4) -> dict[str, Array]:
    """Inputs of the model, the same at every call: steps around softplus(N(-4, 1)), decays down to -state."""
    rng = np.random.default_rng(0)
    means = {"delta": -4.0}

    def normal(*shape: int, mean: float = 0.0) -> Array:
        return rng.normal(mean, 1.0, shape).astype(np.float32)

    sizes = {"batch": batch, "time": time, "channel": channel, "state": state}
    inputs = {
        tensor.name: normal(*(sizes[size] for size in tensor.sizes if size in sizes), mean=means.get(tensor.name, 0.0))
        for tensor in SELECTIVE_SCAN.inputs
    }
    inputs["A"] = np.tile(-np.arange(1.0, state + 1.0, dtype=np.float32), (channel, 1))
    inputs["delta_bias"] /= np.float32(10.0)
    return inputs


def state_space_dual_numpy(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array,
    dt_bias: Array,
    z: Array,
    initial_state: Array,
) -> tuple[Array, Array]:
    """The state space dual in float64, step by step, with softplus; shapes and meaning as in docs/op.md, D [head].

    Returns:
        y [batch, time, head, head_dim] and the last state [batch, head, head_dim, state], both float64.
    """
    state, head = np.asarray(initial_state, np.float64), x.shape[2]
    B, C = (np.repeat(np.asarray(v, np.float64), head // v.shape[2], axis=2) for v in (B, C))
    step = np.logaddexp(0.0, np.asarray(dt, np.float64) + dt_bias)
    y = np.asarray(x, np.float64) * D[:, None]
    for t in range(x.shape[1]):
        added = (step[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        state = np.exp(step[:, t] * A)[..., None, None] * state + added
        y[:, t] += (state * C[:, t, :, None]).sum(-1)
    return y * z / (1.0 + np.exp(-np.asarray(z, np.float64))), state


def dual_inputs() -> dict[str, Array]:
    """Inputs of the model of StateSpaceDual, the same at every call."""
    rng = np.random.default_rng(0)
    sizes = {"batch": 2, "time": 9, "head": 4, "head_dim": 3, "group": 2, "state": 5}
    inputs = {
        tensor.name: rng.normal(size=[sizes[s] for s in tensor.sizes][: 1 if tensor.spread else None]).astype(
            np.float32
        )
        for tensor in STATE_SPACE_DUAL.inputs
    }
    inputs["A"] = -np.abs(inputs["A"]) - np.float32(0.5)
    return inputs


def run_selfcheck(library: Path | None) -> SelfCheck:
    """Runs the one-node model, with the operator library or (None) through its model-local function.

    Raises:
        BackendError: ONNX Runtime is missing, or refuses the library or the model.
        CheckFailed: it ran, and its numbers are wrong.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BackendError(f"ONNX Runtime cannot be imported ({error}): pip install 'hcmen[cpu]'") from error
    inputs: dict[str, Any] = selfcheck_inputs()
    try:
        outputs, operators = operators_run(onnxruntime, MODEL.read_bytes(), inputs, library)
    except Exception as error:
        version = onnxruntime.__version__
        raise BackendError(f"ONNX Runtime {version} cannot run the one-node model: {reason_of(error)}") from error
    worst = max(
        float(np.abs(got - want).max() / np.abs(want).max())
        for got, want in zip(outputs, selective_scan_numpy(**inputs, delta_softplus=True), strict=True)
    )
    check = SelfCheck(tuple(operators), worst)
    if not worst <= TOLERANCE:
        raise CheckFailed(
            f"the one-node model is off by {worst:.1e} of its largest output, expected {TOLERANCE:.0e} or less"
        )
    if library is not None and not check.kernel:
        raise CheckFailed(f"{library} was registered and its kernel did not run: {', '.join(operators)} ran instead")
    return check


def operators_run(
    onnxruntime: Any, model: bytes, inputs: dict[str, Array], library: Path | None = None, threads: int = 1
) -> tuple[list[Array], list[str]]:
    """Runs `model` once.

    Returns:
        Its outputs, and the operators that ran, each once, as ONNX Runtime's own profile tells them.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")
        options.intra_op_num_threads = threads
        if library is not None:
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        outputs = session.run(None, inputs)
        events = json.loads(Path(session.end_profiling()).read_text())
    ran = (e for e in events if e.get("cat") == "Node" and e.get("name", "").endswith("_kernel_time"))
    return outputs, list(dict.fromkeys(e["args"]["op_name"] for e in ran))
