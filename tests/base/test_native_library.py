"""libhcmen_ops.so through its C interface, without torch: refusals, forks, exports, accuracy of exp and friends."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sys

import numpy as np
import pytest

from hcmen.base.library import (
    ConvArguments,
    ConvGradients,
    DualArguments,
    DualGradients,
    ScanArguments,
    ScanGradients,
    library_isa,
    library_path,
    load_library,
)

OK, BAD_ARGUMENT = 0, 1
KINDS = {"scan": "selective_scan", "conv": "causal_conv1d", "dual": "state_space_dual"}
BATCH, TIME, CHANNEL, STATE, GROUP, WIDTH, HEAD, ROWS = 2, 5, 6, 3, 2, 4, 4, 5


class Call:
    """Valid arguments of one function over arrays this object keeps alive; tests spoil one thing and look."""

    def __init__(self, kind: str) -> None:
        generator = np.random.default_rng(0)
        series, state = (BATCH, TIME, CHANNEL), (BATCH, CHANNEL, STATE)
        projection = (BATCH, TIME, GROUP, STATE)
        if kind == "scan":
            sizes = {"batch": BATCH, "time": TIME, "channel": CHANNEL, "state": STATE, "group": GROUP}
            shapes = {
                **dict.fromkeys(("u", "delta", "z", "y"), series),
                **dict.fromkeys(("B", "C"), projection),
                **dict.fromkeys(("D", "delta_bias"), (CHANNEL,)),
                **dict.fromkeys(("initial_state", "last_state"), state),
                "A": (CHANNEL, STATE),
            }
            grads = {
                **dict.fromkeys(("dy", "du", "ddelta", "dz"), series),
                **dict.fromkeys(("dB", "dC"), projection),
                **dict.fromkeys(("dD", "ddelta_bias"), (CHANNEL,)),
                **dict.fromkeys(("dlast_state", "dinitial_state"), state),
                "dA": (CHANNEL, STATE),
            }
            arguments, gradients, flags = ScanArguments, ScanGradients, {"dtype": 0, "delta_softplus": 1, "reverse": 0}
        elif kind == "dual":
            sizes = {"batch": BATCH, "time": TIME, "head": HEAD, "head_dim": ROWS, "state": STATE, "group": GROUP}
            series, state = (BATCH, TIME, HEAD, ROWS), (BATCH, HEAD, ROWS, STATE)
            shapes = {
                **dict.fromkeys(("x", "z", "y"), series),
                **dict.fromkeys(("B", "C"), projection),
                **dict.fromkeys(("A", "D", "dt_bias"), (HEAD,)),
                **dict.fromkeys(("initial_state", "last_state"), state),
                "dt": (BATCH, TIME, HEAD),
            }
            grads = {
                **dict.fromkeys(("dy", "dx", "dz"), series),
                **dict.fromkeys(("dB", "dC"), projection),
                **dict.fromkeys(("dA", "dD", "ddt_bias"), (HEAD,)),
                **dict.fromkeys(("dlast_state", "dinitial_state"), state),
                "ddt": (BATCH, TIME, HEAD),
            }
            arguments, gradients = DualArguments, DualGradients
            flags = {"dtype": 0, "delta_softplus": 1, "reverse": 0, "wide_D": 0, "dt_min": 0.0, "dt_max": np.inf}
        else:
            sizes = {"batch": BATCH, "time": TIME, "channel": CHANNEL, "width": WIDTH}
            state = (BATCH, WIDTH - 1, CHANNEL)
            shapes = {"x": series, "weight": (CHANNEL, WIDTH), "bias": (CHANNEL,), "y": series}
            shapes |= dict.fromkeys(("initial_state", "last_state"), state)
            grads = {"dy": series, "dx": series, "dweight": (CHANNEL, WIDTH), "dbias": (CHANNEL,)}
            grads |= dict.fromkeys(("dlast_state", "dinitial_state"), state)
            arguments, gradients, flags = ConvArguments, ConvGradients, {"dtype": 0, "silu": 1, "reverse": 0}
        self.arrays = {k: generator.standard_normal(s).astype(np.float32) for k, s in {**shapes, **grads}.items()}
        self.arguments = arguments(**sizes, **flags, **{name: self.arrays[name].ctypes.data for name in shapes})
        self.gradients = gradients(**{name: self.arrays[name].ctypes.data for name in grads})
        self.name = f"hcmen_{KINDS[kind]}"

    def forward(self, threads: int = 1) -> int:
        return getattr(load_library(), f"{self.name}_forward")(ctypes.byref(self.arguments), threads)

    def backward(self, threads: int = 1) -> int:
        function = getattr(load_library(), f"{self.name}_backward")
        return function(ctypes.byref(self.arguments), ctypes.byref(self.gradients), threads)


@pytest.mark.parametrize("kind", KINDS)
def test_valid_arguments_are_accepted(kind: str) -> None:
    call = Call(kind)
    assert call.forward() == OK
    assert call.backward() == OK
    assert call.forward(threads=100000) == OK
    assert all(np.isfinite(x).all() for x in call.arrays.values())


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("scan", f) for f in ("u", "delta", "A", "B", "C", "D", "delta_bias")),
        *(("conv", f) for f in ("x", "weight", "bias")),
        *(("dual", f) for f in ("x", "dt", "A", "B", "C", "D", "dt_bias")),
    ],
)
def test_null_arrays_are_refused(kind: str, field: str) -> None:
    call = Call(kind)
    setattr(call.arguments, field, None)
    assert call.forward() == BAD_ARGUMENT
    assert call.backward() == BAD_ARGUMENT


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("scan", f) for f in ("dy", "du", "ddelta", "dA", "dB", "dC", "dD", "ddelta_bias", "dz")),
        *(("conv", f) for f in ("dy", "dx", "dweight", "dbias")),
        *(("dual", f) for f in ("dy", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dz")),
    ],
)
def test_null_gradients_are_refused(kind: str, field: str) -> None:
    call = Call(kind)
    setattr(call.gradients, field, None)
    assert call.backward() == BAD_ARGUMENT


def test_a_convolution_may_have_a_state_and_must_not_have_one_of_a_width_of_1() -> None:
    call = Call("conv")
    call.arguments.initial_state = call.arguments.last_state = None
    assert call.forward() == OK
    call.arguments.y = None
    assert call.forward() == BAD_ARGUMENT
    call.gradients.dlast_state = call.gradients.dinitial_state = None
    assert call.backward() == OK
    for of, field in (
        ("arguments", "initial_state"),
        ("arguments", "last_state"),
        ("gradients", "dlast_state"),
        ("gradients", "dinitial_state"),
    ):
        call = Call("conv")
        call.arguments.width = 1
        call.arguments.initial_state = call.arguments.last_state = None
        call.gradients.dlast_state = call.gradients.dinitial_state = None
        assert call.forward() == call.backward() == OK
        setattr(getattr(call, of), field, call.arrays[field].ctypes.data)
        assert call.backward() == BAD_ARGUMENT
        assert call.forward() == (BAD_ARGUMENT if of == "arguments" else OK)


@pytest.mark.parametrize("kind", ["scan", "dual"])
def test_optional_arrays_may_be_null(kind: str) -> None:
    call = Call(kind)
    call.arguments.initial_state = call.arguments.last_state = None
    assert call.forward() == OK
    call.arguments.y = None
    assert call.forward() == BAD_ARGUMENT
    call.gradients.dlast_state = call.gradients.dinitial_state = None
    assert call.backward() == OK
    # dz goes with z.
    call.arguments.z = None
    assert call.backward() == BAD_ARGUMENT
    call.gradients.dz = None
    assert call.backward() == OK


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("scan", f) for f in ("batch", "time", "channel", "state", "group")),
        *(("conv", f) for f in ("batch", "time", "channel", "width")),
        *(("dual", f) for f in ("batch", "time", "head", "head_dim", "state", "group")),
    ],
)
@pytest.mark.parametrize("value", [0, -1, -(2**63), 2**62, 2**63 - 1])
def test_impossible_sizes_are_refused(kind: str, field: str, value: int) -> None:
    call = Call(kind)
    setattr(call.arguments, field, value)
    assert call.forward() == BAD_ARGUMENT
    assert call.backward() == BAD_ARGUMENT


def test_products_that_overflow_are_refused() -> None:
    call = Call("scan")
    call.arguments.batch = call.arguments.time = call.arguments.channel = 2**22
    assert call.forward() == BAD_ARGUMENT
    call = Call("conv")
    call.arguments.time, call.arguments.channel = 2**40, 2**40
    assert call.forward() == BAD_ARGUMENT
    call = Call("dual")
    call.arguments.head = call.arguments.head_dim = call.arguments.state = 2**22
    assert call.forward() == BAD_ARGUMENT


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_dtype_threads_and_structures_are_refused(kind: str) -> None:
    call = Call(kind)
    for dtype in (-1, 2, 7):
        call.arguments.dtype = dtype
        assert call.forward() == BAD_ARGUMENT
    call.arguments.dtype = 1  # gradients are float32 only
    assert call.backward() == BAD_ARGUMENT
    call.arguments.dtype = 0
    for threads in (0, -1):
        assert call.forward(threads) == BAD_ARGUMENT
        assert call.backward(threads) == BAD_ARGUMENT
    library = load_library()
    assert getattr(library, f"{call.name}_forward")(None, 1) == BAD_ARGUMENT
    assert getattr(library, f"{call.name}_backward")(None, None, 1) == BAD_ARGUMENT


@pytest.mark.parametrize(("kind", "group"), [("scan", 4), ("dual", 3)])
def test_groups_must_divide_the_channels_or_heads(kind: str, group: int) -> None:
    call = Call(kind)
    call.arguments.group = group
    assert call.forward() == BAD_ARGUMENT


@pytest.mark.parametrize(("least", "most"), [(1.0, 0.5), (np.nan, 1.0), (0.0, np.nan)])
def test_bounds_of_step_sizes_that_are_none_are_refused(least: float, most: float) -> None:
    call = Call("dual")
    call.arguments.dt_min, call.arguments.dt_max = least, most
    assert call.forward() == call.backward() == BAD_ARGUMENT


# --- elementary functions -------------------------------------------------------------------------------------------

FUNCTIONS = {
    # number, float64 truth, units in the last place allowed
    "exp": (0, np.exp, 1.51),
    "softplus": (1, lambda x: np.where(x > 40, x, np.log1p(np.exp(np.minimum(x, 40)))), 2.34),
    "silu": (2, lambda x: x / (1 + np.exp(-x)), 3.95),
    "sigmoid": (3, lambda x: 1 / (1 + np.exp(-x)), 3.1),
    "exp2": (4, np.exp2, 1.25),
}


def evaluate(function: int, x: np.ndarray) -> np.ndarray:
    y = np.empty_like(x)
    assert load_library().hcmen_evaluate(function, x.ctypes.data, y.ctypes.data, x.size) == OK
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_elementary_functions_are_accurate_everywhere(name: str) -> None:
    """Every 509th bit pattern of float32: 8.4 million values, both signs, subnormals, infinities' neighbourhood."""
    number, truth, bound = FUNCTIONS[name]
    x = np.arange(0, 2**32, 509, dtype=np.uint64).astype(np.uint32).view(np.float32)
    x = x[np.isfinite(x)]
    got = evaluate(number, x).astype(np.float64)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        want = truth(x.astype(np.float64))
        nearest = want.astype(np.float32)
        exponent = np.frexp(want)[1]
        unit = np.ldexp(1.0, np.maximum(exponent, -119 if name == "silu" else -125) - 24)
        error = np.abs(got - want) / unit
    both_infinite = np.isinf(nearest) & (got == nearest)
    error[both_infinite] = 0.0
    worst = int(np.nanargmax(np.where(np.isnan(error), np.inf, error)))
    assert error[worst] <= bound, f"{name}({x[worst]}) = {got[worst]}, expected {want[worst]}"


