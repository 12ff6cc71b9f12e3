"""The command hcmen-eval: the robustness tables of a checkpoint, of several seeds, or of an exported bundle.

A bundle is judged by its own graphs in the runtime, without PyTorch: a sample goes to the graph of exactly the
modalities it is left with, so that the numbers are the device's.
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console, command
from hcmen.base.errors import InputError
from hcmen.base.files import check_writable, refused, sweep, write_files
from hcmen.base.shipped import chosen_checkpoint
from hcmen.base.tables import folded, screen_width
from hcmen.base.typed import as_typed

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from hcmen.base.inputs import Inputs
    from hcmen.data import MultimodalDataset, Split
    from hcmen.data.protocols import Masks, Protocol

    Scorer = Callable[[Masks, Callable[[int], None]], npt.NDArray[np.float64]]

__all__ = ["evaluate", "main", "write_together"]

TABLES = ("results.json", "results.csv", "results.md", "results.tex")
_PICTURES = ("missing_rate.png", "fixed_sets.png")
_NAMES = ("intra", "fixed", "random_mr", "imbalanced")


@command(
    "hcmen-eval",
    examples=(
        "hcmen-eval --protocol fixed",
        "hcmen-eval --bundle build/bundle --checkpoint build/train --no-pictures",
        "hcmen-eval --checkpoint build/seed1 --checkpoint build/seed2 --out build/eval",
    ),
    groups={
        "What is judged": ("checkpoints", "bundle", "data", "split"),
        "How": ("protocols", "seed", "batch_size", "device", "threads"),
        "Files": ("out", "latex", "no_pictures"),
    },
)
@click.option(
    "--checkpoint",
    "checkpoints",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A folder that hcmen-train wrote; several, or one of --seeds, give mean and deviation.  [default: build/train "
    "if it is there, else the demo's]",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="Judge this bundle by its own graphs. --checkpoint then only tells what data it was trained on.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="MMSA data file (.pkl); what the checkpoint was trained on if not given.",
)
@click.option("--split", type=Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option(
    "--protocol", "protocols", type=Choice(list(_NAMES)), multiple=True, help="Repeatable.  [default: all four]"
)
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True, help="Seed of what is hidden.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, show_default=True, help="Samples per batch.")
@click.option("--device", type=Choice(["auto", "cpu", "cuda"]), help="Where checkpoints are run.  [default: auto]")
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads.  [default: one per core]")
@click.option("--time-limit", type=float, metavar="SECONDS", help="With --bundle: of each load and run of a graph.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/eval"),
    show_default=True,
    help="Folder for the tables and pictures.",
)
@click.option("--latex", is_flag=True, help="Write results.tex, too: tables for a paper, with booktabs.")
@click.option("--no-pictures", is_flag=True, help="Draw nothing; matplotlib is then not needed.")
def main(
    console: Console,
    checkpoints: tuple[Path, ...],
    bundle: Path | None,
    data: Path | None,
    split: str,
    protocols: tuple[str, ...],
    seed: int,
    batch_size: int,
    device: str | None,
    threads: int | None,
    time_limit: float | None,
    out: Path,
    latex: bool,
    no_pictures: bool,
) -> None:
    """Judge a checkpoint or a bundle under the missing-modality protocols: all measures, the floor beside each.

    intra drops steps at rates 0.0 to 0.9, fixed leaves out whole modalities, random_mr draws them per sample,
    imbalanced does either at a rate per modality. Writes results.json, results.csv, results.md, missing_rate.png and
    fixed_sets.png to --out, replacing those of an earlier evaluation.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not no_pictures:
        import matplotlib  # noqa: F401  found missing before the work rather than after it
    with refused(out, "a folder that can be written", "choose another --out"):
        check_writable(out)
    report = evaluate(
        _each_run(checkpoints, console) or ([] if bundle else [chosen_checkpoint(None, console.note)]),
        bundle,
        data=data,
        split=split,
        protocols=list(dict.fromkeys(protocols)) or list(_NAMES),
        seed=seed,
        batch_size=batch_size,
        device=device,
        threads=threads,
        time_limit=time_limit,
        console=console,
    )
    from hcmen.base import metrics
    from hcmen.evaluation.latex import latex as latex_tables
    from hcmen.evaluation.robustness import csv_text, markdown, text

    pictures = {}
    if not no_pictures:
        from hcmen.evaluation.plots import PICTURES, draw

        pictures = draw(report)
        report["pictures"] = {name: PICTURES[name] for name in pictures}
    files = {
        "results.json": (
            json.dumps({"schema_version": 1, **metrics.plain(report)}, indent=2, allow_nan=False) + "\n"
        ).encode(),
        "results.csv": csv_text(report).encode(),
        "results.md": markdown(report).encode(),
        **({"results.tex": latex_tables(report).encode()} if latex else {}),
        **pictures,
    }
    write_together(out, files, (*TABLES, *_PICTURES))
    width = screen_width()
    written = "\n".join(folded(f"Written to {out}: {', '.join(files)}", width))
    console.emit(metrics.plain(report), f"{text(report, width)}\n\n{written}")


