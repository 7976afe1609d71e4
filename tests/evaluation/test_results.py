"""The results as JSON and as a table."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest

from ccella_fast.evaluation.results import Evaluation, Row
from ccella_fast.folder_kinds import folder_kind


def some_results(**changes) -> Evaluation:
    given = {
        "value": 2.0, "value_equal_n": 1.5, "ci95": (1.0, 3.0), "floor": 0.5, "ratio": 3.0, "dim": 7, "guards": ("few", "n<d"),
        "details": {"p": np.float64(0.25), "none": float("nan"), "pair": (1, np.int64(2))},
    }  # fmt: skip
    rows = [
        Row(
            "fd",
            "taps-l3",
            "t2w",
            "samples",
            "prepared:test",
            n_real=8,
            n_synthetic=6,
            better="lower",
            **(given | changes),
        ),
        Row("msssim", None, "t2w", "samples", "prepared:test", 0.5, 8, 6, "floor", floor=0.25),
        Row("fd", "random", "adc", "samples", "prepared:test", float("inf"), 8, 6, "lower"),
    ]
    return Evaluation(rows, [{"id": "real-001", "volume_cc": np.float32(41.5)}], {"format": "ccella_fast.evaluation"})


def test_numbers_are_plain_and_those_that_are_not_finite_are_null(tmp_path):
    result = some_results()
    result.write_protocol(tmp_path)
    result.write(tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    first, second, third = found["rows"]
    assert first["details"] == {"p": 0.25, "none": None, "pair": [1, 2]} and first["ci95"] == [1.0, 3.0]
    assert (second["features"], second["ratio"], third["value"]) == (None, None, None)
    assert found["per_case"] == [{"id": "real-001", "volume_cc": 41.5}]
    assert found["protocol_sha256"] == hashlib.sha256((tmp_path / "protocol.json").read_bytes()).hexdigest()
    assert folder_kind(tmp_path) == "evaluation"
    (tmp_path / "protocol.json").write_text("{}")
    assert folder_kind(tmp_path) is None


def test_rows_are_found_by_metric_and_features():
    result = some_results()
    assert result["fd"].features == "taps-l3" and result["fd", "random"].sequence == "adc"
    assert result["msssim", None].floor == 0.25
    for wrong in ("kid", ("fd", "radiomics"), ("msssim", "random")):
        with pytest.raises(KeyError):
            result[wrong]


def test_the_table_has_a_line_for_each_row_and_blanks_for_what_is_not_known():
    header, *lines = some_results().table().splitlines()
    assert len(lines) == 3
    start = {
        name: header.index(name)
        for name in ("value", "at equal n", "95 % interval", "floor", "ratio", "limit", "n  ", "guards")
    }
    first = lines[0]
    assert first[: start["value"]].split() == ["fd", "taps-l3", "t2w"]
    assert first[start["95 % interval"] : start["floor"]].strip() == "1 to 3"
    assert first[start["ratio"] : start["limit"]].strip() == "3" and first[start["guards"] :] == "few, n<d"
    assert first[start["limit"] : start["n  "]].strip() == "" and "8 + 6" in first
    assert lines[1][start["ratio"] :].split() == ["8", "+", "6"]
