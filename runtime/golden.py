"""The golden set of a variant: inputs with the eager model's outputs, by which a device checks itself."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from hcmen.base.bundle import Bundle
from hcmen.base.errors import CorruptFileError, reason_of
from hcmen.base.npy import read_npy_header
from hcmen.runtime.compare import Comparison, compare

__all__ = ["SelfTest", "Session", "golden_test", "golden_test_twice", "read_golden"]

Arrays = dict[str, NDArray[Any]]

_MAX_GOLDEN_BYTES = 1 << 29
_MAX_GOLDEN_MEMBERS = 4096


@dataclass(frozen=True)
class SelfTest:
    """A variant's outputs on its golden inputs against the eager model's, which came with the bundle."""

    variant: str
    cases: int
    outputs: Mapping[str, Comparison]

    @property
    def passed(self) -> bool:
        """Whether every output is within the bound."""
        return all(c.passed for c in self.outputs.values())

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON."""
        outputs = {name: comparison.to_json() for name, comparison in self.outputs.items()}
        return {"passed": self.passed, "cases": self.cases, "outputs": outputs}

    def first_failed(self) -> str:
        """The first output beyond the bound, and by how much, on one line; there must be one."""
        name, worst = next((n, c) for n, c in self.outputs.items() if not c.passed)
        return f"{name} {worst.line()}"


class Session(Protocol):
    """A loaded variant, whatever runs it. kernels: as in `Result`. tolerance: (atol, rtol) of its parity."""

    kernels: str
    tolerance: tuple[float, float]

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs by name."""
        ...


def golden_test(
    bundle: Bundle, variant: str, session: Session, atol: float | None = None, rtol: float | None = None
) -> SelfTest:
    """Runs the golden inputs of `variant` in `session` and compares with the eager model's outputs.

    Args:
        bundle, variant: whose golden set. session: what runs. atol, rtol: the bound, by default the session's own.

    Raises:
        CorruptFileError: the golden file is damaged.
        HcmenError: what the session raises.
    """
    record = bundle.variant(variant)
    where = f"{bundle.path / record.golden.file}"
    cases = read_golden(bundle.read(record.golden), where)
    got: dict[str, list[NDArray[Any]]] = {t.name: [] for t in record.outputs}
    expected: dict[str, list[NDArray[Any]]] = {t.name: [] for t in record.outputs}
    for arrays in cases:
        missing = [t.name for t in (*record.inputs, *record.outputs) if t.name not in arrays]
        if missing:
            raise CorruptFileError(f"{where}: a case lacks {missing[0]!r}", fix="export the bundle again")
        for name in expected:
            if arrays[name].dtype.kind not in "biuf":
                raise CorruptFileError(
                    f"{where}: {name!r} is {arrays[name].dtype}", "numbers", "export the bundle again"
                )
        outputs = session.run({t.name: arrays[t.name] for t in record.inputs})
        for name in got:
            if outputs[name].shape != arrays[name].shape:
                compare(outputs[name], arrays[name])  # raises, naming both shapes
            got[name].append(outputs[name])
            expected[name].append(arrays[name])
    bound = (session.tolerance[0] if atol is None else atol, session.tolerance[1] if rtol is None else rtol)
    comparisons = {name: compare(np.concatenate(got[name]), np.concatenate(expected[name]), *bound) for name in got}
    return SelfTest(variant, len(cases), comparisons)


def golden_test_twice(bundle: Bundle, variant: str, session: Session) -> SelfTest:
    """As `golden_test`, and again, since sizes that come again may run as CUDA graphs; the one that failed, if any."""
    tests = [golden_test(bundle, variant, session) for _ in range(2)]
    return next((t for t in tests if not t.passed), tests[-1])


def read_golden(content: NDArray[np.uint8], where: str) -> list[Arrays]:
    """The cases of a golden file, in order: members "<case>/<tensor>"."""
    cases: dict[str, Arrays] = {}
    try:
        with zipfile.ZipFile(io.BytesIO(content.tobytes())) as archive:
            members = archive.infolist()
            declared = sum(m.file_size for m in members)
            if len(members) > _MAX_GOLDEN_MEMBERS or declared > _MAX_GOLDEN_BYTES:
                raise CorruptFileError(f"{where}: {len(members)} arrays of {declared} bytes, expected far fewer")
            for member in members:
                case, _, name = member.filename.removesuffix(".npy").partition("/")
                cases.setdefault(case, {})[name] = _read_member(archive, member)
    except CorruptFileError:
        raise
    except Exception as error:  # zipfile, zlib and numpy each raise errors of their own on damage
        reason = reason_of(error)
        raise CorruptFileError(f"{where}: damaged golden file ({reason})", fix="export the bundle again") from error
    if not cases:
        raise CorruptFileError(f"{where}: no case in it, expected at least one", fix="export the bundle again")
    return [cases[key] for key in sorted(cases)]


def _read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    with archive.open(member) as stream:
        content = stream.read(member.file_size + 1)
    array: NDArray[Any] = read_npy_header(io.BytesIO(content)).array(content).copy()
    return array