def test_elementary_functions_at_the_ends() -> None:
    x = np.array([-np.inf, np.inf, np.nan, 0.0, -0.0, 89.0, -104.0, 20.0, 20.000002], np.float32)
    exp = evaluate(0, x)
    np.testing.assert_array_equal(exp, np.array([0, np.inf, np.nan, 1, 1, np.inf, 0, exp[7], exp[8]], np.float32))
    softplus = evaluate(1, x)
    assert softplus[0] == 0.0
    assert softplus[1] == np.inf
    assert np.isnan(softplus[2])
    assert softplus[5] == 89.0
    assert softplus[8] == x[8]
    assert evaluate(3, x)[:2].tolist() == [0.0, 1.0]
    exp2 = evaluate(4, x)
    assert exp2[0] == 0.0
    assert exp2[1] == np.inf
    assert np.isnan(exp2[2])


def test_checked_and_unchecked_exponentials_agree_to_the_bit() -> None:
    """Which of the two a chunk uses depends on its neighbours' values; its results must not."""
    x = np.linspace(-99.9, 99.9, 1_000_003, dtype=np.float32)
    assert np.array_equal(evaluate(4, x), evaluate(5, x))


def test_lengths_that_do_not_fill_a_vector() -> None:
    x = np.linspace(-5, 5, 67, dtype=np.float32)
    whole = evaluate(0, x)
    for count in range(1, 40):
        assert np.array_equal(evaluate(0, x[:count].copy()), whole[:count])


