"""Scores a live source window by window.

    stream = model.stream("auto", window=4, hop="0.5", rates={"audio": 100, "vision": "30000/1001"})
    for update in stream.push(audio=new_audio, vision=new_vision):
        print(update.end_seconds, update.score, update.latency_seconds)

Frame i of a modality with r frames per second lies at i / r seconds. Window k covers [k * hop, k * hop + window), and
in it lie the frames from ceil(start * r) to ceil(end * r) - 1. All times are whole multiples of one tick, the largest
fraction of a second that divides every one of them, and are counted in whole numbers of any size: nothing is rounded
but the seconds that an `Update` shows, and nothing drifts. A float is taken for the decimal that it prints as.

A gap costs nothing, however long: windows that hold no frame and no token are counted and passed over in one step.

A window is cut out, made a `Clip` and given to the `Predictor`, which is what an offline call does, so the scores are
those of the offline call to the last bit. docs/streaming.md says what is guaranteed.
"""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hcmen.base.clip import TEXT_TOKENS, Clip, clip_from_arrays
from hcmen.base.errors import HcmenError, InputError, shown
from hcmen.base.inputs import FeatureConfig, Inputs
from hcmen.base.modalities import MODALITIES, variant_named
from hcmen.runtime.stream_buffers import Frames, Number, Said, Text, exact

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["Counts", "Stream", "Update"]

_MOST_BUFFER_BYTES = 1 << 30
_MOST_STEPS = 1 << 40  # no bound on a chunk but what its sender had in memory
_MOST_FRAME = 1 << 62
"""The largest number of a frame: numbers are kept as int64."""
_FAR_AHEAD_SECONDS = 60
"""How far text may lie ahead of the frames, beyond a window and the delay, before its clock is doubted."""
_MOST_OVERLAP = 10_000
"""Windows over one moment, where text is the only clock; frames bound them by the steps that the model takes."""


@dataclass(frozen=True)
class Update:
    """The score of one window.

    index: k, see above. start_seconds, end_seconds: what it covers, its end left out. variant: the graph that scored
    it. score, modality_weights: as in `Result`. frames: modality -> steps that were there. cleaned: modality -> values
    set to zero by `clean`. cut: tokens of text that did not fit. partial: shorter than the window, from `flush`.

    run_seconds: the graph's run. latency_seconds: from the arrival of the frames that completed the window to its
    score, waiting included. late_seconds: by how much that is longer than the hop; 0.0 when the update was in time.
    missed: windows since the last update that have none, be it that they were dropped or that nothing was in them.
    """

    index: int
    start_seconds: float
    end_seconds: float
    variant: str
    score: float
    modality_weights: Mapping[str, float]
    frames: Mapping[str, int]
    cleaned: Mapping[str, int]
    cut: int
    partial: bool
    run_seconds: float
    latency_seconds: float
    late_seconds: float
    missed: int


@dataclass(frozen=True)
class Counts:
    """What became of the windows so far. scored: each an `Update`. late: those of them that took longer than a hop.

    dropped: passed over by a live stream, since they were late already and a newer one was ready. starved: a modality
    that the variant needs had no frame in them, or no modality had; a text without times alone makes no window. failed:
    the model raised an error.
    """

    scored: int = 0
    late: int = 0
    dropped: int = 0
    starved: int = 0
    failed: int = 0


