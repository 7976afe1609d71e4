"""The benchmarks on slow machines, simulated by a fake clock that runs at the machine's pace. Nothing is timed here."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch

import benchmark_case
import budget
import machine
import registry
import run
import runner
import timer
from ccella_fast import hardware

CPU = torch.device("cpu")
QUICK = registry.select(["quick"], CPU)
HEADLINES = {"denoising_step", "training_step", "decode"}
EMULATED = {torch.float32: 6e10, torch.bfloat16: 2e9}  # FLOP/s, as measured on a CPU without bf16 instructions
NATIVE = {torch.float32: 5e11, torch.bfloat16: 1e12}


class Clock:
    """A clock that advances a little with every reading, and otherwise when `now` is increased."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6  # so that no measured time is zero
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    for module in (machine, timer, runner):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=fake))
    return fake


def fake_hardware(monkeypatch, clock, rates, *, convolution=1.0):
    """Matrix products take the time that follows from `rates`, convolutions run at a fraction `convolution` of them."""

    def mm(a, b):
        clock.now += 2 * len(a) ** 3 / rates[a.dtype]

    def conv3d(x, w, padding):
        clock.now += 2 * w.numel() * x[0, 0].numel() / (convolution * rates[x.dtype])

    def copy_rate(device, seconds):
        clock.now += 1
        return 1e10

    monkeypatch.setattr(machine.torch, "mm", mm)
    monkeypatch.setattr(machine.F, "conv3d", conv3d)
    monkeypatch.setattr(machine, "_copy_rate", copy_rate)


def find_rates(**changes):
    settings = {"widths": [64, 128, 256, 512], "grid": [32, 32, 16], "budget": budget.LIMITS_SECONDS}
    return machine.rates(CPU, **settings | changes, on_progress=lambda text: None)


# The machine's limits


def test_rates_of_this_machine_are_measured_in_every_precision():
    found = find_rates(widths=[8], grid=[4, 4, 4], budget=4.0)
    assert set(found["matmul_flops"]) == {"fp32", "bf16"} and found["copy_bytes_per_second"] > 1e8
    assert found["matmul_flops"]["fp32"] >= found["conv3d_flops"]["fp32"].get("8", 0.0) > 0


# An emulated convolution can be much slower than a matrix product.
@pytest.mark.parametrize("convolution", [1.0, 0.15], ids=["equal-convolutions", "slow-convolutions"])
def test_limits_keep_to_their_budget_with_emulated_bf16(monkeypatch, clock, convolution):
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: False)
    fake_hardware(monkeypatch, clock, EMULATED, convolution=convolution)
    found = find_rates()
    assert clock.now < 1.3 * budget.LIMITS_SECONDS
    assert found["matmul_flops"]["bf16"] == pytest.approx(2e9, rel=1e-2)
    assert found["emulated"] == ["bf16"] and "bf16 2 GFLOP/s (emulated)" in machine.describe(found)
    assert any("bf16 matmul measured at 512 x 512" in line for line in found["reduced"])


def test_a_fast_machine_is_measured_at_full_size(monkeypatch, clock):
    """Negative control: nothing is reduced, and every convolution is measured."""
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: True)
    fake_hardware(monkeypatch, clock, NATIVE)
    found = find_rates()
    assert found["reduced"] == found["emulated"] == [] and "emulated" not in machine.describe(found)
    assert all(list(rates) == ["64", "128", "256", "512"] for rates in found["conv3d_flops"].values())


def test_limits_without_a_budget_take_much_longer(monkeypatch, clock):
    """Negative control: with an infinite budget the same machine takes several times as long."""
    fake_hardware(monkeypatch, clock, EMULATED, convolution=0.15)
    find_rates(budget=float("inf"))
    assert clock.now > 3 * budget.LIMITS_SECONDS


# Rounds


def test_no_round_begins_after_the_time_of_a_case(clock):
    def call(stopwatch):
        clock.now += 10

    rounds = {most: len(timer.measure({"A": call}, CPU, budget=30, most=most)["A"].rounds) for most in (1, 25, 35, 1e9)}
    assert rounds == {1: 1, 25: 1, 35: 2, 1e9: 3}


