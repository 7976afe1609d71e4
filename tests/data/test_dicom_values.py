"""Voxels and place of DICOM slices: exact for every slice, refused where the header does not state them."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.encaps import encapsulate, generate_frames

from ccella_fast.data.readers import dicom_pixels, dicom_series
from ccella_fast.data.readers.dicom_series import read_dicom_series
from ccella_fast.data.readers.volume_file import read_volume
from ccella_fast.errors import DataError
from dicom_fixtures import COLUMN, NORMAL, ROW, SHAPE, affine, position, set_pixels, slices, write_slices
from study_fixtures import restored_locale

JPEG_LS, RLE = "1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.5"


def set_to(**attributes: Any) -> Callable[[Any, int], None]:
    """Set attributes of every slice: a value, or a function of the number of the slice. None deletes."""

    def change(dataset: Any, number: int) -> None:
        for keyword, value in attributes.items():
            value = value(number) if callable(value) else value
            if value is None:
                delattr(dataset, keyword)
            else:
                setattr(dataset, keyword, value)

    return change


def of_slice_2(value: Any, otherwise: Any) -> Callable[[int], Any]:
    return lambda number: value if number == 2 else otherwise


REFUSED: dict[str, tuple[str, Any, str]] = {
    "spacing, absent": ("PixelSpacing", None, "PixelSpacing is missing"),
    "spacing, empty": ("PixelSpacing", "", "PixelSpacing is missing"),
    "spacing, 0": ("PixelSpacing", [0, 0], "not positive"),
    "spacing, negative": ("PixelSpacing", [1.25, -0.75], "not positive"),
    "spacing, one value": ("PixelSpacing", [1.25], "not 2 finite"),
    "spacing, three values": ("PixelSpacing", [1.25, 0.75, 3], "not 2 finite"),
    "position, absent": ("ImagePositionPatient", None, "ImagePositionPatient is missing"),
    "position, two values": ("ImagePositionPatient", [0, 0], "not 3 finite"),
    "orientation, absent": ("ImageOrientationPatient", None, "ImageOrientationPatient is missing"),
    "orientation, 0": ("ImageOrientationPatient", [0] * 6, "two unit vectors"),
    "orientation, parallel": ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "two unit vectors"),
    "orientation, long": ("ImageOrientationPatient", [2, 0, 0, 0, 2, 0], "two unit vectors"),
    "rows, too many": ("Rows", 60000, "bytes of pixels, but its header says"),
    "rows, too few": ("Rows", 9, "240 bytes of pixels, but its header says 216"),
    "columns, 0": ("Columns", 0, "Columns is 0"),
    "rows, absent": ("Rows", None, "Rows is missing"),
    "samples, 0": ("SamplesPerPixel", 0, "SamplesPerPixel is 0"),
    "samples, 3": ("SamplesPerPixel", 3, "gray values"),
    "colors": ("PhotometricInterpretation", "RGB", "gray values"),
    "inverted": ("PhotometricInterpretation", "MONOCHROME1", "gray values"),
    "no photometric interpretation": ("PhotometricInterpretation", None, "gray values"),
    "bits allocated": ("BitsAllocated", 12, "do not fit together"),
    "bits allocated, half": ("BitsAllocated", 8, "do not fit together"),
    "bits stored": ("BitsStored", 10, "do not fit together"),
    "high bit": ("HighBit", 15, "do not fit together"),
    "bits, absent": ("BitsAllocated", None, "BitsAllocated is missing"),
    "sign": ("PixelRepresentation", 2, "PixelRepresentation is 2"),
    "frames": ("NumberOfFrames", 2, "bytes of pixels"),
    "billions of frames": ("NumberOfFrames", 2**31 - 1, "NumberOfFrames is|at most"),
    "modality": ("Modality", "CT", "modality is not MR but CT"),
    "no pixels": ("PixelData", None, "no pixels"),
    "empty pixels": ("PixelData", b"", "no pixels"),
    "slope without intercept": ("RescaleSlope", 2, "only one of"),
    "transfer syntax": ("TransferSyntaxUID", "1.2.840.10008.1.2.4.103", r"\(1.2.840.10008.1.2.4.103\) is not read"),
}


@pytest.mark.parametrize(("keyword", "value", "words"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("everywhere", [False, True], ids=["one slice", "every slice"])
def test_what_a_header_does_not_state_is_refused(
    keyword: str, value: Any, words: str, everywhere: bool, tmp_path: Path
):
    def change(dataset: Any, number: int) -> None:
        if everywhere or number == 2:
            if keyword == "TransferSyntaxUID":
                dataset.file_meta.TransferSyntaxUID = value
                dataset.PixelData = encapsulate([dataset.PixelData])
            else:
                set_to(**{keyword: value})(dataset, number)

    with pydicom.config.disable_value_validation():
        paths = write_slices(tmp_path, change=change)
    with pytest.raises(DataError, match=words) as caught:
        read_dicom_series(tmp_path)
    assert caught.value.path == str(paths[0 if everywhere else 2]) and caught.value.field and caught.value.fix
    assert "CANARY" not in str(caught.value)


def shifted(right: float, number: int, axis: np.ndarray = ROW) -> list[float]:
    return [round(float(value), 9) for value in np.array(position(number)) + right * axis]


GEOMETRY: dict[str, tuple[Callable[[Any, int], None], str | None]] = {
    "0.3 mm a slice, to the left": (set_to(ImagePositionPatient=lambda n: shifted(0.3 * n, n)), "shifted.* 1.50 mm"),
    "0.3 mm a slice, to the back": (set_to(ImagePositionPatient=lambda n: shifted(0.3 * n, n, COLUMN)), "shifted"),
    "0.01 mm a slice": (set_to(ImagePositionPatient=lambda n: shifted(0.01 * n, n)), "shifted.* 0.05 mm"),
    "0.002 mm a slice": (set_to(ImagePositionPatient=lambda n: shifted(0.002 * n, n)), None),
    "one slice 0.1 mm off": (set_to(ImagePositionPatient=lambda n: shifted(0.1 * (n == 3), n)), "image003.dcm"),
    "one slice 0.2 mm higher": (
        set_to(ImagePositionPatient=lambda n: shifted(0.2 * (n == 3), n, NORMAL)), "unevenly.*image00[234].dcm",
    ),
    "written to 0.01 mm": (set_to(ImagePositionPatient=lambda n: [round(v, 2) for v in position(n)]), None),
    "cosines across a rounding edge": (
        set_to(ImageOrientationPatient=lambda n: [1, 0, 0, 0, 0.9781476, 0.2079116 + 1e-7 * (-1) ** n]), None,
    ),
    "cosines of one slice": (
        set_to(ImageOrientationPatient=of_slice_2([1, 0, 0, 0, 1, 0], [*ROW, *COLUMN])),
        "orientation: image000.dcm and image002",
    ),
    "float32 spacing": (set_to(PixelSpacing=of_slice_2([1.2500000477, 0.75], [1.25, 0.75])), None),
    "spacing of one slice": (set_to(PixelSpacing=of_slice_2([1.26, 0.75], [1.25, 0.75])), "voxel size"),
    "frame of reference": (set_to(FrameOfReferenceUID=of_slice_2("1.9", "1.2.3.5")), "2 frames of reference"),
    "no series": (
        set_to(SeriesInstanceUID=of_slice_2(None, "1.2.3.4")), "files that do not state SeriesInstanceUID, such as image002",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), GEOMETRY.values(), ids=GEOMETRY)
def test_rounding_of_positions_passes_and_shear_does_not(
    change: Callable[[Any, int], None], words: str | None, tmp_path: Path
):
    write_slices(tmp_path, change=change)
    if words is None:
        # Positions to 0.01 mm: 5 um in each coordinate.
        np.testing.assert_allclose(read_dicom_series(tmp_path).affine, affine(), atol=6e-3)
    else:
        with pytest.raises(DataError, match=words):
            read_dicom_series(tmp_path)


def test_small_differences_of_distance_are_noted(tmp_path: Path):
    write_slices(tmp_path, change=set_to(ImagePositionPatient=lambda n: shifted(0.1 * (n == 3), n, NORMAL)))
    assert read_dicom_series(tmp_path).notes == (
        "the distances of the slices differ by up to 0.100 mm; they are taken as even",
    )  # fmt: skip


def test_a_series_equals_that_of_simpleitk_and_dcm2niix(tmp_path: Path, real_data: Path):
    """Two other readers agree on voxels and on the place of each."""
    generated = tmp_path / "generated"
    write_slices(generated, change=set_to(RescaleSlope=2, RescaleIntercept=-3))
    for folder in (generated, real_data / "mri" / "prostate3t-03-0001" / "t2w-dicom"):
        volume, ras = read_dicom_series(folder), read_volume(folder)
        reader = sitk.ImageSeriesReader()
        reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
        image = reader.Execute()
        np.testing.assert_array_equal(volume.array, sitk.GetArrayFromImage(image).T)
        for index in [(0, 0, 0), (3, 7, 2), (11, 0, 5)]:
            expected = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose((volume.affine @ [*index, 1])[:3], expected, atol=1e-4)
        out = tmp_path / f"nifti-{folder.name}"
        out.mkdir()
        subprocess.run(["dcm2niix", "-z", "n", "-f", "x", "-o", out, folder], check=True, capture_output=True)
        converted = read_volume(next(out.glob("*.nii")))
        np.testing.assert_array_equal(ras.array, converted.array)
        np.testing.assert_allclose(ras.affine, converted.affine, atol=1e-4)


SCALES: dict[str, tuple[list[float], list[float]]] = {
    "intercept": ([1] * 6, [0, -700, 0, -700, 0, -700]),
    "slope": ([1, 0.38, 1.7, 0.38, 1, 0.9], [0] * 6),
    "small slope": ([1, 0.001, 1, 1, 1, 1], [0] * 6),
    "both": ([0.5, 3, 0.25, 1, 2, 1], [-4000, 12.5, 0, 0, 1, 7]),
}


@pytest.mark.parametrize(("slopes", "intercepts"), SCALES.values(), ids=SCALES)
def test_each_slice_has_its_own_scale(slopes: list[float], intercepts: list[float], tmp_path: Path):
    """Compared with float64 arithmetic and with SimpleITK, one file at a time."""
    paths = write_slices(
        tmp_path, change=set_to(RescaleSlope=lambda n: slopes[n], RescaleIntercept=lambda n: intercepts[n])
    )
    volume = read_dicom_series(tmp_path)
    exact = slices().astype(np.float64) * slopes + intercepts
    np.testing.assert_array_equal(volume.array, exact.astype(np.float32))
    for number, path in enumerate(paths):
        one = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))[0].T
        np.testing.assert_allclose(volume.array[:, :, number], one, rtol=1e-6, atol=1e-6)
    assert "different pairs of RescaleSlope" in volume.notes[-1]


@pytest.mark.parametrize("values", [
    pytest.param(slices().astype(np.int16) - 2000, id="signed"),
    pytest.param((slices() // 17).astype(np.uint8), id="8 bits"),
    pytest.param(slices().astype(np.uint32) * 999, id="32 bits"),
    pytest.param(slices() * np.uint16(15), id="16 bits"),
])  # fmt: skip
def test_number_types(values: np.ndarray, tmp_path: Path):
    def change(dataset: Any, number: int) -> None:
        bits = values.itemsize * 8
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
        dataset.PixelRepresentation = int(values.dtype.kind == "i")
        set_pixels(dataset, values[:, :, number].T)

    write_slices(tmp_path, change=change)
    np.testing.assert_array_equal(read_dicom_series(tmp_path).array, values.astype(np.float32))


@pytest.mark.parametrize("signed", [False, True], ids=["unsigned", "signed"])
def test_bits_above_those_stored_are_left_out(signed: bool, tmp_path: Path):
    """An overlay may be there; a signed value of 12 bits ends at its own sign bit. SimpleITK agrees."""

    def change(dataset: Any, number: int) -> None:
        dataset.PixelRepresentation = int(signed)
        set_pixels(dataset, slices()[:, :, number].T | 0x5000)

    paths = write_slices(tmp_path, change=change)
    expected = slices().astype(np.float32)
    expected -= 4096 * (signed & (expected >= 2048))
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(volume.array[:, :, 3], sitk.GetArrayFromImage(sitk.ReadImage(str(paths[3])))[0].T)


def test_slices_of_which_some_are_signed_are_noted(tmp_path: Path):
    write_slices(tmp_path, slices() // 4, set_to(PixelRepresentation=of_slice_2(1, 0)))
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, (slices() // 4).astype(np.float32))
    assert volume.notes == ("PixelRepresentation differs: some slices are signed, others are not",)


def test_big_endian(tmp_path: Path):
    for path in write_slices(tmp_path):
        dataset = pydicom.dcmread(path)
        dataset.PixelData = dataset.pixel_array.astype(">u2").tobytes()
        dataset.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.2"
        pydicom.dcmwrite(path, dataset, implicit_vr=False, little_endian=False, enforce_file_format=True)
    np.testing.assert_array_equal(read_dicom_series(tmp_path).array, slices().astype(np.float32))


def test_padding_is_noted(tmp_path: Path):
    values = slices()
    values[:, :2] = 4095
    write_slices(tmp_path, values, set_to(PixelPaddingValue=4095))
    count = np.count_nonzero(values == 4095)
    assert read_dicom_series(tmp_path).notes == (
        f"voxels with the value of PixelPaddingValue: {count} of {values.size}",
    )  # fmt: skip


def compress(folder: Path, name: str) -> list[Path]:
    """Write the series with SimpleITK's compressor `name`."""
    paths = write_slices(folder)
    for path in paths:
        image = sitk.ReadImage(str(path))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.UseCompressionOn()
        writer.SetCompressor(name)
        writer.SetFileName(str(path))
        with restored_locale():
            writer.Execute(image)
    return paths


