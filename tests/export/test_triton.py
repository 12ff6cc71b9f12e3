"""The model repository for Triton: its configurations in Triton's own schema, its graphs as the server runs them."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.wheels import Unavailable, unpacked

import hcmen.export.commands.export
import hcmen.export.triton
from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.errors import CheckFailed, InputError
from hcmen.base.library import library_path
from hcmen.base.modalities import VARIANTS
from hcmen.export.triton import model_config, write_repository
from hcmen.runtime import load

SCHEMA = "tritonclient==2.73.0"
NAMES = [v.name for v in VARIANTS]


@pytest.fixture(scope="module")
def schema() -> ModuleType:
    """Triton's model_config.proto as its client package has it; the package itself would ask for gRPC."""
    try:
        path = unpacked(SCHEMA) / "tritonclient" / "grpc" / "model_config_pb2.py"
    except Unavailable as error:
        pytest.skip(str(error))
    spec = importlib.util.spec_from_file_location("triton_model_config_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def opened(micro_bundle) -> Bundle:
    return read_bundle(micro_bundle)


@pytest.fixture
def repository(opened, tmp_path) -> Path:
    write_repository(opened, tmp_path / "models")
    return tmp_path / "models"


def parsed(schema: ModuleType, path: Path) -> Any:
    from google.protobuf import text_format

    return text_format.Parse(path.read_text(), schema.ModelConfig())


@pytest.mark.parametrize("variant", NAMES)
def test_every_configuration_is_one_of_tritons(schema, opened, repository, variant):
    config = parsed(schema, repository / f"hcmen_{variant}" / "config.pbtxt")
    assert config.name == f"hcmen_{variant}"
    assert config.backend == "onnxruntime"
    assert (repository / config.name / "1" / config.default_model_filename).is_file()
    assert config.max_batch_size == 32
    assert config.HasField("dynamic_batching")
    assert list(config.model_operations.op_library_filename) == ["/models/libhcmen_ops.so"]
    assert config.instance_group[0].kind == schema.ModelInstanceGroup.KIND_CPU
    record = opened.variant(variant)
    kinds = {schema.TYPE_FP32: "float32", schema.TYPE_INT64: "int64"}
    for tensors, specs in ((config.input, record.inputs), (config.output, record.outputs)):
        assert [t.name for t in tensors] == [s.name for s in specs]
        for tensor, spec in zip(tensors, specs, strict=True):
            assert kinds[tensor.data_type] == spec.dtype
            tail = tuple(-1 if isinstance(n, str) else n for n in spec.shape[1:])
            if tail:
                assert tuple(tensor.dims) == tail
                assert not tensor.HasField("reshape")
            else:
                assert list(tensor.dims) == [1]
                assert tensor.HasField("reshape")
                assert list(tensor.reshape.shape) == []


@pytest.mark.parametrize("variant", NAMES)
def test_the_graphs_score_as_the_server_calls_them(schema, micro_bundle, repository, variant):
    """Requests of one shape joined along the first axis, each tensor [batch, *dims], reshaped as the file says."""
    config = parsed(schema, repository / f"hcmen_{variant}" / "config.pbtxt")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.register_custom_ops_library(str(repository / "libhcmen_ops.so"))
    path = repository / config.name / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    reference = load(micro_bundle)
    rng = np.random.default_rng(0)
    batch, steps = 3, 5
    requests = []
    for _ in range(batch):
        request = {}
        for tensor in config.input:
            shape = [1, *(steps if n == -1 else n for n in tensor.dims)]
            whole = tensor.data_type == schema.TYPE_INT64
            request[tensor.name] = rng.integers(1, 6, shape) if whole else rng.normal(size=shape).astype(np.float32)
        requests.append(request)
    joined = {}
    for tensor in config.input:
        x = np.concatenate([r[tensor.name] for r in requests])
        joined[tensor.name] = x.reshape(len(x), *tensor.reshape.shape) if tensor.HasField("reshape") else x
    outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, joined), strict=True))
    expected = reference.run(variant, joined)
    for tensor in config.output:
        got = outputs[tensor.name].reshape(batch, *tensor.dims)
        want = expected[tensor.name].reshape(batch, *tensor.dims)
        np.testing.assert_allclose(got, want, atol=1e-6, rtol=1e-6)
    for i, request in enumerate(requests):  # and a score is that of the request alone
        single = {n: x[:, 0] if n.endswith("_length") else x for n, x in request.items()}
        np.testing.assert_allclose(
            outputs["score"][i], reference.run(variant, single)["score"][0], atol=1e-5, rtol=1e-5
        )


