"""The PI-RADS score of a report: phrases with the score that a person reads in them, None where it is not certain."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast.data.importing.pirads_text import read_pirads

PHRASES = [
    ("72 year old man with a PI-RADS 4 lesion", 4),
    ("extends outside the capsule, PI-RADS 5", 5),
    ("PI-RADS 5 lesion extending from apex to base", 5),
    ("Outside MRI: PI-RADS 4", None),
    ("Old MRI PI-RADS 4, current MRI PI-RADS 2", 2),
    ("Score PI-RADS global : 4", 4),
    ("Clasificación PI-RADS v2.1: 3", 3),
    ("Antecedentes: PI-RADS 5 en 2018.\nHallazgos: PI-RADS 2.", 2),
    ("PI-RADS-Score 2, keine PI-RADS 3 Läsion", 2),
    ("Beoordeling: PI-RADS categorie 3", 3),
    ("PI-RADS 4 ou 5", None),
    ("PI-RADS 4 oder 5", None),
    ("PI-RADS 4 of 5", None),
    ("wahrscheinlich PI-RADS 4", None),
    ("vermutlich PI-RADS 3", None),
    ("PI-RADS 4", 4),
    ("PIRADS 5", 5),
    ("PI RADS 3", 3),
    ("PI-RADS: 2", 2),
    ("PI-RADS v2.1 category 4", 4),
    ("PI-RADS v2.1 score: 5", 5),
    ("PI-RADS version 2.1 assessment category 3", 3),
    ("PI-RADS (v2.1): 4", 4),
    ("PI-RADS 4/5", 4),
    ("PI-RADS score 4 out of 5", 4),
    ("PI-RADS IV", 4),
    ("PIRADS V lesion", 5),
    ("PIRADS4", 4),
    ("PI-RADS-4-Läsion", 4),
    ("PI-RADS™ v2.1 assessment: 4 - High", 4),
    ("PI‑RADS 4", 4),
    ("pirads 3", 3),
    ("PI-RADS score of 4", 4),
    ("Overall PI-RADS assessment category is 5.", 5),
    ("Lesion 1: PI-RADS 3. Lesion 2: PI-RADS 5. Lesion 3: PI-RADS 4.", 5),
    ("PI-RADS 3 and 4 lesions", 4),
    ("PI-RADS 4, previously PI-RADS 3", 4),
    ("PI-RADS 4 (previously 3)", 4),
    ("Previously PI-RADS 5, now PI-RADS 3.", 3),
    ("Prior MRI: PI-RADS 4.", None),
    ("Comparison: MRI 2019, PI-RADS 5.\nFindings: PI-RADS 2.", 2),
    ("Clinical history: PI-RADS 4 lesion in 2020. Findings: normal gland. Impression: PI-RADS 2.", 2),
    ("PI-RADS 3-4", None),
    ("PI-RADS 3 to 4", None),
    ("PI-RADS 3/4", None),
    ("PI-RADS 4 or 5", None),
    ("PI-RADS 3–4 lesion", None),
    ("No PI-RADS 4 or 5 lesion.", None),
    ("No PI-RADS 4 or 5 lesion. PI-RADS 2.", 2),
    ("No lesion with PI-RADS ≥ 3. Overall PI-RADS 2", 2),
    ("No suspicious lesion (PI-RADS 1).", 1),
    ("No focal lesion, PI-RADS 2.", 2),
    ("No extraprostatic extension. PI-RADS 4.", 4),
    ("PI-RADS 1: very low, 2: low, 3: intermediate, 4: high, 5: very high", None),
    (
        "Lesion PI-RADS 3. PI-RADS 1: very low; PI-RADS 2: low; PI-RADS 3: intermediate; PI-RADS 4: high; "
        "PI-RADS 5: very high.",
        3,
    ),
    (
        "PI-RADS 1 - very low\nPI-RADS 2 - low\nPI-RADS 3 - intermediate\nPI-RADS 4 - high\nPI-RADS 5 - very high\n",
        None,
    ),
    ("Scored with PI-RADS v2.1.", None),
    ("PI-RADS 2.1", None),
    ("PI-RADS v2", None),
    ("According to PI-RADS 2.", None),
    ("Assessed according to PI-RADS 2. Left lesion PI-RADS 4.", 4),
    ("At least PI-RADS 3", None),
    ("PI-RADS >= 3", None),
    ("PI-RADS 3 or higher", None),
    ("PI-RADS 4?", None),
    ("Possibly PI-RADS 3", None),
    ("PI-RADS 5 mm lesion", None),
    ("PI-RADS 4, 12 mm", 4),
    ("VI-RADS 3", None),
    ("LI-RADS 4. PI-RADS 2", 2),
    ("PI-RADS X", None),
    ("PI-RADS 6", None),
    ("PI-RADS 1 2 3 4 5", None),
    ("Known PI-RADS 4 lesion", None),
    ("If PI-RADS 3, biopsy", None),
    ("PI-RADS-Kategorie 4", 4),
    ("PI-RADS Klassifikation: 5", 5),
    ("Keine PI-RADS 4 oder 5 Läsion", None),
    ("Kein Hinweis auf PI-RADS 4 Läsion. PI-RADS 2.", 2),
    ("Vorbefund: PI-RADS 3. Aktuell PI-RADS 4.", 4),
    ("score PI-RADS à 4", None),
    ("Lésion PI-RADS 4 du lobe gauche", 4),
    ("Catégorie PI-RADS : 3", 3),
    ("Pas de lésion PI-RADS 4", None),
    ("Lesión PI-RADS 5", 5),
    ("Categoría PI-RADS 4", 4),
    ("Sin lesiones PI-RADS 4", None),
    ("(PIRADS 5). Afwijking nr. 2 (PIRADS 2).", 5),
    ("Geen PI-RADS 4 laesie.", None),
    ("PI-RADS score: 4", 4),
    ("eerder PI-RADS 3, nu PI-RADS 4", 4),
    ("Upgraded from PI-RADS 3 to PI-RADS 4", 4),
    ("upgraded from PI-RADS 3 to 4", None),
    ("PI-RADS 3+1=4", None),
    ("PI-RADS of lesion 2: 5. Lesion 1 PI-RADS 3.", None),
    ("PI-RADS 4 on prior MRI", None),
    ("PI-RADS 4 lesion, unchanged from prior.", 4),
    ("A score of 4 according to PI-RADS v2.1", None),
    ("PI-RADS 3a", 3),
    ("PI-RADS 4 lesion is not seen", None),
    ("PI-RADS category (v2.1): 4", 4),
    ("Lesion no. 2 PI-RADS 4", 4),
    ("lesion no 2 PI-RADS 4", 4),
    ("No change in the PI-RADS 4 lesion", 4),
    ("PI-RADS\n5", 5),
    ("PI-RADS 4 lesion without extraprostatic extension", 4),
    ("PI-RADS 4 lesion does not extend beyond the capsule", 4),
    ("PI-RADS (1-5): 4", 4),
    ("on a scale of 1 to 5, PI-RADS 4", 4),
    ("PI-RADS = 4", 4),
    ("PI-RADS category 4 lesion measuring 15 mm, PI-RADS category 3 lesion", 4),
    ("Two PI-RADS 3 lesions", 3),
    ("PI-RADS: n/a", None),
    ("PI-RADS 4.1", None),
    ("PI-RADS 3 of 4", None),
    ("T2 score 5, DWI score 4", None),
    ("PI-RADS T2: 4, DWI: 5", None),
    ("PI-RADS 3 bis 4", None),
    ("PI-RADS 4 von 5", 4),
    ("PI-RADS 4 sur 5", 4),
    ("PI-RADS 2 score 4", 4),
    ("PI-RADS category: PI-RADS 4", 4),
    ("2019: PI-RADS 4. 2021: PI-RADS 3.", None),
    ("Lesion #1: PI-RADS 4; #2: 5", None),
    ("PI-RADS 3, 5 lesions in total", None),
    ("PI-RADS 5, 2 lesions", 5),
    ("PI-RADS 3 in 2020, now PI-RADS 4", 4),
    ("PI-RADS was 4 in 2019 and is now 3", None),
    ("status post ablation of a PI-RADS 5 lesion", None),
    ("No PI-RADS 3, 4 or 5 lesions", None),
    ("PI-RADS: lesion 1: 4, lesion 2: 5", None),
    ("not PI-RADS 4 but PI-RADS 3", None),
    ("PI-RADS 3 (lesion 1), 5 (lesion 2)", None),
]


@pytest.mark.parametrize(("phrase", "score"), PHRASES)
def test_score_of_a_phrase(phrase: str, score: int | None):
    assert read_pirads(phrase).score == score


def test_the_table_can_fail():
    """A parser that takes the first or the last digit after the name would be wrong in much of the table."""
    import re

    wrong = 0
    for phrase, score in PHRASES:
        digits = re.findall(r"(?i)pi.?rads.*?([1-5])", phrase)
        wrong += (int(digits[0]) if digits else None) != score
    assert wrong > 40 and len(PHRASES) > 100


def test_the_reason_never_repeats_the_report():
    for phrase, _ in PHRASES:
        assert "kanarie" not in read_pirads(f"kanarie {phrase} kanarie").reason


def test_the_examples_of_the_documentation():
    page = (Path(__file__).resolve().parents[2] / "docs" / "how-to" / "import.md").read_text(encoding="utf-8")
    table = page.split("| report | score |")[1].split("\n\n")[0]
    examples = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    assert len(examples) > 15
    for phrase, score in examples:
        assert (read_pirads(phrase).score is None) == score.startswith("empty"), phrase
        assert str(read_pirads(phrase).score or "empty") == score.split(":")[0], phrase


def test_real_reports(real_data: Path):
    for name in ("nl-1", "nl-2"):
        assert read_pirads((real_data / "text" / f"prostate-mri-report-{name}.txt").read_text()).score == 5
    report = json.loads((real_data / "text" / "prostate-mri-report-en-hl7lt.json").read_text())
    assert read_pirads(report["conclusion"]).score == 5
    assert read_pirads("\n".join(report["sections"].values())).score == 5
    assert read_pirads("\n".join(report["notes"])).score is None  # "No focal PI-RADS lesion", scores of sequences alone
