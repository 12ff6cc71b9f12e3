"""Channels-last forwards of recognised mixers: the numbers of the module, or left out with the reason."""

from __future__ import annotations

import copy
import math

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hcmen.base.errors import CheckFailed
from hcmen.mamba import export, exporting, rewrite
from hcmen.mamba.rewrite import rewrite_modules
from hcmen.mamba.scan import state_space_dual_ref
from tests.helpers.mamba_forks import ChannelsFirstMixer


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model with no parameter left at an initial value that would hide a mistake, such as zeros and ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def agree(model: nn.Module, rewritten: nn.Module, *args, **kwargs) -> None:
    with torch.no_grad():
        expected, found = model(*args, **kwargs), rewritten(*args, **kwargs)
    scale = expected.abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(found / scale, expected / scale, atol=2e-6, rtol=0)


class TwoLayers(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(ChannelsFirstMixer(**options) for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "scale": 0.7},
        {"directions": "v1"},
        {"directions": "v2"},
        {"directions": "v2", "averaged": True},
    ],
    ids=str,
)
def test_forks_of_mamba_1(options):
    model, x = stir(TwoLayers(**options)), torch.randn(2, 9, 12)
    rewritten, report = rewrite_modules(model, (x,))
    assert [(one.name, one.count, one.kept) for one in report] == [("channels-last Mamba-1", 2, True)]
    assert report[0].nodes_after < report[0].nodes_before
    assert all("forward" in layer.__dict__ for layer in rewritten.layers)
    assert not any("forward" in layer.__dict__ for layer in model.layers)
    assert rewritten.layers[0].A_log is model.layers[0].A_log, "the copy shares its parameters"
    for batch, time in ((2, 9), (1, 1), (3, 14)):
        agree(model, rewritten, torch.randn(batch, time, 12))


def test_a_mixer_that_computes_something_else_is_left_out():
    class Squared(ChannelsFirstMixer):
        def forward(self, hidden_states, inference_params=None):
            return super().forward(hidden_states) ** 2

    model, x = stir(Squared()), torch.randn(2, 9, 12)
    rewritten, (one,) = rewrite_modules(model, (x,))
    assert not one.kept
    assert "differs by" in one.reason
    assert "forward" not in rewritten.__dict__
    agree(model, rewritten, x)


def test_only_the_first_steps_alike_is_left_out():
    class Forgetful(ChannelsFirstMixer):
        """Starts anew after 40 steps: what a comparison on a few steps would not see."""

        def forward(self, hidden_states, inference_params=None):
            return torch.cat([super(Forgetful, self).forward(x) for x in hidden_states.split(40, dim=1)], 1)

    _, (one,) = rewrite_modules(stir(Forgetful()), (torch.randn(1, 60, 12),))
    assert not one.kept
    assert "differs by" in one.reason


@pytest.mark.parametrize(("multiple", "steps", "kept"), [(4, 12, True), (5, 100, False)])
def test_a_mixer_that_takes_multiples_of_a_length_alone(multiple, steps, kept):
    """Half of the example is no multiple, and of a long one neither is the part that is compared."""

    class Sliced(ChannelsFirstMixer):
        def forward(self, hidden_states, inference_params=None):
            if hidden_states.shape[1] % multiple:
                raise RuntimeError("slices of one length alone")
            return super().forward(hidden_states)

    _, (one,) = rewrite_modules(stir(Sliced()), (torch.randn(2, steps, 12),))
    assert one.kept == kept
    assert kept or one.reason == "its own forward fails on a part of the example: RuntimeError"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_experts_one_after_the_other(gated, biased, transposed):
    """Against a loop over tokens in float64; expert 3 is chosen by none."""
    torch.manual_seed(0)
    experts, hidden, inner, tokens = 5, 4, 6, 7
    wide = 2 * inner if gated else inner
    first, name = torch.randn(experts, wide, hidden).double(), "gate_up_proj" if gated else "up_proj"
    second = torch.randn(experts, hidden, inner).double()
    biases = torch.randn(experts, wide).double(), torch.randn(experts, hidden).double()

    class Experts(nn.Module):
        num_experts, has_gate, has_bias, is_transposed, act_fn = experts, gated, biased, transposed, nn.SiLU()

        def _apply_gate(self, x):
            gate, up = x.chunk(2, dim=-1)
            return self.act_fn(gate) * up

    module = Experts()
    for own, weight, bias in ((name, first, biases[0]), ("down_proj", second, biases[1])):
        setattr(module, own, weight.transpose(1, 2) if transposed else weight)
        setattr(module, f"{own}_bias", bias)
    x, weights = torch.randn(tokens, hidden).double(), torch.rand(tokens, 2).double()
    chosen = torch.tensor([[0, 1], [1, 2], [4, 0], [2, 1], [4, 1], [0, 2], [1, 4]])
    want = torch.zeros_like(x)
    for token in range(tokens):
        for rank in range(2):
            e = chosen[token, rank]
            y = first[e] @ x[token] + biased * biases[0][e]
            y = F.silu(y[:inner]) * y[inner:] if gated else F.silu(y)
            want[token] += weights[token, rank] * (second[e] @ y + biased * biases[1][e])
    torch.testing.assert_close(rewrite._one_after_the_other(module, x, chosen, weights), want)


