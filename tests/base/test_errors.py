"""hcmen/base/errors.py: errors in parts, passed on as parts; one line whatever came; close names alone."""

from __future__ import annotations

import ast
import copy
import json
import os
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from helpers.small_bundle import make_bundle

from hcmen.base.bundle import read_bundle
from hcmen.base.clip import clip_from_arrays, read_clip
from hcmen.base.console import describe_error, one_line
from hcmen.base.engines import read_engines
from hcmen.base.errors import (
    BackendError,
    CorruptFileError,
    HcmenError,
    InputError,
    did_you_mean,
    reason_of,
    shown,
    unknown_name,
)
from hcmen.base.manifest import Manifest
from hcmen.base.modalities import variant_for, variant_named
from hcmen.base.records import MANIFEST, parse_json
from hcmen.base.typed import as_typed
from hcmen.data.folder import read_folder
from hcmen.models import registry
from hcmen.models.hcmen.config import ModelConfig
from hcmen.runtime.benchmark.report import read_document
from hcmen.training.config import train_setting
from hcmen.training.presets import preset_named

ROOT = Path(__file__).resolve().parents[2]
CONFIG = preset_named("tiny").model
INPUTS = CONFIG.inputs


def test_the_text_is_the_parts_on_one_line() -> None:
    assert str(InputError("plain, expected something: do it")) == "plain, expected something: do it"
    assert str(InputError("what", "that", "do it", where="here")) == "here: what, expected that: do it"
    assert str(InputError("what", fix="do it")) == "what: do it"
    assert str(InputError("two\n  lines", where="a\nfile")) == "a file: two lines"
    assert str(HcmenError()) == ""


@pytest.mark.parametrize("length", [60_000, 1_000_000])
@pytest.mark.parametrize("around", ["'{}'", '"{}"', "{}", "'it\\'s {}'", "'x' {} 'y'"])
def test_no_value_fills_a_message(length: int, around: str) -> None:
    """However it is quoted, by whomever the line is made, and with what is wrong behind it."""
    value = around.format("x" * length)
    for text in (
        str(InputError(f"{value} is odd", "less")),
        describe_error(InputError(f"{value} is odd", "less"))[0],
        describe_error(click.UsageError(f"no such option: {value}, expected less"))[0],
        describe_error(OSError(2, "no such file", value))[0],
        describe_error(ValueError(f"{value}, expected less"))[0],
        one_line(f"{value}, expected less"),
    ):
        assert len(text) <= 1200
        assert text.endswith(("expected less", "check the path", "for the traceback)"))


def test_a_part_is_changed_and_the_rest_stays() -> None:
    error = BackendError("what", "that", "do it", where="here")
    error.exit_code = 7
    other = error.but(where="there", fix="do that")
    assert (type(other), other.exit_code, str(other)) == (BackendError, 7, "there: what, expected that: do that")
    assert str(error) == "here: what, expected that: do it"
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert (str(twin), twin.exit_code, twin.fix) == (str(error), 7, "do it")


def test_long_quotations_are_cut_and_prose_is_not() -> None:
    long = "x" * 1000
    assert str(InputError(f"key {long!r} is unknown")) == f"key '{'x' * 200}...' is unknown"
    assert str(InputError(f'key "{long}\'s" is unknown')) == f'key "{"x" * 200}..." is unknown'
    prose = f"the model's own words, {'and more, ' * 30}are the model's"
    assert str(InputError(prose)) == prose
    started = time.process_time()
    assert len(str(InputError(f"key {'x' * 10**6!r} and 'the end"))) < 300
    assert time.process_time() - started < 2


def test_foreign_errors_and_values_are_told_briefly() -> None:
    assert reason_of(ValueError("a\n b"), 3) == "a b"
    assert reason_of(KeyboardInterrupt()) == "KeyboardInterrupt"
    assert [shown(v) for v in ("x", b"x", 3, None, True)] == ["'x'", "b'x'", "3", "None", "True"]
    assert [shown(v) for v in ([[]], {"a": 1}, (1,))] == ["of type list", "of type dict", "of type tuple"]
    assert len(shown("x" * 10**6)) < 210
    assert [shown(v) for v in ([1, 0.5], [], [1] * 9, [None])] == ["[1, 0.5]", "[]", "of type list", "of type list"]
    assert [shown(v) for v in (1 << 40000, [-1 << 400])] == ["a number of 40001 bits", "[a number of 401 bits]"]


