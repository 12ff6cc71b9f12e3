"""`hcmen-run`: scores clips with an exported bundle, and checks the bundle against the eager model."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Command, Console, VariantChoice, command, one_line
from hcmen.base.errors import CheckFailed, HcmenError, InputError
from hcmen.base.modalities import MODALITIES, variant_for, variant_named
from hcmen.base.tables import aligned, fitted, folded, screen_width
from hcmen.base.typed import as_typed, from_here
from hcmen.media.text_lines import TextLines
from hcmen.runtime.commands.model import MODEL_OPTIONS, model_options, opened_model

if TYPE_CHECKING:
    import numpy as np

    from hcmen.base.bundle import Bundle
    from hcmen.base.clip import Clip
    from hcmen.base.inputs import Inputs
    from hcmen.runtime.compare import Comparison
    from hcmen.runtime.golden import SelfTest
    from hcmen.runtime.predictor import ClipLike, Predictor, Result

__all__ = ["main"]

_EPILOG = (
    "A clip is an .npz file with float arrays text, audio, vision, each [time, features], whichever are there. "
    "A clip that cannot be used gets an error line and the others are still scored; the exit code then tells of it. "
    "A score is shown on the scale of the bundle's labels: -2.58 of -3 (negative) to 3 (positive). A weight of - "
    "belongs to a modality that the variant does without; in JSON it has the weight of its learned stand-in. "
    "The first call of a graph is marked as such: later ones are faster. "
    "Exit codes: 0 ok, 1 a check failed, 2 bad input, 3 a backend is missing, 5 a corrupt or unsafe file."
)


_TOLD = 3
"""Texts that were cut and are told one by one; of others there is a count."""


class _Run(Command):
    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, *more: Any, **extra: Any) -> Any:
        """As ever; with `--follow FOLDER`, which was an option of this command, it is hcmen-follow."""
        words = list(sys.argv[1:] if args is None else args)
        options = words[: words.index("--")] if "--" in words else words
        place = next((i for i, word in enumerate(options) if re.match("--follow(=|$)", word)), None)
        if place is None:
            return super().main(words, prog_name, *more, **extra)
        from hcmen.runtime.commands.follow import main as follow

        Console().warn(
            f"hcmen-run --follow FOLDER goes away in the next version: use {as_typed('hcmen-follow')} FOLDER"
        )
        words[place : place + 1] = words[place].split("=", 1)[1:]
        return follow.main(words, "hcmen-follow", *more, **extra)


@command(
    "hcmen-run",
    epilog=_EPILOG,
    kind=_Run,
    examples=(
        "hcmen-run samples/clip.npz",
        "hcmen-run clips --variant text_only --format json",
        "hcmen-run --self-test",
        "hcmen-run --text 'what a film' --text 'never again' --bundle BUNDLE-WITH-TEXT-ENCODER",
        "hcmen-run --text-file reviews.txt --format json --bundle BUNDLE-WITH-TEXT-ENCODER",
    ),
    groups={
        "What is scored": ("words", "text_files", "variant", "clean"),
        "Model": MODEL_OPTIONS,
        "Checks": ("self_test", "check", "checkpoint"),
    },
)
@click.argument("clips", nargs=-1, metavar="[CLIP.npz | FOLDER]...")
@click.option(
    "--text",
    "words",
    metavar="WORDS",
    multiple=True,
    help="What is said, in raw words, for a bundle with a text encoder; alone, or with the audio and vision of a clip. "
    "Repeatable without clips: each is scored.",
)
@click.option(
    "--text-file",
    "text_files",
    metavar="FILE",
    multiple=True,
    help="Texts to score in UTF-8, one a line, for a bundle with a text encoder; - is stdin. Repeatable.",
)
@click.option(
    "--variant",
    type=VariantChoice("auto"),
    default="auto",
    show_default=True,
    help="Which graph: auto takes the one for exactly what each clip carries, or else the best that the bundle has. "
    "With --self-test: which one to test.",
)
@model_options
@click.option("--check", is_flag=True, help="Compare every score with the eager PyTorch model (needs torch).")
@click.option(
    "--checkpoint", help="The eager model for --check.  [default: the bundle's own, in build/train or of the demo]"
)
@click.option(
    "--self-test", is_flag=True, help="Run the bundle's golden inputs and compare; needs neither clips nor torch."
)
def main(
    console: Console,
    clips: tuple[str, ...],
    words: tuple[str, ...],
    text_files: tuple[str, ...],
    variant: str,
    check: bool,
    checkpoint: str | None,
    self_test: bool,
    **options: Any,
) -> None:
    """Scores clips with an exported bundle. A folder stands for the .npz files directly in it, sorted by name."""
    if text_files and (clips or words):
        raise click.UsageError(
            f"--text-file goes without {'clips' if clips else '--text'}: score those in another call"
        )
    if not (clips or words or text_files or self_test):
        raise InputError(
            "no clip given, expected .npz files or folders: name some, or test the bundle with --self-test"
        )
    if check and not (clips or words or text_files):
        raise InputError("--check compares scores and no clip was given: name some, or use --self-test")
    paths, errors = _expand(clips)
    model = opened_model(console, **options)
    checker = _EagerCheck(model.bundle, _checkpoint_of(console, model.bundle, checkpoint)) if check else None

    tests: list[SelfTest] = []
    if self_test:
        chosen = model.variants if variant == "auto" else (variant,)
        with console.progress("self-test", len(chosen), "variants") as bar:
            for test in model.self_test(chosen):
                tests.append(test)
                bar.advance()
    texts = _Texts(model, words, text_files)
    items: Iterable[ClipLike] = texts if words or text_files else paths
    if words and paths:
        items = [_with_words(console, model, texts, paths)]
    names = texts.names if items is texts else paths
    results: list[tuple[int, Result]] = []
    unusable: list[tuple[int, str, HcmenError]] = []
    with console.progress("scoring", 0 if text_files else len(names) or len(words), texts.unit) as bar:
        observe = checker.observe if checker else None
        for i, outcome in enumerate(model.outcomes(items, variant=variant, observe=observe)):
            if isinstance(outcome, HcmenError):
                unusable.append((i, names[i], outcome))
            else:
                results.append((i, outcome))
            bar.advance()
    texts.tell(console)
    # A text that cannot be read stands before the one that was scored next.
    errors += [(name, error) for _, name, error in sorted([*texts.errors, *unusable], key=lambda e: e[0])]

    checks = checker.reports(model) if checker else {}
    eager = {i: checker.scores[i] for i, _ in results} if checker else {}
    _emit(console, model, results, eager, errors, tests, checks)
    _mention(console, model, variant, [result for _, result in results])
    _finish(console, errors, tests, checks)


def _expand(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, HcmenError]]]:
    """The clip files that the arguments stand for, and the arguments that stand for none."""
    from hcmen.base.bundle import looks_like_bundle

    paths: list[str] = []
    errors: list[tuple[str, HcmenError]] = []
    for argument in arguments:
        if not os.path.isdir(argument):
            paths.append(argument)
            continue
        try:
            found = sorted(
                e.path for e in os.scandir(argument) if e.name.endswith(".npz") and not os.path.isdir(e.path)
            )
        except OSError as error:
            reason = (error.strerror or "cannot be read").lower()
            errors.append((argument, InputError(f"{argument}: {reason}: check its owner and permissions")))
            continue
        if not found:
            what, fix = "no .npz file in this folder", "give clips, or their folder"
            if looks_like_bundle(Path(argument)):
                what, fix = "a bundle, expected clips", f"name it with --bundle {argument}"
            errors.append((argument, InputError(what, fix=fix, where=argument)))
        paths += found
    return paths, errors


class _Texts:
    """Raw words as clips of tokens, made as they are asked for: those of --text, then those of each --text-file.

    Attributes:
        words: those of --text. names: of the clips made so far.
        errors: (how many clips came before, name, why it is none) of the others.
        unit: what to call them.
    """

    def __init__(self, model: Predictor, words: Sequence[str], files: Sequence[str]):
        self.names: list[str] = []
        self.errors: list[tuple[int, str, HcmenError]] = []
        self.unit = "texts" if words or files else "clips"
        self.words, self._model = words, model
        self._files = [TextLines(path) for path in files]
        self._cut: list[tuple[str, int]] = []
        if words or files:
            model.encode("words")  # a bundle that takes none says so once

    def _named(self) -> Iterator[tuple[str, str | HcmenError]]:
        for i, text in enumerate(self.words):
            yield ("--text" if len(self.words) == 1 else f"--text {i + 1}"), text
        for lines in self._files:
            yield from lines

    def __iter__(self) -> Iterator[Clip]:
        from hcmen.base.clip import Clip

        for name, text in self._named():
            try:
                if isinstance(text, HcmenError):
                    raise text
                tokens, dropped = self._model.encode(text)
            except InputError as error:
                self.errors.append((len(self.names), name, error.but(where=name)))
                continue
            if dropped:
                self._cut.append((name, dropped))
            self.names.append(name)
            yield Clip(name, {}, text_tokens=tokens)

    def tell(self, console: Console) -> None:
        """Says what was cut and what was left out."""
        for name, dropped in self._cut[:_TOLD]:
            console.note(f"note: {name}: the text is {dropped} tokens too long for the model, its end was cut")
        more = len(self._cut) - _TOLD
        if more > 0:
            console.note(f"note: {more} more {'texts are' if more > 1 else 'text is'} too long, and cut")
        for lines in self._files:
            if lines.blank:
                which = "1 blank line was" if lines.blank == 1 else f"{lines.blank} blank lines were"
                console.note(f"note: {lines.name}: {which} skipped")


def _with_words(console: Console, model: Predictor, texts: _Texts, paths: Sequence[str]) -> Clip:
    """The clip at the one path, with the one text for its text."""
    from dataclasses import replace

    from hcmen.base.clip import read_clip

    if len(paths) > 1:
        raise InputError(f"--text and {len(paths)} clips were given, expected one clip at most: what is said in which?")
    if len(texts.words) > 1:
        raise InputError(
            f"{len(texts.words)} --text and a clip were given, expected one --text with a clip: "
            "score the others without it"
        )
    spoken = list(texts)
    for _, _, error in texts.errors:
        raise error
    clip = read_clip(paths[0], model.inputs, model.clean)
    if clip.text_tokens is not None:
        console.note(f"note: {paths[0]}: its own text is replaced by that of --text")
    ignored = tuple(key for key in clip.ignored if key != "text")
    return replace(clip, text_tokens=spoken[0].text_tokens, ignored=ignored)


def _checkpoint_of(console: Console, bundle: Bundle, named: str | None) -> Path:
    from hcmen.base.shipped import chosen_checkpoint

    return chosen_checkpoint(named, console.note, sha256=bundle.manifest.source.get("checkpoint_sha256"))


class _EagerCheck:
    """Compares every run of a graph with the eager model of a checkpoint, batch by batch."""

    def __init__(self, bundle: Bundle, checkpoint: Path):
        from importlib.util import find_spec

        from hcmen.base.bundle import CHECKPOINT_FILE
        from hcmen.base.errors import BackendError
        from hcmen.base.shipped import or_the_demo

        self.checkpoint = checkpoint
        if not self.checkpoint.is_dir():
            raise InputError(
                f"{checkpoint}: no such checkpoint folder, expected what hcmen-train wrote: "
                f"name it with --checkpoint, or use --self-test, which needs none{or_the_demo(checkpoint)}"
            )
        if find_spec("torch") is None:
            raise BackendError(
                "torch is not installed, and --check runs the eager model: pip install 'hcmen[train]', "
                "or use --self-test, which needs none"
            )
        weights = self.checkpoint / CHECKPOINT_FILE
        wanted = bundle.manifest.source.get("checkpoint_sha256")
        if weights.is_file() and wanted is not None and _sha256(weights) != wanted:
            raise InputError(
                f"{weights}: not the checkpoint that {bundle.path} was exported from: "
                "export it again, or name the right one with --checkpoint"
            )
        self.scores: dict[int, float] = {}
        """Place among the clips -> the eager model's score."""
        self._got: dict[str, dict[str, list[np.ndarray[Any, Any]]]] = {}
        self._expected: dict[str, dict[str, list[np.ndarray[Any, Any]]]] = {}

    def observe(self, variant: str, places: Sequence[int], inputs: dict[str, Any], outputs: dict[str, Any]) -> None:
        """Runs the eager model on what a graph just ran on."""
        # By name, since this is the one line of the runtime that reaches for the part with torch in it.
        parity = importlib.import_module("hcmen.export.parity")
        expected = parity.eager_outputs(self.checkpoint, variant, inputs)
        self.scores.update(zip(places, expected["score"].tolist(), strict=True))
        for store, values in ((self._got, outputs), (self._expected, expected)):
            for name, value in values.items():
                store.setdefault(variant, {}).setdefault(name, []).append(value)

    def reports(self, model: Predictor) -> dict[str, dict[str, Comparison]]:
        """variant -> output -> comparison, over all that was run, within the bound of what `model` runs."""
        import numpy as np

        from hcmen.runtime.compare import compare

        return {
            variant: {
                name: compare(
                    np.concatenate(got), np.concatenate(self._expected[variant][name]), *model.tolerance(variant)
                )
                for name, got in outputs.items()
            }
            for variant, outputs in self._got.items()
        }


