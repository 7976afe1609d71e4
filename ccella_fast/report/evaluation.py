"""The page of an evaluation, from the files that `ccella-fast evaluate` has written.

Volumes are numbered; neither ids nor report text are copied.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.data.example_volumes import SHOWN, Kind, StoredExample
from ccella_fast.quantities import counted
from ccella_fast.report.evaluation_figures import (
    Dot,
    DotPanel,
    Pair,
    dot_plots,
    pair_gallery,
    profiles,
    trios,
    volume_strips,
)
from ccella_fast.report.evaluation_page import EVALUATION
from ccella_fast.report.figures import Panel
from ccella_fast.report.page import FOOT, HEAD, POLICY, render
from ccella_fast.report.stored_evaluation import (
    EXPLAINING,
    GLAND,
    METRICS,
    PROTOCOL,
    WRITTEN_BY,
    MetricRow,
    StoredEvaluation,
    guard_sentence,
    read_evaluation,
)
from ccella_fast.report.verdicts import CONDITION, COUNTERFACTUAL, percent, shown, verdicts
from ccella_fast.report.viewer import ViewedCase, ViewedVolume, Viewer, make_viewer
from ccella_fast.storage import atomic_path, damage_named

WINDOW = (0.0, 1.0)
_PAIRS = 10
_PLAUSIBLE_CC = (15.0, 80.0)
_SYNTHETIC = "Generated images are synthetic. Nothing on this page is for diagnosis."
_PHANTOMS = "The real volumes are phantoms: drawn by a program, not patients."

# metric -> its name, in the order of the table
_NAMES = {
    "fd": "Fréchet distance",
    "fd_slices": "Fréchet distance of slices (2.5D)",
    "kid": "Kernel distance (KID)",
    "c2st": "Real or generated? AUC of a classifier",
    "precision": "Precision",
    "recall": "Recall",
    "coverage": "Coverage",
    "msssim": "Similarity of volumes (MS-SSIM)",
    "intensity": "Intensities, Wasserstein-1",
    "spectrum": "Power spectrum, dB",
    "copies": "Copies of training studies",
    CONDITION: "",  # rows of several properties
    COUNTERFACTUAL: "",
    "retrieval_1": "Own report found by the volume",
    "retrieval_5": "Own report among the first 5",
    "retrieval_10": "Own report among the first 10",
    "gland_plausible": "Plausible glands",
    "mmd": "Gaussian MMD",
    "density": "Density",
    "clipped_density": "Clipped density",
    "clipped_coverage": "Clipped coverage",
    "fd_infinity": "Fréchet distance, extrapolated to infinitely many volumes",
    "below_1pct": "Nearer than 99 % of held-out ones",
    "below_5pct": "Nearer than 95 % of held-out ones",
    "memorisation_index": "Nearness in standard deviations",
    "ct": "Data copying, C_T",
    "own_study": "Nearest to the study of its report",
}
_FIRST = list(_NAMES)[: list(_NAMES).index("mmd")]  # the others are in a part of the page that is opened by a click
_PLOTTED = ("fd", "kid", "mmd", "c2st", "precision", "recall", "density", "coverage", "msssim")
_SHARES = ("c2st", "precision", "recall", "coverage")
_BETTER = {"lower": "lower is better", "higher": "higher is better", "floor": "best as among real volumes"}
_CURVES = {"real", "autoencoder", "synthetic"}
_RULES = {
    "found": "a gland is found",
    "volume": f"{_PLAUSIBLE_CC[0]:g} to {_PLAUSIBLE_CC[1]:g} cc",
    "extents": "10 to 150 mm in each direction",
    "one_component": "in one piece",
    "no_hole": "without holes",
    "no_border_contact": "away from the border of the image",
    "no_slice_gap": "without gaps between slices",
    "plausible": "all of these",
}


class EvaluationPart(NamedTuple):
    """A part of a page.

    Attributes:
        html: of the evaluation.
        policy: the Content-Security-Policy that a page with it needs.
        notice: what has to stand at the top of a page with it.
        subtitle: what was compared.
    """

    html: str
    policy: str
    notice: str
    subtitle: str


def write_evaluation_page(folder: str | Path) -> Path:
    """Write `folder/report.html` from the files of an evaluation in `folder`, and return its path.

    Raises:
        DataError: there is no evaluation, or a file is damaged.
    """
    folder = Path(folder)
    part = evaluation_part(folder)
    page = render(
        HEAD + "{{ body | safe }}" + FOOT,
        title="ccella_fast: evaluation",
        subtitle=part.subtitle,
        notices=[part.notice],
        facts=[],
        body=part.html,
        policy=part.policy,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def evaluation_part(folder: Path) -> EvaluationPart:
    """The evaluation in `folder` as a part of a page.

    Raises:
        DataError: there is no evaluation, or a file is damaged.
    """
    stored = read_evaluation(folder)
    rows = sorted(stored.rows, key=_table_order)
    listed = [row for row in rows if row.metric == GLAND + "plausible" or not row.metric.startswith(GLAND)]
    table, notes = _table(listed)
    is_first = [_kind(row.metric) in _FIRST for row in listed]
    columns = _shown_columns(stored)
    viewer = _viewer(columns)
    with damage_named(folder / METRICS, **WRITTEN_BY):
        curves = _curves(stored)
    with damage_named(folder / PROTOCOL, **WRITTEN_BY):
        protocol = _protocol(stored)
    html = render(
        EVALUATION,
        verdicts=verdicts(stored),
        word="phantom" if stored.phantom else "real",
        words=f"{stored.word}s",
        sequences=len({row.sequence for row in rows}) > 1,
        rows=[row for row, first in zip(table, is_first, strict=True) if first],
        further=[row for row, first in zip(table, is_first, strict=True) if not first],
        notes=notes,
        dots=[_dots(rows)],
        montages=[_montage(columns)],
        viewer=viewer if isinstance(viewer, Viewer) else None,
        no_viewer=viewer,
        pairs=[_pairs(stored)],
        rules=_rules(stored),
        glands=[_glands(stored)],
        curves=[curves],
        gates=[gate_row(gate) for gate in stored.gates],
        no_gates="The sensitivity gate was not run: nothing shows that these features see known degradations.",
        protocol=protocol,
    )
    policy = POLICY
    if isinstance(viewer, Viewer):
        policy = f"{POLICY.replace('img-src data:', 'img-src data: blob:')}; script-src {viewer.policy}"
    return EvaluationPart(
        html, policy, f"{_PHANTOMS} {_SYNTHETIC}" if stored.phantom else _SYNTHETIC, _subtitle(stored)
    )


def _subtitle(stored: StoredEvaluation) -> str:
    if not stored.rows:
        return "No metric was computed."
    first = max(stored.rows, key=lambda row: row.n_synthetic)
    generated = counted(first.n_synthetic, "generated volume")
    return f"{generated} ({first.set}) against {counted(first.n_real, stored.word)} ({first.reference})"


def _table_order(row: MetricRow) -> tuple[int, str, str]:
    known = [*_NAMES, row.metric]
    return known.index(_kind(row.metric)), row.metric, row.sequence


def _kind(metric: str) -> str:
    """The metric, or what the rows of several properties share."""
    return next((prefix for prefix in (CONDITION, COUNTERFACTUAL) if metric.startswith(prefix)), metric)


def _name(metric: str) -> str:
    if metric.startswith(CONDITION):
        return f"{metric.removeprefix(CONDITION).replace('_', ' ').capitalize()} that was asked for"
    if metric.startswith(COUNTERFACTUAL):
        return f"Effect of asking for another {metric.removeprefix(COUNTERFACTUAL).replace('_', ' ')}, same noise"
    return _NAMES.get(metric, metric.replace("_", " "))


def _table(rows: Sequence[MetricRow]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table, and the sentences that the numbers in their last column refer to."""
    notes: list[str] = []
    table, last = [], None
    for row in rows:
        sentences = [guard_sentence(guard) for guard in row.guards]
        notes += [each for each in sentences if each not in notes]
        numbers = sorted(notes.index(each) + 1 for each in sentences)
        is_first = row.metric != last
        table.append({
            "metric": _name(row.metric) if is_first else "", "better": _BETTER.get(row.better, "") if is_first else "",
            "features": row.features or "-", "sequence": row.sequence, "value": shown(row.value, 3),
            "interval": f"{shown(row.ci95[0], 3)} to {shown(row.ci95[1], 3)}" if row.ci95 else "-",
            "equal_n": shown(row.value_equal_n, 3), "floor": shown(row.floor, 3), "ratio": shown(row.ratio, 3),
            "limit": shown(row.limit_autoencoder, 3),
            "n": _sizes(row), "notes": ", ".join(map(str, numbers)), "faint": row.has("gate"),
        })  # fmt: skip
        last = row.metric
    return table, notes


