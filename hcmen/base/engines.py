"""TensorRT engines beside a bundle, listed in an index of their own.

    engines/manifest.json                                       what `read_engines` reads: every engine with its sha256
    engines/<variant>.<precision>.sm<cc>.trt<version>.engine    the engine as TensorRT serialised it
    engines/<variant>.<precision>.sm<cc>-<cc>.rtx<version>.engine    the same of TensorRT for RTX, for several GPUs
    engines/<variant>....engine.json                            how it was built, for people
    engines/<variant>....engine.<digest>.parity.json            that it passed the golden set on one device

An engine is made long after the bundle's manifest.json was written, and a bundle is replaced whole when it is exported
again, so the index is a file apart; its engines say of which export they were made. An engine is native code: only one
that is listed, of the listed sha256, and signed here, is ever given to TensorRT. Each entry is signed by whoever
compiled it (hcmen/base/trust.py), so that devices may share a bundle and each runs its own engines.

The index is written last and whole, so that a killed compile leaves the engines that were listed before, or a gap
that the next compile fills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import glob
import hashlib
import hmac
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from hcmen.base.bundle import Bundle
from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.files import refused, sweep, write_file, writing_file
from hcmen.base.modalities import VARIANTS
from hcmen.base.records import FileRecord, JsonFile, JsonObject, parse_json
from hcmen.base.trust import made_key, signature
from hcmen.base.typed import as_typed

__all__ = [
    "ENGINES_FOLDER",
    "FLAVOURS",
    "PLUGINS",
    "PRECISIONS",
    "EngineRecord",
    "is_kept",
    "keep",
    "read_engines",
    "write_engine",
    "write_whole",
]

ENGINES_FOLDER = "engines"
INDEX_FILE = f"{ENGINES_FOLDER}/manifest.json"
SCHEMA_VERSION = 1
PRECISIONS = ("fp32", "fp16")
FLAVOURS = {"tensorrt": "trt", "tensorrt-rtx": "rtx"}
"""The flavour of TensorRT that built an engine -> what stands before its version in the engine's file name."""
PLUGINS = ("library", "aot", "function", "none")
"""How an engine runs the hcmen ops: the plugin library, kernels inside the engine, standard operators; none in it."""
_MOST_ENGINES = 1000
_MOST_CAPABILITIES = 32
_KEPT = ".parity.json"


@dataclass(frozen=True)
class EngineRecord:
    """One engine of the index.

    variant, precision: what it computes, and in what.
    capabilities: compute capabilities of the GPUs it was built for, rising, 87 for 8.7. TensorRT's is that of the
        builder's GPU alone, which the index has as "sm".
    tensorrt: the version that built it. machine: the processor architecture, as platform.machine() tells it.
    plugin: one of `PLUGINS`; plugin_embedded: whether the plugin library is inside the engine.
    version_compatible: later versions of TensorRT load it too. hardware_compatible: so do GPUs of sm 80 and later.
    max_batch: most clips in one run; opt_batch: the batch that the profile of batches is tuned for.
    graph_sha256, weights_sha256: of the export that it was made from.
    parity: what was measured on the golden set before the engine was accepted; {"measured": false} where it was built
        without a GPU.
    flavour: of the TensorRT that built it, one of `FLAVOURS`; not in the index where it is "tensorrt".
    profiles: how many optimisation profiles it has at most, 1 or 2; not in the index where it is 2.
    signature: of all the rest, by the key of who compiled it; empty where it is unsigned.
    """

    engine: FileRecord
    variant: str
    precision: str
    capabilities: tuple[int, ...]
    tensorrt: str
    machine: str
    plugin: str
    plugin_embedded: bool
    version_compatible: bool
    hardware_compatible: bool
    max_batch: int
    opt_batch: int
    graph_sha256: str
    weights_sha256: str
    created: str
    parity: Mapping[str, Any]
    flavour: str = "tensorrt"
    profiles: int = 2
    signature: str = field(default="", compare=False)

    @staticmethod
    def file_name(
        variant: str, precision: str, capabilities: Sequence[int], tensorrt: str, flavour: str = "tensorrt"
    ) -> str:
        """Where in a bundle such an engine lies."""
        sm = "-".join(map(str, capabilities))
        return f"{ENGINES_FOLDER}/{variant}.{precision}.sm{sm}.{FLAVOURS[flavour]}{tensorrt}.engine"

    def of_export(self, bundle: Bundle) -> bool:
        """Whether it was made from the graph and the weights that `bundle` holds now."""
        variant = bundle.manifest.variants.get(self.variant)
        return variant is not None and (variant.graph.sha256, bundle.manifest.weights.sha256) == (
            self.graph_sha256,
            self.weights_sha256,
        )

    def signed_with(self, key: bytes | None) -> bool:
        """Whether the signature is that of `key` over this very record."""
        found = self.signature.encode("utf-8", "replace")  # JSON may hold what is no Unicode text
        return key is not None and hmac.compare_digest(found, signature(key, self.to_json()).encode())

    def to_json(self) -> dict[str, Any]:
        """As it stands in the index, without the signature."""
        data = dataclasses.asdict(dataclasses.replace(self, parity={}))
        del data["signature"]
        if self.flavour == "tensorrt":
            del data["flavour"]
            (data["sm"],) = data.pop("capabilities")
        if self.profiles == 2:
            del data["profiles"]
        return {**data.pop("engine"), **data, "parity": dict(self.parity)}


