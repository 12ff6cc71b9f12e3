"""Every parser of hcmen's: valid files as the product writes them, how to spoil them, and how a command reads them.

`prepare` makes a folder of its own for each format. There the file in question is written anew for every case, and
`read` does with it what a command does. What guards a file by its sha256 or size elsewhere is brought up to date first:
whoever alters the one alters the other.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import io
import json
import os
import pickle
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutate
from helpers.small_bundle import INPUTS, clip_arrays, engine_record, golden, graph, make_bundle
from helpers.tables import TEXTS, as_csv, as_json_lines, rows, split_of, write_words

from hcmen.base.clip import write_clip
from hcmen.base.console import one_line
from hcmen.base.errors import HcmenError, InputError
from hcmen.base.inputs import Inputs, TokenConfig
from hcmen.base.modalities import MODALITIES

__all__ = ["FORMATS", "Format"]

TOKENS = dataclasses.replace(INPUTS, text_tokens=TokenConfig(2000, 2, 100))
_FILES = Path(__file__).resolve().parents[1] / "files"
_RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file that hcmen reads.

    file: where it lies in the folder of its own. prepare: makes what lies beside it, and gives valid contents.
    read: as a command does. mutate: makes a hostile neighbour of a content. command: the arguments of hcmen that read
    it; None where no command of this machine does.
    """

    name: str
    file: str
    prepare: Callable[[Path], Sequence[bytes]]
    read: Callable[[Path], object]
    mutate: mutate.Mutator
    command: Callable[[Path], list[str]] | None = None


# --- what lies around ------------------------------------------------------------------------------------------------


def _archive(**arrays: Any) -> bytes:
    target = io.BytesIO()
    np.savez(target, **arrays)
    return target.getvalue()


def _bundle(folder: Path) -> Path:
    return make_bundle(folder / "bundle", ("text_only",))


def _clip(folder: Path) -> Path:
    (folder / "given.npz").write_bytes(_archive(**clip_arrays(0, ("text",))))
    return folder / "given.npz"


def _is_file(path: Path) -> bool:
    """Whether it may be touched beforehand: a pipe is waited for, and /dev/zero never ends."""
    return path.is_file()


def _recorded(folder: Path, *names: str) -> None:
    """Makes the manifest of the bundle agree with the files as they are."""
    path = folder / "bundle" / "manifest.json"
    document = json.loads(path.read_bytes())
    places = {"graph": document["variants"]["text_only"], "golden": document["variants"]["text_only"]["golden"]}
    for name in names:
        found = folder / "bundle" / places[name]["file"]
        if _is_file(found):
            content = found.read_bytes()
            places[name] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.write_text(json.dumps(document))


# --- clips -----------------------------------------------------------------------------------------------------------


def _clips(folder: Path) -> list[bytes]:
    _bundle(folder)
    arrays = clip_arrays(0, text=3, audio=4, vision=5)
    return [
        _archive(**arrays),
        _archive(text=arrays["text"]),
        _archive(**{m: x.astype(">f8") for m, x in arrays.items()}),
    ]


def _token_clips(folder: Path) -> list[bytes]:
    tokens = np.array([[101, 1000, 1001, 102], [1] * 4, [0] * 4])
    return [_archive(text_tokens=tokens), _archive(text_tokens=tokens.astype(np.int32), audio=clip_arrays(0)["audio"])]


def _read_clip(inputs: Inputs) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from hcmen.base.clip import batch_clips, read_clip

        return batch_clips([read_clip(folder / "clip.npz", inputs, clean=True), read_clip(folder / "clip.npz", inputs)])

    return read


def _run_clip(folder: Path) -> list[str]:
    return ["run", str(folder / "clip.npz"), "--bundle", str(folder / "bundle")]


# --- bundles ---------------------------------------------------------------------------------------------------------


