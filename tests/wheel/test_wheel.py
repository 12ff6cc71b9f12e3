"""What a wheel has to be: tests/wheel/run.py builds one and runs it alone; here is what costs little to know."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import platform
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from helpers.scripts import loaded

from hcmen.base.library import library_path

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tests" / "wheel" / "check.py"


def module(path: Path) -> ModuleType:
    """A file that lies in no package, as a module."""
    return loaded(path, f"wheel_{path.stem}")


def needs_of_the_library() -> dict[str, object]:
    """What the installed kernel library asks for, by objdump."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    needs = module(ROOT / "tests" / "wheel" / "build.py").library_needs(library_path())
    if "libstdc++.so.6" in needs["needed"]:
        pytest.skip("the compiler of this machine has no static C++ library")
    return needs


def test_the_library_asks_for_the_c_library_alone():
    """Nothing of the C++ library of the machine that it was built on."""
    needs = needs_of_the_library()
    parts = ("libc.so", "libm.so", "libpthread.so", "libdl.so", "librt.so", "ld-linux")
    assert [n for n in needs["needed"] if not n.startswith(parts)] == []
    assert needs["other_versions"] == []


def wheel_of(folder: Path, **libraries: bytes) -> Path:
    """A wheel as scikit-build-core names it, with these shared libraries."""
    tag = f"py3-none-linux_{platform.machine()}"
    wheel, about = folder / f"hcmen-0.1.0-{tag}.whl", "hcmen-0.1.0.dist-info/WHEEL"
    files = {f"hcmen/base/{name}.so": content for name, content in libraries.items()}
    files[about] = f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n".encode()
    record = "".join(f"{name},{digest(content)},{len(content)}\n" for name, content in files.items())
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(about.replace("WHEEL", "RECORD"), f"{record}hcmen-0.1.0.dist-info/RECORD,,\n")
    return wheel


def digest(content: bytes) -> str:
    """A file's digest as RECORD has it."""
    return "sha256=" + base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def test_a_wheel_is_named_after_the_c_library_that_it_needs(tmp_path):
    needs = needs_of_the_library()
    given = wheel_of(tmp_path, libhcmen_ops=library_path().read_bytes())
    wheel = module(ROOT / "builder" / "true_tag.py").true_tag(given)
    tag = f"py3-none-manylinux_{needs['glibc'].replace('.', '_')}_{platform.machine()}"
    assert [p.name for p in tmp_path.iterdir()] == [wheel.name] == [f"hcmen-0.1.0-{tag}.whl"]
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        contents = {name: archive.read(name) for name in archive.namelist()}
    assert contents["hcmen/base/libhcmen_ops.so"] == library_path().read_bytes()
    assert contents["hcmen-0.1.0.dist-info/WHEEL"].decode().splitlines()[-1] == f"Tag: {tag}"
    rows = list(csv.reader(io.StringIO(contents["hcmen-0.1.0.dist-info/RECORD"].decode())))
    assert [row[0] for row in rows] == list(contents)
    for name, found, size in rows[:-1]:
        assert (found, int(size)) == (digest(contents[name]), len(contents[name]))


@pytest.mark.parametrize("arguments", [("-lstdc++",), ("-nostdlib",)], ids=["another library", "no library"])
def test_a_wheel_keeps_its_tag_where_manylinux_would_be_untrue(arguments, tmp_path, capsys):
    if not (shutil.which("c++") and shutil.which("readelf")):
        pytest.skip("c++ or readelf is not installed")
    (tmp_path / "a.cc").write_text('extern "C" int one() { return 1; }')
    library = tmp_path / "a.so"
    subprocess.run(
        ["c++", "-shared", "-Wl,--no-as-needed", "a.cc", "-o", library, *arguments], check=True, cwd=tmp_path
    )
    given = wheel_of(tmp_path, libhcmen_ops=library_path().read_bytes(), a=library.read_bytes())
    before = given.read_bytes()
    assert module(ROOT / "builder" / "true_tag.py").true_tag(given) == given
    assert given.read_bytes() == before
    said = capsys.readouterr().err
    assert said.startswith("hcmen: the wheel keeps the tag of this machine: a.so ")
    assert len(said.splitlines()) == 1


def test_a_wheel_without_readelf_keeps_its_tag(tmp_path, capsys, monkeypatch):
    given = wheel_of(tmp_path, libhcmen_ops=library_path().read_bytes())
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module(ROOT / "builder" / "true_tag.py").true_tag(given) == given
    assert "readelf" in capsys.readouterr().err


def test_a_name_that_claims_an_older_c_library_is_refused():
    check_tag = module(ROOT / "tests" / "wheel" / "build.py").check_tag
    check_tag(Path("hcmen-0.1.0-py3-none-manylinux_2_35_x86_64.whl"), {"glibc": "2.35"})
    for name in ("manylinux_2_34_x86_64", "manylinux_2_3_x86_64", "linux_x86_64"):
        with pytest.raises(RuntimeError, match=r"asks for glibc 2\.35"):
            check_tag(Path(f"hcmen-0.1.0-py3-none-{name}.whl"), {"glibc": "2.35"})


def test_the_check_of_an_installed_wheel_passes_here():
    """On this environment, which has more in it than a wheel needs."""
    done = subprocess.run(
        [sys.executable, str(CHECK), "--not-bare"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["self_test"]) == 7
    assert facts["clip"]["score"] == pytest.approx(facts["clip"]["golden"], abs=1e-4)


def test_the_check_sees_what_should_not_be_there():
    done = subprocess.run([sys.executable, str(CHECK)], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.startswith("error: expected no torch or onnx")


def test_the_check_fails_where_hcmen_does(tmp_path):
    """An interpreter that cannot run it is named with what it said."""
    command = [
        sys.executable,
        str(CHECK),
        "--python",
        f"{shlex.quote(sys.executable)} -S -E",
        "--scripts",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "No module named 'hcmen'" in done.stderr


def test_both_architectures_are_built_and_checked():
    tomllib = pytest.importorskip("tomllib")  # from Python 3.11 on
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["build-system"]["backend-path"] == ["builder"]
    settings = project["tool"]["cibuildwheel"]
    assert all(b.endswith("-manylinux_*") for b in settings["build"])
    assert (ROOT / settings["test-command"].split()[1].replace("{project}/", "")) == CHECK
    workflow = (ROOT / ".github" / "workflows" / "wheels.yml").read_text(encoding="utf-8")
    assert "ubuntu-24.04-arm" in workflow
    assert "cibuildwheel" in workflow
