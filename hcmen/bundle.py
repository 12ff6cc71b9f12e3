"""The bundle: the folder that export writes and a device runs from, and its manifest.

    manifest.json         what is in the bundle; everything else is read only because it is listed there
    weights.bin           the weights of all variants
    <variant>.onnx        one graph per variant
    golden/<variant>.npz  inputs with the eager model's outputs, so that a device checks itself
    tokenizer.json        words to token ids; only where the model has a text encoder

A bundle is not trusted. The manifest is read with every key, type and value checked (`Manifest.from_json`). A listed
file must be a regular file reached by plain names, through no symbolic link, of the listed size and sha256; `read`
hashes the very bytes it returns, so that nothing can change between the check and the use. Hard links are let be: a
content that has the listed sha256 is the listed content, and image-based systems store all their files as hard links.

Writing goes to a temporary sibling which is renamed when it is whole (`writing_bundle`), so that a killed or failed
export leaves no half bundle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.config import ModelConfig
from hcmen.errors import BackendError, CorruptFileError, HcmenError, InputError, did_you_mean, reason_of, shown
from hcmen.files import read_small, writing_folder
from hcmen.modalities import MODALITIES, VARIANTS, variant_named

__all__ = [
    "MANIFEST_FILE",
    "OP_DOMAIN",
    "OP_VERSION",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "Bundle",
    "FileRecord",
    "JsonObject",
    "Manifest",
    "SharedFile",
    "TensorSpec",
    "VariantRecord",
    "expected_inputs",
    "expected_outputs",
    "file_record",
    "parse_json",
    "read_bundle",
    "write_manifest",
    "writing_bundle",
]

SCHEMA_VERSION = 1
OP_DOMAIN = "hcmen"
OP_VERSION = 1
NAME = "hcmen"
MANIFEST_FILE = "manifest.json"
PRECISIONS = ("fp32", "fp16", "int8")

_MAX_MANIFEST_BYTES = 16 << 20
_MAX_DEPTH = 32
_MAX_FILE_BYTES = 8 << 30
_READ_BYTES = 1 << 20
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_FILE_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}\Z")


@dataclass(frozen=True)
class FileRecord:
    """A file of the bundle: its path relative to the bundle with `/` between parts, its sha256 and its size."""

    file: str
    sha256: str
    bytes: int


@dataclass(frozen=True)
class TensorSpec:
    """A graph input or output. shape: an int for a fixed size, a name for a dynamic one."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


@dataclass(frozen=True)
class VariantRecord:
    """One exported graph. parity: what the exporter measured against the eager model, as it reported it."""

    graph: FileRecord
    golden: FileRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Mapping[str, Any]


