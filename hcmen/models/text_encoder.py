"""BERT inside the model: token ids to text features, so that it is trained and exported with everything else.

The encoder is `transformers`' BertModel, built from sizes alone: a checkpoint holds its weights and needs no folder of
BERT's. Weights and vocabulary come once, from a local folder as `save_pretrained` writes it and model hubs hand it out:

    config.json                                  the sizes
    model.safetensors or pytorch_model.bin       the weights, of a bare BertModel or of one with a head on top
    tokenizer.json or vocab.txt                  the vocabulary; the former is copied to the checkpoint and the bundle

Tokens are int64 [batch, 3, time]: ids, attention mask (ones, then zeros), token types, as in MMSA's `text_bert`.

On a CPU what is padding is not computed: the tokens of all texts stand in one row, and only the attention takes them
apart, texts of one length at a time. A batch of MOSI's texts, padded to its longest, is two thirds padding. What is
exported, and what a GPU runs, is the padded form: the one has no lengths yet, and the other would wait for them. The
two agree to rounding. Dropout draws for the tokens that there are, so a GPU and a CPU draw differently.
"""

from __future__ import annotations

import contextlib
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import BackendError, CorruptFileError, InputError, reason_of, shown
from hcmen.base.files import open_regular, refused
from hcmen.base.inputs import MOST_FEATURES
from hcmen.base.records import read_json
from hcmen.media.encoder_folder import UNKNOWN, folder_tokenizer
from hcmen.models.contract import MASKED
from hcmen.models.held import read_header
from hcmen.models.text_encoder_config import TextEncoderConfig

__all__ = ["TextEncoder", "load_weights", "read_sizes", "read_tokenizer", "read_weights"]

# (name in config.json, name here, what transformers takes where it is not given)
_SIZES = (
    ("vocab_size", "vocabulary", 30522),
    ("num_hidden_layers", "layers", 12),
    ("num_attention_heads", "heads", 12),
    ("intermediate_size", "intermediate", 3072),
    ("max_position_embeddings", "positions", 512),
    ("type_vocab_size", "token_types", 2),
    ("hidden_act", "activation", "gelu"),
    ("layer_norm_eps", "norm_epsilon", 1e-12),
    ("hidden_dropout_prob", "dropout", 0.1),
)
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ATTENTION = "hcmen"
"""The name of `_attention` among those of transformers."""


