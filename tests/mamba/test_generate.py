"""samples/generate.py: a language model is exported with states, and generates what it generates itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import loaded_after
from helpers.scripts import loaded
from helpers.small_lm import Mamba1, Mamba2, SmallLM

from hcmen.mamba import export
from hcmen.runtime.mamba import Stepper

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "generate.py"
VOCABULARY = 29
PROMPT = [3, 1, 4, 1, 5]
WORDS = [f"w{i}" for i in range(VOCABULARY - 1)] + ["<end>"]

generate = loaded(SAMPLE, "hcmen_sample_generate")


@pytest.fixture(scope="module")
def model() -> SmallLM:
    return SmallLM(Mamba1, Mamba2, size=16, vocabulary=VOCABULARY, seed=4)


@pytest.fixture(scope="module")
def graph(model, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lm") / "lm.onnx"
    export(model, torch.tensor([PROMPT, PROMPT]), path, states=True, verify=False)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, "w0"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    folder = tmp_path_factory.mktemp("tokenizer")
    made.save(str(folder / "tokenizer.json"))
    return folder


def greedy(model: SmallLM, count: int) -> list[int]:
    """The likeliest tokens, each by a run of the whole sequence."""
    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(count):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(PROMPT) :]


def first(tokens, count: int) -> list[int]:
    return [next(tokens) for _ in range(count)]


@pytest.mark.parametrize("library", [True, False])
def test_the_likeliest_tokens_are_those_of_the_model(model, graph, library):
    stepper = Stepper(graph, library=library, threads=1)
    want = greedy(model, 40)
    assert len(set(want)) > 3  # a model that says one word for ever would prove nothing
    assert first(generate.generate(stepper, PROMPT, temperature=0), 40) == want


def test_the_same_seed_gives_the_same_tokens(graph):
    stepper = Stepper(graph, threads=1)
    tokens = [first(generate.generate(stepper, PROMPT, seed=seed), 30) for seed in (1, 1, 2)]
    assert tokens[0] == tokens[1] != tokens[2]


def kept(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> dict[int, float]:
    """Token -> probability, token by token: the oracle of `probabilities`, for logits that differ."""
    share = {i: np.exp(float(x) / temperature) for i, x in enumerate(logits)}
    likeliest = sorted(share, key=share.__getitem__, reverse=True)[: top_k or len(logits)]
    total = sum(share[i] for i in likeliest)
    taken, found = 0.0, {}
    for i in likeliest:
        if top_p < 1 and taken >= top_p:
            break
        taken += share[i] / total
        found[i] = share[i]
    return {i: x / sum(found.values()) for i, x in found.items()}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1), (1, 1), (5, 1), (0, 0.5), (7, 0.9), (100, 1e-9)])
def test_tokens_are_drawn_with_the_probabilities_of_the_definition(temperature, top_k, top_p):
    logits = np.random.default_rng(3).normal(0, 3, 20).astype(np.float32)
    got = generate.probabilities(logits, temperature, top_k, top_p)
    want = kept(logits, temperature, top_k, top_p)
    assert set(np.flatnonzero(got)) == set(want)
    for i, x in want.items():
        assert got[i] == pytest.approx(x, rel=1e-9)


def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, str(SAMPLE), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_command_prints_token_ids_and_how_fast_they_came(model, graph):
    done = run(str(graph), "--prompt", "3 1 4 1 5", "--tokens", "6", "--temperature", "0", "--threads", "1")
    ids, told = done.stdout.splitlines()
    assert list(map(int, ids.split())) == greedy(model, 6)
    number = r"[\d.]+"
    assert re.fullmatch(
        rf"prompt: 5 tokens in {number} ms, {number} tokens a second; then 5 tokens, {number} a second \(native\)", told
    )


def test_the_command_prints_text_until_the_token_that_ends_it(model, graph, tokenizer):
    want = [WORDS[i] for i in greedy(model, 12)]
    asked = [str(graph), "--prompt", "w3 w1 w4 w1 w5", "--temperature", "0", "--threads", "1"]
    text = run(*asked, "--tokens", "12", "--tokenizer", str(tokenizer)).stdout.splitlines()[0]
    assert text.split() == ["w3", "w1", "w4", "w1", f"w5{want[0]}", *want[1:]]
    end = want[4]
    text = run(*asked, "--tokenizer", str(tokenizer / "tokenizer.json"), "--stop", end).stdout.splitlines()[0]
    assert text.split() == ["w3", "w1", "w4", "w1", f"w5{want[0]}", *want[1 : want.index(end)]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "hello"], "error: --prompt is text, expected token ids: give the --tokenizer of the model"),
        (["--prompt", " "], "error: --prompt is empty, expected one token at least"),
        (["--prompt", "1", "--stop", "end"], "error: --stop 'end' is no token of the tokenizer"),
        (["--prompt", "1", "--tokenizer", "none.json"], "error: none.json: no tokenizer"),
        (["--prompt", "1", "--top-p", "0"], "--top-p is 0.0, expected above 0 and up to 1"),
        (["--prompt", "1", "--tokens", "0"], "--tokens is 0, expected 1 or more"),
        (["--prompt", "1", "--temperature", "nan"], "--temperature is nan, expected 0 or more"),
    ],
)
def test_what_does_not_do_is_told_in_one_line(graph, arguments, said):
    done = run(str(graph), *arguments, code=2)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1 or done.stderr.startswith("usage:")


def test_a_file_that_is_none_is_told(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    assert "error: " in run(str(tmp_path / "m.onnx"), "--prompt", "1", code=5).stderr


def test_the_sample_needs_no_torch(graph):
    loaded_modules = loaded_after(
        "import runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')",
        *(str(SAMPLE), str(graph), "--prompt", "1", "--tokens", "2"),
    )
    assert "onnxruntime" in loaded_modules
    assert loaded_modules.isdisjoint({"torch", "onnx", "transformers", "tokenizers"})
