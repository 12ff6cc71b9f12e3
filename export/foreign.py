"""Somebody else's model for `hcmen-export-mamba`, made by a function or loaded by transformers, and its inputs."""

from __future__ import annotations

import importlib
import math
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hcmen.base.errors import BackendError, CorruptFileError, HcmenError, InputError, reason_of, shown
from hcmen.base.files import open_regular, refused
from hcmen.mamba.tracing import quiet

__all__ = ["example", "from_factory", "from_hub", "load_weights", "parse_dynamic", "parse_input"]

_DTYPES = {
    "f32": torch.float32,
    "f16": torch.float16,
    "f64": torch.float64,
    "bool": torch.bool,
    "u8": torch.uint8,
    "i32": torch.int32,
    "i64": torch.int64,
}
_MOST_NUMBERS = 1 << 31
_INPUT = re.compile(r"(?:([A-Za-z_]\w*)=)?([a-z]+\d*)\[([\d, ]*)(?::(-?\d+)\.\.(-?\d+))?\]")
_AXIS = re.compile(r"(\d{1,2})=([A-Za-z_]\w*)")
_NESTS = ("state_dict", "model_state_dict", "model", "module", "net", "params_ema", "params", "ema")
"""Where training programs put a model's weights within what they save."""


def from_factory(spec: str) -> nn.Module:
    """What `module:function` makes when it is called without arguments. Modules of the working folder are found.

    Raises:
        InputError: there is no such function, it fails, or what it makes is no torch.nn.Module.
    """
    where = f"--factory {spec}"
    module_name, _, path = spec.partition(":")
    if not re.fullmatch(r"[\w.]+", module_name) or not re.fullmatch(r"[\w.]+", path):
        raise InputError(f"--factory is {shown(spec)}", "package.module:function")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except HcmenError:
        raise
    except Exception as error:  # a module of somebody else runs when it is imported, and may raise anything
        why = f"{type(error).__name__}: {reason_of(error)}"
        triton = isinstance(error, ImportError) and str(error.name).partition(".")[0] == "triton"
        fix = "triton's own kernels need CUDA: export the part of the repository that has none" if triton else None
        raise InputError(f"'{module_name}' cannot be imported: {why}", fix=fix, where=where) from error
    for name in path.split("."):
        if not hasattr(found, name):
            raise InputError(f"'{module_name}' has no '{path}'", where=where)
        found = getattr(found, name)
    if not callable(found):
        raise InputError(f"it is a {type(found).__name__}", "a function or class that makes the model", where=where)
    try:
        model = found()
    except HcmenError:
        raise
    except Exception as error:
        raise InputError(f"it raises {type(error).__name__}: {reason_of(error)}", where=where) from error
    if not isinstance(model, nn.Module):
        raise InputError(f"it gives a {type(model).__name__}", "a torch.nn.Module", where=where)
    return model


def from_hub(name: str) -> nn.Module:
    """The model of that name, or of that folder, as transformers has it: float32, in evaluation mode.

    Raises:
        InputError: transformers does not find it, or knows no such model.
        BackendError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise BackendError("transformers is not installed, and --hf needs it: pip install 'hcmen[text]'") from error
    where = f"--hf {name}"
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = [getattr(transformers, kind, None) for kind in getattr(config, "architectures", None) or ()]
        kind = next((kind for kind in kinds if kind is not None), transformers.AutoModel)
        model: nn.Module = kind.from_pretrained(name, dtype=torch.float32).eval()
    except Exception as error:  # it raises OSError, ValueError, ImportError and classes of the hub's client
        why = f"transformers cannot load it: {type(error).__name__}: {reason_of(error)}"
        fix = "name a folder with config.json and the weights, or a model that the hub has"
        raise InputError(why, fix=fix, where=where) from error
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Puts the weights of a checkpoint into `model`; a pickle is read as tensors alone, never run.

    Raises:
        InputError: there is no such file, or its weights are another model's.
        CorruptFileError: it is damaged, or holds more than tensors.
    """
    where = str(path)
    with refused(path), open_regular(path) as file, quiet():
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load_file

                found: Any = load_file(path)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # unpickling, zip and safetensors errors have no common base
            raise CorruptFileError(
                f"no checkpoint of tensors alone ({type(error).__name__})",
                fix="save model.state_dict() with torch.save, or as .safetensors",
                where=where,
            ) from error
    weights = _weights_in(found)
    if weights is None:
        raise InputError(f"it holds a {type(found).__name__} without tensors", "name -> tensor", where=where)
    own = model.state_dict()
    missing, more = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
    other = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    for what, names in (("lacks", missing), ("has another size of", other), ("has, unlike the model,", more)):
        if names:
            rest = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(f"it {what} '{names[0]}'{rest}", "the weights of this model", where=where)
    model.load_state_dict(weights)


