"""How long a file may be: 500 lines, or a place on the list with its reason. The list may only shrink."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOST_LINES = 500
SUFFIXES = {".py", ".h", ".cc", ".cu", ".cmake"}
LARGE = {
    "runtime/csrc/selective_scan.cu": "one kernel, and how its lanes read, scan and write",
    "runtime/csrc/selective_scan_backward.cu": "four kernels of one pass, which share the layout of a warp",
    "runtime/csrc/vector-inl.h": "one vector type per instruction set, side by side to be compared",
    "runtime/stream.py": "one class: the rules on what a window holds are read in one place",
}


def lines_of_product_files() -> dict[str, int]:
    """Path -> lines of every source file that is installed, its tests in C++ left out."""
    return {
        str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n")
        for folder in ("hcmen", "export", "runtime")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in SUFFIXES and not path.stem.endswith("_test")
    }


def test_no_file_is_longer_than_it_may_be():
    found = lines_of_product_files()
    assert len(found) > 150
    long = {name: count for name, count in found.items() if count > MOST_LINES and name not in LARGE}
    assert not long, f"split them by what they do: {long}"


def test_the_list_names_long_files_only():
    found = lines_of_product_files()
    short = [name for name in LARGE if found.get(name, 0) <= MOST_LINES]
    assert not short, f"take them off the list: {short}"
    assert all(LARGE.values())
