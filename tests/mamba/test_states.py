"""Models with states: what is found, that pieces of a sequence give what the whole has, and what is refused."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import onnx
import pytest
import torch
from helpers.small_lm import Mamba1, Mamba2, SmallLM
from torch import nn
from torch.nn import functional as F

from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.state_records import STATES_KEY, StateRecord, states_from_json
from hcmen.mamba import export, scan
from hcmen.mamba.cuts import cuts_of, fed
from hcmen.mamba.states import stateful
from hcmen.mamba.verification import verify_cuts
from hcmen.runtime.mamba import Stepper

VOCABULARY = 29


def ids_of(batch: int, time: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))


def test_states_have_the_names_and_shapes_of_their_modules():
    made = stateful(SmallLM(Mamba1, Mamba2), (ids_of(2, 5),))
    assert made.states == (
        StateRecord("layers.0.mixer.conv", "conv", (3, 24)),
        StateRecord("layers.0.mixer.scan", "scan", (24, 6)),
        StateRecord("layers.1.mixer.conv", "conv", (3, 34)),
        StateRecord("layers.1.mixer.dual", "dual", (6, 4, 5)),
    )
    assert made.graph_inputs == ("input_ids", *(s.name for s in made.states))
    assert made.graph_outputs == ("output", *(f"{s.name}.next" for s in made.states))
    assert [tuple(x.shape) for x in made.example] == [(2, 5), (2, 3, 24), (2, 24, 6), (2, 3, 34), (2, 6, 4, 5)]


@pytest.mark.parametrize("how", ["native", "ref"])
@pytest.mark.parametrize("mixers", [(Mamba1, Mamba1), (Mamba2, Mamba1)])
def test_pieces_give_what_the_model_gives(mixers, how):
    """The oracle is the model as it is, in float64 on the reference and in float32 on the kernels."""
    model = SmallLM(*mixers)
    ids = ids_of(3, 13)
    with scan.implementation(how), torch.no_grad():
        made = stateful(model, (ids,))
        if how == "ref":
            model.double()
        whole = model(ids)
        zeros = [x.to(whole.dtype) for x in made.first_states(3)]
        np.testing.assert_array_equal(made(ids, *zeros)[0], whole)
        for cut in cuts_of(13):
            pieces = fed(lambda given: made(*given), [ids], zeros, cut)
            got = torch.cat([piece[0] for piece in pieces], 1)
            # The state of a convolution is float32.
            np.testing.assert_allclose(got, whole, rtol=0, atol=2e-6 * float(whole.abs().max()))


def test_the_model_itself_is_as_it_was():
    model = SmallLM(Mamba1)
    ids = ids_of(2, 6)
    before = model(ids)
    made = stateful(model, (ids,))
    assert torch.equal(model(ids), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(InputError, match="1 tensors, expected 1 inputs and 2 states"):
        made(ids)
    assert torch.equal(model(ids), before)


@pytest.mark.parametrize("mixers", [(Mamba1, Mamba1), (Mamba2, Mamba1)])
def test_one_graph_serves_a_prompt_and_each_token_bit_for_bit(mixers, tmp_path):
    model = SmallLM(*mixers, size=32)
    report = export(model, ids_of(2, 7), tmp_path / "m.onnx", states=True)
    states = stateful(model, (ids_of(2, 7),)).states
    (entry,) = onnx.load(tmp_path / "m.onnx").metadata_props
    assert entry.key == STATES_KEY
    assert states_from_json(entry.value, "m.onnx") == states
    assert report.states == [state.name for state in states]
    assert report.cuts == {"library": 0, "functions": 0}
    assert "in pieces, with the library: the same bits as a whole" in str(report)
    assert {size.name for size in report.sizes} == {"batch", "time"}
    assert "states: off by" in str(report)
    assert f"{states[0].name} axis" not in str(report)
    ids = ids_of(3, 21).numpy()
    with torch.no_grad():
        eager = model(torch.from_numpy(ids)).numpy()
    for library in (True, False):
        stepper = Stepper(tmp_path / "m.onnx", library=library, threads=1)
        assert stepper.kernels == ("native" if library else "functions")
        stepper.reset(3)
        whole = stepper.feed(input_ids=ids)["output"]
        last = stepper.state
        np.testing.assert_allclose(whole, eager, rtol=0, atol=5e-6 * np.abs(eager).max())
        for cut in cuts_of(21):
            stepper.reset(3)
            edges = np.cumsum((0, *cut))
            pieces = [stepper.feed(input_ids=ids[:, a:b])["output"] for a, b in itertools.pairwise(edges)]
            np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)
            for name, values in stepper.state.items():
                np.testing.assert_array_equal(values, last[name])


def test_a_file_of_the_last_step(tmp_path):
    model = SmallLM(Mamba1)
    export(model, ids_of(2, 7), tmp_path / "m.onnx", states=True, last_step=True)
    ids = ids_of(1, 9)
    stepper = Stepper(tmp_path / "m.onnx")
    got = stepper.feed(input_ids=ids.numpy())["output"]
    with torch.no_grad():
        np.testing.assert_allclose(got, model(ids)[:, -1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "options", "error", "said"),
    [
        (lambda: Wrapped(Attention()), {}, CheckFailed, "the first module that differs is extra (Attention)"),
        (lambda: SmallLM(Mamba1), {"states": False, "last_step": True}, InputError, "last_step was asked for without"),
        (
            lambda: SmallLM(Mamba1),
            {"dynamic": {0: "batch"}},
            InputError,
            "dynamic was given with states, expected batch",
        ),
    ],
)
def test_what_cannot_have_states_leaves_no_file(model, options, error, said, tmp_path):
    with pytest.raises(error) as caught:
        export(model(), ids_of(2, 9), tmp_path / "m.onnx", **{"states": True, **options})
    assert said in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_gives_other_numbers_in_pieces_is_refused(tmp_path):
    """Its states are another model's: the first step is right, and what it leaves is not."""
    made = stateful(SmallLM(Mamba1), (ids_of(2, 7),))
    export(SmallLM(Mamba1), ids_of(2, 7), tmp_path / "m.onnx", states=True, verify=False, functions=False)
    bounds = dict.fromkeys(made.graph_outputs, 1e-5)
    assert verify_cuts(made, tmp_path / "m.onnx", functions=False, bounds=bounds) == {"library": 0}
    model = onnx.load(tmp_path / "m.onnx")
    (scan_node,) = [node for node in model.graph.node if node.op_type == "SelectiveScan"]
    model.graph.node.append(onnx.helper.make_node("Neg", ["turned"], [scan_node.output[1]]))
    scan_node.output[1] = "turned"
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(CheckFailed, match=r"'output' is .* off when 21 steps come in pieces of .* with the library"):
        verify_cuts(made, tmp_path / "m.onnx", functions=False, bounds=bounds)


