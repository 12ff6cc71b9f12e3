"""The exceptions of hcmen, and the exit code each one becomes on the command line.

HcmenError
├── CheckFailed           exit 1   parity, metric or doctor said no
├── InputError            exit 2   usage or bad input: a clip, an argument, a data file's content
├── BackendError          exit 3   a backend, library or device is missing or refuses to work
└── CorruptFileError      exit 5   a file is damaged, altered or unsafe

Every message is one line: what came, what was expected, what to do. An error has these as parts, so that who passes it
on changes a part (`but`) and never the text.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable

__all__ = [
    "BackendError",
    "CheckFailed",
    "CorruptFileError",
    "HcmenError",
    "InputError",
    "did_you_mean",
    "reason_of",
    "several_names",
    "shortened",
    "shown",
    "unknown_name",
]

EXIT_INTERRUPTED = 130

_MOST_QUOTED = 200
# An apostrophe within or after a word opens no quotation.
_MOST_WORDS = 1000
_LONG_QUOTATION = re.compile(rf"""(?<!\w)(['"])((?:(?!\1).){{{_MOST_QUOTED}}})(?:(?!\1).)+\1""")


class HcmenError(Exception):
    """Base of every expected error; `exit_code` is what a command line ends with.

    Attributes:
        where: the file or object that it is about; None where `what` says it.
        what: what came.
        expected: what should have come; None where `what` says it or nothing else can.
        fix: what to do; None if that is plain.
    """

    exit_code = 2

    def __init__(
        self, what: str = "", expected: str | None = None, fix: str | None = None, *, where: str | None = None
    ) -> None:
        super().__init__(what)
        self.where, self.what, self.expected, self.fix = where, what, expected, fix

    def but(self, *, where: str | None = None, expected: str | None = None, fix: str | None = None) -> HcmenError:
        """The same error with the parts that are given in the place of its own; an empty one leaves its own out."""
        other = copy.copy(self)
        given = {"where": where, "expected": expected, "fix": fix}
        vars(other).update((name, part) for name, part in given.items() if part is not None)
        return other

    def __str__(self) -> str:
        """One line, `where: what, expected ...: fix`; long values in quotation marks are cut."""
        text = f"{self.where}: {self.what}" if self.where else f"{self.what}"
        text += f", expected {self.expected}" if self.expected else ""
        text += f": {self.fix}" if self.fix else ""
        return shortened(" ".join(map(str.strip, text.splitlines())))


def shortened(line: str) -> str:
    """`line` as one can read it: long quotations are cut, and of what is longer all the same begin and end are left.

    A path may have 4,096 bytes, and what is wrong with it stands behind it.
    """
    line = _LONG_QUOTATION.sub(r"\1\2...\1", line[: 1 << 16] + line[1 << 16 :][-_MOST_WORDS:])
    return line if len(line) <= _MOST_WORDS else f"{line[: _MOST_WORDS - 403]}...{line[-400:]}"


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


def reason_of(error: BaseException, most: int = 200) -> str:
    """What an error of another package says, on one line of at most `most` characters; its type if it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def shown(value: object) -> str:
    """`value` from a file that is not trusted, for a message: a plain value or a few numbers, or else its type."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python refuses to print the longest ones
        return f"a number of {value.bit_length()} bits"
    if type(value) is list and len(value) <= 8 and all(type(x) in (int, float) for x in value):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        text = repr(value[: _MOST_QUOTED + 1] if isinstance(value, (str, bytes)) else value)
        return text if len(text) <= _MOST_QUOTED + 2 else f"{text[:_MOST_QUOTED]}..."
    return f"of type {type(value).__name__}"


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """ "did you mean 'x'?" if one of `choices` is close to `name`, else nothing."""
    import difflib  # takes 8 ms, and errors alone need it

    # The search takes time by the product of the lengths, and `name` may come from a file. At difflib's
    # own cutoff of 0.6 cpu is close to gpu.
    near = difflib.get_close_matches(name.lower(), list(choices), n=1, cutoff=0.7) if len(name) <= 100 else []
    return f"did you mean '{near[0]}'?" if near else ""


def several_names(value: str, choices: Iterable[str]) -> tuple[str, ...]:
    """The names that `value` lists, as in "a,b", if it lists more than one and each is one of `choices`; else none."""
    names = tuple(part for part in re.split(r"[\s,;:+|]+", value) if part) if len(value) <= 1000 else ()
    return names if len(names) > 1 and set(names) <= set(choices) else ()


def unknown_name(what: str, name: object, choices: Iterable[str]) -> InputError:
    """The error that refuses `name`, which is no `what`: names the close one of `choices`, and all of them."""
    names = list(choices)
    fix = f"{did_you_mean(str(name), names)} choose from {', '.join(names)}".lstrip()
    return InputError(f"unknown {what} " + (f"'{name}'" if isinstance(name, str) else shown(name)), fix=fix)
