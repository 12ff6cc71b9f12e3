"""The predictor on hand-made graphs of standard operators: numbers against NumPy, loading, safety, threads."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from helpers.small_bundle import INPUTS, clip_arrays, expected, graph, make_bundle, weights
from onnx import TensorProto, helper, numpy_helper

import hcmen.runtime.backends.ort as ort
from hcmen.base.bundle import Bundle, read_bundle
from hcmen.base.clip import Clip, batch_clips, write_clip
from hcmen.base.errors import BackendError, CheckFailed, CorruptFileError, InputError
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.runtime import Predictor, load
from hcmen.runtime.backends.graph import read_graph
from hcmen.runtime.predictor import BATCH_CLIPS


def assert_right(result, arrays, variant: str) -> None:
    score, modality_weights = expected(arrays, variant)
    assert result.variant == variant
    assert result.score == pytest.approx(score, abs=2e-6)
    assert list(result.modality_weights) == list(MODALITIES)
    np.testing.assert_allclose(list(result.modality_weights.values()), modality_weights, atol=2e-6)


@pytest.fixture(scope="module")
def model(shared_bundle) -> Predictor:
    return load(shared_bundle)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
@pytest.mark.parametrize("form", ["path", "Path", "Clip", "dict"])
def test_what_a_clip_carries_decides_the_variant(model, tmp_path, variant, form):
    arrays = clip_arrays(11, variant.present)
    write_clip(tmp_path / "c.npz", arrays)
    clip = {
        "path": str(tmp_path / "c.npz"),
        "Path": tmp_path / "c.npz",
        "Clip": Clip("mine", arrays),
        "dict": arrays,
    }[form]
    result = model(clip)
    assert_right(result, arrays, variant.name)
    assert result.name == {"path": clip, "Path": str(clip), "Clip": "mine", "dict": "clip"}[form]
    assert (result.backend, result.kernels, result.ignored, result.batch_size) == ("ort", "standard", (), 1)


@pytest.mark.parametrize("count", [1, 2, 31, 32, 33, 70, 300])
def test_many_clips_keep_their_order_whatever_their_variants(model, count):
    clips = [clip_arrays(i, VARIANTS[i * i % 7].present) for i in range(count)]
    results = model(clips)
    assert len(results) == count
    for i, (result, arrays) in enumerate(zip(results, clips, strict=True)):
        assert_right(result, arrays, VARIANTS[i * i % 7].name)
        assert result.batch_size <= BATCH_CLIPS


def test_clips_of_a_variant_run_together(shared_bundle, monkeypatch):
    model = load(shared_bundle)
    runs = []
    model_run = ort.OrtSession.run
    monkeypatch.setattr(ort.OrtSession, "run", lambda s, inputs: runs.append(len(inputs)) or model_run(s, inputs))
    list(model.outcomes([clip_arrays(i, VARIANTS[i % 2].present) for i in range(40)]))
    assert len(runs) == 2
    runs.clear()
    model([clip_arrays(i) for i in range(BATCH_CLIPS + 1)])
    assert len(runs) == 2


def test_an_observer_is_told_the_places_of_every_batch(model):
    """Over more clips than are read ahead, with bad ones between: each place once, beside its own inputs and score."""
    clips = [clip_arrays(i, VARIANTS[i % 3].present) for i in range(600)]
    bad = {5, 255, 256, 300, 599}
    told = {}

    def observe(variant, places, inputs, outputs):
        length = inputs[f"{variant_named(variant).present[0]}_length"]
        assert len(places) == len(length) == len(outputs["score"])
        told.update(zip(places, zip([variant] * len(places), length, outputs["score"], strict=True), strict=True))

    items = [{} if i in bad else c for i, c in enumerate(clips)]
    outcomes = list(model.outcomes(items, observe=observe))
    assert sorted(told) == [i for i in range(600) if i not in bad]
    for i, (variant, length, score) in told.items():
        assert variant == outcomes[i].variant == VARIANTS[i % 3].name
        assert length == len(clips[i][VARIANTS[i % 3].present[0]])
        assert float(score) == outcomes[i].score
    assert all(isinstance(outcomes[i], InputError) for i in bad)


def test_what_is_no_clip_is_refused_with_what_is_expected(model):
    for nothing, told in ((3, "of type int"), (None, "of type NoneType"), ([], "no clip was given")):
        with pytest.raises(InputError, match=f"{told}.*expected a"):
            model(nothing)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.name)
def test_a_variant_asked_for_ignores_the_rest_and_says_so(model, variant):
    arrays = clip_arrays(12)
    result = model(arrays, variant=variant.name)
    assert_right(result, arrays, variant.name)
    assert result.ignored == variant.absent


def test_a_variant_that_needs_what_is_absent_is_refused(model):
    with pytest.raises(InputError, match=r"'full' needs text and vision, the clip has only audio: use .*'audio_only'"):
        model(clip_arrays(0, ("audio",)), variant="full")
    with pytest.raises(InputError, match="unknown variant 'ful': did you mean 'full'"):
        model(clip_arrays(0), variant="ful")
    with pytest.raises(InputError, match="a clip is of type int"):
        model([3])


def test_a_bad_clip_does_not_stop_the_others(model, tmp_path):
    good = clip_arrays(1)
    outcomes = list(model.outcomes([good, tmp_path / "none.npz", {"text": np.zeros((1, 5))}, good]))
    assert [isinstance(o, InputError) for o in outcomes] == [False, True, True, False]
    assert_right(outcomes[3], good, "full")
    with pytest.raises(InputError, match=r"none\.npz: no such file"):
        model([good, tmp_path / "none.npz"])


def test_a_clip_made_by_hand_is_checked_like_a_file(model):
    arrays = clip_arrays(1)
    arrays["text"][0, 0] = np.nan
    with pytest.raises(InputError, match="mine: text has 1 NaN"):
        model(Clip("mine", arrays))
    with pytest.raises(InputError, match="5 features"):
        model(Clip("mine", {"text": np.zeros((2, 5), np.float32)}))


def test_clean_is_counted_in_the_result(shared_bundle):
    arrays = clip_arrays(1)
    arrays["text"][0, :2] = np.nan
    result = load(shared_bundle, clean=True)(arrays)
    assert result.cleaned == {"text": 2}
    arrays["text"][0, :2] = 0
    assert_right(result, arrays, "full")


def test_variants_are_loaded_on_demand_and_share_one_copy_of_the_weights(shared_bundle, monkeypatch):
    read = []
    monkeypatch.setattr(
        Bundle, "verified", lambda b, r, keep, real=Bundle.verified: read.append(r.file) or real(b, r, keep=keep)
    )
    model = load(shared_bundle)
    assert read == []
    model(clip_arrays(0, ("text",)))
    model(clip_arrays(1, ("text",)))
    assert sorted(read) == ["text_only.onnx", "weights.bin"]
    model(clip_arrays(1))
    assert sorted(read) == ["full.onnx", "text_only.onnx", "weights.bin"]


MAPS = pytest.mark.skipif(
    ort._release(onnxruntime.__version__) < ort._MAPS_FROM,
    reason=f"onnxruntime {onnxruntime.__version__} maps nothing, 1.23 does",
)


@pytest.mark.parametrize("library", [True, False], ids=["kernels", "functions"])
@pytest.mark.parametrize("change", ["zeros", "gone"])
@pytest.mark.parametrize("mapped", [pytest.param(True, marks=MAPS), False], ids=["mapped", "copied"])
def test_what_was_verified_is_what_runs(tmp_path, monkeypatch, library, change, mapped):
    """weights.bin is exchanged or removed once it is read: the next variant still runs on what was verified, which an
    older ONNX Runtime has in memory, or it is refused."""
    if not mapped:
        monkeypatch.setattr(ort, "_MAPS_FROM", (99, 0))
    path = make_bundle(tmp_path / "b", ("full", "text_only"), graphs={"text_only": with_conv(True)})
    if not library:
        monkeypatch.setattr(ort, "library_path", no_library)
    model = load(path)
    model(clip_arrays(0))
    size = (path / "weights.bin").stat().st_size
    (path / "weights.bin").unlink()
    if change == "zeros":
        (path / "weights.bin").write_bytes(bytes(size))
    arrays = clip_arrays(3, ("text",))
    for opened in (model, load(path)) if mapped else (load(path),):
        with pytest.raises(CorruptFileError, match=r"altered|missing"):
            opened(arrays)
    if not mapped:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = model(arrays)
        assert_right(result, arrays, "text_only")
        assert result.kernels == ("native" if library else "functions")


@MAPS
@pytest.mark.parametrize("change", ["altered", "exchanged", "touched"])
def test_weights_that_change_while_they_are_mapped_are_refused(bundle, monkeypatch, change):
    """The file changes after it was hashed and before ONNX Runtime opens it."""
    file = bundle / "weights.bin"
    content = file.read_bytes()

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *arguments, **options):
            if change == "exchanged":
                file.unlink()
            file.write_bytes(content if change == "touched" else bytes(len(content)))
            super().__init__(*arguments, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    model = load(bundle)
    with pytest.raises(CorruptFileError, match=r"weights\.bin: changed while it was being loaded"):
        model(clip_arrays(0))
    monkeypatch.undo()
    if change == "touched":
        assert_right(model(clip_arrays(0)), clip_arrays(0), "full")
    else:
        with pytest.raises(CorruptFileError, match=r"weights\.bin: sha256"):
            model(clip_arrays(0))


@MAPS
@pytest.mark.parametrize("prepack", [True, False, None])
def test_sessions_share_the_mapped_weights_unless_each_packs_its_own(micro_bundle, prepack):
    """The micro bundle has products to pack; those that are stay mapped in no session."""
    code = f"""
