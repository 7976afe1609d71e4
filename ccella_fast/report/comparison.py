"""The page of a comparison: the answers, what was measured, volumes side by side, and the protocol."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.report.comparison_figures import classifiers, distances, roc_curves
from ccella_fast.report.comparison_page import COMPARISON
from ccella_fast.report.evaluation import curve_figure, figure, gate_row
from ccella_fast.report.evaluation_figures import Pair, nearest_distances, pair_gallery, trios
from ccella_fast.report.figures import Panel
from ccella_fast.report.page import render
from ccella_fast.report.stored_evaluation import WRITTEN_BY, StoredEvaluation, read_evaluation, read_gates
from ccella_fast.storage import atomic_path, damage_named

PAGE = "report.html"
_WINDOW = (0.0, 1.0)


class Table(NamedTuple):
    """A table of the page.

    Attributes:
        columns: their names; the first is that of the variant.
        rows: as text.
        references: number of rows at the top that are not of a variant.
    """

    columns: list[str]
    rows: list[list[str]]
    references: int


class Further(NamedTuple):
    """What the page shows besides the answers and the table of variants. A table without rows was not measured.

    Attributes:
        distances: in all feature spaces.
        conditions: how well what was asked for is read from the volumes.
        class_changes: what asking for the other class changes.
        copies: how near volumes are to training studies.
        gland_volumes: as reports state them, against those of segmented glands.
        slices: distances of slices, by direction.
        images: distances of intensities and spectra.
        glands: shares of plausible glands.
        same_prompts: a column of volumes for each test study.
        other_class: pairs of volumes of the same noise, by generator.
    """

    distances: Table
    conditions: Table
    class_changes: Table
    copies: Table
    gland_volumes: Table
    slices: Table
    images: Table
    glands: Table
    same_prompts: list[list[Panel]]
    other_class: dict[str, list[Pair]]


def write_page(folder: Path, record: Mapping[str, Any], variants: Table, further: Further) -> None:
    """Write report.html.

    Args:
        folder: of the comparison.
        record: the content of comparison.json.
        variants: the table of variants.
        further: what else is shown.
    """
    asked, decided = record["protocol"]["asked"], record["protocol"]["decided"]
    names = [f"{generator['variant']}-{generator['seed']}" for generator in record["generators"]]
    evaluations = {name: read_evaluation(folder / "evaluation" / name) for name in names}
    first = {variant: evaluations[f"{variant}-{asked['training_seeds'][0]}"] for variant in asked["variants"]}
    with damage_named(folder / "evaluation", **WRITTEN_BY):
        nearest, curves = _nearest(evaluations, asked["variants"]), _curves(first)
    tables = {name: table for name, table in further._asdict().items() if isinstance(table, Table)}
    page = render(
        COMPARISON,
        title="Comparison of generators",
        subtitle=f"{' and '.join([', '.join(asked['variants'][:-1]), asked['variants'][-1]])}, "
        f"{len(asked['training_seeds'])} training seeds each",
        notices=_notices(record),
        facts=[
            ("training studies", decided.get("size", "all of --data")),
            ("test studies", sum(record["studies"]["real"]["test"].values())),
            ("classifier seeds", asked["classifier_seeds"]),
            ("distances in", decided["space"]),
            ("protocol", record["protocol_sha256"][:12]),
        ],
        statements=[_answer(each) for each in record["statements"]],
        variants=variants,
        space=decided["space"],
        paper=list(record["paper"].items()),
        distances=[figure(distances(record), _ABOUT_DISTANCES, "")],
        classifiers=[figure(classifiers(record), _ABOUT_CLASSIFIERS, "")],
        contrasts=[_contrast(each) for each in record["contrasts"]],
        roc=[_roc(record["roc"])],
        same_prompts=[_same_prompts(further.same_prompts)],
        other_class=[_other_class(name, pairs) for name, pairs in further.other_class.items()],
        nearest=[nearest],
        curves=[curves],
        gates=[gate_row(gate) for gate in read_gates(folder / "sensitivity")],
        tables=tables,
        evaluations=names,
        decided=[(_words(name), _words(value)) for name, value in decided.items()],
        protocol=[(_words(name), _words(value)) for name, value in asked.items()],
        seconds=list(record["seconds"].items()),
    )
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")


_ABOUT_DISTANCES = (
    "Fréchet distance of generated volumes to real ones, a dot for each training seed. The bar is the distance between two "
    "halves of the real studies, the diamond that of real studies after the autoencoder."
)
_ABOUT_CLASSIFIERS = (
    "Accuracy and AUC on real test studies, a dot for each classifier and generator, and their mean. All arms have the same "
    "number of updates."
)
_ABOUT_ROC = (
    "Mean over the classifiers and generators of an arm; the band is one standard deviation to either side. Gray: the mean of "
    "the first arm."
)
_ABOUT_PROMPTS = (
    "A column for each real test study: the study, the same after the autoencoder, and what each variant generates from its "
    "report and class, as far as it reads them. Middle axial slices in one gray window, of the first training seed."
)
_ABOUT_CLASSES = (
    "Same noise and same report; the difference is red where asking for pos makes the volume brighter, and blue where it makes "
    "it darker."
)
_ABOUT_NEAREST = (
    "Distance of each volume to the nearest training study, all training seeds together. Copies lie to the left of the "
    "held-out real studies."
)


def _notices(record: Mapping[str, Any]) -> list[str]:
    asked = record["protocol"]["asked"]
    notices = ["Not for diagnosis. Generated volumes are synthetic."]
    if asked["phantom"] is not None:
        notices.append("Real studies are phantoms here: the answers are about phantoms, not about patients.")
    if not record["protocol"]["decided"]["autoencoder"]["gate_open"]:
        notices.append(
            "The class can hardly be read after the autoencoder, which may explain differences between classifiers of real and "
            "of generated studies."
        )
    accuracies = record["protocol"]["decided"].get("accuracy_by_size")
    if accuracies is not None:
        chosen, (low, high) = accuracies[str(record["protocol"]["decided"]["size"])], asked["wanted_accuracy"]
        if not low <= chosen <= high:
            notices.append(
                f"No number of training studies gave an accuracy between {low:g} and {high:g}: {chosen:.2f} was the nearest, "
                "so that gains are hard to see."
            )
    if not record["protocol"]["decided"]["passed"].get(record["protocol"]["decided"]["space"], False):
        notices.append("No features order known degradations of the real studies, so that distances decide nothing.")
    left_out = [arm for arm in asked["arms"] if arm not in {job["arm"] for job in record["classifiers"]}]
    if left_out:
        notices.append(
            f"Arms without classifiers: {', '.join(left_out)}. A model predicts the same class for every report."
        )
    return notices


def _answer(statement: Mapping[str, Any]) -> dict[str, Any]:
    exploratory = ["exploratory: not adjusted for the number of questions"]
    return {**statement, "remarks": exploratory if statement["p_holm"] is None else []}


def _roc(curves: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    missing = "There are no ROC curves: the test studies are of one class."
    return figure(roc_curves(curves) if curves else None, _ABOUT_ROC, missing)


def _same_prompts(columns: Sequence[Sequence[Panel]]) -> dict[str, Any]:
    missing = "No test study is the prompt of a volume of each variant."
    return figure(trios(columns, window=_WINDOW) if columns else None, _ABOUT_PROMPTS, missing)


def _other_class(name: str, pairs: Sequence[Pair]) -> dict[str, Any]:
    return figure(pair_gallery(pairs, window=_WINDOW), f"{name}. {_ABOUT_CLASSES}", "")


def _nearest(evaluations: Mapping[str, StoredEvaluation], variants: Sequence[str]) -> dict[str, Any]:
    """The distances in the feature space in which most of them are."""
    cases = {
        variant: [
            case
            for name, stored in evaluations.items()
            if name.rpartition("-")[0] == variant
            for case in stored.cases
            if case.kind == "synthetic" and case.distance is not None
        ]
        for variant in variants
    }
    counts = Counter(case.features for of_variant in cases.values() for case in of_variant)
    if not counts:
        return figure(None, "", "Copies of training studies were not looked for.")
    ((space, _),) = counts.most_common(1)
    rows = [row for stored in evaluations.values() for row in stored.named("copies") if row.features == space]
    null = [float(value) for value in rows[0].details["null"]]
    of_space = {
        variant: [case.distance for case in found if case.features == space and case.distance is not None]
        for variant, found in cases.items()
    }
    return figure(nearest_distances(null, of_space), f"{_ABOUT_NEAREST} Features: {space}.", "")


def _curves(first: Mapping[str, StoredEvaluation]) -> dict[str, Any]:
    """Those of the first training seed; the autoencoder was looked at with the first variant."""
    some = next(iter(first.values()))
    real = ("phantoms" if some.phantom else "real", some, "real")
    generated = [(name, stored, "synthetic") for name, stored in first.items()]
    return curve_figure([real, ("reconstructed", some, "autoencoder"), *generated])


def _words(value: Any) -> str:
    """A value of the protocol as text: numbers with three digits, parts with commas between them."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_words(name)} {_words(each)}" for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return (
            "; ".join(map(_words, value))
            if any(isinstance(each, Mapping) for each in value)
            else " ".join(map(_words, value))
        )
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("_", " ")


def _contrast(each: Mapping[str, Any]) -> dict[str, str]:
    interval, value, same = each["ci95"], each["difference"], each.get("equivalence")
    return {
        "contrast": each["contrast"], "metric": each["metric"].replace("_", " "), "verdict": each["verdict"],
        "value": "–" if value is None else f"{value:+.3f}",
        "interval": "–" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}",
        "equal": same["verdict"] if same else "",
    }  # fmt: skip
