"""What is decided on real studies alone, before any generated volume is seen.

G0: the autoencoder keeps what shows the class. G1: how many training studies a classifier gets, so that its accuracy is neither
at chance nor at its limit. G2: a feature space that orders known degradations judges the distance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.evaluation import open_volumes
from ccella_fast.evaluation.collecting import collect
from ccella_fast.evaluation.conditions import Label, condition_agreement
from ccella_fast.evaluation.findings import CaseFindings
from ccella_fast.evaluation.foci import FociFeatures
from ccella_fast.evaluation.reconstruction import reconstructions
from ccella_fast.evaluation.volumes import VolumeSet

LEAST_KEPT = 0.9  # accuracy on the class after the autoencoder, relative to that on originals


def autoencoder_gate(real: VolumeSet, vae: str | Path, findings: CaseFindings | None = None) -> dict[str, Any]:
    """G0: how well class and findings are read from volumes after the autoencoder, and its PSNR in dB.

    Linear probes are fitted on original volumes, in five folds.

    Args:
        real: volumes that the autoencoder was not trained on.
        vae: the folder of the autoencoder.
        findings: of their reports.

    Returns:
        psnr; read, for each property what the probes read; accuracy_ratio, of the class; gate_open.
    """
    decoded = reconstructions(real, vae)
    extractor = FociFeatures()
    (before,), (after,) = (collect(volumes, [extractor], name=volumes.name)[0].values() for volumes in (real, decoded))
    errors = [np.mean((np.asarray(a.array) - np.asarray(b.array)) ** 2) for a, b in zip(real, decoded, strict=True)]
    properties: dict[str, list[Label]] = {"class": list(before.classes)}
    for name, cases in ({} if findings is None else findings.properties).items():
        properties[name] = [cases.get(case) for case in before.ids]
    read = {}
    for name, known in properties.items():
        found = condition_agreement(
            name, before.spaces["foci"], known, after.spaces["foci"], known, prompted_by=range(len(before))
        )
        read[name] = {
            key: getattr(found, key) for key in ("score", "value", "ceiling", "floor", "accuracy", "ceiling_accuracy")
        }
    known_accuracy, ceiling = read["class"]["accuracy"], read["class"]["ceiling_accuracy"]
    ratio = known_accuracy / ceiling if known_accuracy is not None and ceiling else None
    return {
        "psnr": float(np.mean([-10 * math.log10(error) for error in errors])),
        "read": read, "accuracy_ratio": ratio, "gate_open": ratio is not None and bool(ratio >= LEAST_KEPT),
    }  # fmt: skip


def choose_size(accuracies: Mapping[int, float], wanted: Sequence[float], nearest: float) -> int:
    """G1: the smallest number of training studies with a mean accuracy inside of `wanted`, else the nearest to `nearest`.

    Args:
        accuracies: number of studies -> mean accuracy over the seeds, on real test studies.
        wanted: lower and upper bound.
        nearest: where none is inside.
    """
    low, high = wanted
    inside = [size for size, accuracy in accuracies.items() if low <= accuracy <= high]
    return min(inside) if inside else min(accuracies, key=lambda size: (abs(accuracies[size] - nearest), size))


def is_too_easy(accuracies: Mapping[int, float], wanted: Sequence[float]) -> bool:
    """Whether the smallest number of training studies is above what is wanted already, so that lesions are made harder."""
    return accuracies[min(accuracies)] > wanted[1]


def choose_space(gates: Sequence[Mapping[str, Any]], preferred: Sequence[str]) -> str | None:
    """G2: the first preferred feature space that has passed the sensitivity gate; None without any."""
    passed = [str(gate["space"]) for gate in gates if gate["passed"]]
    return next((space for space in preferred if space in passed), None)


def open_real(prepared: Path, split: str) -> VolumeSet:
    """The real volumes of a split."""
    return open_volumes(f"{prepared}:{split}", field="real")
