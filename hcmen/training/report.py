"""What hcmen-train leaves to look at: the curves of a run, and the table of the test split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hcmen.base.tables import folded

if TYPE_CHECKING:
    from hcmen.data import MultimodalDataset
    from hcmen.models.contract import Model

__all__ = ["BASELINES", "draw_curves", "scores_text", "test_scores"]

BASELINES = (
    "floor: the mean training label (MAE), the commonest class (Acc-2); "
    "linear: ridge regression on mean frames (of tokens on their tf-idf), one per variant"
)
"""What stands beside a model in a table."""
_NAMES = {"floor": "the floor", "linear": "the linear model"}
_TERMS = {
    "task_loss": "task: error",
    "alignment_loss": "alignment: nats",
    "mix_loss": "mixtures: error",
    "intensity_loss": "intensity: nats",
    "polarity_loss": "polarity: nats",
    "polarity_mix_loss": "polarity of mixtures: nats",
}

_MEASURE_WIDTH = 26
"""The columns of a measure: three models of seven, two spaces between, three before."""


def _drawn_terms(history: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The loss terms that were on, over the epochs, by what they are called in the picture."""
    names = dict.fromkeys(name for record in history for name in record if name.endswith("_loss"))
    terms = {_TERMS.get(name, name): [float(r.get(name, 0.0)) for r in history] for name in names}
    return {label: values for label, values in terms.items() if any(values)}


def draw_curves(path: Path, history: list[dict[str, Any]]) -> None:
    """The losses and the validation MAE over the epochs, as a picture."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from hcmen.training.checkpoint import write_whole

    epochs = [record["epoch"] for record in history]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", dpi=120)
    for label, values in _drawn_terms(history).items():
        left.plot(epochs, values, label=label)
    left.set(xlabel="epoch", ylabel="terms of the training loss, before weighting", ylim=(0, None))
    variants = list(history[0]["validation"])
    for variant in variants:
        right.plot(epochs, [r["validation"][variant] for r in history], lw=1, alpha=0.7, label=variant)
    if len(variants) > 1:
        mean = f"mean of the {_number(len(variants))}"
        right.plot(epochs, [r["validation_mae"] for r in history], color="black", lw=2, label=mean)
    chosen = [r for r in history if r["best"]][-1]
    right.plot(
        chosen["epoch"], chosen["validation_mae"], "o", color="black", label=f"checkpoint: epoch {chosen['epoch']}"
    )
    right.set(xlabel="epoch", ylabel="validation MAE (label units)", ylim=(0, None))
    right.legend(fontsize=8, ncols=2)
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    plt.close(figure)
    write_whole(path, picture.getvalue())


def test_scores(model: Model, dataset: MultimodalDataset) -> dict[str, dict[str, dict[str, float]]]:
    """{variant: {the model's kind, "floor", "linear": measures}} on the test split."""
    from hcmen.base import metrics
    from hcmen.data.baseline import linear_baseline
    from hcmen.training.evaluate import predict

    truth, family = dataset.splits["test"].labels, metrics.family_for(dataset.label_min, dataset.label_max)
    floor = metrics.floor(truth, dataset.splits["train"].labels, family)
    return {
        v.name: {
            model.config.kind: metrics.scores(truth, predict(model, dataset.splits["test"], v), family),
            "floor": floor,
            "linear": metrics.scores(truth, linear_baseline(dataset, v), family),
        }
        for v in dataset.splits["test"].variants
    }


def unheard(model: Model, dataset: MultimodalDataset) -> dict[str, dict[str, list[str]]]:
    """{"unheard": {variant: modalities}} of what the model does not listen to, {} where it listens to all."""
    from hcmen.models.contract import heard_by

    heard = {v: heard_by(model, v.present) for v in dataset.splits["test"].variants}
    found = {
        v.name: [m for m in v.present if m not in of_these] for v, of_these in heard.items() if of_these != v.present
    }
    return {"unheard": found} if found else {}


def scores_text(report: Mapping[str, Any], kind: str, screen: int | None = None) -> str:
    """The table of the test split of a model of the kind `kind`, with what it says underneath.

    It has `screen` columns at most (None: any): measures from the right are left out, and named.
    """
    from hcmen.base import metrics
    from hcmen.models import registry

    title = registry.named(kind).title

    dataset, test = report["dataset"], report["test"]
    accuracy = metrics.family_for(dataset["label_min"], dataset["label_max"]).acc2
    measures = (("MAE", "mae", ".3f"), ("Corr", "corr", ".3f"), ("Acc-2", accuracy, ".1%"))
    models = ((title, kind), ("floor", "floor"), ("linear", "linear"))
    width = max(len("variant"), *map(len, test))
    shown = len(measures) if screen is None else max(1, min(len(measures), (screen - width) // _MEASURE_WIDTH))
    left_out = ", ".join(name for name, *_ in measures[shown:])
    measures = measures[:shown]
    lines = [
        f"test split, {dataset['samples']['test']} samples, epoch {report['epoch']} "
        f"(validation MAE {report['validation_mae']:.3f})",
        " " * width + "".join(f"   {name:^23}" for name, *_ in measures),
        f"{'variant':<{width}}" + "".join("   " + " ".join(f"{name:>7}" for name, _ in models) for _ in measures),
    ]
    for name, scores in test.items():
        cells = (
            "   " + " ".join(f"{scores[key][measure]:>7{form}}" for _, key in models) for _, measure, form in measures
        )
        lines.append(f"{name:<{width}}" + "".join(cells))
    behind = {
        key: [
            name
            for name, s in test.items()
            if s[kind]["mae"] >= s[key]["mae"] or not s[kind][accuracy] > s[key][accuracy]
        ]
        for key in ("floor", "linear")
    }
    lines += [
        "",
        BASELINES,
        *(
            f"{title} beats {_NAMES[key]} in MAE and Acc-2 in {_beaten(list(test), names)}"
            for key, names in behind.items()
        ),
        *(
            f"{name} does not listen to {' and '.join(modalities)}: validation is better without (docs/training.md)"
            for name, modalities in report.get("unheard", {}).items()
        ),
        f"checkpoint: {report['checkpoint']}",
    ]
    lines += [f"left out in {screen} columns: {left_out}"] if left_out else []
    return "\n".join(part for line in lines for part in folded(line, screen))


def _beaten(variants: Sequence[str], behind: Sequence[str]) -> str:
    """The variants that are not among `behind`, in words: which they are, or which they are not, the shorter list."""
    won, total = [name for name in variants if name not in behind], _number(len(variants))
    if not behind:
        return "every variant" if len(won) > 1 else f"its one variant: {won[0]}"
    if not won:
        return "no variant"
    if len(won) <= len(behind):
        return f"{_number(len(won))} of {total} variants: {', '.join(won)}"
    return f"every variant but {', '.join(behind)}"


def _number(count: int) -> str:
    words = ("none", "one", "two", "three", "four", "five", "six", "seven")
    return words[count] if count < len(words) else str(count)
