"""Find studies in a folder or in a list. Only names and lists are read, no image is opened.

Plain folders: see folder_search.py, and series_names.py for the names of series. The id of a study is the `<id>` of files such
as `<id>_t2w.mha`, else the name of its folder, or, if several folders have this name, the folder's path with / written as _.

BIDS folders: see bids.py. Tables of classes and reports: study_table.py. JSON lists: study_list.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from ccella_fast.data.readers.bids import find_bids_series, is_bids
from ccella_fast.data.readers.folder_search import FolderSearch, warn_of_unread
from ccella_fast.data.readers.series_names import SEQUENCES
from ccella_fast.data.readers.study import Defects, FoundSeries, Study
from ccella_fast.data.readers.study_list import read_study_list
from ccella_fast.data.readers.study_table import PARTICIPANTS, apply_table
from ccella_fast.data.readers.text_checks import check_id, printable
from ccella_fast.data.readers.volume_file import FORMAT_NAMES
from ccella_fast.errors import DataError

TABLE = "studies.csv"

_NO_LIST = {".csv", ".tsv", ".xls", ".xlsx", ".nii", ".gz", ".mha", ".mhd", ".nrrd", ".nhdr", ".dcm"}


def find_studies(
    data: str | Path,
    *,
    csv_file: str | Path | None = None,
    test_data: str | Path | None = None,
    data_base_dir: str | Path | None = None,
    embedding_base_dir: str | Path | None = None,
    follow_links: bool = False,
    defects: Defects | None = None,
) -> list[Study]:
    """Find the studies of a folder or of a JSON list, sorted by id.

    Args:
        data: The folder or list.
        csv_file: Splits, classes and reports of a folder's studies, instead of the table in the folder.
        test_data: A second JSON list, whose studies have the split "test".
        data_base_dir: Folder that the paths of images in a list are relative to. Default: the folder of the list.
        embedding_base_dir: Folder of the latents and text features that the reference prepared.
        follow_links: Whether series may be links to files or folders outside the data folder.
        defects: Where defects are collected instead of raising the first one; the rest of the studies is returned.

    Raises:
        DataError: For the first defect found; the message counts the others.
    """
    data, raises = Path(data), defects is None
    defects = Defects() if defects is None else defects
    if not data.exists():
        raise DataError("there is no such file or folder", path=data, fix="check --data")
    if data.is_dir():
        for value, flag in (
            (test_data, "--test_data"),
            (data_base_dir, "--data_base_dir"),
            (embedding_base_dir, "--embedding_base_dir"),
        ):
            if value is not None:
                why = f"{flag} needs a JSON list of studies, but --data is a folder"
                raise DataError(why, path=data, fix=f"leave {flag} out")
        studies = _find_in_folder(data, Path(csv_file) if csv_file else None, follow_links, defects)
    else:
        if data.suffix.lower() in _NO_LIST:
            why = "this is a table or an image, and neither a folder of studies nor a JSON list of studies"
            fix = "give the folder of the studies as --data, and a table as --csv"
            raise DataError(why, path=data, field="--data", fix=fix)
        if csv_file is not None:
            why = "--csv needs a folder of studies, but --data is a list, which holds classes and reports itself"
            raise DataError(why, path=data, fix="leave --csv out")
        images = Path(data_base_dir) if data_base_dir else data.parent
        embeddings = Path(embedding_base_dir) if embedding_base_dir else None
        studies = read_study_list(data, "train", images, embeddings, follow_links, defects)
        if test_data is not None:
            studies += read_study_list(Path(test_data), "test", images, embeddings, follow_links, defects)
    _check_unique_ids(studies, defects)
    if raises:
        defects.raise_first()
    if not studies and not defects.found:
        raise _no_study(data, "")
    return sorted(studies, key=lambda study: study.id)


def _check_unique_ids(studies: list[Study], defects: Defects) -> None:
    last = {study.id: study for study in studies}
    for name, count in Counter(study.id for study in studies).items():
        if count > 1:
            why, fix = f"{count} studies have the id '{name}'", "give every study an id of its own"
            defects.add(DataError(why, path=last[name].listed_in, field=last[name].field, fix=fix))


def _find_in_folder(root: Path, table: Path | None, follow_links: bool, defects: Defects) -> list[Study]:
    """The studies of a plain folder or a BIDS folder, with the values of the table."""
    default_table = root / (PARTICIPANTS if is_bids(root) else TABLE)
    if table is None and (default_table.is_file() or default_table.is_symlink()):  # perhaps to data that is not here
        table = default_table
    if is_bids(root):
        found, unread = find_bids_series(root, follow_links, defects)
    else:
        search = FolderSearch(root, follow_links, defects)
        search.run()
        found, unread = _with_unique_names(root, search.found), search.unread(table)
    if not found and not defects.found:
        names = [name for each in unread.values() for name in each][:3]
        raise _no_study(root, f"; not read are {', '.join(map(printable, names))}" if names else "")
    warn_of_unread(unread)
    studies = []
    for name, folder, files in found:
        try:
            studies.append(Study(check_id(name, folder), files, listed_in=folder))
        except DataError as defect:
            defects.add(defect)
    try:
        return studies if table is None else apply_table(studies, table, defects)
    except DataError as defect:  # the table cannot be read at all
        defects.add(defect)
        return studies


def _no_study(data: Path, why: str) -> DataError:
    fix = f"name the series {', '.join(SEQUENCES)} and give them as {FORMAT_NAMES}"
    return DataError(f"no study was found{why}", path=data, fix=fix)


def _with_unique_names(root: Path, found: list[FoundSeries]) -> list[FoundSeries]:
    """Names that several studies share are replaced by the paths of their folders."""
    counts = Counter(name for name, _, _ in found)
    return [
        ("_".join(folder.relative_to(root).parts) if counts[name] > 1 else name, folder, files)
        for name, folder, files in found
    ]
