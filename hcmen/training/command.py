"""The command hcmen-train, and `load_checkpoint` for whoever wants its result.

Heavy imports live inside functions, so that --help is quick; the loop itself is hcmen/training/trainer.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hcmen.base.console import Choice, Console, command
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.tables import screen_width
from hcmen.media.encoder_folder import encoder_folder
from hcmen.training.config import AUXILIARIES, MIXES, PRECISIONS, TrainConfig
from hcmen.training.loggers import LOGGERS, Loggers, named_loggers
from hcmen.training.outputs import CLIPS, CURVES, REPORT, SEVERAL, check_free, seed_folder
from hcmen.training.presets import PRESETS, Preset, preset_for, preset_named, sized
from hcmen.training.report import draw_curves, scores_text, test_scores, unheard
from hcmen.training.seeds import SeedList, failed_line, several_report, several_text
from hcmen.training.settings import Saved, given_settings, option, read_settings, resumed_seeds, resumed_settings

if TYPE_CHECKING:
    from hcmen.base.inputs import Inputs
    from hcmen.data import MultimodalDataset, Split
    from hcmen.data.layout import Fit, Sizes
    from hcmen.models.contract import Config
    from hcmen.models.text_encoder_config import TextEncoderConfig
    from hcmen.training.trainer import Trainer

__all__ = ["load_checkpoint", "main"]

SAVED_CLIPS = 20


def load_checkpoint(folder: str | os.PathLike[str]) -> tuple[Any, dict[str, Any]]:
    """The model that hcmen-train wrote to `folder`, in eval mode, and the contents of its config.json.

    Raises:
        InputError: there is no checkpoint, or its files cannot be read.
        CorruptFileError: a file is truncated or altered, or the two do not belong together.
    """
    from hcmen.training import checkpoint

    return checkpoint.load_checkpoint(folder)


@command(
    "hcmen-train",
    examples=(
        "hcmen-train --epochs 3",
        "hcmen-train --preset mosi --data mosi.pkl --mix ms-mix --out build/mosi-train",
        "hcmen-train --resume --out build/mosi-train",
        "hcmen-train --config build/mosi-train --seeds 1111,1112,1113 --out build/mosi-seeds",
    ),
    groups={
        "Data and model": ("data", "preset", "text_encoder", "config"),
        "Training": (
            *("epochs", "batch_size", "micro_batches", "learning_rate", "text_encoder_learning_rate"),
            *("mix", "aux", "seed", "seeds", "changes"),
        ),
        "Run": ("out", "resume", "force", "log", "device", "precision", "threads"),
    },
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="MMSA data file (.pkl), or its folder from hcmen-convert; the synthetic set if not given.",
)
@click.option(
    "--preset",
    type=Choice(list(PRESETS)),
    help="Architecture and training settings; the sizes are those of --data.  [default: what fits --data; else tiny]",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Passes over the training split; the preset's if not given.")
@click.option("--batch-size", type=click.IntRange(min=1), help="Samples per optimiser step, over all processes.")
@click.option("--micro-batches", type=click.IntRange(min=1), help="Pieces a batch is computed in.  [default: 1]")
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Peak learning rate.")
@click.option(
    "--text-encoder",
    type=click.Path(path_type=Path),
    help="Folder of a BERT (config.json, weights, vocabulary) to put into the model, or an installed package with one: "
    "minilm is that of hcmen[minilm]. The data's tokens are its input.",
)
@click.option(
    "--text-encoder-learning-rate",
    type=click.FloatRange(min=0),
    help="Peak learning rate of the text encoder; 0 freezes it.  [default: the preset's]",
)
@click.option("--mix", type=Choice(list(MIXES)), help="How training samples are mixed.  [default: none]")
@click.option("--aux", type=Choice(list(AUXILIARIES)), help="Auxiliary head, in training only.  [default: none]")
@click.option(
    "--seed",
    type=click.IntRange(0, 2**32 - 1),
    help="Seed of weights, order, dropout, corruption and of the synthetic set.",
)
@click.option(
    "--seeds",
    type=SeedList(),
    default=(),
    metavar="SEED,...",
    help="One run for each of these seeds, in seed-N below --out; mean and deviation at the end.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    help="Train with the settings that a training wrote: its folder, config.json or run.json. Other options win.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("build/train"),
    show_default=True,
    help="Folder for what is written.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out, to the same result as without the break.")
@click.option("--force", is_flag=True, help="Start over where --out holds a run already.")
@click.option("--log", type=Choice(list(LOGGERS)), multiple=True, help="Follow the run there as well. Repeatable.")
@click.option(
    "--set",
    "changes",
    metavar="NAME=VALUE",
    multiple=True,
    help="Any other training setting, a field of hcmen.training.config.TrainConfig. Repeatable.",
)
@click.option(
    "--device",
    type=Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="auto: a GPU if there is one.",
)
@click.option(
    "--precision",
    type=Choice(list(PRECISIONS)),
    help="What training computes matrix products in; the checkpoint is float32.  [default: fp32]",
)
@click.option("--threads", type=click.IntRange(1, 1024), help="CPU threads per process.  [default: one per core]")
def main(
    console: Console,
    data: Path | None,
    preset: str | None,
    epochs: int | None,
    batch_size: int | None,
    micro_batches: int | None,
    learning_rate: float | None,
    text_encoder: Path | None,
    text_encoder_learning_rate: float | None,
    mix: str | None,
    aux: str | None,
    seed: int | None,
    seeds: tuple[int, ...],
    config: Path | None,
    out: Path,
    resume: bool,
    force: bool,
    log: tuple[str, ...],
    changes: tuple[str, ...],
    device: str,
    precision: str | None,
    threads: int | None,
) -> None:
    """Train a model, and compare it with the majority floor and a linear model on the test split.

    Writes to --out: checkpoint.safetensors and config.json (the epoch with the lowest validation MAE, averaged over
    the missing-modality variants of the data), last.safetensors (for --resume), log.jsonl, curves.png, clips/
    (validation samples that hcmen-export checks parity on) and report.json, the scores on the test split, which is
    looked at once, at the end.

    With several GPUs or cores: torchrun --nproc-per-node 2 -m hcmen.training.command ... trains in two processes, to
    the result of one.
    """
    if resume and force:
        raise click.UsageError("--resume and --force exclude each other: go on, or start over")
    if resume and config is not None:
        raise click.UsageError("--resume goes on with the settings of the run in --out: leave --config out")
    given = given_settings(
        changes,
        epochs=epochs,
        batch_size=batch_size,
        micro_batches=micro_batches,
        learning_rate=learning_rate,
        text_encoder_learning_rate=text_encoder_learning_rate,
        mix=mix,
        aux=aux,
        precision=precision,
        seed=seed,
    )
    if seeds and "seed" in given:
        raise click.UsageError("--seeds and --seed exclude each other: several runs, or one")
    text_encoder = None if text_encoder is None else encoder_folder(text_encoder)
    if resume:
        # One run, unless the folder is that of several; what it lacks then is said below.
        several = bool(seeds) or (out / SEVERAL).exists()
        saved = resumed_seeds(out, seeds, preset, given, data, text_encoder) if several else None
    else:
        saved = None if config is None else read_settings(config)
    if not seeds and saved is not None and "seed" not in given:
        seeds = saved.seeds
    encoder = text_encoder is not None or (saved is not None and saved.run["text_encoder"] is not None)
    if not resume and not encoder and "text_encoder_learning_rate" in given:
        raise click.UsageError("--text-encoder-learning-rate is for --text-encoder, which is not given")
    folders = {seed: seed_folder(out, seed) for seed in seeds} or {None: out}
    if not resume and "RANK" not in os.environ:
        # Before torch is loaded, which takes seconds. Of several processes the first looks, once they have met.
        for folder in (out, *folders.values()):
            check_free(folder, force)

    # OpenMP's threads spin while they wait. Where other programs want the cores as well, that makes a step ten times
    # slower than letting them sleep; it is read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Where another process of the run has gone, torch's own warnings of it are a page of stack frames.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    import torch

    from hcmen.base import metrics
    from hcmen.training.checkpoint import write_json
    from hcmen.training.ranks import joined
    from hcmen.training.runs import Run

    if threads is not None:
        torch.set_num_threads(threads)
    reports: dict[int | None, dict[str, Any]] = {}
    failed: dict[int, str] = {}
    with joined(device) as ranks:
        console = console if ranks.first else Console(console.format, -1)
        loggers = Loggers(named_loggers(log) if ranks.first else {}, console.warn)
        dataset = None
        if resume and saved is not None:
            begun = saved
        elif resume:
            begun = Saved(out, *resumed_settings(out, preset, given, data, text_encoder))
        else:
            if ranks.first:
                for folder in (out, *folders.values()):
                    check_free(folder, force)
            start = _Start(preset, data, text_encoder, console)
            if saved is not None:
                start = _Again(saved, preset, data, text_encoder, console)
            dataset = start.dataset({**given, "seed": seeds[0]} if seeds else given)
            begun = Saved(out / SEVERAL, start.model, start.train, start.source, seeds)
        with contextlib.closing(loggers):
            for seed, folder in folders.items():
                train = begun.train if seed is None else dataclasses.replace(begun.train, seed=seed)
                if seed is not None:
                    console.note(f"seed {seed}, {seeds.index(seed) + 1} of {len(seeds)}: {folder}")
                if dataset is None or (seeds and seed != seeds[0] and begun.run["data"] is None):
                    told = console if dataset is None else Console(console.format, -1)
                    dataset = _load_data(begun.run, begun.model.inputs, train.seed, told)
                run = Run(folder, begun.model, train, begun.run, dataset, begun if seeds else None)
                try:
                    trainer = run.trained(resume, ranks, loggers, console)
                except CheckFailed as error:
                    if seed is None:
                        raise
                    failed[seed] = str(error)
                    loggers.close()
                    continue
                if ranks.first:
                    reports[seed] = _finished(trainer)
                    loggers.end(reports[seed])
    if not ranks.first:
        return
    if not seeds:
        console.emit(metrics.plain(reports[None]), scores_text(reports[None], begun.model.kind, screen_width()))
        return
    if reports:
        report = several_report(reports, failed)
        write_json(out / REPORT, {"schema_version": 1, **metrics.plain(report)})
        console.emit(metrics.plain(report), several_text(report, begun.model.kind, screen_width()))
    if failed:
        raise CheckFailed(failed_line(failed, seeds))


def _finished(trainer: Trainer) -> dict[str, Any]:
    """Leaves beside a checkpoint what is made at the end of its run; the report."""
    from hcmen.base import metrics
    from hcmen.training.checkpoint import write_json

    out, dataset = trainer.out, trainer.dataset
    draw_curves(out / CURVES, trainer.history)
    _save_clips(out / CLIPS, dataset.splits["valid"])

    model, described = load_checkpoint(out)
    report = {
        "checkpoint": str(out),
        "epoch": described["epoch"],
        "validation_mae": described["validation"]["mae"],
        "dataset": described["dataset"],
        "test": test_scores(model.to(trainer.ranks.device), dataset),
        **unheard(model, dataset),
    }
    write_json(out / REPORT, {"schema_version": 1, **metrics.plain(report)})
    return report


# --- settings and data ----------------------------------------------------------------------------------------------


class _Start:
    """What a run begins with: model and training settings, where both come from, the tokenizer of a text encoder."""

    model: Any
    train: TrainConfig
    tokenizer: bytes | None = None

    def __init__(self, preset: str | None, data: Path | None, text_encoder: Path | None, console: Console) -> None:
        self.preset, self.data, self.text_encoder, self.console = preset, data, text_encoder, console
        self.source: dict[str, Any] = {}

    def dataset(self, given: Mapping[str, Any]) -> MultimodalDataset:
        """The data, once the settings are chosen: by the file's sizes, where there is a file."""
        if self.data is None:
            self._choose(self.preset or "tiny", given, None)
            return _load_data(self.source, self.model.inputs, self.train.seed, self.console)

        def fit(sizes: Sizes) -> Inputs:
            name, why = preset_for(sizes) if self.preset is None else (self.preset, "")
            self._choose(name, given, sizes)
            self._tell(sizes, why)
            return self.model.inputs

        dataset = _load_file(os.path.realpath(self.data), fit, self.console)
        self._check_tokenizer(dataset)
        return dataset

    def _choose(self, name: str, given: Mapping[str, Any], sizes: Sizes | None) -> None:
        chosen = preset_named(name)
        encoder, hidden = None, 0
        if self.text_encoder is not None:
            from hcmen.models.text_encoder import read_sizes, read_tokenizer

            encoder, hidden = read_sizes(self.text_encoder)
            self.tokenizer = read_tokenizer(self.text_encoder)
        if sizes is None:
            self.model = _without_data(chosen, encoder, hidden, self.text_encoder)
        else:
            try:
                self.model = sized(chosen, sizes, encoder, hidden)
            except InputError as error:
                raise error.but(where=str(self.data)) from error
        learns = encoder is not None and given.get("text_encoder_learning_rate") != 0
        self.train = dataclasses.replace(chosen.train, **{**(chosen.with_encoder if learns else {}), **given})
        paths = {"data": self.data, "text_encoder": self.text_encoder}
        self.source = {
            "preset": chosen.name,
            **{k: os.path.realpath(path) if path else None for k, path in paths.items()},
        }

    def _check_tokenizer(self, dataset: MultimodalDataset) -> None:
        """Refuses tokens that were made with another tokenizer than the text encoder's."""
        made = dataset.front_ends.get("text")
        if self.tokenizer is None or made is None or made.sha256 is None:
            return
        if made.sha256 != hashlib.sha256(self.tokenizer).hexdigest():
            raise InputError(
                f"its text tokens are of another tokenizer than that of {self.text_encoder}",
                fix="convert the data with this one, or name the encoder that it was converted with",
                where=str(self.data),
            )

    def _tell(self, sizes: Sizes, why: str) -> None:
        inputs = self.model.inputs
        told = ((m, inputs.modality(m)) for m in inputs.modalities)
        listed = "; ".join(f"{m} {x.features} features, {x.max_steps} steps" for m, x in told)
        self.console.note(f"sizes from {self.data}: {listed}")
        chosen = f", chosen by the {why} of the data; --preset names another" if why else ""
        self.console.note(
            f"preset {self.source['preset']}: its architecture, training settings and label range "
            f"{inputs.label_min:g} to {inputs.label_max:g}{chosen}"
        )


