"""hcmen-compile --backend tensorrt-rtx over the real builder: what is built, listed, built again and refused."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.command import run
from helpers.micro import micro_bundle_at
from helpers.rtx import BACKEND, RealBuilder, built, command, compiled, files, listed, needs_rtx
from helpers.small_bundle import engine_record, graph, make_bundle
from onnx import TensorProto, helper

from hcmen.base.bundle import read_bundle
from hcmen.base.engines import write_engine
from hcmen.base.records import MANIFEST_FILE
from hcmen.base.shipped import DEMO
from hcmen.base.trust import made_key
from hcmen.export.commands.compile import main as compile_main

pytestmark = needs_rtx

ALL = "80-86-89-120-121"


@pytest.fixture(scope="module")
def version() -> str:
    """That of the builder."""
    return RealBuilder().tensorrt.version


@pytest.fixture(scope="module")
def micro(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of the smallest model; tests choose targets of their own."""
    return micro_bundle_at(tmp_path_factory.mktemp("micro") / "bundle")


# --- built ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "arguments", "targets", "profiles", "batch"),
    [("fp32", (), ALL, 1, 32), ("fp16", ("--target", "89,86", "--profiles", 2, "--max-batch", 4), "86-89", 2, 4)],
)
def test_an_engine_is_built_and_listed(micro, version, precision, arguments, targets, profiles, batch):
    (told,) = built(micro, "--variant", "text_only", "--precision", precision, *arguments)
    name = f"text_only.{precision}.sm{targets}.rtx{version}.engine"
    record = listed(micro)[name]
    measured = {"fresh": True, **{key: told[key] for key in ("seconds", "weights_bytes")}}
    assert told == {**json.loads(json.dumps(record.to_json())), **measured}
    assert 0 < told["weights_bytes"] < told["bytes"]
    assert (record.variant, record.precision, record.tensorrt) == ("text_only", precision, version)
    assert record.capabilities == tuple(map(int, targets.split("-")))
    assert (record.flavour, record.plugin, record.profiles) == ("tensorrt-rtx", "function", profiles)
    assert (record.max_batch, record.machine, record.parity) == (batch, platform.machine(), {"measured": False})
    assert record.signed_with(made_key())
    assert record.of_export(read_bundle(micro))
    side = json.loads((micro / "engines" / f"{name}.json").read_text())
    assert side["sha256"] == record.engine.sha256
    assert side["build"]["profiles"][-1]["text"][2][0] == batch
    assert len(side["build"]["profiles"]) == profiles


@pytest.mark.slow  # half a minute: the whole graph that ships, in the precision whose loops the builder once refused
def test_the_graph_of_all_modalities_that_ships_is_built(tmp_path):
    shutil.copytree(DEMO / "bundle", tmp_path / "demo", ignore=shutil.ignore_patterns("engines"))
    (told,) = built(tmp_path / "demo", "--variant", "full", "--precision", "fp16", "--target", "120")
    assert told["bytes"] > read_bundle(tmp_path / "demo").manifest.weights.bytes
    assert (told["plugin"], told["capabilities"]) == ("function", [120])


def test_targets_and_profiles_name_or_replace_engines(bundle, version):
    """Targets and precision are in the name, so such engines stand side by side; of others one replaces the other."""
    first = built(bundle, "--variant", "audio_only")
    assert [e["fresh"] for e in first] == [True]
    before = files(bundle)
    assert [e["fresh"] for e in built(bundle, "--variant", "audio_only", "--target", "121,120,89,86,80")] == [False]
    assert files(bundle) == before
    (forced,) = built(bundle, "--variant", "audio_only", "--force")
    assert forced["fresh"]
    for again in (("--profiles", 2), ("--profiles", 2, "--max-batch", 8), ("--profiles", 2, "--max-batch", 1)):
        assert [e["fresh"] for e in built(bundle, "--variant", "audio_only", *again)] == [True]
        assert [e["fresh"] for e in built(bundle, "--variant", "audio_only", *again)] == [False]
        assert len(listed(bundle)) == 1
    for beside in (("--target", "86"), ("--target", "86", "--precision", "fp16"), ("--target", "86,86, 120")):
        assert [e["fresh"] for e in built(bundle, "--variant", "audio_only", *beside)] == [True]
    expected = {f"audio_only.fp32.sm{targets}.rtx{version}.engine" for targets in (ALL, "86", "86-120")}
    assert set(listed(bundle)) == expected | {f"audio_only.fp16.sm86.rtx{version}.engine"}
    assert set(files(bundle)) == {"manifest.json", *listed(bundle), *(f"{name}.json" for name in listed(bundle))}