class Wrapped(nn.Module):
    """A language model and something that is not causal, or not ours."""

    def __init__(self, extra: nn.Module):
        super().__init__()
        self.lm = SmallLM(Mamba1)
        self.extra = extra
        self.eval()

    def forward(self, input_ids):
        return self.extra(self.lm(input_ids))


class Attention(nn.Module):
    """Causal attention over the logits."""

    def forward(self, x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)


class Positions(nn.Module):
    """Adds a number for each position."""

    def forward(self, x):
        return x + torch.arange(x.shape[1])[:, None]


class OverTime(nn.Module):
    """Subtracts the mean over time."""

    def forward(self, x):
        return x - x.mean(1, keepdim=True)


class Backwards(nn.Module):
    """A convolution of the flipped series, as bidirectional models have it."""

    def forward(self, x):
        weight = torch.linspace(0, 1, 3).expand(x.shape[2], 3)
        return scan.causal_conv1d(x.flip(1), weight, activation="none").flip(1)


@pytest.mark.parametrize("extra", [Attention, Positions, OverTime, Backwards])
def test_what_mixes_time_otherwise_is_named(extra):
    with pytest.raises(CheckFailed) as caught:
        stateful(Wrapped(nn.Sequential(nn.Identity(), extra())), (ids_of(2, 9),))
    said = str(caught.value)
    assert f"the first module that differs is extra.1 ({extra.__name__})" in said
    assert "use transformers' OnnxExporter" in said
    assert "\n" not in said


