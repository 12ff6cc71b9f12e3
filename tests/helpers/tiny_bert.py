"""A tiny BERT of random weights in a folder, as BertModel.save_pretrained and BertTokenizer.save_pretrained write it.

Ids are laid out as in bert-base-uncased and bert-base-chinese: [PAD] 0, [UNK] 100, [CLS] 101, [SEP] 102, [MASK] 103;
the words of the synthetic set begin at 1000, as in its `text_bert`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from hcmen.data.synthetic import _WORDS as SYNTHETIC_WORDS

FIRST_WORD = 1000


def vocabulary(words: Sequence[str] = SYNTHETIC_WORDS) -> list[str]:
    """The tokens by id."""
    tokens = [f"[unused{i}]" for i in range(FIRST_WORD)]
    tokens[0] = "[PAD]"
    tokens[100:104] = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [*tokens, *words]


def write_bert(
    folder: Path,
    hidden: int = 32,
    layers: int = 2,
    words: Sequence[str] = SYNTHETIC_WORDS,
    *,
    positions: int = 64,
    seed: int = 0,
    head: bool = False,
    lower: bool = True,
) -> Path:
    """Writes config.json, model.safetensors, vocab.txt and tokenizer_config.json; with `head` a BertForMaskedLM's."""
    from transformers import BertConfig, BertForMaskedLM, BertModel

    tokens = vocabulary(words)
    config = BertConfig(
        vocab_size=len(tokens),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=2 * hidden,
        max_position_embeddings=positions,
        initializer_range=0.2,
    )
    torch.manual_seed(seed)
    model = BertForMaskedLM(config) if head else BertModel(config)
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(f'{{"do_lower_case": {str(lower).lower()}}}')
    return folder
