"""What the shim makes importable, and that what was there before is as it was when it ends."""

from __future__ import annotations

import importlib
import subprocess
import sys
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.utils._triton

import hcmen.mamba
from hcmen.base.errors import InputError
from hcmen.mamba.mamba_ssm import mamba_function
from hcmen.mamba.stand_ins import hook, packages
from hcmen.mamba.stand_ins.hook import hidden

NAMES = [
    *("causal_conv1d", "causal_conv1d.causal_conv1d_interface", "causal_conv1d.causal_conv1d_varlen"),
    *("causal_conv1d.cpp_functions", "causal_conv1d_cuda", "mamba_ssm", "mamba_ssm.modules.block"),
    *("mamba_ssm.modules.mamba2", "mamba_ssm.modules.mamba_simple", "mamba_ssm.ops.selective_scan_interface"),
    *("mamba_ssm.ops.triton.layer_norm", "mamba_ssm.ops.triton.layernorm", "mamba_ssm.ops.triton.layernorm_gated"),
    *("mamba_ssm.ops.triton.selective_state_update", "mamba_ssm.ops.triton.ssd_combined"),
    *("mamba_ssm.utils.generation", "selective_scan_cuda", "selective_scan_cuda_core", "selective_scan_cuda_nrow"),
    *("selective_scan_cuda_oflex", "triton", "triton.language", "triton.language.extra.libdevice", "triton.testing"),
]


def absent(name: str) -> bool:
    """Whether the package of this module is not installed here."""
    try:
        return importlib.util.find_spec(name.partition(".")[0]) is None
    except ValueError:
        return False


