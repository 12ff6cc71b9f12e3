"""The manifest of a bundle: what manifest.json says, and how it is read without being trusted.

It is read with every key, type and value checked (`Manifest.from_json`), out of what `records.parse_json` gives.
Schema 2 is written. Schema 1, which held the configuration of one model, is read as what it means in schema 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from hcmen.base.errors import BackendError, InputError, did_you_mean, shown
from hcmen.base.inputs import Inputs, TensorSpec
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.base.op import DOMAIN as OP_DOMAIN
from hcmen.base.op import IR_VERSION, OPSET
from hcmen.base.op import VERSION as OP_VERSION
from hcmen.base.records import MANIFEST, FileRecord, JsonObject
from hcmen.base.schema1 import as_schema_2

__all__ = [
    "NAME",
    "OP_DOMAIN",
    "OP_VERSION",
    "PRECISIONS",
    "SCHEMA_VERSION",
    "FrontEnd",
    "Manifest",
    "ModelRecord",
    "Score",
    "VariantRecord",
    "front_ends_from_json",
    "front_ends_to_json",
]

SCHEMA_VERSION = 2
NAME = "hcmen"
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class VariantRecord:
    """One exported graph. parity: what the exporter measured against the eager model, as it reported it."""

    graph: FileRecord
    golden: FileRecord
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    parity: Mapping[str, Any]


class ModelRecord(NamedTuple):
    """Which model it was: its kind and its configuration, for whoever wants to build it again. Nobody runs by it."""

    kind: str
    config: Mapping[str, Any]


class Score(NamedTuple):
    """What the checkpoint reached: each measure, of one variant, on one split of one data set.

    protocol: what was hidden, such as "variants" (the absent modalities of a variant, of every sample).
    """

    data: str
    split: str
    protocol: str
    variant: str
    measures: Mapping[str, float]


class FrontEnd(NamedTuple):
    """What made the features of a modality: an extractor, its settings, and the sha256 of its weights (None: none)."""

    extractor: str
    settings: Mapping[str, Any]
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """manifest.json. inputs: what the model takes and gives; in the file its outputs are a key of their own.

    model: carried and not read. normalisation: each modality of the inputs -> {"mean": [features], "std": [features]}
    of the training features. versions: tool -> version at export. source: where the weights came from. scores: may be
    empty. front_ends: by modality, those that are known.
    precision: one of PRECISIONS, of all graphs; the outputs of an int8 graph are within the `atol` and `rtol` of its
    parity record of the eager model's, those of the others within fixed bounds (docs/parity.md).
    tokenizer: for the text encoder, if there is one and its tokenizer came with the checkpoint.
    """

    inputs: Inputs
    model: ModelRecord
    normalisation: Mapping[str, Mapping[str, tuple[float, ...]]]
    weights: FileRecord
    variants: Mapping[str, VariantRecord]
    versions: Mapping[str, str]
    source: Mapping[str, Any]
    created: str
    opset: int = OPSET
    ir_version: int = IR_VERSION
    precision: str = "fp32"
    name: str = NAME
    op_domain: str = OP_DOMAIN
    op_version: int = OP_VERSION
    schema_version: int = SCHEMA_VERSION
    tokenizer: FileRecord | None = None
    scores: tuple[Score, ...] = ()
    front_ends: Mapping[str, FrontEnd] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The content of manifest.json, which `from_json` reads back to an equal manifest."""
        inputs = self.inputs.to_json()
        outputs = inputs.pop("outputs")
        return {
            "schema_version": self.schema_version,
            "name": self.name,
            "versions": dict(self.versions),
            "created": self.created,
            "op": {"domain": self.op_domain, "version": self.op_version},
            "opset": self.opset,
            "ir_version": self.ir_version,
            "precision": self.precision,
            "inputs": inputs,
            "outputs": outputs,
            "model": {"kind": self.model.kind, "config": dict(self.model.config)},
            "scores": [{**score._asdict(), "measures": dict(score.measures)} for score in self.scores],
            "front_ends": front_ends_to_json(self.front_ends),
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
        top = JsonObject("", data, MANIFEST)
        schema = top.integer("schema_version", 1)
        if schema not in (1, SCHEMA_VERSION):
            raise InputError(
                f"manifest schema_version is {schema}",
                f"1 or {SCHEMA_VERSION}",
                "upgrade hcmen, or export the bundle again",
            )
        if schema == 1:
            top = JsonObject("", as_schema_2(top), MANIFEST)
            schema = top.integer("schema_version", 2)
        op = top.object("op")
        domain, version = op.string("domain"), op.integer("version", 1)
        op.finish()
        if (domain, version) != (OP_DOMAIN, OP_VERSION):
            raise BackendError(
                f"the graphs need ops '{domain}' version {version}, "
                f"this package has '{OP_DOMAIN}' version {OP_VERSION}",
                fix="upgrade hcmen" if version > OP_VERSION else "export the bundle again",
            )
        inputs = _inputs_from_json(top)
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
            inputs=inputs,
            model=_model_from_json(top.object("model")),
            scores=_scores_from_json(top.value("scores", list)),
            front_ends=front_ends_from_json(top.object("front_ends")),
            normalisation=_normalisation_from_json(top.object("normalisation"), inputs),
            source=top.value("source", dict),
            weights=_record_from_json(top.object("weights")),
            variants=_variants_from_json(top.object("variants"), inputs, precision),
            tokenizer=_record_from_json(top.object("tokenizer")) if "tokenizer" in top.data else None,
        )
        top.finish()
        return manifest


