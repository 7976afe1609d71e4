"""Recognize files that stand for data which was not downloaded: pointers of Git LFS and git-annex, links to nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ccella_fast.errors import DataError

_LONGEST = (
    1024  # bytes, by the specification of Git LFS; those of git-annex are shorter than 32 KiB, usually than 300 bytes
)
_LFS = b"version https://git-lfs.github.com/spec/"
_ANNEX = re.compile(rb"[^\0\n]*(?:^|/)annex/objects/")  # "/annex/objects/KEY", or a link that became text


def check_is_data(path: Path) -> None:
    """Raise DataError for a pointer of Git LFS or git-annex and for a link to nothing; other files and folders pass."""
    if path.is_symlink() and not path.exists():
        if _ANNEX.match(os.fsencode(os.readlink(path))):
            raise _missing("git-annex", path)
        why = "this link points to a file that does not exist"
        raise DataError(why, path=path, fix="copy the file here, or correct the link")
    if path.is_file():
        with open(path, "rb") as file:
            head = file.read(_LONGEST)
        if head.startswith(_LFS):
            raise _missing("Git LFS", path)
        if _ANNEX.match(head):
            raise _missing("git-annex", path)


def _missing(tool: str, path: Path) -> DataError:
    command = "`git lfs pull`" if tool == "Git LFS" else "`git annex get .` (or `datalad get .`)"
    why = f"this file is a pointer of {tool}: its data was not downloaded"
    return DataError(why, path=path, fix=f"run {command} in its folder")
