"""English reports for synthetic studies: the same facts in varying words."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Findings(NamedTuple):
    """The properties of a phantom that its report states.

    Without a lesion, `zone`, `side` and `level` are empty and `size_mm` is 0.
    """

    volume_ml: int
    psa: float
    pirads: int
    zone: str  # PZ or TZ
    side: str  # the patient's left or right
    level: str  # apex, mid or base
    size_mm: int


_OPENING = [
    "Multiparametric MRI of the prostate. PSA {psa} ng/ml. Prostate volume {volume} ml.",
    "Clinical information: PSA {psa} ng/mL. The prostate measures {volume} cc.",
    "MRI prostate, axial T2. Serum PSA {psa}. Estimated gland volume {volume} ml.",
    "Indication: PSA of {psa} ng/ml. Gland volume approximately {volume} cc, PSA density {density}.",
]
_LESION = [
    "There is a {size} mm focus of low T2 signal in the {side} {zone}, at the level of the {level}.",
    "A {size} mm hypointense lesion is seen in the {zone} on the {side}, {level}.",
    "{Side} {zone}, {level}: ill-defined dark area on T2, {size} mm in largest diameter.",
    "Suspicious finding in the {level} of the {side} {zone} measuring {size} mm, homogeneous and moderately hypointense.",
]
_CLEAR = [
    "No focal lesion. The peripheral zone shows homogeneous high signal on both sides.",
    "The peripheral zone is of normal bright signal. The transition zone shows benign hyperplasia only.",
    "No suspicious area in the peripheral zone or the transition zone.",
    "Heterogeneous transition zone with well-circumscribed nodules; no area suspicious for cancer.",
]
_SCORE = [
    "PI-RADS {pirads}.",
    "Overall assessment: PI-RADS category {pirads}.",
    "Impression: {suspicion} suspicion of clinically significant cancer (PI-RADS {pirads}).",
    "Conclusion: PI-RADS score {pirads}, {suspicion} likelihood.",
]
_CLOSING = [
    "No extraprostatic extension. Seminal vesicles unremarkable.",
    "No enlarged pelvic lymph nodes.",
    "Bladder and rectum without abnormality.",
    "",
]
_ZONES = {"PZ": ["peripheral zone", "PZ"], "TZ": ["transition zone", "TZ"]}
_LEVELS = {"apex": ["apex", "apical third"], "mid": ["mid-gland", "midgland"], "base": ["base", "basal third"]}
_SUSPICION = {1: "very low", 2: "low", 3: "equivocal", 4: "high", 5: "very high"}


def write_report(rng: np.random.Generator, findings: Findings, *, with_score: bool = True) -> str:
    """Write a report of a few sentences; the same state of the generator gives the same text.

    Args:
        rng: selects the wording.
        findings: the facts.
        with_score: whether the report states the PI-RADS score.
    """

    def choose(choices: list[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    words = {
        "psa": findings.psa,
        "volume": findings.volume_ml,
        "density": f"{findings.psa / findings.volume_ml:.2f}",
        "pirads": findings.pirads,
        "suspicion": _SUSPICION[findings.pirads],
    }
    finding = choose(_CLEAR)
    if findings.size_mm:
        words |= {
            "zone": choose(_ZONES[findings.zone]),
            "level": choose(_LEVELS[findings.level]),
            "size": findings.size_mm,
        }
        words |= {"side": findings.side, "Side": findings.side.capitalize()}
        finding = choose(_LESION)
    sentences = [choose(_OPENING), finding, choose(_CLOSING), choose(_SCORE) if with_score else ""]
    return " ".join(sentence for sentence in sentences if sentence).format(**words)