def test_a_mixer_called_with_states_is_left_out_and_keeps_its_own_forward_for_such_calls():
    model, x = stir(ChannelsFirstMixer()), torch.randn(2, 9, 12)
    _, (one,) = rewrite_modules(model, (x,), {"inference_params": {"a": 1}})
    assert (one.kept, one.reason) == (False, "it is called with inference_params")
    rewritten, (one,) = rewrite_modules(model, (x,))
    assert one.kept
    agree(model, rewritten, x, inference_params={"a": 1})


def test_a_mixer_that_the_example_does_not_reach():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = ChannelsFirstMixer(), ChannelsFirstMixer()

        def forward(self, x):
            return self.used(x)

    _, report = rewrite_modules(stir(Spare()), (torch.randn(2, 9, 12),))
    assert {(one.where, one.kept) for one in report} == {("used", True), ("spare", False)}


def test_a_model_that_cannot_be_copied():
    class Stubborn(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    model = Stubborn(3, 3)
    same, (one,) = rewrite_modules(model, (torch.zeros(1, 3),))
    assert same is model
    assert not one.kept
    assert "no copies" in one.reason


def test_a_model_without_mixers_has_nothing_to_report():
    _, report = rewrite_modules(nn.Linear(3, 3), (torch.zeros(1, 3),))
    assert report == []


class GatedNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width))

    def forward(self, x, z):
        x = x * F.silu(z)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.weight


