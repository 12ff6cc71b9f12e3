"""Language models: mamba_ssm's own, those of transformers, Caduceus, and mambapy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.registry import Example, bare_package, family

MAMBA = ("https://github.com/state-spaces/mamba", "e9594ce1c732d97440f0332fdc43170a2294dbfa")
BATCH_TIME = ({0: "batch", 1: "time"},)
TOKENS = (2, 256)
WORDS = 512


class Logits(nn.Module):
    """token ids [batch, time] -> logits [batch, time, word]: a language model without its caches and classes."""

    def __init__(self, model: nn.Module, **options: object) -> None:
        super().__init__()
        self.model, self.options = model, options

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(ids, **self.options).logits
        return found


def tokens(words: int = WORDS, shape: tuple[int, int] = TOKENS) -> Tensor:
    return torch.randint(0, words, shape, generator=torch.Generator().manual_seed(0))


@family(
    "Mamba block",
    *MAMBA,
    "mamba_ssm.Mamba, d_model 64",
    BATCH_TIME,
    folders=("mamba",),
    packages=("einops",),
)
def block(_: Path) -> Example:
    from mamba_ssm import Mamba

    return Mamba(d_model=64).eval(), (torch.randn(2, 256, 64),)


def _lm(layer: str) -> Example:
    from mamba_ssm.models.config_mamba import MambaConfig
    from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

    heads = {"d_state": 64, "headdim": 64} if layer == "Mamba2" else {}
    config = MambaConfig(d_model=128, n_layer=2, vocab_size=WORDS, ssm_cfg={"layer": layer, **heads})
    return Logits(MambaLMHeadModel(config).eval()), (tokens(),)


@family(
    "Mamba language model",
    *MAMBA,
    "MambaLMHeadModel, 2 layers, d_model 128",
    BATCH_TIME,
    folders=("mamba",),
    packages=("einops",),
)
def mamba_lm(_: Path) -> Example:
    return _lm("Mamba1")


@family(
    "Mamba-2 language model",
    *MAMBA,
    "MambaLMHeadModel of Mamba2, 2 layers, d_model 128, 64 states",
    BATCH_TIME,
    folders=("mamba",),
    packages=("einops",),
)
def mamba2_lm(_: Path) -> Example:
    return _lm("Mamba2")


def hugging_face(name: str, architecture: str, what: str, **config: Any) -> None:
    """A family of transformers: `<architecture>Config` and `<architecture>ForCausalLM`."""

    def build(_: Path) -> Example:
        import transformers

        made = getattr(transformers, f"{architecture}Config")(vocab_size=WORDS, use_cache=False, **config)
        model = getattr(transformers, f"{architecture}ForCausalLM")(made).eval()
        return Logits(model, use_cache=False), (tokens(),)

    what = f"{architecture}ForCausalLM, {what}"
    family(f"transformers {name}", "transformers", None, what, BATCH_TIME, packages=("transformers",))(build)


ATTENTION: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA2: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 64, "mamba_chunk_size": 64}

hugging_face("Mamba", "Mamba", "2 layers, hidden 128", hidden_size=128, num_hidden_layers=2)
hugging_face("FalconMamba", "FalconMamba", "2 layers, hidden 128", hidden_size=128, num_hidden_layers=2)
hugging_face(
    "Jamba",
    "Jamba",
    "3 layers, hidden 128, 1 of attention, 4 experts",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    attn_layer_period=3,
    attn_layer_offset=1,
    num_experts=4,
    num_experts_per_tok=2,
    pad_token_id=0,
    **ATTENTION,
)
hugging_face(
    "Zamba",
    "Zamba",
    "4 layers, hidden 128, 2 with shared attention",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=4,
    layers_block_type=["mamba", "mamba", "hybrid", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=4,
    n_mamba_heads=2,
    pad_token_id=0,
)
hugging_face(
    "Mamba2",
    "Mamba2",
    "2 layers, hidden 128, 128 states",
    hidden_size=128,
    num_hidden_layers=2,
    num_heads=4,
    head_dim=64,
    state_size=128,
    n_groups=1,
    chunk_size=64,
)
hugging_face(
    "Bamba",
    "Bamba",
    "3 layers, hidden 128, 1 of attention",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    attn_layer_indices=[1],
    **ATTENTION,
    **MAMBA2,
)
hugging_face(
    "Zamba2",
    "Zamba2",
    "2 layers, hidden 128, 1 with shared attention",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    layers_block_type=["mamba", "hybrid"],
    num_attention_heads=4,
    num_key_value_heads=4,
    mamba_d_state=64,
    n_mamba_heads=4,
    mamba_headdim=64,
    chunk_size=64,
    num_mem_blocks=1,
    pad_token_id=0,
)
hugging_face(
    "GraniteMoeHybrid",
    "GraniteMoeHybrid",
    "3 layers, hidden 128, 1 of attention, 4 experts",
    hidden_size=128,
    intermediate_size=128,
    shared_intermediate_size=128,
    num_hidden_layers=3,
    layer_types=["mamba", "attention", "mamba"],
    num_local_experts=4,
    num_experts_per_tok=2,
    **ATTENTION,
    **MAMBA2,
)
hugging_face(
    "NemotronH",
    "NemotronH",
    "4 layers, hidden 128, 1 of attention, 1 dense",
    hidden_size=128,
    intermediate_size=256,
    layers_block_type=["mamba", "attention", "mamba", "mlp"],
    head_dim=32,
    mamba_num_heads=4,
    mamba_head_dim=64,
    ssm_state_size=64,
    n_groups=1,
    chunk_size=64,
    **ATTENTION,
)
hugging_face(
    "FalconH1",
    "FalconH1",
    "3 layers, hidden 128, attention beside each scan",
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    head_dim=32,
    mamba_d_ssm=256,
    **ATTENTION,
    **MAMBA2,
)


@family(
    "Caduceus",
    "https://github.com/kuleshov-group/caduceus",
    "0060a6d8079b6a040fc55d505e15972a327b70a6",
    "CaduceusMixerModel of DNA, 2 layers, d_model 64, both directions, reverse complements",
    BATCH_TIME,
    folders=("caduceus", "mamba"),
    packages=("einops",),
    note="the mixer without transformers' loading of weights",
)
def caduceus(repositories: Path) -> Example:
    bare_package("caduceus", repositories / "caduceus" / "caduceus")
    from caduceus.configuration_caduceus import CaduceusConfig
    from caduceus.modeling_caduceus import CaduceusMixerModel

    letters = 16
    config = CaduceusConfig(
        d_model=64,
        n_layer=2,
        vocab_size=letters,
        rcps=True,
        complement_map={i: letters - 1 - i for i in range(letters)},
    )

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = CaduceusMixerModel(config)

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.model(ids)[0]
            return found

    return Hidden().eval(), (tokens(letters),)


@family(
    "mamba.py",
    "mambapy",
    None,
    "mambapy.lm.LM of Mamba, 2 layers, d_model 128, use_cuda",
    BATCH_TIME,
    packages=("mambapy",),
)
def mamba_py(_: Path) -> Example:
    from mambapy.lm import LM
    from mambapy.mamba import MambaConfig

    config = MambaConfig(d_model=128, n_layers=2, use_cuda=True)
    return LM(config, vocab_size=WORDS).eval(), (tokens(),)
