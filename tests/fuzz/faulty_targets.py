"""Readers that do what no reader may do: the control of the harness."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from ccella_fast.errors import DataError
from mutations import Mutation
from target import CANARY, Content, Target


def _crash(folder: Path) -> Content:
    os.kill(os.getpid(), signal.SIGSEGV)
    return Content("")


def _hang(folder: Path) -> Content:
    time.sleep(1000)
    return Content("")


def _memory(folder: Path) -> Content:
    np.ones(2**28 + 2**24, np.float32)
    return Content("same")


def _raise(error: Exception) -> Content:
    raise error


_ON_DAMAGE = {
    "crash": _crash,
    "hang": _hang,
    "memory": _memory,
    "internal": lambda folder: _raise(RuntimeError("unexpected")),
    "leak": lambda folder: _raise(DataError(f"unknown name '{CANARY}'")),
    "long message": lambda folder: _raise(DataError("words", path="words " * 1000)),
    "silent change": lambda folder: Content("other", 6),
    "lost slices": lambda folder: Content("other", 5),
    "refused": lambda folder: _raise(DataError("this file is damaged")),
    "same": lambda folder: Content("same", 6),
}


def _target(outcome: str) -> Target:
    def read(folder: Path) -> Content:
        if (folder / "file").read_bytes() == b"valid":
            return Content("same", 6)
        return _ON_DAMAGE[outcome](folder)

    damage = Mutation("damage", lambda rng, files: {"file": b"damaged"}, guarded=True)
    return Target(outcome, lambda folder: (folder / "file").write_bytes(b"valid"), read, [damage], 1)


TARGETS = {outcome: _target(outcome) for outcome in _ON_DAMAGE}
