"""The page of an evaluation, from the files that `ccella-fast evaluate` has written.

Volumes are numbered; neither ids nor report text are copied.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.data.example_volumes import SHOWN, Kind, StoredExample
from ccella_fast.errors import DataError
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
from ccella_fast.report.findings import METRICS, Findings, MetricRow, guard_sentence, read_findings
from ccella_fast.report.page import FOOT, HEAD, POLICY, render
from ccella_fast.report.verdicts import percent, shown, verdicts
from ccella_fast.report.viewer import ViewedCase, ViewedVolume, Viewer, make_viewer
from ccella_fast.storage import atomic_path

WINDOW = (0.0, 1.0)
_PAIRS = 10
_PLAUSIBLE_CC = (15.0, 80.0)
_KINDS: tuple[tuple[Kind, str], ...] = (("real", ""), ("reconstructed", "Reconstructed"), ("synthetic", "Generated"))
_SYNTHETIC = "Generated images are synthetic. Nothing on this page is for diagnosis."
_PHANTOMS = "The real volumes are phantoms: drawn by a program, not patients."

# metric -> its name in the table, in the order of the table
_NAMES = {
    "fd": "Fréchet distance",
    "kid": "Kernel distance (KID)",
    "mmd": "Gaussian MMD",
    "c2st": "Real or generated, by a classifier",
    "precision": "Precision",
    "recall": "Recall",
    "density": "Density",
    "coverage": "Coverage",
    "ms_ssim": "Similarity among volumes (MS-SSIM)",
    "intensity": "Intensities (Wasserstein-1)",
    "spectrum": "Power spectrum, dB",
    "memorisation": "Copies of training studies",
    "class_agreement": "Class that was asked for",
    "gland_volume": "Gland volume that was asked for",
    "anatomy": "Plausible glands",
}
_BETTER = {"lower": "lower is better", "higher": "higher is better", "floor": "as among real volumes"}
_RULES = {
    "found": "a gland is found", "volume": "15 to 80 cc", "extents": "10 to 150 mm in each direction",
    "one_component": "in one piece", "no_hole": "without holes", "no_border_contact": "away from the border",
    "no_slice_gap": "without gaps between slices", "plausible": "all of these",
}  # fmt: skip


class EvaluationPart(NamedTuple):
    """The evaluation as HTML, and the Content-Security-Policy that a page with it needs."""

    html: str
    policy: str


def write_evaluation_page(folder: str | Path) -> Path:
    """Write `folder/report.html` from the files of an evaluation in `folder`, and return its path.

    Raises:
        DataError: there is no evaluation, or a file is damaged.
    """
    folder = Path(folder)
    findings = read_findings(folder)
    part = evaluation_part(folder, findings)
    names = findings.protocol.get("synthetic", {}).get("name") or (findings.rows[0].set if findings.rows else "")
    page = render(
        HEAD + "{{ body | safe }}" + FOOT,
        title="ccella_fast: evaluation" + (f" of {names}" if names else ""),
        subtitle="Are the generated volumes good, new, and what the report says?",
        notices=[_PHANTOMS, _SYNTHETIC] if findings.phantom else [_SYNTHETIC],
        facts=[],
        body=part.html,
        policy=part.policy,
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / "report.html"


def evaluation_part(folder: Path, findings: Findings | None = None) -> EvaluationPart:
    """The evaluation in `folder` as a part of a page, and the policy that it needs.

    Raises:
        DataError: there is no evaluation, or a file is damaged.
    """
    findings = findings or read_findings(folder)
    with _damage_named(folder / METRICS):
        rows = sorted(findings.rows, key=_table_order)
        table, notes = _table(rows)
        viewer = _viewer(findings)
        html = render(
            EVALUATION,
            verdicts=verdicts(findings),
            word="phantom" if findings.phantom else "real",
            sequences=len({row.sequence for row in rows}) > 1,
            rows=table,
            notes=notes,
            dots=[_dots(rows)],
            montages=[_montage(findings)],
            viewer=viewer if isinstance(viewer, Viewer) else None,
            no_viewer=viewer,
            pairs=[_pairs(findings)],
            anatomy=_anatomy(findings),
            glands=[_glands(findings)],
            curves=[_curves(findings)],
            gates=[_gate(gate) for gate in findings.gates],
            no_gates="The sensitivity gate was not run: nothing shows that these features see known degradations.",
            protocol=_protocol(findings),
        )
    if not isinstance(viewer, Viewer):
        return EvaluationPart(html, POLICY)
    return EvaluationPart(html, f"{POLICY.replace('img-src data:', 'img-src data: blob:')}; script-src {viewer.policy}")


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Convert what the content of a damaged file raises, where it is used, to a DataError that names the file."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError):
        why = "a value that `ccella-fast evaluate` writes into this file is missing or of another kind"
        raise DataError(why, path=path, fix="run `ccella-fast evaluate` again") from None


def _table_order(row: MetricRow) -> tuple[int, str, str]:
    known = list(_NAMES)
    return known.index(row.metric) if row.metric in known else len(known), row.metric, row.sequence


def _table(rows: Sequence[MetricRow]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of the table, and the sentences that the numbers in their last column refer to."""
    notes: list[str] = []
    table, last = [], None
    for row in rows:
        sentences = [guard_sentence(guard) for guard in row.guards]
        notes += [each for each in sentences if each not in notes]
        numbers = sorted(notes.index(each) + 1 for each in sentences)
        name = _NAMES.get(row.metric, row.metric.replace("_", " "))
        table.append({
            "metric": name if row.metric != last else "", "better": _BETTER.get(row.better, "") if row.metric != last else "",
            "features": row.features or "-", "sequence": row.sequence, "value": shown(row.value, 3),
            "interval": f"{shown(row.ci95[0], 3)} to {shown(row.ci95[1], 3)}" if row.ci95 else "-",
            "floor": shown(row.floor, 3), "ratio": shown(row.ratio, 3), "limit": shown(row.limit_autoencoder, 3),
            "n": f"{row.n_real}, {row.n_synthetic}", "notes": ", ".join(map(str, numbers)), "faint": "gate" in row.guards,
        })  # fmt: skip
        last = row.metric
    return table, notes


