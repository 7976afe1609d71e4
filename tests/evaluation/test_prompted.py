"""What reports state against what volumes show, and whether a prompt returns its own study; no text leaves."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.data.phantom.report_text import Findings, write_report
from ccella_fast.errors import DataError
from ccella_fast.evaluation.prompted import StatedFindings, read_reports, stated_findings
from ccella_fast.evaluation.run import evaluate
from ccella_fast.evaluation.volumes import Volume
from evaluation_fixtures import SPACING, CountingExtractor, some_volumes


@pytest.mark.parametrize("zone", ["PZ", "TZ"])
@pytest.mark.parametrize("level", ["apex", "mid", "base"])
def test_the_findings_of_phantom_reports_are_read_in_every_wording(zone, level):
    for seed in range(40):
        facts = Findings(40 + seed, 5.5, 3 + seed % 3, zone, ("left", "right")[seed % 2], level, 8 + seed % 9)
        report = write_report(np.random.default_rng(seed), facts)
        expected = StatedFindings(facts.side, zone.lower(), level, facts.size_mm, facts.volume_ml)
        assert stated_findings(report) == expected, report


def test_without_a_lesion_nothing_is_stated_of_it():
    for seed in range(40):
        report = write_report(np.random.default_rng(seed), Findings(33, 4.0, 1 + seed % 2, "", "", "", 0))
        assert stated_findings(report) == StatedFindings(gland_volume=33), report


def test_several_values_are_none():
    found = stated_findings("Lesions in the left and right peripheral zone of 8 mm and 12 mm.")
    assert found == StatedFindings(zone="pz")


class Sided(CountingExtractor):
    """The mean of each half."""

    spaces = {"halves": 2}

    def __call__(self, volume):
        middle = volume.array.shape[0] // 2
        return {"halves": np.array([volume.array[:middle].mean(), volume.array[middle:].mean()], np.float32)}


def sided_volumes(count, kind, *, obey=True):
    """Volumes that are dark on one side, with the reports that say which."""
    random = np.random.default_rng(len(kind))
    volumes, reports = [], {}
    for k in range(count):
        side = ("left", "right")[k % 2]
        array = 0.5 + 0.1 * random.random((12, 12, 8)).astype(np.float32)
        dark = slice(0, 6) if (side == "left") == (obey or k % 4 < 2) else slice(6, 12)
        array[dark] -= 0.3
        volumes.append(Volume(array, SPACING, f"{kind}{k}", prompt=f"{kind}{k}"))
        reports[f"{kind}{k}"] = f"{side.capitalize()} peripheral zone, apex: 9 mm focus."
    return volumes, reports


def test_the_side_of_prompts_is_read_from_volumes():
    real, real_reports = sided_volumes(24, "real")
    given = {"real": real, "features": [Sided()], "metrics": ["condition"], "draws": 4}
    for obey in (True, False):
        synthetic, reports = sided_volumes(24, "synthetic", obey=obey)
        row = evaluate(synthetic=synthetic, reports=real_reports | reports, **given)["condition_side", "halves"]
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


def test_reports_come_from_a_table_or_from_text_files(tmp_path):
    (tmp_path / "studies.csv").write_text('case,split,report\na,train,"Left, 9 mm."\nb,test,\n')
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("Left, 9 mm.")
    assert read_reports(tmp_path / "studies.csv") == read_reports(tmp_path / "texts") == {"a": "Left, 9 mm."}
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("id,text\na,Left PZ\n")
    for name, words in (("empty", "no reports"), ("other.csv", "columns 'case' and 'report'"), ("none", "not exist")):
        with pytest.raises(DataError, match=words) as caught:
            read_reports(tmp_path / name)
        assert "PZ" not in str(caught.value)
