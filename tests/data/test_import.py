"""`ccella-fast import` on a generated export: what is chosen, what is written, and that no name, id or date is in any of it."""

from __future__ import annotations

import csv
import gzip
import logging
import re
import stat
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pydicom is not installed; install it with: pip install -e '.[test]'")

from ccella_fast.data.importing.import_studies import import_studies  # noqa: E402
from ccella_fast.data.manifest import load_manifest  # noqa: E402
from ccella_fast.data.preparation.prepare import prepare  # noqa: E402
from ccella_fast.data.readers.discovery import find_studies  # noqa: E402
from pacs_fixtures import CANARIES, write_export  # noqa: E402
from study_fixtures import config  # noqa: E402

REPORT = "Mr Quagga, MRN7788{n}, examined on 23.08.2019. Zebedee is well. Left lesion, PI-RADS {score}."


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_reports(folder: Path, studies) -> Path:
    path = folder / "reports.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["Accession Number", "Report text"])
        for n, study in enumerate(studies[:-1]):
            score = "3-4" if n == 1 else str(n % 5 + 1)
            writer.writerow([study.accession, REPORT.format(n=study.patient_id[-1], score=score)])
        writer.writerow(["ACC5551-other", "PI-RADS 5"])
    return path


class Imported:
    """An export, and what two runs of the command leave and say."""

    def __init__(self, folder: Path, *, flat: bool):
        self.out = folder / "studies"
        self.studies = write_export(folder / "export", flat=flat)
        self.reports = write_reports(folder, self.studies)
        self.records: list[str] = []
        handler = logging.Handler(0)
        handler.emit = lambda record: self.records.append(record.getMessage())  # type: ignore[method-assign]
        root, level = logging.getLogger(), logging.getLogger().level
        root.addHandler(handler)
        root.setLevel(0)
        try:
            self.run()
            self.files_before_write = list(self.out.glob("*"))
            self.run(write=True)
        finally:
            root.removeHandler(handler)
            root.setLevel(level)
        self.ids = {row["study_uid"]: row["id"] for row in table(folder / "studies.private" / "key.csv")}

    def run(self, **options) -> None:
        import_studies(self.out.parent / "export", self.out, reports=self.reports, workers=1, **options)


@pytest.fixture(scope="module", params=[False, True], ids=["nested", "flat"])
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return Imported(tmp_path_factory.mktemp("import"), flat=request.param)


def test_the_right_series_of_every_study_and_vendor_are_chosen(imported: Imported):
    from pydicom import dcmread

    used = defaultdict(dict)
    for row in table(imported.out.with_name("studies.import") / "choices.csv"):
        if row["use"]:
            assert row["use"] == row["proposed"]
            assert bool(row["look_at"]) == (row["series"] == "500")  # this vendor names ADC in the description alone
            used[row["study"]][row["use"]] = row["series"].split(" ")[0]
    for study in imported.studies:
        expected = {name: str(dcmread(files[0]).SeriesNumber) for name, files in study.chosen.items()}
        assert set(expected) == {"t2w", "hbv", "adc"}
        assert used[imported.ids[study.uid]] == expected


def test_voxels_and_geometry_equal_simpleitk(imported: Imported):
    import SimpleITK as sitk

    for study in imported.studies[::2]:
        for sequence, files in study.chosen.items():
            image = sitk.ReadImage(sorted(map(str, files), key=position), sitk.sitkFloat64)
            written = nibabel.load(imported.out / imported.ids[study.uid] / f"{sequence}.nii.gz")
            values = np.asarray(written.dataobj)
            assert values.size == np.prod(image.GetSize()) == 16 * 16 * 6
            is_whole = np.array_equal(values, np.rint(values))
            assert written.get_data_dtype() == (np.int16 if is_whole else np.float32)
            np.testing.assert_allclose(written.get_sform(), written.get_qform(), atol=1e-5)
            for index in np.random.default_rng(0).integers(0, [16, 16, 6], (50, 3)).tolist():
                x, y, z = image.TransformIndexToPhysicalPoint(index)
                voxel = np.linalg.solve(written.affine, [-x, -y, z, 1])[:3]
                np.testing.assert_allclose(voxel, np.rint(voxel), atol=2e-3)
                assert values[tuple(np.rint(voxel).astype(int))] == image[index]


