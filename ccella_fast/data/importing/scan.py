"""Read the headers of all DICOM files of an export. Names of files and folders mean nothing here; only attributes do.

No value of a header is part of a message. What identifies a patient is in a field of its own, `FileHeader.identity`, which only
the key and the comparison with report texts use.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ccella_fast.data.importing.diffusion import b_value_of, is_trace
from ccella_fast.data.importing.words import known_words
from ccella_fast.data.preparation.worker_pool import WorkerPool
from ccella_fast.data.readers.deflated_dicom import DEFLATED, MAX_INFLATED, inflate_dicom
from ccella_fast.data.readers.dicom_files import is_index, quiet_pydicom
from ccella_fast.errors import DataError

_FILES_PER_TASK = 200
_BYTES_PER_TASK = 200 * 2**20
_META_BYTES = 1024  # which hold the transfer syntax
_MAX_ELEMENT = 2**26  # bytes; before the voxels
_MAX_READS = 10**6  # each element takes two or three
_STORAGE = {
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "enhanced MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "enhanced MR",  # converted from single images
}


class Identity(NamedTuple):
    """What identifies the patient and the study in a header."""

    patient_id: str
    patient_name: str
    birth_date: str
    accession: str
    study_date: str


class FrameHeader(NamedTuple):
    """An image of a file. position: of its first voxel, LPS mm. b_value: s/mm2. trace: a mean over diffusion directions."""

    position: tuple[float, ...] | None
    b_value: float | None
    trace: bool


class FileHeader(NamedTuple):
    """The attributes of a DICOM file that series are chosen by. Times are in ms, lengths in mm.

    Attributes:
        storage: "MR", "enhanced MR", or "" for everything that is not an MR image.
        image_type: The values of Image Type, in upper case.
        scanning_sequence: Of SE, GR, EP, IR; of enhanced files derived from the pulse sequence.
        options: Of the scan, such as FS.
        frames: One of a single image, all of an enhanced file.
        words: Meanings of known words of the description (words.py).
    """

    path: str
    identity: Identity
    study_uid: str
    series_uid: str
    instance_uid: str
    storage: str
    modality: str
    series_number: int | None
    image_type: tuple[str, ...]
    scanning_sequence: frozenset[str]
    sequence_name: str
    options: frozenset[str]
    acquisition_type: str
    echo_time: float | None
    repetition_time: float | None
    inversion_time: float | None
    echo_train: int | None
    frames: tuple[FrameHeader, ...]
    orientation: tuple[float, ...] | None
    rows: int
    columns: int
    samples: int
    pixel_spacing: tuple[float, ...] | None
    words: frozenset[str]


class UnusedFile(NamedTuple):
    """A file that gives no header, and why."""

    path: str
    reason: str


def scan_export(export: Path, workers: int | None) -> tuple[list[FileHeader], list[UnusedFile]]:
    """The headers of all DICOM files below `export`, and the other files, sorted by path. Linked folders are not searched.

    Raises:
        DataError: If `export` is not a folder, pydicom is not installed, or a worker process was killed.
    """
    if not export.is_dir():
        why = "this is a file, not a folder" if export.exists() else "there is no such folder"
        raise DataError(why, path=export, fix="give the folder of the export as --data")
    unused: list[UnusedFile] = []
    paths = sorted(_files(export, unused))
    starts = range(0, len(paths), _FILES_PER_TASK)
    tasks = [paths[start : start + _FILES_PER_TASK] for start in starts]
    names = [f"files {start + 1} to {start + len(task)}" for start, task in zip(starts, tasks, strict=True)]
    headers: list[FileHeader] = []
    progress = tqdm(total=len(paths), desc="headers", unit="file", mininterval=1, disable=not paths)
    with WorkerPool(workers) as pool, progress:
        for done in pool.run(read_headers, tasks, names, bytes_each=_BYTES_PER_TASK):
            if isinstance(done.result, DataError):
                raise done.result
            progress.update(len(tasks[done.task]))
            for each in done.result:
                if isinstance(each, FileHeader):
                    headers.append(each)
                else:
                    unused.append(each)
    return sorted(headers, key=lambda header: header.path), sorted(unused)


def _files(export: Path, unused: list[UnusedFile]) -> Iterator[str]:
    def unreadable(error: OSError) -> None:
        unused.append(UnusedFile(str(error.filename), "the folder cannot be read"))

    for folder, subfolders, names in os.walk(export, onerror=unreadable):
        for name in subfolders:
            if os.path.islink(os.path.join(folder, name)):
                unused.append(UnusedFile(os.path.join(folder, name), "a link to a folder"))
        yield from (os.path.join(folder, name) for name in names)


def read_headers(paths: list[str]) -> list[FileHeader | UnusedFile]:
    """The headers of some files, each in its own right: the error of a file is the reason not to use it.

    Raises:
        DataError: If pydicom is not installed.
    """
    with quiet_pydicom():
        return [_read_header(path) for path in paths]


class _BoundedFile(io.BufferedReader):
    """A file of which a header is read in a bounded number of steps, none of them large."""

    name = ""  # pydicom asks for it, and a file that was inflated in memory has none
    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS or size is None or not 0 <= size <= _MAX_ELEMENT:
            raise ValueError("the header is too long")
        return super().read(size)


def _read_header(path: str) -> FileHeader | UnusedFile:
    import pydicom

    try:
        if not os.path.isfile(path):
            return UnusedFile(path, "not a regular file")
        with open(path, "rb") as opened:
            start = opened.read(_META_BYTES)
        if not start:
            return UnusedFile(path, "the file is empty")
        has_preamble = start[128:132] == b"DICM"
        # Files without a preamble begin with group 2 or 8.
        if not has_preamble and start[:2] not in (b"\x02\x00", b"\x08\x00"):
            return UnusedFile(path, "not a DICOM file")
        if is_index(start):
            return UnusedFile(path, "a DICOMDIR; the files themselves are read")
        source: Any = io.FileIO(path)
        if DEFLATED in start:  # pydicom would inflate it to any size
            with source:
                source = io.BytesIO(inflate_dicom(source.read(MAX_INFLATED), MAX_INFLATED)[0])
        with _BoundedFile(source) as file:
            dataset = pydicom.dcmread(file, stop_before_pixels=True, force=not has_preamble)
        if _text(dataset.get("SyntheticData")).upper() == "YES":
            return UnusedFile(path, "a generated image (Synthetic Data is YES), not one of a patient")
        header = _parse(path, dataset)
    except Exception as error:  # pydicom raises nearly everything on damaged files, and its texts may quote the header
        return UnusedFile(path, f"the header cannot be read ({type(error).__name__})")
    for name in ("study_uid", "series_uid", "instance_uid"):
        if not getattr(header, name):
            return UnusedFile(path, f"the header has no {name.replace('_uid', '')} UID")
    return header


def _parse(path: str, dataset: Any) -> FileHeader:
    shared = next(iter(dataset.get("SharedFunctionalGroupsSequence") or []), None)
    per_frame = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])

    def found(name: str, group: str = "", frame: Any = None) -> Any:
        """A value of the file or, for enhanced files, of a group of its first frame or of `frame`."""
        groups = [frame] if frame is not None else per_frame[:1]
        items = [item for each in (*groups, shared) if each is not None for item in each.get(group) or []]
        return next((place.get(name) for place in (*items, dataset) if place.get(name) is not None), None)

    image_type = _codes(dataset.get("ImageType")) + _codes(found("FrameType", "MRImageFrameTypeSequence"))
    image_type += _codes(found("AcquisitionContrast", "MRImageFrameTypeSequence"))
    if per_frame:
        frames = tuple(
            FrameHeader(
                _numbers(found("ImagePositionPatient", "PlanePositionSequence", frame), 3),
                b_value_of(frame),
                is_trace(frame, image_type),
            )
            for frame in per_frame
        )
    else:
        position = _numbers(dataset.get("ImagePositionPatient"), 3)
        frames = (FrameHeader(position, b_value_of(dataset), is_trace(dataset, image_type)),)
    echo_time = found("EffectiveEchoTime", "MREchoSequence")
    return FileHeader(
        path=path,
        identity=Identity(
            _text(dataset.get("PatientID")),
            _text(dataset.get("PatientName")),
            _text(dataset.get("PatientBirthDate")),
            _text(dataset.get("AccessionNumber")),
            _text(dataset.get("StudyDate")),
        ),
        study_uid=_text(dataset.get("StudyInstanceUID")),
        series_uid=_text(dataset.get("SeriesInstanceUID")),
        instance_uid=_text(dataset.get("SOPInstanceUID")),
        storage=_STORAGE.get(_text(dataset.get("SOPClassUID")), ""),
        modality=_text(dataset.get("Modality")).upper(),
        series_number=_integer(dataset.get("SeriesNumber")),
        image_type=image_type,
        scanning_sequence=_scanning_sequence(dataset),
        sequence_name=_text(dataset.get("SequenceName") or dataset.get("PulseSequenceName")).lower(),
        options=frozenset(_codes(dataset.get("ScanOptions")) + _codes(found("FatSuppression", "MRModifierSequence"))),
        acquisition_type=_text(dataset.get("MRAcquisitionType")).upper(),
        echo_time=_number(echo_time if echo_time is not None else dataset.get("EchoTime")),
        repetition_time=_number(found("RepetitionTime", "MRTimingAndRelatedParametersSequence")),
        inversion_time=_number(dataset.get("InversionTime")),
        echo_train=_integer(found("EchoTrainLength", "MRTimingAndRelatedParametersSequence")),
        frames=frames,
        orientation=_numbers(found("ImageOrientationPatient", "PlaneOrientationSequence"), 6),
        rows=_integer(dataset.get("Rows")) or 0,
        columns=_integer(dataset.get("Columns")) or 0,
        samples=_integer(dataset.get("SamplesPerPixel")) or 1,
        pixel_spacing=_numbers(found("PixelSpacing", "PixelMeasuresSequence"), 2),
        words=known_words(_text(dataset.get("SeriesDescription")) or _text(dataset.get("ProtocolName"))),
    )


def _scanning_sequence(dataset: Any) -> frozenset[str]:
    """SE, GR, EP and IR as single images state them; enhanced files state the same in other attributes."""
    stated = _codes(dataset.get("ScanningSequence"))
    echo = _text(dataset.get("EchoPulseSequence")).upper()
    stated += {"SPIN": ("SE",), "GRADIENT": ("GR",), "BOTH": ("SE", "GR")}.get(echo, ())
    is_epi = _text(dataset.get("EchoPlanarPulseSequence")).upper() == "YES"
    is_inverted = _text(dataset.get("InversionRecovery")).upper() == "YES"
    return frozenset(stated + ("EP",) * is_epi + ("IR",) * is_inverted)


def _codes(value: Any) -> tuple[str, ...]:
    """The values of a multi-valued code, in upper case."""
    if value is None or isinstance(value, str):
        return tuple(part.strip().upper() for part in (value or "").split("\\") if part.strip())
    return tuple(str(part).strip().upper() for part in value)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip(" \0")


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _integer(value: Any) -> int | None:
    number = _number(value)
    return None if number is None or number != number or abs(number) > 2**31 else int(number)


def _numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """A vector of `count` finite numbers; None for everything else."""
    if value is None or isinstance(value, str) or len(value) != count:
        return None
    numbers = [_number(part) for part in value]
    if any(number is None or not -1e6 < number < 1e6 for number in numbers):
        return None
    return tuple(numbers)  # type: ignore[arg-type]
