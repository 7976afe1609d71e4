"""What a comparison has found: one sentence per order statement, the table of variants, and their files."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from ccella_fast.comparison.protocol import digest
from ccella_fast.downstream.contrasts import holm
from ccella_fast.environment import describe_environment
from ccella_fast.evaluation.results import plain_values
from ccella_fast.report.comparison import write_page
from ccella_fast.storage import atomic_path, read_json, write_csv, write_json
from ccella_fast.variants import VARIANTS

FORMAT = {"format": "ccella_fast.comparison.results", "version": 1}
LEVEL = 0.05
#: The figures of the paper (arXiv 2506.10230), which were measured on other data: only their order can be compared.
PAPER = {
    "3D FID, CCELLA": "0.025", "3D FID, a foundation model": "0.071", "accuracy, real": "69 %",
    "accuracy, real + CCELLA": "74 %",
}  # fmt: skip
_METRICS = {"kid": "KID", "fd": "FD", "coverage": "coverage", "condition_class": "class", "copies": "copies"}
COLUMNS = ["variant", "report", "class", "head", "KID", "FD", "coverage", "class AUC", "copies", "accuracy of rs"]


class Statement(NamedTuple):
    """An answer to one of the order statements of the paper.

    Attributes:
        name: "O1" to "O4".
        question: in words.
        answer: "yes", "no" or "undecided".
        sentence: the numbers, with interval and n.
        p: of a primary statement; adjusted for both (Holm) in `p_holm`.
        p_holm: None if the statement is exploratory.
    """

    name: str
    question: str
    answer: str
    sentence: str
    p: float | None = None
    p_holm: float | None = None


def write_results(
    out: Path, protocol: Mapping[str, Any], runs: Sequence[tuple[str, int]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write comparison.json, the tables and the page from the files of the stages.

    Args:
        out: the folder of the comparison.
        protocol: the content of protocol.json.
        runs: variant and seed of every generator.
        seconds: by stage.

    Returns:
        The content of comparison.json.
    """
    space = protocol["decided"]["space"]
    generators = [
        {"variant": variant, "seed": seed, "rows": _rows(out / "evaluation" / f"{variant}-{seed}", space)}
        for variant, seed in runs
    ]
    classified = {"": read_json(out / "classify" / "classify.json")}
    for variant in protocol["asked"]["variants"][2:]:
        classified[variant] = read_json(out / f"classify-{variant}" / "classify.json")
    record: dict[str, Any] = {
        **FORMAT,
        "protocol_sha256": digest(protocol),
        "protocol": dict(protocol),
        "generators": generators,
        "classifiers": _classifiers(classified, protocol["asked"]["variants"]),
        "contrasts": classified[""]["contrasts"],
        "paper": PAPER,
        "seconds": dict(seconds),
        "environment": describe_environment(),
    }
    record["statements"] = [statement._asdict() for statement in statements(record)]
    record = plain_values(record)
    write_json(out / "comparison.json", record)
    rows = table(record)
    write_csv(out / "table.csv", COLUMNS, rows, line_end="\n")
    for name, content in (("table.md", markdown(record, rows)), ("table.tex", latex(rows))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    write_page(out, record, COLUMNS, rows)
    return record


def _rows(folder: Path, space: str) -> list[dict[str, Any]]:
    """The rows of an evaluation that the table shows: in the space that judges, or of conditions."""
    kept = ("metric", "features", "value", "ci95", "floor", "limit_autoencoder", "n_real", "n_synthetic", "guards")
    return [
        {name: row[name] for name in kept} | {"ceiling": row["details"].get("ceiling")}
        for row in read_json(folder / "metrics.json")["rows"]
        if row["metric"] in _METRICS and (row["features"] == space or row["metric"] in ("condition_class", "copies"))
    ]


def _classifiers(classified: Mapping[str, dict[str, Any]], variants: Sequence[str]) -> list[dict[str, Any]]:
    """Every trained classifier: which arm, whose volumes, and its metrics on the test studies."""
    found = []
    for variant, content in classified.items():
        for job in content["jobs"]:
            whose = variant or (variants[1] if job["arm"] == "rb" else variants[0])
            test = {name: job["test"][name] for name in ("accuracy", "auc", "average_precision")}
            found.append({"arm": job["arm"], "variant": None if job["generator"] is None else whose,
                          "generator": job["generator"], "seed": job["seed"], "updates": job["updates"], **test})  # fmt: skip
    return found


# ---- Order statements


def statements(record: Mapping[str, Any]) -> list[Statement]:
    """O1 to O4. O1 and O2 are primary and share the level; the others are exploratory."""
    first, second = record["protocol"]["asked"]["variants"][:2]
    contrasts = {(each["contrast"], each["metric"]): each for each in record["contrasts"]}
    found = [
        _closer(record, first, second),
        _gain(contrasts.get(("rs-rr", "accuracy")), "O2", "Do the volumes improve a classifier of real studies?",
              f"real + {first} against real twice"),
        _equal(contrasts.get(("s-r", "accuracy"))),
        _gain(contrasts.get(("rs-rb", "accuracy")), "O4", f"More than those of {second}?",
              f"real + {first} against real + {second}"),
    ]  # fmt: skip
    primary = [each for each in found[:2] if each.p is not None]
    adjusted = dict(
        zip((each.name for each in primary), holm([each.p for each in primary if each.p is not None]), strict=True)
    )
    return [_adjusted(each, adjusted.get(each.name)) for each in found]


def _adjusted(statement: Statement, p: float | None) -> Statement:
    """A primary statement whose adjusted p-value is above the level is undecided."""
    if p is None:
        return statement
    answer = statement.answer if p <= LEVEL + 1e-9 else "undecided"
    return statement._replace(
        p_holm=p, answer=answer, sentence=f"{statement.sentence} p = {p:.3g} (Holm, two statements)."
    )


def _closer(record: Mapping[str, Any], first: str, second: str) -> Statement:
    """O1: the distance to real volumes of the first variant against that of the second, over training seeds."""
    space = record["protocol"]["decided"]["space"]
    question = f"Are volumes of {first} closer to real ones than those of {second}?"
    values = {variant: metric_by_seed(record, variant, "fd", space) for variant in (first, second)}
    if any(value is None for of in values.values() for value in of):
        return Statement("O1", question, "undecided", "A distance is not defined.")
    a, b = ([float(value) for value in values[variant] if value is not None] for variant in (first, second))
    lower, higher = permutation_p(a, b), permutation_p(b, a)
    answer = "yes" if lower <= LEVEL + 1e-9 else "no" if higher <= LEVEL + 1e-9 else "undecided"
    shown = ", ".join(f"{value:.3g}" for value in a), ", ".join(f"{value:.3g}" for value in b)
    sentence = f"FD in {space}: {mean(a):.3g} ({shown[0]}) against {mean(b):.3g} ({shown[1]}), by training seed."
    return Statement("O1", question, answer, sentence, p=min(lower, higher))


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """One-sided p-value that `a` is smaller than `b`: of all divisions of the values, the share with as small a sum as `a`."""
    values, total = [*a, *b], sum(a)
    sums = [sum(chosen) for chosen in itertools.combinations(values, len(a))]
    return sum(each <= total * (1 + 1e-12) + 1e-300 for each in sums) / len(sums)


def _gain(contrast: Mapping[str, Any] | None, name: str, question: str, what: str) -> Statement:
    """A difference of accuracy."""
    if contrast is None or contrast["ci95"] is None:
        return Statement(name, question, "undecided", "The difference has no interval.")
    low, high = contrast["ci95"]
    sentence = f"Accuracy of {what}: {_points(contrast['difference'])} points ({_points(low)} to {_points(high)})."
    return Statement(name, question, contrast["verdict"], sentence, p=contrast["p"] if name == "O2" else None)


def _equal(contrast: Mapping[str, Any] | None) -> Statement:
    """O3: synthetic against real, within the margin."""
    question = "Are synthetic studies alone as good as real ones?"
    if contrast is None or contrast["ci95"] is None or "equivalence" not in contrast:
        return Statement("O3", question, "undecided", "The difference has no interval.")
    low, high = contrast["ci95"]
    same = contrast["equivalence"]
    sentence = (
        f"Accuracy of synthetic against real: {_points(contrast['difference'])} points ({_points(low)} to {_points(high)}); "
        f"within ±{100 * same['margin']:g} counts as equal."
    )
    return Statement("O3", question, same["verdict"], sentence)


def metric_by_seed(
    record: Mapping[str, Any], variant: str, metric: str, space: str | None = None
) -> list[float | None]:
    """A metric of every generator of a variant; None where it is not defined."""
    found: list[float | None] = []
    for generator in record["generators"]:
        if generator["variant"] == variant:
            rows = [row for row in generator["rows"] if row["metric"] == metric and space in (None, row["features"])]
            found.append(rows[0]["value"] if rows else None)
    return found


# ---- Tables


def table(record: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table: real against real, the autoencoder alone, and every variant, with mean and sd over seeds."""
    space = record["protocol"]["decided"]["space"]
    everything = [row for generator in record["generators"] for row in generator["rows"]]

    def of_metric(metric: str, field: str) -> str:
        judging = space if metric in ("kid", "fd", "coverage") else None
        values = [row[field] for row in everything if row["metric"] == metric and judging in (None, row["features"])]
        return _mean([value for value in values if value is not None])

    ceiling = of_metric("condition_class", "ceiling")
    real = [job["accuracy"] for job in record["classifiers"] if job["arm"] == "r"]
    limits = [of_metric(metric, "limit_autoencoder") for metric in ("kid", "fd", "coverage")]
    floors = [of_metric(metric, "floor") for metric in ("kid", "fd", "coverage")]
    reconstructed = [job["accuracy"] for job in record["classifiers"] if job["arm"] == "v"]
    rows = [
        ["real against real", "", "", "", *floors, ceiling, "", _spread(real)],
        ["autoencoder alone", "", "", "", *limits, "", "", _spread(reconstructed)],
    ]
    for name in record["protocol"]["asked"]["variants"]:
        traits = VARIANTS[name]
        arm = "rb" if name == record["protocol"]["asked"]["variants"][1] else "rs"
        accuracy = [job["accuracy"] for job in record["classifiers"] if (job["arm"], job["variant"]) == (arm, name)]
        metrics = [metric_by_seed(record, name, metric, space) for metric in ("kid", "fd", "coverage")]
        metrics += [metric_by_seed(record, name, metric) for metric in ("condition_class", "copies")]
        about = [name, "yes" if traits.text else "no", traits.class_input, traits.head]
        rows.append([*about, *map(_spread, metrics), _spread(accuracy)])
    return rows


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
        f"KID, FD and coverage in {record['protocol']['decided']['space']}.",
        "In the paper, on other data: " + "; ".join(f"{name} {value}" for name, value in record["paper"].items()) + ".",
        f"Protocol {record['protocol_sha256']}.",
    ]
    return "\n".join(lines) + "\n"


def latex(rows: Sequence[Sequence[str]]) -> str:
    """The table for booktabs."""
    lines = [r"\begin{tabular}{llllrrrrrr}", r"\toprule", " & ".join(COLUMNS) + r" \\", r"\midrule"]
    lines += [" & ".join(cell.replace("±", r"$\pm$").replace("%", r"\%") for cell in row) + r" \\" for row in rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"


def _mean(values: Sequence[float]) -> str:
    return f"{mean(values):.3g}" if values else "–"


def _spread(values: Sequence[float | None]) -> str:
    """Mean and standard deviation; a dash if a value is not defined."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known or len(known) < len(values):
        return "–"
    return f"{mean(known):.3g}" + (f" ± {stdev(known):.2g}" if len(known) > 1 else "")