def evaluate(
    checkpoints: Sequence[Path],
    bundle: Path | None = None,
    *,
    data: Path | None = None,
    split: str = "test",
    protocols: Sequence[str] = _NAMES,
    seed: int = 0,
    batch_size: int = 64,
    device: str | None = None,
    threads: int | None = None,
    time_limit: float | None = None,
    console: Console | None = None,
) -> dict[str, Any]:
    """The report of `checkpoints`, or of `bundle` (a checkpoint then only tells of the data): see robustness.py.

    Raises:
        InputError: a checkpoint, bundle or data file is missing, is of another kind than the others, or does not fit;
            the bundle lacks a variant that a protocol needs.
        CorruptFileError: a file is damaged.
        BackendError: the bundle cannot be run here, or there is no such device.
        CheckFailed: a score is NaN or infinite.
    """
    from hcmen.base import metrics
    from hcmen.base.modalities import MODALITIES
    from hcmen.data.protocols import protocol_named
    from hcmen.data.published import published_for, real_name
    from hcmen.evaluation.machine import machine, versions
    from hcmen.evaluation.robustness import published_rows, run_scores, summarise

    console = console or Console(verbosity=-1)
    if bundle and device not in (None, "auto"):
        raise InputError(
            f"--device {device} is for checkpoints, a bundle runs where its runtime does: leave --device out"
        )
    judged = (
        [_bundle(bundle, checkpoints, data, split, threads, time_limit, batch_size, console)]
        if bundle
        else _checkpoints(checkpoints, data, split, device, threads, batch_size, console)
    )
    dataset, modalities = judged[0].dataset, judged[0].split.modalities
    chosen, left_out = [], {}
    for protocol in (protocol_named(name, modalities) for name in protocols):
        if protocol.settings:
            chosen.append(protocol)
            continue
        left_out[protocol.name] = f"{protocol.about}: the data has {' and '.join(modalities)} alone"
        console.note(f"protocol '{protocol.name}' is left out, {left_out[protocol.name]}")
    if not chosen:
        told = "; ".join(f"{name} is for {why}" for name, why in left_out.items())
        raise InputError(f"no protocol is left ({told})", fix="choose --protocol intra or fixed")
    family = metrics.family_for(dataset.label_min, dataset.label_max)
    total = sum(len(p.settings) for p in chosen) * sum(len(run.split) for run in judged)
    runs = []
    with console.progress("scoring", total, "samples") as bar:
        for run in judged:
            masks = {p.name: p.apply(run.split, seed) for p in chosen}
            run.check(chosen, masks)
            runs.append(
                run_scores(
                    lambda mask, run=run: run.score(mask, bar.advance),
                    masks,
                    run.split.labels,
                    run.dataset.splits["train"].labels,
                    family,
                    run.about["path"],
                )
            )
    scale = (dataset.label_min, dataset.label_max)
    real = real_name(dataset.name, len(judged[0].split), *scale) if split == "test" else None
    # Of a set without all of its modalities nothing but the same fixed sets has been published.
    comparable = protocols if len(modalities) == len(MODALITIES) else [name for name in protocols if name == "fixed"]
    known = [row for row in published_for(real) if row.protocol in comparable] if real else []
    return {
        "source": {"kind": "bundle" if bundle else "checkpoint", "runs": [run.finished() for run in judged]},
        "dataset": {
            "name": dataset.name,
            "label_min": dataset.label_min,
            "label_max": dataset.label_max,
            "family": family.name,
            "modalities": list(modalities),
            "samples": len(judged[0].split),
            "own_synthetic_sets": len({id(run.dataset) for run in judged}) > 1,
        },
        "split": split,
        "seed": seed,
        "batch_size": batch_size,
        **summarise(runs, chosen),
        "left_out": left_out,
        "published": published_rows(known),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }


