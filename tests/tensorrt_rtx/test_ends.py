"""Builds of TensorRT-RTX that do not come to their end, and what a build asks of the machine."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.micro import micro_bundle_at
from helpers.rtx import built, command, files, listed, needs_rtx, started
from helpers.small_bundle import engine_record, make_bundle

from hcmen.base.bundle import read_bundle
from hcmen.base.engines import write_engine

pytestmark = needs_rtx

FULL = ("--variant", "full", "--target", "86")
SMALL = ("--variant", "text_only", "--target", "86")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model's bundle with an engine, of a Jetson; tests leave it as it is."""
    bundle = micro_bundle_at(tmp_path_factory.mktemp("ready") / "bundle")
    write_engine(opened := read_bundle(bundle), engine_record(opened, b"engine"), b"engine", {})
    return bundle


# --- ended from outside -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("after", [0.0, 0.7])
def test_a_build_ends_at_once_and_leaves_nothing(ready, number, after):
    """The builder takes seconds and lets no signal be answered, or lets it be and drops what is raised."""
    before = files(ready)
    process = started(ready, *FULL)
    try:
        time.sleep(after)
        process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert (process.returncode, out) == (-number, "")  # 128 + number, as a shell tells it
    assert files(ready) == before


def test_signals_around_a_build_end_it_too(ready):
    """From the first line on, at moments that differ: within Python, the parser or the builder."""
    before = files(ready)
    for delay in (0.0, 0.05, 0.15, 0.3):
        process = subprocess.Popen(command(ready, *FULL), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) in ((-15, ""), (143, ""))
        assert "Traceback" not in err
        assert "KeyboardInterrupt" not in err
        assert files(ready) == before


# --- no room ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [100, 1_500, 100_000])
@pytest.mark.parametrize("arguments", [(), ("--force", "--max-batch", 1)], ids=["new", "again"])
def test_files_that_may_not_become_large(bundle, most, arguments):
    """Too small for the index, its report or the engine: what is there remains, and nothing else."""
    built(bundle, *SMALL, "--max-batch", 1)
    before = files(bundle)
    process = subprocess.Popen(
        command(bundle, *SMALL, *arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
    )
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, ""), err
    lines = err.splitlines()
    assert lines[-1].startswith(f"error: {bundle / 'engines'}")
    assert "file too large: copy the bundle to a place that can be written" in lines[-1]
    assert files(bundle) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a disk of so many KiB."""
    place = tmp_path / "small"
    place.mkdir()

    def mount(kilobytes: int) -> Path:
        options = ["-o", f"size={kilobytes}k", "tmpfs", str(place)]
        done = subprocess.run(["mount", "-t", "tmpfs", *options], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("spare", [0, 8, 200])
def test_a_full_disk(small_disk, spare):
    place = small_disk(1000)
    bundle = make_bundle(place / "bundle")
    filler = place / "filler"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    filler.write_bytes(bytes(free - (spare << 10)))
    done = subprocess.run(command(bundle, *SMALL), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"error: {bundle / 'engines'}")
    assert "no space left on device: make room, or copy the bundle to a place that can be written" in line
    assert not files(bundle)


TIGHT = """
    import resource, sys
    import onnx.inliner
    import hcmen.export.float16, hcmen.export.weights, hcmen.mamba.functions
    from hcmen.export.commands.compile import main
    from hcmen.runtime.backends.flavour import TENSORRT_RTX, TrtModule
    TrtModule(TENSORRT_RTX)
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + int(sys.argv.pop(1))
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    main()
"""


def test_too_little_memory(ready):
    """The builder's own threads may meet it, too, and end or stop the whole process: then nothing is told."""
    before = files(ready)
    lines = []
    for megabytes in (20, 40, 80, 150):
        words = [str(megabytes << 20), *command(ready, *SMALL, "--force", "--max-batch", 1)[4:]]
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(TIGHT), *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _, err = process.communicate(timeout=15)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)  # nothing of the builder runs any more, and it ends all the same
            _, err = process.communicate(timeout=60)
        assert process.returncode not in (0, 1, 70), err
        assert "Traceback" not in err
        assert files(ready) == before
        lines += [line for line in err.splitlines() if line.startswith("error:") and process.returncode == 3]
    told = [line for line in lines if "the build ran out of memory (" in line]
    assert told, lines
    assert all(line.endswith("close what else uses it, or lower --workspace or --max-batch") for line in told)


# --- what a build asks for --------------------------------------------------------------------------------------------

WATCHED = """
    import json, sys
    opened = []
    sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "ctypes.dlopen" else None)
    from hcmen.export.commands.compile import main
    code = main(sys.argv[1:], standalone_mode=False)
    mapped = sorted({line.split()[-1] for line in open("/proc/self/maps") if "/" in line})
    modules = sorted({name.partition(".")[0] for name in sys.modules})
    print(json.dumps({"code": code, "opened": opened, "mapped": mapped, "modules": modules}), file=sys.stderr)
"""


def test_a_build_asks_for_no_cuda_and_no_pytorch(bundle, tmp_path):
    """Neither we nor the builder open a library of the driver or of the CUDA runtime, wherever they may lie."""
    words = ["-c", textwrap.dedent(WATCHED), *command(bundle, *SMALL)[4:]]
    state = {"XDG_STATE_HOME": os.environ["XDG_STATE_HOME"], "HOME": str(tmp_path)}
    empty = {"PATH": "", "LD_LIBRARY_PATH": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env={**state, **empty})
    seen = json.loads(done.stderr.splitlines()[-1])
    assert seen["code"] == 0
    (name,) = listed(bundle)
    assert name.startswith("text_only.fp32.sm86.rtx")
    assert any("libtensorrt_rtx.so" in path for path in seen["mapped"])  # it was the real one
    words_of_cuda = ("libcuda", "libcudart", "libnvidia", "libnvrtc", "libhcmen")
    assert not [path for path in (*seen["opened"], *seen["mapped"]) if any(word in path for word in words_of_cuda)]
    assert not {"torch", "onnxruntime", "cuda", "tensorrt"} & set(seen["modules"])