from hcmen.runtime import load
model = load({str(micro_bundle)!r}, prepack={prepack})
for test in model.self_test():
    assert test.passed, test
print(open("/proc/self/maps").read().count("weights.bin"), *(model.backend.maps_weights,))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    count, maps = done.stdout.split()
    assert maps == "True"
    assert int(count) > 0
    if prepack:
        assert int(count) < mapped_without_packing(micro_bundle)


def mapped_without_packing(bundle: Path) -> int:
    """How many tensors of all variants' graphs lie in weights.bin."""
    size = (bundle / "weights.bin").stat().st_size
    return sum(len(read_graph(p.read_bytes(), "weights.bin", size, p.name).external) for p in bundle.glob("*.onnx"))


def no_library() -> Path:
    raise BackendError("libhcmen_ops.so was not found")


@pytest.mark.parametrize("name", ["full.onnx", "weights.bin"])
def test_an_altered_file_is_never_run(bundle, name):
    content = bytearray((bundle / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle / name).write_bytes(content)
    with pytest.raises(CorruptFileError, match=f"{name}: sha256"):
        load(bundle)(clip_arrays(0))


def test_the_working_directory_does_not_matter(shared_bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(shared_bundle.parent)
    model = load(shared_bundle.name)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"not these")
    write_clip("c.npz", clip_arrays(5))
    assert_right(model("c.npz"), clip_arrays(5), "full")


def test_self_test_passes_on_the_truth_and_fails_on_other_weights(shared_bundle, tmp_path):
    tests = list(load(shared_bundle).self_test())
    assert [t.variant for t in tests] == [v.name for v in VARIANTS]
    assert all(t.passed and t.cases == 4 for t in tests)
    assert all(t.outputs["score"].elements == 1 + 2 + 3 + 4 for t in tests)
    wrong = make_bundle(tmp_path / "wrong", ("full", "text_only"), scale=1.001)
    full, text_only = load(wrong).self_test()
    assert not full.passed
    assert not full.outputs["score"].passed
    assert text_only.outputs["modality_weights"].passed  # one modality has all the weight, whatever the numbers
    assert not text_only.passed


def test_damaged_golden_sets_are_refused(tmp_path, monkeypatch):
    import helpers.small_bundle as small

    whole = small.golden("text_only")
    dates = {name: x.astype("M8[s]") if name.endswith("/score") else x for name, x in whole.items()}
    for change, why in (
        ({}, "no case in it"),
        ({"000/text": np.zeros((1, 1, 6), np.float32)}, "a case lacks 'text_length'"),
        ({"000/text": np.array([[None]], object)}, "damaged golden file"),
        (dates, r"'score' is datetime64\[s\], expected numbers"),
    ):
        monkeypatch.setattr(small, "golden", lambda name, change=change: change)
        path = make_bundle(tmp_path / "b", ("text_only",))
        with pytest.raises(CorruptFileError, match=why):
            list(load(path).self_test())


def test_a_score_that_is_no_number_is_a_failed_check(tmp_path):
    proto = graph("text_only")
    bias = next(t for t in proto.graph.initializer if t.name == "bias")
    bias.CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), "bias"))
    model = load(make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": proto}))
    with pytest.raises(CheckFailed, match="variant 'text_only' gave score nan"):
        model(clip_arrays(0, ("text",)))
    (test,) = model.self_test()
    assert not test.passed
    assert test.outputs["score"].nan == 10


def test_a_variant_whose_parity_failed_at_export_is_warned_of(tmp_path, monkeypatch):
    path = make_bundle(tmp_path / "b", ("text_only",))
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"passed": true', '"passed": false'))
    model = load(path)
    with pytest.warns(RuntimeWarning, match="failed its parity check"):
        model(clip_arrays(0, ("text",)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(model.self_test())


def test_wrong_arguments_are_refused(shared_bundle):
    for backend, hint in (("openvino", ""), ("Ort", r"did you mean 'ort'\? "), ("", "")):
        with pytest.raises(InputError, match=f"unknown backend '{backend}': {hint}choose from auto, ort"):
            load(shared_bundle, backend=backend)
    for threads in (0, -1, 5000):
        with pytest.raises(InputError, match=f"threads is {threads}, expected 1 to 1024"):
            load(shared_bundle, threads=threads)


def test_threads_and_backend_are_what_was_asked(shared_bundle):
    model = load(shared_bundle, backend="ort", threads=3)
    assert (model.backend.name, model.backend.threads) == ("ort", 3)
    assert load(shared_bundle).backend.threads == ort.physical_cores() >= 1
    model.run("text_only", batch_clips([Clip("c", clip_arrays(0, ("text",)))]))
    assert model._sessions["text_only"]._session.get_providers() == ["CPUExecutionProvider"]


def test_one_model_serves_many_threads(shared_bundle):
    model = load(shared_bundle, threads=1)
    clips = [clip_arrays(i, VARIANTS[i % 7].present) for i in range(28)]
    answers: dict[int, list] = {}

    def work(me: int) -> None:
        answers[me] = [model(c) for c in clips[me:] + clips[:me]]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(answers) == 6
    for me, results in answers.items():
        for result, arrays in zip(results, clips[me:] + clips[:me], strict=True):
            assert_right(result, arrays, result.variant)
    assert len(model._sessions) == 7


# --- ONNX Runtime and what it must not do ---------------------------------------------------------------------------


def test_without_onnxruntime_the_error_names_the_cure(shared_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BackendError, match=r"onnxruntime.* is not installed|does not load"):
        load(shared_bundle)


def test_a_half_overwritten_onnxruntime_is_told(shared_bundle, monkeypatch):
    import types

    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    with pytest.raises(BackendError, match="onnxruntime and onnxruntime-gpu were both installed"):
        load(shared_bundle)


def nested(proto: onnx.ModelProto, tensor: TensorProto, place: str) -> onnx.ModelProto:
    """`proto` with `tensor` in a place where no weight belongs."""
    node = helper.make_node("Constant", [], ["unused"])
    attribute = node.attribute.add(name="value", type=onnx.AttributeProto.TENSOR)
    attribute.t.CopyFrom(tensor)
    if place == "constant":
        proto.graph.node.append(node)
    elif place == "subgraph":
        branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("unused", 1, None)])
        proto.graph.node.append(helper.make_node("If", ["zero"], ["out"], then_branch=branch, else_branch=branch))
    elif place == "subgraph initializer":
        branch = helper.make_graph([], "branch", [], [helper.make_tensor_value_info("w", 1, None)], [tensor])
        proto.graph.node.append(helper.make_node("If", ["zero"], ["out"], then_branch=branch, else_branch=branch))
    elif place == "function":
        opsets = [helper.make_opsetid("", 19)]
        proto.functions.append(helper.make_function("hcmen", "F", [], ["unused"], [node], opsets))
    elif place == "sparse":
        proto.graph.sparse_initializer.add().values.CopyFrom(tensor)
    elif place == "training":
        proto.training_info.add().initialization.initializer.append(tensor)
    return proto


def external(**entries: str) -> TensorProto:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    return tensor


@pytest.mark.parametrize("place", ["constant", "subgraph", "subgraph initializer", "function", "sparse", "training"])
def test_external_data_anywhere_but_at_the_top_is_refused(tmp_path, place):
    proto = nested(graph("text_only"), external(location="weights.bin", offset="0", length="8"), place)
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": proto})
    with pytest.raises(CorruptFileError, match="nested tensor has external data"):
        load(path)(clip_arrays(0, ("text",)))


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../weights.bin", "./weights.bin", "other.bin", "", "weights.bin\x00", "WEIGHTS.BIN"]
)
def test_external_data_in_another_file_is_refused(tmp_path, location):
    proto = graph("text_only", location=location)
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": proto})
    with pytest.raises(CorruptFileError, match=r"expected 'weights\.bin' alone"):
        load(path)(clip_arrays(0, ("text",)))


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": "-4"},
        {"offset": "45"},
        {"offset": "99999999999999999999"},
        {"offset": "0x0"},
        {"offset": ""},
        {"length": "4"},
        {"length": "12"},
        {"offset": "\N{ARABIC-INDIC DIGIT ONE}"},
    ],
    ids=repr,
)
def test_external_data_out_of_range_is_refused(entries):
    tensor = external(**{"location": "weights.bin", "offset": "0", "length": "8", **entries})
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
    with pytest.raises(CorruptFileError, match="expected 8 bytes within 52"):
        read_graph(model, "weights.bin", 52, "g")


