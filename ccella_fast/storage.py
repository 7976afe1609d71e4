"""Everything that lands on disk goes through here: a final name never holds a partial file.

Written beside the target under a temporary name, flushed, fsynced, renamed. Hashes are SHA-256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from ccella_fast.errors import CcellaError, DataError, DiskError

_TEMPORARY = ".partial-"


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` (same suffixes); rename it to `path` when the block ends well, else delete it.

    Raises DiskError when the folder cannot be written or the disk is full."""
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
    except OSError as error:
        raise disk_error(error, path) from error


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Like `atomic_path` for a whole folder. `path` must not exist yet."""
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
    except OSError as error:
        raise disk_error(error, path) from error


def publish_folder(temporary: Path, path: Path) -> None:
    """Fsync all that is below `temporary`, then give the folder its final name."""
    for entry in temporary.rglob("*"):
        _fsync(entry)
    os.chmod(temporary, 0o777 & ~_umask())
    _fsync(temporary)  # also its mode
    os.rename(temporary, path)
    _fsync(path.parent)


def check_writable(folder: str | Path, field: str) -> None:
    """DiskError unless `folder`, which need not exist yet, can be written. Before long work, so that it is not lost."""
    folder = Path(folder)
    existing = existing_parent(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "cannot write here" if existing.is_dir() else f"{existing.name} is a file, not a folder"
        raise DiskError(why, path=folder, field=field, fix="choose a folder you can write to")


def remove_partial_files(folder: str | Path) -> None:
    """Remove what killed writers left in `folder`. Call only where no other writer is at work."""
    for left in Path(folder).rglob(f"{_TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Atomic, sorted as given, UTF-8, with a final newline. NaN is refused (it is not JSON)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | Path, *, error: type[CcellaError] = DataError) -> Any:
    """Parse a JSON file; `error` names line and column when it is malformed. Duplicate keys are refused."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        raise error("this file does not exist", path=path, fix="check the path") from None
    except IsADirectoryError:
        raise error("this is a folder, a JSON file is expected", path=path, fix="name the file inside it") from None
    except json.JSONDecodeError as bad:
        where = f"line {bad.lineno}, column {bad.colno}"
        raise error(f"malformed JSON at {where}: {bad.msg}", path=path, fix="mend the file there") from None
    except OSError as bad:
        why = f"this file cannot be read: {os.strerror(bad.errno or 0)}"
        raise error(why, path=path, fix="check the path and its permissions") from None
    except UnicodeDecodeError as bad:
        raise error(f"not UTF-8 text (byte {bad.start})", path=path, fix="save the file as UTF-8") from None
    except (ValueError, RecursionError) as bad:
        why = "nested too deeply" if isinstance(bad, RecursionError) else str(bad)
        raise error(f"malformed JSON: {why}", path=path, fix="mend the file") from None


def sha256(path: str | Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safe_join(root: str | Path, entry: str, *, path: object = None, field: str | None = None) -> Path:
    """`root / entry`, refused when it is absolute or leaves `root` (also through a link). `path`, `field` say who named it."""
    root = Path(root)
    parts = PurePosixPath(entry).parts
    if any(len(part.encode(errors="replace")) > 255 for part in parts):
        raise DataError("this is too long for a file name", path=path, field=field, fix="give a relative path")
    unsafe = not entry or not entry.isprintable() or PurePosixPath(entry).is_absolute() or ".." in parts
    if unsafe or not (root / entry).resolve().is_relative_to(root.resolve()):
        fix = f"give a relative path inside {root}"
        raise DataError(f"the path {entry!r} leaves the data folder", path=path, field=field, fix=fix)
    return root / entry


def disk_error(error: OSError, path: Path) -> DiskError:
    """The OSError in the user's words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        free = shutil.disk_usage(existing_parent(path)).free
        return DiskError(
            f"no room left ({free / 1e6:.1f} MB free)", path=path, fix="free space or choose another folder"
        )
    return DiskError(
        f"cannot write: {os.strerror(error.errno or 0)}", path=path, fix="choose a folder you can write to"
    )


def existing_parent(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    return next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key '{twice}' appears twice")
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