def _manifests(folder: Path) -> list[bytes]:
    _clip(folder)
    content = (_bundle(folder) / "manifest.json").read_bytes()
    document = json.loads(content)
    score = {"data": "a", "split": "test", "protocol": "variants", "variant": "text_only", "measures": {"mae": 0.5}}
    document["scores"] = [score]
    document["front_ends"] = {"audio": {"extractor": "e", "settings": {}, "sha256": None}}
    document["inputs"]["text_tokens"] = {"vocabulary": 2000, "token_types": 2, "unknown_token": 100}
    document["variants"]["text_only"]["inputs"] = [t.to_json() for t in TOKENS.of_variant("text_only")]
    document["precision"] = "int8"
    return [content, json.dumps(document).encode()]


def _old_manifests(folder: Path) -> list[bytes]:
    with zipfile.ZipFile(_FILES / "schema1_bundle.zip") as archive:
        archive.extractall(folder / "bundle")
    return [(folder / "bundle" / "manifest.json").read_bytes()]


def _read_manifest(folder: Path) -> object:
    from hcmen.base.bundle import read_bundle

    bundle = read_bundle(folder / "bundle")
    for record in bundle.records():
        bundle.others_may_write(record)
    inputs = bundle.manifest.inputs
    return one_line(inputs.scale), inputs.label(0.5), json.dumps(bundle.manifest.to_json(), allow_nan=False)


def _run_bundle(folder: Path) -> list[str]:
    return ["run", str(folder / "given.npz"), "--bundle", str(folder / "bundle")]


def _indexes(folder: Path) -> list[bytes]:
    import platform

    from hcmen.base.bundle import read_bundle
    from hcmen.base.engines import write_engine

    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    bundle = read_bundle(_bundle(folder))
    own = {"machine": platform.machine(), "version_compatible": True}
    portable = {"flavour": "tensorrt-rtx", "profiles": 1, "parity": {"measured": False}}
    for changes in ({"capabilities": (80,), **own}, {"capabilities": (86, 89), **portable}, own):
        write_engine(bundle, engine_record(bundle, b"engine", "text_only", **changes), b"engine", {})
    return [(bundle.path / "engines" / "manifest.json").read_bytes()]


def _read_index(folder: Path) -> object:
    from hcmen.base.bundle import read_bundle
    from hcmen.runtime.backends.flavour import TENSORRT_RTX
    from hcmen.runtime.backends.tensorrt import choose_engine

    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    bundle = read_bundle(folder / "bundle")
    portable = choose_engine(bundle, "text_only", None, 89, "10.3.0", TENSORRT_RTX)
    return choose_engine(bundle, "text_only", None, 87, "10.9.0"), portable


_KEY = {"engine": "0" * 64, "sm": 89}
_DIGEST = hashlib.sha256(json.dumps(_KEY, sort_keys=True).encode()).hexdigest()
_KEPT = f"bundle/engines/text_only.fp16.sm80.trt10.3.0.engine.{_DIGEST[:16]}.parity.json"
_CODE = f"cache/hcmen/tensorrt-rtx/{_DIGEST[:32]}.cache"


def _kept(folder: Path) -> list[bytes]:
    from hcmen.base.bundle import read_bundle
    from hcmen.base.engines import keep, read_engines

    _indexes(folder)
    bundle = read_bundle(folder / "bundle")
    keep(bundle, read_engines(bundle)[0], _KEY, {"passed": True})
    return [(folder / _KEPT).read_bytes()]


def _read_kept(folder: Path) -> object:
    from hcmen.base.bundle import read_bundle
    from hcmen.base.engines import is_kept, read_engines

    bundle = read_bundle(folder / "bundle")
    if not is_kept(bundle, read_engines(bundle)[0], _KEY):
        raise InputError("measured again")
    return True


def _codes(folder: Path) -> list[bytes]:
    from hcmen.runtime.backends.kept_code import KeptCode

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    KeptCode(_KEY).write(bytes(range(256)) * 8)
    return [(folder / _CODE).read_bytes()]


