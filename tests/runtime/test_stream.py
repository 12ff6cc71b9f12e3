"""`Predictor.stream`: every window's score is the offline call's to the last bit, whatever the rates and the chunks."""

from __future__ import annotations

import dataclasses
import gc
import math
import threading
import tracemalloc
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers.micro import MICRO, micro_bundle_at
from hypothesis import given, settings
from hypothesis import strategies as st

import hcmen.runtime.stream as stream_module
import hcmen.runtime.stream_buffers as stream_buffers
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.modalities import variant_for
from hcmen.runtime import Predictor, load
from hcmen.runtime.stream import Counts, Stream
from hcmen.runtime.stream_buffers import exact

SECONDS = 5
# window, hop, rates: rates that divide neither each other nor the hop, a hop of a frame and one longer than the window.
CASES = {
    "even": ("0.5", "0.25", {"audio": 16, "vision": 8}),
    "fractional frames": ("0.37", "0.11", {"audio": "30000/1001", "vision": 25}),
    "rates apart": (0.4, 0.1, {"audio": 39.7, "vision": Fraction(7, 2)}),
    "hop of one frame": ("1.1", "1/13", {"audio": 13, "vision": 11}),
    "hop beyond window": (Decimal("0.3"), "0.77", {"audio": 24, "vision": "12.5"}),
    "longest window": ("16/31", "0.2", {"audio": 31, "vision": "29.97"}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Predictor:
    return load(micro_bundle_at(tmp_path_factory.mktemp("stream") / "micro"), threads=1)


def recording(rates, seconds=SECONDS, seed=0) -> dict[str, np.ndarray]:
    """What each modality's source gives in `seconds`."""
    rng = np.random.default_rng(seed)
    return {
        m: rng.normal(size=(int(exact(r, m) * seconds), MICRO.modality(m).features)).astype(np.float32)
        for m, r in rates.items()
    }


def offline(model, frames, rates, start: Fraction, end: Fraction, variant="auto"):
    """The result of a window of a recording, cut out by the definition: frame i lies at i / rate seconds."""
    cut = {}
    for m, x in frames.items():
        rate = exact(rates[m], m)
        inside = [i for i in range(len(x)) if start <= i / rate < end]
        if inside:
            cut[m] = x[inside[0] : inside[-1] + 1]
    return model(cut, variant=variant), {m: len(x) for m, x in cut.items()}


def assert_same(update, result, frames=None) -> None:
    assert update.score == result.score
    assert update.modality_weights == result.modality_weights
    assert update.variant == result.variant
    assert update.cleaned == result.cleaned
    if frames is not None:
        assert update.frames == frames


def in_chunks(stream: Stream, frames, sizes) -> list:
    """Pushes `frames` by chunks of the seconds in `sizes`, over and over, each modality at its own rate."""
    updates, time, i = [], Fraction(0), 0
    done = dict.fromkeys(frames, 0)
    while any(done[m] < len(x) for m, x in frames.items()):
        time += Fraction(sizes[i % len(sizes)])
        i += 1
        part = {}
        for m, x in frames.items():
            upto = min(len(x), int(time * Fraction(len(x), SECONDS)))
            part[m] = x[done[m] : upto]
            done[m] = upto
        updates += stream.push(**part)
    return updates


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("live", [False, True], ids=["every", "live"])
@pytest.mark.parametrize("sizes", [["0.01"], ["0.3", "0", "0.05"], [str(SECONDS)]], ids=["small", "uneven", "whole"])
def test_scores_are_those_of_the_offline_call(model, case, live, sizes):
    window, hop, rates = CASES[case]
    frames = recording(rates)
    stream = model.stream("auto", window=window, hop=hop, rates=rates, live=live, patience=1)
    updates = in_chunks(stream, frames, sizes)
    window, hop = exact(window, ""), exact(hop, "")
    if sizes != [str(SECONDS)] or not live:
        # Up to the end of the source that ends first, no window is left out.
        reach = min(Fraction(len(x)) / exact(rates[m], m) for m, x in frames.items())
        assert [u.index for u in updates] == list(range(math.floor((reach - window) / hop) + 1))
    assert updates
    for u in updates:
        start = u.index * hop
        assert (u.start_seconds, u.end_seconds) == (float(start), float(start + window))
        assert_same(u, *offline(model, frames, rates, start, start + window))
        assert u.variant == "text_missing"
    counts = stream.counts
    assert counts.scored == len(updates)
    assert updates[-1].index + 1 == counts.scored + counts.dropped


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rate=st.tuples(st.fractions(3, 20, max_denominator=50), st.fractions(3, 20, max_denominator=50)),
    window=st.fractions(Fraction(1, 3), Fraction(3, 4), max_denominator=97),
    hop=st.fractions(Fraction(1, 3), 2, max_denominator=97),
    cuts=st.lists(st.tuples(st.sampled_from(["audio", "vision"]), st.integers(0, 9)), max_size=60),
)
def test_any_rates_and_any_chunks_give_the_same(model, rate, window, hop, cuts):
    """Modality by modality, in chunks of any size; each update against the window cut out offline."""
    rates = dict(zip(("audio", "vision"), rate, strict=True))
    frames = recording(rates, 4)
    stream = model.stream("text_missing", window=window, hop=hop, rates=rates, live=False, patience=5)
    updates, done = [], {"audio": 0, "vision": 0}
    for m, count in [*cuts, ("audio", 10**6), ("vision", 10**6)]:
        updates += stream.push(**{m: frames[m][done[m] : done[m] + count]})
        done[m] += count
    updates += stream.flush()
    reach = max(Fraction(len(x)) / rates[m] for m, x in frames.items())
    assert [u.index for u in updates] == list(range(max(0, math.floor((reach - window) / hop) + 1)))
    for u in updates:
        start = u.index * hop
        assert_same(u, *offline(model, frames, rates, start, start + window, "text_missing"))


def test_frames_are_counted_without_drift(model):
    """After more than 10^7 frames at a rate that no float holds, and after 10^15, the window is still the exact one."""
    rate, hop, window = Fraction(30000, 1001), Fraction(1, 3), Fraction(1, 2)
    for start in (10_000_019, 10**15):
        rng = np.random.default_rng(1)
        stream = model.stream("vision_only", window=window, hop=hop, rates={"vision": "30000/1001"}, live=True)
        stream.skip("vision", frames=start)
        frames = rng.normal(size=(60, 4)).astype(np.float32)
        updates = [u for x in np.array_split(frames, 20) for u in stream.push(vision=x)]
        whole = [u for u in updates if u.index * hop >= start / rate]
        assert len(whole) > 3
        for u in whole:
            first, last = math.ceil(u.index * hop * rate), math.ceil((u.index * hop + window) * rate)
            assert_same(u, model({"vision": frames[first - start : last - start]}), {"vision": last - first})
            assert u.start_seconds == float(u.index * hop)


def test_ten_million_frames_pushed(model):
    """The same by pushing them: silence in huge chunks, dropped by a live stream, then windows that are looked at."""
    rate, hop, window = 16000, Fraction(1, 999), Fraction(1, 1000)
    stream = model.stream("audio_only", window=window, hop=hop, rates={"audio": rate}, patience=1)
    silence = np.zeros((500_000, 3), np.float16)
    for _ in range(20):
        stream._take_in(stream._checked(silence, None, None, None), 0.0)
    stream.updates()
    frames = np.random.default_rng(2).normal(size=(200, 3)).astype(np.float32)
    updates = [u for x in np.array_split(frames, 40) for u in stream.push(audio=x)]
    whole = [u for u in updates if u.index * hop * rate >= 10_000_000]
    assert len(whole) >= 10
    for u in whole:
        first, last = math.ceil(u.index * hop * rate), math.ceil((u.index * hop + window) * rate)
        assert_same(u, model({"audio": frames[first - 10_000_000 : last - 10_000_000]}))


# --- late updates ---------------------------------------------------------------------------------------------------


class Clock:
    """Stands in for the clock of the stream, and for a model that takes `cost` seconds."""

    def __init__(self, monkeypatch, model, cost):
        self.now, self.cost = 100.0, cost
        monkeypatch.setattr(stream_module.time, "perf_counter", lambda: self.now)
        call = Predictor.__call__

        def slow(me, *args, **kwargs):
            self.now += self.cost
            return call(me, *args, **kwargs)

        monkeypatch.setattr(Predictor, "__call__", slow)


def test_a_live_stream_that_cannot_keep_up_goes_on_with_the_newest(model, monkeypatch):
    """Hop 0.1 s, 0.25 s a window, all of 3 s there at once: two are begun within a hop, then the newest is taken."""
    clock = Clock(monkeypatch, model, 0.0)
    stream = model.stream("audio_only", window="0.5", hop="0.1", rates={"audio": 30}, patience=3)
    clock.cost = 0.25
    updates = stream.push(audio=np.ones((90, 3), np.float32))
    assert [(u.index, u.missed) for u in updates] == [(0, 0), (25, 24)]
    assert [u.latency_seconds for u in updates] == pytest.approx([0.25, 0.5])
    assert [u.late_seconds for u in updates] == pytest.approx([0.15, 0.4])
    assert stream.counts == Counts(scored=2, late=2, dropped=24)
    # Waiting elsewhere counts too.
    clock.now += 10
    stream.append(audio=np.ones((3, 3), np.float32), arrived=clock.now - 7)
    (update,) = stream.updates()
    assert update.latency_seconds == pytest.approx(7.25)
    clock.cost = 0.01
    for _ in range(20):
        (update,) = stream.push(audio=np.ones((3, 3), np.float32))
        assert (update.missed, update.late_seconds) == (0, 0.0)
        assert update.latency_seconds == pytest.approx(0.01)
    assert stream.counts == Counts(scored=23, late=3, dropped=24)


def test_without_live_none_is_dropped_and_the_lateness_is_told(model, monkeypatch):
    clock = Clock(monkeypatch, model, 0.0)
    stream = model.stream("audio_only", window="0.5", hop="0.1", rates={"audio": 30}, live=False)
    clock.cost = 0.25
    updates = stream.push(audio=np.ones((90, 3), np.float32))
    assert [u.index for u in updates] == list(range(26))
    assert [u.late_seconds for u in updates] == pytest.approx([0.25 * (i + 1) - 0.1 for i in range(26)])
    assert stream.counts == Counts(scored=26, late=26)


def test_a_live_stream_that_is_never_asked_keeps_the_newest_windows(model):
    stream = model.stream("audio_only", window="0.5", hop="0.1", rates={"audio": 30})
    frames = recording({"audio": 30}, 60)["audio"]
    for x in np.array_split(frames, 100):
        stream.append(audio=x)
    updates = stream.updates()
    assert updates[-1].index == 595
    assert updates[0].missed == updates[0].index == stream.counts.dropped > 500
    for u in updates:
        start = Fraction(u.index, 10)
        assert_same(u, *offline(model, {"audio": frames}, {"audio": 30}, start, start + Fraction(1, 2)))


def test_without_live_append_refuses_to_lose_frames(model):
    stream = model.stream("audio_only", window="0.5", hop="0.1", rates={"audio": 30}, live=False)
    frames = recording({"audio": 30}, 60)["audio"]
    taken, refused, updates = 0, 0, []
    for x in np.array_split(frames, 600):
        try:
            stream.append(audio=x)
        except InputError:
            with pytest.raises(InputError, match="more than it can keep"):
                stream.append(audio=x)
            refused += 1
            updates += stream.updates()
            stream.append(audio=x)
        taken += len(x)
    updates += stream.updates()
    assert refused > 10
    assert [u.index for u in updates] == list(range(596))
    assert_same(updates[-1], model({"audio": frames[-15:]}))


def test_memory_is_bounded(model, monkeypatch):
    """What the stream itself holds after 5, 17 and 30 minutes is the same; the model is a stand-in."""
    result = model({"audio": np.ones((1, 3))})
    monkeypatch.setattr(Predictor, "__call__", lambda *_, **__: result)
    stream = model.stream("auto", window="0.5", hop="0.25", rates={"audio": 30, "vision": 25}, live=False, patience=2)
    audio, vision, text = (np.ones((n, m), np.float32) for n, m in ((900, 3), (750, 4), (60, 6)))
    held = []
    tracemalloc.start()
    try:
        for i in range(60):
            stream.push(audio=audio, vision=vision, text=text, text_times=30 * i + np.arange(60) / 2)
            if i in (9, 34, 59):
                gc.collect()  # empties the free lists of small objects, which fill up slowly
                ours = [tracemalloc.Filter(True, str(m.__file__)) for m in (stream_module, stream_buffers)]
                taken = tracemalloc.take_snapshot().filter_traces(ours)
                held.append(sum(trace.size for trace in taken.traces))
    finally:
        tracemalloc.stop()
    assert stream.counts.scored == 60 * 30 * 4 - 1
    # A byte a frame kept by mistake would be 40 kB.
    assert max(held[1:]) < held[0] + 1_000


# --- missing and late modalities ------------------------------------------------------------------------------------


def test_auto_goes_on_without_a_modality_that_stalls_and_takes_it_back(model):
    rates = {"audio": 30, "vision": 20}
    frames = recording(rates, 10)
    stream = model.stream("auto", window="0.5", hop="0.5", rates=rates, patience=1)
    got = []

    def tenth(i):  # vision is lost from 3 s to 6 s
        part = {"audio": frames["audio"][3 * i : 3 * i + 3]}
        if i == 60:
            stream.skip("vision", until=6)
        if not 30 <= i < 60:
            part["vision"] = frames["vision"][2 * i : 2 * i + 2]
        got.extend(stream.push(**part))
        assert stream.stalled == (("vision",) if 40 < i + 1 <= 60 else ())

    with pytest.warns(RuntimeWarning, match=r"vision lags more than 1 s behind, windows are scored without it") as told:
        list(map(tenth, range(100)))
    assert len(told) == 1  # once for the whole stall
    assert [u.index for u in got] == list(range(20))
    for u in got:
        start, end = Fraction(u.index, 2), Fraction(u.index + 1, 2)
        blind = 6 <= u.index < 12
        assert u.variant == ("audio_only" if blind else "text_missing")
        there = {m: x for m, x in frames.items() if not (blind and m == "vision")}
        assert_same(u, *offline(model, there, rates, start, end))


def test_frames_that_come_late_but_come_are_used(model):
    """A source behind by less than the patience holds windows up; nothing is lost."""
    rates = {"audio": 30, "vision": 20}
    frames = recording(rates, 6)
    stream = model.stream("auto", window="0.5", hop="0.5", rates=rates, patience=2)
    got = []
    for i in range(60):
        late = i - 15
        got += stream.push(
            audio=frames["audio"][3 * i : 3 * i + 3],
            vision=frames["vision"][2 * late : 2 * late + 2] if late >= 0 else None,
        )
    assert {u.variant for u in got} == {"text_missing"}
    assert [u.index for u in got] == list(range(9))
    got += stream.flush()
    assert [u.index for u in got] == list(range(12))
    assert [u.variant for u in got[9:]] == ["audio_only"] * 3
    assert got[8].frames == {"audio": 15, "vision": 10}


def test_a_named_variant_never_becomes_another_one(model):
    rates = {"audio": 30, "vision": 20}
    frames = recording(rates, 6)
    stream = model.stream("text_missing", window="0.5", hop="0.5", rates=rates, patience=1)
    with pytest.warns(RuntimeWarning, match=r"vision lags .* windows without it are passed over"):
        got = [
            u
            for i in range(60)
            for u in stream.push(
                audio=frames["audio"][3 * i : 3 * i + 3], vision=frames["vision"][2 * i : 2 * i + 2] if i < 22 else None
            )
        ]
    # 2.2 s of vision: four whole windows, a fifth with the 4 frames that came, and seven with none.
    assert [(u.index, u.frames["vision"]) for u in got] == [(0, 10), (1, 10), (2, 10), (3, 10), (4, 4)]
    assert stream.counts == Counts(scored=5, starved=7)
    assert_same(got[4], model({"audio": frames["audio"][60:75], "vision": frames["vision"][40:44]}))


def test_a_gap_is_left_out_of_its_window(model):
    frames = recording({"audio": 30}, 3)["audio"]
    stream = model.stream("audio_only", window="0.5", hop="0.5", rates={"audio": 30})
    got = stream.push(audio=frames[:20])
    stream.skip("audio", frames=5)
    got += stream.push(audio=frames[25:60])
    assert_same(got[1], model({"audio": np.concatenate([frames[15:20], frames[25:30]])}), {"audio": 10})
    assert_same(got[2], model({"audio": frames[30:45]}), {"audio": 15})
    stream.skip("audio", until="3.01")  # the first frame from there on is number 91
    assert stream.positions == {"audio": 91 / 30}
    got = stream.push(audio=frames[:14])
    assert stream.counts == Counts(scored=5, starved=2)
    assert (got[0].missed, got[0].frames) == (2, {"audio": 14})
    for wrong in ({"until": 1}, {"frames": -1}):
        with pytest.raises(InputError, match=r"audio is at 3\.5 s already"):
            stream.skip("audio", **wrong)
    with pytest.raises(InputError, match="'vision' has no frames here, expected one of audio"):
        stream.skip("vision", frames=1)
    with pytest.raises(InputError, match="either frames or until"):
        stream.skip("audio")


def test_nothing_there_is_no_update(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30})
    stream.skip("audio", until=2)
    (update,) = stream.push(audio=np.ones((15, 3)))
    assert (update.index, update.missed, stream.counts) == (4, 4, Counts(scored=1, starved=4))


