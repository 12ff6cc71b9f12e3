"""hcmen-convert: the same numbers as the pickle, in bounded memory, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.micro import MICRO
from helpers.mmsa_files import FILES, expected, make, soil, written

from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.modalities import MODALITIES
from hcmen.data import folder, layout
from hcmen.data.convert import convert, main
from hcmen.data.mmsa import read_mmsa
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.training import command as train
from hcmen.training.config import TrainConfig
from hcmen.training.presets import Preset
from hcmen.training.trainer import Trainer

FILE = FILES["mosi aligned"]
UNALIGNED = FILES["mosi unaligned"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "set.pkl", make(FILE))


def run(*arguments: Any) -> int:
    return main.main([*map(str, arguments)], standalone_mode=False)


def names(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in tmp_path.iterdir())


# --- the result -------------------------------------------------------------------------------------------------------


def test_the_index_says_where_the_numbers_come_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make(FILE)
    cleaned = soil(data)
    path = written(tmp_path / "set.pkl", data)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert run(path, tmp_path / "a" / "b", "--sha256", digest.upper(), "--format", "json") == 0
    captured = capsys.readouterr()
    index = json.loads((tmp_path / "a" / "b" / "dataset.json").read_text())
    labels = np.concatenate([split["regression_labels"] for split in data.values()]).astype(np.float32)
    assert index["schema_version"] == 1
    assert index["source"] == {"file": "set.pkl", "bytes": path.stat().st_size, "sha256": digest}
    assert index["cleaned"] == cleaned
    assert (index["label_min"], index["label_max"]) == (labels.min(), labels.max())
    assert {s: x["samples"] for s, x in index["splits"].items()} == {"train": 5, "valid": 3, "test": 4}
    assert index["splits"]["test"]["sizes"] == {
        "text": {"steps": 50, "features": 768},
        "audio": {"steps": 50, "features": 5},
        "vision": {"steps": 50, "features": 20},
    }
    assert index["misplaced"] == dict.fromkeys(("text", "audio", "vision"), 0)
    assert index["left_out"] == {}
    assert (index["label_range"], index["front_ends"]) == (None, {})
    told = json.loads(captured.out)
    assert {key: index[key] for key in index if key != "versions"} == {k: v for k, v in told.items() if k != "out"}
    assert captured.err.splitlines() == [
        f"{m}: {cleaned[m]} stored values were NaN or infinite and are 0 now" for m in ("audio", "vision")
    ]
    assert names(tmp_path / "a") == ["b"]


def test_the_page_on_data_names_every_key_of_the_index(tmp_path: Path, source: Path) -> None:
    assert run(source, tmp_path / "out") == 0
    page = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    rows = page.partition("| key | what it says |\n|---|---|\n")[2].partition("\n\n")[0].splitlines()
    told = [key for row in rows for key in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(told) == sorted(json.loads((tmp_path / "out" / "dataset.json").read_text()))


@pytest.mark.parametrize("piece", [1, 30_000, 1 << 23])
@pytest.mark.parametrize("order", ["C", "F"])
def test_pieces_of_any_size_give_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, order: Any
) -> None:
    data = make(FILE)
    soil(data)
    monkeypatch.setattr(layout, "_PIECE_BYTES", piece)
    stored = {
        s: {k: np.asarray(v, order=order) if k in MODALITIES else v for k, v in x.items()} for s, x in data.items()
    }
    convert(written(tmp_path / "set.pkl", stored), tmp_path / "set")
    for s, split in read_mmsa(tmp_path / "set", FILE.config.inputs).splits.items():
        for m in MODALITIES:
            for i, frames in enumerate(expected(data[s], m)):
                assert split.lengths[m][i] == len(frames)
                np.testing.assert_array_equal(split.features[m][i, : len(frames)], frames)


def test_features_stay_on_disk(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "set")
    for split in read_mmsa(tmp_path / "set", FILE.config.inputs).splits.values():
        for x in split.features.values():
            assert type(x) is np.ndarray
            assert isinstance(x.base, np.memmap)
            assert not x.flags.writeable


# --- training on it ---------------------------------------------------------------------------------------------------

TRAIN = TrainConfig(epochs=2, batch_size=10, learning_rate=1e-3)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_training_on_the_folder_is_training_on_the_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    monkeypatch.setattr(train, "preset_named", lambda name: Preset("tiny", "for tests", MICRO, TRAIN))
    data = make_synthetic(MICRO.inputs, (24, 12, 16))
    data["train"]["audio"] = data["train"]["audio"].astype(np.float64)
    data["train"]["audio"][2, 0, 0], data["valid"]["vision"][1, 1, 1] = -np.inf, np.nan
    write_synthetic(tmp_path / "set.pkl", data)
    convert(tmp_path / "set.pkl", tmp_path / "set")
    results = {}
    for form in ("set.pkl", "set"):
        out = tmp_path / f"from {form}"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert (
                train.main.main(["--data", str(tmp_path / form), "--out", str(out), "-q"], standalone_mode=False) == 0
            )
        report = json.loads((out / "report.json").read_text())
        results[form] = {
            "weights": (out / "checkpoint.safetensors").read_bytes(),
            "log": [
                {k: v for k, v in json.loads(line).items() if k != "seconds"}
                for line in (out / "log.jsonl").read_text().splitlines()
            ],
            "normalisation": json.loads((out / "config.json").read_text())["normalisation"],
            "cleaned": report["dataset"]["cleaned"],
            "test": report["test"],
            "clips": {p.name: p.read_bytes() for p in (out / "clips").iterdir()},
        }
    assert results["set"] == results["set.pkl"]
    assert results["set"]["cleaned"] == {"text": 0, "audio": 1, "vision": 1}


def test_the_digest_of_the_data_is_the_same(tmp_path: Path) -> None:
    """So a run on the one is known to be of the same data as a run on the other, and one changed number is not."""
    write_synthetic(tmp_path / "set.pkl", make_synthetic(MICRO.inputs, (130, 12, 16)))
    convert(tmp_path / "set.pkl", tmp_path / "set")
    sets = [read_mmsa(tmp_path / name, MICRO.inputs) for name in ("set.pkl", "set", "set.pkl")]
    sets[2].splits["train"].features["audio"][129, 0, 0] += 1.0
    digests = [Trainer(MICRO, TRAIN, d, tmp_path)._fingerprint for d in sets]
    assert digests[0] == digests[1] != digests[2]


# --- memory -----------------------------------------------------------------------------------------------------------

MEASURED = """
import sys
from hcmen.data.convert import main
code = main.main(sys.argv[1:], standalone_mode=False)
# Not getrusage: its peak begins at what the parent had when it started this process.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak.split()[1], file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's account of memory")
@pytest.mark.parametrize(
    ("samples", "order", "protocol"),
    [(1150, "C", 4), (300, "F", 5), (300, "K", 5), (300, "C", 2)],
    ids=["600 MB", "Fortran", "turned", "text"],
)
def test_memory_stays_below_the_bound(tmp_path: Path, samples: int, order: Any, protocol: int) -> None:
    """Peak resident set, mapped pages and interpreter included, on MOSEI's sizes: 200 MB are promised for any file."""
    generator = np.random.default_rng(0)

    def split(n: int) -> dict[str, Any]:
        return {
            "text": generator.random((n, 50, 768), dtype=np.float32),
            # "K": a view with its axes in turn, which NumPy writes as it lies since 2.3.
            "audio": generator.random((500, 74, n)).transpose(2, 0, 1)
            if order == "K"
            else np.asarray(generator.random((n, 500, 74)), order=order),
            "vision": generator.random((n, 500, 35), dtype=np.float32),
            "text_bert": np.ones((n, 3, 50)),
            "audio_lengths": [500] * n,
            "vision_lengths": [400] * n,
            "regression_labels": np.zeros(n),
            "id": [f"video$_${i}" for i in range(n)],
        }

    data = {"train": split(samples), "valid": split(3), "test": split(2)}
    path = tmp_path / "set.pkl"
    try:
        with open(path, "wb") as file:
            pickle.dump(data, file, protocol=protocol)
        assert path.stat().st_size > (600e6 if samples > 1000 else 150e6)
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, path, tmp_path / "set", "-q"], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        # What does not grow with the file is about 75 MB; the rest of the 200 is for names and raw texts.
        assert int(done.stderr) * 1024 < 120e6
        for m in MODALITIES:
            found = np.load(tmp_path / "set" / "train" / f"{m}.npy", mmap_mode="r")
            length = 400 if m == "vision" else 500
            np.testing.assert_array_equal(found[::97, :length], data["train"][m][::97, :length].astype(np.float32))
            assert not found[-1, length:].any()
    finally:
        path.unlink(missing_ok=True)
        for big in (tmp_path / "set").glob("*/*.npy"):
            big.unlink()


