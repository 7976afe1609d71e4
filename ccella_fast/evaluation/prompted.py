"""Rows about what generated volumes were asked for: class, findings and gland volume of reports, and the prompt's own study."""

from __future__ import annotations

import csv
import io
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.data.readers.text_checks import read_text
from ccella_fast.errors import DataError
from ccella_fast.evaluation.conditions import Agreement, Label, condition_agreement
from ccella_fast.evaluation.copying import own_study_retrieval
from ccella_fast.evaluation.metrics import Draws, Sets, set_names
from ccella_fast.evaluation.report_volumes import stated_volume, volume_agreement
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.statistics import standardisation

_SIZE = re.compile(r"\b(\d{1,2})\s?mm\b")
_WORDS = {
    "side": {"left": r"\bleft\b", "right": r"\bright\b"},
    "zone": {"pz": r"\bperipheral zone\b|\bPZ\b", "tz": r"\btransition(?:al)? zone\b|\bTZ\b"},
    "level": {"apex": r"\bapex\b|\bapical\b", "mid": r"\bmid-?gland\b", "base": r"\bbase\b|\bbasal\b"},
}


class StatedFindings(NamedTuple):
    """What a report says of its first lesion with a size; None where it says nothing, or several things.

    Attributes:
        side: "left" or "right".
        zone: "pz" or "tz".
        level: "apex", "mid" or "base".
        size: in mm.
        gland_volume: in cc.
    """

    side: str | None = None
    zone: str | None = None
    level: str | None = None
    size: float | None = None
    gland_volume: float | None = None


def stated_findings(report: str) -> StatedFindings:
    """Read a report in English by patterns. The text itself goes no further."""
    sentence = next((part for part in re.split(r"(?<=[.;!?])\s+", report) if _SIZE.search(part)), "")
    found: dict[str, Any] = {}
    for name, words in _WORDS.items():
        named = [value for value, pattern in words.items() if re.search(pattern, sentence, re.IGNORECASE)]
        found[name] = named[0] if len(named) == 1 else None
    sizes = set(_SIZE.findall(sentence))
    size = float(sizes.pop()) if len(sizes) == 1 else None
    return StatedFindings(**found, size=size, gland_volume=stated_volume(report))


def read_reports(path: str | Path) -> dict[str, str]:
    """Reports by case or report id: from a table with the columns `case` and `report`, or a folder of `<id>.txt` files.

    Raises:
        DataError: the table or a file is missing or damaged, or there are no reports.
    """
    path = Path(path)
    if path.is_dir():
        found = {file.stem: read_text(file) for file in sorted(path.glob("*.txt"))}
    else:
        reader = csv.DictReader(io.StringIO(read_text(path)))
        if not {"case", "report"} <= set(reader.fieldnames or ()):
            why, fix = "this table has no columns 'case' and 'report'", "give a studies.csv, or a folder of .txt files"
            raise DataError(why, path=path, field="--reports", fix=fix)
        found = {row["case"]: row["report"] for row in reader if row["report"]}
    if not found:
        fix = "give a studies.csv, or a folder of .txt files that are named by case or report id"
        raise DataError("there are no reports here", path=path, field="--reports", fix=fix)
    return found


def condition_rows(
    sets: Sets, spaces: Mapping[str, dict[str, Any]], reports: Mapping[str, StatedFindings], draws: Draws
) -> list[Row]:
    """The agreement of synthetic volumes with the class, side, zone, level and size that they were asked for.

    Args:
        sets: the features.
        spaces: name -> weights_sha256 and preprocessing.
        reports: id -> what the report states.
        draws: their seed.
    """
    stated = [_stated(reports, ids) for ids in (sets.real.ids, sets.synthetic.prompts)]
    places = {case: row for row, case in enumerate(sets.real.ids)}
    prompted_by = [None if prompt is None else places.get(prompt) for prompt in sets.synthetic.prompts]
    labels: dict[str, list[Sequence[Label]]] = {"class": [sets.real.classes, sets.synthetic.classes]}
    labels |= {name: [[getattr(each, name) for each in of_set] for of_set in stated] for name in (*_WORDS, "size")}
    rows = []
    for name, (known, asked) in labels.items():
        if len(set(known) - {None}) < 2 or not any(label is not None for label in asked):
            continue
        for space, about in spaces.items():
            start = time.perf_counter()
            real, synthetic = (each.spaces[space] for each in (sets.real, sets.synthetic))
            found = condition_agreement(
                name, real, known, synthetic, asked, patients=sets.real.patients, prompted_by=prompted_by,
                seed=draws.seed,
            )  # fmt: skip
            rows.append(_row(found, sets, start, features=space, dim=real.shape[1], **about))
    return rows


def gland_volume_row(sets: Sets, reports: Mapping[str, StatedFindings], draws: Draws) -> list[Row]:
    """The gland volume that reports state against that of the segmented gland; nothing where no prompt states one."""
    start = time.perf_counter()
    stated = [[each.gland_volume for each in _stated(reports, ids)] for ids in (sets.synthetic.prompts, sets.real.ids)]
    if not any(value is not None for value in stated[0]):
        return []
    segmented = [[float(row[0]) or None for row in table.spaces["gland"]] for table in (sets.synthetic, sets.real)]
    found = volume_agreement(stated[0], segmented[0], stated[1], segmented[1], seed=draws.seed)
    more = {name: getattr(found, name) for name in ("bias_cc", "limits_cc", "real_bias_cc", "real_limits_cc")}
    return [_row(found.agreement, sets, start, features=None, more=more)]


def own_study_row(sets: Sets, space: str, about: dict[str, Any]) -> list[Row]:
    """How often the nearest training volume is the study whose report was the prompt; nothing without such prompts."""
    assert sets.train is not None
    start = time.perf_counter()
    places = {case: row for row, case in enumerate(sets.train.ids)}
    prompted = [row for row, prompt in enumerate(sets.synthetic.prompts) if prompt in places]
    if not prompted:
        return []
    standard = standardisation(sets.train.spaces[space])
    own = [places[str(sets.synthetic.prompts[row])] for row in prompted]
    found = own_study_retrieval(
        standard.apply(sets.train.spaces[space]), standard.apply(sets.synthetic.spaces[space][prompted]), own
    )
    details = {"median_rank": found.median_rank, "n_train": len(sets.train)}
    names = set_names(sets) | {"n_synthetic": len(prompted)}
    return [
        Row(
            "own_study",
            **names,
            features=space,
            dim=int(standard.kept.sum()),
            value=found.rate,
            ci95=found.ci95,
            floor=found.chance,
            better="floor",
            guards=("few",) if len(prompted) < 20 else (),
            details=details,
            seconds=round(time.perf_counter() - start, 3),
            **about,
        )  # fmt: skip
    ]


def _stated(reports: Mapping[str, StatedFindings], ids: Sequence[str | None]) -> list[StatedFindings]:
    return [reports.get(each or "", StatedFindings()) for each in ids]


def _row(found: Agreement, sets: Sets, start: float, *, more: dict[str, Any] | None = None, **about: Any) -> Row:
    names = ("score", "ceiling", "normalized", "normalized_ci95", "p", "accuracy", "ceiling_accuracy")
    counts = {"n_real": found.n_real, "n_synthetic": found.n_synthetic}
    return Row(
        f"condition_{found.name}", **(set_names(sets) | counts), value=found.value, floor=found.floor, better="higher",
        guards=tuple(found.guards), details={name: getattr(found, name) for name in names} | (more or {}),
        seconds=round(time.perf_counter() - start, 3), **about,
    )  # fmt: skip