# --- text -----------------------------------------------------------------------------------------------------------


def test_tokens_lie_in_the_windows_of_their_times(model):
    rng = np.random.default_rng(3)
    text = rng.normal(size=(8, 6)).astype(np.float32)
    times = [0, 0.3, 0.5, 0.5, 0.9, 1.0, 1.9, 2.2]
    frames = recording({"audio": 30}, 3)["audio"]
    stream = model.stream("auto", window=0.5, hop="0.5", rates={"audio": 30}, live=False)
    got = stream.push(audio=frames[:60], text=text[:6], text_times=times[:6])
    with pytest.warns(RuntimeWarning, match="text stamped 1.9 s came after the windows"):  # that at 1.5 s
        got += stream.push(text=text[6:], text_times=np.array(times[6:], np.float32))
    got += stream.push(audio=frames[60:])
    inside = [(0, 2), (2, 5), (5, 6), (6, 6), (7, 8), (8, 8)]
    assert [u.frames.get("text", 0) for u in got] == [b - a for a, b in inside]
    for u, (a, b) in zip(got, inside, strict=True):
        clip = {"audio": frames[15 * u.index : 15 * u.index + 15], **({"text": text[a:b]} if b > a else {})}
        assert_same(u, model(clip))
        assert u.variant == ("vision_missing" if b > a else "audio_only")


