"""The recipe of docs/mamba.md for Mamba-3: against the recurrence of its paper, step by step in float64."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hcmen.mamba.scan import state_space_dual, state_space_dual_ref

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mamba.md"


@pytest.fixture(scope="module")
def recipe() -> Any:
    """`mamba3_siso`, as the page has it."""
    (block,) = (b for b in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if "mamba3_siso" in b)
    names: dict[str, Any] = {}
    exec(compile(block, str(PAGE), "exec"), names)
    return names["mamba3_siso"]


def arguments(batch: int, time: int, group: int, head: int, dim: int, state: int, angles: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    DT = torch.nn.functional.softplus(normal(batch, head, time) - 2)
    return {
        "Q": normal(batch, time, group, state),
        "K": normal(batch, time, group, state),
        "V": normal(batch, time, head, dim),
        "ADT": -(torch.rand(batch, head, time, generator=random, dtype=torch.float64) * 3 + 1e-4) * DT,
        "DT": DT,
        "Trap": normal(batch, head, time),
        "Q_bias": normal(head, state),
        "K_bias": normal(head, state),
        "Angles": normal(batch, time, head, angles),
        "D": normal(head),
        "Z": normal(batch, time, head, dim),
    }


def recurrence(given: dict[str, Tensor]) -> Tensor:
    """h = a h + (1 - l) dt a v' k'^T + l dt v k^T and y = h q + D v: the trapezoidal rule, ' being the step before.

    The pairs of k and q are turned by the sum of the angles so far.
    """
    batch, time, head, dim = given["V"].shape
    group, state = given["Q"].shape[2:]
    angles = given["Angles"].shape[3]
    y = torch.zeros_like(given["V"])
    for b in range(batch):
        for h in range(head):
            memory, turned = torch.zeros(dim, state, dtype=torch.float64), [0.0] * angles
            k_before, v_before = torch.zeros(state, dtype=torch.float64), torch.zeros(dim, dtype=torch.float64)
            for t in range(time):
                dt, decay = given["DT"][b, h, t], given["ADT"][b, h, t].exp()
                share = 1 / (1 + torch.exp(-given["Trap"][b, h, t]))
                q = given["Q"][b, t, h // (head // group)] + given["Q_bias"][h]
                k = given["K"][b, t, h // (head // group)] + given["K_bias"][h]
                q, k = q.clone(), k.clone()
                for i in range(angles):
                    turned[i] += math.pi * math.tanh(given["Angles"][b, t, h, i]) * float(dt)
                    cos, sin = math.cos(turned[i]), math.sin(turned[i])
                    for x in (q, k):
                        first, second = float(x[2 * i]), float(x[2 * i + 1])
                        x[2 * i], x[2 * i + 1] = first * cos - second * sin, first * sin + second * cos
                v = given["V"][b, t, h]
                memory = decay * memory + (1 - share) * dt * decay * torch.outer(v_before, k_before)
                memory = memory + share * dt * torch.outer(v, k)
                gate = given["Z"][b, t, h]
                y[b, t, h] = (memory @ q + given["D"][h] * v) * gate / (1 + torch.exp(-gate))
                k_before, v_before = k, v
    return y


@pytest.mark.parametrize("sizes", [(2, 13, 2, 6, 5, 8, 3), (1, 1, 1, 1, 1, 2, 1), (1, 30, 3, 3, 4, 6, 3)], ids=str)
def test_the_recipe_is_exact(recipe: Any, sizes: tuple[int, ...]) -> None:
    given = arguments(*sizes)
    wanted = recurrence(given)
    y, _ = recipe(**given, dual=state_space_dual_ref)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    y, _ = recipe(**{name: x.float() for name, x in given.items()}, dual=state_space_dual)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_the_recipe_goes_on_where_it_stopped(recipe: Any) -> None:
    given = arguments(2, 17, 1, 4, 3, 6, 2)
    whole, _ = recipe(**given, dual=state_space_dual_ref)
    states, pieces = None, []
    for begin, end in ((0, 1), (1, 2), (2, 11), (11, 17)):
        piece = {
            name: x[:, :, begin:end] if name in ("ADT", "DT", "Trap") else x[:, begin:end] if x.dim() == 4 else x
            for name, x in given.items()
        }
        y, states = recipe(**piece, states=states, dual=state_space_dual_ref)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-12, atol=1e-12)


def test_a_step_that_underflows_is_no_nan(recipe: Any) -> None:
    given = {name: x.float() for name, x in arguments(1, 5, 1, 2, 3, 4, 1).items()}
    for name in ("DT", "ADT"):
        given[name][:, :, 2] = 0
    y, _ = recipe(**given)
    assert torch.isfinite(y).all()
