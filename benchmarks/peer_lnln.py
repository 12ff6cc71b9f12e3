"""HCMEN beside LNLN (Haoyu-ha/LNLN): both trained here on one synthetic file, judged on the same holes.

    git clone https://github.com/Haoyu-ha/LNLN lnln
    python benchmarks/peer_lnln.py --lnln lnln --out docs/results/peer_lnln.json
    python benchmarks/peer_lnln.py --lnln lnln --out docs/results/peer_lnln.json --timing

What is equal: the file (MMSA's layout, MOSI's features, the steps of the preset `tiny`), the splits, the batch size,
the number of epochs, the text encoder (a small BERT with random weights, the same for both, trained along at the
model's learning rate), the rule that chooses epoch and settings (validation MAE, mean over some rates of `intra`, masks
of seed 1), and the masks of the test (`intra`, seed 0). What is each model's own: size, loss, optimiser, schedule, and
how it loses steps in training. docs/protocols.md says what was found.

LNLN is imported from its checkout; nothing of it is kept here. What is changed in its configuration is in CHANGES. Its
loader redraws the missing steps when sample 0 is fetched. In a worker process the change would be lost with the worker,
so there is none; and its seeding leaves numpy's generator at the same place after every redraw, so that the rates would
be those of the epoch before: the generator is seeded anew each epoch.

Settings are tried with the first seed; the ones with the lowest validation MAE are run with the others. Runs are added
to the JSON one by one, with a table and a picture beside it: what is stopped goes on where it was, also as several
processes at once (--models). --timing trains both in turn, epoch by epoch, and adds the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import fcntl
import hashlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Read once, when torch is loaded: waiting threads sleep instead of keeping a core from whoever could use it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np
import numpy.typing as npt
import torch
from machine import describe

from hcmen.base import metrics
from hcmen.base.inputs import FeatureConfig
from hcmen.data import MultimodalDataset
from hcmen.data.mmsa import dataset_from_mmsa
from hcmen.data.protocols import PROTOCOLS, Masks
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.training.checkpoint import write_json, write_whole
from hcmen.training.presets import preset_named

Array = npt.NDArray[Any]

MODELS = ("hcmen", "lnln")
RATES = [s.name for s in PROTOCOLS["intra"].settings]
CHOOSING = ("r=0.0", "r=0.3", "r=0.6", "r=0.9")
"""The rates whose mean validation MAE chooses the epoch and the settings, of both models."""

BERT = {"hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "vocabulary": 1060, "positions": 64}
_UNKNOWN = 100

# First seed only. LNLN takes its input as it is, HCMEN standardises it inside: so LNLN is also given the standardised.
LEARNING_RATES = {"hcmen": (1e-3, 2e-3, 4e-3), "lnln": (1e-4, 4e-4, 1e-3)}
INPUTS = {"hcmen": ("raw",), "lnln": ("raw", "standardised")}
CHANGES = (
    "heads: as stated (its code fixes 64 channels per head and a width of 128: 2 heads are as wide as the tokens)",
    "bert_pretrained: the small BERT",
    "input_length: [20, 32, 40] and input_dims: [64, 20, 5] (text, vision, audio), those of the file",
    "n_epochs, batch_size, lr: as stated",
    "num_workers: 0",
)


# --- what both models are given -------------------------------------------------------------------------------------


def masked_ids(tokens: Array, keep: Array) -> Array:
    """Text tokens [N, 3, T] (ids, attention mask, types) with the ids of dropped steps replaced by that of [UNK].

    Args:
        tokens: as in MMSA's `text_bert`. keep: bool [N, T], False for dropped and for padded steps.

    Returns:
        A copy; padding stays 0, attention mask and types stay as they are.
    """
    result = np.array(tokens, dtype=np.int64)
    result[:, 0][(result[:, 1] != 0) & ~keep] = _UNKNOWN
    return result


def standardised(data: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The set with the audio and vision features at mean 0 and deviation 1 over the training split's valid steps.

    Padding stays zero.
    """
    result = {split: dict(members) for split, members in data.items()}
    for m in ("audio", "vision"):

        def valid(members: Mapping[str, Any], m: str = m) -> Array:
            return np.arange(members[m].shape[1]) < np.asarray(members[f"{m}_lengths"])[:, None]

        frames = data["train"][m][valid(data["train"])].astype(np.float64)
        for members in result.values():
            scaled = (members[m] - frames.mean(axis=0)) / frames.std(axis=0)
            members[m] = np.where(valid(members)[..., None], scaled, 0.0).astype(np.float32)
    return result


