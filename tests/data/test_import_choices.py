"""The choice of series: by attributes and not by words, edited by the user, refused where it is not certain."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("pydicom", reason="pydicom is not installed; install it with: pip install -e '.[test]'")

from ccella_fast.data.importing import page  # noqa: E402
from ccella_fast.data.importing.import_studies import import_studies  # noqa: E402
from ccella_fast.data.importing.scan import scan_export  # noqa: E402
from ccella_fast.data.importing.sequence_choice import Judgement, choose_sequences  # noqa: E402
from ccella_fast.data.importing.series import group_studies  # noqa: E402
from ccella_fast.errors import ConfigError, DataError  # noqa: E402
from dicom_fixtures import enhanced, slices  # noqa: E402
from pacs_fixtures import change, remove, write_export  # noqa: E402


@pytest.fixture(autouse=True)
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take most of the time and are tested in test_import.py."""
    monkeypatch.setattr(page, "montage", lambda panels, **_: b"")


def judged(folder: Path) -> dict[str, Judgement]:
    """Series -> judgement, of an export of one study."""
    studies, _ = group_studies(scan_export(folder, 1)[0])
    assert len(studies) == 1
    return {each.volume.name: each for each in choose_sequences(studies[0].volumes)}


def used(folder: Path) -> dict[str, str]:
    return {each.use: name for name, each in judged(folder).items() if each.use}


@pytest.fixture
def siemens(tmp_path: Path) -> Path:
    write_export(tmp_path / "export", patients=1, visits=1)
    return tmp_path / "export"


@pytest.fixture
def philips(tmp_path: Path) -> Path:
    write_export(tmp_path / "export", patients=3, visits=1)
    for number in (0, 1):
        remove(tmp_path / "export" / f"QUAGGA{number}")
    return tmp_path / "export"


def test_words_of_the_description_are_not_needed(siemens: Path):
    change(siemens, "SeriesDescription", None)
    assert used(siemens) == {"t2w": "4", "hbv": "10", "adc": "9"}


def test_words_of_the_description_do_not_outweigh_attributes(siemens: Path):
    """Descriptions are typed by hand: the coronal series is called axial, and T1 is called T2."""
    change(siemens, "SeriesDescription", "t2_tse_tra", series=3)
    change(siemens, "SeriesDescription", "t2_tse_tra prostate", series=7)
    change(siemens, "SeriesDescription", "x", series=4)
    found = judged(siemens)
    assert found["4"].use == "t2w"
    assert found["3"].reason == "coronal" and found["7"].reason.startswith("echo time of 11 ms")


@pytest.mark.parametrize(
    ("series", "reason"),
    [
        ("1", "only 2 slices"), ("2", "sagittal"), ("3", "coronal"), ("7", "echo time of 11 ms"), ("11", "dynamic"),
        ("12", "a subtraction"), ("5", "was preferred"), ("6", "was preferred"), ("8 b50", "below 800"),
        ("8 b800", "10 was preferred"), ("13", "echo times"),
    ],
)  # fmt: skip
def test_every_other_series_has_its_reason(siemens: Path, series: str, reason: str):
    if series in ("1", "13"):  # the descriptions of the others say nothing that their attributes do not
        change(siemens, "SeriesDescription", None, series=int(series))
    found = judged(siemens)
    matching = [each for name, each in found.items() if name == series or name.startswith(f"{series} part")]
    assert matching and all(reason in each.reason and not each.use for each in matching)


