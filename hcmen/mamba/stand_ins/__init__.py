"""Stand-ins for what Mamba models import and a machine without CUDA lacks; `hcmen.mamba.shim` puts them in place."""