def test_a_delay_waits_for_text_that_comes_after_the_sound(model):
    text = np.random.default_rng(3).normal(size=(20, 6)).astype(np.float32)
    frames = recording({"audio": 30}, 5)["audio"]
    stream = model.stream("vision_missing", window="0.5", hop="0.5", rates={"audio": 30}, delay="0.4")
    got = []
    for i in range(50):  # a token every quarter of a second, heard 0.3 s later
        said = [j for j in range(20) if i <= 2.5 * j + 3 < i + 1]
        got += stream.push(audio=frames[3 * i : 3 * i + 3], text=text[said], text_times=[j / 4 for j in said])
    assert [u.index for u in got] == list(range(9))
    for u in got:
        k = u.index
        assert_same(u, model({"audio": frames[15 * k : 15 * k + 15], "text": text[2 * k : 2 * k + 2]}))
    assert [u.index for u in stream.flush()] == [9]


def test_a_text_without_times_holds_until_it_is_replaced(model):
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=(4, 6)), rng.normal(size=(9, 6))
    frames = recording({"audio": 30}, 4)["audio"]
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    got = stream.push(audio=frames[:30], text=first)
    first[:] = 0  # the stream has its own copy
    first = np.random.default_rng(4).normal(size=(4, 6))
    got += stream.push(audio=frames[30:60])
    got += stream.push(audio=frames[60:90], text=second)
    got += stream.push(audio=frames[90:105], text=np.zeros((0, 6)))
    got += stream.push(audio=frames[105:], text=second[:1], text_times=["3.7"])
    for u, said in zip(got, [first] * 4 + [second] * 2 + [None, second[:1]], strict=True):
        clip = {"audio": frames[15 * u.index : 15 * u.index + 15], **({} if said is None else {"text": said})}
        assert_same(u, model(clip))