@pytest.mark.parametrize("name", [RLE, JPEG_LS, "JPEG", "JPEG2000"])
def test_compressed_slices(name: str, tmp_path: Path):
    if name.startswith("J"):
        compress(tmp_path, name)
    else:
        write_slices(tmp_path, change=set_to(RescaleSlope=lambda n: n + 0.5, RescaleIntercept=-9), syntax=name)
    syntax = pydicom.dcmread(tmp_path / "image000.dcm").file_meta.TransferSyntaxUID
    assert syntax == {"JPEG": "1.2.840.10008.1.2.4.70", "JPEG2000": "1.2.840.10008.1.2.4.90"}.get(name, name)
    volume, expected = read_dicom_series(tmp_path), slices().astype(np.float32)
    expected = expected if name.startswith("J") else expected * (np.arange(SHAPE[2]) + 0.5) - 9
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_allclose(volume.affine, affine(), atol=1e-6)


def rewrite_stream(path: Path, change: Callable[[bytes], bytes]) -> None:
    dataset = pydicom.dcmread(path)
    (stream,) = generate_frames(dataset.PixelData, number_of_frames=1)
    dataset.PixelData = encapsulate([change(stream)])
    dataset.save_as(path)


@pytest.mark.parametrize("name", ["JPEG", "JPEG2000", JPEG_LS])
def test_compressed_pixels_of_another_size_or_cut_off_are_refused(name: str, tmp_path: Path):
    """A stream that claims 60,000 x 60,000 pixels would be given that much memory by its decoder."""
    path = (compress(tmp_path, name) if name.startswith("J") else write_slices(tmp_path, syntax=name))[2]
    original = path.read_bytes()
    size = b"\0\0\0\x0c\0\0\0\x0a" if name == "JPEG2000" else b"\0\x0a\0\x0c"
    assert size in original
    path.write_bytes(original.replace(size, size.replace(b"\0\x0a", b"\xea\x60"), 1))
    with pytest.raises(DataError, match="60000 x 12 x 1 values of .*which the header does not say") as caught:
        read_dicom_series(tmp_path)
    assert caught.value.path == str(path)
    for change, words in [
        (lambda stream: stream[: len(stream) // 2], "cut off"),
        (lambda stream: stream + bytes(100_000), "more than the 240 of uncompressed"),
        (lambda stream: b"\xff\xd8\xff\xff\xff\xd9", "0 x 0 x 0 values"),
    ]:
        path.write_bytes(original)
        rewrite_stream(path, change)
        with pytest.raises(DataError, match=words):
            read_dicom_series(tmp_path)


@pytest.mark.parametrize("precision", [0, 1, 17, 175])
def test_a_compressed_stream_of_impossible_precision_is_refused(precision: int, tmp_path: Path):
    """GDCM ends the process with a segmentation fault at a lossless JPEG of 175 bits."""
    path = compress(tmp_path, "JPEG")[2]
    original = path.read_bytes()
    start = b"\xff\xc3\0\x0b"  # of the frame header of lossless JPEG; the precision follows
    assert original.count(start + b"\x10") == 1
    path.write_bytes(original.replace(start + b"\x10", start + bytes([precision])))
    with pytest.raises(DataError, match=f"10 x 12 x 1 values of {precision} bits") as caught:
        read_dicom_series(tmp_path)
    assert caught.value.path == str(path)


RLE_HEADERS = {
    "none": [0],
    "three": [3, 64, 70, 80],
    "equal": [2, 64, 64],
    "beyond": [2, 64, 10**6],
    "early": [2, 0, 70],
    "one": [1, 64],
}


@pytest.mark.parametrize("header", RLE_HEADERS.values(), ids=RLE_HEADERS)
def test_rle_of_impossible_segments_is_refused(header: list[int], tmp_path: Path):
    """GDCM divides by the number of segments: 0 ends the process."""
    path = write_slices(tmp_path, syntax=RLE)[2]
    rewrite_stream(path, lambda stream: struct.pack("<16I", *header, *[0] * (16 - len(header))) + stream[64:])
    with pytest.raises(DataError, match="damaged header"):
        read_dicom_series(tmp_path)


def test_two_slices_are_a_volume(tmp_path: Path):
    write_slices(tmp_path, slices()[:, :, :2])
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, slices()[:, :, :2].astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine(), atol=1e-6)


def test_more_voxels_than_fit_into_memory_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Of one file before its pixels are decoded, of a series before its array is made."""
    write_slices(tmp_path)
    monkeypatch.setattr(dicom_series, "MAX_VOXELS", 12 * 10 * 6 - 1)
    with pytest.raises(DataError, match="more than 719 voxels"):
        read_dicom_series(tmp_path)
    monkeypatch.setattr(dicom_pixels, "MAX_VOXELS", 12 * 10 - 1)
    with pytest.raises(DataError, match="10 x 12 x 1 voxels, but at most 119 are read"):
        read_dicom_series(tmp_path)
