"""One writer per folder: a command holds the lock of the folder that it writes to.

The lock is `flock` on the file `.lock` in the folder. The kernel releases it when its process ends, however it ends, so a
`.lock` that a killed process has left behind means nothing: the next command takes it over. Worker processes do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ccella_fast.errors import ConfigError
from ccella_fast.storage import disk_error

LOCK = ".lock"
logger = logging.getLogger("ccella_fast")
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # some network file systems have no locks
_ATTEMPTS = 1000  # to create a folder that others remove at the same time; takes some milliseconds
_MAX_BYTES = 4096  # of the description of a holder


@contextmanager
def lock_folder(folder: str | Path, command: str, *, name: str = LOCK) -> Iterator[None]:
    """Hold the lock of `folder`, which is created if needed, until the end of the block.

    Folders that were created for the lock are removed again if nothing has been written to them.

    Args:
        folder: the folder that will be written to.
        command: what is writing, for the message that another command prints.
        name: the file that is locked. A command that writes a single file locks a name made from it.

    Raises:
        ConfigError: another process holds the lock; the message says which.
        DiskError: the folder cannot be written.
    """
    folder = Path(folder)
    created = [each for each in [folder, *folder.parents] if not each.exists()]
    path = folder / name
    try:
        handle = _open_locked(path)
        try:
            _describe(handle, command)
            yield
        finally:
            with suppress(OSError):
                path.unlink()  # while it is held: afterwards it may be another process's
            os.close(handle)
    finally:
        for each in created:
            with suppress(OSError):  # not empty, or never created
                each.rmdir()


def _open_locked(path: Path) -> int:
    """A handle of the locked file `path`."""
    while True:
        handle = _open(path)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(handle, _MAX_BYTES, 0)
            os.close(handle)
            raise _refusal(path, holder) from None
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                os.close(handle)
                raise disk_error(error, path.parent) from error
            logger.warning("the disk of %s has no locks: run one command at a time that writes to it", path.parent)
            return handle
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # the holder removed the file after it was opened here: the lock is that of no path


def _open(path: Path) -> int:
    """A handle of the file `path`, which is created with its folders if needed."""
    attempts = 0
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            attempts += 1
            collision = isinstance(error, FileNotFoundError | FileExistsError)  # a holder has just removed its folder
            if not collision or attempts == _ATTEMPTS:
                raise disk_error(error, path.parent) from error


def _describe(handle: int, command: str) -> None:
    """Write to the locked file who holds it."""
    facts = {
        "command": command, "pid": os.getpid(), "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip
    with suppress(OSError):  # a full disk: what is written afterwards reports it
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(facts).encode(), 0)


def _refusal(path: Path, holder: bytes) -> ConfigError:
    """The error of a command that does not get the lock, which is the file `path`."""
    fix = "wait until it has ended, or choose another folder"
    try:
        facts = json.loads(holder)
        if facts["host"] != socket.gethostname():  # a file server may keep the lock of a machine that it has lost
            fix += f"; if {facts['host']} is gone, delete {path}"
        who = f"'{facts['command']}', process {facts['pid']} on {facts['host']} since {facts['since']}"
    except (ValueError, KeyError, TypeError):  # it has just taken the lock
        who = "a process that has just started"
    return ConfigError(f"another command is writing to this folder: {who}", path=path.parent, fix=fix)
