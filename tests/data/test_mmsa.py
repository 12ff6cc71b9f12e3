"""hcmen.data.mmsa and its unpickler: files of the true layout in every protocol, and files that are up to no good."""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.typed import as_typed
from hcmen.data import Split
from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
from hcmen.data.unpickle import load_pickle
from hcmen.models.hcmen.config import ModelConfig

CONFIG = ModelConfig(FeatureConfig(4, 6), FeatureConfig(3, 9), FeatureConfig(5, 8), width=8, tokens=4)
COUNTS = {"train": 5, "valid": 3, "test": 4}


def layout(seed: int = 0, *, aligned: bool = False) -> dict[str, dict[str, Any]]:
    """A set in the layout of MMSA's files, values drawn, padding zero, the second sample of full length."""
    generator = np.random.default_rng(seed)
    data = {}
    for split, count in COUNTS.items():
        steps = {"text": 6, "audio": 6 if aligned else 9, "vision": 6 if aligned else 8}
        lengths = {m: generator.integers(2, t + 1, count) for m, t in steps.items()}
        for m, t in steps.items():
            lengths[m][1] = t
        if aligned:
            lengths = dict.fromkeys(lengths, lengths["text"])
        features = {m: generator.standard_normal((count, t, CONFIG.modality(m).features)) for m, t in steps.items()}
        real = {m: np.arange(steps[m]) < lengths[m][:, None] for m in steps}
        for m in ("audio", "vision"):
            features[m][~real[m]] = 0.0
        ids = np.where(real["text"], generator.integers(1000, 2000, (count, 6)), 0)
        labels = np.round(generator.uniform(-3, 3, count), 1)
        data[split] = {
            "raw_text": np.array([f"clip {i} of {split}" for i in range(count)], dtype=object),
            "audio": features["audio"],  # float64, wider than what models use
            "vision": features["vision"],
            "id": [f"video_{split}$_${i}" for i in range(count)],
            "text": features["text"].astype(np.float32),
            "text_bert": np.stack([ids, real["text"], np.zeros_like(ids)], axis=1).astype(np.float32),
            "annotations": np.array(["Positive"] * count),
            "classification_labels": np.sign(labels) + 1,
            "regression_labels": labels,
        }
        if not aligned:
            data[split] |= {"audio_lengths": lengths["audio"].tolist(), "vision_lengths": lengths["vision"].tolist()}
    return data


def written(tmp_path: Path, data: Any, protocol: int = 4) -> Path:
    path = tmp_path / "set.pkl"
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


# --- true files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_reads_the_layout_in_every_protocol(tmp_path: Path, protocol: int) -> None:
    data = layout()
    found = read_mmsa(written(tmp_path, data, protocol), CONFIG.inputs)
    assert (found.label_min, found.label_max) == (-3.0, 3.0)
    assert found.cleaned == {"text": 0, "audio": 0, "vision": 0}
    for name, split in found.splits.items():
        raw = data[name]
        assert split.ids == raw["id"]
        np.testing.assert_array_equal(split.labels, raw["regression_labels"].astype(np.float32))
        assert len(split) == COUNTS[name]
        for m in ("audio", "vision"):
            assert split.features[m].dtype == np.float32
            np.testing.assert_array_equal(split.features[m], raw[m].astype(np.float32))
            np.testing.assert_array_equal(split.lengths[m], raw[f"{m}_lengths"])
        mask = raw["text_bert"][:, 1].astype(bool)
        np.testing.assert_array_equal(split.lengths["text"], mask.sum(axis=1))
        assert split.lengths["text"][1] == 6  # a full row: argmin of its mask would say 0
        np.testing.assert_array_equal(split.features["text"], raw["text"] * mask[..., None])


def test_the_module_path_of_old_numpy(tmp_path: Path) -> None:
    """Files written under NumPy 1 name numpy.core, those of NumPy 2 numpy._core; both read the same anywhere."""
    path = written(tmp_path, layout(), 2)
    content = path.read_bytes()
    assert b"numpy._core.multiarray" in content or b"numpy.core.multiarray" in content
    expected = read_mmsa(path, CONFIG.inputs)
    for old, new in ((b"cnumpy._core.", b"cnumpy.core."), (b"cnumpy.core.", b"cnumpy._core.")):
        path.write_bytes(content.replace(old, new))
        _assert_equal(read_mmsa(path, CONFIG.inputs).splits["test"], expected.splits["test"])


