"""What a file is that was given for another: told by its first bytes, or by the end of its name."""

from __future__ import annotations

import re
from pathlib import PurePath

__all__ = ["HEAD_BYTES", "stranger"]

HEAD_BYTES = 512
"""So many bytes from the start of a file are enough."""

_EXTRACT = (
    "take features from it first, with the extractor of the data that the model was trained on, and save them with "
    "numpy.savez"
)
_ARRAYS = "store NumPy arrays in plain dicts, with tensor.numpy() for each tensor"
_LFS = "run git lfs pull in its repository"
_PAGE = "download the file itself: sign in, or use its direct link"
_STARTS: tuple[tuple[bytes, str, str], ...] = (
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer, not the file itself", _LFS),
    (rb"\x1f\x8b", "a gzip archive", "unpack it first (gunzip, or tar xzf)"),
    (rb"BZh[1-9]", "a bzip2 archive", "unpack it first (bunzip2)"),
    (rb"\xfd7zXZ\x00", "an xz archive", "unpack it first (unxz)"),
    (rb"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it first (unzstd)"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it first (7z x)"),
    (rb"Rar!", "a rar archive", "unpack it first (unrar x)"),
    (rb".{257}ustar", "a tar archive", "unpack it first (tar xf)"),
    (rb"\x80.\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19", "a file of torch.save", _ARRAYS),
    (rb"(?=PK\x03\x04).{30}[^\x00]{0,200}/?(?:data\.pkl|byteorder|\.format_version)", "a file of torch.save", _ARRAYS),
    (rb"\s*(?:\xef\xbb\xbf)?\s*(?i:<!doctype html|<html|<head|<!--)", "an HTML page", _PAGE),
    (rb"(?:\xef\xbb\xbf)?\s*<", "an XML or HTML page", _PAGE),
    (rb"\x89HDF\r\n", "an HDF5 file", "read it with h5py and store NumPy arrays"),
    (rb"MATLAB 5\.0", "a MATLAB file", "read it with scipy.io.loadmat and store NumPy arrays"),
    (rb"PAR1", "a Parquet file", "read it with pandas and store NumPy arrays"),
    (rb"%PDF", "a PDF", "give the data itself"),
    (rb"RIFF....WAVE", "sound", _EXTRACT),
    (rb"ID3|\xff[\xfb\xf3\xf2\xf1\xf9]|OggS|fLaC|FORM....AIF", "sound", _EXTRACT),
    (rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", "a video", _EXTRACT),
    (rb"\x89PNG|\xff\xd8\xff|GIF8", "a picture", _EXTRACT),
)
_STRANGERS = tuple((re.compile(start, re.DOTALL), what, fix) for start, what, fix in _STARTS)
_SUFFIXES = {
    **dict.fromkeys((".wav", ".mp3", ".flac", ".ogg", ".oga", ".opus", ".m4a", ".aac", ".aiff", ".wma"), "sound"),
    **dict.fromkeys((".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv"), "a video"),
    **dict.fromkeys((".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp"), "a picture"),
}


def stranger(head: bytes, name: str = "") -> tuple[str, str] | None:
    """What the file is and what to do with it, or None if it is none of those known here.

    Args:
        head: its first `HEAD_BYTES` bytes. name: its name, whose end is looked at where the bytes say nothing.
    """
    for start, what, fix in _STRANGERS:
        if start.match(head):
            return what, fix
    kind = _SUFFIXES.get(PurePath(name).suffix.lower())
    return (f"{kind}, by its name", _EXTRACT) if kind else None
