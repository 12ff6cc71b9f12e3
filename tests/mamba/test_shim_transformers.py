"""Ten families of transformers give under the shim what they give without it: logits, gradients, generated tokens."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hcmen.mamba
from hcmen.mamba.stand_ins import packages
from hcmen.mamba.stand_ins.transformers import FUNCTIONS, OLD_NAMES

transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install 'hcmen[text]'")

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
LAYERS |= {"pad_token_id": 0}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
OF_JAMBA = {"mamba_d_state": 8, "mamba_dt_rank": 4, "use_mamba_kernels": False}
OF_JAMBA |= {"attn_layer_period": 2, "attn_layer_offset": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 8},
    "FalconMamba": {"state_size": 8},
    "Jamba": ATTENTION | OF_JAMBA | {"expert_layer_period": 2, "num_experts": 2, "num_experts_per_tok": 1},
    "Zamba": ATTENTION | OF_JAMBA | {"num_hidden_layers": 6, "n_mamba_heads": 2, "num_key_value_heads": 4},
    "Mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "Bamba": ATTENTION | HEADS | {"attn_layer_indices": [1]},
    "Zamba2": ATTENTION
    | {"mamba_d_state": 8, "n_mamba_heads": 8, "mamba_ngroups": 2, "num_mem_blocks": 1}
    # One chunk: beyond it transformers 5.0 sums the states of chunks the wrong way, 6e-5 off its own float64.
    | {"chunk_size": 16}
    | {"layers_block_type": ["mamba", "hybrid"], "use_mem_rope": True, "adapter_rank": 4},
    "GraniteMoeHybrid": ATTENTION
    | HEADS
    | {"layer_types": ["mamba", "attention"], "num_local_experts": 2, "num_experts_per_tok": 1}
    | {"shared_intermediate_size": 16},
    "NemotronH": ATTENTION
    | {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8}
    | {"n_groups": 2, "chunk_size": 4, "head_dim": 8},
    "FalconH1": ATTENTION | HEADS | {"mamba_d_ssm": 64, "head_dim": 8},
}
BATCH, TIME = 2, 11


def built(family: str, **others: Any) -> Any:
    """A tiny model with random weights, biases and norms too."""
    name = f"{family}ForCausalLM"
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {family}: a newer one has")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**LAYERS, **FAMILIES[family], **others})
    model = getattr(transformers, name)(config).float()
    for module in model.modules():
        if hasattr(module, "time_step_min"):
            # Zamba2 of transformers before 5.13 cuts steps there on its slow path, and not on that for kernels.
            module.time_step_min = 0.0
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, float(parameter.data.mean()), 0.1)
    return model


def tokens(batch: int = BATCH, time: int = TIME) -> Tensor:
    return torch.randint(3, 64, (batch, time), generator=torch.Generator().manual_seed(1))


def close(found: Tensor, wanted: Tensor, within: float = 1e-5) -> None:
    assert float((found - wanted).abs().max()) <= within * max(float(wanted.abs().max()), 1e-6)


def trained(model: Any) -> tuple[Tensor, list[Tensor]]:
    model.train().zero_grad()
    logits = model(tokens(), use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad if p.grad is not None else torch.zeros(1) for p in model.parameters()]


def generated(model: Any) -> Any:
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return model.eval().generate(tokens(time=5), **settings)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of hcmen's operators that run within the block."""
    scan = importlib.import_module("hcmen.mamba.scan")
    calls: list[str] = []
    with monkeypatch.context() as patch:
        for place in ("selective_scan", "ssd"):
            module = importlib.import_module(f"hcmen.mamba.stand_ins.{place}")
            for name in ("selective_scan", "state_space_dual"):
                if name in vars(module):
                    run = getattr(scan, name)

                    def counting(*x: Any, _run: Any = run, _name: str = name, **named: Any) -> Any:
                        calls.append(_name)
                        return _run(*x, **named)

                    patch.setattr(module, name, counting)
        yield calls


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(family)
    mask = torch.ones(BATCH, TIME, dtype=torch.long)
    # Of older versions Zamba2 masks after the convolution only on its path for kernels.
    if family != "Zamba2" or hasattr(sys.modules[type(model).__module__], "mamba2_chunk_scan"):
        mask[1, :3] = 0
    with torch.no_grad():
        masked = model.eval()(tokens(), attention_mask=mask, use_cache=False).logits
    logits, grads = trained(model)
    sequence = generated(model)
    modules = [m for n, m in sys.modules.items() if n.startswith("transformers.models.")]
    before = [(m, dict(vars(m))) for m in modules if isinstance(m, types.ModuleType)]
    with hcmen.mamba.shim(), counted(monkeypatch) as calls:
        with torch.no_grad():
            close(model(tokens(), attention_mask=mask, use_cache=False).logits, masked)
        assert calls, "hcmen's operators ran"
        found, found_grads = trained(model)
        close(found, logits)
        for got, wanted in zip(found_grads, grads, strict=True):
            close(got, wanted, 2e-5)
        again = generated(model)
    assert torch.equal(again.sequences, sequence.sequences)
    for got, wanted in zip(again.logits, sequence.logits, strict=True):
        close(got, wanted)
    for module, names in before:
        assert all(vars(module)[name] is value for name, value in names.items()), module.__name__


