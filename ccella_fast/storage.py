"""Atomic writes: a partial file never has a final name. Every file that the package writes goes through this module.

A file is written next to its target under a temporary name, flushed, fsynced and renamed. Hashes are SHA-256.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from ccella_fast.errors import CcellaError, DataError, DiskError

_TEMPORARY = ".partial-"
_DIGEST = "digest"  # key of a sealed JSON file
_CHUNK = 2**24  # bytes read at a time


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path next to `path`, with the same suffixes; rename it to `path` if the block succeeds, else delete it.

    Raises:
        DiskError: the folder cannot be written, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=_TEMPORARY, suffix="".join(path.suffixes[-2:]), dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            os.chmod(temporary, 0o666 & ~_umask())
            _fsync(temporary)
            os.replace(temporary, path)
            _fsync(path.parent)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except (OSError, SafetensorError) as error:
        raise disk_error(_os_error(error), path) from error


def replace_link(path: Path, target: Path) -> None:
    """Make `path` a link to `target`, relative to the folder of `path`, in place of an earlier link. Raises DiskError."""
    temporary = path.with_name(f"{_TEMPORARY}{path.name}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(os.path.relpath(target, path.parent))
        os.replace(temporary, path)
    except OSError as error:
        raise disk_error(error, path) from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder. `path` must not exist yet."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=path.parent))
        try:
            yield temporary
            publish_folder(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except (OSError, SafetensorError) as error:
        raise disk_error(_os_error(error), path) from error


def publish_folder(temporary: Path, path: Path) -> None:
    """Fsync everything in `temporary`, then rename the folder to `path`."""
    for entry in temporary.rglob("*"):
        _fsync(entry)
    os.chmod(temporary, 0o777 & ~_umask())
    _fsync(temporary)  # after chmod, so that the mode is flushed too
    os.rename(temporary, path)
    _fsync(path.parent)


def write_hashed(path: str | Path, chunks: Iterable[Any]) -> str:
    """Write a new file, fsync it, and return its SHA-256, which a second thread computes while the first one writes.

    It is not atomic: for files in a folder that `publish_folder` renames later.

    Args:
        path: the file.
        chunks: bytes-like objects, of some MB each for speed.

    Raises:
        OSError: as `open` and `write`.
    """
    digest = hashlib.sha256()
    with open(path, "xb") as file, ThreadPoolExecutor(1, thread_name_prefix="sha256") as pool:
        for chunk in chunks:
            hashing = pool.submit(digest.update, chunk)  # both release Python's lock
            file.write(chunk)
            hashing.result()  # before the next chunk, which may come in the same memory
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_chunks(path: str | Path) -> Iterator[bytes]:
    """Yield a file's content in chunks for `write_hashed`."""
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def check_writable(folder: str | Path, field: str) -> None:
    """Raise DiskError unless `folder`, which need not exist yet, can be written. For use before long work."""
    folder = Path(folder)
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "this folder cannot be written" if existing.is_dir() else f"{existing.name} is a file, not a folder"
        raise DiskError(why, path=folder, field=field, fix="choose a folder that you can write to")


def remove_partial_files(folder: str | Path, *, nested: bool = True) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there.

    nested: also those in its subfolders.
    """
    for left in Path(folder).glob(f"**/{_TEMPORARY}*" if nested else f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any, *, sealed: bool = False) -> None:
    """Write JSON atomically, as UTF-8, with keys in the given order. Raises ValueError for NaN, which JSON does not have.

    sealed: add the key "digest", the SHA-256 of the object without it, with which `read_json` notices a changed bit.
    """
    text = json_text({**value, _DIGEST: _digest(value)} if sealed else value)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_text(value: Any) -> str:
    """JSON as `write_json` writes it. Raises ValueError for NaN, which JSON does not have."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_csv(
    path: str | Path, columns: Sequence[str], rows: Iterable[Iterable[object]], *, line_end: str = "\r\n"
) -> None:
    """Write a table atomically, as UTF-8. Lines end as RFC 4180 says, or with `line_end`."""
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator=line_end)
        writer.writerow(columns)
        writer.writerows(rows)