class _Again(_Start):
    """As `_Start`, with the settings that a training wrote wherever the command line says nothing else."""

    def __init__(
        self, saved: Saved, preset: str | None, data: Path | None, text_encoder: Path | None, console: Console
    ) -> None:
        there = {name: None if path is None else Path(path) for name, path in saved.run.items() if name != "preset"}
        self.saved, self.asked = saved, {"preset": preset, "data": data, "text_encoder": text_encoder}
        data, text_encoder = data or there["data"], text_encoder or there["text_encoder"]
        super().__init__(preset or saved.run["preset"], data, text_encoder, console)

    def dataset(self, given: Mapping[str, Any]) -> MultimodalDataset:
        """As of `_Start`; says which settings are not those of the file."""
        before = {**self.saved.train.to_json(), **self.saved.run}
        paths = {k: os.path.realpath(x) if isinstance(x, Path) else x for k, x in self.asked.items() if x is not None}
        others = [
            f"{option(name)} {value} (there {before[name]})"
            for name, value in {**paths, **given}.items()
            if value != before[name]
        ]
        self.console.note(f"settings of {self.saved.where}" + (f", but for {', '.join(others)}" if others else ""))
        if self.data is None and self.preset is None:
            raise InputError(
                f"{self.saved.where}: does not say which preset's synthetic set it was trained on",
                fix="name it with --preset",
            )
        if self.text_encoder is None and self.saved.model.inputs.text_tokens is not None:
            raise InputError(
                f"{self.saved.where}: does not say where the text encoder came from: name it with --text-encoder"
            )
        return super().dataset(given)

    def _choose(self, name: str, given: Mapping[str, Any], sizes: Sizes | None) -> None:
        super()._choose(name, given, sizes)
        self.train = dataclasses.replace(self.saved.train, **given)
        if self.asked["preset"] not in (None, self.saved.run["preset"]):
            return
        if sizes is not None:
            self._check_sizes(sizes)
        if self.asked["text_encoder"] is None:
            self.model = self.saved.model
        else:
            text = FeatureConfig(self.model.text.features, self.saved.model.inputs.modality("text").max_steps)
            self.model = dataclasses.replace(self.saved.model, text=text, text_encoder=self.model.text_encoder)  # type: ignore[type-var]

    def _check_sizes(self, sizes: Sizes) -> None:
        """Raises InputError if the file's model is none for data of such sizes."""
        inputs, found = self.saved.model.inputs, sizes.modalities
        for m in inputs.modalities:
            if m == "text" and inputs.text_tokens is not None:
                continue  # its features are the encoder's, and longer texts are cut
            wanted = inputs.modality(m)
            if m not in found or found[m].features != wanted.features or found[m].max_steps > wanted.max_steps:
                what = f"{found[m].features} features, {found[m].max_steps} steps" if m in found else f"no {m}"
                raise InputError(
                    f"{self.data} has {what}" + (f" of {m}" if m in found else ""),
                    f"{wanted.features} features, {wanted.max_steps} steps at most, as the model of {self.saved.where}",
                    "name the data of that run, or a --preset, which takes the sizes of --data",
                )

    def _tell(self, sizes: Sizes, why: str) -> None:
        """Nothing: all of it stands in the file."""


