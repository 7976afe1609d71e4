"""Read `studies.csv`, or the `participants.tsv` of a BIDS folder: split, class and report of the studies of a folder.

Cells are compared without the spaces around them. `n/a` is an empty cell. `pirads` is the score 1 to 5, also written 4.0,
`neg` or `pos`, or empty if the class is unknown. A blank report is treated as missing. `synthetic` is `yes` for a study that
was drawn, not measured; `source_case` and `class_predicted` are columns of `ccella-fast synthesize`. `patient` is the same for
all studies of a patient. Further columns are the user's own and ignored. The rows are read in one pass and not kept.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args

from ccella_fast.data.manifest import CASE_ID, Split
from ccella_fast.data.readers.study import Defects, Study
from ccella_fast.data.readers.text_checks import (
    MAX_LIST_BYTES,
    MAX_REPORT,
    MAX_STUDIES,
    check_known,
    check_tag,
    clean_report,
    misspelling_of,
    quote,
    read_text,
)
from ccella_fast.errors import DataError, did_you_mean
from ccella_fast.pirads import CLASSES
from ccella_fast.quantities import counted
from ccella_fast.storage import safe_join

logger = logging.getLogger("ccella_fast")

PARTICIPANTS = "participants.tsv"
_COLUMNS = {
    "case", "split", "pirads", "report", "report_file", "dataset", "synthetic", "source_case", "class_predicted", "patient",
}  # fmt: skip
_SHOWN = 3  # names in a message
_LONGEST_CASE = 255  # characters, as of the name of a folder
_TSV_CELL = re.compile(r'(?:^|\t)("(?:[^"]|"")*"(?=\t|$)|[^\t]*)')  # BIDS: quotes enclose a cell that holds tabs
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "the character |"}


def apply_table(studies: list[Study], table: Path, defects: Defects) -> list[Study]:
    """The studies with the values of the table's rows. A study without a row has neither report nor class.

    A row of participants.tsv holds for all sessions of the participant. Rows without images, which BIDS allows, and studies
    without a row are counted in a warning.
    """
    is_bids = table.name == PARTICIPANTS
    by_id = {study.id: study for study in studies}
    ids = _ids_of_cases(by_id, is_bids)
    key = "participant_id" if is_bids else "case"
    lines: dict[str, int] = {}
    unmatched, names = 0, list[str]()
    alike = {_plain_id(name): name for name in ids}
    misnamed: list[tuple[str, str, str]] = []
    for line, row in read_rows(table, key):
        case, field = row[key], f"line {line}, {key}"
        if case not in ids and is_bids:
            unmatched += 1
            names += [case] * (unmatched <= _SHOWN)
            misnamed += [(case, field, alike[_plain_id(case)])] if _plain_id(case) in alike else []
        elif case not in ids:
            why = f"no study is called {quote(case)}"
            defects.add(DataError(why, path=table, field=field, fix=_suggest(case, ids)))
        elif case in lines:
            why = f"the case '{case}' is already listed on line {lines[case]}"
            defects.add(DataError(why, path=table, field=field, fix="keep one of the lines"))
        else:
            lines[case] = line
            try:
                values = _parse_row(table, line, row)
                by_id.update({name: by_id[name]._replace(**values) for name in ids[case]})
            except DataError as defect:
                defects.add(defect)
    if unmatched and not lines and studies:
        why = f"no row names a study of this folder; the first of {unmatched} names {quote(names[0])}"
        defects.add(DataError(why, path=table, field=key, fix=_suggest(names[0], ids)))
    elif unmatched:
        for case, field, name in misnamed:
            if name not in lines:
                why = f"no study is called {quote(case)}, and '{name}' has no row"
                defects.add(DataError(why, path=table, field=field, fix=_suggest(case, ids)))
        _warn(table, unmatched, names, "rows without images")
    return list(by_id.values())


def _ids_of_cases(names: Iterable[str], is_bids: bool) -> dict[str, list[str]]:
    """What a row may be called -> the studies for which it holds."""
    ids: dict[str, list[str]] = {name: [name] for name in names}
    for name in list(ids):
        participant, _, session = name.partition("_ses-")
        if is_bids and session:
            ids.setdefault(participant, []).append(name)
    return ids


def _suggest(case: str, ids: dict[str, list[str]]) -> str:
    """What to do about a case that is not a study: spreadsheets drop leading zeros and append .0, people drop `sub-`."""
    alike = next((name for name in ids if _plain_id(name) == _plain_id(case)), None)
    if alike is not None:
        return f"did you mean '{alike}'? (a spreadsheet may have changed the ids)"
    return did_you_mean(case[:128], ids) if len(ids) < 20 else "check the names against the folders"


def _plain_id(name: str) -> str:
    return name.casefold().removeprefix("sub-").removesuffix(".0").lstrip("0")


def _warn(table: Path, count: int, first: list[str], what: str) -> None:
    if count:
        more = f" and {count - len(first)} more" if count > len(first) else ""
        logger.warning("%s: %s: %d, %s%s", table, what, count, ", ".join(map(quote, first)), more)


def read_rows(table: Path, key: str) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column -> stripped cell) of every row. `key` is the column that must exist. `.tsv` files are separated by tabs."""
    is_tsv = table.suffix.lower() == ".tsv"
    text = read_text(table)
    _check_separator(text, key, table, "\t" if is_tsv else ",")
    rows = _tsv_rows(text) if is_tsv else _csv_rows(text, table)
    first, columns = next(rows, (1, [""]))
    columns = [name.strip() for name in columns]
    _check_columns(columns, key, table, f"line {first}")
    for number, (line, cells) in enumerate(rows, start=1):
        if number > MAX_STUDIES:
            why = f"this table has more than {MAX_STUDIES} rows"
            raise DataError(why, path=table, field=f"line {line}", fix="check that this is the right file")
        if len(cells) != len(columns):
            why = f"this line has {counted(len(cells), 'cell')}, but the table has {counted(len(columns), 'column')}"
            fix = "separate the cells by single tabs" if is_tsv else 'put text that holds commas into "double quotes"'
            raise DataError(why, path=table, field=f"line {line}", fix=fix)
        cells = [cell.strip() for cell in cells]
        yield line, {name: "" if cell == "n/a" else cell for name, cell in zip(columns, cells, strict=True)}


