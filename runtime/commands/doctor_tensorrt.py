"""The rows of hcmen-doctor on the NVIDIA driver, the GPU, each TensorRT, its plugins and the engines of a bundle.

None of it is needed to score clips on the CPU, so that what is not there is told and not counted as a failure; what is
there and does not work is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING, cast

from hcmen.base.console import one_line
from hcmen.base.errors import CheckFailed, CorruptFileError, HcmenError
from hcmen.base.typed import as_typed
from hcmen.runtime.backends.cuda import Cuda, find_driver
from hcmen.runtime.backends.options import BACKENDS, TensorRT
from hcmen.runtime.commands.doctor_rows import FAILED, INFO, OK, SKIPPED, Row, failed

if TYPE_CHECKING:
    from hcmen.runtime.backends.flavour import Flavour

__all__ = ["tensorrt_rows"]


def tensorrt_rows(bundle: str | None, *, trust: bool = False) -> Iterator[Row]:
    """The findings, each the possible cause of the next.

    Args:
        bundle: the folder whose engines are looked at; None for none. trust: run engines of others too.
    """
    driver = find_driver()
    yield Row("nvidia driver", INFO, driver or "none")
    gpu, cuda = _gpu(driver)
    yield gpu
    from hcmen.runtime.backends.flavour import FLAVOUR_OF

    for flavour in FLAVOUR_OF.values():
        row, usable = _tensorrt(flavour, cuda)
        yield row
        if flavour.library:
            yield _plugins(flavour) if row.status == OK else Row(f"{flavour.name} plugins", INFO, "need TensorRT")
        yield _engines(bundle, cuda if usable else None, flavour, trust)


def _gpu(driver: str | None) -> tuple[Row, Cuda | None]:
    if driver is None:
        return Row("gpu", INFO, "none, without a driver"), None
    try:
        cuda = Cuda()
        free, total = cuda.free_bytes()
    except HcmenError as error:
        return failed("gpu", error, "install a driver that serves this CUDA runtime"), None
    detail = f"sm {cuda.sm}, driver for CUDA {cuda.driver}, runtime {cuda.runtime} ({cuda.path}), "
    return Row("gpu", OK, f"{detail}{free >> 20} of {total >> 20} MiB free"), cuda


def _tensorrt(flavour: Flavour, cuda: Cuda | None) -> tuple[Row, bool]:
    """What is installed, and whether it serves the GPU that is here."""
    if find_spec(flavour.module) is None:
        return Row(flavour.name, INFO, f"not installed; only --backend {flavour.name} and hcmen-compile need it"), False
    from hcmen.runtime.backends.flavour import TrtModule

    try:
        tensorrt = TrtModule(flavour)
    except HcmenError as error:
        oldest = ".".join(map(str, flavour.oldest))
        return failed(flavour.name, error, f"install {flavour.title} {oldest} or later again"), False
    detail = tensorrt.version
    if flavour.portable:
        detail += f", builds for GPUs of sm {', '.join(map(str, flavour.served(tensorrt.module)))}"
    if cuda is None:
        return Row(flavour.name, OK, detail), False
    try:
        flavour.require_device(tensorrt.module, cuda.sm)
    except HcmenError as error:
        return Row(flavour.name, INFO, one_line(error)), False
    return Row(flavour.name, OK, f"{detail}; sm {cuda.sm} is here" if flavour.portable else detail), True


def _plugins(flavour: Flavour) -> Row:
    from hcmen.runtime.backends.flavour import PLUGIN_OPS, TrtModule

    name = f"{flavour.name} plugins"
    try:
        path = flavour.plugin_library()
    except HcmenError as error:
        return Row(name, INFO, one_line(error))
    try:
        TrtModule(flavour).load_plugins(path)
    except HcmenError as error:
        return failed(name, error, "build hcmen again on this device: docs/jetson.md")
    return Row(name, OK, f"{' and '.join(PLUGIN_OPS)}, {path.stat().st_size / 1024:.0f} KiB, {path}")


def _engines(bundle: str | None, cuda: Cuda | None, flavour: Flavour, trust: bool) -> Row:
    """Whether the engines are as listed, which fit this device, and whether those score the golden set rightly."""
    # The name is from a time when there was one TensorRT.
    name = "engines" if flavour.library else f"{flavour.name} engines"
    if bundle is None:
        return Row(name, INFO, "no bundle")
    from hcmen.base.bundle import read_bundle
    from hcmen.base.engines import read_engines
    from hcmen.runtime.backends.tensorrt import TrtBackend, choose_engine
    from hcmen.runtime.golden import golden_test

    compiled = f"run {flavour.place}: {as_typed('hcmen-compile', '--bundle', bundle, *flavour.chosen)}"
    try:
        opened = read_bundle(bundle)
    except HcmenError:
        return Row(name, SKIPPED, "need a sound bundle")
    try:
        records = [record for record in read_engines(opened) if record.flavour == flavour.name]
        if not records:
            purpose = "" if flavour.chosen else f" for --backend {flavour.name}"
            return Row(name, INFO, f"none in {bundle}; {compiled}{purpose}")
        for record in records:
            opened.file(record.engine)
        what = f"{len(records)}, each as listed"
        if cuda is None:
            return Row(name, OK, f"{what}; not run, needs a GPU and {flavour.title}")
        pairs = sorted({(r.variant, r.precision) for r in records})
        fitting, unfit = [], []
        for variant, precision in pairs:
            options = cast("type[TensorRT]", BACKENDS[flavour.name])
            backend = TrtBackend(options(precision=precision, trust_engines=trust))
            try:
                choose_engine(opened, variant, precision, backend.cuda.sm, backend.version, flavour, trust=trust)
            except HcmenError as error:
                unfit.append(one_line(error))
                continue
            session = backend.open(opened, variant)
            try:
                test = golden_test(opened, variant, session)
            finally:
                session.close()
            if not test.passed:
                raise CheckFailed(f"{what}; the golden set fails for '{variant}' in {precision}")
            fitting.append(f"{variant} {precision}")
    except CorruptFileError as error:
        return failed(name, error.but(fix=f"{compiled} --force"), "")
    except HcmenError as error:
        return failed(name, error, compiled)
    if unfit:
        return Row(name, FAILED, f"{what}; {len(unfit)} of {len(pairs)} do not fit: {unfit[0]}", compiled)
    return Row(name, OK, f"{what}; golden set passed for {', '.join(fitting)}")