def read_engines(bundle: Bundle) -> tuple[EngineRecord, ...]:
    """The engines beside `bundle` as their index lists them, none if nothing was compiled; no engine is opened.

    Whose they are is not asked here: `EngineRecord.signed_with` tells.

    Raises:
        InputError: the index is of another version of hcmen, or may not be read.
        CorruptFileError: the index is damaged, altered or unsafe.
    """
    where = bundle.path / INDEX_FILE
    index = JsonFile(str(where), f"remove {where.parent} and run {as_typed('hcmen-compile', '--bundle', bundle.path)}")
    try:
        content = bundle.read_index(INDEX_FILE)
    except CorruptFileError as error:
        raise error.but(fix=index.fix) from error
    return () if content is None else _records_from_json(parse_json(content, index), index)


def write_engine(bundle: Bundle, record: EngineRecord, engine: bytes | memoryview, report: Mapping[str, Any]) -> None:
    """Writes an engine, its report beside it, and lists it, signed, in the index in the place of one of the same name.

    The other entries stay as they are: an engine of another machine is not made this user's.

    Args:
        record: its `engine` says where to; sha256 and size must be those of `engine`.
        report: what shall be known of how it was built; goes into the .json beside it, with the record.

    Raises:
        InputError: the place cannot be written, nor this user's key made.
        CorruptFileError: the index that is there is damaged, or the key is unsafe.
    """
    content = memoryview(engine).cast("B")
    if (hashlib.sha256(content).hexdigest(), len(content)) != (record.engine.sha256, record.engine.bytes):
        raise InputError(f"{record.engine.file}: the record is of another engine")
    path = bundle.path / record.engine.file
    with _index_locked(bundle):
        record = dataclasses.replace(record, signature=signature(made_key(), record.to_json()))
        others = [r for r in read_engines(bundle) if r.engine.file != record.engine.file]
        files: dict[Path, bytes | memoryview] = {  # put in place from the last to the first
            bundle.path / INDEX_FILE: _index([*others, record]),
            path.with_name(path.name + ".json"): _json({**record.to_json(), "build": dict(report)}),
            path: content,
        }
        with contextlib.ExitStack() as stack:
            for target, data in files.items():
                stack.enter_context(_written(target))
                file = stack.enter_context(writing_file(target))
                file.write(data)
                file.flush()  # a full disk is met here, while the index and the engine are as they were
            # Were the process killed between the engine and the index, the old index would tell of another engine.
            write_whole(bundle.path / INDEX_FILE, _index(others))
            for kept in path.parent.glob(f"{glob.escape(path.name)}.*{_KEPT}"):
                with _written(kept):
                    kept.unlink(missing_ok=True)


def is_kept(bundle: Bundle, record: EngineRecord, key: Mapping[str, Any]) -> bool:
    """Whether it is kept that the engine passed the golden set under `key`; whatever else is there counts as no.

    Whoever can write the bundle can write this. It spares a check of numbers, and lets no code in.
    """
    name = _kept_file(record, key)
    with contextlib.suppress(HcmenError):
        content = bundle.read_index(name)
        if content is not None:
            data = parse_json(content, JsonFile(str(bundle.path / name), ""))
            return isinstance(data, dict) and data.get("key") == dict(key) and data.get("passed") is True
    return False


def keep(bundle: Bundle, record: EngineRecord, key: Mapping[str, Any], report: Mapping[str, Any]) -> None:
    """Keeps a `report` of the golden set under `key`, plain JSON, beside the engine.

    Raises:
        InputError: the place cannot be written. CorruptFileError: the folder is a link.
    """
    path = bundle.path / _kept_file(record, key)
    _check_place(bundle)
    with _written(path.parent):  # without the lock, which whoever can read it can hold for ever
        write_file(path, _json({"key": dict(key), **report}))


