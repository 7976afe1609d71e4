"""The tables of a comparison: a row for each variant, with mean and standard deviation over its training seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from ccella_fast.report.comparison import Table
from ccella_fast.variants import VARIANTS

COLUMNS = [
    "variant", "report", "class", "head", "KID", "FD", "coverage", "class AUC", "copies", "accuracy of rs", "parameters",
    "training, s", "synthesis, s",
]  # fmt: skip
_REAL, _AUTOENCODER = "real against real", "autoencoder alone"
_CONDITION, _SLICES, _GLAND, _COUNTERFACTUAL = "condition_", "fd_slices", "gland_", "counterfactual_"
_COPIES = {
    "copies": "copies", "below_5pct": "nearer than 95 % of held-out", "below_1pct": "nearer than 99 %",
    "memorisation_index": "nearness, sd", "ct": "C_T", "own_study": "nearest to the study of its report",
}  # fmt: skip


# ---- Values of a record


def metric_by_seed(
    record: Mapping[str, Any], variant: str, metric: str, space: str | None = None, field: str = "value"
) -> list[float | None]:
    """A metric of every generator of a variant; None where it is not defined.

    Args:
        record: the content of comparison.json.
        variant: whose generators.
        metric: its name.
        space: of the features; None for the first row of the metric.
        field: of the row.
    """
    found: list[float | None] = []
    for generator in record["generators"]:
        if generator["variant"] == variant:
            rows = [row for row in generator["rows"] if row["metric"] == metric and space in (None, row["features"])]
            found.append(rows[0].get(field) if rows else None)
    return found


def best_reader(record: Mapping[str, Any], metric: str) -> str | None:
    """The feature space in which a property is read best from real volumes; None where none is."""
    ceilings: dict[str, list[float]] = {}
    for row in _rows(record, metric):
        if row.get("ceiling") is not None and row["features"] is not None:
            ceilings.setdefault(row["features"], []).append(row["ceiling"])
    return max(ceilings, key=lambda space: mean(ceilings[space]), default=None)


def label(record: Mapping[str, Any], variant: str) -> str:
    """What a variant is called: one whose trainings start from given weights is fine-tuned."""
    given = record["protocol"]["asked"].get("given", {})
    return f"{variant}, fine-tuned" if given.get(variant) is not None else variant


def _rows(record: Mapping[str, Any], metric: str, space: str | None = None) -> list[Mapping[str, Any]]:
    return [
        row
        for generator in record["generators"]
        for row in generator["rows"]
        if row["metric"] == metric and space in (None, row["features"])
    ]


def _reference(record: Mapping[str, Any], metric: str, space: str | None, field: str) -> str:
    """The mean of what all generators state of the same real volumes."""
    values = [row[field] for row in _rows(record, metric, space) if row.get(field) is not None]
    return shown(mean(values)) if values else "–"


# ---- Variants


def variants_table(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table: real against real, the autoencoder alone, and every variant, with mean and sd over seeds."""
    space, reader = record["protocol"]["decided"]["space"], best_reader(record, "condition_class")
    distances = ("kid", "fd", "coverage")
    real, reconstructed = (
        [job["accuracy"] for job in record["classifiers"] if job["arm"] == arm] for arm in ("r", "v")
    )
    floors, limits = (
        [_reference(record, metric, space, field) for metric in distances] for field in ("floor", "limit_autoencoder")
    )
    ceiling = _reference(record, "condition_class", reader, "ceiling")
    rows = [
        [_REAL, "", "", "", *floors, ceiling, "", _spread(real), "", "", ""],
        [_AUTOENCODER, "", "", "", *limits, "", "", _spread(reconstructed), "", "", ""],
    ]
    for name in record["protocol"]["asked"]["variants"]:
        traits = VARIANTS[name]
        arm = "rb" if name == record["protocol"]["asked"]["variants"][1] else "rs"
        accuracy = [job["accuracy"] for job in record["classifiers"] if (job["arm"], job["variant"]) == (arm, name)]
        metrics = [metric_by_seed(record, name, metric, space) for metric in distances]
        metrics += [metric_by_seed(record, name, "condition_class", reader), metric_by_seed(record, name, "copies")]
        about = [label(record, name), "yes" if traits.text else "no", traits.class_input, traits.head]
        rows.append([*about, *map(_spread, metrics), _spread(accuracy), *_cost(record, name)])
    return rows


