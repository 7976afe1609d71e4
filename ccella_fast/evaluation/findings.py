"""What reports and phantoms state about the cases: side, zone, level and size of a lesion, and the volume of the gland.

It is read from a table like the `studies.csv` of `prepare`. Of a report only the number of its volume is kept.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.data.readers.study_table import read_cases
from ccella_fast.errors import DataError
from ccella_fast.evaluation.conditions import Agreement, Label, condition_agreement
from ccella_fast.evaluation.report_volumes import VolumeAgreement, stated_volume, volume_agreement

CATEGORIES, NUMBERS = ("side", "zone", "level"), ("lesion_size_mm",)  # columns of the table


class CaseFindings(NamedTuple):
    """What is known of cases and of the reports that are prompts.

    Attributes:
        properties: column -> case -> what it states; cases without an entry are left out.
        volumes_cc: case -> the volume of the gland that its report states.
    """

    properties: dict[str, dict[str, Label]]
    volumes_cc: dict[str, float]

    def describes(self, case: str) -> bool:
        """Whether anything is known of a case."""
        return case in self.volumes_cc or any(case in cases for cases in self.properties.values())


def read_findings(table: str | Path) -> CaseFindings:
    """Read a table with the column `case` and any of side, zone, level, lesion_size_mm and report.

    A case is the id of a real volume, or the name of a report that was a prompt.

    Raises:
        DataError: the table cannot be read, names a case twice, or has a size that is no number.
    """
    table = Path(table)
    properties: dict[str, dict[str, Label]] = {name: {} for name in (*CATEGORIES, *NUMBERS)}
    volumes: dict[str, float] = {}
    for line, row in read_cases(table):
        case = row["case"]
        for name in CATEGORIES:
            if row.get(name):
                properties[name][case] = row[name]
        for name in NUMBERS:
            if row.get(name):
                properties[name][case] = _number(row[name], table, f"line {line}, {name}")
        volume = stated_volume(row.get("report", ""))
        if volume is not None:
            volumes[case] = volume
    return CaseFindings({name: cases for name, cases in properties.items() if cases}, volumes)


def _number(cell: str, table: Path, field: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError("this cell must be a number or empty", path=table, field=field, fix="correct it there")
    return value


def findings_agreement(
    findings: CaseFindings,
    real: Any,
    ids: Sequence[str],
    synthetic: Any,
    prompts: Sequence[str | None],
    *,
    patients: Sequence[Hashable] | None = None,
    seed: int = 0,
) -> list[Agreement]:
    """`condition_agreement` for each property that the findings name for real volumes and for prompts.

    Args:
        findings: of the real volumes and of the prompts.
        real: (n, d) features.
        ids: of the real volumes.
        synthetic: (m, d) features.
        prompts: the names of the reports that prompted the generated volumes; None where it is not known.
        patients: of the real volumes.
        seed: of folds, orders and resamples.
    """
    place = {case: row for row, case in enumerate(ids)}
    prompted_by = [None if prompt is None else place.get(prompt) for prompt in prompts]
    return [
        condition_agreement(
            name,
            real,
            [cases.get(case) for case in ids],
            synthetic,
            [None if prompt is None else cases.get(prompt) for prompt in prompts],
            patients=patients,
            prompted_by=prompted_by,
            seed=seed,
        )
        for name, cases in findings.properties.items()
    ]


def stated_volume_agreement(
    findings: CaseFindings,
    ids: Sequence[str],
    segmented: Sequence[float | None],
    prompts: Sequence[str | None],
    generated: Sequence[float | None],
    *,
    seed: int = 0,
) -> VolumeAgreement:
    """`volume_agreement` of the volumes that reports state with those of the segmented glands.

    Args:
        findings: of the real volumes and of the prompts.
        ids: of the real volumes.
        segmented: volumes of their glands in cc; None where none was found.
        prompts: the names of the reports that prompted the generated volumes.
        generated: volumes of the generated glands in cc.
        seed: of random orders and resamples.
    """
    stated = [findings.volumes_cc.get(case) for case in ids]
    asked = [None if prompt is None else findings.volumes_cc.get(prompt) for prompt in prompts]
    return volume_agreement(asked, generated, stated, segmented, seed=seed)