def test_text_alone_is_its_own_clock(model):
    text = np.random.default_rng(5).normal(size=(6, 6)).astype(np.float32)
    stream = model.stream("text_only", window=2, hop=1, rates={})
    got = stream.push(text=text[:4], text_times=[0.1, 0.9, 1.5, 2.0])
    assert [u.frames for u in got] == [{"text": 3}]
    stream.skip("text", until=3)
    got += stream.updates()
    got += stream.push(text=text[4:], text_times=[3.5, 4])
    got += stream.flush(partial=True)
    assert [(u.start_seconds, u.end_seconds) for u in got[:3]] == [(0, 2), (1, 3), (2, 4)]
    for u, (a, b) in zip(got, [(0, 3), (2, 4), (3, 5), (4, 6)], strict=True):
        assert_same(u, model({"text": text[a:b]}))
    assert got[-1].partial
    with pytest.raises(InputError, match="the text has no times, and this stream has no other clock"):
        model.stream("text_only", window=2, hop=1, rates={}).push(text=text)


def test_more_tokens_than_the_model_takes_lose_the_oldest(model):
    most = MICRO.text.max_steps
    text = np.random.default_rng(5).normal(size=(most + 3, 6)).astype(np.float32)
    stream = model.stream("text_only", window=2, hop=1, rates={})
    stream.push(text=text, text_times=np.linspace(0, 1.9, len(text)))
    (update,) = stream.push(text=text[:1], text_times=[2])
    assert (update.cut, update.frames) == (3, {"text": most})
    assert_same(update, model({"text": text[3:]}))
    with pytest.raises(InputError, match=rf"text has {most + 3} steps, expected at most {most}"):
        model.stream("auto", window="0.5", hop=1, rates={"audio": 30}).push(text=text)


