"""Fits a run into its time limit: which cases run, on how large a latent, and for how many rounds.

The estimate of a case is for the machine named below. It is scaled by the measured limits of the actual machine and corrected
by the time that earlier cases took. When time is short, a case first gets fewer rounds, then later cases get a smaller latent,
and only then are cases left out, the headline cases last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmark_case import BenchmarkCase
from registry import HEADLINES

LIMITS_SECONDS = 30.0  # for measuring the machine's limits, on any machine
_AFTER = 25.0  # seconds reserved for counts, table, page and picture
SMALLEST = 4  # the largest divisor of the full latent's axes: three levels of the network halve each axis again

# The machine of the estimates: two cores of a Xeon (AVX-512), with the limits measured in a run. A step of the reference there
# spends a third of its time in convolutions, a third in memory traffic, and a third in work that neither limit explains.
_MACHINE = {"matmul_flops": 5e11, "copy_bytes_per_second": 4.4e10}


def slowness(rates: dict[str, Any], shrink: int) -> float:
    """The factor by which cases exceed their estimates on a CPU with these limits and the latent's axes divided by `shrink`.

    Convolutions shrink with the latent; weights, optimizer and adapter do not. No machine counts as faster than the estimate's.
    """
    compute = max(1.0, _MACHINE["matmul_flops"] / rates["matmul_flops"]["fp32"])
    memory = max(1.0, _MACHINE["copy_bytes_per_second"] / rates["copy_bytes_per_second"])
    return compute / 3 * (2 / shrink) ** 3 + memory / 3 + 1 / 3


class Budget:
    """The time limit of a run: what has been used, what is left, and which cases fit.

    Args:
        device: Device type, "cpu" or "cuda".
        minutes: The limit; None for no limit.
        clock: Returns seconds.
    """

    def __init__(self, device: str, minutes: float | None, clock: Callable[[], float] = time.perf_counter):
        self.device, self.clock, self.start = device, clock, clock()
        self.limit = math.inf if minutes is None else 60 * minutes
        self.slow = 1.0
        self._expected = self._spent = 0.0

    def spent(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.start

    def left(self) -> float:
        """Seconds left for cases."""
        return self.limit - _AFTER - self.spent()

    def choose_latent(self, cases: Sequence[BenchmarkCase], rates: dict[str, Any], shrink: int) -> int:
        """The divisor of the latent's axes: `shrink`, or `SMALLEST` if the headline cases among these do not fit otherwise."""
        if self.device != "cpu":
            return shrink
        self.slow = slowness(rates, shrink)
        headline = [case for case in cases if case.name in HEADLINES]
        if sum(self.needed(case) for case in headline) > self.left():
            shrink = SMALLEST
            self.slow = slowness(rates, shrink)
        return shrink

    def needed(self, case: BenchmarkCase) -> float:
        """Estimated seconds of this case with a single round."""
        return self._pace() * self.slow * case.least_seconds(self.device)

    def fitting(self, waiting: Sequence[BenchmarkCase]) -> list[BenchmarkCase]:
        """The cases that still fit, in their order. Time for headline cases is reserved first."""
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
        """Seconds that the first of the fitting cases may take so that the others still fit."""
        return self.left() - sum(self.needed(case) for case in fitting[1:])

    def learn(self, case: BenchmarkCase, seconds: float, rounds: float) -> None:
        """Record that a case took `seconds` in total, `rounds` of them in its timed rounds."""
        self._expected += self.slow * case.set_up_seconds(self.device)
        self._spent += seconds - rounds

    def why_not(self, case: BenchmarkCase) -> str:
        """The reason for which a case is left out."""
        return (
            f"with one round it needs about {self.needed(case):.0f} s here, {max(0.0, self.left()):.0f} s are left of the "
            f"{self.limit / 60:g} minutes for this and what matters more; --case {case.name} measures it"
        )

    def _pace(self) -> float:
        """Time taken by earlier cases relative to their estimates, at least 0.5: later cases may not be as quick."""
        return max(0.5, self._spent / self._expected) if self._expected else 1.0
