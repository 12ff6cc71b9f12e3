"""Rows of what a user would run instead, in PyTorch: eager, eager on the reference scan, `torch.compile` of either.

PyTorch never enters this process. A child runs `hcmen.export.bench_eager` and takes its turns when it is told to, so
that its rows alternate with ours round by round; while others have their turn it waits in a read and burns nothing.
Words go over its stdin and stdout as lines of JSON, arrays through .npz files in a folder of ours.

A row of eager PyTorch is checked on the golden inputs of the bundle, every row on the very inputs that are timed,
against eager. A compiled row is not run on the golden inputs, since each of their shapes would be compiled anew.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hcmen.base.bundle import CHECKPOINT_FILE, Bundle, check_no_bundle, file_record
from hcmen.base.console import one_line
from hcmen.base.errors import BackendError, InputError
from hcmen.runtime.benchmark.rows import Arrays, Measured, Work, check_golden, check_outputs
from hcmen.runtime.compare import SCORE_ATOL, SCORE_RTOL, Comparison

__all__ = ["CHILD", "PEERS", "PeerProcess", "PeerRunner", "check_checkpoint"]

PEERS = ("eager", "eager-reference", "compile", "compile-reference")
"""eager: on our C++ kernels. -reference: on `selective_scan_ref`, plain PyTorch. compile: by torch.compile."""

CHILD = "hcmen.export.bench_eager"
"""The module that the child runs; loaded by name, there alone."""

_BOUND = (SCORE_ATOL, SCORE_RTOL)


def check_checkpoint(checkpoint: str, bundle: Bundle) -> None:
    """Whether `checkpoint` is there, is what `bundle` was exported from, and PyTorch could run it.

    Raises:
        BackendError: torch is not installed. InputError: no such folder, or the checkpoint of another bundle.
    """
    if find_spec("torch") is None:
        raise BackendError("torch is not installed, and --against eager or compile runs it: pip install 'hcmen[train]'")
    folder = Path(checkpoint)
    weights = folder / CHECKPOINT_FILE
    if not weights.is_file():
        check_no_bundle(folder, "a checkpoint folder of hcmen-train", "name the one it was exported from")
        raise InputError(f"{checkpoint}: no checkpoint there, expected what hcmen-train wrote: name it by --checkpoint")
    wanted = bundle.manifest.source.get("checkpoint_sha256")
    if wanted is not None and file_record(weights, folder).sha256 != wanted:
        raise InputError(
            f"{weights}: not the checkpoint that {bundle.path} was exported from: name the right one by --checkpoint"
        )


class PeerProcess:
    """The child with PyTorch in it. A context: it ends with the block, however the block ends.

    Args:
        checkpoint: the folder. folder: for the arrays that go back and forth.

    Raises:
        BackendError: it did not start, or ended early; its last words are in the message.
    """

    def __init__(self, checkpoint: str, folder: Path):
        self._folder, self._count = folder, 0
        self._log = open(folder / "peers.log", "w+", errors="replace")  # noqa: SIM115 (closed in __exit__)
        # A session of its own: Ctrl-C is for us, and we end it.
        self._child = subprocess.Popen(
            [sys.executable, "-m", CHILD, checkpoint],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.pid = self._child.pid
        self.versions: dict[str, str] = {}

    def __enter__(self) -> PeerProcess:
        try:
            self.versions = self.ask({"do": "hello"})["versions"]
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            # It ends when its stdin does; one that is compiling is not waited for.
            self._child.wait(timeout=5 if kind is None else 0.2)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        if self._child.stdout is not None:
            self._child.stdout.close()
        self._log.close()

    def ask(self, words: Mapping[str, Any]) -> dict[str, Any]:
        """What the child answers; raises InputError or BackendError when it refuses, BackendError when it is gone."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        try:
            self._child.stdin.write(json.dumps(words) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self._child.wait()
            self._log.seek(0)
            last = [text for text in self._log.read().splitlines() if text.strip()]
            how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
            raise BackendError(f"the process that runs PyTorch {how}: {one_line(last[-1] if last else 'no message')}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            kind = InputError if answer["exit_code"] == 2 else BackendError
            raise kind(answer["error"])
        return answer

    def send(self, feeds: Sequence[Mapping[str, NDArray[Any]]]) -> str:
        """The path of a file with graph inputs, for the child."""
        self._count += 1
        path = self._folder / f"peer-{self._count}.npz"
        arrays: dict[str, Any] = {f"{i}/{name}": x for i, feed in enumerate(feeds) for name, x in feed.items()}
        np.savez(path, **arrays)
        return str(path)

    def outputs(self, engine: str, variant: str, threads: int, feeds: Sequence[Arrays]) -> list[Arrays]:
        """What the model says to `feeds`, one dict of outputs for each."""
        sent = self.send(feeds)
        answer = self.ask({"do": "run", "engine": engine, "variant": variant, "threads": threads, "inputs": sent})
        results: list[Arrays] = [{} for _ in feeds]
        with np.load(answer["outputs"], allow_pickle=False) as stored:
            for key in stored.files:
                place, _, name = key.partition("/")
                results[int(place)][name] = stored[key]
        for path in (sent, answer["outputs"]):
            Path(path).unlink(missing_ok=True)
        return results


class PeerRunner:
    """A row in the child. bundle: whose golden inputs check it. reference: eager's outputs on the timed inputs."""

    def __init__(self, measured: Measured, process: PeerProcess, bundle: Bundle, reference: Sequence[Arrays]):
        self.measured = measured
        self._process, self._bundle, self._reference = process, bundle, reference
        self.pid: int | None = process.pid
        self._inputs = ""

    @property
    def _who(self) -> dict[str, Any]:
        row = self.measured.row
        return {"engine": row.engine, "variant": row.variant, "threads": row.threads}

    def _outputs(self, feeds: Sequence[Arrays]) -> list[Arrays]:
        row = self.measured.row
        assert row.threads is not None
        return self._process.outputs(row.engine, row.variant, row.threads, feeds)

    def check(self) -> dict[str, Comparison]:
        """On the golden inputs, unless it is compiled; on the timed ones, against eager."""
        row, work = self.measured.row, _work(self.measured)
        checks = {}
        if not row.engine.startswith("compile"):
            checks = check_golden(self._bundle, row.variant, _BOUND, lambda feed: self._outputs([dict(feed)])[0])
        return checks | check_outputs(self._outputs(work.feeds), self._reference, _BOUND)

    def load(self) -> tuple[float, float] | None:
        """None: what PyTorch takes to load is measured in fresh processes (cold.py)."""
        return None

    def time_runs(self, settle: int, calls: int) -> list[int]:
        """Forward passes, from NumPy arrays to NumPy arrays."""
        if not self._inputs:
            self._inputs = self._process.send(_work(self.measured).feeds)
        words = {"do": "time", **self._who, "inputs": self._inputs, "settle": settle, "calls": calls}
        taken: list[int] = self._process.ask(words)["ns"]
        return taken

    def time_calls(self, settle: int, calls: int) -> list[int]:
        """None of these: there is no end-to-end call of the eager model."""
        return []


def _work(measured: Measured) -> Work:
    assert measured.work is not None
    return measured.work
