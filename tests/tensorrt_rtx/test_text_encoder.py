"""A graph with a BERT in it, whose text comes as token numbers, through the real builder of TensorRT-RTX."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from helpers.micro import MICRO
from helpers.rtx import built, listed, needs_rtx

from hcmen.base.bundle import read_bundle
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import variant_named

pytestmark = [needs_rtx, pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")]
HIDDEN = 8


def exported(folder: Path) -> Path:
    """The bundle of text alone, of random weights."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from helpers.tiny_bert import write_bert

    from hcmen.export.bundle import export_bundle
    from hcmen.models.hcmen.model import HCMEN
    from hcmen.models.text_encoder import read_sizes
    from hcmen.training.checkpoint import save_checkpoint
    from hcmen.training.config import TrainConfig

    sizes = read_sizes(write_bert(folder / "bert", HIDDEN))[0]
    torch.manual_seed(0)
    model = HCMEN(dataclasses.replace(MICRO, text=FeatureConfig(HIDDEN, 12), text_encoder=sizes)).eval()
    (folder / "train").mkdir()
    save_checkpoint(folder / "train", model, TrainConfig(), epoch=0, validation={}, dataset={"name": "none"})
    export_bundle(folder / "train", folder / "bundle", [variant_named("text_only")])
    return folder / "bundle"


@pytest.mark.slow  # half a minute, most of it PyTorch's export: no other test has whole numbers at an engine's input
def test_token_numbers_go_into_an_engine(tmp_path: Path) -> None:
    bundle = exported(tmp_path)
    (tokens, *_) = read_bundle(bundle).manifest.variants["text_only"].inputs
    assert (tokens.name, tokens.dtype) == ("text_tokens", "int64")
    (told,) = built(bundle, "--target", "86", "--precision", "fp16")
    assert (told["variant"], told["plugin"]) == ("text_only", "function")
    assert len(listed(bundle)) == 1
