"""What a benchmark case is, and the list of all of them.

A case is a record. Its `build` makes the sides (what is compared with what) from the model's configuration; run.py checks
that they agree, times them in turn and writes down what came out. To add one: a function and a row in one of the
`*_cases.py` files.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ccella_fast import hardware
from timer import LEAST_ROUNDS, Stopwatch

SUITES = ["kernels", "sampler", "training", "data", "memory"]
# The cases that users ask for first, the most important one first: what they are called on the page.
HEADLINES = {
    "denoising_step": "denoising step", "training_step": "training step", "sampling": "text to volume",
    "decode": "decode",
}  # fmt: skip
MOST_CUDA_SECONDS = 8.0  # for the rounds of a case: a GPU's rounds are short
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 6e-2}  # largest difference from the fp32 truth / largest value


@dataclass(frozen=True)
class Roofline:
    """The least work the case can be, whatever the program. Seconds follow from the machine's own measured rates."""

    flops: float
    bytes: float
    precision: str  # "fp32" or "bf16": the rate that counts
    derivation: str
    upsampler_flops: float = 0.0  # the two that other floors are made of
    activation_bytes: float = 0.0

    def seconds(self, machine: dict[str, Any]) -> tuple[float, str]:
        """The time of this work at the measured matmul rate and copy bandwidth, and which of the two it is."""
        compute = self.flops / machine["matmul_flops"][self.precision]
        memory = self.bytes / machine["copy_bytes_per_second"]
        return max(compute, memory), "compute" if compute >= memory else "memory"


@dataclass
class Implementation:
    """One competitor. `run(watch)` is the timed call, on data that is ready; `output()` is what the gate looks at."""

    precision: str
    run: Callable[[Stopwatch], Any]
    output: Callable[[], Tensor] | None = None
    calls: int = 1  # how many units of work one run is


@dataclass
class Trial:
    """A case that has been set up. The first side is the baseline, "ours" is ours."""

    sides: dict[str, Implementation] = field(default_factory=dict)
    truth: Callable[[], Tensor] | None = None  # fp32, or float64 for kernels
    floor: dict[str, Roofline] = field(default_factory=dict)  # by side
    shapes: dict[str, Any] = field(default_factory=dict)
    facts: list[tuple[str, float, str]] = field(
        default_factory=list
    )  # (what, value, unit): measured outside the rounds
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # what grows -> (size, cost), for a plot
    missing: dict[str, str] = field(default_factory=dict)  # competitor: why it is not there
    notes: list[str] = field(default_factory=list)
    tolerance: dict[str, float] = field(default_factory=lambda: TOLERANCE)
    check: Callable[[], dict[str, float]] | None = None  # another gate, after the rounds: facts, or AssertionError
    twice: bool = False  # the tolerance is twice the baseline's own error: for kernels, judged against float64
    holds: list[Any] = field(default_factory=list)  # what must live as long as the trial: a temporary folder

    def allowed(self, precision: str, errors: dict[str, float]) -> float:
        """The largest error that a side of this precision may have; `errors` of all sides."""
        return 2 * errors[next(iter(self.sides))] + 1e-9 if self.twice else self.tolerance[precision]


class Skip(Exception):
    """This case cannot run here; the message says why and is printed in its place."""


@dataclass(frozen=True)
class BenchmarkCase:
    name: str
    suite: str
    about: str  # what is compared with what, one sentence
    build: Callable[[Any], Trial]  # takes a Workbench
    quick: tuple[str, ...] = ()  # on which devices it is part of the quick suite: "cpu", "cuda"
    profile: bool = False  # always look where its time goes, not only with --profile
    budget: float = 12.0  # seconds for the timed rounds
    set_up: dict[str, float] = field(default_factory=dict)  # rough seconds around them, by device: see budget.py
    bf16: bool = False  # it computes in bf16 on every CPU, also on one that emulates it
    last: bool = False  # after all others: it compiles for minutes

    def rounds_budget(self, device: str) -> float:
        return min(self.budget, MOST_CUDA_SECONDS) if device == "cuda" else self.budget

    def seconds(self, device: str) -> float:
        """Roughly, all in all, on the machine of `budget.py`."""
        return self.rounds_budget(device) + self.set_up.get(device, 10)

    def least_seconds(self, device: str) -> float:
        """The same with a single round."""
        return self.rounds_budget(device) / LEAST_ROUNDS + self.set_up.get(device, 10)


def registry() -> list[BenchmarkCase]:
    """All cases, in the order in which they run."""
    import cases.data
    import cases.kernels
    import cases.memory
    import cases.sampler
    import cases.training

    modules = [cases.sampler, cases.training, cases.kernels, cases.data, cases.memory]
    return sorted((case for module in modules for case in module.CASES), key=lambda case: case.last)


def select(suites: list[str], device: torch.device) -> list[BenchmarkCase]:
    """The cases of these suites; "quick" and "all" are suites too."""
    every = registry()
    if "all" in suites:
        return every
    return [case for case in every if case.suite in suites or ("quick" in suites and device.type in case.quick)]


def emulated(cases: list[BenchmarkCase], device: torch.device) -> dict[str, str]:
    """Those of these cases that would spend their time in emulated bf16, each with the reason; none on other machines."""
    if device.type != "cpu" or hardware.cpu_multiplies_bf16():
        return {}
    why = "this CPU emulates bf16, many times slower than fp32; --case {} measures it all the same"
    return {case.name: why.format(case.name) for case in cases if case.bf16}
