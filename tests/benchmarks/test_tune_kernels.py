"""The kernel tuner: candidates, correctness, and the file it writes. Times come from a fake, so nothing is timed here."""

from __future__ import annotations

import json

import pytest
import torch

import tune_kernels
from ccella_fast.kernels import tuning
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

KEY = "forward"
FASTER = LaunchConfig({"BLOCK_R": 8, "BLOCK_C": 512}, 4, 2)


def call() -> list[torch.Tensor]:
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    return [geglu(h, backend="triton")]


def fake_measure(run) -> float:
    run()
    return 1.0 if tuning.launch_config("geglu", KEY, torch.device("cpu")) == FASTER else 2.0


def test_candidates_are_the_neighbors_and_the_shipped_one_is_first():
    found = tune_kernels.candidates(LaunchConfig({"A": 64, "B": 16}, 4, 2))
    assert found[0] == LaunchConfig({"A": 64, "B": 16}, 4, 2) and len(found) == 3 * 2 * 3 * 3
    assert LaunchConfig({"A": 128, "B": 32}, 8, 3) in found and min(c.constants["B"] for c in found) == 16


def test_keys_used_by_a_call():
    plain = tuning.launch_config
    assert tune_kernels.keys_used("geglu", call) == [KEY]
    assert tune_kernels.keys_used("attention", call) == []
    assert tuning.launch_config is plain


def test_the_fastest_correct_candidate_wins():
    assert FASTER in tune_kernels.candidates(DEFAULT_LAUNCH_CONFIGS["geglu"][KEY])
    assert tune_kernels.best("geglu", KEY, [call], fake_measure) == (FASTER, pytest.approx(2.0))
    # Without a gain the shipped configuration wins; and the candidates do not remain in effect.
    assert tune_kernels.best("geglu", KEY, [call], lambda run: 1.0) == (DEFAULT_LAUNCH_CONFIGS["geglu"][KEY], 1.0)
    assert tuning.launch_config("geglu", KEY, torch.device("cpu")) == DEFAULT_LAUNCH_CONFIGS["geglu"][KEY]


def test_a_wrong_candidate_never_wins():
    def run():
        wrong = tuning.launch_config("geglu", KEY, torch.device("cpu")) == FASTER
        return [torch.full((2,), 1.5 if wrong else 1.0)]

    assert tune_kernels.best("geglu", KEY, [run], fake_measure) == (DEFAULT_LAUNCH_CONFIGS["geglu"][KEY], 1.0)


def test_a_written_configuration_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "tuned_file", lambda chip: tmp_path / f"{chip}.json")
    file = tune_kernels.write("chip", "geglu", KEY, FASTER)
    tune_kernels.write("chip", "geglu", "backward", FASTER)
    assert set(json.loads(file.read_text())["geglu"]) == {KEY, "backward"}
    tuning._measured.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    try:
        assert tuning.launch_config("geglu", KEY, torch.device("cuda")) == FASTER
    finally:
        tuning._measured.cache_clear()


def test_tiles_that_must_hold_a_whole_group_are_not_tuned():
    """A smaller tile could be correct for a small tensor, win, and be wrong for a larger tensor of the same key."""
    whole = [config for key, config in DEFAULT_LAUNCH_CONFIGS["group_norm_silu"].items() if key.startswith("whole")]
    assert len(whole) == 3
    assert not any(candidate.constants for config in whole for candidate in tune_kernels.candidates(config))
