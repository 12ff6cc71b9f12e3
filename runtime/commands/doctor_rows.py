"""The findings that hcmen-doctor is made of."""

from __future__ import annotations

from dataclasses import dataclass

from hcmen.base.console import one_line
from hcmen.base.errors import HcmenError

__all__ = ["FAILED", "INFO", "OK", "SKIPPED", "Row", "failed"]

OK, FAILED, INFO, SKIPPED = "ok", "FAILED", "info", "skipped"


@dataclass(frozen=True)
class Row:
    """One finding. status: "ok", "FAILED" (then `fix` says what to do), "info", or "skipped" for a cause above it.

    A failure's detail may end with the same advice.
    """

    name: str
    status: str
    detail: str
    fix: str = ""


def failed(name: str, error: Exception, fix: str) -> Row:
    """The row of a check that raised `error`: its own advice fits its cause, and `fix` is for an error without."""
    if not isinstance(error, HcmenError):
        return Row(name, FAILED, f"{type(error).__name__}: {one_line(error)}", fix)
    return Row(name, FAILED, one_line(error), one_line(error.fix or fix))