def test_arrays_of_every_kind_survive(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays: list[Any] = [
        *(
            generator.integers(0, 100, (3, 2)).astype(d)
            for d in ("i1", "u2", "i4", "u8", ">i4", ">f8", "<f2", "f4", "?")
        ),
        np.asfortranarray(generator.standard_normal((3, 4))),
        generator.standard_normal((4, 6))[::2, ::3],
        np.array(["short", "a longer one", "äöü"]),
        np.array([b"bytes", b""]),
        np.zeros((0, 3)),
        np.array(2.5),
        np.float64(1.25),
        np.int32(-7),
        np.bool_(True),
        np.str_("text"),
        "text",
        b"",
        b"raw",
        None,
        True,
        -(2**70),
        1.5,
        (1, 2),
    ]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        found = load_pickle(written(tmp_path, {"train": {str(i): a for i, a in enumerate(arrays)}}, protocol))["train"]
        for i, expected in enumerate(arrays):
            np.testing.assert_array_equal(found[str(i)], expected)
            if isinstance(expected, np.ndarray):
                assert found[str(i)].dtype == expected.dtype


def test_aligned_files_have_no_lengths(tmp_path: Path) -> None:
    data = layout(aligned=True)
    found = read_mmsa(written(tmp_path, data), CONFIG.inputs).splits["train"]
    for m in ("audio", "vision"):
        np.testing.assert_array_equal(found.lengths[m], found.lengths["text"])


def test_without_a_mask_text_ends_at_its_last_step(tmp_path: Path) -> None:
    data = layout()
    for split in data.values():
        del split["text_bert"]
        split["text"][0, 4:] = 0.0
    found = read_mmsa(written(tmp_path, data), CONFIG.inputs).splits["train"]
    assert found.lengths["text"].tolist() == [4, 6, 6, 6, 6]


def test_a_sample_of_nothing_but_zeros_has_one_step(tmp_path: Path) -> None:
    data = layout(aligned=True)
    data["train"]["audio"][0] = 0.0
    assert read_mmsa(written(tmp_path, data), CONFIG.inputs).splits["train"].lengths["audio"][0] == 1
    data = layout()
    data["train"]["audio_lengths"][0] = 0
    assert read_mmsa(written(tmp_path, data), CONFIG.inputs).splits["train"].lengths["audio"][0] == 1


def test_keys_of_sims_are_let_be(tmp_path: Path) -> None:
    data = layout()
    for split in data.values():
        for m in "TAV":
            split[f"regression_labels_{m}"] = split["regression_labels"]
            split[f"classification_labels_{m}"] = split["classification_labels"]
    data["train_mix"] = {"mask": np.ones(3)}
    assert len(read_mmsa(written(tmp_path, data), CONFIG.inputs).splits["train"]) == 5


def test_numbers_that_are_none_become_zero_and_are_counted(tmp_path: Path) -> None:
    data = layout()
    data["train"]["audio"][1, :2, 0] = -np.inf
    data["train"]["audio"][1, 3, 1] = np.nan
    data["valid"]["audio"][1, 0, 2] = np.inf
    data["test"]["audio"][1, 0, 0] = 1e300  # a number, until it is cast to float32
    data["test"]["vision"][1, 1, 1] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_mmsa(written(tmp_path, data), CONFIG.inputs)
    assert found.cleaned == {"text": 0, "audio": 5, "vision": 1}
    assert found.splits["train"].features["audio"][1, :2, 0].tolist() == [0.0, 0.0]
    for split in found.splits.values():
        assert all(np.isfinite(x).all() for x in split.features.values())


def _assert_equal(a: Split, b: Split) -> None:
    assert a.ids == b.ids
    np.testing.assert_array_equal(a.labels, b.labels)
    for m in a.features:
        np.testing.assert_array_equal(a.features[m], b.features[m])
        np.testing.assert_array_equal(a.lengths[m], b.lengths[m])


# --- files of another set, or incomplete ------------------------------------------------------------------------------


def _set(key: str, value: Any, split: str = "valid") -> Any:
    def change(data: dict[str, Any]) -> None:
        data[split][key] = value

    return change


def _drop(key: str, split: str | None = "valid") -> Any:
    def change(data: dict[str, Any]) -> None:
        del (data if split is None else data[split])[key]

    return change


BAD = {
    "missing split": (_drop("test", None), "'test' is missing, found train, valid"),
    "split is no dict": (lambda d: d.update(test=[1]), "'test' is a list, expected a dict"),
    "missing labels": (_drop("regression_labels"), "valid: 'regression_labels' is missing"),
    "missing modality": (
        _drop("vision"),
        "has text, audio, vision in train; text, audio in valid",
    ),
    "features of another set": (
        _set("audio", np.zeros((3, 9, 74))),
        "valid: audio has 74 features per step, expected 3: the file is of another data set than the model is for",
    ),
    "too many steps": (_set("vision", np.zeros((3, 500, 5))), "valid: vision has 500 steps, expected 1 to 8"),
    "no steps": (_set("vision", np.zeros((3, 0, 5))), "valid: vision has 0 steps, expected 1 to 8$"),
    "rank": (_set("text", np.zeros((3, 4))), r"valid: 'text' is float64 of shape \[3, 4\], expected numbers with 3"),
    "strings for numbers": (_set("text", np.full((3, 6, 4), "x")), "valid: 'text' is <U1"),
    "lists for arrays": (_set("text", [[[1.0]]]), "valid: 'text' is a list, expected an array"),
    "other number of samples": (_set("audio", np.zeros((2, 9, 3))), "valid: audio has 2 samples, expected 3"),
    "length beyond the array": (
        _set("audio_lengths", [3, 10, 1]),
        "valid: 'audio_lengths' of sample 1 is 10, expected 0 to 9, the steps of audio",
    ),
    "negative length": (_set("audio_lengths", [3, 1, -1]), "of sample 2 is -1, expected 0 to 9"),
    "broken length": (_set("audio_lengths", [3, 1.5, 1]), "has 3 entries, expected 3 whole numbers"),
    "length that is no number": (_set("audio_lengths", [3, float("nan"), 1]), "expected 3 whole numbers"),
    "too few lengths": (_set("vision_lengths", [3]), "'vision_lengths' has 1 entries, expected 3"),
    "label too large": (
        _set("regression_labels", [0.0, 3.5, 0.0]),
        "label of sample 1 is 3.5, expected -3 to 3: scale them, or",
    ),
    "label is NaN": (
        _set("regression_labels", [0.0, 0.0, float("nan")]),
        "label of sample 2 is nan, expected a number$",
    ),
    "no samples": (_set("regression_labels", []), "valid: holds no samples"),
    "too few names": (_set("id", ["a"]), "'id' is 1 entries, expected 3 names"),
    "names that are no names": (_set("id", [["a"], ["b"], ["c"]]), "expected 3 names"),
    "names that are a number": (_set("id", 7), "'id' is a int, expected 3 names"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_refused(tmp_path: Path, case: str) -> None:
    change, message = BAD[case]
    data = layout()
    change(data)
    with pytest.raises(InputError, match=message) as error:
        read_mmsa(written(tmp_path, data), CONFIG.inputs)
    assert "\n" not in str(error.value)
    assert "set.pkl" in str(error.value)


@pytest.mark.parametrize("data", [[1, 2], "text", 3, None, np.zeros(3)])
def test_the_top_must_be_a_dict(tmp_path: Path, data: Any) -> None:
    with pytest.raises(InputError, match="expected a dict with the splits train, valid, test"):
        read_mmsa(written(tmp_path, data), CONFIG.inputs)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_mmsa(tmp_path / "nothing.pkl", CONFIG.inputs)
    with pytest.raises(InputError, match="is a directory"):
        read_mmsa(tmp_path, CONFIG.inputs)


def test_the_given_data_is_left_alone() -> None:
    data = layout()
    before = copy.deepcopy(data)
    dataset_from_mmsa(data, "here", CONFIG.inputs)
    for split in data:
        for key, value in data[split].items():
            np.testing.assert_array_equal(value, before[split][key])


# --- hostile files --------------------------------------------------------------------------------------------------


class _Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.result = (function, args)

    def __reduce__(self) -> Any:
        return self.result


def _text_pickle(*parts: bytes) -> bytes:
    return b"".join(parts) + b"."


def _object_over_bytes() -> bytes:
    """An array of objects whose pointers would be read from raw bytes."""
    array = np.frombuffer(b"\x41" * 16, "u8")
    content = pickle.dumps(array, protocol=5)
    return content.replace(b"\x8c\x02u8", b"\x8c\x02O8")


HOSTILE = {
    "call": (pickle.dumps(_Call(os.system, "echo caught")), f"'{os.system.__module__}.system'"),
    "call in protocol 0": (pickle.dumps(_Call(os.system, "echo caught"), 0), f"'{os.system.__module__}.system'"),
    "call inside the layout": (
        pickle.dumps({**layout(), "extra": _Call(subprocess.check_output, ["true"])}),
        "'subprocess.check_output'",
    ),
    "eval": (pickle.dumps(_Call(eval, "1")), "'builtins.eval'"),
    "getattr": (pickle.dumps(_Call(getattr, 1, "real")), "'builtins.getattr'"),
    "instance by INST": (_text_pickle(b"(S'true'\nios\nsystem\n"), "'os.system'"),
    "instance by OBJ": (_text_pickle(b"(cos\nsystem\nS'true'\no"), "'os.system'"),
    "numpy function": (_text_pickle(b"cnumpy\nload\n(S'x'\ntR"), "'numpy.load'"),
    "dotted name": (_text_pickle(b"\x80\x04\x8c\x05numpy\x8c\x0bctypes.cdll\x93"), "'numpy.ctypes.cdll'"),
    "dunder of an admitted name": (
        _text_pickle(b"\x80\x04\x8c\x05numpy\x8c\x10ndarray.__init__\x93"),
        "ndarray.__init__",
    ),
    "class": (_text_pickle(b"\x80\x02cnumpy\nndarray\n(I3\nt\x81"), "an object of a class"),
    "extension registry": (_text_pickle(b"\x80\x02\x82\x01"), "an object of a class"),
    "persistent id": (_text_pickle(b"Pfoo\n"), "kept outside the file"),
    "state of a function": (_text_pickle(b"\x80\x02cnumpy\ndtype\n}b"), "setting the state of a Admitted"),
    "slots of a function": (
        _text_pickle(b"\x80\x02cnumpy\ndtype\nN}X\x05\x00\x00\x00_callNs\x86b"),
        "setting the state of a Admitted",
    ),
    "state of a dict": (_text_pickle(b"\x80\x02}}b"), "setting the state of a dict"),
    "call of a string": (_text_pickle(b"\x80\x02X\x01\x00\x00\x00a)R"), "a call of a str"),
    "array called directly": (
        _text_pickle(b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ft\x85R"),
        "ndarray called directly",
    ),
    "structured dtype": (pickle.dumps(np.zeros(2, "i4,f8")), "an array of dtype 'V12'"),
    "dates": (pickle.dumps(np.zeros(2, "M8[s]")), "an array of dtype 'M8'"),
    "objects over bytes": (_object_over_bytes(), "an array of objects over raw bytes"),
    "matrix": (_text_pickle(b"cnumpy.matrixlib.defmatrix\nmatrix\n"), "'numpy.matrixlib.defmatrix.matrix'"),
    "codec": (_text_pickle(b"c_codecs\nencode\n(Vx\nVrot13\ntR"), "codec 'rot13'"),
    "unhashable key": (b"\x80\x04}]]s.", "a list as a key"),
    "objects in two axes": (pickle.dumps(np.array([["a"], ["b"]], dtype=object)), "not a plain list"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_pickle_that_calls_is_refused_by_name(tmp_path: Path, case: str) -> None:
    content, name = HOSTILE[case]
    path = tmp_path / "set.pkl"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"the pickle asks for .*{name}") as error:
        read_mmsa(path, CONFIG.inputs)
    assert "\n" not in str(error.value)


DAMAGED = {
    "empty": b"",
    "text": b"text,audio,vision\n1,2,3\n",
    "no stop": b"\x80\x04}",
    "unknown protocol": b"\x80\x63}.",
    "unknown opcode": b"\x80\x04\xff.",
    "pop from nothing": b"\x80\x040.",
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 40) + b"x.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 62) + b"N.",
    "huge integer": b"\x80\x04\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x.",
    "negative integer size": b"\x80\x04\x8b" + struct.pack("<i", -5) + b"x.",
    "unset memo": b"\x80\x04j" + struct.pack("<I", 0xFFFFFFFF) + b".",
    "bad utf-8": b"\x80\x04\x8c\x02\xff\xfe.",
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    path = tmp_path / "set.pkl"
    path.write_bytes(DAMAGED[case])
    with pytest.raises(CorruptFileError, match="truncated, damaged or not a pickle") as error:
        read_mmsa(path, CONFIG.inputs)
    assert "\n" not in str(error.value)


def test_what_is_no_pickle_is_called_by_its_name(tmp_path: Path) -> None:
    """Read as a pickle, the first letter of each would be an opcode or none, and the advice that for a damaged one."""
    store = r", expected a pickle of MMSA's layout: store its arrays with pickle\.dump, in the layout of docs/data\.md"
    np.savez(tmp_path / "set.npz", x=np.zeros(3))
    np.save(tmp_path / "set.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("set.pkl", b"")
    (tmp_path / "set.pkl").write_text('\n {"train": {}}')
    (tmp_path / "set.txt").write_text("")
    for name, says in (
        ("set.npz", "an .npz archive of arrays" + store),
        ("set.npy", r"a single \.npy array" + store),
        ("set.zip", "a zip archive, expected a pickle of MMSA's layout: unpack it first"),
        ("set.pkl", "JSON" + store),
        ("set.txt", "a text, by its name" + store),
    ):
        with pytest.raises(CorruptFileError, match=says):
            read_mmsa(tmp_path / name, CONFIG.inputs)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet", ".CSV"])
def test_a_table_is_to_be_converted_first(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"my set{suffix}"
    path.write_bytes(b"PAR1" if suffix == ".parquet" else b"id,label\n1,2\n")
    with pytest.raises(InputError) as caught:
        read_mmsa(path, CONFIG.inputs)
    line = as_typed("hcmen-convert", path, "build/my set")
    assert str(caught.value) == f"{path}: is a table: convert it first with {line}, and give that folder"


def test_a_workbook_is_to_be_saved_as_a_table(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", b"")
    with pytest.raises(InputError, match=r"is a workbook, .*save the sheet as CSV"):
        read_mmsa(tmp_path / "set.xlsx", CONFIG.inputs)


OTHERS = {
    "a list": ([{"a": 1}, {"b": 2}, np.zeros(2), "x"], "holds a list of 4: 2 of dict, 1 of array, 1 of str, expected"),
    "a tuple of arrays": ((np.zeros((2, 3)), np.ones(2)), "holds a tuple of 2: 2 of array, expected"),
    "an empty list": ([], "holds a list, expected a dict"),
    "an array": (np.zeros((2, 3)), r"holds an array of shape \[2, 3\], expected a dict"),
    "a number": (5, "holds a int, expected a dict"),
    "other names": ({"videos": [], "labels": []}, "'train' is missing, found labels, videos"),
    "numbers as names": ({1: [], 2: []}, "'train' is missing, found a dict of 2: 1, 2"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_a_pickle_of_another_layout_is_told_what_it_holds(tmp_path: Path, case: str) -> None:
    data, says = OTHERS[case]
    (tmp_path / "set.pkl").write_bytes(pickle.dumps(data))
    with pytest.raises(InputError, match=says) as caught:
        read_mmsa(tmp_path / "set.pkl", CONFIG.inputs)
    assert "again" not in str(caught.value)


def test_truncated_anywhere(tmp_path: Path) -> None:
    content = pickle.dumps(layout(), protocol=4)
    path = tmp_path / "set.pkl"
    for end in range(0, len(content) - 1, 37):
        path.write_bytes(content[:end])
        with pytest.raises(CorruptFileError):
            read_mmsa(path, CONFIG.inputs)


def test_flipped_bytes_never_do_worse_than_an_error(tmp_path: Path) -> None:
    content = bytearray(pickle.dumps(layout(), protocol=2))
    path = tmp_path / "set.pkl"
    generator = np.random.default_rng(0)
    for _ in range(300):
        place = int(generator.integers(len(content)))
        before, content[place] = content[place], int(generator.integers(256))
        path.write_bytes(content)
        # Most places are numbers of the arrays, where any byte will do; no other exception may come through.
        with contextlib.suppress(CorruptFileError, InputError):
            read_mmsa(path, CONFIG.inputs)
        content[place] = before


def test_an_array_may_not_claim_more_than_it_has(tmp_path: Path) -> None:
    honest = pickle.dumps({"train": np.arange(4.0)}, protocol=2)
    shape = b"K\x04\x85"
    assert honest.count(shape) == 1
    path = tmp_path / "set.pkl"
    for claim in (b"J\xff\xff\xff\x7f\x85", b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x00\x85", b"K\x03\x85"):
        path.write_bytes(honest.replace(shape, claim))
        with pytest.raises(CorruptFileError, match="has 32 bytes of"):
            load_pickle(path)


LIMITED = """
import resource, sys
from pathlib import Path
import numpy as np
from hcmen.base.inputs import FeatureConfig
from hcmen.models.hcmen.config import ModelConfig
from hcmen.data.mmsa import read_mmsa
from hcmen.base.errors import HcmenError

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000,) * 2)
config = ModelConfig(FeatureConfig(4, 6), FeatureConfig(3, 9), FeatureConfig(5, 8), width=8, tokens=4)
for path in sys.argv[1:]:
    try:
        read_mmsa(path, config.inputs)
        print(path, "was read")
    except HcmenError as error:
        pass
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's account of memory")
def test_small_files_cannot_use_much_memory(tmp_path: Path) -> None:
    """In 200 MB: a memo index that makes the C unpickler allocate 64 GB, lists that unfold, sizes out of nowhere."""
    doubling = b"\x80\x02]q\x00K\x01a" + b"".join(
        b"](" + b"h" + bytes([i]) + b"h" + bytes([i]) + b"e" + b"q" + bytes([i + 1]) for i in range(60)
    )
    unfold = b"\x80\x02}X\x05\x00\x00\x00train}X\x02\x00\x00\x00id" + doubling[2:] + b"s"
    bombs = {
        "memo": b"\x80\x02Nr" + struct.pack("<I", 0xFFFFFFF0) + b".",
        "lists": doubling + b".",
        "names": unfold + b"s.",
        **{name: content for name, content in DAMAGED.items() if name.startswith("huge")},
    }
    data = layout()
    data["train"]["id"] = "MARK"
    whole = pickle.dumps(data, protocol=2)
    mark = b"X\x04\x00\x00\x00MARKq"
    assert whole.count(mark) == 1
    at = whole.index(mark)
    bombs["names in a whole file"] = whole[:at] + doubling.replace(b"\x80\x02", b"") + whole[at + len(mark) + 1 :]
    paths = []
    for name, content in bombs.items():
        paths.append(tmp_path / f"{name}.pkl")
        paths[-1].write_bytes(content)
    done = subprocess.run([sys.executable, "-c", LIMITED, *map(str, paths)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_oracle_of_hostility_is_hostile(tmp_path: Path) -> None:
    """The call above does run under pickle.load, so refusing it means something."""
    marker = tmp_path / "ran"
    content = pickle.dumps(_Call(os.mkdir, str(marker)))
    assert "mkdir" in {arg for op, arg, _ in pickletools.genops(content) if isinstance(arg, str)}
    path = tmp_path / "set.pkl"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError):
        read_mmsa(path, CONFIG.inputs)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()
