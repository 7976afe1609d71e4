"""The answers of a comparison, and what is recorded of its classifiers, from made-up numbers."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from ccella_fast.comparison import results
from ccella_fast.errors import CheckpointError
from ccella_fast.storage import write_csv, write_json
from comparison_fixtures import CONTRASTS, contrast, record


def answers(found: dict[str, Any]) -> dict[str, str]:
    return {each.name: each.answer for each in results.statements(found)}


def test_permutations_are_enumerated():
    a, b = [1.0, 2.0, 4.0], [3.0, 5.0, 6.0]
    least = sum(sum(chosen) <= sum(a) for chosen in itertools.combinations([*a, *b], 3)) / 20
    assert results.permutation_p(a, b) == least == 2 / 20
    assert results.permutation_p(b, a) == 19 / 20
    assert results.permutation_p([1, 2, 3], [4, 5, 6]) == 1 / 20  # separated: the least with three and three
    assert results.permutation_p([1, 1], [1, 1]) == 1
    assert results.permutation_p([-0.3, -0.2], [-0.1, 0.1]) == 1 / 6  # KID may be negative


def test_the_statements_follow_from_distances_and_contrasts():
    far, near = [20.0, 22.0, 21.0, 23.0], [10.0, 12.0, 11.0, 13.0]
    assert answers(record(near, far, CONTRASTS)) == {"O1": "yes", "O2": "yes", "O3": "yes", "O4": "undecided"}
    assert answers(record(far, near, CONTRASTS))["O1"] == "no"
    assert answers(record([10.0, 21.0, 12.0, 22.0], [11.0, 20.0, 13.0, 23.0], CONTRASTS))["O1"] == "undecided"
    o1, o2, *others = results.statements(record(near, far, CONTRASTS))
    assert o1.p == pytest.approx(1 / 70) and o2.p == 0.01
    assert o2.p_holm == pytest.approx(0.02) and o1.p_holm == pytest.approx(0.02)  # Holm: 2 x 0.01, then at least that
    assert "+4.0 points (+1.0 to +7.0)" in o2.sentence
    assert "KID in taps-l3: 0.115 (0.1, 0.12, 0.11, 0.13) against 0.215" in o1.sentence
    assert "FD: 11.5 against 21.5." in o1.sentence
    assert [each.p for each in others] == [None, None]
    assert "MAISI is unconditional" in others[1].sentence
    conditioned = record(near, far, CONTRASTS)
    conditioned["protocol"]["asked"]["variants"][1] = "RADMAISI"
    for generator in conditioned["generators"][len(near) :]:
        generator["variant"] = "RADMAISI"
    assert "unconditional" not in results.statements(conditioned)[3].sentence


def test_the_opposite_of_the_first_statement_needs_half_of_the_level():
    near, far = [10.0, 11.0, 12.0], [20.0, 21.0, 22.0]  # separated: one division of 20
    assert results._closer(record(near, far, []), "CCELLA", "MAISI").answer == "yes"
    opposite = results._closer(record(far, near, []), "CCELLA", "MAISI")
    assert opposite.answer == "undecided" and opposite.p == pytest.approx(2 / 20)


def test_features_that_fail_the_gate_decide_nothing():
    found = record([10.0, 11.0, 12.0, 13.0], [20.0, 21.0, 22.0, 23.0], CONTRASTS)
    found["protocol"]["decided"]["passed"]["taps-l3"] = False
    o1, o2, *_ = results.statements(found)
    assert (o1.answer, o1.p) == ("undecided", None)
    assert o2.p_holm == 0.01 and o2.sentence.endswith("p = 0.01.")  # alone


def test_synthetic_studies_that_teach_more_are_not_called_worse():
    better = contrast("s-r", 0.1, 0.02, equal="no")
    worse = contrast("s-r", -0.1, 0.02, equal="no")
    sentences = [results._equal(each).sentence for each in (better, worse)]
    assert sentences[0].endswith("They teach more.") and "90 %: +8.0 to +12.0" in sentences[0]
    assert sentences[1].endswith("counts as equal.")


def test_two_primary_statements_share_the_level():
    near, far = [10.0, 11.0, 12.0], [20.0, 21.0, 22.0]
    worse = [contrast("rs-rr", 0.02, 0.03, p=0.2), *CONTRASTS[1:]]
    o1, o2, *_ = results.statements(record(near, far, worse))
    assert o1.p == pytest.approx(0.05) and o1.p_holm == pytest.approx(0.1) and o1.answer == "undecided"
    assert o2.answer == "undecided"
    barely = [contrast("rs-rr", 0.04, 0.03, p=0.04), *CONTRASTS[1:]]
    o1, o2, *_ = results.statements(record([1.0, 2.0, 9.0], [3.0, 4.0, 5.0], barely))
    assert o2.p_holm == pytest.approx(0.08) and o2.answer == "undecided"  # alone, it would be a yes


def test_what_is_not_known_is_undecided():
    found = record([10.0, 11.0], [20.0, 21.0], [])
    found["generators"][0]["rows"][2]["value"] = None
    assert answers(found) == dict.fromkeys(("O1", "O2", "O3", "O4"), "undecided")


def write_classifiers(folder: Path, predicted: dict[str, list[float]]) -> None:
    """The files of `ccella-fast classify` that are read, for four test studies of which the last two are positive."""
    for name, scores in predicted.items():
        rows = [["v", "val", 1, 0.0], *([str(place), "test", place > 1, p] for place, p in enumerate(scores))]
        rows = [[case, split, int(label), p] for case, split, label, p in rows]
        write_csv(folder / "predictions" / f"{name}.csv", ["case", "split", "label", "p_pos"], rows)
    jobs = [
        {"job": name, "arm": name.split("-")[0], "generator": 0 if "generator" in name else None, "seed": 0, "updates": 1,
         "test": {"accuracy": 0.5, "auc": 0.5, "average_precision": 0.5}}
        for name in predicted
    ]  # fmt: skip
    write_json(folder / "classify.json", {"jobs": jobs})


def test_distances_are_those_of_equal_numbers(tmp_path):
    """Those of the floor and of the autoencoder's limit; a row without is as it is."""
    row = dict.fromkeys(results._KEPT) | {"sequence": "t2w", "details": {"moved": 0.5}}
    rows = [
        {**row, "metric": "fd", "value": 1.5, "value_equal_n": 1.8, "floor": 1.8},
        {**row, "metric": "copies", "value": 0.0, "value_equal_n": None},
        {**row, "metric": "fd", "value": 9.0, "value_equal_n": 9.0, "sequence": "adc"},
    ]
    write_json(tmp_path / "metrics.json", {"rows": rows})
    assert [each["value"] for each in results._rows(tmp_path)] == [1.8, 0.0]
    assert results._rows(tmp_path)[0]["moved"] == 0.5