def test_rounds_that_slow_down_keep_to_their_budget(clock):
    """After two quick calls ten rounds are expected; then another program slows the machine down by a factor of eight."""
    pace = iter([1.0, 1.0] + 30 * [8.0])

    def call(stopwatch):
        clock.now += next(pace)

    timings = timer.measure({"A": call}, CPU, budget=30)
    assert len(timings["A"].rounds) == 4


# Selection of cases and size of the latent


def limits(fp32: float, copy: float) -> dict:
    return {"matmul_flops": {"fp32": fp32}, "copy_bytes_per_second": copy}


@pytest.mark.parametrize(
    ("rates", "shrink", "kept"),
    [
        (limits(5e11, 4.4e10), 2, HEADLINES),
        (limits(1e11, 2e10), 4, HEADLINES),
        (limits(6e10, 1e10), 4, {"denoising_step", "training_step"}),
    ],
    ids=["machine-of-the-estimates", "slow", "very-slow"],
)
def test_headline_cases_are_kept_on_slow_machines(rates, shrink, kept):
    clock = Clock()
    plan = budget.Budget("cpu", 5, clock)
    clock.now += 1.3 * budget.LIMITS_SECONDS  # limits and noise
    assert plan.choose_latent(QUICK, rates, 2) == shrink
    assert {case.name for case in plan.fitting(QUICK)} >= kept
    if shrink == 4:  # negative control: on the usual latent they do not fit
        plan.slow = budget.slowness(rates, 2)
        assert not {case.name for case in plan.fitting(QUICK)} >= kept


def test_headline_cases_are_left_out_last():
    """`decode` and a kernel run before the training step, but its time is reserved."""
    plan = budget.Budget("cpu", 3, Clock())
    chosen = [case.name for case in plan.fitting(QUICK)]
    assert chosen[:2] == ["denoising_step", "decode"] and "training_step" in chosen
    plan.limit = 130.0
    assert [case.name for case in plan.fitting(QUICK)][:2] == ["denoising_step", "training_step"]
    in_order, left = [], plan.left()
    for case in QUICK:  # negative control: in the order of the run there is no time for the training step
        if plan.needed(case) <= left:
            left -= plan.needed(case)
            in_order.append(case.name)
    assert "training_step" not in in_order


def test_estimates_follow_the_times_of_earlier_cases():
    plan, (first, second) = budget.Budget("cpu", 5, Clock()), QUICK[:2]
    before = plan.needed(second)
    plan.learn(first, 3 * first.set_up["cpu"] + 7, rounds=7)
    assert plan.needed(second) == pytest.approx(3 * before)
    plan = budget.Budget("cpu", 5, Clock())
    plan.learn(first, first.set_up["cpu"] / 9, rounds=0)  # after a quick case others are not expected to be as quick
    assert plan.needed(second) == pytest.approx(before / 2)


def test_the_latent_shrinks_when_cases_exceed_their_estimates():
    """By its limits the machine is fast; then the first case takes twice its estimate."""
    rates, plan = limits(5e11, 4.4e10), budget.Budget("cpu", 5, Clock())
    first = QUICK[0]
    assert plan.choose_latent(QUICK, rates, 2) == 2
    plan.limit = 180.0  # leaves little time after the first case
    assert plan.choose_latent(QUICK[1:], rates, 2) == 2  # negative control
    plan.learn(first, 2 * first.set_up["cpu"], rounds=0)
    assert plan.choose_latent(QUICK[1:], rates, 2) == 4


# Whole runs, with cases that only advance the clock


def toy(clock, name, seconds, **settings):
    """A case with two implementations, whose set-up and calls take `seconds` each."""

    def build(bench):
        clock.now += seconds
        implementations = {
            name: benchmark_case.Implementation("fp32", lambda stopwatch: wait(clock, seconds))
            for name in ("reference", "ours")
        }
        return benchmark_case.PreparedCase(implementations)

    return benchmark_case.BenchmarkCase(name, "sampler", "a toy", build, quick=("cpu",), **settings)


def wait(clock, seconds):
    clock.now += seconds


def record_of(monkeypatch, clock, toys, *, minutes=5.0):
    monkeypatch.setattr(budget.Budget.__init__, "__defaults__", (clock,))
    monkeypatch.setattr(runner.BenchmarkRun, "_noise", lambda self: {"noise": 0.01})
    monkeypatch.setattr(
        runner.machine, "rates", lambda *_, **__: limits(5e11, 4.4e10) | {"reduced": [], "emulated": []}
    )
    monkeypatch.setattr(runner.timer, "overhead", lambda device: 1e-6)
    monkeypatch.setattr(runner.op_counts, "counted", lambda config: {})
    return runner.BenchmarkRun(CPU, minutes=minutes, command="").measure(toys, None, {})