@pytest.mark.parametrize(
    ("said", "times", "why"),
    [
        (np.ones((2, 6)), [1.0], "2 tokens of text came with 1 times"),
        (np.ones((2, 6)), [1.0, 0.5], "times of the text fall"),
        (np.ones((1, 6)), [0.1], "times of the text fall"),
        (np.ones((1, 6)), [np.nan], "a time of the text is 'nan'"),
        (np.ones((1, 6)), [-1], "a time of the text is '-1'"),
        (np.ones((1, 5)), [3], r"text has 5 features"),
        (np.full((1, 6), np.inf), [3], "NaN or infinite"),
        ("word", [3], "one string came with text_times"),
        ("word", None, "has no text encoder and takes no words"),
        (["word"], [3], "has no text encoder and takes no words"),
        (np.ones((70_000, 6)), np.full(70_000, 1e6), "wait for their windows, expected at most 65536"),
        (None, [3], "text_times came without text"),
    ],
)
def test_bad_text_is_refused_and_nothing_is_changed(model, said, times, why):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30})
    text = np.ones((1, 6), np.float32)
    stream.push(text=text, text_times=[0.2])
    with pytest.raises(InputError, match=why):
        stream.push(audio=np.zeros((3, 3)), text=said, text_times=times)
    (update,) = stream.push(audio=np.ones((15, 3)))
    assert_same(update, model({"audio": np.ones((15, 3)), "text": text}))


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "why"),
    [
        (np.ones((4, 5)), "audio has 5 features"),
        (np.ones((0, 5)), "audio has 5 features"),
        (np.ones((4, 3), int), "audio has dtype int64"),
        (np.ones((4, 3), complex), "audio has dtype complex128"),
        (np.ones((1, 4, 3)), r"audio has shape \[1, 4, 3\]"),
        (np.ones(3), r"audio has shape \[3\]"),
        ([[1.0, 2.0, 3.0], [1.0]], "holds Python objects"),
        (np.full((4, 3), np.nan), "audio has 12 NaN or infinite values among 12"),
        (np.full((4, 3), 1e300), "audio has 12 NaN or infinite"),
        ("noise", "audio has dtype"),
    ],
)
def test_a_bad_chunk_is_refused_whole(model, chunk, why):
    rates = {"audio": 30, "vision": 20}
    frames = recording(rates, 2)
    stream = model.stream("text_missing", window="0.5", hop="0.25", rates=rates, live=False)
    got = stream.push(audio=frames["audio"][:20], vision=frames["vision"][:15])
    before = stream.positions
    with pytest.raises(Exception, match=f"stream: .*{why}|{why}") as told:
        stream.push(audio=chunk, vision=frames["vision"][15:20])
    assert "\n" not in str(told.value)
    assert stream.positions == before
    got += stream.push(audio=frames["audio"][20:], vision=frames["vision"][15:])
    assert [u.index for u in got] == list(range(7))
    for u in got:
        assert_same(u, *offline(model, frames, rates, Fraction(u.index, 4), Fraction(u.index + 2, 4)))


