"""`hcmen-run` on bundles of links, weights mapped and not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from helpers.linked import LAYOUTS, linked
from helpers.small_bundle import clip_arrays, expected

from hcmen.base.clip import write_clip
from hcmen.base.errors import CorruptFileError
from hcmen.runtime import load
from hcmen.runtime.backends.graph import read_graph

MAPS = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 23)


@pytest.mark.parametrize("mapped", [True, False], ids=["mapped", "read"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_of_links_scores_as_its_files_do(
    shared_bundle: Path, tmp_path: Path, layout: str, mapped: bool
) -> None:
    made = linked(shared_bundle, layout, tmp_path)
    arrays = clip_arrays(3)
    write_clip(tmp_path / "clip.npz", arrays)
    command = [sys.executable, "-m", "hcmen", "run", tmp_path / "clip.npz", "--self-test", "--bundle", made]
    done = subprocess.run(
        [*command, "--format", "json", *([] if mapped else ["--no-map"])], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert answer["results"][0]["score"] == pytest.approx(expected(arrays, "full")[0], abs=1e-5)
    assert len(answer["self_test"]) == 7


@pytest.mark.skipif(not MAPS, reason=f"onnxruntime {onnxruntime.__version__} maps nothing, 1.23 does")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_behind_a_link_are_mapped_and_not_read(shared_bundle: Path, tmp_path: Path, layout: str) -> None:
    made = linked(shared_bundle, layout, tmp_path)
    with load(made, map=True) as model:
        model(clip_arrays(0))
        assert str((made / "weights.bin").resolve()) in Path("/proc/self/maps").read_text()


@pytest.mark.skipif(not MAPS, reason=f"onnxruntime {onnxruntime.__version__} maps nothing, 1.23 does")
def test_a_real_name_of_any_bytes_serves(bundle: Path, tmp_path: Path) -> None:
    real = os.fsdecode(b"\xff name\n" + b"x" * 200)
    (bundle / "weights.bin").rename(tmp_path / real)
    (bundle / "weights.bin").symlink_to(tmp_path / real)
    for way in (True, False):
        with load(bundle, map=way) as model:
            assert model(clip_arrays(0)).score == pytest.approx(expected(clip_arrays(0), "full")[0], abs=1e-5)


def test_weights_that_a_link_exchanges_are_never_run(bundle: Path, tmp_path: Path) -> None:
    content = bytearray((bundle / "weights.bin").read_bytes())
    content[0] ^= 1
    (tmp_path / "other").write_bytes(content)
    (bundle / "weights.bin").unlink()
    (bundle / "weights.bin").symlink_to(tmp_path / "other")
    for way in (True, False):
        with pytest.raises(CorruptFileError, match=r"weights\.bin: sha256"):
            load(bundle, map=way)(clip_arrays(0))


def test_the_place_of_the_weights_alone_is_given_another_name(shared_bundle: Path) -> None:
    model, size = (shared_bundle / "full.onnx").read_bytes(), (shared_bundle / "weights.bin").stat().st_size
    plain = read_graph(model, "weights.bin", size, "full.onnx")
    renamed = read_graph(model, "weights.bin", size, "full.onnx", b"abc" * 50)
    assert renamed.external == plain.external
    assert plain.model.count(b"weights.bin") == 3
    from onnx import ModelProto

    after, before = ModelProto.FromString(renamed.model), ModelProto.FromString(plain.model)
    for tensor in after.graph.initializer:
        for entry in tensor.external_data:
            assert entry.key != "location" or entry.value == "abc" * 50
            entry.value = "weights.bin" if entry.key == "location" else entry.value
    assert after == before