@dataclass(frozen=True)
class _Judged:
    """One run to judge: where its scores come from, on which data.

    about: goes into the report; details: what is known only after the scoring. variants: those it can score.
    """

    about: dict[str, Any]
    dataset: MultimodalDataset
    split: Split
    score: Scorer
    variants: tuple[str, ...] | None = None
    details: Callable[[], dict[str, Any]] = dict

    def check(self, protocols: Sequence[Protocol], masks: Mapping[str, Mapping[str, Masks]]) -> None:
        """Raises InputError if a protocol leaves samples to a variant that this run lacks."""
        if self.variants is None:
            return
        for protocol in protocols:
            for mask in masks[protocol.name].values():
                for variant in mask.variants:
                    if variant.name not in self.variants:
                        raise InputError(
                            f"{self.about['path']}: has no variant '{variant.name}', which protocol '{protocol.name}' "
                            f"needs, only {', '.join(self.variants)}: export all variants, or choose another --protocol"
                        )

    def finished(self) -> dict[str, Any]:
        """What the report says of this run."""
        return {**self.about, **self.details()}


def _each_run(folders: Sequence[Path], console: Console) -> list[Path]:
    """`folders`, and in the place of one with the runs of several seeds the folders of these.

    Raises:
        InputError: none of its runs has come to its end.
    """
    from hcmen.training.outputs import SEVERAL, finished_runs
    from hcmen.training.settings import read_settings

    found: list[Path] = []
    for folder in folders:
        if not (folder / SEVERAL).is_file():
            found.append(folder)
            continue
        ended, others = finished_runs(folder, read_settings(folder / SEVERAL).seeds)
        for seed in others:
            console.warn(f"{folder}: seed {seed} did not come to its end and is left out")
        if not ended:
            raise InputError(f"{folder}: no run in it has come to its end: go on with hcmen-train --resume")
        found += ended
    return found


# --- what is judged -------------------------------------------------------------------------------------------------


def _checkpoints(
    folders: Sequence[Path],
    data: Path | None,
    split: str,
    device: str | None,
    threads: int | None,
    batch_size: int,
    console: Console,
) -> list[_Judged]:
    import torch

    from hcmen.training.checkpoint import load_checkpoint
    from hcmen.training.device import choose_device
    from hcmen.training.evaluate import predict_masked

    if not folders:
        raise InputError("no checkpoint and no bundle given: name one with --checkpoint or --bundle")
    if threads is not None:
        torch.set_num_threads(threads)
    place = choose_device(device or "auto")
    judged: list[_Judged] = []
    sets: dict[str, MultimodalDataset] = {}
    for folder in folders:
        model, config = load_checkpoint(folder)
        about = _about(folder, config)
        for before in judged:
            if before.about["sha256"] == about["sha256"]:
                raise InputError(
                    f"{folder}: holds the same weights as {before.about['path']}: give each checkpoint once, or the "
                    "deviation is too small"
                )
        dataset = _dataset(folder, config, model.config.inputs, data, sets, console)
        if judged and _kind(dataset) != _kind(judged[0].dataset):
            raise InputError(
                f"{folder}: was trained on {dataset.name}, {judged[0].about['path']} on {judged[0].dataset.name}: give "
                "checkpoints of the same data, or name the data with --data"
            )
        part = dataset.splits[split]
        model.to(place)

        def score(masks: Masks, on_batch: Callable[[int], None], model: Any = model, part: Split = part) -> Any:
            return predict_masked(model, part, masks, batch_size, on_batch)

        judged.append(_Judged(about, dataset, part, score))
    return judged


