"""Volumes to evaluate, read one at a time: from prepared folders, sample folders and folders of any generator's NIfTI files."""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, overload

import numpy as np

from ccella_fast.data.manifest import Manifest, Split, StudyEntry, load_manifest
from ccella_fast.data.preparation.resampling import Grid, normalize
from ccella_fast.data.readers.sample_files import read_sample
from ccella_fast.data.readers.series_names import SEQUENCES, parse_series_name
from ccella_fast.data.readers.text_checks import read_text
from ccella_fast.data.readers.volume_file import read_volume, volume_suffix
from ccella_fast.errors import ConfigError, DataError, did_you_mean
from ccella_fast.folder_kinds import check_folder, folder_kind, wrong_folder
from ccella_fast.pirads import CLASS_NAMES, CLASSES
from ccella_fast.quantities import counted
from ccella_fast.storage import damage_named, read_json, safe_join, sha256

logger = logging.getLogger("ccella_fast")
TABLE = "volumes.csv"  # optional, in a folder of NIfTI files
_COLUMNS = ("file", "sequence", "pirads", "patient")
_NIFTI = (".nii", ".nii.gz")
# Entries of a sample's sidecar that say which model generated it, and how.
_GENERATOR = (
    "step", "weights", "weights_sha256", "vae_sha256", "solver", "num_inference_steps", "guidance_scale", "autoguidance",
)  # fmt: skip


class Volume(NamedTuple):
    """A volume to evaluate.

    Attributes:
        array: (X, Y, Z) float32, axes R, A, S, scaled so that the window of intensities is [0, 1].
        spacing: voxel size in mm.
        id: of the case, or the stem of the file; unique among the volumes of a set that have the same sequence.
        sequence: "t2w", "hbv" or "adc".
        patient: what the studies of one patient share; a random split does not separate them. None: a patient of its own.
        pirads: the class that the volume shows or was asked for, "neg" or "pos"; None if it is unknown.
        prompt: of a generated volume, the name of the report that it was generated from.
    """

    array: np.ndarray
    spacing: tuple[float, float, float]
    id: str
    sequence: str = "t2w"
    patient: str | None = None
    pirads: str | None = None
    prompt: str | None = None


class Source(NamedTuple):
    """Where a volume is, and what is known of it before it is read.

    Attributes:
        id: as in `Volume`, like `sequence`, `patient`, `pirads` and `prompt`.
        path: its file or folder, for messages.
        read: returns the voxels, as in `Volume`, and their size in mm.
    """

    id: str
    path: Path
    read: Callable[[], tuple[np.ndarray, Sequence[float]]]
    sequence: str = "t2w"
    patient: str | None = None
    pirads: str | None = None
    prompt: str | None = None


class VolumeSet(Sequence[Volume]):
    """Volumes that are read when they are asked for, and not kept.

    Args:
        name: what the set is called in results: its folder's name and the split.
        sources: where the volumes are.
        path: the folder, for messages.
        scaling: how intensities are brought to [0, 1].
        manifest: of a prepared folder.
        generator: of a folder of samples, the entries of _GENERATOR that all of them share.
    """

    def __init__(
        self,
        name: str,
        sources: Sequence[Source],
        path: Path,
        scaling: str,
        manifest: Manifest | None = None,
        generator: dict[str, Any] | None = None,
    ):
        self.name, self.path, self.scaling, self.manifest = name, path, scaling, manifest
        self.sources, self.generator = list(sources), generator

    def __len__(self) -> int:
        return len(self.sources)

    @overload
    def __getitem__(self, index: int) -> Volume: ...
    @overload
    def __getitem__(self, index: slice) -> VolumeSet: ...
    def __getitem__(self, index: int | slice) -> Volume | VolumeSet:
        if isinstance(index, slice):
            return self._with(self.sources[index])
        source = self.sources[index]
        array, spacing = source.read()
        check_array(array, path=source.path)
        x, y, z = (float(length) for length in spacing)
        return Volume(array, (x, y, z), source.id, source.sequence, source.patient, source.pirads, source.prompt)

    def __iter__(self) -> Iterator[Volume]:
        return (self[index] for index in range(len(self)))

    @property
    def sequences(self) -> list[str]:
        """The names of the sequences of which there are volumes, in the order t2w, hbv, adc."""
        found = {source.sequence for source in self.sources}
        return [sequence for sequence in SEQUENCES if sequence in found]

    def of_sequence(self, sequence: str) -> VolumeSet:
        """The volumes of one sequence."""
        return self.of_sequences([sequence])

    def of_sequences(self, sequences: Sequence[str]) -> VolumeSet:
        """The volumes of some sequences."""
        return self._with([source for source in self.sources if source.sequence in sequences])

    def _with(self, sources: Sequence[Source]) -> VolumeSet:
        return VolumeSet(self.name, sources, self.path, self.scaling, self.manifest, self.generator)