def test_a_repository_holds_what_it_says_and_nothing_else(opened, repository):
    found = {p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()}
    expected = {f"hcmen_{v}/{name}" for v in NAMES for name in ("config.pbtxt", "1/model.onnx")}
    assert found == expected | {"libhcmen_ops.so", "hcmen.json"}
    assert (repository / "libhcmen_ops.so").read_bytes() == library_path().read_bytes()
    for v in NAMES:
        model = onnx.load(str(repository / f"hcmen_{v}" / "1" / "model.onnx"), load_external_data=False)
        assert not any(t.external_data for t in model.graph.initializer)
        onnx.checker.check_model(model, full_check=True)
        assert model.functions  # right without the library, too
    mark = json.loads((repository / "hcmen.json").read_text())
    assert set(mark["files"]) == found - {"hcmen.json"}


def test_another_root_and_batch(schema, opened, tmp_path):
    write_repository(opened, tmp_path / "r", ["audio_only"], server_root="/srv/triton/", max_batch=7)
    config = parsed(schema, tmp_path / "r" / "hcmen_audio_only" / "config.pbtxt")
    assert list(config.model_operations.op_library_filename) == ["/srv/triton/libhcmen_ops.so"]
    assert config.max_batch_size == 7
    assert [p.name for p in (tmp_path / "r").iterdir() if p.is_dir()] == ["hcmen_audio_only"]


@pytest.mark.parametrize("root", ["models", "", '/a"b', "/a b", "/a\nb"])
def test_a_root_that_no_path_can_be(opened, tmp_path, root):
    with pytest.raises(InputError, match="expected an absolute one"):
        write_repository(opened, tmp_path / "r", server_root=root)
    assert not (tmp_path / "r").exists()


def test_it_is_written_whole_or_not_at_all(opened, repository, monkeypatch):
    before = {p: p.read_bytes() for p in sorted(repository.rglob("*")) if p.is_file()}
    real, calls = hcmen.export.triton.embedded_model, []

    def failing(bundle, name, weights):
        calls.append(name)
        if len(calls) == 3:
            raise CheckFailed("halfway")
        return real(bundle, name, weights)

    monkeypatch.setattr(hcmen.export.triton, "embedded_model", failing)
    with pytest.raises(CheckFailed):
        write_repository(opened, repository, server_root="/elsewhere")
    assert {p: p.read_bytes() for p in sorted(repository.rglob("*")) if p.is_file()} == before
    assert [p.name for p in repository.parent.iterdir() if p.name.startswith(".")] == []
    monkeypatch.undo()
    write_repository(opened, repository, ["full"])  # one of ours is replaced unasked
    assert [p.name for p in repository.iterdir() if p.is_dir()] == ["hcmen_full"]


def test_other_folders_are_left_alone(opened, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    with pytest.raises(InputError, match="no model repository of hcmen"):
        write_repository(opened, other)
    assert (other / "precious").read_text() == "x"
    write_repository(opened, other, ["full"], force=True)
    assert not (other / "precious").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="a file is there"):
        write_repository(opened, tmp_path / "file", force=True)


def test_hcmen_export_writes_it(micro_bundle, tmp_path, monkeypatch):
    """The export itself is tested elsewhere, and takes its time: here the bundle is there already."""
    from helpers.command import run

    opened = read_bundle(micro_bundle)
    monkeypatch.setattr(hcmen.export.commands.export, "export_bundle", lambda *arguments, **options: opened.manifest)
    arguments = ("--bundle", micro_bundle, "--triton", tmp_path / "repo", "--triton-root", "/data")
    done = run(hcmen.export.commands.export.main, *arguments, "--format", "json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["triton"]["models"] == [f"hcmen_{v}" for v in NAMES]
    assert '"/data/libhcmen_ops.so"' in (tmp_path / "repo" / "hcmen_full" / "config.pbtxt").read_text()
    done = run(hcmen.export.commands.export.main, *arguments)
    assert "7 models, to be mounted at /data" in done.out


def test_the_configuration_is_plain_text(opened):
    text = model_config(opened, "full", "/models/libhcmen_ops.so")
    assert text.isascii()
    assert text.count("input [") == 6
    assert text.count("reshape: { shape: [ ] }") == 4
