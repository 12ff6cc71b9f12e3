"""Every command and every Python snippet of README and docs runs on the demo, or a table here says why it does not."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from helpers.foreign_graph import foreign_graph
from helpers.mmsa_files import File, make, written

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = Path(sys.executable).parent

# What begins so is not run, and why. A command may be listed for one page.
GPU, NETWORK, MINUTES = "needs a GPU", "downloads or installs", "takes minutes"
NOT_RUN: dict[str, str] = {
    "pip install": NETWORK,
    "pip download": NETWORK,
    "sudo apt-get": NETWORK,
    "docker": NETWORK,
    ".venv/bin/pip install": NETWORK,
    ".venv/bin/pre-commit install": NETWORK,
    "python3 -m venv": NETWORK,
    "make": MINUTES,
    ".venv/bin/python -m pytest": MINUTES,
    "python -m pytest": "needs the headers of ONNX Runtime or TensorRT",
    ".venv/bin/python tests/gpu": GPU,
    "python3 tests/gpu": GPU,
    "python3 benchmarks/scan_cuda.py": GPU,
    "PYTHONPATH=SITE": GPU,
    "sudo nvpmodel": GPU,
    "sudo jetson_clocks": GPU,
    "hcmen-compile --backend tensorrt-rtx": MINUTES,
    "hcmen-compile": GPU,
    "hcmen-run --bundle build/bundle --backend tensorrt": GPU,
    "hcmen-run samples/clip.npz --bundle build/bundle --backend tensorrt": GPU,
    "hcmen-run samples/clip.npz samples/clip.npz --bundle build/bundle --backend tensorrt": GPU,
    "hcmen-run samples/clip.npz --backend ort-cuda": GPU,
    "cmake": GPU,
    "build/trt": GPU,
    "compute-sanitizer": GPU,
    "c++": "needs the headers of ONNX Runtime",
    "cc -std=c11": "tests/csrc/test_cpp_samples.py compiles it",
    "hcmen-export-mamba --factory model:make": "needs a repository",
    "python -m hcmen.mamba run": "needs a repository",
    "HCMEN_ORT_INCLUDE_DIR=": "needs the headers of ONNX Runtime",
    ". ": "changes the shell",
    "export": "changes the shell",
    "hcmen-bench --bundle build/bundle --bundle build/bundle-int8": MINUTES,
    "hcmen-bench --against": MINUTES,
    "hcmen-bench --compare": "a busy machine may be slower the second time",
    "hcmen-bench --show after.json": "needs a second measurement",
    "hcmen-train --data mosi.pkl --preset mosi": "needs the real data set",
    "hcmen-train --data build/mosei --preset mosei": "needs the real data set",
    "hcmen-convert reviews.csv": "needs a BERT; tests/data/test_table.py runs it on small tables",
    "hcmen-train --data build/reviews": "needs a BERT",
    "hcmen-convert movies.csv": "needs VADER's ratings and a BERT; make demo-words runs the same",
    "python benchmarks/real_data.py": "needs real data and hours",
    "hcmen-convert mosi_utterances.csv": "needs MOSI",
    "hcmen-eval --checkpoint build/real/features": "needs MOSI",
    "hcmen-export-mamba --hf state-spaces/mamba-130m-hf": NETWORK,
    "python samples/generate.py": "needs a language model; tests/mamba/test_generate.py has a small one",
}
SNIPPETS_NOT_RUN: dict[str, str] = {
    "docs/cuda.md": GPU,
    "docs/serving.md": "needs a Triton server",
    "docs/tensorrt.md": "needs TensorRT",
}
# What a placeholder of a page stands for.
PLACEHOLDERS = {"DIGEST": "mosei.pkl"}
# Blocks that show something else than commands.
SHOWN = re.compile(r"^(d\[t\]|y\[t\]|base <-|dataset\.json|build/bundle/engines/|SelectiveScan:)")
# Pages that train, export or measure.
SLOW = {
    "README.md",
    "docs/bench.md",
    "docs/data.md",
    "docs/op.md",
    "docs/precision.md",
    "docs/serving.md",
    "docs/states.md",
    "docs/training.md",
}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    language: str
    text: str


def blocks(path: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"), re.M | re.S)
    return [Block(path.relative_to(ROOT).as_posix(), language, text) for language, text in found]


def commands(path: Path) -> Iterator[list[str]]:
    """The commands of a page, each as its words."""
    for block in blocks(path):
        if block.language or SHOWN.match(block.text):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in line.split(" && "):
                if words := shlex.split(part, comments=True):
                    yield words


def reason(words: list[str]) -> str | None:
    """Why a command is not run; None if it is."""
    return next((why for begin, why in NOT_RUN.items() if f"{' '.join(words)} ".startswith(begin)), None)


def snippets(path: Path) -> str:
    """The Python of a page as one program."""
    return "\n".join(block.text for block in blocks(path) if block.language == "python")


@functools.cache
def help_of(name: str) -> str:
    """What a command of ours says of itself."""
    command = [COMMANDS / name, "--help"]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout


ALL = [(path, words) for path in PAGES for words in commands(path)]
RUN = [path for path in PAGES if any(reason(w) is None for w in commands(path)) or snippets(path)]


@pytest.mark.parametrize(("path", "words"), ALL, ids=lambda x: x.name if isinstance(x, Path) else " ".join(x)[:70])
def test_what_is_run_is_one_of_our_commands_and_has_its_options(path, words):
    name = Path(words[0]).name
    if reason(words) is None:
        assert name.startswith("hcmen-"), f"{path.name}: not run, and in no table: {' '.join(words)}"
    if name.startswith("hcmen-"):
        assert [w for w in words if w.startswith("--") and not re.search(rf"{w.split('=')[0]}\b", help_of(name))] == []


def test_the_tables_name_nothing_that_is_gone():
    lines = [f"{' '.join(words)} " for _, words in ALL]
    assert [begin for begin in NOT_RUN if not any(line.startswith(begin) for line in lines)] == []
    names = {path.relative_to(ROOT).as_posix(): path for path in PAGES}
    assert set(SNIPPETS_NOT_RUN) | SLOW <= set(names)
    assert all(snippets(names[page]) for page in SNIPPETS_NOT_RUN)


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint and a bundle as `make demo` leaves them: those of the package, or made here in short."""
    shipped = ROOT / "hcmen" / "demo"
    if (shipped / "bundle" / "manifest.json").exists():
        return shipped
    folder = tmp_path_factory.mktemp("demo")
    train, bundle = str(folder / "train"), str(folder / "bundle")
    run(["hcmen-train", "--preset", "tiny", "--out", train, "--set", "epochs=1"], folder)
    run(["hcmen-export", "--checkpoint", train, "--bundle", bundle], folder)
    return folder