def _without_data(chosen: Preset, encoder: TextEncoderConfig | None, hidden: int, folder: Path | None) -> Config:
    """The model for the synthetic set, which has tokens of the preset's sizes."""
    from hcmen.data.synthetic import SAMPLES

    if chosen.name not in SAMPLES:
        raise InputError(f"preset {chosen.name} is for data of your own", fix="name it with --data")
    text = chosen.model.inputs.modality("text")
    if encoder is None:
        return chosen.model
    if hidden != text.features:
        raise InputError(
            f"{folder}: the hidden size is {hidden}, preset {chosen.name} expects {text.features} text features: "
            "choose a BERT of that size"
        )
    return dataclasses.replace(chosen.model, text_encoder=encoder)  # type: ignore[type-var]


def _load_data(source: Mapping[str, Any], inputs: Inputs, seed: int, console: Console) -> MultimodalDataset:
    from hcmen.data.mmsa import dataset_from_mmsa
    from hcmen.data.synthetic import SAMPLES, make_synthetic

    if source["data"] is None:
        console.note(f"no --data: training on the synthetic set of preset {source['preset']}")
        return dataset_from_mmsa(make_synthetic(inputs, SAMPLES[source["preset"]], seed), "synthetic", inputs)
    return _load_file(source["data"], inputs, console)


def _load_file(path: str | Path, inputs: Inputs | Fit, console: Console) -> MultimodalDataset:
    from hcmen.data.mmsa import read_mmsa
    from hcmen.data.trained_on import mention_cleaned

    dataset = read_mmsa(path, inputs)
    mention_cleaned(dataset, console.note)
    return dataset


def _save_clips(folder: Path, split: Split) -> None:
    """Leaves the first validation samples beside the checkpoint, as clips that hcmen-export checks parity on."""
    from hcmen.base.clip import TEXT_TOKENS, write_clip

    folder.mkdir(exist_ok=True)
    for i in range(min(SAVED_CLIPS, len(split))):
        arrays = {m: x[i, : split.lengths[m][i]] for m, x in split.features.items()}
        if split.text_tokens:
            arrays.pop("text", None)
            arrays[TEXT_TOKENS] = split.text_tokens.ids[i, :, : split.lengths["text"][i]]
        write_clip(folder / f"{i:03d}.npz", arrays)


if __name__ == "__main__":
    main()
