"""Files whose data was not downloaded are named as such, with the command that gets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.volume_file import FORMATS, read_volume
from ccella_fast.errors import DataError
from image_file_fixtures import write_image
from study_fixtures import voxels, write_nifti, write_studies

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 3635379\n"
ANNEX = "/annex/objects/SHA256E-s3635379--" + "4d" * 32 + ".nii.gz\n"
AS_TEXT = "../../.git/annex/objects/0Z/fx/SHA256E-s9--4d.mha/SHA256E-s9--4d.mha"  # a link where links are not supported


def expect_pointer(path: Path, tool: str, command: str, named: Path | None = None) -> None:
    with pytest.raises(DataError, match=f"pointer of {tool}: its data was not downloaded") as caught:
        read_volume(path)
    assert caught.value.path == str(named or path) and command in caught.value.fix


@pytest.mark.parametrize("suffix", [*FORMATS, ".dcm"])
def test_pointers_are_named_in_every_format(tmp_path: Path, suffix: str):
    path = tmp_path / f"t2w{suffix}"
    for text, tool, command in (
        (LFS, "Git LFS", "git lfs pull"),
        (ANNEX, "git-annex", "git annex get"),
        (AS_TEXT, "git-annex", "git annex get"),
    ):
        path.write_text(text)
        expect_pointer(path, tool, command)
    path.write_text("annexed in version 1")  # control: other short files are what they are
    with pytest.raises(DataError, match="not supported|is not a"):
        read_volume(path)


def test_links_to_data_that_is_not_here(tmp_path: Path):
    path = tmp_path / "t2w.nii.gz"
    path.symlink_to("../.git/annex/objects/0Z/fx/SHA256E-s9--4d.nii.gz/SHA256E-s9--4d.nii.gz")
    expect_pointer(path, "git-annex", "datalad get")
    path.unlink()
    path.symlink_to("elsewhere/t2w.nii.gz")
    with pytest.raises(DataError, match="this link points to a file that does not exist"):
        read_volume(path)


def test_pointers_among_the_files_of_a_volume(tmp_path: Path):
    raw, header = tmp_path / "voxels.raw", write_image(tmp_path / "t2w.mhd", {"ElementDataFile": "voxels.raw"}, b"")
    raw.write_text(LFS)
    expect_pointer(header, "Git LFS", "git lfs pull", raw)
    raw.unlink()
    raw.symlink_to(".git/annex/objects/a/b/KEY/KEY")
    expect_pointer(header, "git-annex", "git annex get", raw)
    series = write_nifti(tmp_path / "hbv.nii.gz", voxels((8, 8, 8, 3)))
    (tmp_path / "hbv.bval").write_text(LFS)
    expect_pointer(series, "Git LFS", "git lfs pull", tmp_path / "hbv.bval")
    folder = tmp_path / "t2w"
    folder.mkdir()
    (folder / "0.dcm").write_text(ANNEX)
    expect_pointer(folder, "git-annex", "git annex get", folder / "0.dcm")


def test_tables_lists_and_reports_that_are_pointers(tmp_path: Path):
    """The text of a pointer would be the report of a study, and a link to nothing no table at all."""
    studies = write_studies(tmp_path / "studies")
    table, report = studies / "studies.csv", studies / "r.txt"
    content = table.read_text()
    for pointer in (LFS, ANNEX):
        report.write_text(pointer)
        table.write_text("case,report_file\ncase0,r.txt\n")
        expect_unread(studies, report)
        table.write_text(pointer)
        expect_unread(studies, table)
        (tmp_path / "list.json").write_text(pointer)
        expect_unread(tmp_path / "list.json", tmp_path / "list.json")
    table.unlink()
    table.symlink_to(".git/annex/objects/a/b/KEY/KEY")
    expect_unread(studies, table)
    table.unlink()
    assert {study.report for study in find_studies(studies)} == {None}  # control: without a table
    table.write_text(content)
    assert {study.report for study in find_studies(studies)} != {None}


def expect_unread(data: Path, pointer: Path) -> None:
    with pytest.raises(DataError, match="is a pointer of .*: its data was not downloaded") as caught:
        find_studies(data)
    assert caught.value.path == str(pointer)
