"""Read MetaImage files: `.mha`, or a header `.mhd` with its voxels in another file (MetaIO of Kitware; itk.org/Wiki/MetaIO)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.raw_voxels import LPS_TO_RAS, RawImage, find_data_file, read_raw_image
from ccella_fast.data.readers.text_header import MAX_HEADER, TextHeader
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import TOLERANCE, check_size
from ccella_fast.errors import DataError

# AnatomicalOrientation is not used: ITK does not read it (ITK#1017), other programs write it wrongly, and TransformMatrix has
# the same content. CenterOfRotation does not move the voxels.
_FIELDS = ["ObjectType", "NDims", "BinaryData", "CompressedData", "CompressedDataSize", "DimSize", "HeaderSize",
           "ElementType", "ElementNumberOfChannels", "ElementSpacing", "ElementSize", "ElementDataFile", "DistanceUnits",
           "ElementToIntensityFunctionSlope", "ElementToIntensityFunctionOffset"]  # fmt: skip
_KNOWN = {field.lower(): field for field in _FIELDS} | {
    "binarydatabyteordermsb": "ElementByteOrderMSB", "elementbyteordermsb": "ElementByteOrderMSB",
    "transformmatrix": "TransformMatrix", "rotation": "TransformMatrix", "orientation": "TransformMatrix",
    "offset": "Offset", "position": "Offset", "origin": "Offset",
}  # fmt: skip
_TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4", "MET_DOUBLE": "f8",
}  # fmt: skip
_BOOLEAN, _TRUE = "true|false|t|f|1|0", ("true", "t", "1")


def read_metaimage(path: Path, b_value: float | None = None) -> StoredVolume:
    """Read a volume in its stored order of axes.

    Raises:
        DataError: If the file is damaged or cut off, does not state its geometry or is not a 3D volume of plain numbers.
    """
    return read_raw_image(parse_metaimage(path))


def parse_metaimage(path: Path) -> RawImage:
    """Read the header. Raises DataError for one that is damaged, incomplete or not of a 3D volume of plain numbers."""
    with open(path, "rb") as file:
        head = file.read(MAX_HEADER)
    end = re.search(rb"(?mi)^ElementDataFile\s*[=:][^\n]*(?:\n|\Z)", head)
    if end is None:
        fix = "copy or export the file again"
        raise DataError("this is not a MetaImage file, or its header is cut off", path=path, field="header", fix=fix)
    lines = head[: end.end()].decode("latin-1").split("\n")
    pairs = (re.split("[=:]", line, maxsplit=1) for line in lines if "=" in line or ":" in line)
    header = TextHeader(path, ((name, value) for name, value in pairs), _KNOWN)
    header.text("ObjectType", "image", "Image", "Image")
    dimensions = int(header.text("NDims", "[34]", "3 (or 4, with a last axis of 1)"))
    _check_encoding(header)
    shape = _read_shape(header, dimensions)
    kind = _TYPES[header.text("ElementType", "|".join(_TYPES), "one number, such as MET_SHORT,").upper()]
    is_big_endian = kind[1] != "1" and header.text("ElementByteOrderMSB", _BOOLEAN, "True or False").lower() in _TRUE
    start, data_file = end.end(), path
    name = header.text("ElementDataFile", ".+", "LOCAL or the name of a file")
    skipped = int(header.text("HeaderSize", r"-1|\d{1,9}", "-1 or a number of bytes", "0"))
    if name.upper() != "LOCAL":
        data_file, start = find_data_file(name, header, "ElementDataFile"), max(skipped, 0)
    is_compressed = header.text("CompressedData", _BOOLEAN, "True or False", "False").lower() in _TRUE
    if skipped and (is_compressed or name.upper() == "LOCAL"):
        raise header.defect(f"HeaderSize is {skipped}, but voxels in this place begin after 0 bytes", "HeaderSize")
    stored = int(header.text("CompressedDataSize", r"\d{1,12}", "a number of bytes", "0")) or None
    dtype = np.dtype((">" if is_big_endian else "<") + kind)
    return RawImage(
        data_file, start, skipped == -1, is_compressed, stored, shape, dtype, _read_affine(header, dimensions)
    )


def _check_encoding(header: TextHeader) -> None:
    """Raise DataError unless voxels are binary, of one value each, and in no need of scaling."""
    header.text("BinaryData", "true|t|1", "True (not voxels as text)", "True")
    header.text("ElementNumberOfChannels", "1", "1 value per voxel", "1")
    header.text("DistanceUnits", r"mm|\?|", "mm", "mm")
    for field, neutral in (("Slope", 1), ("Offset", 0)):
        field = f"ElementToIntensityFunction{field}"
        if field in header and header.numbers(field, 1)[0] != neutral:  # ITK does not apply it, other programs do
            raise header.defect(f"{field} is not {neutral}", field, "store the scaled voxels")


def _read_shape(header: TextHeader, dimensions: int) -> tuple[int, ...]:
    sizes = header.integers("DimSize", dimensions)
    if sizes[3:] not in ((), (1,)):
        why = f"the image has 4 dimensions and {sizes[3]} volumes, but one is expected"
        raise header.defect(why, "DimSize", "give one 3D volume per file")
    check_size(sizes[:3], header.path, "DimSize")
    return sizes[:3]


def _read_affine(header: TextHeader, dimensions: int) -> np.ndarray:
    # MetaIO takes the size of a voxel for the distance of voxels where only that is given.
    spacing_field = "ElementSize" if "ElementSize" in header and "ElementSpacing" not in header else "ElementSpacing"
    spacing = header.numbers(spacing_field, dimensions)[:3]
    if spacing.min() <= 0:
        why = f"the voxel size is {spacing.tolist()} mm, but positive numbers are expected"
        raise header.defect(why, spacing_field, "export the series again with its voxel size in mm")
    # A row of the file is the direction of an axis of the array.
    direction = header.numbers("TransformMatrix", dimensions**2).reshape(dimensions, dimensions)[:3, :3].T
    if np.abs(np.linalg.norm(direction, axis=0) - 1).max() > TOLERANCE:
        why = "the axes in TransformMatrix do not have length 1"
        raise header.defect(why, "TransformMatrix", "export the series again with its direction cosines")
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing
    affine[:3, 3] = header.numbers("Offset", dimensions)[:3]
    return LPS_TO_RAS @ affine