def check_array(array: np.ndarray, *, path: object, field: str | None = None) -> None:
    """Raise DataError unless an array is three-dimensional, finite and not constant.

    Args:
        array: the voxels.
        path: the file or the volume to name.
        field: what else to name.
    """
    fix = "generate or prepare this volume again, or remove it"
    if array.ndim != 3 or min(array.shape) < 3:
        why = f"a volume must have three axes of at least 3 voxels, got the shape {array.shape}"
        raise DataError(why, path=path, field=field, fix=fix)
    low, high = float(array.min()), float(array.max())  # NaN if any voxel is
    if not np.isfinite([low, high]).all():
        count = int(np.count_nonzero(~np.isfinite(array)))
        why = f"voxels that are not finite (NaN or infinity): {count} of {array.size}"
        raise DataError(why, path=path, field=field, fix=fix)
    if low == high:
        raise DataError(f"all voxels are equal ({low:g})", path=path, field=field, fix=fix)


def open_volumes(given: str | Path, *, field: str) -> VolumeSet:
    """The volumes of a folder, of which nothing but the list is read yet.

    Args:
        given: a prepared folder, of which a split may be named after a colon (`prepared:test`); a folder of samples of
            `ccella-fast sample`; or any folder of NIfTI files, whose intensities are scaled as `prepare` does.
        field: the option that gives it.

    Raises:
        ConfigError: the split does not exist, or is named of another folder than a prepared one.
        DataError: the folder is missing, empty or of another kind, or one of its lists is damaged.
    """
    path, split = _split_name(str(given), field)
    if not path.is_dir():
        raise wrong_folder(path, "volumes", error=DataError, field=field)
    check_folder(path, "volumes", error=DataError, field=field)
    kind = folder_kind(path)
    if split is not None and kind != "prepared":
        why = f"only a prepared folder has splits, and this is not one: '{split}' cannot be chosen"
        raise ConfigError(why, path=path, field=field, fix="leave out the colon and what follows")
    if kind == "prepared":
        return _prepared(path, split, field)
    volumes = _samples(path) if kind == "samples" else _files(path)
    if not volumes:
        why = "there are no volumes in this folder"
        raise DataError(why, path=path, field=field, fix="give a folder of .nii or .nii.gz files")
    return volumes


def _split_name(given: str, field: str) -> tuple[Path, str | None]:
    """The folder and the split that is named after a colon."""
    folder, colon, split = given.rpartition(":")
    if not colon or Path(given).exists():  # a folder's name may contain a colon
        return Path(given), None
    if split not in get_args(Split):
        why = f"there is no split '{split:.40}'"
        raise ConfigError(why, path=folder, field=field, fix=did_you_mean(split, get_args(Split)))
    return Path(folder), split


def _prepared(path: Path, split: str | None, field: str) -> VolumeSet:
    manifest = load_manifest(path)
    cases = [case for case in manifest.cases if split in (None, case.split)]
    if not cases:
        known = sorted({case.split for case in manifest.cases})
        why = f"no study of this folder is in the split '{split}'"
        raise DataError(why, path=path, field=field, fix=f"it has studies in {', '.join(known)}")
    # The numbers of patients hold within a folder. Whether two sets are of one folder is seen by its list of studies.
    scope = sha256(path / "manifest.json")
    sources = [
        Source(
            case.id,
            path / case.files[f"image/{sequence}"].path if f"image/{sequence}" in case.files else path,
            partial(_read_prepared, manifest, case, sequence),
            sequence,
            None if case.patient is None else f"{scope} {case.patient}",
            None if case.pirads is None else CLASS_NAMES[case.pirads.index(1)],
            case.source_case,
        )
        for case in cases
        for sequence in manifest.data.sequences
    ]
    name = path.resolve().name + ("" if split is None else f":{split}")
    return VolumeSet(name, sources, path, "as prepared", manifest)


def _read_prepared(manifest: Manifest, case: StudyEntry, sequence: str) -> tuple[np.ndarray, Sequence[float]]:
    return np.array(manifest.array(case, f"image/{sequence}", verify=True)), case.spacing


def _samples(path: Path) -> VolumeSet:
    """The volumes that the sidecars of a sample folder list; those of a run that has not ended are left out."""
    sources, generators = [], []
    for sidecar_path in sorted(path.glob("sample-*.json")):
        sidecar = read_json(sidecar_path)
        with damage_named(sidecar_path, writer="`ccella-fast sample`", fix="generate this volume again"):
            files = {
                sequence: safe_join(path, name, path=sidecar_path, field="files")
                for sequence, name in sidecar["files"].items()
            }
            scales = {sequence: float(sidecar["intensity_scale"][sequence]) for sequence in files}
            spacing = [float(length) for length in sidecar["spacing"]]
            pirads, prompt = _class_of_sample(sidecar), sidecar.get("report_id")
            generators.append({name: sidecar.get(name) for name in _GENERATOR})
        for sequence, file in files.items():
            if file.exists():
                read = partial(_read_sample, file, scales[sequence], spacing)
                sources.append(Source(sidecar_path.stem, file, read, sequence=sequence, pirads=pirads, prompt=prompt))
    first = generators[0] if generators else {}
    generator = {
        name: value
        for name, value in first.items()
        if value is not None and all(other[name] == value for other in generators)
    }
    return VolumeSet(path.resolve().name, sources, path, "divided by intensity_scale", generator=generator)


