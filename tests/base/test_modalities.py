"""The names of variants, and what people type in their place."""

from __future__ import annotations

import click
import pytest

from hcmen.base.console import Console, VariantChoice, command
from hcmen.base.errors import InputError
from hcmen.base.modalities import VARIANTS, variant_meant, variant_named

MEANT = {
    "audio_missing": [
        "no_audio",
        "without_audio",
        "missing_audio",
        "noaudio",
        "audioless",
        "Audio-Missing",
        "no sound",
    ],
    "text_missing": ["no-text", "text_absent", "withoutText", "audio+video", "vision_audio"],
    "vision_missing": ["missing_vision", "no_video", "video-missing", "text_audio", "w/o video"],
    "text_only": ["text", "just_text", "onlytext", "no_audio_no_video", "audio_vision_missing"],
    "audio_only": ["audio", "acoustic_only"],
    "vision_only": ["video", "videoonly", "visual"],
    "full": ["all", "text_audio_vision", "everything"],
}


@pytest.mark.parametrize(("variant", "typed"), [(v, t) for v, names in MEANT.items() for t in names])
def test_other_words_for_a_variant_are_understood(variant, typed):
    assert variant_meant(typed) == variant
    with pytest.raises(InputError, match=f"did you mean '{variant}'"):
        variant_named(typed)


@pytest.mark.parametrize("typed", ["", "loud", "ful", "no", "no_audio_text_vision", "audio_mising", "x" * 10**5])
def test_other_names_mean_no_variant(typed):
    assert variant_meant(typed) is None


def test_every_variant_means_itself():
    assert [variant_meant(v.name) for v in VARIANTS] == [v.name for v in VARIANTS]


@pytest.mark.parametrize(
    ("multiple", "said"),
    [(True, "repeat the option: --variant full --variant text_only"), (False, "takes one at a time")],
)
def test_a_list_of_variants_says_how_several_are_given(multiple, said, capsys):
    @command("x")
    @click.option("--variant", type=VariantChoice(), multiple=multiple)
    def main(console: Console, variant) -> None:
        """A command."""

    assert main.main(["--variant", "full,text_only"], standalone_mode=False) == 2
    assert said in capsys.readouterr().err
