"""The field's missing-modality protocols as data: what of a split is hidden from the model when it is judged.

    intra       every modality loses steps at the same rate r, r = 0.0 to 0.9 (TFR-Net, MMSA, LNLN, TF-Mamba)
    fixed       the seven sets of modalities, each for every sample (MMIN, GCNet, HRLF)
    random_mr   every sample keeps a set of its own; MR is the share of modalities that are missing, 0.0 to 0.7
    imbalanced  a rate per modality: the rule of `intra`, or whole modalities missing (MissBench's idea)

What a setting hides is a function of the seed and a sample's index in the split; batches and workers have no part in
it. docs/protocols.md has the definitions on one page.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hcmen.base.errors import InputError, unknown_name
from hcmen.base.modalities import MODALITIES, VARIANTS, Variant, variants_of
from hcmen.data import IntArray, Split

__all__ = [
    "PROTOCOLS",
    "Average",
    "Batch",
    "Masks",
    "Protocol",
    "Setting",
    "apply_setting",
    "batches",
    "protocol_named",
]

BoolArray = npt.NDArray[np.bool_]
Noise = Mapping[str, npt.NDArray[np.float64]]

# Names these uses of (seed, modality, index) and (seed, index); missing.py and training/trainer.py have 1 to 3.
_STEPS, _SETS, _SHARES = 4, 5, 6
_COUNT = len(MODALITIES)


@dataclass(frozen=True)
class Masks:
    """What a setting leaves of N samples.

    keep: {m: bool [N, T_m]} of the data's modalities, False for dropped and for padded steps. lengths: {m: int64 [N]},
    the valid prefix, which dropping leaves as it is. present: bool [N, 3] in the order of MODALITIES, at least one per
    row.
    """

    keep: dict[str, BoolArray]
    lengths: dict[str, IntArray]
    present: BoolArray

    @property
    def missing_rate(self) -> float:
        """The share of the data's modalities that are missing, 1 - sum |u_i| / (3 N) of three."""
        return 1.0 - int(self.present.sum()) / (len(self.present) * len(self.keep))

    @property
    def missing_shares(self) -> dict[str, float]:
        """Per modality of the data the share of samples that lack it."""
        return {m: 1.0 - int(self.present[:, MODALITIES.index(m)].sum()) / len(self.present) for m in self.keep}

    @property
    def dropped_steps(self) -> dict[str, float]:
        """Per modality the share of its valid steps that are dropped."""
        return {m: 1.0 - int(x.sum()) / int(self.lengths[m].sum()) for m, x in self.keep.items()}

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The variants that some sample is left with."""
        there = {tuple(row) for row in np.unique(self.present, axis=0).tolist()}
        return tuple(v for v in VARIANTS if v.mask in there)

    @property
    def digest(self) -> str:
        """sha256 of the lengths, the kept steps and the presence; how far a split is padded does not enter."""
        digest = hashlib.sha256()
        for m in self.keep:
            valid = _valid(self.lengths[m], self.keep[m].shape[1])
            digest.update(self.lengths[m].astype("<i8").tobytes())
            digest.update(np.packbits(self.keep[m][valid]).tobytes())
        digest.update(np.packbits(self.present).tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Setting:
    """One point of a protocol.

    name: unique in its protocol. rates: probability per modality, in the order of MODALITIES, that a step is dropped.
    present: which modalities every sample has, of those that the data has. missing_rate: the share of modalities to
    take away, drawn per sample, instead of the same set for all. missing_rates: likewise with a probability per
    modality that it is missing; every sample keeps one at least, so they sum to less than 2.
    """

    name: str
    rates: tuple[float, ...] = (0.0,) * _COUNT
    present: tuple[bool, ...] = (True,) * _COUNT
    missing_rate: float = 0.0
    missing_rates: tuple[float, ...] = (0.0,) * _COUNT

    def __post_init__(self) -> None:
        if len(self.rates) != _COUNT or not all(0.0 <= r <= 1.0 for r in self.rates):
            raise InputError(f"setting '{self.name}': rates are {self.rates}, expected {_COUNT} numbers from 0 to 1")
        if len(self.present) != _COUNT or not any(self.present):
            raise InputError(f"setting '{self.name}': present is {self.present}, expected at least one of {_COUNT}")
        if not 0.0 <= self.missing_rate <= 1.0:
            raise InputError(f"setting '{self.name}': missing_rate is {self.missing_rate}, expected 0 to 1")
        shares = self.missing_rates
        if len(shares) != _COUNT or not all(0.0 <= r <= 1.0 for r in shares) or sum(shares) >= _COUNT - 1:
            raise InputError(
                f"setting '{self.name}': missing_rates are {shares}, expected {_COUNT} numbers from 0 to 1 with a sum "
                f"below {_COUNT - 1}, so that a modality is left"
            )
        if bool(self.missing_rate) + any(shares) + (not all(self.present)) > 1:
            raise InputError(
                f"setting '{self.name}': missing_rate, missing_rates and a fixed set exclude each other: choose one"
            )


@dataclass(frozen=True)
class Average:
    """A mean over some settings of a protocol, as the field's tables print it; `about` is its label."""

    name: str
    about: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Protocol:
    """A named list of settings, which may be empty, and the averages that are quoted of it."""

    name: str
    about: str
    settings: tuple[Setting, ...]
    averages: tuple[Average, ...]

    def apply(self, split: Split, seed: int) -> dict[str, Masks]:
        """The masks of every setting by name, all from one draw, so that a higher rate hides more of the same."""
        noise = _step_noise(split, seed) if any(any(s.rates) for s in self.settings) else None
        return {s.name: _apply(s, split, seed, noise) for s in self.settings}


