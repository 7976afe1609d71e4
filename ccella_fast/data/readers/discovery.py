"""Find studies in a folder or in a list. Only names and lists are read, no image is opened.

A study of a plain folder is the shallowest folder that directly holds a recognized series; its subfolders are not searched. A
series is a file `t2w` with a suffix of FORMATS, such as `t2w.nii.gz`, or `<id>_t2w.mha` as in PI-CAI, or a folder of DICOM
files called `t2w` or `t2w-dicom`; the same holds for the other names of SERIES_NAMES. The id of a study is its `<id>`, else
the name of its folder, or, if several folders have this name, the folder's path with / written as _.

BIDS folders: see bids.py. Tables of classes and reports: study_table.py. JSON lists: study_list.py.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from ccella_fast.data.readers.bids import find_bids_series, is_bids
from ccella_fast.data.readers.dicom_files import is_dicom_folder
from ccella_fast.data.readers.study import Defects, FoundSeries, Study
from ccella_fast.data.readers.study_list import read_study_list
from ccella_fast.data.readers.study_table import PARTICIPANTS, apply_table
from ccella_fast.data.readers.text_checks import check_id
from ccella_fast.data.readers.volume_file import FORMAT_NAMES, volume_suffix
from ccella_fast.errors import DataError
from ccella_fast.storage import safe_join

SERIES_NAMES = {
    "t2w": ["t2w", "axt2", "t2", "t2_tra", "t2w_tra", "t2_tse_tra"],
    "hbv": ["hbv", "b1600", "dwi_high", "dwi_high_b", "high_b", "highb"],
    "adc": ["adc"],
}
_SEQUENCES = {name: sequence for sequence, names in SERIES_NAMES.items() for name in names}
TABLE = "studies.csv"


def find_studies(
    data: str | Path,
    *,
    csv_file: str | Path | None = None,
    test_data: str | Path | None = None,
    data_base_dir: str | Path | None = None,
    embedding_base_dir: str | Path | None = None,
    defects: Defects | None = None,
) -> list[Study]:
    """Find the studies of a folder or of a JSON list, sorted by id.

    Args:
        data: The folder or list.
        csv_file: Splits, classes and reports of a folder's studies, instead of the table in the folder.
        test_data: A second JSON list, whose studies have the split "test".
        data_base_dir: Folder that the paths of images in a list are relative to. Default: the folder of the list.
        embedding_base_dir: Folder of the latents and text features that the reference prepared.
        defects: Where defects are collected instead of raising the first one; the rest of the studies is returned.

    Raises:
        DataError: For the first defect found; the message counts the others.
    """
    data, raises = Path(data), defects is None
    defects = Defects() if defects is None else defects
    if not data.exists():
        raise DataError("there is no such file or folder", path=data, fix="check --data")
    if data.is_dir():
        for value, flag in ((test_data, "--test_data"), (embedding_base_dir, "--embedding_base_dir")):
            if value is not None:
                why = f"{flag} needs a JSON list of studies, but --data is a folder"
                raise DataError(why, path=data, fix=f"leave {flag} out")
        studies = _find_in_folder(data, Path(csv_file) if csv_file else None, defects)
    else:
        images = Path(data_base_dir) if data_base_dir else data.parent
        embeddings = Path(embedding_base_dir) if embedding_base_dir else None
        studies = read_study_list(data, "train", images, embeddings, defects)
        if test_data is not None:
            studies += read_study_list(Path(test_data), "test", images, embeddings, defects)
    _check_unique_ids(studies, defects)
    if raises:
        defects.raise_first()
    if not studies and not defects.found:
        fix = f"name the series {', '.join(SERIES_NAMES)} and give them as {FORMAT_NAMES}"
        raise DataError("no study was found", path=data, fix=fix)
    return sorted(studies, key=lambda study: study.id)


def _check_unique_ids(studies: list[Study], defects: Defects) -> None:
    last = {study.id: study for study in studies}
    for name, count in Counter(study.id for study in studies).items():
        if count > 1:
            why, fix = f"{count} studies have the id '{name}'", "give every study an id of its own"
            defects.add(DataError(why, path=last[name].listed_in, field=last[name].field, fix=fix))


def _find_in_folder(root: Path, table: Path | None, defects: Defects) -> list[Study]:
    """The studies of a plain folder or a BIDS folder, with the values of the table."""
    if is_bids(root):
        found, default_table = find_bids_series(root, defects), root / PARTICIPANTS
    else:
        found, default_table = _with_unique_names(root, list(_find_series(root, root, defects))), root / TABLE
    studies = []
    for name, folder, files in found:
        try:
            studies.append(Study(check_id(name, folder), files, listed_in=folder))
        except DataError as defect:
            defects.add(defect)
    if table is None and default_table.is_file():
        table = default_table
    try:
        return studies if table is None else apply_table(studies, table, defects)
    except DataError as defect:  # the table cannot be read at all
        defects.add(defect)
        return studies


def _with_unique_names(root: Path, found: list[FoundSeries]) -> list[FoundSeries]:
    """Names that several studies share are replaced by the paths of their folders."""
    counts = Counter(name for name, _, _ in found)
    return [
        ("_".join(folder.relative_to(root).parts) if counts[name] > 1 else name, folder, files)
        for name, folder, files in found
    ]


def _find_series(root: Path, folder: Path, defects: Defects) -> Iterator[FoundSeries]:
    """The studies directly in `folder`; if there are none, those of its subfolders."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    series: dict[tuple[str, str], list[Path]] = {}
    for entry in entries:
        recognized = _recognize(entry)
        if recognized:
            series.setdefault(recognized, []).append(entry)
    prefixes = {prefix for prefix, _ in series}
    for prefix in sorted(prefixes):
        files = {}
        for (_, sequence), candidates in sorted(item for item in series.items() if item[0][0] == prefix):
            if len(candidates) > 1 or (len(prefixes) > 1 and ("", sequence) in series):
                same = [path.name for (_, name), paths in series.items() if name == sequence for path in paths]
                why = f"this folder holds two series for {sequence}: {' and '.join(same)}"
                fix = f"keep one of them, named {sequence}, in this folder"
                defects.add(DataError(why, path=folder, field=sequence, fix=fix))
            files[sequence] = safe_join(root, candidates[0].relative_to(root).as_posix(), path=folder, field=sequence)
        yield prefix or folder.resolve().name, folder, files
    if not series:
        for entry in entries:
            if entry.is_dir():
                yield from _find_series(root, safe_join(root, entry.relative_to(root).as_posix()), defects)


def _recognize(entry: Path) -> tuple[str, str] | None:
    """(id of the study or "", sequence) of a file or DICOM folder by its name; None if it is not a series."""
    if entry.is_dir():
        name = re.sub(r"[-_]dicom$", "", entry.name.lower())
        return ("", _SEQUENCES[name]) if name in _SEQUENCES and is_dicom_folder(entry) else None
    suffix = volume_suffix(entry.name)
    if suffix is None:
        return None
    stem = entry.name[: -len(suffix)]
    if stem.lower() in _SEQUENCES:
        return "", _SEQUENCES[stem.lower()]
    for name in sorted(_SEQUENCES, key=len, reverse=True):
        if stem.lower().endswith(f"_{name}"):
            return stem[: -len(name) - 1], _SEQUENCES[name]
    return None
