"""The kernel tuner: candidates, trials in processes, correctness, and the files it writes. Times come from a fake."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import time
from pathlib import Path

import pytest
import torch

import kernel_launches
import kernel_trials
import tune_kernels
from ccella_fast.config import ModelConfig
from ccella_fast.kernels import tuning
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig
from kernel_trials import OK, WRONG, Candidate, Trial, TrialPool
from kernel_workloads import (
    BLOCKS,
    CHANNELS,
    CONTEXT,
    GROUPS,
    HEAD_WIDTH,
    TRANSFORMERS,
    Workload,
    workloads,
)

CPU = torch.device("cpu")
GRID = (8, 8, 8)
KEY = "forward"
SHIPPED = DEFAULT_LAUNCH_CONFIGS["geglu"][KEY]
FASTER = LaunchConfig({"BLOCK_R": 8, "BLOCK_C": 512}, 4, 2)
KNOWN = {
    "small": Workload("geglu", "sampling", 1, lambda: call),
    "large": Workload("geglu", "training", 1, lambda: call),
}


def call() -> list[torch.Tensor]:
    h = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    return [geglu(h, backend="triton")]


def in_effect(key: str = KEY) -> LaunchConfig:
    return tuning.launch_config("geglu", key, CPU)


def measure(launches) -> float:
    for launch in launches:
        launch()
    return 1.0 if in_effect() == FASTER else 2.0


@pytest.mark.parametrize(("kernel", "stages"), [("attention", {2, 3, 4}), ("geglu", {3})])
def test_candidates_change_one_or_two_factors(kernel, stages):
    shipped = LaunchConfig({"A": 64, "B": 16}, 4, 3)
    found = tune_kernels.candidates(kernel, shipped)
    flat = [(*config.constants.values(), config.num_warps, config.num_stages) for config in found]
    changed = [sum(a != b for a, b in zip(values, flat[0], strict=True)) for values in flat]
    assert found[0] == shipped and changed == sorted(changed) and set(changed) == {0, 1, 2}
    assert len(set(flat)) == len(flat) <= 24
    assert {values[-1] for values in flat} == stages  # a loop without tl.dot ignores them
    assert {values[0] for values in flat} == {32, 64, 128} and {values[1] for values in flat} == {16, 32}
    # Of two changes, those that keep the work per warp come first.
    work = [abs(math.log2(math.prod(values[:2]) / values[2] / (64 * 16 / 4))) for values in flat[changed.index(2) :]]
    assert work == sorted(work) and work[0] == 0


def test_every_configuration_has_few_candidates():
    for kernel, configs in DEFAULT_LAUNCH_CONFIGS.items():
        for shipped in configs.values():
            assert 1 < len(tune_kernels.candidates(kernel, shipped)) <= 24
    halved = {config.constants["BLOCK_R"] for config in tune_kernels.candidates("geglu", SHIPPED)}
    assert halved == {2, 4, 8}  # 16 is the least for tl.dot only


def test_stages_are_varied_for_the_kernels_with_tl_dot():
    sources = {kernel: "" for kernel in DEFAULT_LAUNCH_CONFIGS}
    for file in sorted(Path(tuning.__file__).parent.glob("*.py")):
        for kernel in sources:
            sources[kernel] += file.read_text(encoding="utf-8") * file.name.startswith(kernel)
    few = {"adamw"}  # one or few tiles: the rows of a batch
    assert {kernel for kernel, text in sources.items() if "tl.dot(" in text} == {*tune_kernels.PIPELINED, *few}
    others = {*sources} - {*tune_kernels.PIPELINED}  # their loops have STAGES of their own, or none
    assert all(sources[kernel].count("num_stages=") == sources[kernel].count("num_stages=STAGES") for kernel in others)


def test_tiles_that_must_hold_a_whole_group_are_not_tuned():
    """A smaller tile could be correct for a small tensor, win, and be wrong for a larger tensor of the same key."""
    whole = [config for key, config in DEFAULT_LAUNCH_CONFIGS["group_norm_silu"].items() if key.startswith("whole")]
    assert len(whole) == 4
    assert not any(each.constants for config in whole for each in tune_kernels.candidates("group_norm_silu", config))


def test_the_workloads_have_the_sizes_of_the_default_model():
    config = ModelConfig()
    assert list(CHANNELS) == config.num_channels and config.norm_num_groups == GROUPS
    assert {width for width in config.num_head_channels if width} == {HEAD_WIDTH} and config.num_latents == CONTEXT
    per_level, last = 2 * config.num_res_blocks + 1, len(CHANNELS) - 1
    assert tuple(per_level + 2 * (level == last) for level in range(4)) == BLOCKS
    attends = config.attention_levels
    assert tuple((per_level + (level == last)) * attends[level] for level in range(4)) == TRANSFORMERS


def test_launches_are_recorded_with_their_configurations():
    x = torch.randn(2, 64, 700).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(64, requires_grad=True), torch.randn(64)
    plain = tuning.launch_config
    forward = functools.partial(group_norm_silu, x, 2, weight, bias, backend="triton")
    y = forward()
    launches = kernel_launches.record_launches(forward)
    assert [(each.kernel, each.key) for each in launches] == [
        ("group_norm_silu", "statistics last"),
        ("group_norm_silu", "apply last"),
    ]
    assert tuning.launch_config is plain
    written = launches[1].repeat.args[1]
    assert torch.equal(written, y)
    written.zero_()
    launches[1].repeat()
    assert torch.equal(written, y)

    def backward():
        return torch.autograd.grad(y, [x, weight], torch.ones_like(y), retain_graph=True)

    keys = [each.key for each in kernel_launches.record_launches(backward)]
    assert keys == ["sums last", "input gradient last", "parameter gradients"]
    counts = {key: len(kernel_launches.launches_of("group_norm_silu", key, backward)) for key in keys}
    assert counts == {"sums last": 3, "input gradient last": 1, "parameter gradients": 1}


def test_launches_are_timed_in_a_graph(monkeypatch):
    """The order of what a capture allows, and the arithmetic: launches of 0.25 ms each, on a clock that they advance."""
    log, clock = [], [0.0]

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time = clock[0]

        def elapsed_time(self, end):
            assert log[-1] == "synchronize", "an event is read before the GPU has reached it"
            return end.time - self.time

    class Graph:
        def replay(self):
            clock[0] += 0.25 * log.count("captured")
            log.append("replay")

    @contextlib.contextmanager
    def graph(_):
        assert log.count("launch") >= 2, "a kernel is loaded in the capture"
        log.append("capture")
        yield
        log.append("captured all")

    def launch():
        captured = "capture" in log
        log.append("captured" if captured else "launch")
        clock[0] += 0.0 if captured else 0.25

    for name, fake in (("Event", Event), ("CUDAGraph", Graph), ("graph", graph)):
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    assert kernel_launches.time_in_graph([launch]) == pytest.approx(0.25e-3)
    assert log.count("captured") == 4 and log.count("replay") == 16


def tune_geglu(configs, measure=measure, **settings) -> tune_kernels.Tuned:
    return tune_kernels.tune_key("geglu", KEY, configs, {"small": call, "large": call}, KNOWN, measure, **settings)


def test_the_fastest_candidate_wins():
    configs = tune_kernels.candidates("geglu", SHIPPED)
    assert FASTER in configs
    tuned = tune_geglu(configs)
    assert tuned.config == FASTER and tuned.gain == pytest.approx(2.0) and len(tuned.times) == len(configs)
    assert in_effect() == SHIPPED
    # Without a gain the shipped configuration wins.
    assert tune_geglu(configs, lambda launches: 1.0)[:2] == (SHIPPED, 1.0)
    # After the deadline no further candidate is timed.
    assert len(tune_geglu(configs, deadline=-math.inf).times) == 1


def test_a_candidate_that_was_lucky_once_does_not_win():
    times = iter([2.0, 2.0, 1.0, 1.0])
    assert tune_geglu([SHIPPED, FASTER], lambda launches: next(times, 2.0))[:2] == (SHIPPED, 1.0)


def test_speedup_weighs_by_the_launches_of_a_step():
    known = {
        "a": Workload("k", "sampling", 3, lambda: call),
        "b": Workload("k", "sampling", 1, lambda: call),
        "c": Workload("k", "training", 5, lambda: call),
    }
    before, after = {"a": 2.0, "b": 4.0, "c": 9.0}, {"a": 1.0, "b": 2.0, "c": 18.0}
    assert tune_kernels.speedup(before, after, known) == pytest.approx(1.0)  # 10 / 5 and 45 / 90
    after = {"a": 3.0, "b": 1.0, "c": 9.0}
    assert tune_kernels.speedup(before, after, known) == pytest.approx(1.0)  # 10 / 10: faster and slower ones balance


@pytest.mark.parametrize(("factor", "verdict"), [(1.0, OK), (1.005, OK), (1.02, WRONG), (math.nan, WRONG)])
def test_a_candidate_with_another_result_is_wrong(factor, verdict):
    def run():
        return [torch.ones(2), torch.tensor([0.1, factor if in_effect() == FASTER else 1.0])]

    known = {"w": Workload("geglu", "sampling", 1, lambda: run)}
    assert kernel_trials._try(Trial(Candidate("geglu", KEY, FASTER), ["w"]), known, {}) == verdict


class Unpickled:
    """Calls a function in the process that receives it."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def test_a_trial_that_fails_crashes_or_hangs_harms_no_other():
    good = Trial(Candidate("geglu", KEY, FASTER), ["geglu level 3 sampling"])
    bad = good._replace(candidate=Candidate("geglu", KEY, LaunchConfig({"BLOCK_R": 3, "BLOCK_C": 512})))
    crash, hang = Trial(None, Unpickled(os._exit, 3)), Trial(None, Unpickled(time.sleep, 1000))
    with TrialPool(1, CPU, GRID) as pool:
        verdicts = pool.run([good, bad, good, crash, good], time.monotonic() + 300)
        assert verdicts[0] == verdicts[2] == verdicts[4] == OK
        assert "power of 2" in verdicts[1] and verdicts[3] == "its process ended with exit code 3"
        pool.seconds = 0.5
        assert pool.run([hang], time.monotonic() + 300) == ["it takes more than 0.5 s"]
        processes = [worker.process for worker in pool._idle]
        assert pool.run([good, good], -math.inf) == [kernel_trials.NOT_TRIED] * 2
    assert not any(process.is_alive() for process in processes)


