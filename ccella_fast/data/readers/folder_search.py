"""Find the studies of a plain folder, by names, and name what is there and not read.

A study is the shallowest folder that directly holds a series. A series is a file with a suffix of FORMATS or a folder whose
name says its sequence (series_names.py). Such a folder holds the files of one DICOM series, or one volume or DICOM folder
somewhere below it. A name of a series without a series is a defect, and so are two series for one sequence.

Every folder is searched once, also if links lead to it. Links to places outside are followed on request only.
"""

from __future__ import annotations

import logging
import os
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from ccella_fast.data.readers.dicom_files import is_dicom_folder
from ccella_fast.data.readers.links import join_series
from ccella_fast.data.readers.series_names import SeriesName, parse_series_name
from ccella_fast.data.readers.study import Defects, FoundSeries
from ccella_fast.data.readers.text_checks import printable
from ccella_fast.data.readers.volume_file import FORMAT_NAMES, volume_suffix
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted
from ccella_fast.storage import safe_join

logger = logging.getLogger("ccella_fast")

#: Images, also in formats that are not read: that they are there matters.
_OTHER_IMAGES = re.compile(
    r"\.(nii|dcm|dicom|ima|mhd|mha|nhdr|nrrd|hdr|img|raw|zraw|mgz|mgh|mnc|par|rec|vtk|npy|npz|h5|zip|tar|tgz|7z|rar)"
    r"(\.(gz|bz2|xz|zst))?$",
    re.IGNORECASE,
)
_HEADERS, _VOXELS = (".mhd", ".nhdr"), re.compile(r"\.(raw|zraw)(\.gz)?$", re.IGNORECASE)  # of one series
_TABLES = (".csv", ".tsv", ".xlsx", ".xls", ".ods")
_SHOWN_NAMES, _SHOWN_FOLDERS = 5, 20
_MAX_IMAGES = 1000  # that are counted in a folder with the name of one series


class _Folder(NamedTuple):
    """A folder to search, and the folder of a study that it is below of."""

    path: Path
    study: Path | None


