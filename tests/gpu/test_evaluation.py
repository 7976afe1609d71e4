"""Features of the evaluation's networks on a GPU equal those on a CPU: they share one cache."""

from __future__ import annotations

import importlib.metadata

import numpy as np
import pytest

from ccella_fast.evaluation.features.extractor import load_extractor
from ccella_fast.evaluation.features.taps import PACKAGE, GlandSegmenter
from feature_fixtures import make_volume

pytestmark = pytest.mark.gpu
installed = {distribution.name for distribution in importlib.metadata.distributions()}
needs_taps = pytest.mark.skipif(PACKAGE not in installed, reason=f"needs {PACKAGE}")


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("name", ["random", pytest.param("taps", marks=needs_taps)])
def test_features_are_those_of_a_cpu(name):
    first, other = (make_volume((60, 56, 24), (1.5, 1.5, 3.0), seed=seed) for seed in (0, 1))
    expected = load_extractor(name)(first)
    extractor = load_extractor(name, device="cuda")
    found, different = extractor(first), extractor(other)
    for space, features in found.items():
        assert difference(features, expected[space]) < 1e-4 < 1e-3 < difference(different[space], expected[space])
        assert np.array_equal(features, extractor(first)[space])


@needs_taps
def test_gland_is_that_of_a_cpu():
    volume = make_volume((60, 56, 24), (1.5, 1.5, 3.0))
    expected, found = (GlandSegmenter(device=device).logits(volume) for device in ("cpu", "cuda"))
    assert difference(found, expected) < 1e-4
