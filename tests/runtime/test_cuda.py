"""The ctypes declarations of the CUDA runtime against the toolkit's header, and what is said where nothing can run."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.fake_cuda import FakeCuda

import hcmen.runtime.backends.cuda
from hcmen.base.errors import BackendError
from hcmen.runtime.backends.cuda import SIGNATURES, Buffer, Cuda, Graph, Stream


def toolkit_header() -> Path | None:
    nvcc = shutil.which("nvcc")
    places = [
        os.environ.get("CUDA_HOME", ""),
        "/usr/local/cuda",
        str(Path(nvcc).resolve().parent.parent) if nvcc else "",
    ]
    found = (Path(place) / "include" / "cuda_runtime_api.h" for place in places if place)
    return next((path for path in found if path.is_file()), None)


HEADER = toolkit_header()
needs_header = pytest.mark.skipif(HEADER is None, reason="no cuda_runtime_api.h: needs a CUDA toolkit (CUDA_HOME)")

C_TYPES = {
    ctypes.c_int: ("int", "enum cudaMemcpyKind", "enum cudaStreamCaptureMode", "enum cudaDeviceAttr"),
    ctypes.c_uint: ("unsigned int",),
    ctypes.c_size_t: ("size_t", "unsigned long long"),  # one type to ctypes, where both have 64 bits
    ctypes.c_void_p: ("void *", "const void *", "cudaStream_t", "cudaGraph_t", "cudaGraphExec_t"),
    ctypes.POINTER(ctypes.c_int): ("int *",),
    ctypes.POINTER(ctypes.c_size_t): ("size_t *",),
    ctypes.POINTER(ctypes.c_void_p): ("void **", "cudaStream_t *", "cudaGraph_t *", "cudaGraphExec_t *"),
}


@needs_header
@pytest.mark.parametrize("name", sorted(SIGNATURES))
def test_every_signature_is_that_of_the_header(name):
    text = re.sub(r"/\*.*?\*/|__dv\(\w*\)", "", HEADER.read_text(encoding="utf-8", errors="replace"), flags=re.S)
    found = re.search(rf"^extern [^\n;]*cudaError_t CUDARTAPI {name}\(([^;]*?)\);", text, re.M)
    assert found, f"{name} is not in {HEADER}"
    declared = [d for part in found[1].split(",") if (d := part.strip()) != "void"]
    assert len(declared) == len(SIGNATURES[name])
    for argument, kind in zip(declared, SIGNATURES[name], strict=True):
        assert any(re.fullmatch(rf"{re.escape(c)}\s*\w+", argument) for c in C_TYPES[kind]), f"{name}: {argument}"


@needs_header
def test_every_enumerator_has_its_value(tmp_path):
    cuda = hcmen.runtime.backends.cuda
    pairs = {
        "cudaErrorMemoryAllocation": cuda._ERROR_MEMORY,
        "cudaErrorInsufficientDriver": 35,
        "cudaErrorNoDevice": 100,
        "cudaDevAttrComputeCapabilityMajor": cuda._ATTRIBUTE_MAJOR,
        "cudaDevAttrComputeCapabilityMinor": cuda._ATTRIBUTE_MINOR,
        "cudaStreamNonBlocking": cuda._STREAM_NON_BLOCKING,
        "cudaStreamCaptureModeThreadLocal": cuda._CAPTURE_THREAD_LOCAL,
        "cudaMemcpyHostToDevice": cuda._TO_DEVICE,
        "cudaMemcpyDeviceToHost": cuda._TO_HOST,
        "cudaHostAllocDefault": 0,
    }
    assert set(cuda._NO_DEVICE) == {35, 100}
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to read the header with")
    source = tmp_path / "check.cc"
    lines = "\n".join(f'static_assert(int({name}) == {value}, "{name}");' for name, value in pairs.items())
    source.write_text(f"#include <cuda_runtime_api.h>\n{lines}\n")
    done = subprocess.run(
        [compiler, "-fsyntax-only", "-isystem", str(HEADER.parent), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@needs_header
def test_the_toolkits_library_has_every_function():
    libraries = [Path(f) for f in (HEADER.parent.parent / "lib64", HEADER.parent.parent / "lib")]
    found = next((p for folder in libraries if folder.is_dir() for p in sorted(folder.glob("libcudart.so*"))), None)
    if found is None:
        pytest.skip("the toolkit has no libcudart.so")
    library = ctypes.CDLL(str(found))
    for name in (*SIGNATURES, "cudaGetErrorName", "cudaGetErrorString"):
        assert getattr(library, name)


def test_without_a_device_it_says_so():
    """On this machine or, where it has a GPU, on one that hides it."""
    import sys

    script = "from hcmen.runtime.backends.cuda import Cuda\nfrom hcmen.base.errors import BackendError\n"
    script += "try: Cuda()\nexcept BackendError as error: print(error)\n"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert re.search(r"libcudart.*(install|not found)", done.stdout), done.stdout
    assert len(done.stdout.splitlines()) == 1


@pytest.fixture
def fake(monkeypatch) -> FakeCuda:
    made = FakeCuda(sm=87)
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("fake", made)]))
    return made


def test_the_first_library_that_sees_a_device_is_taken(monkeypatch):
    libraries = [("new", FakeCuda(error=35)), ("old", FakeCuda(sm=89))]
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter(libraries))
    cuda = Cuda()
    assert (cuda.path, cuda.sm, cuda.runtime, cuda.driver) == ("old", 89, "12.6", "12.8")


@pytest.mark.parametrize("named", [("580.65", "Ada"), None])
def test_a_gpu_is_told_from_others_by_what_driver_and_runtime_say(fake, monkeypatch, named):
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "driver_and_gpu", lambda: named)
    driver, gpu = named or ("unknown", "unknown")
    assert Cuda().identity() == {"gpu": gpu, "sm": 87, "driver": f"{driver}, CUDA 12.8"}


def test_data_comes_back(fake):
    cuda = Cuda()
    stream, buffer = Stream(cuda), Buffer(cuda, 8)
    buffer.host[:] = range(8)
    buffer.upload(8, stream)
    buffer.download(6, stream)
    stream.wait()
    assert list(buffer.host) == list(range(8))
    buffer.host[:] = 0
    buffer.download(6, stream)
    assert list(buffer.host) == [0] * 8  # nothing happens before the wait
    stream.wait()
    assert list(buffer.host) == [0, 1, 2, 3, 4, 5, 0, 0]
    buffer.close()
    stream.close()
    assert fake.alive == {}


def test_what_is_forgotten_is_given_back(fake):
    cuda = Cuda()
    stream, buffer = Stream(cuda), Buffer(cuda, 8)
    with Graph(cuda, stream) as graph:
        buffer.upload(8, stream)
    graph.launch()
    stream.wait()
    assert fake.alive == {"device": 1, "host": 1, "stream": 1, "executable": 1}
    del graph, buffer, stream
    assert fake.alive == {}


def test_a_capture_that_fails_leaves_nothing(fake):
    cuda = Cuda()
    stream = Stream(cuda)
    with pytest.raises(ValueError, match="inside"), Graph(cuda, stream):
        raise ValueError("inside")
    fake.cudaGraphInstantiateWithFlags = lambda *arguments: 900
    said = "cudaGraphInstantiateWithFlags failed with cudaErrorStreamCaptureUnsupported"
    with pytest.raises(BackendError, match=said), Graph(cuda, stream):
        pass
    assert fake.alive == {"stream": 1}
    stream.wait()  # the stream is as good as before


def test_memory_that_is_not_there(monkeypatch):
    small = FakeCuda(room=1 << 20)
    monkeypatch.setattr(hcmen.runtime.backends.cuda, "_libraries", lambda: iter([("fake", small)]))
    cuda = Cuda()
    with pytest.raises(BackendError, match=r"cudaMalloc: the GPU has no memory left \(1 of 1 MiB free\)"):
        Buffer(cuda, 2 << 20)
    assert small.alive == {}