def test_a_run_with_estimates_far_too_low_ends_in_time_with_speedups(monkeypatch, clock):
    """Cases take six times their estimate: they get fewer rounds, and the least important are left out with a reason."""
    toys = [
        toy(clock, "denoising_step", 12.0, budget=20, set_up={"cpu": 10}),
        toy(clock, "decode", 12.0, budget=20, set_up={"cpu": 10}),
        toy(clock, "training_step", 25.0, budget=30, set_up={"cpu": 15}),
    ]
    record = record_of(monkeypatch, clock, toys)
    assert record["seconds"] < 300
    by_name = {case["name"]: case for case in record["cases"]}
    assert set(by_name) >= {"denoising_step", "training_step"}
    assert all(case["speedups"]["ours"]["median"] == pytest.approx(1) for case in record["cases"])
    assert set(record["left_out"]) | set(by_name) == {case.name for case in toys}
    assert all("s are left of the 5 minutes" in why for why in record["left_out"].values())


def test_a_run_on_a_fast_machine_leaves_nothing_out(monkeypatch, clock):
    toys = [
        toy(clock, name, 0.5, budget=5, set_up={"cpu": 3}) for name in ("denoising_step", "decode", "training_step")
    ]
    record = record_of(monkeypatch, clock, toys)
    assert len(record["cases"]) == 3 and record["left_out"] == {} and record["reduced"] == []
    assert all(case["sides"]["ours"]["seconds"]["n"] >= timer.LEAST_ROUNDS for case in record["cases"])


@pytest.mark.parametrize("set_up", [500.0, 100.0], ids=["longer-than-the-run", "time-for-one-round"])
def test_a_case_is_given_up_when_the_time_is_over(monkeypatch, clock, set_up):
    """The set-up alone takes longer than the run may; in the negative control there is time for one round."""
    toys = [toy(clock, "denoising_step", 0.5, budget=5, set_up={"cpu": 3}), with_slow_set_up(clock, set_up)]
    record = record_of(monkeypatch, clock, toys)
    late = record["cases"][1]
    rounds = [timed["seconds"]["n"] for timed in late["sides"].values()]
    if set_up == 500.0:
        assert late["status"] == "skipped" and "given up" in late["why"] and rounds == [] and clock.now < 600
    else:
        assert late["status"] == "ok" and min(rounds) >= 1 and record["seconds"] < 300
    assert record["cases"][0]["status"] == "ok"


def with_slow_set_up(clock, seconds):
    """A training step whose set-up takes much longer than estimated."""
    case = toy(clock, "training_step", 1.0, budget=5, set_up={"cpu": 3})

    def build(bench):
        clock.now += seconds
        return case.build(bench)

    return dataclasses.replace(case, build=build)


def test_bf16_cases_are_left_out_where_bf16_is_emulated(monkeypatch):
    every = registry.registry()
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: False)
    found = registry.emulated(every, CPU)
    assert set(found) == {"training_step_bf16", "training_step_tuned"}
    assert all("emulates bf16" in why and f"--case {name}" in why for name, why in found.items())
    assert registry.emulated(every, torch.device("cuda")) == {}
    monkeypatch.setattr(hardware, "cpu_multiplies_bf16", lambda: True)
    assert registry.emulated(every, CPU) == {}


@pytest.mark.parametrize("minutes", [5.0, 0.1], ids=["5-minutes", "6-seconds"])
def test_a_run_without_a_result_fails_and_reports_it(monkeypatch, clock, tmp_path, capsys, minutes):
    toys = [toy(clock, "denoising_step", 0.5, budget=5, set_up={"cpu": 3})]
    record = record_of(monkeypatch, clock, toys, minutes=minutes)
    monkeypatch.setattr(runner.BenchmarkRun, "measure", lambda *_, **__: record)
    code = run.main(["--case", "decode", "--json", str(tmp_path / "record.json")])
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["left_out"].keys() == (
        {"denoising_step"} if minutes < 1 else set()
    )
    assert (code, "NOTHING MEASURED" in out) == ((1, True) if minutes < 1 else (0, False))
