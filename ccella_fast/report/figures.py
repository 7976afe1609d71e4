"""Pictures as PNG bytes: three-plane montages, curves, histograms. Equal input gives equal bytes.

Volumes have axes X, Y, Z that grow to the patient's right, front and head (RAS+). Slices are shown as a radiologist sees them:
axial and coronal with the patient's right on the left side, sagittal from the patient's left, in true proportions.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")
COLUMNS = 4  # volumes side by side in a montage
_LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom
# A mark in mm: the middle of the upper and the lower third of a usual gland, its side, and its zones in front and behind.
_THIRD, _LATERAL, _BACK = 9.0, 29.0, 9.0
COLORS = ["#1f6fb4", "#c2571a", "#3a8a4d", "#7a4fa3"]


class Mark(NamedTuple):
    """Where a report has a lesion. side: the patient's. zone: PZ or TZ, level: apex, mid or base; None if unknown."""

    side: Literal["left", "right"]
    zone: str | None
    level: str | None


class Panel(NamedTuple):
    """volume: (X, Y, Z), any real dtype. spacing: mm along X, Y, Z. mark: the axial slice is that of its level."""

    volume: np.ndarray
    spacing: Sequence[float]
    title: str
    mark: Mark | None = None


class Slice(NamedTuple):
    """pixels: (rows, columns), first row on top. size: width and height in mm. letters: left, right, top, bottom."""

    pixels: np.ndarray
    size: tuple[float, float]
    letters: str


