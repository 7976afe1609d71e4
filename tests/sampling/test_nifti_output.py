"""The geometry of written volumes as read by nibabel and SimpleITK."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.sampling.output import nifti_bytes

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
    (tmp_path / "a.nii.gz").write_bytes(nifti_bytes(volume, spacing))
    assert_geometry(tmp_path / "a.nii.gz", volume, spacing)
    with pytest.raises(AssertionError):
        assert_geometry(tmp_path / "a.nii.gz", volume[::-1], spacing)
    with pytest.raises(AssertionError):
        assert_geometry(tmp_path / "a.nii.gz", volume, np.roll(spacing, 1))


def test_header_fields_that_viewers_use(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(nifti_bytes(np.ones((4, 4, 2), np.float64), (1.5, 1.5, 3.0)))
    header = nibabel.load(tmp_path / "a.nii.gz").header
    raw = nibabel.Nifti1Header(gzip.decompress((tmp_path / "a.nii.gz").read_bytes())[:348])
    assert header.get_data_dtype() == np.float32
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_sform(), header.get_qform(), atol=1e-6)
    assert header.get_xyzt_units()[0] == "mm"
    assert header["dim"][0] == 3
    assert raw["scl_slope"] in (0, 1) or np.isnan(raw["scl_slope"])  # each of them means no scaling
    assert (header["cal_min"], header["cal_max"]) == (0, 0)  # a viewer guesses
    assert header["descrip"].item() == b"ccella_fast synthetic"
    assert nibabel.Nifti1Header.diagnose_binaryblock(raw.binaryblock) == ""


def test_a_window_is_written_for_viewers(tmp_path):
    volume = np.random.default_rng(2).random((4, 4, 2)).astype(np.float32) * 700
    (tmp_path / "a.nii.gz").write_bytes(nifti_bytes(volume, (1, 1, 1), window=(0, 700)))
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert (image.header["cal_min"], image.header["cal_max"]) == (0, 700)
    np.testing.assert_array_equal(np.asarray(image.dataobj), volume)  # not rescaled by it
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(tmp_path / "a.nii.gz")).T, volume)


def test_the_header_holds_geometry_and_the_name_of_the_project_alone(tmp_path):
    """Negative control: a header with a further field is not accepted."""

    def foreign_fields(path) -> list[str]:
        allowed = {"sizeof_hdr", "regular", "dim", "datatype", "bitpix", "pixdim", "vox_offset", "xyzt_units", "cal_min",
                   "cal_max", "descrip", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
                   "qoffset_y", "qoffset_z", "srow_x", "srow_y", "srow_z", "magic"}  # fmt: skip
        image = nibabel.load(path)
        raw = np.frombuffer(gzip.decompress(path.read_bytes())[:348], nibabel.Nifti1Header.template_dtype)[0]
        scaling = {"scl_slope", "scl_inter"}  # NaN or 0: no scaling
        filled = {name for name in raw.dtype.names if np.any(np.nan_to_num(np.asarray(raw[name]), nan=0) != 0)
                  if raw[name].dtype.kind not in "SV"}  # fmt: skip
        filled |= {name for name in raw.dtype.names if raw[name].dtype.kind == "S" and raw[name].item()}
        return sorted(filled - allowed - scaling) + ["extension"] * len(image.header.extensions)

    content = nifti_bytes(np.ones((3, 3, 3), np.float32), (1, 2, 3), window=(0, 1))
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert foreign_fields(tmp_path / "a.nii.gz") == []
    image = nibabel.load(tmp_path / "a.nii.gz")
    image.header["aux_file"] = b"Zebedee"
    image.header["intent_name"] = b"Zebedee"
    image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", b"Zebedee"))
    nibabel.save(image, tmp_path / "b.nii.gz")
    assert foreign_fields(tmp_path / "b.nii.gz") == ["aux_file", "intent_name", "extension"]


def test_equal_input_gives_equal_bytes(tmp_path):
    volume = np.random.default_rng(1).random((4, 4, 2)).astype(np.float32)
    for name, values in (("a", volume), ("b", volume), ("c", volume + 1)):
        (tmp_path / f"{name}.nii.gz").write_bytes(nifti_bytes(values, (1, 1, 1)))
    a, b, c = ((tmp_path / f"{name}.nii.gz").read_bytes() for name in "abc")
    assert a == b
    assert a != c
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "b.nii.gz", "c.nii.gz"]
