"""What the benchmarks do on a slow machine: a faked clock runs at the machine's pace, so nothing is timed here."""

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
from ccella_fast import environment

CPU = torch.device("cpu")
QUICK = registry.select(["quick"], CPU)
HEADLINE = {"denoising_step", "training_step", "decode"}
EMULATED = {torch.float32: 6e10, torch.bfloat16: 2e9}  # FLOP/s, as measured on a CPU without bf16 instructions
NATIVE = {torch.float32: 5e11, torch.bfloat16: 1e12}


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-6  # so that nothing takes no time
        return self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    for module in (machine, timer, runner):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(perf_counter=fake))
    return fake


def fake_hardware(monkeypatch, clock, rates, *, convolution=1.0):
    """Matrix products and convolutions take the time that `rates` say, convolutions at a fraction of them."""

    def product(a, b):
        clock.now += 2 * len(a) ** 3 / rates[a.dtype]

    def conv3d(x, w, padding):
        clock.now += 2 * w.numel() * x[0, 0].numel() / (convolution * rates[x.dtype])

    def copy(device, seconds):
        clock.now += 1
        return 1e10

    monkeypatch.setattr(machine.torch, "mm", product)
    monkeypatch.setattr(machine.F, "conv3d", conv3d)
    monkeypatch.setattr(machine, "_copy_rate", copy)


def find_rates(**changes):
    settings = {"widths": [64, 128, 256, 512], "grid": [32, 32, 16], "budget": budget.LIMITS_SECONDS}
    return machine.rates(CPU, **settings | changes, on_progress=lambda text: None)


# The machine's limits


def test_rates_of_this_machine_are_found_for_every_precision():
    found = find_rates(widths=[8], grid=[4, 4, 4], budget=4.0)
    assert set(found["matmul_flops"]) == {"fp32", "bf16"} and found["copy_bytes_per_second"] > 1e8
    assert found["matmul_flops"]["fp32"] >= found["conv3d_flops"]["fp32"].get("8", 0.0) > 0


@pytest.mark.parametrize("convolution", [1.0, 0.15])  # an emulated convolution can be far slower than a product
def test_limits_keep_to_their_budget_where_bf16_is_emulated(monkeypatch, clock, convolution):
    monkeypatch.setattr(environment, "cpu_multiplies_bf16", lambda: False)
    fake_hardware(monkeypatch, clock, EMULATED, convolution=convolution)
    found = find_rates()
    assert clock.now < 1.3 * budget.LIMITS_SECONDS
    assert found["matmul_flops"]["bf16"] == pytest.approx(2e9, rel=1e-2)
    assert found["emulated"] == ["bf16"] and "bf16 2 GFLOP/s (emulated)" in machine.describe(found)
    assert any("bf16 matmul measured at 512 x 512" in line for line in found["reduced"])


def test_a_fast_machine_is_measured_at_full_size(monkeypatch, clock):
    """The control: nothing is reduced, and every convolution is there."""
    monkeypatch.setattr(environment, "cpu_multiplies_bf16", lambda: True)
    fake_hardware(monkeypatch, clock, NATIVE)
    found = find_rates()
    assert found["reduced"] == found["emulated"] == [] and "emulated" not in machine.describe(found)
    assert all(list(rates) == ["64", "128", "256", "512"] for rates in found["conv3d_flops"].values())


def test_what_a_limit_costs_without_a_budget(monkeypatch, clock):
    """The control: with an endless budget the same machine takes several times as long."""
    fake_hardware(monkeypatch, clock, EMULATED, convolution=0.15)
    find_rates(budget=float("inf"))
    assert clock.now > 3 * budget.LIMITS_SECONDS


# Rounds


def test_no_round_begins_past_the_time_that_a_case_may_take(clock):
    def side(stopwatch):
        clock.now += 10

    rounds = {most: len(timer.measure({"A": side}, CPU, budget=30, most=most)["A"].rounds) for most in (1, 25, 35, 1e9)}
    assert rounds == {1: 1, 25: 1, 35: 2, 1e9: 3}


def test_rounds_that_slow_down_do_not_go_on_past_their_budget(clock):
    """Two quick calls promise ten rounds; then something else wants the machine, and each takes eight times as long."""
    pace = iter([1.0, 1.0] + 30 * [8.0])

    def side(stopwatch):
        clock.now += next(pace)

    timings = timer.measure({"A": side}, CPU, budget=30)
    assert len(timings["A"].rounds) == 4


