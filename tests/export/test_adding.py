"""Exporting into a bundle that is there: the same checkpoint's other variants stay, all else is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command import Outcome, run
from helpers.linked import LAYOUTS, linked
from helpers.micro import MICRO

from hcmen.base.bundle import read_bundle
from hcmen.base.errors import InputError
from hcmen.base.modalities import variant_named
from hcmen.export.bundle import export_bundle
from hcmen.export.commands.export import main
from hcmen.export.kept import kept_of
from hcmen.models.hcmen.model import HCMEN
from hcmen.training.checkpoint import save_checkpoint
from hcmen.training.config import TrainConfig

TEXT, AUDIO = variant_named("text_only"), variant_named("audio_only")
Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(folder, HCMEN(MICRO).eval(), TrainConfig(), epoch=1, validation={}, dataset={"name": "test"})
    return folder


@pytest.fixture(scope="module")
def both(checkpoint, tmp_path_factory) -> Path:
    """Two variants that were exported at once; not to be changed."""
    bundle = tmp_path_factory.mktemp("both") / "bundle"
    export_bundle(checkpoint, bundle, [TEXT, AUDIO])
    return bundle


@pytest.fixture
def bundle(both, tmp_path) -> Path:
    return shutil.copytree(both, tmp_path / "bundle")


def exported(checkpoint: Path, bundle: Path, *arguments: str) -> Outcome:
    return run(main, "--checkpoint", checkpoint, "--bundle", bundle, *arguments)


def contents(folder: Path, *, without: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in files.items() if name not in without}


def edited(**changes: Any) -> Change:
    """Changes keys of manifest.json."""

    def change(bundle: Path) -> None:
        data = json.loads((bundle / "manifest.json").read_text())
        (bundle / "manifest.json").write_text(json.dumps({**data, **changes}))

    return change


def cut(name: str) -> Change:
    """Cuts a file short."""
    return lambda bundle: (bundle / name).write_bytes((bundle / name).read_bytes()[:-1])


def in_schema_1(bundle: Path) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    inputs = data.pop("inputs")
    for key in ("outputs", "scores", "front_ends"):
        del data[key]
    data |= {"schema_version": 1, "model": data["model"]["config"]}
    data["label_range"] = [inputs["label_min"], inputs["label_max"]]
    (bundle / "manifest.json").write_text(json.dumps(data))


def test_variant_by_variant_is_the_bundle_that_is_exported_at_once(checkpoint, both, tmp_path):
    export_bundle(checkpoint, tmp_path / "b", [AUDIO])
    manifest = export_bundle(checkpoint, tmp_path / "b", [TEXT])
    assert list(manifest.variants) == ["text_only", "audio_only"]
    written = ("manifest.json", "README.md")  # which tell the time
    assert contents(tmp_path / "b", without=written) == contents(both, without=written)
    for name, record in read_bundle(both).manifest.variants.items():
        assert manifest.variants[name] == record
    assert "| audio_only |" in (tmp_path / "b" / "README.md").read_text()


def test_what_is_exported_again_may_be_damaged_and_of_schema_1(checkpoint, both, bundle):
    in_schema_1(bundle)
    cut("text_only.onnx")(bundle)
    cut("golden/text_only.npz")(bundle)
    done = exported(checkpoint, bundle, "--variant", "text_only", "--format", "json")
    assert done.code == 0, done.err
    assert list(json.loads(done.out)["variants"]) == ["text_only", "audio_only"]
    assert f"{bundle}: is of this checkpoint, audio_only stays" in done.lines
    read_bundle(bundle).verify()
    assert json.loads((bundle / "manifest.json").read_text())["schema_version"] == 2
    assert (bundle / "weights.bin").read_bytes() == (both / "weights.bin").read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bundle_of_links_gets_another_variant_and_its_cache_stays(checkpoint, both, tmp_path, layout):
    """What is there is read through its links; the new bundle is files, and nothing is written through a link."""
    bundle = linked(both, layout, tmp_path / "cache")
    before = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file() and bundle not in p.parents}
    done = exported(checkpoint, bundle, "--variant", "audio_missing")
    assert done.code == 0, done.err
    assert f"{bundle}: is of this checkpoint, text_only, audio_only stay" in done.lines
    opened = read_bundle(bundle)
    opened.verify()
    assert set(opened.manifest.variants) == {"text_only", "audio_only", "audio_missing"}
    assert not any(p.is_symlink() for p in bundle.rglob("*"))
    assert {p: p.read_bytes() for p in before} == before
    assert not [p for p in bundle.parent.iterdir() if p.name.startswith(f".{bundle.name}.")]


REFUSED: dict[str, tuple[Change, int, str]] = {
    "another checkpoint": (
        edited(source={"checkpoint_sha256": "0" * 64}),
        2,
        "holds a bundle of another checkpoint (000000000000...)",
    ),
    "no checkpoint": (edited(source={}), 2, "holds a bundle of another checkpoint"),
    "another precision": (edited(precision="fp16"), 2, "its graphs are fp16, and a bundle has one precision"),
    "another opset": (edited(opset=17), 2, "audio_only would stay, and another version of hcmen exported them"),
    "a schema to come": (edited(schema_version=3), 2, "schema_version is 3"),
    "ops to come": (edited(op={"domain": "hcmen", "version": 2}), 3, "the graphs need ops 'hcmen' version 2"),
    "a damaged manifest": (edited(weights=None), 5, "weights"),
    "damaged weights": (cut("weights.bin"), 5, "the manifest says"),
    "a damaged graph": (cut("audio_only.onnx"), 5, "the manifest says"),
    "a damaged golden set": (cut("golden/audio_only.npz"), 5, "the manifest says"),
    "a missing graph": (lambda bundle: (bundle / "audio_only.onnx").unlink(), 5, "missing from the bundle"),
    "no manifest": (lambda bundle: (bundle / "manifest.json").write_text("{"), 2, "a folder that is no bundle"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_stay_is_refused_in_one_line_and_left_alone(checkpoint, bundle, what):
    change, code, message = REFUSED[what]
    change(bundle)
    before = contents(bundle)
    done = exported(checkpoint, bundle, "--variant", "text_only")
    assert done.code == code, done.err
    assert len(done.lines) == 1, done.err
    assert str(bundle) in done.err
    assert message in done.err
    assert "--force" in done.err
    assert contents(bundle) == before


@pytest.mark.parametrize("what", ["another checkpoint", "another precision", "a schema to come"])
def test_all_variants_go_over_another_bundle_with_force_alone(checkpoint, bundle, what):
    """Naming no variant is no leave to lose what cannot be made again."""
    REFUSED[what][0](bundle)
    before = contents(bundle)
    assert exported(checkpoint, bundle).code == 2
    assert contents(bundle) == before


def test_force_replaces_what_cannot_stay_and_nothing_else(checkpoint, bundle):
    done = exported(checkpoint, bundle, "--variant", "text_only", "--force")
    assert done.code == 0, done.err
    assert list(read_bundle(bundle).manifest.variants) == ["text_only", "audio_only"]
    REFUSED["another checkpoint"][0](bundle)
    done = exported(checkpoint, bundle, "--variant", "text_only", "--force")
    assert done.code == 0, done.err
    assert any(line.startswith("--force replaces the bundle that is there: ") for line in done.lines)
    assert list(read_bundle(bundle).manifest.variants) == ["text_only"]
    assert not (bundle / "audio_only.onnx").exists()


def test_a_bundle_that_another_export_wrote_meanwhile_is_not_replaced(bundle, tmp_path):
    def kept(target: Path) -> Any:
        sha = read_bundle(bundle).manifest.source["checkpoint_sha256"]
        return kept_of(
            target,
            [TEXT],
            checkpoint_sha256=sha,
            precision="fp32",
            inputs=MICRO.inputs,
            force=False,
            note=lambda line: None,
        )

    for target in (bundle, tmp_path / "new"):
        before = kept(target)
        before.check_unchanged()
        if target != bundle:
            shutil.copytree(bundle, target)
        edited(created="later")(target)
        with pytest.raises(InputError, match="another export wrote it meanwhile"):
            before.check_unchanged()
