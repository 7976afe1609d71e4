"""Readers and resampling against SimpleITK, analytic fields and the output of picai_prep; damaged files raise DataError."""

from __future__ import annotations

import gzip
import resource
import shutil
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.data.preparation import resampling as module
from ccella_fast.data.preparation.resampling import covers_center, make_grid, normalize, resample
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_file import FORMATS, check_axial, read_volume
from ccella_fast.errors import DataError
from study_fixtures import SHAPE, oblique, patch_header, voxels, write_nifti

LPS = np.array([-1.0, -1.0, 1.0])


def expect_defect(path: Path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        check_axial(read_volume(path), path)
    assert caught.value.path == str(path) and caught.value.field and caught.value.fix
    assert len(str(caught.value).splitlines()) <= 5


# ---- geometry ----


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".mha", ".nrrd"])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)], ids=["xyz", "zxy"])
def test_a_point_is_the_same_voxel_as_in_simpleitk(tmp_path: Path, suffix: str, order: tuple[int, ...]):
    source = sitk.ReadImage(str(write_nifti(tmp_path / "source.nii")))
    image = sitk.PermuteAxes(source, order)
    path = tmp_path / f"t2w{suffix}"
    sitk.WriteImage(image, str(path), suffix == ".nrrd")
    volume = read_volume(path)
    rng = np.random.default_rng(1)
    for _ in range(50):
        index = [int(rng.integers(size)) for size in image.GetSize()]
        point = np.array(image.TransformIndexToPhysicalPoint(index)) * LPS
        voxel = nibabel.affines.apply_affine(np.linalg.inv(volume.affine), point)
        assert np.abs(voxel - np.rint(voxel)).max() < 1e-3
        assert volume.array[tuple(np.rint(voxel).astype(int))] == image[index]
    assert nibabel.aff2axcodes(volume.affine) == ("R", "A", "S")
    assert volume.array.dtype == np.float32 and volume.affine.dtype == np.float64


def test_a_new_format_is_one_row_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "study" / "t2w.raw3d"
    path.parent.mkdir()
    path.write_bytes(voxels().tobytes())
    with pytest.raises(DataError, match="no study was found"):
        find_studies(tmp_path)
    with pytest.raises(DataError, match="the file format '.raw3d' is not supported"):
        read_volume(path)

    def read(path: Path, b_value: float | None) -> StoredVolume:
        array = np.frombuffer(path.read_bytes(), np.uint16).reshape(SHAPE).astype(np.float32)
        return StoredVolume(array, np.diag([1.5, 1.5, 3, 1]))

    monkeypatch.setitem(FORMATS, ".raw3d", read)
    assert find_studies(tmp_path)[0].files == {"t2w": path}
    np.testing.assert_array_equal(read_volume(path).array, voxels())


def test_oblique_directions_are_kept(real_data: Path):
    for path in sorted((real_data / "mri").glob("*/t2w*")):
        if "coronal" in path.name:
            continue
        volume = read_volume(path)
        tilt = np.rad2deg(np.arccos(volume.affine[2, 2] / volume.spacing[2]))
        assert 11.5 < tilt < 19, path  # data/README.md: 12.0 to 18.5 degrees
        np.testing.assert_allclose(volume.spacing, [0.5, 0.5, 3], atol=1e-4)