def test_clean_counts_in_each_window_what_the_offline_call_counts(model):
    frames = recording({"audio": 30, "vision": 20}, 3)
    frames["audio"][20:22, 1] = np.nan
    frames["audio"][40, 0] = np.inf
    frames["vision"][5] = -np.inf
    cleaning = load(model.bundle.path, threads=1, clean=True)
    stream = cleaning.stream("auto", window="0.5", hop="0.3", rates={"audio": 30, "vision": 20}, live=False)
    got = [
        u
        for i in range(30)
        for u in stream.push(**{m: x[len(x) * i // 30 :][: len(x) // 30] for m, x in frames.items()})
    ]
    assert sum(bool(u.cleaned) for u in got) >= 4
    for u in got:
        start = Fraction(3, 10) * u.index
        assert_same(u, *offline(cleaning, frames, {"audio": 30, "vision": 20}, start, start + Fraction(1, 2)))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            {"window": 0.6},
            r"window of 0.6 s holds 18 frames of audio, expected at most 16: .* possible here is 0.533333 s",
        ),
        ({"window": "1e9"}, "longest window possible here is 0.533333 s"),
        ({"window": 0}, "window is '0', expected a positive number"),
        ({"window": -1}, "window is '-1'"),
        ({"window": float("nan")}, "window is 'nan'"),
        ({"window": "1e999999999"}, "window is '1e999999999'"),
        ({"window": "ten"}, "window is 'ten'"),
        ({"window": True}, "window is 'True'"),
        ({"window": 0.001}, "shorter than a frame of audio"),
        ({"hop": 0}, "hop is '0'"),
        ({"hop": "1/0"}, "hop is '1/0'"),
        ({"hop": 0.001}, r"hop of 0.001 s brings no new frame, expected at least 0.0333333 s"),
        ({"delay": -1}, "delay is '-1', expected a number from 0 on"),
        ({"patience": 0}, "patience is '0'"),
        ({"patience": 1e9}, "would have to be kept"),
        ({"rates": {"audio": 30}}, "no rate of vision was given"),
        ({"rates": {"audio": 30, "vision": "fast"}}, "the rate of vision is 'fast'"),
        ({"rates": {"audio": 30, "vision": 0}}, "the rate of vision is '0'"),
        ({"rates": {"audio": 30, "vison": 20}}, "a rate of 'vison' was given, expected audio or vision"),
        ({"rates": {"audio": 30, "vision": 20, "text": 2}}, "a rate of 'text' was given"),
        ({"variant": "ful"}, "unknown variant 'ful': did you mean 'full'"),
    ],
)
def test_what_cannot_be_streamed_is_refused_at_the_start(model, arguments, why):
    given_ = {"variant": "text_missing", "window": 0.5, "hop": 0.25, "rates": {"audio": 30, "vision": 20}, **arguments}
    with pytest.raises(InputError, match=why) as told:
        model.stream(given_.pop("variant"), **given_)
    assert "\n" not in str(told.value)


