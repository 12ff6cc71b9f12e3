"""What a stream keeps of what came: frames, text, and exact times."""

from __future__ import annotations

import itertools
import math
import re
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hcmen.base.clip import TEXT_TOKENS, clip_from_arrays
from hcmen.base.errors import InputError, shown
from hcmen.base.inputs import Inputs

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["Frames", "Number", "Said", "Text", "exact"]

Number = int | float | str | Fraction | Decimal
"""A time or a rate: "30000/1001" and 29.97 are taken as they are written."""

_MOST_TOKENS = 1 << 16
_MOST_INT64 = (1 << 63) - 1
_WORDS = "words"
_ZERO = re.compile(r"[+-]?(0+\.?0*|\.0+)(e[+-]?[0-9]+)?(/[1-9][0-9]*)?", re.I)


@dataclass
class Said:
    """Checked text. kind: "text", "text_tokens" or "words". whole: replaces what was said. timed: (tick, token)."""

    kind: str
    whole: NDArray[Any] | None = None
    cut: int = 0
    timed: list[tuple[int, Any]] | None = None


class Frames:
    """The last `capacity` frames of one modality and their numbers, which count from 0 and leave out what was lost.

    They lie side by side in a buffer of twice that length: what lives is moved to the front when the end is reached,
    so that a window is one slice and memory stays as it is.
    """

    def __init__(self, ticks: int, features: int, capacity: int):
        self.ticks, self.features, self.capacity = ticks, features, capacity
        self.next = 0
        """The number of the next frame."""
        self._lost = 0  # frames numbered below were pushed out by newer ones
        self._values = np.empty((2 * capacity, features), np.float32)
        self._numbers = np.empty(2 * capacity, np.int64)
        self._first = self._last = 0

    def append(self, values: NDArray[np.float32]) -> None:
        """Adds the newest frames, [time, features]."""
        total, count = len(values), min(len(values), self.capacity)
        if self._last + count > 2 * self.capacity:
            live = min(self._last - self._first, self.capacity)
            self._values[:live] = self._values[self._last - live : self._last]
            self._numbers[:live] = self._numbers[self._last - live : self._last]
            self._first, self._last = 0, live
        end = self._last + count
        self._values[self._last : end] = values[total - count :]
        self._numbers[self._last : end] = np.arange(self.next + total - count, self.next + total)
        self.next += total
        self._last = end
        if total > count or end - self._first > self.capacity:
            self._first = max(self._first, end - self.capacity)
            self._lost = int(self._numbers[self._first])

    def lost_before(self, hop: int) -> int:
        """The first window of which no frame was pushed out; window k begins at tick k * `hop`."""
        return (self._lost - 1) * self.ticks // hop + 1 if self._lost else 0

    def between(self, first: int, last: int) -> NDArray[np.float32]:
        """A view [time, features] of the frames numbered from `first` to before `last` that are there."""
        start, end = self._places(first, last)
        return self._values[start:end]

    def next_tick(self, tick: int) -> int | None:
        """When the first frame from `tick` on that is there lies; None without one."""
        (place,) = self._places(-(-tick // self.ticks))
        return int(self._numbers[place]) * self.ticks if place < self._last else None

    def forget(self, number: int) -> None:
        """Lets go of the frames before `number`."""
        (self._first,) = self._places(number)

    def _places(self, *numbers: int) -> list[int]:
        """Where in the buffers the frames of these numbers are, or would be; a number may be of any size."""
        kept = [min(n, _MOST_INT64) for n in numbers]
        return [self._first + int(i) for i in np.searchsorted(self._numbers[self._first : self._last], kept)]

    def clear(self) -> None:
        """Gives the memory back."""
        self._values, self._numbers = self._values[:0].copy(), self._numbers[:0].copy()
        self._first = self._last = 0


class Text:
    """What is said: a text that holds until it is replaced, or tokens with times. wanted: the variant has text."""

    def __init__(self, model: Predictor, *, wanted: bool):
        self.wanted = wanted
        self.until = 0
        """The tick up to which text is known."""
        self._model = model
        self._kind = ""
        self._whole: NDArray[Any] | None = None
        self._cut = 0  # tokens of `_whole` that did not fit
        self._timed: deque[tuple[int, Any]] = deque()
        self._newest = 0  # the tick of the last token that came with a time
        self._latest = 0  # the tick of the first token of the last chunk
        self._came = self._counted = 0  # tokens with times, and those that lay in a window
        self._told: set[str] = set()

    def checked(self, text: str | Sequence[str] | ArrayLike, times: Any, free: Inputs, ticks_per_second: int) -> Said:
        """`text` as it can be added; raises InputError."""
        model = self._model
        if isinstance(text, str):
            if times is not None:
                raise InputError("one string came with text_times", "a list with a word for each time", where="stream")
            if not text.strip():
                return Said(TEXT_TOKENS, whole=np.zeros((3, 0), np.int64))
            tokens, dropped = model.encode(text)
            return Said(TEXT_TOKENS, whole=tokens, cut=dropped)
        if times is not None and not isinstance(text, np.ndarray) and _are_words(text):
            words = [str(w) for w in text]  # type: ignore[union-attr]
            model.encode(" ".join(words))
            return Said(_WORDS, timed=self._with_times(words, times, ticks_per_second))
        try:
            array = np.asarray(text)
        except ValueError:
            array = np.asarray(None)
        key = TEXT_TOKENS if array.dtype.kind in "iu" else "text"
        if array.size == 0:
            return (
                Said(key, whole=array)
                if times is None
                else Said(key, timed=self._with_times([], times, ticks_per_second))
            )
        clip = clip_from_arrays("stream", {key: array}, model.inputs if times is None else free, model.clean)
        values: NDArray[Any] = array.astype(np.float32 if key == "text" else np.int64)
        if times is None:
            return Said(key, whole=values)
        steps = clip.features[key] if key == "text" and not clip.cleaned else values if key == "text" else values.T
        return Said(key, timed=self._with_times([np.array(step) for step in steps], times, ticks_per_second))

    def _with_times(self, tokens: Sequence[Any], times: Any, ticks_per_second: int) -> list[tuple[int, Any]]:
        try:
            count = len(times)
        except TypeError:
            raise InputError(f"text_times is of type {type(times).__name__}", "a list", where="stream") from None
        if count != len(tokens):
            raise InputError(f"{len(tokens)} tokens of text came with {count} times", "one each", where="stream")
        if len(self._timed) + count > _MOST_TOKENS:
            raise InputError(
                f"{len(self._timed) + count} tokens of text wait for their windows",
                f"at most {_MOST_TOKENS}",
                "their times are ahead of the frames, or seconds were given in another unit",
                where="stream",
            )
        seconds = [exact(t, "a time of the text", zero=True) for t in times]
        # A token lies in a window by its time; rounded down to a tick it lies in the same ones.
        ticks = [math.floor(t * ticks_per_second) for t in seconds]
        for before, tick in zip([self._newest, *ticks], ticks, strict=False):
            if tick < before:
                raise InputError(
                    f"the times of the text fall from {before / ticks_per_second:g} to {tick / ticks_per_second:g} s",
                    "each no earlier than the one before it",
                    where="stream",
                )
        return list(zip(ticks, tokens, strict=True))

    def add(self, said: Said) -> None:
        """Takes in what `checked` gave."""
        if said.timed is None:
            self._kind, self._whole, self._cut = said.kind, said.whole, said.cut
            self._timed.clear()
            return
        if said.kind != self._kind:
            self._timed.clear()
        self._kind, self._whole = said.kind, None
        self._timed.extend(said.timed)
        self._came += len(said.timed)
        if said.timed:
            self._latest, self._newest = said.timed[0][0], said.timed[-1][0]
            self.until = max(self.until, self._newest)

    def between(
        self, start: int, end: int, *, whole: bool = True
    ) -> tuple[dict[str, NDArray[Any]], Sequence[str], int]:
        """The text of a window as arrays, or as words; and how many tokens did not fit.

        Of tokens with times the last ones are taken, of a text that was given whole the first. whole: whether the
        window may have such a text.
        """
        if self._whole is not None and self._whole.size:
            return ({self._kind: self._whole}, (), self._cut) if whole else ({}, (), 0)
        until_end = itertools.takewhile(lambda timed: timed[0] < end, self._timed)
        tokens = [token for tick, token in until_end if tick >= start]
        self._counted += len(tokens)
        if self._kind == _WORDS or not tokens:
            return {}, tokens, 0
        most = self._model.inputs.modality("text").max_steps
        array = np.stack(tokens[-most:], axis=0 if self._kind == "text" else 1)
        return {self._kind: array}, (), max(0, len(tokens) - most)

    def next_tick(self, tick: int) -> int | None:
        """When the first token with a time from `tick` on lies; None without one."""
        return next((t for t, _ in self._timed if t >= tick), None)

    def of_another_clock(self, frames: int, ahead: int, passed: int, ticks_per_second: int) -> list[str]:
        """Warnings, each once in a stream, about tokens whose times cannot be those of the frames.

        Args:
            frames: the tick that the frames have reached. ahead: from where on a token is too far ahead of them.
            passed: the start of the first window that is neither scored nor passed over.
        """
        told = []
        at, now = (f"{t / ticks_per_second:.12g}" for t in (self._newest, frames))
        if self._timed and self._timed[0][0] > ahead and "ahead" not in self._told:
            self._told.add("ahead")
            told.append(
                f"text is stamped up to {at} s where the frames are at {now} s, so it counts in no window: give "
                "text_times in seconds of the frames' clock, which starts at 0"
            )
        if self._timed and self._latest < passed and "late" not in self._told:
            self._told.add("late")
            told.append(
                f"text stamped {self._latest / ticks_per_second:.12g} s came after the windows that it lies in, "
                f"with the frames at {now} s: give a delay if it comes late, or text_times of the frames' clock"
            )
        return told

    def never_counted(self, ticks_per_second: int) -> str | None:
        """A warning where tokens with times came and none lay in a window, unless one was given before."""
        if not self._came or self._counted or self._told:
            return None
        self._told.add("never")
        return (
            f"none of {self._came} tokens of text lay in a window, the last is stamped "
            f"{self._newest / ticks_per_second:.12g} s: give text_times in seconds of the frames' clock, which starts "
            "at 0"
        )

    def encoded(self, words: Sequence[str]) -> tuple[NDArray[np.int64], int]:
        """Tokens of the last words that fit, and how many words did not."""
        kept = list(words)
        while True:
            encoded = self._model.encode(" ".join(kept))
            if not encoded.dropped or len(kept) == 1:
                return encoded.tokens, len(words) - len(kept)
            # No word is more than a few tokens, and none is less than one.
            kept = kept[min(len(kept) - 1, -(-encoded.dropped // 4)) :]

    def forget(self, start: int | None) -> None:
        """Lets go of tokens before tick `start`, or of everything."""
        if start is None:
            self._timed.clear()
            self._whole = None
        while self._timed and start is not None and self._timed[0][0] < start:
            self._timed.popleft()


def exact(value: Number, what: str, *, zero: bool = False) -> Fraction:
    """The number as it is written: 0.1 is a tenth, "30000/1001" is that fraction.

    Args:
        value: a number or its text. what: what to call it in messages. zero: whether it may be 0.

    Raises:
        InputError: not a number, not positive, beyond 1e12, or below 1e-12; with `zero`, above 0 and below 1e-30.
    """
    least = 1e-30 if zero else 1e-12  # a difference of two times may be next to nothing
    number = None
    try:
        text = str(value).strip()
    except ValueError:  # a whole number of more than 4,300 digits
        text = shown(value)
    try:
        parts = [float(part) for part in text.split("/")]
        if len(text) <= 64 and all(least <= abs(p) <= 1e12 for p in parts):
            number = Fraction(text)
        elif zero and len(text) <= 64 and _ZERO.fullmatch(text):
            number = Fraction(0)  # Fraction multiplies out the power of ten behind a zero too
    except (ValueError, ZeroDivisionError):
        pass
    if number is None or isinstance(value, bool) or number < 0:
        expected = "a number from 0 on, at most 1e12" if zero else "a positive number, from 1e-12 to 1e12"
        raise InputError(f"{what} is {text[:80]!r}", expected, where="stream")
    return number


def _are_words(text: Any) -> bool:
    return isinstance(text, Sequence) and len(text) > 0 and all(isinstance(w, str) and w.strip() for w in text)
