"""Studies of BIDS folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.errors import DataError
from study_fixtures import config, write_nifti


def write_bids(root: Path) -> Path:
    for number, name in enumerate([
        "sub-01/anat/sub-01_T2w.nii.gz", "sub-01/dwi/sub-01_acq-b1400_dwi.nii.gz", "sub-01/dwi/sub-01_acq-b50_dwi.nii.gz",
        "sub-01/dwi/sub-01_ADC.nii.gz", "sub-02/ses-a/anat/sub-02_ses-a_acq-tra_T2w.nii.gz",
        "sub-02/ses-a/anat/sub-02_ses-a_acq-cor_T2w.nii.gz", "sub-02/ses-b/anat/sub-02_ses-b_run-1_T2w.nii",
        "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz", "sub-03/anat/notes.txt",
    ]):  # fmt: skip
        if name.endswith("txt"):
            (root / name).parent.mkdir(parents=True)
            (root / name).write_text("nothing to see")
        else:
            write_nifti(root / name, seed=number)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    (root / "participants.tsv").write_text(
        "participant_id\tage\tpirads\tsplit\treport\n"
        'sub-01\t61\t4\ttrain\t"focus, 9 mm, left"\nsub-02\t70\tn/a\ttest\tn/a\nsub-0\t55\t1\ttest\tno focus\n'
    )
    return root


def test_sessions_series_and_participants(tmp_path: Path):
    studies = find_studies(write_bids(tmp_path))
    assert [study.id for study in studies] == ["sub-01", "sub-02_ses-a", "sub-02_ses-b"]
    names = [{sequence: path.name for sequence, path in study.files.items()} for study in studies]
    assert names == [
        {"t2w": "sub-01_T2w.nii.gz", "hbv": "sub-01_acq-b1400_dwi.nii.gz", "adc": "sub-01_ADC.nii.gz"},
        {"t2w": "sub-02_ses-a_acq-tra_T2w.nii.gz"},
        {"t2w": "sub-02_ses-b_run-1_T2w.nii"},
    ]
    assert [study.split for study in studies] == ["train", "test", "test"]
    assert studies[0].pirads == [0, 1] and studies[0].report == "focus, 9 mm, left" and studies[1].pirads is None
    assert studies[1].report is None  # BIDS writes n/a for a missing value


@pytest.mark.parametrize("name", ["02", "2", "sub-2", "SUB-02", "sub-02.0"])
def test_a_row_that_almost_names_a_study_raises(name: str, tmp_path: Path):
    """That other rows do name studies must not hide that this one's class and report would be lost."""
    table = write_bids(tmp_path) / "participants.tsv"
    table.write_text(table.read_text().replace("sub-02\t", f"{name}\t"))
    with pytest.raises(DataError, match=f"no study is called '{name}', and 'sub-02' has no row") as caught:
        find_studies(tmp_path)
    assert caught.value.field == "line 3, participant_id" and "did you mean 'sub-02" in str(caught.value.fix)


def test_a_participant_without_images_may_have_a_name_like_that_of_another(tmp_path: Path):
    with open(write_bids(tmp_path) / "participants.tsv", "a") as table:
        table.write("sub-1\t50\t5\ttest\tn/a\n")
    assert [study.pirads for study in find_studies(tmp_path)] == [[0, 1], None, None]


def test_given_table_replaces_participants(tmp_path: Path):
    (tmp_path / "mine.csv").write_text("case,pirads\nsub-01,1\n")
    studies = find_studies(write_bids(tmp_path / "bids"), csv_file=tmp_path / "mine.csv")
    assert [(study.pirads, study.split) for study in studies] == [([1, 0], "train"), (None, "train"), (None, "train")]


def test_a_bids_folder_is_prepared(tmp_path: Path):
    prepare(write_bids(tmp_path / "bids"), tmp_path / "out", config())
    cases = load_manifest(tmp_path / "out").cases
    assert [(case.id, case.split, case.text_isnull) for case in cases] == [
        ("sub-01", "train", 0), ("sub-02_ses-a", "test", 1), ("sub-02_ses-b", "test", 1),
    ]  # fmt: skip


