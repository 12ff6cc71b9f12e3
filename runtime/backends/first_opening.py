"""An engine that was built without a GPU runs the golden set on the first one that opens it, before it serves anything.

That it passed is kept beside the engine, for this very engine and golden set on this GPU under these versions; all else
that may be there is measured again. Where the bundle cannot be written, it is measured each time.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Protocol

from hcmen.base.bundle import Bundle
from hcmen.base.engines import EngineRecord, is_kept, keep
from hcmen.base.errors import CheckFailed, HcmenError
from hcmen.runtime.golden import Session, golden_test_twice

__all__ = ["require_golden"]


class _Session(Session, Protocol):
    def save(self) -> None: ...


def require_golden(
    bundle: Bundle, engine: EngineRecord, session: _Session, here: Mapping[str, str | int], again: str
) -> None:
    """Holds that `engine` passes, or has passed, the golden set of its variant here.

    Args:
        bundle, engine: whose. session: runs it. here: what tells this device and its versions from others.
        again: how an engine is compiled again, for the message.

    Raises:
        CheckFailed: it differs from the eager model by more than the bound.
        BackendError, CorruptFileError: it did not run, or the golden set is damaged.
    """
    key = {**here, "engine_sha256": engine.engine.sha256, "golden_sha256": bundle.variant(engine.variant).golden.sha256}
    if is_kept(bundle, engine, key):
        return
    test = golden_test_twice(bundle, engine.variant, session)
    if not test.passed:
        precision = " with --precision fp32" if engine.precision == "fp16" else ", or use another backend"
        raise CheckFailed(
            f"the golden set of '{engine.variant}' fails on this {here.get('gpu', 'GPU')}: {test.first_failed()}",
            fix=f"{again}{precision}",
            where=str(bundle.path / engine.engine.file),
        )
    session.save()
    atol, rtol = session.tolerance
    try:
        keep(bundle, engine, key, {**test.to_json(), "atol": atol, "rtol": rtol})
    except HcmenError as error:
        what = error.but(fix="the golden set runs whenever an engine is opened, as its result cannot be kept")
        warnings.warn(str(what), RuntimeWarning, stacklevel=2)