def _sha256(path: Path) -> str:
    from hcmen.base.bundle import file_record

    return file_record(path, path.parent).sha256


def _emit(
    console: Console,
    model: Predictor,
    results: Sequence[tuple[int, Result]],
    eager: Mapping[int, float],
    errors: Sequence[tuple[str, HcmenError]],
    tests: Sequence[SelfTest],
    checks: Mapping[str, Mapping[str, Comparison]],
) -> None:
    data: dict[str, Any] = {
        "bundle": str(model.bundle.path),
        "backend": {"name": model.backend.name, "version": model.backend.version, "threads": model.backend.threads},
        "results": [_result_json(r, eager.get(i), model.inputs) for i, r in results],
        "errors": [{"clip": name, "error": one_line(e), "exit_code": e.exit_code} for name, e in errors],
    }
    blocks = []
    if results:
        blocks.append(_table(_result_rows(results, eager, model.inputs)))
    if checks:
        data["check"] = {
            v: {
                "passed": all(c.passed for c in outputs.values()),
                "outputs": {n: c.to_json() for n, c in outputs.items()},
            }
            for v, outputs in checks.items()
        }
        blocks.append("\n".join(_report_lines("check against the eager model", checks, console.verbosity)))
    if tests:
        data["self_test"] = {t.variant: t.to_json() for t in tests}
        blocks.append("\n".join(_report_lines("self-test", {t.variant: t.outputs for t in tests}, console.verbosity)))
    if blocks or console.format == "json":
        console.emit(data, "\n\n".join(blocks))