# Which cases, and how large


def limits(fp32: float, copy: float) -> dict:
    return {"matmul_flops": {"fp32": fp32}, "copy_bytes_per_second": copy}


@pytest.mark.parametrize(
    ("rates", "shrink", "kept"),
    [
        (limits(5e11, 4.4e10), 2, HEADLINE),
        (limits(1e11, 2e10), 4, HEADLINE),
        (limits(6e10, 1e10), 4, {"denoising_step", "training_step"}),
    ],
    ids=["of the estimates", "slow", "very slow"],
)
def test_headline_cases_are_kept_on_slow_machines(rates, shrink, kept):
    clock = Clock()
    plan = budget.Budget("cpu", 5, clock)
    clock.now += 1.3 * budget.LIMITS_SECONDS  # limits and noise
    assert plan.choose_latent(QUICK, rates, 2) == shrink
    assert {case.name for case in plan.fitting(QUICK)} >= kept
    if shrink == 4:  # the control: on the usual latent they do not fit
        plan.slow = budget.slowness(rates, 2)
        assert not {case.name for case in plan.fitting(QUICK)} >= kept


def test_what_users_ask_for_first_is_left_out_last():
    """In the order of the run `decode` and a kernel come before the training step; its time is kept for it."""
    plan = budget.Budget("cpu", 3, Clock())
    chosen = [case.name for case in plan.fitting(QUICK)]
    assert chosen[:2] == ["denoising_step", "decode"] and "training_step" in chosen
    plan.limit = 130.0
    assert [case.name for case in plan.fitting(QUICK)][:2] == ["denoising_step", "training_step"]
    in_order, left = [], plan.left()
    for case in QUICK:  # the control: first come, first served loses the training step
        if plan.needed(case) <= left:
            left -= plan.needed(case)
            in_order.append(case.name)
    assert "training_step" not in in_order


def test_estimates_follow_what_cases_took():
    plan, (first, second) = budget.Budget("cpu", 5, Clock()), QUICK[:2]
    before = plan.needed(second)
    plan.learn(first, 3 * first.set_up["cpu"] + 7, rounds=7)
    assert plan.needed(second) == pytest.approx(3 * before)
    plan = budget.Budget("cpu", 5, Clock())
    plan.learn(first, first.set_up["cpu"] / 9, rounds=0)  # a case that was quick does not promise equally quick ones
    assert plan.needed(second) == pytest.approx(before / 2)


def test_the_latent_shrinks_when_cases_turn_out_slower_than_their_estimates():
    """The limits promised a fast machine; the first case then took twice its estimate."""
    rates, plan = limits(5e11, 4.4e10), budget.Budget("cpu", 5, Clock())
    first = QUICK[0]
    assert plan.choose_latent(QUICK, rates, 2) == 2
    plan.limit = 180.0  # what is left once the first case is over
    assert plan.choose_latent(QUICK[1:], rates, 2) == 2  # the control
    plan.learn(first, 2 * first.set_up["cpu"], rounds=0)
    assert plan.choose_latent(QUICK[1:], rates, 2) == 4


# Whole runs of cases that only let the clock run


def toy(clock, name, seconds, **settings):
    """A case of two sides whose set-up and calls take `seconds` each."""

    def build(bench):
        clock.now += seconds
        sides = {
            side: benchmark_case.Implementation("fp32", lambda stopwatch: wait(clock, seconds))
            for side in ("reference", "ours")
        }
        return benchmark_case.PreparedCase(sides)

    return benchmark_case.BenchmarkCase(name, "sampler", "a toy", build, quick=("cpu",), **settings)


def wait(clock, seconds):
    clock.now += seconds


def measured(monkeypatch, clock, toys, *, minutes=5.0):
    monkeypatch.setattr(budget.Budget.__init__, "__defaults__", (clock,))
    monkeypatch.setattr(runner.BenchmarkRun, "_noise", lambda self: {"noise": 0.01})
    monkeypatch.setattr(
        runner.machine, "rates", lambda *_, **__: limits(5e11, 4.4e10) | {"reduced": [], "emulated": []}
    )
    monkeypatch.setattr(runner.timer, "overhead", lambda device: 1e-6)
    monkeypatch.setattr(runner.op_counts, "counted", lambda config: {})
    return runner.BenchmarkRun(CPU, minutes=minutes, command="").measure(toys, None, {})


