"""The TensorRT plugins without TensorRT: built against its headers, called as it calls them, loaded by its registry.

helpers/trt_wheels.py says where headers and registries come from.

`runtime/csrc/trt_test.cc` holds the checks; the host library it calls has the plugins over the CPU kernels. What the
plugins compute is in test_op_hosts.py.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from helpers.op_cases import SCANS, ConvCase, assert_scan, scan_arrays
from helpers.trt_program import INCLUDES, Build, build, enqueue, has_gpu, run
from helpers.trt_wheels import NO_HEADERS, NO_LEAN, lean_folders

from hcmen.base.library import library_folders

LEANS = lean_folders("tensorrt_lean_bindings", "tensorrt_lean_libs")
INSTALLED = [path for folder in library_folders() if (path := folder / "libhcmen_trt.so").is_file()]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the library is for Linux")
needs_headers = pytest.mark.skipif(not INCLUDES, reason=NO_HEADERS)


@pytest.fixture(scope="module", params=INCLUDES, ids=lambda path: path.name)
def built(request: pytest.FixtureRequest) -> Build:
    return build(request.param, "trt")


@needs_headers
@pytest.mark.timeout(900)
def test_every_method_keeps_its_contract(built: Build) -> None:
    result = built.check(built.host, "contract")
    assert result.stderr == ""
    if built.cuda:
        assert built.check(built.cuda, "contract").stderr == ""


# Every set of switches in either type.
SWITCHES = [(case, case) for case in SCANS[:32]]


@needs_headers
def test_every_attribute_reaches_the_kernel(built: Build, tmp_path: Path) -> None:
    """With headers of any version; the whole table is for test_op_hosts.py. What must be refused is."""
    for (case, _), got in zip(SWITCHES, enqueue(built, built.host, "enqueue-host", SWITCHES, tmp_path), strict=True):
        assert_scan(case, scan_arrays(case), got)


@needs_headers
def test_without_a_gpu_enqueue_is_an_error(built: Build) -> None:
    if built.cuda is None:
        pytest.skip("libhcmen_trt.so is not built: there is no CUDA compiler")
    if has_gpu():
        pytest.skip("there is a GPU")
    assert built.check(built.cuda, "no-gpu").stderr == ""


@needs_headers
def test_a_logger_of_another_major_version_is_not_called(built: Build) -> None:
    result = built.check(built.host, "foreign-logger")
    line = "error: SelectiveScan: attribute 'gated' is 2, expected 0 or 1 (layer 'node')\n"
    assert result.stderr == 2 * line  # one for the foreign logger, one for none


@needs_headers
def test_failing_allocations_are_errors(built: Build) -> None:
    lines = built.check(built.host, "no-memory").stderr.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("error: SelectiveScan: no memory for a ") for line in lines)


@needs_headers
def test_two_functions_are_shown_and_nothing_is_needed(built: Build) -> None:
    nm, readelf = shutil.which("nm"), shutil.which("readelf")
    if nm is None or readelf is None:
        pytest.skip("nm and readelf (binutils) are not installed")
    for library in built.libraries:
        listing = run([nm, "-D", "--defined-only", str(library)]).stdout
        assert {line.split()[-1].partition("@")[0] for line in listing.splitlines()} == {
            "getCreators",
            "setLoggerFinder",
        }
        needed = [line for line in run([readelf, "-d", str(library)]).stdout.splitlines() if "(NEEDED)" in line]
        names = {line.partition("[")[2].partition(".so")[0] for line in needed}
        assert not [name for name in names if "nvinfer" in name or "cudart" in name]


@needs_headers
@pytest.mark.timeout(900)
def test_under_sanitizers(tmp_path: Path) -> None:
    """The contract and the host `enqueue` with AddressSanitizer and UndefinedBehaviorSanitizer, at the last version."""
    probe = tmp_path / "probe.cc"
    probe.write_text("int main() { return 0; }\n")
    compiler = os.environ.get("CXX", "c++")
    flags = ["-fsanitize=address,undefined", str(probe), "-o", str(tmp_path / "probe")]
    if (
        shutil.which(compiler) is None
        or run([compiler, *flags]).returncode
        or run([str(tmp_path / "probe")]).returncode
    ):
        pytest.skip(f"{compiler} has no sanitizer runtime here")
    # One set of kernels is enough: theirs is another test.
    sanitized = build(INCLUDES[-1], "trt-sanitize", "-DHCMEN_SANITIZE=ON", "-DHCMEN_X86=OFF")
    convs = [
        ConvCase(width=width, reverse=reverse, stateful=width > 1) for width in (1, 4, 6) for reverse in (False, True)
    ]
    cases = [*SWITCHES, *((case, case) for case in convs)]
    enqueue(sanitized, sanitized.host, "enqueue-host", cases, tmp_path, UBSAN_OPTIONS="print_stacktrace=1")
    for mode in ("contract", "foreign-logger"):
        result = sanitized.check(sanitized.host, mode, UBSAN_OPTIONS="print_stacktrace=1")
        assert "runtime error" not in result.stderr
        assert "Sanitizer" not in result.stderr


# --- the registry of TensorRT itself --------------------------------------------------------------------------------

REGISTRY = """
import sys
import numpy as np
import tensorrt_lean_libs  # the libraries that the next line needs
import tensorrt_lean_bindings as trt

registry = trt.get_plugin_registry()
handle = registry.load_library(sys.argv[1])
BUILD, RUNTIME = trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME

