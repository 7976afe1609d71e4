"""Classes and reports: whether there is anything to learn from, and for what share of the studies."""

from __future__ import annotations

from collections.abc import Sequence

from ccella_fast.config import Config
from ccella_fast.data.checking.findings import Finding, Severity
from ccella_fast.data.checking.study_facts import StudyFacts
from ccella_fast.pirads import NEGATIVE, POSITIVE
from ccella_fast.quantities import counted

_FEW = 20  # training studies
_RARE = 0.1  # share of the rarer class
_MANY = 0.5  # share of studies without report or class
#: Findings that follow from lines of a table that could not be read.
_OF_TABLE = {
    "class_balance",
    "no_class",
    "one_class",
    "rare_class",
    "few_classes",
    "reports",
    "no_reports",
    "few_reports",
}
_NAMES = {tuple(NEGATIVE): "PI-RADS 1-2", tuple(POSITIVE): "PI-RADS 3-5"}


def check_classes(facts: Sequence[StudyFacts], config: Config) -> list[Finding]:
    """Findings about the studies that training would use."""
    tag = config.data.dataset
    train = [study for study in facts if study.split == "train" and tag in (None, study.dataset)]
    return [
        *_number(train, facts, tag),
        *_classes(train, config),
        *_reports(train, config),
        *_synthetic(facts),
    ]


def without_classes(findings: Sequence[Finding]) -> list[Finding]:
    """Findings about a data set whose table has defects, without those about the classes and reports that it gives."""
    why = "classes and reports were not judged, because the table that gives them has to be corrected first"
    return [*(each for each in findings if each.name not in _OF_TABLE), Finding("table", "info", why)]


def learns_classes(config: Config) -> bool:
    """Whether the model learns something from classes: it is given them, or has a class head that is trained."""
    variant = config.model.traits
    return variant.class_input == "given" or (variant.head != "none" and config.class_loss_weight > 0)


def _number(train: list[StudyFacts], facts: Sequence[StudyFacts], tag: str | None) -> list[Finding]:
    others = {name: sum(study.split == name for study in facts) for name in ("val", "test")}
    counts = ", ".join([f"{len(train)} train", *(f"{count} {name}" for name, count in others.items() if count)])
    tagged = "" if tag is None else f" (of them with the tag of data.dataset: {len(train)})"
    found = [Finding("studies", "info", f"{counted(len(facts), 'study', 'studies')}: {counts}{tagged}")]
    if len(train) < 2:
        why = f"{'one study is' if train else 'no study is'} in the training split: a model can only copy it"
        fix = "add studies, or correct the column split"
        found.append(Finding("too_few_studies", "stop", why, fix, tuple(study.id for study in train)))
    elif len(train) < _FEW:
        why = f"{len(train)} training studies are very few; the model will reproduce them"
        found.append(Finding("few_studies", "warning", why, "add studies"))
    return found


def _classes(train: list[StudyFacts], config: Config) -> list[Finding]:
    given = [study for study in train if study.pirads is not None]
    counts = _count(given)
    matters = learns_classes(config)
    stop: Severity = "stop" if matters else "info"
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    found = [Finding("class_balance", "info", f"{text}, {len(train) - len(given)} without a class")]
    if not train:
        return found
    if not given:
        why = "none of the training studies has a class (pirads)"
        return [*found, Finding("no_class", stop, why, _class_fix(config))]

    learned, what = given, "one"
    if config.model.traits.class_input != "given" and any(study.report is not None for study in train):
        # The class is predicted from the report.
        learned, what = [study for study in given if study.report is not None], "one and a report"
        counts = _count(learned)
    rarest = min(counts, key=lambda name: counts[name])
    if not learned:
        why = "none of the training studies with a class has a report, from which the class is predicted"
        found.append(Finding("no_class", stop, why, "give studies.csv with both, the columns pirads and report"))
    elif counts[rarest] == 0:
        other = next(name for name in counts if name != rarest)
        why = f"training studies with the class {other}: all {len(learned)} that have {what}; with {rarest}: none"
        found.append(Finding("one_class", stop, why, _class_fix(config)))
    elif matters and counts[rarest] < _RARE * len(learned):
        why = f"training studies with the class {rarest}: only {counts[rarest]} of {len(learned)} that have {what}"
        found.append(Finding("rare_class", "warning", why, "add studies of this class"))
    if matters and len(given) < _MANY * len(train):
        why = f"training studies without a class: {len(train) - len(given)} of {len(train)}"
        fix = "fill in the column pirads"
        found.append(Finding("few_classes", "warning", why, fix, _ids(train, "pirads")))
    return found


def _count(studies: list[StudyFacts]) -> dict[str, int]:
    classes = [tuple(study.pirads or ()) for study in studies]
    return {name: classes.count(one_hot) for one_hot, name in _NAMES.items()}


def _class_fix(config: Config) -> str:
    text = config.model.traits.text
    return f"fill in the column pirads, or choose the variant {'ELLAMAISI' if text else 'MAISI'}"


def _reports(train: list[StudyFacts], config: Config) -> list[Finding]:
    with_report = sum(study.report is not None for study in train)
    found = [Finding("reports", "info", f"training studies with a report: {with_report} of {len(train)}")]
    if not config.model.traits.text or not train:
        return found
    if with_report == 0:
        why = f"none of the training studies has a report, but the variant {config.model.variant} reads reports"
        fix = "give studies.csv with a column report, or choose a variant without text, such as RADMAISI or MAISI"
        found.append(Finding("no_reports", "stop", why, fix))
    elif with_report < _MANY * len(train):
        why = f"training studies without a report: {len(train) - with_report} of {len(train)}"
        found.append(Finding("few_reports", "warning", why, "add the reports", _ids(train, "report")))
    return found


def _synthetic(facts: Sequence[StudyFacts]) -> list[Finding]:
    held_out = [study.id for study in facts if study.synthetic and study.split != "train"]
    if not held_out or all(study.synthetic for study in facts):
        return []
    why = f"synthetic studies that are held out for validation or test, next to measured ones: {len(held_out)}"
    return [Finding("synthetic_held_out", "warning", why, "hold out measured studies only", tuple(held_out))]


def _ids(studies: list[StudyFacts], field: str) -> tuple[str, ...]:
    return tuple(study.id for study in studies if getattr(study, field) is None)
