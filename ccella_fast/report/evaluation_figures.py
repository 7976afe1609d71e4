"""Pictures of an evaluation as PNG bytes: values with their floors and limits, pairs of volumes, curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.report.figures import COLORS, Panel, cut, png

_GENERATED, _REAL, _LIMIT = COLORS[0], "#555b61", COLORS[1]


class Dot(NamedTuple):
    """A value with what it is compared with; None for what is not known. faint: the row decides nothing."""

    label: str
    value: float
    interval: tuple[float, float] | None
    floor: float | None
    limit: float | None
    faint: bool = False


class DotPanel(NamedTuple):
    """Dots on one axis. title: above it. log: whether the axis is logarithmic; share: whether it is from 0 to 1."""

    title: str
    dots: list[Dot]
    log: bool = False
    share: bool = False


def dot_plots(panels: Sequence[DotPanel]) -> bytes:
    """A small chart for each panel: dots with intervals, the floor as a bar, the autoencoder's limit as a diamond."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    columns = min(2, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [0.62 + 0.27 * max(len(panel.dots) for panel in row) for row in rows]
    legend = 0.42
    figure = Figure(figsize=(4.9 * columns, sum(heights) + legend), dpi=110, facecolor="white", layout="constrained")
    grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
    for place, panel in enumerate(panels):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        for y, dot in enumerate(reversed(panel.dots)):
            shade = 0.35 if dot.faint else 1.0
            if dot.interval is not None:
                axes.plot(dot.interval, [y, y], color=_GENERATED, linewidth=1.6, alpha=shade, solid_capstyle="butt")
            if dot.floor is not None:
                axes.plot([dot.floor] * 2, [y - 0.36, y + 0.36], color=_REAL, linewidth=2, alpha=shade)
            if dot.limit is not None:
                axes.plot([dot.limit], [y], "D", color=_LIMIT, markersize=5, fillstyle="none", alpha=shade)
            axes.plot([dot.value], [y], "o", color=_GENERATED, markersize=6, alpha=shade)
        axes.set_yticks(range(len(panel.dots)), [dot.label for dot in reversed(panel.dots)], fontsize=8)
        axes.set_ylim(-0.6, len(panel.dots) - 0.4)
        if panel.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            low, high = axes.get_xlim()
            ticks = [step * 10.0**power for power in range(-3, 5) for step in (1, 2, 5)]
            axes.set_xticks([tick for tick in ticks if low <= tick <= high])
        axes.margins(x=0.08)
        if panel.share:
            axes.set_xlim(-0.03, 1.03)
        axes.set_title(panel.title, fontsize=9, loc="left")
        axes.tick_params(labelsize=8, length=2)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right", "left"]].set_visible(False)
    marks = [
        Line2D([], [], color=_GENERATED, marker="o", linewidth=1.6, label="generated volumes, 95 % interval"),
        Line2D(
            [], [], color=_REAL, marker="|", markersize=11, markeredgewidth=2, linewidth=0, label="real volumes (floor)"
        ),
        Line2D(
            [], [], color=_LIMIT, marker="D", fillstyle="none", markersize=5, linewidth=0, label="autoencoder alone"
        ),
    ]
    figure.legend(handles=marks, loc="outside upper left", ncols=3, fontsize=8, frameon=False)
    return png(figure)


class Pair(NamedTuple):
    """Two volumes of one shape and spacing, such as a generated one and its nearest training volume."""

    first: np.ndarray
    second: np.ndarray
    spacing: Sequence[float]
    title: str
    subtitle: str


