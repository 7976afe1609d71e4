"""The studies of the experiment, from prepared folders: what is trained on, validated and tested, and what is refused.

A study of the test or validation set, one of the same patient, one with the same voxels, and a study that was generated from
one of them must not be in a training set. Generated studies must not be in a test set.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.data.checking.study_facts import patient_of
from ccella_fast.data.loading.selection import divide_patients
from ccella_fast.data.manifest import NAME, Manifest, StudyEntry, load_manifest
from ccella_fast.errors import ConfigError, DataError
from ccella_fast.evaluation.reconstruction import reconstructions
from ccella_fast.evaluation.volumes import open_volumes
from ccella_fast.models.autoencoder.folder import weights_file
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.quantities import counted
from ccella_fast.storage import sha256

logger = logging.getLogger("ccella_fast")


class LabelledCase(NamedTuple):
    """A volume with its class.

    Attributes:
        id: of the study.
        label: 1 for PI-RADS 3 to 5, else 0.
        key: identity of the voxels.
        patient: what the studies of one patient share.
        read: returns the voxels (X, Y, Z), axes R, A, S, and their size in mm.
    """

    id: str
    label: int
    key: str
    patient: str
    read: Callable[[], tuple[np.ndarray, Sequence[float]]]


@dataclass(frozen=True)
class MeasuredStudies:
    """The studies of `--real` that have a class.

    Attributes:
        manifest: of the folder.
        sequence: that is classified.
        train: the studies to train on.
        val: those of the split val, or of the patients that are set aside.
        test: those of the split test.
        without_class: how many were left out, by split.
        held_out: name of a study, a patient or voxels -> "val" or "test".
        set_aside: the names of the studies and patients that are set aside from the split train.
    """

    manifest: Manifest
    sequence: str
    train: list[LabelledCase]
    val: list[LabelledCase]
    test: list[LabelledCase]
    without_class: dict[str, int]
    held_out: dict[str, str]
    set_aside: frozenset[str]


@dataclass(frozen=True)
class GeneratedStudies:
    """The studies of the split train that one generator has made.

    Attributes:
        name: of the folder.
        asked: with the class that was asked for.
        predicted: with the class that the generator predicts.
        counts: what was left out, and what is not known.
    """

    name: str
    asked: list[LabelledCase]
    predicted: list[LabelledCase]
    counts: dict[str, int]


def read_real(folder: str | Path, *, validation_fraction: float, num_real: int | None) -> MeasuredStudies:
    """The measured studies of a prepared folder.

    Args:
        folder: the prepared folder.
        validation_fraction: the share of the training patients that is set aside if there is no split val. They are chosen by
            a hash, so that they are the same for every arm, seed and number of studies.
        num_real: how many of the remaining training studies are used; None for all. They are chosen by a hash in each class,
            in the proportion of the classes, and a smaller choice is a part of a larger one.

    Raises:
        ConfigError: there are fewer training studies than wanted, or no two patients to divide.
        DataError: the folder is not prepared, mixes measured and generated studies, lacks a class or the split test, or a
            training study is known in a held-out split.
    """
    manifest = load_manifest(folder)
    path = manifest.folder / NAME
    _check_measured(manifest)
    sequence = manifest.data.sequences[0]
    by_split = {split: [case for case in manifest.cases if case.split == split] for split in ("train", "val", "test")}
    held_out = {name: split for split in ("test", "val") for case in by_split[split] for name in _names(case, sequence)}
    for case in by_split["train"]:
        _check_held_out(case.id, _names(case, sequence), held_out, path, f"{case.id}.split")
    labelled = {split: [case for case in cases if case.pirads is not None] for split, cases in by_split.items()}
    without_class = {split: len(by_split[split]) - len(labelled[split]) for split in by_split}
    set_aside: frozenset[str] = frozenset()
    if not by_split["val"] and validation_fraction:
        # All training studies are divided, so that those without a class do not change who is set aside.
        labelled["train"], aside = (
            [case for case in part if case.pirads is not None]
            for part in divide_patients(
                by_split["train"], validation_fraction, path=path, field="--validation_fraction"
            )
        )
        labelled["val"], set_aside = aside, frozenset(name for case in aside for name in _names(case, sequence))
    if num_real is not None:
        labelled["train"] = _choose(labelled["train"], num_real)
    for split in ("train", "test"):
        if not labelled[split]:
            why = f"there is no study with a class in the split {split}"
            raise DataError(why, path=path, field="cases", fix=f"prepare studies of the split {split} with a class")
    _check_classes([_label(case.pirads) for case in labelled["train"]], "the real training studies", path)
    train, val, test = (
        [_of_image(manifest, case, sequence, _label(case.pirads)) for case in labelled[split]]
        for split in ("train", "val", "test")
    )
    return MeasuredStudies(manifest, sequence, train, val, test, without_class, held_out, set_aside)


def read_generated(folder: str | Path, real: MeasuredStudies, *, field: str) -> GeneratedStudies:
    """The generated studies of a prepared folder that may be trained on with `real`.

    Studies of other splits than train are left out, as are those that were generated from a patient who was set aside.

    Args:
        folder: the prepared folder.
        real: the measured studies.
        field: the option that gives the folder.

    Raises:
        DataError: the folder has another grid than that of the real studies, studies that are not synthetic, or none to train
            on; a training study was generated from a held-out study or patient, or has its voxels.
    """
    manifest = load_manifest(folder)
    path = manifest.folder / NAME
    _check_grid(manifest, real, field)
    if (measured := next((case for case in manifest.cases if not case.synthetic), None)) is not None:
        why = f"the study '{measured.id}' is not marked as synthetic, so this is not a folder of generated studies"
        fix = f"give it as --real, or correct the column synthetic and prepare it again, if {field} is meant"
        raise DataError(why, path=path, field=f"{measured.id}.synthetic", fix=fix)
    known = {case.id: case for case in real.manifest.cases}
    train = [case for case in manifest.cases if case.split == "train"]
    counts = {"other_splits": len(manifest.cases) - len(train), "of_set_aside": 0, "unknown_source": 0}
    used = []
    for case in train:
        # Generators that do not state the source often name a volume like it.
        source = case.source_case or (case.id if case.id in known else None)
        names = {f"voxels {case.files[f'image/{real.sequence}'].sha256}"} if _has_image(case, real) else set()
        if source is not None:
            names |= _names(known[source], real.sequence) if source in known else _names_of_id(source)
        counts["unknown_source"] += source not in known
        _check_held_out(case.id, names, real.held_out, path, f"{case.id}.source_case", source)
        if names & real.set_aside:
            counts["of_set_aside"] += 1
        else:
            used.append(case)
    if not used:
        why = "no study of this folder can be trained on: none is in the split train and of a training patient"
        fix = "generate from training studies, or set --validation_fraction lower"
        raise DataError(why, path=path, field="cases", fix=fix)
    if counts["unknown_source"]:
        unknown = counted(counts["unknown_source"], "study was", "studies were")
        logger.warning("%s: %s generated from cases that --real does not have; they cannot be checked", path, unknown)
    labels = {"asked": [case.pirads for case in used], "predicted": [case.class_predicted for case in used]}
    found = {
        name: [
            _of_image(manifest, case, real.sequence, _label(label))
            for case, label in zip(used, each, strict=True)
            if label is not None
        ]
        for name, each in labels.items()
    }
    counts |= {f"without_{name}": len(used) - len(found[name]) for name in found}
    return GeneratedStudies(manifest.folder.resolve().name, found["asked"], found["predicted"], counts)


def check_labels(
    cases: Sequence[LabelledCase], missing: int, arm: str, what: str, *, path: object, field: str, partly: bool
) -> None:
    """Raise DataError unless an arm can be trained on the classes of generated studies.

    Args:
        cases: the studies that have such a class.
        missing: how many do not have it.
        arm: the arm.
        what: how the class is called.
        path: the folder.
        field: the entry of the manifest.
        partly: whether studies without it may be left out.
    """
    if missing and not (partly and cases):
        why = f"the arm {arm} needs {what} of every generated study, and {counted(missing, 'study lacks', 'studies lack')} it"
        raise DataError(why, path=path, field=field, fix=f"prepare the folder with them, or leave out the arm {arm}")
    _check_classes([case.label for case in cases], f"the generated studies of the arm {arm}", path)


def reconstructed(real: MeasuredStudies, vae: str | Path, device: str) -> list[LabelledCase]:
    """The real training studies after the generator's autoencoder. Raises as `evaluation.reconstruction.reconstructions`."""
    volumes = open_volumes(real.manifest.folder, field="--real").of_sequence(real.sequence)
    decoded = {source.id: source.read for source in reconstructions(volumes, vae, device=device).sources}
    weights = sha256(weights_file(vae))
    return [case._replace(read=decoded[case.id], key=f"{weights} {case.key}") for case in real.train]


