"""The measuring instrument: counters, timer, gate, records, their comparison, the doctor, the door. Nothing is timed here."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

import benchmark_case
import cases.memory
import compiled_baseline
import profile_summary
import reference
import registry
import report
import results
import run
import runner
import timer
from benchmark_fixtures import TINY
from ccella_fast import environment, nvml
from ccella_fast.config import Config, SchedulerConfig
from ccella_fast.errors import DataError
from ccella_fast.models import build_model
from ccella_fast.storage import write_json
from fixtures import Workbench

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# The reference and the tuned peer


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = build_model("CCELLA", **{key: value for key, value in TINY.items() if key != "variant"})
    Workbench.fill_zeros(model)
    return model.eval()


def tiny_inputs():
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(2, *shape, generator=generator) for shape in ((4, 4, 4, 2), (8, 16)))
    return x, {"spacing": torch.tensor([[50.0, 50.0, 56.25]] * 2), "text": text}


@pytest.mark.parametrize("wrong", [False, True])
def test_reference_equals_our_model_on_the_same_weights(tiny, wrong):
    theirs = reference.shared_with(tiny)
    assert theirs.unet.conv_in.conv.weight is tiny.unet.conv_in.conv.weight  # shared, not copied
    x, conditions = tiny_inputs()
    timesteps = torch.tensor([3, 700])
    if wrong:
        conditions = {**conditions, "text": conditions["text"].flip(1)[:, :4]}
    expected, logits = theirs(x, timesteps, **tiny_inputs()[1])
    found = tiny(x, timesteps, **conditions)
    assert torch.allclose(found.noise, expected, rtol=1e-4, atol=1e-5) != wrong
    assert torch.allclose(found.class_logits, logits, rtol=1e-4, atol=1e-5) != wrong


@pytest.mark.parametrize("num_steps", [1, 3])
def test_reference_and_peer_loops_equal_ours(tiny, num_steps):
    """Our sampler's chain with the same start and the same noise. Negative control: another seed in the loop."""
    from ccella_fast import sample
    from ccella_fast.diffusion.noise import generator, start_noise

    _, conditions = tiny_inputs()
    one = {name: value[:1] for name, value in conditions.items()}
    start = start_noise([4, 4, 4, 2], [5])
    ours = sample(
        lambda x, t: tiny(x, t, **one).noise, start, solver="ddpm", num_steps=num_steps, seeds=[5]
    )  # fmt: skip
    theirs, peer = (
        reference.shared_with(tiny),
        compiled_baseline.CompiledSampler(tiny, SchedulerConfig(), torch.float32),
    )
    for seed, equal in ((5, True), (6, num_steps == 1)):
        noise = lambda seed=seed: generator(seed, "step")  # noqa: E731
        settings = {"config": SchedulerConfig(), "num_steps": num_steps}
        chain = reference.sample(theirs, start, **one, **settings, generator=noise())
        tuned = peer(start, **one, num_steps=num_steps, source=noise())
        scale = float(ours.abs().max())
        assert (float((chain - ours).abs().max()) < 1e-3 * scale) == equal
        assert (float((tuned - ours).abs().max()) < 1e-3 * scale) == equal


def test_reference_loss_equals_ours(tiny):
    from ccella_fast.diffusion.schedule import Schedule
    from ccella_fast.training.batches import MicroBatch
    from ccella_fast.training.loop import joint_loss

    x, conditions = tiny_inputs()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    pirads, known = torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([True, False])
    samples = MicroBatch(
        ids=["a", "b"], latents=x, noise=noise, timesteps=torch.tensor([10, 900]), pirads=pirads, has_class=known,
        class_share=1.0, **conditions,
    )  # fmt: skip
    body = reference.ReferenceTrainingStep(reference.shared_with(tiny), SchedulerConfig(), weight=1e-2)
    batch = {key: value for key, value in samples._asdict().items() if isinstance(value, torch.Tensor)}
    ours = joint_loss(tiny, samples, Schedule.from_config(SchedulerConfig()), 1e-2)
    assert torch.allclose(body.loss(batch), ours.total, rtol=1e-5) and not torch.allclose(ours.noise, ours.total)