def _sizes(row: MetricRow) -> str:
    """The numbers of volumes, and of slices where these are rows."""
    slices = [row.number(f"slices_{kind}") for kind in ("real", "synthetic")]
    after = f" ({slices[0]:g}, {slices[1]:g} slices)" if slices[0] and slices[1] else ""
    return f"{row.n_real}, {row.n_synthetic}{after}"


def _dots(rows: Sequence[MetricRow]) -> dict[str, Any]:
    panels = []
    for metric in _PLOTTED:
        own = [row for row in rows if row.metric == metric and row.value is not None]
        relative = [_relative(row) for row in own if row.ratio is not None and row.floor]
        if metric == "fd" and relative:
            low = min(dot.interval[0] if dot.interval else dot.value for dot in relative)
            far = max(dot.value for dot in relative) > 5 and low > 0
            panels.append(DotPanel(f"{_name(metric)}, multiples of the floor", relative, log=far))
        elif own := [row for row in own if row.features != EXPLAINING]:
            panels.append(DotPanel(_name(metric), [_absolute(row) for row in own], share=metric in _SHARES))
    caption = (
        f"Each metric in each feature space, of {EXPLAINING} the Fréchet distance only. Faint: features that failed the "
        "sensitivity gate."
    )
    return figure(dot_plots(panels) if panels else None, caption, "No distance was computed.")


