"""What "auto" takes where the bundle lacks the variant for exactly what a clip carries."""

from __future__ import annotations

import json

import pytest
from helpers.command import run
from helpers.small_bundle import clip_arrays, make_bundle

from hcmen.base.clip import write_clip
from hcmen.base.errors import InputError
from hcmen.base.manifest import Score
from hcmen.base.modalities import MODALITIES
from hcmen.base.typed import as_typed
from hcmen.runtime import load
from hcmen.runtime.commands.run import main

PAIRS = ("text_missing", "audio_missing", "vision_missing")


def scores(**errors: float) -> tuple[Score, ...]:
    return tuple(Score("set", "valid", "variants", name, {"mae": error}) for name, error in errors.items())


@pytest.mark.parametrize(
    ("variants", "told", "present", "taken"),
    [
        (("audio_missing",), {}, MODALITIES, "audio_missing"),
        (("full", "text_only"), {}, MODALITIES, "full"),
        (("text_only", "text_missing"), {"text_only": 0.1, "text_missing": 0.9}, MODALITIES, "text_missing"),
        (PAIRS, {}, MODALITIES, "vision_missing"),
        (PAIRS, {"text_missing": 0.5, "audio_missing": 0.4, "vision_missing": 0.6}, MODALITIES, "audio_missing"),
        (PAIRS, {"text_missing": 0.5}, MODALITIES, "text_missing"),
        (("text_only", "audio_only", "vision_only"), {}, MODALITIES, "text_only"),
        (("text_only", "audio_only", "vision_only"), {}, ("audio", "vision"), "audio_only"),
        (("full", "audio_missing", "vision_only"), {}, ("audio", "vision"), "vision_only"),
    ],
)
def test_the_best_variant_that_is_there(tmp_path, variants, told, present, taken):
    model = load(make_bundle(tmp_path / "b", variants, scores=scores(**told)))
    result = model(clip_arrays(0, present))
    named = model(clip_arrays(0, present), variant=taken)
    assert (result.variant, result.score) == (taken, named.score)
    used = {m for m in MODALITIES if result.modality_weights[m]}
    assert set(result.ignored) == set(present) - used


def test_a_clip_that_no_variant_is_for_is_refused_and_the_others_are_scored(tmp_path):
    model = load(make_bundle(tmp_path / "b", ("audio_missing", "vision_only")))
    with pytest.raises(
        InputError, match=r"has text alone, .*\(audio_missing, vision_only\) need more: add 'text_only'"
    ):
        model(clip_arrays(0, ("text",)))
    refused, scored = model.outcomes([clip_arrays(0, ("text",)), clip_arrays(0)])
    assert isinstance(refused, InputError)
    assert scored.variant == "audio_missing"
    with pytest.raises(InputError, match="variant 'full' is not in this bundle"):
        model(clip_arrays(0), variant="full")


def test_the_command_names_what_was_left_out(tmp_path):
    bundle = make_bundle(tmp_path / "b", ("audio_missing", "vision_only"))
    for i in range(2):
        write_clip(tmp_path / f"{i}.npz", clip_arrays(i))
    write_clip(tmp_path / "vision.npz", clip_arrays(3, ("vision",)))
    done = run(main, *sorted(tmp_path.glob("*.npz")), "--bundle", bundle, "--format", "json", "--quiet")
    assert done.code == 0
    assert done.lines == [
        f"warning: {tmp_path / '0.npz'} and 1 more clips: scored without audio, by 'audio_missing': 'full' is not in "
        f"the bundle: add it with {as_typed('hcmen-export', '--variant', 'full', '--bundle', bundle)}"
    ]
    results = json.loads(done.out)["results"]
    assert [r["ignored"] for r in results] == [["audio"], ["audio"], []]
    asked = run(main, tmp_path / "0.npz", "--bundle", bundle, "--variant", "audio_missing")
    assert "warning" not in asked.err
    assert "ignores audio" in asked.err
