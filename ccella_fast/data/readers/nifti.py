"""Read `.nii` and `.nii.gz` files (NIfTI-1 and NIfTI-2, nifti.nimh.nih.gov) strictly."""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ccella_fast.data.readers.b_values import choose_b_value
from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.data.readers.text_header import NUMBER
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import TOLERANCE, check_number_type, check_size
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

_FORMS_TOLERANCE = 2e-3  # rad; near half a turn a qform, which drops a quaternion's first part, is only good to 1.2e-3
_OTHER_UNITS = {1: "metres", 3: "micrometres"}  # of length, by the code of the format; 0 is unknown, 2 is mm
_LAST_OFFSET = 2**24  # bytes; the largest start of the voxels, after the header's extensions
_MAX_RATIO = 1040  # deflate shortens at most 1032 to 1
_BLOCK = 2**22  # bytes that are read at once where nothing is kept
_SAME_B = 0.05  # relative; the b-values of the directions of one shell differ by less
_MAX_B_VALUES = 2**16  # bytes of a .bval file
_EXPORT_AGAIN, _COPY_AGAIN = "export the series again", "copy or export the file again"


def read_nifti_file(path: Path, b_value: float | None = None) -> StoredVolume:
    """Read a 3D file, or one volume of a 4D diffusion file with its b-values in `<stem>.bval`, in the stored order of axes.

    Raises:
        DataError: As `read_nifti_array` does; if a 4D file has no `.bval`, or one that is damaged or has another number of
            volumes; if it has several volumes of the chosen b-value: those are single directions, not the trace image.
    """
    with _open(path) as file:
        header, shape = _read_header(file, path)
        if len(shape) < 3 or any(size > 1 for size in shape[4:]):
            why = f"the volume has {len(shape)} dimensions, but 3 are expected (or 4 with b-values)"
            raise DataError(why, path=path, field="dim", fix="give one 3D volume per file")
        count = shape[3] if len(shape) > 3 else 1
        index, notes = _choose_volume(path, count, b_value)
        array = _read_voxels(file, header, shape[:3], path, index=index, count=count)
        return StoredVolume(array, _read_affine(header, path), notes)


