"""Runs suites beside each other and keeps what became of them in two files, whatever stops the run.

gpu.json and gpu.log are written again whenever a suite ends, a case of one ends, or its result changes. Together they
stay below 16 MiB, whatever the suites print. Standard library only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from suites import Suite

HERE = Path(__file__).resolve().parent
RUNNING, PASSED, FAILED, SKIPPED = "running", "passed", "FAILED", "skipped"
TICK_S, WRITE_S, KILL_S = 0.1, 1.0, 1.0
"""How often suites are looked at, how often at most the files are written meanwhile, what a kill may take."""
MOST_OUTPUT = 64 << 20
"""A suite that printed more is ended, before it fills the disk."""
MOST_RESULT, MOST_JSON, MOST_LOG = 1 << 20, 5 << 20, 4 << 20
"""Bytes of one result, of gpu.json and of gpu.log. The new file lies beside the old one for a moment."""
TAIL = 3000
MOST_SHOWN = 5
"""Failed cases of a suite in the table; gpu.json has more."""
NO_CASES, SANITIZER_FOUND = 5, 9
"""Exit codes: of pytest where it found no cases, and of compute-sanitizer where it found a fault."""


def _signal(number: int) -> str:
    names = {s.value: s.name for s in signal.Signals}
    return names.get(number, f"signal {number}")


class Stop:
    """Which signal asked for the end, if any, and when all must end. Everything that waits looks at them, so that no
    process is left behind."""

    number, deadline = 0, float("inf")

    def left(self) -> float:
        """Seconds until all must end."""
        return self.deadline - time.monotonic()

    @property
    def reason(self) -> str:
        return f"stopped by {_signal(self.number)}"

    @contextlib.contextmanager
    def noticed(self, deadline: float) -> Iterator[None]:
        """Takes the signals that end programs, within the block."""
        self.number, self.deadline = 0, deadline

        def arrived(number: int, frame: object) -> None:
            self.number = self.number or number

        before = {s: signal.signal(s, arrived) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


STOP = Stop()


def say(text: str, error: bool = False) -> None:
    """Prints, and goes on where nobody reads any more."""
    stream = sys.stderr if error else sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _kill(process: subprocess.Popen[bytes]) -> int | None:
    """Ends the group of a process. Gives its exit code, or None where the kernel does not let go of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(KILL_S)
    return None


def ask(command: Sequence[str], seconds: float) -> tuple[int, str] | None:
    """Exit code and output of a short command; None if it did not end in time, or a signal arrived."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    end = min(time.monotonic() + seconds, STOP.deadline)
    while not STOP.number and time.monotonic() < end:
        with contextlib.suppress(subprocess.TimeoutExpired):
            output, _ = process.communicate(timeout=TICK_S)
            return process.returncode, output.decode(errors="replace")
    _kill(process)
    return None


def ends_of(path: Path, most: int) -> bytes:
    """The head and the tail of a file, in about `most` bytes; read as little of it."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        if size <= most:
            return file.read(most)
        half = most // 2
        head = file.read(half)
        file.seek(size - half)
        return head + f"\n... {size - 2 * half} bytes left out ...\n".encode() + file.read(half)


def _tail(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - most))
        return file.read(most).decode(errors="replace")


class State:
    """What became of every suite, and the two files that say so."""

    def __init__(self, out: Path | None, folder: Path, machine: Mapping[str, Any]):
        self.out, self.folder, self.machine = out, folder, machine
        self.results: dict[str, dict[str, Any]] = {}
        self.problem = ""

    def named(self, status: str) -> list[str]:
        return [name for name, r in self.results.items() if r["status"] == status]

    def write(self, complete: bool = False) -> None:
        """Writes both anew. A disk that takes no more is told once, and the suites go on."""
        if self.out is None:
            return
        try:
            for name, content in (("gpu.json", self._json(complete)), ("gpu.log", self._log())):
                part = self.out / f"{name}.part"
                part.write_bytes(content)
                part.replace(self.out / name)
        except OSError as error:
            if not self.problem:
                say(f"the results cannot be written: {error}", error=True)
            self.problem = str(error)

    def _json(self, complete: bool) -> bytes:
        passed = complete and not self.named(FAILED)
        data = {"schema_version": 3, "machine": self.machine, "complete": complete, "passed": passed}
        suites = {name: dict(r) for name, r in self.results.items()}
        while True:
            content = (json.dumps({**data, "suites": suites}, indent=1) + "\n").encode()
            if len(content) <= MOST_JSON:
                return content
            with_result = [r for r in suites.values() if "result" in r]
            if not with_result:
                return content
            largest = max(with_result, key=lambda r: len(json.dumps(r["result"])))
            size = len(json.dumps(largest.pop("result")))
            largest["result_left_out"] = f"{size} characters, beyond the {MOST_JSON} bytes of this file"

    def _log(self) -> bytes:
        logs = [(name, self.folder / f"{name}.log") for name, r in self.results.items() if "seconds" in r]
        share = MOST_LOG // max(1, len(logs)) - 200
        return b"".join(
            f"=== {name} ===\n".encode() + ends_of(log, share) + b"\n" for name, log in logs if log.exists()
        )


