"""`hcmen-run --follow`: feeds clip files to a stream as they appear, and prints an update per window.

A chunk is an ordinary clip file whose audio and vision are the next frames. Chunks come as files in a folder, in the
order of their names (numbers in them count as numbers: chunk-9 is before chunk-10), or as paths, one a line, on stdin.
The folder is looked at every few milliseconds, which works on every file system and needs no further package.

A writer makes a chunk under another name (`.x.npz.tmp`, as `write_clip` does) and renames it. A file that is written in
place is damaged until it is whole, so a damaged one is read again until it has not changed for a while; the chunks
after it wait, since their frames come later. Then it gets one line, and the stream goes on without it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import select
import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from hcmen.clip import Clip, NotAnArchive, read_clip
from hcmen.config import FeatureConfig, ModelConfig
from hcmen.errors import CorruptFileError, HcmenError, InputError
from hcmen.modalities import MODALITIES
from hcmen.runtime.cli import JSON_SCHEMA_VERSION, Console, one_line
from hcmen.runtime.stream import Stream, Update

if TYPE_CHECKING:
    from hcmen.runtime.predictor import Predictor

__all__ = ["END", "FollowOptions", "follow_chunks"]

END = "end"
"""A file of this name in the folder says that no chunk will come any more."""
_POLL_SECONDS = 0.02
_LIST_SECONDS = 1.0
"""How often a folder is listed though its time of change stands still: clocks are coarse, or a server's."""
_SETTLE_SECONDS = 2.0
"""How long a damaged file must have stood still before it counts as one."""
_MOST_CHUNK_FRAMES = 1 << 20
_MOST_LATENCIES = 1 << 16
_MOST_PATH_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True)
class FollowOptions:
    """What `hcmen-run --follow` was told.

    source: a folder, or "-" for paths on stdin. window, hop: seconds. rates: "audio=100", as typed. live: as in
    `Stream`. partial: score the last part of a window too. gaps: what a chunk lacks was lost for the chunk's length.
    idle_timeout: seconds without a chunk after which the source has ended; None waits for ever.
    """

    source: str
    variant: str
    window: str
    hop: str
    rates: Sequence[str]
    live: bool = False
    partial: bool = False
    gaps: bool = False
    idle_timeout: float | None = None


def follow_chunks(console: Console, model: Predictor, options: FollowOptions) -> None:
    """Prints a line per update until the source ends, and what became of the windows at the end.

    Raises:
        InputError: an option or the source cannot be used.
        click.exceptions.Exit: at the end, with the gravest exit code of what went wrong on the way.
    """
    timeout = options.idle_timeout
    if timeout is not None and not 0 < timeout < float("inf"):
        raise InputError(f"--idle-timeout is {timeout}, expected a positive number of seconds")
    rates = _rates(options.rates)
    chunks: Iterator[tuple[str, float] | None]
    if options.source == "-":
        chunks = _from_stdin()
    else:
        if not os.path.isdir(options.source):
            raise InputError(f"{options.source}: no such folder, expected one that chunks appear in: make it first")
        chunks = _from_folder(console, options.source)
    with model.stream(
        options.variant, window=options.window, hop=options.hop, rates=rates, live=options.live
    ) as stream:
        _Follower(console, model, stream, options).run(chunks)