def _absolute(row: MetricRow) -> Dot:
    """A value, at the number of volumes of the floor if it has one."""
    value = row.value if row.value_equal_n is None else row.value_equal_n
    assert value is not None and row.value is not None
    interval = None if row.ci95 is None else (row.ci95[0] + value - row.value, row.ci95[1] + value - row.value)
    return Dot(_label(row), value, interval, row.floor, row.limit_autoencoder, row.has("gate"))


def _relative(row: MetricRow) -> Dot:
    """A distance and the autoencoder's limit in multiples of the floor."""
    assert row.ratio is not None and row.floor
    limit = None if row.limit_autoencoder is None else row.limit_autoencoder / row.floor
    return Dot(_label(row), row.ratio, row.ratio_ci95, 1.0, limit, row.has("gate"))


def _label(row: MetricRow) -> str:
    return (row.features or "images") + ("" if row.sequence == "t2w" else f", {row.sequence}")


def _shown_columns(stored: StoredEvaluation) -> list[list[tuple[str, StoredExample]]]:
    """Volumes to show next to each other, by number: a real one, its reconstruction and a generated one where they are kept."""
    titles: dict[Kind, str] = {
        "real": "Phantom" if stored.phantom else "Real",
        "reconstructed": "Reconstructed",
        "synthetic": "Generated",
    }
    found = {(each.sequence, each.number, each.kind): each for each in stored.examples}
    columns = []
    for sequence in dict.fromkeys(each.sequence for each in stored.examples):
        for number in range(1, SHOWN + 1):
            kinds = [kind for kind in titles if (sequence, number, kind) in found]
            after = "" if sequence == "t2w" else f", {sequence}"
            columns.append([(f"{titles[kind]} {number}{after}", found[sequence, number, kind]) for kind in kinds])
    return [column for column in columns if column]