def test_external_data_is_found_and_viewed_in_place():
    tensors = [external(location="weights.bin", offset="8", length="8"), external(location="weights.bin")]
    tensors[1].dims[:] = [2, 1]
    tensors[1].data_type = TensorProto.INT64
    model = helper.make_model(helper.make_graph([], "g", [], [], tensors)).SerializeToString()
    found = read_graph(model, "weights.bin", 16, "g").external
    assert [(t.dtype, t.shape, t.offset) for t in found] == [("float32", (2,), 8), ("int64", (2, 1), 0)]
    content = np.arange(4, dtype=np.float32).view(np.uint8)
    assert found[0].view(content).tolist() == [2.0, 3.0]
    assert np.shares_memory(found[0].view(content), content)
    doubled = external(location="weights.bin", offset="0", length="8")
    doubled.external_data.add(key="location", value="/etc/passwd")
    model = helper.make_model(helper.make_graph([], "g", [], [], [doubled])).SerializeToString()
    with pytest.raises(CorruptFileError, match="'location' twice"):
        read_graph(model, "weights.bin", 16, "g")


def test_every_truncation_of_a_graph_is_refused_or_read(shared_bundle):
    """Cut anywhere, the reader ends with an answer or an expected error; never with another, never in a loop."""
    content = (shared_bundle / "full.onnx").read_bytes()
    refused = 0
    for end in range(len(content)):
        try:
            read_graph(content[:end], "weights.bin", 52, "g")
        except CorruptFileError:
            refused += 1
    assert refused > 0.9 * len(content)