class Running:
    """A suite in a process group of its own, its output in a file."""

    def __init__(self, suite: Suite, folder: Path, environment: Mapping[str, str], seconds: float, workers: int):
        self.suite, self.seconds = suite, seconds
        self.log = folder / f"{suite.name}.log"
        self.result = folder / (suite.result or f"{suite.name}.cases")
        self.seen, self.result_row = (0, 0), dict[str, Any]()
        self.result.unlink(missing_ok=True)
        command = [part.replace("{seconds}", f"{max(seconds - 60, seconds / 2):.0f}") for part in suite.command]
        if suite.tests:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "helpers.gpu_cases"]
            if workers > 1 and importlib.util.find_spec("xdist") is not None:
                command += ["-n", str(workers)]
            command += [str(HERE / name) for name in suite.tests]
        self.started = time.monotonic()
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**environment, "PYTHONUNBUFFERED": "1", "HCMEN_GPU_CASES": str(self.result)},
                cwd=folder,  # in the checkout itself, its folder `hcmen` would come first
                start_new_session=True,
            )

    def changed(self) -> bool:
        """Whether its result is another than at the last call."""
        try:
            found = self.result.stat()
        except OSError:
            return False
        before, self.seen = self.seen, (found.st_mtime_ns, found.st_size)
        if self.seen == before:
            return False
        self.result_row = self._read(found.st_size)
        return True

    def _read(self, size: int) -> dict[str, Any]:
        if size > MOST_RESULT:
            return {"result_left_out": f"{size} bytes, expected at most {MOST_RESULT}"}
        try:
            found = json.loads(self.result.read_bytes())
        except (OSError, ValueError, RecursionError):
            return {}
        if not self.suite.tests:
            return {"result": found}
        return {name: value for name, value in found.items() if value or name in ("passed", "failed", "not_run")}

    def row(self) -> dict[str, Any]:
        """What is known while it runs."""
        return {"status": RUNNING, "seconds": round(time.monotonic() - self.started, 1), **self.result_row}

    def ended(self) -> dict[str, Any] | None:
        """What became of it, once it has ended or had to be ended; None before."""
        reason = ""
        if STOP.number:
            reason = STOP.reason
        elif time.monotonic() - self.started > self.seconds:
            reason = f"stopped after {self.seconds:.0f} s"
        elif self.log.stat().st_size > MOST_OUTPUT:
            reason = f"stopped, it had printed more than {MOST_OUTPUT >> 20} MiB"
        if not reason and self.process.poll() is None:
            return None
        code = _kill(self.process)
        if code is None:
            reason += ", and the kernel does not let go of it"
        elif code < 0 and not reason:
            reason = f"ended by {_signal(-code)}"
        self.changed()
        row = {**self.row(), "status": FAILED if reason or code else PASSED}
        return self._judged(row, reason, code)

    def _judged(self, row: dict[str, Any], reason: str, code: int | None) -> dict[str, Any]:
        suite, tail = self.suite, _tail(self.log, TAIL)
        refusal = re.search(suite.refused, _tail(self.log, MOST_RESULT)) if suite.refused else None
        if refusal and not reason and code != SANITIZER_FOUND:
            return {**row, "status": SKIPPED, "reason": refusal[0].strip("= ")}
        if suite.tests and not row.get("passed") and not row.get("failed") and code in (0, NO_CASES):
            return {**row, "status": SKIPPED, "reason": "every case was skipped: see its log"}
        if suite.result and code == 0 and not reason and "result" not in row and "result_left_out" not in row:
            row["status"], reason = FAILED, "it ended well and wrote no result"
        if reason:
            row["reason"] = reason
        if row["status"] == FAILED:
            row["output_tail"] = tail
        return row


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per suite."""
    lines = []
    for name, r in results.items():
        counts = f"{r['passed']} passed, {r['failed']} failed, {r['not_run']} skipped" if "passed" in r else ""
        detail = ", ".join(part for part in (counts, r.get("reason"), r.get("result_left_out")) if part)
        lines.append(f"{r['status']:<8} {name:<14} {r.get('seconds', ''):>7}  {detail}")
        for failure in r.get("failures", ())[:MOST_SHOWN]:
            lines.append(f"           {failure['case']}")
        if r["status"] == FAILED and r.get("begun"):
            lines.append(f"           had begun and not ended: {', '.join(r['begun'])}")
    return "\n".join(lines)


def run_stage(suites: Sequence[Suite], state: State, environment: Mapping[str, str], share: float = 1.0) -> None:
    """Runs suites beside each other into the state. share: the part of the time left that is theirs."""
    running: list[Running] = []
    cases = sum(1 for s in suites if s.tests)
    workers = max(1, min(8, (os.cpu_count() or 1) // (2 * max(1, cases))))
    part = share * STOP.left()
    for suite in suites:
        seconds = min(suite.timeout_s, STOP.left(), max(part, suite.least_s))
        reason = STOP.reason if STOP.number else ""
        if not reason and STOP.left() < suite.least_s:
            reason = f"{max(0.0, STOP.left()):.0f} s are left, it takes at least {suite.least_s}"
        row = {"status": SKIPPED, "reason": reason}
        if not reason:
            try:
                running.append(Running(suite, state.folder, environment, seconds, workers))
                row = running[-1].row()
            except OSError as error:
                row = {"status": FAILED, "reason": f"it does not start: {error}"}
        state.results[suite.name] = row
        if row["status"] != RUNNING:
            say(table({suite.name: row}))
    try:
        _follow(running, state)
    finally:
        for one in running:
            _kill(one.process)


def _follow(running: list[Running], state: State) -> None:
    """Takes suites off the list as they end, and writes what changes meanwhile."""
    state.write()
    written = time.monotonic()
    while running:
        time.sleep(TICK_S)
        late, changed = time.monotonic() - written >= WRITE_S, False
        for one in list(running):
            ended = one.ended()
            if ended is not None:
                running.remove(one)
                state.results[one.suite.name] = ended
                say(table({one.suite.name: ended}))
                changed = late = True
            elif late and one.changed():
                state.results[one.suite.name] = one.row()
                changed = True
        if changed:
            state.write()
            written = time.monotonic()
        elif late:
            written = time.monotonic()