def test_roc_curves_are_averaged_over_the_classifiers_of_an_arm(tmp_path):
    first = {"r-seed0": [0.1, 0.2, 0.8, 0.9], "r-seed1": [0.8, 0.9, 0.1, 0.2], "rb-generator0-seed0": [0.5] * 4}
    write_classifiers(tmp_path / "classify", first)
    write_classifiers(tmp_path / "classify-LAST", {"rs-generator0-seed0": [0.1, 0.8, 0.2, 0.9]})
    folders = {"": tmp_path / "classify", "LAST": tmp_path / "classify-LAST"}
    found, curves = results._classifiers(folders, ["CCELLA", "MAISI", "LAST"])
    assert [(each["arm"], each["variant"], each["label"]) for each in found] == [
        ("r", None, "r"), ("r", None, "r"), ("rb", "MAISI", "rb MAISI"), ("rs", "LAST", "rs LAST"),
    ]  # fmt: skip
    curves = {curve["label"]: curve for curve in curves}
    rates = np.array(curves["r"]["false_positive_rate"])
    assert rates[0] == 0 and rates[-1] == 1 and curves["r"]["classifiers"] == 2
    # One classifier is always right and the other always wrong: 1 and 0, at the right end 1 and 1.
    np.testing.assert_allclose(curves["r"]["mean"], np.where(rates < 1, 0.5, 1))
    np.testing.assert_allclose(curves["r"]["sd"], np.where(rates < 1, 0.7071, 0))
    np.testing.assert_allclose(curves["rb MAISI"]["mean"], rates)  # all scores are equal
    np.testing.assert_allclose(curves["rs LAST"]["mean"], np.where(rates < 0.5, 0.5, 1))
    assert set(curves["rs LAST"]["sd"]) == {0}


def test_parameters_are_those_of_the_newest_checkpoint(tmp_path):
    for step, shape in ((2, (3, 5)), (10, (4, 5))):
        folder = tmp_path / "models" / "CCELLA-1" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        save_file({"a": np.zeros(shape, np.float32), "b": np.zeros(7, np.float32)}, folder / "model.safetensors")
        write_json(folder / "manifest.json", {})
    assert results._count_parameters(tmp_path, "CCELLA-1") == 27
    shutil.rmtree(tmp_path / "models" / "CCELLA-1" / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint any more") as caught:
        results._count_parameters(tmp_path, "CCELLA-1")
    assert "train-CCELLA-1.json" in str(caught.value)
