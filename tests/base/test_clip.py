"""Clips: what is read is what was written, in any lawful form; what is damaged is refused and nothing else happens."""

from __future__ import annotations

import io
import os
import tracemalloc
import zipfile
import zlib

import numpy as np
import pytest
from helpers.small_bundle import INPUTS, clip_arrays
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hcmen.base.clip import Clip, batch_clips, clip_from_arrays, read_clip, write_clip
from hcmen.base.errors import CorruptFileError, HcmenError, InputError
from hcmen.base.modalities import MODALITIES, VARIANTS


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_written_clip_is_read_back(tmp_path, variant):
    arrays = clip_arrays(1, variant.present)
    write_clip(tmp_path / "c.npz", arrays)
    clip = read_clip(tmp_path / "c.npz", INPUTS)
    assert clip.variant == variant
    assert clip.name == str(tmp_path / "c.npz")
    assert list(clip.features) == list(variant.present)
    for m, x in arrays.items():
        assert clip.features[m].dtype == np.float32
        np.testing.assert_array_equal(clip.features[m], x)


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_floats_of_every_width_and_layout_are_read(tmp_path, dtype, order, save):
    text = np.asarray(clip_arrays(2, ("text",), text=5)["text"], dtype, order=order)
    save(tmp_path / "c.npz", text=text)
    got = read_clip(tmp_path / "c.npz", INPUTS).features["text"]
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, text.astype(np.float32))


@pytest.mark.parametrize("steps", [1, 2, 11, 12])
def test_lengths_from_one_to_the_maximum_are_read(tmp_path, steps):
    write_clip(tmp_path / "c.npz", clip_arrays(0, ("text",), text=steps))
    assert read_clip(tmp_path / "c.npz", INPUTS).features["text"].shape == (steps, 6)


def test_a_link_to_a_clip_is_followed(tmp_path):
    write_clip(tmp_path / "c.npz", clip_arrays())
    (tmp_path / "link.npz").symlink_to(tmp_path / "c.npz")
    assert read_clip(tmp_path / "link.npz", INPUTS).variant.name == "full"


def test_clean_zeroes_and_counts_what_is_not_finite(tmp_path):
    arrays = clip_arrays(3)
    arrays["audio"][0, 0], arrays["audio"][-1, 2], arrays["vision"][0, 1] = np.nan, np.inf, -np.inf
    write_clip(tmp_path / "c.npz", arrays)
    with pytest.raises(InputError, match=r"audio has 2 NaN or infinite values among \d+.*--clean"):
        read_clip(tmp_path / "c.npz", INPUTS)
    clip = read_clip(tmp_path / "c.npz", INPUTS, clean=True)
    assert clip.cleaned == {"audio": 2, "vision": 1}
    for m in MODALITIES:
        np.testing.assert_array_equal(clip.features[m], np.where(np.isfinite(arrays[m]), arrays[m], 0))


def test_a_float64_beyond_float32_is_infinite_and_refused(tmp_path):
    text = np.zeros((2, 6))
    text[1, 1] = 1e300
    np.savez(tmp_path / "c.npz", text=text)
    with pytest.raises(InputError, match="1 NaN or infinite"):
        read_clip(tmp_path / "c.npz", INPUTS)


def test_arrays_in_memory_are_checked_and_left_alone():
    arrays = clip_arrays(4)
    arrays["text"][0, 0] = np.nan
    before = {m: x.copy() for m, x in arrays.items()}
    clip = clip_from_arrays("mine", arrays, INPUTS, clean=True)
    assert clip.features["text"][0, 0] == 0
    for m in MODALITIES:
        np.testing.assert_array_equal(arrays[m], before[m])
    with pytest.raises(InputError, match="mine: audio is no array"):
        clip_from_arrays("mine", {"audio": [[1.0], [1.0, 2.0]]}, INPUTS)


def test_text_tokens_beside_a_modality_are_set_aside_by_name(tmp_path):
    np.savez(tmp_path / "c.npz", text_tokens=np.zeros((3, 4), np.int64), **clip_arrays(5, ("audio",)))
    clip = read_clip(tmp_path / "c.npz", INPUTS)
    assert (clip.variant.name, clip.ignored) == ("audio_only", ("text_tokens",))


