"""The exceptions of hcmen, and the exit code each one becomes on the command line.

HcmenError
├── CheckFailed           exit 1   parity, metric or doctor said no
├── InputError            exit 2   usage or bad input: a clip, an argument, a data file's content
├── BackendError          exit 3   a backend, library or device is missing or refuses to work
└── CorruptFileError      exit 5   a file is damaged, altered or unsafe

Every message is one line: what came, what was expected, what to do.
"""

from __future__ import annotations

__all__ = ["BackendError", "CheckFailed", "CorruptFileError", "HcmenError", "InputError"]

EXIT_INTERRUPTED = 130


class HcmenError(Exception):
    """Base of every expected error; `exit_code` is what a command line ends with."""

    exit_code = 2


class CheckFailed(HcmenError):
    """A check ran to its end and its answer is no."""

    exit_code = 1


class InputError(HcmenError):
    """The caller's argument, clip or data cannot be used as it is."""

    exit_code = 2


class BackendError(HcmenError):
    """A backend, shared library or device is missing, too old or does not work."""

    exit_code = 3


class CorruptFileError(HcmenError):
    """A file is truncated, altered, or asks for something unsafe."""

    exit_code = 5
