"""Which studies are trained on, and which the validation loss is measured on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ccella_fast.config import Config
from ccella_fast.data.checking.study_facts import patient_of
from ccella_fast.data.manifest import NAME, Manifest, StudyEntry
from ccella_fast.errors import ConfigError
from ccella_fast.quantities import counted


def select_studies(prepared: Manifest, config: Config, split: str) -> list[StudyEntry]:
    """The studies of a split with the tag of `data.dataset`, in the order of the manifest.

    With `monitoring.validation_fraction`, this share of the patients of the split train, at least one, make the split val. They
    are chosen by a hash, so that they stay the same when other studies are added, and for every seed of the training. A study
    of which neither the list nor the id names the patient counts as a patient of its own.

    Raises:
        ConfigError: a fraction is given, but the folder has studies of the split val, or no two patients to divide.
    """
    tag, fraction = config.data.dataset, config.monitoring.validation_fraction
    by_split: dict[str, list[StudyEntry]] = {"train": [], "val": [], "test": []}
    for case in prepared.cases:
        if tag in (None, case.dataset):
            by_split[case.split].append(case)
    if fraction:
        by_split["train"], by_split["val"] = _divide(prepared, by_split, fraction)
    return by_split[split]


def _divide(
    prepared: Manifest, by_split: dict[str, list[StudyEntry]], fraction: float
) -> tuple[list[StudyEntry], list[StudyEntry]]:
    """The studies to train on, and those to set aside."""
    path, field = prepared.folder / NAME, "monitoring.validation_fraction"
    if by_split["val"]:
        count = counted(len(by_split["val"]), "study", "studies")
        why = f"a fraction of {fraction:g} is to be set aside, but the split val has {count} already"
        raise ConfigError(why, path=path, field=field, fix="set it to 0")
    return divide_patients(by_split["train"], fraction, path=path, field=field)


def divide_patients(
    cases: Sequence[StudyEntry], fraction: float, *, path: object, field: str
) -> tuple[list[StudyEntry], list[StudyEntry]]:
    """The studies to train on, and those of the patients that are set aside; see `select_studies`.

    Args:
        cases: the studies of the split train.
        fraction: share of the patients that is set aside.
        path: of the manifest, for the message.
        field: the setting or option that states the fraction.

    Raises:
        ConfigError: the studies are of fewer than two patients.
    """
    patients = sorted({_patient(case) for case in cases}, key=lambda name: hashlib.sha256(name.encode()).digest())
    if len(patients) < 2:
        why = f"the split train must have at least two patients to set some aside, got {len(patients)}"
        raise ConfigError(why, path=path, field=field, fix="set it to 0, or add studies")
    aside = set(patients[: min(max(1, round(fraction * len(patients))), len(patients) - 1)])
    return [case for case in cases if _patient(case) not in aside], [case for case in cases if _patient(case) in aside]


def _patient(case: StudyEntry) -> str:
    """What distinguishes the patient from others; of a study without one, its id."""
    named = patient_of(case.id, None if case.patient is None else str(case.patient))
    return f"study {case.id}" if named is None else f"patient {named}"