def _kept_file(record: EngineRecord, key: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    return f"{record.engine.file}.{digest}{_KEPT}"


def _records_from_json(data: Any, index: JsonFile) -> tuple[EngineRecord, ...]:
    top = JsonObject("", data, index)
    schema = top.integer("schema_version", 1)
    if schema != SCHEMA_VERSION:
        raise InputError(f"schema_version is {schema}", str(SCHEMA_VERSION), index.fix, where=index.name)
    entries = top.value("engines", list)
    top.finish()
    if len(entries) > _MOST_ENGINES:
        raise index.damaged(f"{len(entries)} engines", f"at most {_MOST_ENGINES}")
    records = [_record_from_json(JsonObject(f"engines[{i}]", entry, index)) for i, entry in enumerate(entries)]
    names = [r.engine.file for r in records]
    if len(set(names)) < len(names):
        raise index.damaged("an engine is listed twice")
    return tuple(records)


def _record_from_json(data: JsonObject) -> EngineRecord:
    flavour = data.one_of("flavour", tuple(FLAVOURS)) if "flavour" in data.data else "tensorrt"
    record = EngineRecord(
        engine=data.record(),
        variant=data.one_of("variant", tuple(v.name for v in VARIANTS)),
        precision=data.one_of("precision", PRECISIONS),
        capabilities=(data.integer("sm", 1, 10_000),) if flavour == "tensorrt" else _capabilities(data),
        tensorrt=data.string("tensorrt"),
        machine=data.string("machine"),
        plugin=data.one_of("plugin", PLUGINS),
        plugin_embedded=data.value("plugin_embedded", bool),
        version_compatible=data.value("version_compatible", bool),
        hardware_compatible=data.value("hardware_compatible", bool),
        max_batch=data.integer("max_batch", 1),
        opt_batch=data.integer("opt_batch", 1),
        graph_sha256=data.string("graph_sha256"),
        weights_sha256=data.string("weights_sha256"),
        created=data.string("created"),
        parity=MappingProxyType(data.value("parity", dict)),
        flavour=flavour,
        profiles=data.integer("profiles", 1, 2) if "profiles" in data.data else 2,
        signature=data.string("signature") if "signature" in data.data else "",
    )
    data.finish()
    expected = EngineRecord.file_name(record.variant, record.precision, record.capabilities, record.tensorrt, flavour)
    if record.engine.file != expected:
        raise data.file.damaged(f"'{data.where}.file' is {record.engine.file!r}", repr(expected))
    return record


def _capabilities(data: JsonObject) -> tuple[int, ...]:
    found = data.value("capabilities", list)
    sound = all(type(n) is int and 1 <= n <= 10_000 for n in found) and sorted(set(found)) == found
    if not 1 <= len(found) <= _MOST_CAPABILITIES or not sound:
        raise data.file.damaged(f"'{data.where}.capabilities' is no rising list of compute capabilities", "[86, 89]")
    return tuple(found)


@contextlib.contextmanager
def _index_locked(bundle: Bundle) -> Iterator[None]:
    """The engines' folder is there, and no other process writes its index within the block."""
    folder = bundle.path / ENGINES_FOLDER
    with _written(folder):
        folder.mkdir(exist_ok=True)
        _check_place(bundle)
        descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _check_place(bundle)
        sweep(folder)
        yield
    finally:
        os.close(descriptor)


def _check_place(bundle: Bundle) -> None:
    """Holds that what is written into the folder of engines lies beside this very bundle."""
    folder = bundle.path / ENGINES_FOLDER
    if folder.is_symlink():
        raise CorruptFileError("a link", "a folder", "remove it", where=str(folder))
    if not bundle.is_in_place():
        raise InputError("another export was put there meanwhile", fix="compile again", where=str(bundle.path))


def _index(records: list[EngineRecord]) -> bytes:
    entries = [{**r.to_json(), "signature": r.signature} for r in sorted(records, key=lambda r: r.engine.file)]
    return _json({"schema_version": SCHEMA_VERSION, "engines": entries})


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=1, allow_nan=False) + "\n").encode()


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes `content` so that a reader sees the old file or the new one; raises InputError when it cannot."""
    with _written(path):
        write_file(path, content)


def _written(path: Path) -> contextlib.AbstractContextManager[None]:
    return refused(path, fix="copy the bundle to a place that can be written")