# Arithmetic of the instrument


def test_slope():
    assert timer.slope([(x, 3 * x**2) for x in (1, 2, 4, 8)]) == pytest.approx(2)
    assert timer.slope([(1, 5.0), (10, 5.0)]) == pytest.approx(0)
    assert timer.slope([(1, 8.0), (2, 4.0)]) == pytest.approx(-1)


def test_ratio_is_of_neighbours():
    """A round in which the machine was three times slower changes nothing."""
    assert timer.ratio([2, 6, 2], [1, 3, 1])["median"] == 2
    assert timer.summary([4.0])["q1"] == 4.0 and timer.spread([1, 1, 1]) == 0


def test_quartiles_spread_and_noise():
    """Against numpy, whose percentiles interpolate alike."""
    values = [5.0, 1.0, 2.0, 9.0, 4.0, 4.5]
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    assert timer.summary(values) == pytest.approx({"median": median, "q1": q1, "q3": q3, "min": 1.0, "n": 6})
    assert timer.spread(values) == pytest.approx((q3 - q1) / 2 / median)


def test_a_short_call_is_repeated_and_its_parts_add_up(monkeypatch):
    """1 + 2 ms in one part, 4 ms in another, 1 ms in none, by a clock of our own; three calls fill a timed stretch of 24 ms."""
    now, calls = [0.0], []
    monkeypatch.setattr(timer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def side(stopwatch):
        calls.append(now[0])
        for part, seconds in (("a", 1e-3), ("b", 4e-3), ("a", 2e-3)):
            now[0] += seconds
            stopwatch.mark(part)
        now[0] += 1e-3

    timing = timer.measure({"A": side}, CPU, budget=0.081)["A"]
    assert timing.rounds == pytest.approx([8e-3] * 10) and len(calls) == 2 + 10
    assert timing.parts == {"a": pytest.approx([3e-3] * 10), "b": pytest.approx([4e-3] * 10)}
    monkeypatch.setattr(timer, "_LEAST_SECONDS", 0.024)
    again = timer.measure({"A": side}, CPU, budget=0.1)["A"]
    assert again.rounds == pytest.approx([8e-3] * 4) and len(calls) == 12 + 2 + 3 * 4
    assert again.parts["a"] == pytest.approx([3e-3] * 4)


def test_measure_interleaves_and_collects_parts():
    calls = []

    def side(name):
        def run(stopwatch):
            calls.append(name)
            stopwatch.mark("work")

        return run

    timings = timer.measure({"A": side("A"), "B": side("B")}, CPU, budget=0.0)
    a_round = [name for name in calls[4:]]  # after a first and a second call of each
    per_round = len(a_round) // timer.LEAST_ROUNDS
    half = a_round[:per_round]
    assert set(half) == {"A", "B"} and half == sorted(half)  # all of A, then all of B, in every round
    assert len(timings["A"].rounds) == timer.LEAST_ROUNDS and set(timings["A"].parts) == {"work"}


def test_floor_is_the_slower_of_compute_and_memory():
    rates = {"matmul_flops": {"fp32": 100.0, "bf16": 1000.0}, "copy_bytes_per_second": 10.0}
    assert benchmark_case.Roofline(200, 10, "fp32", "").seconds(rates) == (2.0, "compute")
    assert benchmark_case.Roofline(200, 10, "bf16", "").seconds(rates) == (1.0, "memory")


def test_kinds_of_work():
    assert (
        profile_summary.kind("aten::mkldnn_convolution") == "convolution"
        and profile_summary.kind("aten::silu") == "norm, SiLU"
    )
    assert (
        profile_summary.kind("ccella_fast::cross_attention") == "attention"
        and profile_summary.kind("aten::rand") == "other"
    )
    found = profile_summary.profiled(lambda: torch.ones(64, 64) @ torch.ones(64, 64), CPU)
    assert found["seconds_by_kind"]["linear"] > 0 and found["top_ops"]


def test_peak_memory_sees_an_allocation():
    size = 64 << 20
    kept = cases.memory.peak(lambda: torch.ones(size // 4).sum(), CPU)
    assert 0.9 * size < kept < 1.5 * size
    assert cases.memory.peak(lambda: None, CPU) < 8 << 20


# The gate


def prepared_case(error: float, *, twice: bool = False) -> benchmark_case.PreparedCase:
    truth = torch.tensor([1.0, -2.0, 4.0])
    work = lambda stopwatch: sum(range(200))  # noqa: E731
    prepared = benchmark_case.PreparedCase(truth=lambda: truth, twice=twice)
    prepared.implementations["reference"] = benchmark_case.Implementation("fp32", work, lambda: truth + 1e-6)
    prepared.implementations["ours"] = benchmark_case.Implementation("fp32", work, lambda: truth + 4 * error)
    prepared.rooflines["ours"] = benchmark_case.Roofline(1e3, 8, "fp32", "by hand")
    return prepared


def run_case(prepared: benchmark_case.PreparedCase) -> dict:
    bench = runner.BenchmarkRun(CPU, minutes=None, command="")
    bench.bench.machine = {"matmul_flops": {"fp32": 1e9}, "copy_bytes_per_second": 1e9}
    return bench._case(benchmark_case.BenchmarkCase("toy", "kernels", "a toy", lambda _: prepared, budget=0.0), None)


@pytest.mark.parametrize(("error", "twice", "right"), [(1e-7, False, True), (0.5, False, False), (1e-5, True, False)])
def test_no_speed_up_for_a_wrong_result(error, twice, right):
    """1e-5 is within the tolerance of fp32, but more than twice the baseline's own error."""
    row = run_case(prepared_case(error, twice=twice))
    assert row["status"] == ("ok" if right else "wrong") and ("ours" in row["speedups"]) == right
    assert row["sides"]["ours"]["seconds"]["n"] == timer.LEAST_ROUNDS and row["sides"]["ours"]["of_limit"] > 0


def test_a_check_after_the_rounds_is_a_gate_too():
    def fails():
        raise AssertionError("not the same volumes")

    good, bad = prepared_case(1e-7), prepared_case(1e-7)
    good.check, bad.check = lambda: {"correlation": 0.99}, fails
    assert run_case(good)["facts"] == [("correlation", 0.99, "")] and run_case(good)["speedups"]
    assert run_case(bad)["status"] == "wrong" and not run_case(bad)["speedups"]


def test_nan_and_another_shape_are_wrong():
    truth = torch.ones(3)
    assert runner.relative_error(torch.tensor([1.0, float("nan"), 1.0]), truth) == float("inf")
    assert runner.relative_error(torch.ones(2), truth) == float("inf")
    assert runner.relative_error(truth, truth) == 0


def test_a_case_that_cannot_run_takes_no_other_with_it():
    def broken(bench):
        raise RuntimeError("no such thing")

    def unfit(bench):
        raise benchmark_case.Skip("no GPU")

    bench = runner.BenchmarkRun(CPU, minutes=None, command="")
    rows = [bench._case(benchmark_case.BenchmarkCase("toy", "kernels", "", build), None) for build in (broken, unfit)]
    assert [row["status"] for row in rows] == ["failed", "skipped"]
    assert "no such thing" in rows[0]["why"] and rows[1]["why"] == "no GPU"


# Records


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
        "cases": [case], "counts": {"denoising step": {"ours": {"ops": 300, "bytes": 10, "flops": 5, "peak_bytes": 1}}},
        "seconds": 1.0,
    }  # fmt: skip


def test_record_round_trip_page_and_table(record, tmp_path):
    path = results.write(record, tmp_path / "some-cpu" / "2026-01-01-abc.json")
    assert results.read(path) == json.loads(path.read_text())
    report.write(record, tmp_path / "r.html", tmp_path / "r.png")
    page = (tmp_path / "r.html").read_text()
    assert "data:image/png;base64," in page and "http" not in page.replace("http-equiv", "")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "r-scaling.png").is_file()
    assert "toy" in report.table(record)
    assert "left out: big: no time" in report.table(record) and "reduced: latent 1 x 1 x 1" in report.table(record)
    assert "left out: no time" in page and "reduced: latent 1 x 1 x 1" in page
    text = results.write_markdown(tmp_path / "RESULTS.md", tmp_path).read_text()
    assert "## Some (R) CPU: `python benchmarks/run.py`" in text and "| toy | ours | fp32 |" in text
    assert "(results/some-cpu/2026-01-01-abc-scaling.png)" in text


def test_bars_of_the_picture():
    """Their lengths by hand: twice as fast; 40 % of the limit; a quarter and three quarters of the time, then half of that."""
    from matplotlib.figure import Figure

    work = {"seconds_by_kind": {"convolution": 7.0, "other": 3.0}}
    reference = {"precision": "fp32", "seconds": {"median": 4.0}, "parts": {"forward": 10.0, "backward": 30.0}}
    ours = {"precision": "fp32", "seconds": {"median": 2.0}, "parts": {"forward": 1.0}, "profile": work}
    ours |= {"of_limit": 0.4, "floor": {"limit": "compute", "seconds": 0.8}}
    sides = {"reference": reference, "ours": ours}
    case = {"name": "toy", "status": "ok", "sides": sides, "speedups": {"ours": {"median": 2.0}}}
    expected = {
        report._speedups: [(0, 1), (0, 2)], report._roofline: [(0, 40)], report._time_shares: [(0, 25), (25, 75), (0, 35), (35, 15)],
    }  # fmt: skip
    for draw, bars in expected.items():
        axis = Figure().subplots()
        draw(axis, [case])
        assert [(bar.get_x(), bar.get_width()) for bar in axis.patches] == [pytest.approx(bar) for bar in bars], draw


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda r: r.update(schema=99), "schema"),
        (lambda r: r.pop("rates"), "rates"),
        (lambda r: r["cases"][0].update(status="fine"), "cases.0.status"),
        (lambda r: r["cases"][0].update(status="wrong"), "cases.0.speedups"),  # a speed-up beside a wrong result
    ],
)
def test_records_of_another_form_are_refused(record, tmp_path, change, field):
    bad = copy.deepcopy(record)
    change(bad)
    write_json(tmp_path / "bad.json", bad)
    with pytest.raises(DataError) as caught:
        results.read(tmp_path / "bad.json")
    assert caught.value.field == field