def write_bert(folder: Path, seed: int = 0) -> None:
    """A BERT with random weights, in the format of `save_pretrained`: config.json, weights, vocab.txt."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    named = {0: "[PAD]", _UNKNOWN: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}
    words = [named.get(i, f"[unused{i}]") for i in range(BERT["vocabulary"])]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=BERT["vocabulary"],
        hidden_size=BERT["hidden"],
        num_hidden_layers=BERT["layers"],
        num_attention_heads=BERT["heads"],
        intermediate_size=BERT["intermediate"],
        max_position_embeddings=BERT["positions"],
    )
    transformers.BertModel(config).save_pretrained(folder)


@dataclasses.dataclass(frozen=True)
class Material:
    """The set as the file holds it, by input; as HCMEN's splits; the masks; and where file and BERT lie."""

    raw: Mapping[str, Mapping[str, Mapping[str, Any]]]
    dataset: MultimodalDataset
    validation: Mapping[str, Masks]
    test: Mapping[str, Masks]
    files: Mapping[str, Path]
    bert: Path


def prepare(samples: tuple[int, int, int], folder: Path) -> Material:
    """Makes the set and the BERT, always the same, and writes them to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = preset_named("tiny").model
    config = dataclasses.replace(config, text=FeatureConfig(BERT["hidden"], config.text.max_steps))
    raw = make_synthetic(config.inputs, samples, 0)
    sets = {"raw": raw, "standardised": standardised(raw)}
    files = {}
    for name, data in sets.items():
        # A file per process: several may be at work in one folder.
        files[name] = folder / f"{name}.{os.getpid()}.pkl"
        write_synthetic(files[name], data)
    bert = folder / f"bert.{os.getpid()}"
    write_bert(bert)
    dataset = dataset_from_mmsa(raw, "synthetic", config.inputs)
    intra = PROTOCOLS["intra"]
    validation = {k: v for k, v in intra.apply(dataset.splits["valid"], 1).items() if k in CHOOSING}
    return Material(sets, dataset, validation, intra.apply(dataset.splits["test"], 0), files, bert)


# --- the two models -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Epochs and batch size of both, and LNLN's attention heads."""

    epochs: int
    batch: int
    heads: int


# Called after each epoch: the epoch, its mean training loss, seconds and processor seconds of its steps.
OnEpoch = Callable[[int, float, float, float], None]
Predict = Callable[[str, Masks], Array]


@contextlib.contextmanager
def _measured(into: list[float]) -> Iterator[None]:
    """Appends seconds and this process's processor seconds of the block."""
    started, used = time.perf_counter(), time.process_time()
    yield
    into.extend((time.perf_counter() - started, time.process_time() - used))