def test_an_engine_that_was_altered_or_of_another_export_is_built_again(bundle, version):
    name = f"text_only.fp32.sm86.rtx{version}.engine"
    arguments = ("--variant", "text_only", "--target", "86")
    built(bundle, *arguments)
    path = bundle / "engines" / name
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert [e["fresh"] for e in built(bundle, *arguments)] == [True]
    listed(bundle)
    engines = files(bundle)
    make_bundle(bundle, scale=2.0)
    (bundle / "engines").mkdir()
    for file, content in engines.items():
        (bundle / "engines" / file).write_bytes(content)
    assert [e["fresh"] for e in built(bundle, *arguments)] == [True]


def test_engines_of_both_flavours_stand_in_one_index(bundle, version):
    opened = read_bundle(bundle)
    write_engine(opened, engine_record(opened, b"of a Jetson", "audio_only"), b"of a Jetson", {})
    built(bundle, "--variant", "audio_only", "--precision", "fp16", "--target", "86")
    write_engine(opened, engine_record(opened, b"of a server", "audio_only", capabilities=(90,)), b"of a server", {})
    flavours = {name: record.flavour for name, record in listed(bundle).items()}
    assert flavours == {
        "audio_only.fp16.sm87.trt10.3.0.engine": "tensorrt",
        "audio_only.fp16.sm90.trt10.3.0.engine": "tensorrt",
        f"audio_only.fp16.sm86.rtx{version}.engine": "tensorrt-rtx",
    }
    assert [e["fresh"] for e in built(bundle, "--variant", "audio_only", "--precision", "fp16", "--target", "86")] == [
        False
    ]