def _csv_rows(text: str, table: Path) -> Iterator[tuple[int, list[str]]]:
    """(the line where it starts, cells) of every row that is not blank."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(MAX_LIST_BYTES)  # of the process; reports have a limit of their own
        try:
            cells = next(reader, None)
        except csv.Error as error:
            fix = 'close the quotes that this line opens; within them, write "" for one quote'
            raise DataError(f"this is not valid CSV: {error}", path=table, field=f"line {line}", fix=fix) from None
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        if any(cells):
            yield line, cells


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """As `_csv_rows`. Quotes that do not enclose a whole cell are part of the text; a cell has no line ends."""
    for line, content in enumerate(io.StringIO(text, newline=None), start=1):
        if content.strip():
            cells = _TSV_CELL.findall(content.rstrip("\n"))
            yield line, [cell[1:-1].replace('""', '"') if _is_quoted(cell) else cell for cell in cells]


def _is_quoted(cell: str) -> bool:
    return len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in cell[1:-1].replace('""', "")


def _check_separator(text: str, key: str, table: Path, separator: str) -> None:
    """Raise DataError if the first line names the column `key`, but by the look of it with another separator."""
    header = text.lstrip().partition("\n")[0]
    names = {each: [name.strip(' "\r') for name in header.split(each)] for each in _SEPARATORS}
    for other, found in names.items():
        if key in found and len(found) > 1 and key not in names[separator]:
            why = f"the cells of this table are separated by {_SEPARATORS[other]}, not by {_SEPARATORS[separator]}"
            fix = f"save it with {_SEPARATORS[separator]}" + (", or name it .tsv" if other == "\t" else "")
            raise DataError(why, path=table, field="line 1", fix=fix)


def _check_columns(columns: list[str], key: str, table: Path, field: str) -> None:
    """Raise DataError unless the columns are named. Other cells of the line are not shown: it may be a row, with a report."""
    if key not in columns:
        fix = f"begin with a line of the names of the columns: {key},split,pirads,report"
        near = next((name for name in columns if misspelling_of(name, {key}, columns)), None)
        fix = f"rename the column {quote(near)}" if near else fix
        raise DataError(f"the table has no column '{key}'", path=table, field=field, fix=fix)
    for name in sorted(set(columns) - _COLUMNS - {key}):
        check_known(name, _COLUMNS, columns, path=table, field=f"{field}, {quote(name).strip(chr(39))}")
    twice = sorted({name for name in columns if name in _COLUMNS | {key} and columns.count(name) > 1})
    if twice:
        raise DataError(
            f"the column '{twice[0]}' appears twice", path=table, field=field, fix="keep one of the columns"
        )


def _parse_row(table: Path, line: int, row: dict[str, str]) -> dict[str, Any]:
    """Values of the fields of Study that a row states."""

    def defect(why: str, column: str, fix: str) -> DataError:
        return DataError(why, path=table, field=f"line {line}, {column}", fix=fix)

    split = row.get("split") or "train"
    if split not in get_args(Split):
        raise defect(f"split must be train, val or test, got {quote(split)}", "split", "write train, val or test")
    synthetic = row.get("synthetic", "").lower()
    if synthetic not in ("yes", "no", ""):
        why = f"synthetic must be yes, no or empty, got {quote(synthetic)}"
        raise defect(why, "synthetic", "write yes, no, or leave it empty")
    classes = {}
    for column in ("pirads", "class_predicted"):
        # pandas writes 4.0 if another score is missing
        score = re.sub(r"^(\d)\.0+$", r"\1", row.get(column, "").lower())
        if score and score not in CLASSES:
            why = f"{column} must be 1 to 5, neg, pos or empty, got {quote(row[column])}"
            raise defect(why, column, "write the PI-RADS score, neg or pos, or leave it empty")
        classes[column] = CLASSES.get(score)
    source = row.get("source_case") or None
    if source is not None and synthetic != "yes":
        why = "only a synthetic study can have a source_case"
        raise defect(why, "source_case", "leave it empty, or write yes in the column synthetic")
    if source is not None and not re.fullmatch(CASE_ID, source):
        why = f"source_case must be the name of a case, got {quote(source)}"
        raise defect(why, "source_case", "write the case that the study was generated from, or leave it empty")
    report, report_file = row.get("report", ""), row.get("report_file", "")
    if report_file:
        if report:
            raise defect("report and report_file are both given", "report_file", "leave one of them empty")
        report = _read_report(table, line, report_file)
    check_tag(row.get("dataset"), table, f"line {line}, dataset")
    return {
        "split": split,
        **classes,
        "report": clean_report(report, table, f"line {line}, report"),
        "synthetic": synthetic == "yes",
        "source_case": source,
        "patient": row.get("patient") or None,
        "dataset": row.get("dataset") or None,
        "listed_in": table,
        "field": f"line {line}",
    }


def read_cases(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """As `read_rows`, of a table that need not be that of a folder of studies: each row has a case of its own.

    Raises:
        DataError: the table cannot be read, or a case is missing, not a name, or listed again.
    """
    lines: dict[str, int] = {}
    for line, row in read_rows(table, "case"):
        case, field = row["case"], f"line {line}, case"
        if not case or len(case) > _LONGEST_CASE or not case.isprintable():
            why = f"a case must be a name of 1 to {_LONGEST_CASE} printable characters, got {quote(case)}"
            raise DataError(why, path=table, field=field, fix="name the case, or remove the line")
        if case in lines:
            why = f"the case {quote(case)} is already listed on line {lines[case]}"
            raise DataError(why, path=table, field=field, fix="keep one of the lines")
        lines[case] = line
        yield line, row


def studies_of(table: Path) -> list[Study]:
    """The rows of a table like studies.csv, without images, which need not exist.

    Raises:
        DataError: the table cannot be read, or a row is invalid or names a case again.
    """
    return [Study(row["case"], {}, **_parse_row(table, line, row)) for line, row in read_cases(table)]


def reports_of(table: Path) -> dict[str, str]:
    """The reports in a table like studies.csv, by case. Rows without a report are left out; there need be no images.

    Raises:
        DataError: the table cannot be read, a row is invalid or names a case again, or no row has a report.
    """
    reports = {study.id: study.report for study in studies_of(table) if study.report}
    if not reports:
        raise DataError("no row of this table has a report", path=table, field="report", fix="write the reports there")
    return reports


def _read_report(table: Path, line: int, name: str) -> str:
    field = f"line {line}, report_file"
    if len(name) > 255 or not name.isprintable():
        why = f"report_file must be a file name of at most 255 printable characters, got {quote(name)}"
        raise DataError(why, path=table, field=field, fix="move the text to the column report")
    path = safe_join(table.parent, name, path=table, field=field)
    if not path.is_file():
        raise DataError("this report file does not exist", path=table, field=field, fix=f"put it below {table.parent}")
    return read_text(path, limit=4 * MAX_REPORT)