def _read_code(folder: Path) -> object:
    import warnings

    from hcmen.runtime.backends.kept_code import KeptCode

    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    if _is_file(folder / _CODE):
        (folder / _CODE).chmod(0o600)
        content = (folder / _CODE).read_bytes()
        head = content.find(b"\n") + 1
        if len(content) > head + 32:
            code = content[head + 32 :]
            (folder / _CODE).write_bytes(content[:head] + hashlib.sha256(code).digest() + code)
    with warnings.catch_warnings(record=True) as told:  # one line and no error, whatever is there
        warnings.simplefilter("always")
        found = KeptCode(_KEY).read()
    if told:
        raise InputError(str(told[0].message))
    return found


def _keys(folder: Path) -> list[bytes]:
    return [b"0123456789abcdef" * 4 + b"\n"]


def _read_key(folder: Path) -> object:
    from hcmen.base.trust import engine_key

    os.environ["XDG_STATE_HOME"] = str(folder)
    if _is_file(folder / "hcmen" / "engine.key"):
        (folder / "hcmen" / "engine.key").chmod(0o600)
    return engine_key()


def _goldens(folder: Path) -> list[bytes]:
    _clip(folder)
    _bundle(folder)
    return [_archive(**golden("text_only", 2))]


def _read_golden(folder: Path) -> object:
    from hcmen.runtime import load

    _recorded(folder, "golden")
    return [test.outputs for test in load(folder / "bundle").self_test()]


def _self_test(folder: Path) -> list[str]:
    _recorded(folder, "golden")
    return ["run", "--self-test", "--bundle", str(folder / "bundle")]


def _graphs(folder: Path) -> list[bytes]:
    from onnx import TensorProto, helper

    _clip(folder)
    _bundle(folder)
    rich = graph("text_only")
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "body", [], [])
    rich.graph.node.append(helper.make_node("If", ["yes"], ["z"], then_branch=body, else_branch=body))
    rich.graph.node.append(helper.make_node("F", ["z"], ["u"], domain="d"))
    rich.graph.node.append(helper.make_node("ConstantOfShape", ["axis1"], ["v"]))
    rich.graph.node.append(helper.make_node("Constant", [], ["k"], value_ints=[2, 3]))
    rich.graph.initializer.append(TensorProto(name="few", data_type=6, dims=[2], int32_data=[-1, 7]))
    inner = helper.make_node("Relu", ["x"], ["y"])
    rich.functions.append(helper.make_function("d", "F", ["x"], ["y"], [inner], rich.opset_import))
    return [graph("text_only").SerializeToString(), rich.SerializeToString()]


def _read_graph(folder: Path) -> object:
    from hcmen.runtime.backends.graph import read_graph

    weights = np.zeros((folder / "bundle" / "weights.bin").stat().st_size, np.uint8)
    found = read_graph(
        (folder / "bundle" / "text_only.onnx").read_bytes(), "weights.bin", weights.size, "text_only.onnx"
    )
    return [tensor.view(weights).sum() for tensor in found.external]


def _run_graph(folder: Path) -> list[str]:
    _recorded(folder, "graph")
    return [*_run_bundle(folder), "--time-limit", "2"]


def _saved_states(folder: Path) -> list[bytes]:
    from helpers.foreign_graph import foreign_graph

    from hcmen.runtime.mamba import Stepper

    stepper = Stepper(foreign_graph(folder / "lm.onnx"))
    made = []
    for batch in (1, 3):
        stepper.reset(batch)
        stepper.save(folder / "states.npz")
        made.append((folder / "states.npz").read_bytes())
    return made


@functools.cache
def _stepper(path: Path) -> Any:
    from hcmen.runtime.mamba import Stepper

    return Stepper(path)


def _load_states(folder: Path) -> object:
    stepper = _stepper(folder / "lm.onnx").clone()
    stepper.load(folder / "states.npz")
    return stepper.state, stepper.batch


def _records(_folder: Path) -> list[bytes]:
    from hcmen.base.state_records import StateRecord, states_to_json

    rows = [StateRecord("a", "conv", (3, 8)), StateRecord("b", "scan", (8, 4)), StateRecord("c", "dual", (2, 3, 4))]
    return [states_to_json(rows).encode()]


