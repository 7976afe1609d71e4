"""The benchmarks: baselines, timer, comparison with the truth, machine, registry, command. Nothing is timed here."""

from __future__ import annotations

import ast
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
import run
import runner
import timer
from benchmark_fixtures import TINY, prepared_case, run_case
from ccella_fast import environment, nvml
from ccella_fast.config import Config, SchedulerConfig
from ccella_fast.models import build_model
from fixtures import Workbench

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# The reference and the compiled baseline


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


@pytest.mark.parametrize("wrong", [False, True], ids=["same-text", "other-text"])
def test_reference_equals_our_model_on_the_same_weights(tiny, wrong):
    shared = reference.shared_with(tiny)
    assert shared.unet.conv_in.conv.weight is tiny.unet.conv_in.conv.weight  # shared, not copied
    x, conditions = tiny_inputs()
    timesteps = torch.tensor([3, 700])
    if wrong:
        conditions = {**conditions, "text": conditions["text"].flip(1)[:, :4]}
    expected, logits = shared(x, timesteps, **tiny_inputs()[1])
    found = tiny(x, timesteps, **conditions)
    assert torch.allclose(found.noise, expected, rtol=1e-4, atol=1e-5) != wrong
    assert torch.allclose(found.class_logits, logits, rtol=1e-4, atol=1e-5) != wrong


@pytest.mark.parametrize("num_inference_steps", [1, 3], ids=["1-step", "3-steps"])
def test_sampling_loops_of_both_baselines_equal_ours(tiny, num_inference_steps):
    """With the same starting noise and step noise. Negative control: another seed in the loop."""
    from ccella_fast import sample
    from ccella_fast.diffusion.noise import generator, start_noise

    _, conditions = tiny_inputs()
    one = {name: value[:1] for name, value in conditions.items()}
    start = start_noise([4, 4, 4, 2], [5])
    ours = sample(
        lambda x, t: tiny(x, t, **one).noise, start, solver="ddpm", num_inference_steps=num_inference_steps, seeds=[5]
    )
    shared = reference.shared_with(tiny)
    compiled = compiled_baseline.CompiledSampler(tiny, SchedulerConfig(), torch.float32)
    for seed, equal in ((5, True), (6, num_inference_steps == 1)):
        noise = lambda seed=seed: generator(seed, "step")  # noqa: E731
        settings = {"config": SchedulerConfig(), "num_inference_steps": num_inference_steps}
        chain = reference.sample(shared, start, **one, **settings, generator=noise())
        compiled_chain = compiled(start, **one, num_inference_steps=num_inference_steps, source=noise())
        scale = float(ours.abs().max())
        assert (float((chain - ours).abs().max()) < 1e-3 * scale) == equal
        assert (float((compiled_chain - ours).abs().max()) < 1e-3 * scale) == equal


def test_reference_loss_equals_ours(tiny):
    from ccella_fast.data.loading.dataset import TrainingSample
    from ccella_fast.diffusion.objective import Objective
    from ccella_fast.training.batches import MicroBatch
    from ccella_fast.training.loop import joint_loss

    x, conditions = tiny_inputs()
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    pirads, known = torch.tensor([[100.0, 0.0], [0.0, 100.0]]), torch.tensor([True, False])
    studies = TrainingSample(["a", "b"], x, torch.zeros_like(x), pirads=pirads, has_class=known, **conditions)
    samples = MicroBatch(studies, latents=x, noise=noise, timesteps=torch.tensor([10, 900]), class_share=1.0)
    body = reference.ReferenceTrainingStep(reference.shared_with(tiny), SchedulerConfig(), weight=1e-2)
    parts = {**samples._asdict(), **studies._asdict()}
    batch = {key: value for key, value in parts.items() if isinstance(value, torch.Tensor)}
    ours = joint_loss(tiny, samples, Objective(), 1e-2)
    assert torch.allclose(body.loss(batch), ours.total, rtol=1e-5) and not torch.allclose(ours.noise, ours.total)


# Timer and profile


def test_slope_of_power_laws():
    assert timer.slope([(x, 3 * x**2) for x in (1, 2, 4, 8)]) == pytest.approx(2)
    assert timer.slope([(1, 5.0), (10, 5.0)]) == pytest.approx(0)
    assert timer.slope([(1, 8.0), (2, 4.0)]) == pytest.approx(-1)


def test_ratio_is_taken_within_rounds():
    """A round in which the machine was three times slower does not change it."""
    assert timer.ratio([2, 6, 2], [1, 3, 1])["median"] == 2
    assert timer.summary([4.0])["q1"] == 4.0 and timer.spread([1, 1, 1]) == 0