def apply_setting(setting: Setting, split: Split, seed: int) -> Masks:
    """The masks of one setting: the same that `Protocol.apply` gives."""
    return _apply(setting, split, seed, _step_noise(split, seed) if any(setting.rates) else None)


class Batch(NamedTuple):
    """Samples of one variant, dropped steps hidden.

    rows: their places in the split. features: {m: float32 [batch, longest, F_m], or text tokens int64
    [batch, 3, longest]} and lengths: {m: int64 [batch]} of the modalities that are present.
    """

    variant: Variant
    rows: IntArray
    features: dict[str, npt.NDArray[Any]]
    lengths: dict[str, IntArray]


def batches(split: Split, masks: Masks, batch_size: int) -> Iterator[Batch]:
    """The split as `masks` leaves it, each sample once, variant by variant, padded to the longest of each batch."""
    for variant in masks.variants:
        members = np.flatnonzero((masks.present == variant.mask).all(axis=1))
        for start in range(0, len(members), batch_size):
            rows = members[start : start + batch_size]
            lengths = {m: split.lengths[m][rows] for m in variant.present}
            longest = {m: int(n.max()) for m, n in lengths.items()}
            features = {m: split.model_input(m, rows, t, masks.keep[m][rows, :t]) for m, t in longest.items()}
            yield Batch(variant, rows, features, lengths)


def protocol_named(name: str, modalities: Sequence[str] = MODALITIES) -> Protocol:
    """The protocol called `name` for data of these modalities; without settings where it has nothing to hide there.

    Raises:
        InputError: there is none; the message suggests the nearest one.
    """
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name] if set(modalities) == set(MODALITIES) else _protocols(tuple(modalities))[name]


# --- the draws ------------------------------------------------------------------------------------------------------


def _apply(setting: Setting, split: Split, seed: int, noise: Noise | None) -> Masks:
    keep = {}
    there = np.array([m in split.lengths for m in MODALITIES])
    for m, rate in zip(MODALITIES, setting.rates, strict=True):
        if m not in split.lengths:
            continue
        steps, lengths = split.steps[m], split.lengths[m]
        keep[m] = _valid(lengths, steps)
        if not rate or noise is None:
            continue
        keep[m] &= noise[m] > rate
        if m == "text":  # [CLS] and [SEP]
            keep[m][:, 0] = True
            keep[m][np.arange(len(split)), lengths - 1] = True
    present = np.tile(np.array(setting.present) & there, (len(split), 1))
    if not present.any():
        raise InputError(
            f"setting '{setting.name}' leaves nothing of a set of {' and '.join(split.modalities)}",
            fix="leave it out",
        )
    if setting.missing_rate:
        present[:, there] = _random_sets(len(split), setting.missing_rate, seed, int(there.sum()))
    elif any(setting.missing_rates):
        if not there.all():
            raise InputError(
                f"setting '{setting.name}' is for three modalities, the data has {' and '.join(split.modalities)}",
                fix="leave it out",
            )
        present = _uneven_sets(len(split), setting.missing_rates, seed)
    return Masks(keep, split.lengths, present)


def _step_noise(split: Split, seed: int) -> Noise:
    """{m: [N, T_m]} in (0, 1], so that a rate of 0 keeps every step; a step's number depends on nothing behind it."""
    noise = {}
    for i, m in enumerate(MODALITIES):
        if m not in split.lengths:
            continue
        noise[m] = np.zeros((len(split), split.steps[m]))
        for row, length in enumerate(split.lengths[m]):
            noise[m][row, :length] = 1.0 - np.random.default_rng((_STEPS, seed, i, row)).random(length)
    return noise


def _random_sets(samples: int, rate: float, seed: int, count: int = _COUNT) -> BoolArray:
    """Presence [samples, count] with `rate` of all modalities missing, or as much as leaves one to each sample.

    Each sample draws the modality it keeps for sure and a number for each of the others; over the whole split the
    lowest numbers go missing, as many as the rate asks for. That hits the rate to half a modality, where independent
    draws would scatter about it, and a higher rate takes away more of the same.
    """
    draws = np.array([np.random.default_rng((_SETS, seed, row)).random(1 + count) for row in range(samples)])
    kept = np.floor(draws[:, 0] * count).astype(np.int64)
    numbers = draws[:, 1:]
    numbers[np.arange(samples), kept] = 2.0
    missing = min(round(rate * samples * count), samples * (count - 1))
    present = np.ones(samples * count, dtype=np.bool_)
    present[np.argsort(numbers, axis=None, kind="stable")[:missing]] = False
    return present.reshape(samples, count)