def _cost(record: Mapping[str, Any], variant: str) -> list[str]:
    """Millions of parameters of a model, mean seconds of its training and of the synthesis of both its sets."""
    own = [generator for generator in record["generators"] if generator["variant"] == variant]
    sizes = sorted({generator["parameters"] for generator in own})
    seconds = [mean(generator["seconds"][what] for generator in own) for what in ("training", "synthesis")]
    return [", ".join(f"{shown(size / 1e6)} M" for size in sizes), *(f"{each:,.0f}" for each in seconds)]


# ---- What else was measured


def distances_table(record: Mapping[str, Any]) -> Table:
    """The Fréchet distance in every feature space, and which share of real and generated volumes are near each other."""
    space = record["protocol"]["decided"]["space"]
    spaces = dict.fromkeys([space, *(str(row["features"]) for row in _rows(record, "fd"))])
    failed = {name for name, passed in record["protocol"]["decided"].get("passed", {}).items() if not passed}
    columns = {f"FD, {each}{' (fails the gate)' if each in failed else ''}": ("fd", each) for each in spaces}
    names = {"kid": "KID", "precision": "precision", "recall": "recall", "coverage": "coverage"}
    columns |= {f"{name}, {space}": (metric, space) for metric, name in names.items()}
    return _compared(record, columns)


def conditions_table(record: Mapping[str, Any]) -> Table:
    """How well what was asked for is read from the volumes, each property with the features that read it best."""
    names = _metrics(record, lambda name: name.startswith(_CONDITION) and name != f"{_CONDITION}gland_volume")
    columns = {name.removeprefix(_CONDITION).replace("_", " "): (name, best_reader(record, name)) for name in names}
    return _compared(record, columns, {"real volumes": "ceiling", "prompts in random order": "floor"})


def class_changes_table(record: Mapping[str, Any]) -> Table:
    """What asking for the other class changes in volumes of the same noise and report."""
    metric = f"{_COUNTERFACTUAL}class"
    rows = []
    for generator in record["generators"]:
        if found := [row for row in generator["rows"] if row["metric"] == metric]:
            row = max(found, key=lambda row: row["features"] == "foci")  # made to see what shows the class
            effect = "–" if row["value"] is None else f"{row['value']:.3g}"
            interval = "–" if row["ci95"] is None else f"{row['ci95'][0]:.3g} to {row['ci95'][1]:.3g}"
            moved = "–" if row.get("moved") is None else f"{100 * row['moved']:.0f} %"
            name = f"{label(record, generator['variant'])}, seed {generator['seed']}"
            rows.append([name, effect, interval, moved, str(row["n_synthetic"]), str(row["features"])])
    return Table(["variant", "effect", "95 % interval", "in this direction", "pairs", "read by"], rows, 0)


def copies_table(record: Mapping[str, Any]) -> Table:
    """How near volumes are to training studies, in the space that measures distances if copies were looked for there."""
    judging = record["protocol"]["decided"]["space"]
    columns = {}
    for metric, name in _COPIES.items():
        spaces = [row["features"] for row in _rows(record, metric)]
        if spaces:
            columns[name] = (metric, judging if judging in spaces else spaces[0])
    return _compared(record, columns, {"expected": "floor"})


def gland_volumes_table(record: Mapping[str, Any]) -> Table:
    """The gland's volume as the report states it, against that of the segmented gland."""
    metric = f"{_CONDITION}gland_volume"
    if not _rows(record, metric):
        return Table([], [], 0)
    references = [
        ["real volumes", *(_reference(record, metric, None, field) for field in ("ceiling", "real_bias_cc"))],
        ["prompts in random order", _reference(record, metric, None, "floor"), ""],
    ]
    rows = [
        [
            label(record, name),
            *(_spread(metric_by_seed(record, name, metric, field=field)) for field in ("value", "bias_cc")),
        ]
        for name in record["protocol"]["asked"]["variants"]
    ]
    return Table(["variant", "rank correlation", "segmented minus stated, cc"], references + rows, len(references))


