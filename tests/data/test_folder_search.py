"""What is in a folder of studies is read, refused or named: names of series, folders below each other, links."""

from __future__ import annotations

import inspect
import os
import sys
from pathlib import Path

import pytest

from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.series_names import parse_series_name
from ccella_fast.errors import DataError


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0" * 128 + b"DICM" if name.endswith(".dcm") else b"x")
    return root


def found(root: Path, **options) -> dict[str, dict[str, str]]:
    """Id -> sequence -> path of its image, relative to the folder."""
    return {
        study.id: {sequence: path.relative_to(root).as_posix() for sequence, path in study.files.items()}
        for study in find_studies(root, **options)
    }


def refused(root: Path, **options) -> DataError:
    with pytest.raises(DataError) as caught:
        find_studies(root, **options)
    assert len(str(caught.value).splitlines()) <= 5 and caught.value.fix
    return caught.value


NAMES = {
    "t2w": "t2w T2W t2 axt2 axT2 ax_t2 t2_axial T2-ax t2_tra t2w_tra t2_tse_tra T2.TSE.TRA tra_t2w t2_2d_tse_tra axt2w",
    "hbv": "hbv HBV b1600 b1400 b2000 highb high_b dwi_high dwi_high_b dwi_b1500 dwi-b-1400 calc_b1500 dwi dwi_tra",
    "adc": "adc ADC adc_map dwi_adc adc_tra ep2d_diff_adc",
    None: "t2_cor t2w-coronal cor_t2w ax_cor_t2 sag_t2 t2_sag t2_map t2w_mask mask_t2w seg_adc b50 dwi_b800 t1 dce case_0000",
}


@pytest.mark.parametrize(("sequence", "name"), [(key, name) for key, names in NAMES.items() for name in names.split()])
def test_the_sequence_is_known_by_its_name(sequence: str | None, name: str):
    parsed = parse_series_name(name)
    assert (parsed and parsed[:2]) == (("", sequence) if sequence else None)
    prefixed = parse_series_name(f"Pat-07_{name}")
    assert (prefixed and prefixed[:2]) == (("Pat-07", sequence) if sequence else None)


