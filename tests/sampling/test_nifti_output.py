"""The geometry of written volumes as read by nibabel and SimpleITK."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.sampling.output import write_nifti

GEOMETRIES = [((6, 5, 4), (1.5, 1.5, 3.0)), ((3, 8, 2), (0.5, 0.75, 0.5625)), ((5, 5, 7), (0.3333333, 2.0, 1.0))]


def assert_geometry(path, volume: np.ndarray, spacing) -> None:
    """Both readers agree on the spacing in mm, the axes R, A, S, the grid's center at the origin, and every voxel."""
    center = (np.array(volume.shape) - 1) / 2
    image = nibabel.load(path)
    np.testing.assert_allclose(image.affine @ [*center, 1], [0, 0, 0, 1], atol=1e-4)
    np.testing.assert_allclose(image.header.get_zooms(), spacing, rtol=1e-6)
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume)
    itk = sitk.ReadImage(str(path))
    np.testing.assert_allclose(itk.GetSpacing(), spacing, rtol=1e-6)
    # The patient axes of ITK are L, P, S: the first two have the opposite sign.
    np.testing.assert_allclose(np.array(itk.GetDirection()).reshape(3, 3), np.diag([-1, -1, 1]), atol=1e-6)
    np.testing.assert_allclose(itk.TransformContinuousIndexToPhysicalPoint(center.tolist()), [0, 0, 0], atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).transpose(2, 1, 0), volume)


@pytest.mark.parametrize(("shape", "spacing"), GEOMETRIES, ids=["6x5x4", "3x8x2", "5x5x7"])
def test_nibabel_and_simpleitk_read_the_same_geometry(tmp_path, shape, spacing):
    volume = np.random.default_rng(0).random(shape).astype(np.float32) * 900
    write_nifti(tmp_path / "a.nii.gz", volume, spacing)
    assert_geometry(tmp_path / "a.nii.gz", volume, spacing)
    with pytest.raises(AssertionError):
        assert_geometry(tmp_path / "a.nii.gz", volume[::-1], spacing)
    with pytest.raises(AssertionError):
        assert_geometry(tmp_path / "a.nii.gz", volume, np.roll(spacing, 1))


def test_header_fields_that_viewers_use(tmp_path):
    write_nifti(tmp_path / "a.nii.gz", np.ones((4, 4, 2), np.float64), (1.5, 1.5, 3.0))
    header = nibabel.load(tmp_path / "a.nii.gz").header
    raw = nibabel.Nifti1Header(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:348])
    assert header.get_data_dtype() == np.float32
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-6)
    assert header.get_xyzt_units()[0] == "mm"
    assert header["dim"][0] == 3
    assert raw["scl_slope"] in (0, 1) or np.isnan(raw["scl_slope"])  # each of them means no scaling
    assert header["descrip"].item() == b"ccella_fast synthetic"
    assert nibabel.Nifti1Header.diagnose_binaryblock(raw.binaryblock) == ""


def test_equal_input_gives_equal_bytes(tmp_path):
    volume = np.random.default_rng(1).random((4, 4, 2)).astype(np.float32)
    for name, values in (("a", volume), ("b", volume), ("c", volume + 1)):
        write_nifti(tmp_path / f"{name}.nii.gz", values, (1, 1, 1))
    a, b, c = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