def _class_of_sample(sidecar: dict[str, Any]) -> str | None:
    """The class that was asked for, else the one that a trained head has predicted from the report."""
    given = sidecar.get("class_override") or sidecar.get("class_given")
    if given is not None:
        return CLASS_NAMES[CLASSES[str(given)].index(1)]
    predicted = sidecar.get("class_probabilities")
    return max(predicted, key=predicted.get) if predicted and sidecar.get("class_head") == "trained" else None


def _read_sample(path: Path, scale: float, spacing: Sequence[float]) -> tuple[np.ndarray, Sequence[float]]:
    return read_sample(path) / np.float32(scale), spacing


def _files(path: Path) -> VolumeSet:
    """The NIfTI files in a folder and the folders in it, sorted by name.

    Where the names of some say a sequence, the others are something else, such as masks, and are left out.
    """
    files = {
        str(file.relative_to(path)): file
        for file in sorted(path.rglob("*"))
        if volume_suffix(file.name) in _NIFTI and not _is_hidden(file.relative_to(path)) and file.is_file()
    }
    named = {name: file for name, file in files.items() if parse_series_name(_stem(file.name)) is not None}
    if named and len(named) < len(files):
        first = next(name for name in files if name not in named)
        left_out = counted(len(files) - len(named), "file is", "files are")
        logger.warning("%s: %s left out: their names do not say a sequence, such as %s", path, left_out, first)
    files = named or files
    rows = _read_table(path / TABLE, files) if (path / TABLE).is_file() else {}
    sources = []
    for name, file in files.items():
        row = rows.get(name, {})
        stem = _stem(name)
        read_as = parse_series_name(Path(stem).name)
        sequence = row.get("sequence") or (read_as.sequence if read_as else "t2w")
        pirads = CLASS_NAMES[CLASSES[row["pirads"]].index(1)] if row.get("pirads") else None
        identifier = _case_of_file(stem, sequence)
        sources.append(
            Source(identifier, file, partial(_read_file, file, sequence), sequence, row.get("patient") or None, pirads)
        )
    return VolumeSet(path.resolve().name, sources, path, "percentiles 0 to 99.5 of a volume; ADC: 0 to 3000")


def _case_of_file(stem: str, sequence: str) -> str:
    """The id of a file's case: its path without the name of the sequence, so that the sequences of a case share it."""
    folder, name = Path(stem).parent, Path(stem).name
    read_as = parse_series_name(name)
    if read_as is not None and read_as.sequence == sequence:
        name = read_as.prefix.rstrip("_-. ")
    return "/".join(part for part in (*folder.parts, name) if part) or stem


def _stem(name: str) -> str:
    return name[: -len(volume_suffix(name) or "")]


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_file(path: Path, sequence: str) -> tuple[np.ndarray, Sequence[float]]:
    volume = read_volume(path)
    everything = tuple(slice(0, size) for size in volume.array.shape)
    grid = Grid(volume.array.shape, volume.affine, everything)  # type: ignore[arg-type]
    return normalize(volume.array, sequence, grid, path=path)[0], volume.spacing.tolist()


def _read_table(path: Path, files: dict[str, Path]) -> dict[str, dict[str, str]]:
    """File name -> row of the table, whose columns are file and, if wanted, sequence, pirads and patient."""
    reader = csv.DictReader(io.StringIO(read_text(path)))
    columns = reader.fieldnames or []
    if "file" not in columns or not set(columns) <= set(_COLUMNS):
        why = f"the columns of this table must be file and any of {', '.join(_COLUMNS[1:])}"
        raise DataError(why, path=path, field="line 1", fix="correct its first line")
    rows: dict[str, dict[str, str]] = {}
    for row in reader:
        field = f"line {reader.line_num}"
        row = {name: (value or "").strip() for name, value in row.items() if isinstance(name, str)}
        name = row["file"]
        if name not in files:
            raise DataError(
                "this line names no file of the folder", path=path, field=field, fix="correct the column file"
            )
        if name in rows:
            raise DataError(
                "this line names a file for the second time", path=path, field=field, fix="keep one of them"
            )
        for column, known in (("pirads", CLASSES), ("sequence", SEQUENCES)):
            if row.get(column) and row[column] not in known:
                why = f"{column} must be empty or one of {', '.join(known)}"
                raise DataError(why, path=path, field=f"{field}, {column}", fix="correct it there")
        rows[name] = row
    return rows
