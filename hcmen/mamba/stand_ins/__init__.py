"""Stand-ins for what Mamba models import and a machine without CUDA lacks; `hcmen.mamba.shim` puts them in place."""

from __future__ import annotations

from hcmen.mamba.stand_ins.hook import Shim, hidden
from hcmen.mamba.stand_ins.transformers import batched_experts

__all__ = ["batched_experts", "hidden", "shim"]

_SHIM = Shim()


def shim() -> Shim:
    """Makes `import mamba_ssm`, `causal_conv1d`, `triton` and what lies below them succeed, on hcmen's operators.

        with hcmen.mamba.shim():
            from mamba_ssm import Mamba
        hcmen.mamba.shim().install()                 # for good, before a repository is imported
        python -m hcmen.mamba run train.py ARGS...   # the same for a script as it is

    Models then run and train on the CPU as their authors wrote them. What is installed and works is never replaced, but
    for its kernels on tensors of the CPU. Modules of transformers are changed too, and are as they were in the end.
    """
    return _SHIM