def _dots(rows: Sequence[MetricRow]) -> dict[str, Any]:
    panels = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [row for row in rows if row.metric == metric and row.value is not None]
        with_ratio = [row for row in own if row.ratio is not None and row.floor]
        name = _NAMES.get(metric, metric.replace("_", " "))
        if with_ratio:
            dots = [
                Dot(_label(row), row.ratio or 0, row.ratio_ci95, 1.0,
                    row.limit_autoencoder / row.floor if row.limit_autoencoder and row.floor else None, "gate" in row.guards)
                for row in with_ratio
            ]  # fmt: skip
            logarithmic = max(dot.value for dot in dots) > 5 and min(
                (dot.interval or (dot.value,))[0] for dot in dots
            ) > 0  # fmt: skip
            panels.append(DotPanel(f"{name}, multiples of the floor", dots, log=logarithmic))
        elif own and any(row.floor is not None or row.ci95 for row in own):
            dots = [
                Dot(_label(row), row.value or 0, row.ci95, row.floor, row.limit_autoencoder, "gate" in row.guards)
                for row in own
            ]
            panels.append(DotPanel(name, dots))
    caption = "Each metric with its interval. Faint: feature spaces that failed the sensitivity gate."
    return _figure(dot_plots(panels) if panels else None, caption, "No metric has a floor or an interval to be drawn.")


def _label(row: MetricRow) -> str:
    return f"{row.features or 'images'}" + ("" if row.sequence == "t2w" else f", {row.sequence}")