pytestmark = pytest.mark.skipif(
    not all(map(absent, ("triton", "mamba_ssm", "causal_conv1d"))),
    reason="Triton, mamba_ssm or causal_conv1d is installed: an environment without them has stand-ins",
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is searched first; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name, module in list(sys.modules.items()):
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def in_a_process(script: str, *arguments: str) -> str:
    """stdout of a fresh Python."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_each_module_is_there_within_and_gone_after(name: str) -> None:
    before, finders = set(sys.modules), list(sys.meta_path)
    with hcmen.mamba.shim():
        module = importlib.import_module(name)
        assert packages.is_stand_in(module)
        assert importlib.import_module(name) is module
        assert importlib.util.find_spec(name) is not None
    assert {n for n in sys.modules if packages.is_stand_in(sys.modules[n])} == set()
    assert sys.meta_path == finders
    assert before <= set(sys.modules)
    with pytest.raises(ImportError):
        importlib.import_module(name)


def test_a_second_shim_within_the_first_changes_nothing() -> None:
    with hcmen.mamba.shim():
        with hcmen.mamba.shim():
            first = importlib.import_module("triton")
        assert importlib.import_module("triton") is first
    assert "triton" not in sys.modules


def test_what_it_patches_is_as_it_was() -> None:
    event, device = torch.cuda.Event, torch.cuda.device
    with hcmen.mamba.shim():
        if not torch.cuda.is_available():
            first, second = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            second.record()
            assert first.elapsed_time(second) >= 0
            with torch.cuda.device(torch.device("cpu")):
                pass
    assert torch.cuda.Event is event
    assert torch.cuda.device is device


def test_an_error_within_the_block_ends_the_shim_too() -> None:
    with pytest.raises(ZeroDivisionError), hcmen.mamba.shim():
        _ = importlib.import_module("mamba_ssm") and 1 / 0
    assert "mamba_ssm" not in sys.modules


def test_what_a_stand_in_lacks_says_what_to_do() -> None:
    with hcmen.mamba.shim():
        for script in ("from mamba_ssm import MambaLMHeadModel", "import mamba_ssm.models.mixer_seq_simple"):
            with pytest.raises(ImportError, match=r"put a checkout of github\.com/state-spaces/mamba on the path") as e:
                exec(script)
            assert "\n" not in str(e.value)
        with pytest.raises(ImportError):
            exec("from causal_conv1d import nothing_like_it")


def test_install_stays() -> None:
    script = """
        import hcmen.mamba
        hcmen.mamba.shim().install()
        from mamba_ssm import Mamba
        import torch, triton
        print(tuple(Mamba(8)(torch.zeros(1, 3, 8)).shape))
    """
    assert in_a_process(script) == "(1, 3, 8)"


def test_importing_hcmen_mamba_costs_no_torch_and_puts_nothing_in_place() -> None:
    script = """
        import sys, hcmen.mamba
        print("torch" in sys.modules, len([f for f in sys.meta_path if "hcmen.mamba" in type(f).__module__]))
    """
    assert in_a_process(script) == "False 0"


def test_an_export_sees_no_triton() -> None:
    with hcmen.mamba.shim():
        fake = importlib.import_module("triton")
        assert not torch.utils._triton.has_triton_package()
        torch.utils._triton.has_triton_package.cache_clear()
        with hidden():
            assert "triton" not in sys.modules
            assert not torch.utils._triton.has_triton_package()
            with pytest.raises(ImportError):
                importlib.import_module("mamba_ssm")
        assert sys.modules["triton"] is fake
        assert not torch.utils._triton.has_triton_package()


def test_the_stand_ins_are_never_taken_for_mamba_ssm() -> None:
    mamba_function.cache_clear()
    with hcmen.mamba.shim():
        importlib.import_module("mamba_ssm")
        for operation in ("scan", "convolution"):
            function, why = mamba_function(operation)
            assert function is None
            assert "is a stand-in of hcmen.mamba.shim" in str(why)
    mamba_function.cache_clear()


# --- what is there for real -------------------------------------------------------------------------------------------


def test_a_checkout_is_imported_as_it_is(package: Path) -> None:
    (package / "mamba_ssm" / "ops").mkdir(parents=True)
    (package / "mamba_ssm" / "__init__.py").write_text("from mamba_ssm.ops.own import scanned\n")
    (package / "mamba_ssm" / "ops" / "__init__.py").write_text("")
    (package / "mamba_ssm" / "ops" / "own.py").write_text(
        "import selective_scan_cuda, triton\ndef scanned(*x):\n    return selective_scan_cuda.fwd(*x)\n"
    )
    with hcmen.mamba.shim():
        module = importlib.import_module("mamba_ssm")
        assert not packages.is_stand_in(module)
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("mamba_ssm.modules")
        u = torch.randn(1, 2, 3)
        out = module.scanned(
            u, u, -torch.rand(2, 4), torch.randn(1, 4, 3), torch.randn(1, 4, 3), None, None, None, True
        )
        assert out[0].shape == u.shape


def test_a_compiled_module_that_works_keeps_all_but_its_functions_on_the_cpu(package: Path) -> None:
    # A module of Python stands for a compiled one: it says where its calls came from.
    (package / "selective_scan_cuda.py").write_text("def fwd(*x):\n    return 'its own'\nother = 5\n")

    class OnCuda(torch.Tensor):
        is_cuda = True

    with hcmen.mamba.shim():
        module = importlib.import_module("selective_scan_cuda")
        assert module.other == 5
        u = torch.randn(1, 2, 3)
        projected = torch.randn(1, 4, 3)
        out = module.fwd(u, u, -torch.rand(2, 4), projected, projected, None, None, None, True)
        assert out[0].shape == u.shape
        assert module.fwd(u, torch.zeros(1).as_subclass(OnCuda)) == "its own"
    assert module.fwd() == "its own", "it is as it was"


def test_a_compiled_module_that_does_not_load_is_stood_in(package: Path) -> None:
    (package / "causal_conv1d_cuda.py").write_text("raise ImportError('libcudart.so.12: no such file')\n")
    with hcmen.mamba.shim():
        assert packages.is_stand_in(importlib.import_module("causal_conv1d_cuda"))


def test_functions_of_modules_that_were_there_before_are_replaced_until_the_end(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = types.ModuleType("triton")
    monkeypatch.setitem(sys.modules, "triton", kernels)
    (package / "kept_kernels.py").write_text(
        "import triton\ndef rms_norm_fn(x, weight, bias, eps, residual=None, odd=3):\n    return 'its own'\n"
    )
    (package / "kept_user.py").write_text("from kept_kernels import rms_norm_fn\n")
    home, user = importlib.import_module("kept_kernels"), importlib.import_module("kept_user")
    x = torch.randn(2, 4)
    with hcmen.mamba.shim():
        assert sys.modules["triton"] is kernels
        for module in (home, user):
            found = module.rms_norm_fn(x, torch.ones(4), None, 1e-5)
            torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (4,), eps=1e-5))
        with pytest.raises(InputError, match=r"rms_norm_fn was called with odd, expected no more than x, weight"):
            user.rms_norm_fn(x, torch.ones(4), None, 1e-5, odd=4)
    assert home.rms_norm_fn(1, 2, 3, 4) == user.rms_norm_fn(1, 2, 3, 4) == "its own"


def test_arguments_keep_the_order_of_the_function_that_is_replaced() -> None:
    def older(x, weight, bias, residual=None, prenorm=False, residual_in_fp32=False, eps=1e-6):  # type: ignore[no-untyped-def]
        raise AssertionError

    call = hook.adapted(older, hook.KERNELS["rms_norm_fn"], works_on_cuda=False)
    x = torch.randn(2, 4)
    y, whole = call(x, torch.ones(4), None, x, True, False, 1e-3)
    torch.testing.assert_close(whole, 2 * x)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(2 * x, (4,), eps=1e-3))
    # mamba_ssm 1.0's own RMSNorm calls it so.
    torch.testing.assert_close(
        call(x, torch.ones(4), None, eps=1e-3, is_rms_norm=True), call(x, torch.ones(4), None, eps=1e-3)
    )


# --- mixers of our own ------------------------------------------------------------------------------------------------

KEYS = {
    "Mamba": "A_log D in_proj.weight conv1d.weight conv1d.bias x_proj.weight"
    " dt_proj.weight dt_proj.bias out_proj.weight",
    "Mamba2": "dt_bias A_log D in_proj.weight conv1d.weight conv1d.bias norm.weight out_proj.weight",
}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mamba", {"d_state": 5}),
        ("Mamba", {"dt_rank": 3, "conv_bias": False, "bias": True, "dt_init": "constant"}),
        ("Mamba2", {"d_state": 8, "headdim": 8, "ngroups": 2}),
        ("Mamba2", {"d_state": 8, "headdim": 8, "rmsnorm": False, "D_has_hdim": True}),
        ("Mamba2", {"d_state": 8, "headdim": 8, "d_ssm": 24, "norm_before_gate": True, "conv_init": 0.1}),
    ],
)
def test_a_mixer_steps_as_it_scans(name: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    with hcmen.mamba.shim():
        package = importlib.import_module("mamba_ssm")
        params = importlib.import_module("mamba_ssm.utils.generation").InferenceParams(16, 2)
        mixer = getattr(package, name)(24, layer_idx=0, **options)
    x = torch.randn(2, 9, 24)
    whole = mixer(x)
    whole.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    with torch.no_grad():
        parts = [mixer(x[:, :4], inference_params=params)]
        for t in range(4, 9):
            params.seqlen_offset = t
            parts.append(mixer(x[:, t : t + 1], inference_params=params))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-5, atol=1e-5)
        states = mixer.allocate_inference_cache(2, 16)
        stepped = torch.cat([mixer.step(x[:, t : t + 1], *states)[0] for t in range(9)], dim=1)
        torch.testing.assert_close(stepped, whole, rtol=1e-5, atol=1e-5)
    if not options.keys() & {"conv_bias", "bias", "rmsnorm"}:
        assert set(mixer.state_dict()) == set(KEYS[name].split())


def test_a_block_adds_its_mixer_to_the_residual() -> None:
    with hcmen.mamba.shim():
        block = importlib.import_module("mamba_ssm.modules.block").Block
        older = importlib.import_module("mamba_ssm.modules.mamba_simple").Block
        rms = importlib.import_module("mamba_ssm.ops.triton.layer_norm").RMSNorm

    class Twice(torch.nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor, inference_params: object = None) -> torch.Tensor:
            return 2 * x

    x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    layer_norm, rms_norm = torch.nn.functional.layer_norm, torch.nn.functional.rms_norm
    for norm_cls, normed in ((torch.nn.LayerNorm, layer_norm), (rms, rms_norm)):
        found = older(8, Twice, norm_cls=norm_cls)(x, residual)
        torch.testing.assert_close(found, (2 * normed(x + residual, (8,), eps=1e-5), x + residual))
    y, kept = block(8, Twice, Twice)(x)
    middle = x + 2 * layer_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close((y, kept), (2 * layer_norm(middle, (8,), eps=1e-5), middle))
