"""Which volumes of an evaluation are kept for its page: the first of each set, and the closest pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ccella_fast.data.example_volumes import SHOWN, Example, Kind, write_examples
from ccella_fast.evaluation.volumes import VolumeSet

FOLDER = "examples"
_PAIRS = 10
_COMPARED: tuple[Kind, ...] = ("real", "reconstructed", "synthetic")


def keep_examples(folder: str | Path, sets: Mapping[str, VolumeSet], per_case: Sequence[Mapping[str, Any]]) -> None:
    """Write crops of the first four volumes of each set and of the ten closest pairs, read one at a time.

    Args:
        folder: of the evaluation.
        sets: "real" and "synthetic", and "train" and "reconstructed" if there are any.
        per_case: of the evaluation.
    """
    real = sets["real"].manifest
    phantom = real is not None and all(case.synthetic for case in real.cases)
    write_examples(Path(folder) / FOLDER, _examples(sets, per_case), phantom=phantom)


def closest_pairs(per_case: Sequence[Mapping[str, Any]], sequence: str) -> list[tuple[int, int]]:
    """The numbers of the synthetic and of the training volume: copies, then the nearest, from `Evaluation.per_case`."""
    found = [case for case in per_case if case["sequence"] == sequence and "nearest_train" in case]
    found.sort(key=lambda case: (not case["copy"], case["null_percentile"], case["distance"]))
    return [(_number(case["id"]), _number(case["nearest_train"])) for case in found[:_PAIRS]]


def _examples(sets: Mapping[str, VolumeSet], per_case: Sequence[Mapping[str, Any]]) -> Iterator[Example]:
    for sequence in sets["real"].sequences:
        of_sequence = {kind: volumes.of_sequence(sequence) for kind, volumes in sets.items()}
        wanted: list[tuple[Kind, int]] = [
            (kind, number)
            for kind in _COMPARED
            if kind in of_sequence
            for number in range(1, min(SHOWN, len(of_sequence[kind])) + 1)
        ]
        for synthetic, train in closest_pairs(per_case, sequence):
            wanted += [("synthetic", synthetic), ("train", train)]
        for kind, number in wanted:
            volume = of_sequence[kind][number - 1]
            yield Example(kind, number, sequence, volume.array, volume.spacing)


def _number(name: str) -> int:
    """The number in what `metrics.case_name` calls a volume."""
    return int(name.rpartition("-")[2])
