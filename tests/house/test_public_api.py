"""The names this package offers: few, listed, and all there."""

from __future__ import annotations

import ast
import importlib
import inspect

import pytest
from house.test_imports import ALL, room

import hcmen.runtime
from hcmen.base.errors import BackendError, CheckFailed, CorruptFileError, HcmenError, InputError

CHECKED = sorted(n for n, path in ALL.items() if room(n) in ("base", "media", "runtime") and path.name != "__init__.py")


def test_the_runtime_offers_exactly_its_names():
    assert sorted(hcmen.runtime.__all__) == ["Clip", "HcmenError", "Predictor", "Result", "load", "read_clip"]
    assert len(hcmen.runtime.__all__) <= 8
    for name in hcmen.runtime.__all__:
        assert getattr(hcmen.runtime, name).__module__.startswith("hcmen.")
    assert set(hcmen.runtime.__all__) <= set(dir(hcmen.runtime))
    with pytest.raises(AttributeError, match="has no attribute 'laod'"):
        _ = hcmen.runtime.laod


def test_star_import_gives_the_listed_names():
    names: dict[str, object] = {}
    exec("from hcmen.runtime import *", names)
    assert set(names) - {"__builtins__"} == set(hcmen.runtime.__all__)


@pytest.mark.parametrize("name", CHECKED)
def test_all_lists_what_a_module_defines_for_others(name):
    """Every listed name exists, and is documented; nothing listed is private."""
    module = importlib.import_module(name)
    assert module.__doc__
    listed = module.__all__
    assert listed == sorted(set(listed), key=_ruff_order)
    for item in listed:
        value = getattr(module, item)
        assert not item.startswith("_")
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name}.{item} has no docstring"


def _ruff_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then the rest, as the linter sorts `__all__`."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", CHECKED)
def test_public_functions_and_methods_are_documented(name):
    missing = []
    for node in ast.walk(ast.parse(ALL[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            missing += [
                f"{node.name}.{f.name}"
                for f in node.body
                if isinstance(f, ast.FunctionDef)
                and not f.name.startswith("_")
                and not ast.get_docstring(f)
                and "overload" not in ast.dump(ast.Module(f.decorator_list, []))  # type: ignore[arg-type]
            ]
    assert not missing


def test_every_error_has_its_exit_code():
    assert {e: e.exit_code for e in (CheckFailed, InputError, BackendError, CorruptFileError)} == {
        CheckFailed: 1,
        InputError: 2,
        BackendError: 3,
        CorruptFileError: 5,
    }
    assert all(issubclass(e, HcmenError) for e in (CheckFailed, InputError, BackendError, CorruptFileError))
