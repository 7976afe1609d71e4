"""One pass over a data set finds every planted defect, and nothing in clean studies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ccella_fast.config import Config
from ccella_fast.data.checking.check import check
from ccella_fast.data.preparation.prepare import prepare
from planted_defects import (
    ENTRIES,
    IMAGES,
    plant_in_features,
    plant_in_folder,
    plant_in_list,
    write_clean,
    write_table,
)
from study_fixtures import config, write_bert

ALARMS = ("error", "stop", "warning")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Config:
    encoder = write_bert(tmp_path_factory.mktemp("bert"))
    return config(variant="CCELLA", encoder=encoder, text__max_length=32, data__dim=[48, 48, 16])


def check_into(out: Path, data: Path, settings: Config, **options: object) -> tuple[int, list[dict]]:
    """The exit code, and the findings of check.json."""
    code = check(data, settings, out=out, workers=1, **options)  # type: ignore[arg-type]
    assert (out / "check.html").read_text().startswith("<!DOCTYPE html>")
    return code, json.loads((out / "check.json").read_text())["findings"]


def test_every_defect_of_a_folder_is_found_in_one_pass(tmp_path, settings, capsys):
    """Seventeen defects of images, three of the table, a leak."""
    expected = plant_in_folder(tmp_path / "studies")
    code, findings = check_into(tmp_path / "out", tmp_path / "studies", settings)
    assert code == 3
    found = {(study, each["name"]) for each in findings for study in each["studies"]}
    assert expected.items() <= found and len(expected) == len(IMAGES) + 2
    table = [each for each in findings if each["path"] and each["path"].endswith("studies.csv")]
    assert [each["name"] for each in table] == ["defect"] and "pirads" in table[0]["field"]
    alarmed = {study for each in findings if each["severity"] in ALARMS for study in each["studies"]}
    assert {study for study in alarmed if study.startswith("clean")} == {"clean0"}  # whose copy is in the test split
    said = capsys.readouterr().out
    assert len(said.splitlines()) < 90 and "leakage" in said


def test_every_defect_of_a_list_is_found_in_one_pass(tmp_path, settings):
    listed, fields = plant_in_list(tmp_path / "studies")
    code, findings = check_into(tmp_path / "out", listed, settings)
    assert code == 3
    errors = [each for each in findings if each["severity"] == "error"]
    found = {name for name, field in fields.items() if any((each["field"] or "").startswith(field) for each in errors)}
    assert found == set(ENTRIES)
    assert any("have the id 'clean0'" in each["message"] for each in errors)
    assert len(errors) == len(ENTRIES) + 1


def test_every_defect_of_prepared_features_is_found_in_one_pass(tmp_path, settings):
    listed, bad = plant_in_features(tmp_path, settings.model_copy())
    code, findings = check_into(
        tmp_path / "out", listed, settings, embedding_base_dir=tmp_path / "emb", allow=["leakage"]
    )
    errors = [each for each in findings if each["severity"] == "error" and each["path"].endswith("text.npy")]
    assert code == 3 and {Path(each["path"]).parent.name for each in errors} == bad


def test_a_table_that_is_not_utf_8_and_a_grid_that_does_not_divide(tmp_path, settings):
    """Both are found although neither the table nor the grid can be used."""
    rows = write_clean(tmp_path / "studies", 3)
    write_table(tmp_path / "studies", rows)
    table = tmp_path / "studies" / "studies.csv"
    table.write_bytes(table.read_bytes().replace(b"zone", b"z\xf6ne"))
    grid = settings.model_copy(update={"data": settings.data.model_copy(update={"dim": [42, 48, 16]})})
    code, findings = check_into(tmp_path / "out", tmp_path / "studies", grid)
    errors = {each["name"]: each for each in findings if each["severity"] == "error"}
    assert code == 3 and set(errors) == {"config", "defect"}
    assert "UTF-8" in errors["defect"]["message"] and "42" in errors["config"]["message"]


def test_changed_files_of_a_prepared_folder_are_found_in_one_pass(tmp_path, settings):
    rows = write_clean(tmp_path / "studies", 6)
    write_table(tmp_path / "studies", rows)
    prepare(tmp_path / "studies", tmp_path / "prepared", settings)
    code, findings = check_into(tmp_path / "sound", tmp_path / "prepared", settings)
    assert code == 0 and not [each for each in findings if each["severity"] == "error"]
    manifest = json.loads((tmp_path / "prepared" / "manifest.json").read_text())
    for case, key in ((manifest["cases"][0], "text"), (manifest["cases"][3], "image/t2w")):
        path = tmp_path / "prepared" / case["files"][key]["path"]
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
    code, findings = check_into(tmp_path / "stale", tmp_path / "prepared", settings)
    errors = {study for each in findings if each["severity"] == "error" for study in each["studies"]}
    assert code == 3 and errors == {manifest["cases"][0]["id"], manifest["cases"][3]["id"]}


def test_two_hundred_clean_studies_raise_no_alarm(tmp_path, settings):
    rows = write_clean(tmp_path / "studies", 200)
    write_table(tmp_path / "studies", rows)
    code, findings = check_into(tmp_path / "out", tmp_path / "studies", settings)
    alarms = [(each["name"], each["message"]) for each in findings if each["severity"] in ALARMS]
    assert (code, alarms) == (0, [])
