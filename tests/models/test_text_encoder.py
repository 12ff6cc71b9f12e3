"""BERT inside the model: the same numbers as transformers' own, trained, dropped, exported and given raw words."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from helpers.command import run
from helpers.micro import MICRO
from helpers.tiny_bert import FIRST_WORD, vocabulary, write_bert

from hcmen.base.bundle import read_bundle
from hcmen.base.clip import Clip, batch_clips, clip_from_arrays, read_clip, write_clip
from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.library import library_path
from hcmen.base.modalities import VARIANTS, variant_named
from hcmen.data import Split, TextTokens, cut
from hcmen.data.convert import main as convert
from hcmen.data.mmsa import dataset_from_mmsa, read_mmsa
from hcmen.data.protocols import Setting, apply_setting, batches
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.evaluation.command import evaluate
from hcmen.export.bundle import export_bundle
from hcmen.export.commands.export import main as export
from hcmen.export.float16 import to_float16
from hcmen.export.weights import embedded_model
from hcmen.models.hcmen.config import ModelConfig
from hcmen.models.hcmen.model import HCMEN
from hcmen.models.text_encoder import TextEncoder, load_weights, read_sizes, read_tokenizer, read_weights
from hcmen.models.text_encoder_config import TextEncoderConfig
from hcmen.runtime import load
from hcmen.runtime.backends.tensorrt import TOLERANCES
from hcmen.runtime.commands.run import main as hcmen_run
from hcmen.runtime.golden import golden_test
from hcmen.training.command import main as hcmen_train
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import predict, predict_masked, texts_read
from hcmen.training.presets import PRESETS, Preset
from hcmen.training.trainer import Trainer

HIDDEN = 8
SAMPLES = (24, 12, 16)
TRAIN = TrainConfig(epochs=2, batch_size=10, learning_rate=1e-3, text_encoder_learning_rate=1e-4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT on disk; not to be changed."""
    return write_bert(tmp_path_factory.mktemp("bert") / "bert", HIDDEN)


@pytest.fixture(scope="module")
def config(bert: Path) -> ModelConfig:
    """The micro model with that BERT in it."""
    return dataclasses.replace(MICRO, text=FeatureConfig(HIDDEN, 12), text_encoder=read_sizes(bert)[0])


@pytest.fixture(scope="module")
def raw(config: ModelConfig) -> dict:
    return make_synthetic(config.inputs, SAMPLES, 0)


@pytest.fixture(scope="module")
def dataset(config: ModelConfig, raw: dict):
    return dataset_from_mmsa(raw, "synthetic", config.inputs)


