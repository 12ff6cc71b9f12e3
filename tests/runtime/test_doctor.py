"""`hcmen-doctor`: it runs what it vouches for, and tells one fix per failure."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command import run
from helpers.dual_cases import DualCase, dual_oracle
from helpers.small_bundle import make_bundle

import hcmen.base.library as library
import hcmen.base.selfcheck as selfcheck
import hcmen.runtime.commands.doctor as doctor
from hcmen.base import shipped
from hcmen.base.errors import BackendError
from hcmen.runtime.commands.doctor import check_machine, main
from hcmen.runtime.commands.doctor_rows import Row

NAMES = [
    *("python", "hcmen", "system", "cpu", "memory", "numpy", "onnxruntime", "kernel library"),
    *("SelectiveScan, function", "SelectiveScan, kernel", "CausalConv1d, function", "CausalConv1d, kernel"),
    *("StateSpaceDual, function", "StateSpaceDual, kernel"),
    *("cuda device", "cuda provider", "cuda kernels", "SelectiveScan, cuda"),
    *("bundle", "nvidia driver", "gpu", "tensorrt", "tensorrt plugins", "engines"),
    *("tensorrt-rtx", "tensorrt-rtx engines", "torch", "tokenizers"),
]


def rows(bundle: Path | None = None) -> dict[str, Row]:
    return {r.name: r for r in check_machine(None if bundle is None else str(bundle))}


def test_a_sound_machine_passes_every_row(shared_bundle):
    done = run(main, "--bundle", shared_bundle, "--format", "json")
    answer = json.loads(done.out)
    assert (done.code, done.err, answer["passed"], answer["schema_version"]) == (0, "", True, 1)
    assert [r["name"] for r in answer["rows"]] == NAMES
    # What a machine without a GPU lacks is no failure.
    assert {r["status"] for r in answer["rows"]} <= {"ok", "info", "skipped"}
    assert {r["name"] for r in answer["rows"] if r["status"] == "skipped"} <= {"SelectiveScan, cuda"}
    assert not any(r["fix"] for r in answer["rows"])


def test_text_is_a_table_with_a_count(shared_bundle):
    done = run(main, "--bundle", shared_bundle)
    lines = done.out.splitlines()
    assert len(lines) == len(NAMES) + 2
    assert lines[-1] == f"{sum(x.startswith('ok') for x in lines)} ok, 0 FAILED, {lines[-1].split()[-2]} skipped"
    assert sum(x.startswith("ok") for x in lines) >= 9
    assert lines[0].startswith("ok       python ")
    assert "\x1b" not in done.out


def test_the_kernel_ran_as_itself_and_the_function_as_standard_nodes():
    found = rows()
    for op in ("SelectiveScan", "CausalConv1d", "StateSpaceDual"):
        assert f"ran as {op}, largest error" in found[f"{op}, kernel"].detail
        assert "standard nodes, largest error" in found[f"{op}, function"].detail


def test_the_numpy_convolution_is_the_definition():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(2, 7, 3)), rng.normal(size=(3, 4)), rng.normal(size=3)
    state = rng.normal(size=(2, 3, 3))
    got, last = doctor.causal_conv1d_numpy(x, weight, bias, state)
    np.testing.assert_array_equal(last, x[:, 4:])
    short = doctor.causal_conv1d_numpy(x[:, :1], weight, bias, state)[1]
    np.testing.assert_array_equal(short, [[state[b, 1], state[b, 2], x[b, 0]] for b in range(2)])
    for b in range(2):
        for t in range(7):
            for c in range(3):
                seen = [x[b, i, c] if i >= 0 else state[b, i + 3, c] for i in range(t - 3, t + 1)]
                s = bias[c] + sum(weight[c, k] * seen[k] for k in range(4))
                assert got[b, t, c] == pytest.approx(s / (1 + np.exp(-s)))


def test_the_numpy_dual_is_the_table_of_cases():
    inputs = selfcheck.dual_inputs()
    case = DualCase(2, 9, 4, 3, 5, 2)
    for got, want in zip(selfcheck.state_space_dual_numpy(**inputs), dual_oracle(case, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


def failed(found: dict[str, Row]) -> dict[str, Row]:
    """The failed rows; each has a fix on one line."""
    bad = {name: r for name, r in found.items() if r.status == "FAILED"}
    assert all(r.fix and "\n" not in r.fix + r.detail for r in bad.values())
    return bad


def test_a_missing_library_fails_and_the_functions_still_pass(monkeypatch):
    def missing() -> Path:
        raise BackendError("libhcmen_ops.so was not found in /nowhere")

    monkeypatch.setattr(library, "library_path", missing)
    found = rows()
    assert list(failed(found)) == ["kernel library"]
    assert found["SelectiveScan, kernel"].status == found["CausalConv1d, kernel"].status == "skipped"
    assert found["SelectiveScan, function"].status == found["CausalConv1d, function"].status == "ok"
    done = run(main)
    assert done.code == 1
    assert done.lines[1:] == [f"error: 1 of {len(NAMES)} checks failed: kernel library"]
    assert "fix: reinstall hcmen with a C++17 compiler present" in done.out


def test_a_library_that_exists_and_does_not_load_fails(monkeypatch, tmp_path):
    (tmp_path / "libhcmen_ops.so").write_bytes(b"\x7fELF and nothing behind it")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "libhcmen_ops.so")
    library.load_library.cache_clear()
    try:
        assert "cannot be loaded" in failed(rows())["kernel library"].detail
    finally:
        library.load_library.cache_clear()


def test_wrong_numbers_are_found(monkeypatch):
    """A kernel that is off by a thousandth: existence and loading would not have shown it."""
    real = selfcheck.operators_run

    def off(*arguments: object, **options: object) -> object:
        outputs, operators = real(*arguments, **options)
        return [o * 1.001 for o in outputs], operators

    monkeypatch.setattr(selfcheck, "operators_run", off)
    bad = failed(rows())
    assert list(bad) == [n for n in NAMES if n.endswith(("function", "kernel"))]
    assert all("off by 1.0e-03 of" in r.detail for r in bad.values())


def test_a_library_whose_kernels_stay_idle_is_found(monkeypatch):
    real = selfcheck.operators_run

    def without_library(
        ort: object, model: object, inputs: object, library: object = None, **options: object
    ) -> object:
        return real(ort, model, inputs, None, **options)

    monkeypatch.setattr(selfcheck, "operators_run", without_library)
    bad = failed(rows())
    assert list(bad) == ["SelectiveScan, kernel", "CausalConv1d, kernel", "StateSpaceDual, kernel"]
    assert all("its kernel did not run" in r.detail for r in bad.values())


def test_two_onnxruntimes_at_once_are_told(monkeypatch):
    versions = {"onnxruntime": "1.20.0", "onnxruntime-gpu": "1.21.0"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    found = rows()
    row = failed(found)["onnxruntime"]
    assert (
        row.detail
        == "onnxruntime 1.20.0 and onnxruntime-gpu 1.21.0 are both installed and overwrite each other's files"
    )
    assert row.fix == "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'hcmen[cpu]'"
    assert {found[n].status for n in NAMES if n.endswith(("function", "kernel"))} == {"skipped"}


def test_a_missing_onnxruntime_is_told_once(monkeypatch, shared_bundle):
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = rows(shared_bundle)
    assert list(failed(found)) == ["onnxruntime"]
    assert found["onnxruntime"].fix == "pip install 'hcmen[cpu]'"
    assert found["bundle"].detail.endswith("every file as listed; not run, needs onnxruntime")


def test_a_bundle_with_wrong_weights_fails_its_self_test(tmp_path):
    bundle = make_bundle(tmp_path / "b", ("full", "text_only"), scale=1.01)
    row = failed(rows(bundle))["bundle"]
    assert row.detail.endswith("self-test failed for full, text_only")


def test_the_bundle_is_that_of_the_working_directory_or_the_demo(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    found = rows()["bundle"]
    assert found.status == "ok"
    assert found.detail.startswith(f"{shipped.DEMO / 'bundle'}: 7 variants, ")
    with monkeypatch.context() as stripped:
        stripped.setattr(shipped, "DEMO", tmp_path / "none")
        assert rows()["bundle"] == Row("bundle", "info", "none at build/bundle; name one with --bundle")
    make_bundle(tmp_path / "build" / "bundle", ("text_only",))
    found = rows()["bundle"]
    assert found.status == "ok"
    assert found.detail.startswith("build/bundle: 1 variants, 0.0 MiB, every file as listed; self-test passed")


def test_torch_is_looked_for_and_not_imported(monkeypatch):
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert rows()["torch"] == Row("torch", "info", "not installed; scoring does not need it")


def test_an_unexpected_error_is_a_row_too(monkeypatch):
    def explode() -> str:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(doctor, "_numpy", explode)
    assert failed(rows())["numpy"].detail == "ZeroDivisionError: division by zero"


def no_schema(bundle: Path) -> None:
    path = bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema_version": 9}))


@pytest.mark.parametrize(
    ("provoke", "detail", "fix"),
    [
        (lambda b: (b / "weights.bin").write_bytes(b"x"), "1 bytes, the manifest says", "copy or export the bundle"),
        (lambda b: (b / "full.onnx").unlink(), "missing from the bundle", "copy or export the bundle again"),
        (lambda b: (b / "manifest.json").unlink(), "no manifest.json in it", "name the folder that hcmen-export wrote"),
        (no_schema, "schema_version is 9", "upgrade hcmen, or export the bundle again"),
    ],
)
def test_the_advice_on_a_bundle_is_that_of_its_cause_and_told_once(tmp_path, provoke, detail, fix):
    bundle = make_bundle(tmp_path / "b", ("full",))
    provoke(bundle)
    row = failed(rows(bundle))["bundle"]
    assert detail in row.detail
    assert row.fix.startswith(fix)
    assert run(main, "--bundle", bundle).out.count(row.fix) == 1
