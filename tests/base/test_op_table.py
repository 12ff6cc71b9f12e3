"""The operators stand once in Python (hcmen/base/op.py), once in C++ (runtime/csrc/op_table.h), once in words
(docs/op.md): the three say the same, and nothing says it again.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import inspect
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hcmen.base import library, op, selfcheck
from hcmen.base.op import CAUSAL_CONV1D, OPERATORS, SELECTIVE_SCAN, STATE_SPACE_DUAL, Operator
from hcmen.mamba import scan, trt_aot

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "runtime" / "csrc"
PRODUCT = [path for folder in ("hcmen", "export", "runtime") for path in sorted((ROOT / folder).rglob("*.py"))]


# --- C++ --------------------------------------------------------------------------------------------------------------

PROGRAM = r"""
#include <stddef.h>
#include <stdio.h>

#include "causal_conv1d.h"
#include "op_table.h"
#include "selective_scan.h"
#include "state_space_dual.h"

using namespace hcmen::op;

void text(const char* value) { value ? (void)printf("\"%s\"", value) : (void)printf("null"); }

template <class T, class Show>
void list(const char* name, const T* begin, const T* end, Show show) {
  printf(", \"%s\": [", name);
  for (const T* one = begin; one != end; ++one) printf(one == begin ? "" : ", "), show(*one);
  printf("]");
}