def test_a_run_whose_estimates_were_far_too_low_ends_in_time_with_ratios(monkeypatch, clock):
    """Cases that take six times their estimate: fewer rounds, and the least important are left out with a reason."""
    toys = [
        toy(clock, "denoising_step", 12.0, budget=20, set_up={"cpu": 10}),
        toy(clock, "decode", 12.0, budget=20, set_up={"cpu": 10}),
        toy(clock, "training_step", 25.0, budget=30, set_up={"cpu": 15}),
    ]
    record = measured(monkeypatch, clock, toys)
    assert record["seconds"] < 300
    by_name = {case["name"]: case for case in record["cases"]}
    assert set(by_name) >= {"denoising_step", "training_step"}
    assert all(case["speedups"]["ours"]["median"] == pytest.approx(1) for case in record["cases"])
    assert set(record["left_out"]) | set(by_name) == {case.name for case in toys}
    assert all("s are left of the 5 minutes" in why for why in record["left_out"].values())


def test_a_quick_run_leaves_nothing_out(monkeypatch, clock):
    toys = [
        toy(clock, name, 0.5, budget=5, set_up={"cpu": 3}) for name in ("denoising_step", "decode", "training_step")
    ]
    record = measured(monkeypatch, clock, toys)
    assert len(record["cases"]) == 3 and record["left_out"] == {} and record["reduced"] == []
    assert all(case["sides"]["ours"]["seconds"]["n"] >= timer.LEAST_ROUNDS for case in record["cases"])


@pytest.mark.parametrize("set_up", [500.0, 100.0])
def test_a_case_is_given_up_when_the_time_is_over(monkeypatch, clock, set_up):
    """Its set-up alone takes longer than the run may; the control has time left for one round."""
    toys = [toy(clock, "denoising_step", 0.5, budget=5, set_up={"cpu": 3}), stuck(clock, set_up)]
    record = measured(monkeypatch, clock, toys)
    late = record["cases"][1]
    calls = [side["seconds"]["n"] for side in late["sides"].values()]
    if set_up == 500.0:
        assert late["status"] == "skipped" and "given up" in late["why"] and calls == [] and clock.now < 600
    else:
        assert late["status"] == "ok" and min(calls) >= 1 and record["seconds"] < 300
    assert record["cases"][0]["status"] == "ok"


def stuck(clock, seconds):
    """A training step whose set-up takes far longer than estimated."""
    case = toy(clock, "training_step", 1.0, budget=5, set_up={"cpu": 3})

    def build(bench):
        clock.now += seconds
        return case.build(bench)

    return dataclasses.replace(case, build=build)


def test_bf16_cases_are_for_those_who_ask_where_it_is_emulated(monkeypatch):
    every = registry.registry()
    monkeypatch.setattr(environment, "cpu_multiplies_bf16", lambda: False)
    found = registry.emulated(every, CPU)
    assert set(found) == {"training_step_bf16", "training_step_tuned"}
    assert all("emulates bf16" in why and f"--case {name}" in why for name, why in found.items())
    assert registry.emulated(every, torch.device("cuda")) == {}
    monkeypatch.setattr(environment, "cpu_multiplies_bf16", lambda: True)
    assert registry.emulated(every, CPU) == {}


@pytest.mark.parametrize("minutes", [5.0, 0.1])
def test_a_run_without_a_result_fails_and_says_so(monkeypatch, clock, tmp_path, capsys, minutes):
    toys = [toy(clock, "denoising_step", 0.5, budget=5, set_up={"cpu": 3})]
    record = measured(monkeypatch, clock, toys, minutes=minutes)
    monkeypatch.setattr(runner.BenchmarkRun, "measure", lambda *_, **__: record)
    code = run.main(["--case", "decode", "--json", str(tmp_path / "record.json")])
    out = capsys.readouterr().out
    assert json.loads((tmp_path / "record.json").read_text())["left_out"].keys() == (
        {"denoising_step"} if minutes < 1 else set()
    )
    assert (code, "NOTHING MEASURED" in out) == ((1, True) if minutes < 1 else (0, False))