@pytest.fixture
def checkout(demo: Path, tmp_path: Path) -> Path:
    """A working directory with what the pages speak of: the demo, samples, data files and chunks of a recording."""
    for name in ("train", "bundle"):
        shutil.copytree(demo / name, tmp_path / "build" / name)
    shutil.copytree(ROOT / "samples", tmp_path / "samples")
    for name in ("mosi.pkl", "mosei.pkl"):
        written(tmp_path / name, make(File("tiny", 20, 40, 32)))
    (tmp_path / "chunks").mkdir()
    for i in range(4):
        np.savez(tmp_path / "chunks" / f"{i}.npz", audio=np.zeros((20, 5), "f4"), vision=np.zeros((15, 20), "f4"))
    (tmp_path / "chunks" / "end").touch()
    for name in ("model.onnx", "reduced.onnx"):
        foreign_graph(tmp_path / name, words=1000)
    np.savez(tmp_path / "inputs.npz", ids=np.arange(18, dtype=np.int32).reshape(2, 9), series=np.zeros((2, 9, 8), "f4"))
    (tmp_path / "movieReviewSnippets_GroundTruth.txt").write_text('1\t2.5\tGood.\n2\t-3.1\t"Bad", he said.\n')
    return tmp_path


def run(words: list[str], folder: Path) -> str:
    """What a command prints on stdout in `folder`. Fails the test with all it said if it fails."""
    words = [
        hashlib.sha256((folder / PLACEHOLDERS[w]).read_bytes()).hexdigest() if w in PLACEHOLDERS else w for w in words
    ]
    done = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, f"{shlex.join(words)}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(p, id=name, marks=[pytest.mark.slow] if name in SLOW else [])
        for p in RUN
        for name in [p.relative_to(ROOT).as_posix()]
    ],
)
@pytest.mark.timeout(3600)
def test_everything_on_the_page_runs(path, checkout):
    """In the order of the page, in one folder: a later line may need what an earlier one made."""
    for words in commands(path):
        if reason(words) is None:
            run(words, checkout)
    program = snippets(path)
    if program and path.relative_to(ROOT).as_posix() not in SNIPPETS_NOT_RUN:
        assert run([sys.executable, "-c", program], checkout).strip() or "print(" not in program


def test_the_picture_shows_the_scores_of_the_demo(demo):
    """README's picture is drawn from docs/results/demo.json; its scores are those of the bundle that is shipped."""
    from hcmen.runtime import load

    if demo != ROOT / "hcmen" / "demo":
        pytest.skip("no bundle is shipped")
    rows = json.loads((ROOT / "docs" / "results" / "demo.json").read_bytes())["rows"]
    model = load(demo / "bundle")
    for row in rows:
        assert model(ROOT / "samples" / "clip.npz", variant=row["variant"]).score == pytest.approx(
            row["score"], abs=1e-4
        )