@dataclass(frozen=True)
class Manifest:
    """manifest.json. normalisation: modality -> {"mean": [features], "std": [features]} of the training features.

    versions: tool -> version at export. source: where the weights came from. label_range: (lowest, highest) label.
    precision: one of PRECISIONS, of all graphs; the outputs of an int8 graph are within the `atol` and `rtol` of its
    parity record of the eager model's, those of the others within fixed bounds (docs/parity.md).
    tokenizer: for the text encoder, if there is one and its tokenizer came with the checkpoint.
    """

    model: ModelConfig
    label_range: tuple[float, float]
    normalisation: Mapping[str, Mapping[str, tuple[float, ...]]]
    weights: FileRecord
    variants: Mapping[str, VariantRecord]
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    created: str
    opset: int = 19
    ir_version: int = 9
    precision: str = "fp32"
    name: str = NAME
    op_domain: str = OP_DOMAIN
    op_version: int = OP_VERSION
    schema_version: int = SCHEMA_VERSION
    tokenizer: FileRecord | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, which `from_json` reads back to an equal manifest."""
        return {
            "schema_version": self.schema_version,
            "name": self.name,
            "versions": dict(self.versions),
            "created": self.created,
            "op": {"domain": self.op_domain, "version": self.op_version},
            "opset": self.opset,
            "ir_version": self.ir_version,
            "precision": self.precision,
            "model": self.model.to_json(),
            "label_range": list(self.label_range),
            "normalisation": {
                m: {key: list(values) for key, values in statistics.items()}
                for m, statistics in self.normalisation.items()
            },
            "source": dict(self.source),
            "weights": dataclasses.asdict(self.weights),
            **({} if self.tokenizer is None else {"tokenizer": dataclasses.asdict(self.tokenizer)}),
            "variants": {name: _variant_to_json(v) for name, v in self.variants.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Manifest:
        """The manifest in `data`, every key and value of it checked.

        Raises:
            InputError: written by a version of hcmen with another schema.
            BackendError: its graphs need another version of the ops than this package has.
            CorruptFileError: anything missing, unknown, of the wrong type, out of range or unsafe.
        """
        top = JsonObject("", data)
        schema = top.integer("schema_version", 1)
        if schema != SCHEMA_VERSION:
            raise InputError(
                f"manifest schema_version is {schema}",
                str(SCHEMA_VERSION),
                "upgrade hcmen" if schema > SCHEMA_VERSION else "export the bundle again",
            )
        op = top.object("op")
        domain, version = op.string("domain"), op.integer("version", 1)
        op.finish()
        if (domain, version) != (OP_DOMAIN, OP_VERSION):
            raise BackendError(
                f"the graphs need ops '{domain}' version {version}, "
                f"this package has '{OP_DOMAIN}' version {OP_VERSION}",
                fix="upgrade hcmen" if version > OP_VERSION else "export the bundle again",
            )
        try:
            model = ModelConfig.from_json(top.value("model", dict))
        except InputError as error:
            raise CorruptFileError(f"'model': {error}", where="manifest") from error
        low, high = top.numbers("label_range", 2)
        if low >= high:
            raise CorruptFileError(f"'label_range' is [{low}, {high}]", "two numbers in rising order", where="manifest")
        precision = top.one_of("precision", PRECISIONS)
        manifest = cls(
            schema_version=schema,
            name=top.one_of("name", (NAME,)),
            versions={k: top.object("versions").string(k) for k in top.object("versions").data},
            created=top.string("created"),
            op_domain=domain,
            op_version=version,
            opset=top.integer("opset", 1),
            ir_version=top.integer("ir_version", 1),
            precision=precision,
            model=model,
            label_range=(low, high),
            normalisation=_normalisation_from_json(top.object("normalisation"), model),
            source=top.value("source", dict),
            weights=_record_from_json(top.object("weights")),
            variants=_variants_from_json(top.object("variants"), model, high - low if precision == "int8" else None),
            tokenizer=_record_from_json(top.object("tokenizer")) if "tokenizer" in top.data else None,
        )
        top.finish()
        return manifest


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been read and checked; no other file of it has been touched."""

    path: Path
    manifest: Manifest

    def variant(self, name: str) -> VariantRecord:
        """The record of the variant `name`.

        Raises:
            InputError: there is no such variant, or this bundle was exported without it.
        """
        variant_named(name)
        found = self.manifest.variants.get(name)
        if found is None:
            have = ", ".join(self.manifest.variants)
            raise InputError(f"{self.path}: variant '{name}' is not in this bundle, it has {have}: export it too")
        return found

    def read(self, record: FileRecord) -> NDArray[np.uint8]:
        """The verified content of a listed file, as read-only bytes [record.bytes] in memory of our own.

        Raises:
            CorruptFileError: missing, a link, not a regular file, or not of the listed size and sha256.
        """
        content = self._verify(record, keep=True)
        content.flags.writeable = False
        return content

    def file(self, record: FileRecord) -> Path:
        """The path of a listed file, verified; for tools that take paths alone, as the file can change afterwards.

        Raises:
            CorruptFileError: missing, a link, not a regular file, or not of the listed size and sha256.
        """
        self._verify(record, keep=False)
        return self.path / record.file

    def read_index(self, name: str) -> bytes | None:
        """The content of a small file that no manifest lists, since it is made on the device; None if it is not there.

        Raises:
            InputError: it may not be read.
            CorruptFileError: a link, or not a regular file.
        """
        try:
            with _opened_beneath(self.path, name) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read(_MAX_MANIFEST_BYTES + 1)
        except _MissingFile:
            return None

    def verify(self) -> None:
        """Verifies every file that the manifest lists; raises CorruptFileError at the first that is not as listed."""
        for record in self.records():
            self.file(record)

    def records(self) -> list[FileRecord]:
        """All files that the manifest lists, the weights first."""
        variants = self.manifest.variants.values()
        tokenizer = [self.manifest.tokenizer] if self.manifest.tokenizer else []
        return [self.manifest.weights, *tokenizer, *(v.graph for v in variants), *(v.golden for v in variants)]

    def _verify(self, record: FileRecord, *, keep: bool) -> NDArray[np.uint8]:
        """Reads and hashes a listed file; returns its content with `keep`, else an empty array."""
        where = self.path / record.file
        _check_file_name(record.file)
        with _opened_beneath(self.path, record.file) as descriptor:
            size = os.fstat(descriptor).st_size
            if size != record.bytes:
                raise CorruptFileError(
                    f"{size} bytes, the manifest says {record.bytes}",
                    fix="copy or export the bundle again",
                    where=str(where),
                )
            digest = hashlib.sha256()
            content = np.empty(size if keep else min(size, _READ_BYTES), np.uint8)
            done = 0
            while done < size:
                start = done if keep else 0
                part = content.data[start : start + min(_READ_BYTES, size - done)]
                count = os.readv(descriptor, [part])
                if count == 0:
                    raise CorruptFileError(
                        f"ended after {done} of {size} bytes", fix="copy the bundle again", where=str(where)
                    )
                digest.update(part[:count])
                done += count
        if digest.hexdigest() != record.sha256:
            raise CorruptFileError(
                f"sha256 {digest.hexdigest()[:12]}..., the manifest says {record.sha256[:12]}...",
                fix="the file was altered or damaged, copy or export the bundle again",
                where=str(where),
            )
        return content if keep else content[:0]