def test_a_mean_of_the_last_step_alone_is_no_obstacle():
    """Outputs without time are compared at the end, as what a prompt is summed up by."""

    class Last(nn.Module):
        def forward(self, x):
            return x[:, -1]

    made = stateful(Wrapped(Last()), (ids_of(2, 9),))
    assert made.output_names == ("output",)
    with pytest.raises(CheckFailed):
        stateful(Wrapped(nn.Sequential(OverTime(), Last())), (ids_of(2, 9),))


class Keeping(nn.Module):
    """As of transformers: `logits_to_keep` of the last steps, 0 for all. A number is not for pieces."""

    def __init__(self):
        super().__init__()
        self.lm = SmallLM(Mamba1)

    def forward(self, input_ids, logits_to_keep=0):
        return {"logits": self.lm(input_ids)[:, -logits_to_keep:], "kept": torch.tensor(logits_to_keep)}


@pytest.mark.parametrize("model", [SmallLM(Mamba1), Keeping().eval()])
def test_the_last_step_alone_is_asked_for(model):
    ids = ids_of(2, 9)
    whole = stateful(model, (ids,))
    made = stateful(model, (ids,), last_step=True)
    for steps in (9, 1):
        last, want = (m(ids[:, :steps], *m.first_states(2)) for m in (made, whole))
        assert torch.equal(last[0], want[0][:, -1:])
        assert all(map(torch.equal, last[-2:], want[-2:]))
    if isinstance(model, Keeping):
        assert made(*made.example)[1] == 1
        two = stateful(model, (ids, 2), last_step=True, check=False)(*made.example)[0]
        assert two.shape[1] == 2  # as the caller says


class Calls(nn.Module):
    """A model of one call of ours."""

    def __init__(self, call):
        super().__init__()
        self.inner = nn.Identity()
        self.inner.forward = call

    def forward(self, x, mask=None):
        return self.inner(x)


def conv(x, **more):
    return scan.causal_conv1d(x, torch.ones(x.shape[2], 3), **more)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x: x, "Calls makes no convolution or scan by hcmen.mamba.scan: build and export it within"),
        (
            lambda x: conv(x, reverse=True),
            "causal_conv1d of module inner runs from the last step to the first: a causal model alone has states",
        ),
        (
            lambda x: conv(x, initial_state=x.new_zeros(2, 2, 4)),
            "causal_conv1d of module inner is given a state by the model itself: leave the model's own cache out",
        ),
        (
            lambda x: conv(x.transpose(0, 1)).transpose(0, 1),
            "causal_conv1d of module inner has batch and time [5, 2], expected [2, 5] as the model's inputs",
        ),
        (lambda x: conv(x.repeat(1, 2, 1))[:, :5], "causal_conv1d of module inner has batch and time [2, 10]"),
        (lambda x: (conv(x), object()), "output 'output_1' is a object, expected a tensor, or a nest of tensors"),
        (lambda x: (conv(x), "text")[1], "the model gives a str, expected a tensor, or a nest of tensors"),
        (lambda x: {"x": conv(x)}, "'x' is the name of two inputs, outputs or states"),
    ],
)
def test_calls_that_are_not_causal_are_refused(call, said):
    with pytest.raises(InputError) as caught:
        stateful(Calls(call).eval(), (torch.rand(2, 5, 4),))
    assert said in str(caught.value)
    # Nothing is left behind.
    assert scan.causal_conv1d(torch.ones(1, 2, 1), torch.ones(1, 1), activation="none").shape == (1, 2, 1)


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        (
            (torch.rand(2, 1, 4),),
            {},
            "input 'x' has shape [2, 1, 4], expected a batch of 1 or more and 2 steps or more",
        ),
        ((torch.rand(0, 3, 4),), {}, "input 'x' has shape [0, 3, 4]"),
        ((torch.rand(4),), {}, "input 'x' has shape [4], expected [batch, time, ...]"),
        ((torch.rand(2, 5, 4),), {"mask": torch.ones(2, 4)}, "input 'mask' has shape [2, 4], expected [batch, time"),
        ((), {"x": 1}, "no tensor among the model's inputs"),
    ],
)
def test_examples_that_do_not_do_are_refused(args, kwargs, said):
    with pytest.raises(InputError) as caught:
        stateful(Calls(conv).eval(), args, kwargs)
    assert said in str(caught.value)