def _montage(columns: Sequence[Sequence[tuple[str, StoredExample]]]) -> dict[str, Any]:
    panels = [[Panel(*example.read(), title) for title, example in column] for column in columns]
    caption = (
        "Middle axial slices in one gray window; the patient's right is on the left side. A generated volume does not "
        "belong to the volumes above it."
    )
    return figure(trios(panels, window=WINDOW) if panels else None, caption, "No volumes were kept to be shown.")


def _viewer(columns: Sequence[Sequence[tuple[str, StoredExample]]]) -> Viewer | str:
    most = max(map(len, columns), default=0)
    cases = [
        ViewedCase(column[0][0], [ViewedVolume(title, example.path) for title, example in column])
        for column in columns
        if len(column) == most
    ]
    return make_viewer(cases) if cases else ""


def _pairs(stored: StoredEvaluation) -> dict[str, Any]:
    kept = {(each.kind, each.number, each.sequence): each for each in stored.examples}
    pairs: list[Pair] = []
    found = [case for case in stored.cases if case.kind == "synthetic" and case.nearest_train is not None]
    found.sort(key=lambda case: (not case.is_copy, case.null_percentile or 0.0, case.distance or 0.0))
    for case in found:
        first = kept.get(("synthetic", case.number, case.sequence))
        second = kept.get(("train", case.nearest_train or 0, case.sequence))
        if first is None or second is None or len(pairs) == _PAIRS:
            continue
        (generated, spacing), (training, _) = first.read(), second.read()
        title = f"Generated {case.number}  |  training study {case.nearest_train}  |  difference"
        share = 0 if case.null_percentile is None else round(100 - case.null_percentile)
        near = f"nearer than {share} % of held-out volumes" if share else "no nearer than any held-out volume"
        near = f"{near}: a copy" if case.is_copy else near
        pairs.append(Pair(generated, training, spacing, title, f"distance {shown(case.distance, 3)}, {near}"))
    caption = (
        "The generated volumes that are nearest to a training study. Difference: red where the generated one is brighter, blue "
        "where it is darker; that of a copy shows no anatomy."
    )
    missing = "There are no pairs to show: no training set was given (--train)."
    return figure(pair_gallery(pairs, window=WINDOW) if pairs else None, caption, missing)


def _rules(stored: StoredEvaluation) -> list[dict[str, str]]:
    """A row for each rule of glands."""
    return [
        {"rule": _RULES.get(row.metric.removeprefix(GLAND), _name(row.metric)), "sequence": row.sequence,
         "real": "-" if row.floor is None else percent(row.floor),
         "generated": "-" if row.value is None else percent(row.value),
         "interval": f"{percent(row.ci95[0])} to {percent(row.ci95[1])}" if row.ci95 else "-"}
        for row in stored.rows
        if row.metric.startswith(GLAND)
    ]  # fmt: skip


def _glands(stored: StoredEvaluation) -> dict[str, Any]:
    volumes = {
        name: [case.volume_cc for case in stored.cases if case.kind == kind and case.volume_cc]
        for name, kind in (("phantoms" if stored.phantom else "real", "real"), ("generated", "synthetic"))
    }
    if not any(volumes.values()):
        return figure(None, "", "No gland was segmented: that needs the segmenter's package, and T2-weighted volumes.")
    image = volume_strips(volumes, unit="gland volume, cc", plausible=_PLAUSIBLE_CC)
    caption = "Volumes of the segmented glands. Bar: median; band: plausible."
    if any(row.has("segmenter_fails_on_real") for row in stored.rows):
        caption += f" {guard_sentence('segmenter_fails_on_real')}"
    return figure(image, caption, "")


