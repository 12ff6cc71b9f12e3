"""What a bundle says of its model to people: the scores that its checkpoint reached, and the model card README.md."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hcmen.base.errors import CorruptFileError, reason_of
from hcmen.base.files import read_small, refused
from hcmen.base.manifest import Manifest, Score
from hcmen.base.records import MOST_MANIFEST_BYTES, JsonFile, parse_json
from hcmen.models import registry

__all__ = ["CARD", "card", "scores_of"]

CARD = "README.md"
_PROTOCOL = "variants"
"""Every sample without the modalities that the variant leaves out."""


def scores_of(checkpoint: Path, about: Mapping[str, Any]) -> tuple[Score, ...]:
    """What the checkpoint reached: on the validation split, by which it was chosen, and on the test split.

    Args:
        checkpoint: the folder; a report.json in it counts where it is of this very epoch. about: its config.json.

    Raises:
        CorruptFileError: report.json is damaged, or what `about` says of the data and the validation.
    """
    try:
        data, validation = str(about.get("dataset", {}).get("name", "")), about.get("validation", {})
        maes = validation.get("mae_by_variant", {}).items()
    except AttributeError as error:
        raise CorruptFileError(
            f"{checkpoint}: config.json does not describe a training ({reason_of(error, 100)}): train again"
        ) from error
    found = [Score(data, "valid", _PROTOCOL, variant, {"mae": mae}) for variant, mae in maes]
    path = checkpoint / "report.json"
    if not os.path.lexists(path):
        return tuple(found)  # the training was stopped
    with refused(path, "a report of hcmen-train"):
        content = read_small(path, MOST_MANIFEST_BYTES)
    try:
        report = parse_json(content, JsonFile(f"{path}: no report of hcmen-train", "remove it, or train again"))
        if (report["epoch"], report["validation_mae"]) == (about["epoch"], validation["mae"]):
            kind = about.get("kind", registry.DEFAULT)
            for variant, models in report["test"].items():
                measures = {name: float(x) for name, x in models[kind].items() if x is not None}
                found.append(Score(data, "test", _PROTOCOL, variant, measures))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CorruptFileError(
            f"{path}: no report of hcmen-train ({reason_of(error, 100)}): remove it, or train again"
        ) from error
    return tuple(found)


def card(manifest: Manifest) -> str:
    """The model card of a bundle, in Markdown."""
    inputs, kind = manifest.inputs, manifest.model.kind
    lines = [
        f"# A sentiment model for an edge device: {registry.named(kind).title}",
        "",
        f"Gives a score from {inputs.label_min:g} ({inputs.label_min_means}) to {inputs.label_max:g} "
        f"({inputs.label_max_means}) from text, audio and vision, any of which may be missing. One ONNX graph for each "
        "variant below; `manifest.json` lists every file with its sha256.",
        "",
        *_synthetic(manifest),
        "    hcmen-run CLIP.npz --bundle FOLDER      hcmen-run --self-test --bundle FOLDER",
        "",
        "| input | features per step | most steps |",
        "| --- | ---: | ---: |",
    ]
    for m in inputs.modalities:
        sizes = inputs.modality(m)
        tokens = m == "text" and inputs.text_tokens
        width = f"token ids below {tokens.vocabulary}" if tokens else str(sizes.features)
        lines.append(f"| {m} | {width} | {sizes.max_steps} |")
    measured = _columns(manifest)
    lines += [
        "",
        f"| variant | graph | parity with the eager model{''.join(f' | {name}' for name, _ in measured)} |",
        f"| --- | ---: | ---: {'| ---: ' * len(measured)}|",
    ]
    for name, v in manifest.variants.items():
        worst = v.parity["outputs"]["score"]["max_abs"]
        parity = "none" if worst is None else f"score within {worst:.1e}"
        cells = "".join(f" | {_figure(scores.get(name))}" for _, scores in measured)
        lines.append(f"| {name} | {v.graph.bytes / 1024:.0f} KiB | {parity}{cells} |")
    lines += [
        "",
        f"- precision {manifest.precision}, opset {manifest.opset}, ops `{manifest.op_domain}` {manifest.op_version}",
        f"- weights sha256 {manifest.weights.sha256}",
        f"- checkpoint sha256 {manifest.source.get('checkpoint_sha256')}, epoch {manifest.source.get('epoch')}",
        f"- exported {manifest.created} by "
        + ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items()),
    ]
    return "\n".join(lines) + "\n"


def _synthetic(manifest: Manifest) -> list[str]:
    """What has to be said of a model that never saw a recording."""
    if not any(score.data == "synthetic" for score in manifest.scores):
        return []
    return [
        "Trained on the synthetic set of the demo. It shows how hcmen works; on real recordings it means nothing.",
        "",
    ]


def _columns(manifest: Manifest) -> list[tuple[str, dict[str, float]]]:
    """(heading, variant -> MAE) for every split of every data set that has scores."""
    found: dict[str, dict[str, float]] = {}
    for score in manifest.scores:
        if "mae" in score.measures:
            heading = f"MAE, {Path(score.data).name}, {score.split}".replace("|", "/")
            found.setdefault(heading, {})[score.variant] = score.measures["mae"]
    return list(found.items())


def _figure(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"
