"""Timing side by side: A B A B in one process, medians with quartiles, ratios of neighbours.

On a shared or warming machine two runs a minute apart differ by more than what is to be shown. So all sides of a case run in
turn, and a ratio is the median of the ratios within the rounds: what slows a whole round cancels out.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

LEAST_ROUNDS, MOST_ROUNDS = 3, 30
_LEAST_SECONDS = 0.01  # a timed stretch on the CPU is at least this long: shorter calls are repeated inside it
_LEAST_SECONDS_CUDA = 0.002
_LONG = 2.0


class Stopwatch:
    """The clock of one timed call. `watch.mark("forward")` ends a part and begins the next; nothing waits for the GPU."""

    def __init__(self, device: torch.device):
        self.device, self.cuda = device, device.type == "cuda"
        self.marks = [("", self._now())]

    def mark(self, name: str) -> None:
        self.marks.append((name, self._now()))

    def seconds(self) -> tuple[float, dict[str, float]]:
        """The whole call, and its parts (several marks of one name add up)."""
        self.mark("")
        if self.cuda:
            torch.cuda.synchronize(self.device)
        parts: dict[str, float] = {}
        for (_, start), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            if name:
                parts[name] = parts.get(name, 0.0) + self._between(start, end)
        return self._between(self.marks[0][1], self.marks[-1][1]), parts

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


@dataclass
class Timing:
    """Seconds of one call of one side, one entry a round; the same for each part; and of the very first call, compilation
    included."""

    rounds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    first: float = 0.0


def measure(
    sides: dict[str, Callable[[Stopwatch], Any]],
    device: torch.device,
    *,
    budget: float,  # seconds for the rounds of all sides together; LEAST_ROUNDS even where they take longer
    most: float = math.inf,  # seconds for everything, first calls included: later no round begins, but one is always run
    tick: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Run every side once (its first call), a short one once more, then all in turn until the budget is used."""
    begin, timings = time.perf_counter(), {name: Timing() for name in sides}
    repeats, a_round = {}, 0.0
    for name, run in sides.items():
        tick(f"{name}: first call")
        timings[name].first = _once(run, device)[0]
        second = timings[name].first
        if second < _LONG:  # the first call of a long one has warmed up enough
            second = min(second, _once(run, device)[0])
        least = _LEAST_SECONDS_CUDA if device.type == "cuda" else _LEAST_SECONDS
        repeats[name] = max(1, min(1000, round(least / max(second, 1e-9))))
        a_round += second * repeats[name]
    rounds = max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(a_round, 1e-9))))
    first_round = time.perf_counter()
    for number in range(rounds):
        now = time.perf_counter()
        if number and now - begin + a_round > most or number >= LEAST_ROUNDS and now - first_round > budget:
            break
        tick(f"round {number + 1} of {rounds}")
        for name, run in sides.items():
            whole, parts = _once(run, device, repeats[name])
            timings[name].rounds.append(whole)
            for part, value in parts.items():
                timings[name].parts.setdefault(part, []).append(value)
    return timings


def _once(run: Callable[[Stopwatch], Any], device: torch.device, repeats: int = 1) -> tuple[float, dict[str, float]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    watch = Stopwatch(device)
    for _ in range(repeats):
        watch.mark("")  # what the call before did after its last mark is no part of this one
        run(watch)
    whole, parts = watch.seconds()
    return whole / repeats, {name: value / repeats for name, value in parts.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """median, q1, q3, min and n."""
    low, high = (
        (values[0], values[0]) if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")[::2]
    )
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "n": len(values)}


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, as a fraction of the median."""
    facts = summary(values)
    return (facts["q3"] - facts["q1"]) / 2 / facts["median"]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times faster `fast` is: the median and the quartiles of the ratios within the rounds."""
    return summary([a / b for a, b in zip(slow, fast, strict=True)])


def noise_floor(run: Callable[[Stopwatch], Any], device: torch.device, *, budget: float) -> dict[str, float]:
    """The same call as both sides. `noise`: how far the ratio of equals is from 1, bias and quartile together."""
    timings = measure({"A": run, "A again": run}, device, budget=budget)
    facts = ratio(timings["A"].rounds, timings["A again"].rounds)
    facts["noise"] = abs(facts["median"] - 1) + (facts["q3"] - facts["q1"]) / 2
    return facts


def overhead(device: torch.device) -> float:
    """Seconds that the watch itself adds to a call: an empty call, timed as every other is."""
    empty = [_once(lambda watch: None, device)[0] for _ in range(50)]
    return statistics.median(empty)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log(cost) over log(size): 1 is proportional, less is better than that, 2 is quadratic."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)
