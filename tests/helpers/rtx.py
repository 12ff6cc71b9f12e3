"""hcmen-compile over the real builder of TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from onnx import ModelProto

from hcmen.base.bundle import read_bundle
from hcmen.base.engines import EngineRecord, read_engines
from hcmen.runtime.backends.flavour import TENSORRT_RTX, TrtModule
from hcmen.runtime.backends.tensorrt_rtx import set_targets
from helpers.command import Outcome

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec(TENSORRT_RTX.module) is None,
    reason="TensorRT-RTX is not installed: pip install 'hcmen[rtx]'",
)
BACKEND = ("--backend", "tensorrt-rtx")


def command(bundle: Path, *arguments: object) -> list[str]:
    """hcmen-compile for a process of its own."""
    words = ("compile", "--bundle", bundle, *BACKEND, *arguments)
    return [sys.executable, "-m", "hcmen", *map(str, words)]


def compiled(bundle: Path, *arguments: object, **environment: str) -> Outcome:
    """What hcmen-compile in a process of its own left."""
    done = subprocess.run(
        command(bundle, *arguments), capture_output=True, text=True, env={**os.environ, **environment}, timeout=300
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def built(bundle: Path, *arguments: object) -> list[dict[str, Any]]:
    """The engines that the command's JSON tells of, after it ended well."""
    done = compiled(bundle, *arguments, "--format", "json")
    assert done.code == 0, done.err
    engines: list[dict[str, Any]] = json.loads(done.out)["engines"]
    return engines


def started(bundle: Path, *arguments: object) -> subprocess.Popen[str]:
    """hcmen-compile, of which the builder has begun to build."""
    process = subprocess.Popen(
        command(bundle, *arguments, "-v"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "timing cache in use" in line:
            return process
    raise AssertionError(f"it ended with {process.wait()} before it built")


def listed(bundle: Path) -> dict[str, EngineRecord]:
    """file name -> the engine, each as the index says."""
    opened = read_bundle(bundle)
    records = {record.engine.file.removeprefix("engines/"): record for record in read_engines(opened)}
    for record in records.values():
        opened.read(record.engine)
    return records


def files(bundle: Path) -> dict[str, bytes]:
    """name -> content of all that lies in the folder of engines, but the lock."""
    folder = bundle / "engines"
    found = {path.name: path.read_bytes() for path in folder.iterdir()} if folder.is_dir() else {}
    return {name: content for name, content in found.items() if name != ".lock"}


class RealBuilder:
    """The parser and the builder themselves, for graphs that are no bundle's."""

    def __init__(self) -> None:
        self.tensorrt = TrtModule(TENSORRT_RTX)

    def parsed(self, model: ModelProto) -> tuple[Any, Any, list[str]]:
        """The builder, the network, and what the parser has against the model."""
        trt = self.tensorrt.module
        builder = trt.Builder(self.tensorrt.logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self.tensorrt.logger)
        sound = parser.parse(model.SerializeToString())
        errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
        assert sound == (not errors)
        return builder, network, errors

    def build(self, model: ModelProto, sizes: Sequence[dict[str, int]], targets: Sequence[int] = (86,)) -> Any:
        """(network, engine) of `model`; sizes: of its named dimensions at the least, the best and the most."""
        trt = self.tensorrt.module
        mark = self.tensorrt.logger.count
        builder, network, errors = self.parsed(model)
        assert not errors
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        set_targets(trt, config, targets)
        profile = builder.create_optimization_profile()
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            if any(d.dim_param for d in dims):
                profile.set_shape(value.name, *([size.get(d.dim_param, d.dim_value) for d in dims] for size in sizes))
        assert config.add_optimization_profile(profile) >= 0
        engine = builder.build_serialized_network(network, config)
        assert engine is not None, self.tensorrt.errors(mark)
        return network, engine
