"""DICOM series that are written tag by tag: read at the right place, or DataError if one slice does not fit the others."""

from __future__ import annotations

import locale
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import DataError
from study_fixtures import SHAPE, voxels, write_dicom


def cosines(degrees: float, axis: str = "normal") -> str:
    """ImageOrientationPatient of an axial slice that is rotated about its normal or about its rows."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    columns = (c, s, 0, -s, c, 0) if axis == "normal" else (1, 0, 0, 0, c, s)
    return "\\".join(f"{value:.6f}" for value in columns)


def at(x: float = -31.5, y: float = -40.25, z: float = -20.75) -> str:
    return f"{x:.4f}\\{y:.4f}\\{z:.4f}"


def one(number: int, slice_number: int, value: str, otherwise: str) -> str:
    return value if slice_number == number else otherwise


ODD = {
    "orientation, about the normal": ({"t0020_0037": lambda n: one(7, n, cosines(5), cosines(0))}, "orientation"),
    "orientation, tilted": ({"t0020_0037": lambda n: one(7, n, cosines(5, "rows"), cosines(0))}, "orientation"),
    "orientation, mirrored": ({"t0020_0037": lambda n: one(0, n, "-1\\0\\0\\0\\1\\0", cosines(0))}, "orientation"),
    "voxel size": ({"t0028_0030": lambda n: one(17, n, "1.5\\1.8", "1.5\\1.5")}, "voxel size"),
    "height": ({"t0020_0032": lambda n: at(z=3.0 * n + one_mm(n))}, "unevenly"),
    "position in its plane, right": ({"t0020_0032": lambda n: at(x=-31.5 + one_mm(n), z=3.0 * n)}, "shifted.* 1.00 mm"),
    "position in its plane, front": ({"t0020_0032": lambda n: at(y=-40.25 + one_mm(n), z=3.0 * n)}, "shifted.* 1.00 mm"),
    "sheared": ({"t0020_0032": lambda n: at(x=2.0 * n, z=3.0 * n)}, "shifted.* 34.00 mm"),
    "two slices at one position": ({"t0020_0032": lambda n: at(z=3.0 * min(n, SHAPE[2] - 2))}, "same position"),
    "no position": ({"t0020_0032": lambda n: None if n == 3 else at(z=3.0 * n)}, "no position|cannot be read|position"),
    "series": ({"t0020_000e": lambda n: one(5, n, "1.2.3.9", "1.2.3.4")}, "2 DICOM series"),
}  # fmt: skip


def one_mm(number: int) -> float:
    return float(number == 4)


@pytest.mark.parametrize(("tags", "words"), ODD.values(), ids=ODD)
def test_a_slice_that_does_not_fit_raises(tags: dict[str, Any], words: str, tmp_path: Path):
    write_dicom(tmp_path, **tags)
    with pytest.raises(DataError, match=words) as caught:
        read_volume(tmp_path)
    assert caught.value.path == str(tmp_path) and caught.value.field and caught.value.fix


def test_a_slice_of_another_size_raises(tmp_path: Path):
    write_dicom(tmp_path)
    large = write_dicom(tmp_path / "large", voxels((44, 36, 18)))
    large[9].replace(tmp_path / large[9].name)
    for path in large[:9] + large[10:]:
        path.unlink()
    with pytest.raises(DataError, match="differ in size"):
        read_volume(tmp_path)


@pytest.mark.parametrize("degrees", [0, 12], ids=["axial", "tilted"])
def test_a_valid_series_is_where_its_tags_place_it(degrees: float, tmp_path: Path):
    """The affine is computed by hand from position, orientation and pixel spacing; the order of the files is irrelevant."""
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    rows, columns, normal = np.array([1, 0, 0]), np.array([0, c, s]), np.array([0, -s, c])
    first = np.array([-31.5, -40.25, -20.75])
    write_dicom(
        tmp_path, t0020_0037=cosines(degrees, "rows"), t0020_0032=lambda n: at(*(first + 3 * n * normal)),
        t0028_0030="1.25\\0.75",
    )  # fmt: skip
    volume, stored = read_volume(tmp_path), voxels()
    for index in [(0, 0, 0), (39, 0, 5), (3, 35, 17), (20, 11, 9)]:
        in_plane = 0.75 * index[0] * rows + 1.25 * index[1] * columns  # rows are 1.25 mm apart
        lps = first + in_plane + 3 * index[2] * normal
        voxel = np.linalg.solve(volume.affine, [-lps[0], -lps[1], lps[2], 1])[:3]
        np.testing.assert_allclose(voxel, np.rint(voxel), atol=2e-3)
        assert volume.array[tuple(np.rint(voxel).astype(int))] == stored[index]
    np.testing.assert_allclose(volume.spacing, [0.75, 1.25, 3], atol=1e-4)


def test_each_slice_has_its_own_rescaling(tmp_path: Path):
    """Some scanners give every slice its own slope and intercept: the voxel type of the first slice must not hold for all."""
    values = voxels() - voxels().min((0, 1))  # every slice has a 0, which a negative intercept moves below 0
    paths = write_dicom(tmp_path, values, t0028_1053="1", t0028_1052="0")
    plain = read_volume(tmp_path).array.astype(np.float64)
    slopes = [["1 ", ".5", "3 "][n % 3] for n in range(SHAPE[2])]
    intercepts = ["-9" if n % 2 else "0 " for n in range(SHAPE[2])]
    for path, slope, intercept in zip(paths, slopes, intercepts, strict=True):
        content = path.read_bytes()
        for element, old, new in [
            (b"\x28\0\x53\x10\2\0\0\0", b"1 ", slope),
            (b"\x28\0\x52\x10\2\0\0\0", b"0 ", intercept),
        ]:
            assert content.count(element + old) == 1
            content = content.replace(element + old, element + new.encode())
        path.write_bytes(content)
    expected = plain * np.array(slopes, float) + np.array(intercepts, float)
    assert expected.min() < 0 and np.abs(expected - np.rint(expected)).max() == 0.5
    np.testing.assert_array_equal(read_volume(tmp_path).array, expected)


def test_reading_and_writing_a_series_keep_the_locale(tmp_path: Path):
    before = locale.setlocale(locale.LC_ALL), locale.getencoding()
    write_dicom(tmp_path / "series")
    read_volume(tmp_path / "series")
    assert (locale.setlocale(locale.LC_ALL), locale.getencoding()) == before