class _Follower:
    """The loop, and what it has seen."""

    def __init__(self, console: Console, model: Predictor, stream: Stream, options: FollowOptions):
        self.console, self.model, self.stream, self.options = console, model, stream, options
        self.config = _chunk_limits(model.config)
        self.exit_code = 0
        self.latencies: deque[float] = deque(maxlen=_MOST_LATENCIES)
        self.slowest = 0.0
        self.chunks = 0
        self._headed = False
        self._ignored: set[str] = set()

    def run(self, chunks: Iterator[tuple[str, float] | None]) -> None:
        """Takes (path, when it was seen) from `chunks`, and None whenever there is nothing."""
        last = time.monotonic()
        try:
            for chunk in chunks:
                if chunk is not None:
                    self._take(*chunk)
                    last = time.monotonic()
                    if self.options.live:
                        continue  # all that is there comes in before anything is scored
                self._score(self.stream.updates)
                timeout = self.options.idle_timeout
                if chunk is None and timeout is not None and time.monotonic() - last > timeout:
                    self.console.note(f"note: no chunk for {timeout:g} s, the source has ended")
                    break
            self._score(lambda: self.stream.flush(partial=self.options.partial))
        finally:
            self._summary()
        if self.exit_code:
            raise click.exceptions.Exit(self.exit_code)

    def _take(self, path: str, seen: float) -> None:
        clip = self._read(path)
        if clip is None:
            return
        self.chunks += 1
        if clip.cleaned:
            what = " and ".join(f"{count} of {m}" for m, count in clip.cleaned.items())
            self.console.note(f"note: {path}: NaN or infinite values were set to zero, {what}")
        text = clip.text_tokens if clip.text_tokens is not None else clip.features.get("text")
        frames = {m: clip.features[m] for m in MODALITIES[1:] if m in clip.features}
        try:
            if self.options.live:
                self.stream.append(**frames, text=text, arrived=seen)
            else:
                self._print(self.stream.push(**frames, text=text, arrived=seen))
            if self.options.gaps:
                self._skip(frames)
        except HcmenError as error:
            where = path if error.where in (None, "stream") else f"{path}: {error.where}"
            self._problem(error.but(where=where))
        self._mention(path, clip.ignored)

    def _read(self, path: str) -> Clip | None:
        """The chunk, once it is whole; None after a line about what is wrong with it."""
        first = since = time.monotonic()
        before, told = (-1, -1), False
        while True:
            try:
                return read_clip(path, self.config, self.model.clean)
            except HcmenError as error:
                growing = isinstance(error, (CorruptFileError, NotAnArchive))
                now = time.monotonic()
                try:
                    state = os.stat(path)
                except OSError:
                    growing = False
                else:
                    if (state.st_size, state.st_mtime_ns) != before:
                        before, since = (state.st_size, state.st_mtime_ns), now
                    # By either clock: that of the file may be another machine's.
                    growing &= now - since < _SETTLE_SECONDS and time.time() - state.st_mtime < _SETTLE_SECONDS
                if not growing:
                    self._problem(error)
                    return None
                if now - first > 2 * _SETTLE_SECONDS and not told:
                    told = True
                    self.console.note(f"note: {path}: not whole yet, waiting for it")
            time.sleep(_POLL_SECONDS)

    def _skip(self, frames: Mapping[str, Any]) -> None:
        """Moves the modalities that the chunk lacks to where the others are."""
        at = self.stream.positions
        until = max((at[m] for m in frames if m in at), default=0.0)
        for m, position in at.items():
            if frames and m not in frames and position < until and m != "text":
                self.stream.skip(m, until=until)

    def _score(self, updates: Any) -> None:
        try:
            self._print(updates())
        except HcmenError as error:
            self._problem(error)

    def _print(self, updates: Sequence[Update]) -> None:
        for update in updates:
            self.latencies.append(update.latency_seconds)
            self.slowest = max(self.slowest, update.latency_seconds)
            if self.console.format == "json":
                click.echo(json.dumps(_json(update), allow_nan=False))
                continue
            if not self._headed:
                click.echo(_HEADER)
                self._headed = True
            click.echo(_line(update))

    def _mention(self, path: str, keys: Sequence[str]) -> None:
        """Notes once what is left out of all chunks."""
        new = {*keys, *self.stream.ignored} - self._ignored
        if new:
            self.console.note(f"note: {path}: {' and '.join(sorted(new))} and the like in later chunks are ignored")
            self._ignored |= new

    def _problem(self, error: HcmenError) -> None:
        self.console.error(error)
        self.exit_code = max(self.exit_code, error.exit_code)

    def _summary(self) -> None:
        counts = self.stream.counts
        if not self.latencies:
            self.console.note(f"no update from {self.chunks} chunks")
            return
        told = [f"{n} {what}" for what, n in dataclasses.asdict(counts).items() if n and what != "scored"]
        self.console.note(
            f"{counts.scored} updates from {self.chunks} chunks, latency median "
            f"{statistics.median(self.latencies) * 1e3:.1f} ms, longest {self.slowest * 1e3:.1f} ms"
            f"{''.join(f', {t}' for t in told)}"
        )


_HEADER = f"{'window':>21}  {'variant':<14}  {'score':>8}  {'  '.join(f'{m:>6}' for m in MODALITIES)}  {'latency':>9}"


def _line(u: Update) -> str:
    weights = (f"{u.modality_weights[m]:6.0%}" if u.modality_weights[m] else f"{'-':>6}" for m in MODALITIES)
    told = [
        f"late by {u.late_seconds * 1e3:.1f} ms" if u.late_seconds else "",
        f"{u.missed} windows missed" if u.missed else "",
        "partial" if u.partial else "",
    ]
    line = (
        f"{u.start_seconds:9.3f} - {u.end_seconds:9.3f}  {u.variant:<14}  {u.score:+8.4f}  {'  '.join(weights)}  "
        f"{u.latency_seconds * 1e3:6.1f} ms"
    )
    return ", ".join([line, *(t for t in told if t)])


