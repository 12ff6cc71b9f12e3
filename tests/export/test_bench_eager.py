"""The rows of `hcmen-bench` that need PyTorch: they run in a process of their own, and wrong numbers are seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.command import run
from helpers.micro import MICRO, micro_bundle_at

from hcmen.base.bundle import file_record, read_bundle
from hcmen.base.errors import BackendError, InputError
from hcmen.runtime.benchmark.command import main
from hcmen.runtime.benchmark.peers import PeerProcess, PeerRunner, check_checkpoint
from hcmen.runtime.benchmark.rows import Measured, Row, judged, make_work

torch = pytest.importorskip("torch")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """The checkpoint of a random model of the smallest size."""
    from hcmen.models.hcmen.model import HCMEN
    from hcmen.training.checkpoint import save_checkpoint
    from hcmen.training.config import TrainConfig

    folder = tmp_path_factory.mktemp("train")
    torch.manual_seed(1)
    save_checkpoint(folder, HCMEN(MICRO), TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
    return folder


@pytest.fixture(scope="module")
def bundle(checkpoint, tmp_path_factory) -> Path:
    """The micro bundle with this checkpoint's eager outputs as golden set of `text_only`; the graphs are others."""
    from hcmen.export.parity import eager_outputs

    path = micro_bundle_at(tmp_path_factory.mktemp("bench") / "bundle")
    golden = path / "golden" / "text_only.npz"
    with np.load(golden) as stored:
        arrays = dict(stored)
    for case in sorted({k.partition("/")[0] for k in arrays}):
        inputs = {n: arrays[f"{case}/{n}"] for n in ("text", "text_length")}
        arrays |= {f"{case}/{n}": x for n, x in eager_outputs(checkpoint, "text_only", inputs).items()}
    np.savez(golden, **arrays)
    manifest = json.loads((path / "manifest.json").read_text())
    record = file_record(golden, path)
    manifest["variants"]["text_only"]["golden"] |= {"sha256": record.sha256, "bytes": record.bytes}
    manifest["source"]["checkpoint_sha256"] = file_record(checkpoint / "checkpoint.safetensors", checkpoint).sha256
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


@pytest.fixture(scope="module")
def process(checkpoint, tmp_path_factory):
    with PeerProcess(str(checkpoint), tmp_path_factory.mktemp("peers")) as running:
        yield running


def runner(process, bundle, folder, engine, reference=None) -> PeerRunner:
    opened = read_bundle(bundle)
    work = make_work(opened, "text_only", 2, folder)
    measured = Measured(Row("", "text_only", engine, "fp32", 1, 2), work)
    return PeerRunner(measured, process, opened, reference or process.outputs("eager", "text_only", 1, work.feeds))


@pytest.mark.parametrize("engine", ["eager", "eager-reference"])
def test_eager_rows_are_right_and_take_their_turns(process, bundle, tmp_path, engine):
    row = runner(process, bundle, tmp_path, engine)
    checks = row.check()
    assert set(checks) == {f"{a} {b}" for a in ("golden", "timed") for b in ("score", "modality_weights")}
    assert all(c.passed for c in checks.values())
    taken = row.time_runs(1, 3)
    assert len(taken) == 3
    assert all(1e3 < ns < 60e9 for ns in taken)
    assert row.time_calls(1, 3) == []
    assert process.versions["torch"] == torch.__version__


def test_a_row_with_wrong_numbers_says_so(process, bundle, tmp_path):
    row = runner(process, bundle, tmp_path, "eager")
    wrong = [{name: x + 1e-3 for name, x in feed.items()} for feed in row._reference]
    row = runner(process, bundle, tmp_path, "eager", wrong)
    judged(row.measured, row.check())
    assert (row.measured.status, row.measured.exit_code) == ("wrong", 1)
    assert "timed score differs from eager: FAILED" in row.measured.reason


def test_what_goes_wrong_in_the_child_comes_back_as_one_line(process, bundle, tmp_path):
    with pytest.raises(InputError, match="unknown engine 'lazy'"):
        process.outputs("lazy", "text_only", 1, make_work(read_bundle(bundle), "text_only", 1, tmp_path).feeds)
    with pytest.raises(InputError, match="no such file or directory, expected a checkpoint"):
        PeerProcess(str(tmp_path), tmp_path).__enter__()


def test_a_child_that_is_killed_is_told_of(checkpoint, tmp_path):
    with PeerProcess(str(checkpoint), tmp_path) as running:
        running._child.kill()
        with pytest.raises(BackendError, match="was killed by signal 9"):
            running.ask({"do": "hello"})


def test_the_checkpoint_must_be_the_bundles(checkpoint, micro_bundle):
    with pytest.raises(InputError, match="not the checkpoint that"):
        check_checkpoint(str(checkpoint), read_bundle(micro_bundle))


def test_the_command_puts_eager_beside_a_row_of_ours_that_is_wrong(bundle, checkpoint):
    """The graphs are of other weights than the golden set here: they must not be timed, the eager model must."""
    done = run(
        main,
        *(bundle, "--variant", "text_only", "--against", "eager", "--checkpoint", checkpoint, "--threads", 1),
        *("--rounds", 2, "--calls", 2, "--warmup", 1, "--loads", 1, "--format", "json"),
    )
    rows = {r["engine"]: r for r in json.loads(done.out)["rows"]}
    assert done.code == 1
    assert (rows["ort"]["status"], rows["ort"]["run"]) == ("wrong", None)
    assert rows["eager"]["status"] == "ok"
    assert rows["eager"]["run"]["n"] == 4
