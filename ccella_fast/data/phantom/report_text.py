"""English reports for synthetic studies: the same facts in varying words.

They follow PI-RADS v2.1 (Turkbey et al., European Urology 76, 2019): diffusion decides in the peripheral zone and T2 in the
transition zone, and a lesion of category 5 measures at least 15 mm, one of category 4 less.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

import numpy as np

#: What a report says: everything; no category, score or likelihood; or nothing about findings.
Content = Literal["full", "no_scores", "no_findings"]


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
    "MRI prostate with T2, diffusion and contrast series. Serum PSA {psa}. Estimated gland volume {volume} ml.",
    "Indication: PSA of {psa} ng/ml. Gland volume approximately {volume} cc, PSA density {density} ng/ml/ml.",
]
# Zone and category -> how the lesion looks.
_LOOKS = {
    "PZ": {
        3: "{size} mm area of non-circumscribed, moderate T2 hypointensity with mildly low ADC, no early enhancement",
        4: "{size} mm circumscribed focus of markedly low ADC and marked signal at high b-value, moderately dark on T2",
        5: "{size} mm focus of markedly low ADC and marked signal at high b-value, homogeneously dark on T2",
    },
    "TZ": {
        3: "{size} mm area of heterogeneous T2 signal with obscured margins and mildly low ADC",
        4: "{size} mm lenticular, homogeneous, moderately hypointense T2 lesion with indistinct margins, markedly low ADC",
        5: "{size} mm lenticular, homogeneous, hypointense T2 lesion with indistinct margins and markedly low ADC",
    },
}
_LESION = [
    "In the {side} {zone}, {level}: {look} ({scores}).",
    "{Side} {zone}, {level}: {look}. {scores}.",
    "Index lesion in the {level} of the {side} {zone}: {look} ({scores}).",
]
_SCORED = re.compile(r" \(\{scores\}\)|\. \{scores\}| \(DWI 2\)|, DWI 2")  # what gives the category away in a finding
_SCORES = ["DWI {category}, T2 {category}", "DWI score {category}, T2 score {category}"]
_CLEAR = {
    1: [
        "No focal lesion. The peripheral zone shows homogeneous high T2 signal on both sides, diffusion is normal.",
        "The peripheral zone is of normal bright signal. Completely encapsulated nodules in the transition zone.",
        "No suspicious area in the peripheral zone or the transition zone.",
    ],
    2: [
        "Indistinct wedge-shaped T2 hypointensity of the peripheral zone on both sides, no focal restriction (DWI 2).",
        "Linear and wedge-shaped mild hypointensity of the peripheral zone on both sides, DWI 2. No focal lesion.",
    ],
}
_SCORE = [
    "PI-RADS {pirads}.",
    "Overall assessment: PI-RADS category {pirads}.",
    "Impression: clinically significant cancer is {likelihood} (PI-RADS {pirads}).",
    "Conclusion: PI-RADS score {pirads}, clinically significant cancer {likelihood}.",
]
_CLOSING = [
    "No extraprostatic extension. Seminal vesicles unremarkable.",
    "No enlarged pelvic lymph nodes.",
    "Bladder and rectum without abnormality.",
    "",
]
_ZONES = {"PZ": ["peripheral zone", "PZ"], "TZ": ["transition zone", "TZ"]}
_LEVELS = {"apex": ["apex", "apical third"], "mid": ["mid-gland", "midgland"], "base": ["base", "basal third"]}
_LIKELIHOOD = {1: "highly unlikely", 2: "unlikely", 3: "equivocal", 4: "likely", 5: "highly likely"}


def write_report(
    rng: np.random.Generator, findings: Findings, *, with_score: bool = True, content: Content = "full"
) -> str:
    """Write a report of a few sentences; the same state of the generator gives the same text.

    Args:
        rng: selects the wording.
        findings: the facts.
        with_score: whether the report states the PI-RADS score.
        content: what it says; the wording of what is said is the same.
    """

    def choose(choices: list[str]) -> str:
        return choices[int(rng.integers(len(choices)))]

    words = {
        "psa": findings.psa,
        "volume": findings.volume_ml,
        "density": f"{findings.psa / findings.volume_ml:.2f}",
        "pirads": findings.pirads,
        "likelihood": _LIKELIHOOD[findings.pirads],
    }
    if findings.size_mm:
        words |= {
            "zone": choose(_ZONES[findings.zone]),
            "level": choose(_LEVELS[findings.level]),
            "look": _LOOKS[findings.zone][findings.pirads].format(size=findings.size_mm),
            "scores": choose(_SCORES).format(category=findings.pirads),
            "side": findings.side,
            "Side": findings.side.capitalize(),
        }
        finding = choose(_LESION)
    else:
        finding = choose(_CLEAR[findings.pirads])
    sentences = [choose(_OPENING), finding, choose(_CLOSING), choose(_SCORE) if with_score else ""]
    if content != "full":
        sentences[1] = _SCORED.sub("", finding) if content == "no_scores" else ""
        sentences[3] = ""
    return " ".join(sentence for sentence in sentences if sentence).format(**words)