int main() {
  printf("{\"domain\": \"%s\", \"version\": \"%s\"", kDomain, kVersion);
  list("parser", kParserAttributes, kParserAttributes + 2, text);
  list("operators", kOperators, kOperators + sizeof kOperators / sizeof *kOperators, [](const Operator* of) {
    printf("{\"name\": \"%s\"", of->name);
    list("others", of->others, of->others + kMostOthers, text);
    const Attribute* const attributes = of->attributes;
    list("attributes", attributes, attributes + of->attribute_count(), [](const Attribute& attribute) {
      printf("{\"name\": \"%s\"", attribute.name);
      list("words", attribute.words, attribute.words + kMostWords, text);
      const float number = attribute.number;
      printf(", \"number\": ");
      attribute.is_number ? (void)printf(number > 1e38f ? "Infinity" : "%g", number) : text(nullptr);
      printf("}");
    });
    const auto tensor = [&](const Tensor& one) {
      printf("{\"name\": \"%s\", \"shared\": %s, \"only_with\": ", one.name, one.type == kShared ? "true" : "false");
      text(one.only_with == kAlways ? nullptr : of->attributes[one.only_with].name);
      printf(", \"spread\": %s", one.spread ? "true" : "false");
      list("sizes", one.sizes, one.sizes + one.rank(), [](Size size) { text(kSizeNames[size]); });
      printf("}");
    };
    list("inputs", of->inputs, of->inputs + of->input_count(), tensor);
    list("outputs", of->outputs, of->outputs + of->output_count(), tensor);
    printf("}");
  });
  const DerivedSize* const derived = kDerivedSizes;
  list("derived", derived, derived + sizeof kDerivedSizes / sizeof *derived, [](const DerivedSize& one) {
    printf("[\"%s\", [\"%s\", %d]]", kSizeNames[one.size], kSizeNames[one.of], one.plus);
  });
  printf(", \"structures\": {");
#define STRUCTURE(name, before) printf("%s\"%s\": {\"\": %zu", before, #name, sizeof(name))
#define FIELD(structure, name) printf(", \"%s\": %zu", #name, offsetof(structure, name))
  FIELDS
  printf("}}\n");
}
"""
STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "hcmen_scan": library.ScanArguments,
    "hcmen_scan_grad": library.ScanGradients,
    "hcmen_conv": library.ConvArguments,
    "hcmen_conv_grad": library.ConvGradients,
    "hcmen_dual": library.DualArguments,
    "hcmen_dual_grad": library.DualGradients,
}


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What C++ has: the table, and the offsets of the fields that Python has."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("table")
    lines: list[str] = []
    for name, structure in STRUCTURES.items():
        lines.append(f'STRUCTURE({name}, "{", " if lines else ""}");')
        lines += [f"FIELD({name}, {field[0]});" for field in structure._fields_]
        lines.append('printf("}");')
    (folder / "table.cc").write_text(PROGRAM.replace("  FIELDS\n", "".join(f"  {line}\n" for line in lines)))
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", str(CSRC)]
    made = subprocess.run(
        [compiler, *flags, str(folder / "table.cc"), "-o", str(folder / "table")], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    return json.loads(subprocess.run([str(folder / "table")], capture_output=True, text=True, check=True).stdout)


def test_python_and_cpp_have_the_same_operators(native: Any) -> None:
    assert (native["domain"], native["version"]) == (op.DOMAIN, str(op.VERSION))
    assert native["parser"] == list(op.PARSER_ATTRIBUTES)
    parts = ("attributes", "inputs", "outputs")
    tables = [
        o._asdict() | {part: [x._asdict() for x in getattr(o, part)] for part in parts} for o in OPERATORS.values()
    ]
    ours = json.loads(json.dumps(tables))
    for theirs in native["operators"]:
        theirs["others"] = [name for name in theirs["others"] if name]
        for attribute in theirs["attributes"]:
            attribute["words"] = [word for word in attribute["words"] if word]
    assert native["operators"] == ours
    assert native["derived"] == json.loads(json.dumps([*op.DERIVED_SIZES.items()]))


def test_a_derived_size_comes_after_what_it_follows_from() -> None:
    """So that whoever reads shapes in order knows it."""
    for operator in OPERATORS.values():
        sizes = [size for tensor in operator.inputs for size in tensor.sizes]
        for size, (of, _) in op.DERIVED_SIZES.items():
            assert size not in sizes or sizes.index(of) < sizes.index(size)
            assert size not in operator.sizes


def test_python_and_cpp_have_the_same_structures(native: Any) -> None:
    """The fields of the C structures, which Python takes from the table: each at its place, and none besides."""
    for name, structure in STRUCTURES.items():
        offsets = {field[0]: getattr(structure, field[0]).offset for field in structure._fields_}
        assert native["structures"][name] == {"": ctypes.sizeof(structure), **offsets}


def test_the_table_of_cpp_needs_no_header() -> None:
    assert "#include" not in (CSRC / "op_table.h").read_text(encoding="utf-8")


# --- words ------------------------------------------------------------------------------------------------------------


def tables(operator: Operator) -> Iterator[tuple[list[str], list[list[str]]]]:
    """The tables in the section of docs/op.md about `operator`: head and rows, of cells without their backticks."""
    section = re.split(r"^## ", (ROOT / "docs" / "op.md").read_text(encoding="utf-8"), flags=re.M)
    (text,) = (part for part in section if part.startswith(f"{operator.name}\n"))
    for block in re.findall(r"(?:^\|.*\n)+", text, re.M):
        head, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines())
        yield head, rows


def names(cell: str) -> list[str]:
    return re.findall(r"`([A-Za-z_]\w*)`", cell)


def test_words_have_the_same_tensors() -> None:
    """Names, order, shapes, types, and which attribute makes a tensor be there."""
    for operator in OPERATORS.values():
        told: dict[str, tuple[list[str], str, str]] = {}
        for head, rows in tables(operator):
            if head[1] != "shape":
                continue
            for cell, shapes, kind, text in rows:
                for name in names(cell):
                    told[name] = (re.findall(r"`\[(.+?)\]`", shapes), kind, text)
        tensors = {tensor.name: tensor for tensor in (*operator.inputs, *operator.outputs)}
        assert sorted(told) == sorted(tensors)
        if operator is not CAUSAL_CONV1D:  # whose one table has x and y in one row
            assert list(told) == list(tensors)
        for name, tensor in tensors.items():
            shapes, kind, text = told[name]
            without = [size for size in tensor.sizes if size != "group"]
            if tensor.spread:
                without = without[:-1]
            wanted = (
                [", ".join(without)]
                if len(without) == len(tensor.sizes)
                else [", ".join(without), ", ".join(tensor.sizes)]
            )
            assert shapes == wanted, name
            assert kind == ("T" if tensor.shared else "float32"), name
            there = re.search(r"there exactly if `(\w+)` is 1", text)
            assert (there[1] if there else None) == tensor.only_with, name


def test_words_have_the_same_signature() -> None:
    text = (ROOT / "docs" / "op.md").read_text(encoding="utf-8")
    for operator in OPERATORS.values():

        def listed(tensors: tuple[op.Tensor, ...]) -> str:
            required = ", ".join(t.name for t in tensors if t.only_with is None)
            return required + "".join(f" [, {t.name}]" for t in tensors if t.only_with)

        assert f"`{operator.name}({listed(operator.inputs)}) -> {listed(operator.outputs)}`" in text


def test_words_have_the_same_attributes() -> None:
    for operator in OPERATORS.values():
        told: dict[str, list[str]] = {}
        for head, rows in tables(operator):
            if head[0] == "attribute":
                told |= {name: row for row in rows for name in names(row[0])}
        assert list(told) == [
            *(attribute.name for attribute in operator.attributes),
            *operator.others,
            *op.PARSER_ATTRIBUTES,
        ]
        for attribute in operator.attributes:
            _, kind, default, _ = told[attribute.name]
            kinds = "string, `none` or `silu`" if attribute.words else "int, 0 or 1"
            assert kind == (kinds if attribute.number is None else "float")
            assert default.strip("`") == f"{attribute.default}".removesuffix(".0")
        for row in (told[name] for name in op.PARSER_ATTRIBUTES):
            assert set(re.findall(r"`(\w+)`", row[2])) <= set(op.PARSER_ATTRIBUTES.values())
    text = (ROOT / "docs" / "op.md").read_text(encoding="utf-8")
    assert f"domain `{op.DOMAIN}`, version {op.VERSION}" in text
    assert f"opset {op.OPSET}, IR {op.IR_VERSION}" in text


# --- and nothing again ------------------------------------------------------------------------------------------------


def strings(tree: ast.AST) -> Iterator[tuple[ast.AST, list[str]]]:
    """Every literal of several values, and what strings it holds, in order."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Tuple, ast.List, ast.Set)):
            yield node, [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
        elif isinstance(node, ast.Dict):
            yield node, [k.value for k in node.keys if isinstance(k, ast.Constant) and isinstance(k.value, str)]


def test_the_walk_sees_a_list_that_is_written_again() -> None:
    """Or the next test could pass on nothing."""
    assert [found for _, found in strings(ast.parse('x = ("u", 1, "delta")'))] == [["u", "delta"]]
    assert len(PRODUCT) > 80


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: str(path.relative_to(ROOT)))
def test_inputs_domain_and_version_are_written_in_one_place(path: Path) -> None:
    if path == ROOT / "hcmen" / "base" / "op.py":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    required = {tensor.name for tensor in SELECTIVE_SCAN.inputs if tensor.only_with is None}
    for node, found in strings(tree):
        assert not required <= set(found), f"line {node.lineno}: {found}"  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        wrong = None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            targets = [ast.unparse(target).upper() for target in node.targets]
            if node.value.value == op.DOMAIN and any("DOMAIN" in target for target in targets):
                wrong = "the domain"
            elif {*targets} & {"OP_VERSION", "OPSET", "IR_VERSION"}:
                wrong = targets[0]
        elif isinstance(node, ast.Compare):
            sides = (node.left, *node.comparators)
            if any(isinstance(side, ast.Constant) and side.value == op.DOMAIN for side in sides):
                wrong = "the domain"
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            if node.arg in ("domain", "plugin_namespace") and node.value.value == op.DOMAIN:
                wrong = "the domain"
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value in op.PARSER_ATTRIBUTES:
                    wrong = f"'{key.value}'" if isinstance(value, ast.Constant) else wrong
        assert wrong is None, f"line {node.lineno} writes {wrong} again: take it from hcmen.base.op"  # type: ignore[attr-defined]


