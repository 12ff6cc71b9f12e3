"""A model learns from real words: from a table to a score, with numbers that chance does not give.

tests/files/rated_tweets.csv are 1,500 of the 4,200 tweets of VADER's ground truth (C.J. Hutto and E.E. Gilbert, ICWSM
2014), each with the mean of some 20 people's ratings from -4 to 4; rated_tweets.LICENSE.txt is their licence.
"""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
from helpers.command import run
from helpers.tiny_bert import write_bert

from hcmen.data.convert import main as hcmen_convert
from hcmen.export.commands.export import main as hcmen_export
from hcmen.models.text_encoder import read_tokenizer
from hcmen.runtime import load
from hcmen.training.command import main as hcmen_train

TWEETS = Path(__file__).resolve().parents[1] / "files" / "rated_tweets.csv"


@pytest.mark.slow
def test_a_tiny_encoder_learns_from_real_words(tmp_path):
    """From random weights: on other tweets its error is 10 % below the floor, or more (17 % when this was written)."""
    with open(TWEETS, encoding="utf-8", newline="") as file:
        texts = [row["text"].lower() for row in csv.DictReader(file)]
    counts = Counter(word for text in texts for word in set(re.findall(r"[a-z]+|[^\sa-z]", text)))
    bert = write_bert(tmp_path / "bert", 32, 1, [word for word, count in counts.items() if count > 2])
    (bert / "tokenizer.json").write_bytes(read_tokenizer(bert))

    data, out, bundle = tmp_path / "data", tmp_path / "train", tmp_path / "bundle"
    done = run(hcmen_convert, TWEETS, data, "--text-encoder", bert, "--label-range=-4,4")
    assert done.code == 0, done.err
    rates = ("--learning-rate", 2e-3, "--text-encoder-learning-rate", 1e-3, "--epochs", 8)
    done = run(hcmen_train, "--data", data, "--text-encoder", bert, *rates, "--threads", 1, "--out", out)
    assert done.code == 0, done.err
    (scores,) = json.loads((out / "report.json").read_text())["test"].values()
    assert scores["hcmen"]["mae"] < 0.9 * scores["floor"]["mae"]
    assert scores["hcmen"]["corr"] > 0.35
    assert run(hcmen_export, "--checkpoint", out, "--bundle", bundle).code == 0
    said = load(bundle)
    liked, hated = ({"text": words} for words in ("I love it, so happy and great", "I hate this, so sad and bad"))
    assert said(liked).score - said(hated).score > 1.0