def _result_json(result: Result, eager_score: float | None, inputs: Inputs) -> dict[str, Any]:
    return {
        "clip": result.name,
        "variant": result.variant,
        "score": result.score,
        "label_min": inputs.label_min,
        "label_max": inputs.label_max,
        "label": inputs.label(result.score),
        **({} if eager_score is None else {"eager_score": eager_score}),
        "modality_weights": dict(result.modality_weights),
        "backend": result.backend,
        "kernels": result.kernels,
        "ignored": list(result.ignored),
        "cleaned": dict(result.cleaned),
        "latency_ms": round(result.run_seconds * 1e3, 4),
        "first_call": result.first_call,
        "batch_size": result.batch_size,
    }


def _result_rows(
    results: Sequence[tuple[int, Result]], eager: Mapping[int, float], inputs: Inputs
) -> Iterator[tuple[str, ...]]:
    yield ("clip", "variant", "score", *(["eager"] if eager else []), *(f"{m:>6}" for m in MODALITIES), "time")
    for i, r in results:
        # What a variant does without has a learned stand-in, whose weight says nothing of the clip.
        present = variant_named(r.variant).present
        weights = (f"{r.modality_weights[m]:6.0%}" if m in present else f"{'-':>6}" for m in MODALITIES)
        batch = f", batch of {r.batch_size}" if r.batch_size > 1 else ""
        first = ", first call" if r.first_call else ""
        score = f"{r.score:+.4f}" if eager else f"{r.score:+.2f}"
        scores = [f"{score} of {one_line(inputs.scale)}", *([f"{eager[i]:+.4f}"] if eager else [])]
        yield (one_line(r.name), r.variant, *scores, *weights, f"{r.run_seconds * 1e3:.1f} ms{first}{batch}")


