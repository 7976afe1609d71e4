"""Read one series from disk, whole and checked, as an array in RAS order with its affine.

Readers of medical images stop at the last voxel, so that a flipped bit in a gzip stream goes unseen, and repair or guess what
a header lacks. Here nothing is repaired: what is not a sound 3D volume is refused with the reason.
"""

from __future__ import annotations

import gzip
import re
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError

MAX_VOXELS = 2**28  # 1 GiB as float32; the largest clinical series has a tenth of it
_TOLERANCE = 1e-3  # of directions and voxel sizes
_FORMS_TOLERANCE = 2e-3  # rad; near half a turn a qform, which drops a quaternion's first part, is only good to 1.2e-3
_PLANES = ("sagittal", "coronal", "axial")


class Volume(NamedTuple):
    """`array` (X, Y, Z) float32, axes nearest to Right, Anterior, Superior; `affine` (4, 4) float64: voxel index -> RAS mm.
    Oblique direction cosines are kept: nothing is rotated."""

    array: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def read_volume(path: str | Path) -> Volume:
    """A `.nii`, `.nii.gz`, `.mha` or `.nrrd` file, or a folder that holds one DICOM series.

    Raises DataError for a damaged or cut-off file, and for anything but a finite, not constant 3D volume of plain numbers with
    positive spacing and orthonormal directions."""
    path = Path(path)
    if not path.exists():
        raise DataError("this file does not exist", path=path, fix="check the path, or copy the file again")
    if path.is_dir():
        array, affine = _read_dicom(path)
    elif path.name.lower().endswith((".nii", ".nii.gz")):
        array, affine = read_nifti_array(path)
    elif path.name.lower().endswith((".mha", ".nrrd")):
        array, affine = _read_with_itk(path)
    else:
        raise DataError("not a format that is read here", path=path, fix="give NIfTI, MHA, NRRD or a DICOM folder")
    _check_affine(affine, path)
    if not np.isfinite(array).all():
        raise DataError(
            "voxels are not finite (NaN or infinite)", path=path, field="voxels", fix="export the series again"
        )
    if array.min() == array.max():
        raise DataError("all voxels are equal", path=path, field="voxels", fix="export the series again")
    return _to_closest_ras(array, affine)


def check_axial(volume: Volume, path: Path) -> None:
    """DataError unless slices are axial. A volume that is nearly isotropic has no plane and passes."""
    order = np.argsort(volume.spacing)
    thick = int(order[-1])
    if volume.spacing[thick] > 1.2 * volume.spacing[order[-2]] and thick != 2:
        fix = "give the axial series"
        raise DataError(f"this series is {_PLANES[thick]}, not axial", path=path, field="direction", fix=fix)


# ---- NIfTI ----


