"""Rows into train, valid and test. Rows of one group, such as a video or a document, stay together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from hcmen.base.errors import InputError, shown
from hcmen.data import SPLITS
from hcmen.data.table.rows import Row

__all__ = ["SHARES", "Divided", "divided", "group_of"]

SHARES = {"train": 70, "valid": 10, "test": 20}
"""In percent of the rows, where the table does not say."""
_MMSA = "$_$"


class Divided(NamedTuple):
    """Which rows are in which split, in the order of the table. how: for the index and the reader."""

    places: dict[str, list[int]]
    how: dict[str, Any]


def group_of(row: Row) -> str:
    """The group of `row`: as its column says, else the video in a name such as "video$_$3", else its own."""
    if row.group is not None:
        return f"group {row.group}"
    video, mark, _ = row.id.partition(_MMSA)
    return f"video {video}" if mark else f"row {row.id}"


def divided(rows: Sequence[Row], seed: int, where: str) -> Divided:
    """The splits that the table gives, or seeded ones of 70, 10 and 20 percent.

    Made ones depend on the names of the groups and the seed, and not on the order of the rows.

    Raises:
        InputError: a group is in two splits; a split is empty; there are too few groups.
    """
    groups: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(group_of(row), []).append(place)
    if rows and rows[0].split is not None:
        split_of = _given(rows, groups, where)
    else:
        split_of = _made(groups, seed, len(rows), where)
    places: dict[str, list[int]] = {split: [] for split in SPLITS}
    for group, inside in groups.items():
        places[split_of[group]] += inside
    empty = [split for split in SPLITS if not places[split]]
    if empty:
        raise InputError(
            f"no row is in split {' or '.join(empty)}", f"some in each of {', '.join(SPLITS)}", where=where
        )
    by = next((kind for kind in ("group", "video", "row") if any(g.startswith(f"{kind} ") for g in groups)), "row")
    how: dict[str, Any] = {"given": rows[0].split is not None, "by": by}
    if not how["given"]:
        how |= {"seed": seed, "shares": dict(SHARES)}
    how["groups"] = {split: sum(x == split for x in split_of.values()) for split in SPLITS}
    return Divided({split: sorted(found) for split, found in places.items()}, how)


def _given(rows: Sequence[Row], groups: dict[str, list[int]], where: str) -> dict[str, str]:
    split_of = {}
    for group, places in groups.items():
        found = dict.fromkeys(str(rows[place].split) for place in places)
        if len(found) > 1:
            first, second = list(found)[:2]
            kind, _, name = group.partition(" ")
            raise InputError(
                f"{kind} {shown(name[:100])} is in split {first} and in {second}",
                "each in one split",
                "correct the column 'split', or give groups of your own in a column 'group'",
                where=where,
            )
        split_of[group] = next(iter(found))
    return split_of


def _made(groups: dict[str, list[int]], seed: int, count: int, where: str) -> dict[str, str]:
    if len(groups) < len(SPLITS):
        rows = "row" if count == 1 else "rows"
        raise InputError(
            f"{count} {rows} in {len(groups)} group{'s' * (len(groups) != 1)}: too few for {', '.join(SPLITS)}",
            f"at least {len(SPLITS)} groups",
            "give more rows",
            where=where,
        )
    order = sorted(groups)
    random.Random(seed).shuffle(order)
    lacking = {split: count * share / 100 for split, share in SHARES.items()}
    split_of: dict[str, str] = {}
    for i, group in enumerate(order):
        empty = [split for split in SPLITS if split not in split_of.values()] if len(order) - i <= len(SPLITS) else []
        choice = max(empty if len(empty) == len(order) - i else SPLITS, key=lambda split: lacking[split])
        split_of[group] = choice
        lacking[choice] -= len(groups[group])
    return split_of
