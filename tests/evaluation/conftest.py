"""A fixture for tests that have nothing to do with the prostate network."""

from __future__ import annotations

import pytest

from ccella_fast.evaluation.features import taps


@pytest.fixture
def no_prostate_network(monkeypatch):
    """As if its package were not installed: it takes seconds per volume, and test_taps.py and test_anatomy.py judge it."""
    monkeypatch.setattr(taps, "is_installed", lambda: False)