def test_the_longest_window_named_is_taken(model):
    rates = {"audio": "29.97", "vision": 25}
    with pytest.raises(InputError) as told:
        model.stream("auto", window=1, hop=1, rates=rates)
    longest = str(told.value).rpartition("here is ")[2].removesuffix(" s")
    assert float(longest) == pytest.approx(16 / 29.97, abs=1e-6)
    stream = model.stream("auto", window=longest, hop=1, rates=rates, live=False)
    got = stream.push(**recording(rates, 12))
    assert len(got) == 12
    assert max(u.frames["audio"] for u in got) == 16


def test_a_variant_that_is_not_in_the_bundle_is_refused(tmp_path):
    from helpers.small_bundle import make_bundle

    model = load(make_bundle(tmp_path / "b", ("audio_only",)))
    with pytest.raises(InputError, match="'text_missing' is not in this bundle"):
        model.stream("text_missing", window="0.5", hop=1, rates={"audio": 30, "vision": 20})


def test_auto_does_without_what_no_variant_of_the_bundle_takes(tmp_path):
    from helpers.small_bundle import make_bundle

    model = load(make_bundle(tmp_path / "b", ("audio_only",)))
    stream = model.stream("auto", window="0.5", hop=1, rates={"audio": 30, "vision": 20})
    (update,) = stream.push(audio=np.ones((15, 3)), vision=np.ones((10, 4)))
    assert update.variant == "audio_only"
    assert update.frames == {"audio": 15}
    assert stream.ignored == ("vision",)
    stream.skip("audio", until=2)
    with pytest.raises(InputError, match=r"has vision alone, .*\(audio_only\) need more: add 'vision_only'"):
        stream.push(vision=np.ones((20, 4)))
    assert stream.counts == Counts(scored=1, failed=1)