def read_nifti_array(path: Path, dimensions: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (float32, as stored) and affine of a sound `.nii` or `.nii.gz` file with that many dimensions; else DataError."""
    import nibabel

    with open(path, "rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    opener: Any = gzip.open if zipped else open
    try:
        with opener(path, "rb") as file:
            head = file.read(352)
            cls: Any = nibabel.Nifti2Image if head[:4] in (b"\x1c\x02\0\0", b"\0\0\x02\x1c") else nibabel.Nifti1Image
            head += file.read(cls.header_class.sizeof_hdr + 4 - len(head)) if cls is nibabel.Nifti2Image else b""
            size = _check_nifti_header(cls.header_class, head, path, dimensions)
            raw = head + file.read(size - len(head))
            if file.read(1):
                raise DataError(
                    "holds more than its header says", path=path, field="dim", fix="export the series again"
                )
            # That read reached the end of the stream, so that gzip has compared its CRC.
    except (EOFError, gzip.BadGzipFile, zlib.error) as bad:
        why = (
            "cut off: the gzip stream has no end"
            if isinstance(bad, EOFError)
            else "damaged: its gzip checksum does not agree"
        )
        raise DataError(f"this file is {why}", path=path, field="gzip stream", fix="copy or export it again") from None
    if len(raw) < size:
        why = f"this file is cut off: {len(raw)} bytes, its header says {size}"
        raise DataError(why, path=path, field="dim", fix="copy or export it again")
    try:
        image = cls.from_bytes(raw)
        with np.errstate(over="ignore"):  # becomes infinite, and is refused as such
            return np.asarray(image.dataobj, dtype=np.float32), _nifti_affine(image.header, path)
    except (
        nibabel.spatialimages.HeaderDataError,
        nibabel.filebasedimages.ImageFileError,
        ValueError,
        OverflowError,
    ) as bad:
        why = f"not a NIfTI volume: {' '.join(str(bad).split()):.100}"
        raise DataError(why, path=path, field="header", fix="export it again") from None


def _check_nifti_header(header_class: Any, head: bytes, path: Path, dimensions: int) -> int:
    """Check the raw header, before a reader repairs it and before anything is allocated. Returns the size of the file."""

    def refuse(why: str, field: str, fix: str = "export the series again") -> DataError:
        return DataError(why, path=path, field=field, fix=fix)

    size = header_class.sizeof_hdr
    if len(head) < size or head[:4] not in (size.to_bytes(4, "little"), size.to_bytes(4, "big")):
        raise refuse("this is no NIfTI file", "sizeof_hdr")
    header = header_class(head[:size], check=False)
    if header["magic"].item().rstrip(b"\0\r\n\x1a") not in (b"n+1", b"n+2"):
        raise refuse("not a single-file NIfTI", "magic", "give .nii or .nii.gz, not .hdr and .img")
    dim = [int(value) for value in header["dim"]]
    if dim[0] != dimensions:
        raise refuse(f"has {dim[0]} dimensions, {dimensions} are expected", "dim", "give one 3D volume a file")
    shape = dim[1 : 1 + dimensions]
    if min(shape[:3]) < 2 or min(shape) < 1 or int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        raise refuse(f"claims a size of {' x '.join(map(str, shape))} voxels", "dim")
    spacing = np.asarray(header["pixdim"][1:4], float)
    if not (np.isfinite(spacing).all() and (spacing > 0).all()):
        raise refuse(f"has voxel size {spacing.tolist()}", "pixdim", "export it again with its voxel size in mm")
    try:
        dtype = header.get_data_dtype()
    except Exception:  # nibabel raises several kinds for an unknown code
        raise refuse(f"has unknown data type {int(header['datatype'])}", "datatype") from None
    if dtype.kind not in "iuf":
        raise refuse(f"voxels are {dtype}, plain numbers are expected", "datatype")
    offset = float(header["vox_offset"])
    if not size <= offset <= 2**24:
        raise refuse(f"voxels start at byte {offset}", "vox_offset")
    return int(offset) + int(np.prod(shape, dtype=object)) * dtype.itemsize


def _nifti_affine(header: Any, path: Path) -> np.ndarray:
    """sform, else qform. DataError when there is none, or when both are set and place the volume differently."""
    (q_affine, q_code), (s_affine, s_code) = header.get_qform(coded=True), header.get_sform(coded=True)
    if q_code == 0 and s_code == 0:
        fix = "export it again with its position (qform or sform)"
        raise DataError("has no orientation", path=path, field="sform_code", fix=fix)
    if q_code and s_code:
        corners = np.array(np.meshgrid(*[(0, n) for n in header.get_data_shape()[:3]], [1])).reshape(4, -1)
        apart = np.linalg.norm((s_affine @ corners - q_affine @ corners)[:3], axis=0).max()
        extent = np.linalg.norm(np.array(header.get_data_shape()[:3]) * header.get_zooms()[:3])
        if not apart <= _FORMS_TOLERANCE * extent:
            why = f"qform and sform disagree by up to {apart:.1f} mm"
            raise DataError(why, path=path, field="sform", fix="export it again, or unset the wrong one")
    affine = np.asarray(s_affine if s_code else q_affine, float)
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if s_code and not np.allclose(lengths, header.get_zooms()[:3], rtol=_TOLERANCE):
        why = f"sform has voxel size {np.round(lengths, 3).tolist()}, pixdim {np.round(header.get_zooms()[:3], 3).tolist()}"
        raise DataError(why, path=path, field="sform", fix="export the series again")
    return affine


# ---- MHA, NRRD, DICOM ----


def _read_with_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    import SimpleITK as sitk

    header, start = _text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        _check_itk_shape(reader.GetSize(), reader.GetNumberOfComponents(), path)
        if {header.get("compresseddata", "").lower(), header.get("encoding", "").lower()} & {"true", "gzip", "gz"}:
            _check_stream(path, start, int(np.prod(reader.GetSize(), dtype=object)) * 8)
        return _from_itk(reader.Execute(), path)
    except RuntimeError as bad:
        raise DataError(
            f"cannot be read: {_reason(bad)}", path=path, field="header", fix="copy or export it again"
        ) from None


def _text_header(path: Path) -> tuple[dict[str, str], int]:
    """Keys (lower case) of a MetaImage or NRRD header and where its voxels begin. Refuses a header that names another file,
    voxels as text, and a voxel size of zero."""
    with open(path, "rb") as file:
        head = file.read(2**20)
    nrrd = path.name.lower().endswith(".nrrd")
    end = re.search(rb"\r?\n\r?\n" if nrrd else rb"(?m)^ElementDataFile[^\n]*\n", head)
    if end is None or (nrrd and not head.startswith(b"NRRD")):
        fix = "copy or export it again"
        raise DataError(f"this is no {'NRRD' if nrrd else 'MetaImage'} file", path=path, field="header", fix=fix)
    lines = head[: end.end()].decode("latin-1").splitlines()
    pairs = (line.split(":" if nrrd else "=", 1) for line in lines if (":" if nrrd else "=") in line)
    header = {key.strip().lower(): value.strip() for key, value in pairs}
    if header.get("elementdatafile", "LOCAL") != "LOCAL" or {"data file", "datafile"} & header.keys():
        raise DataError(
            "its voxels lie in another file", path=path, field="data file", fix="write header and voxels into one file"
        )
    if header.get("encoding", "raw") not in ("raw", "gzip", "gz") or header.get("binarydata", "True").lower() != "true":
        raise DataError("its voxels are not raw or gzip", path=path, field="encoding", fix="write it again, binary")
    sizes = header.get("elementspacing", header.get("spacings", "1")).replace("NaN", "nan").split()
    if not all(_positive(size) for size in sizes):
        fix = "export it again with its voxel size in mm"
        raise DataError(f"has voxel size {' '.join(sizes)}", path=path, field="spacing", fix=fix)
    return header, end.end()


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < float("inf")
    except ValueError:
        return False


def _check_stream(path: Path, start: int, limit: int) -> None:
    """Inflate compressed voxels to their end, which compares the checksum; ITK goes on with garbage where it fails."""
    inflate, total = zlib.decompressobj(wbits=47), 0
    try:
        with open(path, "rb") as file:
            file.seek(start)
            while not inflate.eof and total <= limit:
                chunk = inflate.unconsumed_tail or file.read(2**18)
                if not chunk:
                    raise DataError("this file is cut off", path=path, field="voxels", fix="copy or export it again")
                total += len(inflate.decompress(chunk, 2**24))
    except zlib.error:
        why = "this file is damaged: its checksum does not agree"
        raise DataError(why, path=path, field="voxels", fix="copy or export it again") from None
    if total > limit:
        raise DataError("holds more than its header says", path=path, field="sizes", fix="export the series again")


def _read_dicom(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """One series, its slices in order of position and evenly spaced."""
    import SimpleITK as sitk

    def refuse(why: str, field: str, fix: str) -> DataError:
        return DataError(why, path=folder, field=field, fix=fix)

    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        fix = "keep one series a folder"
        raise refuse(f"holds {len(series)} DICOM series, one is expected", "SeriesInstanceUID", fix)
    names = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        step = _check_slices(names, refuse)
        reader.SetFileNames(names)
        reader.SetOutputPixelType(sitk.sitkFloat32)  # else the first slice's type: others have slopes of their own
        image = reader.Execute()
    except RuntimeError as bad:
        raise refuse(f"cannot be read: {_reason(bad)}", "DICOM file", "copy or export the series again") from None
    array, affine = _from_itk(image, folder)
    if abs(np.linalg.norm(affine[:3, 2]) - step) > 0.01 * step:  # ours is of all slices, not of the first two
        raise refuse(
            "slice positions and the reader's spacing disagree", "ImagePositionPatient", "export the series again"
        )
    return array, affine


def _check_slices(names: tuple[str, ...], refuse: Any) -> float:
    """Every slice has the same orientation and size, and positions are even and in line. Returns the slices' distance in mm."""
    import SimpleITK as sitk

    if len(names) < 2:
        raise refuse("holds a single slice, a 3D volume is expected", "DICOM files", "give the whole series")
    heights, aside, planes = [], [], set()
    for name in names:
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        reader.ReadImageInformation()
        try:
            position, cosines = (
                np.array([float(value) for value in reader.GetMetaData(tag).split("\\")])
                for tag in ("0020|0032", "0020|0037")
            )
            heights.append(float(position @ np.cross(cosines[:3], cosines[3:])))
            aside.append([position @ cosines[:3], position @ cosines[3:]])
        except (RuntimeError, ValueError):
            raise refuse("a slice has no position", "ImagePositionPatient", "export the series again") from None
        planes.add((reader.GetSize()[:2], reader.GetSpacing()[:2], tuple(np.round(cosines, 3))))
        if (
            len(names) * int(np.prod(reader.GetSize(), dtype=object)) > MAX_VOXELS
            or reader.GetNumberOfComponents() != 1
        ):
            raise refuse("slices are too large or in colour", "Rows", "give an MR series")
    if len(planes) > 1:
        raise refuse(
            "slices differ in size, voxel size or orientation", "ImageOrientationPatient", "keep one series a folder"
        )
    steps = np.diff(np.sort(heights))
    typical = float(np.median(steps))
    if typical <= 0 or steps.min() < 0.5 * typical:
        raise refuse("two slices lie at one position", "ImagePositionPatient", "keep one volume a folder")
    if np.abs(steps - typical).max() > 0.05 * typical:
        at = int(np.abs(steps - typical).argmax()) + 1
        why = f"slices are uneven: {steps[at - 1]:.2f} mm after slice {at}, elsewhere {typical:.2f}"
        raise refuse(why, "ImagePositionPatient", "add the missing slices")
    shifted = float(np.ptp(aside, axis=0).max())
    if shifted > 0.05 * typical:
        why = f"slices are shifted against each other by {shifted:.2f} mm within their plane"
        raise refuse(why, "ImagePositionPatient", "export the series again")
    return float(steps.mean())


def _check_itk_shape(shape: tuple[int, ...], components: int, path: Path) -> None:
    if len(shape) != 3 or components != 1:
        why = f"has {len(shape)} dimensions and {components} values a voxel; a plain 3D volume is expected"
        raise DataError(why, path=path, field="sizes", fix="give one 3D volume a file")
    if min(shape) < 2 or int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        why = f"claims a size of {' x '.join(map(str, shape))} voxels"
        raise DataError(why, path=path, field="sizes", fix="export the series again")


def _from_itk(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """ITK's (Z, Y, X) in LPS as (X, Y, Z) in RAS."""
    import SimpleITK as sitk

    _check_itk_shape(image.GetSize(), image.GetNumberOfComponentsPerPixel(), path)
    array = sitk.GetArrayViewFromImage(image)
    if array.dtype.kind not in "iuf":
        raise DataError(f"voxels are {array.dtype}", path=path, field="voxels", fix="give plain numbers")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array.transpose(2, 1, 0).astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _reason(bad: RuntimeError) -> str:
    """The last words of an ITK message, without its source lines and pointers."""
    return " ".join(str(bad).split())[-90:]


# ---- geometry ----


def _check_affine(affine: np.ndarray, path: Path) -> None:
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    # Below 0.01 mm a header counts in other units, metres as a rule; above 100 in micrometres.
    if not np.isfinite(affine).all() or spacing.min() < 0.01 or spacing.max() > 100:
        why = f"has voxel size {np.round(spacing, 4).tolist()} mm"
        raise DataError(why, path=path, field="spacing", fix="export it again with its voxel size in mm")
    direction = affine[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > _TOLERANCE:
        raise DataError(
            "its axes are not at right angles", path=path, field="direction", fix="resample it without shear"
        )


def _to_closest_ras(array: np.ndarray, affine: np.ndarray) -> Volume:
    """Permute and flip axes (no interpolation) so that each points most nearly to Right, Anterior, Superior."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(affine)
    moved = np.ascontiguousarray(apply_orientation(array, orientation))
    return Volume(moved, affine @ inv_ornt_aff(orientation, array.shape))