def test_random_bytes_are_no_graph():
    rng = np.random.default_rng(0)
    for _ in range(300):
        try:
            read_graph(rng.bytes(int(rng.integers(0, 200))), "weights.bin", 52, "g")
        except CorruptFileError as error:
            assert "\n" not in str(error)  # noqa: PT017 - some random bytes are a message
    deep = b""
    for _ in range(60):
        deep = b"\x32" + varint(len(deep)) + deep  # Attribute.g
        deep = b"\x2a" + varint(len(deep)) + deep  # Node.attribute
        deep = b"\x0a" + varint(len(deep)) + deep  # Graph.node
    with pytest.raises(CorruptFileError, match="nested more than 32 deep"):
        read_graph(b"\x3a" + varint(len(deep)) + deep, "weights.bin", 52, "g")


def varint(value: int) -> bytes:
    out = b""
    while value > 127:
        out, value = out + bytes([value & 127 | 128]), value >> 7
    return out + bytes([value])


def test_a_truncated_graph_under_a_manifest_that_agrees_is_refused(tmp_path):
    class Cut:
        def __init__(self, length: int) -> None:
            self.length = length

        def SerializeToString(self) -> bytes:
            return graph("text_only").SerializeToString()[: self.length]

    for length in (1, 100, 500, 900):
        path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": Cut(length)})
        with pytest.raises(CorruptFileError):
            load(path)(clip_arrays(0, ("text",)))