class Mamba2(nn.Module):
    """mamba_ssm's Mamba2, and Mamba2Simple's initial states: in_proj gives [z0, x0, z, x, B, C, dt]."""

    def __init__(self, *, width=8, head=3, dim=4, state=5, group=1, beside=0, norm=True, wide_D=False, states=False):
        super().__init__()
        inner = head * dim
        self.headdim, self.ngroups, self.rmsnorm, self.dt_limit = dim, group, norm, (0.02, 0.5)
        self.sizes, self.beside, self.activation = [inner, inner + 2 * group * state, head], beside, "swish"
        self.in_proj = nn.Linear(width, 2 * beside + sum(self.sizes), bias=False)
        self.conv1d = nn.Conv1d(self.sizes[1], self.sizes[1], 4, groups=self.sizes[1], padding=3)
        self.dt_bias, self.A_log = nn.Parameter(torch.randn(head)), nn.Parameter(torch.rand(head))
        self.D = nn.Parameter(torch.randn(inner if wide_D else head))
        if norm:
            self.norm = GatedNorm(inner)
        if states:
            self.init_states = nn.Parameter(torch.randn(head, dim, state))
        self.out_proj = nn.Linear(inner + beside, width, bias=False)

    def forward(self, u):
        batch, time, _ = u.shape
        z0, x0, z, xBC, dt = self.in_proj(u).split([self.beside, self.beside, *self.sizes], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2))[..., :time]).transpose(1, 2)
        head, dim, group = self.A_log.shape[0], self.headdim, self.ngroups
        x, B, C = xBC.tensor_split([head * dim, (head * dim + xBC.shape[2]) // 2], dim=-1)
        first = self.init_states.expand(batch, -1, -1, -1) if hasattr(self, "init_states") else None
        y = state_space_dual_ref(
            x.reshape(batch, time, head, dim),
            dt,
            -torch.exp(self.A_log),
            B.reshape(batch, time, group, -1),
            C.reshape(batch, time, group, -1),
            self.D if self.D.shape[0] == head else self.D.reshape(head, dim),
            self.dt_bias,
            None if self.rmsnorm else z.reshape(batch, time, head, dim),
            first,
            delta_softplus=True,
            dt_min=self.dt_limit[0],
            dt_max=self.dt_limit[1],
        ).reshape(batch, time, head * dim)
        y = self.norm(y, z) if self.rmsnorm else y
        return self.out_proj(torch.cat([F.silu(z0) * x0, y], dim=-1))


@pytest.mark.parametrize(
    "options", [{}, {"beside": 6}, {"norm": False}, {"wide_D": True, "group": 3}, {"states": True}], ids=str
)
def test_mamba_2(options):
    model = stir(Mamba2(**options))
    rewritten, (one,) = rewrite_modules(model, (torch.randn(2, 9, 8),))
    assert (one.name, one.kept) == ("channels-last Mamba-2", True), one.reason
    for batch, time in ((2, 9), (1, 1), (3, 14)):
        agree(model, rewritten, torch.randn(batch, time, 8))


def test_a_mamba_2_whose_limits_are_elsewhere_is_left_out():
    model = stir(Mamba2())
    wrong = copy.deepcopy(model)
    wrong.forward = lambda u, own=model: own(u)  # computes with the limits of another
    wrong.dt_limit = (0.0, math.inf)
    _, (one,) = rewrite_modules(wrong, (torch.randn(2, 9, 8),))
    assert not one.kept


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
TWO = {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 6, "mamba_n_groups": 2, "mamba_chunk_size": 4}
FAMILIES = {
    "Mamba": {**SMALL, "state_size": 5},
    "FalconMamba": {**SMALL, "state_size": 5},
    "Jamba": {**SMALL, **HEADS, "mamba_d_state": 5, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 3},
    "Mamba2": {**SMALL, "num_heads": 4, "head_dim": 8, "state_size": 6, "n_groups": 2, "chunk_size": 4},
    "Bamba": {**SMALL, **HEADS, **TWO, "attn_layer_indices": [1]},
    "FalconH1": {**SMALL, **HEADS, **TWO, "head_dim": 8, "mamba_d_ssm": 32, "ssm_in_multiplier": 1.3},
    "GraniteMoeHybrid": {**SMALL, **HEADS, **TWO, "num_local_experts": 3, "layer_types": ["mamba", "attention"]},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**FAMILIES[name])
    model = stir(getattr(transformers, name + "ForCausalLM")(config))
    ids = torch.randint(0, 50, (2, 11))
    mask = torch.tensor([[0] * 3 + [1] * 8, [1] * 11])
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    rewritten, report = rewrite_modules(model, (), call)
    kinds = {one.name for one in report}
    assert all(one.kept for one in report), report
    assert kinds & {"channels-last Mamba-1", "channels-last Mamba-2"}
    assert ("experts apart" in kinds) == (name in ("Jamba", "GraniteMoeHybrid"))
    for one in (call, {"input_ids": ids[:1, :5], "use_cache": False}):
        with torch.no_grad():
            expected, found = model(**one).logits, rewritten(**one).logits
        torch.testing.assert_close(found, expected, atol=3e-6 * float(expected.abs().max()), rtol=0)


def test_export_holds_the_file_to_the_model_as_it_came(tmp_path, monkeypatch):
    model, x = stir(TwoLayers()), torch.randn(2, 9, 12)
    report = export(model, x, tmp_path / "m.onnx", dynamic={0: "batch", 1: "time"})
    assert next((row["name"], row["kept"]) for row in report.rewrites) == ("channels-last Mamba-1", True)
    before, after = (report.rewrites[0][name] for name in ("nodes_before", "nodes_after"))
    assert before > after
    assert f"Mamba-1: rewritten, layers.0 and 1 more, {before} to {after} operations: within" in str(report)
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert kinds.count("SelectiveScan") == 2
    assert "Transpose" not in kinds
    alone = export(stir(ChannelsFirstMixer()), x, tmp_path / "one.onnx")
    assert f"Mamba-1: rewritten, the model, {before // 2} to {after // 2} operations: within" in str(alone)

    def careless(model, args, kwargs):
        twin = copy.deepcopy(model)
        twin.layers[0].D.data += 1
        return twin, [rewrite.Rewrite("careless", "layers.0", 1, 1, 1, True, "nobody looked")]

    monkeypatch.setattr(exporting, "rewrite_modules", careless)
    with pytest.raises(CheckFailed):
        export(model, x, tmp_path / "other.onnx", dynamic={0: "batch", 1: "time"})
    assert not (tmp_path / "other.onnx").exists()
