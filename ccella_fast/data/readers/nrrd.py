"""Read NRRD files: `.nrrd`, or a header `.nhdr` with its voxels in another file (teem.sourceforge.net/nrrd/format.html)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.raw_voxels import RawImage, find_data_file, read_raw_image
from ccella_fast.data.readers.text_header import MAX_HEADER, NUMBER, TextHeader
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import check_size
from ccella_fast.errors import DataError

_FIELDS = [
    "dimension", "type", "block size", "encoding", "endian", "content", "min", "max", "old min", "old max", "data file",
    "line skip", "byte skip", "number", "sample units", "sizes", "spacings", "thicknesses", "axis mins", "axis maxs",
    "centers", "labels", "units", "kinds", "space", "space dimension", "space units", "space origin", "space directions",
    "measurement frame",
]  # fmt: skip
_KNOWN = {field: field for field in _FIELDS} | {
    "datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip", "sampleunits": "sample units",
    "centerings": "centers", "axismins": "axis mins", "axismaxs": "axis maxs", "oldmin": "old min", "oldmax": "old max",
    "blocksize": "block size",
}  # fmt: skip
_TYPES = {
    "i1": "signed char|int8|int8_t", "u1": "uchar|unsigned char|uint8|uint8_t",
    "i2": "short|short int|signed short|signed short int|int16|int16_t",
    "u2": "ushort|unsigned short|unsigned short int|uint16|uint16_t",
    "i4": "int|signed int|int32|int32_t", "u4": "uint|unsigned int|uint32|uint32_t",
    "i8": "longlong|long long|long long int|signed long long|signed long long int|int64|int64_t",
    "u8": "ulonglong|unsigned long long|unsigned long long int|uint64|uint64_t", "f4": "float", "f8": "double",
}  # fmt: skip
_SPACES = {  # name -> signs that lead to RAS. What other spaces, such as scanner-xyz, mean for left and right is not stated
    "right-anterior-superior": (1, 1, 1), "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1), "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1), "lps": (-1, -1, 1),
}  # fmt: skip
_VECTOR = rf"\(\s*{NUMBER}\s*,\s*{NUMBER}\s*,\s*{NUMBER}\s*\)"


def read_nrrd(path: Path, b_value: float | None = None) -> StoredVolume:
    """Read a volume in its stored order of axes.

    Raises:
        DataError: If the file is damaged or cut off, does not state its geometry or is not a 3D volume of plain numbers.
    """
    return read_raw_image(parse_nrrd(path))


def parse_nrrd(path: Path) -> RawImage:
    """Read the header. Raises DataError for one that is damaged, incomplete or not of a 3D volume of plain numbers."""
    header, end = _read_header(path)
    dimensions = int(header.text("dimension", "[34]", "3 (or 4, with an axis of 1)"))
    sizes = header.integers("sizes", dimensions)
    axes, affine = _read_geometry(header, sizes)
    shape = tuple(sizes[axis] for axis in axes)
    check_size(shape, path, "sizes")
    name = header.text("type", "|".join(_TYPES.values()), "one number, such as short,").lower()
    kind = next(kind for kind, names in _TYPES.items() if name in names.split("|"))
    is_big_endian = kind[1] != "1" and header.text("endian", "little|big", "little or big").lower() == "big"
    encoding = header.text("encoding", "raw|gzip|gz", "raw or gzip").lower()
    header.text("line skip", "0", "0", "0")
    skipped = int(header.text("byte skip", r"-1|\d{1,9}", "-1 or a number of bytes", "0"))
    if skipped and encoding != "raw":
        raise header.defect(f"byte skip is {skipped}, but only raw voxels may begin later", "byte skip")
    data_file, start = path, end
    if "data file" in header:
        data_file, start = find_data_file(header.text("data file", ".+", "a file name"), header, "data file"), 0
    elif path.name.lower().endswith(".nhdr"):
        header.text("data file", ".+", "the file of the voxels")
    start += max(skipped, 0)
    dtype = np.dtype((">" if is_big_endian else "<") + kind)
    return RawImage(data_file, start, skipped == -1, encoding != "raw", None, shape, dtype, affine)


def _read_header(path: Path) -> tuple[TextHeader, int]:
    """The fields of the header, and the byte where the voxels begin."""
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER)
    end = re.search(rb"\r?\n\r?\n", head)
    is_detached = end is None and path.name.lower().endswith(".nhdr") and len(head) < MAX_HEADER  # ends with the file
    if not re.match(rb"NRRD00(?:0[1-5]|\.01)\r?\n", head) or (end is None and not is_detached):
        fix = "copy or export the file again"
        raise DataError("this is not a NRRD file, or its header is cut off", path=path, field="header", fix=fix)
    stop = len(head) if end is None else end.end()
    pairs = []
    for number, line in enumerate(head[:stop].decode("latin-1").split("\n")[1:], 2):
        field, colon, value = line.partition(":")
        if line.startswith("#") or not line.strip() or value.startswith("="):
            continue  # a comment, or a pair of the user's own
        if not colon or field.strip().lower() not in _KNOWN:
            why = f"line {number} of the header is not a field of the NRRD format"
            raise DataError(why, path=path, field="header", fix="write a field of your own as `name:=value`")
        pairs.append((field, value))
    return TextHeader(path, pairs, _KNOWN), stop


def _read_geometry(header: TextHeader, sizes: tuple[int, ...]) -> tuple[list[int], np.ndarray]:
    """The three axes of space, and the affine."""
    space = header.text("space", "|".join(_SPACES), "RAS, LAS or LPS as letters or words").lower()
    pattern = rf"(?:(?:none|{_VECTOR})\s*){{{len(sizes)}}}"
    text = header.text("space directions", pattern, f"{len(sizes)} vectors of 3 numbers").lower()
    vectors = re.findall(rf"none|{_VECTOR}", text)
    axes = [axis for axis, vector in enumerate(vectors) if vector != "none"]
    if len(axes) != 3:
        why = f"space directions gives {len(axes)} vectors, but 3 are expected"
        raise header.defect(why, "space directions", "export the series again with its orientation")
    if others := [sizes[axis] for axis in range(len(sizes)) if axis not in axes and sizes[axis] != 1]:
        why = f"the image has {others[0]} values per voxel, but 1 is expected"
        raise header.defect(why, "sizes", "give one 3D volume per file")
    for field in ("spacings", "axis mins", "axis maxs", "units"):  # not allowed by the format
        header.text(field, r'(?:(?:nan|"")\s*)*', "no value beside space directions", "")
    header.text("space units", r'(?:"(?:mm|millimeters?|)"\s*)*', '"mm"', "")
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([_numbers_of(vectors[axis], header, "space directions") for axis in axes])
    origin = header.text("space origin", _VECTOR, "a vector of 3 numbers")
    affine[:3, 3] = _numbers_of(origin, header, "space origin")
    return axes, np.diag([*_SPACES[space], 1.0]) @ affine


def _numbers_of(vector: str, header: TextHeader, field: str) -> np.ndarray:
    return header.finite([float(number) for number in vector.strip("()").split(",")], field)