@pytest.mark.parametrize("missing", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_a_series_with_an_incomplete_header_marks_the_one_that_is_chosen_instead(siemens: Path, missing: str):
    assert not judged(siemens)["4"].doubt  # control
    change(siemens, missing, None, series=4)
    found = judged(siemens)
    assert found["6"].use == "t2w" and found["6"].doubt.endswith("which may be part of it or better: 4")
    assert not found["9"].doubt and not found["10"].doubt  # T2 says nothing about diffusion


def test_of_several_t2_series_the_rule_prefers_in_this_order(siemens: Path):
    """2D of the prostate, then 3D of the prostate, then 2D of the pelvis; the latter are marked."""
    found = []
    for series in (4, 6, 5):
        found.append(used(siemens)["t2w"])
        remove(siemens, series=series)
    assert found == ["4", "6", "5"] and "t2w" not in used(siemens)


def test_a_pelvis_in_place_of_the_prostate_is_marked(siemens: Path):
    remove(siemens, series=4)
    remove(siemens, series=6)
    assert "field of view of 384 mm" in judged(siemens)["5"].doubt


def test_equal_series_are_marked_and_the_later_is_taken(siemens: Path):
    change(siemens, "MRAcquisitionType", "2D", series=6)
    found = judged(siemens)
    assert found["6"].use == "t2w" and found["6"].doubt == "equal in all attributes to 4"
    change(siemens, "SeriesDescription", None)
    found = judged(siemens)
    assert found["6"].use == "t2w" and found["6"].doubt == "equal in all attributes to 4"


@pytest.mark.parametrize(("option", "number"), [("FS", 6), ("", 4)], ids=["fat suppressed", "negative control"])
def test_fat_suppression_comes_last(siemens: Path, option: str, number: int):
    change(siemens, "ScanOptions", option, series=4)
    assert used(siemens)["t2w"] == str(number)


def test_the_highest_b_value_is_taken_from_800_on(siemens: Path):
    remove(siemens, series=10)
    best = judged(siemens)["8 b800"]
    assert best.use == "hbv" and best.doubt == "b-value 800 is below 1000"
    change(siemens, "SequenceName", "*ep_b400t", series=8)
    for path in sorted(siemens.rglob("*.dcm")):
        if path.stat().st_size:
            import pydicom

            dataset = pydicom.dcmread(path)
            if dataset.SeriesNumber == 8:
                del dataset[0x0019, 0x100C]
                dataset.save_as(path)
    assert "hbv" not in used(siemens)


def test_single_directions_are_not_taken_for_the_trace(philips: Path):
    assert used(philips)["hbv"] == "501 b1000"
    change(philips, "DiffusionDirectionality", "DIRECTIONAL", series=501)
    found = judged(philips)
    assert all(each.use != "hbv" for each in found.values())
    assert "4 images at a position" in found["501 b1000"].reason


def test_a_b0_image_of_a_spin_echo_is_no_t2(philips: Path):
    """Philips states SE for echo-planar diffusion; the image of b-value 0 has the contrast of T2."""
    change(philips, "PixelSpacing", [11.25, 11.25], series=501)
    for series in (401, 402):
        remove(philips, series=series)
    assert "t2w" not in used(philips)
    assert judged(philips)["501 b0"].reason == "b-value 0, below 800"


def test_private_b_values_without_the_name_of_their_creator(siemens: Path):
    """Anonymizers remove the name; the attribute remains."""
    import pydicom

    for path in siemens.rglob("*.dcm"):
        if path.stat().st_size:
            dataset = pydicom.dcmread(path)
            if (0x0019, 0x0010) in dataset:
                del dataset[0x0019, 0x0010]
                del dataset.SequenceName
                dataset.save_as(path)
    assert used(siemens)["hbv"] == "10"


def test_enhanced_files(tmp_path: Path):
    """One file per series: T2, and diffusion of two b-values with directions and trace."""
    from pydicom.dataset import Dataset

    def save(name: str, dataset, echo: float, repetition: float, epi: str, kind: list[str], number: int) -> None:
        shared = dataset.SharedFunctionalGroupsSequence[0]
        shared.MREchoSequence, shared.MRTimingAndRelatedParametersSequence = [Dataset()], [Dataset()]
        shared.MREchoSequence[0].EffectiveEchoTime = echo
        shared.MRTimingAndRelatedParametersSequence[0].RepetitionTime = repetition
        dataset.EchoPulseSequence, dataset.EchoPlanarPulseSequence, dataset.MRAcquisitionType = "SPIN", epi, "2D"
        dataset.SeriesNumber, dataset.SeriesInstanceUID, dataset.ImageType = number, f"1.2.3.4.{number}", kind
        dataset.SOPInstanceUID = f"1.2.3.9.{number}"
        dataset.save_as(tmp_path / "export" / name, enforce_file_format=True)

    (tmp_path / "export").mkdir()
    frames = [
        {"slice": n, "b_value": b, "directionality": d}
        for b, d in ((0, "NONE"), (1000, "DIRECTIONAL"), (1000, "ISOTROPIC"))
        for n in range(6)
    ]
    values = slices((12, 10, 18), seed=3)
    plain = ["ORIGINAL", "PRIMARY", "M", "NONE"]
    save("a", enhanced(slices()), 100, 4000, "NO", plain, 1)
    save("b", enhanced(values, frames), 70, 4000, "YES", ["ORIGINAL", "PRIMARY", "DIFFUSION", "NONE"], 2)
    save("c", enhanced(slices(seed=4)), 70, 4000, "YES", ["DERIVED", "PRIMARY", "DIFFUSION", "ADC"], 3)
    assert used(tmp_path / "export") == {"t2w": "1", "hbv": "2 b1000", "adc": "3"}
    import nibabel

    for write in (False, True):
        import_studies(tmp_path / "export", tmp_path / "studies", write=write, workers=1)
    written = np.asarray(nibabel.load(tmp_path / "studies" / "p0001_s1" / "hbv.nii.gz").dataobj)
    trace = values[:, :, 12:]
    assert sorted(written.ravel().tolist()) == sorted(trace.ravel().tolist())


def edit(folder: Path, series: str, use: str) -> None:
    path = folder / "studies.import" / "choices.csv"
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert series in {row["series"] for row in rows}
    for row in rows:
        row["use"] = use if row["series"] == series else row["use"]
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=";")  # as a spreadsheet may save it
        writer.writeheader()
        writer.writerows(rows)


