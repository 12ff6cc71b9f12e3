"""The eager model for `hcmen-bench`: the process with PyTorch that takes turns with the runtime.

    python -m hcmen.export.bench_eager CHECKPOINT

Reads one JSON object a line from stdin and answers each with one line on stdout:

    {"do": "hello"}                                     -> {"versions": {...}}
    {"do": "run", engine, variant, threads, inputs}     -> {"outputs": path of an .npz}
    {"do": "time", ..., settle, calls}                  -> {"ns": [nanoseconds of each call]}

inputs: an .npz with "<i>/<graph input>" for the i-th feed; a call runs all feeds. What fails is answered with
{"error": one line, "exit_code": ...}, and the process goes on. It ends with its stdin.

`cold` is what a fresh process runs for `hcmen-bench --cold`: the eager model's score of one clip, with the time of each
step and the memory taken.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcmen.base.clip import TEXT_TOKENS
from hcmen.base.console import describe_error, one_line
from hcmen.base.errors import BackendError, unknown_name
from hcmen.base.modalities import variant_named
from hcmen.mamba.scan import implementation
from hcmen.training.checkpoint import load_checkpoint

__all__ = ["ENGINES", "Engines", "main"]

ENGINES = ("eager", "eager-reference", "compile", "compile-reference")

Arrays = dict[str, np.ndarray]


class Engines:
    """The model of a checkpoint, run as each of ENGINES on the CPU.

    Raises:
        InputError, CorruptFileError: the checkpoint is missing or damaged.
    """

    def __init__(self, checkpoint: str):
        self.model = load_checkpoint(checkpoint)[0].eval()
        self._compiled: dict[tuple[str, str], Callable[..., Any]] = {}

    def outputs(self, engine: str, variant: str, feed: Mapping[str, np.ndarray]) -> Arrays:
        """Every output, score [batch] among them, for graph inputs as `hcmen.base.clip.batch_clips` makes them.

        Raises:
            InputError: no such engine. BackendError: torch.compile could not.
        """
        if engine not in ENGINES:
            raise unknown_name("engine", engine, ENGINES)
        features, lengths = {}, {}
        for m in variant_named(variant).present:
            if m == "text" and TEXT_TOKENS in feed:
                features[m] = torch.from_numpy(feed[TEXT_TOKENS])
                lengths[m] = features[m][:, 1].sum(dim=1)
            else:
                features[m], lengths[m] = torch.from_numpy(feed[m]), torch.from_numpy(feed[f"{m}_length"])
        forward = self._forward(engine, variant)
        with torch.inference_mode(), implementation("ref" if engine.endswith("-reference") else "native"):
            try:
                prediction = forward(features, lengths)
            except Exception as error:
                if not engine.startswith("compile"):
                    raise
                raise BackendError(f"torch.compile failed: {one_line(error)[:300]}") from error
            return {t.name: getattr(prediction, t.name).numpy() for t in self.model.config.inputs.outputs}

    def _forward(self, engine: str, variant: str) -> Callable[..., Any]:
        if not engine.startswith("compile"):
            return self.model
        # One compiled function per variant: they are different graphs, and one would be compiled again at each turn.
        if (engine, variant) not in self._compiled:
            torch._dynamo.config.recompile_limit = 64
            self._compiled[engine, variant] = torch.compile(lambda x, lengths: self.model(x, lengths), dynamic=False)
        return self._compiled[engine, variant]

    def timed(self, engine: str, variant: str, feeds: Sequence[Arrays], settle: int, calls: int) -> list[int]:
        """Nanoseconds of each of `calls` passes over `feeds`, after `settle` untimed ones; no garbage collection."""
        taken = []
        gc.collect()
        gc.disable()
        try:
            for i in range(settle + calls):
                started = time.perf_counter_ns()
                for feed in feeds:
                    self.outputs(engine, variant, feed)
                if i >= settle:
                    taken.append(time.perf_counter_ns() - started)
        finally:
            gc.enable()
        return taken


def _read(path: str) -> list[Arrays]:
    feeds: dict[int, Arrays] = {}
    with np.load(path, allow_pickle=False) as stored:
        for key in stored.files:
            place, _, name = key.partition("/")
            feeds.setdefault(int(place), {})[name] = stored[key]
    return [feeds[i] for i in sorted(feeds)]


def _answer(engines: Engines, words: Mapping[str, Any], kept: dict[str, list[Arrays]]) -> dict[str, Any]:
    if words["do"] == "hello":
        return {"versions": {"torch": str(torch.__version__), "python": platform.python_version()}}
    if torch.get_num_threads() != words["threads"]:
        torch.set_num_threads(words["threads"])
    engine, variant, path = words["engine"], words["variant"], words["inputs"]
    if words["do"] == "time":
        if path not in kept:
            kept[path] = _read(path)
        return {"ns": engines.timed(engine, variant, kept[path], words["settle"], words["calls"])}
    results = [engines.outputs(engine, variant, feed) for feed in _read(path)]
    target = str(Path(path).with_suffix(".out.npz"))
    np.savez(target, **{f"{i}/{name}": x for i, result in enumerate(results) for name, x in result.items()})
    return {"outputs": target}


def main(arguments: Sequence[str]) -> None:
    """Answers line by line until stdin ends."""
    # What PyTorch or a compiler prints must not come between our lines: it goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    engines: Engines | None = None
    kept: dict[str, list[Arrays]] = {}
    for line in sys.stdin:
        try:
            engines = engines or Engines(arguments[0])
            answer = _answer(engines, json.loads(line), kept)
        except Exception as error:
            text, code = describe_error(error)
            answer = {"error": text, "exit_code": code}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def cold(checkpoint: str, clip: str, variant: str, threads: int) -> float:
    """The eager model's score of one clip file, as the shortest script would compute it."""
    torch.set_num_threads(threads)
    with np.load(clip, allow_pickle=False) as stored:
        arrays = {m: stored[m] for m in stored.files}
    feed: Arrays = {}
    for m, x in arrays.items():
        feed[m] = x[None]
        if m != TEXT_TOKENS:
            feed[f"{m}_length"] = np.array([len(x)], np.int64)
    return float(Engines(checkpoint).outputs("eager", variant, feed)["score"][0])


if __name__ == "__main__":
    main(sys.argv[1:])
