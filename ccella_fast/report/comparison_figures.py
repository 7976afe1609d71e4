"""The charts of a comparison as PNG bytes: distances by variant, classifiers by arm, ROC curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ccella_fast.report.evaluation_figures import series_colors
from ccella_fast.report.figures import COLORS, png

_METRICS = {"accuracy": "accuracy on real test studies", "auc": "AUC on real test studies"}
_COLUMNS = 4


def distances(record: Mapping[str, Any]) -> bytes:
    """The distance of every generator, with the floor and the limit of the autoencoder."""
    from matplotlib.figure import Figure

    space, names = record["protocol"]["decided"]["space"], record["protocol"]["asked"]["variants"]
    figure = Figure(figsize=(7.0, 0.9 + 0.32 * len(names)), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    everything = []
    for y, name in enumerate(reversed(names)):
        rows = [
            row
            for generator in record["generators"]
            if generator["variant"] == name
            for row in generator["rows"]
            if (row["metric"], row["features"]) == ("fd", space) and row["value"] is not None
        ]
        axes.plot([row["value"] for row in rows], [y] * len(rows), "o", color=COLORS[0], alpha=0.8, markersize=6)
        everything += rows
    for field, marker in (("floor", "|"), ("limit_autoencoder", "D")):
        known = [row[field] for row in everything if row[field] is not None]
        if known:
            value = float(np.mean(known))
            axes.plot([value] * len(names), range(len(names)), marker, color=COLORS[1], markersize=9, fillstyle="none")
    _label(axes, names, f"FD, {space}")
    axes.set_xlim(left=0)
    return png(figure)


def classifiers(record: Mapping[str, Any]) -> bytes:
    """Accuracy and AUC of every classifier, by arm."""
    from matplotlib.figure import Figure

    arms = list(dict.fromkeys(job["label"] for job in record["classifiers"]))
    figure = Figure(figsize=(8.4, 0.9 + 0.32 * len(arms)), dpi=110, facecolor="white", layout="constrained")
    for place, (metric, title) in enumerate(_METRICS.items(), start=1):
        axes = figure.add_subplot(1, len(_METRICS), place)
        for y, arm in enumerate(reversed(arms)):
            values = [job[metric] for job in record["classifiers"] if job["label"] == arm and job[metric] is not None]
            axes.plot(values, [y] * len(values), "o", color=COLORS[0], alpha=0.35, markersize=4)
            if values:
                axes.plot([float(np.mean(values))], [y], "|", color=COLORS[1], markersize=16, markeredgewidth=2)
        _label(axes, arms, title)
    return png(figure)


def roc_curves(curves: Sequence[Mapping[str, Any]]) -> bytes:
    """A chart for each arm: the mean ROC curve, its standard deviation as a band, and the mean of the first arm in gray."""
    from matplotlib.figure import Figure

    down = -(-len(curves) // _COLUMNS)
    figure = Figure(
        figsize=(2.2 * min(_COLUMNS, len(curves)), 2.35 * down), dpi=110, facecolor="white", layout="constrained"
    )
    for place, (curve, color) in enumerate(zip(curves, series_colors(len(curves)), strict=True), start=1):
        axes = figure.add_subplot(down, min(_COLUMNS, len(curves)), place)
        x, mean, sd = (np.asarray(curve[name], float) for name in ("false_positive_rate", "mean", "sd"))
        axes.plot([0, 1], [0, 1], color="#c9cdd2", linewidth=1, linestyle=":")
        if place > 1:
            axes.plot(x, curves[0]["mean"], color="#8a9199", linewidth=1.2)
        axes.fill_between(x, np.clip(mean - sd, 0, 1), np.clip(mean + sd, 0, 1), color=color, alpha=0.25, linewidth=0)
        axes.plot(x, mean, color=color, linewidth=1.6)
        axes.set_title(f"{curve['label']}, n = {curve['classifiers']}", fontsize=8, loc="left")
        axes.set_aspect("equal")
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.01)
        axes.set_xticks([0, 0.5, 1])
        axes.set_yticks([0, 0.5, 1])
        axes.tick_params(labelsize=7, length=2)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("false positive rate", fontsize=8)
    figure.supylabel("sensitivity", fontsize=8)
    return png(figure)


def _label(axes: Any, lines: Sequence[str], title: str) -> None:
    """Name the lines, the first on top, and the axis."""
    axes.set_yticks(range(len(lines)), list(reversed(lines)), fontsize=8)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.set_xlabel(title, fontsize=9)
    axes.tick_params(labelsize=8, length=2)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
