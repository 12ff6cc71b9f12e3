"""Engines are native code: those that this user compiled here run, others do not unless that is asked for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers.command import Outcome, run
from helpers.fake_tensorrt import MODULES, compiled, machine
from helpers.micro import micro_clip

import hcmen.runtime.commands.doctor_tensorrt
from hcmen.base.bundle import read_bundle
from hcmen.base.engines import EngineRecord, read_engines
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.trust import key_path, made_key, signature
from hcmen.base.typed import as_typed
from hcmen.runtime import load
from hcmen.runtime.backends import TensorRT
from hcmen.runtime.benchmark.command import main as bench_main
from hcmen.runtime.commands.doctor_tensorrt import tensorrt_rows
from hcmen.runtime.commands.follow import main as follow_main
from hcmen.runtime.commands.run import main as run_main

both = pytest.mark.parametrize("flavour", list(MODULES), indirect=True)


@pytest.fixture
def flavour(request) -> str:
    """Which TensorRT the machine of a test has."""
    return str(getattr(request, "param", "tensorrt"))


@pytest.fixture
def trt(monkeypatch, tmp_path, flavour) -> Any:
    return machine(monkeypatch, tmp_path, flavour=flavour)


@pytest.fixture(autouse=True)
def state(monkeypatch, tmp_path) -> Path:
    """A state folder of its own for each test."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state" / "hcmen" / "engine.key"


@pytest.fixture
def ready(micro_bundle, trt, state, flavour) -> Path:
    """A bundle with an engine of "full", compiled here."""
    assert compiled(micro_bundle, "--variant", "full", "--max-batch", 4, "--backend", flavour).code == 0
    return micro_bundle


@pytest.fixture
def clip(ready, tmp_path) -> Path:
    return micro_clip(tmp_path)


def changed(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle / "engines" / "manifest.json"
    data = json.loads(path.read_text())
    change(data["engines"][0])
    path.write_text(json.dumps(data))


def scored(bundle: Path, clip: Path, *arguments: object, backend: str = "tensorrt") -> Outcome:
    return run(run_main, clip, "--bundle", bundle, "--backend", backend, *arguments)


def followed(bundle: Path, clip: Path, *arguments: object, backend: str = "tensorrt") -> Outcome:
    folder = clip.parent / "chunks"
    folder.mkdir(exist_ok=True)
    shutil.copy(clip, folder / "1.npz")
    (folder / "end").touch()
    options = ("--window", 1, "--hop", 1, "--rate", "audio=5", "--rate", "vision=5", "--variant", "full")
    return run(follow_main, folder, "--bundle", bundle, "--backend", backend, *options, *arguments)


def measured(bundle: Path, clip: Path, *arguments: object, backend: str = "tensorrt") -> Outcome:
    options = ("--variant", "full", "--rounds", 1, "--calls", 1, "--warmup", 0, "--loads", 0, "--clip", clip)
    return run(bench_main, bundle, "--backend", backend, *options, *arguments)


FOREIGN: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "unsigned": (lambda bundle, key: changed(bundle, lambda e: e.pop("signature")), "not signed"),
    "another machine's": (lambda bundle, key: key.unlink(), "signed, and this user has no key to tell by whom"),
    "another user's": (
        lambda bundle, key: key.write_text("0" * 64 + "\n"),
        "signed by another user or on another machine, or altered since",
    ),
    "with host code": (
        lambda bundle, key: changed(bundle, lambda e: e.update(version_compatible=True)),
        "signed by another user or on another machine, or altered since",
    ),
    "signed with nothing": (
        lambda bundle, key: changed(bundle, lambda e: e.update(signature=signature(b"", without_signature(e)))),
        "signed by another user or on another machine, or altered since",
    ),
}


def without_signature(entry: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in entry.items() if k != "signature"}


@both
@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.parametrize("command", [scored, followed, measured])
def test_engines_of_others_run_where_that_is_asked_for_alone(ready, clip, state, command, kind, flavour):
    command = partial(command, backend=flavour)
    assert command(ready, clip).code == 0
    make, what = FOREIGN[kind]
    make(ready, state)
    done = command(ready, clip)
    assert (done.code, done.out if command.func is not measured else "") == (5, ""), done.err
    line = next(line for line in [*done.lines, *done.out.splitlines()] if f"engine: {what}" in line)
    assert f"expected an engine that this user compiled here: run {as_typed('hcmen-compile')}" in line
    place = "this device" if flavour == "tensorrt" else "any machine"
    assert line.endswith(f"on {place}, or run native code of others with --trust-engines (trust_engines=True)")
    if flavour == "tensorrt" or kind != "with host code":  # which TensorRT-RTX does not know
        done = command(ready, clip, "--trust-engines")
        assert done.code == 0, done.err


def test_the_api_has_the_same_choice(ready, clip, state):
    expected = load(ready, backend="tensorrt")(str(clip)).score
    state.unlink()
    for backend in ("tensorrt", TensorRT()):
        with pytest.raises(CorruptFileError, match="this user has no key"):
            load(ready, backend=backend)(str(clip))
    assert load(ready, backend="tensorrt", trust_engines=True)(str(clip)).score == expected
    assert load(ready, backend=TensorRT(trust_engines=True))(str(clip)).score == expected
    with pytest.raises(InputError, match="trust_engines is an option of the backend 'tensorrt'"):
        load(ready, trust_engines=True)
    assert not state.exists()  # nothing but a compile makes a key


