"""A file of a bundle that others open by its path, seen to be the verified one while they do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hcmen.base.bundle import Bundle, identity
from hcmen.base.errors import CorruptFileError
from hcmen.base.records import FileRecord

__all__ = ["SharedFile"]

Result = TypeVar("Result")


class SharedFile:
    """A listed file that others open by its path once it is verified, such as ONNX Runtime, which maps it.

    Between hashing and opening the file could change. `opened_by` sees that it did not: device, inode, size and both
    times of the file are those of the hashed one before and after. (Who may write the file can still change what is
    mapped, as with a program's own libraries. An export never does, it puts another file in the place.)

    Several threads may open it at once.
    """

    def __init__(self, bundle: Bundle, record: FileRecord) -> None:
        self.bundle, self.record = bundle, record
        self._hashed: tuple[int, ...] | None = None

    def opened_by(self, use: Callable[[Path], Result]) -> Result:
        """What `use` gives for the place of the file: its absolute path, all links resolved. Its name may be another.

        `use` is called anew where an export moves the bundle aside meanwhile.

        Raises:
            CorruptFileError: missing, not of the listed size and sha256, or changed meanwhile.
            HcmenError: what `use` raises.
        """
        moves = 2  # of a folder that is replaced, for good
        while True:
            place = self.bundle.place()
            try:
                return self._opened_at(Path(os.path.realpath(place / self.record.file)), use)
            except CorruptFileError:
                if not moves or place == self.bundle.place():
                    raise
            moves -= 1

    def _opened_at(self, real: Path, use: Callable[[Path], Result]) -> Result:
        before = self._identity()
        if before != self._hashed:
            _, before = self.bundle.verified(self.record, keep=False)
            self._hashed = before
        self._check(before, real)
        result = use(real)
        self._check(before, real)
        return result

    def _identity(self) -> tuple[int, ...]:
        with self.bundle.opened(self.record.file) as file:
            return identity(os.fstat(file.fileno()))

    def _check(self, before: tuple[int, ...], real: Path) -> None:
        with contextlib.suppress(OSError):
            if before == self._identity() == identity(os.stat(real)):
                return
        raise CorruptFileError(
            f"{self.bundle.path / self.record.file}: changed while it was being loaded: load the bundle again"
        )
