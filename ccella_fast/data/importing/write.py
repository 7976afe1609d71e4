"""Write the chosen series of a study as NIfTI files, which hold voxels and geometry and no text of the headers."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.data.importing.sequence_choice import Judgement
from ccella_fast.data.readers.dicom_series import MAY_BE_MISSING
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_file import check_axial, read_volume
from ccella_fast.errors import DataError
from ccella_fast.storage import atomic_folder, atomic_path, read_json, write_json


class SeriesFiles(NamedTuple):
    """The files of a chosen volume.

    Attributes:
        files: Their paths.
        b_value: Which volume of files with several, in s/mm2; None if they hold one.
        is_part: Whether the series has more files, which belong to other volumes.
    """

    files: tuple[str, ...]
    b_value: float | None
    is_part: bool


class StudyTask(NamedTuple):
    """A study to read: what a worker process needs.

    Attributes:
        id: New id.
        series: Sequence -> files.
        folder: Where to write the study.
        private: The private folder.
    """

    id: str
    series: dict[str, SeriesFiles]
    folder: Path
    private: Path

    @property
    def record(self) -> Path:
        """The file that says from which files the study in `folder` was written."""
        return self.private / "written" / f"{self.id}.json"


def task_of(study_id: str, judged: list[Judgement], out: Path, private: Path) -> StudyTask:
    """The task of a study; its series are those with a use."""
    series = {}
    for each in sorted(judged, key=lambda judgement: judgement.use):
        if each.use:
            headers = each.volume.headers
            has_several = any(header.storage == "enhanced MR" for header in headers) and each.volume.b_value is not None
            series[each.use] = SeriesFiles(
                tuple(header.path for header in headers),
                each.volume.b_value if has_several else None,
                sum(other.volume.series_uid == each.volume.series_uid for other in judged) > 1,
            )
    return StudyTask(study_id, series, out / study_id, private)


def read_series(task: StudyTask, sequence: str) -> StoredVolume:
    """Read one volume. Its files are linked into a temporary folder under neutral names, which is all that messages show."""
    files, b_value, is_part = task.series[sequence]
    with tempfile.TemporaryDirectory(prefix="ccella-") as temporary:
        folder = Path(temporary)
        for number, file in enumerate(files):
            (folder / f"{number:06d}.dcm").symlink_to(Path(file).absolute())
        try:
            volume = read_volume(folder, b_value=b_value)
            check_axial(volume, folder)
        except DataError as error:
            defect = task.private / "defects" / f"{task.id}_{sequence}.txt"
            place = Path(error.path or folder)
            original = files[int(place.stem)] if place.parent == folder else files[0]
            with atomic_path(defect) as unfinished:
                unfinished.write_text(f"{original}\n{error.why}\n", encoding="utf-8")
            why = f"the series chosen as {sequence} of {task.id} cannot be used: {error.why}"
            fix = "see that file for the path in the export; export it again, or choose another series in choices.csv"
            raise DataError(why, path=defect, field=error.field, fix=fix) from None
    if is_part:  # the numbers of the images run through the whole series
        volume = volume._replace(notes=tuple(note for note in volume.notes if not note.startswith(MAY_BE_MISSING)))
    return volume


def is_written(task: StudyTask) -> bool:
    """Whether the study in its folder was written from these very files."""
    names = {f"{sequence}.nii.gz" for sequence in task.series}
    if not task.record.is_file() or not all((task.folder / name).is_file() for name in names):
        return False
    return read_json(task.record) == {"inputs": _digest(task)}


def write_study(task: StudyTask) -> dict[str, tuple[str, ...]]:
    """Write the study and return the notes of each sequence. What an earlier import wrote is replaced.

    Raises:
        DataError: If a series cannot be read, or the folder exists and is not from an import with this private folder.
    """
    if task.folder.exists() and not task.record.is_file():
        why = "this folder exists, and no import with this private folder has written it"
        raise DataError(why, path=task.folder, fix="choose another --out, or give the --private folder of that import")
    volumes = {sequence: read_series(task, sequence) for sequence in task.series}
    write_json(task.record, {"inputs": None})  # the folder is ours, but not yet complete
    if task.folder.exists():
        shutil.rmtree(task.folder)
    with atomic_folder(task.folder) as temporary:
        for sequence, volume in volumes.items():
            (temporary / f"{sequence}.nii.gz").write_bytes(nifti_bytes(volume))
    write_json(task.record, {"inputs": _digest(task)})
    return {sequence: volume.notes for sequence, volume in volumes.items()}


def nifti_bytes(volume: StoredVolume) -> bytes:
    """A gzip-compressed NIfTI file with equal sform and qform. Whole numbers are stored as int16 or int32, else float32."""
    import nibabel

    array: np.ndarray = volume.array
    if np.array_equal(array, np.rint(array)) and np.abs(array).max() < 2**31:
        array = array.astype(np.int16 if np.abs(array).max() < 2**15 else np.int32)
    image = nibabel.Nifti1Image(array, None)
    image.header.set_xyzt_units("mm")
    image.set_qform(volume.affine, code=1)
    image.set_sform(image.get_qform(), code=1)
    return gzip.compress(image.to_bytes(), 6, mtime=0)


def _digest(task: StudyTask) -> str:
    """Of the names, sizes and times of the files, and of what they are used as."""
    digest = hashlib.sha256()
    for sequence, series in sorted(task.series.items()):
        digest.update(f"{sequence} {series.b_value}\n".encode())
        for file in series.files:
            state = Path(file).stat()
            digest.update(f"{Path(file).name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def remove_study(task: StudyTask) -> bool:
    """Remove what an earlier import wrote for a study that has no series any more; whether there was anything."""
    if not task.record.is_file():
        return False
    shutil.rmtree(task.folder, ignore_errors=True)
    task.record.unlink()
    return True
