"""The training loop.

Two views of every sample: as it is, and corrupted (hcmen/data/missing.py). The model's objective (hcmen/models) makes
the loss of both; log.jsonl has every term of it, before weighting, as a mean over the epoch's samples. Mixing, where it
is on, adds mixtures of the corrupted view, so that these have modalities missing as well.

A batch may be computed in micro-batches, one after the other; their gradients add up, weighted by samples. Terms that
compare the samples of a batch (alignment, intensity, mixing) see one micro-batch, so they are others with more of them.
A micro-batch may be spread over processes (hcmen/training/ranks.py), and there the losses see all of it: the number of
processes changes a run by rounding only, and by the draws of dropout, which each process makes for its own samples.

Precision bf16: matrix products and convolutions of the model in bfloat16, by autocast; its norms, softmaxes, scans,
scores and everything outside it (losses, gradients, weights, optimiser) in float32. Validation is all float32, as the
exported model is.

The checkpoint is chosen by one number, the mean of the validation MAE over the variants that the data has the
modalities of, each with its absent ones left out for every sample: no draw, so no luck.

Everything random is a function of the seed, the epoch and a sample's index, or the step's number for what concerns a
batch: the order of the samples, the corruption, the mixing, and PyTorch's generator (dropout), which is set anew at the
start of each epoch, in each process differently. A run that is resumed after an epoch therefore needs no generator
states, and goes on bit for bit as if it had never stopped; with another number of processes up to dropout and rounding.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hcmen.base import metrics
from hcmen.base.errors import CheckFailed, CorruptFileError, InputError
from hcmen.base.interrupts import uninterrupted
from hcmen.base.manifest import front_ends_to_json
from hcmen.data import IntArray, MultimodalDataset, Split
from hcmen.data.missing import corruption
from hcmen.models import registry
from hcmen.models.contract import Config, Step, uncalibrated
from hcmen.models.held import on_meta
from hcmen.models.text_encoder import load_weights, read_weights
from hcmen.training import checkpoint
from hcmen.training.config import TrainConfig
from hcmen.training.device import moved
from hcmen.training.evaluate import calibrated_on, predict_variants, texts_read
from hcmen.training.optimiser import learning_rate_at, make_optimiser
from hcmen.training.ranks import Ranks, each_tensor, gather_outputs

__all__ = ["Progress", "Trainer", "feature_statistics"]

LOG = "log.jsonl"

# Numbers that tell apart the uses of (seed, epoch); missing.py has 1.
_ORDER, _DROPOUT, _MIXING = 2, 3, 4


class Progress(NamedTuple):
    """Where a running epoch is: steps done of steps, and the mean loss so far."""

    epoch: int
    step: int
    steps: int
    loss: float


class Trainer:
    """One run, from its configurations to the files in `out`.

    Attributes:
        model: the model as it stands after the last step, not the best one (that is on disk).
        objective: what it is trained with.
        history: one record per whole epoch, as in log.jsonl.
    """

    def __init__(
        self,
        config: Config,
        train: TrainConfig,
        dataset: MultimodalDataset,
        out: Path,
        run: Mapping[str, Any] | None = None,
        ranks: Ranks | None = None,
        text_encoder: Path | None = None,
    ) -> None:
        """Builds model and optimiser on the device of `ranks`, the CPU by default.

        Args:
            config: the model. train: the run. dataset: what to train on; with text tokens where the model has a text
                encoder. out: the folder for what is written.
            run: kept with the state, for the command line to read back. ranks: this process among those of the run.
            text_encoder: the folder with the weights that the text encoder starts from; without it they are random,
                unless `resume` brings those of the state.

        Raises:
            InputError, CorruptFileError: as `hcmen.models.text_encoder.read_weights`, or the model and the data have
                other modalities.
            BackendError: the model has a text encoder and `transformers` is not installed.
        """
        self.train_config, self.dataset, self.out, self.run_info = train, dataset, out, dict(run or {})
        self.ranks = ranks or Ranks()
        if dataset.splits["train"].modalities != config.inputs.modalities:
            raise InputError(
                f"the model has {', '.join(config.inputs.modalities)}, the data has "
                f"{', '.join(dataset.splits['train'].modalities)}",
                "the same of both",
                where=dataset.name,
            )
        torch.manual_seed(train.seed)
        kind = registry.named(config.kind)
        if text_encoder is not None:  # before memory is taken for sizes that are its own
            weights = read_weights(on_meta(lambda: kind.module(config)).text_encoder, text_encoder)
        self.model = kind.module(config)
        statistics = feature_statistics(dataset.splits["train"])
        if config.inputs.text_tokens is not None:
            # What BERT says is normalised already, and changes as it learns.
            statistics.pop("text", None)
            if text_encoder is not None:
                load_weights(self.model.text_encoder, weights)
            if train.text_encoder_learning_rate == 0:
                self.model.text_encoder.freeze()
        self.model.set_normalisation(statistics)
        self.objective = kind.objective(config, train)
        self._splits = {name: dataset.splits[name] for name in ("train", "valid")}
        self.history: list[dict[str, Any]] = []
        self._fingerprint = _fingerprint(dataset)
        parts = {"model": self.model, **dict(sorted(self.objective.named_children()))}
        self._parameters = {
            f"{part}/{name}": p
            for part, module in parts.items()
            for name, p in module.to(self.ranks.device).named_parameters()
        }
        self._optimiser = make_optimiser(self._parameters, train)

    @property
    def best(self) -> dict[str, Any] | None:
        """The record of the epoch whose model is the checkpoint; None before the first."""
        chosen = [record for record in self.history if record["best"]]
        return chosen[-1] if chosen else None

    def run(
        self,
        on_step: Callable[[Progress], None] = lambda _: None,
        on_epoch: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        """Trains the epochs that are still to do, and writes checkpoint, state and log after each.

        Of several processes the first writes; the callbacks run in all.

        Raises:
            CheckFailed: the loss or a gradient is not finite; the files are those of the last good epoch.
            InputError: a file cannot be written, or the processes of the run differ in settings or data.
            BackendError: another process has ended.
            KeyboardInterrupt: Ctrl-C; between epochs the files are whole.
        """
        settings = json.dumps([self.model.config.to_json(), self.train_config.to_json(), len(self.history)])
        self.ranks.check_same(settings, "settings")
        self.ranks.check_same(self._fingerprint, "data")
        self.ranks.spread(p.data for p in self._parameters.values())
        self._read_texts()
        for epoch in range(len(self.history) + 1, self.train_config.epochs + 1):
            started = time.monotonic()
            losses = self._epoch(epoch, on_step)
            validation = self._validate()
            score = float(np.mean(list(validation.values())))
            better = self.best is None or score < self.best["validation_mae"]
            record = {
                "epoch": epoch,
                **losses,
                "validation_mae": score,
                "validation": validation,
                "best": better,
                "seconds": round(time.monotonic() - started, 3),
            }
            with uninterrupted():
                self._save(record)
            on_epoch(record)

    def resume(self) -> None:
        """Takes up the run that `out` holds the state of.

        Raises:
            InputError: there is no state, or it is of other configurations or other data.
            CorruptFileError: the state is damaged.
        """
        tensors, state = checkpoint.load_state(self.out)
        mine = {
            "kind": self.model.config.kind,
            "model": self.model.config.to_json(),
            "train": self.train_config.to_json(),
            "data": self._fingerprint,
        }
        if isinstance(state.get("train"), dict):  # a state of before a setting was there has its default
            state["train"] = {**TrainConfig().to_json(), **state["train"]}
        for part, value in mine.items():
            if state.get(part) != value:
                raise InputError(
                    f"{self.out}: was trained with {_difference(part, state.get(part), value)}: give the same to "
                    "resume, or start over with --force"
                )
        if any(name not in tensors or tensors[name].shape != p.shape for name, p in self._parameters.items()):
            raise CorruptFileError(f"{self.out}: the state lacks parameters", fix="start over with --force")
        for name, p in self._parameters.items():
            with torch.no_grad():
                p.copy_(tensors[name])
            moments = {k: tensors.get(f"optimiser/{name}/{k}") for k in ("step", "exp_avg", "exp_avg_sq")}
            # A parameter that has had no gradient yet has no moments either.
            if all(value is not None for value in moments.values()):
                step = moments.pop("step")
                self._optimiser.state[p] = {"step": step, **{k: x.to(p.device) for k, x in moments.items()}}
        self.history = state["history"]
        # A process killed between two writes may have left the log behind the state.
        if self.ranks.first:
            self._write_log()

    def _read_texts(self) -> None:
        """Lets an encoder that does not learn read every text once, where no word is ever dropped."""
        encoder = getattr(self.model, "text_encoder", None)
        if encoder is not None and encoder.frozen and not self.train_config.step_drop_probability:
            with self._autocast():
                self._splits["train"] = texts_read(encoder, self.dataset.splits["train"])
            self._splits["valid"] = texts_read(encoder, self.dataset.splits["valid"])

    # --- one epoch --------------------------------------------------------------------------------------------------

    def _epoch(self, epoch: int, on_step: Callable[[Progress], None]) -> dict[str, float]:
        config, split = self.train_config, self._splits["train"]
        torch.manual_seed(_torch_seed(config.seed, epoch, self.ranks.rank))
        order = np.random.default_rng((_ORDER, config.seed, epoch)).permutation(len(split))
        batches = [order[i : i + config.batch_size] for i in range(0, len(order), config.batch_size)]
        total = len(batches) * config.epochs
        sums = dict.fromkeys(("loss", *self.objective.weights, "gradient_norm"), 0.0)
        self.model.train()
        for step, indices in enumerate(batches):
            rate = learning_rate_at(config, (epoch - 1) * len(batches) + step, total)
            for group in self._optimiser.param_groups:
                group["lr"] = rate * group["share"]
            for name, value in self._step(epoch, step, split, indices).items():
                sums[name] += value * len(indices) / len(split)
            on_step(Progress(epoch, step + 1, len(batches), sums["loss"] * len(split) / _seen(batches, step)))
        return {**sums, "learning_rate": rate}

    def _step(self, epoch: int, step: int, split: Split, indices: IntArray) -> dict[str, float]:
        self._optimiser.zero_grad()
        sums: dict[str, Tensor] = {}
        pieces = np.array_split(indices, min(self.train_config.micro_batches, len(indices)))
        for number, piece in enumerate(pieces):
            clean, corrupted = self._views(epoch, split, piece)
            parts = self._losses(epoch, step, split, piece, clean, corrupted, number)
            share = len(piece) / len(indices)
            (share * parts["loss"]).backward()
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + share * value.detach()
        self.ranks.average(self._parameters.values())
        sums["gradient_norm"] = nn.utils.clip_grad_norm_(
            self._parameters.values(), self.train_config.gradient_clip_norm
        )
        # One transfer, since a GPU is waited for.
        found = dict(zip(sums, torch.stack([x.float() for x in sums.values()]).tolist(), strict=True))
        for name, key in (("loss", "loss"), ("gradient", "gradient_norm")):
            if not math.isfinite(found[key]):
                kept = (
                    f"the checkpoint of epoch {self.best['epoch']} is kept" if self.best else "there is no checkpoint"
                )
                raise CheckFailed(
                    f"the {name} is {found[key]:g} in epoch {epoch}, step {step + 1}: {kept}; "
                    f"try a lower --learning-rate than {self.train_config.learning_rate:g}"
                )
        self._optimiser.step()
        return found

    def _losses(
        self, epoch: int, step: int, split: Split, indices: IntArray, clean: Any, corrupted: Any, micro_batch: int = 0
    ) -> dict[str, Tensor]:
        """The terms of the loss before weighting, and "loss"."""
        place = (step, micro_batch) if micro_batch else (step,)
        labels = moved(torch.from_numpy(split.labels[indices]), self.ranks.device)
        found: dict[str, Tensor] = self.objective(
            Step(
                self.model,
                clean,
                corrupted,
                labels,
                lambda: np.random.default_rng((_MIXING, self.train_config.seed, epoch, *place)),
                lambda: self._corrupted(epoch, split, indices)[:2],
                self._outputs,
                self._agreed,
            )
        )
        return found

    def _agreed(self, tensors: Sequence[Tensor] | None) -> Sequence[Tensor] | None:
        """The first process's tensors."""
        if self.ranks.world == 1:
            return tensors
        found = self.ranks.agreed(None if tensors is None else [x.cpu() for x in tensors])
        return None if found is None else [x.to(self.ranks.device) for x in found]

    def _outputs(self, values: Mapping[str, Tensor], lengths: Mapping[str, Tensor] | None, present: Tensor) -> Any:
        """The model's outputs for other values, features or tokens; each process computes some of them."""
        count = len(present)
        own = self._own(count)
        values, present = {m: x[own] for m, x in values.items()}, present[own]
        with self._autocast():
            if lengths is not None:
                values = self.model.encode(values, {m: n[own] for m, n in lengths.items()})
            outputs = self.model.fuse(values, present)
        return gather_outputs(self.ranks, [_float32(outputs)], count)[0]

    def _views(self, epoch: int, split: Split, indices: IntArray) -> tuple[Any, Any]:
        """The model's outputs for the clean and the corrupted view, computed as one batch.

        They are one and the same where nothing is ever hidden: half the work. Each process computes some of the
        samples, and has the outputs of all.
        """
        own = indices[self._own(len(indices))]
        features, lengths, present = self._corrupted(epoch, split, own)
        train = self.train_config
        if not train.step_drop_probability and not (train.modality_drop_probability and len(split.modalities) > 1):
            with self._autocast():
                outputs = _float32(self.model.fuse(self.model.encode(features, lengths), present))
            (gathered,) = gather_outputs(self.ranks, [outputs], len(indices))
            return gathered, gathered
        clean = {
            m: moved(torch.from_numpy(split.model_input(m, own, int(split.lengths[m][own].max()))), self.ranks.device)
            for m in features
        }
        with self._autocast():
            tokens = self.model.encode(
                {m: torch.cat([clean[m], x]) for m, x in features.items()},
                {m: n.repeat(2) for m, n in lengths.items()},
            )
            both = self.model.fuse(tokens, torch.cat([torch.ones_like(present), present]))
        both = _float32(both)
        views = _rows(both, slice(None, len(own))), _rows(both, slice(len(own), None))
        first, second = gather_outputs(self.ranks, views, len(indices))
        return first, second

    def _own(self, count: int) -> slice:
        """The rows that this process computes: its share, or one of another's where that is none."""
        share = self.ranks.share(count)
        return share if share.stop > share.start else slice(0, 1)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.train_config.precision == "bf16")

    def _corrupted(
        self, epoch: int, split: Split, indices: IntArray
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Features (or text tokens), lengths and presence of the corrupted view, padded to the longest of the batch."""
        lengths = {m: split.lengths[m][indices] for m in split.modalities}
        steps = {m: int(n.max()) for m, n in lengths.items()}
        corrupt = corruption(self.train_config.corruption, epoch, indices, lengths, steps)
        features = {m: torch.from_numpy(split.model_input(m, indices, steps[m], corrupt.keep[m])) for m in lengths}
        device = self.ranks.device
        return (
            {m: moved(x, device) for m, x in features.items()},
            {m: moved(torch.from_numpy(n), device) for m, n in lengths.items()},
            moved(torch.from_numpy(corrupt.present), device),
        )

    def _validate(self) -> dict[str, float]:
        """Validation MAE per variant; each process scores some of the samples.

        A model that calibrates its scores is calibrated by them.
        """
        split = self._splits["valid"]
        calibrated = getattr(self.model, "calibration", None) is not None
        if calibrated:
            self.model.calibrate(uncalibrated())
        predictions = predict_variants(self.model, split.rows(self.ranks.share(len(split))))
        if self.ranks.world > 1:
            own = torch.from_numpy(np.stack(list(predictions.values()), axis=1)).to(self.ranks.device)
            columns = self.ranks.gather(own, len(split)).cpu().numpy().T
            predictions = dict(zip(predictions, columns, strict=True))
        if not all(np.isfinite(p).all() for p in predictions.values()):
            raise CheckFailed(
                "the model's validation scores are not finite: try a lower --learning-rate than "
                f"{self.train_config.learning_rate:g}"
            )
        if calibrated:
            table, predictions = calibrated_on(split.labels, predictions)
            self.model.calibrate(table)
        return {name: metrics.mae(split.labels, p) for name, p in predictions.items()}

    # --- files ------------------------------------------------------------------------------------------------------

    def _save(self, record: dict[str, Any]) -> None:
        """Checkpoint first, then the state: a process killed in between redoes the epoch and writes the same again."""
        if not self.ranks.first:
            self.history.append(record)
            return
        if record["best"]:
            checkpoint.save_checkpoint(
                self.out,
                self.model,
                self.train_config,
                epoch=record["epoch"],
                validation={"mae": record["validation_mae"], "mae_by_variant": record["validation"]},
                dataset={
                    "name": self.dataset.name,
                    "label_min": self.dataset.label_min,
                    "label_max": self.dataset.label_max,
                    "samples": {name: len(split) for name, split in self.dataset.splits.items()},
                    "cleaned": self.dataset.cleaned,
                    "front_ends": front_ends_to_json(self.dataset.front_ends),
                },
                run=self.run_info,
            )
        self.history.append(record)
        tensors: dict[str, Tensor] = dict(self._parameters)
        for name, p in self._parameters.items():
            tensors |= {f"optimiser/{name}/{key}": value for key, value in self._optimiser.state[p].items()}
        checkpoint.save_state(
            self.out,
            tensors,
            {
                "schema_version": checkpoint.SCHEMA_VERSION,
                "kind": self.model.config.kind,
                "model": self.model.config.to_json(),
                "train": self.train_config.to_json(),
                "data": self._fingerprint,
                "run": self.run_info,
                "history": self.history,
                "versions": checkpoint.versions(),
            },
        )
        self._write_log()

    def _write_log(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.history)
        checkpoint.write_whole(self.out / LOG, lines.encode())


def feature_statistics(split: Split) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Mean and standard deviation per feature [F] over the valid steps of `split`, per modality."""
    result = {}
    for m, x in split.features.items():
        # Padding is zero, so sums over all steps are sums over the valid ones. Sample by sample, since float64 copies
        # of a whole modality need not fit in memory.
        count = int(split.lengths[m].sum())
        mean = sum(row.sum(axis=0, dtype=np.float64) for row in x) / count
        squares = sum(np.square(row[:n] - mean).sum(axis=0) for row, n in zip(x, split.lengths[m], strict=True))
        result[m] = (mean, np.sqrt(squares / count))
    return result


def _rows(outputs: Any, rows: slice) -> Any:
    return each_tensor(outputs, lambda x: x[rows])


def _float32(outputs: Any) -> Any:
    """`outputs` for the losses, which know no other precision."""
    return each_tensor(outputs, lambda x: x if x.dtype == torch.bool else x.float())


def _seen(batches: list[IntArray], step: int) -> int:
    return sum(len(b) for b in batches[: step + 1])


def _torch_seed(seed: int, epoch: int, rank: int) -> int:
    return int(np.random.SeedSequence((_DROPOUT, seed, epoch, *([rank] if rank else []))).generate_state(1)[0])


def _fingerprint(dataset: MultimodalDataset) -> str:
    """A digest of every number of the training and validation splits: a resumed run must see the same data."""
    digest = hashlib.blake2b(digest_size=16)
    for name in ("train", "valid"):
        split = dataset.splits[name]
        tokens = (split.text_tokens.ids,) if split.text_tokens else ()
        for array in (*split.features.values(), *split.lengths.values(), split.labels, *tokens):
            digest.update(repr(array.shape).encode())
            # Some samples at a time: features may lie on disk.
            for start in range(0, len(array), 64):
                digest.update(np.ascontiguousarray(array[start : start + 64]).data)
    return digest.hexdigest()


def _difference(part: str, before: Any, now: Any) -> str:
    if not isinstance(before, dict) or not isinstance(now, dict):
        return f"model kind {before}, not {now}" if part == "kind" else "other data"
    name = next(key for key in {**before, **now} if before.get(key) != now.get(key))
    return f"{part}.{name} {before.get(name)}, not {now.get(name)}"