def cut(volume: np.ndarray, spacing: Sequence[float], plane: str, height: float = 0.0) -> Slice:
    """The middle slice of `plane` ("axial", "coronal" or "sagittal"), turned to the radiological view.

    height: of an axial slice above the middle, in mm.
    """
    x, y, z = (size // 2 for size in volume.shape)
    z = min(max(z + round(height / spacing[2]), 0), volume.shape[2] - 1)
    width, depth, height = (size * step for size, step in zip(volume.shape, spacing, strict=True))
    if plane == "axial":
        pixels, size = volume[::-1, ::-1, z], (width, depth)
    elif plane == "coronal":
        pixels, size = volume[::-1, y, ::-1], (width, height)
    else:
        pixels, size = volume[x, ::-1, ::-1], (depth, height)
    return Slice(pixels.T, size, _LETTERS[plane])


def spread(items: Sequence[T], count: int) -> list[T]:
    """At most `count` of the items, evenly spread from the first on: those of a montage, so that it shows every report."""
    shown = min(count, len(items))
    return [items[k * len(items) // shown] for k in range(shown)]


def montage(
    panels: Sequence[Panel], *, window: tuple[float, float], caption: str = "", planes: Sequence[str] = tuple(_LETTERS)
) -> bytes:
    """A PNG with one column per volume and one row per plane, all at one scale and in one gray window."""
    from matplotlib.figure import Figure

    blocks = [list(panels[i : i + COLUMNS]) for i in range(0, len(panels), COLUMNS)]
    slices = [[[cut(p.volume, p.spacing, plane, _height(p)) for p in block] for plane in planes] for block in blocks]
    widths = [max(row[c].size[0] for rows in slices for row in rows if c < len(row)) for c in range(len(slices[0][0]))]
    heights = [max(part.size[1] for part in row) for rows in slices for row in rows]
    gap, title, note = 0.06, 0.28, 0.30 if caption else 0.0  # inches
    scale = 2.2 / max(widths)  # inches per mm
    figure_size = (
        sum(widths) * scale + gap * (len(widths) + 1),
        sum(heights) * scale + gap * (len(heights) + 1) + title * len(blocks) + note,
    )
    figure = Figure(figsize=figure_size, dpi=120, facecolor="black")
    top = figure_size[1]
    for rows, block in zip(slices, blocks, strict=True):
        left = gap
        for width, panel in zip(widths, block, strict=False):
            _text(figure, left + width * scale / 2, top - title / 2 - 0.02, panel.title, figure_size)
            left += width * scale + gap
        top -= title
        for row in rows:
            height = max(part.size[1] for part in row) * scale
            top -= height + gap
            left = gap
            for width, part, panel in zip(widths, row, block, strict=False):
                own = (part.size[0] * scale, part.size[1] * scale)  # volumes of several sizes stay at one scale
                box = (left + (width * scale - own[0]) / 2, top + (height - own[1]) / 2, *own)
                axial = row is rows[0] and planes[0] == "axial"
                _draw(figure, part, box, figure_size, window, bar=row is rows[0], mark=panel.mark if axial else None)
                left += width * scale + gap
    if caption:
        _text(figure, figure_size[0] / 2, note / 2, caption, figure_size, color="#b8b8b8", size=7)
    return png(figure)


def curves(groups: Sequence[Mapping[str, Any]]) -> bytes:
    """One small chart per group: {"title", "unit", "log", "lines": {name: (steps, values)}}. Long series are smoothed.

    A group without any finite value has no chart, unless none has.
    """
    from matplotlib.figure import Figure

    known = [group for group in groups if any(np.isfinite(values).any() for _, values in group["lines"].values())]
    groups = known or groups[:1]
    columns = min(2, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure(figsize=(4.6 * columns, 2.7 * rows), dpi=110, facecolor="white", layout="constrained")
    for place, group in enumerate(groups, start=1):
        axes = figure.add_subplot(rows, columns, place)
        for color, (name, (steps, values)) in zip(COLORS, group["lines"].items(), strict=False):
            raw = np.asarray(values, dtype=float)
            smooth = _smooth(raw)
            if smooth is not raw:
                axes.plot(steps, raw, color=color, alpha=0.22, linewidth=0.8)
            only = "o" if np.isfinite(raw).sum() == 1 else None  # a line through one point cannot be seen
            axes.plot(steps, smooth, color=color, linewidth=1.6, label=name, marker=only)
        if group.get("log"):
            axes.set_yscale("log")
        axes.set_title(group["title"], fontsize=10, loc="left")
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel(group.get("unit", ""), fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if len(group["lines"]) > 1:
            axes.legend(fontsize=8, frameon=False)
    return png(figure)


def histogram(samples: Mapping[str, np.ndarray], *, window: tuple[float, float], unit: str) -> bytes:
    """Share of voxels per intensity, one line a group; intensities outside the window go into its outermost bins."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 2.8), dpi=110, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    edges = np.linspace(*window, 65)
    for color, (name, values) in zip(COLORS, samples.items(), strict=False):
        counts, _ = np.histogram(np.clip(values, *window), bins=edges)
        axes.stairs(100 * counts / max(1, counts.sum()), edges, color=color, linewidth=1.6, label=name)
    axes.set_yscale("log")
    axes.set_xlabel(unit, fontsize=9)
    axes.set_ylabel("voxels, %", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _height(panel: Panel) -> float:
    """Of the axial slice that is shown, in mm above the middle: in the third of the gland that the mark names."""
    return {"apex": -_THIRD, "base": _THIRD}.get(panel.mark.level or "", 0.0) if panel.mark else 0.0


def _draw(
    figure: Any,
    part: Slice,
    box: tuple,
    figure_size: tuple,
    window: tuple[float, float],
    *,
    bar: bool,
    mark: Mark | None,
) -> None:
    left, bottom, width, height = box
    axes = figure.add_axes(
        (left / figure_size[0], bottom / figure_size[1], width / figure_size[0], height / figure_size[1])
    )
    axes.imshow(
        part.pixels, cmap="gray", vmin=window[0], vmax=window[1], extent=(0, part.size[0], part.size[1], 0),
        interpolation="bilinear", aspect="equal",
    )  # fmt: skip
    axes.set_axis_off()
    for letter, (x, y) in zip(part.letters, [(0.035, 0.5), (0.965, 0.5), (0.5, 0.95), (0.5, 0.05)], strict=True):
        # Letters keep their distance in points from the border, whatever the height of the slice.
        y = 0.5 if y == 0.5 else (1 - 0.085 / height if y > 0.5 else 0.085 / height)
        axes.text(x, y, letter, transform=axes.transAxes, ha="center", va="center", **_outlined(8))
    if mark is not None:  # an arrow from the side, at the height of the zone; the patient's left is on the right
        sign, width = (1 if mark.side == "left" else -1), part.size[0]
        y = part.size[1] / 2 + {"PZ": _BACK, "TZ": -_BACK / 2}.get(mark.zone or "", 0.0)
        tip, end = (width / 2 + sign * distance for distance in (_LATERAL, min(_LATERAL + 14, width / 2 - 1)))
        arrow = {"arrowstyle": "-|>", "color": "#ffd23f", "linewidth": 1.4}
        axes.annotate("", (tip, y), (end, y), arrowprops=arrow)
    if bar:
        start = part.size[0] * 0.06
        axes.plot([start, start + 20], [part.size[1] * 0.955] * 2, color="white", linewidth=1.6, solid_capstyle="butt")
        axes.text(start, part.size[1] * 0.935, "20 mm", ha="left", va="bottom", **_outlined(6))


def _text(figure: Any, x: float, y: float, text: str, figure_size: tuple, *, color="white", size=8) -> None:
    figure.text(x / figure_size[0], y / figure_size[1], text, color=color, fontsize=size, ha="center", va="center")


def _outlined(size: float) -> dict[str, Any]:
    from matplotlib.patheffects import withStroke

    return {"color": "#ffe9a8", "fontsize": size, "path_effects": [withStroke(linewidth=1.6, foreground="black")]}


def _smooth(values: np.ndarray) -> np.ndarray:
    """A running mean over 3 % of a long series, with the ends averaged over what there is."""
    width = len(values) // 33
    if width < 2:
        return values
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def png(figure: Any) -> bytes:
    """A figure as PNG bytes; equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None}, facecolor=figure.get_facecolor())
    return buffer.getvalue()
