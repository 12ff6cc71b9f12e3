"""What tells one TensorRT from another is in its `Flavour`: a second one needs no change elsewhere."""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
import types
from pathlib import Path

import pytest
from helpers.small_bundle import engine_record

from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.engines import FLAVOURS, EngineRecord, read_engines, write_engine
from hcmen.base.errors import BackendError, CorruptFileError, InputError
from hcmen.runtime.backends.flavour import TENSORRT, Flavour, TrtModule
from hcmen.runtime.backends.tensorrt import choose_engine

OTHER = Flavour(
    name="other",
    title="OtherRT",
    module="other_rt",
    oldest=(1, 3),
    install="pip install other-rt",
    library="libother.so",
    plugins={"function": (1, 3)},
)


@pytest.fixture
def other(monkeypatch) -> Flavour:
    """A second flavour, in the table of engines."""
    monkeypatch.setitem(FLAVOURS, OTHER.name, "other")
    return OTHER


def engine(bundle: Bundle, version: str, flavour: str, content: bytes = b"an engine") -> EngineRecord:
    record = engine_record(
        bundle,
        content,
        precision="fp32",
        capabilities=(90,),
        tensorrt=version,
        machine=platform.machine(),
        plugin="function",
        hardware_compatible=False,
        max_batch=1,
        opt_batch=1,
        flavour=flavour,
    )
    write_engine(bundle, record, content, {})
    return record


def index(bundle: Bundle) -> Path:
    return bundle.path / "engines" / "manifest.json"


def test_a_record_tells_its_flavour_and_tensorrt_goes_without_saying(bundle, other):
    opened = read_bundle(bundle)
    records = (engine(opened, "1.7.1", "other"), engine(opened, "10.3.0", "tensorrt"))
    assert read_engines(opened) == records
    told = {e["file"]: e.get("flavour") for e in json.loads(index(opened).read_text())["engines"]}
    assert told == {
        "engines/full.fp32.sm90.trt10.3.0.engine": None,
        "engines/full.fp32.sm90.other1.7.1.engine": "other",
    }


def test_an_unknown_flavour_is_damage(bundle, other, monkeypatch):
    opened = read_bundle(bundle)
    engine(opened, "1.7.1", "other")
    monkeypatch.delitem(FLAVOURS, "other")
    with pytest.raises(CorruptFileError, match="flavour' is 'other', expected tensorrt"):
        read_engines(opened)


def test_each_flavour_takes_its_own_engines(bundle, other):
    opened = read_bundle(bundle)
    theirs = engine(opened, "1.7.1", "other")
    with pytest.raises(BackendError, match="no engine for variant 'full'"):
        choose_engine(opened, "full", None, 90, "10.3.0")
    assert choose_engine(opened, "full", None, 90, "1.7.1", other) == theirs
    ours = engine(opened, "10.3.0", "tensorrt")
    assert choose_engine(opened, "full", None, 90, "10.3.0") == ours
    with pytest.raises(BackendError, match=r"made by OtherRT 1\.7\.1, this machine has 1\.8\.0"):
        choose_engine(opened, "full", None, 90, "1.8.0", other)


def test_what_an_engine_fits_is_the_flavours_own(bundle, other):
    """As engines that run on every GPU and processor of a list do."""

    class Portable(Flavour):
        def unfit(self, record: EngineRecord, sm: int, version: str) -> str | None:
            return None if sm in (*record.capabilities, 120) else "another GPU"

    portable = Portable(**{f.name: getattr(other, f.name) for f in dataclasses.fields(other)})
    opened = read_bundle(bundle)
    record = engine(opened, "1.7.1", "other")
    assert choose_engine(opened, "full", None, 120, "9.9", portable) == record
    with pytest.raises(BackendError, match="another GPU"):
        choose_engine(opened, "full", None, 87, "1.7.1", portable)


def test_the_module_and_its_oldest_version_are_the_flavours(monkeypatch):
    with pytest.raises(
        BackendError, match="other_rt is not installed, and OtherRT engines need it: pip install other-rt"
    ):
        TrtModule(OTHER)
    module = types.ModuleType("other_rt")
    module.ILogger = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "other_rt", module)
    module.__version__ = "1.2.9"  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match=r"OtherRT is 1\.2\.9, expected 1\.3 or later: upgrade it"):
        TrtModule(OTHER)
    module.__version__ = "1.7.1.116"  # type: ignore[attr-defined]
    assert TrtModule(OTHER).version == "1.7.1.116"


@pytest.mark.parametrize(
    ("flavour", "plugin", "version", "why"),
    [
        (TENSORRT, "library", "10.3.0", None),
        (TENSORRT, "aot", "10.9.0", None),
        (
            TENSORRT,
            "aot",
            "10.8.1",
            r"TensorRT 10\.8\.1 has no AOT plugins, expected 10\.9 or later: use --plugin library",
        ),
        (OTHER, "function", "1.7.1", None),
        (OTHER, "library", "1.7.1", r"OtherRT 1\.7\.1 has no library plugins: use --plugin function"),
    ],
)
def test_the_kinds_of_plugins_are_the_flavours(flavour, plugin, version, why):
    if why is None:
        flavour.require_plugin(plugin, version)
    else:
        with pytest.raises((BackendError, InputError), match=why):
            flavour.require_plugin(plugin, version)
