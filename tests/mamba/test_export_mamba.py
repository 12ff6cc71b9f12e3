"""One call from a model to a file that is checked: what it writes, which sizes it leaves open, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from helpers import foreign_models as models
from helpers.foreign_models import line_with
from torch import nn

import hcmen.mamba
from hcmen.base.errors import BackendError, CheckFailed, InputError
from hcmen.base.library import library_path
from hcmen.mamba import calls, exporting, verification
from hcmen.mamba.functions import nodes_of, strip_functions
from hcmen.mamba.scan import implementation


def picture(height=6, width=10):
    return torch.randn(2, 8, height, width, generator=torch.Generator().manual_seed(0))


def series(time=7):
    return torch.randn(2, time, 8, generator=torch.Generator().manual_seed(0))


def ran(path, feeds, library):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if library:
        options.register_custom_ops_library(str(library_path()))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feeds)


def shapes(path):
    found = onnx.load(path).graph
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*found.input, *found.output)
    }


def no_file(folder):
    return not list(folder.iterdir())


def test_two_inputs_two_signatures_and_a_dict_of_outputs(tmp_path):
    """Held to float64 at sizes that the export never saw, with the library and without."""
    model, path = models.Pair(), tmp_path / "pair.onnx"
    x, ids = series(), torch.randint(0, 10, (2, 7))
    report = hcmen.mamba.export(model, {"x": x, "ids": ids}, path, times=True)
    assert isinstance(report, hcmen.mamba.Report)
    assert model.training
    assert shapes(path) == {
        "x": ["batch", "time", 8],
        "ids": ["batch", "time"],
        "series": ["batch", "time", 8],
        "score": ["batch", 8],
    }
    assert report.dropped == ["cache"]
    assert report.sites == {op: {"first": 1, "second": 1} for op in ("CausalConv1d", "SelectiveScan")}
    assert sum(node.domain == "hcmen" for node in onnx.load(path).graph.node) == 4
    model.eval().double()
    x, ids = torch.randn(3, 19, 8), torch.randint(0, 10, (3, 19))
    with torch.no_grad(), implementation("ref"):
        want = model(x.double(), ids)
    for library in (False, True):
        for got, name in zip(
            ran(path, {"x": x.numpy(), "ids": ids.numpy()}, library), ("series", "score"), strict=True
        ):
            assert np.abs(got - want[name].numpy()).max() <= 1e-5 * want[name].abs().max()
    rows = {output.name: output for output in report.outputs}
    assert list(rows) == ["series", "score"]
    assert max(max(row.library, row.functions, row.float64) for row in rows.values()) < 1e-5
    assert {"batch": 4, "time": 11} in [trial.sizes for trial in report.trials]
    assert {trial.outcome for trial in report.trials} == {"same"}
    assert set(report.times) == {"eager", "library", "functions"}
    told = json.loads(json.dumps(report.as_dict()))
    assert [row["name"] for row in told["sizes"] if row["open"]] == ["batch", "time", "batch", "time"]
    assert "x axis 1: open, 'time'" in str(report)
    assert "cache" in str(report)


def test_names_sizes_and_outputs_as_they_are_asked_for(tmp_path):
    report = hcmen.mamba.export(models.Named(), series(), tmp_path / "a.onnx", dynamic={1: "steps"}, functions=False)
    assert shapes(tmp_path / "a.onnx") == {"x": [2, "steps", 8], "x_out": [2, "steps", 8], "last": [2, 8]}
    assert not onnx.load(tmp_path / "a.onnx").functions
    assert [(output.name, output.functions) for output in report.outputs] == [("x_out", None), ("last", None)]


def test_every_size_of_a_picture_is_open(tmp_path):
    report = hcmen.mamba.export(models.Picture(), picture(), tmp_path / "a.onnx")
    assert shapes(tmp_path / "a.onnx")["picture"] == ["batch", 8, "height", "width"]
    (fixed,) = (size for size in report.sizes if size.name is None)
    assert (fixed.axis, fixed.example) == (1, 8)
    assert "foreign_models.py" in str(fixed.fixed_by)


@pytest.mark.parametrize(
    ("model", "given", "asked", "fixed", "mark"),
    [
        (models.CountedPixels, picture(), {2: "height"}, [2, 3], "counts pixels"),
        (models.DividedBatch, picture(8, 12), {0: "batch"}, [0], "divides windows"),
        (models.PaddedTime, series(6), {1: "time"}, [1], "fills up"),
    ],
    ids=["counted pixels", "divided batch", "padded time"],
)
def test_a_size_that_the_model_fixes_is_found_with_its_line(tmp_path, model, given, asked, fixed, mark):
    """Three ways in which models of others make a size a number; torch.onnx.export says nothing of any."""
    where = line_with(mark)
    with pytest.raises(CheckFailed, match=r"nothing was written: '\w+' \(axis") as error:
        hcmen.mamba.export(model(), given, tmp_path / "a.onnx", dynamic=asked)
    assert where in str(error.value)
    assert "\n" not in str(error.value)
    assert no_file(tmp_path)
    report = hcmen.mamba.export(model(), given, tmp_path / "a.onnx")
    closed = [size for size in report.sizes if size.name is None and size.example != 8]
    assert [size.axis for size in closed] == [axis for axis in fixed if given.shape[axis] != 8]
    assert all(where in str(size.fixed_by) for size in closed)
    assert where in str(report)
    name = "picture" if given.dim() == 4 else "x"
    for axis in fixed:
        assert shapes(tmp_path / "a.onnx")[name][axis] == given.shape[axis]


@pytest.mark.parametrize(
    ("model", "given", "options", "message"),
    [
        (models.Plain(), series(), {}, "makes no convolution or scan of hcmen's.*shim"),
        (models.Text(), series(), {}, "gives a str, expected a tensor"),
        (
            models.Stumbling(),
            series(),
            {},
            r"foreign_models.py:\d+ \(.*\): the model does not run on",
        ),
        (models.Mixer(), series()[:1], {}, "'x' has size 1 on axis 0, and its first size is tried"),
        (models.Mixer(), series(1), {"dynamic": {1: "time"}}, "'x' has size 1 on axis 1, and 'time' shall be open"),
        (models.Mixer(), series(), {"dynamic": {3: "time"}}, r"dynamic has axis 3 of 'x', expected 0 to 2"),
        (models.Mixer(), series(), {"dynamic": {0: "n", 1: "n"}}, "'n' is 2 in 'x' and 7 in 'x'"),
        (models.Mixer(), series(), {"dynamic": {"y": {0: "batch"}}}, "dynamic names an input 'y', expected one of x"),
        (models.Mixer(), series(), {"dynamic": "all"}, "dynamic is 'all', expected 'auto'"),
        (models.Mixer(), 3, {}, "example_inputs is a int"),
        (models.Mixer(), {}, {}, "no tensor among the example inputs"),
        (models.Mixer(), series().bfloat16(), {}, r"'x' is torch.bfloat16, expected float32"),
        (models.Mixer(), series().to(torch.complex64), {}, r"'x' is torch.complex64"),
        (lambda x: x, series(), {}, "the model is a function, expected a torch.nn.Module"),
        (models.Mixer().double(), series().double(), {}, r"exported in torch.float64, expected float32"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_leaves_no_file(tmp_path, model, given, options, message):
    with pytest.raises(InputError, match=message) as error:
        hcmen.mamba.export(model, given, tmp_path / "a.onnx", **options)
    assert "\n" not in str(error.value)
    assert no_file(tmp_path)


def test_a_place_that_is_taken_is_kept(tmp_path):
    path = tmp_path / "a.onnx"
    path.write_bytes(b"mine")
    with pytest.raises(InputError, match="something is there already"):
        hcmen.mamba.export(models.Mixer(), series(), path)
    assert path.read_bytes() == b"mine"
    with pytest.raises(InputError, match=r"expected a name that ends in .onnx"):
        hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.pt")
    with pytest.raises(InputError, match="no such folder"):
        hcmen.mamba.export(models.Mixer(), series(), tmp_path / "b" / "a.onnx")


def test_a_scan_in_a_region_under_autocast_is_found(tmp_path):
    """torch.export makes a graph of its own of such a region; medical models have them round each scan."""

    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = models.Mixer()

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return 2 * self.mixer(x)

    report = hcmen.mamba.export(Guarded(), series(), tmp_path / "guarded.onnx")
    assert report.verified
    assert {op: sum(modules.values()) for op, modules in report.sites.items()} == {
        "CausalConv1d": 1,
        "SelectiveScan": 1,
    }


def test_calls_whose_results_are_not_used_are_not_counted(tmp_path):
    """Another branch of a fork, or its second output: exporters leave them out of the file."""

    class Discarding(models.Mixer):
        def forward(self, x):
            super().forward(x + 1)
            return super().forward(x)

    report = hcmen.mamba.export(Discarding(), series(), tmp_path / "a.onnx")
    assert {op: sum(modules.values()) for op, modules in report.sites.items()} == {
        node.op_type: 1 for node in onnx.load(tmp_path / "a.onnx").graph.node if node.domain == "hcmen"
    }


def test_random_numbers_are_found(tmp_path):
    with pytest.raises(CheckFailed, match="it draws random numbers"):
        hcmen.mamba.export(models.Noisy(), series(), tmp_path / "a.onnx")
    assert no_file(tmp_path)


def test_a_wrong_file_is_found_and_removed(tmp_path, monkeypatch):
    """The check is given a graph whose weights are not the model's."""
    own = exporting.tidy

    def spoilt(proto, name):
        made = own(proto, name)
        weight = next(x for x in made.graph.initializer if x.name.endswith("project"))
        weight.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(weight), weight.name))
        return made

    monkeypatch.setattr(exporting, "tidy", spoilt)
    with pytest.raises(CheckFailed, match=r"output 'output' is off by .* with the library, 1.0e-05 is accepted"):
        hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.onnx")
    assert no_file(tmp_path)
    report = hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.onnx", verify=False)
    assert not report.verified
    assert "not verified" in str(report)
    monkeypatch.undo()
    report = hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.onnx", overwrite=True)
    assert report.verified