def test_an_operator_nobody_has_names_onnxruntime_as_too_old(tmp_path):
    proto = graph("text_only", domain="hcmen")
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": proto})
    with pytest.raises(BackendError, match=r"cannot load it .*upgrade onnxruntime"):
        load(path)(clip_arrays(0, ("text",)))


def with_conv(functions: bool) -> onnx.ModelProto:
    """text_only with an hcmen::CausalConv1d whose weight is the identity, before everything else."""
    from hcmen.mamba.functions import add_functions

    proto = graph("text_only")
    for node in proto.graph.node:
        node.input[:] = ["conv" if name == "text" else name for name in node.input]
    identity = np.zeros((6, 4), np.float32)
    identity[:, -1] = 1
    proto.graph.initializer.append(numpy_helper.from_array(identity, "taps"))
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(6, np.float32), "no_bias"))
    proto.graph.node.insert(
        0,
        helper.make_node(
            "CausalConv1d",
            ["text", "taps", "no_bias"],
            ["conv"],
            domain="hcmen",
            activation="none",
            reverse=0,
            plugin_namespace="hcmen",
            plugin_version="1",
        ),
    )
    proto.opset_import.append(helper.make_opsetid("hcmen", 1))
    return add_functions(proto) if functions else proto


def test_kernels_and_functions_give_the_same_score_and_are_told_apart(tmp_path, monkeypatch):
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": with_conv(True)})
    arrays = clip_arrays(8, ("text",))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native = load(path)(arrays)
    assert native.kernels == "native"
    assert_right(native, arrays, "text_only")

    monkeypatch.setattr(ort, "library_path", no_library)
    with pytest.warns(RuntimeWarning, match=r"without the kernel library, .*slower: libhcmen_ops\.so was not found"):
        slow = load(path)(arrays)
    assert slow.kernels == "functions"
    assert_right(slow, arrays, "text_only")


