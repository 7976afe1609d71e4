"""New ids for patients and studies, kept in a key file that never leaves the private folder, and texts without the old ones.

`key.csv` has one line per study. A patient that is in it keeps its number and its split, a study its id, so that repeated
imports give the same ids. The numbers of new patients are drawn at random: their order says nothing about the old ids.
"""

from __future__ import annotations

import csv
import io
import os
import re
import secrets
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from ccella_fast.data.importing.scan import Identity
from ccella_fast.data.importing.series import ExportedStudy
from ccella_fast.data.importing.splitting import assign_splits
from ccella_fast.data.readers.text_checks import read_text
from ccella_fast.errors import DataError
from ccella_fast.storage import write_csv

_COLUMNS = ("id", "patient", "split", "patient_id", "study_uid", "accession")
_MONTHS = (
    "jan[a-z]*", "f[eé][bv][a-zé]*", "m(?:ar|aa|ä)[a-z]*", "a[pvb]r[a-z]*", "ma[iyj]o?", "jui?n[a-z]*", "jui?l[a-z]*",
    "a(?:ug|go|o)[a-zû]*", "sep[a-z]*", "o[ck]t[a-z]*", "nov[a-z]*", "d[eéi][zc][a-z]*",
)  # fmt: skip
_MANY_STUDIES = 8  # of one patient; more look like an export whose patient ids were all replaced by one


class KeyRow(NamedTuple):
    """A study in the key. patient_id: as in the headers, or what stands in for it (`patient_of`)."""

    id: str
    patient: str
    split: str
    patient_id: str
    study_uid: str
    accession: str


def patient_of(study: ExportedStudy) -> str | None:
    """What identifies the patient: the patient id, else name and date of birth, else the study; None for several patients."""
    ids = {each.patient_id for each in study.identities if each.patient_id}
    if ids:
        return ids.pop() if len(ids) == 1 else None
    names = {f"{each.patient_name}|{each.birth_date}" for each in study.identities if each.patient_name}
    if names:
        return names.pop() if len(names) == 1 else None
    return f"study {study.uid}"


def read_key(path: Path) -> dict[str, KeyRow]:
    """Study UID -> row of the key file; empty if there is none yet.

    Raises:
        DataError: If the file is not a key file, or states two splits for a patient. No message repeats its content.
    """
    if not path.exists():
        return {}
    try:
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            fix = "give the private folder of an earlier import, or a new one"
            raise DataError(f"this is not a key file: its columns are not {', '.join(_COLUMNS)}", path=path, fix=fix)
        rows = []
        for row in reader:
            if None in row or None in row.values():
                raise DataError("this line has too few or too many cells", path=path, field=f"line {reader.line_num}")
            rows.append(KeyRow(**row))
    except csv.Error:
        raise DataError("this is not valid CSV", path=path, fix="restore the key from a copy") from None
    _check_key(rows, path)
    return {row.study_uid: row for row in rows}


def _check_key(rows: list[KeyRow], path: Path) -> None:
    splits, ids = defaultdict(set), set()
    for number, row in enumerate(rows, start=2):
        splits[row.patient].add(row.split)
        named = re.fullmatch(r"p\d{4,}", row.patient) and re.fullmatch(rf"{row.patient}_s\d+", row.id)
        if not named or row.split not in ("train", "val", "test") or row.id in ids or len(splits[row.patient]) > 1:
            why = "the id, the patient or the split of this line is not valid, or contradicts another line"
            fix = "restore the key from a copy; to move a patient, change the split in all of its lines"
            raise DataError(why, path=path, field=f"line {number}", fix=fix)
        ids.add(row.id)