def test_dicom_nifti_and_mha_of_one_series_are_equal(real_data: Path, tmp_path: Path):
    folder = real_data / "mri" / "prostate3t-03-0001" / "t2w-dicom"
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    dicom = read_volume(folder)
    grid = make_grid(dicom, [1.0, 1.0, 3.0], [96, 96, 16])
    prepared = resample(dicom, grid)
    for name in ("t2w.nii.gz", "t2w.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        other = read_volume(tmp_path / name)
        np.testing.assert_array_equal(other.array, dicom.array)
        np.testing.assert_allclose(other.affine, dicom.affine, atol=2e-4)
        again = make_grid(other, [1.0, 1.0, 3.0], [96, 96, 16])
        np.testing.assert_allclose(resample(other, again), prepared, atol=0.02)
    assert np.abs(np.flip(prepared, 0) - prepared).max() > 100  # control: a mirrored volume differs


@pytest.mark.parametrize(
    ("spacing", "dim"),
    [([1.5, 1.5, 3.0], [32, 48, 16]), ([1.1, 1.3, 2.0], [48, 32, 32]), ([2.7, 1.5, 4.1], [16, 32, 16])],
    ids=["same-spacing", "finer", "coarser"],
)
def test_linear_field_is_reproduced(spacing: list[float], dim: list[int]):
    """Away from the edges B-splines reproduce a linear function of position exactly, so any shift or flip would show."""

    def field(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        points = nibabel.affines.apply_affine(affine, np.stack(np.indices(shape), -1))
        return points @ [2.0, -3.0, 1.5] + 100

    affine = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros(SHAPE), oblique())).affine
    volume = StoredVolume(field(affine, SHAPE).astype(np.float32), affine)
    grid = make_grid(volume, spacing, dim)
    inner = tuple(slice(part.start + 5, part.stop - 5) for part in grid.inner)
    expected = field(grid.affine, grid.shape)
    result = np.zeros(grid.shape)
    result[grid.inner] = resample(volume, grid)
    assert all(part.stop - part.start > 2 for part in inner)
    np.testing.assert_allclose(result[inner], expected[inner], atol=0.05)
    shifted = grid.affine.copy()
    shifted[:3, 3] += shifted[:3, 0] / 2
    assert np.abs(field(shifted, grid.shape)[inner] - expected[inner]).max() > 1  # control: a shift by half a voxel


def test_right_spacing_means_no_interpolation():
    volume = _volume()
    grid = make_grid(volume, [1.5, 1.5, 3.0], [33, 30, 22])
    assert grid.inner == (slice(0, 33), slice(0, 30), slice(2, 20))
    np.testing.assert_array_equal(resample(volume, grid), volume.array[3:36, 3:33, :])
    first = nibabel.affines.apply_affine(volume.affine, [3, 3, -2])
    np.testing.assert_allclose(grid.affine[:3, 3], first, atol=1e-9)


def test_coarser_grids_are_smoothed_first():
    """A Gaussian of sigma voxels leaves 1 / (2 sqrt(pi) sigma) of the variance of white noise per axis."""
    noise = np.random.default_rng(0).standard_normal((96, 96, 24)).astype(np.float32)
    volume = StoredVolume(noise, np.diag([1.0, 1.0, 3.0, 1.0]))
    coarse = resample(volume, make_grid(volume, [4.0, 4.0, 3.0], [24, 24, 24]))
    sigma = np.sqrt((4.0**2 - 1) / (8 * np.log(2)))
    np.testing.assert_allclose(coarse[2:-2, 2:-2].std(), 1 / (2 * np.sqrt(np.pi) * sigma), rtol=0.1)
    assert noise[::4, ::4].std() > 0.9  # control: subsampling without a filter keeps all of it


def test_separable_resampling_equals_itk(real_data: Path, monkeypatch: pytest.MonkeyPatch):
    """T2 on finer and coarser grids and beyond the ends of the series, and ADC on the grid of T2."""
    folder = real_data / "mri" / "prostatex-0000"
    leading, calls = read_volume(folder / "t2w.mha"), []
    with_itk = module._resample_with_itk
    monkeypatch.setattr(module, "_resample_with_itk", lambda *arguments: calls.append(1) or with_itk(*arguments))
    for name, spacing, dim in [
        ("t2w", [0.5, 0.5, 1.5], [128, 128, 64]), ("t2w", [1.3, 0.9, 4.1], [160, 64, 32]),
        ("adc", [0.8, 0.8, 2.0], [96, 192, 48]),
    ]:  # fmt: skip
        volume, grid = read_volume(folder / f"{name}.mha"), make_grid(leading, spacing, dim)
        separable = resample(volume, grid)
        assert not calls
        with monkeypatch.context() as patch:
            patch.setattr(module, "_resample_by_axis", with_itk)
            expected = resample(volume, grid)
        assert np.ptp(expected) > 0.3 * np.ptp(volume.array)
        assert np.abs(separable - expected).max() < 2e-6 * np.ptp(volume.array)
    rotated = StoredVolume(
        volume.array, leading.affine @ np.diag([4, 4, 1, 1]) @ nibabel.affines.from_matvec(_rotation(5))
    )
    resample(rotated, grid)
    assert calls == [1]  # grids that are rotated against each other are not separable