def run(export: Path, **options) -> None:
    import_studies(export, export.parent / "studies", workers=1, **options)


def test_an_edited_choice_is_written_and_kept(siemens: Path, capsys: pytest.CaptureFixture[str]):
    import nibabel

    folder = siemens.parent
    run(siemens)
    run(siemens, write=True)
    path = folder / "studies" / "p0001_s1" / "t2w.nii.gz"
    before = np.asarray(nibabel.load(path).dataobj)
    edit(folder, "6", "t2w")
    capsys.readouterr()
    run(siemens)
    assert "p0001_s1  6" in capsys.readouterr().out
    np.testing.assert_array_equal(np.asarray(nibabel.load(path).dataobj), before)
    run(siemens, write=True)
    assert (np.asarray(nibabel.load(path).dataobj) != before).any()


def test_a_series_can_be_left_out(siemens: Path):
    run(siemens)
    edit(siemens.parent, "9", "")
    run(siemens, write=True)
    names = {path.name for path in (siemens.parent / "studies" / "p0001_s1").iterdir()}
    assert names == {"t2w.nii.gz", "hbv.nii.gz"}


@pytest.mark.parametrize(
    ("series", "use", "message"),
    [
        ("2", "t2", "use must be t2w, hbv, adc or empty, got 't2'"),
        ("2", "the report of Mr X", "got a text of 18 characters"),
        ("8 b800", "hbv", ""),
    ],
)
def test_edits_are_checked(siemens: Path, series: str, use: str, message: str):
    run(siemens)
    edit(siemens.parent, series, use)
    if message:
        with pytest.raises(DataError, match=message):
            run(siemens, write=True)
    else:
        run(siemens, write=True)


def test_two_edits_for_one_sequence_are_refused(siemens: Path):
    run(siemens)
    edit(siemens.parent, "5", "t2w")
    path = siemens.parent / "studies.import" / "choices.csv"
    path.write_text(path.read_text().replace("p0001_s1;6;;", "p0001_s1;6;t2w;"))
    with pytest.raises(DataError, match="2 series of study p0001_s1 are to be used as t2w: 5, 6"):
        run(siemens, write=True)


def test_an_edit_of_a_series_that_is_gone_is_refused(siemens: Path):
    run(siemens)
    edit(siemens.parent, "6", "t2w")
    remove(siemens, series=6)
    with pytest.raises(DataError, match="study p0001_s1 has no series 6, which this file was edited for"):
        run(siemens)


def test_nothing_is_written_that_was_not_shown(siemens: Path):
    with pytest.raises(ConfigError, match="not been shown yet: 1, p0001_s1"):
        run(siemens, write=True)
    assert not list((siemens.parent / "studies").glob("*"))


@pytest.mark.parametrize("delete", [4, 5])
def test_no_t2_series_at_all_is_an_error(siemens: Path, delete: int):
    for series in (4, 5, 6) if delete == 4 else (5, 6):
        remove(siemens, series=series)
    if delete == 4:
        with pytest.raises(DataError, match="no study has an axial T2 series"):
            run(siemens)
    else:
        run(siemens)