def _uneven_sets(samples: int, rates: Sequence[float], seed: int) -> BoolArray:
    """Presence [samples, 3]; modality i is missing with probability `rates[i]`, and something is always left.

    Modalities go missing independently, and a sample that would lose all of them draws again. That would leave each
    one missing more seldom than asked, so the odds q of a single draw are raised: with all = q_1 q_2 q_3 the share
    that is left after drawing again is (q_i - all) / (1 - all) = r_i, hence q_i = r_i + (1 - r_i) all. Iterating from
    all = 0 rises to the smallest solution, which is below 1 as long as the rates sum to less than 2.
    """
    wanted, all_gone, before = np.asarray(rates, dtype=np.float64), 0.0, -1.0
    while all_gone > before:
        before, all_gone = all_gone, float(np.prod(wanted + (1.0 - wanted) * all_gone))
    odds = wanted + (1.0 - wanted) * all_gone
    present = np.empty((samples, _COUNT), dtype=np.bool_)
    for row in range(samples):
        generator = np.random.default_rng((_SHARES, seed, row))
        present[row] = False
        while not present[row].any():
            present[row] = generator.random(_COUNT) >= odds
    return present


def _valid(lengths: IntArray, steps: int) -> BoolArray:
    return np.arange(steps) < lengths[:, None]


# --- the protocols --------------------------------------------------------------------------------------------------


_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _mean(settings: Sequence[Setting], name: str, about: str) -> Average:
    """`{}` in the name and what it is about is the number of settings."""
    word = _WORDS[len(settings)]
    return Average(name.format(word), about.format(word), tuple(s.name for s in settings))


def _protocols(modalities: tuple[str, ...]) -> dict[str, Protocol]:
    """The protocols for data of these modalities; what hides modalities has nothing to do with one alone."""
    several = len(modalities) > 1
    # A sample keeps one modality at least, so of two no more than half go missing.
    most = 7 if len(modalities) == _COUNT else 5
    intra = tuple(Setting(f"r={k / 10:.1f}", rates=(k / 10,) * _COUNT) for k in range(10))
    fixed = tuple(Setting(v.name, present=v.mask) for v in variants_of(modalities))
    random_mr = tuple(Setting(f"MR={k / 10:.1f}", missing_rate=k / 10) for k in range(most + 1) if several)
    uneven = [(own, other, m) for own, other in ((0.8, 0.2), (0.2, 0.8)) for m in modalities if several]
    of_steps = tuple(
        Setting(f"{m}_{'poor' if own > other else 'rich'}", rates=tuple(own if k == m else other for k in MODALITIES))
        for own, other, m in uneven
    )
    # Of two modalities 0.8 and 0.2 would leave none to spare: every sample would keep one.
    of_samples = tuple(
        Setting(
            f"{m}_{'often' if own > other else 'seldom'}_missing",
            missing_rates=tuple(own if k == m else other for k in MODALITIES),
        )
        for own, other, m in (uneven if len(modalities) == _COUNT else ())
    )
    incomplete = fixed[1:]
    return {
        p.name: p
        for p in (
            Protocol(
                "intra",
                "steps dropped at rate r in all modalities",
                intra,
                (_mean(intra, "mean_of_rates", "mean of the {} rates"),),
            ),
            Protocol(
                "fixed",
                "whole modalities missing, one set for all samples",
                fixed,
                (
                    _mean(incomplete, "mean_of_{}", "mean of the {} incomplete sets"),
                    _mean(fixed, "mean_of_{}", "mean of all {} sets"),
                )
                if several
                else (),
            ),
            Protocol(
                "random_mr",
                "whole modalities missing, drawn per sample",
                random_mr,
                (
                    _mean(random_mr, "mean_of_rates", "mean of the {} rates"),
                    _mean(random_mr[1:], "mean_of_{}", "mean of the rates above 0"),
                )
                if several
                else (),
            ),
            Protocol(
                "imbalanced",
                "steps dropped, or whole modalities missing, at 0.8 for some modalities and 0.2 for the others",
                (*of_steps, *of_samples),
                (
                    *([_mean(of_steps, "mean_of_{}", "mean of the {} that drop steps")] if of_steps else []),
                    *(
                        [_mean(of_samples, "mean_of_{}_missing", "mean of the {} that lack modalities")]
                        if of_samples
                        else []
                    ),
                ),
            ),
        )
    }


PROTOCOLS: dict[str, Protocol] = _protocols(MODALITIES)
"""The protocols by name."""