def extend_key(
    key: dict[str, KeyRow], studies: Iterable[ExportedStudy], fractions: Sequence[float]
) -> dict[str, KeyRow]:
    """The key with the studies that it lacks. Studies whose headers name several patients are left out."""
    by_patient: dict[str, list[ExportedStudy]] = defaultdict(list)
    for study in studies:
        patient = patient_of(study)
        if patient is not None:
            by_patient[patient].append(study)
    numbers = {row.patient_id: (row.patient, row.split) for row in key.values()}
    new = sorted(set(by_patient) - set(numbers))
    secrets.SystemRandom().shuffle(new)
    first = max((int(patient[1:]) for patient, _ in numbers.values()), default=0) + 1
    splits = assign_splits([split for _, split in dict(numbers.values()).items()], len(new), fractions)
    for number, (patient, split) in enumerate(zip(new, splits, strict=True), start=first):
        numbers[patient] = (f"p{number:04d}", split)
    result = dict(key)
    for patient_id, theirs in by_patient.items():
        patient, split = numbers[patient_id]
        used = [int(row.id.rpartition("_s")[2]) for row in key.values() if row.patient == patient]
        following = max(used, default=0) + 1
        fresh = [study for study in theirs if study.uid not in key]
        for study in sorted(fresh, key=lambda study: (min(each.study_date for each in study.identities), study.uid)):
            accession = next((each.accession for each in study.identities if each.accession), "")
            row = KeyRow(f"{patient}_s{following}", patient, split, patient_id, study.uid, accession)
            result[study.uid] = row
            following += 1
    return result


def write_key(path: Path, key: dict[str, KeyRow]) -> None:
    """Write the key, readable by its owner alone."""
    write_private_table(path, _COLUMNS, sorted(key.values()))


def write_private_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write a CSV file with mode 0600, in a folder with mode 0700 if it is new."""
    with _owner_only():
        write_csv(path, columns, rows)


@contextmanager
def _owner_only() -> Iterator[None]:
    mask = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(mask)


def warnings_of(studies: Sequence[ExportedStudy]) -> list[str]:
    """Sentences about patient ids that are missing or shared by too many studies."""
    patients = [patient_of(study) for study in studies]
    alone = sum(patient is not None and patient.startswith("study ") for patient in patients)
    result = []
    if alone:
        result.append(
            f"studies with neither a patient id nor a name: {alone}; each counts as a patient of its own, so that "
            "studies of one patient may be in two splits"
        )
    most = max((patients.count(patient) for patient in set(patients) if patient is not None), default=0)
    if most > _MANY_STUDIES:
        result.append(
            f"{most} studies have the same patient id, as if the ids were replaced by one before the export: all of "
            "them are in one split"
        )
    return result


def without_identity(text: str, identities: Iterable[Identity]) -> tuple[str, int]:
    """A report with the names, ids and dates of its headers replaced by [NAME], [ID] and [DATE]; and how many were replaced.

    Names are replaced as whole words that begin with a capital, in any case otherwise; dates in the usual spellings. Other
    names in the text, such as that of the physician, are not known and stay.
    """
    patterns: list[tuple[str, str]] = []
    for each in identities:
        patterns += [("[ID]", re.escape(value)) for value in (each.patient_id, each.accession) if len(value) > 2]
        patterns += [("[DATE]", spelling) for value in (each.birth_date, each.study_date) for spelling in _dates(value)]
        names = [name for name in re.split(r"[\s^=,]+", each.patient_name) if len(name) > 1]
        patterns += [("[NAME]", f"(?=[^\\W\\d_a-z])(?i:{re.escape(name)})") for name in names]
    total = 0
    for placeholder, pattern in sorted(set(patterns), key=lambda item: (item[0] == "[NAME]", -len(item[1]), item[1])):
        text, count = re.subn(rf"(?<!\w){pattern}(?!\w)", placeholder, text)
        total += count
    return text, total


def _dates(value: str) -> list[str]:
    """Patterns of the spellings of a DICOM date (YYYYMMDD)."""
    match = re.fullmatch(r"(\d{4})(\d\d)(\d\d)", value)
    if match is None:
        return []
    year, month, day = match.groups()
    m, d, y = (f"0?{int(month)}", f"0?{int(day)}", f"(?:{year}|{year[2:]})")
    gap = r"\s?[./-]\s?"
    name = f"(?i:{_MONTHS[int(month) - 1]})" if 1 <= int(month) <= 12 else "(?!)"
    return [
        value, f"{year}{gap}{m}{gap}{d}", f"{d}{gap}{m}{gap}{y}", f"{m}{gap}{d}{gap}{y}",
        rf"{d}\.?\s{name}\.?,?\s{year}", rf"{name}\.?\s{d},?\s{year}",
    ]  # fmt: skip