def test_quartiles_and_spread_equal_numpys():
    values = [5.0, 1.0, 2.0, 9.0, 4.0, 4.5]
    q1, median, q3 = np.percentile(values, [25, 50, 75])
    assert timer.summary(values) == pytest.approx({"median": median, "q1": q1, "q3": q3, "min": 1.0, "n": 6})
    assert timer.spread(values) == pytest.approx((q3 - q1) / 2 / median)


def test_short_calls_are_repeated_and_their_parts_add_up(monkeypatch):
    """1 + 2 ms in one part, 4 ms in another, 1 ms in none, on a fake clock; three calls fill the least time of 24 ms."""
    now, calls = [0.0], []
    monkeypatch.setattr(timer, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def call(stopwatch):
        calls.append(now[0])
        for part, seconds in (("a", 1e-3), ("b", 4e-3), ("a", 2e-3)):
            now[0] += seconds
            stopwatch.mark(part)
        now[0] += 1e-3

    timing = timer.measure({"A": call}, CPU, budget=0.081)["A"]
    assert timing.rounds == pytest.approx([8e-3] * 10) and len(calls) == 2 + 10
    assert timing.parts == {"a": pytest.approx([3e-3] * 10), "b": pytest.approx([4e-3] * 10)}
    monkeypatch.setattr(timer, "_LEAST_SECONDS", 0.024)
    again = timer.measure({"A": call}, CPU, budget=0.1)["A"]
    assert again.rounds == pytest.approx([8e-3] * 4) and len(calls) == 12 + 2 + 3 * 4
    assert again.parts["a"] == pytest.approx([3e-3] * 4)


def test_measure_interleaves_implementations_and_collects_parts():
    calls = []

    def implementation(name):
        def run(stopwatch):
            calls.append(name)
            stopwatch.mark("work")

        return run

    timings = timer.measure({"A": implementation("A"), "B": implementation("B")}, CPU, budget=0.0)
    timed = calls[4:]  # after a first and a second call of each
    first_round = timed[: len(timed) // timer.LEAST_ROUNDS]
    assert set(first_round) == {"A", "B"} and first_round == sorted(
        first_round
    )  # all of A, then all of B, in every round
    assert len(timings["A"].rounds) == timer.LEAST_ROUNDS and set(timings["A"].parts) == {"work"}


def test_roofline_is_the_slower_of_compute_and_memory():
    rates = {"matmul_flops": {"fp32": 100.0, "bf16": 1000.0}, "copy_bytes_per_second": 10.0}
    assert benchmark_case.Roofline(200, 10, "fp32", "").seconds(rates) == (2.0, "compute")
    assert benchmark_case.Roofline(200, 10, "bf16", "").seconds(rates) == (1.0, "memory")


def test_profile_assigns_ops_to_kinds_of_work():
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


def test_peak_memory_includes_temporary_allocations():
    size = 64 << 20
    kept = cases.memory.peak(lambda: torch.ones(size // 4).sum(), CPU)
    assert 0.9 * size < kept < 1.5 * size
    assert cases.memory.peak(lambda: None, CPU) < 8 << 20


# Comparison with the truth


@pytest.mark.parametrize(
    ("error", "twice_baseline_error", "right"),
    [
        pytest.param(1e-7, False, True, id="within-tolerance"),
        pytest.param(0.5, False, False, id="beyond-tolerance"),
        pytest.param(1e-5, True, False, id="beyond-twice-the-baseline's-error"),
    ],
)
def test_a_wrong_result_has_no_speedup(error, twice_baseline_error, right):
    """1e-5 is within the tolerance of fp32, but more than twice the baseline's own error."""
    row = run_case(prepared_case(error, twice_baseline_error=twice_baseline_error))
    assert row["status"] == ("ok" if right else "wrong") and ("ours" in row["speedups"]) == right
    assert row["sides"]["ours"]["seconds"]["n"] == timer.LEAST_ROUNDS and row["sides"]["ours"]["of_limit"] > 0


def test_a_failed_check_makes_the_result_wrong():
    def fails():
        raise AssertionError("not the same volumes")

    good, bad = prepared_case(1e-7), prepared_case(1e-7)
    good.check, bad.check = lambda: {"correlation": 0.99}, fails
    assert run_case(good)["facts"] == [("correlation", 0.99, "")] and run_case(good)["speedups"]
    assert run_case(bad)["status"] == "wrong" and not run_case(bad)["speedups"]


@pytest.mark.parametrize(("required", "verdict"), [(1e-3, "reached"), (1e3, "MISSED")])
def test_required_speedup_is_judged_and_printed(required, verdict):
    """Both implementations do the same work, so the speedup is close to 1."""
    prepared = prepared_case(1e-7)
    prepared.required_speedup = required
    row = run_case(prepared)
    assert row["status"] == "ok" and (f"required speedup, {verdict}", required, "x") in row["facts"]
    assert f"required speedup, {verdict} {required:.3g} x" in runner._outcome(row)


def test_a_wrong_result_does_not_reach_a_required_speedup():
    prepared = prepared_case(0.5)
    prepared.required_speedup = 1e-3
    row = run_case(prepared)
    assert row["status"] == "wrong" and row["facts"] == []


def test_nan_and_another_shape_are_wrong():
    truth = torch.ones(3)
    assert runner.relative_error(torch.tensor([1.0, float("nan"), 1.0]), truth) == float("inf")
    assert runner.relative_error(torch.ones(2), truth) == float("inf")
    assert runner.relative_error(truth, truth) == 0


def test_a_failing_case_does_not_stop_the_run():
    def broken(bench):
        raise RuntimeError("no such thing")

    def unfit(bench):
        raise benchmark_case.Skip("no GPU")

    bench = runner.BenchmarkRun(CPU, minutes=None, command="")
    rows = [bench._case(benchmark_case.BenchmarkCase("toy", "kernels", "", build), None) for build in (broken, unfit)]
    assert [row["status"] for row in rows] == ["failed", "skipped"]
    assert "no such thing" in rows[0]["why"] and rows[1]["why"] == "no GPU"


# The machine


def test_environment_warnings_name_known_problems():
    facts = {
        "cpu": {"quota": 2.0, "torch_threads": 8, "cores": 4, "multiplies_bf16": True},
        "gpu": [{"name": "H100"}], "cudnn": 90900,
        "packages": {"torch": "2.9.1+cu130", "triton": None, "pynvml": "13"},
        "settings": {"TRITON_INTERPRET": "1", "OMP_WAIT_POLICY": "passive"},
    }  # fmt: skip
    found = environment.environment_warnings(facts)
    words = [
        "2.9",
        "90900"[:1] + ".9",
        "Triton is not installed",
        "interpreter",
        "quota",
        "cores",
        "OMP_WAIT_POLICY",
        "pynvml",
    ]
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


def test_description_names_every_kernel_and_its_reason():
    facts = environment.describe_environment()
    text = environment.format_environment(facts)
    assert all(name in text and entry["why"] in text for name, entry in facts["kernels"].items()) and facts["kernels"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_open_gpu_returns_the_reason_without_a_driver():
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


# Registry and command


def test_registry_has_unique_names_and_quick_cases_for_both_devices():
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


def test_records_import_no_case():
    """benchmark_case.py is imported by the cases, and registry.py imports them: an import the other way would be a circle."""
    imported = set()
    for node in ast.walk(ast.parse((ROOT / "benchmarks" / "benchmark_case.py").read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert "timer" in imported and not any(name == "registry" or name.split(".")[0] == "cases" for name in imported)


def test_benchmark_modules_do_not_shadow_common_modules():
    """`python benchmarks/run.py` puts benchmarks/ first on the path."""
    names = {path.stem for path in (ROOT / "benchmarks").iterdir() if path.suffix == ".py"}
    third_party = {"profiling", "datasets", "evaluate", "kernels", "utils"}
    assert not names & (set(sys.stdlib_module_names) | third_party)


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_command_prints_the_plan_and_suggests_a_case(capsys):
    plan = run_command("--dry-run")
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
    """Set-up, comparison, timing and parts as at full size, with training through DeepSpeed in both precisions."""
    names = ["training_step", "training_step_bf16", "training_step_tuned", "denoising_step", "denoising_step_batch_8",
             "denoising_step_tuned", "sampling", "checkpoint"]  # fmt: skip
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks", ROOT / "tests" / "fixtures")))
    done = subprocess.run(
        [sys.executable, "-c", TINY_RUN, *names], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    # Skipped on machines without the memory for the full size.
    large = {"training_step", "training_step_bf16", "training_step_tuned", "checkpoint"}
    for name, row in rows.items():
        passed = row["status"] == "ok" or (row["status"] == "skipped" and name in large)
        assert passed, (name, row["status"], row["why"])
    assert set(rows["sampling"]["sides"]["ours"]["parts"]) == {"steps", "decode"}
    assert all(timed["passed"] for name in names[:7] for timed in rows[name]["sides"].values())