@contextmanager
def damage_named(
    path: Path, *, writer: str = "the command", fix: str = "run the command that wrote it again, or restore the file"
) -> Iterator[None]:
    """Convert what the content of a damaged file raises, where it is used, to a DataError that names the file.

    Args:
        path: the file.
        writer: the command that writes it, for the message.
        fix: what the user can do.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError):
        why = f"a value that {writer} writes into this file is missing or of another kind"
        raise DataError(why, path=path, fix=fix) from None


def _digest(value: dict[str, Any]) -> str:
    return hashlib.sha256(json_text(value).encode()).hexdigest()


def read_json(path: str | Path, *, error: type[CcellaError] = DataError) -> Any:
    """Parse a JSON file. The key of a sealed one is checked and left out, see `write_json`.

    Raises `error` with line and column if it is malformed, or if a key appears twice, and if a sealed file has been changed.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
        digest = value.pop(_DIGEST, None) if isinstance(value, dict) else None
        if digest is not None and digest != _digest(value):
            why = "this file is damaged or was edited: its content is not that of its digest"
            fix = "restore it or run the command that wrote it again; if the change is wanted, remove the key 'digest'"
            raise error(why, path=path, fix=fix)
        return value
    except FileNotFoundError:
        raise error("this file does not exist", path=path, fix="check the path") from None
    except IsADirectoryError:
        raise error("this is a folder, not a JSON file", path=path, fix="give the file in it") from None
    except json.JSONDecodeError as bad:
        where = f"line {bad.lineno}, column {bad.colno}"
        raise error(f"this file is not valid JSON at {where}: {bad.msg}", path=path, fix="correct it there") from None
    except OSError as bad:
        why = f"this file cannot be read: {os.strerror(bad.errno or 0)}"
        raise error(why, path=path, fix="check the path and its permissions") from None
    except UnicodeDecodeError as bad:
        raise error(f"this file is not UTF-8 text (byte {bad.start})", path=path, fix="save it as UTF-8") from None
    except (ValueError, RecursionError) as bad:
        why = "it is nested too deeply" if isinstance(bad, RecursionError) else str(bad)
        raise error(f"this file is not valid JSON: {why}", path=path, fix="correct the file") from None


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(
    root: str | Path, entry: str, *, path: object = None, field: str | None = None, follow_links: bool = False
) -> Path:
    """Join `root` and the relative path `entry`, which must stay inside `root`, also through links.

    Args:
        root: the folder.
        entry: the relative path.
        path: the file in which `entry` is written, for the error message.
        field: its key there.
        follow_links: whether links may lead out of `root`.

    Raises:
        DataError: `entry` is absolute, too long, not printable, or leaves `root`.
    """
    root = Path(root)
    parts = PurePosixPath(entry).parts
    longest = max((len(part.encode(errors="replace")) for part in parts), default=0)
    if longest > 255 or len(str(root.absolute() / entry).encode(errors="replace")) > 4095:
        why = "a part of this path has more than 255 bytes" if longest > 255 else "this path has more than 4095 bytes"
        raise DataError(why, path=path, field=field, fix="give a shorter relative path")
    unsafe = not entry or not entry.isprintable() or PurePosixPath(entry).is_absolute() or ".." in parts
    if unsafe:
        fix = f"give a relative path inside {root}"
        raise DataError(f"the path {_shown(entry)} leaves the data folder", path=path, field=field, fix=fix)
    if not follow_links and not Path(os.path.realpath(root / entry)).is_relative_to(os.path.realpath(root)):
        why = f"the path {_shown(entry)} leaves the data folder through a link to elsewhere"
        fix = "copy the files into the folder, or give `prepare --follow_links`, with which it reads linked series"
        raise DataError(why, path=path, field=field, fix=fix)
    return root / entry


def _shown(entry: str) -> str:
    """A path or key of a user's file for a message; more than one word may be a report in the wrong place."""
    is_word = re.fullmatch(r"[!-~]{1,80}", entry)
    return f"'{entry}'" if is_word else f"of {len(entry)} characters"


def disk_error(error: OSError, path: Path) -> DiskError:
    """The DiskError that describes `error` to a user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(existing_parent(path)).free
        return DiskError(
            f"the disk is full ({free / 1e6:.1f} MB free)", path=path, fix="free space, or choose another folder"
        )
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        why = "this path cannot be written: a file, or a link to nothing, is where a folder has to be"
        return DiskError(why, path=path, fix="remove it, or choose another folder")
    return DiskError(
        f"this path cannot be written: {os.strerror(error.errno or 0)}",
        path=path,
        fix="choose a folder that you can write to",
    )


def _os_error(error: OSError | SafetensorError) -> OSError:
    """The error itself; safetensors states the number of a failed write in its text alone."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is None:
        raise error
    return OSError(int(number[1]), str(error))


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {_shown(twice)} appears twice")
    return result


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