def slices_table(record: Mapping[str, Any]) -> Table:
    """The Fréchet distance of the slices in each direction, with their numbers, and on average."""
    columns: dict[str, tuple[str, str | None]] = {}
    for row in _rows(record, _SLICES):
        counts = [row.get(f"slices_{kind}") for kind in ("real", "synthetic")]
        numbers = "" if None in counts else f" ({counts[0]} real, {counts[1]} generated slices)"
        if row["features"] not in [space for _, space in columns.values()]:
            columns[f"{row['features']}{numbers}"] = (_SLICES, row["features"])
    return _compared(record, columns)


def images_table(record: Mapping[str, Any]) -> Table:
    """Distances of intensities and of power spectra."""
    columns = {"intensities, Wasserstein-1": ("intensity", None), "power spectrum, dB": ("spectrum", None)}
    return _compared(record, columns)


def glands_table(record: Mapping[str, Any]) -> Table:
    """The share of the volumes whose gland, as segmented, follows each rule."""
    names = _metrics(record, lambda name: name.startswith(_GLAND))
    return _compared(record, {name.removeprefix(_GLAND).replace("_", " "): (name, None) for name in names})


def _metrics(record: Mapping[str, Any], is_wanted: Callable[[str], bool]) -> list[str]:
    names = (str(row["metric"]) for generator in record["generators"] for row in generator["rows"])
    return list(dict.fromkeys(name for name in names if is_wanted(name)))


def _compared(
    record: Mapping[str, Any],
    columns: Mapping[str, tuple[str, str | None]],
    references: Mapping[str, str] | None = None,
) -> Table:
    """A table with a column for each metric and feature space that there is.

    Args:
        record: the content of comparison.json.
        columns: name -> metric and space.
        references: name -> field of the rows; default: real against real and the autoencoder alone.
    """
    known = {name: key for name, key in columns.items() if _rows(record, *key)}
    if not known:
        return Table([], [], 0)
    fields = {_REAL: "floor", _AUTOENCODER: "limit_autoencoder"} if references is None else references
    rows = [[name, *(_reference(record, *key, field) for key in known.values())] for name, field in fields.items()]
    for variant in record["protocol"]["asked"]["variants"]:
        values = [_spread(metric_by_seed(record, variant, *key)) for key in known.values()]
        rows.append([label(record, variant), *values])
    return Table(["variant", *known], rows, len(fields))


# ---- Files


def markdown(record: Mapping[str, Any], rows: Sequence[Sequence[str]]) -> str:
    """Statements and table as Markdown."""
    lines = [
        "| statement | answer | |",
        "|---|---|---|",
        *(f"| {each['question']} | {each['answer']} | {each['sentence']} |" for each in record["statements"]),
        "",
        f"| {' | '.join(COLUMNS)} |",
        f"|{'---|' * len(COLUMNS)}",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        "Mean ± standard deviation over training seeds; of accuracies, over generators and classifiers. "
        f"KID, FD and coverage in {record['protocol']['decided']['space']}, between equal numbers of volumes. "
        f"{sum(record['studies']['real']['test'].values())} real test studies.",
        "In the paper, on other data: " + "; ".join(f"{name} {value}" for name, value in record["paper"].items()) + ".",
        f"Protocol {record['protocol_sha256']}.",
    ]
    return "\n".join(lines) + "\n"


def latex(rows: Sequence[Sequence[str]]) -> str:
    """The table for booktabs."""
    lines = [
        rf"\begin{{tabular}}{{llll{'r' * (len(COLUMNS) - 4)}}}",
        r"\toprule",
        " & ".join(COLUMNS) + r" \\",
        r"\midrule",
    ]
    lines += [" & ".join(cell.replace("±", r"$\pm$").replace("%", r"\%") for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation; a dash if a value is not defined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return "–"
    return shown(mean(known)) + (f" ± {shown(stdev(known), 2)}" if len(known) > 1 else "")


def shown(value: float, digits: int = 3) -> str:
    """A number with this many significant digits, and thousands apart."""
    return f"{float(f'{value:.{digits}g}'):,g}"
