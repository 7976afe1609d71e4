"""Findings about classes, reports, tables, geometry and language, against data sets with one property each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast import cli
from ccella_fast.data.checking.check import check, estimate_needs
from ccella_fast.data.checking.classes import check_classes
from ccella_fast.data.checking.findings import Finding, format_findings, log_findings
from ccella_fast.data.checking.geometry import check_geometry
from ccella_fast.data.checking.overview import check_before_training
from ccella_fast.data.checking.study_facts import SeriesFacts, StudyFacts
from ccella_fast.data.checking.text import check_reports, language_of
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.readers.study import Study
from ccella_fast.errors import DataError
from ccella_fast.pirads import NEGATIVE, POSITIVE
from ccella_fast.storage import write_json
from planted_defects import texture, write_clean, write_table
from study_fixtures import config, write_bert, write_dicom, write_nifti, write_studies
from training_fixtures import train_here, write_prepared


def study(name: str, pirads: list[int] | None = POSITIVE, report: str | None = "r", **values: object) -> StudyFacts:
    return StudyFacts(name, "train", None, None, pirads, report and f"{report} {name}", 20, False)._replace(**values)


def stops(facts: list[StudyFacts], variant: str, **changes: object) -> list[str]:
    """The names of what stops training."""
    return [each.name for each in check_classes(facts, config(variant=variant, **changes)) if each.severity == "stop"]


@pytest.mark.parametrize(
    ("variant", "one_class", "no_class", "no_reports"),
    [
        ("CCELLA", True, True, True), ("FIRST", True, True, True), ("L1ONLY", False, False, True),
        ("DECOUPLED", True, True, True), ("ELLAMAISI", False, False, True), ("RADMAISI", True, True, False),
        ("MAISI", False, False, False),
    ],
)  # fmt: skip
def test_what_is_pointless_depends_on_what_the_variant_reads(variant, one_class, no_class, no_reports):
    good = [study("a"), study("b", NEGATIVE), study("c", None, None)]
    assert stops(good, variant) == []
    assert stops([each._replace(pirads=NEGATIVE) for each in good], variant) == ["one_class"] * one_class
    assert stops([each._replace(pirads=None) for each in good], variant) == ["no_class"] * no_class
    assert stops([each._replace(report=None) for each in good], variant) == ["no_reports"] * no_reports
    assert "too_few_studies" in stops(good[:1], variant)


def test_only_the_studies_that_are_trained_on_count():
    held_out = study("b", NEGATIVE, split="test")
    assert stops([study("a"), study("c"), held_out], "CCELLA") == ["one_class"]
    other = study("b", NEGATIVE, dataset="other")
    tagged = [study("a", dataset="mine"), study("c", dataset="mine"), other]
    assert stops(tagged, "CCELLA") == [] and stops(tagged, "CCELLA", data__dataset="mine") == ["one_class"]


@pytest.mark.parametrize(("variant", "predicts"), [("CCELLA", True), ("DECOUPLED", False), ("MAISI", False)])
def test_a_class_is_learned_only_from_studies_with_a_report(variant, predicts):
    """One class without reports: the head would see the other class alone."""
    half = [study("a"), study("b"), study("c", NEGATIVE, None), study("d", NEGATIVE, None)]
    assert stops(half, variant) == ["one_class"] * predicts
    (found, *_) = [each for each in check_classes(half, config(variant=variant)) if each.severity == "stop"] or [None]
    assert found is None or found.message == (
        "training studies with the class PI-RADS 3-5: all 2 that have one and a report; with PI-RADS 1-2: none"
    )
    apart = [study("a", None), study("b", POSITIVE, None), study("c", NEGATIVE, None)]
    assert stops(apart, variant) == ["no_class"] * (variant == "CCELLA")


def test_a_class_loss_without_weight_needs_no_classes():
    facts = [study("a"), study("b")]
    assert stops(facts, "CCELLA") == ["one_class"]
    assert stops(facts, "CCELLA", training__text_class_pred_weight=0.0) == []


def test_rare_classes_missing_values_and_synthetic_studies_are_warned_of():
    def warned(facts: list[StudyFacts]) -> set[str]:
        return {each.name for each in check_classes(facts, config(variant="CCELLA")) if each.severity == "warning"}

    many = [study(f"a{n}", NEGATIVE if n % 2 else POSITIVE) for n in range(30)]
    assert warned(many) == set()
    assert warned([each._replace(pirads=NEGATIVE if n < 2 else POSITIVE) for n, each in enumerate(many)]) == {
        "rare_class"
    }
    assert warned([each._replace(report=None) if n < 16 else each for n, each in enumerate(many)]) == {"few_reports"}
    assert warned([each._replace(pirads=None) if n < 16 else each for n, each in enumerate(many)]) == {"few_classes"}
    assert warned([*many, study("t", split="test", synthetic=True)]) == {"synthetic_held_out"}
    assert warned([each._replace(synthetic=True) for each in [*many, study("t", split="test")]]) == set()


@pytest.mark.parametrize("name", ["study.csv", "Studies.xlsx", "Studies.csv", "studies.tsv", "clinical_data.xlsx"])
def test_a_table_with_another_name_is_named(tmp_path: Path, name: str, caplog):
    studies = write_studies(tmp_path / "studies")
    (studies / "studies.csv").rename(studies / name)
    (studies / "LICENSE.txt").write_text("words")
    caplog.set_level("INFO", "ccella_fast")
    prepare(studies, tmp_path / "out", config())
    (said,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("no_table: ")]
    assert f"; {name} in it looks like the table" in said and "LICENSE" not in said


def test_no_table_at_all_and_studies_that_it_does_not_list(tmp_path: Path, caplog):
    studies = write_studies(tmp_path / "studies")
    table = studies / "studies.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]) + "\n")
    prepare(studies, tmp_path / "out", config())
    assert (
        "not_in_table: studies that are not in the table, and so have neither report nor class and the split train: 1 of 3"
        in caplog.text
        and "studies: case2" in caplog.text
    )
    table.unlink()
    caplog.clear()
    prepare(studies, tmp_path / "out", config())
    assert "no_table: there is no studies.csv" in caplog.text and "looks like" not in caplog.text


@pytest.mark.parametrize(
    ("change", "is_judged"),
    [
        (lambda text: text, True),
        (lambda text: text.replace(",", ";"), False),
        (lambda text: text.replace(",2,", ",PI-RADS 2,"), False),
    ],
    ids=["sound", "semicolons", "one cell"],
)
def test_classes_and_reports_of_a_damaged_table_are_not_called_missing(change, is_judged: bool, tmp_path: Path):
    table = write_studies(tmp_path / "studies") / "studies.csv"
    table.write_text(change(table.read_text()))
    check(tmp_path / "studies", config(variant="RADMAISI"), out=tmp_path / "out", headers_only=True, workers=1)
    names = {each["name"] for each in json.loads((tmp_path / "out" / "check.json").read_text())["findings"]}
    assert ({"class_balance", "reports", "one_class"} <= names) is is_judged
    assert ("table" in names) is not is_judged and ("defect" in names) is not is_judged
    assert not {"no_class", "no_reports"} & names


def test_training_does_not_start_without_reports_and_says_how_it_would(tmp_path: Path, caplog):
    """S2: a folder without table was prepared and trained on without a word."""
    manifest = load_manifest(write_prepared(tmp_path / "prepared"))
    empty = [case.model_copy(update={"text_isnull": 1, "pirads": None}) for case in manifest.cases]
    pointless = manifest.model_copy(update={"cases": empty})
    check_before_training(manifest, config(variant="CCELLA"), [])
    with pytest.raises(DataError) as caught:
        check_before_training(pointless, config(variant="CCELLA"), [])
    said = str(caught.value)
    assert len(said.splitlines()) <= 5 and "--allow no_class --allow no_reports" in said
    with pytest.raises(DataError, match="no_reports"):
        check_before_training(pointless, config(variant="CCELLA"), ["no_class"])
    check_before_training(pointless, config(variant="CCELLA"), ["no_class", "no_reports"])
    assert "no_class" in caplog.text
    check_before_training(pointless, config(variant="MAISI"), [])


def test_a_class_loss_that_no_study_enters_is_not_a_number(tmp_path: Path):
    """The average over no studies is null in metrics.jsonl, not 0."""
    data = write_prepared(tmp_path / "prepared")
    manifest = json.loads((data / "manifest.json").read_text())
    assert train_here(tmp_path / "with", data, max_train_steps=1) == 0
    for case in manifest["cases"]:
        case["pirads"] = None
    write_json(data / "manifest.json", manifest)
    assert train_here(tmp_path / "without", data, max_train_steps=1) == 0
    with_classes, without = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss_class"]
        for name in ("with", "without")
    )
    assert with_classes > 0 and without is None


def series(spacing=(0.5, 0.5, 3.0), shape=(384, 384, 24), low=0.0, high=600.0) -> SeriesFacts:
    return SeriesFacts(shape, spacing, "x", low, high)


@pytest.mark.parametrize(
    ("other", "names"),
    [
        (series(), set()),
        (series(spacing=(1.2, 1.2, 3.0), shape=(160, 160, 24)), {"other_spacing"}),
        (series(spacing=(0.5, 0.5, 6.0), shape=(384, 384, 12)), {"other_spacing", "thick_slices"}),
        (series(shape=(140, 384, 24)), {"small_field"}),
        (series(shape=(384, 384, 8)), {"small_field"}),
        (series(shape=(800, 800, 24)), {"large_field"}),
        (series(high=60_000.0), {"other_intensities"}),
        (series(high=0.5), {"other_intensities"}),
        (series(low=-32768.0), {"negative_intensities"}),
    ],
    ids=["same", "coarse", "thick", "narrow", "short", "wide", "high", "low", "negative"],
)
def test_geometry_and_intensities_against_grid_and_median(other: SeriesFacts, names: set[str]):
    """On the default grid, 128 x 128 x 72 mm; one study of seven differs."""
    settings = config(data__dim=[256, 256, 128], data__spacing=[0.5, 0.5, 0.5625])
    facts = [study(f"a{n}", series={"t2w": series()}) for n in range(6)] + [study("b", series={"t2w": other})]
    found = check_geometry(facts, settings)
    warned = {each.name: each.studies for each in found if each.severity == "warning"}
    assert set(warned) == names and all(studies == ("b",) for studies in warned.values())
    assert [each.name for each in found if each.severity == "info"] == ["interpolated_slices"]


LANGUAGES = {
    "English": "There is a lesion in the left peripheral zone with no sign of extension. The right side is normal.",
    "Dutch": "Er is een laesie van 12 mm in de perifere zone links. Geen aanwijzing voor doorgroei. Rechts is niet afwijkend.",
    "German": "In der peripheren Zone links zeigt sich eine Läsion von 12 mm. Keine Hinweise auf Durchbruch, rechts nicht.",
    "French": "Il y a une lésion de 12 mm dans la zone périphérique gauche, sans extension. Les autres ne sont pas atteintes.",
    "Swedish": "I vänster perifer zon finns en förändring på 12 mm. Ingen växt utanför kapseln. Höger sida är utan fynd.",
    "Danish or Norwegian": "I venstre perifere zone ses en forandring på 12 mm uden tegn på vækst. Højre side er normal.",
    "Polish": "W strefie obwodowej po lewej stronie widoczna zmiana 12 mm, bez cech naciekania. Węzły nie są powiększone.",
    "Czech": "V periferní zóně vlevo je ložisko 12 mm bez známek šíření. Vpravo bez nálezu, uzliny nejsou zvětšené.",
    "Turkish": "Sol periferik zonda 12 mm lezyon izlendi. Sağ tarafta patoloji saptanmadı ve lenf nodu yok.",
    "Finnish": "Eturauhasen vasemmalla puolella on 12 mm muutos ilman kapselin ylitystä. Oikealla ei ole poikkeavaa.",
    "Hungarian": "A bal oldali perifériás zónában 12 mm elváltozás látható. Jobb oldalon nem látható kóros jel.",
    "Romanian": "În zona periferică stânga se observă o leziune de 12 mm fără extensie. În dreapta nu este modificare.",
    "not in English": "Kushoto kuna uvimbe wenye ukubwa mdogo katika eneo pembeni, hakuna dalili nyingine; kulia hali kawaida"
    " kabisa, tezi limekuwa kubwa kidogo.",
    "not in Latin letters": "В левой периферической зоне определяется очаг размером 12 мм. PI-RADS 4.",
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_language_of_a_report(language: str):
    assert language_of(LANGUAGES[language]) == language


@pytest.mark.parametrize(
    ("report", "language"),
    [
        ("PI-RADS 4 Läsion links apikal, 12 mm, T2w hypointens, ADC erniedrigt.", "German"),
        ("Lesión en zona periférica izquierda, PI-RADS 4", "Spanish"),
        ("Lésion PI-RADS 4 zone périphérique droite", "French"),
        ("PI-RADS 4 lesion left apex, 12 mm, PZ, abuts the capsule", "English"),
        (
            "Volume 45 cc. PSA 5.6. Index lesion: midline apex PZ, 12 mm, T2 score 4, DWI score 4, DCE positive, PI-RADS 4."
            " Extraprostatic extension: none. Seminal vesicles: normal. Lymph nodes: normal. Bones: normal.",
            "English",
        ),
    ],
)
def test_the_language_of_notes_without_sentences(report: str, language: str):
    assert language_of(report) == language


def test_short_reports_and_abbreviations_have_no_language():
    assert language_of("PI-RADS 4, 12 mm PZ left.") in (None, "English")
    assert language_of("T2: 12 mm. DWI 4. PSA 7.") in (None, "English")


def test_real_reports(real_data: Path):
    dutch = [path.read_text() for path in sorted((real_data / "text").glob("*-nl-*.txt"))]
    assert [language_of(text) for text in dutch] == ["Dutch"] * 2
    english = json.loads((real_data / "text" / "prostate-mri-report-en-hl7lt.json").read_text())
    assert language_of(json.dumps(english)) == "English"


def test_reports_in_another_language_unknown_tokens_and_truncation_are_numbers_only(tmp_path: Path):
    encoder = write_bert(tmp_path / "bert")
    settings = config(variant="CCELLA", encoder=encoder, text__max_length=12)
    texts = {
        "en": "lesion of 5 mm in the left zone .",
        "nl": LANGUAGES["Dutch"],
        "long": "lesion of 5 mm in the zone . " * 3,
    }
    studies = [Study(name, {}, report=text) for name, text in texts.items()]
    found = {each.name: each for each in check_reports(studies, settings)}
    assert found["report_language"].studies == ("nl",) and "1 Dutch" in found["report_language"].message
    assert found["unknown_tokens"].studies == ("nl",) and found["truncated_reports"].studies == ("nl", "long")
    assert "laesie" not in str(found)
    nowhere = config(variant="CCELLA", text__encoder="nobody/nothing")
    assert "no_tokenizer" in {each.name for each in check_reports(studies, nowhere)}
    assert check_reports(studies, config(variant="MAISI")) == []


def test_needs_are_those_of_preparation_and_training(tmp_path: Path):
    settings = config(variant="MAISI")
    needs, found = estimate_needs(settings, tmp_path, 10, prepared=False)
    assert found == [] and "parameters" in dict(needs)["training: memory"]
    huge = config(variant="MAISI", data__dim=[2048, 2048, 1024])
    _, found = estimate_needs(huge, tmp_path, 10**6, prepared=False)
    assert {each.name for each in found} == {"disk_space", "memory"}
    done, found = estimate_needs(settings, tmp_path, 10**9, prepared=True)
    assert found == [] and dict(done)["preparing: disk"] == "done"


def test_headers_are_checked_without_voxels(tmp_path: Path):
    """A cut file passes, a wrong header does not, DICOM is read completely."""
    rows = write_clean(tmp_path / "studies", 5)
    for name, values in (("cut", texture(50)), ("flat", texture(51)[:, :, :1])):
        path = write_nifti(tmp_path / "studies" / name / "t2w.nii.gz", values)
        rows[name] = ["train", "1", f"lesion of 5 mm in the left zone . no {name}"]
    path = tmp_path / "studies" / "cut" / "t2w.nii.gz"
    path.write_bytes(path.read_bytes()[:-2000])
    write_dicom(tmp_path / "studies" / "slices" / "t2w", texture(52))
    write_table(tmp_path / "studies", rows)

    def broken(**options: bool) -> set[str]:
        check(tmp_path / "studies", config(), out=tmp_path / "out", workers=1, **options)
        found = json.loads((tmp_path / "out" / "check.json").read_text())["findings"]
        return {name for each in found if each["severity"] == "error" for name in each["studies"]}

    assert broken(headers_only=True) == {"flat"} and broken() == {"flat", "cut"}


def test_the_command_writes_only_where_it_is_told(tmp_path: Path, capsys, monkeypatch):
    studies = write_studies(tmp_path / "studies", 6)
    write_json(tmp_path / "config.json", config().dump())
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    arguments = ["check", "--data", str(studies), "--config", str(tmp_path / "config.json"), "--workers", "1"]
    assert cli.main(arguments) == 0 and sorted(tmp_path.rglob("*")) == before
    assert "studies checked: 6; nothing has to be corrected" in capsys.readouterr().out
    assert cli.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "check.html").read_text()
    assert "http:" not in page and "https:" not in page and "<script" not in page and "PI-RADS 1-2" in page
    (studies / "case1" / "t2w.nii.gz").write_bytes(b"")
    assert cli.main(arguments) == 3
    assert cli.main([*arguments, "--allow", "leakage"]) == 3  # a defect cannot be allowed
    assert cli.main([*arguments, "--allow", "defect"]) == 2
    assert cli.main(["check", "--data", str(tmp_path / "none")]) == 3


def test_table_and_log_are_bounded(caplog):
    many = [Finding("defect", "error", f"number {n}", "fix", (f"s{n}",), "/a\nb") for n in range(500)]
    text = format_findings([*many, Finding("x", "warning", "y", studies=tuple(map(str, range(99))))])
    assert len(text.splitlines()) < 30 and "490 more" in text and "and 91 more" in text
    log_findings([Finding(f"w{n}", "warning", "why") for n in range(50)])
    assert len(caplog.records) == 13 and "38 more" in caplog.text
