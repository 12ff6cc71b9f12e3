"""Language models of transformers with states: they generate the tokens that transformers' own generate does."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scripts import loaded

from hcmen.base.errors import CheckFailed
from hcmen.mamba import export, shim
from hcmen.mamba.cuts import cuts_of
from hcmen.mamba.states import stateful
from hcmen.runtime.mamba import Stepper

transformers = pytest.importorskip("transformers")

SAMPLES = Path(__file__).resolve().parents[2] / "samples"
VOCABULARY = 48
COMMON = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "tie_word_embeddings": False}
KINDS = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Mamba2": {"state_size": 16, "num_heads": 8, "head_dim": 8, "n_groups": 2},
}
PROMPT = [3, 1, 4, 1, 5]


def model_of(kind: str, **config) -> torch.nn.Module:
    torch.manual_seed(2)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**COMMON, **config))
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generates_what_transformers_generates(kind, tmp_path):
    generate = loaded(SAMPLES / "generate.py", "hcmen_sample_generate")
    with shim():
        model = model_of(kind, **KINDS[kind])
        export(model, {"input_ids": torch.tensor([PROMPT, PROMPT])}, tmp_path / "lm.onnx", states=True, verify=False)
    options = {"max_new_tokens": 25, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
    assert len(set(want)) > 3
    ids = np.random.default_rng(5).integers(0, VOCABULARY, (2, 19))
    with torch.no_grad():
        eager = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    for library in (True, False):
        stepper = Stepper(tmp_path / "lm.onnx", library=library, threads=1)
        tokens = generate.generate(stepper, PROMPT, temperature=0)
        assert [next(tokens) for _ in want] == want
        stepper.reset(2)
        whole = stepper.feed(input_ids=ids)["logits"]
        np.testing.assert_allclose(whole, eager, rtol=0, atol=1e-5 * np.abs(eager).max())
        for cut in cuts_of(ids.shape[1]):
            stepper.reset(2)
            edges = np.cumsum((0, *cut))
            pieces = [stepper.feed(input_ids=ids[:, a:b])["logits"] for a, b in itertools.pairwise(edges)]
            np.testing.assert_array_equal(np.concatenate(pieces, 1), whole)


def test_the_attention_of_a_hybrid_is_named():
    hybrid = {"num_hidden_layers": 3, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "mamba_d_state": 8}
    with shim():
        torch.manual_seed(2)
        config = transformers.JambaConfig(**{**COMMON, **hybrid, **layers}, use_mamba_kernels=False)
        model = transformers.JambaForCausalLM(config).eval()
        with pytest.raises(CheckFailed, match=r"the first module that differs is model\.layers\.1\.self_attn"):
            stateful(model, (), {"input_ids": torch.tensor([PROMPT, PROMPT])})


def test_a_mask_of_padding_is_an_input_of_every_step():
    with shim():
        model = model_of("Mamba", state_size=8)
        ids = torch.tensor([[0, 0, *PROMPT], [*PROMPT, 7, 8]])
        mask = (ids > 0).long()
        made = stateful(model, (), {"input_ids": ids, "attention_mask": mask})
        assert made.input_names == ("input_ids", "attention_mask")
        with torch.no_grad():
            want = model(input_ids=torch.tensor([PROMPT]), use_cache=False).logits
            got = made(ids, mask, *made.first_states(2))[0]
    torch.testing.assert_close(got[:1, 2:], want, rtol=0, atol=1e-6)