class Stream:
    """Windows over growing audio, vision and text, from `Predictor.stream`. Several threads may push.

    Args:
        model: scores the windows. variant: which graph; "auto" takes, window by window, the one for what is there.
        window, hop: seconds. rates: modality -> frames per second, for audio and vision as far as they will come.
        delay: seconds for which a window waits after its end, for text that comes after the sound.
        patience: seconds by which a modality may lag behind the furthest one before windows go on without it; the
            window by default.
        live: the latest wins: when a window has waited for longer than a hop and a newer one is ready, go on with the
            newest and drop what lies between. False scores every window.

    Raises:
        InputError: a time or rate that cannot be used, such as a window longer than the model takes.
        CorruptFileError, BackendError: the named variant cannot be loaded.
    """

    def __init__(
        self,
        model: Predictor,
        variant: str = "auto",
        *,
        window: Number,
        hop: Number,
        rates: Mapping[str, Number],
        delay: Number = 0,
        patience: Number | None = None,
        live: bool = True,
    ):
        needed = None if variant == "auto" else variant_named(variant).present
        if needed is not None:
            model.bundle.variant(variant)
        length, step = exact(window, "window"), exact(hop, "hop")
        wait = exact(delay, "delay", zero=True)
        lag = length if patience is None else exact(patience, "patience")
        per_second = _checked_rates(rates, needed, model.inputs, length, step)
        self.variant, self.live = variant, live
        self._model, self._needed = model, needed

        times = [length, step, wait, lag, *(1 / r for r in per_second.values())]
        self._ticks = math.lcm(*(t.denominator for t in times))  # per second
        self._window, self._hop, self._delay, self._patience = (int(t * self._ticks) for t in times[:4])
        # A window, what may be there beyond it, and a hop, for a live source that is seldom asked for its updates.
        held = length + step + wait + 2 * lag
        self._frames: dict[str, Frames] = {}
        for m, rate in per_second.items():
            capacity = math.ceil(held * rate) + 2
            features = model.inputs.modality(m).features
            if 8 * capacity * features > _MOST_BUFFER_BYTES:
                raise InputError(
                    f"{float(held):g} s of {m} would have to be kept, {8 * capacity * features} bytes",
                    f"at most {_MOST_BUFFER_BYTES}",
                    "choose a shorter hop, delay or patience",
                    where="stream",
                )
            self._frames[m] = Frames(int(self._ticks / rate), features, capacity)
        if not per_second and length / step > _MOST_OVERLAP:
            raise InputError(
                f"a hop of {float(step):g} s lays {math.ceil(length / step)} windows over every token",
                f"at most {_MOST_OVERLAP}",
                "choose a longer hop",
                where="stream",
            )
        self._text = Text(model, wanted=needed is None or "text" in needed)
        self._free = _without_limits(model.inputs)

        self._lock = threading.Lock()  # over all that follows; held for no longer than a copy takes
        self._scoring = threading.RLock()  # one window at a time
        self._next = 0  # the first window that is neither scored nor passed over
        self._missed = 0
        self._arrivals: deque[tuple[int, float]] = deque()  # (windows ready from then on, when)
        self._stalled: frozenset[str] = frozenset()
        self._ignored: set[str] = set()
        self._kept: list[Update] = []
        self._problem: HcmenError | None = None
        self._counts = Counts()
        self._ended = self._closed = False
        if needed is not None:
            model.kernels(variant)  # loads the graph, which the first update should not wait for

    @property
    def counts(self) -> Counts:
        """What became of the windows so far."""
        with self._lock:
            return self._counts

    @property
    def positions(self) -> dict[str, float]:
        """modality -> seconds up to which its frames have come; that of a text with times is its last token's."""
        with self._lock:
            return {m: t / self._ticks for m, t in self._reached().items()}

    @property
    def stalled(self) -> tuple[str, ...]:
        """The modalities that lag behind the furthest one by more than the patience."""
        return tuple(m for m in MODALITIES if m in self._stalled)

    @property
    def ignored(self) -> tuple[str, ...]:
        """The modalities that came and that the variant does without."""
        return tuple(m for m in MODALITIES if m in self._ignored)

    def push(
        self,
        *,
        audio: ArrayLike | None = None,
        vision: ArrayLike | None = None,
        text: str | Sequence[str] | ArrayLike | None = None,
        text_times: Sequence[Number] | NDArray[Any] | None = None,
        arrived: float | None = None,
    ) -> list[Update]:
        """Appends what came and returns the updates that it made possible: `append`, then `updates`.

        With `live` off a chunk may be of any length; it is taken in by pieces, and every window of it is scored.

        Args:
            audio, vision: float [time, features], the next frames; any number of them, none included.
            text: with `text_times`, further tokens (features [time, features], tokens int64 [3, time], or a list of
                words) and the second of each, never falling; without, a text (features, tokens or words as one str)
                that takes the place of all text before and counts for every window scored from now on, until an empty
                one ends it.
            arrived: when the chunk came, by `time.perf_counter`, if that was before this call.

        Warns (RuntimeWarning), once each: a modality lags behind; the times of the text are of another clock than the
        frames', or come after all windows that they lie in.

        Raises:
            InputError: a chunk does not fit the model, or has NaN or infinite values and the model's `clean` is off;
                nothing of the call was taken in then. Or the stream has ended.
            HcmenError: scoring a window failed, the first if several did. The others were scored, and their updates
                are returned by the next call.
        """
        arrived = _checked_arrival(arrived)
        chunk = self._checked(audio, vision, text, text_times)
        if self.live:
            self._take_in(chunk, arrived)
            return self.updates()
        with self._scoring:
            self._score_ready()  # what `append` may have left
            for piece in self._pieces(chunk):
                self._take_in(piece, arrived)
                self._score_ready()
            return self._made()

    def append(
        self,
        *,
        audio: ArrayLike | None = None,
        vision: ArrayLike | None = None,
        text: str | Sequence[str] | ArrayLike | None = None,
        text_times: Sequence[Number] | NDArray[Any] | None = None,
        arrived: float | None = None,
    ) -> None:
        """Appends what came and scores nothing: for a thread that must not wait. Arguments and errors as for `push`.

        Raises:
            InputError: also, with `live` off, when frames of windows not scored yet would be lost.
        """
        arrived = _checked_arrival(arrived)
        self._take_in(self._checked(audio, vision, text, text_times), arrived)

    def updates(self) -> list[Update]:
        """Scores the windows that are ready and not dropped. Raises HcmenError as `push` does."""
        with self._scoring:
            self._score_ready()
            return self._made()

    def skip(self, modality: str, *, frames: int | None = None, until: Number | None = None) -> None:
        """Tells that frames were lost: the next ones pushed lie later by that much. Windows are scored without them.

        A gap of any length costs the same: windows in which nothing is left count as `starved`, in one step.

        Args:
            modality: audio or vision; or text, with `until`, to tell that nothing was said up to then.
            frames: how many were lost. until: or the second from which the next frames are; one of the two.

        Raises:
            InputError: not such a modality, or a time that has passed.
        """
        if (frames is None) == (until is None):
            raise InputError("skip: give either frames or until")
        if frames is not None and (not isinstance(frames, (int, np.integer)) or isinstance(frames, bool)):
            raise InputError(f"skip: frames is of type {type(frames).__name__}", "a whole number from 0 on")
        ticks = None if until is None else exact(until, "until", zero=True) * self._ticks
        with self._lock:
            self._check_open()
            found = self._frames.get(modality)
            if modality == "text" and ticks is not None and self._text.wanted:
                self._text.until = max(self._text.until, math.floor(ticks))
            elif found is None:
                raise InputError(f"skip: {modality!r} has no frames here, expected one of {', '.join(self._frames)}")
            else:
                number = found.next + int(frames or 0) if ticks is None else math.ceil(ticks / found.ticks)
                if number < found.next:
                    raise InputError(
                        f"skip: {modality} is at {found.next * found.ticks / self._ticks:g} s already, expected a "
                        "later time, or a number of frames from 0 on"
                    )
                if number > _MOST_FRAME:
                    raise InputError(f"skip: {modality} would go on beyond frame 2^62", "an earlier time")
                found.next = number
            told = self._note_arrival(time.perf_counter())
        self._warn(told)

    def flush(self, *, partial: bool = False) -> list[Update]:
        """The source has ended: the updates of the windows that still waited for a modality or for the delay.

        The stream takes no more frames after that.

        Args:
            partial: also score what came after the last whole window, with the frames before it that its window would
                have had; of a source shorter than one window, that is all there is.

        Raises:
            HcmenError: scoring a window failed; a second call returns the updates that were made.
        """
        with self._scoring:
            with self._lock:
                if not self._ended:
                    self._ended = True
                    self._note_arrival(time.perf_counter())
            self._score_ready()
            with self._lock:
                last = self._last_window() if partial and not self._closed else None
            if last is not None:
                self._score(last)
            self._warn([t for t in [self._text.never_counted(self._ticks)] if t and self._frames and self._next])
            return self._made()

    def close(self) -> None:
        """Lets go of all frames; the stream takes no more. The model stays as it is."""
        with self._scoring, self._lock:
            self._ended = self._closed = True
            self._next = max(self._next, self._ready())
            for frames in self._frames.values():
                frames.clear()
            self._text.forget(None)

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- taking in --------------------------------------------------------------------------------------------------

    def _checked(
        self,
        audio: ArrayLike | None,
        vision: ArrayLike | None,
        text: str | Sequence[str] | ArrayLike | None,
        text_times: Sequence[Number] | NDArray[Any] | None,
    ) -> _Chunk:
        """What came, checked as a clip is; nothing is changed yet."""
        chunk = _Chunk()
        for m, given in (("audio", audio), ("vision", vision)):
            if given is None:
                continue
            if m not in self._frames:
                if self._needed is not None:
                    self._ignored.add(m)
                    continue
                raise InputError(
                    f"{m} came, and this stream was made without its rate",
                    fix=f"give rates={{'{m}': frames per second}}",
                    where="stream",
                )
            try:
                array = np.asarray(given)
            except ValueError:
                array = np.asarray(None)  # ragged; refused by the check below
            if array.shape == (0, self._frames[m].features):
                continue
            checked = clip_from_arrays("stream", {m: array}, self._free, self._model.clean)
            chunk.frames[m] = checked.features[m] if m not in checked.cleaned else array.astype(np.float32)
        if text_times is not None and text is None:
            raise InputError("text_times came without text", "the second of each token of a text", where="stream")
        if text is not None:
            if self._text.wanted:
                chunk.said = self._text.checked(text, text_times, self._free, self._ticks)
                if not self._frames and chunk.said.whole is not None:
                    raise InputError(
                        "the text has no times, and this stream has no other clock",
                        fix="give text_times",
                        where="stream",
                    )
            else:
                self._ignored.add("text")
        return chunk

    def _pieces(self, chunk: _Chunk) -> Iterator[_Chunk]:
        """The chunk in the order of time, in pieces short enough for the buffers; the text comes with the first."""
        step = min(self._hop, self._patience)
        left = dict(chunk.frames)
        said = chunk.said
        reach = max(((self._frames[m].next + len(x)) * self._frames[m].ticks for m, x in left.items()), default=0)
        edge = 0
        while True:
            starts = [self._frames[m].next * self._frames[m].ticks for m in left]
            edge = max(edge, min(starts, default=0)) + step
            piece = _Chunk(said=said, reach=reach)
            for m in list(left):
                count = -(-edge // self._frames[m].ticks) - self._frames[m].next
                if count > 0:
                    piece.frames[m], left[m] = left[m][:count], left[m][count:]
                if not len(left[m]):
                    del left[m]
            yield piece
            said = None
            if not left:
                return

    def _take_in(self, chunk: _Chunk, arrived: float) -> None:
        with self._lock:
            self._check_open()
            if not self.live:
                self._check_room(chunk)
            told: list[str] = []
            if chunk.said is not None:
                self._text.add(chunk.said)
            for m, values in chunk.frames.items():
                self._frames[m].append(values)
            self._drop(max(f.lost_before(self._hop) for f in self._frames.values()) if self._frames else 0)
            if chunk.said is not None and self._frames:
                furthest = max(chunk.reach, *self._reached().values())
                ahead = furthest + self._window + self._delay + _FAR_AHEAD_SECONDS * self._ticks
                told = self._text.of_another_clock(furthest, ahead, self._next * self._hop, self._ticks)
            told += self._note_arrival(arrived)
        self._warn(told)

    def _warn(self, told: Sequence[str]) -> None:
        for text in told:
            warnings.warn(f"stream: {text}", RuntimeWarning, stacklevel=4)

    def _check_open(self) -> None:
        if self._ended:
            raise InputError("it has ended and takes no more frames", fix="make another one", where="stream")

    def _check_room(self, chunk: _Chunk) -> None:
        """Refuses a chunk that would push out frames of windows that are still to be scored."""
        for m, values in chunk.frames.items():
            frames = self._frames[m]
            needed = len(frames.between(-(-self._next * self._hop // frames.ticks), frames.next))
            if needed + len(values) > frames.capacity:
                raise InputError(
                    f"{len(values)} frames of {m} are more than it can keep beside those of windows not scored yet",
                    fix="call updates() more often, push in place of append, or use live=True",
                    where="stream",
                )

    def _drop(self, first: int) -> None:
        """Passes over the windows before `first`."""
        dropped = max(0, first - self._next)
        self._counts = dataclasses.replace(self._counts, dropped=self._counts.dropped + dropped)
        self._missed += dropped
        self._next += dropped
        while self._arrivals and self._arrivals[0][0] <= self._next:
            self._arrivals.popleft()

    def _note_arrival(self, arrived: float) -> list[str]:
        """Remembers when windows became ready; a warning for each modality that has now come to lag."""
        ready = self._ready()
        if ready > (self._arrivals[-1][0] if self._arrivals else self._next):
            self._arrivals.append((ready, arrived))
        reached = self._reached()
        furthest = max(reached.values())
        stalled = frozenset(m for m, t in reached.items() if furthest - t > self._patience)
        newly = sorted(stalled - self._stalled)
        self._stalled = stalled
        what = "windows are scored without it" if self._needed is None else "windows without it are passed over"
        return [
            f"{m} lags more than {self._patience / self._ticks:g} s behind, {what}: check its source and rate, and "
            "tell of lost frames with skip()"
            for m in newly
        ]

    def _reached(self) -> dict[str, int]:
        """modality -> the tick up to which it is known. Text has no frames, so it counts where nothing else does."""
        if not self._frames:
            return {"text": self._text.until}
        return {m: f.next * f.ticks for m, f in self._frames.items()}

    def _ready(self) -> int:
        """How many windows, from the first on, wait for nothing any more."""
        reached = self._reached()
        furthest = max(reached.values())
        if self._ended:
            return max(0, (furthest - self._window) // self._hop + 1)
        until = min(t for t in reached.values() if furthest - t <= self._patience)
        return max(0, (until - self._delay - self._window) // self._hop + 1)

    # --- scoring ----------------------------------------------------------------------------------------------------

    def _made(self) -> list[Update]:
        problem, self._problem = self._problem, None
        if problem is not None:
            raise problem
        made, self._kept = self._kept, []
        return made

    def _score_ready(self) -> None:
        while True:
            with self._lock:
                window = self._next_window()
            if window is None:
                return
            self._score(window)

    def _next_window(self) -> _Window | None:
        """The next window to score, its frames copied; those passed over are counted."""
        ready = self._ready()
        while self._next < ready:
            waited = time.perf_counter() - self._arrivals[0][1] if self._arrivals else 0.0
            self._drop(ready - 1 if self.live and waited > self._hop / self._ticks else 0)
            self._pass_empty(ready)
            if self._next >= ready:
                return None
            start = self._next * self._hop
            window = self._cut_out(start, start + self._window, partial=False)
            self._next += 1
            self._drop(0)
            self._forget()
            if window is not None:
                return window
        return None

    def _pass_empty(self, ready: int) -> None:
        """Counts the windows before `ready` that hold no frame and no token as starved, up to the next that may."""
        start = self._next * self._hop
        found = [self._text.next_tick(start), *(f.next_tick(start) for f in self._frames.values())]
        ticks = [t for t in found if t is not None]
        # The first window that ends after the tick; with a hop beyond the window it may begin after it too.
        first = (min(ticks) - self._window) // self._hop + 1 if ticks else ready
        empty = max(0, min(first, ready) - self._next)
        self._counts = dataclasses.replace(self._counts, starved=self._counts.starved + empty)
        self._missed += empty
        self._next += empty
        self._drop(0)
        self._forget()

    def _last_window(self) -> _Window | None:
        start = self._next * self._hop
        covered = start - self._hop + self._window if self._next else 0
        # A text's last token lies at the very end, which belongs to no window that ends there.
        end = max(self._reached().values()) + (not self._frames)
        if end <= max(start, covered):
            return None
        window = self._cut_out(start, end, partial=True)
        self._next += 1
        return window

    def _cut_out(self, start: int, end: int, *, partial: bool) -> _Window | None:
        """The window from tick `start` to before tick `end`; None, and counted, if it cannot be scored."""
        features: dict[str, NDArray[Any]] = {}
        for m, frames in self._frames.items():
            values = frames.between(-(-start // frames.ticks), -(-end // frames.ticks))
            if len(values):
                features[m] = values.copy()
        # Nobody knows whether an utterance without times still holds where no frame is.
        said, words, cut = self._text.between(start, end, whole=bool(features))
        present = {*features, *(["text"] if said or words else [])}
        arrived = self._arrivals[0][1] if self._arrivals and not partial else time.perf_counter()
        if not present or (self._needed is not None and not present.issuperset(self._needed)):
            self._counts = dataclasses.replace(self._counts, starved=self._counts.starved + 1)
            self._missed += 1
            return None
        missed, self._missed = self._missed, 0
        return _Window(self._next, start, end, {**features, **said}, words, cut, arrived, missed, partial)

    def _forget(self) -> None:
        """Lets go of what no window needs any more."""
        start = self._next * self._hop
        for frames in self._frames.values():
            frames.forget(-(-start // frames.ticks))
        self._text.forget(start)

    def _score(self, window: _Window) -> None:
        try:
            arrays, cut = dict(window.arrays), window.cut
            if window.words:
                arrays[TEXT_TOKENS], cut = self._text.encoded(window.words)
            tokens = arrays.pop(TEXT_TOKENS, None)
            clip = Clip(f"window {window.index}", arrays, text_tokens=tokens)
            result = self._model(clip, variant=self.variant)
        except HcmenError as error:
            self._problem = self._problem or error
            with self._lock:
                self._counts = dataclasses.replace(self._counts, failed=self._counts.failed + 1)
                self._missed += window.missed + 1
            return
        latency = time.perf_counter() - window.arrived
        late = max(0.0, latency - self._hop / self._ticks)
        used = variant_named(result.variant).present
        frames = {m: len(x) for m, x in arrays.items() if m in used}
        if tokens is not None:
            frames = {"text": tokens.shape[1], **frames}
        self._kept.append(
            Update(
                index=window.index,
                start_seconds=window.start / self._ticks,
                end_seconds=window.end / self._ticks,
                variant=result.variant,
                score=result.score,
                modality_weights=result.modality_weights,
                frames={m: frames[m] for m in MODALITIES if m in frames},
                cleaned=result.cleaned,
                cut=cut,
                partial=window.partial,
                run_seconds=result.run_seconds,
                latency_seconds=latency,
                late_seconds=late,
                missed=window.missed,
            )
        )
        with self._lock:
            self._ignored.update(m for m in result.ignored if m in MODALITIES)
            counts = self._counts
            self._counts = dataclasses.replace(counts, scored=counts.scored + 1, late=counts.late + (late > 0))


@dataclass(frozen=True)
class _Window:
    """A window cut out. start, end: ticks. arrays: as in a clip file. words: or the text in words, to be encoded."""

    index: int
    start: int
    end: int
    arrays: Mapping[str, NDArray[Any]]
    words: Sequence[str]
    cut: int
    arrived: float
    missed: int
    partial: bool


@dataclass
class _Chunk:
    """Checked input. frames: modality -> float32 [time, features]. reach: the tick that later pieces of it come to."""

    frames: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    said: Said | None = None
    reach: int = 0


def _checked_arrival(arrived: float | None) -> float:
    """The time of `time.perf_counter` at which a chunk came; raises InputError for one that cannot be."""
    now = time.perf_counter()
    if arrived is None:
        return now
    if isinstance(arrived, bool) or not isinstance(arrived, (int, float, np.number)) or not -math.inf < arrived <= now:
        raise InputError(
            f"arrived is {shown(arrived)}",
            f"a time up to now, {now:.3f}",
            "take it from time.perf_counter()",
            where="stream",
        )
    return float(arrived)


def _checked_rates(
    rates: Mapping[str, Number], needed: Sequence[str] | None, inputs: Inputs, window: Fraction, hop: Fraction
) -> dict[str, Fraction]:
    """modality -> frames per second of those that the variant uses."""
    clocked = tuple(m for m in inputs.modalities if m != "text")
    for m in rates:
        if m in MODALITIES[1:] and m not in clocked:
            only = " and ".join(inputs.modalities)
            raise InputError(f"a rate of {m} was given", f"none: the model has {only} alone", where="stream")
        if m not in clocked:
            raise InputError(
                f"a rate of {m!r} was given", " or ".join(clocked), "text comes with times", where="stream"
            )
    for m in needed or ():
        if m in clocked and m not in rates:
            fix = f"rates={{'{m}': per second}}"
            raise InputError(f"no rate of {m} was given, and the variant needs it", fix=fix, where="stream")
    checked = {m: exact(rates[m], f"the rate of {m}") for m in clocked if m in rates and m in (needed or clocked)}
    longest = min((inputs.modality(m).max_steps / r for m, r in checked.items()), default=window)
    for m, r in checked.items():
        most, frames = inputs.modality(m).max_steps, math.ceil(window * r)
        if frames > most:
            raise InputError(
                f"a window of {float(window):g} s holds {frames} frames of {m}",
                f"at most {most}",
                f"the longest window possible here is {_rounded_down(longest)} s",
                where="stream",
            )
        if window * r < 1:
            raise InputError(
                f"a window of {float(window):g} s is shorter than a frame of {m}",
                f"at least {float(1 / r):g} s",
                where="stream",
            )
        if hop * max(checked.values()) < 1:
            raise InputError(
                f"a hop of {float(hop):g} s brings no new frame",
                f"at least {float(1 / max(checked.values())):g} s",
                where="stream",
            )
    return checked


def _rounded_down(value: Fraction) -> str:
    """A decimal that is no larger than `value`, which may be typed in its place."""
    return f"{math.floor(value * 1_000_000) / 1_000_000:.6f}".rstrip("0").rstrip(".")


def _without_limits(inputs: Inputs) -> Inputs:
    """The same sizes, for chunks of any length: the window bounds what the model gets."""
    sizes: dict[str, Any] = {m: FeatureConfig(inputs.modality(m).features, _MOST_STEPS) for m in inputs.modalities}
    return dataclasses.replace(inputs, **sizes)
