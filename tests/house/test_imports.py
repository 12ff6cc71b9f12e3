"""Who may import whom (the arrows of the design), read from the sources and seen in running processes."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers.processes import loaded_after
from helpers.small_bundle import clip_arrays

from hcmen.base.clip import write_clip

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"hcmen": ROOT / "hcmen", "hcmen.runtime": ROOT / "runtime", "hcmen.export": ROOT / "export"}
HEAVY = (
    *("torch", "onnxruntime", "onnx", "onnxscript", "tensorrt", "tensorrt_rtx_bindings"),
    *("matplotlib", "rich", "safetensors", "transformers"),
)

# Room -> the rooms it may import, itself left out.
ARROWS = {
    "base": set[str](),
    "data": {"base"},
    "media": {"base"},
    "mamba": {"base"},
    "models": {"base", "data", "media", "mamba"},
    "training": {"base", "data", "media", "mamba", "models"},
    "evaluation": {"base", "data", "media", "mamba", "models", "training"},
    "export": {"base", "data", "media", "mamba", "models", "training", "runtime"},
    "runtime": {"base", "media"},
}
# A module, what it may import against the arrows, and why.
EXCEPTIONS = {
    ("hcmen.evaluation.command", "hcmen.runtime"): "hcmen-eval --bundle scores with what runs on the device",
    ("hcmen.data.table.texts", "hcmen.media.words"): "the words of a table become the tokens that the device makes",
    ("hcmen.data.table.texts", "hcmen.media.encoder_folder"): "with the tokenizer of training, named as there",
    ("hcmen.models.loading", "hcmen.training.checkpoint"): "hcmen.models.load reads what training wrote",
}
# Room -> packages of others that it may import: when it is imported itself, and within functions only.
PACKAGES = {
    "base": ({"numpy", "click"}, {"onnxruntime"}),
    "data": ({"numpy", "click"}, {"pyarrow"}),
    "media": ({"numpy"}, {"tokenizers"}),
    "mamba": ({"numpy", "torch", "onnx", "onnxscript"}, {"onnxruntime", "tensorrt"}),
    "models": ({"numpy", "torch"}, {"huggingface_hub", "safetensors", "transformers"}),
    "training": ({"numpy", "click", "torch", "safetensors"}, {"matplotlib", "rich", "wandb"}),
    "evaluation": ({"numpy", "click"}, {"matplotlib", "torch"}),
    "export": ({"numpy", "click", "torch", "onnx"}, {"onnxruntime", "safetensors", "transformers"}),
    "runtime": ({"numpy", "click"}, {"onnxruntime", "tensorrt", "tensorrt_rtx_bindings"}),
}
OLD_NAMES = {
    *("hcmen.scan", "hcmen.model", "hcmen.clip", "hcmen.bundle", "hcmen.config"),
    *("hcmen.export.scan_function", "hcmen.runtime.library"),
}


def modules() -> Iterator[tuple[str, Path]]:
    """(dotted name, file) of every Python file of the package."""
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


def imports_of(tree: ast.AST, name: str, at_import: bool = True) -> Iterator[tuple[str, bool]]:
    """(imported module, whether it runs when the file is imported) for every import statement, wherever it stands."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, at_import
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            yield str(node.module), at_import
            for alias in node.names:  # `from hcmen.runtime import library` imports a module
                if f"{node.module}.{alias.name}" in ALL:
                    yield f"{node.module}.{alias.name}", at_import
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports_of(ast.Module(node.body, []), name, False)
            yield from imports_of(ast.Module(node.orelse, []), name, at_import)
        else:
            function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from imports_of(node, name, at_import and not function)


ALL = dict(modules())


def room(module: str) -> str:
    """The room that a module of ours belongs to; `hcmen` and its commands' umbrella lie in base, old names in none."""
    if module in OLD_NAMES:
        return "old names"
    return "base" if module in ("hcmen", "hcmen.__main__") else module.split(".")[1]


def allowed(importer: str, imported: str) -> bool:
    """Whether the arrow from one module of ours to another is one of the design's."""
    source, target = room(importer), room(imported)
    if source == "old names":
        return room(imported) == "base"
    return source == target or target in ARROWS[source]


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_import_follows_an_arrow(name):
    place = room(name)
    assert place in ARROWS or name in OLD_NAMES, f"{name} lies in no room: put it into one of {', '.join(ARROWS)}"
    wrong = []
    for imported, at_import in imports_of(ast.parse(ALL[name].read_text(encoding="utf-8")), name):
        package = imported.partition(".")[0]
        if package == "hcmen":
            fine = allowed(name, imported) or (not at_import and (name, imported) in EXCEPTIONS)
        elif package in sys.stdlib_module_names:
            fine = True
        else:
            first, lazily = PACKAGES.get(place, (set(), set()))
            fine = package in first or (package in lazily and not at_import)
        if not fine:
            wrong.append(imported)
    assert not wrong, f"{name} must not import {', '.join(wrong)}"


def test_no_modules_import_each_other_in_a_circle():
    """Within functions and for types too. `Predictor.stream` alone may: it makes what holds the predictor.

    What the package of models names for type checkers is imported by name when it is asked for.
    """
    arrows = {
        name: {imported for imported, _ in imports_of(ast.parse(path.read_bytes()), name) if imported in ALL} - {name}
        for name, path in ALL.items()
    }
    arrows["hcmen.runtime.predictor"] -= {"hcmen.runtime.stream", "hcmen.runtime.stream_buffers"}
    arrows["hcmen.models"] -= {"hcmen.models.loading"}
    assert len(list(TopologicalSorter(arrows).static_order())) == len(ALL)


