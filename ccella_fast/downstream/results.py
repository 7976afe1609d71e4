"""The files of the experiment: one pair for each trained classifier, then the results of all."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import numpy as np

import ccella_fast
from ccella_fast.downstream.arms import ARMS, CONTRASTS, GENERATED
from ccella_fast.downstream.contrasts import ArmPredictions, Contrasts, Resampling, equivalence, holm
from ccella_fast.downstream.data import LabelledCase
from ccella_fast.downstream.metrics import METRICS, best_threshold, classification_metrics
from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_path, damage_named, read_json, sha256, write_csv, write_json

RESULTS, TABLE = "classify.json", "table.md"
_COLUMNS = ("case", "split", "label", "p_pos")
_SHOWN = {
    "accuracy": "accuracy", "auc": "AUC", "average_precision": "AP", "sensitivity": "sensitivity",
    "specificity": "specificity", "brier": "Brier",
}  # fmt: skip


class Job(NamedTuple):
    """A classifier to train.

    Attributes:
        arm: of ARMS.
        generator: number of the folder of generated studies, from 0; None for an arm without them.
        seed: of the classifier.
    """

    arm: str
    generator: int | None
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        generator = "" if self.generator is None else f"-generator{self.generator}"
        return f"{self.arm}{generator}-seed{self.seed}"


@dataclass(frozen=True)
class JobResult:
    """What a job has written besides its predictions.

    Attributes:
        identity: SHA-256 of all that the predictions depend on.
        n_train: for each source of the arm, its name and the number of studies of each class.
        updates: of the weights.
        loss: the mean over the last tenth of them.
        predictions_sha256: of the file of predictions.
    """

    identity: str
    n_train: list[dict[str, Any]]
    updates: int
    loss: float
    predictions_sha256: str


def write_job(
    out: Path,
    job: Job,
    identity: str,
    n_train: list[dict[str, Any]],
    updates: int,
    loss: float,
    cases: Sequence[tuple[str, LabelledCase]],
    p_positive: np.ndarray,
) -> None:
    """Write predictions/JOB.csv, then jobs/JOB.json, which says that the job is done. cases: with their splits."""
    path = out / "predictions" / f"{job.name}.csv"
    rows = [[case.id, split, case.label, f"{p:.9g}"] for (split, case), p in zip(cases, p_positive, strict=True)]
    write_csv(path, _COLUMNS, rows, line_end="\n")
    result = JobResult(identity, n_train, updates, loss, sha256(path))
    write_json(out / "jobs" / f"{job.name}.json", asdict(result), sealed=True)


def read_job(out: Path, job: Job, identity: str) -> JobResult | None:
    """The result of a job that is done, else None.

    Raises:
        DataError: it was done with other studies, or its files have been changed.
    """
    path, predictions = (
        out / folder / f"{job.name}.{kind}" for folder, kind in (("jobs", "json"), ("predictions", "csv"))
    )
    if not path.is_file():
        return None
    with damage_named(path, writer="`ccella-fast classify`", fix="delete it, and run the same command again"):
        result = JobResult(**read_json(path))
    if result.identity != identity:
        field = "--real" if job.generator is None else GENERATED[ARMS[job.arm].sources[-1]]
        why = f"the classifier {job.name} was trained with other studies than those of {field} now"
        fix = "choose another --out, or give the folders in the same order; further ones come last"
        raise DataError(why, path=path, field=field, fix=fix)
    if not predictions.is_file() or sha256(predictions) != result.predictions_sha256:
        why = f"the predictions of {job.name} are missing, or are not what was written"
        raise DataError(why, path=predictions, fix=f"delete {path}, and run the same command again")
    return result


def write_results(
    out: Path,
    settings: dict[str, Any],
    studies: dict[str, Any],
    jobs: dict[Job, JobResult],
    val: Sequence[LabelledCase],
    test: Sequence[LabelledCase],
) -> dict[str, Any]:
    """Write classify.json and table.md from the files of the jobs.

    Args:
        out: the folder.
        settings: of the experiment.
        studies: how many there are and were left out.
        jobs: the classifiers.
        val: the validation studies.
        test: the test studies.

    Returns:
        The content of classify.json.
    """
    predicted = {job: _read_predictions(out, job, len(val)) for job in jobs}
    labels = {"val": np.array([case.label for case in val], int), "test": np.array([case.label for case in test], int)}
    rows = []
    for job, result in jobs.items():
        threshold = best_threshold(labels["val"], predicted[job]["val"])
        measured = {split: classification_metrics(labels[split], predicted[job][split], threshold) for split in labels}
        about = {name: value for name, value in asdict(result).items() if name in ("n_train", "updates", "loss")}
        rows.append({"job": job.name, **job._asdict(), **about, **measured})
    packages = ["torch", "numpy", *(["monai"] if settings["backbone"] == "efficientnet-b0" else [])]
    content = {
        "format": "ccella_fast.classification",
        "version": 1,
        "settings": settings,
        "versions": {"ccella_fast": ccella_fast.__version__, **{name: metadata.version(name) for name in packages}},
        "studies": studies,
        "jobs": rows,
        "contrasts": _contrasts(settings, {job: each["test"] for job, each in predicted.items()}, test),
    }
    write_json(out / RESULTS, content, sealed=True)
    with atomic_path(out / TABLE) as temporary:
        temporary.write_text(make_table(content), encoding="utf-8")
    return content


def make_table(content: dict[str, Any]) -> str:
    """The content of classify.json as Markdown: arms with mean and standard deviation over classifiers, and differences."""
    lines = [f"| arm | trains on | studies | classifiers | {' | '.join(_SHOWN.values())} |"]
    lines.append(f"|---|---|---:|---:|{'---:|' * len(_SHOWN)}")
    for arm in dict.fromkeys(row["arm"] for row in content["jobs"]):
        rows = [row for row in content["jobs"] if row["arm"] == arm]
        n = " + ".join(str(source["neg"] + source["pos"]) for source in rows[0]["n_train"])
        values = [_spread([row["test"][name] for row in rows]) for name in _SHOWN]
        lines.append(f"| {arm} | {ARMS[arm].about} | {n} | {len(rows)} | {' | '.join(values)} |")
    lines += ["", "| difference | metric | value | 95 % interval | p | larger | equivalent | McNemar p | |"]
    lines.append("|---|---|---:|---|---:|---|---|---:|---|")
    for each in content["contrasts"]:
        interval = "–" if each["ci95"] is None else f"{each['ci95'][0]:+.3f} to {each['ci95'][1]:+.3f}"
        same, mcnemar = each.get("equivalence"), each.get("mcnemar")
        words = [
            *([f"primary (Holm p {_number(each.get('p_holm'), '.3g')})"] if each["primary"] else []),
            *each["guards"],
        ]
        cells = [
            each["contrast"], _SHOWN[each["metric"]], _number(each["difference"], "+.3f"), interval,
            _number(each["p"], ".3g"), each["verdict"], same["verdict"] if same else "",
            _number(mcnemar["p"], ".3g") if mcnemar else "", ", ".join(words),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _contrasts(
    settings: dict[str, Any], predicted: dict[Job, np.ndarray], test: Sequence[LabelledCase]
) -> list[dict[str, Any]]:
    """The differences between the arms that there are, for each metric."""
    arms = {name: _arm_predictions(name, predicted) for name in dict.fromkeys(job.arm for job in predicted)}
    counts = {arm.family: len(arm.p_positive) for arm in arms.values() if arm.family is not None}
    seeds = next(iter(arms.values())).p_positive.shape[1]
    labels, margin = np.array([case.label for case in test], int), settings["margin"]
    contrasts = Contrasts(labels, arms, Resampling([case.patient for case in test], seeds, counts))
    found: list[dict[str, Any]] = []
    for first, second in CONTRASTS:
        for metric in METRICS if first in arms and second in arms else ():
            name = f"{first}-{second}"
            about = {
                "contrast": name,
                "metric": metric,
                "primary": metric == "accuracy" and name in settings["primary"],
            }
            difference = contrasts.difference(first, second, metric)
            found.append({**about, **difference})
            if metric == "accuracy":
                found[-1]["mcnemar"] = contrasts.mcnemar(first, second)
                if (error := difference["standard_error"]) is not None:
                    df = difference["df"] or float("inf")
                    found[-1]["equivalence"] = equivalence(difference["difference"], error, df, margin / 100)
    primary = [each for each in found if each["primary"] and each["p"] is not None]
    for each, p in zip(primary, holm([each["p"] for each in primary]), strict=True):
        each["p_holm"] = p
    return found


def _arm_predictions(name: str, predicted: dict[Job, np.ndarray]) -> ArmPredictions:
    jobs = [job for job in predicted if job.arm == name]
    generators, seeds = ({getattr(job, field): None for job in jobs} for field in ("generator", "seed"))
    stacked = np.stack([[predicted[Job(name, generator, seed)] for seed in seeds] for generator in generators])
    option = next((GENERATED[source] for source in ARMS[name].sources if source in GENERATED), None)
    return ArmPredictions(stacked, option)


def read_test_predictions(out: Path, job: str) -> tuple[np.ndarray, np.ndarray]:
    """The labels of the test studies and their predicted probabilities of class 1; job: the name of a classifier.

    Raises:
        DataError: the file is damaged.
    """
    path = out / "predictions" / f"{job}.csv"
    fix = f"delete {out / 'jobs' / f'{job}.json'}, and run the same command again"
    with damage_named(path, writer="`ccella-fast classify`", fix=fix), open(path, encoding="utf-8", newline="") as file:
        rows = [(int(row["label"]), float(row["p_pos"])) for row in csv.DictReader(file) if row["split"] == "test"]
    return np.array([label for label, _ in rows], int), np.array([p for _, p in rows])


def _read_predictions(out: Path, job: Job, n_val: int) -> dict[str, np.ndarray]:
    with open(out / "predictions" / f"{job.name}.csv", encoding="utf-8", newline="") as file:
        p = np.array([float(row["p_pos"]) for row in csv.DictReader(file)], np.float32)
    return {"val": p[:n_val], "test": p[n_val:]}


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _spread(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "–"
    return f"{mean(known):.3f}" + (f" ± {stdev(known):.3f}" if len(known) > 1 else "")
