"""What a target of the fuzzing is: a kind of input as {name: content}, how it is damaged, and how it is read."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mutations import Files, Mutation, on_one_file, text

CANARY = "KANARIENVOGEL"


class Content(NamedTuple):
    """What was read: a digest of it, and the number of slices that it has; `noted` if the reader says what it left out."""

    digest: str
    slices: int = 0
    noted: bool = False


class Target(NamedTuple):
    """One kind of input.

    Attributes:
        name: For the table and the command line.
        write: Writes the valid input to a folder.
        read: Reads the input in a folder.
        mutations: How it is damaged.
        count: Inputs of a whole run.
        command: The command line that uses the input, given the input's folder and an output folder; None if there is none.
    """

    name: str
    write: Callable[[Path], Any]
    read: Callable[[Path], Content]
    mutations: list[Mutation]
    count: int
    command: Callable[[Path, Path], list[str]] | None = None


def digest(*parts: object) -> str:
    """SHA-256 of arrays and of the text of everything else."""
    result = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            result.update(f"{part.shape}{part.dtype}".encode())
        result.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return result.hexdigest()


def text_target(
    name: str, write: Callable[[Path], Any], file: str, read: Callable[[Path], Content], count: int, **more: Any
) -> Target:
    """A target of which one text file is damaged; `file` is the end of its name."""
    return Target(name, write, read, [Mutation("text", on_one_file(text, file))], count, **more)


def prepare_command(folder: Path, out: Path, *options: str) -> list[str]:
    """`prepare` of the studies in `folder` on a small grid, without text."""
    config = ["data.spacing=[1.5,1.5,3.0]", "data.dim=[32,32,32]", "model.variant=MAISI"]
    arguments = ["ccella_fast.cli", "prepare", "--data", str(folder), "--out", str(out), "--workers", "1", *options]
    return arguments + [word for setting in config for word in ("--set", setting)]


def valid_files(target: Target) -> Files:
    """The files of the valid input."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        target.write(folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def write_files(folder: Path, files: Files) -> None:
    """Write the files below `folder`."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
