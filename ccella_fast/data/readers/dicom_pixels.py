"""Stored values of DICOM images, after checks of everything that says how they are stored.

Uncompressed values are read by numpy. Compressed ones are decoded by GDCM, a library in C++, which gets a file of our own with
the attributes that were checked and the compressed bytes of one frame.
"""

from __future__ import annotations

import re
import struct
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.readers.dicom_files import DicomFile, value_of
from ccella_fast.data.readers.volume_checks import MAX_VOXELS
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

_UNCOMPRESSED = {"1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"}
_RLE = "1.2.840.10008.1.2.5"
_JPEG = {f"1.2.840.10008.1.2.4.{number}" for number in (50, 51, 57, 70, 80, 81)}  # also JPEG-LS
_JPEG_2000 = {f"1.2.840.10008.1.2.4.{number}" for number in (90, 91)}
_END_OF_STREAM = b"\xff\xd9"  # of every JPEG; decoders fill up what is cut off
_OTHER = "OT"  # the modality that converters such as SimpleITK write


def check_pixels(file: DicomFile) -> int:
    """Check that the file holds grayscale MR images and all of their pixels; returns the number of frames."""
    if not isinstance(value_of(file, "PixelData"), bytes):
        raise _defect(file, "it holds no pixels, or is cut off before them", "PixelData")
    modality = value_of(file, "Modality")
    if modality not in (None, "MR", _OTHER):
        known = f" but {modality}" if re.fullmatch("[A-Z]{2}", str(modality)) else ""
        raise _defect(file, f"its modality is not MR{known}", "Modality", "give an MR series")
    if _integer(file, "SamplesPerPixel", 1, 4) != 1 or value_of(file, "PhotometricInterpretation") != "MONOCHROME2":
        why = "its pixels are not gray values of which the highest is the brightest (MONOCHROME2)"
        raise _defect(file, why, "PhotometricInterpretation", "export the original MR images")
    rows, columns = _integer(file, "Rows", 2, 2**16), _integer(file, "Columns", 2, 2**16)
    count = _integer(file, "NumberOfFrames", 1, MAX_VOXELS) if value_of(file, "NumberOfFrames") is not None else 1
    if rows * columns * count > MAX_VOXELS:
        why = f"its header claims {rows} x {columns} x {count} voxels, but at most {MAX_VOXELS} are read"
        raise _defect(file, why, "Rows")
    bits, stored = _integer(file, "BitsAllocated", 8, 32), _integer(file, "BitsStored", 1, 32)
    if bits not in (8, 16, 32) or stored > bits or _integer(file, "HighBit", 0, 31) != stored - 1:
        raise _defect(file, "BitsAllocated, BitsStored and HighBit do not fit together", "BitsAllocated")
    _integer(file, "PixelRepresentation", 0, 1)
    _check_length(file, rows * columns * count * bits // 8)
    return count


def read_pixels(file: DicomFile, numbers: Sequence[int]) -> np.ndarray:
    """The stored values of frames `numbers` of a checked file, (frames, rows, columns) integers."""
    header = file.header
    if _transfer_syntax(file) not in _UNCOMPRESSED:
        return np.stack(_decode(file, numbers))
    bits, stored, is_signed = header.BitsAllocated, header.BitsStored, header.PixelRepresentation
    order = "<" if header.original_encoding[1] else ">"
    dtype = np.dtype(f"{order}{'i' if is_signed else 'u'}{bits // 8}")
    shape = -1, header.Rows, header.Columns
    size = header.Rows * header.Columns * (len(header.PixelData) * 8 // bits // (header.Rows * header.Columns))
    pixels = np.frombuffer(header.PixelData, dtype, count=size).reshape(shape)[list(numbers)]
    pixels = pixels.astype(dtype.newbyteorder("="))
    # Bits above BitsStored may hold anything, such as overlays; a signed value ends at its own sign bit.
    return pixels << (bits - stored) >> (bits - stored)


def _check_length(file: DicomFile, expected: int) -> None:
    """Raise DataError unless the file holds all bytes of its pixels and no more than one byte of padding."""
    data, syntax = file.header.PixelData, _transfer_syntax(file)
    if syntax in _UNCOMPRESSED:
        if len(data) not in (expected, expected + expected % 2):
            raise _defect(
                file, f"it holds {counted(len(data), 'byte')} of pixels, but its header says {expected}", "PixelData"
            )
    elif syntax not in _JPEG | _JPEG_2000 | {_RLE}:
        name = syntax if re.fullmatch(r"[\d.]{1,64}", syntax) else "unknown"
        raise _defect(file, f"its transfer syntax ({name}) is not read", "TransferSyntaxUID", "export it uncompressed")
    elif len(data) > 2 * expected + 2**16:
        why = f"it holds {len(data)} bytes of compressed pixels, more than the {expected} of uncompressed ones"
        raise _defect(file, why, "PixelData")


def _decode(file: DicomFile, numbers: Sequence[int]) -> list[np.ndarray]:
    """Decompress frames, each of (rows, columns)."""
    import SimpleITK as sitk
    from pydicom.encaps import generate_frames

    shape = file.header.Rows, file.header.Columns
    count = int(value_of(file, "NumberOfFrames") or 1)
    decoded = []
    try:
        frames = list(generate_frames(file.header.PixelData, number_of_frames=count))
    except Exception:  # pydicom raises many types for damaged data
        frames = []
    if len(frames) != count:
        raise _defect(
            file, f"its compressed pixels are damaged: {counted(count, 'frame is', 'frames are')} expected", "PixelData"
        )
    with tempfile.TemporaryDirectory() as folder:
        for number in numbers:
            what = _stream_defect(file, frames[number])
            if what is not None:
                raise _defect(file, f"the compressed pixels of frame {number + 1} {what}", "PixelData")
            path = Path(folder) / "frame.dcm"
            _write_frame(file, frames[number], path)
            reader = sitk.ImageFileReader()
            reader.SetImageIO("GDCMImageIO")
            reader.SetFileName(str(path))
            try:
                array = sitk.GetArrayFromImage(reader.Execute())
            except RuntimeError:
                raise _defect(file, f"the pixels of frame {number + 1} cannot be decompressed", "PixelData") from None
            if array.size != shape[0] * shape[1] or array.dtype.kind not in "iu":
                raise _defect(file, f"the pixels of frame {number + 1} cannot be decompressed", "PixelData")
            decoded.append(array.reshape(shape))
    return decoded


def _stream_defect(file: DicomFile, frame: bytes) -> str | None:
    """What is wrong with the header or the end of a compressed stream. Decoders trust its header, up to a crash."""
    syntax, header = _transfer_syntax(file), file.header
    if syntax == _RLE:
        count, *offsets = struct.unpack("<16I", frame[:64].ljust(64, b"\0"))
        offsets = [*offsets[:count], len(frame)]
        is_valid = count == header.BitsAllocated // 8 and offsets[0] == 64 and sorted(set(offsets)) == offsets
        return None if is_valid else "have a damaged header"
    if frame.rstrip(b"\0")[-2:] != _END_OF_STREAM:
        return "are cut off"
    rows, columns, components, bits = _jpeg_2000_size(frame) if syntax in _JPEG_2000 else _jpeg_size(frame)
    if (rows, columns, components) != (header.Rows, header.Columns, 1) or not 2 <= bits <= header.BitsAllocated:
        return f"are of {rows} x {columns} x {components} values of {bits} bits, which the header does not say"
    return None


def _jpeg_2000_size(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits that a JPEG 2000 stream states; zeros if it states none."""
    siz = frame.find(b"\xff\x4f\xff\x51")  # markers SOC and SIZ, perhaps within the boxes of a JP2 file
    if siz < 0 or len(frame) < siz + 43:
        return 0, 0, 0, 0
    right, bottom, left, top = struct.unpack_from(">4I", frame, siz + 8)
    components, bits = struct.unpack_from(">HB", frame, siz + 40)
    return bottom - top, right - left, components, (bits & 0x7F) + 1  # the top bit is that of signed values


def _jpeg_size(frame: bytes) -> tuple[int, int, int, int]:
    """Rows, columns, components and bits that a JPEG or JPEG-LS stream states; zeros if it states none."""
    at = 2
    while frame[:2] == b"\xff\xd8" and at + 10 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], struct.unpack_from(">H", frame, at + 2)[0]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):
            bits, rows, columns, components = struct.unpack_from(">BHHB", frame, at + 4)
            return rows, columns, components, bits
        at += 1 if marker == 0xFF else 2 + length
    return 0, 0, 0, 0


def _write_frame(file: DicomFile, frame: bytes, path: Path) -> None:
    """A DICOM file of one compressed frame without a place or a scale."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import SecondaryCaptureImageStorage

    small: Any = Dataset()
    small.file_meta = FileMetaDataset()
    small.file_meta.TransferSyntaxUID = _transfer_syntax(file)
    small.SOPClassUID, small.SOPInstanceUID = SecondaryCaptureImageStorage, "1.2.3"
    small.SamplesPerPixel, small.PhotometricInterpretation = 1, "MONOCHROME2"
    for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"):
        setattr(small, keyword, file.header[keyword].value)
    small.PixelData = encapsulate([frame])
    small["PixelData"].VR = "OB"
    small.save_as(path, enforce_file_format=True)


def _transfer_syntax(file: DicomFile) -> str:
    """The transfer syntax; if the file does not state it, that of its values as they were found."""
    try:
        stated = file.header.file_meta.get("TransferSyntaxUID")
    except Exception:  # see above
        stated = None
    return str(stated) if stated else "1.2.840.10008.1.2"


def _integer(file: DicomFile, keyword: str, low: int, high: int) -> int:
    found = value_of(file, keyword)
    if not isinstance(found, int) or not low <= found <= high:
        state = "is missing" if found is None else "is not one integer" if not isinstance(found, int) else f"is {found}"
        raise _defect(file, f"{keyword} {state}, but {low} to {high} is expected", keyword)
    return int(found)


def _defect(file: DicomFile, why: str, field: str, fix: str = "copy or export the series again") -> DataError:
    return DataError(f"this DICOM file cannot be used: {why}", path=file.path, field=field, fix=fix)
