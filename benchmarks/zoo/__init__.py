"""Other people's Mamba models, each built small from its authors' own code: what benchmarks/mamba_zoo.py measures."""

from zoo import language, restoration, series, vision
from zoo.registry import FAMILIES, Family, Missing

__all__ = ["FAMILIES", "Family", "Missing", "language", "restoration", "series", "vision"]
