"""`hcmen-follow`: feeds clip files to a stream as they appear, and prints an update per window.

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

from hcmen.base.console import JSON_SCHEMA_VERSION, Console, VariantChoice, command, one_line
from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.inputs import FeatureConfig, Inputs
from hcmen.base.modalities import MODALITIES, variant_named
from hcmen.runtime.commands.model import MODEL_OPTIONS, model_options, opened_model

if TYPE_CHECKING:
    from hcmen.base.clip import Clip
    from hcmen.runtime.predictor import Predictor
    from hcmen.runtime.stream import Stream, Update

__all__ = ["END", "main"]

END = "end"
"""A file of this name in the folder says that no chunk will come any more."""
_POLL_SECONDS = 0.02
_LIST_SECONDS = 1.0
"""How often a folder is listed though its time of change stands still: clocks are coarse, or a server's."""
_SETTLE_SECONDS = 2.0
"""How long a damaged file must have stood still before it counts as one."""
_PATIENCE_SECONDS = 30.0
"""How long a damaged file may go on changing; one that is touched for ever would hold up all after it."""
_MOST_CHUNK_FRAMES = 1 << 20
_MOST_LATENCIES = 1 << 16
_MOST_PATH_BYTES = 1 << 16


_EPILOG = (
    "A chunk is an .npz clip whose audio and vision are the next frames of the recording, and whose text, if there is "
    f"one, is the current utterance. The source ends with a file named '{END}', with stdin, with --idle-timeout or "
    "with Ctrl-C. A weight of - belongs to a modality that the variant does without; in JSON "
    "it has the weight of its learned stand-in, which says nothing of the recording. "
    "Exit codes: 0 ok, 2 bad input, 3 a backend is missing, 5 a corrupt or unsafe file, 130 interrupted."
)


@command(
    "hcmen-follow",
    epilog=_EPILOG,
    examples=(
        "hcmen-follow chunks --window 0.4 --hop 0.1 --rate audio=100 --rate vision=30",
        "ls chunks/*.npz | hcmen-follow - --window 0.4 --hop 0.1 --rate audio=100 --rate vision=30 --format json",
    ),
    groups={
        "Windows": ("window", "hop", "rates", "live", "gaps", "partial", "idle_timeout"),
        "Model": ("variant", "clean", *MODEL_OPTIONS),
    },
)
@click.argument("source", metavar="FOLDER|-")
@click.option("--window", metavar="SECONDS", help="How much of the recording a score is of.")
@click.option("--hop", metavar="SECONDS", help="The time from one window's begin to the next one's.")
@click.option("--rate", "rates", multiple=True, metavar="MODALITY=RATE", help="Frames per second, as in audio=100.")
@click.option("--live", is_flag=True, help="When behind, drop late windows and go on with the newest.")
@click.option("--gaps", is_flag=True, help="What a chunk lacks was lost for as long as the chunk is.")
@click.option("--partial", is_flag=True, help="At the end score what is left of a window too.")
@click.option("--idle-timeout", type=float, metavar="SECONDS", help="End after no chunk for so long.")
@click.option(
    "--variant",
    type=VariantChoice("auto"),
    default="auto",
    show_default=True,
    help="Which graph: auto takes the one for exactly what each window has, or else the best that the bundle has.",
)
@model_options
def main(
    console: Console,
    source: str,
    window: str | None,
    hop: str | None,
    rates: tuple[str, ...],
    live: bool,
    gaps: bool,
    partial: bool,
    idle_timeout: float | None,
    variant: str,
    backend: str,
    **options: Any,
) -> None:
    """Scores a recording, window by window, as its chunks appear in FOLDER or are named on stdin (-)."""
    if window is None or hop is None:
        raise InputError("hcmen-follow needs --window and --hop, both in seconds: for instance --window 4 --hop 0.5")
    if idle_timeout is not None and not 0 < idle_timeout < float("inf"):
        raise InputError(f"--idle-timeout is {idle_timeout}, expected a positive number of seconds")
    # Between two updates there is nothing to do for much longer than threads would spin.
    spin = False if backend in ("auto", "ort") else None
    model = opened_model(console, backend=backend, spin=spin, **options)
    frame_rates = _rates(rates)
    if source == "-":
        chunks = _from_stdin()
    elif os.path.isdir(source):
        chunks = _from_folder(console, source)
    else:
        raise InputError(f"{source}: no such folder, expected one that chunks appear in: make it first")
    with model.stream(variant, window=window, hop=hop, rates=frame_rates, live=live) as stream:
        _Follower(console, model, stream, live, gaps, partial, idle_timeout).run(chunks)


