"""The options of backends: objects, names and keywords mean the same, and what a backend lacks is refused."""

from __future__ import annotations

import pickle

import pytest
from helpers.processes import loaded_after
from helpers.small_bundle import clip_arrays

from hcmen.base.errors import InputError
from hcmen.runtime import load
from hcmen.runtime.backends import Ort, OrtCuda, TensorRT, TensorRTRTX
from hcmen.runtime.backends.options import BACKENDS, backend_options


@pytest.mark.parametrize(
    ("name", "keywords", "options"),
    [
        ("auto", {}, Ort()),
        ("ort", {"threads": 2, "prepack": False, "spin": False}, Ort(threads=2, prepack=False, spin=False)),
        ("ort-cuda", {"threads": 3, "cuda_graph": True}, OrtCuda(threads=3, cuda_graph=True)),
        ("tensorrt", {"precision": "fp16", "cuda_graph": False}, TensorRT(precision="fp16", cuda_graph=False)),
        (
            "tensorrt-rtx",
            {"precision": "fp32", "trust_engines": True, "specialization": "eager"},
            TensorRTRTX(precision="fp32", trust_engines=True, specialization="eager"),
        ),
        # What was not said comes as None from a command line, and no backend is asked for no graph.
        ("ort", {"threads": None, "precision": None, "cuda_graph": False, "spin": None}, Ort()),
    ],
)
def test_a_name_with_keywords_is_the_object(name, keywords, options):
    assert backend_options(name, keywords) == options
    assert backend_options(options, {}) is options


def test_every_backend_is_named_by_its_options():
    assert {name: options.name for name, options in BACKENDS.items()} == {
        n: n for n in ("ort", "ort-cuda", "tensorrt", "tensorrt-rtx")
    }


@pytest.mark.parametrize(
    ("backend", "keywords", "why"),
    [
        (
            "ort",
            {"precision": "fp16"},
            r"precision is an option of the backend 'tensorrt' or 'tensorrt-rtx', got backend 'ort': leave it",
        ),
        (
            "auto",
            {"cuda_graph": True},
            "cuda_graph is an option of the backend 'ort-cuda', 'tensorrt' or 'tensorrt-rtx', got .*'auto'",
        ),
        ("tensorrt", {"threads": 2}, "threads is an option of the backend 'ort' or 'ort-cuda', got .*'tensorrt'"),
        ("ort-cuda", {"spin": False}, "spin is an option of the backend 'ort', got backend 'ort-cuda'"),
        (Ort(threads=2), {"spin": False}, "spin was given beside Ort.*: give it to Ort"),
        (3, {}, "backend is of type int, expected a name or one of Ort, OrtCuda, TensorRT"),
        (Ort, {}, "backend is of type type, expected a name"),
        ("openvino", {}, "unknown backend 'openvino': choose from auto, ort, ort-cuda, tensorrt"),
        ("tensorrt", {"specialization": "eager"}, "specialization is an option of the backend 'tensorrt-rtx', got"),
        (
            "tensorrt-rtx",
            {"specialization": "Lazy"},
            r"unknown specialization 'Lazy': did you mean 'lazy'\? choose from",
        ),
        ("ort-cuda", {"threads": 0}, "threads is 0, expected 1 to 1024"),
    ],
)
def test_what_a_backend_lacks_is_refused_in_one_line(shared_bundle, backend, keywords, why):
    with pytest.raises(InputError, match=why) as caught:
        load(shared_bundle, backend=backend, **keywords)
    assert "\n" not in str(caught.value)


def test_a_keyword_that_nobody_has_is_the_callers_error(shared_bundle):
    with pytest.raises(TypeError, match="no backend has an option 'thread'"):
        load(shared_bundle, thread=2)


def test_a_model_runs_and_is_pickled_with_its_options(shared_bundle):
    model = load(shared_bundle, backend=Ort(threads=2, spin=False))
    again = pickle.loads(pickle.dumps(model))
    for m in (model, again):
        assert (m.backend.name, m.backend.threads, m.backend.spin) == ("ort", 2, False)
    assert again(clip_arrays(1)).score == model(clip_arrays(1)).score


def test_the_options_are_light_to_import():
    loaded = loaded_after("from hcmen.runtime.backends import Ort, OrtCuda, TensorRT; Ort(threads=2)")
    assert loaded.isdisjoint({"numpy", "onnxruntime", "tensorrt", "torch", "click"})