def _rotation(degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])


def test_resampling_matches_picai_prep(real_data: Path):
    """picai_prep cropped T2 without resampling and resampled ADC and high b to its grid with B-splines."""
    folder = real_data / "mri" / "prostatex-0000"
    grid = make_grid(read_volume(folder / "t2w.mha"), [0.5, 0.5, 3.0], [160, 160, 20])
    limits = {"t2w": 0.99999, "adc": 0.998, "hbv": 0.997}
    for name, limit in limits.items():
        expected = read_volume(folder / "resampled-by-picai_prep" / f"{name}.nii.gz")
        resampled = resample(read_volume(folder / f"{name}.mha"), grid)
        np.testing.assert_allclose(grid.affine, expected.affine, atol=1e-3)
        inner = expected.array[grid.inner]
        assert np.corrcoef(resampled.ravel(), inner.ravel())[0, 1] >= limit, name
        assert np.corrcoef(resampled[:-1].ravel(), inner[1:].ravel())[0, 1] < limit, "control: a shift by one voxel"
        if name == "t2w":
            assert np.abs(resampled - inner).max() <= 1
    assert expected.array[..., 19].max() == 0  # both add the slice at the head end
    assert grid.inner[2] == slice(0, 19)


def test_normalize_follows_the_protocol():
    volume = _volume()
    grid = make_grid(volume, [1.5, 1.5, 3.0], [48, 32, 16])
    values = resample(volume, grid)
    image, (low, high) = normalize(values, "t2w", grid)
    ordered = np.sort(values.ravel().astype(np.float64))
    position = 0.995 * (ordered.size - 1)
    below = int(position)
    expected_high = ordered[below] + (position - below) * (ordered[below + 1] - ordered[below])
    assert low == ordered[0] and high == pytest.approx(expected_high, rel=1e-12)
    np.testing.assert_allclose(image[grid.inner], np.clip((values - low) / (high - low), 0, 1), atol=1e-6)
    outside = np.ones(grid.shape, bool)
    outside[grid.inner] = False
    assert outside.any() and (image[outside] == 0).all() and image.dtype == np.float32
    adc, window = normalize(values, "adc", grid)
    np.testing.assert_allclose(adc[grid.inner], np.clip(values / 3000, 0, 1), atol=1e-6)
    assert window == (0, 3000)


def test_volume_outside_the_center_of_the_grid_is_detected():
    volume = _volume()
    grid = make_grid(volume, [1.5, 1.5, 3.0], [32, 32, 16])
    moved = volume.affine.copy()
    moved[0, 3] += 80
    assert covers_center(volume, grid) and not covers_center(StoredVolume(volume.array, moved), grid)


def test_coronal_and_sagittal_series_raise(tmp_path: Path, real_data: Path):
    expect_defect(real_data / "mri/prostatex-0000/t2w-coronal.mha", "coronal")
    image = sitk.ReadImage(str(write_nifti(tmp_path / "a.nii")))
    for order in ((2, 0, 1), (0, 2, 1)):  # the order in memory does not decide the plane
        sitk.WriteImage(sitk.PermuteAxes(image, order), str(tmp_path / "b.nii"))
        check_axial(read_volume(tmp_path / "b.nii"), tmp_path / "b.nii")
    sagittal = np.array([[0, 0, 3, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1]], float)
    expect_defect(write_nifti(tmp_path / "s.nii", voxels(), sagittal), "sagittal")


# ---- damaged files and invalid headers ----


