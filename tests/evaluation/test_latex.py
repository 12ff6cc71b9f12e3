"""hcmen-eval --latex: tables that compile, whatever things are called; what is best is bold; the floor is in them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hcmen.base import metrics
from hcmen.evaluation.latex import escaped, latex
from hcmen.evaluation.robustness import HEADLINES

LATIN = "".join(c for c in map(chr, range(0xA0, 0x180)) if c.isalpha())
HOSTILE = LATIN + r"a_b & 50% of {x} #1 \input{/etc/passwd} ~^ <b> | $x$ 'q' " + '"r" ± é ß 漢 \x07 \u202e'


def report(runs: int = 1, family: str = "mosi", name: str = "data.pkl", **published: Any) -> dict[str, Any]:
    measures = HEADLINES[family]

    def scores(start: float) -> dict[str, Any]:
        return {m: metrics.spread([start + 0.01 * i + 0.1 * k for k in range(runs)]) for i, m in enumerate(measures)}

    def setting(name: str, start: float) -> dict[str, Any]:
        return {"name": name, "scores": scores(start)}

    fixed = {
        "about": "whole modalities missing, one set for all samples",
        "settings": [setting("full", 0.5), setting("text_missing", 0.7)],
        "averages": [{"name": "mean_of_six", "about": "mean of the six incomplete sets", "scores": scores(0.6)}],
    }
    low, high = {"mosi": (-3, 3), "sims": (-1, 1), "range": (1, 5)}[family]
    return {
        "dataset": {"name": name, "samples": 16, "family": family, "label_min": low, "label_max": high},
        "split": "test",
        "seed": 0,
        "source": {"kind": "checkpoint", "runs": [{}] * runs},
        "floor": dict.fromkeys(measures, 0.25),
        "protocols": {"fixed": fixed, "random_mr": {**fixed, "averages": []}},
        "published": [
            {
                "protocol": "fixed",
                "point": "full",
                "model": model,
                "source": "table 1",
                "selection": "test split",
                "features": "MMSA's files",
                "scores": values,
            }
            for model, values in published.items()
        ],
    }


def cells(line: str) -> list[str]:
    """The cells of a row of a table, as TeX sees them: an escaped & ends none."""
    assert line.endswith(r" \\")
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def checked(text: str) -> list[list[list[str]]]:
    """The rows of each table, after looking at all that would keep TeX from setting them."""
    assert text.replace("\n", "").isprintable()
    bare = re.sub(r"\\[\\&%$#_{}]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
    assert not set('%#~"') & set(bare), "special characters without a backslash"
    depth = 0
    for c in bare:
        depth += {"{": 1, "}": -1}.get(c, 0)
        assert depth >= 0
    assert depth == 0, "braces that are not closed"
    assert bare.count("$") % 2 == 0
    outside = re.sub(r"\$[^$]*\$", "", bare)
    assert "_" not in re.sub(r"\\(label|begin|end)\{[^}]*\}", "", outside)
    assert "^" not in outside
    open_environments = []
    for what, name in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if what == "begin":
            open_environments.append(name)
        else:
            assert open_environments.pop() == name
    assert not open_environments
    tables = []
    for columns, body in re.findall(r"\\begin\{tabular\}\{([lr]+)\}\n(.*?)\\end\{tabular\}", text, re.S):
        lines = body.splitlines()
        assert [lines[0], lines[2], lines[-1]] == [r"\toprule", r"\midrule", r"\bottomrule"]
        rows = [cells(line) for line in lines if not re.fullmatch(r"\\(top|mid|bottom)rule", line)]
        assert {len(row) for row in rows} == {len(columns)}
        tables.append(rows)
    return tables


def test_settings_averages_and_the_floor() -> None:
    fixed, random = checked(latex(report()))
    assert fixed[0] == [
        "setting",
        r"MAE $\downarrow$",
        r"Corr $\uparrow$",
        r"Acc-7 $\uparrow$",
        r"Acc-2 Non0 $\uparrow$",
        r"F1 Non0 $\uparrow$",
    ]
    assert fixed[1:] == [
        ["full", "0.500", "0.510", "52.0", "53.0", "54.0"],
        [r"text\_missing", "0.700", "0.710", "72.0", "73.0", "74.0"],
        ["mean of the six incomplete sets", "0.600", "0.610", "62.0", "63.0", "64.0"],
        [r"\emph{floor}", "0.250", "0.250", "25.0", "25.0", "25.0"],
    ]
    assert len(random) == 4
    assert "textbf" not in latex(report()), "nothing is best where nothing is beside it"


def test_mean_and_deviation() -> None:
    text = latex(report(runs=3))
    fixed, _ = checked(text)
    assert fixed[1][:2] == ["full", r"0.600 $\pm$ 0.100"]
    assert r"mean $\pm$ standard deviation of 3 runs" in text


@pytest.mark.parametrize("family", ["sims", "range"])
def test_the_measures_are_those_of_the_family(family: str) -> None:
    fixed, _ = checked(latex(report(family=family)))
    assert len(fixed[0]) == 1 + len(HEADLINES[family])


def test_the_best_of_a_column_is_bold() -> None:
    rivals = {
        "A&B_1": {"mae": 0.4, "corr": 0.3, "acc7": 0.52, "f1_non0": 0.54},
        "C": {"mae": 0.9, "corr": 0.9, "acc7": 0.1},
    }
    text = latex(report(**rivals))
    fixed, random = checked(text)
    assert fixed[0][:2] == ["setting", "model"]
    assert fixed[1:4] == [
        # An Acc-2 that nobody else gives is not the best of several.
        ["full", "ours", "0.500", "0.510", r"\textbf{52.0}", "53.0", r"\textbf{54.0}"],
        ["", r"A\&B\_1$^{1}$", r"\textbf{0.400}", "0.300", r"\textbf{52.0}", "-", r"\textbf{54.0}"],
        ["", "C$^{1}$", "0.900", r"\textbf{0.900}", "10.0", "-", "-"],
    ]
    assert "textbf" not in " ".join(cell for row in [*fixed[4:], *random] for cell in row)
    assert text.count("checkpoint chosen on: test split; features: MMSA's files") == 1
    several = checked(latex(report(runs=2, A={"mae": 0.9, "corr": 0.9})))[0]
    assert several[1][2] == r"\textbf{0.550 $\pm$ 0.071}"


def test_names_are_escaped() -> None:
    text = latex(report(name=HOSTILE, **{HOSTILE: {"mae": 0.1}}))
    checked(text)
    assert r"\input" not in text
    assert r"a\_b \& 50\% of \{x\} \#1 \textbackslash{}input\{/etc/passwd\} \textasciitilde{}\textasciicircum{}" in text
    assert r"é ß ? ? ?" in text
    assert escaped("Đđ") == "??"
    assert escaped("\\") == r"\textbackslash{}"


def has_booktabs() -> bool:
    found = shutil.which("pdflatex") and shutil.which("kpsewhich")
    return bool(found) and subprocess.run(["kpsewhich", "booktabs.sty"], capture_output=True).returncode == 0


@pytest.mark.skipif(not has_booktabs(), reason="needs pdflatex: apt-get install texlive-latex-recommended")
def test_it_compiles(tmp_path: Path) -> None:
    for name, made in (("one", report(name=HOSTILE)), ("more", report(runs=3, **{HOSTILE: {"mae": 0.1, "corr": 0.9}}))):
        (tmp_path / "results.tex").write_text(latex(made), encoding="utf-8")
        page = r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{results.tex}\end{document}"
        (tmp_path / f"{name}.tex").write_text(page)
        line = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"{name}.tex"]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stdout[-2000:]
        assert "Missing character" not in (tmp_path / f"{name}.log").read_text(errors="replace")