class SharedFile:
    """A listed file that others open by its path once it is verified, such as ONNX Runtime, which maps it.

    Between hashing and opening the file could change. `held` sees that it did not: device, inode, size and both times
    of the file are those of the hashed one before and after. (Who may write the file can still change what is mapped,
    as with a program's own libraries. An export never does, it puts another file in the place.)

    Several threads may hold it at once.
    """

    def __init__(self, bundle: Bundle, record: FileRecord) -> None:
        self.bundle, self.record = bundle, record
        self._hashed: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def held(self) -> Iterator[Path]:
        """The absolute folder of the bundle, in which the file is the verified one while the block runs.

        Raises:
            CorruptFileError: missing, a link, not of the listed size and sha256, or changed meanwhile.
        """
        before = self._identity()
        if before != self._hashed:
            self.bundle.file(self.record)
            self._unchanged(before)
            self._hashed = before
        yield self.bundle.path.absolute()
        self._unchanged(before)

    def _identity(self) -> tuple[int, ...]:
        with _opened_beneath(self.bundle.path, self.record.file) as descriptor:
            found = os.fstat(descriptor)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _unchanged(self, before: tuple[int, ...]) -> None:
        if self._identity() != before:
            raise CorruptFileError(
                f"{self.bundle.path / self.record.file}: changed while it was being loaded: load the bundle again"
            )