def test_rehearsal(tmp_path, monkeypatch, capsys):
    """The whole run at a tiny size, cut off at the second configuration: what was found before is in both files."""
    monkeypatch.setattr(tuning, "tuned_file", lambda chip: tmp_path / "tuned" / f"{chip}.json")
    monkeypatch.setattr(tune_kernels, "MOST_CANDIDATES", 7)
    configs = tune_kernels.candidates("geglu", SHIPPED)
    assert FASTER in configs
    report = tmp_path / "new folder" / "report.json"

    def cut_off(launches) -> float:
        if ("geglu", "backward") in tuning._OVERRIDES:
            raise KeyboardInterrupt
        return 1.0 if in_effect() == FASTER else 2.0

    settings = {"seconds": 300.0, "workers": 2, "report": report, "grid": GRID}
    with pytest.raises(KeyboardInterrupt):
        tune_kernels.tune(CPU, "chip", ["geglu"], measure=cut_off, **settings)
    assert json.loads((tmp_path / "tuned" / "chip.json").read_text()) == {"geglu": {KEY: FASTER._asdict()}}
    ((key, entry),) = json.loads(report.read_text())["keys"].items()
    # Both keys are launched at two levels, equally often and long by this clock; only the forward one in sampling as well.
    assert key == "geglu forward" and entry["gain"] == pytest.approx(2.0) and entry["share"] == pytest.approx(0.75)
    names = {name for name, each in workloads(CPU, GRID).items() if each.kernel == "geglu" and "backward" not in name}
    assert [row["constants"] for row in entry["candidates"]] == [config.constants for config in configs]
    assert all(set(row["seconds"]) == names for row in entry["candidates"])
    assert "12 of 12 candidates" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.rglob("*.*")) == ["chip.json", "report.json"]


def test_a_written_configuration_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "tuned_file", lambda chip: tmp_path / f"{chip}.json")
    file = tune_kernels.write_config("chip", "geglu", KEY, FASTER)
    tune_kernels.write_config("chip", "geglu", "backward", FASTER)
    assert set(json.loads(file.read_text())["geglu"]) == {KEY, "backward"}
    tuning._measured.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "chip")
    try:
        assert tuning.launch_config("geglu", KEY, torch.device("cuda")) == FASTER
    finally:
        tuning._measured.cache_clear()
