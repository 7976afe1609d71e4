"""The gland's volume as a report states it, against the volume of the segmented gland. Only the number leaves this module."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ccella_fast.evaluation.conditions import Agreement, agreement

BOUNDS_CC = (5.0, 500.0)  # of a prostate; other numbers are something else

_NUMBER = r"\d{1,3}(?:[.,]\d{1,2})?"
_VOLUME = re.compile(
    rf"(?<![\w.,/])({_NUMBER})(?:\s*(?:-|\N{{EN DASH}}|to|tot|bis)\s*({_NUMBER}))?[\s-]*"
    r"(?:cc|ccm|mls?|cm\s?\^?3|cm³|cubic[\s-]cent[a-z]+|millilit[a-z]+)(?![\w/²³^])",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"(?<=[.;!?])\s+|\n\s*\n")
_GLAND = re.compile(r"prostat|gland|volum|klier|dr[uü]se|\bvol\b", re.IGNORECASE)
# What else has a volume: other organs and parts of the gland before the number, and agents also after it.
_ELSE = re.compile(
    r"contrast|gadol|gadov|gadob|dotarem|prohance|residu|bladder|blaas|blase|void|lesion|laesie|l[aä]sion|nodul|tumou?r|cyst|"
    r"zone|zonal|\b[tp]z\b|adenoma|catheter|balloon|gel\b|saline|vesic|previous|prior|earlier|formerly|voorheen|zuvor",
    re.IGNORECASE,
)
_AGENT = re.compile(
    r"contrast|gadol|gadov|gadob|dotarem|prohance|saline|\bi\.?v\b|residu|gel\b|of urine", re.IGNORECASE
)


def stated_volume(report: str) -> float | None:
    """The volume of the prostate in cc that a report states as "NN cc", "NN ml" or "NN cm3"; None if it states none or several.

    A range counts as its middle. Volumes of lesions, zones, the bladder and contrast agents, and earlier ones, are left out.
    """
    found = set()
    for sentence in _SENTENCE.split(report):
        for match in _VOLUME.finditer(sentence):
            before, after = (
                sentence[max(0, match.start() - 60) : match.start()],
                sentence[match.end() : match.end() + 25],
            )
            earlier = [other.end() for other in _VOLUME.finditer(sentence, 0, match.start())]
            clause = before[-(match.start() - earlier[-1]) :] if earlier else before  # what follows the number before
            if _ELSE.search(clause) or _AGENT.search(after) or not _GLAND.search(sentence):
                continue
            numbers = [float(group.replace(",", ".")) for group in match.groups() if group]
            value = sum(numbers) / len(numbers)
            if BOUNDS_CC[0] <= value <= BOUNDS_CC[1]:
                found.add(value)
    return found.pop() if len(found) == 1 else None


class VolumeAgreement(NamedTuple):
    """Segmented against stated volumes of generated glands.

    Attributes:
        agreement: rank correlation with its floor (prompts in random order) and ceiling (real cases); its value is None below
            three volumes on one side.
        bias_cc: mean of segmented minus stated volumes (Bland and Altman 1986); None without any.
        limits_cc: bias plus and minus 1.96 standard deviations; None below two volumes.
        real_bias_cc: the same of real cases.
        real_limits_cc: likewise.
    """

    agreement: Agreement
    bias_cc: float | None
    limits_cc: tuple[float, float] | None
    real_bias_cc: float | None
    real_limits_cc: tuple[float, float] | None


def volume_agreement(
    stated: Sequence[float | None],
    segmented: Sequence[float | None],
    real_stated: Sequence[float | None],
    real_segmented: Sequence[float | None],
    *,
    seed: int = 0,
) -> VolumeAgreement:
    """Compare the volumes that reports state with those of the segmented glands; see `VolumeAgreement`.

    Args:
        stated: of the prompts' reports, in cc; None where a report states none.
        segmented: of the generated glands, in cc; None where no gland was found.
        real_stated: of real cases' reports.
        real_segmented: of their glands.
        seed: of random orders and resamples.
    """
    pairs = _pairs(stated, segmented)
    real = _pairs(real_stated, real_segmented)
    if min(len(set(pairs[:, 0])), len(set(real[:, 0]))) < 3:
        guards = ["few", "one_class"]
        compared = Agreement(
            "gland_volume", "spearman", None, None, None, None, None, None, None, None, len(real), len(pairs), guards
        )
    else:
        rng = np.random.default_rng(seed)
        compared = agreement(
            "gland_volume", pairs[:, 1:], pairs[:, 0].tolist(), real[:, 1:], real[:, 0].tolist(), rng=rng
        )
    return VolumeAgreement(compared, *_bland_altman(pairs), *_bland_altman(real))


def _pairs(stated: Sequence[float | None], segmented: Sequence[float | None]) -> np.ndarray:
    known = [pair for pair in zip(stated, segmented, strict=True) if None not in pair]
    return np.array(known, dtype=np.float64).reshape(-1, 2)


def _bland_altman(pairs: np.ndarray) -> tuple[float | None, tuple[float, float] | None]:
    differences = pairs[:, 1] - pairs[:, 0]
    if not len(differences):
        return None, None
    bias = float(differences.mean())
    if len(differences) < 2:
        return bias, None
    half = 1.96 * float(differences.std(ddof=1))
    return bias, (bias - half, bias + half)
