"""Reports from a CSV file, or from a folder of text files, found by accession number, study UID or patient id."""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ccella_fast.data.importing.deidentification import KeyRow, without_identity
from ccella_fast.data.importing.pirads_text import PiradsReading, read_pirads
from ccella_fast.data.importing.series import ExportedStudy
from ccella_fast.data.readers.text_checks import MAX_REPORT, clean_report, printable, read_text
from ccella_fast.errors import ConfigError, DataError, did_you_mean

#: Names of columns, in lower case without spaces and punctuation. Of several that are present the first here is used.
ID_COLUMNS = (
    "accession", "accessionnumber", "accessionno", "acc", "studyuid", "studyinstanceuid", "patientid", "patient", "pid",
    "mrn", "case",
)  # fmt: skip
REPORT_COLUMNS = (
    "report", "reporttext", "text", "findingsandimpression", "befund", "verslag", "compterendu", "informe", "narrative",
)  # fmt: skip
PIRADS_COLUMNS = ("pirads", "piradsscore", "piradscategory", "piradsmax", "maxpirads", "piradsassessment")


class SourceReport(NamedTuple):
    """A report as it was given. id: accession number, study UID or patient id. pirads: of its column; "" for none."""

    id: str
    text: str
    pirads: str


class StudyReport(NamedTuple):
    """What studies.csv says about a study.

    Attributes:
        text: The report without what identifies the patient; "" for none.
        score: PI-RADS 1 to 5 as text; "" if it is unknown.
        reason: Where the score is from, or why there is none.
        replaced: How many names, ids and dates were replaced in the text.
    """

    text: str = ""
    score: str = ""
    reason: str = "no report"
    replaced: int = 0


def read_sources(path: Path, report_column: str | None, id_column: str | None) -> list[SourceReport]:
    """The reports of a CSV file or of a folder of `.txt` files, which are named by their ids.

    Raises:
        ConfigError: If a column that the user names is not in the table.
        DataError: If the file cannot be read, or its columns are not recognized. No message repeats a cell.
    """
    if path.is_dir():
        if report_column or id_column:
            why = "--report_column and --id_column are for a CSV file, but --reports is a folder"
            raise ConfigError(why, fix="leave them out")
        found = []
        for file in sorted(path.iterdir()):
            if file.suffix.lower() == ".txt" and file.is_file():
                found.append(SourceReport(file.stem.strip(), read_text(file, limit=4 * MAX_REPORT), ""))
        if not found:
            fix = "name them by accession number, study UID or patient id"
            raise DataError("this folder holds no .txt files", path=path, fix=fix)
        return found
    return _read_table(path, report_column, id_column)


def _read_table(path: Path, report_column: str | None, id_column: str | None) -> list[SourceReport]:
    content = read_text(path)
    header = content.lstrip("\n").split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    csv.field_size_limit(4 * MAX_REPORT)
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = list(reader.fieldnames or [])
        of_id = _column(columns, id_column, ID_COLUMNS, "--id_column", path)
        of_text = _column(columns, report_column, REPORT_COLUMNS, "--report_column", path)
        of_pirads = next((name for name in columns if _folded(name) in PIRADS_COLUMNS), None)
        found = []
        for row in reader:
            if None in row or None in row.values():
                why = f"this line has another number of cells than the {len(columns)} columns"
                fix = 'put text that holds commas, quotes or line ends into "double quotes"'
                raise DataError(why, path=path, field=f"line {reader.line_num}", fix=fix)
            pirads = row[of_pirads].strip() if of_pirads else ""
            found.append(SourceReport(row[of_id].strip(), row[of_text], pirads))
    except csv.Error as error:
        why = f"this is not valid CSV: {error}"
        raise DataError(why, path=path, field=f"line {reader.line_num}", fix="correct that line") from None
    return found


def _folded(name: str) -> str:
    return re.sub(r"[\W_]+", "", name.lower())


def _column(columns: list[str], given: str | None, known: Sequence[str], option: str, path: Path) -> str:
    if given is not None:
        if given in columns:
            return given
        shown = [name for name in columns if re.fullmatch(r"[\w -]{1,40}", name)]
        raise ConfigError(
            f"the table has no column '{printable(given)}'", path=path, field=option, fix=did_you_mean(given, shown)
        )
    for name in known:
        found = [column for column in columns if _folded(column) == name]
        if found:
            return found[0]
    why = f"no column of this table is recognized: {', '.join(known)} are"
    raise DataError(why, path=path, field="line 1", fix=f"give its name with {option}")


def match_reports(
    sources: Sequence[SourceReport], studies: Mapping[str, ExportedStudy], key: Mapping[str, KeyRow]
) -> tuple[dict[str, StudyReport], list[str]]:
    """New id of a study -> its report, and sentences about what did not match, without any old id.

    A patient id stands for a study only if the patient has one study. Several different reports of one study are not used.
    """
    by_name: dict[str, set[str]] = defaultdict(set)
    for study_id, study in studies.items():
        by_name[study.uid].add(study_id)
        for each in study.identities:
            for name in (each.accession, each.patient_id):
                if name:
                    by_name[name].add(study_id)
    by_id: dict[str, list[SourceReport]] = defaultdict(list)
    unmatched, several = 0, 0
    elsewhere = {name for row in key.values() for name in (row.study_uid, row.accession, row.patient_id) if name}
    for source in sources:
        found = by_name.get(source.id, set()) if source.id else set()
        if len(found) == 1:
            by_id[next(iter(found))].append(source)
        elif found:
            several += 1
        elif source.id not in elsewhere:
            unmatched += 1
    reports, doubles = {}, []
    for study_id, study in studies.items():
        texts = {(source.text.strip(), source.pirads): source for source in by_id.get(study_id, [])}
        if len(texts) == 1:
            reports[study_id] = _study_report(next(iter(texts.values())), study)
        elif texts:
            doubles.append(study_id)
            reports[study_id] = StudyReport(reason=f"{len(texts)} different reports")
        else:
            reports[study_id] = StudyReport()
    notes = []
    if unmatched:
        notes.append(
            f"reports with an id that is not an accession number, study UID or patient id of the export: {unmatched}"
        )
    if several:
        notes.append(
            f"reports with an id that several studies share: {several}; give the accession number or the study UID"
        )
    if doubles:
        notes.append(
            f"studies with several different reports, of which none is used: {len(doubles)}, {shortened(doubles)}"
        )
    return reports, notes


def shortened(names: Sequence[str], limit: int = 12) -> str:
    """The first names of a list, and how many follow."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more} more" if more > 0 else "")


def _study_report(source: SourceReport, study: ExportedStudy) -> StudyReport:
    text, replaced = without_identity(source.text, study.identities)
    text = clean_report(text, Path("reports"), "report") or ""
    score, reason = _score(source, text)
    return StudyReport(text, score, reason, replaced)


def _score(source: SourceReport, text: str) -> tuple[str, str]:
    from_text = read_pirads(text) if text else PiradsReading(None, "the report is empty")
    if not source.pirads or source.pirads.lower() in ("n/a", "na", "nan", "-", "none"):
        return "" if from_text.score is None else str(from_text.score), f"from the text: {from_text.reason}"
    match = re.fullmatch(r"([1-5])(?:\.0+)?", source.pirads)
    from_column = int(match[1]) if match else read_pirads(source.pirads).score
    if from_column is None:
        return "", "the PI-RADS column holds no score from 1 to 5"
    if from_text.score not in (None, from_column):
        return str(from_column), f"from the column; the text says {from_text.score}"
    return str(from_column), "from the column"