def changed(record, *, factor=1.0, spread=0.0, noise=0.01, ops=300, machine="Some (R) CPU", speedup=2.0):
    new = copy.deepcopy(record)
    new["machine"], new["noise_floor"] = machine, {"noise": noise}
    for side in new["cases"][0]["sides"].values():
        side["seconds"]["median"], side["spread"] = 1.0, spread
    new["cases"][0]["sides"]["ours"]["seconds"]["median"] = factor
    new["cases"][0]["speedups"]["ours"]["median"] = speedup
    new["counts"]["denoising step"]["ours"]["ops"] = ops
    return new


@pytest.mark.parametrize(
    ("value", "text"), [(123.4, "123 s"), (1.0, "1 s"), (0.0456, "45.6 ms"), (1e-3, "1 ms"), (7.89e-6, "7.89 us")]
)
def test_seconds_are_written_in_their_unit(value, text):
    assert results.seconds(value) == text


@pytest.mark.parametrize(
    ("new", "worse"),
    [
        ({}, False),
        ({"factor": 1.04}, False),  # within 5 %
        ({"factor": 1.2}, True),
        ({"factor": 1.2, "spread": 0.12}, False),  # within twice both spreads
        ({"factor": 0.5}, False),
        ({"ops": 301}, True),  # counts have no noise
        ({"ops": 299}, False),
        ({"factor": 9.0, "machine": "another"}, False),  # seconds of another machine are not compared
        ({"machine": "another", "speedup": 1.5}, True),  # its ratios are
    ],
)
def test_what_counts_as_a_regression(record, new, worse):
    found, remarks = results.regressions(changed(record, **new), changed(record))
    assert bool(found) == worse, found
    assert bool(remarks) == ("machine" in new)


