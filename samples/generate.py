"""Generates text from an exported Mamba language model: the prompt in one run, then token after token.

python samples/generate.py mamba.onnx --tokenizer tokenizer.json --prompt "The meaning of life is" --tokens 100

The model is one with states, as these write it. The first line downloads 0.5 GB; tokenizer.json lies in the model's
repository, beside the weights. --tokenizer takes its folder, too:

    hcmen-export-mamba --hf state-spaces/mamba-130m-hf --states --last-step --out mamba.onnx
    hcmen-export-mamba --hf FOLDER_OF_A_MODEL --states --last-step --out mamba.onnx

PyTorch is not needed: hcmen[cpu] runs the model, and hcmen[words] has the tokenizer. Without a tokenizer the prompt is
token ids, and token ids are printed: --prompt "5 17 3". The same seed gives the same tokens.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hcmen.base.errors import HcmenError, InputError
from hcmen.runtime.mamba import Stepper


def probabilities(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """What each token is drawn with, float64 [vocabulary].

    Args:
        logits: [vocabulary]. temperature: what they are divided by, above 0.
        top_k: the most tokens that are left, the likeliest; 0 for all.
        top_p: of these the likeliest are left that together have this probability at least; 1 for all.
    """
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    weights /= weights.sum()
    if top_p < 1:
        kept = 1 + int(np.searchsorted(np.cumsum(weights), top_p))
        order, weights = order[:kept], weights[:kept]
    drawn = np.zeros(len(logits))
    drawn[order] = weights / weights.sum()
    return drawn


def generate(
    stepper: Stepper,
    prompt: list[int],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow `prompt`, without end.

    Args:
        stepper: a model of one input, token ids [1, time], whose first output is logits [1, time, vocabulary].
        prompt: one token at least. temperature: 0 takes the likeliest token. top_k, top_p: as of `probabilities`.
        seed: of the draws.
    """
    (ids,), logits = stepper.inputs, stepper.outputs[0].name
    random = np.random.default_rng(seed)
    stepper.reset()
    given = prompt
    while True:
        row = stepper.feed(**{ids.name: np.array([given], ids.dtype)})[logits][0, -1]
        if temperature == 0:
            token = int(row.argmax())
        else:
            token = int(random.choice(len(row), p=probabilities(row, temperature, top_k, top_p)))
        yield token
        given = [token]


def opened_tokenizer(path: str) -> Any:
    """The tokenizer of a tokenizer.json, or of the folder that it lies in."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise InputError(
            f"no package {error.name}", fix="pip install 'hcmen[words]', or leave --tokenizer out"
        ) from None
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # it has one class for all that can be wrong
        raise InputError(f"no tokenizer ({error})", "a tokenizer.json", where=str(file)) from None


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Generates text from an exported Mamba language model.")
    parser.add_argument("model", help="an .onnx file with states")
    parser.add_argument("--prompt", required=True, help="text, or token ids where there is no tokenizer")
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json, or its folder")
    parser.add_argument("--tokens", type=int, default=100, help="the most tokens to generate (default: 100)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest (default: 0.8)")
    parser.add_argument("--top-k", type=int, default=40, help="the most tokens to draw from, 0 for all (default: 40)")
    parser.add_argument("--top-p", type=float, default=0.95, help="their probability, 1 for all (default: 0.95)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    parser.add_argument("--stop", metavar="TOKEN", help="the token, or its id, that ends the text")
    parser.add_argument("--threads", type=int, help="worker threads (default: the physical cores)")
    parser.add_argument("--no-library", action="store_true", help="leave the kernel library out")
    given = parser.parse_args()
    for name, fits, expected in (
        ("tokens", given.tokens >= 1, "1 or more"),
        ("temperature", 0 <= given.temperature < float("inf"), "0 or more"),
        ("top-k", given.top_k >= 0, "0 or more"),
        ("top-p", 0 < given.top_p <= 1, "above 0 and up to 1"),
        ("seed", given.seed >= 0, "0 or more"),
    ):
        if not fits:
            parser.error(f"--{name} is {getattr(given, name.replace('-', '_'))}, expected {expected}")
    return given


def ids_of(text: str, tokenizer: Any) -> list[int]:
    """The token ids of a prompt."""
    if tokenizer is not None:
        ids = list(tokenizer.encode(text).ids)
    else:
        try:
            ids = [int(word) for word in text.split()]
        except ValueError:
            raise InputError("--prompt is text", "token ids", "give the --tokenizer of the model") from None
    if not ids:
        raise InputError("--prompt is empty", "one token at least")
    return ids


def stop_id(word: str | None, tokenizer: Any) -> int | None:
    """The id of the token that ends a text."""
    if word is None:
        return None
    known = None if tokenizer is None else tokenizer.token_to_id(word)
    if known is not None:
        return int(known)
    if word.isdecimal():
        return int(word)
    raise InputError(f"--stop {word!r} is no token of the tokenizer", "a token, or its id")


def run(given: argparse.Namespace) -> None:
    """Prints the text as it comes, then how long it took."""
    tokenizer = None if given.tokenizer is None else opened_tokenizer(given.tokenizer)
    prompt, stop = ids_of(given.prompt, tokenizer), stop_id(given.stop, tokenizer)
    stepper = Stepper(given.model, library=not given.no_library, threads=given.threads)
    if len(stepper.inputs) != 1 or len(stepper.inputs[0].shape) != 2:
        raise InputError("not a language model", "one input, token ids [batch, time]", where=given.model)

    ids, shown, seconds = [], "", []
    tokens = generate(
        stepper, prompt, temperature=given.temperature, top_k=given.top_k, top_p=given.top_p, seed=given.seed
    )
    if tokenizer is not None:
        print(given.prompt, end="", flush=True)
    for _ in range(given.tokens):
        start = time.perf_counter()
        token = next(tokens)
        seconds.append(time.perf_counter() - start)
        if token == stop:
            break
        ids.append(token)
        if tokenizer is None:
            print(token, end=" ", flush=True)
            continue
        text = tokenizer.decode(ids)
        if text.startswith(shown) and not text.endswith("\ufffd"):  # half a character waits for its other half
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print()
    first, later = seconds[0], seconds[1:]
    print(f"prompt: {len(prompt)} tokens in {first * 1e3:.1f} ms, {len(prompt) / first:.0f} tokens a second", end="; ")
    if later:
        print(f"then {len(later)} tokens, {len(later) / sum(later):.0f} a second", end=" ")
    print(f"({stepper.kernels})")


def main() -> None:
    """Ends with the exit code of what went wrong, after one line about it."""
    try:
        run(arguments())
    except HcmenError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