class Ours:
    """HCMEN: the preset `tiny` with the small BERT inside, trained as hcmen-train does."""

    def __init__(self, material: Material, learning_rate: float, seed: int, sizes: Sizes, folder: Path) -> None:
        from hcmen.models.text_encoder import read_sizes
        from hcmen.training.trainer import Trainer

        preset = preset_named("tiny")
        encoder, hidden = read_sizes(material.bert)
        config = dataclasses.replace(
            preset.model, text=FeatureConfig(hidden, preset.model.text.max_steps), text_encoder=encoder
        )
        train = dataclasses.replace(
            preset.train,
            epochs=sizes.epochs,
            batch_size=sizes.batch,
            seed=seed,
            learning_rate=learning_rate,
            text_encoder_learning_rate=learning_rate,
        )
        self._dataset = dataset_from_mmsa(material.raw["raw"], "synthetic", config.inputs)
        self._trainer = Trainer(config, train, self._dataset, folder, text_encoder=material.bert)
        self.model: torch.nn.Module = self._trainer.model
        self.text_encoder: torch.nn.Module = self._trainer.model.text_encoder

    def run(self, on_epoch: OnEpoch) -> None:
        begun = [time.perf_counter(), time.process_time()]
        spent = [0.0, 0.0]

        def step(_: Any) -> None:
            spent[:] = time.perf_counter() - begun[0], time.process_time() - begun[1]

        def epoch(record: Mapping[str, Any]) -> None:
            on_epoch(record["epoch"], record["loss"], *spent)
            begun[:] = time.perf_counter(), time.process_time()

        self._trainer.run(step, epoch)

    def predict(self, split: str, masks: Masks) -> Array:
        from hcmen.training.evaluate import predict_masked

        return predict_masked(self._trainer.model, self._dataset.splits[split], masks)


