"""Exports as they come: damaged files, hostile headers, missing ids, later additions; reports in several forms; splits."""

from __future__ import annotations

import csv
import logging
import shutil
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("pydicom", reason="pydicom is not installed; install it with: pip install -e '.[test]'")

from ccella_fast import cli  # noqa: E402
from ccella_fast.data.importing import page  # noqa: E402
from ccella_fast.data.importing.deidentification import without_identity  # noqa: E402
from ccella_fast.data.importing.import_studies import import_studies  # noqa: E402
from ccella_fast.data.importing.scan import Identity, read_headers, scan_export  # noqa: E402
from ccella_fast.data.importing.splitting import assign_splits, check_fractions  # noqa: E402
from ccella_fast.errors import ConfigError, DataError  # noqa: E402
from dicom_fixtures import write_index  # noqa: E402
from pacs_fixtures import CANARIES, change, remove, write_export  # noqa: E402


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time and are tested in test_import.py."""
    monkeypatch.setattr(page, "montage", lambda panels, **_: b"")


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def run(folder: Path, **options) -> None:
    """Review and write."""
    for write in (False, True):
        import_studies(folder / "export", folder / "studies", workers=1, write=write, **options)


def test_a_line_of_the_users_table_with_too_many_cells_is_refused(tmp_path: Path):
    write_export(tmp_path / "export", patients=1, visits=1)
    run(tmp_path)
    table = tmp_path / "studies" / "studies.csv"
    plain = table.read_text()
    table.write_text(plain.rstrip("\n") + ",a cell, and another\n")
    changed = table.read_bytes()
    with pytest.raises(DataError, match="this line has too many cells") as caught:
        run(tmp_path)
    assert caught.value.path == str(table) and caught.value.field == "line 2" and table.read_bytes() == changed
    table.write_text(plain)
    run(tmp_path)  # control


def test_a_later_export_moves_no_patient(tmp_path: Path):
    write_export(tmp_path / "all", patients=6, visits=1)
    shutil.copytree(tmp_path / "all", tmp_path / "export")
    for number in (3, 4, 5):
        shutil.rmtree(tmp_path / "export" / f"QUAGGA{number}")
    run(tmp_path)
    key, table = rows(tmp_path / "studies.private" / "key.csv"), rows(tmp_path / "studies" / "studies.csv")
    assert len(key) == len(table) == 3 and {row["split"] for row in table} == {"train", "val", "test"}
    shutil.rmtree(tmp_path / "export")
    shutil.copytree(tmp_path / "all", tmp_path / "export")
    for number in (0, 1, 2):  # the second export holds the other patients alone
        shutil.rmtree(tmp_path / "export" / f"QUAGGA{number}")
    run(tmp_path)
    later = rows(tmp_path / "studies.private" / "key.csv")
    assert [row for row in later if row in key] == key and len(later) == 6
    assert [row for row in rows(tmp_path / "studies" / "studies.csv") if row in table] == table
    assert len(list((tmp_path / "studies").glob("p*_s1/t2w.nii.gz"))) == 6


def test_a_truncated_slice_is_named_and_the_other_studies_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    studies = write_export(tmp_path / "export", patients=1)
    damaged = sorted(studies[0].chosen["t2w"])[-1]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    caplog.set_level(logging.INFO)
    with pytest.raises(DataError) as error:
        run(tmp_path)
    assert "studies with a chosen series that cannot be read, see the page: 1, p0001_s1" in caplog.text
    assert not any(canary in str(error.value) for canary in CANARIES)
    assert Path(error.value.path).read_text().splitlines()[0] == str(damaged)
    assert [row["case"] for row in rows(tmp_path / "studies" / "studies.csv")] == ["p0001_s2"]
    assert not (tmp_path / "studies" / "p0001_s1").exists()


def test_a_missing_slice_is_no_volume(tmp_path: Path):
    studies = write_export(tmp_path / "export", patients=1, visits=1)
    sorted(studies[0].chosen["t2w"])[2].unlink()
    with pytest.raises(DataError, match="series chosen as t2w of p0001_s1 cannot be used"):
        run(tmp_path)


def test_deflated_files_are_read_as_the_others(tmp_path: Path):
    from pydicom import dcmread
    from pydicom.uid import DeflatedExplicitVRLittleEndian

    export = tmp_path / "export"
    path = write_export(export, patients=1, visits=1)[0].chosen["t2w"][0]
    before = scan_export(export, 1)
    dataset = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    content = path.read_bytes()
    assert scan_export(export, 1) == before
    write_index(tmp_path / "DICOMDIR", [path])  # it states the deflated syntax, but of another file
    assert read_headers([str(tmp_path / "DICOMDIR")])[0].reason == "a DICOMDIR; the files themselves are read"  # type: ignore[union-attr]
    path.write_bytes(content[:-30])  # control: it is inflated to its end
    assert {each.path for each in scan_export(export, 1)[1]} == {str(path), *(each.path for each in before[1])}


def test_hostile_and_odd_files_are_listed_with_a_reason(tmp_path: Path):
    from pydicom import dcmread

    studies = write_export(tmp_path / "export", patients=1, visits=1)
    folder, good = tmp_path / "export", studies[0].chosen["t2w"][0]
    content = good.read_bytes()
    start = content.index(b"\x08\x00\x16\x00")
    (folder / "huge").write_bytes(content[:start] + b"\x08\x00\x05\x00UN\x00\x00\xff\xff\xff\x7f" + content[start:])
    (folder / "cut").write_bytes(content[: start + 40])
    dataset = dcmread(good)
    del dataset.StudyInstanceUID
    dataset.save_as(folder / "no_study")
    dataset = dcmread(good)
    dataset.SyntheticData = "YES"  # as `sample --format dicom` writes
    dataset.save_as(folder / "generated")
    deflated = content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99"[:20])
    (folder / "deflated").write_bytes(content[:132] + b"1.2.840.10008.1.2.1.99" + deflated[132:])
    (folder / "noise").write_bytes(b"\x08\x00" + bytes(range(256)) * 8)
    (folder / "loop").symlink_to(folder, target_is_directory=True)
    (folder / "nowhere").symlink_to(folder / "absent")
    headers, unused = scan_export(folder, 1)
    reasons = {Path(each.path).name: each.reason for each in unused}
    assert reasons["huge"] == "the header cannot be read (ValueError)"
    assert "header" in reasons["cut"] and "header" in reasons["noise"]
    assert (
        reasons["no_study"] == "the header has no study UID"
        and reasons["deflated"] == "the header cannot be read (ValueError)"
    )
    assert reasons["generated"] == "a generated image (Synthetic Data is YES), not one of a patient"
    assert reasons["loop"] == "a link to a folder" and reasons["nowhere"] == "not a regular file"
    assert len(headers) + len(unused) == sum(1 for path in folder.rglob("*") if not path.is_dir() or path.is_symlink())


def test_files_without_preamble_and_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    studies = write_export(tmp_path / "export", patients=1, visits=1)
    for number, path in enumerate(studies[0].chosen["t2w"]):
        shutil.copyfile(path, tmp_path / "export" / f"copy{number}")
        path.write_bytes(path.read_bytes()[132:])
    caplog.set_level(logging.INFO)
    run(tmp_path)
    assert "files that are copies of others: 6" in caplog.text
    assert (tmp_path / "studies" / "p0001_s1" / "t2w.nii.gz").is_file()


def test_worker_processes_give_the_same_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from ccella_fast.data.importing import scan

    write_export(tmp_path / "export", patients=1, visits=1)
    one = scan_export(tmp_path / "export", 1)
    monkeypatch.setattr(scan, "_FILES_PER_TASK", 7)
    assert scan_export(tmp_path / "export", 2) == one and len(one[0]) > 100


@pytest.mark.parametrize(
    ("change_to", "patients", "message"),
    [
        ({"PatientID": ""}, 1, ""),  # name and date of birth are equal
        ({"PatientID": "", "PatientName": ""}, 2, "studies with neither a patient id nor a name: 2"),
        ({"PatientID": "one"}, 1, ""),
    ],
)
def test_patients_without_an_id(
    tmp_path: Path, change_to, patients: int, message: str, caplog: pytest.LogCaptureFixture
):
    write_export(tmp_path / "export", patients=1)
    for name, value in change_to.items():
        change(tmp_path / "export", name, value)
    caplog.set_level(logging.INFO)
    run(tmp_path)
    assert len({row["patient"] for row in rows(tmp_path / "studies.private" / "key.csv")}) == patients
    assert message in caplog.text and ("neither" in caplog.text) == bool(message)


def test_a_study_of_two_patients_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    write_export(tmp_path / "export", patients=2, visits=1)
    change(tmp_path / "export" / "QUAGGA0", "PatientID", "other", series=4)
    caplog.set_level(logging.INFO)
    run(tmp_path)
    assert "studies that are left out, since their files have several patient ids: 1" in caplog.text
    assert len(rows(tmp_path / "studies" / "studies.csv")) == 1
    listed = Counter(row["reason"] for row in rows(tmp_path / "studies.private" / "unused_files.csv"))
    assert listed["its study has several patient ids"] > 100


def test_foreign_folders_are_not_touched(tmp_path: Path):
    write_export(tmp_path / "export", patients=1, visits=1)
    (tmp_path / "studies" / "p0001_s1").mkdir(parents=True)
    (tmp_path / "studies" / "p0001_s1" / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match="no import with this private folder has written it"):
        run(tmp_path)
    assert (tmp_path / "studies" / "p0001_s1" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("form", ["folder", "semicolons", "named", "patient id"])
def test_forms_of_reports(tmp_path: Path, form: str):
    study = write_export(tmp_path / "export", patients=1, visits=1)[0]
    path, options = tmp_path / "reports.csv", {}
    if form == "folder":
        path = tmp_path / "reports"
        path.mkdir()
        (path / f"{study.accession}.txt").write_text("Lesion\nPI-RADS 4")
    elif form == "semicolons":
        path.write_text(f'StudyInstanceUID;Befund;PI-RADS\n{study.uid};"Lesion; PI-RADS 4";4.0\n')
    elif form == "named":
        path.write_text(f"nr,words\n{study.accession},Lesion PI-RADS 4\n")
        options = {"id_column": "nr", "report_column": "words"}
    else:
        path.write_text(f"mrn,text\n{study.patient_id},Lesion PI-RADS 4\n")
    run(tmp_path, reports=path, **options)
    (row,) = rows(tmp_path / "studies" / "studies.csv")
    assert row["pirads"] == "4" and row["report"].startswith("Lesion")


def test_a_patient_id_does_not_stand_for_several_studies(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    study = write_export(tmp_path / "export", patients=1)[0]
    (tmp_path / "reports.csv").write_text(f"mrn,text\n{study.patient_id},Lesion PI-RADS 4\n")
    caplog.set_level(logging.INFO)
    run(tmp_path, reports=tmp_path / "reports.csv")
    assert "reports with an id that several studies share: 1" in caplog.text
    assert not any(row["report"] for row in rows(tmp_path / "studies" / "studies.csv"))


def test_different_reports_of_a_study_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    study = write_export(tmp_path / "export", patients=1, visits=1)[0]
    lines = [f"{study.accession},PI-RADS {score}" for score in (2, 2, 4)]
    (tmp_path / "reports.csv").write_text("\n".join(["accession,text", *lines]))
    caplog.set_level(logging.INFO)
    run(tmp_path, reports=tmp_path / "reports.csv")
    assert "several different reports, of which none is used: 1, p0001_s1" in caplog.text


@pytest.mark.parametrize(
    "content",
    ["a,b\nQUAGGA has a lesion,x\n", "accession,report\nQUAGGA has\n", 'accession,report\n"QUAGGA has a lesion,x\n'],
    ids=["columns", "cells", "quote"],
)
def test_a_wrong_table_is_refused_without_its_words(tmp_path: Path, content: str):
    write_export(tmp_path / "export", patients=1, visits=1)
    (tmp_path / "reports.csv").write_text(content)
    with pytest.raises(DataError) as error:
        run(tmp_path, reports=tmp_path / "reports.csv")
    assert "QUAGGA" not in str(error.value) and "reports.csv" in str(error.value)


def test_what_the_user_fills_in_is_kept(tmp_path: Path):
    study = write_export(tmp_path / "export", patients=1, visits=1)[0]
    (tmp_path / "reports.csv").write_text(f"accession,text\n{study.accession},PI-RADS 3-4\n")
    run(tmp_path, reports=tmp_path / "reports.csv")
    table = tmp_path / "studies" / "studies.csv"
    assert rows(table)[0]["pirads"] == ""
    table.write_text(table.read_text().replace(",train,,", ",train,4,"))
    run(tmp_path, reports=tmp_path / "reports.csv")
    assert rows(table)[0]["pirads"] == "4"


def test_identity_in_texts():
    identity = Identity("MRN77", "QUAGGA^ZEBEDEE^LONG", "19410317", "ACC9", "20210604")
    text = "Quagga, Zebedee (MRN77, acc9x ACC9): a long lesion. Dr Quaggason. 05.06.2021."
    cleaned, count = without_identity(text, [identity])
    assert cleaned == "[NAME], [NAME] ([ID], acc9x [ID]): a long lesion. Dr Quaggason. 05.06.2021." and count == 4
    dates = ["04.06.2021", "4.6.2021", "04/06/2021", "6/4/21", "2021-06-04", "20210604", "4 June 2021", "4. Juni 2021"]
    for date in [*dates, "June 4, 2021", "17-03-1941", "17 mars 1941"]:
        assert without_identity(f"on {date}, PI-RADS 4", [identity]) == ("on [DATE], PI-RADS 4", 1), date


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 100])
def test_splits_have_their_shares(count: int):
    sizes = Counter(assign_splits([], count, (0.7, 0.15, 0.15)))
    assert len(sizes) == min(3, count)
    if count >= 10:
        for name, share in zip(("train", "val", "test"), (0.7, 0.15, 0.15), strict=True):
            assert abs(sizes[name] - share * count) <= 1
    grown = assign_splits(["train"] * count, 50, (0.5, 0.0, 0.5))
    assert "val" not in grown and abs(grown.count("train") + count - (50 + count) / 2) <= max(1, count - 25)


@pytest.mark.parametrize("fractions", [(0.5, 0.5, 0.5), (0, 0.5, 0.5), (1.2, -0.1, -0.1), (0.5, 0.5)])
def test_impossible_shares_are_refused(fractions):
    with pytest.raises(ConfigError, match="shares of train, val and test"):
        check_fractions(fractions)
    check_fractions((0.7, 0.15, 0.15))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 0, ["p0001_s1  4", "--write"]),
        (["--write"], 2, ["not been shown"]),
        (["--out", "export/studies"], 2, ["next to the export"]),
        (["--private", "studies/key"], 2, ["outside of --out"]),
        (["--data", "absent"], 3, ["there is no such folder"]),
        (["--data", "empty"], 3, ["an empty folder, not a PACS export"]),
        (["--reports", "absent.csv"], 3, ["does not exist"]),
        (["--split", "0.5", "0.5", "0.5"], 2, ["sum up to 1"]),
    ],
)
def test_the_command(arguments, code, words, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_export(Path("export"), patients=1, visits=1)
    Path("empty").mkdir()
    assert cli.main(["import", "--data", "export", "--out", "studies", "--workers", "1", *arguments]) == code
    said = "".join(capfd.readouterr())
    assert all(word in said for word in words) and "internal" not in said
    assert not any(canary in said for canary in CANARIES)


def test_many_studies_are_shown_on_several_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "STUDIES_PER_PAGE", 1)
    write_export(tmp_path / "export", patients=1)
    import_studies(tmp_path / "export", tmp_path / "studies", workers=1)
    pages = sorted(path.name for path in (tmp_path / "studies.import").glob("*.html"))
    assert pages == ["import-2.html", "import.html"]
    texts = [(tmp_path / "studies.import" / name).read_text() for name in pages]
    assert ["<h2>p0001_s2</h2>" in text for text in texts] == [True, False]
    remove(tmp_path / "export" / "QUAGGA0" / "20210604")
