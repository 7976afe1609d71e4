"""Fixtures that several test modules share."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

# Before any kernel module is imported: without a GPU, Triton kernels run in Triton's interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real studies (`mri/`), reports (`text/`) and the T5 vocabulary (`tokenizer/t5/`)."""
    folder = Path(os.environ.get("CCELLA_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "mri").is_dir():
        pytest.skip(f"no real data at {folder}; set CCELLA_TEST_DATA")
    return folder


@pytest.fixture(scope="session")
def golden_scheduler() -> dict:
    """The reference's numbers for the noise schedule and its steps."""
    folder = Path(os.environ.get("CCELLA_TEST_SPEC", ROOT.parent / "shared" / "spec"))
    if not (folder / "reference-golden.json").is_file():
        pytest.skip(f"no golden file at {folder}; set CCELLA_TEST_SPEC")
    return json.loads((folder / "reference-golden.json").read_text())["values"]["SCHEDULER"]
