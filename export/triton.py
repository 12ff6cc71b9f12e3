"""A bundle as a model repository of Triton Inference Server: one model per variant, on its ONNX Runtime backend.

    <repository>/hcmen_full/config.pbtxt
    <repository>/hcmen_full/1/model.onnx      the graph with its weights inside
    <repository>/libhcmen_ops.so              the kernel library, which every config.pbtxt names
    <repository>/hcmen.json                   what this was made from; Triton reads folders alone and passes it by

Each tensor's first axis is the batch, which Triton's dynamic batcher joins from requests of one shape. So the clips of
requests that shall share a batch are padded to one length by whoever sends them, and `m_length`, one number per clip,
says how much of each is real; neither padding nor batch mates change a score. The lengths are [batch] in the graph, and
[batch, 1] for Triton, which knows no tensor without a second axis: an empty `reshape` stands between the two.

Needs onnx and NumPy alone. tests/export/test_triton.py reads every config.pbtxt with Triton's own protobuf schema.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hcmen
from hcmen.base.bundle import Bundle, file_record, writing_folder
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.files import read_small
from hcmen.base.inputs import TensorSpec
from hcmen.base.library import LIBRARY_NAME, library_path
from hcmen.base.records import JsonFile, parse_json
from hcmen.export.weights import embedded_model

__all__ = ["SERVER_ROOT", "model_config", "write_repository"]

SERVER_ROOT = "/models"
"""Where a server sees the repository, if nothing else is said: the mount point of Triton's own examples."""
MARK_FILE = "hcmen.json"
SCHEMA_VERSION = 1
MAX_BATCH = 32
# Clips are scored in about a millisecond: waiting longer than that for batch mates would cost more than it saves.
QUEUE_MICROSECONDS = 1000

_TYPES = {"float32": "TYPE_FP32", "int64": "TYPE_INT64"}
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9_./+-]*\Z")


def write_repository(
    bundle: Bundle,
    target: Path,
    variants: Sequence[str] | None = None,
    *,
    server_root: str = SERVER_ROOT,
    max_batch: int = MAX_BATCH,
    force: bool = False,
) -> list[str]:
    """Writes the repository at `target`, whole or not at all; returns the names of its models.

    Args:
        bundle: where the graphs come from; every file is verified. target: the folder; one that this function wrote,
            or an empty one, is replaced.
        variants: which, all of the bundle by default.
        server_root: the path under which the server will see `target`, for the kernel library.
        max_batch: most clips in one run.
        force: replace a folder that is no repository of ours, too.

    Raises:
        InputError: an argument cannot be used, or something else is at `target`.
        CorruptFileError: the bundle is damaged.
        BackendError: the kernel library is missing.
        OSError: the place cannot be written.
    """
    if not _PLAIN_PATH.match(server_root):
        raise InputError(
            f"the server's path is {server_root!r}, expected an absolute one of plain characters such as {SERVER_ROOT}"
        )
    if not 1 <= max_batch <= 4096:
        raise InputError(f"max_batch is {max_batch}, expected 1 to 4096")
    names = list(bundle.manifest.variants) if variants is None else list(variants)
    library = f"{server_root.rstrip('/')}/{LIBRARY_NAME}"
    weights = bundle.read(bundle.manifest.weights)
    with writing_folder(target, check=lambda place: _check_replaceable(place, force), verify=_verify) as folder:
        shutil.copyfile(library_path(), folder / LIBRARY_NAME)
        for name in names:
            model = folder / f"hcmen_{name}"
            (model / "1").mkdir(parents=True)
            content = embedded_model(bundle, name, weights).SerializeToString(deterministic=True)
            (model / "1" / "model.onnx").write_bytes(content)
            (model / "config.pbtxt").write_text(model_config(bundle, name, library, max_batch), encoding="ascii")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        mark = {
            "schema_version": SCHEMA_VERSION,
            "name": "hcmen-triton",
            "hcmen": hcmen.__version__,
            "bundle_created": bundle.manifest.created,
            "server_root": server_root,
            "files": {p.relative_to(folder).as_posix(): file_record(p, p.parent).sha256 for p in files},
        }
        (folder / MARK_FILE).write_text(json.dumps(mark, indent=1) + "\n", encoding="ascii")
    return [f"hcmen_{name}" for name in names]


def model_config(bundle: Bundle, variant: str, library: str, max_batch: int = MAX_BATCH) -> str:
    """The config.pbtxt of a variant, which names the kernel library at the path `library` of the server's."""
    record = bundle.variant(variant)
    return "\n".join(
        [
            f'name: "hcmen_{variant}"',
            'backend: "onnxruntime"',
            'default_model_filename: "model.onnx"',
            f"max_batch_size: {max_batch}",
            *(_tensor("input", t) for t in record.inputs),
            *(_tensor("output", t) for t in record.outputs),
            # A batch of one shape, made of requests that wait for each other no longer than this.
            f"dynamic_batching {{ max_queue_delay_microseconds: {QUEUE_MICROSECONDS} }}",
            "instance_group [ { kind: KIND_CPU count: 1 } ]",
            f'model_operations {{ op_library_filename: [ "{library}" ] }}',
            "",
        ]
    )


def _tensor(kind: str, tensor: TensorSpec) -> str:
    if tensor.shape[:1] != ("batch",):
        raise InputError(f"tensor '{tensor.name}' has shape {list(tensor.shape)}, expected the batch as its first axis")
    tail = [-1 if isinstance(n, str) else n for n in tensor.shape[1:]]
    reshape = "" if tail else " reshape: { shape: [ ] }"
    dims = ", ".join(str(n) for n in tail or [1])
    return f'{kind} [ {{ name: "{tensor.name}" data_type: {_TYPES[tensor.dtype]} dims: [ {dims} ]{reshape} }} ]'


def _verify(folder: Path) -> None:
    """Raises CorruptFileError if what was written is not what was meant to be: a full disk may be silent."""
    mark = _mark(folder)
    for name, sha256 in mark.get("files", {}).items():
        if file_record(folder / name, (folder / name).parent).sha256 != sha256:
            raise CorruptFileError(f"{folder / name}: changed while it was written: write the repository again")


def _mark(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, CorruptFileError):
        data = parse_json(read_small(folder / MARK_FILE), JsonFile(MARK_FILE, "write the repository again"))
        if isinstance(data, dict) and data.get("name") == "hcmen-triton":
            return data
    return {}


def _check_replaceable(target: Path, force: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise InputError(f"{target}: a file is there, expected a folder for the model repository: choose another place")
    here = Path.cwd()
    if target == here or target in here.parents or target == Path.home():
        raise InputError(f"{target}: this folder is in use: choose another place")
    if any(target.iterdir()) and not _mark(target) and not force:
        raise InputError(
            f"{target}: a folder that is no model repository of hcmen: choose another place, or replace it (--force)"
        )