@pytest.mark.parametrize(
    ("name", "near"), [("ful", "full"), ("text_mising", "text_missing"), ("FULL", "full"), ("xyz", ""), ("", "")]
)
def test_a_close_name_is_suggested(name: str, near: str) -> None:
    names = ["full", "text_missing", "text_only"]
    assert did_you_mean(name, names) == (f"did you mean '{near}'?" if near else "")
    error = unknown_name("variant", name, names)
    hint = f"did you mean '{near}'? " if near else ""
    assert str(error) == f"unknown variant '{name}': {hint}choose from full, text_missing, text_only"


def test_a_name_of_any_length_is_refused_at_once() -> None:
    started = time.process_time()
    assert did_you_mean("x" * 10**6, ["x" * 10**4]) == ""
    assert time.process_time() - started < 0.1


# --- got, expected, fix -----------------------------------------------------------------------------------------------

Parts = tuple[type[HcmenError], str, str | None, str | None]


def manifest(**changes: Any) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        path = make_bundle(folder / "b", ("full",)) / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}))
        return read_bundle(path.parent)

    return read


def index(content: bytes) -> Callable[[Path], Any]:
    def read(folder: Path) -> Any:
        bundle = read_bundle(make_bundle(folder / "b", ("full",)))
        (bundle.path / "engines").mkdir()
        (bundle.path / "engines" / "manifest.json").write_bytes(content)
        return read_engines(bundle)

    return read