def test_flipped_bit_in_gzip_raises(tmp_path: Path):
    path = write_nifti(tmp_path / "t2w.nii.gz")
    expected, content = read_volume(path), path.read_bytes()
    rng = np.random.default_rng(3)
    accepted_by_nibabel = 0
    for position in rng.integers(10, len(content), 200):
        flipped = bytearray(content)
        flipped[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(DataError):
            read_volume(path)
        try:
            np.asarray(nibabel.load(path).dataobj)
            accepted_by_nibabel += 1
        except Exception:  # nibabel raises several types
            pass
    assert accepted_by_nibabel > 0, "control: a reader that stops at the last voxel accepts some"
    path.write_bytes(content)
    np.testing.assert_array_equal(read_volume(path).array, expected.array)


@pytest.mark.parametrize("kept", [0, 1, 9, 200, 5000, -1, -8])
def test_truncated_file_raises(tmp_path: Path, kept: int):
    for name in ("t2w.nii.gz", "t2w.nii"):
        path = write_nifti(tmp_path / name)
        path.write_bytes(path.read_bytes()[:kept])
        expect_defect(path, "cut off|not a NIfTI|damaged")


@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
def test_damaged_mha_and_nrrd_raise(tmp_path: Path, suffix: str):
    path = tmp_path / f"t2w{suffix}"
    for compressed in (True, False):
        sitk.WriteImage(sitk.ReadImage(str(write_nifti(tmp_path / "a.nii"))), str(path), compressed)
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 2 // 3])
        expect_defect(path, "cut off")
        if compressed:
            flipped = bytearray(content)
            flipped[len(content) * 2 // 3] ^= 4
            path.write_bytes(flipped)
            expect_defect(path, "damaged")
            smaller = content.replace(b"DimSize = 40 36 18", b"DimSize = 8 8 8").replace(
                b"sizes: 40 36 18", b"sizes: 8 8 8"
            )
            assert smaller != content
            path.write_bytes(smaller)
            expect_defect(path, "more data than its header says")
    elsewhere = content.replace(b"ElementDataFile = LOCAL", b"ElementDataFile = x.raw")
    path.write_bytes(elsewhere.replace(b"encoding", b"data file: x\nencoding"))
    expect_defect(path, "the file of the voxels, '.*', is missing")
    zero = content.replace(b"ElementSpacing = 1.5", b"ElementSpacing = 0")
    if zero != content:
        path.write_bytes(zero)
        expect_defect(path, "voxel size is .0.0, ")


HEADER = [
    ("zero pixdim", 80, struct.pack("<f", 0), "voxel size"),  # nibabel would make it 1 mm
    ("negative pixdim", 84, struct.pack("<f", -1), "voxel size"),
    ("NaN pixdim", 88, struct.pack("<f", float("nan")), "voxel size"),
    ("4D", 40, struct.pack("<8h", 4, 20, 36, 18, 2, 1, 1, 1), "2 volumes, and there is no t2w.bval"),
    ("2D", 40, struct.pack("<8h", 2, 40, 36, 1, 1, 1, 1, 1), "2 dimensions"),
    ("one slice", 40, struct.pack("<8h", 3, 40, 36, 1, 1, 1, 1, 1), "claims a size"),
    ("absurd size", 40, struct.pack("<8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "claims a size"),
    ("negative size", 40, struct.pack("<8h", 3, -5, 36, 18, 1, 1, 1, 1), "claims a size"),
    ("smaller than its data", 40, struct.pack("<8h", 3, 4, 4, 4, 1, 1, 1, 1), "more data than its header"),
    ("in metres", 123, b"\x01", "in metres, but mm is expected"),
    ("in micrometres and seconds", 123, b"\x0b", "in micrometres, but mm is expected"),
    ("RGB", 70, struct.pack("<2h", 128, 24), "plain numbers"),
    ("complex", 70, struct.pack("<2h", 32, 64), "plain numbers"),
    ("unknown type", 70, struct.pack("<2h", 77, 16), "unknown data type"),
    ("no orientation", 252, struct.pack("<2h", 0, 0), "no orientation"),
    ("forms disagree", 280, struct.pack("<f", -1.7), "disagree"),
    ("far start", 108, struct.pack("<f", 1e30), "start at byte"),
    ("pair of files", 344, b"ni1\0", "single-file"),
    ("infinite slope", 112, struct.pack("<2f", 1e38, 0), "finite"),
    ("NaN in sform", 280, struct.pack("<f", float("nan")), "disagree|voxel size|damaged"),
]


@pytest.mark.parametrize("unit", [1e-3, 1e3], ids=["m", "um"])
def test_units_other_than_mm_raise(tmp_path: Path, unit: float):
    affine = oblique()
    affine[:3] *= unit
    expect_defect(write_nifti(tmp_path / "t2w.nii.gz", affine=affine), "voxel size")


@pytest.mark.parametrize(("offset", "patch", "words"), [row[1:] for row in HEADER], ids=[row[0] for row in HEADER])
def test_invalid_nifti_header_raises(tmp_path: Path, offset: int, patch: bytes, words: str):
    for name in ("t2w.nii", "t2w.nii.gz"):
        expect_defect(patch_header(write_nifti(tmp_path / name), offset, patch), words)


def test_gzip_bomb_raises_without_being_inflated(tmp_path: Path):
    path = patch_header(write_nifti(tmp_path / "t2w.nii"), 40, struct.pack("<8h", 3, 16, 16, 16, 1, 1, 1, 1))
    with gzip.open(tmp_path / "bomb.nii.gz", "wb", 1) as file:
        file.write(path.read_bytes()[:352])
        for _ in range(400):
            file.write(bytes(2**20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expect_defect(tmp_path / "bomb.nii.gz", "more data than its header says")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_invalid_voxels_axes_and_formats_raise(tmp_path: Path):
    values = voxels().astype(np.float32)
    values[3, 4, 5] = np.nan
    expect_defect(write_nifti(tmp_path / "nan.nii.gz", values), "not finite")
    expect_defect(write_nifti(tmp_path / "flat.nii.gz", np.full(SHAPE, 7, np.uint16)), "all voxels are equal")
    sheared = nibabel.Nifti1Image(
        voxels(), oblique() @ np.array([[1, 0.02, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    )
    sheared.set_qform(None, code=0)
    nibabel.save(sheared, tmp_path / "sheared.nii")
    expect_defect(tmp_path / "sheared.nii", "right angles")
    with pytest.raises(DataError, match="does not exist"):
        read_volume(tmp_path / "absent.nii.gz")
    (tmp_path / "t2w.txt").write_text("x")
    with pytest.raises(DataError, match="'.txt' is not supported"):
        read_volume(tmp_path / "t2w.txt")


def test_qform_near_half_a_turn_is_accepted(tmp_path: Path):
    """A qform omits the first part of its quaternion; near half a turn this costs up to 1.2e-3 rad, which is tolerated."""
    rng = np.random.default_rng(0)
    for number in range(20):
        affine = oblique(tilt=float(rng.uniform(5, 18)), twist=float(rng.uniform(-0.1, 0.1)))
        image = nibabel.Nifti1Image(voxels(), affine)
        image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        nibabel.save(image, tmp_path / f"{number}.nii")
        read_volume(tmp_path / f"{number}.nii")


def test_broken_dicom_series_raises(real_data: Path, tmp_path: Path):
    source = real_data / "mri" / "prostate3t-03-0001" / "t2w-dicom"
    folder = Path(shutil.copytree(source, tmp_path / "t2w-dicom"))
    names = sorted(folder.iterdir())
    assert read_volume(folder).array.shape == (384, 384, 19)
    removed = names[7].read_bytes()
    names[7].unlink()
    expect_defect(folder, "spaced unevenly: 6.00 mm after slice")
    names[7].write_bytes(removed[: len(removed) // 2])
    with pytest.raises(DataError, match="cut off") as caught:
        read_volume(folder)
    assert caught.value.path == str(names[7])
    names[7].write_bytes(removed)
    (folder / "copy.dcm").write_bytes(names[3].read_bytes())
    expect_defect(folder, "same position")
    uid = read_uid(names[0])
    (folder / "copy.dcm").write_bytes(names[3].read_bytes().replace(uid, uid[:-1] + bytes([uid[-1] ^ 1])))
    expect_defect(folder, "2 DICOM series")
    for name in [*names, folder / "copy.dcm"][1:]:
        name.unlink()
    expect_defect(folder, "single slice")


def read_uid(path: Path) -> bytes:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.LoadPrivateTagsOn()
    reader.ReadImageInformation()
    return reader.GetMetaData("0020|000e").strip().encode()


def _volume() -> StoredVolume:
    affine = nibabel.as_closest_canonical(nibabel.Nifti1Image(np.zeros(SHAPE), oblique())).affine
    return StoredVolume(voxels().astype(np.float32), affine)