class _Follower:
    """The loop, and what it has seen: a line per update until the source ends, then what became of the windows."""

    def __init__(
        self,
        console: Console,
        model: Predictor,
        stream: Stream,
        live: bool,
        gaps: bool,
        partial: bool,
        idle_timeout: float | None,
    ):
        self.console, self.model, self.stream = console, model, stream
        self.live, self.gaps, self.partial, self.idle_timeout = live, gaps, partial, idle_timeout
        self.inputs = _chunk_limits(model.inputs)
        self.exit_code = 0
        self.latencies: deque[float] = deque(maxlen=_MOST_LATENCIES)
        self.slowest = 0.0
        self.chunks = 0
        self._headed = False
        self._ignored: set[str] = set()

    def run(self, chunks: Iterator[tuple[str, float] | None]) -> None:
        """Takes (path, when it was seen) from `chunks`, and None whenever there is nothing."""
        last = time.monotonic()
        lost: InputError | None = None
        try:
            try:
                for chunk in chunks:
                    if chunk is not None:
                        self._take(*chunk)
                        last = time.monotonic()
                        if self.live:
                            continue  # all that is there comes in before anything is scored
                    self._score(self.stream.updates)
                    timeout = self.idle_timeout
                    if chunk is None and timeout is not None and time.monotonic() - last > timeout:
                        self.console.note(f"note: no chunk for {timeout:g} s, the source has ended")
                        break
            except InputError as error:  # the source is gone; what came of it is scored all the same
                lost = error
            self._score(lambda: self.stream.flush(partial=self.partial))
        finally:
            self._summary()
        if lost is not None:
            raise lost
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
            if self.live:
                self.stream.append(**frames, text=text, arrived=seen)
            else:
                self._print(self.stream.push(**frames, text=text, arrived=seen))
            if self.gaps:
                self._skip(frames)
        except HcmenError as error:
            where = path if error.where in (None, "stream") else f"{path}: {error.where}"
            self._problem(error.but(where=where))
        self._mention(path, clip.ignored)

    def _read(self, path: str) -> Clip | None:
        """The chunk, once it is whole; None after a line about what is wrong with it."""
        from hcmen.base.clip import NotAnArchive, read_clip

        first = since = time.monotonic()
        before, told = (-1, -1), False
        while True:
            try:
                return read_clip(path, self.inputs, self.model.clean)
            except HcmenError as error:
                growing = isinstance(error, (CorruptFileError, NotAnArchive))
                now = time.monotonic()
                try:
                    state = os.stat(path)
                except (OSError, ValueError):  # a line of stdin may hold a NUL
                    growing = False
                else:
                    if (state.st_size, state.st_mtime_ns) != before:
                        before, since = (state.st_size, state.st_mtime_ns), now
                    # By either clock: that of the file may be another machine's.
                    growing &= now - since < _SETTLE_SECONDS and time.time() - state.st_mtime < _SETTLE_SECONDS
                    growing &= now - first < _PATIENCE_SECONDS
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
                click.echo(json.dumps(_json(update, self.model.inputs), allow_nan=False))
                continue
            if not self._headed:
                click.echo(f"scores are of {one_line(self.model.inputs.scale)}\n{_HEADER}")
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
    # What a variant does without has a learned stand-in, whose weight says nothing of the recording.
    present = variant_named(u.variant).present
    weights = (f"{u.modality_weights[m]:6.0%}" if m in present else f"{'-':>6}" for m in MODALITIES)
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


def _json(u: Update, inputs: Inputs) -> dict[str, Any]:
    return {
        "schema_version": JSON_SCHEMA_VERSION,
        "window": u.index,
        "start_seconds": u.start_seconds,
        "end_seconds": u.end_seconds,
        "variant": u.variant,
        "score": u.score,
        "label_min": inputs.label_min,
        "label_max": inputs.label_max,
        "label": inputs.label(u.score),
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
            names = [n for n in os.listdir(folder) if not n.startswith(".") and not os.path.isdir(f"{folder}/{n}")]
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


def _chunk_limits(inputs: Inputs) -> Inputs:
    """Chunks may be longer than what the model takes at once, as the windows are not; but not without end."""
    longer: dict[str, Any] = {}
    for m in (m for m in inputs.modalities if m != "text"):
        sizes = inputs.modality(m)
        longer[m] = FeatureConfig(sizes.features, max(sizes.max_steps, _MOST_CHUNK_FRAMES))
    return dataclasses.replace(inputs, **longer)
