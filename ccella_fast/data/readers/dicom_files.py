"""The DICOM files of a folder: which files are images, and their headers.

pydicom, which is pure Python, parses every file that is not hidden, within bounds of time and memory. A file that is an image
or has the name of one is read or refused by name; files that are something else are named in a note.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ccella_fast.data.readers.deflated_dicom import MAX_INFLATED, inflate_dicom
from ccella_fast.data.readers.text_checks import printable
from ccella_fast.errors import DataError
from ccella_fast.optional import require

_SUFFIXES = (".dcm", ".dicom", ".ima")
#: What programs append to the name of a file that they compress, or that they have not transferred completely.
_APPENDED = re.compile(r"\.(gz|bz2|xz|zst|part|partial|filepart|crdownload|tmp)$", re.IGNORECASE)
_MAX_BYTES = 2**31  # of all files of a series: MAX_VOXELS as 32-bit integers take half of it
_MAX_HEADER_BYTES = 2**24  # what precedes the voxels; an enhanced header of a thousand frames has about a third of it
_MAX_READS = 10**6  # each element takes two or three
_MAX_ITEMS = 2 * 10**5  # of sequences, and compressed fragments
_ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # the tag that begins one, in both byte orders
_MAX_NAMES = 10  # in a note

_INDEX = "DICOMDIR"  # the name of the index of a disc, which programs that copy it change
#: The element of the meta information, with which a file begins, that states the class of an index.
_INDEX_ELEMENT, _META_BYTES = b"\x02\0\x02\0UI\x14\x001.2.840.10008.1.3.10", 1024
_PIXEL_DATA = 0x7FE00010
_UNDEFINED_LENGTH = 0xFFFFFFFF
#: SOP classes of images of MR, CT and unknown origin. An object of another class is one if it has pixels.
_IMAGE_CLASSES = {f"1.2.840.10008.5.1.4.1.1.{number}" for number in ("2", "2.1", "4", "4.1", "4.4", "7")}

#: Private group -> creator and element of the b-value (see `ccella_fast.data.readers.dicom_frames`).
PRIVATE_B_VALUES = {
    0x0019: ("SIEMENS MR HEADER", 0x0C),
    0x0043: ("GEMS_PARM_01", 0x39),
    0x2001: ("Philips Imaging DD 001", 0x03),
}
_KEYWORDS = (
    "SOPClassUID SeriesInstanceUID FrameOfReferenceUID Modality ImageType InstanceNumber AcquisitionNumber "
    "ImagesInAcquisition NumberOfTemporalPositions TemporalPositionIdentifier EchoTime DiffusionBValue "
    "DiffusionDirectionality DiffusionGradientOrientation ImagePositionPatient ImageOrientationPatient PixelSpacing "
    "Rows Columns NumberOfFrames SamplesPerPixel PhotometricInterpretation BitsAllocated BitsStored HighBit "
    "PixelRepresentation PixelPaddingValue RescaleSlope RescaleIntercept SharedFunctionalGroupsSequence "
    "PerFrameFunctionalGroupsSequence PixelData"
).split()


class DicomFile(NamedTuple):
    """A file that holds one image, or several, and its header, a `pydicom.Dataset`. Values are converted when they are read."""

    path: Path
    header: Any


def is_dicom_folder(folder: Path) -> bool:
    """Whether any file directly in `folder` is a DICOM file, by its first bytes or, as it may be damaged, by its name."""
    files = (entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".") and not entry.is_dir())
    return any(_has_dicom_name(entry) or _is_dicom(_first_bytes(entry)) for entry in files)


def read_dicom_files(folder: Path) -> tuple[list[DicomFile], list[str]]:
    """Parse every image file directly in `folder`, in order of names, and return notes on the other files.

    Raises:
        DataError: For an image that is damaged, cut off, empty or not DICOM; if there is none.
        ConfigError: pydicom is not installed.
    """
    entries = [entry for entry in sorted(folder.iterdir()) if not entry.name.startswith(".")]
    folders = [entry for entry in entries if entry.is_dir()]
    entries = [entry for entry in entries if not entry.is_dir()]
    is_dicom = {entry: _is_dicom(_first_bytes(entry)) for entry in entries}
    patterns = {_name_pattern(entry) for entry in entries if is_dicom[entry]}
    for entry in entries:
        if not is_dicom[entry] and (_has_dicom_name(entry) or _name_pattern(entry) in patterns):
            state = "no DICOM file" if entry.is_file() else "no file, or a link that leads nowhere"
            state = "empty" if entry.is_file() and entry.stat().st_size == 0 else state
            why = f"this file has the name of a DICOM image, but is {state}"
            raise DataError(why, path=entry, field="DICOM file", fix="copy or export the series again")
    size = sum(entry.stat().st_size for entry in entries if is_dicom[entry])
    if size > _MAX_BYTES:
        why = f"the DICOM files of this folder have {size} bytes, but at most {_MAX_BYTES} are read"
        raise DataError(why, path=folder, field="DICOM files", fix="keep one series per folder")
    files, left = [], MAX_INFLATED
    for entry in entries:
        content = entry.read_bytes() if is_dicom[entry] and entry.name != _INDEX else b""
        if content and not is_index(content):
            content, inflated = _inflate(entry, content, left)
            left -= inflated
            files.append(DicomFile(entry, _parse(entry, content)))
    images = [file for file in files if _is_image(file)]
    if not images:
        raise DataError("this folder holds no DICOM image", path=folder, field="DICOM files", fix="give an MR series")
    used = {file.path for file in images}
    notes = [
        _note([entry for entry in entries if not is_dicom[entry]], "not DICOM"),
        _note([entry for entry in entries if is_dicom[entry] and entry not in used], "DICOM, but no images"),
        _note(folders, "in folders below that of the series"),
    ]
    return images, [note for note in notes if note]


def is_index(head: bytes) -> bool:
    """Whether a file that begins with `head` is the index of a disc (DICOMDIR), by its class, as names differ."""
    return _INDEX_ELEMENT in head[:_META_BYTES]


def value_of(file: DicomFile, keyword: str) -> Any:
    """The value of an attribute, None if it is absent or empty; DataError if it is damaged."""
    try:
        found = file.header.get(keyword)
    except Exception:  # pydicom raises many types for values that it cannot convert, and their messages quote them
        why = f"this DICOM file is damaged: {keyword} cannot be parsed"
        raise DataError(why, path=file.path, field=keyword, fix="copy or export the series again") from None
    return None if found is None or found == "" else found


@contextmanager
def quiet_pydicom() -> Iterator[None]:
    """Read values as they are, without pydicom's warnings, which quote them: they may be the patient's."""
    require("pydicom", "reading DICOM")
    from pydicom.config import disable_value_validation

    with warnings.catch_warnings(), disable_value_validation():
        warnings.simplefilter("ignore")
        yield


def _note(entries: list[Path], what: str) -> str:
    """A note on files that were not read, by name."""
    names = [printable(entry.name) for entry in entries[:_MAX_NAMES]]
    names += [f"{len(entries) - _MAX_NAMES} more"] if len(entries) > _MAX_NAMES else []
    return f"{len(entries)} not read, as they are {what}: {', '.join(names)}" if entries else ""


def _first_bytes(path: Path) -> bytes:
    """The bytes that tell a DICOM file; none for a link that leads nowhere, as to a file that was not downloaded, or a pipe."""
    if not path.is_file():
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(132)
    except OSError as error:
        why = f"this file cannot be opened: {error.strerror}"
        raise DataError(why, path=path, fix="make it readable") from None


def _is_dicom(head: bytes) -> bool:
    """Whether a file begins with the preamble or, as old files lack it, with one of the first elements of a header."""
    first = head[:2] in (b"\x08\0", b"\x02\0") and head[2:4] < b"\x20\0" and head[3:4] == b"\0" and len(head) == 132
    return head[128:132] == b"DICM" or (first and (head[4:6].isupper() or head[6:8] == b"\0\0"))


def _has_dicom_name(path: Path) -> bool:
    return _APPENDED.sub("", path.name).lower().endswith(_SUFFIXES)


def _name_pattern(path: Path) -> str:
    """A name without its numbers: slices are numbered, or are called by a UID or a hash."""
    name = _APPENDED.sub("", path.name)
    return "#" if re.fullmatch(r"[0-9a-fA-F-]{8,}", name) else re.sub(r"\d[\d.]*", "#", name)


class _CountedFile(io.BytesIO):
    """A file in memory that refuses to be read in more steps than a header takes."""

    reads = 0

    def read(self, size: int | None = -1) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS:
            raise ValueError(f"more than {_MAX_READS} elements")
        return super().read(size)


def _defect(path: Path, why: str) -> DataError:
    return DataError(f"this DICOM file {why}", path=path, field="DICOM file", fix="copy or export the series again")


def _inflate(path: Path, content: bytes, limit: int) -> tuple[bytes, int]:
    """The content of a file, inflated if it is deflated as a whole, and how many bytes were inflated, at most `limit`."""
    try:
        return inflate_dicom(content, limit)
    except ValueError as error:
        raise _defect(path, str(error)) from None


def _parse(path: Path, content: bytes) -> Any:
    """The elements of a file that are needed, with PixelData; DataError if it is damaged or cut off."""
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_partial

    if max(map(content.count, _ITEMS)) > _MAX_ITEMS:
        raise _defect(path, f"has sequences of more than {_MAX_ITEMS} items")
    file = _CountedFile(content)

    def is_past_pixels(tag: int, vr: str | None, length: int) -> bool:
        """Whether the pixels have been read; raises if a value does not end within the file."""
        end = file.tell() + (0 if length == _UNDEFINED_LENGTH else length)
        if tag <= _PIXEL_DATA and end > len(content):
            raise _defect(path, "is cut off: an element is longer than what is left of the file")
        if tag < _PIXEL_DATA and end > _MAX_HEADER_BYTES:
            raise _defect(path, f"has a header of more than {_MAX_HEADER_BYTES} bytes")
        return tag > _PIXEL_DATA

    tags: list[Any] = [tag_for_keyword(keyword) for keyword in _KEYWORDS]
    for group, (_, element) in PRIVATE_B_VALUES.items():
        for block in range(0x10, 0x20):
            tags += [group << 16 | block, group << 16 | block << 8 | element]
    try:
        return read_partial(file, is_past_pixels, force=True, specific_tags=tags)
    except DataError:
        raise
    except Exception:  # pydicom raises many types for damaged headers, and their messages may quote values
        raise _defect(path, "is damaged: its header cannot be parsed") from None


def _is_image(file: DicomFile) -> bool:
    """Whether a file is an image, even if it lacks its pixels. Other objects are reports, presentation states, directories."""
    sop_class = value_of(file, "SOPClassUID")
    return sop_class is None or str(sop_class) in _IMAGE_CLASSES or "Rows" in file.header or "PixelData" in file.header
