"""The launcher that started this process: its variables as those of torchrun, which everything else reads.

torchrun and DeepSpeed's launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. `srun` (also through
`deepspeed --launcher slurm`) and the `mpirun` of Open MPI, MVAPICH, MPICH and Intel MPI set variables of their own. A process
that does not know them would train alone, as often as it was started, in one folder.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import MutableMapping
from typing import NamedTuple

from ccella_fast.errors import ConfigError

_BOUNDS = (("LOCAL_RANK", 0, 4095), ("LOCAL_WORLD_SIZE", 1, 4096), ("MASTER_PORT", 1, 65535))
_REQUIRED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Steps that are not started by srun: an allocation's shell, the batch script and others have numbers from here on.
_FIRST_SPECIAL_STEP = 0xFFFFFFFA
_PORTS = range(15000, 30000)  # below those that Linux gives to outgoing connections


class _Names(NamedTuple):
    """The variables of a launcher."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str
    local_size: str


_MPI = [
    _Names("Open MPI", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    _Names("MVAPICH", *(f"MV2_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
]
_PMI = _Names("MPI", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")  # MPICH and Intel MPI


class _Found(NamedTuple):
    """This process among those of its launcher."""

    names: _Names
    rank: int
    world_size: int
    local_rank: int
    local_size: int


def adopt_launcher(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables of torchrun from those of another launcher. Does nothing for torchrun, or without a launcher.

    Raises:
        ConfigError: the variables are incomplete or no numbers, or those of two launchers contradict each other.
    """
    if "LOCAL_SIZE" in environ:  # DeepSpeed's name
        environ.setdefault("LOCAL_WORLD_SIZE", environ["LOCAL_SIZE"])
    found = _find(environ)
    if "RANK" in environ or (environ.get("WORLD_SIZE", "1") != "1" and found is None):
        _check_ranks(environ, found)
    elif found is not None:
        _check_equal(environ, found)
        environ.update({"RANK": str(found.rank), "WORLD_SIZE": str(found.world_size)})
    if found is not None and environ["WORLD_SIZE"] == str(found.world_size):
        environ.setdefault("LOCAL_RANK", str(found.local_rank))
        environ.setdefault("LOCAL_WORLD_SIZE", str(found.local_size))
        _set_address(environ, found)
    for name, least, most in _BOUNDS:
        if name in environ and not least <= _number(environ, name) <= most:
            why = f"{name} is {environ[name]:.40}, not a number from {least} to {most}"
            raise ConfigError(why, field=name, fix=f"unset {name}, or correct it")
    missing = [name for name in _REQUIRED if name not in environ]
    if environ.get("WORLD_SIZE", "1") != "1" and missing:
        verb = "is" if len(missing) == 1 else "are"
        why = f"{environ['WORLD_SIZE']} processes were started, but {' and '.join(missing)} {verb} not set"
        raise ConfigError(why, field=missing[0], fix="start them with deepspeed, torchrun or srun, or set it")


def check_not_one_of_many(environ: MutableMapping[str, str] = os.environ) -> None:
    """Raise ConfigError for a process that no launcher has started, in an allocation of SLURM for several.

    This is a shell of `salloc`, or a batch script without `srun`. Call it after `adopt_launcher`, for work of all processes.
    """
    tasks = environ.get("SLURM_NTASKS", "1")
    if tasks != "1" and "RANK" not in environ and not _is_srun_task(environ):
        why = f"this allocation is for {tasks} processes (SLURM_NTASKS), but no launcher has started this one"
        fix = "put srun, deepspeed or torchrun before it; to train with one process, unset SLURM_NTASKS"
        raise ConfigError(why, field="SLURM_NTASKS", fix=fix)


def _check_ranks(environ: MutableMapping[str, str], found: _Found | None) -> None:
    """Raise unless RANK and WORLD_SIZE are numbers that agree with the launcher's own."""
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environ:
            fix = "unset both, or start the processes with deepspeed or torchrun, which set them"
            raise ConfigError(f"of RANK and WORLD_SIZE, {name} is not set", field=name, fix=fix)
    rank, world_size = _number(environ, "RANK"), _number(environ, "WORLD_SIZE")
    if rank >= world_size:
        why = f"RANK is {rank}, but WORLD_SIZE is {world_size}"
        raise ConfigError(why, field="RANK", fix="unset both, or start the processes with deepspeed or torchrun")
    # srun may start a torchrun or a launcher of DeepSpeed on each machine.
    if found is not None and "TORCHELASTIC_RUN_ID" not in environ and "LOCAL_SIZE" not in environ:
        _check_equal(environ, found)


def _check_equal(environ: MutableMapping[str, str], found: _Found) -> None:
    names = found.names
    pairs = {"RANK": (names.rank, found.rank), "WORLD_SIZE": (names.world_size, found.world_size)}
    for name, (theirs, value) in pairs.items():
        if environ.get(name, str(value)) != str(value):
            why = f"{name} is {environ[name]}, but {names.launcher} has started this process with {theirs}={value}"
            raise ConfigError(why, field=name, fix=f"unset {name}")


def _find(environ: MutableMapping[str, str]) -> _Found | None:
    """The launcher that has started several processes, or None."""
    # mpirun first: inside an allocation it uses srun to start one process of its own on each machine.
    for names in [*_MPI, _PMI]:
        if environ.get(names.world_size, "1") == "1":
            continue
        if names is _PMI and _is_srun_task(environ):  # srun sets PMI_RANK too, but not the local ones
            continue
        return _found(environ, names)
    if _is_srun_task(environ):
        size = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environ else "SLURM_NTASKS"
        if environ.get(size) == "1":
            return None
        return _found(environ, _Names("srun", "SLURM_PROCID", size, "SLURM_LOCALID", "SLURM_GTIDS"))
    return None


def _is_srun_task(environ: MutableMapping[str, str]) -> bool:
    """Whether srun started this process or one of its parents, unlike a shell of salloc or a batch script."""
    return "SLURM_STEP_ID" in environ and _number(environ, "SLURM_STEP_ID") < _FIRST_SPECIAL_STEP


def _found(environ: MutableMapping[str, str], names: _Names) -> _Found:
    for name in names[1:4]:
        if name not in environ:
            why = f"{names.launcher} has started several processes, but {name} is not set"
            raise ConfigError(why, field=name, fix="start them with deepspeed or torchrun, or set RANK and the others")
    rank, world_size, local_rank = (_number(environ, name) for name in names[1:4])
    if rank >= world_size:
        why = f"{names.rank} is {rank}, but {names.world_size} is {world_size}"
        raise ConfigError(why, field=names.rank, fix=f"start the processes with {names.launcher} again")
    if names.local_size == "SLURM_GTIDS":  # the ranks on this machine, such as 0,1,2,3
        local_size = len(environ.get("SLURM_GTIDS", "").split(","))
    else:
        local_size = _number(environ, names.local_size) if names.local_size in environ else 1
    return _Found(names, rank, world_size, local_rank, local_size)


def _set_address(environ: MutableMapping[str, str], found: _Found) -> None:
    """Set where the processes meet, if it follows from the launcher's variables: all must find the same."""
    nodes = environ.get("SLURM_STEP_NODELIST", environ.get("SLURM_JOB_NODELIST"))
    if found.local_size == found.world_size:
        address = "127.0.0.1"
    elif nodes is not None:
        address = first_host(nodes)
    else:
        return
    # Processes of one mpirun on one machine have the same parent.
    job = environ.get("SLURM_JOB_ID", environ.get("PMIX_NAMESPACE", str(os.getppid())))
    name = f"{job}.{environ.get('SLURM_STEP_ID', '0')}"
    environ.setdefault("MASTER_ADDR", address)
    environ.setdefault("MASTER_PORT", str(_PORTS[zlib.crc32(name.encode()) % len(_PORTS)]))


def first_host(nodes: str) -> str:
    """The first host of a list of SLURM: `gpu01` of `gpu[01-03,7],login`."""
    first = re.split(r",(?![^\[]*\])", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _number(environ: MutableMapping[str, str], name: str) -> int:
    value = environ[name]
    if not (value.isascii() and value.isdecimal() and len(value) < 20):
        raise ConfigError(f"{name} is '{value:.40}', not a number", field=name, fix=f"unset {name}")
    return int(value)