class TextEncoder(nn.Module):
    """Tokens [batch, 3, time] to features [batch, time, hidden], zero beyond each sample's tokens.

    With `frozen` it has no gradients and no dropout, whatever mode the model around it is in.

    Raises:
        BackendError: `transformers` is not installed.
    """

    def __init__(self, config: TextEncoderConfig, hidden: int) -> None:
        super().__init__()
        transformers = _transformers()
        self.frozen = False
        sizes = {theirs: getattr(config, ours) for theirs, ours, _ in _SIZES}
        self.bert = transformers.BertModel(
            transformers.BertConfig(
                **sizes,
                hidden_size=hidden,
                attention_probs_dropout_prob=config.dropout,
                attn_implementation=_ATTENTION,
            ),
            add_pooling_layer=False,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        """Features float [batch, time, hidden] for tokens int64 [batch, 3, time]."""
        plain = torch.compiler.is_compiling() or tokens.device.type != "cpu"
        return self._padded(tokens) if plain else self._packed(tokens)

    def _packed(self, tokens: Tensor) -> Tensor:
        """As `_padded`, without computing what is padding; rows are ordered by their length for the attention."""
        batch, _, time = tokens.shape
        lengths, order = tokens[:, 1].sum(dim=1).sort(stable=True)
        ids, mask, types = tokens[order].unbind(dim=1)
        real = mask.bool()
        features = torch.zeros(batch * time, self.bert.config.hidden_size, dtype=self.bert.dtype)
        if not real.any():
            return features.view(batch, time, -1)
        steps = torch.arange(time)
        hidden = self.bert(
            input_ids=ids[real][None],
            token_type_ids=types[real][None],
            position_ids=steps.expand(batch, time)[real][None],
            alike=[(n, rows) for n, rows in zip(*_counts(lengths), strict=True) if n],
        ).last_hidden_state[0]
        places = (order[:, None] * time + steps)[real]
        return features.index_copy(0, places, hidden.to(features.dtype)).view(batch, time, -1)

    def _padded(self, tokens: Tensor) -> Tensor:
        ids, mask, types = tokens.unbind(dim=1)
        real = mask[..., None].to(self.bert.dtype)
        # A mask of four axes is added to the attention scores as it is.
        added = (1.0 - real.transpose(1, 2)[:, None]) * MASKED
        hidden = self.bert(input_ids=ids, attention_mask=added, token_type_ids=types).last_hidden_state
        return hidden * real

    def freeze(self) -> None:
        """Takes the encoder out of the training."""
        self.frozen = True
        self.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> TextEncoder:
        """As nn.Module.train; a frozen encoder stays in evaluation mode."""
        return super().train(mode and not self.frozen)


def _counts(lengths: Tensor) -> tuple[list[int], list[int]]:
    """The lengths that occur, in order, and how many rows have each."""
    found, rows = torch.unique_consecutive(lengths, return_counts=True)
    return found.tolist(), rows.tolist()


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    alike: Sequence[tuple[int, int]] | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention in its plain formula, of [batch, heads, time, size] to [batch, time, heads, size].

    Fused attention is traced into more nodes, which check for rows without any token. On a CPU it is no faster here.

    Args:
        module, scaling, dropout: the layer, the factor of the scores, the share of weights that are dropped.
        query, key, value: what attends, and to what.
        mask: added to the scores; None where every token counts.
        alike: (length, rows) of the texts that stand one behind the other along time, where they do.
    """
    if alike is not None:
        lengths = [length * rows for length, rows in alike]
        parts = zip(alike, *(x[0].split(lengths, dim=1) for x in (query, key, value)), strict=True)
        made = [
            _attention(module, *(_apart(x, length) for x in of_these), None, scaling, dropout)[0].flatten(0, 1)
            for (length, _), *of_these in parts
        ]
        return torch.cat(made)[None], None
    scores = query @ key.transpose(2, 3) * scaling
    if mask is not None:
        scores = scores + mask
    weights = nn.functional.dropout(scores.softmax(dim=-1), dropout, module.training)
    return (weights @ value).transpose(1, 2).contiguous(), None


def _apart(x: Tensor, length: int) -> Tensor:
    """[heads, rows * length, size] as [rows, heads, length, size]."""
    return x.unflatten(1, (-1, length)).transpose(0, 1)


def read_sizes(folder: Path) -> tuple[TextEncoderConfig, int]:
    """The encoder in `folder`, and its hidden size.

    Raises:
        InputError: no such folder, no config.json or vocabulary in it, or a model other than BERT.
        CorruptFileError: config.json or the vocabulary is damaged.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected a BERT with config.json, weights and vocabulary")
    path = folder / "config.json"
    if not path.exists():
        raise InputError(f"{folder}: has no config.json, expected a folder that BertModel.save_pretrained wrote")
    found = read_json(path, "copy the folder again")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if kind != "bert":
        raise InputError(
            f"model_type is {shown(kind)}",
            "'bert', the one architecture that is served",
            "choose a BERT, such as bert-base-uncased, bert-base-chinese or all-MiniLM-L6-v2",
            where=str(path),
        )
    position = found.get("position_embedding_type", "absolute")
    if position != "absolute" or found.get("is_decoder"):
        raise InputError(f"{path}: expected a bidirectional BERT with absolute positions: choose another")
    unknown = folder_tokenizer(folder).token_to_id(UNKNOWN)
    hidden = found.get("hidden_size", 768)
    if type(hidden) is not int or not 1 <= hidden <= MOST_FEATURES:
        raise InputError(f"{path}: hidden_size is {shown(hidden)}, expected a whole number from 1 to {MOST_FEATURES}")
    sizes = {ours: found.get(theirs, default) for theirs, ours, default in _SIZES}
    try:
        return TextEncoderConfig.from_json({**sizes, "unknown_token": unknown}), hidden
    except InputError as error:
        raise InputError(f"{path}: {error}: expected the sizes of a BERT") from error


def read_weights(encoder: TextEncoder, folder: Path) -> dict[str, Tensor]:
    """The weights in `folder` that `encoder` takes, those of heads left aside; `encoder` may be on the meta device.

    Raises:
        InputError: no weights there, or not those of a BERT of these sizes.
        CorruptFileError: the file is damaged or holds anything but tensors.
    """
    wanted = encoder.bert.state_dict()
    found = {own: x for name, x in _read_weights(folder).items() if (own := _own_name(name)) in wanted}
    # Position numbers, which some versions store, are no weights.
    missing = [name for name in wanted if name not in found and not name.endswith("position_ids")]
    if missing:
        raise InputError(
            f"{folder}: the weights lack '{missing[0]}' and {len(missing) - 1} more, expected those of a BERT of the "
            "sizes in config.json: copy the whole folder"
        )
    for name, got in found.items():
        x = wanted[name]
        if got.shape != x.shape:
            raise InputError(
                f"{folder}: weight '{name}' has shape {list(got.shape)}, config.json asks for {list(x.shape)}: "
                "weights and config.json belong to different models"
            )
        if got.layout != torch.strided or (got.is_floating_point() and not bool(torch.isfinite(got).all())):
            raise CorruptFileError(f"{folder}: weight '{name}' holds NaN or infinity: choose another BERT")
    return found


def load_weights(encoder: TextEncoder, weights: Mapping[str, Tensor]) -> None:
    """Gives `encoder` what `read_weights` read for it."""
    encoder.bert.load_state_dict(weights, strict=False)


def read_tokenizer(folder: Path) -> bytes:
    """The vocabulary in `folder` as the content of a tokenizer.json, made from vocab.txt where there is none.

    Raises: as `hcmen.media.encoder_folder.folder_tokenizer`.
    """
    return bytes(folder_tokenizer(folder).to_str(), "utf-8")


def _read_weights(folder: Path) -> dict[str, Tensor]:
    import safetensors.torch

    for name in _WEIGHTS:
        path = folder / name
        if not os.path.lexists(path):
            continue
        with refused(path, "the weights of a BERT"):
            file = open_regular(path)
        try:
            with file:
                if name.endswith(".safetensors"):
                    read_header(file)
                    file.seek(0)
                    return safetensors.torch.load(file.read(os.fstat(file.fileno()).st_size))
                if zipfile.is_zipfile(file):
                    with zipfile.ZipFile(file) as parts:
                        if sum(part.file_size for part in parts.infolist()) > os.fstat(file.fileno()).st_size:
                            raise ValueError("it is compressed")
                file.seek(0)
                tensors = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(x, Tensor) for x in tensors.values()):
                raise ValueError("it is no dictionary of tensors")
            return tensors
        except InputError:
            raise
        except Exception as error:  # torch.load and safetensors raise some ten kinds
            reason = reason_of(error, 100)
            raise CorruptFileError(f"{path}: truncated or no weights ({reason}): copy the folder again") from error
    if (folder / "model.safetensors.index.json").is_file():
        raise InputError(
            f"{folder}: the weights are in several files, expected one: save it again with save_pretrained"
        )
    raise InputError(f"{folder}: has no weights, expected {' or '.join(_WEIGHTS)}: copy the whole folder")


def _own_name(name: str) -> str:
    """A BERT with a head on top has its encoder under "bert."; the oldest files call norms' weights gamma and beta."""
    name = name.removeprefix("bert.")
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def _transformers() -> Any:
    try:
        # On import it reports what is not installed beside it.
        with _quiet("transformers"):
            import transformers
    except ImportError as error:
        raise BackendError(
            f"{error.name} is not installed, and a text encoder needs it: pip install 'hcmen[text]'"
        ) from error
    transformers.AttentionInterface.register(_ATTENTION, _attention)
    return transformers


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
