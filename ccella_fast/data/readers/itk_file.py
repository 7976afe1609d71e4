"""Read MetaImage (`.mha`) and NRRD (`.nrrd`) files with SimpleITK, after checks that SimpleITK does not make."""

from __future__ import annotations

import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.readers.volume import Volume
from ccella_fast.data.readers.volume_checks import check_number_type, check_size
from ccella_fast.errors import DataError

_EXPORT_AGAIN, _COPY_AGAIN = "export the series again", "copy or export the file again"


def read_itk_file(path: Path, b_value: float | None = None) -> Volume:
    """Read a volume in its stored order of axes.

    Raises:
        DataError: If the file is damaged, is cut off, refers to another file or is not a 3D volume of plain numbers.
    """
    import SimpleITK as sitk

    header, start = _read_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_shape(reader.GetSize(), reader.GetNumberOfComponents(), path)
        if {header.get("compresseddata", "").lower(), header.get("encoding", "").lower()} & {"true", "gzip", "gz"}:
            _check_stream(path, start, int(np.prod(reader.GetSize(), dtype=object)) * 8)
        return Volume(*arrays_of_itk_image(reader.Execute(), path))
    except RuntimeError as error:
        why = f"this file cannot be read: {last_words(error)}"
        raise DataError(why, path=path, field="header", fix=_COPY_AGAIN) from None


def arrays_of_itk_image(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Convert an image in ITK's order (Z, Y, X) and LPS coordinates to (X, Y, Z) float32 and an affine in RAS."""
    import SimpleITK as sitk

    _check_shape(image.GetSize(), image.GetNumberOfComponentsPerPixel(), path)
    array = sitk.GetArrayViewFromImage(image)
    check_number_type(array.dtype, path, "voxels")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array.transpose(2, 1, 0).astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def last_words(error: RuntimeError) -> str:
    """The last words of an ITK message, at most 90 characters; source lines and pointers come first."""
    message = " ".join(str(error).split())
    return message if len(message) <= 90 else message[-90:].partition(" ")[2]


def _check_shape(shape: tuple[int, ...], components: int, path: Path) -> None:
    if len(shape) != 3 or components != 1:
        why = f"the image has {len(shape)} dimensions and {components} values per voxel, but 3 and 1 are expected"
        raise DataError(why, path=path, field="sizes", fix="give one 3D volume per file")
    check_size(shape, path, "sizes")


def _read_header(path: Path) -> tuple[dict[str, str], int]:
    """Keys (lower case) and values of the text header, and the byte where the voxels begin.

    Raises DataError for a header that refers to another file, voxels written as text and a voxel size that is not positive.
    """

    def defect(why: str, field: str, fix: str) -> DataError:
        return DataError(why, path=path, field=field, fix=fix)

    with open(path, "rb") as file:
        head = file.read(2**20)
    is_nrrd = path.name.lower().endswith(".nrrd")
    end = re.search(rb"\r?\n\r?\n" if is_nrrd else rb"(?m)^ElementDataFile[^\n]*\n", head)
    if end is None or (is_nrrd and not head.startswith(b"NRRD")):
        raise defect(f"this is not a {'NRRD' if is_nrrd else 'MetaImage'} file", "header", _COPY_AGAIN)
    separator = ":" if is_nrrd else "="
    lines = head[: end.end()].decode("latin-1").splitlines()
    pairs = (line.split(separator, 1) for line in lines if separator in line)
    header = {key.strip().lower(): value.strip() for key, value in pairs}
    if header.get("elementdatafile", "LOCAL") != "LOCAL" or {"data file", "datafile"} & header.keys():
        fix = "write header and voxels into one file"
        raise defect("the voxels are stored in another file", "data file", fix)
    if header.get("encoding", "raw") not in ("raw", "gzip", "gz") or header.get("binarydata", "True").lower() != "true":
        raise defect("the voxels are stored neither raw nor as gzip", "encoding", "write the file again in binary form")
    spacing = header.get("elementspacing", header.get("spacings", "1")).replace("NaN", "nan").split()
    if not all(_is_positive(size) for size in spacing):
        why = f"the voxel size {' '.join(spacing):.60} mm is not positive and finite"
        raise defect(why, "spacing", "export the series again with its voxel size in mm")
    return header, end.end()


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _check_stream(path: Path, start: int, limit: int) -> None:
    """Inflate compressed voxels to their end, which compares the checksum; ITK ignores a checksum that does not match."""
    inflate, total = zlib.decompressobj(wbits=47), 0
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while not inflate.eof and total <= limit:
                chunk = inflate.unconsumed_tail or file.read(2**18)
                if not chunk:
                    why = "this file is cut off: its compressed voxels do not end"
                    raise DataError(why, path=path, field="voxels", fix=_COPY_AGAIN)
                total += len(inflate.decompress(chunk, 2**24))
    except zlib.error:
        why = "this file is damaged: the checksum of its voxels does not match"
        raise DataError(why, path=path, field="voxels", fix=_COPY_AGAIN) from None
    if total > limit:
        why = "this file holds more data than its header says"
        raise DataError(why, path=path, field="sizes", fix=_EXPORT_AGAIN)