def test_a_library_that_does_not_load_is_told_and_not_trusted(tmp_path, monkeypatch):
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": with_conv(True)})
    (tmp_path / "libhcmen_ops.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(ort, "library_path", lambda: tmp_path / "libhcmen_ops.so")
    with pytest.warns(RuntimeWarning, match="ONNX Runtime .* refused"):
        result = load(path)(clip_arrays(8, ("text",)))
    assert result.kernels == "functions"


def test_without_function_and_library_the_graph_does_not_run(tmp_path, monkeypatch):
    path = make_bundle(tmp_path / "b", ("text_only",), graphs={"text_only": with_conv(False)})
    monkeypatch.setattr(ort, "library_path", lambda: tmp_path / "none.so")
    with pytest.warns(RuntimeWarning), pytest.raises(BackendError, match="cannot load it"):
        load(path)(clip_arrays(8, ("text",)))


def test_a_session_costs_one_copy_of_its_weights():
    """And that where they cannot be packed: 64 MiB that are added, not multiplied."""
    script = """
        import numpy as np
        from onnx import TensorProto, helper
        from hcmen.runtime.backends import Ort
        from hcmen.runtime.backends.ort import OrtBackend

        def rss():
            return int(open("/proc/self/statm").read().split()[1]) * 4096

        count = 16 << 20
        tensor = TensorProto(name="w", data_type=1, dims=[count], data_location=1)
        for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", str(4 * count))):
            tensor.external_data.add(key=key, value=value)
        io = [helper.make_tensor_value_info(n, 1, ["n"]) for n in "xy"]
        graph = helper.make_graph([helper.make_node("Add", ["x", "w"], ["y"])], "g", io[:1], io[1:], [tensor])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9).SerializeToString()
        weights = np.ones(4 * count, np.uint8)
        backend = OrtBackend(Ort(threads=1))
        sessions = [backend.session(model, weights, "weights.bin", "a")]
        before = rss()
        sessions += [backend.session(model, weights, "weights.bin", "b") for _ in range(3)]
        print(rss() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 3 * (64 + 8) << 20


def test_the_numpy_twin_of_this_test_masks_nothing_by_accident(model):
    """Padding is really there: a batch of unequal lengths, each with the score it has alone."""
    clips = [clip_arrays(i, ("text", "vision"), text=n, vision=15 - n) for i, n in enumerate((1, 12, 5))]
    for together, arrays in zip(model(clips), clips, strict=True):
        alone = model(arrays)
        assert together.batch_size == 3
        assert together.score == pytest.approx(alone.score, abs=1e-6)
    assert {m: w.shape for m, w in weights().items()} == {m: (INPUTS.modality(m).features,) for m in MODALITIES}
    assert variant_named("audio_missing").present == ("text", "vision")
    assert read_bundle(model.bundle.path).manifest == model.bundle.manifest
