"""Rows about what generated volumes were asked for: class, findings and gland volume, and the prompt's own study."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ccella_fast.evaluation.conditions import Agreement, condition_agreement
from ccella_fast.evaluation.copying import own_study_retrieval
from ccella_fast.evaluation.findings import CaseFindings, findings_agreement, stated_volume_agreement
from ccella_fast.evaluation.metrics import Draws, Sets, set_names
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.statistics import standardisation


def condition_rows(
    sets: Sets, spaces: Mapping[str, dict[str, Any]], findings: CaseFindings | None, draws: Draws
) -> list[Row]:
    """The agreement of synthetic volumes with the class and with the findings that they were asked for.

    Properties of which nothing is known, or of which all real volumes have the same, have no row.

    Args:
        sets: the features.
        spaces: name -> weights_sha256 and preprocessing.
        findings: of the real volumes and of the prompts.
        draws: their seed.
    """
    rows = []
    for space, about in spaces.items():
        start = time.perf_counter()
        real, synthetic = (each.spaces[space] for each in (sets.real, sets.synthetic))
        given: dict[str, Any] = {"patients": sets.real.patients, "seed": draws.seed}
        found = [condition_agreement("class", real, sets.real.classes, synthetic, sets.synthetic.classes, **given)]
        if findings is not None:
            found += findings_agreement(findings, real, sets.real.ids, synthetic, sets.synthetic.prompts, **given)
        rows += [
            _row(each, sets, start, features=space, dim=real.shape[1], **about)
            for each in found
            if each.value is not None
        ]
    return rows


def gland_volume_row(sets: Sets, findings: CaseFindings | None, draws: Draws) -> list[Row]:
    """The gland volume that reports state against that of the segmented gland; nothing where no prompt states one."""
    if findings is None:
        return []
    start = time.perf_counter()
    real, synthetic = (
        [float(row[0]) or None for row in table.spaces["gland"]] for table in (sets.real, sets.synthetic)
    )
    found = stated_volume_agreement(findings, sets.real.ids, real, sets.synthetic.prompts, synthetic, seed=draws.seed)
    if found.agreement.value is None:
        return []
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


def _row(found: Agreement, sets: Sets, start: float, *, more: dict[str, Any] | None = None, **about: Any) -> Row:
    names = ("score", "ceiling", "normalized", "normalized_ci95", "p", "accuracy", "ceiling_accuracy")
    counts = {"n_real": found.n_real, "n_synthetic": found.n_synthetic}
    return Row(
        f"condition_{found.name}", **(set_names(sets) | counts), value=found.value, floor=found.floor, better="higher",
        guards=tuple(found.guards), details={name: getattr(found, name) for name in names} | (more or {}),
        seconds=round(time.perf_counter() - start, 3), **about,
    )  # fmt: skip