def number(name, value):
    return trt.PluginField(name, np.array([value], np.int32), trt.PluginFieldType.INT32)

def real(name, value):
    return trt.PluginField(name, np.array([value], np.float32), trt.PluginFieldType.FLOAT32)

def text(name, value):
    return trt.PluginField(name, np.frombuffer(value, np.int8), trt.PluginFieldType.CHAR)

def create(name, phase, *fields):
    fields = trt.PluginFieldCollection(list(fields))
    plugin = registry.get_creator(name, "1", "hcmen").create_plugin("node", fields, phase)
    if plugin is None:
        return "refused"
    core = plugin.get_capability_interface(trt.PluginCapabilityType.CORE)
    build = plugin.get_capability_interface(trt.PluginCapabilityType.BUILD)
    return core.plugin_name, core.plugin_version, core.plugin_namespace, build.num_outputs, build.timing_cache_id

def names(creator):
    return sorted(field.name for field in registry.get_creator(creator, "1", "hcmen").field_names)

all_fields = [number("delta_softplus", 1), number("reverse", 0), number("gated", 1), number("stateful", 1)]
ours = sorted(c.name for c in registry.all_creators if c.plugin_namespace == "hcmen")
print([
    ours, names("SelectiveScan"), names("CausalConv1d"), names("StateSpaceDual"),
    create("SelectiveScan", BUILD), create("SelectiveScan", BUILD, *all_fields),
    create("SelectiveScan", RUNTIME, *all_fields), create("SelectiveScan", RUNTIME, *all_fields[1:]),
    create("SelectiveScan", BUILD, number("gated", 2)),
    create("CausalConv1d", BUILD, text("activation", b"silu\\0"), number("reverse", 1)),
    create("CausalConv1d", BUILD, number("stateful", 1)),
    create("CausalConv1d", BUILD, text("activation", b"gelu")),
    create("StateSpaceDual", BUILD),
    create("StateSpaceDual", BUILD, real("dt_min", 0.25), real("dt_max", 2.0), number("stateful", 1)),
    create("StateSpaceDual", BUILD, real("dt_min", 3.0), real("dt_max", 2.0)),
])
assert registry.get_creator("SelectiveScan", "1", "") is None
registry.deregister_library(handle)
assert registry.get_creator("SelectiveScan", "1", "hcmen") is None
registry.load_library(sys.argv[1])
print(create("SelectiveScan", BUILD, number("stateful", 1))[3], trt.__version__)
"""


@pytest.fixture(scope="module", params=[*INSTALLED, *INCLUDES], ids=lambda path: path.name)
def libraries(request: pytest.FixtureRequest) -> list[Path]:
    """The plugins as they are installed, or built against some headers."""
    return build(request.param, "trt").libraries if request.param.is_dir() else [request.param]


@pytest.mark.timeout(900)
@pytest.mark.skipif(not LEANS, reason=NO_LEAN)
@pytest.mark.skipif(not INSTALLED and not INCLUDES, reason=f"libhcmen_trt.so is not installed, and {NO_HEADERS}")
@pytest.mark.parametrize("lean", LEANS.values(), ids=LEANS)
def test_the_registry_of_tensorrt_makes_the_plugins(libraries: list[Path], lean: Path) -> None:
    """libnvinfer_lean's registry, whatever its version, takes a library built against any: neither calls the other's
    objects that are laid out differently."""
    scan, conv, dual = ((name, "1", "hcmen") for name in ("SelectiveScan", "CausalConv1d", "StateSpaceDual"))
    for library in libraries:
        result = run([sys.executable, "-c", REGISTRY, str(library)], PYTHONPATH=str(lean))
        assert result.returncode == 0, result.stderr
        first, second = result.stdout.splitlines()
        flags = "delta_softplus={},reverse={},gated={},stateful={}"
        full = (*scan, 2, flags.format(1, 0, 1, 1))
        assert first == str(
            [
                ["CausalConv1d", "SelectiveScan", "StateSpaceDual"],
                ["delta_softplus", "gated", "reverse", "stateful"],
                ["activation", "reverse", "stateful"],
                ["delta_softplus", "dt_max", "dt_min", "gated", "reverse", "stateful"],
                (*scan, 1, flags.format(0, 0, 0, 0)),
                full,
                full,
                "refused",
                "refused",
                (*conv, 1, "activation=1,reverse=1,stateful=0"),
                (*conv, 2, "activation=0,reverse=0,stateful=1"),
                "refused",
                (*dual, 1, f"{flags.format(0, 0, 0, 0)},dt_min=0,dt_max=inf"),
                (*dual, 2, f"{flags.format(0, 0, 0, 1)},dt_min=0.25,dt_max=2"),
                "refused",
            ]
        )
        assert second.startswith("2 ")
        errors = result.stderr.splitlines()
        assert [line.partition(" (layer")[0] for line in errors if "hcmen" in line or "error: " in line] == [
            "error: SelectiveScan: the engine holds no field 'delta_softplus': build it again with this library",
            "error: SelectiveScan: attribute 'gated' is 2, expected 0 or 1",
            'error: CausalConv1d: attribute \'activation\' is "gelu", expected "none" or "silu"',
            "error: StateSpaceDual: attributes 'dt_min' and 'dt_max' are 3 and 2, "
            "expected dt_min to be no more than dt_max",
        ]
