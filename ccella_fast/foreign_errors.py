"""Errors of Python and of libraries that are not bugs of this package, as messages for users.

Classes are compared by name, because most libraries are not imported when an error is translated. The text of a foreign error
is searched for sizes and names but never printed: it may quote its input, for example a report.
"""

from __future__ import annotations

import errno
import os
import re

from ccella_fast import hardware
from ccella_fast.errors import CcellaError, ConfigError, DataError, DiskError
from ccella_fast.optional import PACKAGES, install
from ccella_fast.quantities import format_bytes

_HTTP_CLIENTS = ("requests", "urllib3", "httpx", "httpcore", "huggingface_hub", "aiohttp")
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Unable to allocate|ALLOC_FAILED")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def translate(error: Exception, *, remedies: str) -> CcellaError | None:
    """The message for an error that a user can act on; None for a bug.

    remedies: what to do if the memory does not suffice; it depends on the command.
    """
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(error).__mro__}
    if "ccella_fast.kernels.backend.BackendError" in names:  # its text is ours
        fix = "change or unset the variable; `ccella-fast env` lists what each kernel can use on this machine"
        return ConfigError(str(error), field="CCELLA_FAST_BACKEND", fix=fix)
    if is_out_of_memory(error):
        return ConfigError(f"the memory does not suffice{_sizes(str(error))}", fix=remedies)
    if isinstance(error, ImportError):
        return _missing_package(error)
    if names & {"torch.distributed.DistNetworkError", "torch.distributed.DistStoreError"}:
        return _rendezvous(str(error))
    if isinstance(error, (ConnectionError, TimeoutError)) or any(name.split(".")[0] in _HTTP_CLIENTS for name in names):
        fix = "check the network, or download the encoder on another machine and give its folder as text.encoder"
        return ConfigError(f"a download failed ({type(error).__name__})", fix=fix)
    if isinstance(error, UnicodeError):
        return DataError("a file or an argument is not UTF-8 text", fix="save it as UTF-8")
    return _file_error(error) if isinstance(error, OSError) else None


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation of the operating system, of a GPU or of a library has failed."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def _sizes(text: str) -> str:
    """`: 7.45 GiB were requested, 3.10 GiB are free`, as far as it is known."""
    requested = re.search(r"allocate ([\d.]+) ?([KMGTPE]?i?B|bytes)", text)
    on_gpu = re.search(r"([\d.]+ [KMGT]iB) is free", text)
    free = on_gpu[1] if on_gpu else format_bytes(hardware.free_memory())
    if requested is None:
        return f": {free} are free"
    size = format_bytes(float(requested[1])) if requested[2] == "bytes" else f"{requested[1]} {requested[2]}"
    return f": {size} more were requested, {free} are free"


def _missing_package(error: ImportError) -> ConfigError | None:
    """The package that is not installed; None for any other failed import, which is a bug of ours or of the installation."""
    name = error.name if isinstance(error, ModuleNotFoundError) else None
    if error.name is None:  # a library's own check of what it needs
        name = next((name for name in PACKAGES if name in str(error).lower()), None)
    if name is None or name.split(".")[0] == "ccella_fast":
        return None
    top = name.split(".")[0]
    return ConfigError(f"the package '{top}' is not installed", fix=install(top))


def _rendezvous(text: str) -> ConfigError:
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), os.environ.get("MASTER_PORT", "29500")
    if "EADDRINUSE" in text or "already in use" in text:
        why = f"the port {port} of the launcher is in use, probably by another run"
        fix = "choose another: deepspeed --master_port 29501, or torchrun --master-port 29501"
    else:
        why = f"the processes of this run did not reach each other at {address}:{port}"
        fix = "check that all of them were started, and the launcher's --master_addr and --master_port"
    return ConfigError(why, field="MASTER_PORT", fix=fix)


def _file_error(error: OSError) -> CcellaError | None:
    reason = os.strerror(error.errno or 0)
    if error.errno in _DISK_FULL:
        return DiskError("the disk is full", path=error.filename, fix="free space, or choose another folder")
    if error.errno == errno.EMFILE:
        return ConfigError("too many files are open", fix="allow more: ulimit -n 65536")
    if error.filename is None:
        return None
    fix = "check that it exists and that you have permission"
    return DataError(f"this file cannot be read or written: {reason}", path=error.filename, fix=fix)