def data_digest(*sets: Iterable[LabelledCase]) -> str:
    """Identity of sets of studies: their ids, classes and voxels."""
    lines = [f"{number} {case.id} {case.label} {case.key}" for number, cases in enumerate(sets) for case in cases]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _choose(cases: list[StudyEntry], number: int) -> list[StudyEntry]:
    """The first `number` of studies in the order of a hash, in the proportion of the classes."""
    if number > len(cases):
        why = f"{number} real training studies are wanted, but {len(cases)} with a class can be trained on"
        raise ConfigError(why, field="--num_real", fix=f"use at most {len(cases)}, or leave it out")
    by_class: list[list[StudyEntry]] = [[], []]
    for case in sorted(cases, key=lambda case: hashlib.sha256(case.id.encode()).digest()):
        by_class[_label(case.pirads)].append(case)
    positive = min(max(round(number * len(by_class[1]) / len(cases)), 1), number - 1)
    chosen = {case.id for case in [*by_class[0][: number - positive], *by_class[1][:positive]]}
    return [case for case in cases if case.id in chosen]


def _of_image(manifest: Manifest, case: StudyEntry, sequence: str, label: int) -> LabelledCase:
    key = f"image/{sequence}"
    manifest.array(case, key)  # raises if the file is not there
    patient = patient_of(case.id, None if case.patient is None else str(case.patient)) or f"study {case.id}"
    return LabelledCase(case.id, label, case.files[key].sha256, patient, partial(_read, manifest, case, key))