def test_modalities_that_the_variant_does_without_are_ignored_and_told(model):
    stream = model.stream("audio_only", window="0.5", hop="0.5", rates={"audio": 30, "vision": 20})
    frames = recording({"audio": 30}, 1)["audio"]
    got = stream.push(audio=frames, vision=np.ones((2, 99)), text="anything")
    assert [u.frames for u in got] == [{"audio": 15}] * 2
    assert stream.ignored == ("text", "vision")
    with pytest.raises(InputError, match=r"vision came, .* without its rate: give rates=\{'vision': frames per"):
        model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30}).push(vision=np.ones((2, 4)))


# --- its end, errors, threads ---------------------------------------------------------------------------------------


def test_flush_gives_what_waited_and_the_last_part_if_asked(model):
    frames = recording({"audio": 30}, 2)["audio"]
    for asked in (False, True):
        stream = model.stream("audio_only", window="0.5", hop="0.2", rates={"audio": 30}, delay="0.3")
        got = stream.push(audio=frames[:40])  # 1.333 s
        assert [u.index for u in got] == [0, 1, 2]
        end = stream.flush(partial=asked)
        assert [(u.index, u.partial) for u in end] == [(3, False), (4, False)] + [(5, True)] * asked
        if asked:
            assert (end[-1].start_seconds, end[-1].end_seconds) == (1.0, 40 / 30)
            assert_same(end[-1], model({"audio": frames[30:40]}), {"audio": 10})
        assert stream.flush(partial=asked) == []
        with pytest.raises(InputError, match="has ended and takes no more frames"):
            stream.push(audio=frames[:1])


def test_a_source_shorter_than_the_window(model):
    frames = recording({"audio": 30}, 2)["audio"]
    with model.stream("auto", window="0.5", hop="0.2", rates={"audio": 30}) as stream:
        assert stream.push(audio=frames[:3]) == stream.push() == []
        (update,) = stream.flush(partial=True)
        assert_same(update, model({"audio": frames[:3]}), {"audio": 3})
    with model.stream("auto", window="0.5", hop="0.2", rates={"audio": 30}) as stream:
        assert stream.flush(partial=True) == []
    with pytest.raises(InputError, match="has ended"):
        stream.append(audio=frames)
    assert stream.flush(partial=True) == stream.updates() == []


def test_nothing_is_new_after_the_last_whole_window(model):
    """A window that ended with the source is not scored again, and a gap between windows belongs to none."""
    for hop, frames in (("0.2", 15), ("1", 20)):
        stream = model.stream("audio_only", window="0.5", hop=hop, rates={"audio": 30})
        assert len(stream.push(audio=np.ones((frames, 3)))) == 1
        assert stream.flush(partial=True) == []


def test_a_window_that_fails_does_not_end_the_stream(model, monkeypatch):
    frames = recording({"audio": 30}, 3)["audio"]
    stream = model.stream("audio_only", window="0.5", hop="0.5", rates={"audio": 30}, live=False)
    call = Predictor.__call__

    def failing(me, clip, *, variant):
        if clip.name == "window 2":
            raise CheckFailed("no number")
        return call(me, clip, variant=variant)

    monkeypatch.setattr(Predictor, "__call__", failing)
    with pytest.raises(CheckFailed, match="no number"):
        stream.push(audio=frames[:50])
    got = stream.push(audio=frames[50:])
    assert [(u.index, u.missed) for u in got] == [(0, 0), (1, 0), (3, 1), (4, 0), (5, 0)]
    assert stream.counts == Counts(scored=5, failed=1)


def test_several_threads_may_push(model):
    """A thread per modality; every window once, each the offline one."""
    rates = {"audio": 30, "vision": 20}
    frames = recording(rates, 20)
    stream = model.stream("text_missing", window="0.5", hop="0.1", rates=rates, live=False, patience=30)
    got, failures = [], []

    def source(m):
        try:
            for x in np.array_split(frames[m], 97):
                got.extend(stream.push(**{m: x}))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=source, args=(m,)) for m in frames]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not failures
    assert sorted(u.index for u in got) == list(range(196))
    for u in got[::7]:
        start = Fraction(u.index, 10)
        assert_same(u, *offline(model, frames, rates, start, start + Fraction(1, 2)))


def test_an_update_says_everything(model):
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 30})
    (update,) = stream.push(audio=np.ones((15, 3)))
    assert set(dataclasses.asdict(update)) == {f.name for f in dataclasses.fields(update)}
    assert 0 < update.run_seconds <= update.latency_seconds
    assert update.variant == variant_for(["audio"]).name
    assert sum(update.modality_weights.values()) == pytest.approx(1)