def pair_gallery(pairs: Sequence[Pair], *, window: tuple[float, float], columns: int = 2) -> bytes:
    """For each pair the middle axial slices of both, and the first minus the second, red where it is brighter."""
    from matplotlib.figure import Figure

    across = min(columns, len(pairs))
    down = -(-len(pairs) // across)
    parts = [[cut(volume, pair.spacing, "axial") for volume in pair[:2]] for pair in pairs]
    tallest = max(part.size[1] / part.size[0] for both in parts for part in both)
    tile, gap, title = 1.5, 0.05, 0.36  # inches
    width, height = across * (3 * (tile + gap) + 0.25) - 0.25 + gap, down * (tile * tallest + title + gap)
    figure = Figure(figsize=(width, height), dpi=120, facecolor="black")
    for place, (pair, (first, second)) in enumerate(zip(pairs, parts, strict=True)):
        left = (place % across) * (3 * (tile + gap) + 0.25) + gap
        top = height - (place // across) * (tile * tallest + title + gap)
        for text, y, color in ((pair.title, 0.10, "white"), (pair.subtitle, 0.25, "#b8b8b8")):
            figure.text(left / width, (top - y) / height, text, color=color, fontsize=7, ha="left", va="center")
        size = window[1] - window[0]
        looks: list[tuple[np.ndarray, dict[str, Any]]] = [
            (first.pixels, {"cmap": "gray", "vmin": window[0], "vmax": window[1]}),
            (second.pixels, {"cmap": "gray", "vmin": window[0], "vmax": window[1]}),
            (first.pixels - second.pixels, {"cmap": "RdBu_r", "vmin": -size / 2, "vmax": size / 2}),
        ]
        own = tile * first.size[1] / first.size[0]
        for number, (pixels, look) in enumerate(looks):
            x, y = left + number * (tile + gap), top - title - own
            axes = figure.add_axes((x / width, y / height, tile / width, own / height))
            axes.imshow(pixels, extent=(0, *first.size, 0), interpolation="bilinear", aspect="auto", **look)
            axes.set_axis_off()
    return png(figure)


def profiles(groups: Sequence[Mapping[str, Any]]) -> bytes:
    """Curves side by side: {"title", "x", "y", "log", "lines": {name: (x, y)}}."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.3 * len(groups), 2.7), dpi=110, facecolor="white", layout="constrained")
    fixed = {"real": _REAL, "phantoms": _REAL, "reconstructed": _LIMIT}
    others = dict.fromkeys(name for group in groups for name in group["lines"] if name not in fixed)
    colors = fixed | dict(zip(others, series_colors(len(others)), strict=True))
    for place, group in enumerate(groups, start=1):
        axes = figure.add_subplot(1, len(groups), place)
        for name, (x, y) in group["lines"].items():
            axes.plot(x, y, color=colors[name], linewidth=1.5, label=name)
        if group.get("log"):
            axes.set_yscale("log")
        axes.set_title(group["title"], fontsize=9, loc="left")
        axes.set_xlabel(group["x"], fontsize=8)
        axes.set_ylabel(group["y"], fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1:
            axes.legend(fontsize=8, frameon=False)
    return png(figure)


def series_colors(count: int) -> list[str]:
    """Distinct colors for this many lines. The color of the autoencoder's limit is used last."""
    own = [color for color in COLORS if color != _LIMIT] + [
        "#c2a51a",
        "#2aa1a1",
        "#b03a6f",
        "#6b4f2a",
        "#7f7f7f",
        _LIMIT,
    ]
    return [own[place % len(own)] for place in range(count)]


def nearest_distances(null: Sequence[float], groups: Mapping[str, Sequence[float]]) -> bytes:
    """Histograms of the distance of volumes to the nearest training study: of held-out ones (`null`) and of each group."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.8, 2.9), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    edges = np.histogram_bin_edges(np.concatenate([null, *groups.values()]), bins=24).tolist()
    shares = [np.full(len(values), 100 / max(1, len(values))) for values in (null, *groups.values())]
    axes.hist(null, edges, weights=shares[0], color="#c9cdd2", label="real, held out")
    colors = series_colors(len(groups))
    for (name, values), weights, color in zip(groups.items(), shares[1:], colors, strict=True):
        axes.hist(values, edges, weights=weights, histtype="step", color=color, linewidth=1.5, label=name)
    axes.set_xlabel("distance to the nearest training study", fontsize=8)
    axes.set_ylabel("volumes, %", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def volume_strips(groups: Mapping[str, Sequence[float]], *, unit: str, plausible: tuple[float, float]) -> bytes:
    """One row of dots per group, such as the gland volumes of real and generated studies, and what is plausible as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 0.9 + 0.45 * len(groups)), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.axvspan(*plausible, color="#e8f0e8", zorder=0)
    rng = np.random.default_rng(0)
    for y, (name, values) in enumerate(reversed(list(groups.items()))):
        jitter = rng.uniform(-0.18, 0.18, len(values))
        color = _GENERATED if name == "generated" else _REAL
        axes.plot(values, y + jitter, "o", color=color, markersize=4, alpha=0.6, markeredgewidth=0)
        if len(values):
            axes.plot([np.median(values)] * 2, [y - 0.32, y + 0.32], color=color, linewidth=2)
    axes.set_yticks(range(len(groups)), list(reversed(list(groups))), fontsize=8)
    axes.set_ylim(-0.6, len(groups) - 0.4)
    axes.set_xlim(left=0)
    axes.set_xlabel(unit, fontsize=8)
    axes.tick_params(labelsize=8, length=2)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return png(figure)


def trios(columns: Sequence[Sequence[Panel]], *, window: tuple[float, float]) -> bytes:
    """Middle axial slices in one window: a column for each list, such as a real, a reconstructed and a generated volume."""
    from matplotlib.figure import Figure

    slices = [[cut(panel.volume, panel.spacing, "axial") for panel in column] for column in columns]
    widest = max(part.size[0] for column in slices for part in column)
    tile, gap, title = 2.2, 0.06, 0.24  # inches
    scale = tile / widest
    heights = [
        max(column[row].size[1] for column in slices if row < len(column)) * scale
        for row in range(max(map(len, slices)))
    ]
    width, height = len(slices) * (tile + gap) + gap, sum(heights) + (title + gap) * len(heights)
    figure = Figure(figsize=(width, height), dpi=120, facecolor="black")
    for place, (column, panels) in enumerate(zip(slices, columns, strict=True)):
        top = height
        for part, panel, tall in zip(column, panels, heights, strict=False):
            left = gap + place * (tile + gap)
            figure.text((left + tile / 2) / width, (top - title / 2) / height, panel.title, color="white", fontsize=8,
                        ha="center", va="center")  # fmt: skip
            own = (part.size[0] * scale, part.size[1] * scale)
            x, y = left + (tile - own[0]) / 2, top - title - (tall + own[1]) / 2
            axes = figure.add_axes((x / width, y / height, own[0] / width, own[1] / height))
            axes.imshow(
                part.pixels, cmap="gray", vmin=window[0], vmax=window[1], interpolation="bilinear", aspect="auto"
            )
            axes.set_axis_off()
            top -= title + tall + gap
    return png(figure)
