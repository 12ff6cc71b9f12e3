"""The model card of a bundle, README.md: what people have to know of a model before they use it.

It begins with the metadata of Hugging Face's model cards, so that a bundle can be uploaded as it is. A licence is not
among them, since nobody told it. Nor are scores: there each names a data set of the hub, and ours is a file's name.

Names from a data set are not trusted. What is more than letters, digits, blanks and hyphens stands as code (`quoted`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from hcmen.base.errors import shown
from hcmen.base.manifest import Manifest, Score
from hcmen.base.modalities import MODALITIES
from hcmen.export.trained import Trained
from hcmen.models import registry

__all__ = ["CARD", "card", "quoted"]

CARD = "README.md"
_MOST_QUOTED = 100
_BASELINES = {
    "floor": "Floor: the mean training label for MAE, the commonest class for Acc-2",
    "linear": "Linear: ridge regression on the mean of each modality or on its words, one for each variant",
}
_CLASSES = {
    "acc2_non0": "labels below the neutral one against labels above it, those on it left out",
    "acc2": "labels up to 0 against labels above it",
}
"""By the two-class accuracy that a family of measures quotes first."""
_SPLITS = {"train": "training", "valid": "validation", "test": "test"}
_USE = """\
## Intended use

Research, and the rating of utterances like those of the training data where a wrong score harms nobody. A score
estimates the label that the training data would give to an utterance. It is no measure of what a person feels.

## What it must not be used for

- Clinical decisions, such as diagnosis or therapy.
- Decisions on hiring, work, schooling, credit or insurance.
- Law enforcement, migration and border control.
- Surveillance: nobody's words, voice or face may be rated without their knowledge and consent.
- In the European Union the AI Act, Regulation (EU) 2024/1689, prohibits systems that infer emotions of people at work
  and in education, except for medical or safety reasons: Article 5(1)(f). Elsewhere emotion recognition from biometric
  data, such as a voice or a face, is high-risk by Annex III, and people must be told of it by Article 50(3).
"""


def card(manifest: Manifest, trained: Trained) -> str:
    """The model card of a bundle, in Markdown.

    Args:
        manifest: of the bundle. trained: what its checkpoint tells of the training.
    """
    parts = (
        _metadata(manifest),
        _head(manifest, trained),
        _USE.splitlines(),
        _data(manifest, trained),
        _judged(manifest, trained),
        _limits(manifest, trained),
        _files(manifest),
    )
    return "\n\n".join("\n".join(part) for part in parts) + "\n"


def quoted(text: str) -> str:
    """A name or word for Markdown in which nothing acts: as it is, or as code on one line; long ones are cut."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 2 * _MOST_QUOTED]).split())
    text = text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}..."
    if text and all(c.isalnum() or c in " -" for c in text):
        return text
    return f"`{text.replace('`', chr(39)).replace('|', '/') or '?'}`"


def _metadata(manifest: Manifest) -> list[str]:
    modalities = manifest.inputs.modalities
    tags = ["sentiment-analysis", "onnx", *modalities, *(["missing-modality"] if len(modalities) > 1 else [])]
    return ["---", "library_name: hcmen", "tags:", *(f"- {tag}" for tag in tags), "---"]


def _head(manifest: Manifest, trained: Trained) -> Iterator[str]:
    inputs = manifest.inputs
    yield f"# A sentiment model for an edge device: {registry.named(manifest.model.kind).title}"
    yield ""
    yield (
        f"Gives a score from {inputs.label_min:g} ({quoted(inputs.label_min_means)}) to {inputs.label_max:g} "
        f"({quoted(inputs.label_max_means)}) from {_listed(inputs.modalities)}. There is one ONNX graph for each "
        "variant below, which says what may be missing. `manifest.json` lists every file with its sha256."
    )
    yield ""
    if trained.data == "synthetic":
        yield (
            "Trained on the synthetic set of the demo. It shows how hcmen works; on real recordings it means nothing."
        )
        yield ""
    yield "    hcmen-run CLIP.npz --bundle FOLDER"
    yield "    hcmen-run --self-test --bundle FOLDER"
    yield ""
    yield "The self-test runs each graph on the inputs in `golden/`, and holds it to what the eager model gave."


def _data(manifest: Manifest, trained: Trained) -> Iterator[str]:
    yield "## Data"
    yield ""
    yield f"- trained on {_named(trained.data)}"
    if trained.samples:
        counts = ", ".join(f"{shown(n)} {_split(split)}" for split, n in trained.samples.items())
        yield f"- samples: {counts}"
    inputs = manifest.inputs
    yield f"- labels from {inputs.label_min:g} to {inputs.label_max:g}"
    for m in inputs.modalities:
        made = manifest.front_ends.get(m)
        if made is None:
            yield f"- {m}: what made its features is not recorded"
            continue
        settings = f", settings {_code(json.dumps(dict(made.settings)))}" if made.settings else ""
        yield f"- {m}: made by {quoted(made.extractor)}{settings}" + (f", sha256 {made.sha256}" if made.sha256 else "")


def _judged(manifest: Manifest, trained: Trained) -> Iterator[str]:
    splits = {score.split for score in trained.scores}
    run = "one training run" + ("" if trained.seed is None else f", seed {shown(trained.seed)}")
    chosen = "How it was chosen is not recorded."
    if "valid" in splits:
        chosen = "It is the one of the lowest mean absolute error on the validation split, as a mean over variants."
    tested = "It was not scored on a test split."
    if "test" in splits:
        tested = "hcmen-train scored it on the test split once, after that choice."
    yield "## How it was judged"
    yield ""
    yield f"The checkpoint is that of epoch {shown(manifest.source.get('epoch'))} of {run}. {chosen} {tested}"
    yield "Each variant was scored on every sample without the modalities that it leaves out."
    for data, split in dict.fromkeys((score.data, score.split) for score in manifest.scores):
        yield ""
        count = trained.samples.get(split) if data == trained.data else None
        yield f"### {_named(data)}, {_split(split)} split" + ("" if count is None else f", {shown(count)} samples")
        yield ""
        scores = [s for s in manifest.scores if (s.data, s.split) == (data, split) and s.variant in manifest.variants]
        yield from _scores(scores, trained.baselines if (data, split) == (trained.data, "test") else {})


