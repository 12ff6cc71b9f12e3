"""Old module names: they work, they warn of the new place, and nothing here uses them."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from house.test_imports import ALL, OLD_NAMES, imports_of

ROOT = Path(__file__).resolve().parents[2]
# Old module, a name of it, and where that lies now: for each old module what its users took from it.
USED = [
    ("hcmen.scan", "selective_scan", "hcmen.mamba.scan"),
    ("hcmen.scan", "causal_conv1d_ref", "hcmen.mamba.scan"),
    ("hcmen.model", "HCMEN", "hcmen.models.hcmen.model"),
    ("hcmen.clip", "read_clip", "hcmen.base.clip"),
    ("hcmen.clip", "TEXT_TOKENS", "hcmen.base.clip"),
    ("hcmen.bundle", "read_bundle", "hcmen.base.bundle"),
    ("hcmen.bundle", "Manifest", "hcmen.base.manifest"),
    ("hcmen.bundle", "FileRecord", "hcmen.base.records"),
    ("hcmen.bundle", "TensorSpec", "hcmen.base.inputs"),
    ("hcmen.config", "ModelConfig", "hcmen.models.hcmen.config"),
    ("hcmen.config", "FeatureConfig", "hcmen.base.inputs"),
    ("hcmen.config", "TrainConfig", "hcmen.training.config"),
    ("hcmen.config", "preset_named", "hcmen.training.presets"),
    ("hcmen.export.scan_function", "add_functions", "hcmen.mamba.functions"),
    ("hcmen.export.scan_function", "strip_functions", "hcmen.mamba.functions"),
    ("hcmen.runtime.library", "library_path", "hcmen.base.library"),
]


def test_every_old_name_is_tried():
    assert {old for old, _, _ in USED} == OLD_NAMES


@pytest.fixture(autouse=True)
def imported_before():
    """The old modules are there, as after a first import, which warns by itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        for old in OLD_NAMES:
            importlib.import_module(old)


@pytest.mark.parametrize("old", sorted(OLD_NAMES))
def test_the_import_alone_warns(old, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import {old}\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0
    assert f"{script}:1: DeprecationWarning: {old} is now hcmen." in done.stderr
    assert all(new in done.stderr for name, _, new in USED if name == old)


@pytest.mark.parametrize(("old", "name", "new"), USED)
def test_an_old_name_works_and_warns_of_the_new_place(old, name, new):
    scope: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match=rf"^{old} is now {new}: import {name} from there") as caught:
        exec(compile(f"from {old} import {name}", __file__, "exec"), scope)
    assert scope[name] is getattr(importlib.import_module(new), name)
    # Blamed on the line that imports, or nobody would be shown it.
    assert [w.filename for w in caught] == [__file__]


def test_the_tensors_of_a_graph_are_told_by_their_old_names():
    from hcmen.base.inputs import FeatureConfig
    from hcmen.models.hcmen.config import ModelConfig

    bundle = importlib.import_module("hcmen.bundle")
    config = ModelConfig(FeatureConfig(8, 10), FeatureConfig(5, 16), FeatureConfig(4, 16))
    with pytest.warns(DeprecationWarning, match=r"is now model\.inputs\.of_variant\(variant\)") as caught:
        inputs = bundle.expected_inputs(config, "audio_only")
    with pytest.warns(DeprecationWarning, match=r"is now hcmen\.base\.inputs\.OUTPUTS") as caught_then:
        outputs = bundle.expected_outputs()
    assert (inputs, outputs) == (config.inputs.of_variant("audio_only"), config.inputs.outputs)
    assert [w.filename for w in (*caught, *caught_then)] == [__file__, __file__]


@pytest.mark.parametrize("old", sorted(OLD_NAMES))
def test_what_was_never_there_is_not_there_now(old):
    module = importlib.import_module(old)
    with pytest.raises(AttributeError, match=f"module '{old}' has no attribute 'laod'"):
        _ = module.laod


def test_a_star_import_gives_the_listed_names():
    scope: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        exec("from hcmen.clip import *", scope)
    assert set(importlib.import_module("hcmen.base.clip").__all__) <= set(scope)


def test_nothing_of_ours_imports_an_old_name():
    folders = ("hcmen", "export", "runtime", "tests", "benchmarks", "samples")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 200
    users = {
        str(path.relative_to(ROOT)): sorted(OLD_NAMES & set(dict(imports_of(ast.parse(path.read_bytes()), path.name))))
        for path in files
    }
    assert {path: names for path, names in users.items() if names} == {}


def test_importing_everything_warns_of_nothing_old():
    names = sorted(n for n in ALL if n not in OLD_NAMES)
    code = (
        "import importlib, sys, warnings\n"
        "warnings.filterwarnings('error', '.* is now hcmen', DeprecationWarning)\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
