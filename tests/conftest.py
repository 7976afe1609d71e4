"""Fixtures that several test modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real studies (`mri/`), reports (`text/`) and the T5 vocabulary (`tokenizer/t5/`)."""
    folder = Path(os.environ.get("CCELLA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mri").is_dir():
        pytest.skip(f"no real data at {folder}; set CCELLA_TEST_DATA")
    return folder