def read_bundle(path: str | os.PathLike[str]) -> Bundle:
    """The bundle in the folder `path`: its manifest is read and checked, nothing else is opened.

    Raises:
        InputError: no such folder, no manifest in it, it may not be read, or its schema is of another version.
        BackendError: its graphs need another version of the ops.
        CorruptFileError: the manifest is damaged, altered or unsafe.
    """
    root = Path(path)
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise InputError(f"{root}: {what}, expected a bundle: make one with hcmen-export --bundle {root}")
    try:
        with _opened_beneath(root, MANIFEST_FILE) as descriptor, os.fdopen(os.dup(descriptor), "rb") as file:
            content = file.read(_MAX_MANIFEST_BYTES + 1)
    except _MissingFile as error:
        raise InputError(
            f"{root}: no {MANIFEST_FILE} in it, expected a bundle: make one with hcmen-export --bundle {root}"
        ) from error
    where = root / MANIFEST_FILE
    try:
        return Bundle(root, Manifest.from_json(parse_json(content)))
    except HcmenError as error:
        raise error.but(where=str(where)) from error


def file_record(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> FileRecord:
    """The record of the file `path`, which lies inside the folder `root`, as it is now.

    Raises:
        InputError: it lies outside `root` or under a name that a manifest cannot hold.
        OSError: it cannot be read.
    """
    try:
        name = Path(path).resolve().relative_to(Path(root).resolve()).as_posix()
    except ValueError as error:
        raise InputError(f"{path} is not inside {root}, expected a file of the bundle") from error
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
            size += len(part)
    record = FileRecord(name, digest.hexdigest(), size)
    try:
        _check_file_name(name)
    except CorruptFileError as error:
        raise InputError(str(error)) from error
    return record


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Path:
    """Writes manifest.json into `folder`, after checking that `read_bundle` will take it.

    Raises:
        CorruptFileError: the manifest would be refused when read, for the reason given.
        OSError: it cannot be written.
    """
    text = json.dumps(_plain(manifest.to_json()), indent=1, allow_nan=False)
    Manifest.from_json(parse_json(text.encode()))
    path = Path(folder) / MANIFEST_FILE
    path.write_text(text + "\n", encoding="ascii")
    return path


@contextlib.contextmanager
def writing_bundle(path: str | os.PathLike[str], *, force: bool = False) -> Iterator[Path]:
    """Gives an empty folder to write a bundle into, and puts it at `path` when the block ends well.

    At the end it is verified as a reader would, and an older bundle at `path` is replaced then and not before. When the
    block raises, `path` is as it was (`files.writing_folder`).

    Args:
        path: where the bundle shall be. A bundle or an empty folder there is replaced.
        force: replace a folder that is no bundle, too.

    Raises:
        InputError: something else is at `path`.
        CorruptFileError: what was written would be refused when read.
        OSError: the place cannot be written.
    """
    with writing_folder(
        path, check=lambda target: _check_replaceable(target, force), verify=lambda made: read_bundle(made).verify()
    ) as folder:
        yield folder


def expected_inputs(model: ModelConfig, variant: str) -> tuple[TensorSpec, ...]:
    """The inputs of the graph of `variant`: features and valid length per present modality, in axis order.

    The text of a model with a text encoder is `text_tokens` alone, whose attention mask says how long it is.
    """
    inputs: list[TensorSpec] = []
    for m in variant_named(variant).present:
        if m == "text" and model.text_encoder:
            inputs.append(TensorSpec("text_tokens", "int64", ("batch", 3, "text_time")))
            continue
        inputs.append(TensorSpec(m, "float32", ("batch", f"{m}_time", model.modality(m).features)))
        inputs.append(TensorSpec(f"{m}_length", "int64", ("batch",)))
    return tuple(inputs)


def expected_outputs() -> tuple[TensorSpec, ...]:
    """The outputs of every graph."""
    return (
        TensorSpec("score", "float32", ("batch",)),
        TensorSpec("modality_weights", "float32", ("batch", len(MODALITIES))),
    )


# --- reading the manifest -------------------------------------------------------------------------------------------


class JsonObject:
    """A JSON object whose keys are taken one by one; `finish` refuses the ones that nobody took."""

    def __init__(self, where: str, data: Any):
        self.where = where
        if not isinstance(data, dict):
            raise CorruptFileError(f"{where or 'the top'} is {_kind(data)}", "an object", where="manifest")
        self.data: dict[str, Any] = data
        self._taken: set[str] = set()

    def _name(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else key

    def value(self, key: str, kind: type) -> Any:
        """The value at `key`, of the type `kind`; raises CorruptFileError as all of these."""
        if key not in self.data:
            raise CorruptFileError(f"key '{self._name(key)}' is missing", where="manifest")
        self._taken.add(key)
        value = self.data[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CorruptFileError(f"'{self._name(key)}' is {_kind(value)}", _kind(kind()), where="manifest")
        return value

    def string(self, key: str) -> str:
        """A string of at most 1000 characters."""
        value: str = self.value(key, str)
        if len(value) > 1000:
            raise CorruptFileError(f"'{self._name(key)}' has {len(value)} characters", "at most 1000", where="manifest")
        return value

    def one_of(self, key: str, choices: tuple[str, ...]) -> str:
        """One of the strings `choices`."""
        value = self.string(key)
        if value not in choices:
            raise CorruptFileError(f"'{self._name(key)}' is {shown(value)}", " or ".join(choices), where="manifest")
        return value

    def integer(self, key: str, least: int, most: int = 1 << 31) -> int:
        """An integer from `least` to `most`."""
        value: int = self.value(key, int)
        if not least <= value <= most:
            raise CorruptFileError(f"'{self._name(key)}' is {value}", f"{least} to {most}", where="manifest")
        return value

    def number(self, key: str, least: float, most: float) -> float:
        """A number from `least` to `most`."""
        value = self.value(key, object)
        if not isinstance(value, (int, float)):
            raise CorruptFileError(f"'{self._name(key)}' is {_kind(value)}", "a number", where="manifest")
        if not least <= value <= most:
            raise CorruptFileError(f"'{self._name(key)}' is {value:g}", f"{least:g} to {most:g}", where="manifest")
        return float(value)

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers."""
        values = self.value(key, list)
        if len(values) != count or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in values):
            raise CorruptFileError(f"'{self._name(key)}' is not a list of {count} numbers", where="manifest")
        if not all(abs(v) <= 1e38 for v in values):
            raise CorruptFileError(f"'{self._name(key)}' holds a number beyond float32", where="manifest")
        return tuple(float(v) for v in values)

    def object(self, key: str) -> JsonObject:
        """The object at `key`."""
        return JsonObject(self._name(key), self.value(key, dict))

    def record(self) -> FileRecord:
        """The keys of a file record, among others that may be there."""
        return _take_record(self)

    def finish(self) -> None:
        """Refuses keys that nobody took."""
        unknown = [k for k in self.data if k not in self._taken]
        if unknown:
            fix = f"{did_you_mean(unknown[0], self._taken)} copy or export the bundle again".lstrip()
            raise CorruptFileError(f"unknown key {shown(self._name(unknown[0]))}", fix=fix, where="manifest")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", int: "an integer"}
    return names.get(type(value), "null" if value is None else "a number")


def parse_json(content: bytes) -> Any:
    """JSON without its traps: no duplicate keys, no NaN or infinity, no excess of size or depth.

    Raises:
        CorruptFileError: it has one of them, or is no JSON.
    """
    if len(content) > _MAX_MANIFEST_BYTES:
        raise CorruptFileError(f"more than {_MAX_MANIFEST_BYTES} bytes", "a few thousand", where="manifest")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for key, value in pairs:
            if key in made:
                raise CorruptFileError(f"key {shown(key)} is there twice", where="manifest")
            made[key] = value
        return made

    def refuse(word: str) -> Any:
        raise CorruptFileError(f"{word} is not a finite number", where="manifest")

    def finite(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits[:40])

    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse, parse_float=finite)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else reason_of(error)
        raise CorruptFileError(
            f"not valid JSON ({reason})", fix="copy or export the bundle again", where="manifest"
        ) from error
    if _depth_exceeds(data, _MAX_DEPTH):
        raise CorruptFileError("nested too deeply", f"at most {_MAX_DEPTH} levels", where="manifest")
    return data


def _depth_exceeds(data: Any, limit: int) -> bool:
    level = [data]
    for _ in range(limit):
        level = [v for d in level for v in (d.values() if isinstance(d, dict) else d if isinstance(d, list) else ())]
        if not level:
            return False
    return True


def _record_from_json(data: JsonObject) -> FileRecord:
    record = _take_record(data)
    data.finish()
    return record


def _take_record(data: JsonObject) -> FileRecord:
    record = FileRecord(data.string("file"), data.string("sha256"), data.integer("bytes", 1, _MAX_FILE_BYTES))
    _check_file_name(record.file)
    if not _SHA256.match(record.sha256):
        raise CorruptFileError(
            f"'{data.where}.sha256' is no sha256 of 64 lower-case hexadecimal digits", where="manifest"
        )
    return record


def _check_file_name(name: str) -> None:
    parts = name.split("/")
    if len(parts) > 2 or not all(_FILE_PART.match(p) for p in parts) or name == MANIFEST_FILE:
        raise CorruptFileError(
            f"file name {name[:200]!r} is unsafe", "plain names inside the bundle such as full.onnx", where="manifest"
        )


def _tensors_from_json(data: list[Any], where: str) -> tuple[TensorSpec, ...]:
    specs = []
    for i, item in enumerate(data):
        entry = JsonObject(f"{where}[{i}]", item)
        shape = entry.value("shape", list)
        if not all(isinstance(s, (str, int)) and not isinstance(s, bool) for s in shape):
            raise CorruptFileError(f"'{where}[{i}].shape' is no list of names and integers", where="manifest")
        specs.append(TensorSpec(entry.string("name"), entry.string("dtype"), tuple(shape)))
        entry.finish()
    return tuple(specs)


def _variants_from_json(data: JsonObject, model: ModelConfig, most_atol: float | None) -> dict[str, VariantRecord]:
    names = [v.name for v in VARIANTS]
    for name in data.data:
        if name not in names:
            fix = did_you_mean(name, names) or None
            raise CorruptFileError(f"unknown variant {shown(name)}", ", ".join(names), fix, where="manifest")
    if not data.data:
        raise CorruptFileError("'variants' is empty", "at least one", where="manifest")
    return {name: _variant_from_json(data.object(name), name, model, most_atol) for name in names if name in data.data}


def _variant_from_json(data: JsonObject, name: str, model: ModelConfig, most_atol: float | None) -> VariantRecord:
    """A variant's record. most_atol: the largest bound that its parity may state, None where it states none."""
    record = VariantRecord(
        graph=_take_record(data),
        golden=_record_from_json(data.object("golden")),
        inputs=_tensors_from_json(data.value("inputs", list), f"{data.where}.inputs"),
        outputs=_tensors_from_json(data.value("outputs", list), f"{data.where}.outputs"),
        parity=MappingProxyType(data.value("parity", dict)),
    )
    data.finish()
    for what, got, expected in (
        ("inputs", record.inputs, expected_inputs(model, name)),
        ("outputs", record.outputs, expected_outputs()),
    ):
        if sorted(got, key=lambda t: t.name) != sorted(expected, key=lambda t: t.name):
            raise CorruptFileError(
                f"'{data.where}.{what}' is {_signature(got)}", _signature(expected), where="manifest"
            )
    parity = JsonObject(f"{data.where}.parity", data.data["parity"])
    parity.value("passed", bool)
    if most_atol is not None:
        # A device judges itself by these two, so a bound that nothing could fail is refused.
        parity.number("atol", 0.0, most_atol)
        parity.number("rtol", 0.0, 1.0)
    return record


def _signature(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in specs)[:300] or "none"


def _normalisation_from_json(data: JsonObject, model: ModelConfig) -> dict[str, dict[str, tuple[float, ...]]]:
    made = {}
    for m in MODALITIES:
        entry = data.object(m)
        count = model.modality(m).features
        made[m] = {key: entry.numbers(key, count) for key in ("mean", "std")}
        entry.finish()
        if min(made[m]["std"]) <= 0:
            raise CorruptFileError(f"'normalisation.{m}.std' holds {min(made[m]['std'])}", "above 0", where="manifest")
    data.finish()
    return made


def _variant_to_json(variant: VariantRecord) -> dict[str, Any]:
    return {
        **dataclasses.asdict(variant.graph),
        "inputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in variant.inputs],
        "outputs": [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in variant.outputs],
        "golden": dataclasses.asdict(variant.golden),
        "parity": dict(variant.parity),
    }


def _plain(value: Any) -> Any:
    """`value` with NumPy numbers and mappings of any kind as JSON has them."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (np.generic, np.ndarray)):
        return _plain(value.tolist())
    return value


# --- files ----------------------------------------------------------------------------------------------------------


class _MissingFile(CorruptFileError):
    """A file that should be in the bundle is not."""


@contextlib.contextmanager
def _opened_beneath(root: Path, name: str) -> Iterator[int]:
    """A descriptor of the regular file `name` below `root`, each part of it opened without following links."""
    where = root / name
    folders: list[int] = []
    try:
        try:
            folders.append(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
            *parents, last = PurePosixPath(name).parts
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
            for part in parents:
                folders.append(os.open(part, flags | os.O_DIRECTORY, dir_fd=folders[-1]))
            folders.append(os.open(last, flags | os.O_NONBLOCK, dir_fd=folders[-1]))
        except OSError as error:
            raise _open_error(where, error) from error
        if not stat.S_ISREG(os.fstat(folders[-1]).st_mode):
            raise CorruptFileError("not a regular file", "one", "copy or export the bundle again", where=str(where))
        yield folders[-1]
    finally:
        for descriptor in folders:
            os.close(descriptor)


def _open_error(where: Path, error: OSError) -> HcmenError:
    if error.errno == errno.ENOENT:
        return _MissingFile("missing from the bundle", fix="copy or export the bundle again", where=str(where))
    if error.errno in (errno.ELOOP, errno.EMLINK, errno.ENOTDIR):
        return CorruptFileError("a link", "a regular file", "copy the bundle with its files in it", where=str(where))
    if error.errno in (errno.EACCES, errno.EPERM):
        return InputError("permission denied", fix="check its owner and permissions", where=str(where))
    reason = (error.strerror or "cannot be opened").lower()
    return CorruptFileError(reason, fix="copy the bundle again", where=str(where))


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: a file is there, expected a folder for the bundle: choose another place")
    if not any(target.iterdir()) or _looks_like_bundle(target):
        return
    here = Path.cwd()
    if target == here or target in here.parents or target == Path.home():
        raise InputError(f"{target}: this folder is in use and no bundle: choose another place")
    if not force:
        raise InputError(f"{target}: a folder that is no bundle: choose another place, or replace it (--force)")


def _looks_like_bundle(folder: Path) -> bool:
    """Whether `folder` was written by us, of whatever schema and state; only then is it replaced unasked."""
    try:
        data = parse_json(read_small(folder / MANIFEST_FILE, _MAX_MANIFEST_BYTES))
    except (OSError, CorruptFileError):
        return False
    return isinstance(data, dict) and data.get("name") == NAME and "schema_version" in data and "variants" in data