class Peer:
    """LNLN from its checkout, with its own configuration for MOSI but for CHANGES."""

    def __init__(
        self, source: Path, material: Material, data: str, learning_rate: float, seed: int, sizes: Sizes
    ) -> None:
        import yaml

        if str(source) not in sys.path:
            sys.path.insert(0, str(source))
        from core.dataset import MMDataset
        from core.losses import MultimodalLoss
        from core.scheduler import get_scheduler
        from models.lnln import build_model

        tiny = preset_named("tiny").model
        args = yaml.safe_load((source / "configs" / "train_mosi.yaml").read_text(encoding="utf-8"))
        args["base"] |= {
            "seed": seed,
            "lr": learning_rate,
            "n_epochs": sizes.epochs,
            "batch_size": sizes.batch,
            "num_workers": 0,
        }
        args["dataset"]["dataPath"] = str(material.files[data])
        args["model"]["feature_extractor"] |= {
            "bert_pretrained": str(material.bert),
            "input_length": [tiny.text.max_steps, tiny.vision.max_steps, tiny.audio.max_steps],
            "input_dims": [BERT["hidden"], tiny.vision.features, tiny.audio.features],
        }
        _set_all(args["model"], "heads", sizes.heads)
        self._seed, self._epochs, self._data = seed, sizes.epochs, material.raw[data]
        _seed_all(seed)
        self.model: torch.nn.Module = build_model(args)
        self.text_encoder: torch.nn.Module = self.model.bertmodel
        self._tokens = args["model"]["feature_extractor"]["token_length"][0]
        self._loss = MultimodalLoss(args)
        self._optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, weight_decay=args["base"]["weight_decay"]
        )
        self._scheduler = get_scheduler(self._optimiser, args)
        self._loader = torch.utils.data.DataLoader(
            MMDataset(args, mode="train"), batch_size=sizes.batch, shuffle=True, num_workers=0
        )

    def run(self, on_epoch: OnEpoch) -> None:
        for epoch in range(1, self._epochs + 1):
            spent: list[float] = []
            with _measured(spent):
                loss = self._epoch(epoch)
            on_epoch(epoch, loss, *spent)

    def _epoch(self, epoch: int) -> float:
        """One pass; the mean of the steps' losses."""
        _seed_all(int(np.random.SeedSequence((self._seed, epoch)).generate_state(1)[0]))
        losses = []
        self.model.train()
        for batch in self._loader:
            complete = tuple(batch[k] for k in ("vision", "audio", "text"))
            incomplete = tuple(batch[f"{k}_m"] for k in ("vision", "audio", "text"))
            labels = batch["labels"]
            # The discriminator's classes: 1 for the first half of what it is given, the mended tokens; 0 for complete.
            halves = torch.arange(2).flip(0).repeat_interleave(len(labels["M"]) * self._tokens)
            truth = {
                "sentiment_labels": labels["M"],
                "completeness_labels": 1.0 - labels["missing_rate_l"],
                "effectiveness_labels": halves,
            }
            loss = self._loss(self.model(complete, incomplete), truth)["loss"]
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            losses.append(float(loss.detach()))
        self._scheduler.step()
        return statistics.fmean(losses)

    def predict(self, split: str, masks: Masks) -> Array:
        members = self._data[split]
        inputs = {m: members[m] * masks.keep[m][..., None] for m in ("vision", "audio")}
        inputs["text"] = masked_ids(members["text_bert"], masks.keep["text"]).astype(np.float32)
        before = self.model.training
        self.model.eval()
        scores = []
        with torch.inference_mode():
            # Halves of it at least: its squeeze() takes a batch of one for no batch.
            for rows in np.array_split(np.arange(len(masks.present)), -(-len(masks.present) // 128)):
                batch = tuple(torch.from_numpy(inputs[m][rows]) for m in ("vision", "audio", "text"))
                scores.append(self.model((None, None, None), batch)["sentiment_preds"][:, 0])
        self.model.train(before)
        return torch.cat(scores).double().numpy()


def _set_all(config: dict[str, Any], name: str, value: int) -> None:
    """Sets every `name` in the nested `config`."""
    for key, inner in config.items():
        if isinstance(inner, dict):
            _set_all(inner, name, value)
        elif key == name:
            config[key] = value


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the generator that LNLN draws from
    torch.manual_seed(seed)


# --- one run --------------------------------------------------------------------------------------------------------


def judged(predict: Predict, split: str, labels: Array, masks: Mapping[str, Masks]) -> dict[str, list[float]]:
    """MAE (label units) and Acc-2 (non0, a share) per setting of `masks`."""
    found = [metrics.scores(labels, predict(split, mask), "mosi") for mask in masks.values()]
    return {"mae": [s["mae"] for s in found], "acc2": [s[metrics.HEADLINE_ACC2["mosi"]] for s in found]}


def one_run(model: Ours | Peer, material: Material, say: Callable[[str], None]) -> dict[str, Any]:
    """Trains, keeps the epoch with the lowest validation MAE (mean over CHOOSING), and tests that."""
    splits = material.dataset.splits
    curve: list[dict[str, float]] = []
    best: dict[str, Any] = {}

    def on_epoch(epoch: int, loss: float, seconds: float, cpu: float) -> None:
        found = judged(model.predict, "valid", splits["valid"].labels, material.validation)
        mae = statistics.fmean(found["mae"])
        curve.append(
            {"epoch": epoch, "loss": loss, "validation_mae": mae, "seconds": seconds, "processor_seconds": cpu}
        )
        if not best or mae < best["mae"]:
            best.update(mae=mae, epoch=epoch, weights=copy.deepcopy(model.model.state_dict()))
        say(f"epoch {epoch}: loss {loss:.4f}, validation MAE {mae:.4f}, {cpu:.1f} processor seconds")

    model.run(on_epoch)
    model.model.load_state_dict(best["weights"])
    return {
        "epoch": best["epoch"],
        "validation_mae": best["mae"],
        "test": judged(model.predict, "test", splits["test"].labels, material.test),
        "parameters": {
            "all": sum(p.numel() for p in model.model.parameters()),
            "text_encoder": sum(p.numel() for p in model.text_encoder.parameters()),
        },
        "processor_seconds_per_epoch": round(statistics.median(c["processor_seconds"] for c in curve), 3),
        "curve": curve,
    }


def next_runs(runs: Sequence[Mapping[str, Any]], model: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What is to be run of `model` as far as it can be known: learning rates, then inputs, then the other seeds."""
    first = {"model": model, "seed": seeds[0]}
    tried = [{**first, "learning_rate": rate, "input": INPUTS[model][0]} for rate in LEARNING_RATES[model]]
    if missing := [t for t in tried if not _found(runs, t)]:
        return missing
    best = min(tried, key=lambda t: _found(runs, t)["validation_mae"])
    tried += [{**first, "learning_rate": best["learning_rate"], "input": name} for name in INPUTS[model][1:]]
    if missing := [t for t in tried if not _found(runs, t)]:
        return missing
    best = min(tried, key=lambda t: _found(runs, t)["validation_mae"])
    return [t for t in ({**best, "seed": seed} for seed in seeds[1:]) if not _found(runs, t)]


def chosen(runs: Sequence[Mapping[str, Any]], model: str, first_seed: int) -> list[Mapping[str, Any]]:
    """The runs of `model`, one per seed, with the settings that validation chose with the first seed."""
    own = [r for r in runs if r["model"] == model]
    tried = [r for r in own if r["seed"] == first_seed]
    if not tried:
        return []
    best = min(tried, key=lambda r: r["validation_mae"])
    same = [r for r in own if all(r[k] == best[k] for k in ("learning_rate", "input"))]
    return sorted(same, key=lambda r: r["seed"])


def _found(runs: Sequence[Mapping[str, Any]], wanted: Mapping[str, Any]) -> Any:
    return next((r for r in runs if all(r[k] == v for k, v in wanted.items())), None)


# --- results --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and standard deviation (n - 1); a single value has none."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(results: Mapping[str, Any]) -> str:
    """The results as a Markdown page."""
    settings, runs = results["settings"], results["runs"]
    first = settings["seeds"][0]
    own = {model: chosen(runs, model, first) for model in MODELS}
    names = {"hcmen": "HCMEN", "lnln": "LNLN"}
    there = [m for m in MODELS if own[m]]
    train, valid, test = settings["samples"]
    lines = [
        "# HCMEN beside LNLN, on the synthetic set",
        "",
        f"{train} training, {valid} validation and {test} test samples, {settings['epochs']} epochs each in batches of "
        f"{settings['batch_size']}; epoch and settings chosen by the validation MAE, mean over "
        f"{', '.join(settings['choosing'])}; test under the masks of `intra`, the same for both. Mean and standard "
        f"deviation over seeds; LNLN with {settings['heads']} attention heads. MAE is in label units, lower is better. "
        f"Processor seconds are those of the training steps with {settings['threads']} thread, whatever else the "
        "machine was doing.",
        "",
        f"| steps dropped | {' | '.join(f'{names[m]}: MAE' for m in there)} | floor: MAE | "
        f"{' | '.join(f'{names[m]}: Acc-2 %' for m in there)} | floor: Acc-2 % |",
        f"|---|{'---|' * (2 * len(there) + 2)}",
    ]
    floor = results["floor"]
    rows = [(name, lambda x, i=i: x[i]) for i, name in enumerate(RATES)] + [("mean of the ten", statistics.fmean)]
    for name, of in rows:
        mae = [spread([of(r["test"]["mae"]) for r in own[m]], 3) for m in there]
        acc = [spread([100 * of(r["test"]["acc2"]) for r in own[m]], 1) for m in there]
        cells = [name, *mae, f"{floor['mae']:.3f}", *acc, f"{100 * floor['acc2']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| model | seeds | learning rate | input | epoch chosen | parameters | of these BERT | processor s per epoch | "
        "in all, min |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in there:
        r = own[m][0]
        cells = [
            names[m],
            ", ".join(str(x["seed"]) for x in own[m]),
            f"{r['learning_rate']:g}",
            r["input"],
            ", ".join(str(x["epoch"]) for x in own[m]),
            f"{r['parameters']['all']:,}",
            f"{r['parameters']['text_encoder']:,}",
            f"{statistics.median(x['processor_seconds_per_epoch'] for x in own[m]):.2f}",
            f"{statistics.fmean(sum(c['processor_seconds'] for c in x['curve']) / 60 for x in own[m]):.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Tried with the first seed:", ""]
    lines += ["| model | learning rate | input | epoch | validation MAE |", "|---|---|---|---|---|"]
    tried = (r for r in runs if r["seed"] == first)
    for r in sorted(tried, key=lambda r: (r["model"], r["input"], r["learning_rate"])):
        cells = [
            names[r["model"]],
            f"{r['learning_rate']:g}",
            r["input"],
            str(r["epoch"]),
            f"{r['validation_mae']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if "timing" in results:
        lines += ["", timing_line(results["timing"])]
    return "\n".join(lines) + "\n"


def timing_line(timing: Mapping[str, Any]) -> str:
    """The measured seconds in a sentence."""
    ours, theirs = (timing["seconds_per_epoch"][m] for m in MODELS)
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return (
        f"Training time of one epoch, both in turn in one process, {timing['threads']} thread, median of "
        f"{len(ours)}: HCMEN {statistics.median(ours):.2f} s, LNLN {statistics.median(theirs):.2f} s, LNLN takes "
        f"{statistics.median(ratios):.1f} times as long ({min(ratios):.1f} to {max(ratios):.1f})."
    )


def picture(results: Mapping[str, Any]) -> bytes:
    """PNG: test MAE against the rate, and the validation curves of the chosen runs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", dpi=120)
    rates = [float(name.removeprefix("r=")) for name in RATES]
    for model, label, colour in (("hcmen", "HCMEN", "tab:blue"), ("lnln", "LNLN", "tab:orange")):
        own = chosen(results["runs"], model, results["settings"]["seeds"][0])
        if not own:
            continue
        values = np.array([r["test"]["mae"] for r in own])
        deviation = values.std(axis=0, ddof=1) if len(own) > 1 else None
        left.errorbar(rates, values.mean(axis=0), yerr=deviation, marker="o", ms=4, capsize=3, label=label, c=colour)
        for i, r in enumerate(own):
            epochs = [c["epoch"] for c in r["curve"]]
            curve = [c["validation_mae"] for c in r["curve"]]
            right.plot(epochs, curve, c=colour, lw=1, label=f"{label}, per seed" if i == 0 else None)
            right.plot(r["epoch"], r["validation_mae"], "o", c=colour, ms=4)
    left.axhline(results["floor"]["mae"], color="gray", ls="--", lw=1, label="floor: mean training label")
    left.set(xlabel="share of steps dropped, r", ylabel="test MAE (label units)")
    left.set_ylim(bottom=0)
    right.plot([], [], "o", c="gray", ms=4, label="the epoch that is chosen")
    right.set(xlabel="epoch", ylabel="validation MAE (label units)")
    for panel in (left, right):
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    plt.close(figure)
    return stream.getvalue()


@contextlib.contextmanager
def _lock(path: Path, what: str, wait: bool) -> Iterator[bool]:
    """Whether this process has the lock of `what` about the results in `path`; with the process, the lock ends."""
    name = hashlib.sha256(f"{path.resolve()} {what}".encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"peer_lnln.{name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def results_file(path: Path, settings: Mapping[str, Any], beginning: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The results in `path`, to be changed; written again with table and picture. One process at a time is in here."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path, "", wait=True):
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else copy.deepcopy(dict(beginning))
        before = json.dumps(results)
        # More seeds may be added later; the first one chose the settings.
        seeds = results["settings"]["seeds"]
        if len(settings["seeds"]) > len(seeds) and settings["seeds"][: len(seeds)] == seeds:
            results["settings"]["seeds"] = list(settings["seeds"])
        if results["settings"] != settings:
            sys.exit(f"{path}: was made with {results['settings']}, not {settings}: choose another --out")
        yield results
        if json.dumps(results) == before:
            return
        write_json(path, results)
        if results["runs"]:
            write_whole(path.with_suffix(".md"), table(results).encode())
            write_whole(path.with_suffix(".png"), picture(results))


def _done_here(
    path: Path,
    run: Mapping[str, Any],
    do: Callable[[Mapping[str, Any]], dict[str, Any]],
    opened: Callable[[], contextlib.AbstractContextManager[dict[str, Any]]],
) -> bool:
    """Does `run` and adds it to the results, unless another process is at it or has just finished it."""
    with _lock(path, json.dumps(run), wait=False) as free:
        if not free:
            return False
        with opened() as results:
            if _found(results["runs"], run):
                return True
        found = do(run)
        with opened() as results:
            results["runs"].append({**run, **found})
        return True


def take_turns(source: Path, material: Material, rates: Mapping[str, float], sizes: Sizes) -> dict[str, list[float]]:
    """Seconds per epoch of both, epoch by epoch in turn; a first round warms up and is not counted."""
    spent: dict[str, list[float]] = {m: [] for m in MODELS}
    peer = Peer(source, material, "raw", rates["lnln"], 0, sizes)

    def then_theirs(epoch: int, loss: float, seconds: float, _: float) -> None:
        theirs: list[float] = []
        with _measured(theirs):
            peer._epoch(epoch)
        print(f"round {epoch - 1}: HCMEN {seconds:.2f} s, LNLN {theirs[0]:.2f} s", file=sys.stderr)
        if epoch > 1:
            spent["hcmen"].append(seconds)
            spent["lnln"].append(theirs[0])

    with tempfile.TemporaryDirectory() as folder:
        Ours(material, rates["hcmen"], 0, sizes, Path(folder)).run(then_theirs)
    return spent


def main() -> None:
    """Does the runs that the JSON does not have yet, or measures the time."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lnln", type=Path, required=True, help="A checkout of Haoyu-ha/LNLN.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--samples", nargs=3, type=int, default=[640, 120, 400], help="Train, valid, test.")
    # As many steps in an epoch as MOSI has with LNLN's own 64.
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--heads", type=int, default=2, help="Of LNLN's attention; its own are 8.")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--timing", action="store_true", help="Measure seconds per epoch only.")
    parser.add_argument("--rounds", type=int, default=5, help="Of --timing.")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    if not (a.lnln / "models" / "lnln.py").is_file():
        parser.error(f"{a.lnln}: has no models/lnln.py, expected a checkout of Haoyu-ha/LNLN: give its folder")
    source = a.lnln.resolve()
    sizes = Sizes(a.epochs, a.batch_size, a.heads)
    torch.set_num_threads(a.threads)
    settings = {
        "samples": a.samples,
        "epochs": a.epochs,
        "batch_size": a.batch_size,
        "heads": a.heads,
        "seeds": a.seeds,
        "threads": a.threads,
        "choosing": list(CHOOSING),
        "bert": BERT,
        "lnln_commit": subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip(),
        "lnln_changes": list(CHANGES),
    }

    def do(run: Mapping[str, Any]) -> dict[str, Any]:
        label = f"{run['model']}, learning rate {run['learning_rate']:g}, input {run['input']}, seed {run['seed']}"
        with tempfile.TemporaryDirectory() as out:
            model: Ours | Peer
            if run["model"] == "hcmen":
                model = Ours(material, run["learning_rate"], run["seed"], sizes, Path(out))
            else:
                model = Peer(source, material, run["input"], run["learning_rate"], run["seed"], sizes)
            return one_run(model, material, lambda line: print(f"{label}: {line}", file=sys.stderr))

    with tempfile.TemporaryDirectory() as folder:
        material = prepare(tuple(a.samples), Path(folder))
        splits = material.dataset.splits
        floor = metrics.floor(splits["test"].labels, splits["train"].labels, "mosi")
        beginning = {
            "schema_version": 1,
            "machine": describe(),
            "settings": settings,
            "masks": {name: mask.digest for name, mask in material.test.items()},
            "floor": {"mae": floor["mae"], "acc2": floor[metrics.HEADLINE_ACC2["mosi"]]},
            "runs": [],
        }
        if a.timing:
            rates = {m: LEARNING_RATES[m][0] for m in MODELS}
            spent = take_turns(source, material, rates, dataclasses.replace(sizes, epochs=a.rounds + 1))
            with results_file(a.out, settings, beginning) as results:
                results["timing"] = {"machine": describe(), "threads": a.threads, "seconds_per_epoch": spent}
            print(timing_line(results["timing"]))
            return
        while True:
            with results_file(a.out, settings, beginning) as results:
                todo = [run for name in a.models for run in next_runs(results["runs"], name, a.seeds)]
            if not todo:
                break
            if not any(_done_here(a.out, run, do, lambda: results_file(a.out, settings, beginning)) for run in todo):
                # Others are at work on all of it, and what comes next depends on what they find.
                time.sleep(5)
    sys.stdout.reconfigure(errors="replace")  # the table has signs that not every locale has
    print(table(results), end="")


if __name__ == "__main__":
    main()