def _read(manifest: Manifest, case: StudyEntry, key: str) -> tuple[np.ndarray, Sequence[float]]:
    return np.array(manifest.array(case, key, verify=True)), case.spacing


def _label(one_hot: Sequence[int] | None) -> int:
    assert one_hot is not None
    return list(one_hot).index(1)


def _has_image(case: StudyEntry, real: MeasuredStudies) -> bool:
    return f"image/{real.sequence}" in case.files


def _names(case: StudyEntry, sequence: str) -> set[str]:
    """What a study of `--real`, its patient and its voxels are known by."""
    names = _names_of_id(case.id)
    names |= set() if case.patient is None else {f"patient number {case.patient}"}
    entry = case.files.get(f"image/{sequence}")
    return names | (set() if entry is None else {f"voxels {entry.sha256}"})


def _names_of_id(study: str) -> set[str]:
    patient = patient_of(study, None)
    return {f"study {study}"} | (set() if patient is None else {f"patient {patient}"})


def _check_held_out(
    case: str, names: set[str], held_out: dict[str, str], path: Path, field: str, source: str | None = None
) -> None:
    """Raise DataError if a training study is known by a name that a held-out study has too."""
    if (name := min(names & held_out.keys(), default=None)) is None:
        return
    generated = f", which was generated from '{source}'," if source is not None else ""
    of = {"study": "case", "patient": "patient", "voxels": "voxels"}[name.split()[0]]
    why = f"leakage: the training study '{case}'{generated} is known in the split {held_out[name]}: the same {of}"
    raise DataError(why, path=path, field=field, fix="remove it from the training set and prepare the folder again")


def _check_measured(manifest: Manifest) -> None:
    """Raise DataError for generated studies. Phantoms are synthetic too: then all are, and none has a source."""
    synthetic = [case for case in manifest.cases if case.synthetic]
    generated = [case for case in synthetic if case.source_case is not None or case.class_predicted is not None]
    if generated or 0 < len(synthetic) < len(manifest.cases):
        case = (generated or synthetic)[0]
        why = f"the study '{case.id}' of the split {case.split} is synthetic, so these are not the real studies"
        fix = "give generated studies as --synthetic or --baseline, in a prepared folder of their own"
        raise DataError(why, path=manifest.folder / NAME, field=f"{case.id}.synthetic", fix=fix)


def _check_grid(manifest: Manifest, real: MeasuredStudies, field: str) -> None:
    """Raise DataError unless the volumes have the grid and the sequence of the real ones: else the source can be seen."""
    for key in ("spacing", "dim"):
        found, wanted = getattr(manifest.data, key), getattr(real.manifest.data, key)
        if list(found) != list(wanted):
            why = f"the grid of {field} must be that of --real: its {key} is {list(found)}, not {list(wanted)}"
            fix = "prepare both with the same configuration"
            raise DataError(why, path=manifest.folder / NAME, field=f"data.{key}", fix=fix)
    if real.sequence not in manifest.data.sequences:
        why = f"{field} has no {real.sequence} volumes, which --real has"
        fix = "prepare both with the same data.sequences"
        raise DataError(why, path=manifest.folder / NAME, field="data.sequences", fix=fix)


def _check_classes(labels: Sequence[int], what: str, path: object) -> None:
    if len(set(labels)) < 2:
        which = "no class" if not labels else f"the class '{CLASS_NAMES[labels[0]]}' alone"
        why = f"{what} must be of both classes, but have {which}"
        raise DataError(why, path=path, field="cases", fix="add studies of the other class")
