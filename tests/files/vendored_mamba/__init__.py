"""A repository of its own, which keeps copies of what it needs of mamba_ssm, as forks do: kernels and all.

Nothing here knows of hcmen. Without a GPU, mamba_ssm's compiled modules and Triton its first import fails.
"""

from vendored_mamba.model import Classifier

__all__ = ["Classifier"]