def _record_from_json(data: JsonObject) -> FileRecord:
    record = data.record()
    data.finish()
    return record


def _inputs_from_json(top: JsonObject) -> Inputs:
    values, outputs = top.value("inputs", dict), top.value("outputs", list)
    if "outputs" in values:
        raise MANIFEST.damaged("unknown key 'inputs.outputs'")
    try:
        return Inputs.from_json({**values, "outputs": outputs})
    except InputError as error:
        raise MANIFEST.damaged(f"'inputs': {error}") from error


def _model_from_json(data: JsonObject) -> ModelRecord:
    record = ModelRecord(data.string("kind"), MappingProxyType(data.value("config", dict)))
    data.finish()
    return record


def _scores_from_json(data: list[Any]) -> tuple[Score, ...]:
    scores = []
    for i, item in enumerate(data):
        entry = JsonObject(f"scores[{i}]", item, MANIFEST)
        measures = entry.object("measures")
        score = Score(
            data=entry.string("data"),
            split=entry.string("split"),
            protocol=entry.string("protocol"),
            variant=entry.string("variant"),
            measures={key: measures.number(key, -1e38, 1e38) for key in measures.data},
        )
        scores.append(score)
        entry.finish()
    return tuple(scores)


def front_ends_from_json(data: JsonObject) -> dict[str, FrontEnd]:
    """What `front_ends_to_json` wrote, by modality; raises CorruptFileError on anything else."""
    made = {}
    for m in MODALITIES:
        if m not in data.data:
            continue
        entry = data.object(m)
        digest = None if entry.value("sha256", object) is None else entry.digest("sha256")
        made[m] = FrontEnd(entry.string("extractor"), MappingProxyType(entry.value("settings", dict)), digest)
        entry.finish()
    data.finish()
    return made


def front_ends_to_json(front_ends: Mapping[str, FrontEnd]) -> dict[str, Any]:
    """Plain dictionaries that `front_ends_from_json` reads back."""
    return {m: {**e._asdict(), "settings": dict(e.settings)} for m, e in front_ends.items()}


def _tensors_from_json(data: list[Any], where: str) -> tuple[TensorSpec, ...]:
    try:
        return tuple(TensorSpec.from_json(item, f"{where}[{i}]") for i, item in enumerate(data))
    except InputError as error:
        raise MANIFEST.damaged(f"{error}") from error


def _variants_from_json(data: JsonObject, inputs: Inputs, precision: str) -> dict[str, VariantRecord]:
    names = [v.name for v in VARIANTS]
    for name in data.data:
        if name not in names:
            fix = did_you_mean(name, names) or None
            raise MANIFEST.damaged(f"unknown variant {shown(name)}", ", ".join(names), fix)
    if not data.data:
        raise MANIFEST.damaged("'variants' is empty", "at least one")
    return {name: _variant_from_json(data.object(name), name, inputs, precision) for name in names if name in data.data}


def _variant_from_json(data: JsonObject, name: str, inputs: Inputs, precision: str) -> VariantRecord:
    if variant_named(name) not in inputs.variants:
        raise MANIFEST.damaged(f"'{data.where}' is there", f"a variant of {', '.join(inputs.modalities)}")
    record = VariantRecord(
        graph=data.record(),
        golden=_record_from_json(data.object("golden")),
        inputs=_tensors_from_json(data.value("inputs", list), f"{data.where}.inputs"),
        outputs=_tensors_from_json(data.value("outputs", list), f"{data.where}.outputs"),
        parity=MappingProxyType(data.value("parity", dict)),
    )
    data.finish()
    for what, got, expected in (
        ("inputs", record.inputs, inputs.of_variant(name)),
        ("outputs", record.outputs, inputs.outputs),
    ):
        if sorted(got, key=lambda t: t.name) != sorted(expected, key=lambda t: t.name):
            raise MANIFEST.damaged(f"'{data.where}.{what}' is {_signature(got)}", _signature(expected))
    parity = JsonObject(f"{data.where}.parity", data.data["parity"], MANIFEST)
    parity.value("passed", bool)
    if precision == "int8":
        # A device judges itself by these two, so a bound that nothing could fail is refused.
        parity.number("atol", 0.0, inputs.label_max - inputs.label_min)
        parity.number("rtol", 0.0, 1.0)
    return record


def _signature(specs: tuple[TensorSpec, ...]) -> str:
    return "; ".join(f"{t.name} {t.dtype} {list(t.shape)}" for t in specs)[:300] or "none"


def _normalisation_from_json(data: JsonObject, inputs: Inputs) -> dict[str, dict[str, tuple[float, ...]]]:
    made = {}
    for m in inputs.modalities:
        entry = data.object(m)
        count = inputs.modality(m).features
        made[m] = {key: entry.numbers(key, count) for key in ("mean", "std")}
        entry.finish()
        if min(made[m]["std"]) <= 0:
            raise MANIFEST.damaged(f"'normalisation.{m}.std' holds {min(made[m]['std'])}", "above 0")
    data.finish()
    return made


def _variant_to_json(variant: VariantRecord) -> dict[str, Any]:
    return {
        **dataclasses.asdict(variant.graph),
        "inputs": [t.to_json() for t in variant.inputs],
        "outputs": [t.to_json() for t in variant.outputs],
        "golden": dataclasses.asdict(variant.golden),
        "parity": dict(variant.parity),
    }