# --- whole or not at all ----------------------------------------------------------------------------------------------

PROGRAM = """
import os, signal, sys
from hcmen.data import folder
from hcmen.data.convert import main

write = folder._write_array
def broken(path, key, *rest):
    write(path, key, *rest)
    if path.parent.name == "valid" and key == "audio":
        {change}
folder._write_array = broken
main.main(sys.argv[1:])
"""


def process(change: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(change=change), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGKILL", -9)])
@pytest.mark.parametrize("before", [False, True])
def test_a_killed_conversion_leaves_nothing_half_written(
    tmp_path: Path, source: Path, name: str, code: int, before: bool
) -> None:
    out = tmp_path / "set"
    if before:
        convert(source, out)
        index = (out / "dataset.json").read_bytes()
    done = process(f"os.kill(os.getpid(), signal.{name})", source, out, *(["--force"] if before else []))
    assert done.returncode == code
    left = [n for n in names(tmp_path) if n not in ("set", "set.pkl")]
    assert len(left) == (1 if name == "SIGKILL" else 0)
    assert out.exists() == before
    if before:
        assert (out / "dataset.json").read_bytes() == index
        read_mmsa(out, FILE.config.inputs)
    # What a process could not remove itself, the next one does.
    assert run(source, out, "--force", "-q") == 0
    assert names(tmp_path) == ["set", "set.pkl"]


def test_a_full_disk_is_told_of_before(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr(folder.shutil, "disk_usage", lambda path: Usage)
    assert run(source, tmp_path / "set") == 2
    assert "set: needs 0.0 GB, 0.0 GB are free: free some space" in capsys.readouterr().err
    assert names(tmp_path) == ["set.pkl"]


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done = process(f"raise OSError({errno.ENOSPC}, os.strerror({errno.ENOSPC}))", source, tmp_path / "set")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {tmp_path / 'set'}: no space left on device, expected a place")
    assert done.stderr.count("\n") == 1
    assert names(tmp_path) == ["set.pkl"]


def test_a_limit_on_the_size_of_files(tmp_path: Path, source: Path) -> None:
    """The kernel, not a stand-in, refuses to write."""
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    done = subprocess.run(
        [sys.executable, "-c", limited + PROGRAM.format(change="pass"), source, tmp_path / "set"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "set: file too large, expected a place" in done.stderr
    assert names(tmp_path) == ["set.pkl"]


def test_scratch_space_that_runs_out(tmp_path: Path) -> None:
    """Protocol 2 spells large arrays as text, which is respelt beside the output."""
    path = written(tmp_path / "set.pkl", make(UNALIGNED), 2)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    done = subprocess.run(
        [sys.executable, "-c", limited + PROGRAM.format(change="pass"), path, tmp_path / "set"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "file too large, expected scratch space" in done.stderr
    assert names(tmp_path) == ["set.pkl"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_truncated_pickle(tmp_path: Path) -> None:
    content = pickle.dumps(make(FILE), protocol=4)
    path = tmp_path / "set.pkl"
    for end in [0, 1, 100, *range(4096, len(content) - 1, len(content) // 40), len(content) - 1]:
        path.write_bytes(content[:end])
        with pytest.raises(CorruptFileError, match="truncated, damaged or not a pickle"):
            convert(path, tmp_path / "set")
        assert names(tmp_path) == ["set.pkl"]


class _Call:
    def __reduce__(self) -> Any:
        return os.system, ("echo caught",)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_hostile_pickle_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str], protocol: int) -> None:
    data = make(UNALIGNED)
    data["test"]["extra"] = _Call()
    path = written(tmp_path / "set.pkl", data, protocol)
    assert run(path, tmp_path / "set") == 5
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"the pickle asks for '{os.system.__module__}.system'" in captured.err
    assert captured.err.count("\n") == 1
    assert names(tmp_path) == ["set.pkl"]


def test_a_large_string_is_no_way_round(tmp_path: Path) -> None:
    """Texts that are left in the map count as no name, key or codec, and bytes there as no shape."""
    long = b"\x8d" + (1 << 17).to_bytes(8, "little") + b"a" * (1 << 17)
    raw = b"\x8e" + (1 << 17).to_bytes(8, "little") + b"a" * (1 << 17)
    path = tmp_path / "set.pkl"
    for content, message in (
        (b"\x80\x04" + long + long + b"\x93.", "STACK_GLOBAL requires str"),
        (b"\x80\x04c_codecs\nencode\n" + long + long + b"\x86R.", "_codecs.encode with codec"),
        (b"\x80\x04c_codecs\nencode\n" + raw + b"\x85R.", "_codecs.encode with codec"),
        (b"\x80\x04" + long + b"}b.", "setting the state of a LongText"),
        (b"\x80\x04" + long + b")R.", "a call of a LongText"),
    ):
        path.write_bytes(content)
        with pytest.raises(CorruptFileError, match=message):
            convert(path, tmp_path / "set")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--sha256", "0" * 64), 5, "SHA-256 is .*, expected 0{64}: another file, or a damaged one"),
        (("--sha256", "78e0f8b5"), 2, "the SHA-256 '78e0f8b5' is no digest, expected 64 hexadecimal digits"),
    ],
)
def test_the_checksum_is_held_against_the_file(
    tmp_path: Path, source: Path, arguments: tuple[str, ...], code: int, message: str, capfd: Any
) -> None:
    assert run(source, tmp_path / "set", *arguments) == code
    err = capfd.readouterr().err
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert names(tmp_path) == ["set.pkl"]


def test_what_is_there_is_replaced_on_request_alone(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    convert(source, out)  # an empty folder is no loss
    with pytest.raises(InputError, match="holds a data set already: replace it with --force"):
        convert(source, out)
    (out / "old").touch()
    convert(source, out, force=True)
    assert not (out / "old").exists()
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter").touch()
    (tmp_path / "link").symlink_to(out)
    for name, message in (
        ("home", "so it is no data set to replace"),
        ("set.pkl", "is no folder"),
        ("link", "no folder"),
    ):
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / name, force=True)
    assert names(tmp_path) == ["home", "link", "set", "set.pkl"]


def test_sources_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("nothing", "no such file"), (".", "is a directory"), ("pipe", "not a regular file")):
        with pytest.raises(InputError, match=message):
            convert(tmp_path / name, tmp_path / "set")


def test_progress_is_shown_on_stderr(tmp_path: Path) -> None:
    shown: list[tuple[str, int, int]] = []
    path = written(tmp_path / "set.pkl", make(UNALIGNED))
    convert(path, tmp_path / "set", on_progress=lambda *call: shown.append(call))
    for label, total in (("checksum", path.stat().st_size), ("converting", 4 * 12 * (50 * 768 + 375 * 5 + 500 * 20))):
        done = [count for name, count, _ in shown if name == label]
        assert done == sorted(done)
        assert done[-1] == total
        assert {t for name, _, t in shown if name == label} == {total}


# --- damaged folders --------------------------------------------------------------------------------------------------


def _rewrite_index(change: Any) -> Any:
    def damage(out: Path) -> None:
        index = json.loads((out / "dataset.json").read_text())
        change(index)
        (out / "dataset.json").write_text(json.dumps(index))

    return damage


def _same_size(name: str, array: Any) -> Any:
    def damage(out: Path) -> None:
        np.save(out / name, array)
        index = json.loads((out / "dataset.json").read_text())
        index["splits"]["valid"]["bytes"][Path(name).name] = (out / name).stat().st_size
        (out / "dataset.json").write_text(json.dumps(index))

    return damage


def _archive(out: Path) -> None:
    _same_size("valid/text.npy", np.zeros(3))(out)
    path = out / "valid" / "text.npy"
    path.write_bytes(b"PK\x03\x04".ljust(path.stat().st_size, b"\0"))


DAMAGED = {
    "no index": (lambda out: (out / "dataset.json").unlink(), InputError, "is a directory without dataset.json"),
    "index cut": (lambda out: os.truncate(out / "dataset.json", 50), CorruptFileError, "not valid JSON"),
    "index is a list": (
        lambda out: (out / "dataset.json").write_text("[]"),
        CorruptFileError,
        "schema_version is None",
    ),
    "other version": (_rewrite_index(lambda i: i.update(schema_version=2)), CorruptFileError, "schema_version is 2"),
    "no counts": (_rewrite_index(lambda i: i.pop("cleaned")), CorruptFileError, "does not describe the split"),
    "split unlisted": (_rewrite_index(lambda i: i["splits"].pop("test")), CorruptFileError, "describe the split test"),
    "file unlisted": (
        _rewrite_index(lambda i: i["splits"]["valid"]["bytes"].pop("text.npy")),
        CorruptFileError,
        "describe the split valid",
    ),
    "array cut": (
        lambda out: os.truncate(out / "train" / "text.npy", 5000),
        CorruptFileError,
        r"train/text.npy: has 5000 bytes, dataset.json says \d+: truncated or altered",
    ),
    "array gone": (lambda out: (out / "test" / "audio.npy").unlink(), CorruptFileError, "cannot be found or read"),
    "index of a million lists": (
        lambda out: (out / "dataset.json").write_text("[" + "[]," * (1 << 20) + "[]]"),
        CorruptFileError,
        "lists, objects and keys",
    ),
    "names within names": (
        lambda out: (out / "test" / "id.json").write_text("[" * 40 + "]" * 40),
        CorruptFileError,
        "id.json",
    ),
    "names cut": (lambda out: (out / "test" / "id.json").write_text("x" * 80), CorruptFileError, "id.json"),
    "pickled objects": (
        _same_size("valid/text.npy", np.array([_Call()], dtype=object)),
        CorruptFileError,
        "valid/text.npy: object of shape",
    ),
    "an archive": (_archive, CorruptFileError, "valid/text.npy: damaged"),
    "other dtype": (_same_size("valid/audio.npy", np.zeros((3, 50, 5))), CorruptFileError, "float64 of shape"),
    "other length": (
        _same_size("valid/audio_lengths.npy", np.array([1, 2, 51])),
        InputError,
        "'audio_lengths' of sample 2 is 51, expected 0 to 50",
    ),
    "other samples": (_same_size("valid/audio.npy", np.zeros((2, 50, 5), "f4")), InputError, "audio has 2 samples"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_folder_is_refused(tmp_path: Path, source: Path, case: str) -> None:
    damage, kind, message = DAMAGED[case]
    convert(source, tmp_path / "set")
    damage(tmp_path / "set")
    with pytest.raises(kind, match=message) as error:
        read_mmsa(tmp_path / "set", FILE.config.inputs)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)