def read_nifti_array(path: Path, dimensions: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels, float32 in the stored order of axes, and the affine (4, 4), voxel index -> RAS mm.

    Raises:
        DataError: If the file is damaged, is cut off, does not have this number of dimensions or has an invalid header.
    """
    with _open(path) as file:
        header, shape = _read_header(file, path)
        if len(shape) != dimensions:
            why = f"the volume has {len(shape)} dimensions, but {dimensions} are expected"
            raise DataError(why, path=path, field="dim", fix=f"give one {dimensions}D volume per file")
        return _read_voxels(file, header, shape, path), _read_affine(header, path)


def read_nifti_geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    """Sizes of all axes and affine of a file by its checked header. The voxels are not read, so they may be damaged.

    Raises:
        DataError: If the header is damaged or invalid.
    """
    with _open(path) as file:
        header, shape = _read_header(file, path)
        return shape, _read_affine(header, path)


def b_value_file(path: Path) -> Path:
    """The file with the b-values of a NIfTI file, as FSL, dcm2niix and BIDS name it."""
    return path.with_name(re.sub(r"(?i)\.nii(\.gz)?$", ".bval", path.name))


def _choose_volume(path: Path, count: int, wanted: float | None) -> tuple[int, tuple[str, ...]]:
    """The index of the volume to read, and the notes on this choice."""
    source = b_value_file(path)
    if count == 1 and (wanted is None or not source.exists()):
        return 0, ()
    check_is_data(source)
    if not source.is_file():
        why = f"this file holds {count} volumes, and there is no {source.name} with their b-values"
        raise DataError(why, path=path, field="dim", fix="give one 3D volume per file, or add the .bval file")
    values = _read_b_values(source)
    if len(values) != count:
        why = f"this file gives {counted(len(values), 'b-value')}, but {path.name} holds {count} volumes"
        raise DataError(why, path=source, field="b-value", fix="give the .bval file of this series")
    chosen, notes = choose_b_value(values, wanted, path)
    same = [index for index, value in enumerate(values) if abs(value - chosen) <= _SAME_B * chosen]
    if len(same) > 1:
        why = f"{len(same)} volumes have a b-value of about {chosen:g}: single directions, but the trace image is expected"
        raise DataError(
            why, path=path, field="b-value", fix="give the trace-weighted images, or average the directions"
        )
    return same[0], notes


def _read_b_values(path: Path) -> list[float]:
    with open(path, "rb") as file:
        text = file.read(_MAX_B_VALUES + 1).decode("latin-1")
    words = text.split()
    if len(text) > _MAX_B_VALUES or not words or not all(re.fullmatch(NUMBER, word, re.ASCII) for word in words):
        why = "this file is not a list of b-values, numbers in s/mm2 separated by blanks"
        raise DataError(why, path=path, field="b-value", fix="export the series again")
    values = [float(word) for word in words]
    if min(values) < 0 or max(values) > 1e5:
        why = f"this file gives b-values of {min(values):g} to {max(values):g}, but 0 to 100000 s/mm2 are expected"
        raise DataError(why, path=path, field="b-value", fix="export the series again")
    return values


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a file, inflating it if it is a gzip stream; what is wrong with the stream or the header becomes a DataError."""
    import nibabel

    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if is_gzip else open
    try:
        with opener(path, "rb") as file:
            yield file
    except EOFError:
        why = "this file is cut off: its gzip stream does not end"
        raise DataError(why, path=path, field="gzip stream", fix=_COPY_AGAIN) from None
    except (gzip.BadGzipFile, zlib.error):
        why = "this file is damaged: the checksum of its gzip stream does not match"
        raise DataError(why, path=path, field="gzip stream", fix=_COPY_AGAIN) from None
    except (nibabel.spatialimages.HeaderDataError, ValueError, OverflowError) as error:
        why = f"this is not a NIfTI volume: {' '.join(str(error).split()):.100}"
        raise DataError(why, path=path, field="header", fix=_EXPORT_AGAIN) from None


def _read_header(file: BinaryIO, path: Path) -> tuple[Any, tuple[int, ...]]:
    """The header and its sizes, checked before nibabel repairs it and before memory is allocated."""
    import nibabel

    head = file.read(nibabel.Nifti1Header.sizeof_hdr)
    header_class: Any = nibabel.Nifti1Header
    if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c"):
        header_class = nibabel.Nifti2Header
        head += file.read(header_class.sizeof_hdr - len(head))
    shape = _check_header(header_class, head, path)
    return header_class(head), shape


def _check_header(header_class: Any, head: bytes, path: Path) -> tuple[int, ...]:
    """Check the raw header; returns the sizes of all axes that it gives."""

    def defect(why: str, field: str, fix: str = _EXPORT_AGAIN) -> DataError:
        return DataError(why, path=path, field=field, fix=fix)

    header_size = header_class.sizeof_hdr
    if len(head) < header_size or head[:4] not in (header_size.to_bytes(4, "little"), header_size.to_bytes(4, "big")):
        raise defect("this is not a NIfTI file", "sizeof_hdr")
    header = header_class(head, check=False)
    magic = header["magic"].item().rstrip(b"\0\r\n\x1a")
    if magic not in (b"n+1", b"n+2"):
        why = f"the header's magic string is {magic!r}, but that of a single-file NIfTI is b'n+1' or b'n+2'"
        raise defect(why, "magic", "give a .nii or .nii.gz file, not a pair of .hdr and .img")
    dim = [int(value) for value in header["dim"]]
    if not 1 <= dim[0] <= 7:
        raise defect(f"the volume has {dim[0]} dimensions, but 3 are expected", "dim")
    shape = tuple(dim[1 : 1 + dim[0]])
    check_size(shape, path, "dim")
    spacing = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        why = f"the voxel size {spacing.tolist()} mm is not positive and finite"
        raise defect(why, "pixdim", "export the series again with its voxel size in mm")
    unit = _OTHER_UNITS.get(int(header["xyzt_units"]) & 7)
    if unit is not None:
        why = f"the header gives the voxel size {spacing.tolist()} in {unit}, but mm is expected"
        raise defect(why, "xyzt_units", "export the series again with its voxel size in mm")
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel raises several types for an unknown code
        raise defect(f"the header gives the unknown data type {int(header['datatype'])}", "datatype") from None
    check_number_type(dtype, path, "datatype")
    for field in ("qform_code", "sform_code"):
        if not 0 <= int(header[field]) <= 5:
            raise defect(f"{field} is {int(header[field])}, but 0 to 5 is expected", field)
    offset = float(header["vox_offset"])
    if not header_size <= offset <= _LAST_OFFSET:
        why = f"the header says that voxels start at byte {offset:g}, but {header_size} to {_LAST_OFFSET} is expected"
        raise defect(why, "vox_offset")
    return shape


def _read_voxels(
    file: BinaryIO, header: Any, shape: tuple[int, ...], path: Path, *, index: int = 0, count: int = 1
) -> np.ndarray:
    """Volume `index` of `count`, float32. The file is read to its end: there gzip compares its checksum."""
    from nibabel.arrayproxy import ArrayProxy

    dtype, position = header.get_data_dtype(), file.tell()
    size = int(np.prod(shape, dtype=object)) * dtype.itemsize
    before = int(header["vox_offset"]) + index * size
    expected = int(header["vox_offset"]) + count * size
    held, is_gzip = path.stat().st_size, isinstance(file, gzip.GzipFile)
    if held * (_MAX_RATIO if is_gzip else 1) < expected:
        why = f"this file is cut off: it holds {counted(held, 'byte')}, but its header says {expected}"
        raise DataError(why, path=path, field="dim", fix=_COPY_AGAIN)
    position += _skip(file, before - position)
    raw = file.read(size)
    position += len(raw)
    position += _skip(file, expected - position)
    if position < expected:
        why = f"this file is cut off: it holds {counted(position, 'byte')}, but its header says {expected}"
        raise DataError(why, path=path, field="dim", fix=_COPY_AGAIN)
    if file.read(1):
        why = "this file holds more data than its header says"
        raise DataError(why, path=path, field="dim", fix=_EXPORT_AGAIN)
    slope, intercept = header.get_slope_inter()  # None for a slope of 0 or NaN: the values are not scaled
    scaling = () if slope is None else (slope, intercept)
    proxy = ArrayProxy(io.BytesIO(raw), (shape, dtype, 0, *scaling))
    with np.errstate(over="ignore"):  # becomes infinite, which check_voxels reports
        return np.asarray(proxy, dtype=np.float32)


def _skip(file: BinaryIO, count: int) -> int:
    """Read up to `count` bytes and forget them; returns how many there were."""
    left = count
    while left > 0 and (block := file.read(min(left, _BLOCK))):
        left -= len(block)
    return count - left


def _read_affine(header: Any, path: Path) -> np.ndarray:
    """The sform, else the qform; DataError if neither is set, or if both are set and place the volume differently."""
    (qform, qform_code), (sform, sform_code) = header.get_qform(coded=True), header.get_sform(coded=True)
    shape, pixdim = header.get_data_shape()[:3], header.get_zooms()[:3]
    if qform_code == 0 and sform_code == 0:
        why = "the header gives no orientation: neither qform nor sform is set"
        raise DataError(why, path=path, field="sform_code", fix="export the series again with its orientation")
    if qform_code and sform_code:
        corners = np.array(np.meshgrid(*[(0, n) for n in shape], [1])).reshape(4, -1)
        distance = np.linalg.norm((sform @ corners - qform @ corners)[:3], axis=0).max()
        allowed = _FORMS_TOLERANCE * np.linalg.norm(np.array(shape) * pixdim)
        if not distance <= allowed:
            why = f"qform and sform disagree by up to {distance:.1f} mm, but at most {allowed:.1f} mm is allowed"
            raise DataError(why, path=path, field="sform", fix="export the series again, or unset the wrong one")
    affine = np.asarray(sform if sform_code else qform, float)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if sform_code and not np.allclose(spacing, pixdim, rtol=TOLERANCE):
        why = f"the voxel size is {np.round(spacing, 3).tolist()} in sform and {np.round(pixdim, 3).tolist()} in pixdim"
        raise DataError(why, path=path, field="sform", fix=_EXPORT_AGAIN)
    return affine
