"""How engines are built: the options of hcmen-compile, and the sizes that an engine is made for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hcmen.base.bundle import Bundle
from hcmen.base.engines import PLUGINS, PRECISIONS
from hcmen.base.errors import InputError, shown, unknown_name
from hcmen.base.manifest import VariantRecord

__all__ = ["Options", "profile_shapes"]

_MOST_WORKSPACE = 1 << 44


@dataclass(frozen=True)
class Options:
    """How engines are built.

    precision: "fp32" or "fp16". plugin: "library", "aot" or "function", who runs the hcmen ops; None for the flavour's.
    targets: compute capabilities of the GPUs that a portable engine is for, 89 for 8.9; none for all from 80 on.
    workspace_bytes: most scratch memory a kernel may have, None for TensorRT's own choice (all there is).
    max_batch: largest batch of one run; opt_batch: the one that the profile of batches is tuned for.
    version_compatible: later versions of TensorRT load the engine too; it embeds a runtime and the plugin library.
    hardware_compatible: so do all GPUs from sm 80 on (not on a Jetson).
    profiles: 1 for one optimisation profile, for all batches; 2 for a second one, for single clips; None for the
        flavour's. Two take about twice the room in an engine of TensorRT-RTX.
    timing_cache: a file of kernel timings, read and extended, so that the next build is faster.
    force: build even what is there already.

    Raises:
        InputError: a value out of range, or options that exclude each other.
    """

    precision: str = "fp32"
    plugin: str | None = None
    targets: tuple[int, ...] = ()
    workspace_bytes: int | None = None
    max_batch: int = 32
    opt_batch: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    profiles: int | None = None
    timing_cache: Path | None = None
    force: bool = False

    @property
    def best_batch(self) -> int:
        """`opt_batch`, or what it is if nothing is said: a quarter of the largest, at least two."""
        return self.opt_batch or min(self.max_batch, max(2, self.max_batch // 4))

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("precision", self.precision, PRECISIONS),
            ("plugin", self.plugin, tuple(p for p in PLUGINS if p != "none")),
        ):
            if value is not None and value not in choices:
                raise unknown_name(name, value, choices)
        if self.profiles not in (None, 1, 2):
            raise InputError(f"profiles is {self.profiles}", "1 or 2")
        if not 1 <= self.max_batch <= 4096:
            raise InputError(f"max_batch is {self.max_batch}, expected 1 to 4096")
        if self.opt_batch is not None and not 1 <= self.opt_batch <= self.max_batch:
            raise InputError(f"opt_batch is {self.opt_batch}, expected 1 to max_batch, {self.max_batch}")
        if self.workspace_bytes is not None and not 1 << 20 <= self.workspace_bytes <= _MOST_WORKSPACE:
            raise InputError(f"workspace is {shown(self.workspace_bytes)} bytes", f"{1 << 20} to {_MOST_WORKSPACE}")
        if self.plugin == "aot" and self.version_compatible:
            raise InputError("plugin 'aot' in a version-compatible engine is untried: choose one of the two")


def profile_shapes(
    bundle: Bundle, record: VariantRecord, max_batch: int, opt_batch: int, profiles: int = 2
) -> list[dict[str, tuple[tuple[int, ...], ...]]]:
    """The optimisation profiles of a variant: input -> its (least, best, largest) shape.

    One for batches, tuned for `opt_batch`; with 2 `profiles` one before it for single clips, as a device scores them.
    Time runs from one step to the most that the manifest's model takes, and is tuned for half of it.
    """
    sizes = _time_sizes(bundle, record)
    batches = [(1, opt_batch, max_batch)]
    if profiles == 2 and max_batch > 1:
        batches.insert(0, (1, 1, 1))
    made = []
    for batch in batches:
        profile = {}
        for tensor in record.inputs:
            axes = [batch if n == "batch" else (n, n, n) if isinstance(n, int) else sizes[n] for n in tensor.shape]
            profile[tensor.name] = tuple(tuple(axis[i] for axis in axes) for i in range(3))
        made.append(profile)
    return made


def _time_sizes(bundle: Bundle, record: VariantRecord) -> dict[str, tuple[int, int, int]]:
    """(least, best, most) of every named size but the batch, such as "text_time"."""
    sizes = {}
    for tensor in record.inputs:
        for n in tensor.shape:
            if isinstance(n, str) and n != "batch":
                most = bundle.manifest.inputs.modality(n.removesuffix("_time")).max_steps
                sizes[n] = (1, max(1, most // 2), most)
    return sizes
