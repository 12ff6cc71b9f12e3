"""PyTorch on CUDA with the kernels: values and gradients against the reference in float64 on the same device, at sizes
beyond what the emulation can run, on other streams, in CUDA graphs, and under torch.compile's fake tensors.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from helpers.device import NEEDS_GPU
from helpers.dual_cases import DualCase, dual_arrays
from torch import Tensor

from hcmen.base.cuda_library import cuda_library_path
from hcmen.base.errors import BackendError
from hcmen.mamba.scan import (
    causal_conv1d,
    causal_conv1d_ref,
    implementation,
    selective_scan,
    selective_scan_ref,
    state_space_dual,
    state_space_dual_ref,
)


def _problem() -> str | None:
    if not torch.cuda.is_available():
        return NEEDS_GPU
    try:
        cuda_library_path()
    except BackendError as error:
        return str(error)
    return None


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_problem() is not None, reason=f"{_problem()}")]


@pytest.fixture(autouse=True)
def native():
    """The kernels or an error, never the reference in their place."""
    with implementation("native"):
        yield


def scan_inputs(
    batch: int, time: int, channel: int, state: int, group: int = 1, dtype=torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    return {
        "u": normal(batch, time, channel).to(dtype),
        "delta": (normal(batch, time, channel) - 4).to(dtype),
        "A": -(torch.arange(state, device="cuda") % 16 + 1.0).repeat(channel, 1),
        "B": normal(batch, time, group, state).to(dtype),
        "C": normal(batch, time, group, state).to(dtype),
        "D": normal(channel),
        "delta_bias": 0.1 * normal(channel),
        "z": normal(batch, time, channel).to(dtype),
        "initial_state": normal(batch, channel, state),
    }


SIZES = [(1, 50, 512, 16), (16, 500, 512, 16), (2, 4096, 256, 16), (3, 375, 200, 12), (2, 300, 96, 64), (300, 5, 64, 8)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_scan(sizes, reverse, dtype):
    data = scan_inputs(*sizes, dtype=dtype)
    flags = {"delta_softplus": True, "reverse": reverse, "return_last_state": True}
    y, last = selective_scan(**data, **flags)
    want_y, want_last = selective_scan_ref(**{k: x.double() for k, x in data.items()}, **flags)
    if dtype == torch.float16:
        torch.testing.assert_close(y.double(), want_y, rtol=1e-3, atol=1e-4)
    else:
        assert float((y - want_y).abs().max()) <= 3e-6 * float(want_y.abs().max())
    assert float((last - want_last).abs().max()) <= 3e-6 * float(want_last.abs().max())


@pytest.mark.parametrize(("sizes", "group"), [((2, 375, 256, 16), 1), ((4, 100, 96, 12), 3), ((2, 60, 64, 64), 1)])
def test_gradients_of_the_scan(sizes, group):
    data = scan_inputs(*sizes, group=group)
    ours = {k: x.clone().requires_grad_() for k, x in data.items()}
    exact = {k: x.double().requires_grad_() for k, x in data.items()}
    flags = {"delta_softplus": True, "return_last_state": True}
    weight = torch.randn_like(data["u"])
    for inputs, function in ((ours, selective_scan), (exact, selective_scan_ref)):
        y, last = function(**inputs, **flags)
        ((y * weight).sum() + last.square().sum()).backward()
    for name, x in exact.items():
        worst = float((ours[name].grad - x.grad).abs().max()) / float(x.grad.abs().max())
        assert worst <= 1e-5, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("batch", "time", "head", "head_dim", "state", "group"),
    [(2, 375, 24, 64, 128, 1), (1, 1000, 8, 64, 64, 8), (4, 60, 6, 33, 256, 2), (16, 50, 24, 64, 16, 1)],
)
def test_the_dual_and_its_gradients(batch, time, head, head_dim, state, group, reverse):
    case = DualCase(batch, time, head, head_dim, state, group, reverse=reverse, wide=reverse, dt_max=0.1)
    data = {name: torch.from_numpy(x).cuda() for name, x in dual_arrays(case).items()}
    ours = {k: x.clone().requires_grad_() for k, x in data.items()}
    exact = {k: x.double().requires_grad_() for k, x in data.items()}
    weight = torch.randn_like(data["x"])
    for inputs, function in ((ours, state_space_dual), (exact, state_space_dual_ref)):
        y, last = function(**inputs, **case.flags, return_last_state=True)
        inputs["y"], inputs["last"] = y.detach(), last.detach()
        ((y * weight).sum() + last.square().sum()).backward()
    for name in ("y", "last"):
        got, want = ours.pop(name), exact.pop(name)
        assert float((got - want).abs().max()) <= 3e-6 * float(want.abs().max()), name
    for name, x in exact.items():
        worst = float((ours[name].grad - x.grad).abs().max()) / float(x.grad.abs().max())
        assert worst <= 1e-5, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("width", [2, 3, 4, 9])
def test_convolution(width):
    inputs = [
        torch.randn(8, 375, 512, device="cuda"),
        torch.randn(512, width, device="cuda"),
        torch.randn(512, device="cuda"),
        torch.randn(8, width - 1, 512, device="cuda"),
    ]
    ours = [x.clone().requires_grad_() for x in inputs]
    exact = [x.double().requires_grad_() for x in inputs]
    weight = torch.randn_like(inputs[0])
    for arguments, function in ((ours, causal_conv1d), (exact, causal_conv1d_ref)):
        y, last = function(*arguments, return_last_state=True)
        ((y * weight).sum() + last.square().sum()).backward()
    for x, e in zip(ours, exact, strict=True):
        assert float((x.grad - e.grad).abs().max()) <= 1e-5 * float(e.grad.abs().max())


def test_the_ops_keep_to_torchs_rules():
    data = scan_inputs(2, 20, 16, 4)
    arguments = (*(x.requires_grad_() for x in data.values()), True, False)
    torch.library.opcheck(torch.ops.hcmen.selective_scan.default, arguments)


def test_another_stream_and_a_cuda_graph():
    data = scan_inputs(1, 2048, 64, 16)  # chunks, so that there is a workspace
    want = selective_scan(**data, delta_softplus=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            got = selective_scan(**data, delta_softplus=True)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got, want)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = selective_scan(**data, delta_softplus=True)
    data["u"].mul_(2)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded, selective_scan(**data, delta_softplus=True))


FIRST_LAUNCH = """
import sys, torch
from hcmen.mamba.scan import implementation, selective_scan
torch.manual_seed(0)
u, delta, z = (torch.randn(1, 2048, 64, device="cuda") for _ in range(3))
B, C = (torch.randn(1, 2048, 1, 16, device="cuda") for _ in range(2))
A, D, bias = -torch.rand(64, 16, device="cuda"), torch.randn(64, device="cuda"), torch.randn(64, device="cuda")
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with implementation("native"):
    with torch.cuda.graph(graph):
        recorded = selective_scan(u, delta, A, B, C, D, bias, z, delta_softplus=True)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(recorded, selective_scan(u, delta, A, B, C, D, bias, z, delta_softplus=True))
"""


def test_the_first_launch_of_a_process_may_be_recorded():
    """Kernels, and the library itself, are then loaded while the stream is being recorded."""
    done = subprocess.run([sys.executable, "-c", FIRST_LAUNCH], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second NVIDIA GPU")
def test_a_second_device():
    data = scan_inputs(2, 50, 64, 16)
    want = selective_scan(**data, delta_softplus=True)
    got = selective_scan(**{k: x.to("cuda:1") for k, x in data.items()}, delta_softplus=True)
    assert torch.equal(got.cpu(), want.cpu())
