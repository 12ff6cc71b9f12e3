"""Gaps and times in a stream: what is done never grows with a number that the caller names."""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers.micro import MICRO, micro_bundle_at

from hcmen.base.errors import InputError
from hcmen.runtime import Predictor, load
from hcmen.runtime.stream import Counts, Stream
from hcmen.runtime.stream_buffers import exact

DAY = 86_400
RATES = {"audio": 30, "vision": 20}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Predictor:
    return load(micro_bundle_at(tmp_path_factory.mktemp("gaps") / "micro"), threads=1)


@pytest.fixture
def cuts(monkeypatch) -> list[int]:
    """The windows that were looked at one by one."""
    seen: list[int] = []
    cut_out = Stream._cut_out

    def counted(self, start, end, *, partial):
        seen.append(self._next)
        return cut_out(self, start, end, partial=partial)

    monkeypatch.setattr(Stream, "_cut_out", counted)
    return seen


def frames(modality: str, seconds, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(int(seconds * RATES[modality]), MICRO.modality(modality).features)).astype(np.float32)


@pytest.mark.parametrize("gap", ["8", 8 * 3600, 30 * DAY, 10**11, "999999999990"])
@pytest.mark.parametrize(("window", "hop"), [("0.5", "0.5"), ("0.5", "0.2"), ("0.3", "0.77")])
def test_a_gap_of_any_length_is_passed_over_in_one_step(model, cuts, gap, window, hop):
    """Before and behind the gap every window has the frames that lie in it, and the numbers tell of all others."""
    audio = frames("audio", 4)
    stream = model.stream("auto", window=window, hop=hop, rates={"audio": 30}, live=False)
    got = stream.push(audio=audio[:60])
    stream.skip("audio", until=2 + Fraction(gap))
    got += stream.push(audio=audio[60:])
    got += stream.flush()
    length, step = exact(window, ""), exact(hop, "")
    at = [Fraction(i, 30) + (0 if i < 60 else Fraction(gap)) for i in range(len(audio))]
    expected = {}
    for begin in (Fraction(0), Fraction(gap)):
        first = max(0, math.floor((begin - length) / step))
        for k in range(first, math.ceil((begin + 4) / step)):
            inside = [i for i, t in enumerate(at) if k * step <= t < k * step + length]
            if inside and k * step + length <= at[-1] + Fraction(1, 30):
                expected[k] = audio[inside]
    assert [u.index for u in got] == sorted(expected)
    for u in got:
        assert u.score == model({"audio": expected[u.index]}).score
        assert u.frames == {"audio": len(expected[u.index])}
    counts = stream.counts
    assert dataclasses.replace(counts, late=0) == Counts(scored=len(got), starved=got[-1].index + 1 - len(got))
    assert sum(u.missed for u in got) == counts.starved
    assert len(cuts) <= len(got) + 2


def test_a_live_stream_passes_over_a_gap_too(model, cuts):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=True)
    stream.skip("audio", until=30 * DAY)
    (update,) = stream.push(audio=frames("audio", 0.5))
    assert update.index == 60 * DAY
    assert stream.counts.starved + stream.counts.dropped == 60 * DAY
    assert len(cuts) == 1


def test_a_gap_in_one_modality_is_scored_on_the_others(model, cuts):
    """Work follows the frames that came: the other source's windows are scored, the month behind them is not."""
    stream = model.stream("auto", window="0.5", hop="0.5", rates=RATES, live=False)
    with pytest.warns(RuntimeWarning, match="vision lags more than"):
        got = stream.push(audio=frames("audio", 2))
    with pytest.warns(RuntimeWarning, match="audio lags more than"):
        stream.skip("vision", until=30 * DAY)
    got += stream.push(vision=frames("vision", 1))
    got += stream.flush()
    assert [u.variant for u in got] == ["audio_only"] * 4 + ["vision_only"] * 2
    assert dataclasses.replace(stream.counts, late=0) == Counts(scored=6, starved=60 * DAY - 4)
    assert len(cuts) == 6


def test_a_named_variant_starves_over_a_gap(model, cuts):
    stream = model.stream("text_missing", window="0.5", hop="0.5", rates=RATES, live=False)
    for m in RATES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stream.skip(m, until=30 * DAY)
    (update,) = stream.push(audio=frames("audio", 0.5), vision=frames("vision", 0.5))
    assert (update.index, update.missed) == (60 * DAY, 60 * DAY)
    assert len(cuts) == 1


