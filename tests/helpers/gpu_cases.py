"""A pytest plugin (`-p helpers.gpu_cases`): writes what became of each case into the file that HCMEN_GPU_CASES names.

The file is written again whenever a case begins or ends, so that it tells which case hung or crashed. Under xdist only
the process that hands out the cases writes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

MOST_NAMED, MOST_CHARACTERS = 20, 600


class Cases:
    """Counts, the first failures, and the cases that have begun and not ended."""

    def __init__(self, path: Path):
        self.path = path
        self.outcomes: dict[str, str] = {}
        self.failures: list[dict[str, str]] = []
        self.begun: dict[str, None] = {}
        self.last = ""

    def write(self) -> None:
        counts = [sum(o == wanted for o in self.outcomes.values()) for wanted in ("passed", "failed", "skipped")]
        data: dict[str, Any] = dict(zip(("passed", "failed", "not_run"), counts, strict=True))
        data |= {"failures": self.failures, "begun": list(self.begun)[:MOST_NAMED], "last_ended": self.last}
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(data), encoding="utf-8")
        part.replace(self.path)

    def ended(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        name = report.nodeid[-MOST_CHARACTERS:]
        if report.failed:
            if self.outcomes.get(name) != "failed" and len(self.failures) < MOST_NAMED:
                self.failures.append({"case": name, "why": str(report.longrepr)[-MOST_CHARACTERS:]})
            self.outcomes[name] = "failed"
        elif report.skipped or getattr(report, "when", "") == "call":
            self.outcomes.setdefault(name, report.outcome)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.ended(report)
        self.write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.begun[nodeid[-MOST_CHARACTERS:]] = None
        self.write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ended(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.last = nodeid[-MOST_CHARACTERS:]
        self.begun.pop(self.last, None)
        self.write()

    def pytest_sessionfinish(self) -> None:
        self.write()  # a worker of xdist that crashed has reported a failure, and no end


def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Cases(Path(os.environ["HCMEN_GPU_CASES"])))
