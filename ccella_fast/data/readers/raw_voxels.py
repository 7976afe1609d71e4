"""Read the voxels of a MetaImage or NRRD file, whose header has been parsed.

The voxels are read here and not by ITK: a damaged header makes ITK write beyond its buffers (MetaIO with 100 dimensions, NrrdIO
with a line of a thousand characters), and where compressed voxels end early ITK returns memory that nobody has written.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.data.readers.text_checks import quote
from ccella_fast.data.readers.text_header import TextHeader
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

_MAX_RATIO = 1040  # deflate shortens at most 1032 to 1
_COPY_AGAIN = "copy or export the file again"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class RawImage(NamedTuple):
    """What a header says about the voxels.

    Attributes:
        path: The file of the voxels; that of the header, or another one in its folder.
        start: Byte of `path` where the voxels begin.
        is_last: Whether they may begin later: they are the last bytes of the file.
        is_compressed: Whether they are one zlib or gzip stream.
        stored: Bytes of that stream, if the header gives them.
        shape: (X, Y, Z), the first axis is the fastest in the file.
        dtype: With its byte order.
        affine: (4, 4) voxel index -> RAS mm.
    """

    path: Path
    start: int
    is_last: bool
    is_compressed: bool
    stored: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray


def read_raw_image(image: RawImage) -> StoredVolume:
    """Read the voxels, in the stored order of axes.

    Raises:
        DataError: If the file does not hold exactly the bytes of the voxels, or if the checksum of compressed voxels differs.
    """
    size = int(np.prod(image.shape, dtype=object)) * image.dtype.itemsize
    raw = _inflate(image, size) if image.is_compressed else _read(image, size)
    array = np.frombuffer(raw, image.dtype).reshape(image.shape[::-1]).transpose()
    with np.errstate(over="ignore"):  # becomes infinite, which check_voxels reports
        return StoredVolume(array.astype(np.float32), image.affine)


def find_data_file(name: str, header: TextHeader, field: str) -> Path:
    """The file with the voxels that `header` names: in its folder, or if the header is a link, in that of the original.

    Raises:
        DataError: If it is missing or outside these folders, or if there are several files.
    """
    path, plain = header.path, name.removeprefix("./")
    if plain.startswith("LIST") or "%" in plain:
        raise header.defect("the voxels are stored in several files", field, "write them into one file")
    if plain in ("", ".", "..") or len(plain) > 250 or not plain.isprintable() or any(sign in plain for sign in "/\\"):
        why = f"the voxels are stored in {quote(name)}, which is not a file in the folder of the header"
        raise header.defect(why, field, "put both files into one folder and write only the file's name")
    folders = (path.parent, path.resolve().parent)
    found = next((folder / plain for folder in folders if (folder / plain).exists()), path.parent / plain)
    check_is_data(found)
    if not found.is_file():
        why = f"the file of the voxels, {quote(plain)}, is missing"
        raise header.defect(why, field, "copy it into the folder of its header")
    if found.resolve().parent not in [folder.resolve() for folder in folders]:
        why = f"the file of the voxels, {quote(plain)}, is a link that leaves the folder of its header"
        raise header.defect(why, field, "copy it into the folder of its header")
    return found


def _read(image: RawImage, size: int) -> bytes:
    """The `size` bytes of voxels as they are stored."""
    held = image.path.stat().st_size - image.start
    if held < size:
        raise _defect(
            image,
            f"this file is cut off: it holds {counted(max(held, 0), 'byte')} of voxels, but its header says {size}",
        )
    if held > size and not image.is_last:
        raise _defect(
            image,
            f"this file holds more data than its header says: {counted(held, 'byte')} of voxels instead of {size}",
        )
    with open(image.path, "rb") as file:
        file.seek(image.start + held - size)
        return file.read(size)


def _inflate(image: RawImage, size: int) -> bytes:
    """The `size` bytes of voxels from a stream that is as long as the file. Its end is read: there is the checksum."""
    held = image.path.stat().st_size - image.start
    if image.stored is not None and image.stored != held:
        cut = "this file is cut off: " if held < image.stored else ""
        raise _defect(
            image, f"{cut}its header says {counted(image.stored, 'byte')} of compressed voxels, but it holds {held}"
        )
    if held > size + size // 100 + 2**16:  # deflate lengthens by less; neither is read into memory
        raise _defect(image, f"this file holds more data than its header says: {held} bytes for {size} of voxels")
    if held * _MAX_RATIO < size:
        raise _defect(image, f"this file is cut off: {counted(held, 'compressed byte')} cannot hold {size} of voxels")
    with open(image.path, "rb") as file:
        file.seek(image.start)
        stream = file.read(held)
    inflate = zlib.decompressobj(wbits=47)  # zlib or gzip
    try:
        raw = inflate.decompress(stream, size + 1)
    except zlib.error:
        why = "this file is damaged: its compressed voxels do not inflate, or their checksum does not match"
        raise _defect(image, why) from None
    if len(raw) > size or inflate.unused_data:
        raise _defect(image, f"this file holds more data than its header says ({size} bytes of voxels)")
    if not inflate.eof:
        raise _defect(image, "this file is cut off: its compressed voxels do not end")
    if len(raw) < size:
        raise _defect(image, f"this file holds {counted(len(raw), 'byte')} of voxels, but its header says {size}")
    return raw


def _defect(image: RawImage, why: str) -> DataError:
    return DataError(why, path=image.path, field="voxels", fix=_COPY_AGAIN)
