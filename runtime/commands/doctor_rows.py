"""The findings that hcmen-doctor is made of."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAILED", "INFO", "OK", "SKIPPED", "Row"]

OK, FAILED, INFO, SKIPPED = "ok", "FAILED", "info", "skipped"


@dataclass(frozen=True)
class Row:
    """One finding. status: "ok", "FAILED" (then `fix` says what to do), "info", or "skipped" for a cause above it."""

    name: str
    status: str
    detail: str
    fix: str = ""
