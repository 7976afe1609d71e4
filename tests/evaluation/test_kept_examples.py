"""Which volumes of an evaluation are kept for its page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccella_fast.data.example_volumes import read_examples
from ccella_fast.evaluation.examples import closest_pairs, keep_examples
from ccella_fast.evaluation.volumes import Source, VolumeSet

SPACING = (1.0, 1.0, 3.0)


def made(name: str, count: int, base: float, sequence: str = "t2w") -> VolumeSet:
    """Volumes of one gray level each, `base` + 0.01 x number, with a corner that makes them differ from constants."""

    def read(number: int):
        array = np.full((6, 5, 4), base + 0.01 * number, np.float32)
        array[0, 0, 0] = 0
        return array, SPACING

    sources = [
        Source(f"quagga-{number}", Path(f"quagga-{number}.nii"), lambda number=number: read(number), sequence)
        for number in range(1, count + 1)
    ]
    return VolumeSet(name, sources, Path(name), "as made")


def case(number: int, train: int, percentile: float, distance: float, copy: bool = False) -> dict:
    return {"id": f"synthetic-{number:03d}", "set": "synthetic", "sequence": "t2w", "nearest_train": f"train-{train:03d}",
            "null_percentile": percentile, "distance": distance, "copy": copy}  # fmt: skip


def test_the_first_volumes_and_the_closest_pairs_are_kept(tmp_path: Path):
    sets = {"real": made("a", 3, 0.1), "synthetic": made("b", 15, 0.3), "train": made("c", 20, 0.6)}
    cases = [case(number, 21 - number, 50.0, float(number)) for number in range(1, 14)]
    cases += [case(14, 1, 0.0, 9.0), case(15, 2, 0.0, 8.0), {"id": "real-001", "set": "real", "sequence": "t2w"}]
    assert closest_pairs(cases, "t2w") == [(15, 2), (14, 1), *((number, 21 - number) for number in range(1, 9))]
    assert closest_pairs(cases, "adc") == []
    copies = [case(number, number, 0.0, 9.5, number == 12) for number in range(1, 13)]  # its distance in another space
    assert closest_pairs(copies, "t2w")[0] == (12, 12)
    keep_examples(tmp_path, sets, cases)
    kept = read_examples(tmp_path / "examples")
    found = {(each.kind, each.number): float(np.median(each.read()[0])) for each in kept.volumes}
    assert {number for kind, number in found if kind == "real"} == {1, 2, 3}
    assert {number for kind, number in found if kind == "synthetic"} == {*range(1, 9), 14, 15}
    assert {number for kind, number in found if kind == "train"} == {1, 2, *range(13, 21)}
    for (kind, number), gray in found.items():
        base = {"real": 0.1, "synthetic": 0.3, "train": 0.6}[kind]
        assert abs(gray - base - 0.01 * number) < 0.5 / 255 + 1e-6
    assert not kept.phantom
    assert not any(
        "quagga" in path.name or b"quagga" in path.read_bytes() for path in (tmp_path / "examples").iterdir()
    )


def test_reconstructions_and_every_sequence_are_kept(tmp_path: Path):
    real = VolumeSet("a", [*made("a", 5, 0.1).sources, *made("a", 1, 0.4, "adc").sources], Path("a"), "as made")
    keep_examples(tmp_path, {"real": real, "synthetic": real, "reconstructed": real}, [])
    names = {path.name for path in (tmp_path / "examples").iterdir()} - {"examples.json"}
    kinds = ("real", "reconstructed", "synthetic")
    assert names == {f"{kind}-{number}-t2w.nii.gz" for kind in kinds for number in (1, 2, 3, 4)} | {
        f"{kind}-1-adc.nii.gz" for kind in kinds
    }
