"""A kind of model that nothing of ours has heard of (late_fusion.py) goes all the way: training, export, runtime."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers.processes import loaded_after
from models.late_fusion import KIND, LateFusionConfig

from hcmen.base.bundle import read_bundle
from hcmen.base.clip import read_clip
from hcmen.base.errors import BackendError, InputError
from hcmen.base.inputs import FeatureConfig
from hcmen.base.modalities import MODALITIES, VARIANTS, variant_named
from hcmen.data.mmsa import read_mmsa
from hcmen.data.protocols import protocol_named
from hcmen.data.synthetic import make_synthetic, write_synthetic
from hcmen.export.bench_eager import Engines
from hcmen.export.bundle import export_bundle
from hcmen.export.parity import eager_outputs
from hcmen.export.variants import export_variant
from hcmen.models import registry
from hcmen.runtime import load
from hcmen.training.checkpoint import load_checkpoint
from hcmen.training.command import _save_clips
from hcmen.training.config import TrainConfig
from hcmen.training.evaluate import predict, predict_masked
from hcmen.training.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
CONFIG = LateFusionConfig(FeatureConfig(6, 10), FeatureConfig(3, 16), FeatureConfig(4, 16))
# Every term of the objective that any kind has is on.
TRAIN = TrainConfig(epochs=8, batch_size=16, learning_rate=5e-2, mix="ms-mix")


@pytest.fixture(scope="module", autouse=True)
def registered() -> Iterator[None]:
    before = dict(registry._KINDS)
    registry.register(KIND)
    yield
    registry._KINDS.clear()
    registry._KINDS.update(before)


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "data.pkl"
    write_synthetic(path, make_synthetic(CONFIG.inputs, (96, 24, 24)))
    return path


@pytest.fixture(scope="module")
def trainer(data_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    out = tmp_path_factory.mktemp("train")
    trainer = Trainer(CONFIG, TRAIN, read_mmsa(data_file, CONFIG.inputs), out)
    trainer.run()
    _save_clips(out / "clips", trainer.dataset.splits["valid"])
    return trainer


@pytest.fixture(scope="module")
def bundle(trainer: Trainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "bundle"
    export_bundle(trainer.out, path)
    return path


def oracle(checkpoint: Path, features: dict[str, np.ndarray]) -> tuple[float, np.ndarray]:
    """(score, modality_weights) of one clip by NumPy in float64, from the weights in the checkpoint."""
    stored = safetensors.numpy.load_file(checkpoint / "checkpoint.safetensors")
    w = {name: x.astype(np.float64) for name, x in stored.items()}
    said = {}
    for m, x in features.items():
        mean = ((x.astype(np.float64) - w[f"mean_{m}"]) / w[f"std_{m}"]).mean(axis=0)
        token = np.tanh(w[f"token.{m}.weight"] @ mean + w[f"token.{m}.bias"])
        said[m] = w[f"says.{m}.weight"] @ token + w[f"says.{m}.bias"]
    counts = np.exp(np.array([said[m][1] if m in said else -np.inf for m in MODALITIES]))
    weights = counts / counts.sum()
    return float(sum(weights[MODALITIES.index(m)] * s[0] for m, s in said.items())), weights


def test_it_trains_with_mixing_and_missing_modalities(trainer: Trainer):
    first, last = trainer.history[0], trainer.history[-1]
    assert {name for name in first if name.endswith("loss")} == {"loss", "task_loss", "mix_loss", "intensity_loss"}
    assert last["task_loss"] < 0.85 * first["task_loss"]
    assert last["mix_loss"] > 0
    assert last["intensity_loss"] > 0
    assert set(last["validation"]) == {v.name for v in VARIANTS}
    config = json.loads((trainer.out / "config.json").read_text())
    assert (config["kind"], config["model"]) == ("late-fusion", CONFIG.to_json())


def test_a_run_is_resumed_to_the_same_end(trainer: Trainer, tmp_path: Path):
    half = Trainer(CONFIG, TRAIN, trainer.dataset, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        half.run(on_epoch=lambda record: (_ for _ in ()).throw(KeyboardInterrupt) if record["epoch"] == 3 else None)
    rest = Trainer(CONFIG, TRAIN, trainer.dataset, tmp_path)
    rest.resume()
    assert len(rest.history) == 3
    rest.run()
    for name, x in trainer.model.state_dict().items():
        torch.testing.assert_close(rest.model.state_dict()[name], x, rtol=0, atol=0)


def test_present_and_left_out_are_the_same(trainer: Trainer):
    split = trainer.dataset.splits["test"]
    model, _ = load_checkpoint(trainer.out)
    features = {m: torch.from_numpy(split.features[m]) for m in MODALITIES}
    lengths = {m: torch.from_numpy(split.lengths[m]) for m in MODALITIES}
    for variant in VARIANTS:
        present = torch.tensor([variant.mask]).expand(len(split), -1)
        expected = predict(model, split, variant)
        with torch.inference_mode():
            got = model(features, lengths, present).score.double().numpy()
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("protocol", ["fixed", "intra"])
def test_it_is_judged_under_the_protocols(trainer: Trainer, protocol: str):
    split = trainer.dataset.splits["test"]
    for masks in protocol_named(protocol).apply(split, 0).values():
        scores = predict_masked(trainer.model, split, masks)
        assert scores.shape == (len(split),)
        assert np.isfinite(scores).all()


def test_seven_variants_are_exported_with_parity(bundle: Path, trainer: Trainer):
    opened = read_bundle(bundle)
    opened.verify()
    manifest = opened.manifest
    assert list(manifest.variants) == [v.name for v in VARIANTS]
    assert all(v.parity["passed"] for v in manifest.variants.values())
    assert manifest.inputs == CONFIG.inputs
    assert manifest.model.kind == "late-fusion"
    assert dict(manifest.model.config) == CONFIG.to_json()
    reached = {s.variant: s.measures["mae"] for s in manifest.scores if s.split == "valid"}
    assert reached == pytest.approx(trainer.best["validation"])
    card = (bundle / "README.md").read_text()
    assert "Late fusion" in card
    assert "from -3 (against) to 3 (in favour)" in card
    assert manifest.weights.sha256 in card
    assert all(f"| {name} |" in card for name in manifest.variants)


@pytest.mark.parametrize("variant", [v.name for v in VARIANTS])
def test_the_runtime_says_what_the_formula_says(bundle: Path, trainer: Trainer, variant: str):
    model = load(bundle)
    assert [t.passed for t in model.self_test((variant,))] == [True]
    engines = Engines(str(trainer.out))
    for path in sorted((trainer.out / "clips").iterdir())[:3]:
        clip = read_clip(path, model.inputs)
        present = variant_named(variant).present
        score, weights = oracle(trainer.out, {m: clip.features[m] for m in present})
        got = model(str(path), variant=variant)
        assert got.score == pytest.approx(score, abs=1e-5)
        assert list(got.modality_weights.values()) == pytest.approx(weights, abs=1e-5)
        feed = {m: np.array(clip.features[m][None]) for m in present}
        feed |= {f"{m}_length": np.array([len(clip.features[m])]) for m in present}
        for eager in (eager_outputs(trainer.out, variant, feed), engines.outputs("eager", variant, feed)):
            assert eager["score"][0] == pytest.approx(score, abs=1e-5)


def test_the_runtime_knows_no_kinds(bundle: Path, trainer: Trainer):
    """Another process, to which nobody told of this one, runs the bundle, and without torch."""
    clip = next(iter(sorted((trainer.out / "clips").iterdir())))
    loaded = loaded_after(
        "import sys\nfrom hcmen.runtime import load\nm = load(sys.argv[1])\nm(sys.argv[2])\n"
        "assert all(t.passed for t in m.self_test())",
        str(bundle),
        str(clip),
    )
    assert loaded.isdisjoint({"torch", "hcmen.models"})


def test_a_reduced_precision_is_judged(trainer: Trainer, data_file: Path, tmp_path: Path):
    manifest = export_bundle(trainer.out, tmp_path / "b", [variant_named("full")], precision="fp16", data=data_file)
    assert manifest.variants["full"].parity["metric"]["passed"]


def test_a_size_that_a_model_fixes_is_named(trainer: Trainer):
    model, _ = load_checkpoint(trainer.out)
    fuse = model.fuse
    model.fuse = lambda tokens, present=None: fuse({m: x.expand(len(x), -1, -1) for m, x in tokens.items()}, present)
    with pytest.raises(BackendError, match=r"takes vision \[2, .*expected \['batch', 'vision_time', 4\].*fixes batch"):
        export_variant(model, variant_named("vision_only"))


# --- the registry ---------------------------------------------------------------------------------------------------


def test_an_unknown_kind_is_named_with_those_there_are(trainer: Trainer, tmp_path: Path):
    with pytest.raises(InputError, match=r"unknown model kind 'late-fuson': did you mean 'late-fusion'\? choose"):
        registry.named("late-fuson")
    for name in ("checkpoint.safetensors", "config.json"):
        (tmp_path / name).write_bytes((trainer.out / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "earlier"}))
    with pytest.raises(InputError, match=r"config\.json: unknown model kind 'earlier': choose from hcmen"):
        load_checkpoint(tmp_path)


def test_a_name_is_given_once():
    registry.register(KIND)
    other = dataclasses.replace(KIND, title="Another")
    for kind in (other, dataclasses.replace(KIND, name="hcmen")):
        with pytest.raises(InputError, match="is there already"):
            registry.register(kind)
    with pytest.raises(InputError, match="says 'late-fusion', expected its name"):
        registry.register(dataclasses.replace(KIND, name="fusion"))


SHIMS = {"hcmen/config.py", "hcmen/model.py"}
"""Old import paths, whose business is to name the new ones."""
NAMES = re.compile(r"\bHCMEN\b|hcmen\.models\.hcmen|\bModelConfig\b")


def test_nobody_names_the_first_kind():
    """Code outside its folder reaches it through the registry; prose may tell of it."""
    found, looked = [], 0
    for folder in ("hcmen", "export", "runtime"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if name.startswith("hcmen/models/hcmen/") or name in SHIMS:
                continue
            looked += 1
            nodes = list(ast.walk(ast.parse(path.read_text())))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            prose = {ast.get_docstring(n, clean=False) for n in nodes if isinstance(n, documented)}
            names = {n.id for n in nodes if isinstance(n, ast.Name)}
            names |= {str(n.module) for n in nodes if isinstance(n, ast.ImportFrom)}
            names |= {a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
            names |= {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)} - prose
            found += [f"{name}: {x[:60]}" for x in names if NAMES.search(x)]
    assert looked > 80
    assert found == []