def test_the_walk_sees_what_it_should():
    """Or the test above could pass on nothing."""
    assert {room(name) for name in ALL} - {"old names"} == set(ARROWS)
    assert len(ALL) > 100
    code = "import torch\ndef f():\n  from hcmen import base\nif TYPE_CHECKING:\n  import onnx\nelse:\n  import click"
    found = dict(imports_of(ast.parse(code), "x"))
    assert found == {"torch": True, "hcmen": False, "hcmen.base": False, "onnx": False, "click": True}
    assert not allowed("hcmen.runtime.backends.ort", "hcmen.models.hcmen.model")
    assert not allowed("hcmen.runtime.backends.ort", "hcmen.export.parity")
    assert not allowed("hcmen.base.bundle", "hcmen.runtime.compare")
    assert not allowed("hcmen.data.missing", "hcmen.training.config")
    assert not allowed("hcmen.models.hcmen.model", "hcmen.runtime.predictor")
    assert not allowed("hcmen.models.hcmen.model", "hcmen.export")
    assert not allowed("hcmen.mamba.trt_aot", "hcmen.runtime")
    assert not allowed("hcmen.export.parity", "hcmen.scan")
    assert allowed("hcmen.mamba.scan", "hcmen.base.library")
    assert allowed("hcmen.export.parity", "hcmen.models.hcmen.model")


def test_every_exception_is_needed():
    for (importer, imported), reason in EXCEPTIONS.items():
        assert reason
        assert not allowed(importer, imported)
        assert imported in dict(imports_of(ast.parse(ALL[importer].read_text(encoding="utf-8")), importer))


def test_the_runtime_names_the_exporter_in_two_places_only():
    """`hcmen-run --check` and the process that `hcmen-bench --against eager` starts load the eager model by name."""
    users = [
        n for n, path in ALL.items() if room(n) == "runtime" and '"hcmen.export' in path.read_text(encoding="utf-8")
    ]
    assert sorted(users) == ["hcmen.runtime.benchmark.peers", "hcmen.runtime.commands.run"]


@pytest.mark.parametrize(
    "module",
    [
        "hcmen.runtime.commands.run",
        "hcmen.runtime.commands.follow",
        "hcmen.runtime.benchmark.command",
        "hcmen.runtime.commands.doctor",
        "hcmen.export.commands.export",
        "hcmen.export.commands.compile",
        "hcmen.export.commands.export_mamba",
        "hcmen.training.command",
        "hcmen.data.convert",
        "hcmen.data.cut",
        "hcmen.evaluation.command",
    ],
)
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_and_version_import_nothing_heavy(module, flag):
    loaded = loaded_after(f"import sys; sys.argv = ['x', '{flag}']\nfrom {module} import main; main()")
    assert loaded.isdisjoint(HEAVY)
    if module.startswith("hcmen.runtime"):
        assert "numpy" not in loaded


@pytest.mark.parametrize("place", ["data", "media"])
def test_the_rooms_of_data_never_import_torch(place):
    pytest.importorskip("torch", reason="only with torch installed does its absence prove anything")
    names = [n for n in ALL if room(n) == place]
    loaded = loaded_after("import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module(name)", *names)
    assert "numpy" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_a_data_set_is_made_converted_and_cut_without_torch(tmp_path):
    pytest.importorskip("torch", reason="only with torch installed does its absence prove anything")
    loaded = loaded_after(
        """
        import sys
        from pathlib import Path
        from hcmen.base.inputs import FeatureConfig, Inputs
        from hcmen.data.convert import convert
        from hcmen.data.cut import main
        from hcmen.data.mmsa import read_mmsa
        from hcmen.data.synthetic import make_synthetic, write_synthetic
        folder = Path(sys.argv[1])
        takes = Inputs(FeatureConfig(8, 10), FeatureConfig(5, 16), FeatureConfig(4, 16))
        write_synthetic(folder / "set.pkl", make_synthetic(takes, (6, 2, 2)))
        convert(folder / "set.pkl", folder / "set")
        assert len(read_mmsa(folder / "set", takes).splits["train"]) == 6
        main([str(folder / "set"), "--all", "--out", str(folder / "clips")])
        """,
        str(tmp_path),
    )
    assert loaded.isdisjoint(HEAVY)


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
        ("hcmen.runtime.commands.run", [str(tmp_path / "clip.npz"), "--bundle", str(shared_bundle), "--self-test"]),
        ("hcmen.runtime.commands.doctor", ["--bundle", str(shared_bundle)]),
        (
            "hcmen.runtime.benchmark.command",
            [str(shared_bundle), "--rounds", "2", "--html", str(tmp_path / "report.html")],
        ),
    ):
        loaded = loaded_after(f"from {module} import main; main()", *arguments)
        assert "onnxruntime" in loaded
        # The doctor tries each TensorRT that is installed.
        tried = {"tensorrt", "tensorrt_rtx_bindings"} if "doctor" in module else set()
        assert loaded.isdisjoint(set(HEAVY) - {"onnxruntime"} - tried)