def _shown_columns(findings: Findings) -> list[list[tuple[str, StoredExample]]]:
    """Volumes to show next to each other, by number: a real one, its reconstruction and a generated one where they are kept."""
    columns = []
    for sequence in dict.fromkeys(example.sequence for example in findings.examples):
        for number in range(1, SHOWN + 1):
            column = [
                (f"{name or ('Phantom' if findings.phantom else 'Real')} {number}"
                 + ("" if sequence == "t2w" else f", {sequence}"), example)
                for kind, name in _KINDS
                for example in findings.examples
                if (example.kind, example.number, example.sequence) == (kind, number, sequence)
            ]  # fmt: skip
            if column:
                columns.append(column)
    return columns


def _montage(findings: Findings) -> dict[str, Any]:
    columns = _shown_columns(findings)
    rows = [[Panel(*example.read(), title) for title, example in column] for column in columns]
    caption = (
        "Middle axial slices in one gray window. The generated volumes belong to no particular volume above them. "
        "The patient's right is on the left side."
    )
    return _figure(trios(rows, window=WINDOW) if rows else None, caption, "No volumes were kept to be shown.")


def _viewer(findings: Findings) -> Viewer | str:
    columns = _shown_columns(findings)
    most = max(map(len, columns), default=0)
    cases = [
        ViewedCase(column[0][0].replace("Phantom ", "").replace("Real ", ""),
                   [ViewedVolume(title, example.path) for title, example in column])
        for column in columns
        if len(column) == most
    ]  # fmt: skip
    return make_viewer(cases) if cases else ""


def _pairs(findings: Findings) -> dict[str, Any]:
    kept = {(example.kind, example.number, example.sequence): example for example in findings.examples}
    pairs = []
    near = [case for case in findings.per_case if case.get("nearest_train") is not None]
    near.sort(key=lambda case: (case.get("null_percentile", 100), case.get("distance", 0)))
    for case in near:
        sequence = case.get("sequence", "t2w")
        first = kept.get(("synthetic", case["number"], sequence))
        second = kept.get(("train", case["nearest_train"], sequence))
        if first is None or second is None or len(pairs) == _PAIRS:
            continue
        generated, spacing = first.read()
        training, _ = second.read()
        if generated.shape != training.shape:
            continue
        place = (
            f"nearer than {100 - case['null_percentile']:.0f} % of held-out volumes"
            if "null_percentile" in case
            else ""
        )
        pairs.append(
            Pair(generated, training, spacing, f"Generated {case['number']} | training study {case['nearest_train']} | difference",
                 f"distance {shown(case.get('distance'), 3)}, {place}")
        )  # fmt: skip
    caption = (
        "The generated volumes that are nearest to a training study, and the difference: red where the generated one is brighter. "
        "A copy has a difference without anatomy."
    )
    missing = "There are no pairs to show: the training set was not given (--train), or no volumes were kept."
    return _figure(pair_gallery(pairs, window=WINDOW) if pairs else None, caption, missing)


def _anatomy(findings: Findings) -> dict[str, Any] | None:
    found = [row for row in findings.named("anatomy") if "rules" in row.details]
    if not found:
        return None
    details = found[0].details
    _, (low, high), n = details["segmented"]
    real = percent(details["segmented"][0]) if n else "none"
    sentence = f"The segmenter finds one gland of a plausible volume in {real} of the real volumes (n = {n})."
    if not details["applicable"]:
        sentence += " It has to be 90 % at least: the numbers below say nothing about the generated volumes."
    rows = [
        {"rule": _RULES.get(name, name), "real": _share(both[0]), "generated": _share(both[1]),
         "interval": f"{percent(both[1][1][0])} to {percent(both[1][1][1])}"}
        for name, both in details["rules"].items()
    ]  # fmt: skip
    return {"sentence": sentence, "rows": rows}


def _share(share: Sequence[Any]) -> str:
    return "-" if share[0] is None else percent(share[0])