def _table(rows: Iterator[tuple[str, ...]]) -> str:
    header, *lines = rows
    width = screen_width()
    # One scale for all: where the table is too wide with it in every line, it moves above the table.
    above = []
    if width is not None and max(map(len, aligned([header, *lines], figures=False))) > width:
        scale = lines[0][2].partition(" of ")[2]
        above = folded(f"scores are of {scale}", width)
        lines = [(*line[:2], line[2].partition(" of ")[0], *line[3:]) for line in lines]
    table = fitted([header, *lines], width, len(header) - len(MODALITIES) - 1, least=("time",), figures=False)
    return "\n".join([*above, *table])


def _report_lines(title: str, reports: Mapping[str, Mapping[str, Comparison]], verbosity: int) -> list[str]:
    """A line a variant, of its worst output; with -v a line an output, with all that was measured."""
    passed = sum(all(c.passed for c in outputs.values()) for outputs in reports.values())
    lines = [f"{title}: {passed} of {len(reports)} variants passed"]
    for variant, outputs in reports.items():
        if verbosity > 0:
            lines += [f"  {variant:<15} {name:<17} {comparison.line()}" for name, comparison in outputs.items()]
            continue
        name, worst = max(outputs.items(), key=lambda o: (not o[1].passed, o[1].max_abs or 0.0))
        lines.append(f"  {variant:<15} {worst.verdict()}" + ("" if worst.passed else f", {name}"))
    return [part for line in lines for part in folded(line, screen_width(), "    ")]


