"""The record as a table for the terminal, a picture, and one self-contained page.

They answer three questions: how much faster than the reference, how close to the roofline of this machine, and where the time
goes.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import op_counts
from ccella_fast.storage import atomic_path
from registry import HEADLINES
from results import seconds, times_faster
from timer import slope

TEMPLATE = Path(__file__).resolve().parent / "report.html.j2"
# By implementation: the baseline is gray, "ours" is blue, all others are light blue.
_GREY, _LIGHT_BLUE, _BLUE = "#9aa3ad", "#7fb2e5", "#1f6fb4"
_COLORS = {
    "convolution": "#1f6fb4", "linear": "#d98032", "attention": "#a65fa3", "norm, SiLU": "#c8b13a",
    "copies, casts": "#5fb3b3", "optimizer": "#3a8a4d", "other": "#9aa3ad", "network": "#1f6fb4", "steps": "#1f6fb4",
    "forward": "#1f6fb4", "backward": "#0f3f6b", "decode": "#d98032", "loader": "#c84b4b", "save": "#1f6fb4",
    "load": "#d98032", "taps": "#1f6fb4", "radiomics": "#d98032", "random": "#a65fa3", "medicalnet": "#3a8a4d",
    "radimagenet": "#5fb3b3",
}  # fmt: skip


def table(record: dict[str, Any]) -> str:
    """The table for the terminal: one line per implementation."""
    rows = [["case", "implementation", "precision", "median", "quartiles", "faster", "roofline", "% of roofline"]]
    for case in record["cases"]:
        for name, timed in case["sides"].items():
            rows.append([case["name"], name, *_cells(case, name, timed)])
        rows += [[case["name"], what, "", f"{value:.4g} {unit}", "", "", "", ""] for what, value, unit in case["facts"]]
        if case["status"] != "ok":
            rows.append([case["name"], f"{case['status']}: {case['why'][:60]}", *[""] * 6])
    widths = [max(len(row[column]) for row in rows if len(row[column]) < 40) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * sum(widths, 2 * len(widths) - 2))
    absent = _absent(record)
    lines += ["", *(f"not measured: {line}" for line in absent)] if absent else []
    lines += [f"reduced: {line}" for line in record["reduced"]]
    lines += [f"left out: {name}: {why}" for name, why in record["left_out"].items()]
    return "\n".join(["", *lines, "", op_counts.table(record["counts"]), ""])


def _absent(record: dict[str, Any]) -> list[str]:
    """The implementations that are missing, each once, with the reason."""
    return sorted({f"{name}: {why}" for case in record["cases"] for name, why in case["missing"].items()})


def _cells(case: dict[str, Any], name: str, timed: dict[str, Any]) -> list[str]:
    facts, roofline = timed["seconds"], timed.get("floor")
    quartiles = f"{seconds(facts['q1'])} to {seconds(facts['q3'])}" if facts["n"] > 1 else ""
    cells = [timed["precision"], seconds(facts["median"]), quartiles, times_faster(case, name)]
    return [*cells, seconds(roofline["seconds"]), f"{timed['of_limit']:.0%}"] if roofline else [*cells, "", ""]


def write(record: dict[str, Any], page: Path, picture: Path) -> None:
    """Write the page (HTML) and the picture (PNG), and next to it the picture of the scaling curves if there are any."""
    from jinja2 import Environment, StrictUndefined

    png, scaling = draw(record), draw_scaling(record)
    for image, path in ((png, picture), (scaling, picture.with_name(f"{picture.stem}-scaling.png"))):
        if image is not None:
            with atomic_path(path) as temporary:
                temporary.write_bytes(image)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"seconds": seconds, "percent": "{:.0%}".format}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    text = template.render(
        record=record, headline=headline(record), cells=_cells, picture=base64.b64encode(png).decode("ascii"),
        scaling=scaling and base64.b64encode(scaling).decode("ascii"),
        counts=record["counts"], absent=_absent(record),
    )  # fmt: skip
    with atomic_path(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def headline(record: dict[str, Any]) -> list[dict[str, str]]:
    """The numbers at the top of the page: speedup and fraction of the roofline of the headline cases."""
    cards = []
    for case in record["cases"]:
        if case["name"] in HEADLINES and "ours" in case["speedups"]:
            baseline, ours = next(iter(case["sides"].values())), case["sides"]["ours"]
            same = "ours fp32" in case["speedups"] and f"; {case['speedups']['ours fp32']['median']:.1f}x in fp32"
            limit = f"{ours['of_limit']:.0%} of the roofline" if "of_limit" in ours else ""
            cards.append(
                {
                    "title": HEADLINES[case["name"]],
                    "number": f"{case['speedups']['ours']['median']:.1f}x",
                    "text": f"{seconds(baseline['seconds']['median'])} to {seconds(ours['seconds']['median'])}, "
                    f"{baseline['precision']} to {ours['precision']}{same or ''}",
                    "limit": limit,
                }
            )
    return cards


def draw(record: dict[str, Any]) -> bytes:
    """PNG with three panels: speedups, fractions of the roofline, and where the time goes."""
    from matplotlib.figure import Figure

    cases = [case for case in record["cases"] if len(case["sides"]) > 1]
    bars = sum(len(case["sides"]) for case in cases)
    figure = Figure(figsize=(17, max(4.0, 1.9 + 0.34 * (bars + len(cases)))), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 0.8, 1.1])
    _speedups(axes[0], cases)
    _roofline(axes[1], cases)
    _time_shares(axes[2], cases)
    rates = record["rates"]
    figure.suptitle(
        f"ccella_fast on {record['machine']}, {record['environment']['cpu']['torch_threads']} CPU threads, "
        f"{record['date'][:10]}, commit {record['commit']}\n"
        f"limits measured in this run: copy {rates['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
        + ", ".join(f"{name} {rate / 1e12:,.2g} TFLOP/s" for name, rate in rates["matmul_flops"].items())
        + f"; noise (A against A) {record['noise_floor']['noise']:.1%}",
        fontsize=10,
    )
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_scaling(record: dict[str, Any]) -> bytes | None:
    """PNG of all curves, log-log, with a line of slope 1 through each first point; None if there are no curves."""
    from matplotlib.figure import Figure

    curves = {what: points for case in record["cases"] for what, points in case.get("curves", {}).items()}
    if not curves:
        return None
    figure = Figure(figsize=(4.6 * len(curves), 3.6), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(curves), squeeze=False)[0]
    for axis, (what, points) in zip(axes, curves.items(), strict=True):
        xs, ys = zip(*points, strict=True)
        axis.loglog(xs, [ys[0] * x / xs[0] for x in xs], "--", color=_GREY, label="slope 1")
        axis.loglog(xs, ys, "o-", color=_BLUE, label=f"slope {slope(points):.2f}")
        axis.set_title(what, fontsize=10, loc="left")
        axis.legend(fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def _color(case: dict[str, Any], name: str) -> str:
    if name == next(iter(case["sides"])):
        return _GREY
    return _BLUE if name == "ours" else _LIGHT_BLUE


def _rows(cases: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any], str]]:
    """(height, case, name of the implementation) from top to bottom, with a gap between cases."""
    rows, y = [], 0.0
    for case in cases:
        for name in case["sides"]:
            rows.append((y, case, name))
            y -= 1
        y -= 1
    return rows


def _label(axis: Any, rows: list[tuple[float, dict[str, Any], str]], title: str) -> None:
    axis.set_title(title, fontsize=12, fontweight="bold", loc="left")
    labels = []
    for _, case, name in rows:
        first = name == next(iter(case["sides"]))
        precision = case["sides"][name]["precision"]
        label = name if precision in name else f"{name} {precision}"
        labels.append((f"{case['name']}:  " if first else "") + label)
    axis.set_yticks([y for y, _, _ in rows], labels, fontsize=8)
    axis.set_ylim(min((y for y, _, _ in rows), default=0) - 1, 1)
    axis.spines[["top", "right"]].set_visible(False)


def _speedups(axis: Any, cases: Sequence[dict[str, Any]]) -> None:
    rows = _rows(cases)
    for y, case, name in rows:
        value = 1.0 if name == next(iter(case["sides"])) else case["speedups"].get(name, {}).get("median", 0.0)
        axis.barh(y, value, color=_color(case, name), height=0.8)
        if case["status"] != "ok":
            text = case["status"]
        else:
            text = f"{value:.2f}x, {seconds(case['sides'][name]['seconds']['median'])}" if value else ""
        axis.text(value, y, f"  {text}", va="center", fontsize=8, fontweight="bold" if name == "ours" else None)
    axis.axvline(1, color="#444", linewidth=0.8)
    axis.margins(x=0.3)
    _label(axis, rows, "How many times faster")


def _roofline(axis: Any, cases: Sequence[dict[str, Any]]) -> None:
    rows = _rows(cases)
    for y, case, name in rows:
        timed = case["sides"][name]
        if "of_limit" in timed:
            axis.barh(y, min(100 * timed["of_limit"], 125), color=_color(case, name), height=0.8)
            text = f"  {timed['of_limit']:.0%} ({timed['floor']['limit']}: {seconds(timed['floor']['seconds'])})"
            axis.text(min(100 * timed["of_limit"], 100), y, text, va="center", fontsize=8)
    axis.axvline(100, color="#444", linewidth=0.8, linestyle="--")
    axis.set_xlim(0, 150)
    axis.set_xlabel("% of the roofline of this machine at that precision", fontsize=8)
    _label(axis, rows, "How close to the roofline")
    axis.set_yticklabels([])


def _time_shares(axis: Any, cases: Sequence[dict[str, Any]]) -> None:
    """Time by kind of work if the call was profiled, else by its parts, relative to the case's slowest implementation."""
    rows, shown = _rows(cases), {}
    for y, case, name in rows:
        timed = case["sides"][name]
        pieces = timed.get("profile", {}).get("seconds_by_kind") or timed["parts"]
        if not pieces:
            continue
        slowest = max(other["seconds"]["median"] for other in case["sides"].values())
        scale = timed["seconds"]["median"] / sum(pieces.values()) / slowest * 100
        left = 0.0
        for piece, value in pieces.items():
            bar = axis.barh(y, value * scale, left=left, color=_COLORS.get(piece, _GREY), height=0.8)
            shown.setdefault(piece, bar)
            if value * scale > 1.5 * len(piece) + 1:
                axis.text(left + value * scale / 2, y, piece, ha="center", va="center", fontsize=7, color="white")
            left += value * scale
    axis.set_xlabel("% of the time of the case's slowest implementation", fontsize=8)
    if shown:
        axis.legend(shown.values(), shown.keys(), fontsize=7, loc="lower right", ncols=2, frameon=False)
    _label(axis, rows, "Where the time goes")
    axis.set_yticklabels([])
