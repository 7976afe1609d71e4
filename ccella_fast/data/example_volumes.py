"""A few volumes of an evaluation, kept for its page: crops of 8 bits as NIfTI files, numbered and without ids."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from ccella_fast.data.readers.nifti import read_nifti_array
from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_folder, read_json, safe_join, write_json

INDEX = "examples.json"
CROP = (160, 160, 48)  # voxels; at 0.5 x 0.5 x 3 mm the gland and what is around it
SHOWN = 4  # volumes of each kind that a page compares
Kind = Literal["real", "reconstructed", "synthetic", "train"]


class Example(NamedTuple):
    """A volume to keep.

    Attributes:
        kind: the set that it is of.
        number: its position in the set, from 1. A reconstructed volume has the number of the real one.
        sequence: "t2w", "hbv" or "adc".
        array: (X, Y, Z), axes R, A, S, scaled so that the window of intensities is [0, 1].
        spacing: voxel size in mm.
    """

    kind: Kind
    number: int
    sequence: str
    array: np.ndarray
    spacing: Sequence[float]


class StoredExample(NamedTuple):
    """A volume that was kept; attributes as of `Example`, and its file."""

    kind: Kind
    number: int
    sequence: str
    path: Path

    def read(self) -> tuple[np.ndarray, tuple[float, ...]]:
        """The voxels (X, Y, Z) float32 in [0, 1] and their size in mm."""
        array, affine = read_nifti_array(self.path)
        return array, tuple(float(step) for step in np.abs(np.diag(affine)[:3]))


class StoredExamples(NamedTuple):
    """What was kept. phantom: whether the real volumes are phantoms and not patients."""

    volumes: list[StoredExample]
    phantom: bool


def write_examples(folder: str | Path, examples: Iterable[Example], *, phantom: bool = False) -> None:
    """Write the central `CROP` voxels of each volume to `folder`, which is replaced. Equal volumes give equal bytes.

    Args:
        folder: to write.
        examples: the volumes, read one at a time; one that is given twice is written once.
        phantom: whether the real volumes are phantoms and not patients.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    with atomic_folder(folder) as temporary:
        index: dict[str, dict[str, object]] = {}
        for each in examples:
            name = f"{each.kind}-{each.number}-{each.sequence}.nii.gz"
            if name not in index:
                (temporary / name).write_bytes(_nifti(_cropped(each.array), each.spacing))
                index[name] = {"file": name, "kind": each.kind, "number": each.number, "sequence": each.sequence}
        write_json(temporary / INDEX, {"phantom": phantom, "examples": list(index.values())})


def read_examples(folder: str | Path) -> StoredExamples:
    """The volumes that `write_examples` wrote, in the same order; empty if the folder does not exist.

    Raises:
        DataError: the index is damaged, or names a file that is not there.
    """
    path = Path(folder) / INDEX
    if not path.is_file():
        return StoredExamples([], False)
    content = read_json(path)
    try:
        return StoredExamples([_stored(entry, path) for entry in content["examples"]], content["phantom"] is True)
    except (LookupError, TypeError, ValueError):
        why = "a value of this index is missing or of another kind, or a file that it names is not there"
        raise DataError(why, path=path, fix="run `ccella-fast evaluate` again") from None


def _stored(entry: dict[str, Any], index: Path) -> StoredExample:
    file = safe_join(index.parent, entry["file"], path=index)
    kind, number, sequence = entry["kind"], entry["number"], entry["sequence"]
    if kind not in get_args(Kind) or type(number) is not int or type(sequence) is not str or not file.is_file():
        raise ValueError
    return StoredExample(kind, number, sequence, file)


def _cropped(volume: np.ndarray) -> np.ndarray:
    starts = [max(0, (size - limit) // 2) for size, limit in zip(volume.shape, CROP, strict=True)]
    return volume[tuple(slice(start, start + limit) for start, limit in zip(starts, CROP, strict=True))]


def _nifti(volume: np.ndarray, spacing: Sequence[float]) -> bytes:
    """A `.nii.gz` of unsigned bytes with a slope of 1/255, centred at the origin, its window stated."""
    import nibabel

    affine = np.diag([*map(float, spacing), 1.0])
    affine[:3, 3] = -np.asarray(spacing) * (np.asarray(volume.shape) - 1) / 2
    image = nibabel.Nifti1Image(np.rint(np.clip(volume, 0, 1) * 255).astype(np.uint8), affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["cal_min"], image.header["cal_max"] = 0, 1
    image.header.set_slope_inter(1 / 255, 0)
    return gzip.compress(image.to_bytes(), compresslevel=9, mtime=0)
