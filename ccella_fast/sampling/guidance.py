"""Classifier-free guidance and feature reuse: what each step of a run does, known before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ccella_fast.errors import ConfigError


@dataclass(frozen=True)
class Reuse:
    """Feature reuse: one of every `interval` steps is computed whole, the others compute only the outermost `depth` blocks of
    the up path.

    An approximation (`models.feature_reuse`): measure its error as well as its gain on your model."""

    interval: int = 3
    depth: int = 1

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ConfigError(f"an interval of {self.interval}", field="reuse.interval", fix="use 1 or more")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): null + scale (conditional - null), where null is the
    prediction for the null report. interval: only at timesteps between these fractions of the schedule (Kynkaanniemi et al.
    2024, arXiv 2404.07724); outside it a step costs no more than without guidance."""

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            fix = "give two fractions of the schedule, such as 0.1 0.7"
            raise ConfigError(f"{list(self.interval)} is no interval", field="guidance_interval", fix=fix)
        if not 0 <= self.scale < 1e3:
            raise ConfigError(
                f"a guidance scale of {self.scale}", field="guidance_scale", fix="use 1 (off) to about 10"
            )

    @property
    def on(self) -> bool:
        return self.scale != 1


class StepKind(NamedTuple):
    """Steps of one kind launch the same kernels in the same order."""

    guided: bool
    feature: str  # "": nothing is kept; "keep": computed whole and kept; "reuse": the kept one is used


def step_kinds(timesteps: Sequence[float], total: int, guidance: Guidance, reuse: Reuse | None) -> list[StepKind]:
    """The kind of each evaluation. total: the schedule's length. Where guidance starts or ends, the feature is computed anew,
    because the number of rows changes."""
    low, high = (edge * total for edge in guidance.interval)
    kinds: list[StepKind] = []
    since = 0
    for t in timesteps:
        guided = guidance.on and low <= t <= high
        if reuse is None:
            kinds.append(StepKind(guided, ""))
            continue
        fresh = not kinds or kinds[-1].guided != guided or since >= reuse.interval
        kinds.append(StepKind(guided, "keep" if fresh else "reuse"))
        since = 1 if fresh else since + 1
    return kinds