def test_a_text_without_times_makes_no_window_of_a_gap(model, cuts):
    """Nobody knows whether it still holds; where frames are it counts again."""
    text = np.random.default_rng(1).normal(size=(4, 6)).astype(np.float32)
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    got = stream.push(audio=frames("audio", 0.5), text=text)
    stream.skip("audio", until=30 * DAY)
    got += stream.push(audio=frames("audio", 0.5))
    assert [(u.index, u.variant) for u in got] == [(0, "vision_missing"), (60 * DAY, "vision_missing")]
    assert len(cuts) == 2


def test_words_within_a_gap_are_scored_where_they_lie(model, cuts):
    text = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    stream.push(text=text, text_times=[10.2, 10.3, 5000])
    stream.skip("audio", until=DAY)
    got = stream.push(audio=frames("audio", 0.5))
    assert [(u.start_seconds, u.variant) for u in got] == [
        (10, "text_only"),
        (5000, "text_only"),
        (DAY, "audio_only"),
    ]
    assert got[0].score == model({"text": text[:2]}).score
    assert len(cuts) == 3


def test_text_alone_stamped_in_unix_seconds_is_its_own_clock(model, cuts):
    now = 1_790_000_000
    text = np.random.default_rng(1).normal(size=(3, 6)).astype(np.float32)
    stream = model.stream("text_only", window=2, hop=1, rates={}, live=False)
    got = stream.push(text=text, text_times=[now + 0.5, now + 1.5, now + 4])
    assert [(u.start_seconds, u.frames) for u in got] == [
        (now - 1, {"text": 1}),
        (now, {"text": 2}),
        (now + 1, {"text": 1}),
    ]
    assert dataclasses.replace(stream.counts, late=0) == Counts(scored=3, starved=now - 1 + 1)
    stream.skip("text", until="1e12")
    assert stream.updates()[-1].start_seconds == now + 4
    assert stream.flush(partial=True) == []
    assert len(cuts) < 10


# --- text of another clock ------------------------------------------------------------------------------------------


def told(stream, **chunk) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        stream.push(**chunk)
    return [str(w.message) for w in caught]


@pytest.mark.parametrize("start", [1_790_000_000, 1_790_000_000_000 / 1000, 5000, 100])
def test_text_far_ahead_of_the_frames_is_told_once(model, start):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    first = told(stream, audio=frames("audio", 1), text=np.ones((1, 6)), text_times=[start])
    assert len(first) == 1
    assert f"text is stamped up to {start:.12g} s where the frames are at 1 s, so it counts in no window" in first[0]
    assert "which starts at 0" in first[0]
    assert told(stream, audio=frames("audio", 1), text=np.ones((1, 6)), text_times=[start + 1]) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stream.flush()


