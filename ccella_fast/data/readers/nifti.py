"""Read `.nii` and `.nii.gz` files (NIfTI-1 and NIfTI-2, nifti.nimh.nih.gov) strictly."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.readers.volume import Volume
from ccella_fast.data.readers.volume_checks import TOLERANCE, check_number_type, check_size
from ccella_fast.errors import DataError

_FORMS_TOLERANCE = 2e-3  # rad; near half a turn a qform, which drops a quaternion's first part, is only good to 1.2e-3
_LAST_OFFSET = 2**24  # bytes; the largest start of the voxels, after the header's extensions
_EXPORT_AGAIN, _COPY_AGAIN = "export the series again", "copy or export the file again"


def read_nifti_file(path: Path, b_value: float | None = None) -> Volume:
    """Read a 3D file. Raises DataError as `read_nifti_array` does."""
    return Volume(*read_nifti_array(path))


def read_nifti_array(path: Path, dimensions: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Read the voxels, float32 in the stored order of axes, and the affine (4, 4), voxel index -> RAS mm.

    Raises:
        DataError: If the file is damaged, is cut off, does not have this number of dimensions or has an invalid header.
    """
    import nibabel

    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if is_gzip else open
    try:
        with opener(path, "rb") as file:
            head = file.read(352)
            cls: Any = nibabel.Nifti2Image if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
            head += file.read(cls.header_class.sizeof_hdr + 4 - len(head)) if cls is nibabel.Nifti2Image else b""
            size = _check_header(cls.header_class, head, path, dimensions)
            raw = head + file.read(size - len(head))
            if file.read(1):
                why = "this file holds more data than its header says"
                raise DataError(why, path=path, field="dim", fix=_EXPORT_AGAIN)
            # That read reached the end of the stream, so gzip has compared its CRC.
    except EOFError:
        why = "this file is cut off: its gzip stream does not end"
        raise DataError(why, path=path, field="gzip stream", fix=_COPY_AGAIN) from None
    except (gzip.BadGzipFile, zlib.error):
        why = "this file is damaged: the checksum of its gzip stream does not match"
        raise DataError(why, path=path, field="gzip stream", fix=_COPY_AGAIN) from None
    if len(raw) < size:
        why = f"this file is cut off: it holds {len(raw)} bytes, but its header says {size}"
        raise DataError(why, path=path, field="dim", fix=_COPY_AGAIN)
    try:
        image = cls.from_bytes(raw)
        with np.errstate(over="ignore"):  # becomes infinite, which check_voxels reports
            return np.asarray(image.dataobj, dtype=np.float32), _read_affine(image.header, path)
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.filebasedimages.ImageFileError,
        ValueError,
        OverflowError,
    ) as error:
        why = f"this is not a NIfTI volume: {' '.join(str(error).split()):.100}"
        raise DataError(why, path=path, field="header", fix=_EXPORT_AGAIN) from None


def _check_header(header_class: Any, head: bytes, path: Path, dimensions: int) -> int:
    """Check the raw header before nibabel repairs it and before memory is allocated; returns the expected file size."""

    def defect(why: str, field: str, fix: str = _EXPORT_AGAIN) -> DataError:
        return DataError(why, path=path, field=field, fix=fix)

    header_size = header_class.sizeof_hdr
    if len(head) < header_size or head[:4] not in (header_size.to_bytes(4, "little"), header_size.to_bytes(4, "big")):
        raise defect("this is not a NIfTI file", "sizeof_hdr")
    header = header_class(head[:header_size], check=False)
    magic = header["magic"].item().rstrip(b"\0\r\n\x1a")
    if magic not in (b"n+1", b"n+2"):
        why = f"the header's magic string is {magic!r}, but that of a single-file NIfTI is b'n+1' or b'n+2'"
        raise defect(why, "magic", "give a .nii or .nii.gz file, not a pair of .hdr and .img")
    dim = [int(value) for value in header["dim"]]
    if dim[0] != dimensions:
        why = f"the volume has {dim[0]} dimensions, but {dimensions} are expected"
        raise defect(why, "dim", f"give one {dimensions}D volume per file")
    shape = tuple(dim[1 : 1 + dimensions])
    check_size(shape, path, "dim")
    spacing = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        why = f"the voxel size {spacing.tolist()} mm is not positive and finite"
        raise defect(why, "pixdim", "export the series again with its voxel size in mm")
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel raises several types for an unknown code
        raise defect(f"the header gives the unknown data type {int(header['datatype'])}", "datatype") from None
    check_number_type(dtype, path, "datatype")
    offset = float(header["vox_offset"])
    if not header_size <= offset <= _LAST_OFFSET:
        why = f"the header says that voxels start at byte {offset:g}, but {header_size} to {_LAST_OFFSET} is expected"
        raise defect(why, "vox_offset")
    return int(offset) + int(np.prod(shape, dtype=object)) * dtype.itemsize


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