def test_a_batch_is_padded_with_zeros_at_the_end():
    clips = [Clip(str(i), clip_arrays(i, ("text", "audio"), text=n)) for i, n in enumerate((3, 1, 7))]
    batch = batch_clips(clips)
    assert list(batch) == ["text", "text_length", "audio", "audio_length"]
    assert batch["text"].shape == (3, 7, 6)
    assert batch["text"].dtype == np.float32
    assert batch["text_length"].dtype == np.int64
    assert batch["text_length"].tolist() == [3, 1, 7]
    for i, clip in enumerate(clips):
        n = len(clip.features["text"])
        np.testing.assert_array_equal(batch["text"][i, :n], clip.features["text"])
        assert not batch["text"][i, n:].any()
    assert list(batch_clips(clips, ["audio"])) == ["audio", "audio_length"]
    with pytest.raises(InputError, match="vision is missing"):
        batch_clips(clips, MODALITIES)
    with pytest.raises(InputError, match="no clip"):
        batch_clips([])


def test_writing_is_whole_or_not_at_all(tmp_path, monkeypatch):
    write_clip(tmp_path / "c.npz", clip_arrays(0))
    before = (tmp_path / "c.npz").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_clip(tmp_path / "c.npz", clip_arrays(1))
    assert os.listdir(tmp_path) == ["c.npz"]
    assert (tmp_path / "c.npz").read_bytes() == before
    with pytest.raises(InputError, match="unknown key 'vison': did you mean 'vision'"):
        write_clip(tmp_path / "d.npz", {"vison": np.zeros((1, 4))})
    with pytest.raises(InputError, match="no modality"):
        write_clip(tmp_path / "d.npz", {})
    assert os.listdir(tmp_path) == ["c.npz"]


def npy(shape: str, descr: str = "'<f4'", body: bytes = b"") -> bytes:
    """An .npy member with a header of the caller's making."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118)[:-1] + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + body


def npz(path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def test_a_zip_bomb_is_refused_without_inflating_it(tmp_path):
    """256 MiB of zeros in a quarter of a megabyte: refused by its declared shape, in a fraction of the memory."""
    path = tmp_path / "bomb.npz"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = npy("(11184810, 6)")
    body = packer.compress(head) + b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    write_raw_zip(path, "text.npy", body, declared=len(head) + (1 << 28))
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="11184810 steps, expected at most 12"):
            read_clip(path, INPUTS)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_bomb_behind_a_harmless_header_is_refused_too(tmp_path):
    path = tmp_path / "bomb.npz"
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = npy("(1, 6)")
    body = packer.compress(head) + b"".join(packer.compress(bytes(1 << 24)) for _ in range(16)) + packer.flush()
    for declared in (len(head) + (1 << 28), len(head) + 24):
        write_raw_zip(path, "text.npy", body, declared=declared)
        tracemalloc.start()
        try:
            with pytest.raises(CorruptFileError):
                read_clip(path, INPUTS)
            assert tracemalloc.get_traced_memory()[1] < 8 << 20
        finally:
            tracemalloc.stop()


def write_raw_zip(path, name: str, deflated: bytes, declared: int) -> None:
    """A zip with one deflated member whose declared size is the caller's."""
    info = zipfile.ZipInfo(name)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, b"")
    data = bytearray(path.read_bytes())
    local = 30 + len(name)
    central = data.index(b"PK\x01\x02")
    sizes = len(deflated).to_bytes(4, "little") + declared.to_bytes(4, "little")
    data[8:10] = data[central + 10 : central + 12] = (8).to_bytes(2, "little")
    data[18:26] = data[central + 20 : central + 28] = sizes
    end = data.index(b"PK\x05\x06")
    data[end + 16 : end + 20] = (local + len(deflated)).to_bytes(4, "little")
    path.write_bytes(bytes(data[:local]) + deflated + bytes(data[local:]))