class FolderSearch:
    """The search of one folder.

    Args:
        root: The folder.
        follow_links: Whether links may lead out of `root`.
        defects: Collects what is wrong.

    Attributes:
        found: The series of every study.
    """

    def __init__(self, root: Path, follow_links: bool, defects: Defects):
        self.root, self.follow_links, self.defects = root, follow_links, defects
        self.found: list[FoundSeries] = []
        self._unread: dict[Path, list[str]] = {}  # searched folder -> names of images in it that are not read
        self._hidden: dict[Path, list[Path]] = defaultdict(list)  # folder of a study -> folders of series below it
        self._linked: deque[_Folder] = deque()
        self._visited: dict[tuple[int, int], Path] = {}

    def run(self) -> None:
        """Search all folders; those that are reached through links after all others."""
        pending = [_Folder(self.root, None)]
        while pending or self._linked:
            folder, study = pending.pop() if pending else self._linked.popleft()
            try:
                pending += self._visit(folder, study)
            except OSError as error:
                self.defects.add(_unreadable(folder, error))
        for study, below in self._hidden.items():
            self._check_hidden(study, sorted(below))

    def _visit(self, folder: Path, study: Path | None) -> list[_Folder]:
        """Search `folder`, unless it was searched under another name, and return the folders to search next."""
        status = folder.stat()
        earlier = self._visited.setdefault((status.st_dev, status.st_ino), folder)
        if earlier is folder:
            return self._search(folder, visible_entries(folder), study)
        what = "leads back to a folder above it" if _is_loop(folder) else "leads to a folder that is searched anyway"
        logger.warning("%s: this link %s (%s) and is not followed", folder, what, earlier)
        return []

    def unread(self, table: Path | None) -> dict[Path, list[str]]:
        """Folder -> names of images, tables other than `table`, and folders in it that are not read."""
        used = {self.root}
        for _, folder, _ in self.found:
            used |= {folder, *folder.parents}
        result = {folder: list(names) for folder, names in self._unread.items() if folder in used}
        for folder in self._unread:
            if folder not in used and folder.parent in used:
                result[folder.parent].append(f"{folder.name}/")
        if table is not None and table.parent == self.root and table.name in result[self.root]:
            result[self.root].remove(table.name)
        return {folder: sorted(names) for folder, names in sorted(result.items()) if names}

    def _search(self, folder: Path, entries: list[Path], study: Path | None) -> list[_Folder]:
        """Note the series directly in `folder` and return the folders to search next. `study` is a study's folder above."""
        series, settled = self._find_series(folder, entries, study)
        if series and study is None:
            name = folder.resolve().name if folder == self.root else folder.name
            self.found += [(prefix or name, folder, files) for prefix, files in series.items()]
            study = folder
        elif series and study is not None:
            self._hidden[study].append(folder)
        names = self._unread.setdefault(folder, [])
        has_header = any(path.suffix.lower() in _HEADERS for files in series.values() for path in files.values())
        subfolders: list[_Folder] = []
        for entry in entries:
            if entry in settled:
                continue
            if entry.is_dir():
                try:
                    safe_join(self.root, str(entry.relative_to(self.root)), path=entry, follow_links=self.follow_links)
                    (self._linked if entry.is_symlink() else subfolders).append(_Folder(entry, study))
                except DataError as defect:
                    self.defects.add(defect)
            elif entry.is_symlink() and not entry.exists():
                names.append(f"{entry.name} (a link to a file that does not exist)")
            elif _is_image(entry.name):
                names += [] if has_header and _VOXELS.search(entry.name) else [entry.name]
            elif folder == self.root and entry.suffix.lower() in _TABLES:
                names.append(entry.name)
        return subfolders

    def _find_series(
        self, folder: Path, entries: list[Path], study: Path | None
    ) -> tuple[dict[str, dict[str, Path]], set[Path]]:
        """(id or "" -> sequence -> image of the series directly in `folder`, entries that need no further attention)."""
        candidates: dict[tuple[str, str], list[tuple[bool, Path, Path]]] = defaultdict(list)
        failures: dict[tuple[str, str], list[tuple[Path, DataError]]] = defaultdict(list)
        for entry in entries:
            name = _parse_entry(entry)
            if name is None:
                continue
            try:
                image = self._image_of(entry, name)
            except DataError as defect:
                failures[name[:2]].append((entry, defect))
            else:
                if image is not None:
                    candidates[name[:2]].append((name.is_generic, entry, image))
        prefixes = {prefix for prefix, _ in candidates}
        defects = {key: failed[0][1] for key, failed in failures.items() if key not in candidates}
        series: dict[str, dict[str, Path]] = defaultdict(dict)
        settled = {entry for key in defects for entry, _ in failures[key]} if study is None else set()
        for (prefix, sequence), found in sorted(candidates.items()):
            found = [each for each in found if not each[0]] or found
            if len(found) > 1 or (len(prefixes) > 1 and ("", sequence) in candidates):
                same = sorted(entry.name for key in candidates if key[1] == sequence for _, entry, _ in candidates[key])
                names = " and ".join(map(printable, same[:_SHOWN_NAMES]))
                why, fix = (
                    f"this folder holds two series for {sequence}: {names}",
                    f"keep one of them, named {sequence}",
                )
                defects["", sequence] = DataError(why, path=folder, field=sequence, fix=fix)
            series[prefix][sequence] = found[0][2]
            settled |= {entry for _, entry, _ in found}
        for each in defects.values() if study is None else ():
            self.defects.add(each)
        return series, settled

    def _image_of(self, entry: Path, name: SeriesName) -> Path | None:
        """The file or DICOM folder of the series that `entry` is by its name; None if it is a folder of studies."""
        try:
            self._check_place(entry, name.sequence)
            if entry.is_dir():
                return self._image_in(entry, name)
        except OSError as error:
            raise _unreadable(entry, error) from None
        if not entry.is_file():
            why = "this has the name of a series, but is neither a file nor a folder"
            raise DataError(why, path=entry, field=name.sequence, fix="remove it")
        if volume_suffix(entry.name) is None:
            why = f"this series has the format '{printable(entry.name.removeprefix(_stem(entry.name)))}', which is not read"
            raise DataError(why, path=entry, field=name.sequence, fix=f"convert it to {FORMAT_NAMES}")
        return entry

    def _image_in(self, folder: Path, name: SeriesName) -> Path | None:
        """As `_image_of`, for a folder."""
        if _is_loop(folder):
            why = "this has the name of a series, but is a link to a folder above it"
            raise DataError(why, path=folder, field=name.sequence, fix="remove the link")
        if self._is_dicom(folder):
            return folder
        if name.prefix:
            return None
        images = list(islice(self._images_below(folder), _MAX_IMAGES))
        named = [image for image in images if _parse_entry(image) and image.parent == folder]
        own = [image for image in named if _parse_entry(image)[:2] == ("", name.sequence)]  # type: ignore[index]
        others = {_parse_entry(image)[1] for image in named} - {name.sequence}  # type: ignore[index]
        if others and (folder.parent == self.root or "t2w" in others):
            return None  # a study whose id, such as B1400, is the name of a series as well
        if len(own) == 1:
            return own[0]
        holds_studies = any(
            _parse_entry(part) for image in images for part in (image, *image.parents) if folder in part.parents
        )
        if len(images) == 1 and not (holds_studies and folder.parent == self.root):
            return images[0]
        if holds_studies:
            return None
        if images:
            shown = ", ".join(printable(str(image.relative_to(folder))) for image in images[:_SHOWN_NAMES])
            why = f"this folder has the name of one series, but holds {len(images)}: {shown}"
            raise DataError(why, path=folder, field=name.sequence, fix="keep one of them")
        why = "this folder has the name of a series, but holds no image that can be read"
        fix = f"put the series in it, as {FORMAT_NAMES}, or remove the folder"
        raise DataError(why, path=folder, field=name.sequence, fix=fix)

    def _images_below(self, folder: Path) -> Iterator[Path]:
        """The volumes and DICOM folders below `folder`. Links to folders are not searched for folders in them."""
        pending = [folder]
        while pending:
            for entry in visible_entries(pending.pop()):
                if entry.is_dir() and self._is_dicom(entry):
                    yield entry
                elif entry.is_dir() and not entry.is_symlink():
                    pending.append(entry)
                elif entry.is_file() and volume_suffix(entry.name):
                    self._check_place(entry)
                    yield entry

    def _is_dicom(self, folder: Path) -> bool:
        self._check_place(folder)
        return is_dicom_folder(folder)

    def _check_hidden(self, study: Path, below: list[Path]) -> None:
        """One folder with a series below a study may be a copy of it; several are studies that would be lost."""
        names = ", ".join(printable(str(folder.relative_to(study))) for folder in below[:_SHOWN_NAMES])
        why = f"this folder is a study, as it holds series itself, so that {len(below)} below it are not read: {names}"
        if len(below) == 1:
            logger.warning("%s: %s", study, why)
        else:
            fix = "move the series of this folder into a folder of its own, or the folders below out of it"
            self.defects.add(DataError(why, path=study, fix=fix))

    def _check_place(self, entry: Path, sequence: str | None = None) -> None:
        relative = entry.relative_to(self.root).as_posix()
        join_series(self.root, relative, follow_links=self.follow_links, path=entry, field=sequence)


