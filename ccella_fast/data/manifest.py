"""The manifest of a prepared folder: its models, its reader, and access to the files that it lists."""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from ccella_fast.config import GridConfig
from ccella_fast.errors import DataError
from ccella_fast.folder_kinds import check_folder
from ccella_fast.storage import read_json, safe_join, sha256

NAME = "manifest.json"
IMPORTED = "imported"  # instead of the fingerprint of an encoder
CASE_ID = r"^\w[\w .+@=-]{0,120}$"  # part of file names
FORMAT: Literal["ccella_fast.prepared"] = "ccella_fast.prepared"
Split = Literal["train", "val", "test"]  # nothing is trained on val and test

# The start of a .npy file of version 1 (numpy.lib.format) and its header, as numpy writes it for a plain array.
_NPY_START = struct.Struct("<8sH")
_NPY_HEADER = re.compile(
    rb"\{'descr': '(?P<type>[<>|=][a-zA-Z]\d{0,3})', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>(?:\d{1,12}(?:, \d{1,12}){0,7},?)?)\), \} *\n"
)

Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
OneHot = Annotated[list[Literal[0, 1]], Field(min_length=2, max_length=2)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """A file of the prepared folder. `path` is relative to the folder."""

    path: str
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class AugmentedLatents(_Model):
    """Latents of an augmented study. `Augmentation(**parameters)` is the augmentation that was applied."""

    parameters: dict[str, bool | int | Finite | list[Finite]]
    spacing: Annotated[list[PositiveFinite], Field(min_length=3, max_length=3)]  # mm, of the augmented images
    files: dict[str, FileEntry]


class StudyEntry(_Model):
    """One study.

    The keys of `files` are `image/t2w` (X, Y, Z), `latent_mean/t2w` and `latent_sigma/t2w` (C, X, Y, Z), and `text` (L, E); all
    files are float32. Studies with imported latents do not have an image or a sigma. `window` contains per sequence the
    intensities that were mapped to 0 and 1. `patient` is the number of the patient where the list of
    studies names patients. A generated study has `source_case`, the case that it was generated from, and `class_predicted`, the
    class that its model predicts from the report, where they are known.
    """

    id: Annotated[str, Field(pattern=CASE_ID)]
    split: Split
    synthetic: bool = False  # generated, not measured
    source_case: Annotated[str, Field(pattern=CASE_ID)] | None = Field(
        default=None, exclude_if=lambda name: name is None
    )
    class_predicted: OneHot | None = Field(default=None, exclude_if=lambda value: value is None)
    dataset: str | None
    patient: int | None = Field(default=None, exclude_if=lambda number: number is None)
    spacing: Annotated[list[PositiveFinite], Field(min_length=3, max_length=3)]
    pirads: OneHot | None
    text_isnull: Literal[0, 1]
    affine: Annotated[
        list[Annotated[list[Finite], Field(min_length=4, max_length=4)]], Field(min_length=4, max_length=4)
    ]
    window: dict[str, tuple[Finite, Finite]]
    files: dict[str, FileEntry]
    augmented: list[AugmentedLatents] = Field(default=[], exclude_if=lambda copies: not copies)

    @field_validator("pirads", "class_predicted")
    @classmethod
    def _one_hot(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and sum(value) != 1:
            raise ValueError(f"the class must be [1, 0], [0, 1] or null, got {value}")
        return value


class TextInfo(_Model):
    """How the reports were encoded. `fingerprint` is that of the encoder's files, or IMPORTED."""

    encoder: str
    revision: str | None
    max_length: int
    dtype: str
    width: int
    fingerprint: str


class VaeInfo(_Model):
    """The autoencoder. `sha256` is that of its weights."""

    sha256: Sha256


class Manifest(_Model):
    """The contents of `manifest.json`.

    `scale_factor` is 1 / (standard deviation of the sampled latents of the train split), one value per sequence; it is null
    until there are latents. `null_text` is the file with the features of the null report, if report dropout was configured.
    """

    format: Literal["ccella_fast.prepared"]
    version: Literal[1]
    data: GridConfig
    text: TextInfo | None
    null_text: FileEntry | None = Field(default=None, exclude_if=lambda entry: entry is None)
    vae: VaeInfo | None
    scale_factor: list[PositiveFinite] | None
    intensity_scale: dict[str, PositiveFinite]
    truncated_reports: list[str]
    cases: Annotated[list[StudyEntry], Field(min_length=1)]
    _folder: Path = PrivateAttr()

    @property
    def folder(self) -> Path:
        """The prepared folder."""
        return self._folder

    def array(
        self, case: StudyEntry, key: str, *, verify: bool = False, files: dict[str, FileEntry] | None = None
    ) -> np.ndarray:
        """Open a file of a study as a read-only float32 memory map.

        Args:
            case: the study.
            key: key of the file, see `StudyEntry`.
            verify: whether to compare the file's SHA-256 with the manifest first.
            files: files of an augmented copy of the study, instead of its own.

        Raises:
            DataError: the file is not listed, missing, damaged or not a float32 array.
        """
        field = f"{case.id}.files.{key}"
        entry = (case.files if files is None else files).get(key)
        if entry is None:
            fix = (
                "run `ccella-fast prepare --vae OUT/vae`"
                if key.startswith("latent")
                else "run `ccella-fast prepare` again"
            )
            raise DataError(f"the study '{case.id}' has no {key}", path=self.folder / NAME, field=field, fix=fix)
        return self.open_entry(entry, field, verify=verify)

    def open_entry(self, entry: FileEntry, field: str, *, verify: bool) -> np.ndarray:
        """Open a listed file; see `array`. field: of the manifest, for error messages."""
        path, fix = self.folder / entry.path, "run `ccella-fast prepare` again"
        if not path.is_file():
            raise DataError("this prepared file is missing", path=path, field=field, fix=fix)
        if (size := path.stat().st_size) != entry.bytes:
            why = f"the size of this file must be {entry.bytes} bytes according to the manifest, got {size}"
            raise DataError(why, path=path, field=field, fix=fix)
        if verify and sha256(path) != entry.sha256:
            why = "this file is damaged: its SHA-256 differs from that in the manifest"
            raise DataError(why, path=path, field=field, fix=fix)
        return open_array(path, field=field)


def open_array(path: Path, *, field: str | None = None) -> np.ndarray:
    """Open a float32 `.npy` file as a read-only memory map.

    Args:
        path: the file.
        field: field of the manifest for error messages.

    Raises:
        DataError: the file cannot be read or is not a float32 `.npy` file.
    """

    def defect(why: str) -> DataError:
        return DataError(why, path=path, field=field, fix="write it again")

    try:
        with open(path, "rb") as file:
            head = file.read(_NPY_START.size)
            length = _NPY_START.unpack(head)[1] if len(head) == _NPY_START.size else 0
            header = file.read(length)
        # numpy's own reader evaluates the header as Python, which damage makes fail in many ways, and believes its length.
        match = _NPY_HEADER.fullmatch(header) if head.startswith(b"\x93NUMPY\x01\0") else None
        if match is None:
            raise defect("this file is not a plain .npy array")
        if match["type"] != b"<f4":
            raise defect(f"this file must contain a float32 array, got {match['type'].decode()}")
        shape = tuple(map(int, re.findall(rb"\d+", match["shape"])))
        if 0 in shape:
            raise defect("this file contains an empty array")
        start, size = len(head) + length, path.stat().st_size
        if size != start + 4 * math.prod(shape):
            raise defect(f"this file has {size} bytes, but its header says {start + 4 * math.prod(shape)}")
        order: Literal["F", "C"] = "F" if match["order"] == b"True" else "C"
        return np.memmap(path, np.float32, "r", start, shape, order)
    except OSError as error:
        why = f"this file cannot be read: {os.strerror(error.errno or 0)}"
        raise DataError(why, path=path, field=field, fix="check the file and its disk") from None


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of a prepared folder. Other files are not opened.

    Raises:
        DataError: the folder is not completely prepared, or the manifest has the wrong format or version, an id that occurs
        twice,
            or a path outside the folder.
    """
    path = Path(folder) / NAME
    check_folder(folder, "prepared", error=DataError)
    if not path.is_file():
        fix = "run `ccella-fast prepare`, which resumes where it stopped"
        raise DataError("this folder is not prepared, or its preparation is not complete", path=path, fix=fix)
    values = read_json(path)
    if isinstance(values, dict) and values.get("format") == FORMAT and values.get("version") != 1:
        why = f"the version of this manifest must be 1, got {values.get('version')!r:.20}"
        raise DataError(why, path=path, field="version", fix="prepare the studies again")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        raise _first_error(error, path) from None
    seen: set[str] = set()
    for index, case in enumerate(manifest.cases):
        if case.id in seen:
            why = f"two studies have the id '{case.id}'"
            raise DataError(why, path=path, field=f"cases[{index}].id", fix="prepare the studies again")
        seen.add(case.id)
        files = [*case.files.items(), *(item for copy in case.augmented for item in copy.files.items())]
        for key, entry in files:
            safe_join(folder, entry.path, path=path, field=f"cases[{index}].files.{key}.path")
    if manifest.null_text is not None:
        safe_join(folder, manifest.null_text.path, path=path, field="null_text.path")
    manifest._folder = Path(folder)
    return manifest


def _first_error(error: ValidationError, path: Path) -> DataError:
    first: Any = error.errors()[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    why = first["msg"].removeprefix("Value error, ")
    return DataError(
        f"this manifest is not valid: {why}", path=path, field=field or None, fix="prepare the studies again"
    )
