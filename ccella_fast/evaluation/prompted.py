"""Rows about what generated volumes were asked for: class, findings, gland volume, counterfactuals, and whose report it was."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from ccella_fast.evaluation.conditions import Agreement, condition_agreement
from ccella_fast.evaluation.copying import own_study_retrieval
from ccella_fast.evaluation.counterfactuals import Drift, counterfactual_effect
from ccella_fast.evaluation.findings import CaseFindings, findings_agreement, stated_volume_agreement
from ccella_fast.evaluation.metrics import Draws, Sets, set_names
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.retrieval import CANDIDATES_PER_K, Embeddings, text_image_retrieval
from ccella_fast.evaluation.statistics import standardisation

logger = logging.getLogger("ccella_fast")


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


def counterfactual_rows(
    sets: Sets, spaces: Mapping[str, dict[str, Any]], findings: CaseFindings | None, draws: Draws
) -> list[Row]:
    """What changes in volumes of the same noise if another class or report is asked for; nothing without such pairs.

    Args:
        sets: the features; `counterfactual` has the ids of the synthetic volumes that its volumes are paired with.
        spaces: name -> weights_sha256 and preprocessing.
        findings: of the real volumes and of the prompts.
        draws: their seed.
    """
    if sets.counterfactual is None:
        return []
    place = {case: row for row, case in enumerate(sets.synthetic.ids)}
    pairs = [(place[case], row) for row, case in enumerate(sets.counterfactual.ids) if case in place]
    first, second = ([pair[side] for pair in pairs] for side in (0, 1))
    known: dict[str, tuple[Any, Any, Any]] = {
        "class": (sets.real.classes, sets.synthetic.classes, sets.counterfactual.classes)
    }
    for name, cases in ({} if findings is None else findings.properties).items():
        asked = [
            [None if prompt is None else cases.get(prompt) for prompt in table.prompts]
            for table in (sets.synthetic, sets.counterfactual)
        ]
        known[name] = ([cases.get(case) for case in sets.real.ids], asked[0], asked[1])
    rows = []
    for space, about in spaces.items():
        start, effects, drifts = time.perf_counter(), [], {}
        for name, (of_real, before, after) in known.items():
            found = counterfactual_effect(
                name, sets.real.spaces[space], of_real, sets.synthetic.spaces[space][first],
                sets.counterfactual.spaces[space][second], [before[row] for row in first], [after[row] for row in second],
                patients=sets.real.patients, seed=draws.seed,
            )  # fmt: skip
            if isinstance(found, Drift):
                drifts[name] = {"mean_change_sd": found.value, "p": found.p}
            elif found is not None:
                effects.append(found)
        for effect in effects:
            counts = {"n_real": effect.n_real, "n_synthetic": effect.pairs}
            rows.append(
                Row(
                    f"counterfactual_{effect.name}", **(set_names(sets) | counts), features=space,
                    dim=sets.real.spaces[space].shape[1], value=effect.value, ci95=effect.ci95, floor=0.0, better="higher",
                    guards=tuple(effect.guards), seconds=round(time.perf_counter() - start, 3),
                    details={"ceiling": 1.0, "p": effect.p, "moved": effect.moved, "not_asked_for": drifts}, **about,
                )
            )  # fmt: skip
    return rows


def retrieval_rows(sets: Sets, embeddings: Embeddings | None) -> list[Row]:
    """How often a volume's own report is among the K most similar ones, by embeddings of a text-image model.

    Raises:
        DataError: no generated volume and its report have embeddings.
    """
    if embeddings is None:
        return []
    start = time.perf_counter()
    prompts = dict(zip(sets.synthetic.ids, sets.synthetic.prompts, strict=True))
    found = text_image_retrieval(*embeddings.of_pairs(prompts, "synthetic"))
    if found[0].image_to_text is None:
        logger.warning("retrieval is not judged: that needs vectors of at least %d reports", CANDIDATES_PER_K)
    own = {case: case for case in sets.real.ids if case in embeddings.real and case in embeddings.reports}
    real = text_image_retrieval(*embeddings.of_pairs(own, "real")) if own else []
    rows = []
    for at in found:
        ceiling = next((each.image_to_text for each in real if each.k == at.k), None)
        has_scale = None not in (at.image_to_text, ceiling) and ceiling != at.chance
        normalized = (at.image_to_text - at.chance) / (ceiling - at.chance) if has_scale else None  # type: ignore[operator]
        names = ("k", "texts", "text_to_image", "text_to_image_ci95")
        details = {**{name: getattr(at, name) for name in names}, "ceiling": ceiling, "normalized": normalized}
        rows.append(
            Row(
                f"retrieval_{at.k}", **(set_names(sets) | {"n_real": len(own), "n_synthetic": at.images}), features=None,
                value=at.image_to_text, ci95=at.image_to_text_ci95, floor=at.chance, better="higher",
                guards=tuple(at.guards), details=details, seconds=round(time.perf_counter() - start, 3),
            )
        )  # fmt: skip
    return [row for row in rows if row.value is not None]


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