def _json(u: Update) -> dict[str, Any]:
    return {
        "schema_version": JSON_SCHEMA_VERSION,
        "window": u.index,
        "start_seconds": u.start_seconds,
        "end_seconds": u.end_seconds,
        "variant": u.variant,
        "score": u.score,
        "modality_weights": dict(u.modality_weights),
        "frames": dict(u.frames),
        "cleaned": dict(u.cleaned),
        "partial": u.partial,
        "run_ms": round(u.run_seconds * 1e3, 4),
        "latency_ms": round(u.latency_seconds * 1e3, 4),
        "late_ms": round(u.late_seconds * 1e3, 4),
        "missed": u.missed,
    }


def _from_folder(console: Console, folder: str) -> Iterator[tuple[str, float] | None]:
    """The .npz files of `folder` in the order of their names, as they appear; None whenever there is no new one."""
    handled: set[str] = set()
    mark: tuple[Any, ...] = ()
    changed, listed = -1, 0.0
    while True:
        now = time.monotonic()
        try:
            before = os.stat(folder).st_mtime_ns
            # A file that came within one tick of the file system's clock would not be seen in its time of change.
            if before == changed and now - listed < _LIST_SECONDS and time.time_ns() - before > 100_000_000:
                yield None
                time.sleep(_POLL_SECONDS)
                continue
            names = [e.name for e in os.scandir(folder) if not e.name.startswith(".") and not e.is_dir()]
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            raise InputError(f"{folder}: {reason}: the folder that is followed must stay") from error
        changed, listed = before, now
        chunks = sorted((n for n in names if n.endswith(".npz")), key=_in_order)
        handled &= set(chunks)  # what is no longer there need not be remembered
        for name in (n for n in chunks if n not in handled):
            handled.add(name)
            if _in_order(name) < mark:
                console.warn(f"{os.path.join(folder, name)}: came after later names and is left out: names must rise")
                continue
            mark = _in_order(name)
            yield os.path.join(folder, name), time.perf_counter()
        if END in names:
            return
        yield None
        time.sleep(_POLL_SECONDS)


def _in_order(name: str) -> tuple[Any, ...]:
    """A key that sorts the numbers in names as numbers."""
    parts = re.split(r"([0-9]+)", name)
    return (*((part, 0) if i % 2 == 0 else ("", int(part[:4000])) for i, part in enumerate(parts)), (name, 0))


def _from_stdin() -> Iterator[tuple[str, float] | None]:
    """The paths on stdin, one a line, as they come; None whenever there is none."""
    try:
        descriptor = sys.stdin.fileno()
    except (OSError, ValueError, AttributeError) as error:
        raise InputError("stdin is closed, expected paths of chunks on it, one a line") from error
    rest = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], _POLL_SECONDS)
        if not ready:
            yield None
            continue
        read = os.read(descriptor, 1 << 16)
        *lines, rest = (rest + read).split(b"\n")
        if not read:
            lines, rest = [rest], b""
        if len(rest) > _MOST_PATH_BYTES:
            raise InputError(f"a line of more than {_MOST_PATH_BYTES} bytes on stdin, expected paths, one a line")
        for line in lines:
            path = os.fsdecode(line.removesuffix(b"\r"))
            if path.strip():
                yield path, time.perf_counter()
        if not read:
            return
        yield None


def _rates(typed: Sequence[str]) -> dict[str, str]:
    """{"audio": "100"} from "audio=100"."""
    rates: dict[str, str] = {}
    for item in typed:
        name, sign, rate = item.partition("=")
        if not sign or name in rates:
            raise InputError(
                f"--rate is {one_line(item)!r}, expected each modality once, with its frames per second: audio=100"
            )
        rates[name.strip()] = rate.strip()
    return rates


def _chunk_limits(config: ModelConfig) -> ModelConfig:
    """Chunks may be longer than what the model takes at once, as the windows are not; but not without end."""
    return dataclasses.replace(
        config,
        audio=FeatureConfig(config.audio.features, max(config.audio.max_steps, _MOST_CHUNK_FRAMES)),
        vision=FeatureConfig(config.vision.features, max(config.vision.max_steps, _MOST_CHUNK_FRAMES)),
    )
