"""The records that a benchmark case is made of. This module imports no case; `registry.py` has the list of all of them.

A `BenchmarkCase` is a row of the registry. Its `build` function sets the case up on this machine and returns a `PreparedCase`:
the implementations to compare, the ground truth for their outputs, and the roofline of each. `runner.py` checks that the
outputs agree with the truth, times the implementations in turn and records the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from timer import LEAST_ROUNDS, Stopwatch

if TYPE_CHECKING:
    from fixtures import Workbench

SUITES = ["kernels", "sampler", "training", "data", "evaluation", "memory"]
MOST_CUDA_SECONDS = 8.0  # for the timed rounds of a case: rounds on a GPU are short
# The largest accepted error by precision: largest difference from the fp32 truth, relative to the truth's largest value.
TOLERANCE = {"fp32": 1e-3, "bf16": 6e-2, "fp16": 6e-2}


@dataclass(frozen=True)
class Roofline:
    """A lower bound on the work of an implementation: its time follows from the rates measured on the machine.

    Attributes:
        flops: Floating-point operations that no program can avoid.
        bytes: Bytes that no program can avoid moving.
        precision: "fp32" or "bf16": the matmul rate that applies.
        derivation: How `flops` and `bytes` were obtained, for the report.
        upsampler_flops: The upsamplers' part of the FLOPs, at 27 taps; the roofline of training is derived from it.
        activation_bytes: The activations' part of the bytes, for the same purpose.
    """

    flops: float
    bytes: float
    precision: str
    derivation: str
    upsampler_flops: float = 0.0
    activation_bytes: float = 0.0

    def seconds(self, machine: dict[str, Any]) -> tuple[float, str]:
        """The time at the measured matmul rate and copy bandwidth, and the limit that applies: "compute" or "memory"."""
        compute = self.flops / machine["matmul_flops"][self.precision]
        memory = self.bytes / machine["copy_bytes_per_second"]
        return max(compute, memory), "compute" if compute >= memory else "memory"


@dataclass
class Implementation:
    """One of the programs that a case compares.

    Attributes:
        precision: "fp32", "bf16" or "fp16".
        run: The timed call. Its inputs are ready; it may mark the parts of its time on the stopwatch.
        output: Computes the output that is compared with the truth; None if there is none to compare.
        calls: Units of work in one run, for instance the steps of a chain. Times are reported per unit.
        peer: It belongs to another library. If its result is wrong, it has no speedup, and the case is still right.
    """

    precision: str
    run: Callable[[Stopwatch], Any]
    output: Callable[[], Tensor] | None = None
    calls: int = 1
    peer: bool = False


@dataclass
class PreparedCase:
    """A case that has been set up on this machine.

    Attributes:
        implementations: By name. The first is the baseline; "ours" is ccella_fast.
        truth: Computes the output to compare with: in fp32, for kernels in float64.
        rooflines: By implementation.
        shapes: Sizes for the report. Results are compared with earlier ones only at equal shapes.
        facts: (name, value, unit) of quantities measured outside the timed rounds.
        curves: Title of a plot -> (size, cost) points, drawn with their log-log slope.
        missing: Implementations that cannot run here, each with the reason.
        notes: Sentences for the report.
        tolerance: Largest accepted error by precision.
        twice_baseline_error: Accept twice the baseline's own error instead: for kernels, which are compared with float64.
        check: Runs after the timed rounds. It returns further facts, or raises AssertionError for a wrong result.
        required_speedup: The speedup of "ours" over the baseline that the project demands, if it does. The report says whether
            it was reached.
        keep_alive: Objects that must live as long as the case, such as a temporary folder.
    """

    implementations: dict[str, Implementation] = field(default_factory=dict)
    truth: Callable[[], Tensor] | None = None
    rooflines: dict[str, Roofline] = field(default_factory=dict)
    shapes: dict[str, Any] = field(default_factory=dict)
    facts: list[tuple[str, float, str]] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tolerance: dict[str, float] = field(default_factory=lambda: TOLERANCE)
    twice_baseline_error: bool = False
    check: Callable[[], dict[str, float]] | None = None
    required_speedup: float | None = None
    keep_alive: list[Any] = field(default_factory=list)

    def allowed_error(self, precision: str, errors: dict[str, float]) -> float:
        """The largest error accepted in this precision, given the `errors` of all implementations."""
        if self.twice_baseline_error:
            return 2 * errors[next(iter(self.implementations))] + 1e-9
        return self.tolerance[precision]


class Skip(Exception):  # noqa: N818
    """Raised by a `build` function when the case cannot run on this machine; the message gives the reason."""


@dataclass(frozen=True)
class BenchmarkCase:
    """A row of the registry.

    Attributes:
        name: The name for `--case`.
        suite: One of `SUITES`.
        about: One sentence that names what is compared.
        build: Sets the case up with the models and shapes of the workbench.
        quick: Device types ("cpu", "cuda") on which the case belongs to the quick suite.
        profile: Always profile one call of each implementation, not only with `--profile`.
        budget: Seconds for the timed rounds.
        set_up: Rough seconds around the timed rounds, by device type, on the machine of `budget.py`.
        bf16: It computes in bf16 on every CPU, including those that emulate it.
        last: It runs after all others, because it compiles for minutes.
    """

    name: str
    suite: str
    about: str
    build: Callable[[Workbench], PreparedCase]
    quick: tuple[str, ...] = ()
    profile: bool = False
    budget: float = 12.0
    set_up: dict[str, float] = field(default_factory=dict)
    bf16: bool = False
    last: bool = False

    def rounds_budget(self, device: str) -> float:
        """Seconds for the timed rounds on this device type."""
        return min(self.budget, MOST_CUDA_SECONDS) if device == "cuda" else self.budget

    def set_up_seconds(self, device: str) -> float:
        """Estimated seconds around the timed rounds."""
        return self.set_up.get(device, 10)

    def seconds(self, device: str) -> float:
        """Estimated seconds in total."""
        return self.rounds_budget(device) + self.set_up_seconds(device)

    def least_seconds(self, device: str) -> float:
        """Estimated seconds with a single round."""
        return self.rounds_budget(device) / LEAST_ROUNDS + self.set_up_seconds(device)
