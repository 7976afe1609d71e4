"""NIfTI files with trailing axes, and 4D diffusion files of which one b-value is read."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ccella_fast.data.readers.volume_file import files_of_volume, read_volume
from ccella_fast.errors import DataError
from study_fixtures import SHAPE, oblique, patch_header, voxels, write_nifti


def expect_defect(path: Path, words: str, b_value: float | None = None) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_volume(path, b_value=b_value)
    assert caught.value.path and caught.value.field and caught.value.fix
    assert len(str(caught.value).splitlines()) <= 5


def write_series(path: Path, b_values: str | None, *, count: int = 3) -> list[np.ndarray]:
    """Write a 4D file and its `.bval`; returns the volumes, which all differ."""
    volumes = [voxels(seed=number) for number in range(count)]
    write_nifti(path, np.stack(volumes, -1))
    if b_values is not None:
        path.with_name(path.name.split(".")[0] + ".bval").write_text(b_values)
    return volumes


def place_in_ras(values: np.ndarray) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.Nifti1Image(values, oblique())).dataobj)


@pytest.mark.parametrize("extra", [(1,), (1, 1), (1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["t2w.nii", "t2w.nii.gz"])
def test_trailing_axes_of_one_are_left_out(tmp_path: Path, name: str, extra: tuple[int, ...]):
    plain = read_volume(write_nifti(tmp_path / "plain" / name))
    volume = read_volume(write_nifti(tmp_path / name, voxels().reshape(*SHAPE, *extra)))
    np.testing.assert_array_equal(volume.array, plain.array)
    np.testing.assert_array_equal(volume.affine, plain.affine)
    assert volume.notes == ()


def test_more_than_one_axis_of_volumes_raises(tmp_path: Path):
    for shape in ((*SHAPE[:2], 9, 2, 1, 2), (*SHAPE[:2], 9, 1, 2)):  # dim holds 4 and more volumes, or vectors
        write_nifti(tmp_path / "t2w.nii", voxels(shape))
        expect_defect(tmp_path / "t2w.nii", "dimensions, but 3 are expected")


@pytest.mark.parametrize("name", ["hbv.nii.gz", "hbv.nii"])
def test_the_volume_of_the_chosen_b_value_is_read(tmp_path: Path, name: str):
    path = tmp_path / name
    volumes = write_series(path, "50 1400\t800\n")
    assert files_of_volume(path) == [path, tmp_path / "hbv.bval"]
    for wanted, index in ((None, 1), (1400, 1), (800, 2), (50, 0)):
        volume = read_volume(path, b_value=wanted)
        np.testing.assert_array_equal(volume.array, place_in_ras(volumes[index]))
        np.testing.assert_allclose(volume.affine, nibabel.as_closest_canonical(nibabel.load(path)).affine, atol=1e-6)
        assert volume.notes == (f"b-value {[50, 1400, 800][index]} was read, out of 50, 800, 1400 s/mm2",)
    expect_defect(path, "no image of b-value 1000, only of 50, 800, 1400", 1000)


def test_intensities_of_one_volume_are_scaled(tmp_path: Path):
    path = tmp_path / "hbv.nii"
    volumes = write_series(path, "0 1000 500")
    patch_header(path, 112, struct.pack("<2f", 0.5, -3))
    np.testing.assert_allclose(read_volume(path).array, 0.5 * place_in_ras(volumes[1]) - 3, rtol=1e-6)


def test_a_4d_file_without_b_values_raises(tmp_path: Path):
    write_series(tmp_path / "hbv.nii.gz", None)
    expect_defect(tmp_path / "hbv.nii.gz", "3 volumes, and there is no hbv.bval")


def test_the_b_value_of_a_3d_file_is_compared_with_the_wanted_one(tmp_path: Path):
    path = write_nifti(tmp_path / "hbv.nii.gz")
    read_volume(path, b_value=800)  # nothing says otherwise
    (tmp_path / "hbv.bval").write_text("50")
    read_volume(path)
    read_volume(path, b_value=50)
    expect_defect(path, "no image of b-value 800, only of 50", 800)


DIRECTIONS = [("0 1000 1000", 1000), ("0 995 1005", 1000), ("1400 1399.5 50", 1400), ("0 0 800", 0)]


@pytest.mark.parametrize(("b_values", "shell"), DIRECTIONS)
def test_single_directions_are_not_taken_for_the_trace_image(tmp_path: Path, b_values: str, shell: float):
    path = tmp_path / "hbv.nii.gz"
    volumes = write_series(path, b_values)
    if shell:
        expect_defect(path, "2 volumes have a b-value of about .* the trace image is expected")
    else:
        expect_defect(path, "2 volumes have a b-value of about 0", 0)
        np.testing.assert_array_equal(read_volume(path).array, place_in_ras(volumes[2]))


@pytest.mark.parametrize(
    "b_values",
    [
        "",
        "0 800",
        "0 800 1400 2000",
        "0 800 x",
        "0 800 nan",
        "0 800 -5",
        "0,800,1400",
        "0 800 1e9",
        "\0" * 9,
        "0 " * 40_000,
    ],
    ids=["empty", "fewer", "more", "word", "nan", "negative", "commas", "huge", "zeros", "long"],
)
def test_damaged_b_values_raise(tmp_path: Path, b_values: str):
    write_series(tmp_path / "hbv.nii.gz", b_values)
    expect_defect(tmp_path / "hbv.nii.gz", "this file (is not a list of b-values|gives)")


def test_every_volume_of_a_gzip_stream_is_checked(tmp_path: Path):
    path = tmp_path / "hbv.nii.gz"
    write_series(path, "1400 800 0")  # the first volume is read
    content = path.read_bytes()
    for damaged in (content[:-9], content[:-1], content[:-20] + bytes([content[-20] ^ 8]) + content[-19:]):
        path.write_bytes(damaged)
        expect_defect(path, "cut off|damaged")
    path.write_bytes(gzip.compress(gzip.decompress(content) + b"\0"))
    expect_defect(path, "more data than its header says")
    path.write_bytes(gzip.compress(gzip.decompress(content)[:-1]))
    expect_defect(path, "cut off")


@pytest.mark.parametrize("name", ["qform_code", "sform_code"])
@pytest.mark.parametrize("code", [-1, 6, 127])
def test_unknown_codes_of_the_orientation_raise(tmp_path: Path, name: str, code: int):
    """nibabel replaces an unknown sform code by 0, so that the qform would take its place."""
    offset = {"qform_code": 252, "sform_code": 254}[name]
    path = patch_header(write_nifti(tmp_path / "t2w.nii.gz"), offset, struct.pack("<h", code))
    expect_defect(path, f"{name} is {code}, but 0 to 5 is expected")


@pytest.mark.parametrize("slope", [0, -0.0, np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_without_a_valid_slope_the_values_are_not_scaled(tmp_path: Path, dtype: str, slope: float):
    """As the format says for a slope of 0, whatever the intercept; nibabel reads one that is not finite in the same way."""
    path = patch_header(
        write_nifti(tmp_path / "t2w.nii", (voxels() % 200).astype(dtype)), 112, struct.pack("<2f", slope, 7)
    )
    truth = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata(dtype=np.float32)
    np.testing.assert_array_equal(read_volume(path).array, truth)
    np.testing.assert_array_equal(truth, place_in_ras(voxels() % 200))
    scaled = patch_header(path, 112, struct.pack("<2f", 2, 7))
    np.testing.assert_array_equal(read_volume(scaled).array, 2 * truth + 7)


@pytest.mark.parametrize("intercept", [np.nan, np.inf])
def test_a_slope_without_a_finite_intercept_raises(tmp_path: Path, intercept: float):
    path = patch_header(write_nifti(tmp_path / "t2w.nii"), 112, struct.pack("<2f", 1, intercept))
    expect_defect(path, "this is not a NIfTI volume")


def test_a_header_that_claims_more_than_the_stream_can_hold_costs_no_memory(tmp_path: Path):
    path = write_nifti(tmp_path / "t2w.nii.gz", np.zeros((8, 8, 8), np.float64))
    patch_header(path, 40, struct.pack("<8h", 3, 600, 600, 600, 1, 1, 1, 1))  # 1.7 GB
    tracemalloc.start()
    try:
        expect_defect(path, "cut off")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
