"""Interleaved timing: A B A B in one process, medians with quartiles, ratios within rounds.

On a shared machine, or one that is warming up, two runs a minute apart can differ by more than the effect to be measured.
Therefore all implementations of a case run in turn, and a ratio is the median of the ratios within the rounds: whatever slows a
whole round down cancels out.
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
_LEAST_SECONDS = 0.01  # the shortest time measured on a CPU: shorter calls are repeated until they take this long
_LEAST_SECONDS_CUDA = 0.002
_LONG = 2.0  # seconds: the first call of an implementation that takes longer is warm-up enough


class Stopwatch:
    """The clock of one timed call.

    `stopwatch.mark("forward")` ends one part of the call and begins the next. Marks on a GPU are events in the current stream,
    so they do not synchronize. On a CPU `clock` is read, which is `time.perf_counter` unless given.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] | None = None):
        self.device, self.cuda, self.clock = device, device.type == "cuda", clock or time.perf_counter
        self.marks = [("", self._now())]

    def mark(self, name: str) -> None:
        """End the current part under this name and begin the next; a part without a name is not reported."""
        self.marks.append((name, self._now()))

    def seconds(self) -> tuple[float, dict[str, float]]:
        """Seconds of the whole call and of its parts; marks of the same name add up. Waits for the GPU."""
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
            return self.clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


@dataclass
class Timing:
    """Times of one implementation, in seconds per call.

    Attributes:
        rounds: One entry per round.
        parts: The same for each part of the call.
        first: The very first call, which includes compilation.
    """

    rounds: list[float] = field(default_factory=list)
    parts: dict[str, list[float]] = field(default_factory=dict)
    first: float = 0.0


def measure(
    implementations: dict[str, Callable[[Stopwatch], Any]],
    device: torch.device,
    *,
    budget: float,
    least_rounds: int = LEAST_ROUNDS,
    most: float = math.inf,
    clock: Callable[[], float] | None = None,
    on_progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Timing]:
    """Run every implementation once, short ones a second time, then all in turn until the budget is used.

    Args:
        implementations: By name: the call to time, which receives a stopwatch.
        device: Where they run.
        budget: Seconds for the rounds of all implementations together.
        least_rounds: Rounds that are run even if they take longer.
        most: Seconds for everything, including the first calls: no round begins later, but one is always run.
        clock: What is read on a CPU, as by `Stopwatch`; `time.process_time` does not count the time of other programs.
        on_progress: Called with a description of what runs next.
    """
    begin, timings = time.perf_counter(), {name: Timing() for name in implementations}
    repeats, round_seconds = {}, 0.0
    for name, run in implementations.items():
        on_progress(f"{name}: first call")
        timings[name].first = _once(run, device, clock=clock)[0]
        second = timings[name].first
        if second < _LONG:
            second = min(second, _once(run, device, clock=clock)[0])
        least = _LEAST_SECONDS_CUDA if device.type == "cuda" else _LEAST_SECONDS
        repeats[name] = max(1, min(1000, round(least / max(second, 1e-9))))
        round_seconds += second * repeats[name]
    rounds = max(least_rounds, min(MOST_ROUNDS, int(budget / max(round_seconds, 1e-9))))
    first_round = time.perf_counter()
    for number in range(rounds):
        now = time.perf_counter()
        if number and now - begin + round_seconds > most or number >= least_rounds and now - first_round > budget:
            break
        on_progress(f"round {number + 1} of {rounds}")
        for name, run in implementations.items():
            whole, parts = _once(run, device, repeats[name], clock)
            timings[name].rounds.append(whole)
            for part, value in parts.items():
                timings[name].parts.setdefault(part, []).append(value)
    return timings


def _once(
    run: Callable[[Stopwatch], Any],
    device: torch.device,
    repeats: int = 1,
    clock: Callable[[], float] | None = None,
) -> tuple[float, dict[str, float]]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    stopwatch = Stopwatch(device, clock)
    for _ in range(repeats):
        stopwatch.mark("")  # work after the last mark of the previous call does not belong to this one
        run(stopwatch)
    whole, parts = stopwatch.seconds()
    return whole / repeats, {name: value / repeats for name, value in parts.items()}


def summary(values: Sequence[float]) -> dict[str, float]:
    """The keys median, q1, q3, min and n."""
    low, high = (
        (values[0], values[0]) if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")[::2]
    )
    return {"median": statistics.median(values), "q1": low, "q3": high, "min": min(values), "n": len(values)}


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range, as a fraction of the median."""
    facts = summary(values)
    return (facts["q3"] - facts["q1"]) / 2 / facts["median"]


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """The speedup of `fast` over `slow`: median and quartiles of the ratios within the rounds."""
    return summary([a / b for a, b in zip(slow, fast, strict=True)])


def noise_floor(run: Callable[[Stopwatch], Any], device: torch.device, *, budget: float) -> dict[str, float]:
    """The speedup of a call over itself.

    Adds the key `noise`: the distance of the median from 1 plus half the interquartile range.
    """
    timings = measure({"A": run, "A again": run}, device, budget=budget)
    facts = ratio(timings["A"].rounds, timings["A again"].rounds)
    facts["noise"] = abs(facts["median"] - 1) + (facts["q3"] - facts["q1"]) / 2
    return facts


def overhead(device: torch.device) -> float:
    """Seconds that the timer itself adds to a call, measured with an empty one."""
    empty = [_once(lambda stopwatch: None, device)[0] for _ in range(50)]
    return statistics.median(empty)


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log(cost) over log(size) from (size, cost) points: 1 is linear, 2 is quadratic growth."""
    xs, ys = ([math.log(point[axis]) for point in points] for axis in (0, 1))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum((x - x_mean) ** 2 for x in xs)
