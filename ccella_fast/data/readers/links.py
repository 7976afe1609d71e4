"""Links in a folder of studies: no file outside the folder is opened through one, unless links are followed."""

from __future__ import annotations

from pathlib import Path

from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.storage import safe_join


def join_series(root: Path, entry: str, *, follow_links: bool, path: Path, field: str | None = None) -> Path:
    """`root / entry`, a file or a folder of DICOM files that is inside `root` with all its files.

    Args:
        root: The data folder.
        entry: The path relative to it.
        follow_links: Whether links may lead out of `root`.
        path: The file or folder to name in the message.
        field: The field to name in the message.

    Raises:
        DataError: If the series or a file of it is outside `root`, or a link to a file that does not exist.
    """
    series = safe_join(root, entry, path=path, field=field, follow_links=True)
    if series.is_symlink() and not series.exists():
        check_is_data(series)
    if not follow_links:
        files = [file for file in series.iterdir() if not file.is_dir()] if series.is_dir() else []
        for each in [series, *(file for file in files if file.is_symlink())]:
            safe_join(root, each.relative_to(root).as_posix(), path=path, field=field)
    return series