def test_a_module_that_is_imported_within_is_served_and_left_as_it_would_be() -> None:
    name = "transformers.models.mamba.modeling_mamba"
    kept = {n: sys.modules.pop(n) for n in list(sys.modules) if n == name}
    try:
        with hcmen.mamba.shim():
            importlib.import_module("mamba_ssm")
            module = importlib.import_module(name)
            within = {n: vars(module)[n] for n in FUNCTIONS if n in vars(module)}
            assert packages.is_stand_in(sys.modules["mamba_ssm"])
        assert all(vars(module).get(n) is not value for n, value in within.items())
        assert not [n for n in FUNCTIONS if "hcmen" in getattr(vars(module).get(n), "__module__", "")]
    finally:
        sys.modules.update(kept)


def test_old_names_of_generation_are_there_within() -> None:
    generation = importlib.import_module("transformers.generation")
    utils = importlib.import_module("transformers.generation.utils")
    with hcmen.mamba.shim():
        for module in (generation, utils):
            for old, new in OLD_NAMES.items():
                assert getattr(module, old).__name__ in (old, new)
            with pytest.raises(AttributeError):
                _ = module.nothing_like_it
    with pytest.raises(ImportError):
        exec("from transformers.generation import GreedySearchDecoderOnlyOutput")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_the_exporter_of_transformers_makes_prefill_and_decode(family: str) -> None:
    pytest.importorskip("hcmen.mamba.lowering", reason="torch.ops.hcmen has no ONNX form yet")
    exporting = pytest.importorskip(
        "transformers.exporters.exporter_onnx", reason="transformers has no ONNX exporter: a newer one has"
    )
    onnx_ir, ort = pytest.importorskip("onnx_ir"), pytest.importorskip("onnxruntime")
    from hcmen.mamba.functions import add_functions

    model = built(family, num_hidden_layers=1).eval()
    with hcmen.mamba.shim():
        exporter, config = exporting.OnnxExporter(), exporting.OnnxConfig(dynamic=True)
        made = exporter.export_for_generation(model, {"input_ids": tokens(time=5)}, config)
    sessions = {}
    for name, component in made.components.items():
        proto = add_functions(onnx_ir.to_proto(component.program))
        assert {"Mamba": "SelectiveScan", "Mamba2": "StateSpaceDual"}[family] in {n.op_type for n in proto.graph.node}
        assert len(proto.graph.node) < 200, "nothing is unrolled"
        sessions[name] = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    # Shorter prompts than the convolution's taps are left to the exporter, which fixes a size of its cache.
    for batch, time in ((2, 5), (1, 4), (3, 9)):
        ids = tokens(batch, time + 4)
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits.numpy()
        logits, *states = sessions["prefill"].run(None, {"input_ids": ids[:, :time].numpy()})
        found = [logits[:, -1]]
        names = [x.name for x in sessions["decode"].get_inputs()]
        for t in range(time, time + 4):
            step = {"input_ids": ids[:, t : t + 1].numpy()}
            step |= dict(zip(names[1:], states, strict=True))
            logits, *states = sessions["decode"].run(None, step)
            found.append(logits[:, 0])
        np.testing.assert_allclose(np.stack(found, 1), wanted[:, time - 1 :], rtol=0, atol=1e-5 * abs(wanted).max())
