"""The tuner: what it tries, what it refuses, what it writes. With a stopwatch of its own, so that nothing is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from ccella_fast.kernels import tuning
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import tune_kernels  # noqa: E402

KEY = "forward"
QUICKER = LaunchConfig({"BLOCK_R": 8, "BLOCK_C": 512}, 4, 2)


def problem():
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    return tune_kernels.TuningProblem("geglu", "small", lambda: [geglu(h, backend="triton")])


def stopwatch(run):
    run()
    return 1.0 if tuning.launch_config("geglu", KEY, torch.device("cpu")) == QUICKER else 2.0


def test_candidates_are_the_neighbours_and_the_shipped_one_is_first():
    found = tune_kernels.candidates(LaunchConfig({"A": 64, "B": 16}, 4, 2))
    assert found[0] == LaunchConfig({"A": 64, "B": 16}, 4, 2) and len(found) == 3 * 2 * 3 * 3
    assert LaunchConfig({"A": 128, "B": 32}, 8, 3) in found and min(c.constants["B"] for c in found) == 16


def test_notes_which_configuration_a_problem_reads():
    assert tune_kernels.keys_of(problem()) == [KEY]
    assert tuning.launch_config.__name__ == "launch_config"  # as before


def test_the_fastest_right_candidate_wins():
    assert QUICKER in tune_kernels.candidates(DEFAULT_LAUNCH_CONFIGS["geglu"][KEY])
    assert tune_kernels.best("geglu", KEY, [problem()], stopwatch) == (QUICKER, pytest.approx(2.0))
    # Nothing gained, nothing changed; and no candidate stays behind.
    assert tune_kernels.best("geglu", KEY, [problem()], lambda run: 1.0) == (DEFAULT_LAUNCH_CONFIGS["geglu"][KEY], 1.0)
    assert tuning.launch_config("geglu", KEY, torch.device("cpu")) == DEFAULT_LAUNCH_CONFIGS["geglu"][KEY]


def test_a_wrong_candidate_never_wins():
    def run():
        wrong = tuning.launch_config("geglu", KEY, torch.device("cpu")) == QUICKER
        return [torch.full((2,), 1.5 if wrong else 1.0)]

    wrong = tune_kernels.TuningProblem("geglu", "wrong", run)
    assert tune_kernels.best("geglu", KEY, [wrong], stopwatch) == (DEFAULT_LAUNCH_CONFIGS["geglu"][KEY], 1.0)


def test_what_is_written_is_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "tuned_file", lambda chip: tmp_path / f"{chip}.json")
    file = tune_kernels.write("chip", "geglu", KEY, QUICKER)
    tune_kernels.write("chip", "geglu", "backward", QUICKER)
    assert set(json.loads(file.read_text())["geglu"]) == {KEY, "backward"}
    tuning._measured.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    try:
        assert tuning.launch_config("geglu", KEY, torch.device("cuda")) == QUICKER
    finally:
        tuning._measured.cache_clear()


def test_a_tile_that_must_hold_a_group_is_not_up_for_tuning():
    """A smaller one would be right for a small problem, win, and be wrong for a larger one of the same key."""
    whole = [config for key, config in DEFAULT_LAUNCH_CONFIGS["group_norm_silu"].items() if key.startswith("whole")]
    assert len(whole) == 3
    assert not any(candidate.constants for config in whole for candidate in tune_kernels.candidates(config))
