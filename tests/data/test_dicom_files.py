"""Which files of a DICOM folder are read, refused by name or named in a note: no slice is lost without a word."""

from __future__ import annotations

import gzip
import os
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian

from ccella_fast.data.readers import dicom_files
from ccella_fast.data.readers.dicom_files import is_dicom_folder
from ccella_fast.data.readers.dicom_series import read_dicom_series
from ccella_fast.errors import ConfigError, DataError
from dicom_fixtures import slices, write_index, write_slices

LAST = 5


def expect_defect(folder: Path, words: str, file: Path | None = None) -> None:
    """Reading raises a DataError with these words that names the file, or else the folder, and nothing from a header."""
    with pytest.raises(DataError, match=words) as caught:
        read_dicom_series(folder)
    assert caught.value.path == str(folder if file is None else file) and caught.value.field and caught.value.fix
    assert "CANARY" not in str(caught.value)


def without_pixels(content: bytes) -> bytes:
    return content[: content.index(b"\xe0\x7f\x10\0OW")]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda content: b"",
    "cut in the preamble": lambda content: content[:100],
    "cut in the header": lambda content: content[:400],
    "cut before the pixels": without_pixels,
    "cut in the pixels": lambda content: content[:-10],
    "cut by one byte": lambda content: content[:-1],
    "without its mark": lambda content: content.replace(b"DICM", b"DICN"),
    "overwritten by text": lambda content: b"version https://git-lfs.github.com/spec/v1\nsize 3\n",
    "overwritten by zeros": lambda content: bytes(len(content)),
    "header overwritten": lambda content: content[:200] + bytes(range(1, 200)) + content[399:],
}


@pytest.mark.parametrize("number", [0, 3, LAST])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_slice_is_named(damage: Callable[[bytes], bytes], number: int, tmp_path: Path):
    """A reader that leaves out what it cannot parse returns 5 of 6 slices for the first and the last."""
    path = write_slices(tmp_path)[number]
    path.write_bytes(damage(path.read_bytes()))
    expect_defect(tmp_path, "DICOM", path)


@pytest.mark.parametrize("number", [0, LAST])
def test_a_damaged_slice_is_named_among_files_without_a_suffix(number: int, tmp_path: Path):
    paths = [path.rename(tmp_path / f"1.2.840.{10 * n}.7") for n, path in enumerate(write_slices(tmp_path))]
    assert read_dicom_series(tmp_path).array.shape[2] == 6
    paths[number].write_bytes(b"")
    expect_defect(tmp_path, "name of a DICOM image, but is empty", paths[number])


@pytest.mark.parametrize("suffix", [".dcm", ""])
@pytest.mark.parametrize("appended", [".gz", ".PART"])
def test_a_slice_that_is_compressed_or_was_not_transferred_is_named(suffix: str, appended: str, tmp_path: Path):
    paths = [path.rename(tmp_path / f"IM{n}{suffix}") for n, path in enumerate(write_slices(tmp_path))]
    part = paths[LAST].rename(tmp_path / f"{paths[LAST].name}{appended}")
    assert read_dicom_series(tmp_path).array.shape[2] == 6  # complete: only its name is odd
    part.write_bytes(gzip.compress(part.read_bytes()) if appended == ".gz" else part.read_bytes()[:100])
    expect_defect(tmp_path, "name of a DICOM image, but is no DICOM file", part)


def report_object(path: Path) -> None:
    """Write a structured report, which has no pixels."""
    dataset: Any = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.88.11", "1.2.9"
    dataset.PatientName, dataset.Modality, dataset.SeriesInstanceUID = "CANARY^NAME", "SR", "1.2.3.9"
    dataset.save_as(path, enforce_file_format=True)


def test_files_that_are_no_slices_are_named_and_hide_nothing(tmp_path: Path):
    write_slices(tmp_path)
    expected = read_dicom_series(tmp_path)
    assert expected.notes == ()
    for name, content in {"AAA.txt": b"text", "LICENSE": b"", "info.json": b"{}", "Thumbs.db": bytes(600)}.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "sub").mkdir()
    (tmp_path / ".DS_Store").write_bytes(b"x")
    report_object(tmp_path / "SR000.dcm")
    assert is_dicom_folder(tmp_path)
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.notes == (
        "4 not read, as they are not DICOM: AAA.txt, LICENSE, Thumbs.db, info.json",
        "2 not read, as they are DICOM, but no images: DICOMDIR, SR000.dcm",
        "1 not read, as they are in folders below that of the series: sub",
    )