def _curves(stored: StoredEvaluation) -> dict[str, Any]:
    real = "phantoms" if stored.phantom else "real"
    return curve_figure(
        [(real, stored, "real"), ("reconstructed", stored, "autoencoder"), ("generated", stored, "synthetic")]
    )


def curve_figure(lines: Sequence[tuple[str, StoredEvaluation, str]]) -> dict[str, Any]:
    """The figure of the intensities and power spectra of several sets of volumes.

    Args:
        lines: of each set how it is called, an evaluation, and what the set is there: "real", "autoencoder" or "synthetic".
    """
    groups: list[dict[str, Any]] = []
    if shares := _curves_of("intensity", lines):
        found = {name: np.maximum(100 * curve.reshape(64, -1).sum(1), 1e-3) for name, curve in shares.items()}
        groups.append(
            {"title": "intensities", "x": "normalized intensity", "y": "voxels, %", "log": True, "lines": found}
        )
    if spectra := _curves_of("spectrum", lines):
        for place, plane in ((2, "axial"), (1, "coronal")):
            found = {name: curve.reshape(3, -1)[place] for name, curve in spectra.items()}
            title = f"power spectrum, {plane} slices"
            groups.append({"title": title, "x": "frequency / Nyquist", "y": "dB", "lines": found})
    for group in groups:
        group["lines"] = {name: (_middles(curve), curve) for name, curve in group["lines"].items()}
    caption = "Means over the volumes. At the right end of a spectrum, less power than in real volumes is blur, more is noise."
    return figure(profiles(groups) if groups else None, caption, "Intensities and spectra were not compared.")


def _curves_of(metric: str, lines: Sequence[tuple[str, StoredEvaluation, str]]) -> dict[str, np.ndarray]:
    """The mean curve of each set that has one. Raises KeyError for a curve of something else."""
    found = {}
    for name, stored, kind in lines:
        for row in stored.named(metric)[:1]:
            if unknown := row.details["curves"].keys() - _CURVES:
                raise KeyError(*unknown)
            if kind in row.details["curves"]:
                found[name] = np.asarray(row.details["curves"][kind], float)
    return found


def _middles(values: np.ndarray) -> np.ndarray:
    """The middles of as many bins between 0 and 1."""
    return (np.arange(len(values)) + 0.5) / len(values)


def gate_row(gate: dict[str, Any]) -> dict[str, Any]:
    """A feature space in the table of the sensitivity gate."""
    names = [f"{row['family']} {row['strength']:g} {row['unit']}".strip() for row in gate["rows"]]
    in_order = {family: percent(share) for family, share in gate["in_order"].items()}
    failed = ", ".join(
        f"{family} in order in {in_order[family]}" for family, share in gate["in_order"].items() if share < 0.9
    )
    distances = [shown(row["paired"]) for row in gate["rows"]]
    return {
        "space": gate["space"], "passed": gate["passed"], "failed": failed, "names": names, "distances": distances,
        "in_order": in_order,
    }  # fmt: skip


def _protocol(stored: StoredEvaluation) -> list[tuple[str, str]]:
    rows = [("SHA-256 of the protocol", stored.protocol_sha256)]
    for name, value in stored.protocol.items():
        if name == "features":
            rows += [(", ".join(each["spaces"]), _flat(each["identity"])) for each in value]
        else:
            rows.append((name.replace("_", " "), _flat(value)))
    rows.append(("Time for the metrics", f"{sum(row.seconds for row in stored.rows):.1f} s, without the features"))
    packages = stored.environment.get("packages")
    if isinstance(packages, dict):
        rows.append(("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)))
    return rows


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def figure(image: bytes | None, caption: str, missing: str) -> dict[str, Any]:
    """A picture for the macro `figures` of the pages; missing: the sentence where there is none."""
    encoded = base64.b64encode(image).decode() if image else None
    return {"image": encoded, "caption": caption, "alt": caption, "missing": missing}
