"""Manifests of schema 1, which held the configuration of the one model there was, read as schema 2."""

from __future__ import annotations

from typing import Any

from hcmen.base.inputs import OUTPUTS
from hcmen.base.modalities import MODALITIES
from hcmen.base.records import JsonObject

__all__ = ["KIND", "as_schema_2"]

KIND = "hcmen"
"""The kind of the model of every schema 1 bundle."""
_NEW = ("inputs", "outputs", "scores", "front_ends")
# What the configuration of a text encoder could leave out.
_TOKEN_DEFAULTS = {"token_types": 2, "unknown_token": 100}


def as_schema_2(top: JsonObject) -> dict[str, Any]:
    """The content of a manifest of schema 1 as one of schema 2, which is still to be checked.

    Raises:
        CorruptFileError: it lacks what schema 2 is made of, or has keys of schema 2 already.
    """
    for key in _NEW:
        if key in top.data:
            raise top.file.damaged(f"unknown key '{key}'")
    model = top.object("model")
    low, high = top.numbers("label_range", 2)
    tokens = None
    if model.data.get("text_encoder") is not None:
        encoder = model.object("text_encoder")
        tokens = {
            "vocabulary": encoder.value("vocabulary", int),
            **{key: encoder.data.get(key, default) for key, default in _TOKEN_DEFAULTS.items()},
        }
    return {
        **{key: x for key, x in top.data.items() if key not in ("model", "label_range")},
        "schema_version": 2,
        "inputs": {
            **{m: model.value(m, dict) for m in MODALITIES},
            "text_tokens": tokens,
            "label_min": low,
            "label_max": high,
            "label_min_means": "negative",
            "label_max_means": "positive",
        },
        "outputs": [tensor.to_json() for tensor in OUTPUTS],
        "model": {"kind": KIND, "config": model.data},
        "scores": [],
        "front_ends": {},
    }