@pytest.mark.parametrize("name", ["DICOMDIR", "dicomdir", "DICOMDIR;1", "index.dcm"])
@pytest.mark.parametrize("is_deflated", [False, True], ids=["plain", "of deflated files"])
def test_the_index_of_a_disc_is_no_image_whatever_its_name(name: str, is_deflated: bool, tmp_path: Path):
    paths = write_slices(tmp_path)
    expected = read_dicom_series(tmp_path)
    for path in paths if is_deflated else ():
        deflate(path)
    write_index(tmp_path / name, paths)
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, expected.array)
    assert volume.notes == (f"1 not read, as they are DICOM, but no images: {name}",)


def test_many_other_files_are_counted(tmp_path: Path):
    for path in write_slices(tmp_path):
        for suffix in ("a.json", "b.xml"):
            (tmp_path / f"{path.stem}{suffix}").write_text("{}")
    assert read_dicom_series(tmp_path).notes[0].endswith("image004b.xml, 2 more")


def test_a_folder_is_dicom_if_any_file_is(tmp_path: Path):
    assert not is_dicom_folder(tmp_path)
    (tmp_path / "README").write_text("not an image\n" * 99)
    (tmp_path / ".hidden.dcm").write_bytes(bytes(128) + b"DICM")
    (tmp_path / "sub.dcm").mkdir()
    assert not is_dicom_folder(tmp_path)
    (tmp_path / "z").write_bytes(bytes(128) + b"DICM")
    assert is_dicom_folder(tmp_path)


def test_a_folder_of_emptied_slices_is_dicom_so_that_they_are_named(tmp_path: Path):
    for name in ("a.DCM", "b.ima"):
        (tmp_path / name).write_bytes(b"")
    assert is_dicom_folder(tmp_path)
    expect_defect(tmp_path, "is empty", tmp_path / "a.DCM")


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", ExplicitVRLittleEndian], ids=["implicit", "explicit"])
def test_files_without_preamble_are_read(syntax: str, tmp_path: Path):
    paths = write_slices(tmp_path, syntax=syntax)
    expected = read_dicom_series(tmp_path)
    for number, path in enumerate(paths):
        content = path.read_bytes()
        (tmp_path / f"IM{number}").write_bytes(content[content.index(b"\x08\0\x08\0") :])  # from ImageType on
        path.unlink()
    assert is_dicom_folder(tmp_path)
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)


def test_a_link_that_leads_nowhere_and_a_pipe_are_named(tmp_path: Path):
    paths = write_slices(tmp_path)
    paths[LAST].unlink()
    paths[LAST].symlink_to("../.git/annex/objects/x")
    expect_defect(tmp_path, "leads nowhere", paths[LAST])
    paths[LAST].unlink()
    os.mkfifo(paths[LAST])
    expect_defect(tmp_path, "no file", paths[LAST])


def test_missing_slices_are_noted_where_headers_tell(tmp_path: Path):
    paths = write_slices(tmp_path / "first")
    paths[0].unlink()
    assert read_dicom_series(tmp_path / "first").notes == (
        "images may be missing: InstanceNumber runs from 2 to 6",
    )  # fmt: skip
    write_slices(tmp_path / "last", change=lambda d, n: setattr(d, "ImagesInAcquisition", 7))
    assert read_dicom_series(tmp_path / "last").notes == (
        "images may be missing: ImagesInAcquisition is 7, the folder holds 6",
    )  # fmt: skip
    write_slices(tmp_path / "gap", change=lambda d, n: setattr(d, "InstanceNumber", n + 1 + (n > 2)))
    assert "from 1 to 7, 1 numbers are missing" in read_dicom_series(tmp_path / "gap").notes[0]
    paths = write_slices(tmp_path / "middle")
    paths[2].unlink()
    expect_defect(
        tmp_path / "middle", "unevenly: 6.00 mm after slice 2, 3.00 mm elsewhere: image001.dcm and image003.dcm"
    )


def test_two_series_are_counted_and_not_described(tmp_path: Path):
    write_slices(tmp_path)
    write_slices(
        tmp_path, slices((12, 10, 2)), lambda d, n: setattr(d, "SeriesInstanceUID", "1.2.3.9"), first_file=50
    )  # fmt: skip
    expect_defect(tmp_path, "2 DICOM series.* 2 files such as image050.dcm, 6 files such as image000.dcm")


def test_a_copy_of_a_slice_is_named(tmp_path: Path):
    path = write_slices(tmp_path)[3]
    (tmp_path / "z.dcm").write_bytes(path.read_bytes())
    expect_defect(tmp_path, r"2 images are at the same position \(image003.dcm and z.dcm\)")


