"""Fixtures: a record of how a goal of docs/reference/reliability.md was met; the log as it was before a command."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

OUT = Path(__file__).resolve().parents[2] / "out" / "reliability"


@pytest.fixture
def goal() -> Callable[..., None]:
    """`goal("R10", value=0, target=0, n=200)` asserts that the value is the target, and writes out/reliability/R10.json."""

    def record(name: str, *, value: int, target: int, n: int) -> None:
        OUT.mkdir(parents=True, exist_ok=True)
        print(f"GOAL {name} value={value} target={target} n={n}")
        (OUT / f"{name}.json").write_text(json.dumps({"goal": name, "value": value, "target": target, "n": n}) + "\n")
        assert value == target

    return record


@pytest.fixture(autouse=True)
def restored_log() -> Iterator[None]:
    """Undo what a command that ran in this process has set."""
    logger = logging.getLogger("ccella_fast")
    handlers, level = logger.handlers, logger.level
    yield
    logger.handlers = handlers
    logger.setLevel(level)
