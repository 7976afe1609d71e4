"""The table of a folder of studies: whether there is one, and which studies it does not list."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path

from ccella_fast.data.checking.findings import Finding
from ccella_fast.data.readers.bids import is_bids
from ccella_fast.data.readers.discovery import TABLE
from ccella_fast.data.readers.study import Study
from ccella_fast.data.readers.study_table import PARTICIPANTS

_SUFFIXES = {".csv", ".tsv", ".xlsx", ".xls", ".ods", ".txt"}
_USUAL = ("studies", "study", "participants", "cases", "patients", "reports", "labels", "clinical", "metadata", "table")


def check_table(studies: Sequence[Study], data: Path, csv_file: Path | None) -> list[Finding]:
    """Findings about the table with splits, classes and reports of the folder `data`; none for a JSON list."""
    if not data.is_dir():
        return []
    default = data / (PARTICIPANTS if is_bids(data) else TABLE)
    table = csv_file or default
    if not table.is_file():
        return [_missing(data, default)]
    unlisted = tuple(study.id for study in studies if study.field is None)
    if not unlisted:
        return []
    why = (
        "studies that are not in the table, and so have neither report nor class and the split train: "
        f"{len(unlisted)} of {len(studies)}"
    )
    return [Finding("not_in_table", "warning", why, "add a line for each", unlisted, str(table))]


def _missing(data: Path, default: Path) -> Finding:
    why = f"there is no {default.name} in this folder: no study has a report or a class, and all are used for training"
    fix = f"add {default.name}, or give the table with --csv"
    similar = _similar(data, default.name)
    if similar:
        names = " and ".join(path.name for path in similar)
        why += f"; {names} in it {'look' if len(similar) > 1 else 'looks'} like the table"
        first = similar[0]
        is_text = first.suffix.lower() == default.suffix
        fix = f"rename {first.name} to {default.name}" if is_text else f"save {first.name} as {default.name}"
    return Finding("no_table", "warning", why, fix, path=str(data))


def _similar(data: Path, expected: str) -> list[Path]:
    """Up to three files that may be the table: spreadsheets or text tables, those with a usual name first."""
    stem = Path(expected).stem
    tables = [path for path in sorted(data.iterdir()) if path.is_file() and path.suffix.lower() in _SUFFIXES]

    def likeness(path: Path) -> float:
        return difflib.SequenceMatcher(None, path.stem.lower(), stem).ratio()

    usual = [path for path in tables if any(word in path.stem.lower() for word in _USUAL) or likeness(path) > 0.6]
    only = [path for path in tables if path.suffix.lower() != ".txt"]
    return sorted(usual, key=likeness, reverse=True)[:3] or (only if len(only) == 1 else [])