def test_two_axial_series_raise(tmp_path: Path):
    root = write_bids(tmp_path)
    write_nifti(root / "sub-01/anat/sub-01_run-2_T2w.nii.gz")
    names = "sub-01_T2w.nii.gz and sub-01_run-2_T2w.nii.gz"
    with pytest.raises(DataError, match=f"this folder holds two series for t2w: {names}") as caught:
        find_studies(root)
    assert caught.value.path == str(root / "sub-01/anat") and "acq-tra" in caught.value.fix


def test_folder_without_description_is_not_bids(tmp_path: Path):
    """Negative control: without dataset_description.json BIDS names have no meaning."""
    root = write_bids(tmp_path)
    (root / "dataset_description.json").unlink()
    assert [study.id for study in find_studies(root)] != ["sub-01", "sub-02_ses-a", "sub-02_ses-b"]


def test_bad_value_in_participants_raises(tmp_path: Path):
    root = write_bids(tmp_path)
    (root / "participants.tsv").write_text("participant_id\tpirads\nsub-01\t7\n")
    with pytest.raises(DataError, match="pirads must be .* got '7'") as caught:
        find_studies(root)
    assert caught.value.path == str(root / "participants.tsv") and caught.value.field == "line 2, pirads"


LABELS = {"cor": False, "coronal": False, "sag": False, "tseCor": False, "3dsag": False, "SAG": False,
          "corrected": True, "decor": True, "sagamore": True, "tra": True, "ax": True, "axial": True}  # fmt: skip


@pytest.mark.parametrize(("label", "is_read"), LABELS.items())
def test_the_plane_is_a_word_of_the_label(tmp_path: Path, label: str, is_read: bool, caplog: pytest.LogCaptureFixture):
    """`corrected` holds the letters `cor`."""
    write_nifti(tmp_path / "sub-01/dwi/sub-01_ADC.nii.gz")
    write_nifti(tmp_path / f"sub-01/anat/sub-01_acq-{label}_T2w.nii.gz")
    (tmp_path / "dataset_description.json").write_text("{}")
    (study,) = find_studies(tmp_path)
    assert ("t2w" in study.files) == is_read
    assert (f"sub-01_acq-{label}_T2w.nii.gz" in caplog.text) == (not is_read)


def test_what_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    root = write_bids(tmp_path)
    write_nifti(root / "sub-04/anat/sub-04_T1w.nii.gz")
    find_studies(root)
    text = [record.getMessage() for record in caplog.records]
    words = "not read, as their names are not those of series"
    assert text[:6] == [
        f"{root / 'sub-01/dwi'}: {words}: sub-01_acq-b50_dwi.nii.gz",
        f"{root / 'sub-02/ses-a/anat'}: {words}: sub-02_ses-a_acq-cor_T2w.nii.gz",
        f"{root / 'sub-02/ses-b/anat'}: {words}: sub-02_ses-b_T1w.nii.gz",
        f"{root}: {words}: sub-03/, sub-04/",
        f"{root / 'sub-04/anat'}: {words}: sub-04_T1w.nii.gz",
        f"{root / 'participants.tsv'}: rows without images: 1, 'sub-0'",
    ]


def test_series_of_a_subject_with_sessions_are_not_lost(tmp_path: Path):
    """Of a subject with sessions, series may also be directly in the subject's folder."""
    for name in ("sub-01/anat/sub-01_T2w.nii.gz", "sub-01/ses-1/anat/sub-01_ses-1_T2w.nii.gz"):
        write_nifti(tmp_path / name)
    (tmp_path / "dataset_description.json").write_text("{}")
    assert [study.id for study in find_studies(tmp_path)] == ["sub-01", "sub-01_ses-1"]


def test_links_out_of_a_bids_folder(tmp_path: Path):
    root, outside = write_bids(tmp_path / "bids"), write_nifti(tmp_path / "archive/1.nii.gz")
    link = root / "sub-03/anat/sub-03_T2w.nii.gz"
    link.symlink_to(outside)
    with pytest.raises(DataError, match="through a link to elsewhere") as caught:
        find_studies(root)
    assert caught.value.path == str(link) and "--follow_links" in caught.value.fix
    assert "sub-03" in [study.id for study in find_studies(root, follow_links=True)]
    outside.unlink()
    with pytest.raises(DataError, match="a file that does not exist"):
        find_studies(root, follow_links=True)