def _scores(scores: Sequence[Score], baselines: Mapping[tuple[str, str], Mapping[str, float]]) -> Iterator[str]:
    """The table of one split of one data set, the floor and the linear model beside, and who is behind them."""
    columns: dict[str, list[float | None]] = {}
    accuracy = next((k for s in scores for k in _CLASSES if k in s.measures), "")
    for title, measure in (("MAE", "mae"), ("Corr", "corr"), ("Acc-2", accuracy)):
        columns[title] = [s.measures.get(measure) for s in scores]
        for name in _BASELINES:
            if (measure, name) != ("corr", "floor"):  # no constant correlates with anything
                columns[f"{title}, {name}"] = [baselines.get((s.variant, name), {}).get(measure) for s in scores]
    columns = {name: values for name, values in columns.items() if any(x is not None for x in values)}
    yield f"| variant{''.join(f' | {name}' for name in columns)} |"
    yield f"| ---{' | ---:' * len(columns)} |"
    for i, score in enumerate(scores):
        yield f"| {score.variant}{''.join(f' | {_figure(values[i])}' for values in columns.values())} |"
    if not baselines:
        return
    yield ""
    for name, what in _BASELINES.items():
        compared = [s for s in scores if "mae" in s.measures and "mae" in baselines.get((s.variant, name), {})]
        if compared:
            behind = [s.variant for s in compared if not s.measures["mae"] < baselines[s.variant, name]["mae"]]
            told = f"not better in {', '.join(behind)}" if behind else "better in every variant that has both"
            yield f"- {what}. The model's MAE is {told}."
    if accuracy:
        yield f"- Acc-2: {_CLASSES[accuracy]}."


def _limits(manifest: Manifest, trained: Trained) -> Iterator[str]:
    inputs = manifest.inputs
    yield "## Known limits"
    yield ""
    yield "- Language and domain are those of the training data. Other ones were not measured."
    yield "- Differences between speakers, such as gender, age, accent or dialect, were not measured."
    yield "- This is one run. How much another seed would differ was not measured."
    absent = [m for m in MODALITIES if m not in inputs.modalities]
    if absent:
        yield f"- The model has no {' and no '.join(absent)}: it was trained without."
    if len(inputs.modalities) > 1:
        yield "- Modalities were there or missing as a whole. Gaps within one were not measured for this card."
    for variant, unheard in trained.unheard.items():
        if variant in manifest.variants:
            yield f"- {variant} does not listen to {' and '.join(unheard)}: the validation error was lower without."
    if inputs.text_tokens is not None:
        yield (
            "- A text encoder is part of the weights. Its licence, and what it was trained on, are not recorded: they "
            "bind whoever passes this bundle on."
        )
    if manifest.precision != "fp32":
        yield f"- The scores are those of the model in float32, and the graphs are {manifest.precision}."
    if any(score.data != trained.data for score in manifest.scores):
        yield "- Scores on a data set that it was not trained on say what it does there, and nowhere else."


def _files(manifest: Manifest) -> Iterator[str]:
    inputs = manifest.inputs
    yield "## Inputs, graphs and parity"
    yield ""
    yield "| input | features per step | most steps |"
    yield "| --- | ---: | ---: |"
    for m in inputs.modalities:
        sizes = inputs.modality(m)
        tokens = m == "text" and inputs.text_tokens
        yield f"| {m} | {f'token ids below {tokens.vocabulary}' if tokens else sizes.features} | {sizes.max_steps} |"
    moved = any("metric" in v.parity for v in manifest.variants.values())
    yield ""
    yield f"| variant | graph | parity with the eager model |{' MAE moved on validation clips |' if moved else ''}"
    yield f"| --- | ---: | ---: |{' ---: |' if moved else ''}"
    for name, v in manifest.variants.items():
        worst = v.parity["outputs"]["score"]["max_abs"]
        parity = "none" if worst is None else f"score within {worst:.1e}"
        change = v.parity.get("metric", {}).get("change")
        cell = f" {'' if change is None else format(change, '+.2%')} |" if moved else ""
        yield f"| {name} | {v.graph.bytes / 1024:.0f} KiB | {parity} |{cell}"
    yield ""
    yield f"- precision {manifest.precision}, opset {manifest.opset}, ops `{manifest.op_domain}` {manifest.op_version}"
    yield f"- weights {manifest.weights.bytes / 1024:.0f} KiB, sha256 {manifest.weights.sha256}"
    yield (
        f"- checkpoint sha256 {manifest.source.get('checkpoint_sha256')}, epoch {shown(manifest.source.get('epoch'))}"
    )
    versions = ", ".join(f"{tool} {version}" for tool, version in manifest.versions.items())
    yield f"- exported {manifest.created} by {versions}"


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else f"{names[0]} alone"


def _named(data: str) -> str:
    """The name of a data set, without the folders of the machine it lay on."""
    return quoted(Path(data).name) if Path(data).name else "a data set without a name"


def _split(name: str) -> str:
    return _SPLITS.get(name, "") or quoted(name)


def _code(text: str) -> str:
    return quoted(text if len(text) <= _MOST_QUOTED else f"{text[:_MOST_QUOTED]}...")


def _figure(value: float | None) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:.3f}"
