"""`hcmen-bench`: how fast a bundle is here, side by side with what one could run instead, and whether that changed.

docs/bench.md says how to read it and how noise is judged. The parts are in hcmen.runtime.benchmark.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console, VariantChoice, command
from hcmen.base.errors import CheckFailed, HcmenError, InputError
from hcmen.base.tables import screen_width
from hcmen.runtime.backends.options import BACKENDS, runs_engines
from hcmen.runtime.commands.model import time_limit_option, trust_engines_option

if TYPE_CHECKING:
    from hcmen.runtime.benchmark.foreign import ForeignPlan
    from hcmen.runtime.benchmark.judge import Verdict
    from hcmen.runtime.benchmark.plan import Plan

__all__ = ["main"]

AGAINST = ("eager", "eager-reference", "compile", "compile-reference", "functions")

_EPILOG = (
    "Every row is checked against the eager model's golden outputs before it is timed; of --onnx the library's outputs "
    "against the functions'. Rows take turns in random "
    "order, round by round. A percentile with fewer than 10 calls beyond it is marked '?'. docs/bench.md says how to "
    "read the rest. Exit codes: 0 ok, 1 a row has wrong numbers or --fail-slower found one, 2 bad input, 3 a backend "
    "is missing, 5 a corrupt file, 130 interrupted (what was measured is printed and written)."
)


@command(
    "hcmen-bench",
    epilog=_EPILOG,
    examples=(
        "hcmen-bench",
        "hcmen-bench --bundle build/bundle --bundle build/bundle-int8 --batch 1 --batch 8",
        "hcmen-bench --compare before.json --fail-slower 5",
        "hcmen-bench --onnx model.onnx --size time=256 --against functions",
    ),
    groups={
        "What is measured": (
            *("named", "variants", "backends", "precisions", "threads", "batches", "clip", "golden"),
            *("against", "checkpoint", "cold"),
        ),
        "A foreign graph": ("files", "sizes", "ranges", "tolerance"),
        "How": ("rounds", "calls", "warm_up", "loads", "seed", "cold_rounds"),
        "Reports": ("show", "compare", "fail_slower", "compare_anyway", "out", "html"),
    },
)
@click.argument("bundles", nargs=-1, metavar="")
@click.option(
    "--bundle",
    "named",
    multiple=True,
    help="A folder that hcmen-export wrote; repeatable: several are measured in turns.  [default: "
    "build/bundle if it is there, else the demo's]",
)
@click.option(
    "--variant",
    "variants",
    type=VariantChoice(),
    multiple=True,
    help="Which graph; repeatable. Default: all of the bundle.",
)
@click.option(
    "--backend", "backends", multiple=True, type=Choice(list(BACKENDS)), help="What runs it; repeatable. Default: ort."
)
@click.option(
    "--precision",
    "precisions",
    type=Choice(["fp32", "fp16"]),
    multiple=True,
    help="With tensorrt and tensorrt-rtx: which engines of hcmen-compile are taken; repeatable. Other backends have "
    "the bundle's.",
)
@trust_engines_option()
@click.option("--threads", multiple=True, type=int, help="Worker threads; repeatable. Default: the physical cores.")
@click.option("--batch", "batches", multiple=True, type=int, help="Clips at once; repeatable. Default: 1.")
@click.option("--clip", help="A clip file to run. Default: clips of the greatest length, random features.")
@click.option("--golden", is_flag=True, help="Run the bundle's golden inputs, ragged and in batches, instead of clips.")
@click.option(
    "--against",
    multiple=True,
    type=Choice(AGAINST),
    help="What a user would run instead; repeatable: eager PyTorch on our kernels or on the reference scan, "
    "torch.compile of either (compiles for minutes), or functions: plain ONNX Runtime without our library.",
)
@click.option(
    "--onnx",
    "files",
    multiple=True,
    metavar="FILE.onnx",
    help="A file such as hcmen-export-mamba writes, in the place of bundles; repeatable. Its inputs are random, its "
    "states zero. It takes --threads, --against functions, --time-limit and what stands under How and Reports.",
)
@click.option(
    "--size", "sizes", multiple=True, metavar="NAME=N", help="Of an open size of --onnx; repeatable. A batch is 1."
)
@click.option(
    "--range",
    "ranges",
    multiple=True,
    metavar="INPUT=A..B",
    help="Of the whole numbers that an input of --onnx is given. Default: the rows of the table it looks up, or 0..1.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(0, min_open=True),
    metavar="SHARE",
    help="How far apart the library's and the functions' outputs of --onnx may be, by the largest number of each. "
    "Default: 1e-5.",
)
@time_limit_option
@click.option(
    "--checkpoint", help="The eager model for --against.  [default: the bundle's own, in build/train or of the demo]"
)
@click.option("--rounds", default=30, show_default=True, type=click.IntRange(0, 100_000), help="Turns of each row.")
@click.option(
    "--calls", default=10, show_default=True, type=click.IntRange(1, 100_000), help="Timed calls of a turn, at most."
)
@click.option("--warmup", "warm_up", type=click.IntRange(0, 100_000), help="Calls to warm up. Default: until steady.")
@click.option(
    "--loads", default=3, show_default=True, type=click.IntRange(0, 1000), help="How often each session is loaded anew."
)
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0), help="Of the orders and the features.")
@click.option("--cold", is_flag=True, help="Also fresh processes: time to the first score, resident memory.")
@click.option(
    "--cold-rounds", default=7, show_default=True, type=click.IntRange(1, 10_000), help="Fresh processes of each kind."
)
@click.option("--show", metavar="FILE.json", help="Measure nothing: show, compare or draw what an earlier --out holds.")
@click.option("--compare", metavar="OLD.json", help="Compare with an earlier --out: which rows are faster or slower.")
@click.option(
    "--fail-slower", type=click.FloatRange(0), metavar="PERCENT", help="Exit code 1 if a row is slower by more."
)
@click.option("--compare-anyway", is_flag=True, help="Compare although the machine is another one.")
@click.option("--out", metavar="FILE.json", help="Where to keep everything, for --compare.")
@click.option("--html", metavar="FILE.html", help="Where to write the report with plots; it opens without a network.")
def main(
    console: Console,
    bundles: tuple[str, ...],
    named: tuple[str, ...],
    variants: tuple[str, ...],
    backends: tuple[str, ...],
    precisions: tuple[str, ...],
    trust_engines: bool,
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    clip: str | None,
    golden: bool,
    against: tuple[str, ...],
    files: tuple[str, ...],
    sizes: tuple[str, ...],
    ranges: tuple[str, ...],
    tolerance: float | None,
    time_limit: float | None,
    checkpoint: str | None,
    rounds: int,
    calls: int,
    warm_up: int | None,
    loads: int,
    seed: int,
    cold: bool,
    cold_rounds: int,
    show: str | None,
    compare: str | None,
    fail_slower: float | None,
    compare_anyway: bool,
    out: str | None,
    html: str | None,
) -> None:
    """Measures bundles: latency, throughput, loading, cold start, memory; side by side, with the noise."""
    bundles = (*named, *bundles)
    if files:
        _refuse(
            "is of bundles, and --onnx names a file of its own: leave it out",
            {"--bundle": bundles, "--variant": variants, "--backend": backends, "--precision": precisions}
            | {"--trust-engines": trust_engines, "--batch": batches, "--clip": clip, "--golden": golden}
            | {"--checkpoint": checkpoint, "--cold": cold, "--show": show}
            | {f"--against {a}": a != "functions" for a in against},
        )
    else:
        given = {"--size": sizes, "--range": ranges, "--tolerance": tolerance}
        _refuse("is of a foreign graph: name it with --onnx, or leave it out", given)
    _check_counts("threads", threads, 1024)
    _check_counts("batch", batches, 1 << 20)
    if golden and (clip is not None or batches):
        raise InputError("--golden brings its own clips and batches: leave out --clip and --batch")
    if fail_slower is not None and compare is None:
        raise InputError("--fail-slower needs an earlier run to be slower than: give --compare OLD.json")
    if rounds == 0 and not cold:
        raise InputError("--rounds 0 measures nothing without --cold: give rounds, or --cold")
    engines = any(map(runs_engines, backends))
    if trust_engines and not engines:
        raise InputError("--trust-engines is for engines of --backend tensorrt or tensorrt-rtx: leave it out")
    if precisions and not engines:
        raise InputError(
            "--precision chooses engines of --backend tensorrt or tensorrt-rtx; a bundle has one precision: "
            "name several bundles"
        )
    from hcmen.base.bundle import read_bundle
    from hcmen.base.shipped import chosen_bundle, chosen_checkpoint
    from hcmen.runtime.benchmark.machine import machine, machine_warnings
    from hcmen.runtime.benchmark.measure import Settings
    from hcmen.runtime.benchmark.plan import Plan, labels
    from hcmen.runtime.benchmark.report import describe_bundle, document_path, read_document

    if show is not None and (bundles or cold or against):
        raise InputError("--show measures nothing: leave out bundles, --cold and --against")
    targets = {kind: document_path(path) for kind, path in (("json", out), ("html", html)) if path is not None}
    old = None if compare is None else read_document(compare)
    if show is not None:
        data = read_document(show)
        doubts = _comparable(data["machine"], data["bundles"], old, str(compare), compare_anyway) if old else []
        for line in doubts:
            console.warn(line)
        verdicts, unmatched = _judged(data, old)
        _emit(console, data, verdicts, unmatched, targets, doubts)
        _finish(data, 0, verdicts, fail_slower)
        return
    settings = Settings(rounds, calls, warm_up, loads, seed)
    plan: Plan | ForeignPlan
    with ExitStack() as stack:
        if files:
            from hcmen.runtime.benchmark.foreign import ForeignPlan
            from hcmen.runtime.foreign import parse_ranges, parse_sizes

            numbers, spans = parse_sizes(sizes), parse_ranges(ranges)
            plan = ForeignPlan(files, numbers, spans, threads, against, settings, tolerance or 1e-5, time_limit)
            described = plan.described()
        else:
            paths = bundles or (os.fspath(chosen_bundle(None, console.note)),)
            opened = dict(zip(labels(paths), (read_bundle(os.path.abspath(path)) for path in paths), strict=True))
            eager = Path(checkpoint or "")
            if set(against) - {"functions"}:
                wanted = next(iter(opened.values())).manifest.source.get("checkpoint_sha256")
                eager = chosen_checkpoint(checkpoint, console.note, sha256=wanted)
            plan = Plan(
                bundles=opened,
                variants=variants,
                backends=backends or ("ort",),
                precisions=precisions,
                trust_engines=trust_engines,
                threads=threads,
                batches=(0,) if golden else batches or (1,),
                clip=clip,
                against=against,
                checkpoint=os.fspath(eager),
                settings=settings,
                cold_rounds=cold_rounds if cold else 0,
                folder=Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hcmen-bench-"))),
                time_limit=time_limit,
            )
            described = [describe_bundle(label, bundle) for label, bundle in opened.items()]
        here = machine(plan.packages)
        doubts = machine_warnings(here, plan.most_threads)
        if old is not None:
            doubts += _comparable(here, described, old, str(compare), compare_anyway)
        for line in doubts:
            console.warn(line)
        data, stop = _measured(console, plan, here, described, doubts)
    verdicts, unmatched = _judged(data, old)
    _emit(console, data, verdicts, unmatched, targets, doubts)
    if stop is not None:
        raise stop
    _finish(data, plan.exit_code, verdicts, fail_slower)


def _refuse(why: str, given: Mapping[str, object]) -> None:
    """Raises InputError for the first option that is given."""
    for option, value in given.items():
        if value not in ((), None, False):
            raise InputError(f"{option} {why}")


def _check_counts(what: str, values: Sequence[int], most: int) -> None:
    for value in values:
        if not 1 <= value <= most:
            raise InputError(f"--{what} is {value}, expected 1 to {most}")


def _comparable(
    here: Mapping[str, Any], described: Sequence[Mapping[str, Any]], old: Mapping[str, Any], name: str, anyway: bool
) -> list[str]:
    """What makes a comparison doubtful; raises InputError where it would mean nothing."""
    from hcmen.runtime.benchmark.judge import refusals

    other, besides = refusals(here, described, old)
    if other and not anyway:
        raise InputError(
            f"{name}: measured on another machine ({'; '.join(other)}): times do not compare; "
            "measure there again, or say --compare-anyway"
        )
    lines = [f"{name}: another machine: {'; '.join(other)}"] if other else []
    return lines + ([f"{name}: differs besides: {'; '.join(besides)}"] if besides else [])


def _measured(
    console: Console,
    plan: Plan | ForeignPlan,
    here: Mapping[str, Any],
    described: Sequence[Mapping[str, Any]],
    doubts: Sequence[str],
) -> tuple[dict[str, Any], BaseException | None]:
    """The document, and what ended the measuring early, if anything did: what was measured until then is kept."""
    from hcmen.runtime.benchmark.machine import CpuTime
    from hcmen.runtime.benchmark.report import document

    before, started = CpuTime.now(), time.monotonic()
    stop: BaseException | None = None
    try:
        with console.progress("measuring", plan.steps, "turns") as bar:

            def step(name: str) -> None:
                bar.label = name
                bar.advance()

            plan.run(step)
    except HcmenError:
        raise
    except BaseException as error:  # Ctrl-C and SIGTERM above all
        stop = error
    after = CpuTime.now()
    data = document(
        machine={**here, "versions": {**here["versions"], **plan.versions}},
        bundles=described,
        settings=plan.settings,
        measured=plan.measured,
        probe_ns=plan.probe_ns,
        memory_probe_ns=plan.memory_probe_ns,
        probe_threads=plan.most_threads,
        colds=plan.colds,
        warnings=doubts,
        shares=None if before is None or after is None else after.since(before),
        complete=stop is None,
        seconds=time.monotonic() - started,
    )
    return data, stop


def _judged(data: Mapping[str, Any], old: Mapping[str, Any] | None) -> tuple[list[Verdict], list[str]]:
    if old is None:
        return [], []
    from hcmen.runtime.benchmark.judge import compare_documents

    return compare_documents(data, old)


def _emit(
    console: Console,
    data: dict[str, Any],
    verdicts: Sequence[Verdict],
    unmatched: Sequence[str],
    targets: Mapping[str, Path],
    said: Sequence[str],
) -> None:
    """Tables or JSON on stdout, the files, and the warnings that came with measuring."""
    from hcmen.base.files import write_file
    from hcmen.runtime.benchmark.text import tables

    comparison = {"verdicts": [v.to_json() for v in verdicts], "unmatched": list(unmatched)}
    whole = {**data, "comparison": comparison} if verdicts or unmatched else data
    console.emit(whole, tables(data, verdicts, unmatched, screen_width()))
    for line in data["warnings"]:
        if line not in said:
            console.warn(line)
    if "json" in targets:
        write_file(targets["json"], (json.dumps(whole, allow_nan=False) + "\n").encode())
        console.note(f"written: {targets['json']}")
    if "html" in targets:
        from hcmen.runtime.benchmark.page import page

        write_file(targets["html"], page(data, verdicts, unmatched).encode(errors="backslashreplace"))
        console.note(f"written: {targets['html']}")


def _finish(data: Mapping[str, Any], exit_code: int, verdicts: Sequence[Verdict], fail_slower: float | None) -> None:
    """The exit code: of the gravest thing that went wrong with a row of a bundle, or of a slower one."""
    if exit_code:
        bad = [r["name"] for r in data["rows"] if r["status"] in ("wrong", "failed")]
        bad += [f"fresh process, {c['kind']}" for c in data["cold"] if c["status"] == "failed"]
        message = f"{len(bad)} of {len(data['rows']) + len(data['cold'])} rows could not be timed: {', '.join(bad)}"
        raise _with_code(message, exit_code)
    if fail_slower is not None:
        slower = [v for v in _slower(verdicts) if 100 * (v.ratio - 1) > fail_slower]
        if slower:
            worst = max(slower, key=lambda v: v.ratio)
            raise CheckFailed(
                f"{len(slower)} of {len(verdicts)} figures are slower by more than {fail_slower:g} %, most of all "
                f"{worst.name} ({worst.figure} {worst.ratio - 1:+.1%})"
            )


def _slower(verdicts: Sequence[Verdict]) -> Iterator[Verdict]:
    from hcmen.runtime.benchmark.judge import SLOWER

    return (v for v in verdicts if v.own and v.verdict == SLOWER)


def _with_code(message: str, exit_code: int) -> HcmenError:
    error = HcmenError(message)
    error.exit_code = exit_code
    return error