def test_a_precise_name_takes_precedence_over_dwi(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Prostate158 has t2, adc and dwi; others have a dwi of several b-values next to the high one."""
    touch(tmp_path, *(f"020/{name}.nii.gz" for name in ("t2", "adc", "dwi")))
    touch(tmp_path, *(f"021/{name}.nii.gz" for name in ("t2", "hbv", "dwi")))
    assert found(tmp_path) == {
        "020": {"t2w": "020/t2.nii.gz", "adc": "020/adc.nii.gz", "hbv": "020/dwi.nii.gz"},
        "021": {"t2w": "021/t2.nii.gz", "hbv": "021/hbv.nii.gz"},
    }
    assert "021: not read" in caplog.text and "dwi.nii.gz" in caplog.text


@pytest.mark.parametrize(
    "name", ["t2w.dcm", "T2W.MGZ", "t2w.img", "t2_ax.zip", "t2w.tar.gz", "t2w.nii.bz2", "t2w.npy", "1_t2w.ima"]
)
def test_a_series_in_another_format_is_refused(tmp_path: Path, name: str):
    error = refused(touch(tmp_path, "a/adc.nii.gz", "b/t2w.nii.gz", f"a/{name}"))
    if name.endswith(".img"):  # of an Analyze pair, the header is named
        error = refused(touch(tmp_path, "a/t2w.hdr"))
        name = "t2w.hdr"
    assert error.path == str(tmp_path / "a" / name) and error.field == "t2w" and "is not read" in error.why


@pytest.mark.parametrize("name", ["t2w", "T2W-dicom", "t2_ax", "hbv", "adc_dcm"])
@pytest.mark.parametrize("content", [None, "readme.txt", "IM0001", "deep/er/readme.txt"])
def test_a_folder_with_the_name_of_a_series_but_no_series_is_refused(tmp_path: Path, name: str, content: str | None):
    touch(tmp_path, "b/t2w.nii.gz")
    (tmp_path / "a" / name).mkdir(parents=True)
    if content:
        touch(tmp_path / "a" / name, content)
    error = refused(tmp_path)
    assert error.path == str(tmp_path / "a" / name) and "holds no image that can be read" in error.why


def test_such_a_folder_next_to_the_series_is_only_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, "a/t2w.nii.gz", "a/t2w/notes.txt", "a/t2w.mgz")
    assert found(tmp_path) == {"a": {"t2w": "a/t2w.nii.gz"}}
    assert "t2w.mgz, t2w/" in caplog.text


def test_a_series_in_folders_of_its_own(tmp_path: Path):
    """DICOM one or several folders deeper, and the layout of converters: <study>/<sequence>/<any name>.nii.gz."""
    touch(tmp_path, "p1/t2w/S0001/1.dcm", "p1/adc/x/y/1.dcm", "p2/t2w/801.nii.gz", "p2/adc/902_adc.nii.gz")
    touch(tmp_path, "p3/t2w/t2w.nii.gz", "p3/t2w/mask.nii.gz")
    assert found(tmp_path) == {
        "p1": {"t2w": "p1/t2w/S0001", "adc": "p1/adc/x/y"},
        "p2": {"t2w": "p2/t2w/801.nii.gz", "adc": "p2/adc/902_adc.nii.gz"},
        "p3": {"t2w": "p3/t2w/t2w.nii.gz"},
    }


@pytest.mark.parametrize("names", [("S1/1.dcm", "S2/1.dcm"), ("1.nii.gz", "2.nii.gz"), ("S1/1.dcm", "1.mha")])
def test_two_series_in_the_folder_of_one_are_refused(tmp_path: Path, names: tuple[str, str]):
    error = refused(touch(tmp_path, *(f"a/t2w/{name}" for name in names)))
    assert error.path == str(tmp_path / "a/t2w") and "holds 2" in error.why
    assert all(name.removesuffix("/1.dcm") in error.why for name in names)


def test_a_folder_of_studies_may_have_the_name_of_a_series(tmp_path: Path):
    touch(tmp_path, "T2/p1/t2w.nii.gz", "T2/p2/t2w.nii.gz", "T2/7_t2w.mha")
    with pytest.raises(DataError, match="2 below it are not read: p1, p2"):
        find_studies(tmp_path)  # the file hides the folders
    (tmp_path / "T2/7_t2w.mha").unlink()
    assert sorted(found(tmp_path)) == ["p1", "p2"]


@pytest.mark.parametrize("place", ["", "site1/"])
@pytest.mark.parametrize(
    "series", [("t2w.nii.gz", "adc.nii.gz", "hbv.nii.gz"), ("t2w/1.dcm", "adc/1.dcm", "hbv/1.dcm")]
)
def test_the_id_of_a_study_may_be_the_name_of_a_series(place: str, series: tuple[str, ...], tmp_path: Path):
    """Ids such as B1234 are common, and look like a b-value. A folder that is a single series does not also hold a T2."""
    ids = ["A7", "B1234", "b2000"]
    touch(tmp_path, *(f"{place}{study}/{name}" for study in ids for name in series))
    assert sorted(found(tmp_path)) == ids
    assert all(set(files) == {"t2w", "adc", "hbv"} for files in found(tmp_path).values())


@pytest.mark.parametrize("place", [".", "site1"])
def test_a_stray_series_that_hides_studies_is_refused(tmp_path: Path, place: str):
    touch(tmp_path, "site1/001/t2w.nii.gz", "site1/002/t2w.nii.gz")
    assert sorted(found(tmp_path)) == ["001", "002"]
    error = refused(touch(tmp_path, f"{place}/t2w.nii.gz"))
    assert error.path == str(tmp_path / place) and "001" in error.why and "002" in error.why


def test_a_copy_below_a_study_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, "a/t2w.nii.gz", "a/resampled/t2w.nii.gz", "b/t2w.nii.gz")
    assert list(found(tmp_path)) == ["a", "b"]
    assert f"{tmp_path / 'a'}: this folder is a study" in caplog.text and "not read: resampled" in caplog.text


def test_what_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, "a/t2w.nii.gz", "a/lesion.nii.gz", "a/t2_cor.mha", "a/7.dcm", "a/notes.txt", "a/t2w.json")
    touch(tmp_path, "b/scan.nii.gz", "c/deep/er/scan.nii.gz", "c/d/t2w.mha", "participants.tsv", "readme.txt")
    touch(tmp_path, *(f"a/x{number}.nii" for number in range(9)), "e/t2w.mhd", "e/t2w.raw", ".hidden/t2w.nii")
    (tmp_path / "studies.csv").write_text("case\na\nd\ne\n")
    assert list(found(tmp_path)) == ["a", "d", "e"]
    text = [record.getMessage() for record in caplog.records]
    words = "not read, as their names are not those of series"
    assert text == [
        f"{tmp_path}: {words}: b/, participants.tsv",
        f"{tmp_path / 'a'}: {words}: 7.dcm, lesion.nii.gz, t2_cor.mha, x0.nii, x1.nii and 7 more",
        f"{tmp_path / 'c'}: {words}: deep/",
    ]


def test_the_warnings_are_bounded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, *(f"p{number:03}/{name}.nii.gz" for number in range(30) for name in ("t2w", "sag", "cor")))
    assert len(found(tmp_path)) == 30
    assert (
        len(caplog.records) == 21
        and "files and folders that are not read in 10 more folders: 20" in caplog.records[-1].getMessage()
    )


def test_images_of_other_names_are_named_when_no_study_is_found(tmp_path: Path):
    assert "case_0000.nii.gz" in refused(touch(tmp_path, "case_0000.nii.gz", "case_0001.nii.gz")).why


def test_a_folder_that_cannot_be_listed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a/t2w.nii.gz", "b/t2w.nii.gz")
    plain = Path.iterdir

    def iterdir(folder: Path):
        if folder.name == "b":
            raise PermissionError(13, "denied")
        return plain(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    error = refused(tmp_path)
    assert error.path == str(tmp_path / "b") and "cannot be read: Permission denied" in error.why


def test_deep_folders(tmp_path: Path):
    """The search does not recurse: with few frames left, it finds a study below many folders."""
    deep = "/".join(["d"] * 200)
    touch(tmp_path, f"{deep}/t2w.nii.gz")
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 150)
    try:
        assert found(tmp_path)["d"] == {"t2w": f"{deep}/t2w.nii.gz"}
    finally:
        sys.setrecursionlimit(limit)


# ---- links ----


def test_loops_end_and_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Three links to the folder itself led to three to the power of the longest path searches."""
    touch(tmp_path, "site/a/t2w.nii.gz", "site/b/t2w.nii.gz")
    for name in ("l1", "l2", "site/l3"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "alias").symlink_to("site/a")
    assert found(tmp_path) == {"a": {"t2w": "site/a/t2w.nii.gz"}, "b": {"t2w": "site/b/t2w.nii.gz"}}
    text = caplog.text
    assert all(
        f"{tmp_path / name}: this link leads back to a folder above it" in text for name in ("l1", "l2", "site/l3")
    )
    assert f"{tmp_path / 'alias'}: this link leads to a folder that is searched anyway" in text


@pytest.mark.parametrize("target", [".", "..", "/"])
def test_a_loop_with_the_name_of_a_series_is_refused(tmp_path: Path, target: str):
    touch(tmp_path, "a/adc.nii.gz")
    (tmp_path / "a/t2w").symlink_to(target)
    error = refused(tmp_path, follow_links=True)
    assert error.path == str(tmp_path / "a/t2w") and "link to a folder above it" in error.why


LINKED = {
    "file": ("a/t2w.nii.gz", "t2w.nii.gz", "a/t2w.nii.gz"),
    "folder of DICOM files": ("a/t2w", "series", "a/t2w"),
    "slice": ("a/t2w/1.dcm", "series/1.dcm", "a/t2w"),
    "folder of a study": ("a", ".", "a"),
    "folder in that of a series": ("a/t2w/x", "series", "a/t2w"),
}


@pytest.mark.parametrize(("link", "target", "named"), LINKED.values(), ids=LINKED)
def test_series_linked_from_elsewhere(tmp_path: Path, link: str, target: str, named: str):
    outside, root = touch(tmp_path / "archive", "t2w.nii.gz", "series/1.dcm"), tmp_path / "studies"
    touch(root, "b/t2w.nii.gz")
    (root / link).parent.mkdir(parents=True, exist_ok=True)
    (root / link).symlink_to(outside / target)
    error = refused(root)
    assert "leaves the data folder through a link" in error.why and "--follow_links" in error.fix
    assert error.path and error.path.startswith(str(root / named))
    assert sorted(found(root, follow_links=True)) == ["a", "b"]


def test_links_inside_the_folder_need_no_flag(tmp_path: Path):
    """git-annex and DataLad store files below .git and link to them."""
    touch(tmp_path, ".git/annex/objects/x/t2w", "raw/17/1.dcm")
    (tmp_path / "a").mkdir()
    (tmp_path / "a/t2w.nii.gz").symlink_to("../.git/annex/objects/x/t2w")
    (tmp_path / "b").mkdir()
    (tmp_path / "b/t2w").symlink_to("../raw/17")
    assert found(tmp_path) == {"a": {"t2w": "a/t2w.nii.gz"}, "b": {"t2w": "b/t2w"}}


@pytest.mark.parametrize("name", ["t2w.nii.gz", "t2w", "T2_AX-dicom"])
def test_a_series_that_is_a_link_to_nothing_is_refused(tmp_path: Path, name: str):
    touch(tmp_path, "a/adc.nii.gz")
    (tmp_path / "a" / name).symlink_to("/nowhere/17")
    for follow_links in (False, True):
        error = refused(tmp_path, follow_links=follow_links)
        assert error.path == str(tmp_path / "a" / name) and "a file that does not exist" in error.why


def test_other_links_to_nothing_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    touch(tmp_path, "a/t2w.nii.gz")
    (tmp_path / "a/lesion.nii.gz").symlink_to("/nowhere/17")
    assert list(found(tmp_path)) == ["a"]
    assert "lesion.nii.gz (a link to a file that does not exist)" in caplog.text


def test_a_pipe_with_the_name_of_a_series_is_refused(tmp_path: Path):
    """Opening it would wait for ever."""
    touch(tmp_path, "a/adc.nii.gz")
    os.mkfifo(tmp_path / "a/t2w.nii.gz")
    assert "neither a file nor a folder" in refused(tmp_path).why
