"""The cases of the evaluation, in small: both sides compute the same features, and limits are judged. Nothing is timed here."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases.evaluation
from benchmark_fixtures import run_case
from ccella_fast.config import Config, make_config
from ccella_fast.evaluation.features import preprocessing, radiomics, random_networks
from fixtures import Workbench

CPU = torch.device("cpu")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch):
    """A workbench with small volumes and the spaces without large networks: tests/evaluation compares those with MONAI."""
    pairs = {name: cases.evaluation._PAIRS[name] for name in ("radiomics", "random")}
    monkeypatch.setattr(cases.evaluation, "_PAIRS", pairs)
    monkeypatch.setattr(random_networks, "_WINDOW", random_networks._WINDOW._replace(shape=(32, 32, 4)))
    return Workbench(CPU, make_config({"data.dim": [64, 64, 32]}))


def test_both_sides_compute_the_same_features(tiny: Workbench):
    prepared = cases.evaluation.features_case(tiny)
    row = run_case(prepared)
    assert row["status"] == "ok" and row["sides"]["ours"]["error"] < 1e-3, row["why"]
    assert set(row["sides"]["ours"]["parts"]) == {"radiomics", "random"}
    facts = ("MONAI, volumes/s", "ours, volumes/s", "times faster")
    expected = {f"{name}: {what}" for name in ("radiomics", "random") for what in facts}
    assert {what for what, _, _ in row["facts"]} == expected


def test_other_preprocessing_is_noticed(tiny: Workbench, monkeypatch: pytest.MonkeyPatch):
    """The box of radiomics moved by one voxel of 2 mm."""
    crop = preprocessing.crop_or_pad
    monkeypatch.setattr(radiomics, "crop_or_pad", lambda array, shape: crop(np.roll(array, 1, axis=0), shape))
    prepared = cases.evaluation.features_case(tiny)
    expected = prepared.truth()
    assert (prepared.implementations["ours"].output() - expected).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("limits", "words"), [({}, "kept"), ({"seconds": 0.0, "gigabytes": -1.0}, "EXCEEDED")], ids=["kept", "exceeded"]
)
def test_metrics_are_judged_by_their_limits(monkeypatch: pytest.MonkeyPatch, limits, words):
    small = cases.evaluation.BAR._replace(timed=12, large=14, slices=5, dimensions=9, draws=3, **limits)
    monkeypatch.setattr(cases.evaluation, "BAR", small)
    facts = {what: (value, unit) for what, value, unit in cases.evaluation.metrics_case(Workbench(CPU, Config())).facts}
    assert [*facts][:7] == ["fd", "kid", "mmd", "prdc", "c2st", "memorisation", "condition"]
    assert sum(value for value, _ in [*facts.values()][:7]) == pytest.approx([*facts.values()][7][0])
    assert [what.split()[0] for what in [*facts][7:]] == ["all,", "fd_slices,", "peak"]
    assert [what.split()[-1] for what in [*facts][7:]] == [words] * 3
