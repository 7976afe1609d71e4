"""What prompts state against what volumes show, and whether a prompt returns its own study."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.evaluation.findings import CaseFindings
from ccella_fast.evaluation.run import evaluate
from ccella_fast.evaluation.volumes import Volume
from evaluation_fixtures import SPACING, CountingExtractor, some_volumes


class Sided(CountingExtractor):
    """The mean of each half."""

    spaces = {"halves": 2}

    def __call__(self, volume):
        middle = volume.array.shape[0] // 2
        return {"halves": np.array([volume.array[:middle].mean(), volume.array[middle:].mean()], np.float32)}


def sided_volumes(count, kind, *, obey=True):
    """Volumes that are dark on one side, and which side their prompts state."""
    random = np.random.default_rng(len(kind))
    volumes, sides = [], {}
    for k in range(count):
        side = ("left", "right")[k % 2]
        array = 0.5 + 0.1 * random.random((12, 12, 8)).astype(np.float32)
        dark = slice(0, 6) if (side == "left") == (obey or k % 4 < 2) else slice(6, 12)
        array[dark] -= 0.3
        volumes.append(Volume(array, SPACING, f"{kind}{k}", prompt=f"{kind}{k}"))
        sides[f"{kind}{k}"] = side
    return volumes, sides


def test_the_side_of_prompts_is_read_from_volumes():
    real, known = sided_volumes(24, "real")
    given = {"real": real, "features": [Sided()], "metrics": ["condition"], "draws": 4}
    for obey in (True, False):
        synthetic, asked = sided_volumes(24, "synthetic", obey=obey)
        findings = CaseFindings({"side": known | asked}, {})
        row = evaluate(synthetic=synthetic, findings=findings, **given)["condition_side", "halves"]
        assert row.floor == pytest.approx(0.5, abs=0.05) and row.details["ceiling"] == 1
        assert row.value == (1 if obey else pytest.approx(0.5, abs=0.2))
        assert (row.details["p"] < 0.01) == obey
    without = evaluate(synthetic=synthetic, **given)
    assert "condition_side" not in {row.metric for row in without.rows}


def test_prompts_that_return_their_own_study_are_noticed():
    train = some_volumes(10, 0)
    real = some_volumes(6, 100)
    copies = [volume._replace(id=f"s{k}", prompt=volume.id) for k, volume in enumerate(train[:6])]
    strangers = [v._replace(prompt=w.id) for v, w in zip(some_volumes(6, 200), train, strict=False)]
    given = {"real": real, "train": train, "features": [CountingExtractor()], "metrics": ["memorisation"], "draws": 4}
    own = evaluate(synthetic=copies, **given)["own_study", "fake"]
    assert (own.value, own.floor, own.details["median_rank"]) == (1, 0.1, 1)
    assert evaluate(synthetic=strangers, **given)["own_study", "fake"].value < 0.5
    unprompted = evaluate(synthetic=some_volumes(6, 200), **given)
    assert "own_study" not in {row.metric for row in unprompted.rows}