def _bundle(
    folder: Path,
    checkpoints: Sequence[Path],
    data: Path | None,
    split: str,
    threads: int | None,
    time_limit: float | None,
    batch_size: int,
    console: Console,
) -> _Judged:
    import numpy as np

    from hcmen.base.clip import graph_inputs
    from hcmen.data.mmsa import read_mmsa
    from hcmen.data.protocols import batches
    from hcmen.data.trained_on import mention_cleaned
    from hcmen.runtime import load

    if len(checkpoints) > 1:
        raise InputError(f"{len(checkpoints)} checkpoints given beside --bundle, expected at most the one it came from")
    model = load(folder, threads=threads, time_limit=time_limit)
    manifest = model.bundle.manifest
    if data is not None:
        dataset = read_mmsa(data, model.inputs)
        mention_cleaned(dataset, console.note)
    elif checkpoints:
        from hcmen.training.checkpoint import load_checkpoint

        _, config = load_checkpoint(checkpoints[0])
        made_from, here = manifest.source.get("checkpoint_sha256"), config["weights"]["sha256"]
        if made_from != here:
            raise InputError(
                f"{folder}: was exported from checkpoint {str(made_from)[:12]}..., {checkpoints[0]} is {here[:12]}...: "
                "name the checkpoint it came from, or the data with --data"
            )
        dataset = _dataset(checkpoints[0], config, model.inputs, None, {}, console)
    else:
        raise InputError(
            f"{folder}: a bundle does not say what it was trained on: name the data with --data, or the checkpoint "
            "that it came from with --checkpoint"
        )
    part = dataset.splits[split]
    used: dict[str, str] = {}

    def score(masks: Masks, on_batch: Callable[[int], None]) -> Any:
        scores = np.empty(len(part))
        for batch in batches(part, masks, batch_size):
            name = batch.variant.name
            if name not in used:
                used[name] = model.kernels(name)
                if used[name] == "functions":
                    console.warn(
                        f"variant '{name}' runs without the kernel library: slow; see {as_typed('hcmen-doctor')}"
                    )
                if manifest.variants[name].parity["passed"] is not True:
                    console.warn(f"{folder}: variant '{name}' failed its parity check at export")
            scores[batch.rows] = model.run(name, graph_inputs(batch.features, batch.lengths))["score"]
            on_batch(len(batch.rows))
        return scores

    about = {"path": str(folder), "sha256": manifest.weights.sha256, **manifest.source}
    backend = {"backend": model.backend.name, "backend_version": model.backend.version}
    return _Judged(about, dataset, part, score, model.variants, lambda: {**backend, "kernels": dict(used)})


def _about(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "path": str(folder),
        "sha256": config["weights"]["sha256"],
        "epoch": config.get("epoch"),
        "training_seed": config.get("train", {}).get("seed"),
    }


# --- the data -------------------------------------------------------------------------------------------------------


def _dataset(
    folder: Path,
    config: Mapping[str, Any],
    inputs: Inputs,
    data: Path | None,
    sets: dict[str, MultimodalDataset],
    console: Console,
) -> MultimodalDataset:
    """The file `data`, or what the checkpoint in `folder` was trained on; `sets` keeps what was read before."""
    from hcmen.data.trained_on import dataset_of, trained_on

    name, source = (str(data), None) if data else trained_on(folder, config)
    key = json.dumps([name, inputs.to_json(), source])
    if key not in sets:
        sets[key] = dataset_of(folder, config, inputs, data, console.note, "judging")
    return sets[key]


def _kind(dataset: MultimodalDataset) -> tuple[Any, ...]:
    """What the data of several runs must have in common."""
    splits = dataset.splits
    counts = [len(s) for s in splits.values()]
    return (dataset.name, dataset.label_min, dataset.label_max, splits["test"].modalities, *counts)


# --- files ----------------------------------------------------------------------------------------------------------


def write_together(folder: Path, files: Mapping[str, bytes], owned: Sequence[str] = ()) -> None:
    """Writes all of `files` into `folder`, or none of them.

    Then those of the names `owned` that are not among `files` are removed, so that the folder never mixes two
    evaluations.

    Raises:
        InputError: the place cannot be written; what was there is as it was.
    """
    with refused(folder, "a folder that can be written", "choose another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        write_files(folder, files)
        for name in owned:
            if name not in files:
                (folder / name).unlink(missing_ok=True)


if __name__ == "__main__":
    main()