def _mention(console: Console, model: Predictor, asked: str, results: Sequence[Result]) -> None:
    """Tells what was left out, and what was mended, once per kind. asked: the variant that was asked for."""
    ignored: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for r in results:
        if r.ignored:
            ignored.setdefault((r.ignored, r.variant), []).append(r.name)
    for (keys, variant), names in ignored.items():
        more = f" and {len(names) - 1} more clips" if len(names) > 1 else ""
        lost = [m for m in keys if m in model.inputs.modalities]
        wanted = variant_for((*variant_named(variant).present, *lost)).name
        if asked == "auto" and wanted not in model.variants:
            added = as_typed("hcmen-export", "--variant", wanted, "--bundle", from_here(model.bundle.path))
            console.warn(
                f"{names[0]}{more}: scored without {' and '.join(lost)}, by '{variant}': '{wanted}' is not in the "
                f"bundle: add it with {added}"
            )
            keys = tuple(key for key in keys if key not in lost)
        if not keys:
            continue
        console.note(f"note: {names[0]}{more}: variant '{variant}' ignores {' and '.join(keys)}, which the clip has")
    cleaned = [(r.name, sum(r.cleaned.values())) for r in results if r.cleaned]
    if cleaned:
        more = f" and {len(cleaned) - 1} more clips" if len(cleaned) > 1 else ""
        total = sum(count for _, count in cleaned)
        console.note(f"note: {cleaned[0][0]}{more}: {total} NaN or infinite values were set to zero")


def _finish(
    console: Console,
    errors: Sequence[tuple[str, HcmenError]],
    tests: Sequence[SelfTest],
    checks: Mapping[str, Mapping[str, Comparison]],
) -> None:
    """One line per thing that went wrong; the exit code is that of the gravest (5, then 3, 2, 1)."""
    problems: list[HcmenError] = [error for _, error in errors]
    for what, reports in (("self-test", {t.variant: t.outputs for t in tests}), ("check", checks)):
        failed = [v for v, outputs in reports.items() if not all(c.passed for c in outputs.values())]
        if failed:
            name, worst = next((n, c) for n, c in reports[failed[0]].items() if not c.passed)
            problems.append(
                CheckFailed(f"{what} failed for {', '.join(failed)}: {name} of '{failed[0]}' {worst.line()}")
            )
    if not problems:
        return
    for problem in problems:
        console.error(problem)
    raise click.exceptions.Exit(max(p.exit_code for p in problems))
