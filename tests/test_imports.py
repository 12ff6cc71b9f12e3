"""Who may import whom (the arrows of the design), read from the sources and seen in running processes."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.small_bundle import clip_arrays

from hcmen.clip import write_clip

ROOT = Path(__file__).resolve().parent.parent
BASE = {"__init__", "modalities", "config", "clip", "bundle", "engines", "metrics", "errors", "files"}
FOLDERS = {"hcmen": ROOT / "hcmen", "hcmen.runtime": ROOT / "runtime", "hcmen.export": ROOT / "export"}
HEAVY = ("torch", "onnxruntime", "onnx", "onnxscript", "tensorrt", "matplotlib", "rich", "safetensors", "transformers")


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python file of the package."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imports_of(tree: ast.AST, name: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether it runs when the file is imported) for every import statement, wherever it stands."""
    typing_only = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for child in branch.body
        for node in ast.walk(child)
    }
    lazy = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        at_import = id(node) not in lazy | typing_only
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield str(node.module), at_import
            for alias in node.names:  # `from hcmen.runtime import library` imports a module
                if f"{node.module}.{alias.name}" in ALL:
                    yield f"{node.module}.{alias.name}", at_import


ALL = dict(modules())


def layer(module: str) -> str:
    """Which part of the design a module of ours belongs to."""
    parts = module.split(".")
    if parts[1:2] in (["runtime"], ["export"]):
        return parts[1]
    return "base" if len(parts) == 1 or parts[1] in BASE else "torch"


def allowed(importer: str, imported: str) -> bool:
    """Whether the arrow from one module of ours to another is one of the design's."""
    source, target = layer(importer), layer(imported)
    if source == target or target == "base" or source == "export":
        return True
    if source == "torch" and target == "runtime":
        return imported in ("hcmen.runtime", "hcmen.runtime.library", "hcmen.runtime.cuda_library", "hcmen.runtime.cli")
    return False


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_import_follows_an_arrow(name):
    tree = ast.parse(ALL[name].read_text())
    wrong = []
    for imported, at_import in imports_of(tree, name):
        package = imported.partition(".")[0]
        if package == "hcmen":
            fine = allowed(name, imported)
        elif package in sys.stdlib_module_names:
            fine = True
        elif layer(name) == "base":
            fine = package == "numpy"
        elif layer(name) == "runtime":
            fine = package in ("numpy", "click") or (
                package in ("onnxruntime", "tensorrt", "tokenizers") and not at_import
            )
        else:
            fine = True
        if not fine:
            wrong.append(imported)
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_the_walk_sees_what_it_should():
    """Or the test above could pass on nothing."""
    assert len(ALL) > 20
    tree = ast.parse("import torch\ndef f():\n    from hcmen import model\nif TYPE_CHECKING:\n    import onnx")
    assert dict(imports_of(tree, "x")) == {"torch": True, "hcmen": False, "hcmen.model": False, "onnx": False}
    assert not allowed("hcmen.runtime.ort", "hcmen.model")
    assert not allowed("hcmen.runtime.ort", "hcmen.export.parity")
    assert not allowed("hcmen.bundle", "hcmen.runtime.cli")
    assert not allowed("hcmen.model", "hcmen.runtime.predictor")
    assert not allowed("hcmen.model", "hcmen.export")
    assert allowed("hcmen.scan", "hcmen.runtime.library")
    assert allowed("hcmen.export.parity", "hcmen.model")


def test_the_runtime_names_the_exporter_in_two_places_only():
    """`hcmen-run --check` and the process that `hcmen-bench --against eager` starts load the eager model by name."""
    users = [n for n, path in ALL.items() if layer(n) == "runtime" and '"hcmen.export' in path.read_text()]
    assert sorted(users) == ["hcmen.runtime.benchmark.peers", "hcmen.runtime.command"]


def loaded_after(script: str, *arguments: str) -> set[str]:
    """The top-level modules that a fresh process holds after `script`, which may end the process."""
    code = textwrap.dedent(
        """
        import atexit, json, os, sys
        target = os.environ["HCMEN_TEST_MODULES"]
        atexit.register(lambda: open(target, "w").write(json.dumps(sorted({m.partition(".")[0] for m in sys.modules}))))
        """
    ) + textwrap.dedent(script)
    target = Path(os.environ.get("TMPDIR", "/tmp")) / f"hcmen-modules-{os.getpid()}.json"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            env={**os.environ, "HCMEN_TEST_MODULES": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return set(json.loads(target.read_text()))
    finally:
        target.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "module",
    [
        "hcmen.runtime.command",
        "hcmen.runtime.bench",
        "hcmen.runtime.doctor",
        "hcmen.export.command",
        "hcmen.export.compile_command",
        "hcmen.train",
        "hcmen.data.convert",
        "hcmen.data.cut",
        "hcmen.evaluate_command",
    ],
)
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(module, flag):
    loaded = loaded_after(f"import sys; sys.argv = ['x', '{flag}']\nfrom {module} import main; main()")
    assert loaded.isdisjoint(HEAVY)
    if module.startswith("hcmen.runtime"):
        assert "numpy" not in loaded


def test_importing_the_runtime_is_light():
    loaded = loaded_after("import hcmen.runtime; hcmen.runtime.load, hcmen.runtime.Predictor, hcmen.runtime.Clip")
    assert loaded.isdisjoint(HEAVY)
    assert "numpy" not in loaded_after("import hcmen, hcmen.runtime")


def test_a_whole_prediction_never_imports_torch(shared_bundle, tmp_path):
    pytest.importorskip("torch", reason="only with torch installed does its absence prove anything")
    write_clip(tmp_path / "clip.npz", clip_arrays(1))
    loaded = loaded_after(
        """
        import sys
        from hcmen.runtime import load
        model = load(sys.argv[1])
        assert isinstance(model(sys.argv[2]).score, float)
        assert all(t.passed for t in model.self_test())
        """,
        str(shared_bundle),
        str(tmp_path / "clip.npz"),
    )
    assert "onnxruntime" in loaded
    assert loaded.isdisjoint(set(HEAVY) - {"onnxruntime"})


def test_the_commands_of_the_runtime_never_import_torch(shared_bundle, tmp_path):
    write_clip(tmp_path / "clip.npz", clip_arrays(1))
    for module, arguments in (
        ("hcmen.runtime.command", [str(tmp_path / "clip.npz"), "--bundle", str(shared_bundle), "--self-test"]),
        ("hcmen.runtime.doctor", ["--bundle", str(shared_bundle)]),
        ("hcmen.runtime.bench", [str(shared_bundle), "--rounds", "2", "--html", str(tmp_path / "report.html")]),
    ):
        loaded = loaded_after(f"from {module} import main; main()", *arguments)
        assert "onnxruntime" in loaded
        assert loaded.isdisjoint(set(HEAVY) - {"onnxruntime"})
