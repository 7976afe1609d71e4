"""DICOM series of generated volumes as pydicom, SimpleITK, dcm2niix and the project's own reader see them."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import ConfigError
from ccella_fast.report.html import write_report
from ccella_fast.sampling import FastSampler
from ccella_fast.sampling.command import sample_to_folder
from ccella_fast.sampling.dicom_output import LEVELS, Series, write_series
from ccella_fast.storage import read_json
from sampling_fixtures import THREE, FakeEncoder, write_checkpoint
from study_fixtures import tree

pydicom = pytest.importorskip("pydicom", reason='pip install -e ".[test]"')
GEOMETRIES = [((6, 5, 4), (1.5, 1.5, 3.0)), ((3, 8, 2), (0.5, 0.75, 0.5625)), ((5, 4, 7), (0.3333333, 2.0, 1.1))]


def draw_volume(shape, seed: int = 0) -> np.ndarray:
    volume = np.random.default_rng(seed).random(shape).astype(np.float32)
    volume.flat[:2] = 0, 1
    return volume


def write(folder: Path, volume: np.ndarray, spacing, *, scale: float = 713.0, study: str = "abc", **changes) -> Path:
    folder.mkdir(parents=True)
    series = Series("t2w", 1, volume, scale)._replace(**changes)
    write_series(folder, series, spacing, study=study, description="Synthetic image")
    return folder


def affine_of(shape, spacing) -> np.ndarray:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -np.asarray(spacing) * (np.asarray(shape) - 1) / 2
    return affine


def read_with_simpleitk(folder: Path, tmp: Path) -> tuple[np.ndarray, np.ndarray]:
    sitk = pytest.importorskip("SimpleITK")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    reader.SetOutputPixelType(sitk.sitkFloat64)
    image = reader.Execute()
    direction = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = direction, image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(2, 1, 0), np.diag([-1, -1, 1, 1]) @ lps


def read_with_dcm2niix(folder: Path, tmp: Path) -> tuple[np.ndarray, np.ndarray]:
    out = tmp / "converted"
    out.mkdir(exist_ok=True)
    command = [Path(sys.executable).with_name("dcm2niix"), "-f", "a", "-o", out, folder]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    (path,) = out.glob("*.nii")
    image = nibabel.load(path)
    return image.get_fdata(), image.affine


def read_with_ours(folder: Path, tmp: Path) -> tuple[np.ndarray, np.ndarray]:
    volume = read_volume(folder)
    return volume.array, volume.affine


READERS = [read_with_simpleitk, read_with_dcm2niix, read_with_ours]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(("shape", "spacing"), GEOMETRIES, ids=["6x5x4", "3x8x2", "5x4x7"])
def test_readers_see_the_voxels_and_the_geometry(tmp_path, read, shape, spacing):
    """The truth is the volume itself in R, A, S. Negative controls: mirrored voxels, another spacing."""
    if read is read_with_dcm2niix and not Path(sys.executable).with_name("dcm2niix").is_file():
        pytest.skip("dcm2niix is not installed")
    volume = draw_volume(shape)

    def differs(folder: Path) -> list[str]:
        array, affine = read(folder, folder.parent)
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image(array, affine))
        wrong = []
        if not np.allclose(image.affine, affine_of(shape, spacing), rtol=1e-5, atol=1e-4):
            wrong.append("geometry")
        error = np.abs(image.get_fdata() - volume.astype(np.float64) * 713).max() if image.shape == shape else np.inf
        # half a step of the stored integers, and float32 of dcm2niix's slope
        return wrong + (["voxels"] if error > 713 / LEVELS / 2 + 713 * 1e-6 else [])

    assert differs(write(tmp_path / "a" / "series", volume, spacing)) == []
    assert differs(write(tmp_path / "b" / "series", volume[::-1].copy(), spacing)) == ["voxels"]
    assert differs(write(tmp_path / "c" / "series", volume, np.multiply(spacing, 1.1))) == ["geometry"]


def test_every_slice_says_that_it_is_synthetic(tmp_path):
    folder = write(tmp_path / "series", draw_volume((4, 4, 3)), (1, 1, 3))
    for path in folder.iterdir():
        found = pydicom.dcmread(path)
        assert found.SOPClassUID.name == "MR Image Storage" and found[0x0008, 0x001C].value == "YES"  # Synthetic Data
        assert found.ImageType[:2] == ["DERIVED", "SECONDARY"] and found.ContentQualification == "RESEARCH"
        assert str(found.PatientName) == "SYNTHETIC^NO PATIENT" and found.PatientID.startswith("SYNTHETIC-")
        for keyword in ("SeriesDescription", "StudyDescription", "ImageComments", "DerivationDescription"):
            assert "synthetic" in found[keyword].value.lower(), keyword
        assert found.BurnedInAnnotation == "NO"
        dates = [each for each in found.iterall() if each.VR in ("DA", "TM", "DT")]
        assert not any(each.value for each in dates) and (found.WindowCenter, found.WindowWidth) == (713 / 2, 713)


def test_the_files_have_all_attributes_that_the_standard_requires(tmp_path, monkeypatch):
    """The tables of the standard as highdicom contains them. Negative control: an attribute is removed."""
    pytest.importorskip("highdicom")
    tables = files("highdicom") / "_standard"
    modules = json.loads((tables / "iod_module_map.json").read_text())["mr-image"]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    required = {
        (each["keyword"], each["type"])
        for module in modules
        if module["usage"] == "M"
        for each in attributes[module["key"]]
        if each["type"] in ("1", "2") and not each["path"]
    }
    assert len(required) > 30

    def lacking(dataset) -> list[str]:
        absent = [keyword for keyword, _ in required if keyword not in dataset]
        empty = [
            keyword for keyword, kind in required if kind == "1" and keyword in dataset and dataset[keyword].is_empty
        ]
        return sorted({*absent, *empty})

    folder = write(tmp_path / "series", draw_volume((4, 4, 3)), (0.3333333, 1 / 7, 3.3))
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    for path in sorted(folder.iterdir()):
        dataset = pydicom.dcmread(path)
        assert [each.value for each in dataset.iterall()]  # each is parsed, and an invalid one raises
        assert lacking(dataset) == []
    del dataset.ScanningSequence
    dataset.Modality = ""
    assert lacking(dataset) == ["Modality", "ScanningSequence"]
    with pytest.raises(ValueError, match="maximum length of 16"):  # as a value that was read would raise
        dataset.PixelSpacing = ["0.33333333333333333333", "1"]


def test_uids_follow_from_the_content(tmp_path):
    volume = draw_volume((4, 4, 3))
    variants = {
        "a": write(tmp_path / "a", volume, (1, 1, 3)),
        "b": write(tmp_path / "b", volume, (1, 1, 3)),
        "voxels": write(tmp_path / "voxels", volume[::-1].copy(), (1, 1, 3)),
        "spacing": write(tmp_path / "spacing", volume, (1, 1, 2)),
        "sequence": write(tmp_path / "sequence", volume, (1, 1, 3), sequence="adc", number=2),
        "study": write(tmp_path / "study", volume, (1, 1, 3), study="abd"),
    }
    assert tree(variants["a"]) == tree(variants.pop("b"))
    slices = {name: [pydicom.dcmread(path) for path in sorted(folder.iterdir())] for name, folder in variants.items()}
    uids = [each.SOPInstanceUID for found in slices.values() for each in found]
    assert len(set(uids)) == len(uids) == 15 and all(len(uid) <= 64 and uid.startswith("2.25.") for uid in uids)
    assert all(pydicom.uid.UID(uid).is_valid for uid in uids)
    for found in slices.values():
        assert len({each.SeriesInstanceUID for each in found}) == 1
    assert len({found[0].SeriesInstanceUID for found in slices.values()}) == len(slices)
    studies = {name: found[0].StudyInstanceUID for name, found in slices.items()}
    assert studies["sequence"] == studies["a"] != studies["study"]


def test_a_folder_of_series_is_continued_reported_and_replaced(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step", **THREE)
    shared = {
        "reports": ["Zebedee"],
        "num_samples": 1,
        "seed": 3,
        "text_encoder": FakeEncoder(),
        "dtype": "float32",
    }
    out = tmp_path / "samples"
    sample_to_folder(checkpoint, out, format="dicom", **shared)
    whole = tree(out)
    assert {path.name for path in out.iterdir() if path.is_dir()} == {
        f"sample-000_seed3_seq-{name}" for name in ("t2w", "hbv", "adc")
    }
    (out / "sample-000_seed3_seq-hbv" / "0001.dcm").unlink()
    (out / "sample-000_seed3_seq-hbv").rename(tmp_path / "away")
    sample_to_folder(checkpoint, out, format="dicom", **shared)
    assert tree(out) == whole
    sample_to_folder(checkpoint, tmp_path / "nifti", **shared)
    sidecar = read_json(out / "sample-000_seed3.json")
    assert {path.name: path.read_bytes() for path in out.glob("*.png")} and "<img" in write_report(tmp_path).read_text()
    for sequence, name in sidecar["files"].items():
        nifti = nibabel.load(tmp_path / "nifti" / f"{name}.nii.gz")
        series = read_volume(out / name)
        scale = sidecar["intensity_scale"][sequence]
        np.testing.assert_allclose(series.array, nifti.get_fdata(), rtol=0, atol=scale / LEVELS)
        np.testing.assert_allclose(series.affine, nifti.affine, atol=1e-4)
    assert not any(b"Zebedee" in path.read_bytes() for path in out.rglob("*") if path.is_file())
    with pytest.raises(ConfigError, match="another request"):
        sample_to_folder(checkpoint, out, **shared)
    sample_to_folder(checkpoint, out, overwrite=True, **shared)
    assert not any(path.is_dir() for path in out.iterdir())


def test_python_saves_dicom_too_and_names_what_is_missing(tmp_path, monkeypatch):
    sampler = FastSampler.from_checkpoint(
        write_checkpoint(tmp_path / "step"), device="cpu", dtype="float32", text_encoder=FakeEncoder()
    )
    result = sampler(reports=["a"], num_inference_steps=1)
    (folder,) = result.save(tmp_path / "a", format="dicom")
    assert len(list(folder.glob("*.dcm"))) == 8
    with pytest.raises(ConfigError, match="no output format 'dcm'"):
        result.save(tmp_path / "b", format="dcm")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ConfigError, match=r"pydicom, which is not installed(.|\n)*ccella-fast\[dicom\]"):
        result.save(tmp_path / "b", format="dicom")
    assert not (tmp_path / "b").exists()
    monkeypatch.setattr("ccella_fast.sampling.pretrained.load_checkpoint", None)  # before weights load
    with pytest.raises(ConfigError, match="pydicom"):
        sample_to_folder(tmp_path / "step", tmp_path / "b", reports=["a"], num_samples=1, seed=0, format="dicom")
