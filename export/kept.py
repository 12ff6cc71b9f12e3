"""What stays of a bundle that is there already when variants are exported into it.

The variants of another export of the same checkpoint stay, with their golden sets and what was measured of them. All
else that is there is refused: of another checkpoint or precision, damaged, or older than the graphs that come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcmen.base.bundle import Bundle, looks_like_bundle, read_bundle
from hcmen.base.engines import ENGINES_FOLDER
from hcmen.base.errors import HcmenError, InputError
from hcmen.base.files import read_small
from hcmen.base.inputs import Inputs
from hcmen.base.modalities import Variant
from hcmen.base.op import IR_VERSION, OPSET
from hcmen.base.records import MANIFEST_FILE, MOST_MANIFEST_BYTES

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Kept", "kept_of"]

_CHOOSE = "choose another --bundle, or replace it with --force"
_EXPORT_ALL = f"export all variants (leave --variant out), {_CHOOSE}"


@dataclass(frozen=True)
class Kept:
    """The variants `names` of `bundle`, verified; none where nothing stays.

    target: where the bundle lies. manifest: the content of manifest.json there; None if it has none.
    """

    target: Path
    manifest: bytes | None
    bundle: Bundle | None = None
    names: tuple[str, ...] = ()

    @property
    def parity(self) -> dict[str, Mapping[str, Any]]:
        """What was measured of each variant that stays."""
        return {name: self.bundle.variant(name).parity for name in self.names} if self.bundle else {}

    def graphs(self) -> dict[str, ModelProto]:
        """The graphs that stay, weights inside, made anew by each call."""
        if not self.bundle or not self.names:
            return {}
        from hcmen.export.weights import embedded_model

        weights = self.bundle.read(self.bundle.manifest.weights)
        return {name: embedded_model(self.bundle, name, weights) for name in self.names}

    def copy_golden(self, folder: Path) -> None:
        """Copies the golden sets that stay into `folder`/golden."""
        for name in self.names if self.bundle else ():
            (folder / "golden" / f"{name}.npz").write_bytes(self.bundle.read(self.bundle.variant(name).golden))

    def tokenizer(self) -> bytes | None:
        """The content of the tokenizer that is there; None if there is none."""
        record = self.bundle.manifest.tokenizer if self.bundle and self.names else None
        return None if record is None else self.bundle.read(record).tobytes()

    def check_unchanged(self) -> None:
        """Raises InputError if another export was put at the target since: its variants would be lost."""
        if _content(self.target) != self.manifest:
            raise InputError(f"{self.target}: another export wrote it meanwhile: export again, to keep its variants")

    def let_go(self) -> None:
        """Lets the bundle be removed by what replaces it."""
        if self.bundle is not None:
            self.bundle.let_go()


def kept_of(
    target: Path,
    chosen: Sequence[Variant],
    *,
    checkpoint_sha256: str,
    precision: str,
    inputs: Inputs,
    force: bool,
    note: Callable[[str], None],
) -> Kept:
    """What stays at `target` when the variants `chosen` are exported into it.

    Args:
        target: the place of the bundle; nothing stays where no bundle is.
        checkpoint_sha256, precision, inputs: of what is exported.
        force: whatever cannot stay is replaced instead of refused.
        note: told of what stays and what is replaced.

    Raises:
        InputError: a bundle of another checkpoint or precision is there, or one whose graphs are of another opset.
        CorruptFileError, BackendError: the bundle is damaged, or needs other ops; `force` lifts these too.
    """
    content = _content(target)
    if not looks_like_bundle(target):
        return Kept(target, content)
    try:
        found = read_bundle(target)
        _check_same(found, checkpoint_sha256, precision)
        names = tuple(name for name in found.manifest.variants if name not in {v.name for v in chosen})
        if names:
            _check_sound(found, names, inputs)
    except HcmenError as error:
        fix = error.fix if error.fix in (_CHOOSE, _EXPORT_ALL) else _CHOOSE
        if not force:
            raise error.but(fix=fix) from error
        note(f"--force replaces the bundle that is there: {error.but(fix='all of it goes')}")
        return Kept(target, content)
    if names:
        note(f"{target}: is of this checkpoint, {', '.join(names)} {'stay' if len(names) > 1 else 'stays'}")
    if (target / ENGINES_FOLDER).is_dir():
        note(f"{target}: its engines were made of the graphs before these and go: run hcmen-compile again")
    return Kept(target, content, found, names)


def _content(target: Path) -> bytes | None:
    try:
        return read_small(target / MANIFEST_FILE, MOST_MANIFEST_BYTES)
    except OSError:
        return None


def _check_same(found: Bundle, checkpoint_sha256: str, precision: str) -> None:
    manifest = found.manifest
    there = manifest.source.get("checkpoint_sha256")
    if there != checkpoint_sha256:
        raise InputError(
            f"holds a bundle of another checkpoint ({str(there)[:12]}...)",
            f"one of this checkpoint ({checkpoint_sha256[:12]}...)",
            _CHOOSE,
            where=str(found.path),
        )
    if manifest.precision != precision:
        raise InputError(
            f"its graphs are {manifest.precision}, and a bundle has one precision",
            precision,
            _CHOOSE,
            where=str(found.path),
        )


def _check_sound(found: Bundle, names: Sequence[str], inputs: Inputs) -> None:
    """Raises HcmenError if the variants `names` cannot stand beside graphs that are exported now."""
    manifest = found.manifest
    if (manifest.opset, manifest.ir_version, manifest.inputs) != (OPSET, IR_VERSION, inputs):
        raise InputError(
            f"{', '.join(names)} would stay, and another version of hcmen exported them with opset {manifest.opset}",
            f"opset {OPSET} and the same inputs",
            _EXPORT_ALL,
            where=str(found.path),
        )
    stay = [found.variant(name) for name in names]
    tokenizer = [manifest.tokenizer] if manifest.tokenizer else []
    for record in (manifest.weights, *tokenizer, *(v.graph for v in stay), *(v.golden for v in stay)):
        try:
            found.file(record)
        except HcmenError as error:
            raise error.but(fix=_EXPORT_ALL) from error