def _weights_in(found: Any) -> dict[str, Tensor] | None:
    """name -> tensor, of what a training program saved; None if there is nothing of the kind."""
    for _ in range(3):
        if not isinstance(found, Mapping):
            return None
        tensors = {str(name): x for name, x in found.items() if isinstance(x, Tensor)}
        if tensors and len(tensors) == len(found):
            return {name.removeprefix("module."): x for name, x in tensors.items()}
        found = next((found[key] for key in _NESTS if isinstance(found.get(key), Mapping)), None)
    return None


# --- example inputs -------------------------------------------------------------------------------------------------


def parse_input(text: str) -> tuple[str | None, Tensor]:
    """(name or None, tensor) of `f32[2,256,64]`, `ids=i64[2,16:0..99]`: whole numbers from 0 to 99, ends included.

    Raises:
        InputError: it is not written so, or is too large.
    """
    found = _INPUT.fullmatch(text.strip())
    what = "such as f32[2,256,64] or ids=i64[2,16:0..99]"
    if not found or found[2] not in _DTYPES:
        raise InputError(f"--input is {shown(text)}", f"{what}, of {', '.join(_DTYPES)}")
    name, dtype = found[1], _DTYPES[found[2]]
    try:
        shape = [int(n) for n in found[3].split(",")] if found[3].strip() else []
    except ValueError:
        raise InputError(f"--input is {shown(text)}", f"sizes between commas, {what}") from None
    if math.prod(shape) > _MOST_NUMBERS:
        raise InputError(f"--input {shown(text)} has {math.prod(shape)} numbers", f"at most {_MOST_NUMBERS}")
    generator = torch.Generator().manual_seed(0)
    if dtype.is_floating_point:
        if found[4]:
            raise InputError(f"--input is {shown(text)}", "a range for whole numbers alone; the others are normal")
        return name, torch.randn(shape, generator=generator).to(dtype)
    low, high = (int(found[4]), int(found[5])) if found[4] else (0, 1)
    if not -(1 << 63) <= low <= high < (1 << 63) - 1:
        raise InputError(f"--input is {shown(text)}", "a range from the least to the greatest, ends included")
    return name, torch.randint(low, high + 1, shape, generator=generator).to(dtype)


def example(inputs: Sequence[str], model: nn.Module) -> Any:
    """The example inputs by `--input`; of a language model of transformers its tokens, where none is given.

    Raises:
        InputError: there are none, or some have names and others have not.
    """
    if not inputs:
        words = getattr(getattr(model, "config", None), "vocab_size", None)
        if isinstance(words, int) and words > 0:
            return {"input_ids": parse_input(f"i64[2,16:0..{words - 1}]")[1]}
        raise InputError(
            "there is no --input", "one for each tensor that the model takes, such as --input f32[2,256,64]"
        )
    found = [parse_input(text) for text in inputs]
    names = [name for name, _ in found]
    if any(name is None for name in names):
        if any(names):
            raise InputError("some --input have a name and others have none", "a name for each, or for none")
        return tuple(x for _, x in found)
    if len(set(names)) < len(names):
        raise InputError("two --input have one name", "a name for each")
    return dict(found)


def parse_dynamic(texts: Sequence[str]) -> Any:
    """What `export` takes for `auto`, `none`, `0=batch,1=time`, or `NAME:0=batch,1=time` for each input.

    Raises:
        InputError: it is not written so.
    """
    if not texts or list(texts) == ["auto"]:
        return "auto"
    if list(texts) == ["none"]:
        return None
    by_input: dict[str, dict[int, str]] = {}
    for text in texts:
        name, colon, axes = text.rpartition(":")
        pairs = [_AXIS.fullmatch(part.strip()) for part in axes.split(",")]
        if not all(pairs) or (colon and not name) or len({pair[1] for pair in pairs if pair}) < len(pairs):
            raise InputError(f"--dynamic is {shown(text)}", "auto, none, 0=batch,1=time or NAME:0=batch,1=time")
        if name in by_input:
            raise InputError(f"--dynamic tells twice of {shown(name) if name else 'all inputs'}", "once")
        by_input[name] = {int(pair[1]): pair[2] for pair in pairs if pair}
    if "" in by_input and len(by_input) > 1:
        raise InputError("--dynamic tells of all inputs and of one", "a name in front of each, or of none")
    return by_input.get("", by_input)
