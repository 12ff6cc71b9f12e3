"""Does the exported graph say what the eager model says? The clips it is asked with, and the eager answers.

The eager float32 answers are themselves checked: against the same model in float64 on the reference scan, all clips in
one padded batch. So a golden set stands on the slow twin, and padding and batching are part of what is proven.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hcmen.base.clip import TEXT_TOKENS, Clip, batch_clips
from hcmen.base.errors import CheckFailed
from hcmen.base.inputs import Inputs, TokenConfig
from hcmen.base.modalities import Variant, variant_named
from hcmen.mamba.scan import implementation
from hcmen.runtime.compare import SCORE_ATOL, SCORE_RTOL, compare
from hcmen.training.checkpoint import CHECKPOINT, load_checkpoint

__all__ = [
    "PARITY_CLIPS",
    "eager_outputs",
    "golden_cases",
    "parity_clips",
]

PARITY_CLIPS = 20
# Which clips are scored together: alone and in ragged batches, the shortest and the longest in both.
_BATCHES = ((0,), (1,), (2,), (3, 4), (5, 6, 7), (0, 8, 9, 1, 10), tuple(range(11, PARITY_CLIPS)))

Arrays = dict[str, np.ndarray]


def parity_clips(inputs: Inputs, recorded: Sequence[Clip] = (), seed: int = 0) -> list[Clip]:
    """`PARITY_CLIPS` clips with all modalities of the model and of different lengths, 1 and the maximum among them.

    `recorded` are real clips (the validation clips beside a checkpoint); they are cut, or repeated, to the lengths
    wanted. Without any, smooth series stand in: autoregressive of order one, coefficient 0.9, unit variance.
    """
    generator = np.random.default_rng(seed)
    clips = []
    for index in range(PARITY_CLIPS):
        clip = recorded[index % len(recorded)] if recorded else Clip("", {})
        source, features, tokens = clip.features, {}, None
        for m in inputs.modalities:
            sizes = inputs.modality(m)
            # The first clip is as short as can be, the second as long; the others are ragged, each on its own.
            length = {0: 1, 1: sizes.max_steps}.get(index, int(generator.integers(1, sizes.max_steps + 1)))
            if m == "text" and inputs.text_tokens:
                tokens = _resized(clip.text_tokens, length, inputs.text_tokens, generator)
                continue
            series = source.get(m)
            if series is None:
                series = _smooth(generator, sizes.max_steps, sizes.features)
            features[m] = np.resize(series, (length, sizes.features)).astype(np.float32)
        clips.append(Clip(f"parity {index}", features, text_tokens=tokens))
    return clips


def _resized(tokens: np.ndarray | None, length: int, limits: TokenConfig, generator: np.random.Generator) -> np.ndarray:
    """`tokens` [3, time] cut or repeated to [3, length]; random ids where there are none."""
    if tokens is None:
        tokens = np.ones((3, length), np.int64)
        tokens[0] = generator.integers(limits.vocabulary, size=length)
        tokens[2] = 0
    return np.stack([np.resize(row, length) for row in tokens])


def _smooth(generator: np.random.Generator, steps: int, features: int) -> np.ndarray:
    noise = generator.standard_normal((steps, features))
    series = np.empty_like(noise)
    series[0] = noise[0]
    for t in range(1, steps):
        series[t] = 0.9 * series[t - 1] + np.sqrt(1 - 0.9**2) * noise[t]
    return series


def _run(model: Any, variant: Variant, inputs: Mapping[str, np.ndarray]) -> Arrays:
    work = next(model.parameters()).dtype
    features, lengths = {}, {}
    for m in variant.present:
        if m == "text" and TEXT_TOKENS in inputs:
            features[m] = torch.from_numpy(np.ascontiguousarray(inputs[TEXT_TOKENS]))
            lengths[m] = features[m][:, 1].sum(dim=1)
            continue
        features[m] = torch.from_numpy(np.ascontiguousarray(inputs[m])).to(work)
        lengths[m] = torch.from_numpy(np.ascontiguousarray(inputs[f"{m}_length"]))
    with torch.inference_mode():
        prediction = model.eval()(features, lengths)
    return {t.name: getattr(prediction, t.name).numpy() for t in model.config.inputs.outputs}


def _double(model: Any) -> Any:
    return copy.deepcopy(model).double().eval()


def golden_cases(model: Any, variant: Variant, clips: Sequence[Clip]) -> list[tuple[Arrays, Arrays]]:
    """Batches of inputs with the eager model's float32 outputs.

    Raises:
        CheckFailed: the float32 model is further from its float64 self than the bound for scores.
    """
    with implementation("ref"):
        exact = _run(_double(model), variant, batch_clips(clips, variant.present))
    cases = []
    for rows in _BATCHES:
        inputs = batch_clips([clips[i] for i in rows], variant.present)
        outputs = _run(model, variant, inputs)
        _check_against_exact(outputs, {name: values[list(rows)] for name, values in exact.items()}, variant)
        cases.append((inputs, outputs))
    return cases


def _check_against_exact(outputs: Arrays, exact: Arrays, variant: Variant) -> None:
    for name, got in outputs.items():
        comparison = compare(got, exact[name], SCORE_ATOL, SCORE_RTOL)
        if not comparison.passed:
            raise CheckFailed(
                f"the eager float32 model is {comparison.max_abs:.1e} from float64 on {name} of '{variant.name}', "
                f"allowed {SCORE_ATOL:g} + {SCORE_RTOL:g} |x|: its weights are too large for a float32 parity check"
            )


def eager_outputs(checkpoint: Path, variant_name: str, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """What the eager model of a checkpoint folder says to one batch of graph inputs.

    Args:
        checkpoint: the folder `hcmen-train` wrote.
        variant_name: one of the seven.
        inputs: `m` float32 [batch, m_time, features] and `m_length` int64 [batch] per present modality.

    Returns:
        score float32 [batch] and modality_weights float32 [batch, 3].

    Raises:
        InputError, CorruptFileError: the checkpoint is missing or damaged, or the inputs do not fit it.
        CheckFailed: float32 and float64 disagree beyond the bound for scores.
    """
    weights = checkpoint / CHECKPOINT
    stamp = weights.stat().st_mtime_ns if weights.exists() else 0
    model, exact_model = _loaded(checkpoint, stamp)
    variant = variant_named(variant_name)
    outputs = _run(model, variant, inputs)
    with implementation("ref"):
        exact = _run(exact_model, variant, inputs)
    _check_against_exact(outputs, exact, variant)
    return outputs


@functools.lru_cache(maxsize=1)
def _loaded(checkpoint: Path, stamp: int) -> tuple[Any, Any]:
    """The model of a checkpoint folder and its float64 twin; `stamp` changes when the folder is trained anew."""
    model, _ = load_checkpoint(checkpoint)
    return model, _double(model)