def warn_of_unread(unread: dict[Path, list[str]]) -> None:
    """Log a line for each folder with images that are not read, and one for the folders after the first _SHOWN_FOLDERS."""
    for folder, names in list(unread.items())[:_SHOWN_FOLDERS]:
        shown = ", ".join(printable(name) for name in names[:_SHOWN_NAMES])
        more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
        logger.warning("%s: not read, as their names are not those of series: %s%s", folder, shown, more)
    rest = list(unread.values())[_SHOWN_FOLDERS:]
    if rest:
        logger.warning(
            "files and folders that are not read in %s: %d", counted(len(rest), "more folder"), sum(map(len, rest))
        )


def visible_entries(folder: Path) -> list[Path]:
    """The entries of a folder that are not hidden, in order of their names."""
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _parse_entry(entry: Path) -> SeriesName | None:
    """What the name of a file with the suffix of an image, or of a folder, says."""
    if entry.is_dir() or (entry.is_symlink() and not _is_image(entry.name) and not entry.exists()):
        return parse_series_name(re.sub(r"[-_. ](dicom|dcm)$", "", entry.name, flags=re.IGNORECASE))
    return parse_series_name(_stem(entry.name)) if _is_image(entry.name) else None


def _is_image(name: str) -> bool:
    return volume_suffix(name) is not None or _OTHER_IMAGES.search(name) is not None


def _stem(name: str) -> str:
    """A file name without the suffix of an image."""
    suffix = volume_suffix(name)
    return name[: -len(suffix)] if suffix else _OTHER_IMAGES.sub("", name)


def _is_loop(folder: Path) -> bool:
    return folder.is_symlink() and Path(os.path.realpath(folder.parent)).is_relative_to(os.path.realpath(folder))


def _unreadable(folder: Path, error: OSError) -> DataError:
    why = f"this folder cannot be read: {os.strerror(error.errno or 0)}"
    return DataError(why, path=folder, fix="check its permissions, or remove it")