def _glands(findings: Findings) -> dict[str, Any]:
    word = "phantom" if findings.phantom else "real"
    groups = {
        name: [case["volume_cc"] for case in findings.per_case if case.get("set") == which and case.get("volume_cc")]
        for name, which in ((word, "real"), ("generated", "synthetic"))
    }
    missing = "No glands were segmented: the segmenter is the package of `make demo` for T2-weighted volumes."
    image = volume_strips(groups, unit="gland volume, cc", plausible=_PLAUSIBLE_CC) if all(groups.values()) else None
    return _figure(image, "Volumes of the segmented glands; bar: median; band: 15 to 80 cc.", missing)


def _curves(findings: Findings) -> dict[str, Any]:
    word = "phantom" if findings.phantom else "real"
    names = (("real", word), ("reconstructed", "reconstructed"), ("synthetic", "generated"))
    groups: list[dict[str, Any]] = []
    for row in findings.named("intensity")[:1]:
        lines = {}
        for key, name in names:
            if row.details.get(key) is not None:
                shares = np.asarray(row.details[key], float)
                shares = shares.reshape(64, -1).sum(1) if shares.size % 64 == 0 else shares
                lines[name] = ((np.arange(shares.size) + 0.5) / shares.size, np.maximum(100 * shares, 1e-3))
        if lines:
            groups.append(
                {"title": "intensities", "x": "normalized intensity", "y": "voxels, %", "log": True, "lines": lines}
            )
    for row in findings.named("spectrum")[:1]:
        for place, plane in ((2, "axial"), (1, "coronal")):
            lines = {}
            for key, name in names:
                if row.details.get(key) is not None:
                    power = np.asarray(row.details[key], float).reshape(3, -1)[place]
                    lines[name] = ((np.arange(power.size) + 0.5) / power.size, power)
            if lines:
                title = f"power spectrum, {plane} slices"
                groups.append({"title": title, "x": "frequency / Nyquist", "y": "dB", "lines": lines})
    caption = "Means over the volumes. A spectrum that falls below that of the real volumes on the right side is blur, above it noise."
    return _figure(profiles(groups) if groups else None, caption, "Intensities and spectra were not compared.")


def _gate(gate: dict[str, Any]) -> dict[str, Any]:
    names = [f"{row['family']} {row['strength']:g} {row['unit']}".strip() for row in gate["rows"]]
    failed = ", ".join(
        f"{family} in order in {percent(share)}" for family, share in gate["in_order"].items() if share < 0.9
    )
    return {"space": gate["space"], "passed": gate["passed"], "failed": failed, "names": names,
            "distances": [shown(row["paired"]) for row in gate["rows"]]}  # fmt: skip


def _protocol(findings: Findings) -> list[tuple[str, str]]:
    rows = [("SHA-256 of the protocol", findings.protocol_sha256)]
    rows += [(name, _flat(value)) for name, value in findings.protocol.items()]
    weights = {row.features: row.weights_sha256 for row in findings.rows if row.weights_sha256}
    rows += [(f"Weights of {name}", str(digest)) for name, digest in weights.items()]
    seconds = sum(row.seconds for row in findings.rows)
    if seconds:
        rows.append(("Time for the metrics", f"{seconds:.1f} s, without the features"))
    packages = findings.environment.get("packages", {})
    if packages:
        rows.append(("Packages", ", ".join(f"{name} {version}" for name, version in packages.items() if version)))
    return rows


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_flat(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(_flat, value)) if value else "-"
    return (
        {None: "-", True: "yes", False: "no"}.get(value, str(value))
        if not isinstance(value, int | float) or isinstance(value, bool)
        else f"{value:g}"
    )


def _figure(image: bytes | None, caption: str, missing: str) -> dict[str, Any]:
    encoded = base64.b64encode(image).decode() if image else None
    return {"image": encoded, "caption": caption, "alt": caption, "missing": missing}
