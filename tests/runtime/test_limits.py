"""Graphs that never end, signals that nothing answers, outputs that no manifest names, files that shrink."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from attacks.graphs import endless
from helpers.command import run
from helpers.small_bundle import clip_arrays, graph, make_bundle
from onnx import ModelProto, TensorProto, helper, numpy_helper

import hcmen.runtime.commands.run
from hcmen.base.clip import write_clip
from hcmen.base.errors import BackendError, InputError
from hcmen.runtime import load
from hcmen.runtime.backends.limits import within

IS_FREE = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 31)
FREE = pytest.mark.skipif(not IS_FREE, reason="no thread runs while a session is made")
TEXT = ("text",)


def slow_to_load() -> ModelProto:
    """The graph of text_only with a constant that ONNX Runtime folds for a minute, when the session is made."""
    made = graph("text_only")
    made.graph.initializer.append(numpy_helper.from_array(np.array([50_000_000], np.int64), "large"))
    nodes = [helper.make_node("Expand", ["bias", "large"], ["s0"])]
    nodes += [helper.make_node("Sin", [f"s{i}"], [f"s{i + 1}"]) for i in range(300)]
    nodes += [helper.make_node("ReduceMean", ["s300"], ["mean"], keepdims=0)]
    made.graph.node.extend(nodes)
    place = next(node for node in made.graph.node if node.output[0] == "score")
    place.input[1] = "mean"
    made.graph.node.append(place)
    made.graph.node.remove(place)
    return made


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What takes for ever -> a bundle that does; and a clip."""
    folder = tmp_path_factory.mktemp("slow")
    write_clip(folder / "clip.npz", clip_arrays(0, TEXT))
    made = {
        name: make_bundle(folder / name, ("text_only",), graphs={"text_only": proto})
        for name, proto in (("run", endless()), ("load", slow_to_load()))
    }
    return made | {"clip": folder / "clip.npz"}


def test_a_run_beyond_its_time_is_stopped(slow):
    model = load(slow["run"], time_limit=0.3)
    for _ in range(2):
        with pytest.raises(BackendError, match=r"text_only\.onnx: running it took more than 0\.3 s"):
            model(clip_arrays(0, TEXT))


