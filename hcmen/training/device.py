"""Which device tensors live on, and how a batch gets there."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hcmen.base.errors import BackendError, unknown_name

__all__ = ["DEVICES", "choose_device", "device_of", "moved"]

DEVICES = ("auto", "cpu", "cuda")


def choose_device(name: str, index: int = 0) -> torch.device:
    """The device called `name`: "cpu", "cuda" (number `index` of this machine's), or "auto", CUDA where there is one.

    Raises:
        InputError: there is no such name.
        BackendError: "cuda" was named and there is none, or not as many.
    """
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        why = "PyTorch finds no GPU" if torch.backends.cuda.is_built() else "this PyTorch is built without CUDA"
        raise BackendError(f"device cuda was asked for, {why}: choose --device cpu, or install a PyTorch with CUDA")
    if index >= torch.cuda.device_count():
        raise BackendError(
            f"process {index} of this machine has no GPU of its own, there are {torch.cuda.device_count()}: start no "
            "more processes than there are GPUs, or choose --device cpu"
        )
    # By default PyTorch rounds what cuDNN's convolutions multiply to 10 bits of mantissa: float32 is to mean float32.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", index)


def device_of(module: nn.Module) -> torch.device:
    """Where the parameters of `module` are."""
    return next(module.parameters()).device


def moved(x: Tensor, device: torch.device) -> Tensor:
    """`x` on `device`; to a GPU through pinned memory, so that the host need not wait for the copy."""
    if device.type != "cuda" or x.device.type == "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
