"""`choices.csv`: what each volume is proposed for and used as. The user edits the column `use`; an edit is kept.

A line is an edit if `use` differs from `proposed`. Other lines are renewed whenever the export is read again.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from ccella_fast.data.importing.sequence_choice import SEQUENCES, Judgement
from ccella_fast.data.readers.text_checks import quote, read_text
from ccella_fast.errors import DataError
from ccella_fast.storage import write_csv

COLUMNS = ("study", "series", "use", "proposed", "slices", "b_value", "plane", "reason", "look_at")


def read_choices(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(study, series) -> line; empty if there is no such file.

    Raises:
        DataError: If a line is not valid.
    """
    if not path.exists():
        return {}
    content = read_text(path)
    header = content.split("\n", 1)[0]
    delimiter = ";" if header.count(";") > header.count(",") else ","  # as spreadsheets of some countries save it
    reader = csv.DictReader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    lines: dict[tuple[str, str], dict[str, str]] = {}
    try:
        if not {"study", "series", "use", "proposed"} <= set(reader.fieldnames or ()):
            why = "the columns study, series, use and proposed are expected"
            raise DataError(why, path=path, field="line 1", fix="delete the file to have it written again")
        for row in reader:
            field = f"line {reader.line_num}"
            if None in row or None in row.values():
                raise DataError(
                    "this line has too few or too many cells", path=path, field=field, fix="correct the line"
                )
            row = {name: (cell or "").strip() for name, cell in row.items()}
            row["use"] = row["use"].lower()
            if row["use"] not in ("", *SEQUENCES):
                why = f"use must be {', '.join(SEQUENCES)} or empty, got {quote(row['use'])}"
                raise DataError(why, path=path, field=field, fix="correct the cell")
            if (row["study"], row["series"]) in lines:
                raise DataError("this series is listed twice", path=path, field=field, fix="keep one of the lines")
            lines[row["study"], row["series"]] = row
    except csv.Error as error:
        raise DataError(f"this is not valid CSV: {error}", path=path, field=f"line {reader.line_num}") from None
    return lines


def apply_edits(
    judged: Mapping[str, Sequence[Judgement]], lines: Mapping[tuple[str, str], Mapping[str, str]], path: Path
) -> dict[str, list[Judgement]]:
    """The judgements of each study with the user's edits in `use`.

    Raises:
        DataError: If an edited line names a series that is not in the study, or two series of a study have one use.
    """
    edits = {place: line["use"] for place, line in lines.items() if line["use"] != line["proposed"]}
    result: dict[str, list[Judgement]] = {}
    for study, volumes in judged.items():
        names = {each.volume.name for each in volumes}
        own = {series: use for (named, series), use in edits.items() if named == study}
        if missing := sorted(set(own) - names):
            why = f"study {study} has no series {missing[0]}, which this file was edited for"
            raise DataError(why, path=path, fix="export the series again, or delete the line")
        taken = {use for use in own.values() if use}
        result[study] = []
        for each in volumes:
            use = own.get(each.volume.name, "" if each.use in taken else each.use)
            result[study].append(each._replace(use=use))
        for sequence in SEQUENCES:
            several = [each.volume.name for each in result[study] if each.use == sequence]
            if len(several) > 1:
                why = f"{len(several)} series of study {study} are to be used as {sequence}: {', '.join(several)}"
                raise DataError(why, path=path, fix="leave one")
    return result


def write_choices(
    path: Path,
    proposed: Mapping[str, Sequence[Judgement]],
    used: Mapping[str, Sequence[Judgement]],
    lines: Mapping[tuple[str, str], Mapping[str, str]],
) -> None:
    """Write the file. Lines of studies that are not in this export are kept."""
    rows = {place: [line.get(name, "") for name in COLUMNS] for place, line in lines.items() if place[0] not in used}
    for study, volumes in used.items():
        for each, rule in zip(volumes, proposed[study], strict=True):
            b_value = "" if each.volume.b_value is None else f"{each.volume.b_value:g}"
            plane = plane_of(each)
            rows[study, each.volume.name] = [
                study, each.volume.name, each.use, rule.use, str(each.volume.slices), b_value, plane, each.reason, rule.doubt
            ]  # fmt: skip
    write_csv(path, COLUMNS, (row for _, row in sorted(rows.items())))


def plane_of(judgement: Judgement) -> str:
    """axial, coronal or sagittal; "" without an orientation."""
    normal = judgement.volume.normal
    return "" if normal is None else ("sagittal", "coronal", "axial")[int(abs(normal).argmax())]