def test_a_model_in_training_is_refused():
    with pytest.raises(InputError, match="is in training mode: call its eval"):
        stateful(Calls(conv), (torch.rand(2, 5, 4),))


def test_a_model_whose_layers_change_is_refused():
    state = {"calls": 1}

    def call(x):
        for _ in range(state["calls"]):
            x = conv(x)
        return x

    made = stateful(Calls(call).eval(), (torch.rand(2, 5, 4),))
    for calls, said in ((0, "0 convolutions and scans ran, expected 1"), (2, "call 1 of this run is causal_conv1d")):
        state["calls"] = calls
        with pytest.raises(InputError, match=said):
            made(*made.example)


def test_shared_layers_and_calls_have_names_of_their_own():
    def call(x):
        y, last = conv(conv(x), return_last_state=True)
        assert last.shape == (x.shape[0], 2, 4)
        return scan.causal_conv1d(y, torch.ones(4, 1))  # of width 1, without a state

    model = Calls(call).eval()
    made = stateful(model, (torch.rand(2, 5, 4),))
    assert [s.name for s in made.states] == ["inner.conv", "inner.conv_2"]
    twice = nn.Sequential(model, model).eval()
    assert [s.name for s in stateful(twice, (torch.rand(2, 5, 4),)).states] == [
        *("0.inner.conv", "0.inner.conv_2", "0.inner.conv_3", "0.inner.conv_4"),
    ]


@pytest.mark.parametrize("gated", [True, False])
def test_one_call_written_in_several_ways_has_one_state(gated):
    """The state that a graph keeps is that of the way which is read: with the gate, or the first."""

    def call(x):
        A, B, z = -torch.ones(4, 2), torch.ones(2, 5, 2), torch.ones_like(x) if gated else None
        with scan.one_call():
            out = scan.selective_scan(x, x, A, B, B)
            y, last = scan.selective_scan(x, x, A, B, B, z=z, return_last_state=True)
            lasts.append(last)
        with scan.one_call():
            return scan.selective_scan(out + y, x, A, B, B)

    lasts = []
    x = torch.rand(2, 5, 4)
    made = stateful(Calls(call).eval(), (x,), check=False)
    assert [s.name for s in made.states] == ["inner.scan", "inner.scan_2"]
    first = torch.rand(2, 4, 2)
    _, after, _ = made(x, first, torch.zeros(2, 4, 2))
    want = scan.selective_scan(
        x, x, -torch.ones(4, 2), *[torch.ones(2, 5, 2)] * 2, initial_state=first, return_last_state=True
    )
    assert torch.equal(after, want[1])
    assert (after is lasts[-1]) == gated


def test_nests_of_tensors_are_flat_in_a_graph():
    Pair = collections.namedtuple("Pair", "left right")

    class Nested(nn.Module):
        def forward(self, x, *, more, scale=1.0):
            y = conv(x * scale)
            return Pair(y, [more["a"] + y, None, {"deep": more["b"][0] * y}])

    x, a, b = (torch.rand(2, 5, 4) for _ in range(3))
    model = Nested().eval()
    made = stateful(model, (x,), {"more": {"a": a, "b": (b, "word")}, "scale": 0.5})
    assert made.input_names == ("x", "more.a", "more.b.0")
    assert made.output_names == ("left", "right.0", "right.2.deep")
    got = made(x, a, b, *made.first_states(2))
    want = model(x, more={"a": a, "b": (b,)}, scale=0.5)
    for one, other in zip(got, (want.left, want.right[0], want.right[2]["deep"]), strict=False):
        assert torch.equal(one, other)


def test_numbers_that_are_not_finite_prove_nothing():
    with pytest.raises(CheckFailed, match="'output' has no finite number"):
        stateful(Calls(lambda x: conv(x) * float("nan")).eval(), (torch.rand(2, 5, 4),))