def test_a_transcript_that_comes_before_its_recording_is_no_other_clock(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    times = [*range(3), *range(5000, 5010)]
    assert told(stream, text=np.ones((len(times), 6)), text_times=times) == []
    assert told(stream, audio=frames("audio", 4)) == []


def test_a_recording_in_one_chunk_whose_words_begin_late_is_no_other_clock(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    assert told(stream, audio=frames("audio", 100), text=np.ones((1, 6)), text_times=[90]) == []
    assert dataclasses.replace(stream.counts, late=0) == Counts(scored=200)


def test_text_behind_the_frames_is_told_once(model):
    """The frames are stamped in unix seconds and the text is not; or a recogniser is slow and no delay was given."""
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    stream.skip("audio", until=1_790_000_000)
    stream.push(audio=frames("audio", 1))
    first = told(stream, text=np.ones((1, 6)), text_times=[3])
    assert len(first) == 1
    assert "text stamped 3 s came after the windows that it lies in, with the frames at 1790000001 s" in first[0]
    assert told(stream, text=np.ones((1, 6)), text_times=[4]) == []


def test_text_that_counted_nowhere_is_told_at_the_end(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    assert told(stream, audio=frames("audio", 1), text=np.ones((2, 6)), text_times=[20, 21]) == []
    with pytest.warns(RuntimeWarning, match=r"none of 2 tokens of text lay in a window, the last is stamped 21 s"):
        stream.flush()


def test_text_that_counted_is_not_told(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (update, _) = stream.push(audio=frames("audio", 1), text=np.ones((1, 6)), text_times=[0.25])
        assert update.frames == {"text": 1, "audio": 15}
        stream.flush()


@pytest.mark.parametrize(
    ("times", "why"),
    [
        ([float("nan")], "a time of the text is 'nan'"),
        ([float("inf")], "a time of the text is 'inf', expected a number from 0 on, at most 1e12"),
        ([1.79e12], r"a time of the text is '1790000000000.0', expected a number from 0 on, at most 1e12"),
        ([-0.5], "a time of the text is '-0.5'"),
        ([1e300], r"a time of the text is '1e\+300'"),
        (["1e-99999999"], "a time of the text is '1e-99999999'"),
        ([10**5000], "a time of the text is 'a number of 16610 bits'"),
        ([None], "a time of the text is 'None'"),
        (3.0, "text_times is of type float, expected a list"),
        ([], "1 tokens of text came with 0 times"),
        ([2.0], "the times of the text fall from 3 to 2 s"),
    ],
)
def test_times_that_cannot_be_are_refused_in_one_line(model, times, why):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    # Counted by then and let go of: its time still bounds those that follow.
    stream.push(text=np.ones((1, 6)), text_times=[3])
    stream.push(audio=frames("audio", 4))
    with pytest.raises(InputError, match=why) as error:
        stream.push(text=np.ones((1, 6)), text_times=times)
    assert "\n" not in str(error.value)


def test_a_time_next_to_nothing_is_a_time(model):
    """As 0.1 + 0.2 - 0.3 is."""
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    (update,) = stream.push(audio=frames("audio", 0.5), text=np.ones((1, 6)), text_times=[0.1 + 0.2 - 0.3])
    assert update.frames["text"] == 1


@pytest.mark.parametrize("arrived", [float("nan"), float("inf"), float("-inf"), "now", True, None])
def test_an_arrival_that_cannot_be_is_refused(model, arrived):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30})
    if arrived is None:  # the clock of time.time(), which is ahead of that of time.perf_counter()
        arrived = time.perf_counter() + 1e6
    for call in (stream.push, stream.append):
        with pytest.raises(InputError, match=r"arrived is .*, expected a time up to now, .*perf_counter"):
            call(audio=frames("audio", 1), arrived=arrived)
    assert stream.positions == {"audio": 0}
    assert stream.push(audio=frames("audio", 0.5), arrived=np.float64(time.perf_counter()))[0].late_seconds >= 0


# --- numbers of any size --------------------------------------------------------------------------------------------

NUMBERS = [1e-300, 1e300, "1e-99999999", "1e99999999", 10**400, 10**5000, Decimal("1e-999999"), Fraction(1, 10**400)]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
@pytest.mark.parametrize("what", ["window", "hop", "delay", "patience", "rate of audio"])
def test_numbers_beyond_all_bounds_are_refused_at_once(model, what, number):
    arguments = {"window": "0.5", "hop": "0.5", "rates": {"audio": 30}}
    arguments |= {"rates": {"audio": number}} if what == "rate of audio" else {what: number}
    with pytest.raises(InputError, match=rf"{what} is '.*', expected a .* 1e12") as error:
        model.stream("auto", **arguments)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("zero", ["0e99999999", "0.0E-99999999", "-0.0", "0/7", 0.0])
def test_a_zero_is_zero_however_it_is_written(zero):
    assert exact(zero, "delay", zero=True) == 0
    with pytest.raises(InputError, match=r"delay is .*positive number, from 1e-12 to 1e12"):
        exact(zero, "delay")


@pytest.mark.parametrize("hop", ["1e-12", "1e-6"])
def test_a_hop_that_lays_windows_without_number_over_a_token_is_refused(model, hop):
    with pytest.raises(InputError, match=r"windows over every token, expected at most 10000: choose a longer hop"):
        model.stream("text_only", window=1, hop=hop, rates={})


@pytest.mark.parametrize("lost", [10**400, 1 << 62, float("nan"), 1.5, "3", True, [3]])
def test_frames_that_cannot_be_lost_are_refused(model, lost):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30})
    stream.push(audio=frames("audio", 0.1))
    with pytest.raises(InputError, match=r"skip: (audio would go on beyond frame 2\^62|frames is of type)"):
        stream.skip("audio", frames=lost)
    assert stream.positions == {"audio": 0.1}


def test_frames_beyond_every_size_are_refused_by_time_too(model):
    stream = model.stream("auto", window="1e-11", hop="1e-11", rates={"audio": "1e12"})
    with pytest.raises(InputError, match=r"beyond frame 2\^62"):
        stream.skip("audio", until="1e12")
    stream.skip("audio", until="1e6")
    assert stream.push(audio=frames("audio", 1)[:16])
