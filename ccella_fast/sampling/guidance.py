"""Classifier-free guidance and feature reuse: the kind of each denoising step, known before the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

from ccella_fast.errors import ConfigError


@dataclass(frozen=True)
class Reuse:
    """Feature reuse between steps (`models.feature_reuse`), an approximation.

    Measure its error as well as its speedup on your model.

    Attributes:
        interval: the whole network is evaluated in one of every `interval` steps.
        depth: the other steps evaluate only the last `depth` blocks of the up path.
    """

    interval: int = 3
    depth: int = 1

    def __post_init__(self) -> None:
        for name, value in (("interval", self.interval), ("depth", self.depth)):
            if not isinstance(value, Integral) or value < 1:
                why = f"the {name} of feature reuse must be an integer of at least 1, got {value!r:.40}"
                raise ConfigError(why, field=f"reuse.{name}", fix="use 1 or more")


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): null + scale (conditional - null).

    With autoguidance, the prediction of a weak model takes the place of `null`, see `sampling.autoguidance`.

    Attributes:
        scale: 1 disables guidance.
        interval: guidance is applied only at timesteps between these fractions of the schedule (Kynkaanniemi et al. 2024, arXiv
            2404.07724); other steps cost as much as without guidance.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        low, high = self.interval
        if not 0 <= low < high <= 1:
            why = f"guidance_interval must be two increasing fractions between 0 and 1, got {list(self.interval)}"
            fix = "give two fractions of the schedule, such as 0.1 0.7"
            raise ConfigError(why, field="guidance_interval", fix=fix)
        if not 0 <= self.scale < 1e3:
            why = f"guidance_scale must be at least 0 and below 1000, got {self.scale}"
            raise ConfigError(why, field="guidance_scale", fix="use 1 (off) to about 10")

    @property
    def on(self) -> bool:
        """Whether guidance changes the prediction."""
        return self.scale != 1


class StepKind(NamedTuple):
    """Steps of the same kind launch the same kernels in the same order.

    Attributes:
        guided: whether guidance is applied.
        feature: "" without feature reuse, "keep" if the feature is computed and stored, "reuse" if the stored one is used.
    """

    guided: bool
    feature: str


def step_kinds(timesteps: Sequence[float], total: int, guidance: Guidance, reuse: Reuse | None) -> list[StepKind]:
    """The kind of each evaluation.

    When guidance starts or ends, the feature is recomputed, because the number of rows changes.

    Args:
        timesteps: the timestep of each evaluation.
        total: the number of training timesteps.
        guidance: the guidance settings.
        reuse: the settings of feature reuse; None: off.
    """
    low, high = (edge * total for edge in guidance.interval)
    kinds: list[StepKind] = []
    age = 0  # steps since the feature was computed, that step included
    for t in timesteps:
        guided = guidance.on and low <= t <= high
        if reuse is None:
            kinds.append(StepKind(guided, ""))
            continue
        fresh = not kinds or kinds[-1].guided != guided or age >= reuse.interval
        kinds.append(StepKind(guided, "keep" if fresh else "reuse"))
        age = 1 if fresh else age + 1
    return kinds