@FREE
def test_a_load_beyond_its_time_is_left(slow):
    code = f"""
from hcmen.base.errors import BackendError
from hcmen.runtime import load
import os
try:
    load({str(slow["load"])!r}, time_limit=0.5).kernels("text_only")
except BackendError as error:
    print(error, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert "loading it took more than 0.5 s" in done.stdout, done.stderr


def test_within_gives_what_the_work_gives():
    assert within(5.0, lambda: 3, "w", "working") == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 // 0, "w", "working")


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), True, "3", 1e300])
def test_what_is_no_time_limit(shared_bundle, limit):
    with pytest.raises(InputError, match=r"time.limit is"):
        load(shared_bundle, time_limit=limit)


def test_a_limit_changes_nothing_else(shared_bundle):
    limited, free = load(shared_bundle, time_limit=60), load(shared_bundle)
    assert limited(clip_arrays(3)).score == free(clip_arrays(3)).score


def started(*arguments: object) -> subprocess.Popen[str]:
    code = "from hcmen.runtime.commands.run import main; main()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("place", ["run", "load"])
@pytest.mark.parametrize("limit", [(), ("--time-limit", 100)], ids=["free", "limited"])
@pytest.mark.parametrize(("number", "code", "word"), [(2, 130, "interrupted"), (15, 143, "terminated")])
def test_a_signal_ends_a_command_that_is_deaf(slow, place, limit, number, code, word):
    process = started(slow["clip"], "--bundle", slow[place], *limit)
    wait_until_busy(process)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    if place == "load" and not IS_FREE:
        code, message = -number, ""  # by the signal itself, which a shell shows as the same code
    else:
        message = f"error: {word}\n"
    assert (process.returncode, out, err) == (code, "", message)


def wait_until_busy(process: subprocess.Popen[str]) -> None:
    """Until the graph is under way: it has taken more processor time than Python needs to come there."""
    ticks = os.sysconf("SC_CLK_TCK")
    for _ in range(600):
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        if int(fields[11]) + int(fields[12]) > 3 * ticks:
            return
        time.sleep(0.05)
    raise AssertionError("it does not run")


def test_the_command_takes_a_limit(slow):
    process = started(slow["clip"], "--bundle", slow["run"], "--time-limit", 0.5)
    _out, err = process.communicate(timeout=60)
    assert process.returncode == 3
    assert err.count("\n") == 1
    assert "running it took more than 0.5 s" in err


# --- outputs --------------------------------------------------------------------------------------------------------


def changed(**how: object) -> ModelProto:
    """The graph of text_only whose output is another one than the manifest says."""
    made = graph("text_only")
    score, weights = made.graph.output
    kind = how["kind"]
    if kind == "name":
        made.graph.node[-3].output[0] = score.name = "points"
        assert made.graph.node[-3].op_type == "Add"
    elif kind == "missing":
        made.graph.output.remove(weights)
    elif kind == "more":
        made.graph.output.append(helper.make_tensor_value_info("soft", TensorProto.FLOAT, ["batch", 1]))
    elif kind == "rank":
        after(made, "score", "Unsqueeze", "axis1")
        score.type.tensor_type.shape.dim.add(dim_value=1)
    elif kind == "no rank":
        after(made, "score", "Unsqueeze", "axis1")
        score.type.tensor_type.ClearField("shape")
    elif kind == "batch":
        score.type.tensor_type.shape.dim[0].dim_value = 1
        after(made, "score", "Slice", "zero1", "axis1")
    elif kind == "half the batch":
        after(made, "score", "Slice", "zero1", "axis1")
    elif kind == "width":
        after(made, "modality_weights", "Concat", axis=1, again=True)
        weights.type.tensor_type.shape.dim[1].dim_value = 6
    elif kind == "type":
        after(made, "score", "Cast", to=TensorProto.DOUBLE)
        score.type.tensor_type.elem_type = TensorProto.DOUBLE
    elif kind == "int type":
        after(made, "score", "Cast", to=TensorProto.INT64)
        score.type.tensor_type.elem_type = TensorProto.INT64
    elif kind == "input batch":
        made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    elif kind == "input name":
        made.graph.input.append(helper.make_tensor_value_info("further", TensorProto.FLOAT, [1]))
    return made


def after(made: ModelProto, name: str, op: str, *inputs: str, again: bool = False, **attributes: object) -> None:
    """Puts a node before the output `name`."""
    node = next(n for n in made.graph.node if n.output[0] == name)
    node.output[0] = "before"
    made.graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), "zero1"))
    given = ["before", "before"] if again else ["before", *inputs]
    made.graph.node.append(helper.make_node(op, given, [name], **attributes))


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("name", "has an output 'points'"),
        ("missing", "has no output 'modality_weights'"),
        ("more", "has an output 'soft'"),
        ("rank", "output 'score' has shape [batch, 1], expected [batch]"),
        ("no rank", "output 'score'"),
        ("batch", "output 'score' has shape [1], expected [batch]"),
        ("half the batch", "output 'score'"),
        ("width", "output 'modality_weights' has shape [batch, 6], expected [batch, 3]"),
        ("type", "output 'score' is tensor(double), expected float32"),
        ("int type", "output 'score' is tensor(int64), expected float32"),
        ("input batch", "input 'text' has shape [1, "),
        ("input name", "has an input 'further'"),
    ],
)
def test_a_graph_is_held_to_its_manifest(tmp_path, kind, says):
    made = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": changed(kind=kind)})
    for i in range(2):
        write_clip(tmp_path / f"{i}.npz", clip_arrays(i, TEXT))
    done = run(hcmen.runtime.commands.run.main, tmp_path / "0.npz", tmp_path / "1.npz", "--bundle", made)
    assert (done.code, done.out) == (5, ""), done.err
    assert len(done.lines) == 1, done.err
    assert says in done.err
    assert "text_only.onnx" in done.err


# --- the standard output --------------------------------------------------------------------------------------------


def test_a_session_that_fails_prints_nothing(tmp_path, capfd, monkeypatch):
    """ONNX Runtime prints "EP Error" and tries again on the CPU."""
    tries = []

    def fails(self, providers, *arguments, **options):
        tries.append(providers)
        raise RuntimeError("no such device")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fails)
    made = make_bundle(tmp_path / "b", ("text_only",))
    write_clip(tmp_path / "clip.npz", clip_arrays(0, TEXT))
    done = run(hcmen.runtime.commands.run.main, tmp_path / "clip.npz", "--bundle", made, "--format", "json")
    assert done.code == 5
    assert done.out == ""
    assert len(tries) == 1
    assert capfd.readouterr().out == ""


# --- weights --------------------------------------------------------------------------------------------------------

MAPS = pytest.mark.skipif(
    tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 23),
    reason=f"onnxruntime {onnxruntime.__version__} maps nothing, 1.23 does",
)
SHOWS = """
import sys
from hcmen.runtime import load
from helpers.small_bundle import clip_arrays
model = load(sys.argv[1], **eval(sys.argv[2]))
before = model(clip_arrays(0)).score
print("weights.bin" in open("/proc/self/maps").read())
if sys.argv[3] == "cut":
    open(sys.argv[1] + "/weights.bin", "r+b").truncate(0)
assert model(clip_arrays(0)).score == before
"""


def shown(bundle: Path, options: str, cut: str = "") -> bool:
    places = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    done = subprocess.run(
        [sys.executable, "-c", SHOWS, str(bundle), options, cut], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout == "True\n"


@MAPS
def test_weights_are_mapped_where_nobody_else_may_write_them(bundle):
    bundle.chmod(0o755)
    (bundle / "weights.bin").chmod(0o644)
    assert shown(bundle, "{}")
    assert not shown(bundle, "{'map': False}")
    (bundle / "weights.bin").chmod(0o664)
    assert not shown(bundle, "{}")
    assert shown(bundle, "{'map': True}")
    (bundle / "weights.bin").chmod(0o644)
    bundle.chmod(0o777)
    assert not shown(bundle, "{}")


def test_a_running_model_outlives_weights_that_are_cut_short(bundle):
    assert not shown(bundle, "{'map': False}", "cut")


def test_the_command_reads_the_weights_on_request(bundle, tmp_path):
    write_clip(tmp_path / "clip.npz", clip_arrays(0))
    done = run(
        hcmen.runtime.commands.run.main, tmp_path / "clip.npz", "--bundle", bundle, "--no-map", "--format", "json"
    )
    assert done.code == 0
    assert len(json.loads(done.out)["results"]) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