def test_what_overflows_in_float32_is_held_to_it_all_the_same(tmp_path, monkeypatch):
    """Such an output is infinitely far from float64's; that is no reason to accept any."""

    class Overflowing(models.Mixer):
        def forward(self, x):
            return 1e30 * (1 + super().forward(x).abs()) * 1e30

    assert hcmen.mamba.export(Overflowing(), series(), tmp_path / "a.onnx").verified
    own = verification._Hosts.file
    monkeypatch.setattr(verification._Hosts, "file", lambda *given: [torch.zeros_like(x) for x in own(*given)])
    with pytest.raises(CheckFailed, match=r"output 'output' is off by inf of its largest value"):
        hcmen.mamba.export(Overflowing(), series(), tmp_path / "b.onnx")
    assert not (tmp_path / "b.onnx").exists()


def test_no_memory_in_the_check_is_one_line_and_no_file(tmp_path, monkeypatch):
    own = verification._Hosts.eager
    runs = []

    def eager(self, tensors):
        runs.append(1)
        if len(runs) > 3:
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        return own(self, tensors)

    monkeypatch.setattr(verification._Hosts, "eager", eager)
    with pytest.raises(CheckFailed, match="not enough memory to check the file: give a smaller example"):
        hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.onnx")
    assert no_file(tmp_path)


