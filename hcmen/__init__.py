"""hcmen: a Mamba sentiment model from PyTorch to an edge device, with its meaning intact.

Importing this package imports nothing heavy; the parts live in submodules (see the code map in the README).
"""

from pkgutil import extend_path

# In a checkout `hcmen/` holds the model alone, while `hcmen.runtime` and `hcmen.export` are installed from
# `runtime/` and `export/`. Without this line a checkout on sys.path would hide the installed halves.
__path__ = extend_path(__path__, __name__)

__version__ = "0.1.0"
