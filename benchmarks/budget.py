"""What fits into a run's time limit: which cases, on how large a latent, and how long each may go on.

A case's estimate is for the machine named below. Another machine's measured limits scale it, and so does what the cases before
it took, so that an estimate that is wrong here is soon put right. Where time is short, a case first gets fewer rounds, then
what follows gets a smaller latent; only then are cases left out, those that users ask for first last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmark_case import HEADLINES, BenchmarkCase

LIMITS_SECONDS = 30.0  # for the machine's limits, whatever the machine
_AFTER = 25.0  # seconds kept for counts, table, page and picture
SMALLEST = (
    4  # each axis of the full latent divided by this is the smallest that is measured: three levels halve it again
)

# The machine of the estimates: two cores of a Xeon (AVX-512), and what its limits are in a run. A step of the reference there
# is a third convolutions, a third memory traffic, and a third what neither limit says.
_MACHINE = {"matmul_flops": 5e11, "copy_bytes_per_second": 4.4e10}


def slowness(rates: dict[str, Any], shrink: int) -> float:
    """How many times longer than its estimate a case takes on a CPU of these limits, at the full latent over `shrink`.

    The convolutions shrink with the latent; weights, optimizer and adapter do not. No machine counts as faster."""
    compute = max(1.0, _MACHINE["matmul_flops"] / rates["matmul_flops"]["fp32"])
    memory = max(1.0, _MACHINE["copy_bytes_per_second"] / rates["copy_bytes_per_second"])
    return compute / 3 * (2 / shrink) ** 3 + memory / 3 + 1 / 3


class Budget:
    def __init__(self, device: str, minutes: float | None, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.start = device, clock, clock()
        self.limit = math.inf if minutes is None else 60 * minutes
        self.slow = 1.0
        self._expected = self._spent = 0.0

    def spent(self) -> float:
        return self.clock() - self.start

    def left(self) -> float:
        """Seconds for cases."""
        return self.limit - _AFTER - self.spent()

    def choose_latent(self, cases: Sequence[BenchmarkCase], rates: dict[str, Any], shrink: int) -> int:
        """The divisor of the latent's axes at which the headline cases among these fit, as far as they can."""
        if self.device != "cpu":
            return shrink
        self.slow = slowness(rates, shrink)
        headline = [case for case in cases if case.name in HEADLINES]
        if sum(self.needed(case) for case in headline) > self.left():
            shrink = SMALLEST
            self.slow = slowness(rates, shrink)
        return shrink

    def needed(self, case: BenchmarkCase) -> float:
        """Seconds of this case with a single round."""
        return self._pace() * self.slow * case.least_seconds(self.device)

    def fitting(self, waiting: Sequence[BenchmarkCase]) -> list[BenchmarkCase]:
        """Those of the cases that still fit, in their order; what users ask for first has its time kept for it."""
        left, chosen = self.left(), []
        importance = list(HEADLINES)
        for case in sorted(
            waiting, key=lambda case: importance.index(case.name) if case.name in importance else math.inf
        ):
            if self.needed(case) <= left:
                left -= self.needed(case)
                chosen.append(case)
        return [case for case in waiting if case in chosen]

    def allowed(self, fitting: Sequence[BenchmarkCase]) -> float:
        """Seconds that the first of the fitting cases may take, so that the others are left enough for theirs."""
        return self.left() - sum(self.needed(case) for case in fitting[1:])

    def learn(self, case: BenchmarkCase, seconds: float, rounds: float) -> None:
        """A case took these seconds, `rounds` of them for its timed rounds."""
        self._expected += self.slow * case.set_up.get(self.device, 10)
        self._spent += seconds - rounds

    def why_not(self, case: BenchmarkCase) -> str:
        return (
            f"with one round it needs about {self.needed(case):.0f} s here, {max(0.0, self.left()):.0f} s are left of the "
            f"{self.limit / 60:g} minutes for this and what matters more; --case {case.name} measures it"
        )

    def _pace(self) -> float:
        """How much longer than expected the cases so far took. Where they were quick, later ones need not be as quick."""
        return max(0.5, self._spent / self._expected) if self._expected else 1.0