def _read_records(folder: Path) -> object:
    from hcmen.base.state_records import states_from_json

    return states_from_json((folder / "states.json").read_text("utf-8", "replace"), "lm.onnx")


# --- data sets -------------------------------------------------------------------------------------------------------

_COUNTS = {"train": 3, "valid": 2, "test": 2}
_STEPS = {"text": 3, "audio": 4, "vision": 5}


def _data(*, aligned: bool = False) -> dict[str, dict[str, Any]]:
    """A set in MMSA's layout for `TOKENS`, with each kind of value that the published files have."""
    rng = np.random.default_rng(0)
    made: dict[str, dict[str, Any]] = {}
    for split, count in _COUNTS.items():
        steps = dict.fromkeys(_STEPS, 3) if aligned else _STEPS
        features = {m: rng.normal(size=(count, t, INPUTS.modality(m).features)) for m, t in steps.items()}
        ids = rng.integers(1000, 2000, (count, 3))
        made[split] = {
            **features,
            "text": features["text"].astype(np.float32),
            "raw_text": np.array([f"clip {i}" for i in range(count)], object),
            "annotations": np.array(["Positive"] * count),
            "text_bert": np.stack([ids, np.ones_like(ids), np.zeros_like(ids)], 1).astype(np.float32),
            "id": [f"{split}$_${i}" for i in range(count)],
            "regression_labels": np.round(rng.uniform(-3, 3, count), 1),
        }
        if not aligned:
            made[split] |= {f"{m}_lengths": [steps[m]] * count for m in ("audio", "vision")}
    return made


def _pickles(folder: Path) -> list[bytes]:
    return [pickle.dumps(_data(aligned=protocol % 2 == 0), protocol) for protocol in range(6)]


def _read_set(path: Path) -> object:
    from hcmen.data.mmsa import read_mmsa

    def fit(sizes: Any) -> Inputs:
        return Inputs(**{m: sizes.modalities.get(m) for m in MODALITIES}, label_min=-3.0, label_max=3.0)

    read_mmsa(path, fit)
    return read_mmsa(path, TOKENS)


def _convert(folder: Path) -> list[str]:
    return ["convert", str(folder / "set.pkl"), str(folder / "out")]


def _folder_with(file: str) -> Callable[[Path], Sequence[bytes]]:
    def prepare(folder: Path) -> Sequence[bytes]:
        from hcmen.data import SPLITS
        from hcmen.data.folder import write_folder
        from hcmen.data.layout import open_split

        data = _data()
        origin = {"file": "set.pkl", "bytes": 0, "sha256": "0" * 64}
        write_folder(folder / "set", {s: open_split(data, s, "set") for s in SPLITS}, origin)
        return [(folder / file).read_bytes()]

    return prepare


def _read_folder(folder: Path) -> object:
    return _read_set(folder / "set")


def _read_array(file: str) -> Callable[[Path], object]:
    """As `_read_folder`, with the size of the file in the index."""
    split, name = file.split("/")

    def read(folder: Path) -> object:
        index = json.loads((folder / "set" / "dataset.json").read_bytes())
        index["splits"][split]["bytes"][name] = (folder / "set" / file).lstat().st_size
        (folder / "set" / "dataset.json").write_text(json.dumps(index))
        return _read_folder(folder)

    return read


def _cut_clip(folder: Path) -> list[str]:
    return ["clip", str(folder / "set"), "--split", "test", "--index", "0", "--out", str(folder / "out.npz")]


def _tables(as_text: Callable[[list[dict[str, Any]]], str]) -> Callable[[Path], Sequence[bytes]]:
    """Tables with every column that there is, beside a clip and a tokenizer."""

    def prepare(folder: Path) -> Sequence[bytes]:
        write_words(folder / "bert")
        write_clip(folder / "given.npz", {"vision": np.ones((2, 4))})
        made = rows(
            text=TEXTS,
            split=split_of,
            group=split_of,
            clip=lambda i: "given.npz",
            **{"audio.0": lambda i: i / 7, "audio.1": lambda i: -i},
        )
        less = [{key: row[key] for key in ("id", "label", "text")} for row in made]
        return [as_text(made).encode(), as_text(less).encode("utf-8-sig")]

    return prepare