def test_switches_of_aot_plugins_are_those_of_the_table() -> None:
    """They are written out for their types."""
    for operator, switches in ((SELECTIVE_SCAN, trt_aot.ScanSwitches), (CAUSAL_CONV1D, trt_aot.ConvSwitches)):
        assert [field.name for field in dataclasses.fields(switches)] == [a.flag for a in operator.attributes]


def test_functions_have_the_parameters_of_the_table() -> None:
    """Those that models call, and the oracles. That of the self-checks has the attributes that their model sets."""
    expected = [tensor.name for tensor in SELECTIVE_SCAN.inputs]
    for function in (scan.selective_scan, scan.selective_scan_ref, selfcheck.selective_scan_numpy):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(expected)] == expected
        others = set(parameters[len(expected) :]) - {"return_last_state"}
        assert others <= set(SELECTIVE_SCAN.switches)
        assert function is selfcheck.selective_scan_numpy or others == set(SELECTIVE_SCAN.switches)
    expected = [tensor.name for tensor in STATE_SPACE_DUAL.inputs]
    for function in (scan.state_space_dual, scan.state_space_dual_ref):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(expected)] == expected
        assert set(parameters[len(expected) :]) - {"return_last_state"} == set(STATE_SPACE_DUAL.switches)
    expected = [tensor.name for tensor in CAUSAL_CONV1D.inputs]
    for function in (scan.causal_conv1d, scan.causal_conv1d_ref):
        parameters = list(inspect.signature(function).parameters)
        assert parameters[: len(expected)] == expected
        others = set(parameters[len(expected) :]) - {"return_last_state"}
        assert others == {a.name for a in CAUSAL_CONV1D.attributes} - {"stateful"}


def test_schemas_of_custom_ops() -> None:
    """As PyTorch shows them: what a saved program or a compiled graph depends on."""
    shown = {
        "selective_scan": "(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor delta_bias, "
        "Tensor? z, Tensor? initial_state, bool delta_softplus, bool reverse) -> (Tensor, Tensor)",
        "state_space_dual": "(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor dt_bias, "
        "Tensor? z, Tensor? initial_state, bool delta_softplus, bool reverse, float dt_min, float dt_max) "
        "-> (Tensor, Tensor)",
        "causal_conv1d": "(Tensor x, Tensor weight, Tensor bias, Tensor? initial_state, bool silu, bool reverse)"
        " -> (Tensor, Tensor)",
    }
    for name, schema in shown.items():
        assert str(getattr(torch.ops.hcmen, name).default._schema) == f"hcmen::{name}{schema}"
