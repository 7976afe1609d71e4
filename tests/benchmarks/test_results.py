"""The record of a run: its schema, page, table and picture, and its comparison with an earlier one. Nothing is timed here."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path

import pytest

import report
import results
from benchmark_fixtures import prepared_case, run_case
from ccella_fast import environment
from ccella_fast.errors import DataError
from ccella_fast.storage import write_json

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def record():
    facts = environment.describe_environment()
    case = run_case(prepared_case(1e-7))
    case["sides"]["ours"]["parts"] = {"forward": 1e-3}
    case["curves"] = {"step against batch, s": [(1, 2.0), (2, 3.0)]}
    return {
        "schema": results.SCHEMA, "date": results.now(), "commit": "abc1234", "command": "python benchmarks/run.py",
        "device": "cpu", "machine": "Some (R) CPU", "environment": facts, "warnings": [], "left_out": {"big": "no time"},
        "reduced": ["latent 1 x 1 x 1"],
        "rates": {"copy_bytes_per_second": 1e10, "matmul_flops": {"fp32": 1e11, "bf16": 1e12}, "conv3d_flops": {}},
        "noise_floor": {"median": 1.0, "noise": 0.01}, "overhead_seconds": 1e-6, "telemetry": {"absent": "no GPU"},
        "cases": [case],
        "counts": {"denoising step": {"ours": {"ops": 300, "launches": 400, "bytes": 10, "flops": 5, "peak_bytes": 1}}},
        "seconds": 1.0,
    }  # fmt: skip


def test_committed_records_follow_the_schema():
    files = sorted((ROOT / "benchmarks" / "results").glob("*/*.json"))
    assert files and all(results.read(file)["cases"] for file in files)


def test_record_is_written_as_json_page_table_and_markdown(record, tmp_path):
    path = results.write(record, tmp_path / "some-cpu" / "2026-01-01-abc.json")
    assert results.read(path) == json.loads(path.read_text())
    report.write(record, tmp_path / "r.html", tmp_path / "r.png")
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in page and not re.search(
        "https?:", page
    )  # not "http" alone, which base64 may contain
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r-scaling.png").is_file()
    assert "toy" in report.table(record)
    assert "left out: big: no time" in report.table(record) and "reduced: latent 1 x 1 x 1" in report.table(record)
    assert "left out: no time" in page and "reduced: latent 1 x 1 x 1" in page
    text = results.write_markdown(tmp_path / "RESULTS.md", tmp_path).read_text()
    assert "## Some (R) CPU: `python benchmarks/run.py`" in text and "| toy | ours | fp32 |" in text
    assert "(results/some-cpu/2026-01-01-abc-scaling.png)" in text


def test_lengths_of_the_bars_in_the_picture():
    """By hand: twice as fast; 40 % of the roofline; a quarter and three quarters of the time, then half of that."""
    from matplotlib.figure import Figure

    work = {"seconds_by_kind": {"convolution": 7.0, "other": 3.0}}
    reference = {"precision": "fp32", "seconds": {"median": 4.0}, "parts": {"forward": 10.0, "backward": 30.0}}
    ours = {"precision": "fp32", "seconds": {"median": 2.0}, "parts": {"forward": 1.0}, "profile": work}
    ours |= {"of_limit": 0.4, "floor": {"limit": "compute", "seconds": 0.8}}
    case = {
        "name": "toy",
        "status": "ok",
        "sides": {"reference": reference, "ours": ours},
        "speedups": {"ours": {"median": 2.0}},
    }
    expected = {
        report._speedups: [(0, 1), (0, 2)], report._roofline: [(0, 40)], report._time_shares: [(0, 25), (25, 75), (0, 35), (35,
        15)],
    }  # fmt: skip
    for draw, bars in expected.items():
        axis = Figure().subplots()
        draw(axis, [case])
        assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [pytest.approx(bar) for bar in bars], draw


@pytest.mark.parametrize(
    ("change", "field"),
    [
        pytest.param(lambda r: r.update(schema=99), "schema", id="another-schema"),
        pytest.param(lambda r: r.pop("rates"), "rates", id="missing-key"),
        pytest.param(lambda r: r["cases"][0].update(status="fine"), "cases.0.status", id="unknown-status"),
        pytest.param(
            lambda r: r["cases"][0].update(status="wrong"), "cases.0.speedups", id="speedup-of-a-wrong-result"
        ),
    ],
)
def test_read_raises_for_a_record_of_another_form(record, tmp_path, change, field):
    bad = copy.deepcopy(record)
    change(bad)
    write_json(tmp_path / "bad.json", bad)
    with pytest.raises(DataError) as caught:
        results.read(tmp_path / "bad.json")
    assert caught.value.field == field


def changed(record, *, factor=1.0, spread=0.0, noise=0.01, ops=300, machine="Some (R) CPU", speedup=2.0):
    new = copy.deepcopy(record)
    new["machine"], new["noise_floor"] = machine, {"noise": noise}
    for timed in new["cases"][0]["sides"].values():
        timed["seconds"]["median"], timed["spread"] = 1.0, spread
    new["cases"][0]["sides"]["ours"]["seconds"]["median"] = factor
    new["cases"][0]["speedups"]["ours"]["median"] = speedup
    new["counts"]["denoising step"]["ours"]["ops"] = ops
    return new


@pytest.mark.parametrize(
    ("value", "text"), [(123.4, "123 s"), (1.0, "1 s"), (0.0456, "45.6 ms"), (1e-3, "1 ms"), (7.89e-6, "7.89 us")]
)
def test_seconds_have_a_suitable_unit(value, text):
    assert results.seconds(value) == text


@pytest.mark.parametrize(
    ("new", "worse"),
    [
        pytest.param({}, False, id="equal"),
        pytest.param({"factor": 1.04}, False, id="within-5-percent"),
        pytest.param({"factor": 1.2}, True, id="slower"),
        pytest.param({"factor": 1.2, "spread": 0.12}, False, id="within-twice-both-spreads"),
        pytest.param({"factor": 0.5}, False, id="faster"),
        pytest.param({"ops": 301}, True, id="one-op-more"),
        pytest.param({"ops": 299}, False, id="one-op-less"),
        pytest.param({"factor": 9.0, "machine": "another"}, False, id="slower-on-another-machine"),
        pytest.param({"machine": "another", "speedup": 1.5}, True, id="smaller-speedup-on-another-machine"),
    ],
)
def test_regressions_are_found_beyond_the_noise(record, new, worse):
    found, remarks = results.regressions(changed(record, **new), changed(record))
    assert bool(found) == worse, found
    assert bool(remarks) == ("machine" in new)


def test_tolerance_includes_the_noise_of_both_runs(record):
    """20 % slower, compared with twice the sum of both spreads, and with each run's noise."""

    def found(now, then):
        return bool(results.regressions(changed(record, factor=1.2, **now), changed(record, **then))[0])

    assert found({"spread": 0.04}, {"spread": 0.04}) and found({"noise": 0.15}, {"noise": 0.15})
    for now, then in ((0.06, 0.06), (0.12, 0.0), (0.0, 0.12)):
        assert not found({"spread": now}, {"spread": then})
    for now, then in ((0.25, 0.01), (0.01, 0.25)):
        assert not found({"noise": now}, {"noise": then})


def test_a_failed_case_is_a_regression(record):
    new = changed(record)
    new["cases"][0].update(status="failed", why="", speedups={})
    assert results.regressions(new, changed(record))[0] == ["toy: was ok, is failed"]
