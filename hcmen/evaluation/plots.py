"""The pictures of a robustness report: score against missing rate, and the sets of modalities as bars."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hcmen.base.metrics import HEADLINE_ACC2
from hcmen.evaluation.robustness import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PICTURES", "draw"]

PICTURES = {
    "missing_rate.png": "Score against missing rate",
    "fixed_sets.png": "Score with each set of modalities",
}
"""File name -> what it shows."""

_CURVES = {"intra": "steps dropped (intra)", "random_mr": "modalities missing (random_mr)"}


def draw(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The PNG files, by name, that the protocols of `report` give something to show in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    measures = ("mae", HEADLINE_ACC2[report["dataset"]["family"]])
    wanted = {
        "missing_rate.png": (_curves, any(name in report["protocols"] for name in _CURVES)),
        "fixed_sets.png": (_bars, "fixed" in report["protocols"]),
    }
    files = {}
    for name, (fill, there) in wanted.items():
        if not there:
            continue
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", dpi=120)
        for panel, measure in zip(axes, measures, strict=True):
            fill(panel, report, measure)
            percent = measure != "mae"
            panel.axhline(
                _shown(measure, report["floor"][measure]), color="gray", ls="--", lw=1, label="floor", zorder=0
            )
            panel.set(ylabel=f"{LABELS[measure]} ({'%' if percent else 'label units'})")
            panel.set_ylim(bottom=0)
            panel.grid(alpha=0.3)
            panel.legend(fontsize=8)
        files[name] = _png(figure)
        plt.close(figure)
    return files


def _curves(panel: Axes, report: Mapping[str, Any], measure: str) -> None:
    for name, label in _CURVES.items():
        if name not in report["protocols"]:
            continue
        settings = report["protocols"][name]["settings"]
        rates = [next(iter(s["rates"].values())) if name == "intra" else s["missing_rate"] for s in settings]
        means, deviations = _values(settings, measure)
        panel.errorbar(rates, means, yerr=deviations, marker="o", ms=4, lw=1.5, capsize=3, label=label)
    panel.set(xlabel="missing rate")


def _bars(panel: Axes, report: Mapping[str, Any], measure: str) -> None:
    settings = report["protocols"]["fixed"]["settings"]
    means, deviations = _values(settings, measure)
    panel.bar(range(len(settings)), means, yerr=deviations, capsize=3)
    panel.set_xticks(range(len(settings)), [s["name"] for s in settings], rotation=30, ha="right", fontsize=8)


def _values(settings: Sequence[Mapping[str, Any]], measure: str) -> tuple[list[float], list[float] | None]:
    found = [s["scores"][measure] for s in settings]
    means = [_shown(measure, f["mean"]) for f in found]
    if found[0]["deviation"] is None:
        return means, None
    return means, [_shown(measure, f["deviation"]) for f in found]


def _shown(measure: str, value: float) -> float:
    return value if measure == "mae" else 100 * value


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