@pytest.fixture(scope="module")
def trained(bert: Path, config: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder that the command made."""
    out = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        small(patch, config)
        outcome = run(hcmen_train, "--text-encoder", bert, "--out", out)
    assert outcome.code == 0, outcome.err
    return out


@pytest.fixture(scope="module")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle of that checkpoint."""
    bundle = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(trained, bundle)
    return bundle


def small(patch: pytest.MonkeyPatch, config: ModelConfig) -> None:
    """Makes the default preset the micro model, without its encoder."""
    preset = Preset("tiny", "for tests", dataclasses.replace(config, text_encoder=None), TRAIN)
    patch.setattr("hcmen.training.command.preset_named", lambda name: preset)
    patch.setattr("hcmen.data.synthetic.SAMPLES", {"tiny": SAMPLES})


def some_tokens(config: ModelConfig, lengths: list[int], steps: int, seed: int = 0) -> torch.Tensor:
    """Random tokens [len(lengths), 3, steps], zero beyond the lengths."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((len(lengths), 3, steps), np.int64)
    for row, n in zip(tokens, lengths, strict=True):
        row[0, :n] = rng.integers(config.text_encoder.vocabulary, size=n)
        row[1, :n] = 1
        row[2, :n] = rng.integers(config.text_encoder.token_types, size=n)
    return torch.from_numpy(tokens)


# --- the encoder ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 7, 12])
def test_features_are_those_of_transformers(bert: Path, config: ModelConfig, steps: int):
    from transformers import BertModel

    theirs = BertModel.from_pretrained(bert, add_pooling_layer=False).eval()
    ours = TextEncoder(config.text_encoder, HIDDEN).eval()
    load_weights(ours, read_weights(ours, bert))
    lengths = [steps, max(1, steps // 2), 1]
    tokens = some_tokens(config, lengths, steps)
    with torch.inference_mode():
        got = ours(tokens)
        expected = theirs(
            input_ids=tokens[:, 0], attention_mask=tokens[:, 1], token_type_ids=tokens[:, 2]
        ).last_hidden_state
    for row, n in enumerate(lengths):
        torch.testing.assert_close(got[row, :n], expected[row, :n], atol=2e-6, rtol=1e-5)
        assert not got[row, n:].any()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("lengths", [[7, 12, 1, 7, 3], [12, 12], [5], [0, 4, 0], [0, 0]])
def test_without_its_padding_a_batch_has_the_same_features_and_gradients(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, lengths: list[int], autocast: bool
):
    torch.manual_seed(0)
    encoder = TextEncoder(dataclasses.replace(config.text_encoder, dropout=0.0), HIDDEN)
    tokens = some_tokens(config, lengths, 12)
    weights = torch.randn(len(lengths), 12, HIDDEN)
    found = []
    for forward in (encoder.forward, encoder._padded):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            features = forward(tokens)
        gradients = [torch.zeros(())] * 2
        if any(lengths):
            loss = (features * weights).sum()
            gradients = torch.autograd.grad(loss, list(encoder.parameters()))
        found.append((features, *gradients))
    bound = 3e-2 if autocast else 1e-5
    for got, expected in zip(*found, strict=True):
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(
            got, expected, atol=bound * max(1.0, float(expected.detach().abs().max())), rtol=bound
        )
    # And no layer sees more tokens than there are.
    seen = []
    encoder.bert.embeddings.register_forward_hook(lambda module, inputs, output: seen.append(output[..., 0].numel()))
    encoder(tokens)
    assert seen == ([sum(lengths)] if any(lengths) else [])


def test_dropout_is_drawn_again_at_every_call_of_the_training_alone(config: ModelConfig):
    torch.manual_seed(0)
    encoder = TextEncoder(dataclasses.replace(config.text_encoder, dropout=0.5), HIDDEN)
    tokens = some_tokens(config, [7, 12, 7], 12)
    assert not torch.equal(encoder(tokens), encoder(tokens))
    attention = encoder.bert.encoder.layer[0].attention.self
    states = torch.randn(1, 14, HIDDEN)
    same = [(7, 2)]
    assert not torch.equal(attention(states, alike=same)[0], attention(states, alike=same)[0])
    encoder.eval()
    assert torch.equal(encoder(tokens), encoder(tokens))


@pytest.mark.parametrize("kind", ["head", "gamma and beta", "pickle"])
def test_weights_are_found_under_every_name_in_use(bert: Path, config: ModelConfig, tmp_path: Path, kind: str):
    folder = Path(shutil.copytree(bert, tmp_path / "bert"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    if kind == "head":
        tensors = {f"bert.{name}": x for name, x in tensors.items()} | {"cls.predictions.bias": torch.zeros(3)}
    elif kind == "gamma and beta":
        tensors = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): x
            for name, x in tensors.items()
        }
        assert any("gamma" in name for name in tensors)
    if kind == "pickle":
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    original, got = (TextEncoder(config.text_encoder, HIDDEN).eval() for _ in range(2))
    load_weights(original, read_weights(original, bert))
    load_weights(got, read_weights(got, folder))
    tokens = some_tokens(config, [5], 5)
    with torch.inference_mode():
        assert torch.equal(got(tokens), original(tokens))


def test_a_score_depends_neither_on_padding_nor_on_the_batch(config: ModelConfig):
    torch.manual_seed(0)
    model = HCMEN(config).eval()
    tokens = some_tokens(config, [7, 12, 1], 12)
    lengths = torch.tensor([7, 12, 1])
    with torch.inference_mode():
        together = model({"text": tokens}, {"text": lengths}).score
        for row, n in enumerate(lengths.tolist()):
            alone = model({"text": tokens[row : row + 1, :, :n]}, {"text": lengths[row : row + 1]}).score
            assert math.isclose(float(alone), float(together[row]), rel_tol=1e-5, abs_tol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(2, 3, 5, dtype=torch.int32), "torch.int32"),
        (torch.zeros(2, 2, 5, dtype=torch.int64), r"\[2, 2, 5\]"),
        (torch.zeros(2, 3, 0, dtype=torch.int64), r"\[2, 3, 0\]"),
        (torch.zeros(3, 5, dtype=torch.int64), r"\[3, 5\]"),
    ],
)
def test_tokens_of_another_shape_are_refused(config: ModelConfig, tokens: torch.Tensor, words: str):
    with pytest.raises(InputError, match=words):
        HCMEN(config)({"text": tokens}, {"text": torch.tensor([5, 5])})


# --- the folder -----------------------------------------------------------------------------------------------------


def edited(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def removed(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def written(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(content)


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def hostile(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/hcmen-hostile'\ntR.")


def without_a_layer(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file({n: x for n, x in tensors.items() if "layer.1." not in n}, path)


def infinite(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["embeddings.word_embeddings.weight"][5, 1] = torch.inf
    safetensors.torch.save_file(tensors, path)


BAD = {
    "no weights": (removed("model.safetensors"), 2, "has no weights, expected model.safetensors or"),
    "no config": (removed("config.json"), 2, "has no config.json"),
    "no vocabulary": (removed("vocab.txt"), 2, "has no tokenizer.json and no vocab.txt"),
    "config is no JSON": (written("config.json", b"{"), 5, "not valid JSON"),
    "config is a list": (written("config.json", b"[]"), 2, "model_type is None"),
    **{
        kind: (edited(model_type=kind), 2, f"model_type is '{kind}', expected 'bert', the one architecture that is")
        for kind in ("roberta", "distilbert", "mpnet")
    },
    "relative positions": (edited(position_embedding_type="relative_key"), 2, "absolute positions"),
    "hidden size of another preset": (edited(hidden_size=16), 2, "hidden size is 16, preset tiny expects 8"),
    "hidden size that is no number": (edited(hidden_size="8"), 2, "hidden_size is '8'"),
    "a size that is no number": (edited(num_hidden_layers=2.5), 2, "text_encoder.layers"),
    "an unknown activation": (edited(hidden_act="swish9"), 2, "activation is 'swish9'"),
    "weights of other sizes": (edited(intermediate_size=24), 2, "belong to different models"),
    "weights of fewer layers": (without_a_layer, 2, "the weights lack"),
    "truncated weights": (truncated, 5, "truncated or no weights"),
    "empty weights": (written("model.safetensors", b""), 5, "truncated or no weights"),
    "infinite weights": (infinite, 5, "NaN or infinity"),
    "a hostile pickle": (hostile, 5, "truncated or no weights"),
    "a vocabulary without [UNK]": (written("vocab.txt", b"[PAD]\n[CLS]\n[SEP]\nword\n"), 2, "[UNK]"),
    "a tokenizer that is none": (written("tokenizer.json", b"{}"), 5, "no tokenizer of a BERT"),
    "too few positions": (edited(max_position_embeddings=11), 2, "at most the 11 positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_gets_one_line_and_nothing_is_written(
    bert: Path, config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    spoil, code, words = BAD[name]
    folder = Path(shutil.copytree(bert, tmp_path / "bert"))
    spoil(folder)
    small(monkeypatch, config)
    outcome = run(hcmen_train, "--text-encoder", folder, "--out", tmp_path / "out", "-q")
    assert outcome.code == code, outcome.err
    assert len(outcome.lines) == 1
    assert words in outcome.lines[0]
    assert not any((tmp_path / "out").iterdir())
    assert not Path("/tmp/hcmen-hostile").exists()


def test_a_folder_that_is_not_there(tmp_path: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch):
    small(monkeypatch, config)
    outcome = run(hcmen_train, "--text-encoder", tmp_path / "none", "--out", tmp_path / "out", "-q")
    assert outcome.code == 2
    assert "no such folder" in outcome.err


def test_its_learning_rate_alone_is_refused(tmp_path: Path):
    outcome = run(hcmen_train, "--text-encoder-learning-rate", "1e-5", "--out", tmp_path / "out")
    assert outcome.code == 2
    assert "--text-encoder" in outcome.err


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_a_missing_package_is_named(bert: Path, config: ModelConfig, monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    extra = "text" if package == "transformers" else "words"
    with pytest.raises(BackendError, match=rf"{package} is not installed.*hcmen\[{extra}\]"):
        TextEncoder(config.text_encoder, HIDDEN) if package == "transformers" else read_tokenizer(bert)


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": 0},
        {"heads": 3},
        {"unknown_token": 99999},
        {"dropout": 1.0},
        {"norm_epsilon": 0.0},
        {"norm_epsilon": float("nan")},
        {"positions": 2},
    ],
)
def test_sizes_that_no_encoder_has_are_refused(config: ModelConfig, change: dict):
    with pytest.raises(InputError, match=next(iter(change)) if change != {"positions": 2} else "max_steps"):
        dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, **change))


def test_the_configuration_survives_json(config: ModelConfig):
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    with pytest.raises(InputError, match=r"text_encoder\.vocabulry"):
        ModelConfig.from_json({**config.to_json(), "text_encoder": {"vocabulry": 3}})
    with pytest.raises(InputError, match="text_encoder"):
        ModelConfig.from_json({**config.to_json(), "text_encoder": "bert"})


# --- data -----------------------------------------------------------------------------------------------------------


def test_the_tokens_of_the_file_are_the_input(config: ModelConfig, raw: dict, dataset):
    for name, split in dataset.splits.items():
        stored = raw[name]["text_bert"]
        assert np.array_equal(split.text_tokens.ids, stored)
        assert split.text_tokens.unknown == 100
        assert np.array_equal(split.lengths["text"], stored[:, 1].sum(axis=1))
    assert (
        dataset_from_mmsa(raw, "x", dataclasses.replace(config, text_encoder=None).inputs).splits["test"].text_tokens
        is None
    )


def test_a_dropped_word_becomes_unknown_and_nothing_else_changes():
    ids = np.array([[[101, 7, 8, 9, 102, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]])
    features = {"text": np.zeros((1, 6, 2), np.float32)}
    split = Split(features, {"text": np.array([5])}, np.zeros(1, np.float32), ["a"], TextTokens(ids, 100))
    keep = np.array([[True, False, True, False, True, False]])
    got = split.model_input("text", np.array([0]), 6, keep)
    assert got.tolist() == [[[101, 100, 8, 100, 102, 0], [1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]]
    assert split.model_input("text", slice(0, 1), 3).tolist() == [[[101, 7, 8], [1, 1, 1], [0, 0, 1]]]
    assert split.text_tokens.ids[0, 0, 1] == 7


def test_the_protocol_drops_words_and_keeps_the_ends(dataset):
    split = dataset.splits["test"]
    masks = apply_setting(Setting("r=0.9", rates=(0.9, 0.0, 0.0)), split, 3)
    dropped = 0
    for batch in batches(split, masks, 5):
        stored = split.text_tokens.ids[batch.rows]
        got = batch.features["text"]
        for row, n, tokens, index in zip(got, batch.lengths["text"], stored, batch.rows, strict=True):
            assert row[0, 0] == 101
            assert row[0, n - 1] == 102
            assert not row[:, n:].any()
            assert np.array_equal(row[1:], tokens[1:, : row.shape[1]])
            changed = row[0, :n] != tokens[0, :n]
            assert set(row[0, :n][changed]) <= {100}
            assert np.array_equal(~changed, masks.keep["text"][index, :n])
            dropped += changed.sum()
    assert dropped > len(split)


def stored(spoil: Callable[[np.ndarray], object], dtype: type = np.int64) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        tokens = data["valid"]["text_bert"].astype(dtype)
        spoil(tokens)
        data["valid"]["text_bert"] = tokens

    return change


BAD_TOKENS = {
    "a word of a larger vocabulary": (stored(lambda t: t.__setitem__((3, 0, 1), 2000)), "token 2000 of sample 3"),
    "a negative word": (stored(lambda t: t.__setitem__((3, 0, 1), -1)), "token -1 of sample 3"),
    "an unknown type": (stored(lambda t: t.__setitem__((1, 2, 2), 2)), "token type 2 of sample 1"),
    "a mask with a hole": (stored(lambda t: t.__setitem__((2, 1, 3), 0)), "attention mask of sample 2"),
    "a mask of twos": (stored(lambda t: t.__setitem__((2, 1, 0), 2)), "attention mask of sample 2"),
    "halves": (stored(lambda t: t.__setitem__((0, 0, 1), 1000.5), np.float64), "not whole"),
    "NaN": (stored(lambda t: t.__setitem__((0, 0, 1), np.nan), np.float32), "not whole"),
    "none in one split": (
        lambda data: data["valid"].pop("text_bert"),
        "valid: lacks 'text_bert'",
    ),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_tokens_of_another_kind_are_refused(config: ModelConfig, name: str):
    change, words = BAD_TOKENS[name]
    data = make_synthetic(config.inputs, SAMPLES, 0)
    change(data)
    with pytest.raises(InputError, match=words) as caught:
        dataset_from_mmsa(data, "file", config.inputs)
    assert "valid" in str(caught.value)


def test_data_without_tokens_is_none_for_a_text_encoder(config: ModelConfig):
    data = make_synthetic(config.inputs, SAMPLES, 0)
    for split in data.values():
        del split["text_bert"]
    with pytest.raises(InputError, match="train: lacks 'text_bert'"):
        dataset_from_mmsa(data, "file", config.inputs)


def test_tokens_stored_as_floats_and_an_empty_text_are_read(config: ModelConfig, raw: dict):
    data = make_synthetic(config.inputs, SAMPLES, 0)
    tokens = data["test"]["text_bert"].astype(np.float32)
    tokens[4] = 0
    data["test"]["text_bert"] = tokens
    split = dataset_from_mmsa(data, "file", config.inputs).splits["test"]
    others = [i for i in range(SAMPLES[2]) if i != 4]
    assert np.array_equal(split.text_tokens.ids[others], raw["test"]["text_bert"][others])
    assert split.text_tokens.ids[4, 1].tolist() == [1] + [0] * 11
    assert split.lengths["text"][4] == 1


def test_a_converted_folder_keeps_the_tokens(config: ModelConfig, raw: dict, tmp_path: Path):
    write_synthetic(tmp_path / "data.pkl", raw)
    assert run(convert, tmp_path / "data.pkl", tmp_path / "folder").code == 0
    there = read_mmsa(tmp_path / "folder", config.inputs)
    for name, split in read_mmsa(tmp_path / "data.pkl", config.inputs).splits.items():
        assert np.array_equal(there.splits[name].text_tokens.ids, split.text_tokens.ids)
        assert np.array_equal(there.splits[name].lengths["text"], split.lengths["text"])
    (tmp_path / "folder/test/text_bert.npy").unlink()
    with pytest.raises(CorruptFileError, match=r"text_bert\.npy"):
        read_mmsa(tmp_path / "folder", config.inputs)


def test_a_file_without_tokens_still_converts_and_is_refused_for_an_encoder(config: ModelConfig, tmp_path: Path):
    data = make_synthetic(config.inputs, SAMPLES, 0)
    for split in data.values():
        split.pop("text_bert")
    write_synthetic(tmp_path / "data.pkl", data)
    assert run(convert, tmp_path / "data.pkl", tmp_path / "folder").code == 0
    read_mmsa(tmp_path / "folder", dataclasses.replace(config, text_encoder=None).inputs)
    with pytest.raises(InputError, match="lacks 'text_bert'"):
        read_mmsa(tmp_path / "folder", config.inputs)


# --- clips ----------------------------------------------------------------------------------------------------------

GOOD = np.array([[101, 1000, 102], [1, 1, 1], [0, 0, 0]])
BAD_CLIPS = {
    "floats": (GOOD.astype(np.float32), "dtype float32"),
    "unsigned 64 bit": (GOOD.astype(np.uint64), "dtype uint64"),
    "booleans": (GOOD.astype(bool), "dtype bool"),
    "two rows": (GOOD[:2], r"shape \[2, 3\]"),
    "a batch": (GOOD[None], r"shape \[1, 3, 3\]"),
    "no step": (GOOD[:, :0], "no time step"),
    "too long": (np.tile(GOOD, 5), "15 steps, expected at most 12"),
    "an id too large": (np.where(GOOD == 1000, 5000, GOOD), "token id 5000 at step 1"),
    "a negative id": (np.where(GOOD == 1000, -1, GOOD), "token id -1 at step 1"),
    "a type too large": (np.array([[101, 102], [1, 1], [0, 2]]), "token type 2 at step 1"),
    "padding": (np.array([[101, 102, 0], [1, 1, 0], [0, 0, 0]]), "not all ones"),
}


@pytest.mark.parametrize("name", BAD_CLIPS)
def test_a_clip_with_bad_tokens_is_refused_from_memory_and_from_a_file(config: ModelConfig, tmp_path: Path, name: str):
    tokens, words = BAD_CLIPS[name]
    with pytest.raises(InputError, match=words):
        clip_from_arrays("clip", {"text_tokens": tokens}, config.inputs)
    np.savez(tmp_path / "clip.npz", text_tokens=tokens)
    with pytest.raises(InputError, match=words):
        read_clip(tmp_path / "clip.npz", config.inputs)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, ">i4"])
def test_a_clip_of_tokens_is_read(config: ModelConfig, tmp_path: Path, dtype):
    tokens = np.minimum(GOOD, 200)
    np.savez(tmp_path / "clip.npz", text_tokens=tokens.astype(dtype), audio=np.ones((2, 3)))
    clip = read_clip(tmp_path / "clip.npz", config.inputs)
    assert clip.text_tokens.dtype == np.int64
    assert np.array_equal(clip.text_tokens, tokens)
    assert clip.variant.name == "vision_missing"


def test_of_two_texts_the_model_takes_its_own(config: ModelConfig, tmp_path: Path):
    arrays = {"text": np.ones((3, HIDDEN), np.float32), "text_tokens": GOOD}
    write_clip(tmp_path / "clip.npz", arrays)
    assert read_clip(tmp_path / "clip.npz", config.inputs).ignored == ("text",)
    plain = dataclasses.replace(config, text_encoder=None)
    assert read_clip(tmp_path / "clip.npz", plain.inputs).ignored == ("text_tokens",)
    with pytest.raises(InputError, match="only text features are present"):
        clip_from_arrays("clip", {"text": arrays["text"]}, config.inputs)


def test_tokens_are_batched_with_their_mask():
    clips = [Clip("a", {}, text_tokens=GOOD), Clip("b", {}, text_tokens=GOOD[:, [0, 2]])]
    inputs = batch_clips(clips)
    assert list(inputs) == ["text_tokens"]
    assert inputs["text_tokens"][1].tolist() == [[101, 102, 0], [1, 1, 0], [0, 0, 0]]
    with pytest.raises(InputError, match="c: text_tokens is missing"):
        batch_clips([*clips, Clip("c", {"text": np.zeros((2, 3), np.float32)})])


def test_clips_of_tokens_are_cut_from_a_file(config: ModelConfig, raw: dict, tmp_path: Path):
    write_synthetic(tmp_path / "data.pkl", raw)
    out = tmp_path / "clip.npz"
    outcome = run(cut.main, tmp_path / "data.pkl", "--index", 5, "--text", "tokens", "-o", out)
    assert outcome.code == 0, outcome.err
    clip = read_clip(out, config.inputs)
    n = int(raw["test"]["text_bert"][5, 1].sum())
    assert np.array_equal(clip.text_tokens, raw["test"]["text_bert"][5, :, :n])
    assert set(clip.features) == {"audio", "vision"}


# --- training -------------------------------------------------------------------------------------------------------


def weights_of(model: HCMEN) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.text_encoder.named_parameters()}


def test_a_frozen_encoder_stays_as_it_came(bert: Path, config: ModelConfig, dataset, tmp_path: Path):
    train = dataclasses.replace(TRAIN, text_encoder_learning_rate=0.0, epochs=1)
    trainer = Trainer(config, train, dataset, tmp_path, text_encoder=bert)
    before = weights_of(trainer.model)
    pretrained = safetensors.torch.load_file(bert / "model.safetensors")
    assert all(torch.equal(x, pretrained[name.removeprefix("bert.")]) for name, x in before.items())
    trainer.model.train()
    assert not any(module.training for module in trainer.model.text_encoder.modules())
    trainer.run()
    after = weights_of(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_frozen_encoder_reads_each_text_once_and_the_run_is_the_same(
    bert: Path, config: ModelConfig, dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    train = dataclasses.replace(TRAIN, text_encoder_learning_rate=0.0, epochs=3, step_drop_probability=0.0)
    read: list[int] = []
    forward = TextEncoder.forward

    def counted(self: TextEncoder, tokens: torch.Tensor) -> torch.Tensor:
        read.append(len(tokens))
        return forward(self, tokens)

    monkeypatch.setattr(TextEncoder, "forward", counted)
    found = {}
    for name, most in (("once", 1 << 30), ("always", 0)):
        monkeypatch.setattr("hcmen.training.evaluate._MOST_READ", most)
        (tmp_path / name).mkdir()
        trainer = Trainer(config, train, dataset, tmp_path / name, text_encoder=bert)
        trainer.run()
        found[name] = trainer.history, sum(read)
        read.clear()
    texts = len(dataset.splits["train"]) + len(dataset.splits["valid"])
    assert found["once"][1] == texts
    assert found["always"][1] > 6 * texts  # two views in training, four variants with text in validation
    for once, always in zip(found["once"][0], found["always"][0], strict=True):
        assert once["loss"] == pytest.approx(always["loss"], rel=1e-3)
        assert once["validation"] == pytest.approx(always["validation"], rel=1e-3)


@pytest.mark.parametrize("setting", [{"step_drop_probability": 0.5}, {"text_encoder_learning_rate": 1e-4}])
def test_what_is_not_the_same_in_each_epoch_is_read_again(
    bert: Path, config: ModelConfig, dataset, tmp_path: Path, setting: dict
):
    train = dataclasses.replace(
        TRAIN, **{"text_encoder_learning_rate": 0.0, "epochs": 1, "step_drop_probability": 0.0} | setting
    )
    trainer = Trainer(config, train, dataset, tmp_path, text_encoder=bert)
    trainer.run()
    assert all(split.text_tokens.outputs is None for split in trainer._splits.values())


def test_texts_that_were_read_are_what_the_encoder_says(config: ModelConfig, dataset):
    split, encoder = dataset.splits["valid"], TextEncoder(config.text_encoder, config.text.features).eval()
    made = texts_read(encoder, split, batch_size=3)
    steps = split.steps["text"]
    with torch.inference_mode():
        expected = encoder(torch.from_numpy(split.text_tokens.ids)).numpy()
    assert np.allclose(made.model_input("text", slice(None), steps), expected, atol=1e-5)
    rows = np.array([4, 1])
    assert np.allclose(made.model_input("text", rows, steps), expected[rows], atol=1e-5)
    assert np.allclose(made.rows(slice(2, 5)).model_input("text", slice(None), steps), expected[2:5], atol=1e-5)
    assert np.allclose(made.model_input("text", rows, 3), expected[rows, :3], atol=1e-5)
    keep = np.arange(steps) < split.lengths["text"][rows][:, None]
    assert made.model_input("text", rows, steps, keep).dtype == np.float32
    with pytest.raises(AssertionError, match="dropped"):
        made.model_input("text", rows, steps, keep & (np.arange(steps) != 1))


def test_the_encoder_learns_at_its_own_rate(bert: Path, config: ModelConfig, dataset, tmp_path: Path):
    # The first step of AdamW moves a weight by its learning rate at most, and about that wherever a gradient is.
    train = dataclasses.replace(
        TRAIN, epochs=1, batch_size=24, warmup_fraction=0.0, weight_decay=0.0, text_encoder_learning_rate=1e-5
    )
    trainer = Trainer(config, train, dataset, tmp_path, text_encoder=bert)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in trainer.model.named_parameters()}
    own = max(x for name, x in moved.items() if name.startswith("text_encoder."))
    rest = max(x for name, x in moved.items() if not name.startswith("text_encoder."))
    assert own == pytest.approx(1e-5, rel=0.02)
    assert rest == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("mix", ["none", "mixup", "manifold"])
def test_a_resumed_run_is_the_same_run(bert: Path, config: ModelConfig, dataset, tmp_path: Path, mix: str):
    train = dataclasses.replace(TRAIN, mix=mix)
    whole = Trainer(config, train, dataset, tmp_path / "whole", text_encoder=bert)
    for folder in ("whole", "parts"):
        (tmp_path / folder).mkdir()
    whole.run()
    first = Trainer(config, train, dataset, tmp_path / "parts", text_encoder=bert)
    with pytest.raises(KeyboardInterrupt):
        first.run(on_epoch=interrupt)
    # What the encoder started from is not needed any more.
    second = Trainer(config, train, dataset, tmp_path / "parts")
    second.resume()
    second.run()
    for name, x in whole.model.state_dict().items():
        assert torch.equal(x, second.model.state_dict()[name]), name


def interrupt(record: dict) -> None:
    raise KeyboardInterrupt


def test_resuming_with_another_encoder_is_refused(trained: Path, bert: Path, tmp_path: Path):
    outcome = run(hcmen_train, "--resume", "--out", trained, "--text-encoder", tmp_path)
    assert outcome.code == 2
    assert "--text-encoder" in outcome.err


# --- export and runtime ---------------------------------------------------------------------------------------------


def test_graphs_with_text_have_the_encoder_and_the_others_have_nothing_of_it(trained: Path, exported: Path):
    encoder = {
        name: x
        for name, x in safetensors.torch.load_file(trained / "checkpoint.safetensors").items()
        if "bert." in name
    }
    embeddings = encoder["text_encoder.bert.embeddings.word_embeddings.weight"]
    bundle = read_bundle(exported)
    for v in VARIANTS:
        proto = onnx.load(bundle.path / bundle.manifest.variants[v.name].graph.file, load_external_data=False)
        inputs = {i.name for i in proto.graph.input}
        shapes = [tuple(t.dims) for t in proto.graph.initializer]
        if "text" in v.present:
            assert {"text_tokens"} <= inputs
            assert shapes.count(tuple(embeddings.shape)) == 1
        else:
            assert not any("text" in name for name in inputs)
            assert tuple(embeddings.shape) not in shapes
            assert not any(node.op_type == "Erf" for node in proto.graph.node)
        assert not any(name == "text" or name == "text_length" for name in inputs)
        assert bundle.manifest.variants[v.name].parity["passed"] is True


def test_the_encoder_is_on_disk_once(trained: Path, exported: Path):
    checkpoint = (trained / "checkpoint.safetensors").stat().st_size
    assert (exported / "weights.bin").stat().st_size < 1.05 * checkpoint


def test_every_protocol_scores_alike_from_checkpoint_and_bundle(trained: Path, exported: Path):
    eager = evaluate([trained], protocols=["intra", "fixed"])
    device = evaluate([trained], exported, protocols=["intra", "fixed"])
    for one, other in zip(rows_of(eager), rows_of(device), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def rows_of(report: dict) -> list[float]:
    """Every MAE in a report, in order."""
    found: list[float] = []

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for key, x in value.items():
                if key == "mae" and isinstance(x, dict) and "mean" in x:
                    found.append(x["mean"])
                else:
                    walk(x)
        elif isinstance(value, list):
            for x in value:
                walk(x)

    walk(report)
    assert len(found) > 10
    return found


def test_dropped_words_change_what_the_model_hears(trained: Path, dataset):
    from hcmen.training.checkpoint import load_checkpoint

    model, _ = load_checkpoint(trained)
    split = dataset.splits["test"]
    clean = predict(model, split, variant_named("text_only"))
    hidden = apply_setting(Setting("r", rates=(0.9, 0.0, 0.0), present=(True, False, False)), split, 0)
    assert not np.allclose(predict_masked(model, split, hidden), clean, atol=1e-4)


def test_words_are_scored_as_their_tokens(exported: Path):
    model = load(exported)
    words = "truly very the film good bad"
    known = vocabulary()
    ids = [101, *(known.index(word) for word in words.split()), 102]
    tokens = np.array([ids, [1] * len(ids), [0] * len(ids)])
    assert min(ids[1:-1]) >= FIRST_WORD
    assert np.array_equal(model.encode(words).tokens, tokens)
    audio = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    for extra, variant in (({}, "text_only"), ({"audio": audio}, "vision_missing")):
        spoken = model({"text": words, **extra})
        assert spoken.variant == variant
        assert spoken.score == model({"text_tokens": tokens, **extra}).score


def test_words_with_times_are_encoded_window_by_window(exported: Path, config: ModelConfig):
    """Of more words than the model takes the last ones are kept; tokens with times are taken as they come."""
    model = load(exported)
    audio = np.random.default_rng(0).standard_normal((100, 3)).astype(np.float32)
    words = ["truly", "very", "the", "film", "good", "bad"] + ["film"] * 14
    times = [0.1, 0.2, 0.6, 0.7, 0.8, 1.2, *np.linspace(1.5, 1.99, 14).tolist()]
    stream = model.stream("auto", window="0.5", hop="0.5", rates={"audio": 20}, live=False)
    updates = stream.push(audio=audio[:40], text=words, text_times=times)
    spoken = ["truly very", "the film good", "bad", "film " * 10]
    for i, (update, text) in enumerate(zip(updates, spoken, strict=True)):
        result = model({"audio": audio[10 * i : 10 * i + 10], "text": text})
        assert (update.score, update.variant, update.cut) == (result.score, "vision_missing", 4 if i == 3 else 0)
        assert update.frames == {"text": len(text.split()) + 2, "audio": 10}
    stream.push(text="the film is good " * 10)
    (update,) = stream.push(audio=audio[40:50])
    assert (update.score, update.cut) == (model({"audio": audio[40:50], "text": "the film is good " * 10}).score, 30)
    tokens = some_tokens(config, [6], 6)[0].numpy()
    stream.push(text=tokens, text_times=[2.5, 2.6, 2.7, 2.99, 3.0, 3.4])
    for update, a, b in zip(stream.push(audio=audio[50:70]), (0, 4), (4, 6), strict=True):
        frames = audio[60:70] if a else audio[50:60]
        assert update.score == model({"audio": frames, "text_tokens": tokens[:, a:b]}).score
    stream.push(text=" ")
    (update,) = stream.push(audio=audio[70:80])
    assert update.variant == "audio_only"


SENTENCES = ["Truly the FILM is good", "a story, about one man!", "nothing known here", "good-bad", "  the \t film\n"]


@pytest.mark.parametrize("lower", [True, False])
def test_the_tokenizer_is_that_of_transformers(tmp_path: Path, lower: bool):
    from tokenizers import Tokenizer
    from transformers import BertTokenizer

    folder = write_bert(tmp_path / "bert", HIDDEN, lower=lower)
    theirs = BertTokenizer.from_pretrained(folder)
    ours = Tokenizer.from_str(read_tokenizer(folder).decode())
    for sentence in SENTENCES:
        assert ours.encode(sentence).ids == theirs(sentence)["input_ids"], sentence


def test_chinese_is_read_character_by_character(tmp_path: Path):
    characters = "这部电影真的很好不"
    folder = write_bert(tmp_path / "bert", HIDDEN, words=[*characters, "good"])
    from tokenizers import Tokenizer

    ours = Tokenizer.from_str(read_tokenizer(folder).decode())
    expected = [FIRST_WORD + characters.index(c) for c in "电影不好"]
    assert ours.encode("电影不好").ids == [101, *expected, 102]
    assert ours.encode("坏 good").ids == [101, 100, FIRST_WORD + len(characters), 102]


def test_a_long_text_keeps_its_end_mark(exported: Path):
    encoded = load(exported).encode(" ".join(["film"] * 30))
    assert encoded.tokens.shape == (3, 12)
    assert encoded.tokens[0, [0, -1]].tolist() == [101, 102]
    assert encoded.dropped == 32 - 12


def test_hcmen_run_takes_words(exported: Path, trained: Path):
    outcome = run(hcmen_run, "--bundle", exported, "--text", "the film is good", "--format", "json")
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(outcome.out)["results"]
    assert result["variant"] == "text_only"
    clip = trained / "clips/000.npz"
    outcome = run(
        hcmen_run, clip, "--bundle", exported, "--text", "the " * 40, "--check", "--checkpoint", trained,
        "--format", "json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    (result,) = json.loads(outcome.out)["results"]
    assert result["variant"] == "full"
    assert "30 tokens too long" in outcome.err
    assert "its own text is replaced" in outcome.err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--text", ""), 2, "the text is empty"),
        (("--text", " \n"), 2, "the text is empty"),
        (("--text", "x" * (1 << 21)), 2, "characters, expected at most"),
        (("--text", "word", "a.npz", "b.npz"), 2, "expected one clip at most"),
        (("--text", "word", "--variant", "full"), 2, "needs audio and vision"),
    ],
)
def test_words_that_cannot_be_used_get_one_line(exported: Path, arguments: tuple[str, ...], code: int, words: str):
    outcome = run(hcmen_run, "--bundle", exported, *arguments)
    assert outcome.code == code
    assert len(outcome.lines) == 1
    assert words in outcome.err


def test_a_bundle_without_an_encoder_takes_no_words(bundle: Path):
    outcome = run(hcmen_run, "--bundle", bundle, "--text", "the film")
    assert outcome.code == 2
    assert "has no text encoder" in outcome.err


def test_without_the_tokenizer_package_tokens_still_run(exported: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    model = load(exported)
    assert math.isfinite(model({"text_tokens": GOOD}).score)
    with pytest.raises(BackendError, match=r"tokenizers is not installed.*hcmen\[words\]"):
        model.encode("the film")


def test_a_checkpoint_without_its_tokenizer_exports_with_a_warning(trained: Path, tmp_path: Path):
    folder = Path(shutil.copytree(trained, tmp_path / "run"))
    (folder / "tokenizer.json").unlink()
    arguments = ("--checkpoint", folder, "--bundle", tmp_path / "bundle", "--variant", "text_only")
    outcome = run(export, *arguments)
    assert outcome.code == 0
    assert "tokenizer.json: missing" in outcome.err
    with pytest.raises(InputError, match="has a text encoder and no tokenizer"):
        load(tmp_path / "bundle").encode("word")
    (folder / "tokenizer.json").write_text("{")
    outcome = run(export, *arguments)
    assert outcome.code == 5
    assert "tokenizer.json: not valid JSON" in outcome.err


def test_an_altered_tokenizer_is_refused(exported: Path, tmp_path: Path):
    bundle = Path(shutil.copytree(exported, tmp_path / "bundle"))
    path = bundle / "tokenizer.json"
    path.write_text(path.read_text().replace("film", "flim"))
    with pytest.raises(CorruptFileError, match=r"tokenizer\.json"):
        load(bundle).encode("the film")


def test_words_run_without_torch_and_transformers(exported: Path):
    program = f"""
import sys
for name in ("torch", "transformers", "huggingface_hub"):
    sys.modules[name] = None
from hcmen.runtime import load
print(load({str(exported)!r})({{"text": "the film is good"}}).variant)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("text_only\n", 0), done.stderr


def test_unlisted_errors_are_ours(config: ModelConfig):
    # TextEncoderConfig itself, made by hand.
    with pytest.raises(HcmenError, match="layers is 0"):
        TextEncoderConfig(vocabulary=10, layers=0, heads=1, intermediate=4, positions=8, unknown_token=1)


def test_presets_have_no_encoder():
    assert all(p.model.text_encoder is None for p in PRESETS.values())


@pytest.mark.parametrize("change", [{"micro_batches": 3}, {"precision": "bf16"}])
def test_micro_batches_and_bfloat16_know_tokens(bert: Path, config: ModelConfig, dataset, tmp_path: Path, change: dict):
    still = dataclasses.replace(
        config, dropout=0.0, text_encoder=dataclasses.replace(config.text_encoder, dropout=0.0)
    )  # fmt: skip
    train = dataclasses.replace(TRAIN, alignment_weight=0.0, batch_size=24)
    histories = []
    for name, settings in (("whole", {}), ("changed", change)):
        (tmp_path / name).mkdir()
        trainer = Trainer(
            still, dataclasses.replace(train, **settings), dataset, tmp_path / name, text_encoder=bert
        )  # fmt: skip
        trainer.run()
        histories.append([record["task_loss"] for record in trainer.history])
    assert histories[1] == pytest.approx(histories[0], rel=0.05 if "precision" in change else 1e-5)
    if "precision" in change:
        assert histories[1] != histories[0]


@pytest.mark.parametrize("variant", ["full", "text_only"])
def test_the_encoder_bears_float16(exported: Path, variant: str):
    """Embeddings, norms and softmax in float32, products in float16, within the bound of engines."""
    bundle = read_bundle(exported)
    model = to_float16(embedded_model(bundle, variant))
    onnx.checker.check_model(model, full_check=True)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    class Half:
        kernels, tolerance = "native", TOLERANCES["fp16"]

        def run(self, inputs: dict) -> dict:
            names = [o.name for o in session.get_outputs()]
            return dict(zip(names, session.run(names, inputs), strict=True))

    test = golden_test(bundle, variant, Half())
    assert test.passed
    assert test.outputs["score"].max_abs > 1e-4
