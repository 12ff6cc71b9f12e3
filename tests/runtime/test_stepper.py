"""A graph with states, fed in any pieces: a running sum and a delay, whose numbers NumPy has exactly."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import loaded_after

from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.base.state_records import STATES_KEY, StateRecord, states_from_json, states_to_json
from hcmen.runtime.mamba import Stepper

onnx = pytest.importorskip("onnx", reason="the graphs are made with onnx")

CHANNEL, DELAY = 3, 2
STATES = (StateRecord("layers.0.conv", "conv", (DELAY, CHANNEL)), StateRecord("layers.0.scan", "scan", (1, CHANNEL)))


def graph(**changes) -> bytes:
    """sums = the sums of x over all steps so far; delayed = x of two steps before. A state for each.

    changes: metadata: the JSON text, None for none. scan: the shape of that state in the graph.
    """
    from onnx import TensorProto, helper

    def tensor(name, *shape):
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def ints(name, *values):
        return helper.make_tensor(name, TensorProto.INT64, [len(values)], values)

    conv, scan = (s.name for s in STATES)
    nodes = [
        helper.make_node("CumSum", ["x", "axis"], ["partial"]),
        helper.make_node("Add", ["partial", scan], ["sums"]),
        helper.make_node("Slice", ["sums", "last", "end", "axes"], [f"{scan}.next"]),
        helper.make_node("Concat", [conv, "x"], ["series"], axis=1),
        helper.make_node("Slice", ["series", "zero", "minus_delay", "axes"], ["delayed"]),
        helper.make_node("Slice", ["series", "minus_delay", "end", "axes"], [f"{conv}.next"]),
    ]
    made = helper.make_graph(
        nodes,
        "running",
        [
            tensor("x", "batch", "time", CHANNEL),
            tensor(conv, "batch", DELAY, CHANNEL),
            tensor(scan, *changes.get("scan", ("batch", 1, CHANNEL))),
        ],
        [
            tensor("sums", "batch", "time", CHANNEL),
            tensor("delayed", "batch", "time", CHANNEL),
            tensor(f"{conv}.next", "batch", DELAY, CHANNEL),
            tensor(f"{scan}.next", "batch", None, CHANNEL),
        ],
        [
            helper.make_tensor("axis", TensorProto.INT64, [], [1]),
            *(ints("axes", 1), ints("last", -1), ints("zero", 0), ints("minus_delay", -DELAY), ints("end", 1 << 40)),
        ],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    text = changes.get("metadata", states_to_json(STATES))
    if text is not None:
        helper.set_model_props(model, {STATES_KEY: text})
    return model.SerializeToString()


@pytest.fixture
def path(tmp_path) -> Path:
    (tmp_path / "m.onnx").write_bytes(graph())
    return tmp_path / "m.onnx"


@pytest.fixture
def stepper(path) -> Stepper:
    return Stepper(path, threads=1)


def x_of(batch: int, time: int) -> np.ndarray:
    return np.random.default_rng(7).integers(-9, 9, (batch, time, CHANNEL)).astype(np.float32)


@pytest.mark.parametrize("cut", [(9,), (1,) * 9, (4, 1, 1, 3), (8, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_pieces_give_what_the_whole_sequence_has(stepper, cut, batch):
    x = x_of(batch, sum(cut))
    stepper.reset(batch)
    found, at = [], 0
    for steps in cut:
        found.append(stepper.feed(x=x[:, at : at + steps]))
        at += steps
        assert stepper.steps == at
    sums, delayed = (np.concatenate([f[name] for f in found], axis=1) for name in ("sums", "delayed"))
    np.testing.assert_array_equal(sums, np.cumsum(x, axis=1))
    np.testing.assert_array_equal(delayed[:, DELAY:], x[:, :-DELAY])
    assert not delayed[:, :DELAY].any()
    state = stepper.state
    np.testing.assert_array_equal(state["layers.0.scan"][:, 0], x.sum(1))
    np.testing.assert_array_equal(state["layers.0.conv"], x[:, -DELAY:])
    assert stepper.kernels == "standard"
    assert [t.name for t in stepper.inputs] == ["x"]
    assert [t.name for t in stepper.outputs] == ["sums", "delayed"]


def test_a_sequence_branches_at_a_snapshot(stepper):
    x = x_of(1, 6)
    stepper.feed(x=x[:, :4])
    there = stepper.snapshot()
    kept = stepper.state
    first = stepper.feed(x=x[:, 4:])
    stepper.feed(x=-x)
    other = stepper.clone()
    stepper.restore(there)
    assert stepper.steps == there.steps == 4
    for name, values in kept.items():  # no run wrote into it
        np.testing.assert_array_equal(stepper.state[name], values)
    np.testing.assert_array_equal(stepper.feed(x=x[:, 4:])["sums"], first["sums"])
    assert other.steps == 12
    np.testing.assert_array_equal(other.state["layers.0.scan"], np.zeros((1, 1, CHANNEL)))
    other.restore(there)
    np.testing.assert_array_equal(other.feed(x=x[:, 4:])["sums"], first["sums"])


def test_states_are_read_set_saved_and_loaded(stepper, path, tmp_path):
    x = x_of(2, 5)
    stepper.reset(2)
    stepper.feed(x=x)
    state = stepper.state
    stepper.save(tmp_path / "state.npz")
    again = Stepper(path, library=False)
    again.load(tmp_path / "state.npz")
    assert again.batch == 2
    np.testing.assert_array_equal(again.feed(x=x)["sums"], np.cumsum(np.concatenate([x, x], 1), 1)[:, 5:])
    again.state = {name: values[:1] for name, values in state.items()}
    assert again.batch == 1
    np.testing.assert_array_equal(again.feed(x=x[:1])["sums"], np.cumsum(np.concatenate([x, x], 1), 1)[:1, 5:])
    state["layers.0.scan"][:] = np.nan  # a copy
    assert np.isfinite(stepper.state["layers.0.scan"]).all()
    stepper.reset()
    assert (stepper.batch, stepper.steps) == (1, 0)
    assert not any(values.any() for values in stepper.state.values())


def test_numbers_of_python_take_the_dtype_of_the_input(stepper):
    assert stepper.feed(x=[[[1.0, 2, 3]]])["sums"].tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({}, "no input 'x', expected x"),
        ({"x": x_of(1, 1), "y": 1}, "unknown input 'y', expected x"),
        ({"x": x_of(1, 1).astype("f8")}, "input 'x' is float64, expected float32: convert it with .astype('float32')"),
        ({"x": np.ones((1, 1, CHANNEL), "i8")}, "input 'x' is int64, expected float32"),
        ({"x": x_of(2, 1)}, "input 'x' has batch 2, expected 1, that of the states: begin anew with reset(batch=2)"),
        ({"x": x_of(1, 0)}, "input 'x' has 0 steps, expected at least 1"),
        ({"x": x_of(1, 1)[0]}, "input 'x' has shape [1, 3], expected [batch, time, 3]"),
        ({"x": x_of(1, 1)[..., :2]}, "input 'x' has shape [1, 1, 2], expected [batch, time, 3]"),
        ({"x": [[1.0], [1.0, 2.0]]}, "input 'x' is no array"),
        ({"x": None}, "input 'x' is object, expected float32"),
        ({"x": [[["a", "b", "c"]]]}, "expected float32"),
    ],
)
def test_inputs_that_do_not_fit_leave_the_states_alone(stepper, inputs, said):
    stepper.feed(x=x_of(1, 4))
    before = stepper.state
    with pytest.raises(InputError) as caught:
        stepper.feed(**inputs)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    for name, values in stepper.state.items():
        np.testing.assert_array_equal(values, before[name])


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, "2", None])
def test_a_batch_that_is_none_is_refused(stepper, batch):
    with pytest.raises(InputError, match="batch is"):
        stepper.reset(batch)


def test_a_batch_that_has_no_room_is_refused(stepper):
    with pytest.raises(InputError, match="no room in memory"):
        stepper.reset(1 << 60)
    assert stepper.batch == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("layers.0.scan"), "'layers.0.scan' is missing"),
        (lambda s: s.update(more=s["layers.0.scan"]), "'more' is no state"),
        (lambda s: s.update({"layers.0.scan": s["layers.0.scan"].astype("f8")}), "'layers.0.scan' is float64"),
        (lambda s: s.update({"layers.0.scan": s["layers.0.scan"][0]}), "'layers.0.scan' has shape [1, 3]"),
        (lambda s: s.update({"layers.0.scan": np.zeros((2, 1, 3), "f4")}), "one batch for all"),
        (lambda s: s.update({"layers.0.scan": [1]}), "'layers.0.scan' is list"),
    ],
)
def test_states_that_do_not_fit_are_refused(stepper, tmp_path, change, said):
    state = stepper.state
    change(state)
    with pytest.raises(InputError) as caught:
        stepper.state = state
    assert said in str(caught.value)
    if all(isinstance(x, np.ndarray) for x in state.values()):
        np.savez(tmp_path / "s.npz", **state)
        with pytest.raises(InputError) as caught:
            stepper.load(tmp_path / "s.npz")
        assert said in str(caught.value)


def test_files_of_states_that_are_damaged_are_refused(stepper, tmp_path):
    stepper.save(tmp_path / "s.npz")
    sound = (tmp_path / "s.npz").read_bytes()
    bad = tmp_path / "bad.npz"
    for content in (b"", b"PK\x03\x04", sound[: len(sound) // 2], sound[:-1], sound[:9]):
        bad.write_bytes(content)
        with pytest.raises(CorruptFileError, match="damaged or no file of states"):
            stepper.load(bad)
    np.savez_compressed(bad, **stepper.state)
    with pytest.raises(CorruptFileError, match="member"):
        stepper.load(bad)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("layers.0.conv.npy", b"\x93NUMPY\x01\x00")
    with pytest.raises(CorruptFileError):
        stepper.load(bad)
    np.savez(bad, **{**stepper.state, "layers.0.scan": np.array([{}])})
    with pytest.raises(CorruptFileError):
        stepper.load(bad)
    for place, said in (("none.npz", "no such file"), (".", "is a directory")):
        with pytest.raises(InputError, match=said):
            stepper.load(tmp_path / place)
    with pytest.raises(InputError):
        stepper.save(tmp_path / "no" / "s.npz")


def test_a_snapshot_of_another_model_is_refused(stepper, path):
    with pytest.raises(InputError, match="a snapshot of another model"):
        stepper.restore(Stepper(path).snapshot())
    with pytest.raises(InputError, match="a snapshot of type dict"):
        stepper.restore({})


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"metadata": None}, InputError, "a model without states (no hcmen.states in its metadata)"),
        ({"metadata": ""}, CorruptFileError, "is no JSON text"),
        ({"metadata": "[" * 100_000}, CorruptFileError, "is no JSON text"),
        ({"metadata": "[]"}, CorruptFileError, "has version []"),
        ({"metadata": '{"version": 2, "states": []}'}, CorruptFileError, "has version 2, expected 1"),
        ({"metadata": '{"version": 1, "states": []}'}, CorruptFileError, "no list of 1 to"),
        ({"metadata": states_to_json(STATES[:1] * 2)}, CorruptFileError, "one name for two states"),
        (
            {"metadata": states_to_json([*STATES, StateRecord("more", "scan", (1, 1))])},
            CorruptFileError,
            "input 'more' is not there, expected float32 ['batch', 1, 1] as hcmen.states says",
        ),
        (
            {"metadata": states_to_json([STATES[0], StateRecord("layers.0.scan", "scan", (2, CHANNEL))])},
            CorruptFileError,
            "input 'layers.0.scan' is float32 ['batch', 1, 3], expected float32 ['batch', 2, 3]",
        ),
        ({"metadata": states_to_json(STATES[:1])}, None, ""),
        ({"scan": ("batch", 1)}, CorruptFileError, ""),
    ],
)
def test_files_that_are_no_model_with_states_are_refused(tmp_path, changes, error, said):
    (tmp_path / "m.onnx").write_bytes(graph(**changes))
    if error is None:  # the other state is an input like others then
        assert [t.name for t in Stepper(tmp_path / "m.onnx").inputs] == ["x", "layers.0.scan"]
        return
    with pytest.raises(error) as caught:
        Stepper(tmp_path / "m.onnx")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input": 3}, "input is 3, expected a text"),
        ({"input": ""}, "output is"),
        ({"output": "x"}, "output is 'x', expected 'layers.0.conv.next'"),
        ({"kind": "lstm"}, "kind is 'lstm', expected one of conv, scan, dual"),
        ({"kind": ["conv"]}, "kind is of type list"),
        ({"dtype": "float16"}, "dtype is 'float16', expected float32"),
        ({"shape": [1, 2, 3]}, "shape is [1, 2, 3], expected 'batch' and 2 sizes"),
        ({"shape": ["batch", 2, True]}, "shape is"),
        ({"shape": ["batch", 2, 0]}, "shape is"),
        ({"shape": ["batch", 1 << 20, 1 << 20]}, "fewer than"),
        ({"shape": "batch"}, "shape is 'batch'"),
        ({"more": 1}, "expected input, output, kind, shape, dtype"),
    ],
)
def test_metadata_are_checked(change, said):
    text = json.loads(states_to_json(STATES))
    text["states"][0].update(change)
    with pytest.raises(CorruptFileError) as caught:
        states_from_json(json.dumps(text), "m.onnx")
    assert said in str(caught.value)
    assert states_from_json(states_to_json(STATES), "m.onnx") == STATES


def test_files_that_are_no_graph_are_refused(tmp_path):
    sound = graph()
    file = tmp_path / "m.onnx"
    for content in (b"", b"x", sound[: len(sound) // 2], sound[:-1]):
        file.write_bytes(content)
        with pytest.raises(CorruptFileError):
            Stepper(file)
    for place in ("none.onnx", "."):
        with pytest.raises(InputError):
            Stepper(tmp_path / place)
    model = onnx.load_from_string(sound)
    tensor = model.graph.initializer.add(name="w", data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value="/etc/passwd")
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CorruptFileError, match=r"expected 'm\.onnx\.data' alone"):
        Stepper(file)


def test_weights_may_lie_beside_the_model(tmp_path):
    model = onnx.load_from_string(graph())
    weights = onnx.numpy_helper.from_array(
        np.arange(300, dtype=np.float32)[None, None, :3] + np.zeros((1, 100, 3), "f4"), "w"
    )
    model.graph.initializer.append(weights)
    model.graph.node.append(onnx.helper.make_node("ReduceMax", ["w"], ["most"], keepdims=0))
    model.graph.output.append(onnx.helper.make_tensor_value_info("most", 1, []))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=1000)
    stepper = Stepper(tmp_path / "m.onnx")
    assert stepper.feed(x=x_of(1, 2))["most"] == 2


def test_a_run_that_fails_leaves_the_states_alone(path, monkeypatch):
    stepper = Stepper(path)
    stepper.feed(x=x_of(1, 2))
    before = stepper.state

    def failing(*_):
        raise RuntimeError("no\nluck")

    monkeypatch.setattr(stepper._session._session, "run", failing)
    with pytest.raises(BackendError, match="could not run it: no luck"):
        stepper.feed(x=x_of(1, 2))
    assert stepper.steps == 2
    for name, values in stepper.state.items():
        np.testing.assert_array_equal(values, before[name])


def test_clones_run_in_threads_of_their_own(stepper):
    x = x_of(1, 200)
    found = {}

    def work(sign):
        mine = stepper.clone()
        for t in range(x.shape[1]):
            last = mine.feed(x=sign * x[:, t : t + 1])["sums"]
        found[sign] = last[:, 0]

    threads = [threading.Thread(target=work, args=(sign,)) for sign in (1, -1, 2, -2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stepper.steps == 0
    for sign, sums in found.items():
        np.testing.assert_array_equal(sums, sign * x.sum(1))


def test_a_stepper_never_imports_torch(path):
    pytest.importorskip("torch", reason="only with torch installed does its absence prove anything")
    loaded = loaded_after(
        "import sys\nfrom hcmen.runtime.mamba import Stepper\nStepper(sys.argv[1]).feed(x=[[[1.0, 2.0, 3.0]]])",
        str(path),
    )
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint({"torch", "onnx", "transformers", "tokenizers"})