def test_the_raw_zip_writer_of_this_test_makes_readable_clips(tmp_path):
    """Or the two tests above could pass for a wrong reason."""
    head = npy("(1, 6)", body=bytes(24))
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    path = tmp_path / "c.npz"
    write_raw_zip(path, "text.npy", packer.compress(head) + packer.flush(), len(head))
    data = bytearray(path.read_bytes())
    crc = zlib.crc32(head).to_bytes(4, "little")
    central = data.index(b"PK\x01\x02")
    data[14:18] = data[central + 16 : central + 20] = crc
    path.write_bytes(data)
    assert read_clip(path, INPUTS).features["text"].tolist() == [[0.0] * 6]


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "c.npz"
    np.savez_compressed(path, **clip_arrays(6))
    return path.read_bytes()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_refused_or_harmless(sound, tmp_path, data):
    """Bytes changed, cut or doubled anywhere: a clip as lawful as any, or an expected error. Never another."""
    content = bytearray(sound)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "double"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[at : at + data.draw(st.integers(1, 50))]
            case _:
                content[at:at] = content[at : at + 30]
        if not content:
            break
    path = tmp_path / "c.npz"
    path.write_bytes(content)
    try:
        clip = read_clip(path, INPUTS)
    except HcmenError as error:
        message = str(error)
    else:
        message = ""
        for m, x in clip.features.items():
            assert x.shape[1] == INPUTS.modality(m).features
            assert 1 <= len(x) <= INPUTS.modality(m).max_steps
            assert np.isfinite(x).all()
    assert "\n" not in message


@pytest.mark.parametrize(
    "member",
    [
        npy("(-1, 6)"),
        npy("(1.5, 6)"),
        npy("((((((1))))))", body=bytes(24)),
        npy("(" * 3000 + ")" * 3000),
        npy("(1, 6)", "[('a', '<f4')]", bytes(24)),
        npy("(1, 6)", "'|O'", bytes(24)),
        npy("(1, 6)", "'nonsense'", bytes(24)),
        npy("(1, 6)", body=bytes(23)),
        npy("(1, 6)", body=bytes(25)),
        npy("(9999999999999999999999, 6)"),
        b"\x93NUMPY\x03\x00" + npy("(1, 6)", body=bytes(24))[8:],
        b"\x93NUMPY\x01\x00\xff\xff",
        b"",
    ],
)
def test_hostile_headers_are_refused(tmp_path, member):
    npz(tmp_path / "c.npz", {"text.npy": member})
    with pytest.raises(HcmenError):
        read_clip(tmp_path / "c.npz", INPUTS)


def test_the_header_writer_of_this_test_makes_readable_clips(tmp_path):
    npz(tmp_path / "c.npz", {"text.npy": npy("(1, 6)", body=bytes(24))})
    assert read_clip(tmp_path / "c.npz", INPUTS).features["text"].shape == (1, 6)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compression_is_refused(tmp_path, method):
    npz(tmp_path / "c.npz", {"text.npy": npy("(1, 6)", body=bytes(24))}, method)
    with pytest.raises(InputError, match="compressed by method"):
        read_clip(tmp_path / "c.npz", INPUTS)


def test_members_that_are_doubled_many_or_no_arrays_are_refused(tmp_path):
    good = npy("(1, 6)", body=bytes(24))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("text.npy", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("text.npy", good)
    (tmp_path / "twice.npz").write_bytes(buffer.getvalue())
    with pytest.raises(CorruptFileError, match="'text' is there twice"):
        read_clip(tmp_path / "twice.npz", INPUTS)
    npz(tmp_path / "many.npz", {f"a{i}.npy": good for i in range(17)})
    with pytest.raises(InputError, match="17 arrays, expected at most 3"):
        read_clip(tmp_path / "many.npz", INPUTS)
    npz(tmp_path / "other.npz", {"../text.npy": good})
    with pytest.raises(InputError, match=r"unknown key '\.\./text'"):
        read_clip(tmp_path / "other.npz", INPUTS)
    npz(tmp_path / "readme.npz", {"text.npy": good, "README": b"hello"})
    with pytest.raises(InputError, match=r"'README' is no \.npy array"):
        read_clip(tmp_path / "readme.npz", INPUTS)