def written(name: str, content: bytes, read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    def reads(folder: Path) -> Any:
        (folder / name).write_bytes(content)
        return read(folder / name)

    return reads


def clip(**arrays: Any) -> Callable[[Path], Any]:
    return lambda folder: clip_from_arrays("a clip", arrays, INPUTS)


COMPILE_AGAIN = f"remove {{folder}}/b/engines and run {as_typed('hcmen-compile')} --bundle {{folder}}/b"
EXPORT_AGAIN = "copy or export the bundle again"
# Where (None: no place), what came, what was expected, what to do.
SAMPLES: dict[str, tuple[Callable[[Path], Any], type[HcmenError], str | None, str, str | None, str | None]] = {
    "a manifest of the future": (
        *(manifest(schema_version=9), InputError, "{folder}/b/manifest.json"),
        *("manifest schema_version is 9", "1 or 2", "upgrade hcmen, or export the bundle again"),
    ),
    "a misspelt key": (
        *(manifest(sorce={}), CorruptFileError, "{folder}/b/manifest.json", "unknown key 'sorce'", None),
        "did you mean 'source'? copy or export the bundle again",
    ),
    "an unknown variant in a manifest": (
        *(manifest(variants={"ful": {}}), CorruptFileError, "{folder}/b/manifest.json", "unknown variant 'ful'"),
        "full, text_missing, audio_missing, vision_missing, text_only, audio_only, vision_only",
        f"did you mean 'full'? {EXPORT_AGAIN}",
    ),
    "a value of another type": (
        *(manifest(scores=3), CorruptFileError, "{folder}/b/manifest.json"),
        *("'scores' is an integer", "a list", EXPORT_AGAIN),
    ),
    "a number out of range": (
        *(manifest(opset=0), CorruptFileError, "{folder}/b/manifest.json", "'opset' is 0", f"1 to {1 << 31}"),
        EXPORT_AGAIN,
    ),
    "no JSON in a list of engines": (
        *(index(b"{"), CorruptFileError, "{folder}/b/engines/manifest.json"),
        "not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        *(None, COMPILE_AGAIN),
    ),
    "a list of engines of the future": (
        *(index(b'{"schema_version": 2}'), InputError, "{folder}/b/engines/manifest.json"),
        *("schema_version is 2", "1", COMPILE_AGAIN),
    ),
    "a report that is none": (
        *(written("x", b"[", read_document), CorruptFileError, "{folder}/x"),
        "not valid JSON (Expecting value: line 1 column 2 (char 1))",
        *(None, "give a JSON file that hcmen-bench --out wrote, or measure again"),
    ),
    "no report": (
        *(lambda folder: read_document(folder / "x"), InputError, "{folder}/x"),
        *("no such file or directory", "a JSON file that hcmen-bench --out wrote", None),
    ),
    "text for a clip": (
        *(written("x.npz", b"text", lambda path: read_clip(path, INPUTS)), InputError, "{folder}/x.npz"),
        *("not an .npz file", "a clip with text, audio, vision", "use numpy.savez"),
    ),
    "a folder for a clip": (
        *(lambda folder: read_clip(folder, INPUTS), InputError, "{folder}"),
        *("a folder", "an .npz clip", "give the path of a file"),
    ),
    "a clip's misspelt key": (
        *(clip(vison=np.zeros((3, 4))), InputError, "a clip", "unknown key 'vison'", None),
        "did you mean 'vision'? a clip holds text, audio, vision: remove others",
    ),
    "a clip of another model": (
        *(clip(audio=np.zeros((3, 4), np.float32)), InputError, "a clip"),
        "audio has 4 features (shape [3, 4])",
        *(f"[time, {CONFIG.audio.features}]", "use the features this model was trained on"),
    ),
    "an unknown variant": (
        *(lambda _: variant_named("xyz"), InputError, None, "unknown variant 'xyz'", None),
        "choose from full, text_missing, audio_missing, vision_missing, text_only, audio_only, vision_only",
    ),
    "an unknown modality": (
        *(lambda _: variant_for(["txt"]), InputError, None, "unknown modality 'txt'", None),
        "did you mean 'text'? choose from text, audio, vision",
    ),
    "an unknown model kind": (
        *(lambda _: registry.named("hcmn"), InputError, None, "unknown model kind 'hcmn'", None),
        "did you mean 'hcmen'? choose from hcmen",
    ),
    "an unknown setting": (
        *(lambda _: train_setting("epoch=1"), InputError, None, "unknown training setting 'epoch'", None),
        "did you mean 'epochs'?",
    ),
}


@pytest.mark.parametrize("sample", SAMPLES)
def test_an_error_says_what_came_what_was_expected_and_what_to_do(sample: str, tmp_path: Path) -> None:
    provoke, kind, where, what, expected, fix = SAMPLES[sample]
    with pytest.raises(kind) as told:
        provoke(tmp_path)
    error = told.value

    def filled(text: str | None) -> str | None:
        return text and text.replace("{folder}", str(tmp_path))

    assert (error.where, error.what, error.expected, error.fix) == (filled(where), what, expected, filled(fix))
    assert str(error).startswith(f"{filled(where)}: {what}" if where else what)


def hostile() -> Iterator[Any]:
    nested: Any = "x"
    for _ in range(8):
        nested = [nested, {"a" * 1000: nested}]
    yield from (nested, ["x" * 100] * 10_000, {str(i): i for i in range(10_000)}, "x" * 10**6, "'" * 10**5)


@pytest.mark.parametrize(
    "provoke",
    {
        "a setting of a model": lambda v: ModelConfig.from_json({**CONFIG.to_json(), "width": v}),
        "a key of a model": lambda v: ModelConfig.from_json({**CONFIG.to_json(), str(v): 1}),
        "a manifest's schema": lambda v: Manifest.from_json({"schema_version": v}),
        "a manifest's key": lambda v: parse_json(json.dumps({str(v): 1}).encode() * 2, MANIFEST),
    }.values(),
)
def test_no_message_formats_what_a_file_holds(provoke: Callable[[Any], Any]) -> None:
    for value in hostile():
        with pytest.raises(HcmenError) as told:
            provoke(value)
        assert len(str(told.value)) < 600
        assert "\n" not in str(told.value)


def test_no_message_formats_what_a_data_set_holds(tmp_path: Path) -> None:
    for value in hostile():
        (tmp_path / "dataset.json").write_text(json.dumps({"schema_version": value}))
        with pytest.raises(CorruptFileError, match=r"schema_version is .*, expected 1") as told:
            read_folder(tmp_path, INPUTS)
        assert len(str(told.value)) < 600 + len(os.fspath(tmp_path))


# --- nobody edits a message -------------------------------------------------------------------------------------------


def edits(tree: ast.AST) -> Iterator[int]:
    """Lines in which the text of a caught error is taken apart, searched or put together anew."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler) and node.name):
        for node in ast.walk(handler):
            if not (isinstance(node, ast.Call) and ast.unparse(node) == f"str({handler.name})"):
                continue
            parent = parents[node]
            if isinstance(parent, (ast.Attribute, ast.Subscript, ast.Compare)) or (
                isinstance(parent, ast.Call) and ast.unparse(parent.func).startswith("re.")
            ):
                yield node.lineno


def test_nobody_edits_a_message_as_text() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for folder in ("hcmen", "runtime", "export")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in edits(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize(
    "edit",
    [
        "str(error).removeprefix('x')",
        "str(error).split(': ')[0]",
        "str(error)[:9]",
        "'x' in str(error)",
        "re.sub('x', '', str(error))",
        "f\"{str(error).rsplit(': ', 1)[0]}\"",
    ],
)
def test_an_edit_would_be_noticed(edit: str) -> None:
    caught = "try:\n    f()\nexcept ValueError as error:\n    raise InputError({})"
    assert list(edits(ast.parse(caught.format(edit)))) == [4]
    assert not list(edits(ast.parse(caught.format("str(error)"))))
