"""The quirks of MMSA's files, in files of their true sizes and dtypes: as a pickle, and converted to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.mmsa_files import COUNTS, FILES, File, expected, make, soil, written

from hcmen.base.errors import InputError
from hcmen.base.modalities import MODALITIES
from hcmen.data import MultimodalDataset
from hcmen.data.convert import convert
from hcmen.data.mmsa import read_mmsa
from hcmen.training.presets import PRESETS

FORMS = ("pickle", "folder")
SMALL = FILES["mosi aligned"]


def read(tmp_path: Path, data: Any, file: File, form: str, protocol: int = 4) -> MultimodalDataset:
    path = written(tmp_path / "set.pkl", data, protocol)
    if form == "folder":
        convert(path, tmp_path / "set")
        path = tmp_path / "set"
    return read_mmsa(path, file.config.inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", FILES)
def test_every_file_reads_as_a_plain_loop_does(tmp_path: Path, name: str, form: str) -> None:
    file = FILES[name]
    data = make(file)
    cleaned = soil(data)
    found = read(tmp_path, data, file, form)
    assert found.cleaned == cleaned
    assert {s: len(split) for s, split in found.splits.items()} == COUNTS
    for s, split in found.splits.items():
        assert split.ids == [f"video_{s}$_${i}" for i in range(COUNTS[s])]
        np.testing.assert_array_equal(split.labels, data[s]["regression_labels"].astype(np.float32))
        for m in MODALITIES:
            assert split.features[m].shape == (COUNTS[s], getattr(file, m), file.config.modality(m).features)
            assert split.features[m].dtype == np.float32
            assert split.lengths[m].dtype == np.int64
            for i, frames in enumerate(expected(data[s], m)):
                assert split.lengths[m][i] == len(frames)
                np.testing.assert_array_equal(split.features[m][i, : len(frames)], frames)
                assert not split.features[m][i, len(frames) :].any()
            # Full rows: the smallest place of a zero in their mask would be 0.
            assert split.lengths[m][1] == getattr(file, m)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mosi unaligned", "mosi aligned"])
def test_a_zero_frame_inside_the_prefix_is_a_frame(tmp_path: Path, name: str, form: str) -> None:
    data = make(FILES[name])
    split = read(tmp_path, data, FILES[name], form).splits["train"]
    for m in ("audio", "vision"):
        assert not split.features[m][0, 2:4].any()
        assert split.lengths[m][0] >= 6
        assert split.features[m][0, 4].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_last_frame_of_zeros_is_a_frame_where_lengths_say_so(tmp_path: Path, form: str) -> None:
    file = FILES["mosi unaligned"]
    data = make(file)
    data["train"]["audio"][1, -2:] = 0.0
    assert read(tmp_path, data, file, form).splits["train"].lengths["audio"][1] == 375


@pytest.mark.parametrize("form", FORMS)
def test_values_that_are_cleaned_can_be_all_of_the_last_frame(tmp_path: Path, form: str) -> None:
    """Without lengths, a frame of nothing but -inf counts as the zeros that it becomes."""
    data = make(SMALL)
    data["train"]["audio"][1, -1] = -np.inf
    assert read(tmp_path, data, SMALL, form).splits["train"].lengths["audio"][1] == 49


@pytest.mark.parametrize("form", FORMS)
def test_axes_go_by_name(tmp_path: Path, form: str) -> None:
    """Keys in any order; and published settings that give vision's steps as audio's (MOSI: 375 and 500) mislead
    nobody."""
    file = FILES["mosi unaligned"]
    data = make(file)
    turned = {s: dict(reversed(split.items())) for s, split in reversed(data.items())}
    found = read(tmp_path, turned, file, form)
    assert found.splits["train"].features["audio"].shape == (5, 375, 5)
    assert found.splits["train"].features["vision"].shape == (5, 500, 20)
    for split in data.values():
        split["audio"], split["vision"] = split["vision"], split["audio"]
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="train: audio has 20 features per step, expected 5"):
        read(tmp_path / "other", data, file, "pickle")


def test_steps_and_features_in_turn_are_refused(tmp_path: Path) -> None:
    data = make(SMALL)
    data["train"]["audio"] = data["train"]["audio"].swapaxes(1, 2)
    with pytest.raises(InputError, match="train: audio has 50 features per step, expected 5"):
        read(tmp_path, data, SMALL, "pickle")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mosi aligned", "mosei aligned", "sims unaligned", "simsv2 unaligned"])
def test_a_file_fits_its_own_preset_alone(tmp_path: Path, name: str, form: str) -> None:
    file = FILES[name]
    read(tmp_path, make(file), file, form)
    for preset in PRESETS.values():
        if preset.name != file.preset and not preset.any_scale:
            with pytest.raises(InputError, match=r"train: .*: (the file is of another data set|scale them, or take)"):
                read_mmsa(tmp_path / ("set" if form == "folder" else "set.pkl"), preset.model.inputs)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("path", ["numpy.core", "numpy._core"])
def test_every_protocol_order_and_width_is_converted(tmp_path: Path, protocol: int, path: str) -> None:
    """Large arrays of Fortran order, of the other byte order, of a view; each beyond what stays in the map."""
    file = FILES["mosi unaligned"]
    data = make(file)
    cleaned = soil(data)
    plain = read_mmsa(written(tmp_path / "plain.pkl", data), file.config.inputs)
    train = data["train"]
    train["audio"] = np.asfortranarray(train["audio"])
    train["vision"] = np.repeat(train["vision"], 2, axis=1)[:, ::2]
    train["text"] = train["text"].astype(">f8")
    data["valid"]["vision"] = np.asfortranarray(data["valid"]["vision"].astype(">f4"))
    source = written(tmp_path / "set.pkl", data, protocol)
    content = source.read_bytes()
    # The bytes of a name and its length; text of protocol 2 and 3 stands between newlines.
    for module in ("numpy.core", "numpy._core"):
        for tail in ("multiarray", "numeric"):
            old, new = f"{module}.{tail}".encode(), f"{path}.{tail}".encode()
            content = content.replace(b"c" + old + b"\n", b"c" + new + b"\n")
            content = content.replace(b"\x8c" + bytes([len(old)]) + old, b"\x8c" + bytes([len(new)]) + new)
    source.write_bytes(content)
    assert path.encode() in content
    index = convert(source, tmp_path / "set")
    assert index["cleaned"] == cleaned
    for found in (read_mmsa(source, file.config.inputs), read_mmsa(tmp_path / "set", file.config.inputs)):
        for s, split in found.splits.items():
            for m in MODALITIES:
                np.testing.assert_array_equal(split.features[m], plain.splits[s].features[m])
                np.testing.assert_array_equal(split.lengths[m], plain.splits[s].lengths[m])


@pytest.mark.parametrize("form", FORMS)
def test_a_mixed_split_and_its_mask_are_let_be(tmp_path: Path, form: str) -> None:
    file = FILES["simsv2 unaligned"]
    data = make(file)
    data["train_mix"] = {**data["valid"], "mask": np.ones(3)}
    data["train"]["mask"] = np.ones(5)
    found = read(tmp_path, data, file, form)
    assert sorted(found.splits) == ["test", "train", "valid"]
    assert len(found.splits["train"]) == 5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ids", "names"),
    [
        (np.array(["a", "b", "ü"], dtype=object), ["a", "b", "ü"]),
        (np.array(["a", "b", "c"]), ["a", "b", "c"]),
        (["a", "b", "\ud800"], ["a", "b", "\ud800"]),
        ([1, 2, 3], ["1", "2", "3"]),
        (np.arange(3), ["0", "1", "2"]),
    ],
)
def test_names_of_every_kind(tmp_path: Path, ids: Any, names: list[str], form: str) -> None:
    data = make(SMALL)
    data["valid"]["id"] = ids
    assert read(tmp_path, data, SMALL, form).splits["valid"].ids == names


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("m", ["audio", "vision"])
def test_lengths_beyond_the_arrays(tmp_path: Path, m: str, form: str) -> None:
    """Such as those of the unaligned file beside the arrays of the aligned one."""
    data = make(SMALL)
    data["test"][f"{m}_lengths"] = [10, 51, 3, 375]
    with pytest.raises(InputError, match=f"test: '{m}_lengths' of sample 1 is 51, expected 0 to 50, the steps of {m}"):
        read(tmp_path, data, SMALL, form)
    assert [p.name for p in tmp_path.iterdir()] == ["set.pkl"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("name", "label"), [("mosi aligned", 3.2), ("sims unaligned", -1.2)])
def test_labels_out_of_range(tmp_path: Path, name: str, label: float, form: str) -> None:
    file = FILES[name]
    data = make(file)
    data["valid"]["regression_labels"][2] = label
    with pytest.raises(InputError, match=f"valid: the label of sample 2 is {label:g}, expected"):
        read(tmp_path, data, file, form)


@pytest.mark.parametrize("label", [np.nan, np.inf, 1e300])
def test_a_label_that_is_no_number_is_not_converted(tmp_path: Path, label: float) -> None:
    data = make(SMALL)
    data["train"]["regression_labels"][0] = label
    with pytest.raises(InputError, match=r"train: the label of sample 0 is (nan|inf), expected a number"):
        read(tmp_path, data, SMALL, "folder")