def element(group: int, number: int, vr: bytes, value: bytes = b"", length: int | None = None) -> bytes:
    size = struct.pack(
        "<HI" if vr in (b"SQ", b"OB", b"UN") else "<H", *([0] * (vr in (b"SQ", b"OB", b"UN"))), length or len(value)
    )
    return struct.pack("<HH", group, number) + vr + size + value


UNDEFINED = 0xFFFFFFFF
ITEM, ITEM_END, END = (
    struct.pack("<HHI", 0xFFFE, number, size) for number, size in [(0xE000, UNDEFINED), (0xE00D, 0), (0xE0DD, 0)]
)
NESTED = (element(0x20, 0x9999, b"SQ", length=UNDEFINED) + ITEM) * 1000 + (ITEM_END + END) * 1000
BOMBS = {
    "nested": (NESTED, "cannot be parsed"),
    "elements": (element(0x21, 0x1001, b"LO") * 3000, "cannot be parsed"),
    "elements in a sequence": (
        element(0x20, 0x9999, b"SQ", length=UNDEFINED) + ITEM + element(0x21, 0x1001, b"LO") * 3000 + ITEM_END + END,
        "cannot be parsed",
    ),
    "items": (element(0x20, 0x9999, b"SQ", struct.pack("<HHI", 0xFFFE, 0xE000, 0) * 3000), "more than 2000 items"),
    "long value": (element(0x21, 0x1001, b"UN", b"abcd", 0xFFFFFFF0), "cut off"),
    "no end": (element(0x21, 0x1001, b"OB", b"abcd", UNDEFINED), "cut off before"),
    "long header": (element(0x21, 0x1001, b"UN", bytes(40000)), "header of more than 30000 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("inserted", "words"), BOMBS.values(), ids=BOMBS)
def test_a_header_is_parsed_within_bounds(inserted: bytes, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The bounds are lowered, so that the test is quick; at their own value each takes seconds and below 100 MB."""
    for name, value in [("_MAX_READS", 2000), ("_MAX_ITEMS", 2000), ("_MAX_HEADER_BYTES", 30000)]:
        monkeypatch.setattr(dicom_files, name, value)
    path = write_slices(tmp_path)[2]
    content = path.read_bytes()
    before = content.index(b"\x28\0\x02\0US")
    read_dicom_series(tmp_path)
    path.write_bytes(content[:before] + inserted + content[before:])
    expect_defect(tmp_path, words, path)


def deflate(path: Path) -> None:
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    dataset.save_as(path)


@pytest.mark.parametrize("numbers", [range(LAST + 1), [2]], ids=["all", "one"])
def test_deflated_files_are_read(numbers: Iterable[int], tmp_path: Path):
    paths = write_slices(tmp_path)
    expected = read_dicom_series(tmp_path)
    for number in numbers:
        deflate(paths[number])
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, expected.array)
    np.testing.assert_array_equal(volume.affine, expected.affine)
    assert volume.notes == expected.notes


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[:-40], "its compressed part does not end"),
        (lambda content: content + b"more", "it goes on after the end of its compressed part"),
        (lambda content: content[:360] + b"\xff" * 20 + content[380:], "damaged|cut off"),
        (lambda content: content.replace(b"1.2.840.10008.1.2.1.99", b"1.2.840.10008.1.2.1\0\0\0"), "DICOM"),
        (lambda content: content.replace(b"UL\4\0", b"UN\4\0", 1), "not in its meta information"),
    ],
    ids=["cut", "longer", "changed", "called explicit", "no length"],
)
def test_a_damaged_deflated_file_is_named(damage: Callable[[bytes], bytes], words: str, tmp_path: Path):
    path = write_slices(tmp_path)[LAST]
    deflate(path)
    path.write_bytes(damage(path.read_bytes()))
    expect_defect(tmp_path, words, path)


def test_deflated_files_share_a_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    paths = write_slices(tmp_path)
    meta = 144 + pydicom.dcmread(paths[0]).file_meta.FileMetaInformationGroupLength
    size = paths[0].stat().st_size - meta  # about that of each
    monkeypatch.setattr(dicom_files, "MAX_INFLATED", 3 * size + size // 2)
    for path in paths[:3]:
        deflate(path)
    read_dicom_series(tmp_path)
    deflate(paths[3])
    expect_defect(tmp_path, "inflates to more than", paths[3])


def test_too_many_bytes_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_slices(tmp_path)
    monkeypatch.setattr(dicom_files, "_MAX_BYTES", 5000)
    expect_defect(tmp_path, "at most 5000 are read")


def test_without_pydicom_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_slices(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.config", None)
    with pytest.raises(ConfigError, match="needs pydicom") as caught:
        read_dicom_series(tmp_path)
    assert caught.value.fix == 'pip install "ccella-fast[dicom]"'
