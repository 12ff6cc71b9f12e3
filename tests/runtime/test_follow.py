"""`hcmen-follow`: chunks that appear while it runs, damaged ones, its end; the scores are those of the stream."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.command import Outcome, run
from helpers.small_bundle import INPUTS, clip_arrays

from hcmen.base.clip import write_clip
from hcmen.base.typed import as_typed
from hcmen.runtime import load
from hcmen.runtime.commands import follow as follow_module
from hcmen.runtime.commands.follow import main
from hcmen.runtime.commands.run import main as run_main

ARGUMENTS = ("--window", "0.5", "--hop", "0.25", "--rate", "audio=30", "--rate", "vision=20", "--threads", 1)


def chunks(count: int = 6, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """`count` chunks of half a second."""
    rng = np.random.default_rng(seed)
    sizes = {"audio": 15, "vision": 10}
    return [
        {m: rng.normal(size=(n, INPUTS.modality(m).features)).astype(np.float32) for m, n in sizes.items()}
        for _ in range(count)
    ]


def by_stream(bundle: Path, parts: list[dict[str, np.ndarray]], **flush: bool) -> list[tuple]:
    """(window, score, variant, partial) of the same chunks pushed by hand."""
    stream = load(bundle, threads=1).stream(
        "auto", window="0.5", hop="0.25", rates={"audio": 30, "vision": 20}, live=False
    )
    updates = [u for part in parts for u in stream.push(**part)] + stream.flush(**flush)
    return [(u.index, u.score, u.variant, u.partial) for u in updates]


def told(out: str) -> list[tuple]:
    """The same of the command's output."""
    answers = [json.loads(line) for line in out.splitlines()]
    return [(a["window"], a["score"], a["variant"], a["partial"]) for a in answers]


def follow(bundle: Path, source: object, *more: object) -> Outcome:
    return run(main, source, "--bundle", bundle, *ARGUMENTS, *more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "chunks").mkdir()
    return tmp_path / "chunks"


@pytest.fixture
def ended(folder: Path) -> Path:
    """A folder of six chunks, numbered without zeros, and the end."""
    for i, arrays in enumerate(chunks()):
        write_clip(folder / f"chunk-{i + 7}.npz", arrays)
    (folder / "end").touch()
    return folder


def test_a_line_of_json_per_update(shared_bundle, ended):
    done = follow(shared_bundle, ended, "--format", "json")
    assert done.code == 0
    assert told(done.out) == by_stream(shared_bundle, chunks())
    answer = json.loads(done.out.splitlines()[0])
    assert answer["schema_version"] == 1
    assert (answer["start_seconds"], answer["end_seconds"]) == (0.0, 0.5)
    assert answer["frames"] == {"audio": 15, "vision": 10}
    assert sum(answer["modality_weights"].values()) == pytest.approx(1)
    assert 0 < answer["run_ms"] <= answer["latency_ms"]
    (summary,) = done.lines
    assert re.match(r"11 updates from 6 chunks, latency median \d+\.\d ms, longest \d+\.\d ms", summary)


def test_a_line_of_text_per_update(shared_bundle, ended):
    done = follow(shared_bundle, ended)
    scale, header, *lines = done.out.splitlines()
    assert scale == "scores are of -3 (negative) to 3 (positive)"
    assert header.split() == ["window", "variant", "score", "text", "audio", "vision", "latency"]
    expected = by_stream(shared_bundle, chunks())
    for line, (index, score, variant, _) in zip(lines, expected, strict=True):
        assert line.split()[:5] == [f"{index / 4:.3f}", "-", f"{index / 4 + 0.5:.3f}", variant, f"{score:+.4f}"]
        assert re.search(r" \d+\.\d ms(, late by \d+\.\d ms)?$", line)
    assert lines[0].split()[5] == "-"
    assert lines[0].index(" text_missing ") + 1 == header.index("variant")
    assert follow(shared_bundle, ended, "-q").err == ""


def test_the_last_part_if_asked(shared_bundle, ended):
    (ended / "chunk-12.npz").unlink()
    write_clip(ended / "chunk-12.npz", {"audio": chunks()[5]["audio"][:5]})
    parts = [*chunks()[:5], {"audio": chunks()[5]["audio"][:5]}]
    done = follow(shared_bundle, ended, "--format", "json", "--partial")
    assert told(done.out) == by_stream(shared_bundle, parts, partial=True)
    assert [x[3] for x in told(done.out)][-2:] == [False, True]