def test_the_noise_of_either_run_counts(record):
    """20 % slower, against twice the sum of both spreads, and against each run's noise floor."""

    def found(now, then):
        return bool(results.regressions(changed(record, factor=1.2, **now), changed(record, **then))[0])

    assert found({"spread": 0.04}, {"spread": 0.04}) and found({"noise": 0.15}, {"noise": 0.15})
    for now, then in ((0.06, 0.06), (0.12, 0.0), (0.0, 0.12)):
        assert not found({"spread": now}, {"spread": then})
    for now, then in ((0.25, 0.01), (0.01, 0.25)):
        assert not found({"noise": now}, {"noise": then})


def test_a_case_that_broke_is_a_regression(record):
    new = changed(record)
    new["cases"][0].update(status="failed", why="", speedups={})
    assert results.regressions(new, changed(record))[0] == ["toy: was ok, is failed"]


# The doctor


def test_known_traps_are_found():
    facts = {
        "cpu": {"quota": 2.0, "torch_threads": 8, "cores": 4, "multiplies_bf16": True},
        "gpu": [{"name": "H100"}], "cudnn": 90900,
        "packages": {"torch": "2.9.1+cu130", "triton": None, "pynvml": "13"},
        "settings": {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"},
    }  # fmt: skip
    found = environment.environment_warnings(facts)
    words = ["2.9", "90900"[:1] + ".9", "no Triton", "interpreter", "quota", "cores", "OMP_WAIT_POLICY", "pynvml"]
    assert all(any(word in line for line in found) for word in words) and len(found) == len(words)
    fine = {
        "cpu": {"quota": None, "torch_threads": 2, "cores": 2, "multiplies_bf16": True},
        "gpu": [{"name": "H100"}], "cudnn": 91900,
        "packages": {"torch": "2.11.0", "triton": "3.6.0", "pynvml": None}, "settings": {},
    }  # fmt: skip
    assert environment.environment_warnings(fine) == []
    assert len(environment.environment_warnings({**fine, "cudnn": 91100})) == 1
    slow = {
        **fine, "gpu": [], "cudnn": None, "packages": {**fine["packages"], "torch": "2.14.0+cpu"},
        "cpu": {**fine["cpu"], "instructions": ["amx_bf16", "amx_fp16"]},
    }  # fmt: skip
    assert [("193951" in line) for line in environment.environment_warnings(slow)] == [True]
    assert environment.environment_warnings({**slow, "packages": {**slow["packages"], "torch": "2.14.1+cpu"}}) == []
    assert environment.environment_warnings({**slow, "cpu": {**slow["cpu"], "instructions": ["amx_bf16"]}}) == []


def test_card_names_every_kernel_and_its_reason():
    facts = environment.describe_environment()
    text = environment.format_environment(facts)
    assert all(name in text and entry["why"] in text for name, entry in facts["kernels"].items()) and facts["kernels"]


def test_absent_driver_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert isinstance(nvml.open_gpu(), str)


def test_monitor_averages_and_collects_reasons():
    class Gpu:
        joules, readings = 0.0, 0

        def read(self):
            self.readings += 1
            held = ["power cap"] if self.readings == 2 else []
            return nvml.Reading(50.0 * (self.readings % 2), 1000.0, 2000.0, 300.0, 10.0 * self.readings, 60.0, held)

        def energy(self):
            self.joules += 7
            return self.joules

    with nvml.Monitor(Gpu(), interval=60) as monitor:
        pass
    facts = monitor.summary()
    assert facts["utilisation"] == 25 and facts["energy"] == 7 and facts["memory"] == 20
    assert facts["held_back_by"] == ["power cap"] and facts["readings"] == 2


# Registry and door


def test_registry():
    every = registry.registry()
    names = [case.name for case in every]
    assert len(set(names)) == len(names) and {case.suite for case in every} <= set(benchmark_case.SUITES)
    for device in ("cpu", "cuda"):
        quick = registry.select(["quick"], torch.device(device))
        assert {"denoising_step", "decode", "training_step", "group_norm_silu"} <= {case.name for case in quick}
    assert len(registry.select(["all"], CPU)) == len(every) > len(registry.select(["kernels"], CPU))


def test_shapes_follow_the_configuration():
    import cases.kernels

    for channels in ([64, 128, 256, 512], [32, 64, 128, 256]):
        bench = Workbench(CPU, Config.model_validate({"model": {"num_channels": channels}}))
        x = cases.kernels.group_norm_silu_case(bench, level=1).shapes["inputs"][0]
        q = cases.kernels.attention_case(bench).shapes["inputs"][0]
        assert x[1] == channels[1] and q[1] == channels[2] // 32
        assert x[2:] == [axis // 2 for axis in bench.latent_grid]


def test_no_file_beside_run_py_shadows_a_common_module():
    """`python benchmarks/run.py` puts benchmarks/ first on the path."""
    names = {path.stem for path in (ROOT / "benchmarks").iterdir() if path.suffix == ".py"}
    taken = {
        "types",
        "profile",
        "profiling",
        "logging",
        "datasets",
        "evaluate",
        "kernels",
        "utils",
        "statistics",
        "token",
    }
    assert not names & (set(sys.stdlib_module_names) | taken)


def door(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_door_dry_run_and_usage(capsys):
    plan = door("--dry-run")
    assert plan.returncode == 0 and "case     sampler/denoising_step" in plan.stdout and "minutes" in plan.stdout
    assert run.main(["--case", "denoising_stop"]) == 2 and "did you mean 'denoising_step'?" in capsys.readouterr().err


TINY_RUN = """
import dataclasses, json, sys, torch, registry, runner
from ccella_fast.config import make_config
from benchmark_fixtures import TINY
from fixtures import Workbench
sizes = {f"model.{key}": value for key, value in (TINY | {"latent_channels": [4]}).items()}
vae = {"autoencoder.num_channels": [8, 16, 16], "autoencoder.norm_num_groups": 8}
config = make_config({**sizes, **vae, "data.dim": [64, 64, 32], "text.max_length": 8, "training.batch_size": 2})
run = runner.BenchmarkRun(torch.device("cpu"), minutes=None, command="", debug=True)
run.bench = Workbench(torch.device("cpu"), config)
run.bench.machine = {"matmul_flops": {"fp32": 1e11, "bf16": 1e12}, "copy_bytes_per_second": 1e10}
known = {case.name: dataclasses.replace(case, budget=0.0) for case in registry.registry()}
print(json.dumps({name: run._case(known[name], None) for name in sys.argv[1:]}))
"""


def test_whole_cases_at_a_tiny_size():
    """Set-up, gate, timing and parts as at full size, training through DeepSpeed in both precisions."""
    names = ["training_step", "training_step_bf16", "training_step_tuned", "denoising_step", "denoising_step_batch_8",
             "denoising_step_tuned", "sampling", "checkpoint"]  # fmt: skip
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests" / "fixtures")))
    done = subprocess.run(
        [sys.executable, "-c", TINY_RUN, *names], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    short = {
        "training_step_bf16",
        "training_step_tuned",
        "training_step",
        "checkpoint",
    }  # of memory for the full size: skipped
    for name, row in rows.items():
        assert row["status"] == "ok" or (row["status"] == "skipped" and name in short), (
            name,
            row["status"],
            row["why"],
        )
    assert set(rows["sampling"]["sides"]["ours"]["parts"]) == {"steps", "decode"}
    assert all(side["passed"] for name in names[:7] for side in rows[name]["sides"].values())
