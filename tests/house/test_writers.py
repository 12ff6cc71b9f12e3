"""Product code writes files through hcmen/base/files.py: whole or not at all, through no link, and cleared up after."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEW = "within the new folder of writing_bundle or writing_folder"
PRIVATE = "within a folder that tempfile made for this user alone"

# (file, function) that writes by itself -> why it may.
ALLOWED = {
    ("export/bench_eager.py", "_answer"): PRIVATE,
    ("export/bench_eager.py", "main"): "to a pipe",
    ("export/bundle.py", "_copy_tokenizer"): NEW,
    ("export/bundle.py", "_write_golden"): NEW,
    ("export/bundle.py", "export_bundle"): NEW,
    ("export/commands/compile.py", "_copied"): NEW,
    ("export/int8.py", "activation_ranges"): PRIVATE,
    ("export/kept.py", "copy_golden"): NEW,
    ("export/triton.py", "write_repository"): NEW,
    ("hcmen/base/clip.py", "write_clip"): "to the file of writing_file",
    ("hcmen/base/console.py", "_closed_streams_to_null"): "to /dev/null",
    ("hcmen/base/console.py", "_flush"): "to /dev/null",
    ("hcmen/base/engines.py", "_index_locked"): "an empty file for a lock, and O_NOFOLLOW",
    ("hcmen/base/files.py", "_new"): "this is the way",
    ("hcmen/base/files.py", "_temporary_file"): "this is the way",
    ("hcmen/data/folder.py", "_write_array"): NEW,
    ("hcmen/data/folder.py", "_write_json"): NEW,
    ("hcmen/mamba/graph.py", "share_weights"): NEW,
    ("hcmen/models/loading_archive.py", "_write"): PRIVATE,
    ("runtime/benchmark/peers.py", "__init__"): PRIVATE,
    ("runtime/benchmark/peers.py", "send"): PRIVATE,
    ("runtime/mamba.py", "save"): "to the file of writing_file",
}

WRITES = {"write_text", "write_bytes", "tofile", "touch"}
WRITES |= {
    f"{module}.{name}" for module in ("np", "numpy") for name in ("save", "savez", "savez_compressed", "savetxt")
}
WRITES |= {f"shutil.{name}" for name in ("copy", "copy2", "copyfile", "copytree", "move")}
WRITES |= {"onnx.save", "onnx.save_model", "safetensors.torch.save_file"}


def writes(call: ast.Call) -> bool:
    """Whether `call` makes or changes a file, as far as its text tells."""
    name = ast.unparse(call.func)
    words = [x.value for x in (*call.args, *(k.value for k in call.keywords)) if isinstance(x, ast.Constant)]
    if name == "os.open":
        return len(call.args) > 2 or any(word in ast.unparse(call) for word in ("O_WRONLY", "O_RDWR", "O_CREAT"))
    if name.rpartition(".")[2] in ("open", "fdopen", "ZipFile"):
        return any(isinstance(w, str) and len(w) <= 3 and {*w} & {*"wax+"} for w in words)
    return name in WRITES or name.rpartition(".")[2] in WRITES


def writers(source: str) -> Iterator[tuple[str, int]]:
    """(function, line) of every call that writes; the innermost function that has a name."""
    waiting = [(ast.parse(source), "")]
    while waiting:
        node, function = waiting.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            function = node.name
        if isinstance(node, ast.Call) and writes(node):
            yield function, node.lineno
        waiting += [(child, function) for child in ast.iter_child_nodes(node)]


def test_files_are_written_in_one_way() -> None:
    found: dict[tuple[str, str], list[str]] = {}
    for folder in ("hcmen", "export", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            for function, line in writers(path.read_text()):
                found.setdefault((name, function), []).append(f"{name}:{line}")
    told = [place for key, places in found.items() if key not in ALLOWED for place in places]
    assert not told, f"write through hcmen/base/files.py, or say here why not: {', '.join(told)}"
    assert found.keys() == ALLOWED.keys(), f"allowed and gone: {ALLOWED.keys() - found.keys()}"


@pytest.mark.parametrize(
    "line",
    [
        'open(p, "w")',
        'open(p, mode="ab")',
        'p.open("r+b")',
        'p.write_text("")',
        "np.savez(p, x=x)",
        "shutil.copyfile(a, b)",
        "os.open(p, os.O_CREAT)",
        'zipfile.ZipFile(p, "w")',
    ],
)
def test_a_writer_is_seen(line: str) -> None:
    assert list(writers(f"def f():\n    {line}\n")) == [("f", 2)]


@pytest.mark.parametrize("line", ["open(p)", 'open(p, "rb")', "os.open(p, os.O_RDONLY)", 'x.replace("w", "a")'])
def test_a_reader_is_none(line: str) -> None:
    assert list(writers(line)) == []
