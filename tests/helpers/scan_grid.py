"""The grid of awkward sizes that the kernel and the model-local function both have to pass, and its float64 oracle."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch

from hcmen.mamba.scan import selective_scan_ref

# Every size with every other; the switches go round so that each size meets every one of them.
SIZES = list(itertools.product((1, 2, 7, 500), (1, 15, 16, 17, 512), (1, 4, 12, 16, 17, 64)))
SWITCHES = list(itertools.product((False, True), repeat=4))


def grid_case(time: int, channel: int, state: int, batch: int) -> dict[str, Any]:
    """The switches of one case: keyword arguments of `scan_model`, all but the sizes."""
    index = SIZES.index((time, channel, state))
    gated, stateful, reverse, softplus = SWITCHES[(index * 5 + batch * 3) % len(SWITCHES)]
    return {
        "group": None if channel % 2 or (index + batch) % 3 == 0 else 1 + (index + batch) % 2,
        "dtype": "float16" if (index + batch) % 5 == 0 else "float32",
        "gated": gated,
        "stateful": stateful,
        "reverse": reverse,
        "delta_softplus": softplus,
    }


def scan_feeds(
    rng: np.random.Generator,
    batch: int,
    time: int,
    channel: int,
    state: int,
    group: int | None,
    dtype: str,
    softplus: bool,
    gated: bool,
    stateful: bool,
) -> dict[str, np.ndarray]:
    """Realistic inputs: steps of softplus(N(-4, 1)), decays down to -16 (docs/op.md)."""

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    projection = (batch, time, state) if group is None else (batch, time, group, state)
    delta = rng.normal(-4.0, 1.0, (batch, time, channel))
    feeds = {
        "u": normal(batch, time, channel).astype(dtype),
        "delta": (delta if softplus else np.logaddexp(0.0, delta)).astype(dtype),
        "A": np.tile(-np.linspace(1.0, 16.0, state, dtype=np.float32), (channel, 1)),
        "B": normal(*projection).astype(dtype),
        "C": normal(*projection).astype(dtype),
        "D": normal(channel),
        "delta_bias": np.abs(normal(channel)) * np.float32(0.1 if softplus else 0.001),
    }
    if gated:
        feeds["z"] = normal(batch, time, channel).astype(dtype)
    if stateful:
        feeds["initial_state"] = normal(batch, channel, state)
    return feeds


def grid_feeds(time: int, channel: int, state: int, batch: int, case: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of one case of the grid."""
    return scan_feeds(
        np.random.default_rng(SIZES.index((time, channel, state))),
        *(batch, time, channel, state),
        *(case[k] for k in ("group", "dtype", "delta_softplus", "gated", "stateful")),
    )


def oracle(feeds: dict[str, np.ndarray], softplus: bool, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """y and the last state by the reference in float64, from the rounded inputs."""
    wide = {name: torch.from_numpy(x.astype(np.float64)) for name, x in feeds.items()}
    y, last = selective_scan_ref(**wide, delta_softplus=softplus, reverse=reverse, return_last_state=True)
    return y.numpy(), last.numpy()


def assert_close(got: Any, want: Any, bound: float = 1e-6) -> None:
    """float32 within `bound` of the largest value; float16 within half an ulp and a little."""
    for name, g, w in zip(("y", "last_state"), got, want, strict=False):
        assert g.shape == w.shape
        if g.dtype == np.float16:
            np.testing.assert_allclose(g.astype(np.float64), w, rtol=1e-3, atol=1e-4, err_msg=name)
        else:
            worst = np.abs(g - w).max() / np.abs(w).max()
            assert worst <= bound, f"{name}: {worst:.2e} of the largest value"
