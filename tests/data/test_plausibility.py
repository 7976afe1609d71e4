"""Implausible intensities are refused with the number to correct; notes reach the user and the record."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ccella_fast.data.preparation.plausibility import check_intensities, coverage_note
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.data.preparation.resampling import make_grid, resample
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import DataError
from study_fixtures import SHAPE, config, oblique, tree, voxels, write_nifti


def adc() -> np.ndarray:
    """Values of a plausible ADC map, with background."""
    values = 600 + 4.0 * voxels().astype(np.float32)
    values[:3] = 0
    return values


@pytest.mark.parametrize(
    ("scale", "unit"),
    [
        (1e-12, "m2/s"), (1e-8, "cm2/s"), (1e-6, "mm2/s"), (1e-5, "1e-1 mm2/s"), (1e-4, "1e-2 mm2/s"), (1e-3, "1e-3 mm2/s"),
        (1e-2, "1e-4 mm2/s"), (0.1, "1e-5 mm2/s"), (10, "1e-7 mm2/s"), (100, "1e-8 mm2/s"), (1e3, "1e-9 mm2/s"),
        (1e6, "1e-12 mm2/s"),
    ],
)  # fmt: skip
def test_adc_in_other_units_is_refused_with_the_factor(scale: float, unit: str, tmp_path: Path):
    volume = StoredVolume(adc() * np.float32(scale), oblique())
    with pytest.raises(DataError, match=rf"looks like {unit}\)") as caught:
        check_intensities(volume, "adc", tmp_path)
    factor = float(caught.value.fix.rpartition("multiply by ")[2])
    assert factor == pytest.approx(1 / scale)
    check_intensities(volume._replace(array=volume.array * np.float32(factor)), "adc", tmp_path)  # the factor is right
    check_intensities(volume, "t2w", tmp_path)  # control: no other sequence has a unit


def test_adc_without_positive_voxels_is_refused(tmp_path: Path):
    with pytest.raises(DataError, match="positive voxels in the middle of this ADC map: none"):
        check_intensities(StoredVolume(-adc(), oblique()), "adc", tmp_path)
    gland = np.zeros(SHAPE, np.float32)
    gland[18:22, 16:20, 7:11] = 1300
    check_intensities(StoredVolume(gland, oblique()), "adc", tmp_path)  # control: a map that is masked to an organ
    single = np.where(np.arange(gland.size).reshape(SHAPE) == (20 * SHAPE[1] + 18) * SHAPE[2] + 9, gland, 0)
    with pytest.raises(DataError, match="positive voxels in the middle of this ADC map: 1 of 6480"):
        check_intensities(StoredVolume(single, oblique()), "adc", tmp_path)


@pytest.mark.parametrize("value", [1e30, -1e30, 1e8])
def test_a_hot_voxel_of_an_adc_map_is_refused(value: float, tmp_path: Path):
    """Its window is fixed, but the B-spline of the resampling would spread the voxel over the map."""
    values = adc()
    values[20, 20, 9] = 65535  # control: where the signal is noise, the fit of ADC gives values far above the window
    check_intensities(StoredVolume(values, oblique()), "adc", tmp_path)
    values[20, 20, 9] = value
    with pytest.raises(DataError, match="1 voxel is -?1e.\\d+, more than 1000 times the top of the window"):
        check_intensities(StoredVolume(values, oblique()), "adc", tmp_path)


@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("value", [32767, 65535])
def test_padding_above_the_tissue_is_refused_and_named(value: int, share: float, tmp_path: Path):
    padded = voxels().astype(np.float32)
    count = int(share * padded.size)
    padded.ravel()[:count] = value
    with pytest.raises(DataError, match=f"{count} voxels are {value}, which leaves the tissue"):
        check_intensities(StoredVolume(padded, oblique()), "t2w", tmp_path)
    saturated = np.minimum(voxels().astype(np.float32), np.quantile(voxels(), 0.7))
    check_intensities(StoredVolume(saturated, oblique()), "t2w", tmp_path)  # control: bright tissue has one value


@pytest.mark.parametrize("sequence", ["t2w", "hbv"])
def test_padding_and_hot_voxels_that_take_the_contrast_are_refused(sequence: str, tmp_path: Path):
    plain = voxels().astype(np.float32)
    check_intensities(StoredVolume(plain, oblique()), sequence, tmp_path)
    padded = plain.copy()
    padded.ravel()[:800] = -32768
    with pytest.raises(DataError, match="800 voxels are -32768, which leaves the tissue"):
        check_intensities(StoredVolume(padded, oblique()), sequence, tmp_path)
    hot = plain.copy()
    hot[20, 20, 9] = 1e30
    with pytest.raises(DataError, match="1 voxel is 1e.30, more than 1000 times the 99.5th percentile"):
        check_intensities(StoredVolume(hot, oblique()), sequence, tmp_path)
    masked = np.where(
        np.arange(SHAPE[0])[:, None, None] < 36, 0, plain
    )  # control: nine tenths are background of value 0
    check_intensities(StoredVolume(masked, oblique()), sequence, tmp_path)


@pytest.mark.parametrize(
    ("padding", "words"),
    [
        ([(800, 32767)], "800 voxels are 32767, which leaves the tissue"),
        ([(8000, 1e30)], "8000 voxels are 1e.30, which leaves the tissue"),
        ([(3000, -32768), (1500, -32767)], "4500 voxels are -32768 to -32767, which leaves the tissue"),
        ([(2000, -32768), (2000, 32767)], "2000 voxels are -32768, which leaves the tissue"),
    ],
)
def test_the_voxels_that_take_the_contrast_are_named(padding: list[tuple[int, float]], words: str, tmp_path: Path):
    """Padding at the upper end, in most of the volume, of two values, at both ends."""
    values, start = voxels().astype(np.float32), 0
    for count, value in padding:
        values.ravel()[start : start + count] = value
        start += count
    for sequence in ("t2w", "hbv"):
        with pytest.raises(DataError, match=words):
            check_intensities(StoredVolume(values, oblique()), sequence, tmp_path)


@pytest.mark.parametrize(("count", "shown"), [(2, "0, 1"), (4, "0, 1, 2, 3")])
def test_a_series_of_few_values_is_called_like_a_mask(count: int, shown: str, tmp_path: Path):
    """A mask that is given as a series has no padding that could be replaced."""
    plain = voxels().astype(np.float32)
    levels = np.searchsorted(np.quantile(plain, np.linspace(0, 1, count + 1)[1:-1]), plain)
    words = f"nearly all voxels of this hbv series have one of {count} values \\({shown}\\)"
    with pytest.raises(DataError, match=words):
        check_intensities(StoredVolume(levels.astype(np.float32), oblique()), "hbv", tmp_path)


def test_faint_series_are_plausible(tmp_path: Path):
    """Controls: few levels of gray; a background far below the tissue; a few bright vessels."""
    plain = voxels().astype(np.float32)
    bright = plain.copy()
    bright.ravel()[:60] *= 5
    masked = plain + 400
    masked[:20] = 0
    for values in (np.floor(plain / 100), bright, masked):
        check_intensities(StoredVolume(values, oblique()), "hbv", tmp_path)


@pytest.mark.parametrize("value", [-32768, 32767, 65535])
def test_padding_of_an_adc_map_is_refused(value: float, tmp_path: Path):
    """Interpolation would spread it: the control is the error of a resampled map beside its padding."""
    values = adc()
    values[:5] = value
    words = re.escape(f"{values[:5].size} voxels are {value:.6g}, but an ADC map has values between")
    with pytest.raises(DataError, match=words):
        check_intensities(StoredVolume(values, oblique()), "adc", tmp_path)
    grid = make_grid(StoredVolume(values, oblique()), [1.1, 1.1, 3.0], [54, 48, 16])
    clean, spread = (np.clip(resample(StoredVolume(each, oblique()), grid), 0, 3000) for each in (adc(), values))
    assert (np.abs(spread - clean)[8:] > 100).mean() > 0.02  # the padding ends at 5 x 1.5 / 1.1 = 6.8


def test_noise_of_an_adc_map_is_plausible(tmp_path: Path):
    values = adc()
    values[:2], values[2] = 28000, -28000
    check_intensities(StoredVolume(values, oblique()), "adc", tmp_path)


def test_real_series_are_plausible(real_data: Path):
    folder = real_data / "mri" / "prostatex-0000"
    for sequence in ("t2w", "hbv", "adc"):
        check_intensities(read_volume(folder / f"{sequence}.mha"), sequence, folder)


def test_a_factor_of_ten_is_found_in_real_maps_and_any_part_of_them(real_data: Path):
    """Also where the bladder or fat is most of what the field of view has: parts of half the width, of half the slices."""
    folder = real_data / "mri" / "prostatex-0000"
    for path in (folder / "adc.mha", folder / "resampled-by-picai_prep" / "adc.nii.gz"):
        whole = read_volume(path)
        size = np.array(whole.array.shape) // 2
        for corner in np.ndindex(3, 3, 3):
            start = np.array(corner) * size // 2
            x, y, z = (slice(first, first + count) for first, count in zip(start, size, strict=True))
            part = whole._replace(array=whole.array[x, y, z])
            check_intensities(part, "adc", path)
            for power in (-12, -6, -3, -2, -1, 1, 2, 3):
                scaled = part._replace(array=part.array * np.float32(10.0**power))
                with pytest.raises(DataError) as caught:
                    check_intensities(scaled, "adc", path)
                assert float(caught.value.fix.rpartition(" ")[2]) == pytest.approx(10.0**-power)


def test_a_series_that_covers_half_of_the_grid_is_noted_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    study = tmp_path / "studies" / "a"
    write_nifti(study / "t2w.nii.gz")
    write_nifti(study / "hbv.nii.gz", seed=1)
    half, affine = adc()[:, :, :11].copy(), oblique()
    write_nifti(study / "adc.nii.gz", half, affine)
    three = {"data__sequences": ["t2w", "hbv", "adc"], "model__latent_channels": [4, 4, 4]}
    prepare(tmp_path / "studies", tmp_path / "out", config(**three))
    notes = json.loads((tmp_path / "out/cases/a.json").read_text())["image"]["facts"]["notes"]
    assert notes.keys() == {"adc"} and "adc covers" in notes["adc"][0]
    assert caplog.text.count("adc covers") == 1 and str(study / "adc.nii.gz") in caplog.text
    grid = make_grid(read_volume(study / "t2w.nii.gz"), [1.5, 1.5, 3.0], [32, 32, 16])
    share = float(notes["adc"][0].split()[2].rstrip("%")) / 100
    points = nibabel.affines.apply_affine(grid.affine, np.stack(np.indices((32, 32, 16)), -1)[grid.inner])
    index = nibabel.affines.apply_affine(np.linalg.inv(read_volume(study / "adc.nii.gz").affine), points)
    inside = ((index >= -0.5) & (index <= np.array(half.shape) - 0.5)).all(-1).mean()
    assert abs(share - inside) < 0.06
    assert coverage_note(read_volume(study / "hbv.nii.gz"), "hbv", grid) is None  # control


def test_notes_are_logged_once_per_sentence_and_in_a_limited_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    three = {"data__sequences": ["t2w", "hbv", "adc"], "model__latent_channels": [4, 4, 4]}
    for name, slices in [("a", 11), ("b", 10), ("c", 11), ("d", 12)]:
        write_nifti(tmp_path / "studies" / name / "t2w.nii.gz")
        write_nifti(tmp_path / "studies" / name / "hbv.nii.gz", seed=1)
        write_nifti(tmp_path / "studies" / name / "adc.nii.gz", adc()[:, :, :slices].copy(), oblique())
    monkeypatch.setattr("ccella_fast.data.preparation.manifest_builder._LOGGED_NOTES", 1)
    prepare(tmp_path / "studies", tmp_path / "out", config(**three), workers=2)
    lines = [record.getMessage() for record in caplog.records if "adc covers" in record.getMessage()]
    assert len(lines) == 1 and str(tmp_path / "studies/a/adc.nii.gz") in lines[0]
    assert lines[0].endswith("(and 2 more series)")
    assert "notes that are not shown: 1, see cases" in caplog.text


def test_a_change_of_the_voxels_beside_a_header_is_noticed(tmp_path: Path):
    import SimpleITK as sitk

    study = tmp_path / "studies" / "a"
    sitk.WriteImage(sitk.ReadImage(str(write_nifti(tmp_path / "t2w.nii"))), str(_made(study) / "t2w.mhd"))
    prepare(tmp_path / "studies", tmp_path / "out", config())
    before = tree(tmp_path / "out")
    prepare(tmp_path / "studies", tmp_path / "out", config())
    assert tree(tmp_path / "out") == before  # control: nothing to do
    content = bytearray((study / "t2w.raw").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4000] = bytes(4000)
    (study / "t2w.raw").write_bytes(content)
    prepare(tmp_path / "studies", tmp_path / "out", config())
    assert tree(tmp_path / "out")["images/a/t2w.npy"] != before["images/a/t2w.npy"]


def test_the_b_value_is_an_argument_and_part_of_the_digest(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    study = tmp_path / "studies" / "a"
    write_nifti(study / "t2w.nii.gz")
    write_nifti(study / "adc.nii.gz", adc())
    images = np.stack([voxels(seed=seed) for seed in (1, 2, 3)], -1)
    image = nibabel.Nifti1Image(images, oblique())
    image.set_qform(image.affine, code=1)
    image.set_sform(image.affine, code=1)
    nibabel.save(image, study / "hbv.nii.gz")
    (study / "hbv.bval").write_text("50 400 1400\n")
    three = {"data__sequences": ["t2w", "hbv", "adc"], "model__latent_channels": [4, 4, 4]}
    prepare(tmp_path / "studies", tmp_path / "highest", config(**three))
    assert "b-value 1400 was read, out of 50, 400, 1400 s/mm2" in caplog.text
    prepare(tmp_path / "studies", tmp_path / "low", config(**three), b_value=50)
    prepare(tmp_path / "studies", tmp_path / "named", config(**three), b_value=1400)
    highest, low, named = (np.load(tmp_path / name / "images/a/hbv.npy") for name in ("highest", "low", "named"))
    np.testing.assert_array_equal(highest, named)
    assert np.abs(highest - low).max() > 0.1
    with pytest.raises(DataError, match="no image of b-value 800"):
        prepare(tmp_path / "studies", tmp_path / "absent", config(**three), b_value=800)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
