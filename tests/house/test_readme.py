"""The README is short and plain, and quotes docs/results as they are, as docs/results.md does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS, MOST_WORDS_OF_A_SENTENCE = 1000, 25


def prose(text: str) -> list[str]:
    """The sentences of a page: of its paragraphs and list items, without code blocks, comments, tables and headings."""
    text = re.sub(r"^```.*?^```$|<!--.*?-->|^#[^\n]*|^\|[^\n]*", "\n", text, flags=re.M | re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)  # a link is its words
    parts = re.split(r"\n\s*\n|^- ", text, flags=re.M)
    return [s for part in parts for s in re.split(r"(?<=[.!?])\**\s+(?=[^a-z])", " ".join(part.split())) if s]


def words(sentence: str) -> list[str]:
    """The words of a sentence; what has no letter or digit is none."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def test_sentences_are_found():
    text = (
        "# No\n\nOne two. Three `a.b` four?\n\n- Five [six](x.md)\n  seven.\n- Eight\n\n```\nno. No\n```\n| no | no |\n"
    )
    assert prose(text) == ["One two.", "Three `a.b` four?", "Five six seven.", "Eight"]


def test_the_readme_is_read_in_a_few_minutes():
    assert len(words(README)) <= MOST_WORDS


def test_sentences_are_short():
    assert len(prose(README)) > 40
    long = {s: len(words(s)) for s in prose(README) if len(words(s)) > MOST_WORDS_OF_A_SENTENCE}
    assert long == {}


def test_the_order_is_that_of_a_reader():
    headings = ["Two commands", "Quick start", "Figures", "What was never run", "More"]
    assert re.findall(r"^## (.*)$", README, re.M) == headings
    figures = README.partition("<!-- figures:")[2].partition("<!-- end of figures")[0]
    assert len(re.findall("^- ", figures, re.M)) == 7
    assert not re.search(r"^\|", README, re.M), "tables are for docs/results.md"


WRITTEN = {  # the pages with figures, and one figure of each
    "README.md": r" \d\.\d\d? ms",
    "docs/results.md": r" \d\.\d\d? ms",
    "docs/real_data.md": r" \d\.\d{3} ",
    "docs/text.md": r"MAE \d\.\d{3}",
    "docs/mamba.md": r" \d+\.\d times",
    "docs/op.md": r" \d+\.\d ",
}


@pytest.mark.parametrize("stale", WRITTEN)
def test_figures_are_those_of_the_results(stale, tmp_path):
    """And the check sees a figure that is not."""
    check = [sys.executable, str(ROOT / "benchmarks" / "readme.py"), "--check"]
    done = subprocess.run(check, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr

    for folder in ("benchmarks", "docs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "docs" / "results").symlink_to(ROOT / "docs" / "results")
    for name in ("readme.py", "real_tables.py", "zoo_table.py"):
        (tmp_path / "benchmarks" / name).write_bytes((ROOT / "benchmarks" / name).read_bytes())
    right = {name: (ROOT / name).read_text(encoding="utf-8") for name in WRITTEN}
    for name, text in right.items():
        wrong = re.sub(WRITTEN[name], " 77.7 ", text, count=1) if name == stale else text
        (tmp_path / name).write_text(wrong, encoding="utf-8")
    check[1] = str(tmp_path / "benchmarks" / "readme.py")
    done = subprocess.run(check, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    assert f"quote: {stale}: run" in done.stderr
    subprocess.run(check[:2], check=True)
    assert {name: (tmp_path / name).read_text(encoding="utf-8") for name in WRITTEN} == right


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKS = [
    (page, target, anchor)
    for page in PAGES
    for target, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
]


def anchors(page: Path) -> set[str]:
    """What a link into a page may name: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_engines_are_as_large_as_the_results_say():
    """The table of docs/tensorrt.md, row by row."""
    results = json.loads((ROOT / "docs" / "results" / "tensorrt_rtx.json").read_text())["builds"]
    wanted = {"graph": "full", "body": "blocks", "target": None}
    rows = []
    for sizes, model in (("demo", "demo"), ("mosi", "MOSI's sizes")):
        for precision in ("fp32", "fp16"):
            for profiles, number in (("batches", 1), ("both", 2)):
                case = {**wanted, "sizes": sizes, "precision": precision, "profiles": profiles}
                (b,) = [b for b in results if case.items() <= b.items()]
                launches = " / ".join(map(str, b["launches"]))
                memory = " / ".join(f"{n / 1e6:.0f}" for n in b["activation_bytes"])
                size = f"{b['engine_bytes'] / 1e6:.1f} MB | {b['engine_over_weights']:.0f} x"
                rows.append(f"| {model} | {precision} | {number} | {size} | {launches} | {memory} MB |")
    page = (ROOT / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    assert [line for line in page.splitlines() if line.startswith(("| demo |", "| MOSI's sizes |"))] == rows


@pytest.mark.parametrize(("page", "target", "anchor"), LINKS, ids=lambda x: x.name if isinstance(x, Path) else x)
def test_links_lead_somewhere(page, target, anchor):
    to = page.parent / target if target else page
    assert to.exists()
    if anchor:
        assert anchor in anchors(to)


def test_every_page_can_be_found():
    """From the README, by one link."""
    linked = {(page.parent / target).resolve() for page, target, _ in LINKS if page.name == "README.md" and target}
    assert [page.name for page in PAGES if page.resolve() not in linked] == ["README.md"]