def position(path: str) -> float:
    from pydicom import dcmread

    return dcmread(path).ImagePositionPatient[2]


def test_nothing_that_is_left_or_said_holds_a_name_an_id_or_a_date(imported: Imported):
    folder = imported.out.parent
    found = []
    for path in [*imported.out.rglob("*"), *imported.out.with_name("studies.import").rglob("*")]:
        content = path.read_bytes() if path.is_file() else b""
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        content = str(path.relative_to(folder)).encode() + content
        found += [(path.name, canary) for canary in CANARIES if canary.lower().encode() in content.lower()]
    said = "\n".join(imported.records).lower()
    found += [("log", canary) for canary in CANARIES if canary.lower() in said]
    assert not found
    private = (folder / "studies.private" / "key.csv").read_text()
    assert all(name in private for name in ("MRN7788", "ACC5551"))  # negative control


def test_key_and_private_folder_are_readable_by_their_owner_alone(imported: Imported):
    private = imported.out.with_name("studies.private")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert stat.S_IMODE((private / "key.csv").stat().st_mode) == 0o600
    assert stat.S_IMODE((private / "unused_files.csv").stat().st_mode) == 0o600
    reasons = {Path(row["path"]).name: row["reason"] for row in table(private / "unused_files.csv")}
    assert reasons.pop("empty.dcm") == "the file is empty"
    assert set(reasons.values()) == {"not a DICOM file"} and len(reasons) == 1


def test_the_first_run_writes_no_study(imported: Imported):
    assert imported.files_before_write == []
    page = (imported.out.with_name("studies.import") / "import.html").read_text()
    assert page.count("data:image/png;base64,") == 6 and not re.search("https?:", page.lower())


def test_reports_scores_and_splits_are_in_the_table(imported: Imported):
    rows = {row["case"]: row for row in table(imported.out / "studies.csv")}
    assert sorted(rows) == sorted(imported.ids.values())
    for n, study in enumerate(imported.studies):
        row = rows[imported.ids[study.uid]]
        if n == len(imported.studies) - 1:
            assert row["report"] == row["pirads"] == ""
        else:
            assert row["pirads"] == ("" if n == 1 else str(n % 5 + 1))
            assert row["report"].startswith("Mr [NAME], [ID], examined on ")
            assert ("[DATE]" in row["report"]) == (n % 2 == 0)  # of the other visit's date nothing is known
    by_patient = defaultdict(set)
    for case, row in rows.items():
        by_patient[case.split("_")[0]].add(row["split"])
    assert sorted(map(sorted, by_patient.values())) == [["test"], ["train"], ["val"]]


def test_what_could_not_be_matched_or_read_is_counted_by_new_id(imported: Imported):
    said = "\n".join(imported.records)
    assert "reports with an id that is not an accession number" in said
    assert f"studies without a report: 1, {imported.ids[imported.studies[-1].uid]}" in said
    assert (
        f"reports without a certain PI-RADS score (see reports.csv): 1, {imported.ids[imported.studies[1].uid]}" in said
    )


def test_prepare_takes_the_folder(imported: Imported, tmp_path: Path):
    rows = {row["case"]: row for row in table(imported.out / "studies.csv")}
    studies = find_studies(imported.out)
    assert len(studies) == 6
    for study in studies:
        assert set(study.files) == {"t2w", "hbv", "adc"}
        assert study.report == (rows[study.id]["report"] or None)
        assert study.split == rows[study.id]["split"]
    prepare(imported.out, tmp_path / "prepared", config(), workers=1)
    assert [study.id for study in load_manifest(tmp_path / "prepared").cases] == sorted(rows)


def test_into_the_working_folder(imported: Imported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    import_studies(imported.out.parent / "export", Path(), reports=imported.reports, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["here", "here.import", "here.private"]


def test_a_second_import_changes_nothing(imported: Imported):
    private = imported.out.with_name("studies.private")
    before = {path: path.stat().st_mtime_ns for path in imported.out.rglob("*.nii.gz")}
    key, studies = (private / "key.csv").read_text(), (imported.out / "studies.csv").read_text()
    imported.run()
    imported.run(write=True)
    assert {path: path.stat().st_mtime_ns for path in imported.out.rglob("*.nii.gz")} == before and len(before) == 18
    assert (private / "key.csv").read_text() == key and (imported.out / "studies.csv").read_text() == studies
