"""The fixture that records how a goal of docs/reference/reliability.md was met."""

from __future__ import annotations

import json
from collections.abc import Callable
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
