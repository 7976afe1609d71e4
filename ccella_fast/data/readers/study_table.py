"""Read `studies.csv`, or the `participants.tsv` of a BIDS folder: split, class and report of the studies of a folder.

`pirads` is the score 1 to 5, `neg` or `pos`, or empty if the class is unknown. A blank report is treated as missing.
`synthetic` is `yes` for a study that was drawn, not measured. `patient` is the same for all studies of a patient. Further
columns are the user's own and ignored.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

from ccella_fast.data.readers.study import CLASSES, Defects, Study
from ccella_fast.data.readers.text_checks import MAX_REPORT, check_known, clean_report, printable, quote, read_text
from ccella_fast.errors import DataError, did_you_mean
from ccella_fast.storage import safe_join

PARTICIPANTS = "participants.tsv"
_COLUMNS = {"case", "split", "pirads", "report", "report_file", "dataset", "synthetic", "patient"}


def apply_table(studies: list[Study], table: Path, defects: Defects) -> list[Study]:
    """The studies with the values of the table's rows. A study without a row has neither report nor class.

    A row of participants.tsv holds for all sessions of the participant; those without images are ignored, as BIDS lists them.
    """
    by_id = {study.id: study for study in studies}
    lines: dict[str, int] = {}
    is_bids = table.name == PARTICIPANTS
    key = "participant_id" if is_bids else "case"
    for line, row in _read_rows(table, key):
        field, case = f"line {line}, case", row[key].strip()
        ids = [name for name in by_id if name == case or (is_bids and name.startswith(f"{case}_ses-"))]
        if is_bids and not ids:
            continue
        if not ids:
            fix = did_you_mean(case, by_id) if len(by_id) < 20 else "check the case ids against the folders"
            defects.add(DataError(f"no study is called {quote(case)}", path=table, field=field, fix=fix))
        elif case in lines:
            why = f"the case '{case}' is already listed on line {lines[case]}"
            defects.add(DataError(why, path=table, field=field, fix="keep one of the lines"))
        else:
            lines[case] = line
            try:
                values = _parse_row(table, line, row)
                by_id.update({name: by_id[name]._replace(**values) for name in ids})
            except DataError as defect:
                defects.add(defect)
    return list(by_id.values())


def _read_rows(table: Path, key: str) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> cell) of every row. `key` is the column that must exist; `.tsv` files are separated by tabs."""
    is_tsv = table.suffix.lower() == ".tsv"
    text = io.StringIO(read_text(table), newline="")
    reader = csv.DictReader(text, strict=True, delimiter="\t" if is_tsv else ",")
    rows = []
    try:
        columns = list(reader.fieldnames or [])
        _check_columns(columns, key, table)
        for row in reader:
            if None in row or None in row.values():
                cells = sum(cell is not None for name, cell in row.items() if name is not None) + len(row.get(None, ()))
                why = f"this line has {cells} cells, but the table has {len(columns)} columns"
                fix = 'put text that holds commas or quotes into "double quotes"'
                raise DataError(why, path=table, field=f"line {reader.line_num}", fix=fix)
            if is_tsv:  # BIDS writes n/a for a missing value
                row = {name: "" if cell.strip() == "n/a" else cell for name, cell in row.items()}
            rows.append((reader.line_num, row))
    except csv.Error as error:
        why = f"this is not valid CSV: {error}"
        raise DataError(why, path=table, field=f"line {reader.line_num}", fix="correct that line") from None
    return rows


def _check_columns(columns: list[str], key: str, table: Path) -> None:
    if key not in columns:
        why, fix = f"the table has no column '{key}'", did_you_mean(key, columns or [""])
        raise DataError(why, path=table, field="line 1", fix=fix)
    for name in set(columns) - _COLUMNS - {key}:
        check_known(name, _COLUMNS, path=table, field=f"line 1, {printable(name)}")
    if len(set(columns)) != len(columns):
        name = next(name for name in columns if columns.count(name) > 1)
        why = f"the column {quote(name)} appears twice"
        raise DataError(why, path=table, field="line 1", fix="keep one of the columns")


def _parse_row(table: Path, line: int, row: dict[str, str]) -> dict[str, Any]:
    """Values of the fields of Study that a row states."""

    def defect(why: str, column: str, fix: str) -> DataError:
        return DataError(why, path=table, field=f"line {line}, {column}", fix=fix)

    split = (row.get("split") or "train").strip()
    if split not in ("train", "test"):
        raise defect(f"split must be train or test, got {quote(split)}", "split", "write train or test")
    synthetic = (row.get("synthetic") or "").strip().lower()
    if synthetic not in ("yes", "no", ""):
        why = f"synthetic must be yes, no or empty, got {quote(synthetic)}"
        raise defect(why, "synthetic", "write yes, no, or leave it empty")
    score = (row.get("pirads") or "").strip().lower()
    if score and score not in CLASSES:
        why = f"pirads must be 1 to 5, neg, pos or empty, got {quote(score)}"
        raise defect(why, "pirads", "write the PI-RADS score, neg or pos, or leave it empty")
    report, report_file = row.get("report") or "", (row.get("report_file") or "").strip()
    if report_file:
        if report.strip():
            raise defect("report and report_file are both given", "report_file", "leave one of them empty")
        report = _read_report(table, line, report_file)
    return {
        "split": split,
        "pirads": CLASSES.get(score),
        "report": clean_report(report, table, f"line {line}, report"),
        "synthetic": synthetic == "yes",
        "patient": (row.get("patient") or "").strip() or None,
        "dataset": (row.get("dataset") or "").strip() or None,
        "listed_in": table,
        "field": f"line {line}",
    }


def _read_report(table: Path, line: int, name: str) -> str:
    field = f"line {line}, report_file"
    if len(name) > 255 or not name.isprintable():
        why = f"report_file must be a file name of at most 255 printable characters, got {quote(name)}"
        raise DataError(why, path=table, field=field, fix="move the text to the column report")
    path = safe_join(table.parent, name, path=table, field=field)
    if not path.is_file():
        raise DataError("this report file does not exist", path=table, field=field, fix=f"put it below {table.parent}")
    return read_text(path, limit=4 * MAX_REPORT)
