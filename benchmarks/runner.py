"""One run of the benchmarks: measure the machine's limits, then set up, check and time each case; the result is a record.

Correctness comes before speed: the output of every implementation is compared with the truth, and a case with a wrong result
has no speedups.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import machine
import op_counts
import profile_summary
import results
import timer
from benchmark_case import BenchmarkCase, PreparedCase, Skip
from budget import LIMITS_SECONDS, Budget
from ccella_fast.config import Config
from ccella_fast.environment import describe_environment, environment_warnings, format_environment
from ccella_fast.errors import CcellaError
from ccella_fast.hardware import cpu_name
from ccella_fast.nvml import Gpu, Monitor, open_gpu
from fixtures import Workbench


class BenchmarkRun:
    """A run on one device.

    Args:
        device: The device to measure.
        minutes: Time limit; None for no limit.
        command: The command that repeats the run, for the record.
        debug: Print the traceback of a case that fails.
    """

    def __init__(self, device: torch.device, *, minutes: float | None, command: str, debug: bool = False):
        self.device, self.command, self.debug = device, command, debug
        self.budget = Budget(device.type, minutes)
        self.bench = Workbench(device, Config(), self._show_progress)
        self.give_up = math.inf  # time on the clock at which the case under way is skipped
        self.reduced: list[str] = []  # sentences on what was measured at less than its usual size
        self.name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
        self.gpu: Gpu | str = open_gpu() if device.type == "cuda" else "no GPU"

    def plan(self, cases: list[BenchmarkCase]) -> str:
        """The cases that would run, their sizes and a rough time, as text."""
        model, kind = self.bench.config.model, self.device.type
        seconds = min(self.budget.limit, LIMITS_SECONDS + sum(case.seconds(kind) for case in cases))
        head = [
            f"machine  {self.name}, {torch.get_num_threads()} threads",
            f"model    {model.variant}, channels {model.num_channels}, latent {self.bench.latent_grid}, "
            f"text {self.bench.config.text.max_length} x {model.input_dim}",
            f"time     about {seconds / 60:.0f} minutes",
        ]
        return "\n".join(head + [f"case     {case.suite}/{case.name}: {case.about}" for case in cases])

    def measure(
        self,
        cases: list[BenchmarkCase],
        traces: Path | None,
        left_out: dict[str, str],
        save: Callable[[dict[str, Any]], Any] = lambda record: None,
    ) -> dict[str, Any]:
        """Measure the limits of the machine and all cases that fit the time limit.

        Args:
            cases: The cases to run, in order.
            traces: Folder for profiler traces; None for no traces.
            left_out: Requested cases that are not among `cases`, with the reason. Cases that do not fit are added in the
                record.
            save: Called with the record after every case, so that a run that is interrupted keeps what it has measured.

        Returns:
            The record, in the form that `results.check` describes.
        """
        logging.getLogger("ccella_fast").setLevel(logging.WARNING)  # log lines of the cases would break up the table
        environment = describe_environment()
        found = environment_warnings(environment)
        print(self._card(environment), flush=True)
        grid, widths = self.bench.latent_grid, self.bench.config.model.num_channels
        rates = machine.rates(
            self.device, widths=widths, grid=grid, budget=LIMITS_SECONDS, on_progress=self._show_progress
        )
        self.bench.machine, self.reduced = rates, list(rates["reduced"])
        self._show_progress("noise floor")
        noise, overhead = self._noise(), timer.overhead(self.device)
        self._print(f"limits      {machine.describe(rates)}")
        self._print(f"noise       A against A {noise['noise']:.1%}, the runner itself {overhead * 1e6:.1f} us a call")
        self.label = "counts"
        self._show_progress("ops, bytes and FLOPs on meta tensors")
        record = {
            "schema": results.SCHEMA, "date": results.now(), "commit": results.commit(), "command": self.command,
            "device": self.device.type, "machine": self.name, "environment": environment, "warnings": found,
            "rates": rates, "noise_floor": noise, "overhead_seconds": overhead, "telemetry": self._telemetry(), "cases": [],
            "counts": op_counts.counted(self.bench.config), "reduced": self.reduced, "left_out": dict(left_out),
            "seconds": round(self.budget.spent(), 1),
        }  # fmt: skip
        for number, case in enumerate(cases):
            self._choose_latent(cases[number:])
            fitting = self.budget.fitting(cases[number:])
            if case not in fitting:
                record["left_out"][case.name] = self.budget.why_not(case)
                continue
            self.label = f"[{number + 1}/{len(cases)}] {case.name}"
            record["cases"].append(self._case(case, traces, seconds=self.budget.allowed(fitting)))
            self._print(f"{self.label}: {_outcome(record['cases'][-1])}")
            record["seconds"] = round(self.budget.spent(), 1)
            save(record)
        self.bench.release()
        self._show_progress("")
        return record

    def _choose_latent(self, waiting: list[BenchmarkCase]) -> None:
        whole = self.bench.latent_grid
        self.bench.shrink = self.budget.choose_latent(waiting, self.bench.machine, self.bench.shrink)
        if self.bench.latent_grid != whole:
            small, large = (" x ".join(map(str, grid)) for grid in (self.bench.latent_grid, whole))
            self.reduced.append(
                f"from {waiting[0].name} on: latent {small} in place of {large}, where the most important cases would not fit"
            )
            self._print(f"reduced     {self.reduced[-1]}")

    def _case(self, case: BenchmarkCase, traces: Path | None, seconds: float = math.inf) -> dict[str, Any]:
        """The record of one case, which should take at most `seconds`."""
        begin = time.perf_counter()
        self.give_up = begin + self.budget.left()
        row: dict[str, Any] = {
            "name": case.name, "suite": case.suite, "about": case.about, "status": "ok", "why": "", "shapes": {},
            "sides": {}, "speedups": {}, "facts": [], "curves": {}, "missing": {}, "notes": [],
        }  # fmt: skip
        try:
            self._show_progress("setting up")
            prepared = case.build(self.bench)
            row |= {key: getattr(prepared, key) for key in ("shapes", "facts", "missing", "notes", "curves")}
            self._run(case, prepared, row, traces, begin + seconds)
        except Skip as why:
            row |= {"status": "skipped", "why": str(why)}
        except torch.OutOfMemoryError as error:
            row |= {"status": "failed", "why": f"out of memory: {str(error).splitlines()[0]:.150}", "speedups": {}}
        except CcellaError as error:
            row |= {"status": "failed", "why": error.why, "speedups": {}}
        except Exception as error:  # the other cases still run; the exit code reports the failure
            row |= {"status": "failed", "why": f"{type(error).__name__}: {str(error):.300}", "speedups": {}}
            if self.debug:
                traceback.print_exc()
        self.give_up = math.inf
        prepared = None  # frees its memory before the next case
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        row["case_seconds"] = round(time.perf_counter() - begin, 1)
        if row["status"] == "ok":
            rounds = sum(sum(timed["rounds"]) * timed["calls"] for timed in row["sides"].values())
            self.budget.learn(case, row["case_seconds"], rounds)
        return row

    def _run(
        self, case: BenchmarkCase, prepared: PreparedCase, row: dict[str, Any], traces: Path | None, end: float
    ) -> None:
        """Check and time a prepared case; after `end` on the clock no further round begins."""
        if not prepared.implementations:
            return
        errors = self._errors(prepared)
        with self._nvtx(case.name), self._monitor() as monitor:
            timings = timer.measure(
                {name: implementation.run for name, implementation in prepared.implementations.items()}, self.device,
                budget=case.rounds_budget(self.device.type), most=end - time.perf_counter(), on_progress=self._show_progress,
            )  # fmt: skip
        if isinstance(monitor, Monitor):
            row["telemetry"] = monitor.summary()
        for name, timing in timings.items():
            implementation = prepared.implementations[name]
            per_call = [value / implementation.calls for value in timing.rounds]
            parts = {
                part: timer.summary(values)["median"] / implementation.calls for part, values in timing.parts.items()
            }
            facts: dict[str, Any] = {
                "precision": implementation.precision, "seconds": timer.summary(per_call), "spread": timer.spread(per_call),
                "first_call": timing.first, "rounds": per_call, "calls": implementation.calls, "parts": parts,
            }  # fmt: skip
            if name in errors:
                passed = errors[name] <= prepared.allowed_error(implementation.precision, errors)
                facts |= {"error": errors[name] if math.isfinite(errors[name]) else None, "passed": passed}
            if name in prepared.rooflines:
                roofline = prepared.rooflines[name]
                least, limit = roofline.seconds(self.bench.machine)
                facts["floor"] = {"seconds": least, "limit": limit, "flops": roofline.flops, "bytes": roofline.bytes,
                                  "derivation": roofline.derivation}  # fmt: skip
                facts["of_limit"] = least / facts["seconds"]["median"]
            row["sides"][name] = facts
        rounds = min(len(timing.rounds) for timing in timings.values())
        if rounds < timer.LEAST_ROUNDS:
            self.reduced.append(
                f"{case.name}: rounds timed {rounds}, otherwise at least {timer.LEAST_ROUNDS}: time is short"
            )
        peers = {name for name, implementation in prepared.implementations.items() if implementation.peer}
        judge(row, *_failed_check(prepared, row), peers=peers)
        _judge_requirement(row, prepared.required_speedup)
        if row["status"] == "ok" and (traces is not None or (case.profile and rounds >= timer.LEAST_ROUNDS)):
            for name, implementation in prepared.implementations.items():
                self._show_progress(f"{name}: profile")
                trace = None if traces is None else traces / f"{case.name}-{results.slug(name)}.json"
                run = lambda: implementation.run(timer.Stopwatch(self.device))  # noqa: E731, B023
                row["sides"][name]["profile"] = profile_summary.profiled(run, self.device, trace)

    def _errors(self, prepared: PreparedCase) -> dict[str, float]:
        """The relative error of every implementation that has an output."""
        if prepared.truth is None:
            return {}
        self._show_progress("computing the truth")
        # Without TF32, which PyTorch allows in convolutions by default: it is not accurate enough.
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            truth = prepared.truth().double()
        errors = {}
        for name, implementation in prepared.implementations.items():
            if implementation.output is not None:
                self._show_progress(f"{name}: comparing with the truth")
                errors[name] = relative_error(implementation.output(), truth)
        return errors

    def _noise(self) -> dict[str, float]:
        """The noise of the measurement: a convolution of the model's second level timed against itself."""
        width, grid = self.bench.config.model.num_channels[1], [axis // 2 for axis in self.bench.latent_grid]
        x = torch.randn(1, width, *grid, device=self.device)
        w = torch.randn(width, width, 3, 3, 3, device=self.device)
        with torch.no_grad():
            return timer.noise_floor(lambda stopwatch: F.conv3d(x, w, padding=1), self.device, budget=3.0)

    def _card(self, environment: dict[str, Any]) -> str:
        model = self.bench.config.model
        telemetry = self.gpu if isinstance(self.gpu, str) else "NVML"
        size = f"{model.variant}, channels {model.num_channels}, latent {self.bench.latent_grid}"
        return f"{format_environment(environment)}\nmodel       {size}\ntelemetry   {telemetry}"

    def _telemetry(self) -> dict[str, Any]:
        return {"absent": self.gpu} if isinstance(self.gpu, str) else self.gpu.read()._asdict()

    @contextlib.contextmanager
    def _monitor(self) -> Iterator[Monitor | None]:
        if isinstance(self.gpu, str):
            yield None
            return
        with Monitor(self.gpu) as monitor:
            yield monitor

    @contextlib.contextmanager
    def _nvtx(self, name: str) -> Iterator[None]:
        if self.device.type != "cuda":
            yield
            return
        with torch.cuda.nvtx.range(name):
            yield

    label = "machine"  # of the progress line

    def _show_progress(self, text: str) -> None:
        """Show the work under way on one line, which is overwritten. Raises Skip when the case's time is over."""
        if time.perf_counter() > self.give_up:
            raise Skip("given up: the time limit was reached before its first round")
        if sys.stderr.isatty():
            print(f"\r\033[K{self.label}: {text}" if text else "\r\033[K", end="", file=sys.stderr, flush=True)

    def _print(self, text: str) -> None:
        self._show_progress("")
        print(text, flush=True)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Largest difference relative to the truth's largest value, in float64; infinite if the shapes differ or a value is NaN."""
    if found.shape != truth.shape:
        return float("inf")
    error = float((found.double() - truth.double()).abs().max() / truth.double().abs().max())
    return error if error == error else float("inf")


def _error(timed: dict[str, Any]) -> str:
    return "another shape, or NaN" if timed["error"] is None else f"{timed['error']:.2g}"


def _failed_check(prepared: PreparedCase, row: dict[str, Any]) -> list[str]:
    """The complaint of the case's own check, if it fails; the quantities that it measured become facts of the row."""
    if prepared.check is None:
        return []
    try:
        row["facts"] = [*row["facts"], *((what, value, "") for what, value in prepared.check().items())]
    except AssertionError as why:
        return [f"its check failed: {why}"[:200]]
    return []


def judge(row: dict[str, Any], *complaints: str, peers: Collection[str] = ()) -> None:
    """Add the speedups over the first implementation; none at all if a result is wrong, unless it is that of a peer."""
    timed = row["sides"]
    wrong = {
        name: f"{name} differs from the truth by {_error(facts)}"
        for name, facts in timed.items() if facts.get("passed") is False
    }  # fmt: skip
    row["notes"] = [*row["notes"], *(text for name, text in wrong.items() if name in peers)]
    why = [*(text for name, text in wrong.items() if name not in peers), *complaints]
    if why:
        row |= {"status": "wrong", "why": "; ".join(why), "speedups": {}}
        return
    baseline = next(iter(timed), None)
    for name in list(timed)[1:]:
        if name not in wrong:
            row["speedups"][name] = timer.ratio(timed[baseline]["rounds"], timed[name]["rounds"])


def _judge_requirement(row: dict[str, Any], required: float | None) -> None:
    """Add the required speedup of "ours", and whether it was reached, to the facts of the row."""
    if required is not None and "ours" in row["speedups"]:
        verdict = "reached" if row["speedups"]["ours"]["median"] >= required else "MISSED"
        row["facts"] = [*row["facts"], (f"required speedup, {verdict}", required, "x")]


def _outcome(row: dict[str, Any]) -> str:
    if row["status"] != "ok":
        return f"{row['status'].upper()}: {row['why']}"
    times = [
        f"{name} {results.seconds(timed['seconds']['median'])}"
        + (f" ({row['speedups'][name]['median']:.2f}x)" if name in row["speedups"] else "")
        for name, timed in row["sides"].items()
    ]
    facts = [f"{what} {value:.3g} {unit}" for what, value, unit in row["facts"]]
    return ", ".join(times + facts)
