"""What a comparison has found: its record, one sentence per order statement, and the files of the results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.checkpoint import step_folders
from ccella_fast.comparison import tables
from ccella_fast.comparison.protocol import digest
from ccella_fast.comparison.shown_volumes import other_class, same_prompts
from ccella_fast.downstream.contrasts import holm
from ccella_fast.downstream.metrics import roc_curve
from ccella_fast.downstream.results import read_test_predictions
from ccella_fast.environment import describe_environment
from ccella_fast.errors import CheckpointError
from ccella_fast.evaluation.results import plain_values
from ccella_fast.report.comparison import Further, Table, write_page
from ccella_fast.storage import atomic_path, read_json, write_csv, write_json
from ccella_fast.variants import VARIANTS

FORMAT = {"format": "ccella_fast.comparison.results", "version": 1}
LEVEL = 0.05
#: The figures of the paper (arXiv 2506.10230), which were measured on other data: only their order can be compared.
PAPER = {
    "3D FID, CCELLA": "0.025", "3D FID, a foundation model": "0.071", "accuracy, real": "69 %",
    "accuracy, real + CCELLA": "74 %",
}  # fmt: skip
# Of the rows of an evaluation what the record keeps, and of their details.
_KEPT = ("metric", "features", "value", "ci95", "floor", "limit_autoencoder", "n_real", "n_synthetic", "guards")
_DETAILS = ("ceiling", "bias_cc", "real_bias_cc", "slices_real", "slices_synthetic", "moved")
_RATES = np.linspace(0, 1, 101)  # false positive rates at which ROC curves are averaged


class Statement(NamedTuple):
    """An answer to one of the order statements of the paper.

    Attributes:
        name: "O1" to "O4".
        question: in words.
        answer: "yes", "no" or "undecided".
        sentence: the numbers, with their interval.
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
    out: Path, protocol: Mapping[str, Any], runs: Sequence[tuple[str, int]], seconds: Mapping[str, float], vae: Path
) -> dict[str, Any]:
    """Write comparison.json, the tables and the page from the files of the stages.

    Args:
        out: the folder of the comparison.
        protocol: the content of protocol.json.
        runs: variant and seed of every generator.
        seconds: by stage.
        vae: the autoencoder.

    Returns:
        The content of comparison.json.
    """
    variants = protocol["asked"]["variants"]
    classified = {"": out / "classify"} | {variant: out / f"classify-{variant}" for variant in variants[2:]}
    classifiers, roc = _classifiers(classified, variants)
    classification = read_json(classified[""] / "classify.json")
    record: dict[str, Any] = {
        **FORMAT,
        "protocol_sha256": digest(protocol),
        "protocol": dict(protocol),
        "generators": [_generator(out, *run, seconds) for run in runs],
        "classifiers": classifiers,
        "roc": roc,
        "contrasts": classification["contrasts"],
        "studies": classification["studies"],
        "paper": PAPER,
        "seconds": dict(seconds),
        "environment": describe_environment(),
    }
    record["statements"] = [statement._asdict() for statement in statements(record)]
    record = plain_values(record)
    write_json(out / "comparison.json", record)
    rows = tables.variants_table(record)
    write_csv(out / "table.csv", tables.COLUMNS, rows, line_end="\n")
    for name, content in (("table.md", tables.markdown(record, rows)), ("table.tex", tables.latex(rows))):
        with atomic_path(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    further = Further(
        distances=tables.distances_table(record), conditions=tables.conditions_table(record),
        class_changes=tables.class_changes_table(record), copies=tables.copies_table(record),
        gland_volumes=tables.gland_volumes_table(record), slices=tables.slices_table(record),
        images=tables.images_table(record), glands=tables.glands_table(record),
        same_prompts=same_prompts(out, protocol["asked"], vae), other_class=other_class(out, runs),
    )  # fmt: skip
    write_page(out, record, Table(tables.COLUMNS, rows, 2), further)
    return record


def _generator(out: Path, variant: str, seed: int, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What is known of a generator: its size, its time, and the rows of its evaluations."""
    name = f"{variant}-{seed}"
    rows = _rows(out / "evaluation" / name)
    if (pairs := out / "evaluation" / f"{name}-class").is_dir():
        rows += [row for row in _rows(pairs) if row["metric"].startswith("counterfactual_")]
    synthesis = [seconds[f"synthesize-{name}-{split}"] for split in ("train", "test")]
    return {
        "variant": variant,
        "seed": seed,
        "parameters": _count_parameters(out, name),
        "seconds": {"training": seconds[f"train-{name}"], "synthesis": round(sum(synthesis), 1)},
        "rows": rows,
    }


def _count_parameters(out: Path, name: str) -> int:
    """The number of weights in the newest checkpoint of a run, without reading them.

    Raises:
        CheckpointError: the run has none.
    """
    from safetensors import safe_open

    run = out / "models" / name
    if not (steps := step_folders(run)):
        fix = f"delete {out / 'done' / f'train-{name}.json'}, and run the same command again"
        raise CheckpointError("this run has no checkpoint any more", path=run, fix=fix)
    with safe_open(steps[0] / "model.safetensors", framework="np") as file:
        return sum(math.prod(file.get_slice(weight).get_shape()) for weight in file.keys())  # noqa: SIM118


def _rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of an evaluation for its first sequence.

    The value of a distance is that between as many volumes as the floor and the limit of the autoencoder are computed with.
    """
    kept = []
    for row in (rows := read_json(folder / "metrics.json")["rows"]):
        if row["sequence"] == rows[0]["sequence"]:
            equal = {} if row["value_equal_n"] is None else {"value": row["value_equal_n"]}
            kept.append(
                {name: row[name] for name in _KEPT} | {name: row["details"].get(name) for name in _DETAILS} | equal
            )
    return kept


def _classifiers(
    classified: Mapping[str, Path], variants: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Every trained classifier with its metrics on the test studies, and the ROC curve of each arm."""
    found: list[dict[str, Any]] = []
    curves: dict[str, list[np.ndarray]] = {}
    for variant, folder in classified.items():
        for job in read_json(folder / "classify.json")["jobs"]:
            whose = variant or (variants[1] if job["arm"] == "rb" else variants[0])
            shown = job["arm"] if job["generator"] is None or whose == variants[0] else f"{job['arm']} {whose}"
            test = {name: job["test"][name] for name in ("accuracy", "auc", "average_precision")}
            found.append({"arm": job["arm"], "variant": None if job["generator"] is None else whose, "label": shown,
                          "generator": job["generator"], "seed": job["seed"], "updates": job["updates"], **test})  # fmt: skip
            if job["test"]["auc"] is not None:
                curves.setdefault(shown, []).append(roc_curve(*read_test_predictions(folder, job["job"]), _RATES))
    return found, [_mean_curve(shown, np.stack(of_arm)) for shown, of_arm in curves.items()]


def _mean_curve(shown: str, curves: np.ndarray) -> dict[str, Any]:
    """The mean and the standard deviation of the ROC curves of an arm, over its classifiers and generators."""
    deviation = curves.std(0, ddof=1) if len(curves) > 1 else np.zeros_like(curves[0])
    values = {"false_positive_rate": _RATES, "mean": curves.mean(0), "sd": deviation}
    return {
        "label": shown,
        "classifiers": len(curves),
        **{name: each.round(4).tolist() for name, each in values.items()},
    }


# ---- Order statements


def statements(record: Mapping[str, Any]) -> list[Statement]:
    """O1 to O4. O1 and O2 are primary and share the level; the others are exploratory."""
    first, second = record["protocol"]["asked"]["variants"][:2]
    contrasts = {(each["contrast"], each["metric"]): each for each in record["contrasts"]}
    more = _gain(contrasts.get(("rs-rb", "accuracy")), "O4", f"More than those of {second}?",
                 f"real + {first} against real + {second}")  # fmt: skip
    if not VARIANTS[second].text and VARIANTS[second].class_input == "none":
        unconditional = f"{second} is unconditional, so the labels of its volumes are random."
        more = more._replace(sentence=f"{more.sentence} {unconditional}")
    found = [
        _closer(record, first, second),
        _gain(contrasts.get(("rs-rr", "accuracy")), "O2", "Do the volumes improve a classifier of real studies?",
              f"real + {first} against real twice"),
        _equal(contrasts.get(("s-r", "accuracy"))),
        more,
    ]  # fmt: skip
    primary = [each for each in found[:2] if each.p is not None]
    adjusted = dict(
        zip((each.name for each in primary), holm([each.p for each in primary if each.p is not None]), strict=True)
    )
    return [_adjusted(each, adjusted.get(each.name), len(adjusted)) for each in found]


def _adjusted(statement: Statement, p: float | None, count: int) -> Statement:
    """A primary statement whose p-value, adjusted for `count` of them, is above the level is undecided."""
    if p is None:
        return statement
    answer = statement.answer if p <= LEVEL + 1e-9 else "undecided"
    how = " (Holm, two statements)" if count > 1 else ""
    return statement._replace(p_holm=p, answer=answer, sentence=f"{statement.sentence} p = {p:.3g}{how}.")


def _closer(record: Mapping[str, Any], first: str, second: str) -> Statement:
    """O1: the kernel distance to real volumes of the first variant against that of the second, over training seeds.

    Unlike the Fréchet distance, it is not biased by the number of volumes. The test is one-sided, as the statement is. The
    opposite, which it does not ask for, needs half of the level.
    """
    decided = record["protocol"]["decided"]
    space = decided["space"]
    question = f"Are volumes of {first} closer to real ones than those of {second}?"
    if not decided["passed"].get(space, False):
        return Statement("O1", question, "undecided", "No features order known degradations of real studies.")
    a, b = (_defined(record, variant, "kid", space) for variant in (first, second))
    if a is None or b is None:
        return Statement("O1", question, "undecided", "A distance is not defined.")
    lower, higher = permutation_p(a, b), min(1.0, 2 * permutation_p(b, a))
    answer = "yes" if lower <= LEVEL + 1e-9 else "no" if higher <= LEVEL + 1e-9 else "undecided"
    first_values, second_values = (f"{tables.shown(mean(of))} ({', '.join(map(tables.shown, of))})" for of in (a, b))
    sentence = f"KID in {space}: {first_values} against {second_values}, by training seed (one-sided test)."
    c, d = (_defined(record, variant, "fd", space) for variant in (first, second))
    if c is not None and d is not None:
        sentence += f" FD: {tables.shown(mean(c))} against {tables.shown(mean(d))}."
    return Statement("O1", question, answer, sentence, p=min(lower, higher))


def _defined(record: Mapping[str, Any], variant: str, metric: str, space: str) -> list[float] | None:
    """A metric of every generator of a variant; None if it is not defined for one."""
    values = tables.metric_by_seed(record, variant, metric, space)
    known = [float(value) for value in values if value is not None]
    return known if len(known) == len(values) else None


def permutation_p(a: Sequence[float], b: Sequence[float]) -> float:
    """One-sided p-value that `a` is smaller than `b`: of all divisions of the values, the share with as small a sum as `a`."""
    values, total = [*a, *b], sum(a)
    sums = [sum(chosen) for chosen in itertools.combinations(values, len(a))]
    rounding = 1e-12 * sum(map(abs, values))
    return sum(each <= total + rounding for each in sums) / len(sums)


def _gain(contrast: Mapping[str, Any] | None, name: str, question: str, what: str) -> Statement:
    """A difference of accuracy."""
    if contrast is None or contrast["ci95"] is None:
        return Statement(name, question, "undecided", "The difference has no interval.")
    low, high = contrast["ci95"]
    sentence = f"Accuracy of {what}: {_points(contrast['difference'])} points ({_points(low)} to {_points(high)})."
    return Statement(name, question, contrast["verdict"], sentence, p=contrast["p"] if name == "O2" else None)


def _equal(contrast: Mapping[str, Any] | None) -> Statement:
    """O3: synthetic against real, within the margin."""
    question = "Do synthetic studies alone teach as much as real ones?"
    if contrast is None or contrast["ci95"] is None or "equivalence" not in contrast:
        return Statement("O3", question, "undecided", "The difference has no interval.")
    same = contrast["equivalence"]
    low, high = same["ci90"]
    sentence = (
        f"Accuracy of synthetic against real: {_points(contrast['difference'])} points (90 %: {_points(low)} to "
        f"{_points(high)}); within ±{100 * same['margin']:g} counts as equal."
    )
    if same["verdict"] == "no" and contrast["difference"] > 0:
        sentence += " They teach more."
    return Statement("O3", question, same["verdict"], sentence)


def _points(value: float) -> str:
    return f"{100 * value:+.1f}"