# --- the library as a whole -----------------------------------------------------------------------------------------


def test_only_the_interface_is_exported() -> None:
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm (binutils) is not installed")
    command = [nm, "-D", "--defined-only", str(library_path())]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {line.split()[-1].split("@")[0] for line in listing.splitlines()}
    required = {f"hcmen_{op}_{way}" for op in KINDS.values() for way in ("forward", "backward")}
    required |= {"hcmen_ops_version", "hcmen_ops_isa", "hcmen_ops_problem", "hcmen_exp_loop", "hcmen_evaluate"}
    assert required <= names
    assert names <= required | {"RegisterCustomOps"}


def test_instruction_set_is_named_and_bad_wishes_are_refused() -> None:
    assert library_isa() in (("neon",) if platform.machine() == "aarch64" else ("avx512", "avx2", "baseline"))
    code = (
        "from hcmen.base.errors import BackendError\n"
        "from hcmen.base.library import load_library\n"
        "try:\n    load_library()\nexcept BackendError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HCMEN_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("HCMEN_ISA is 'sse9', expected")
    assert result.stdout.count("\n") == 1


def test_a_library_asked_without_a_usable_instruction_set_refuses_to_compute() -> None:
    code = (
        "import ctypes, sys\n"
        "import hcmen.base.library as library\n"
        "raw = ctypes.CDLL(str(library.library_path()))\n"
        "raw.hcmen_ops_isa.restype = raw.hcmen_ops_problem.restype = ctypes.c_char_p\n"
        "assert raw.hcmen_ops_isa() is None and b'sse9' in raw.hcmen_ops_problem()\n"
        "raw.hcmen_evaluate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]\n"
        "x = (ctypes.c_float * 4)()\n"
        "assert raw.hcmen_evaluate(0, ctypes.addressof(x), ctypes.addressof(x), 4) == 3\n"
        "print('refused')\n"
    )
    environment = {**os.environ, "HCMEN_ISA": "sse9"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout == "refused\n", result.stderr


# A script: `scan()` over arrays of the sizes in its arguments, on four threads.
SCAN = """
import ctypes, os, resource, signal, sys, threading, time
import numpy as np
from hcmen.base.library import ScanArguments, load_library

library = load_library()
rng = np.random.default_rng(0)
b, t, c, n = (int(x) for x in sys.argv[1:])
a = {"u": (b, t, c), "delta": (b, t, c), "B": (b, t, 1, n), "C": (b, t, 1, n), "D": (c,), "delta_bias": (c,)}
a = {k: rng.standard_normal(s).astype(np.float32) for k, s in a.items()}
a["A"] = -np.ones((c, n), np.float32)

def scan():
    y = np.empty((b, t, c), np.float32)
    s = ScanArguments(batch=b, time=t, channel=c, state=n, group=1, delta_softplus=1, y=y.ctypes.data,
                      **{k: x.ctypes.data for k, x in a.items()})
    assert library.hcmen_selective_scan_forward(ctypes.byref(s), 4) == 0
    return y

"""

FORK = """
want = scan()
stop = threading.Event()
# Another thread keeps the pool, and its lock, busy while this one forks.
busy = threading.Thread(target=lambda: [scan() for _ in iter(stop.is_set, True)])
busy.start()
for _ in range(20):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        same = all(np.array_equal(scan(), want) for _ in range(3))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
stop.set()
busy.join()
assert np.array_equal(scan(), want)
print("forked")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_forked_children_make_their_own_threads() -> None:
    command = [sys.executable, "-c", SCAN + FORK, "2", "60", "256", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "forked\n", result.stderr


def test_idle_threads_sleep() -> None:
    code = SCAN + (
        "def used():\n"
        "    usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "    return usage.ru_utime + usage.ru_stime\n"
        "scan(); before = used(); time.sleep(1.0); print(used() - before)\n"
    )
    command = [sys.executable, "-c", code, "2", "60", "256", "8"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    # Those that wait awake take a second each.
    assert float(result.stdout) < 0.5, result.stderr


def test_working_memory_does_not_grow_with_time() -> None:
    """Peak memory over 1000 and 64000 steps differs by the output, not by states over time."""
    code = SCAN + (
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; scan()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    growth = {}
    for steps in (1000, 64000):
        command = [sys.executable, "-c", code, "1", str(steps), "64", "16"]
        growth[steps] = 1024 * int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    output = 64000 * 64 * 4
    # All states of all steps would be 16 outputs.
    assert growth[64000] - growth[1000] < 1.3 * output
