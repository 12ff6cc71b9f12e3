"""One run of hcmen-train in its folder, begun or gone on with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcmen.base.console import Console
from hcmen.base.files import sweep
from hcmen.data import MultimodalDataset
from hcmen.models.contract import Config
from hcmen.models.text_encoder import read_tokenizer
from hcmen.training.checkpoint import STATE, write_json, write_whole
from hcmen.training.config import TrainConfig
from hcmen.training.loggers import Loggers
from hcmen.training.outputs import CLIPS, TOKENIZER, clear
from hcmen.training.progress import shown
from hcmen.training.ranks import Ranks
from hcmen.training.settings import Saved
from hcmen.training.trainer import Trainer

__all__ = ["Run"]


@dataclass(frozen=True)
class Run:
    """One run.

    model, train, source, dataset: what it begins with; source is where that came from. several: the settings of the
    call that this run is one of several of; None for one alone.
    """

    folder: Path
    model: Config
    train: TrainConfig
    source: Mapping[str, str | None]
    dataset: MultimodalDataset
    several: Saved | None = None

    def trained(self, resume: bool, ranks: Ranks, loggers: Loggers, console: Console) -> Trainer:
        """Trains to the end. One of several that are resumed begins where it has not yet.

        Raises:
            As `Trainer` and its methods.
        """
        goes_on = resume and (self.several is None or bool(ranks.agreed((self.folder / STATE).exists())))
        encoder = None if goes_on or self.source["text_encoder"] is None else Path(self.source["text_encoder"])
        tokenizer = None if encoder is None else read_tokenizer(encoder)
        if ranks.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.folder, self.folder / CLIPS):
                sweep(folder)
        trainer = Trainer(self.model, self.train, self.dataset, self.folder, self.source, ranks, encoder)
        if goes_on:
            trainer.resume()
            console.note(f"resuming after epoch {len(trainer.history)} of {self.train.epochs}")
        elif ranks.first:
            self._begin(resume, tokenizer)
        loggers.start(
            {
                "out": str(self.folder),
                "group": None if self.several is None else self.several.where.parent.name,
                "resumed_after": len(trainer.history),
                "kind": self.model.kind,
                "model": self.model.to_json(),
                "train": self.train.to_json(),
                "run": dict(self.source),
            }
        )
        with shown(console, self.train.epochs, len(trainer.history)) as (on_step, on_epoch):

            def told(record: dict[str, Any]) -> None:
                on_epoch(record)
                loggers.epoch(record)

            trainer.run(on_step, told)
        return trainer

    def _begin(self, resume: bool, tokenizer: bytes | None) -> None:
        """Empties the folder of what was there, once all is well so far."""
        if self.several is not None and not resume and self.train.seed == self.several.seeds[0]:
            clear(self.several.where.parent)
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.several.where, self.several.to_json())
        clear(self.folder)
        if tokenizer is not None:
            write_whole(self.folder / TOKENIZER, tokenizer)
