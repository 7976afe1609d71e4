"""Enhanced multi-frame files, and series of several b-values: one volume is read, or the error names the dimension."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from ccella_fast.data.readers.dicom_series import read_dicom_series
from ccella_fast.errors import DataError
from dicom_fixtures import SHAPE, affine, enhanced, slices, write_enhanced, write_slices

VOLUME = [{"slice": number} for number in range(SHAPE[2])]
TWO = np.concatenate([slices(), slices(seed=1)], axis=2)


def frames_of(*volumes: dict[str, Any]) -> list[dict[str, Any]]:
    """Frames of several volumes, one after the other."""
    return [{**frame, **volume} for volume in volumes for frame in VOLUME]


def expect_defect(folder: Path, words: str, b_value: float | None = None) -> DataError:
    with pytest.raises(DataError, match=words) as caught:
        read_dicom_series(folder, b_value)
    assert caught.value.path and caught.value.field and caught.value.fix and "CANARY" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("undefined_length", [False, True])
def test_an_enhanced_file_equals_that_of_highdicom(undefined_length: bool, tmp_path: Path):
    """Frames in mixed order, each with its own scale."""
    order = [4, 0, 5, 2, 1, 3]
    frames = [{"slice": n, "slope": 0.5 + n, "intercept": -7.25 * n} for n in order]
    dataset = enhanced(slices()[:, :, order], frames)
    for keyword in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        dataset[keyword].is_undefined_length = undefined_length
    dataset.save_as(tmp_path / "e.dcm", enforce_file_format=True)
    volume = read_dicom_series(tmp_path)
    exact = slices() * (0.5 + np.arange(6)) - 7.25 * np.arange(6)
    np.testing.assert_array_equal(volume.array, exact.astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine(), atol=1e-6)

    theirs = highdicom.imread(tmp_path / "e.dcm").get_volume(dtype=np.float64, apply_modality_transform=True)
    for index in [(0, 0, 0), (11, 3, 5), (5, 9, 2)]:
        lps = volume.affine @ [*index, 1] * [-1, -1, 1, 1]
        theirs_index = np.linalg.solve(theirs.affine, lps)[:3]
        np.testing.assert_allclose(theirs_index, np.rint(theirs_index), atol=1e-4)
        assert theirs.array[tuple(np.rint(theirs_index).astype(int))] == pytest.approx(volume.array[index], rel=1e-6)


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.80"], ids=["RLE", "JPEG-LS"])
def test_a_compressed_enhanced_file(syntax: str, tmp_path: Path):
    dataset = enhanced(slices(), [{**frame, "slope": 2, "intercept": 0.5} for frame in VOLUME])
    dataset.compress(syntax, generate_instance_uid=False)
    dataset.save_as(tmp_path / "e.dcm", enforce_file_format=True)
    np.testing.assert_array_equal(read_dicom_series(tmp_path).array, slices() * np.float32(2) + np.float32(0.5))


def test_enhanced_files_of_two_slices_each_are_one_series(tmp_path: Path):
    for number in range(3):
        part = slice(2 * number, 2 * number + 2)
        dataset = enhanced(slices()[:, :, part], VOLUME[part], instance=number + 1)
        dataset.save_as(tmp_path / f"{9 - number}.dcm", enforce_file_format=True)
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, slices().astype(np.float32))
    np.testing.assert_allclose(volume.affine, affine(), atol=1e-6)


B_VALUES = [{"b_value": 50, "slope": 3}, {"b_value": 1400, "slope": 0.5}]


def test_the_highest_b_value_of_an_enhanced_file_is_read_unless_one_is_named(tmp_path: Path):
    write_enhanced(tmp_path / "e.dcm", TWO, frames_of(*B_VALUES))
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, slices(seed=1) * np.float32(0.5))
    assert volume.notes == ("b-value 1400 was read, out of 50, 1400 s/mm2",)
    np.testing.assert_array_equal(read_dicom_series(tmp_path, 50).array, slices() * np.float32(3))
    error = expect_defect(tmp_path, "no image of b-value 800, only of 50, 1400", 800)
    assert "--b_value" in str(error.fix)


DIMENSIONS = {
    "time": ([{"time": 1}, {"time": 2}], "2 time points"),
    "stack": ([{"stack": "1"}, {"stack": "2"}], "2 stacks"),
    "nothing": ([{}, {}], r"same position \(e.dcm and e.dcm, frame 7\)"),
    "directions": (
        [{"b_value": 900, "directionality": "DIRECTIONAL"}] * 2, "one b-value, 900",
    ),
    "b-value of some": ([{"b_value": 900}, {}], "only 6 of 12 state a b-value"),
}  # fmt: skip


@pytest.mark.parametrize(("volumes", "words"), DIMENSIONS.values(), ids=DIMENSIONS)
def test_several_volumes_in_an_enhanced_file_are_refused(volumes: list[dict[str, Any]], words: str, tmp_path: Path):
    write_enhanced(tmp_path / "e.dcm", TWO, frames_of(*volumes))
    expect_defect(tmp_path, words)


def test_the_trace_image_is_read_among_directions(tmp_path: Path):
    volumes = [{"b_value": 900, "directionality": name} for name in ("ISOTROPIC", "DIRECTIONAL")]
    write_enhanced(tmp_path / "e.dcm", TWO, frames_of(*volumes))
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, slices().astype(np.float32))
    assert volume.notes == ("of 2 images at a position the trace image was read",)


def change_item(keyword: str, attribute: str, *, shared: bool = False, value: Any = None) -> Callable[[Any], None]:
    """Delete or set an attribute in the functional groups of frame 3, or in the shared ones."""

    def change(dataset: Any) -> None:
        groups = dataset.SharedFunctionalGroupsSequence[0] if shared else dataset.PerFrameFunctionalGroupsSequence[2]
        item = getattr(groups, keyword)[0]
        if value is None:
            delattr(item, attribute)
        else:
            setattr(item, attribute, value)

    return change


BROKEN: dict[str, tuple[Callable[[Any], None], str]] = {
    "no position": (
        change_item("PlanePositionSequence", "ImagePositionPatient"), "ImagePositionPatient of frame 3 is missing",
    ),
    "no spacing": (change_item("PixelMeasuresSequence", "PixelSpacing", shared=True), "PixelSpacing of frame 1 is missing"),
    "spacing 0": (
        change_item("PixelMeasuresSequence", "PixelSpacing", shared=True, value=[0, 0]), "not positive",
    ),
    "no orientation": (
        change_item("PlaneOrientationSequence", "ImageOrientationPatient", shared=True), "ImageOrientationPatient of frame 1",
    ),
    "no slope": (change_item("PixelValueTransformationSequence", "RescaleSlope"), "only one of"),
    "a frame too few": (lambda d: d.PerFrameFunctionalGroupsSequence.pop(), "6 frames, but attributes of 5"),
    "no functional groups": (lambda d: delattr(d, "PerFrameFunctionalGroupsSequence"), "6 frames without a position"),
    "one pixel too few": (lambda d: setattr(d, "PixelData", d.PixelData[:-2]), "bytes of pixels"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BROKEN.values(), ids=BROKEN)
def test_an_enhanced_file_that_lacks_something_is_refused(change: Callable[[Any], None], words: str, tmp_path: Path):
    dataset = enhanced(slices())
    change(dataset)
    dataset.save_as(tmp_path / "e.dcm", enforce_file_format=True)
    assert expect_defect(tmp_path, words).path == str(tmp_path / "e.dcm")


def test_one_frame_is_no_volume(tmp_path: Path):
    write_enhanced(tmp_path / "e.dcm", slices()[:, :, :1])
    expect_defect(tmp_path, r"single slice \(e.dcm\), a 3D volume is expected")


def write_b_values(folder: Path, set_b: Callable[[Any, int], None], count: int = 2) -> None:
    """Classic slices of `count` volumes, one per b-value; `set_b` writes the number of the volume into a dataset."""
    for volume in range(count):

        def change(dataset: Any, number: int, volume: int = volume) -> None:
            set_b(dataset, volume)
            dataset.InstanceNumber = count * number + volume + 1

        write_slices(folder, slices(seed=volume), change, first_file=100 * volume)


def private(group: int, creator: str, element: int, vr: str, values: list[Any]) -> Callable[[Any, int], None]:
    return lambda dataset, volume: dataset.private_block(group, creator, create=True).add_new(
        element, vr, values[volume]
    )


B_VALUE_TAGS: dict[str, Callable[[Any, int], None]] = {
    "standard": lambda dataset, volume: setattr(dataset, "DiffusionBValue", [50.0, 1400.0][volume]),
    "Siemens": private(0x0019, "SIEMENS MR HEADER", 0x0C, "IS", [50, 1400]),
    "Siemens, unknown type": private(0x0019, "SIEMENS MR HEADER", 0x0C, "UN", [b"50", b"1400"]),
    "GE": private(0x0043, "GEMS_PARM_01", 0x39, "IS", [[50, 8, 0, 0], [1400, 8, 0, 0]]),
    "GE, several": private(0x0043, "GEMS_PARM_01", 0x39, "IS", [[1000000050, 8, 0, 0], [1000001400, 8, 0, 0]]),
    "GE, unknown type": private(0x0043, "GEMS_PARM_01", 0x39, "UN", [b"50\\8\\0\\0 ", b"1000001400\\8\\0\\0 "]),
    "Philips": private(0x2001, "Philips Imaging DD 001", 0x03, "FL", [50.0, 1400.0]),
    "Philips, unknown type": private(
        0x2001, "Philips Imaging DD 001", 0x03, "UN", [np.float32(50).tobytes(), np.float32(1400).tobytes()],
    ),
}  # fmt: skip


@pytest.mark.parametrize("set_b", B_VALUE_TAGS.values(), ids=B_VALUE_TAGS)
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2", ExplicitVRLittleEndian], ids=["implicit", "explicit"])
def test_b_values_of_interleaved_slices(set_b: Callable[[Any, int], None], syntax: str, tmp_path: Path):
    for volume in range(2):
        write_slices(
            tmp_path, slices(seed=volume), lambda d, n, v=volume: set_b(d, v), syntax=syntax, first_file=100 * volume
        )
    volume = read_dicom_series(tmp_path)
    np.testing.assert_array_equal(volume.array, slices(seed=1).astype(np.float32))
    assert volume.notes[0] == "b-value 1400 was read, out of 50, 1400 s/mm2"
    np.testing.assert_array_equal(read_dicom_series(tmp_path, 50).array, slices().astype(np.float32))


def test_a_slice_of_one_b_value_is_missed_at_an_end(tmp_path: Path):
    """The other b-value shows that the stack goes on."""
    write_b_values(tmp_path, B_VALUE_TAGS["standard"])
    (tmp_path / "image105.dcm").unlink()
    expect_defect(tmp_path, "b-value 1400 at 5 of 6 positions")
    np.testing.assert_array_equal(read_dicom_series(tmp_path, 50).array, slices().astype(np.float32))


def set_direction(dataset: Any, volume: int) -> None:
    dataset.DiffusionBValue = 1000.0
    dataset.DiffusionGradientOrientation = [float(volume == axis) for axis in range(3)]


def test_single_directions_are_refused_with_a_word_of_trace_images(tmp_path: Path):
    write_b_values(tmp_path, set_direction, count=3)
    assert "trace images" in str(
        expect_defect(tmp_path, "3 images are at the same position.*3 diffusion directions").fix
    )


CLASSIC = {
    "echoes": ("EchoTime", [20, 90], "2 echo times"),
    "times": ("TemporalPositionIdentifier", [1, 2], "2 time points"),
    "phase": ("ImageType", [["ORIGINAL", "PRIMARY", "M"], ["ORIGINAL", "PRIMARY", "P"]], "2 kinds of image"),
    "acquisitions": ("AcquisitionNumber", [1, 2], "2 acquisitions"),
}


@pytest.mark.parametrize(("keyword", "values", "words"), CLASSIC.values(), ids=CLASSIC)
def test_the_dimension_of_several_volumes_is_named(keyword: str, values: list[Any], words: str, tmp_path: Path):
    write_b_values(tmp_path, lambda dataset, volume: setattr(dataset, keyword, values[volume]))
    expect_defect(tmp_path, rf"2 images are at the same position \(image000.dcm and image100.dcm\): {words}")


def test_a_b_value_of_a_single_volume(tmp_path: Path):
    """That of a T2 series may be stated as 0, which asks for nothing; another one must be that which is wanted."""
    write_slices(tmp_path / "t2w", change=lambda d, n: setattr(d, "DiffusionBValue", 0.0))
    assert read_dicom_series(tmp_path / "t2w", 1400).notes == ()
    write_slices(tmp_path / "hbv", change=lambda d, n: setattr(d, "DiffusionBValue", 800.0))
    assert read_dicom_series(tmp_path / "hbv", 800).notes == ()
    expect_defect(tmp_path / "hbv", "no image of b-value 1400, only of 800", 1400)
