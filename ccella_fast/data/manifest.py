"""The prepared folder's manifest: its models, its reader, and access to the files that it lists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator

from ccella_fast.config import GridConfig
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json, safe_join, sha256

NAME = "manifest.json"
IMPORTED = "imported"  # in place of the fingerprint of an encoder
CASE_ID = r"^\w[\w .+@=-]{0,120}$"  # it becomes part of file names
FORMAT: Literal["ccella_fast.prepared"] = "ccella_fast.prepared"

Finite = Annotated[float, Field(allow_inf_nan=False)]
PositiveFinite = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Model):
    """path is relative to the prepared folder."""

    path: str
    sha256: Sha256
    bytes: Annotated[int, Field(ge=0)]


class AugmentedLatents(_Model):
    """Latents of an augmented study. parameters: `Augmentation(**parameters)` is what was applied."""

    parameters: dict[str, bool | int | Finite | list[Finite]]
    spacing: Annotated[list[PositiveFinite], Field(min_length=3, max_length=3)]  # mm, of the augmented images
    files: dict[str, FileEntry]


class StudyEntry(_Model):
    """One study. files: `image/t2w` (X, Y, Z), `latent_mean/t2w` and `latent_sigma/t2w` (C, X, Y, Z), `text` (L, E), all
    float32. Imported latents come without image and sigma. window: the intensities that were mapped to 0 and 1."""

    id: Annotated[str, Field(pattern=CASE_ID)]
    split: Literal["train", "test"]
    synthetic: bool = False  # drawn, not measured
    dataset: str | None
    spacing: Annotated[list[PositiveFinite], Field(min_length=3, max_length=3)]
    pirads: Annotated[list[Literal[0, 1]], Field(min_length=2, max_length=2)] | None
    text_isnull: Literal[0, 1]
    affine: Annotated[
        list[Annotated[list[Finite], Field(min_length=4, max_length=4)]], Field(min_length=4, max_length=4)
    ]
    window: dict[str, tuple[Finite, Finite]]
    files: dict[str, FileEntry]
    augmented: list[AugmentedLatents] = Field(default=[], exclude_if=lambda copies: not copies)

    @field_validator("pirads")
    @classmethod
    def _one_hot(cls, value: list[int] | None) -> list[int] | None:
        if value is not None and sum(value) != 1:
            raise ValueError("the class is not one-hot: [1, 0], [0, 1] or null")
        return value


class TextInfo(_Model):
    """How the reports were encoded. fingerprint: of the encoder's files, or IMPORTED."""

    encoder: str
    revision: str | None
    max_length: int
    dtype: str
    width: int
    fingerprint: str


class VaeInfo(_Model):
    sha256: Sha256


class Manifest(_Model):
    """`manifest.json`. scale_factor: one a sequence, 1 / std of the train latents as drawn; null until there are latents."""

    format: Literal["ccella_fast.prepared"]
    version: Literal[1]
    data: GridConfig
    text: TextInfo | None
    vae: VaeInfo | None
    scale_factor: list[PositiveFinite] | None
    intensity_scale: dict[str, PositiveFinite]
    truncated_reports: list[str]
    cases: Annotated[list[StudyEntry], Field(min_length=1)]
    _folder: Path = PrivateAttr()

    @property
    def folder(self) -> Path:
        return self._folder

    def array(
        self, case: StudyEntry, key: str, *, verify: bool = False, files: dict[str, FileEntry] | None = None
    ) -> np.ndarray:
        """The file `key` of `case` (or of `files`, those of an augmented copy of it) as a read-only memory map, float32.
        verify: compare its SHA-256 first.

        Raises DataError when it is not listed, missing, damaged or of another type."""
        listed, field = self.folder / NAME, f"{case.id}.files.{key}"
        entry = (case.files if files is None else files).get(key)
        if entry is None:
            fix = (
                "run `ccella-fast prepare --vae OUT/vae`"
                if key.startswith("latent")
                else "run `ccella-fast prepare` again"
            )
            raise DataError(f"the study '{case.id}' has no {key}", path=listed, field=field, fix=fix)
        path, fix = self.folder / entry.path, "run `ccella-fast prepare` again"
        if not path.is_file() or path.stat().st_size != entry.bytes:
            why = "has another size than the manifest says" if path.is_file() else "this prepared file is missing"
            raise DataError(why, path=path, field=field, fix=fix)
        if verify and sha256(path) != entry.sha256:
            raise DataError("damaged: the SHA-256 differs from the manifest's", path=path, field=field, fix=fix)
        return open_array(path, field=field)


def open_array(path: Path, *, field: str | None = None) -> np.ndarray:
    """A float32 `.npy` as a read-only memory map; DataError when it is anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as bad:
        why = f"cannot be read: {os.strerror(bad.errno or 0)}"
        raise DataError(why, path=path, field=field, fix="check the file and its disk") from None
    except (ValueError, EOFError, SyntaxError):
        raise DataError("not a plain .npy array", path=path, field=field, fix="write it again") from None
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        kind = array.dtype if isinstance(array, np.ndarray) else "an archive"
        raise DataError(f"holds {kind}, float32 is expected", path=path, field=field, fix="write it again")
    return array


def load_manifest(folder: str | Path) -> Manifest:
    """The manifest of a prepared folder, checked: form, version, unique ids, paths inside. Opens no other file."""
    path = Path(folder) / NAME
    if not path.is_file():
        fix = "run `ccella-fast prepare` (again: it goes on where it stopped)"
        raise DataError("this folder is not prepared, or not to its end", path=path, fix=fix)
    values = read_json(path)
    if isinstance(values, dict) and values.get("format") == FORMAT and values.get("version") != 1:
        why = f"written in version {values.get('version')!r:.20}, this program reads version 1"
        raise DataError(why, path=path, field="version", fix="prepare the studies again")
    try:
        prepared = Manifest.model_validate(values)
    except ValidationError as bad:
        raise _first_error(bad, path) from None
    seen: set[str] = set()
    for index, case in enumerate(prepared.cases):
        if case.id in seen:
            why = f"two cases have the id '{case.id}'"
            raise DataError(why, path=path, field=f"cases[{index}].id", fix="prepare the studies again")
        seen.add(case.id)
        listed = [*case.files.items(), *(item for copy in case.augmented for item in copy.files.items())]
        for key, entry in listed:
            safe_join(folder, entry.path, path=path, field=f"cases[{index}].files.{key}.path")
    prepared._folder = Path(folder)
    return prepared


def _first_error(bad: ValidationError, path: Path) -> DataError:
    first: Any = bad.errors()[0]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    why = first["msg"].removeprefix("Value error, ")
    return DataError(
        f"not as the manifest's form says: {why}", path=path, field=field or None, fix="prepare the studies again"
    )