def _read_table(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        from hcmen.data.table.conversion import TableOptions, convert_table

        options = TableOptions(folder / "bert", context=2, skip_bad=True)
        notes: list[str] = []
        made = convert_table(folder / name, folder / "out", options, force=True, on_note=notes.append)
        return made, [one_line(note) for note in notes]

    return read


def _convert_table(name: str) -> Callable[[Path], list[str]]:
    def command(folder: Path) -> list[str]:
        encoder = ["--text-encoder", str(folder / "bert")]
        return ["convert", str(folder / name), str(folder / "new"), *encoder, "--skip-bad", "-q"]

    return command


# --- words -----------------------------------------------------------------------------------------------------------


def _tokenizers(folder: Path) -> list[bytes]:
    from helpers.tiny_bert import vocabulary
    from tokenizers.implementations import BertWordPieceTokenizer

    # Few words, so that mutants are of the other parts.
    words = {word: i for i, word in enumerate(word for word in vocabulary(("a", "good")) if "unused" not in word)}
    made = BertWordPieceTokenizer(words, lowercase=True)
    made.enable_truncation(8)
    made.enable_padding(length=8)
    plain = BertWordPieceTokenizer(words, lowercase=True).to_str().encode()
    # Parts that no BERT of ours has, and that the library takes all the same.
    rich = json.loads(made.to_str())
    swap = {"type": "Replace", "pattern": {"Regex": "g+"}, "content": "g"}
    rich["normalizer"] = {"type": "Sequence", "normalizers": [swap, {"type": "Prepend", "prepend": "a"}]}
    split = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
    rich["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, {"type": "FixedLength", "length": 5}]}
    return [plain, made.to_str().encode(), json.dumps(rich).encode()]


def _read_tokenizer(folder: Path) -> object:
    from hcmen.media.words import Tokenizer

    path = folder / "tokenizer.json"
    tokenizer = Tokenizer(path.read_bytes(), TOKENS, str(path))
    return [tokenizer(text) for text in ("a good film", "é [MASK] \u0bcd\u200b好 " * 20)]


def _berts(file: str) -> Callable[[Path], Sequence[bytes]]:
    def prepare(folder: Path) -> Sequence[bytes]:
        from helpers.tiny_bert import write_bert

        write_bert(folder, hidden=8, layers=1, words=("good", "film"), positions=8)
        return [(folder / file).read_bytes()]

    return prepare


def _read_bert(folder: Path) -> object:
    from hcmen.models.text_encoder import read_sizes, read_tokenizer

    return read_sizes(folder), read_tokenizer(folder)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _checkpoints(file: str) -> Callable[[Path], Sequence[bytes]]:
    def prepare(folder: Path) -> Sequence[bytes]:
        import torch
        from helpers.micro import MICRO

        from hcmen.models import registry
        from hcmen.training.checkpoint import save_checkpoint, save_state
        from hcmen.training.config import TrainConfig

        torch.manual_seed(0)
        model, train = registry.named("hcmen").module(MICRO), TrainConfig(epochs=1)
        place = folder / "train"
        place.mkdir()
        validation = {"mae": 1.0, "mae_by_variant": {"full": 1.0}}
        dataset = {"name": "set", "label_min": -3.0, "label_max": 3.0, "samples": dict(_COUNTS), "cleaned": {}}
        run = {"preset": "tiny", "data": None, "text_encoder": None}
        save_checkpoint(place, model, train, epoch=1, validation=validation, dataset=dataset, run=run)
        about = {"schema_version": 1, "kind": "hcmen", "model": MICRO.to_json(), "train": train.to_json(), "data": {}}
        record = {"epoch": 1, "loss": 1.0, "validation_mae": 1.0, "validation": {"full": 1.0}, "best": True}
        tensors = {f"model/{name}": x for name, x in model.named_parameters()}
        save_state(place, tensors, {**about, "run": {}, "history": [record]})
        report = {"epoch": 1, "validation_mae": 1.0, "test": {"full": {"hcmen": {"mae": 1.0, "corr": None}}}}
        (place / "report.json").write_text(json.dumps(report))
        return [(folder / file).read_bytes()]

    return prepare


def _read_checkpoint(folder: Path) -> object:
    from hcmen.export.trained import trained
    from hcmen.training.checkpoint import load_checkpoint

    _, about = load_checkpoint(folder / "train")
    return trained(folder / "train", about)


def _read_weights(folder: Path) -> object:
    path = folder / "train" / "config.json"
    config = json.loads(path.read_bytes())
    content = (folder / "train" / "checkpoint.safetensors").read_bytes()
    config["weights"] |= {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    path.write_text(json.dumps(config))
    return _read_checkpoint(folder)


def _read_state(folder: Path) -> object:
    from hcmen.training.settings import resumed_settings

    return resumed_settings(folder / "train", None, {}, None, None)


def _read_settings(folder: Path) -> object:
    from hcmen.training.settings import read_settings

    return read_settings(folder / "train")


def _export(folder: Path) -> list[str]:
    return ["export", "--checkpoint", str(folder / "train"), "--bundle", str(folder / "out")]


def _zipped(folder: Path) -> list[bytes]:
    _checkpoints("train/config.json")(folder)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted((folder / "train").iterdir()):
            archive.write(path, f"train/{path.name}")
    return [target.getvalue()]


def _tarred(folder: Path) -> list[bytes]:
    _checkpoints("train/config.json")(folder)
    made = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        target = io.BytesIO()
        with tarfile.open(fileobj=target, mode="w", format=form) as archive:
            archive.add(folder / "train", "train")
        made += [target.getvalue(), gzip.compress(target.getvalue(), mtime=0)]
    return made


def _load_archive(folder: Path) -> object:
    from hcmen.models import load

    return load(folder / "archive")


# --- reports and lines -----------------------------------------------------------------------------------------------


def _reports(folder: Path) -> list[bytes]:
    document = json.loads((_RESULTS / "bench.json").read_bytes())
    for row in document["rows"]:
        for times in filter(None, (row["run"], row["call"])):
            times["rounds_ms"] = [turn[:2] for turn in times["rounds_ms"][:2]]
    document["rows"] = [document["rows"][0], document["rows"][-1]]
    (folder / "old.json").write_text(json.dumps(document))
    return [json.dumps(document).encode()]


def _read_report(folder: Path) -> object:
    from hcmen.runtime.benchmark.judge import compare_documents
    from hcmen.runtime.benchmark.page import page
    from hcmen.runtime.benchmark.report import read_document
    from hcmen.runtime.benchmark.text import tables

    data, old = read_document(folder / "report.json"), read_document(folder / "old.json")
    verdicts, unmatched = compare_documents(data, old)
    return tables(data, verdicts, unmatched), page(data, verdicts, unmatched).encode("utf-8", "replace")


def _show(folder: Path) -> list[str]:
    return ["bench", "--show", str(folder / "report.json")]


def _texts(_folder: Path) -> list[bytes]:
    return ["\ufeffa film\n\nnever again\r\nна русском\n".encode()]


def _read_texts(folder: Path) -> object:
    """The texts of --text-file; the first that cannot be read counts for all."""
    from hcmen.media.text_lines import TextLines

    told = list(TextLines(str(folder / "texts.txt")))
    for _, found in told:
        if isinstance(found, HcmenError):
            raise found
    return told


def _named_chunks(folder: Path) -> list[bytes]:
    _clip(folder)
    return [f"{folder / 'given.npz'}\n{folder / 'missing.npz'}\n".encode()]


def _read_lines(folder: Path) -> object:
    """The paths as hcmen-follow takes them from stdin, and each as a clip."""
    from hcmen.base.clip import read_clip
    from hcmen.runtime.commands.follow import _from_stdin, _in_order

    with open(folder / "lines") as file:
        before, sys.stdin = sys.stdin, file
        try:
            paths = [found[0] for found in _from_stdin() if found is not None]
        finally:
            sys.stdin = before
    told: list[object] = sorted(paths, key=_in_order)
    for path in paths:
        try:
            told.append(read_clip(path, INPUTS))
        except InputError as error:
            told.append(str(error))
    return told


FORMATS = {
    f.name: f
    for f in (
        Format("clip", "clip.npz", _clips, _read_clip(INPUTS), mutate.npz, _run_clip),
        Format("clip of tokens", "clip.npz", _token_clips, _read_clip(TOKENS), mutate.npz),
        Format("golden set", "bundle/golden/text_only.npz", _goldens, _read_golden, mutate.npz, _self_test),
        Format("manifest", "bundle/manifest.json", _manifests, _read_manifest, mutate.json_file, _run_bundle),
        Format("manifest of schema 1", "bundle/manifest.json", _old_manifests, _read_manifest, mutate.json_file),
        Format("engine index", "bundle/engines/manifest.json", _indexes, _read_index, mutate.json_file),
        Format("engine key", "hcmen/engine.key", _keys, _read_key, mutate.havoc),
        Format("kept golden test", _KEPT, _kept, _read_kept, mutate.json_file),
        Format("kept code", _CODE, _codes, _read_code, mutate.havoc),
        Format("graph", "bundle/text_only.onnx", _graphs, _read_graph, mutate.onnx, _run_graph),
        Format("states of a sequence", "states.npz", _saved_states, _load_states, mutate.npz),
        Format("records of states", "states.json", _records, _read_records, mutate.json_file),
        Format("pickle", "set.pkl", _pickles, lambda folder: _read_set(folder / "set.pkl"), mutate.pickled, _convert),
        *(
            Format(
                f"folder: {name.rpartition('/')[2]}", f"set/{name}", _folder_with(f"set/{name}"), read, how, _cut_clip
            )
            for name, read, how in (
                ("dataset.json", _read_folder, mutate.json_file),
                ("test/audio.npy", _read_array("test/audio.npy"), mutate.npy),
                ("test/text_bert.npy", _read_array("test/text_bert.npy"), mutate.npy),
                ("test/id.json", _read_array("test/id.json"), mutate.json_file),
            )
        ),
        Format(
            "table: CSV", "set.csv", _tables(as_csv), _read_table("set.csv"), mutate.lines, _convert_table("set.csv")
        ),
        Format(
            "table: JSON lines",
            "set.jsonl",
            _tables(as_json_lines),
            _read_table("set.jsonl"),
            mutate.lines,
            _convert_table("set.jsonl"),
        ),
        Format("tokenizer", "tokenizer.json", _tokenizers, _read_tokenizer, mutate.json_file),
        *(
            Format(f"BERT: {name}", name, _berts(name), _read_bert, how)
            for name, how in (("config.json", mutate.json_file), ("vocab.txt", mutate.lines))
        ),
        *(
            Format(f"checkpoint: {name}", f"train/{name}", _checkpoints(f"train/{name}"), read, how, command)
            for name, read, how, command in (
                ("config.json", _read_checkpoint, mutate.json_file, _export),
                ("checkpoint.safetensors", _read_weights, mutate.safetensors, None),
                ("last.safetensors", _read_state, mutate.safetensors, None),
                ("report.json", _read_checkpoint, mutate.json_file, None),
            )
        ),
        Format("checkpoint in a zip", "archive", _zipped, _load_archive, mutate.npz),
        Format("checkpoint in a tar", "archive", _tarred, _load_archive, mutate.havoc),
        Format(
            "settings for --config",
            "train/config.json",
            _checkpoints("train/config.json"),
            _read_settings,
            mutate.json_file,
        ),
        Format("bench report", "report.json", _reports, _read_report, mutate.json_file, _show),
        Format("lines of --text-file", "texts.txt", _texts, _read_texts, mutate.lines),
        Format("lines of --follow", "lines", _named_chunks, _read_lines, mutate.lines),
    )
}