@pytest.mark.parametrize("command", [run_main, bench_main])
def test_the_option_is_for_engines(ready, clip, command):
    arguments = [clip, "--bundle", ready] if command is run_main else [ready]
    done = run(command, *arguments, "--trust-engines")
    assert done.code == 2
    assert all(word in done.lines[-1] for word in ("trust", "engines", "tensorrt"))


def test_the_doctor_runs_no_foreign_engine(ready, state, monkeypatch):
    monkeypatch.setattr(hcmen.runtime.commands.doctor_tensorrt, "find_driver", lambda: "560.35, Orin")
    state.write_text("0" * 64 + "\n")

    def row(**options: bool) -> Any:
        return {r.name: r for r in tensorrt_rows(str(ready), **options)}["engines"]

    assert row().status == "FAILED"
    assert "signed by another user" in row().detail
    assert row(trust=True).status == "ok"


def test_compiling_signs_what_it_built_and_nothing_else(ready, clip, state, trt):
    """Devices that share a bundle keep each other's engines and do not vouch for them."""
    theirs = json.loads((ready / "engines" / "manifest.json").read_text())["engines"][0]
    state.unlink()
    done = compiled(ready, "--variant", "audio_only", "--max-batch", 4)
    assert done.code == 0, done.err
    listed = {e["variant"]: e for e in json.loads((ready / "engines" / "manifest.json").read_text())["engines"]}
    assert listed["full"] == theirs
    records = {r.variant: r for r in read_engines(read_bundle(ready))}
    assert records["audio_only"].signed_with(made_key())
    assert not records["full"].signed_with(made_key())
    assert scored(ready, clip).code == 5
    # What is there already is not taken for compiled: it is built again, and is this user's then.
    before = len(trt.built)
    done = compiled(ready, "--variant", "full", "--max-batch", 4)
    assert len(trt.built) == before + 1
    assert "was not compiled here by this user and is built again" in done.err
    assert scored(ready, clip).code == 0


def test_an_own_engine_is_taken_before_a_foreign_one(ready, clip, state):
    """A better one that another signed does not keep this user's from running."""
    state.unlink()
    assert compiled(ready, "--variant", "full", "--precision", "fp16").code == 0
    done = scored(ready, clip, "--format", "json")
    assert done.code == 0, done.err
    changed(ready, lambda e: None)
    state.write_text("1" * 64 + "\n")
    assert scored(ready, clip).code == 5


@pytest.mark.parametrize("field", [f for f in EngineRecord.__dataclass_fields__ if f not in ("signature", "flavour")])
def test_every_field_is_signed(ready, field):
    bundle = read_bundle(ready)
    (record,) = read_engines(bundle)
    assert record.signed_with(made_key())
    value = getattr(record, field)
    changes = {
        bool: lambda: not value,
        int: lambda: value + 1,
        str: lambda: f"{value}x",
        tuple: lambda: (value[0] + 1,),
    }
    other: Any = changes.get(type(value))
    if field == "engine":
        other = lambda: type(value)(value.file, "0" * 64, value.bytes)  # noqa: E731
    elif field == "parity":
        other = lambda: {**value, "more": 1}  # noqa: E731
    altered = dataclasses.replace(record, **{field: other()})
    assert not altered.signed_with(made_key())
    assert not altered.signed_with(None)


@pytest.mark.parametrize("broken", ["mode", "content", "link"])
def test_an_unsafe_key_is_refused_before_anything_is_built(ready, clip, state, trt, tmp_path, broken):
    if broken == "mode":
        state.chmod(0o640)
    elif broken == "content":
        state.write_text("key\n")
    else:
        state.symlink_to(state.rename(tmp_path / "elsewhere"))
    before = len(trt.built)
    for done in (scored(ready, clip), compiled(ready, "--variant", "full", "--force")):
        assert done.code == 5
        assert done.lines[-1].startswith(f"error: {key_path()}: ")
        assert done.lines[-1].endswith("remove it and compile the engines again")
    assert len(trt.built) == before
    assert scored(ready, clip, "--trust-engines").code == 0


def test_without_a_home_nothing_is_compiled_and_only_the_trusted_runs(ready, clip, trt, monkeypatch):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "nowhere")
    before = len(trt.built)
    done = compiled(ready, "--variant", "full", "--force")
    assert done.code == 2
    assert "no home folder for the key that signs engines: set XDG_STATE_HOME to a folder of yours" in done.lines[-1]
    assert len(trt.built) == before
    done = scored(ready, clip)
    assert done.code == 5
    assert "this user has no key to tell by whom (nor a home folder)" in done.lines[-1]
    assert scored(ready, clip, "--trust-engines").code == 0


def test_a_self_test_opens_no_foreign_engine_either(ready, clip, state):
    """One line for one reason, whatever is asked for and however many clips wait."""
    state.unlink()
    for arguments in (("--self-test", "--variant", "full"), ("--variant", "full"), (clip, clip)):
        done = scored(ready, clip, *arguments)
        assert (done.code, done.out) == (5, "")
        assert len({line for line in done.lines if line.startswith("error: ")}) == 1
