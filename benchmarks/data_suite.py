"""The data engine's cases in the registry's form. What they do, and their gates, are in data_cases.py."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_cases
from cases import Case, Side, Trial
from timer import Watch
from workbench import Workbench


def against_monai(bench: Workbench, build: Callable[[Path], Any]) -> Trial:
    """Two sides that do the same work, a volume each; the gate compares what they have left behind."""
    folder = tempfile.TemporaryDirectory(prefix="ccella-bench-")
    bench.tick("preparing studies")
    made = build(Path(folder.name))
    trial = Trial(shapes={"volume": list(bench.config.data.dim), "volumes": made.units}, check=made.gate)

    def timed(watch: Watch, work: Callable[[], Any]) -> None:
        work()

    trial.sides = {
        name: Side("fp32", functools.partial(timed, work=work), calls=made.units) for name, work in made.sides.items()
    }
    trial.notes.append(f"seconds are of one volume; asked for: {made.bar:g} times")
    trial.holds.append(folder)
    return trial


def waiting(bench: Workbench) -> Trial:
    """The share of a training step that the loop waits for its data."""
    with tempfile.TemporaryDirectory(prefix="ccella-bench-") as folder:
        shares = data_cases.wait_case(Path(folder))
    return Trial(facts=[(f"{source}, exposed wait", 100 * share, "% of a step") for source, share in shares.items()])


def _augment(bench: Workbench) -> Trial:
    return against_monai(bench, functools.partial(data_cases.augment_case, device=bench.device))


CASES = [
    Case("data_prepare", "data", "studies on disk to one grid on disk: a MONAI loop, and ours",
         lambda bench: against_monai(bench, data_cases.prepare_case), budget=0, set_up={"cpu": 120, "cuda": 90}),
    Case("data_augment", "data", "prepared volumes to augmented tensors: MONAI in a DataLoader, and ours", _augment,
         budget=0, set_up={"cpu": 120, "cuda": 60}),
    Case("data_wait", "data", "how long a training step waits for its data", waiting,
         budget=0, set_up={"cpu": 30, "cuda": 30}),
]  # fmt: skip