def test_paths_on_stdin(shared_bundle, ended):
    names = [str(ended / f"chunk-{i + 7}.npz") for i in range(6)]
    command = [
        sys.executable,
        "-c",
        "from hcmen.runtime.commands.follow import main; main()",
        "--bundle",
        str(shared_bundle),
    ]
    command += ["-", *map(str, ARGUMENTS), "--format", "json"]
    lines = "\n".join([*names[:3], "", str(ended / "none.npz"), *names[3:]])
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert told(done.stdout) == by_stream(shared_bundle, chunks())
    assert done.stderr.splitlines()[0] == f"error: {ended / 'none.npz'}: no such file or directory: check the path"
    assert follow(shared_bundle, "-").code == 2  # the runner's stdin is no file


# --- live -----------------------------------------------------------------------------------------------------------


class Process:
    """`hcmen-follow` in a process of its own, its lines read as they come."""

    def __init__(self, bundle: Path, *arguments: object):
        code = "from hcmen.runtime.commands.follow import main; main()"
        command = [sys.executable, "-c", code, "--bundle", str(bundle), "--format", "json", *map(str, arguments)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def wait_for(self, count: int) -> list[tuple]:
        """The first `count` updates, as soon as they are there."""
        until = time.monotonic() + 120
        while len(self.lines) < count and time.monotonic() < until and self.process.poll() is None:
            time.sleep(0.02)
        return told("".join(self.lines))

    def end(self) -> tuple[int, str]:
        """The exit code and stderr."""
        code = self.process.wait(120)
        self.reader.join(10)
        assert self.process.stderr is not None
        return code, self.process.stderr.read()


@pytest.fixture
def process(shared_bundle, folder):
    made = Process(shared_bundle, folder, *ARGUMENTS)
    yield made
    with contextlib.suppress(ProcessLookupError):
        made.process.kill()
    made.process.wait()


def test_updates_come_while_chunks_do_and_Ctrl_C_ends_it(shared_bundle, folder, process):
    """Each update is on stdout before the next chunk is written; half a file is waited for."""
    parts = chunks()
    expected = by_stream(shared_bundle, parts)
    write_clip(folder / "0.npz", parts[0])
    assert process.wait_for(1) == expected[:1]
    write_clip(folder / "1.npz", parts[1])
    assert process.wait_for(3) == expected[:3]

    # Written in place, in two halves; a later chunk is whole meanwhile.
    write_clip(folder / "whole", parts[2])
    content = (folder / "whole").read_bytes()
    with open(folder / "2.npz", "wb") as file:
        file.write(content[:700])
        file.flush()
        write_clip(folder / "3.npz", parts[3])
        time.sleep(0.5)
        assert len(process.lines) == 3
        file.write(content[700:])
    assert process.wait_for(7) == expected[:7]
    process.process.send_signal(signal.SIGINT)
    code, err = process.end()
    assert code == 130
    assert err.splitlines()[-1] == "error: interrupted"
    assert "7 updates from 4 chunks" in err


def test_a_folder_that_goes_away_ends_it(folder, process):
    write_clip(folder / "0.npz", chunks()[0])
    process.wait_for(1)
    (folder / "0.npz").unlink()
    folder.rmdir()
    code, err = process.end()
    assert code == 2
    assert err.splitlines()[-1].startswith(f"error: {folder}: no such file or directory: the folder that is followed")


def test_what_came_before_the_folder_went_away_is_scored(shared_bundle, folder, process):
    parts = [chunks()[0], {"audio": chunks()[1]["audio"]}]  # whose last windows wait for their vision
    for i, arrays in enumerate(parts):
        write_clip(folder / f"{i}.npz", arrays)
    assert len(by_stream(shared_bundle, parts)) > len(process.wait_for(1))
    time.sleep(1)
    shutil.rmtree(folder)
    code, _ = process.end()
    assert code == 2
    assert told("".join(process.lines)) == by_stream(shared_bundle, parts)


def _parentheses(path: Path) -> None:
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + b"(" * 300 + b")" * 300 + b", }"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("audio.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


BAD_CHUNKS = {
    "a pipe": (os.mkfifo, "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("gone.npz"), "no such file"),
    "parentheses": (_parentheses, "no valid .npy header"),
    "no bytes": (lambda path: path.touch(), "the file is empty"),
}


@pytest.mark.parametrize("live", [(), ("--live",)], ids=["paced", "live"])
def test_a_bad_chunk_costs_itself_alone(shared_bundle, ended, live):
    for i, (make, _) in enumerate(BAD_CHUNKS.values()):
        path = ended / f"chunk-{i + 7}-bad.npz"
        make(path)
        if not path.is_symlink():
            os.utime(path, (0, 0))  # as it has been for long
    started = time.monotonic()
    done = follow(shared_bundle, ended, "--format", "json", *live)
    assert time.monotonic() - started < 30
    assert done.code == 5
    if not live:  # which drops late windows
        assert told(done.out) == by_stream(shared_bundle, chunks())
    *errors, summary = done.lines
    assert "updates from 6 chunks" in summary
    for i, ((_, words), line) in enumerate(zip(BAD_CHUNKS.values(), errors, strict=True)):
        assert line.startswith(f"error: {ended / f'chunk-{i + 7}-bad.npz'}: ")
        assert words in line
        assert len(line) < 500


def test_a_chunk_that_is_touched_for_ever_is_given_up(shared_bundle, ended, monkeypatch):
    monkeypatch.setattr("hcmen.runtime.commands.follow._PATIENCE_SECONDS", 3.0)
    bad, over = ended / "chunk-9-bad.npz", threading.Event()
    bad.write_bytes(b"PK\x03\x04")

    def touch() -> None:
        while not over.wait(0.1):
            os.utime(bad)

    toucher = threading.Thread(target=touch)
    toucher.start()
    started = time.monotonic()
    try:
        done = follow(shared_bundle, ended, "--format", "json")
    finally:
        over.set()
        toucher.join()
    assert 3 <= time.monotonic() - started < 30
    assert done.code == 5
    assert told(done.out) == by_stream(shared_bundle, chunks())
    assert [line for line in done.lines if line.startswith("error: ")] == [done.lines[0]]
    assert str(bad) in done.lines[0]


def test_a_path_that_no_system_takes_costs_itself_alone(shared_bundle, ended):
    names = [str(ended / f"chunk-{i + 7}.npz") for i in range(6)]
    command = [sys.executable, "-c", "from hcmen.runtime.commands.follow import main; main()"]
    command += ["--bundle", str(shared_bundle), "-", *map(str, ARGUMENTS), "--format", "json"]
    lines = "\n".join([*names[:3], "a\0b.npz", "x" * 5000, *names[3:]])
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2, done.stderr
    assert told(done.stdout) == by_stream(shared_bundle, chunks())
    assert [line.startswith("error: ") for line in done.stderr.splitlines()] == [True, True, False]


def test_an_idle_source_has_ended(shared_bundle, folder):
    for i, arrays in enumerate(chunks()):
        write_clip(folder / f"{i}.npz", arrays)
    done = follow(shared_bundle, folder, "--idle-timeout", "0.2", "--format", "json")
    assert done.code == 0
    assert told(done.out) == by_stream(shared_bundle, chunks())
    assert done.lines[0] == "note: no chunk for 0.2 s, the source has ended"


def test_live_takes_in_all_that_is_there_before_it_scores(shared_bundle, ended, monkeypatch):
    """Behind by more than a hop, it goes on with the newest window."""
    now = iter(range(10**6))
    monkeypatch.setattr("hcmen.runtime.stream.time.perf_counter", lambda: float(next(now)))  # a second a look
    done = follow(shared_bundle, ended, "--live", "--format", "json")
    assert done.code == 0
    assert told(done.out) == by_stream(shared_bundle, chunks())[-1:]
    answer = json.loads(done.out)
    assert (answer["missed"], answer["late_ms"]) == (10, answer["latency_ms"] - 250)
    assert done.lines[0].endswith("1 late, 10 dropped")


# --- what goes wrong ------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch):
    """A damaged file is given up soon."""
    monkeypatch.setattr(follow_module, "_SETTLE_SECONDS", 0.1)


def test_damaged_chunks_get_a_line_and_the_stream_goes_on(shared_bundle, ended, impatient):
    parts = chunks()
    names = [ended / f"chunk-{i + 7}.npz" for i in range(6)]
    names[1].write_bytes(names[1].read_bytes()[:500])
    np.savez(names[2], audio=np.ones((15, 99), np.float32))
    np.savez(names[3], audio=np.full((15, 3), np.nan, np.float32), vision=parts[3]["vision"])
    (ended / "chunk-10x.npz").touch()
    done = follow(shared_bundle, ended, "--format", "json")
    assert done.code == 5
    assert told(done.out) == by_stream(shared_bundle, [parts[0], parts[4], parts[5]])
    errors = [line for line in done.lines if line.startswith("error: ")]
    for line, why in zip(
        errors,
        ["chunk-8.npz: damaged .npz", "chunk-9.npz: audio has 99 features", "chunk-10.npz: audio has 45 NaN",
         "chunk-10x.npz: the file is empty"],
        strict=True,
    ):  # fmt: skip
        assert why in line
    cleaned = follow(shared_bundle, ended, "--format", "json", "--clean", "-q")
    assert len(told(cleaned.out)) == len(told(done.out)) + 2
    assert cleaned.code == 5


def test_a_wrong_chunk_alone_is_bad_input(shared_bundle, ended):
    np.savez(ended / "chunk-9.npz", audio=np.ones((15, 99), np.float32))
    assert follow(shared_bundle, ended, "--format", "json").code == 2


def test_a_chunk_that_comes_out_of_order_is_told(shared_bundle, folder, process):
    write_clip(folder / "5.npz", chunks()[0])
    process.wait_for(1)
    write_clip(folder / "4.npz", chunks()[1])
    time.sleep(0.3)
    (folder / "end").touch()
    code, err = process.end()
    assert code == 0
    assert len(process.lines) == 1
    assert f"warning: {folder / '4.npz'}: came after later names and is left out: names must rise" in err


def test_numbers_far_apart_are_an_order_and_no_lost_time(shared_bundle, folder):
    for number, arrays in zip(("7", "9" * 30, "1" + "0" * 200), chunks(3), strict=True):
        write_clip(folder / f"chunk-{number}.npz", arrays)
    (folder / "end").touch()
    done = follow(shared_bundle, folder, "--format", "json", "--gaps")
    assert done.code == 0
    assert told(done.out) == by_stream(shared_bundle, chunks(3))


@pytest.mark.parametrize("number", ["1e-300", "1e300", "1e-99999999", "nan", "-1", "1/0", "9" * 5000])
@pytest.mark.parametrize("option", ["--window", "--hop", "--rate"])
def test_numbers_beyond_all_bounds_are_one_line(shared_bundle, folder, option, number):
    given = {"--window": "0.5", "--hop": "0.25", "--rate": "audio=30"}
    given[option] = f"audio={number}" if option == "--rate" else number
    done = run(main, folder, "--bundle", shared_bundle, *(word for pair in given.items() for word in pair))
    assert done.code == 2
    assert done.out == ""
    assert re.search(r"positive number, from 1e-12 to 1e12", done.err)


def test_hidden_files_folders_and_others_are_no_chunks(shared_bundle, ended):
    (ended / ".chunk-1.npz").write_bytes(b"half a file")
    (ended / ".chunk-1.npz.tmp-7").write_bytes(b"half a file")
    (ended / "chunk-2.npz").mkdir()
    (ended / "notes.txt").touch()
    done = follow(shared_bundle, ended, "--format", "json")
    assert (done.code, told(done.out)) == (0, by_stream(shared_bundle, chunks()))


def test_a_chunk_may_be_longer_than_the_model(shared_bundle, folder):
    parts = chunks(40)
    whole = {m: np.concatenate([p[m] for p in parts]) for m in parts[0]}
    assert len(whole["audio"]) > 10 * INPUTS.audio.max_steps
    write_clip(folder / "0.npz", whole)
    (folder / "end").touch()
    done = follow(shared_bundle, folder, "--format", "json")
    assert told(done.out) == by_stream(shared_bundle, parts)


def test_gaps_align_what_comes_after(shared_bundle, folder):
    """Vision is missing in two chunks; with --gaps it goes on at its own time, as skip() does."""
    parts = chunks()
    for i, part in enumerate(parts):
        write_clip(folder / f"{i}.npz", {m: x for m, x in part.items() if m == "audio" or i not in (2, 3)})
    (folder / "end").touch()
    stream = load(shared_bundle).stream("auto", window="0.5", hop="0.25", rates={"audio": 30, "vision": 20}, live=False)
    expected = []
    for i, part in enumerate(parts):
        if i in (2, 3):
            expected += stream.push(audio=part["audio"])
            stream.skip("vision", until=(i + 1) / 2)
            expected += stream.updates()
        else:
            expected += stream.push(**part)
    done = follow(shared_bundle, folder, "--gaps", "--format", "json")
    assert told(done.out) == [(u.index, u.score, u.variant, u.partial) for u in expected]
    assert [x[2] for x in told(done.out)] == ["text_missing"] * 4 + ["audio_only"] * 3 + ["text_missing"] * 4


def test_text_in_a_chunk_holds_until_the_next(shared_bundle, folder):
    parts = chunks(3)
    parts[1]["text"] = clip_arrays(5)["text"]
    for i, part in enumerate(parts):
        write_clip(folder / f"{i}.npz", part)
    (folder / "end").touch()
    done = follow(shared_bundle, folder, "--format", "json")
    assert told(done.out) == by_stream(shared_bundle, parts)
    assert {x[2] for x in told(done.out)} == {"text_missing", "full"}
    named = follow(shared_bundle, folder, "--format", "json", "--variant", "text_missing")
    assert {x[2] for x in told(named.out)} == {"text_missing"}
    assert named.lines[0].endswith("1.npz: text and the like in later chunks are ignored")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (
            ["--window", "5"],
            "holds 150 frames of audio, expected at most 20: the longest window possible here is 0.666",
        ),
        (["--rate", "audio=40"], "--rate is 'audio=40', expected each modality once"),
        (["--rate", "text=40"], "a rate of 'text' was given"),
        (["--rate", "vision"], "--rate is 'vision', expected each modality once"),
        (["--idle-timeout", "-1"], "--idle-timeout is -1.0, expected a positive number"),
        (["--idle-timeout", "nan"], "--idle-timeout is nan"),
        (["--self-test"], "No such option"),
        (["clip.npz"], "unexpected extra argument (clip.npz)"),
        (["--variant", "ful"], "did you mean 'full'"),
        (["--variant", "full", "--hop", "0"], "hop is '0'"),
    ],
)
def test_bad_options_are_one_line(shared_bundle, folder, arguments, why):
    done = follow(shared_bundle, folder, *arguments)
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert why in done.err


def test_what_must_be_there(shared_bundle, folder):
    done = run(main, folder, "--bundle", shared_bundle, "--window", "1")
    assert (done.code, done.lines) == (
        2,
        ["error: hcmen-follow needs --window and --hop, both in seconds: for instance --window 4 --hop 0.5"],
    )
    done = follow(shared_bundle, "nowhere")
    assert (done.code, done.out, len(done.lines)) == (2, "", 1)
    assert "nowhere: no such folder, expected one that chunks appear in" in done.err


@pytest.mark.parametrize("joined", [True, False])
def test_the_option_of_hcmen_run_that_it_was_says_where_it_is_now(shared_bundle, ended, joined):
    words = [f"--follow={ended}"] if joined else ["--follow", ended]
    done = run(run_main, "--bundle", shared_bundle, *words, *ARGUMENTS, "--format", "json")
    assert done.code == 0
    assert told(done.out) == by_stream(shared_bundle, chunks())
    assert done.lines[0] == (
        f"warning: hcmen-run --follow FOLDER goes away in the next version: use {as_typed('hcmen-follow', 'FOLDER')}"
    )
    assert "--follow" not in run(run_main, "--help").out
    done = run(run_main, "clip.npz", "--bundle", shared_bundle, "--window", "1")
    assert (done.code, "No such option" in done.err, "--window" in done.err) == (2, True, True)


def test_a_closed_pipe_ends_it(shared_bundle, ended):
    read, write = os.pipe()
    os.close(read)
    code = "from hcmen.runtime.commands.follow import main; main()"
    command = [sys.executable, "-c", code, "--bundle", str(shared_bundle), str(ended), *map(str, ARGUMENTS)]
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=120, check=False)
    finally:
        os.close(write)
    assert done.returncode == 141
    assert b"Traceback" not in done.stderr
