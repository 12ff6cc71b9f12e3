"""A table into a converted folder: read, checked, divided, done in several processes, written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import hcmen
from hcmen.base.errors import CorruptFileError, InputError
from hcmen.base.files import open_regular, refused
from hcmen.base.manifest import FrontEnd
from hcmen.base.modalities import MODALITIES
from hcmen.data import SPLITS, IntArray
from hcmen.data.folder import check_free, write_folder
from hcmen.data.layout import RawSplit
from hcmen.data.scale import label_scale
from hcmen.data.table.clips import Shapes
from hcmen.data.table.groups import divided
from hcmen.data.table.reading import Problem, TableFile
from hcmen.data.table.rows import Row, Rows, read_rows
from hcmen.data.table.samples import FromClips, Source, TableSplit, Windows, neighbours, shaped, tokens_by_split
from hcmen.data.table.texts import Words
from hcmen.data.table.work import Chunks, work_folder

__all__ = ["BadRows", "TableOptions", "convert_table"]

_MOST_KEPT = 1000
_MOST_COLUMNS_TOLD = 20
"""Bad rows that dataset.json lists, which has to stay small."""
_PIECE_BYTES = 1 << 22
_MOST_CONTEXT = 100
Shown = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TableOptions:
    """How a table is converted.

    text_encoder: folder of the BERT whose tokenizer makes tokens of column `text`. max_tokens: a longer text is cut;
    None takes 128, or what the encoder takes.
    label_range: refuses labels beyond it, and is that of the scale; the data's if None. seed: of the splits, where the
    table has none. context: neighbours of the same group that a row of feature columns is put together with.
    skip_bad: leave out rows that cannot be used. jobs: processes.
    """

    text_encoder: Path | None = None
    max_tokens: int | None = None
    label_range: tuple[float, float] | None = None
    seed: int = 0
    context: int = 0
    skip_bad: bool = False
    jobs: int = 1


class BadRows(InputError):
    """Some rows cannot be used.

    Attributes:
        problems: all of them.
    """

    def __init__(self, problems: Sequence[Problem], count: int, where: str):
        super().__init__(
            f"{len(problems)} of {count} rows cannot be used",
            "all",
            "mend them, or leave them out with --skip-bad",
            where=where,
        )
        self.problems = list(problems)
        if any(problem.corrupt for problem in problems):
            self.exit_code = CorruptFileError.exit_code


class _Done(NamedTuple):
    """What is known of the rows that can be used. shapes: of their clips. tokens: how many each text has."""

    rows: list[Row]
    used: list[bool]
    shapes: list[Shapes]
    tokens: IntArray
    cut: int


@dataclass
class _Conversion:
    source: Path
    out: Path
    options: TableOptions
    on_progress: Shown
    notes: list[str] = field(default_factory=list)
    left_out: list[Problem] = field(default_factory=list)

    def run(self, force: bool, sha256: str | None) -> dict[str, Any]:
        where = str(self.source)
        try:
            file = open_regular(self.source)
        except (OSError, ValueError) as error:
            what = (getattr(error, "strerror", None) or "cannot be read").lower()
            raise InputError(what, "a table", "check the path", where=where) from error
        with file:
            check_free(self.out, force)
            size, digest = 0, hashlib.sha256()
            total = self.source.stat().st_size
            while piece := file.read(min(_PIECE_BYTES, total - size)):  # a file that grows meanwhile need not end
                digest.update(piece)
                self.on_progress("checksum", size := size + len(piece), total)
            found = digest.hexdigest()
            if sha256 is not None and found != sha256.lower():
                raise CorruptFileError(
                    f"{where}: SHA-256 is {found}, expected {sha256.lower()}: another file, or a damaged one: get it "
                    "again, or correct --sha256"
                )
            if not size:
                raise InputError("is empty", "a table with a first row of names", where=where)
            file.seek(0)
            table = TableFile(file, self.source)
            words = None
            if self.options.text_encoder is not None:
                words = Words(self.options.text_encoder, self.options.max_tokens)
            key = {
                "hcmen": hcmen.__version__,
                "table": found,
                "folder": str(self.source.resolve().parent),
                "tokenizer": words and words.digest,
                "max_tokens": words and words.most,
                "label_range": self.options.label_range,
            }
            origin = {"file": self.source.name, "bytes": size, "sha256": found}
            with work_folder(self.out, key) as folder:
                with refused(folder, "a place for what is done of the conversion", "choose another OUT_DIR"):
                    rows = read_rows(table, folder, self.options.label_range)
                return self._converted(rows, words, folder, origin)

    def _converted(self, rows: Rows, words: Words | None, folder: Path, origin: dict[str, Any]) -> dict[str, Any]:
        where, options = str(self.source), self.options
        # Those that may be meant for others come first.
        told = sorted(rows.unknown.items(), key=lambda one: not one[1])[:_MOST_COLUMNS_TOLD]
        for name, hint in told:
            self.notes.append(f"column '{name[:100]}' is ignored" + (f": {hint}" if hint else ""))
        if len(rows.unknown) > _MOST_COLUMNS_TOLD:
            self.notes.append(f"and {len(rows.unknown) - _MOST_COLUMNS_TOLD} more columns are ignored")
        text, clip = (any(getattr(row, name) is not None for row in rows.good) for name in ("text", "clip"))
        self._check_options(rows, words, text, clip)
        chunks, base = Chunks(folder, self.source.parent, rows.good, words), self.source.parent
        done_rows = 0

        def on_rows(count: int) -> None:
            nonlocal done_rows
            done_rows += count
            self.on_progress("reading", done_rows, len(rows.good))

        chunks.work(options.jobs, on_rows)
        if chunks.resumed:
            self.notes.append(f"goes on where it was stopped: {chunks.resumed} of {len(rows.good)} rows were done")
        count = len(rows.good) + len(rows.problems)
        done = self._gathered(rows, chunks, text or clip)
        if rows.problems and not options.skip_bad:
            raise BadRows(rows.problems, count, where)
        if not done.rows:
            raise BadRows(rows.problems, count, where) if rows.problems else InputError("has no rows", where=where)
        parts = divided(done.rows, options.seed, where)
        labels = np.array([row.label for row in done.rows], np.float32)
        if labels.min() == labels.max():
            what = f"every label is {labels[0]:g}"
            raise InputError(what, "at least two different ones", "nothing can be learnt from one", where=where)
        ends = options.label_range or label_scale(float(labels.min()), float(labels.max()))
        splits = self._splits(done, parts.places, rows, chunks, folder, text, base)
        self._tell(done, parts.how, parts.places, ends, labels, words)
        about: dict[str, Any] = {**origin, "rows": count, "split": parts.how, "left_out": len(rows.problems)}
        self.left_out = rows.problems
        if rows.problems:
            about["left_out_rows"] = [
                {"row": p.row, "id": p.id, "reason": p.reason} for p in rows.problems[:_MOST_KEPT]
            ]
        if text:
            about["texts_cut"] = done.cut
        if rows.vectors:
            about["context"] = options.context
        total = sum(4 * raw.size for split in splits.values() for raw in split.raw.values())
        bytes_done = 0

        def written(size: int) -> None:
            nonlocal bytes_done
            bytes_done += size
            self.on_progress("converting", bytes_done, total)

        front_ends: dict[str, FrontEnd] = {"text": words.front_end} if text and words is not None else {}
        return write_folder(
            self.out,
            splits,
            about,
            on_bytes=written,
            label_range=(float(ends[0]), float(ends[1])),
            front_ends=front_ends,
        )

    def _check_options(self, rows: Rows, words: Words | None, text: bool, clip: bool) -> None:
        if not rows.good:
            return  # the bad rows are told by themselves
        where = str(self.source)
        if not (text or clip or rows.vectors):
            fix = "give words in 'text', clips in 'clip', or features in columns such as audio.0"
            raise InputError("has no column to learn from", fix=fix, where=where)
        if text and words is None:
            fix = "give the folder of a BERT with --text-encoder FOLDER, whose tokenizer makes tokens of them"
            raise InputError("holds words in column 'text'", "a tokenizer for them", fix, where=where)
        if words is not None and not text:
            self.notes.append("--text-encoder is not needed: no row has words in column 'text'")
        if self.options.context and not rows.vectors:
            fix = "leave it out, or give features in columns such as audio.0"
            raise InputError("--context is for feature columns, and there are none", fix=fix, where=where)

    def _gathered(self, rows: Rows, chunks: Chunks, worked: bool) -> _Done:
        """What the chunks hold, whose bad rows become problems."""
        used, shapes, lengths, cut = [], [], [], 0
        first: tuple[Row, Shapes] | None = None
        for row, entry in zip(rows.good, chunks.entries(), strict=True) if worked else ((r, {}) for r in rows.good):
            problem = None
            if "problem" in entry:
                problem = Problem(row.number, entry["problem"], row.id, bool(entry.get("corrupt")))
            found = {m: (shape[0], shape[1]) for m, shape in entry.get("shapes", {}).items()}
            if problem is None and row.clip is not None:
                first = first or (row, found)
                reason = _misfit(found, rows, *first)
                problem = Problem(row.number, f"{row.clip}: {reason}", row.id) if reason else None
            used.append(problem is None)
            if problem is not None:
                rows.problems.append(problem)
                continue
            shapes.append(found)
            lengths.append(len(entry.get("ids", ())))
            cut += bool(entry.get("cut"))
        rows.problems.sort(key=lambda p: p.row)
        kept = [row for row, good in zip(rows.good, used, strict=True) if good]
        return _Done(kept, used, shapes, np.array(lengths, np.int64), cut)

    def _splits(
        self,
        done: _Done,
        places: dict[str, list[int]],
        rows: Rows,
        chunks: Chunks,
        folder: Path,
        text: bool,
        base: Path,
    ) -> dict[str, RawSplit]:
        split_of: list[str | None] = [None] * len(done.rows)
        for split, found in places.items():
            for place in found:
                split_of[place] = split
        windows = neighbours(done.rows, self.options.context) if rows.vectors else []
        widths = {m: shape[1] for m, shape in (done.shapes[0] if done.shapes else {}).items()}
        lengths = {m: np.array([shape[m][0] for shape in done.shapes], np.int64) for m in widths}
        for m, vectors in rows.vectors.items():
            widths[m], lengths[m] = vectors.shape[1], np.array([len(window) for window in windows], np.int64)
        steps = {m: int(found.max()) for m, found in lengths.items()}
        tokens: dict[str, Any] = {}
        if text:
            most = int(done.tokens.max())
            if "text" in steps:  # a text encoder takes the tokens in the place of the features, step by step
                most = steps["text"] = max(most, steps["text"])
            all_splits = iter(split_of)
            each = [next(all_splits) if good else None for good in done.used]
            tokens = tokens_by_split(chunks.entries(), each, most, folder)
        made: dict[str, RawSplit] = {}
        for split in SPLITS:
            chosen = places[split]
            sources: dict[str, Source] = {}
            for m in widths:
                if m in rows.vectors:
                    at = [[done.rows[k].place for k in windows[place]] for place in chosen]
                    sources[m] = Windows(rows.vectors[m], at)
                else:
                    paths = [base / str(done.rows[place].clip) for place in chosen]
                    sources[m] = FromClips(m, paths, lengths[m][chosen], widths[m])
            made[split] = TableSplit(
                np.array([done.rows[place].label for place in chosen], np.float32),
                [done.rows[place].id for place in chosen],
                {m: shaped(len(chosen), steps[m], widths[m]) for m in MODALITIES if m in widths},
                {m: lengths[m][chosen] for m in widths},
                tokens.get(split),
                f"{self.source}: {split}",
                sources=sources,
            )
        return made

    def _tell(
        self,
        done: _Done,
        how: dict[str, Any],
        places: dict[str, list[int]],
        ends: tuple[float, float],
        labels: np.ndarray[Any, Any],
        words: Words | None,
    ) -> None:
        """Notes on what was chosen."""
        if not how["given"]:
            kinds = {"row": "each row by itself", "video": "videos held together", "group": "groups held together"}
            counts = ", ".join(f"{len(found)} {split}" for split, found in places.items())
            self.notes.append(f"splits are made, 70/10/20 with seed {how['seed']}: {counts}, {kinds[how['by']]}")
        if self.options.label_range is None:
            self.notes.append(
                f"labels are {labels.min():g} to {labels.max():g}, taken to be on a scale from {ends[0]:g} to "
                f"{ends[1]:g}: say it with --label-range if it is another"
            )
        if words is not None and done.cut:
            told = f"{done.cut} of {len(done.rows)} texts are cut at {words.most} tokens: see --max-tokens"
            self.notes.append(told)
        if self.options.context and how["by"] == "row":
            self.notes.append("--context does nothing: every row is a group of its own, give a column 'group'")


def _misfit(found: Shapes, rows: Rows, first: Row, of_first: Shapes) -> str | None:
    """Why a clip does not go with the first one, or with the columns."""
    both = next((m for m in found if m in rows.vectors), None)
    if both is not None:
        return f"holds {both}, which the columns {both}.0 and so on hold too"
    if set(found) != set(of_first):
        return f"holds {', '.join(found)}, expected {', '.join(of_first)} as in row {first.number}"
    for m, (_, features) in found.items():
        if features != of_first[m][1]:
            return f"{m} has {features} features, expected {of_first[m][1]} as in row {first.number}"
    return None


def convert_table(
    source: Path,
    out: Path,
    options: TableOptions,
    *,
    force: bool = False,
    sha256: str | None = None,
    on_progress: Shown = lambda label, done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> tuple[dict[str, Any], list[Problem]]:
    """Converts the table `source` to the folder `out`.

    Args:
        source: the table; clips are looked for from its folder. out: as of `convert`.
        options: how. force: replace a data set that is there. sha256: the digest that the table must have.
        on_progress: called with what is being done, how much is done and how much there is. on_note: is told what was
            chosen and left aside.

    Returns:
        What dataset.json says, and the rows that were left out.

    Raises:
        BadRows: some rows cannot be used, and `options` does not leave them out; nothing is written.
        InputError, CorruptFileError, BackendError: the table as a whole, or the tokenizer, cannot be used.
    """
    if not 0 <= options.context <= _MOST_CONTEXT:
        raise InputError(f"--context is {options.context}, expected 0 to {_MOST_CONTEXT}")
    conversion = _Conversion(source, out, options, on_progress)
    try:
        return conversion.run(force, sha256), conversion.left_out
    finally:
        for note in conversion.notes:
            on_note(note)