def test_two_processes_compile_into_one_bundle(bundle):
    """Different engines both remain; of the same one it is the later, with its own report."""
    asked = [(v, t) for v in ("text_only", "audio_only") for t in ("86", "89")] + [("text_only", "86")] * 2
    processes = [
        subprocess.Popen(
            command(bundle, "--variant", v, "--target", t), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for v, t in asked
    ]
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    records = listed(bundle)
    assert {(r.variant, *r.capabilities) for r in records.values()} == {(v, int(t)) for v, t in asked}
    for name, record in records.items():
        assert json.loads((bundle / "engines" / f"{name}.json").read_text())["sha256"] == record.engine.sha256


# --- refused ----------------------------------------------------------------------------------------------------------

KNOWN = "expected 80, 86, 89, 120, 121: leave {} out, or compile on such a GPU with --backend tensorrt"
REFUSALS = [
    *((f"--plugin {plugin}", 2, "has no .* plugins: use --plugin function") for plugin in ("library", "aot")),
    ("--version-compatible", 2, "leave out --version-compatible"),
    ("--hardware-compatible", 2, "leave out --hardware-compatible"),
    ("--timing-cache timings", 2, "leave out --timing-cache"),
    *((f"--target {n}", 2, KNOWN.format(n)) for n in (75, 87, 90, 100, 103, 110, 1000, 0)),
    ("--target 75 --precision fp16", 2, KNOWN.format(75)),
    ("--target 86,87,89", 2, KNOWN.format(87)),
    *(
        (f"--target={text}", 2, "expected compute capabilities, such as 86,89,120")
        for text in ("", "86,", ",86", "sm86", "8.6", "-1", "+86", "8_6", "\u0668\u0666", "86;89", "9" * 10, "9" * 5000)
    ),
    ("--profiles 0", 2, "profiles"),
    ("--profiles 3", 2, "profiles"),
    *((f"--workspace {n}", 2, "expected 1048576 to 17592186044416") for n in (16777217, 10**17, 10**400)),
    ("--workspace 0", 2, "workspace"),
]


@pytest.mark.parametrize(("arguments", "code", "text"), REFUSALS, ids=[each[0][:40] for each in REFUSALS])
def test_what_is_refused_before_anything_is_built(shared_bundle, arguments, code, text):
    done = run(compile_main, "--bundle", shared_bundle, *BACKEND, *arguments.split(" "))
    assert (done.code, done.out, len(done.lines)) == (code, "", 1), done.err
    assert re.search(text, done.err), done.err
    assert len(done.err) < 1200
    assert not files(shared_bundle)


def test_targets_are_for_the_portable_flavour_alone(shared_bundle):
    done = run(compile_main, "--bundle", shared_bundle, "--target", "86")
    assert (done.code, len(done.lines)) == (2, 1)
    assert "--target with --backend tensorrt" in done.err


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_a_bundle_of_fewer_bits_is_refused(bundle, precision):
    """Only the manifest says so: such a bundle is refused by it, before its graphs are read."""
    manifest = json.loads((bundle / MANIFEST_FILE).read_text())
    manifest["precision"] = precision
    (bundle / MANIFEST_FILE).write_text(json.dumps(manifest))
    done = run(compile_main, "--bundle", bundle, *BACKEND)
    assert (done.code, len(done.lines)) == (2, 1), done.err
    assert f"its graphs are {precision}" in done.err
    assert not files(bundle)


def refused_by_the_builder(bundle: Path, *arguments: object) -> str:
    """The line of a compile that ends with code 3 and leaves nothing."""
    done = compiled(bundle, "--variant", "text_only", "--target", "86", *arguments)
    assert (done.code, done.out) == (3, ""), done.err
    errors = [line for line in done.lines if line.startswith("error:")]
    assert done.lines[-1:] == errors
    assert not files(bundle)
    return errors[0]


def test_a_workspace_that_is_too_small(tmp_path):
    line = refused_by_the_builder(micro_bundle_at(tmp_path / "micro"), "--workspace", 1)
    assert "could not build the engine: " in line
    assert "within workspace limit" in line


def strings(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("StringNormalizer", ["words"], ["plain"], name="the/words"))
    proto.graph.initializer.append(helper.make_tensor("words", TensorProto.STRING, [1], [b"a"]))


def complex_numbers(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("DFT", ["score_", ""], ["spectrum"], name="the/spectrum", axis=1))
    proto.graph.initializer.append(helper.make_tensor("score_", TensorProto.FLOAT, [1, 4, 1], [1.0] * 4))


def foreign_op(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("Fused", ["text"], ["fused"], name="the/fused", domain="elsewhere"))
    proto.opset_import.append(helper.make_opsetid("elsewhere", 1))


def wrong_sizes(proto: Any) -> None:
    proto.graph.node.append(helper.make_node("Concat", ["text", "a_cube"], ["both"], name="the/both", axis=2))
    proto.graph.initializer.append(helper.make_tensor("a_cube", TensorProto.FLOAT, [3, 3, 3, 3], [0.0] * 81))


def nine_axes(proto: Any) -> None:
    proto.graph.initializer.append(helper.make_tensor("nine", TensorProto.FLOAT, [1] * 9, [0.0]))
    proto.graph.node.append(helper.make_node("Identity", ["nine"], ["other"], name="the/axes"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (strings, "initializer: words$"),
        (complex_numbers, "DFT node 'the/spectrum': "),
        (foreign_op, "Fused node 'the/fused': .*Plugin not found"),
        (wrong_sizes, "Concat node 'the/both': "),
        (nine_axes, "initializer: nine$"),
    ],
)
def test_a_graph_that_the_parser_refuses(tmp_path, change: Callable[[Any], None], why):
    proto = graph("text_only")
    change(proto)
    bundle = make_bundle(tmp_path / "bundle", ("text_only",), graphs={"text_only": proto})
    line = refused_by_the_builder(bundle)
    assert f"{bundle / 'text_only.onnx'}: TensorRT-RTX " in line
    assert re.search(f"cannot take the graph: .*{why}", line), line
    assert len(line) < 1200