def test_weights_beyond_the_limit_of_a_file_lie_beside_it(tmp_path, monkeypatch):
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer, self.out = models.Mixer(), nn.Linear(8, 4096)

        def forward(self, x):
            return self.out(self.mixer(x))

    monkeypatch.setattr(exporting, "MOST_INSIDE", 1000)
    report = hcmen.mamba.export(Wide(), series(), tmp_path / "a.onnx")
    assert report.verified
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    assert report.bytes > (tmp_path / "a.onnx.data").stat().st_size > 8 * 4096 * 4
    assert "rewrites of the graph: left as it was, the model: weights of over 2 GiB lie outside" in str(report)
    (tmp_path / "a.onnx").unlink()
    with pytest.raises(InputError, match="something is there already"):
        hcmen.mamba.export(Wide(), series(), tmp_path / "a.onnx")


def test_an_operator_that_onnx_lacks_is_named(tmp_path):
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = models.Mixer()

        def forward(self, x):
            return torch.linalg.eigvalsh(self.mixer(x) @ self.mixer(x).mT)

    with pytest.raises(BackendError, match=r"has no ONNX for a part of the model: .*linalg"):
        hcmen.mamba.export(Sorted(), series(), tmp_path / "a.onnx")
    assert no_file(tmp_path)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize("keys", [torch.int64, torch.float32])
def test_a_stable_sort_keeps_the_order_of_equals(tmp_path, descending, keys):
    """Sequences are scanned in the order of a few classes, each of many members, and put back."""

    class Ordered(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = models.Mixer()

        def forward(self, x):
            key = (x[..., 0] > 0).to(keys) + (x[..., 1] > 0).to(keys)
            order = torch.argsort(key, dim=1, descending=descending, stable=True)
            back = torch.sort(order, dim=-1, stable=True).indices
            y = self.mixer(torch.gather(x, 1, order[..., None].expand_as(x)))
            return torch.gather(y, 1, back[..., None].expand_as(y)), order

    hcmen.mamba.export(Ordered(), series(130), tmp_path / "a.onnx")
    assert shapes(tmp_path / "a.onnx")["x"] == ["batch", "time", 8]
    other = torch.randn(3, 301, 8, generator=torch.Generator().manual_seed(1))
    classes = ((other[..., 0] > 0).int() + (other[..., 1] > 0).int()).numpy()
    expected = np.argsort(-classes if descending else classes, axis=1, kind="stable")
    np.testing.assert_array_equal(ran(tmp_path / "a.onnx", {"x": other.numpy()}, True)[1], expected)


def test_a_file_is_for_other_programs_too(tmp_path):
    """Without its functions it needs the library; what removes them finds them."""
    hcmen.mamba.export(models.Mixer(), series(), tmp_path / "a.onnx", verify=False)
    model = onnx.load(tmp_path / "a.onnx")
    assert (model.ir_version, [o.version for o in model.opset_import if not o.domain]) == (9, [19])
    assert {node.op_type for node in nodes_of(strip_functions(model)) if node.domain == "hcmen"} == {
        "CausalConv1d",
        "SelectiveScan",
    }


def test_distance_is_that_of_the_largest_value():
    want = torch.tensor([0.0, -4.0, float("nan"), float("inf")])
    assert verification.distance(want, want) == 0
    assert verification.distance(want + torch.tensor([0.0, 1.0, 0.0, 0.0]), want) == 0.25
    assert verification.distance(want[:3], want) == float("inf")
    assert verification.distance(torch.tensor([0.0, 1.0]), torch.tensor([0.0, float("nan")])) == float("inf")
    assert verification.distance(torch.tensor([1]), torch.tensor([2])) == float("inf")
    assert calls.is_memory(RuntimeError("std::bad_alloc"))
