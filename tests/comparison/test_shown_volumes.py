"""Which volumes the page of a comparison shows: those of the same prompts, of both classes, and pairs of the same noise."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from ccella_fast.comparison import shown_volumes
from ccella_fast.evaluation.volumes import Source, VolumeSet

SPACING = (1.0, 1.0, 3.0)


def volumes(path: Path, cases: dict[str, tuple[float, str | None, str | None]]) -> VolumeSet:
    """A set of volumes that have one bright voxel. cases: id -> its value, class and prompt."""

    def read(value: float) -> tuple[np.ndarray, tuple[float, float, float]]:
        array = np.zeros((4, 4, 4), np.float32)
        array[2, 2, 2] = value
        return array, SPACING

    sources = [
        Source(name, path, partial(read, value), pirads=pirads, prompt=prompt)
        for name, (value, pirads, prompt) in cases.items()
    ]
    return VolumeSet(path.name, sources, path, "as given")


def test_volumes_of_one_column_are_of_the_same_prompt(tmp_path, monkeypatch):
    real = {f"t{k}": (k / 10, "neg" if k % 2 else "pos", None) for k in range(1, 9)}
    real["t9"] = (0.95, None, None)
    first = {f"t{k}-synth-0": (k / 100, None, f"t{k}") for k in (8, 1, 2, 3, 5, 7, 9)} | {
        "t1-synth-1": (0.99, None, "t1")
    }
    second = {f"t{k}-synth-0": (k / 1000, None, f"t{k}") for k in (1, 2, 4, 5, 7, 8, 9)}
    known = {"real": real, "CCELLA-3-test": first, "MAISI-3-test": second}

    def open_volumes(given: str | Path, *, field: str) -> VolumeSet:
        path = Path(str(given).removesuffix(":test"))
        assert (path.parent.name == "real") == str(given).endswith(":test")
        return volumes(path, known[path.parent.name])

    monkeypatch.setattr(shown_volumes, "open_volumes", open_volumes)
    monkeypatch.setattr(
        shown_volumes, "reconstructions",
        lambda of, vae, *, device: volumes(of.path, {each.id: (real[each.id][0] / 2, None, None) for each in of.sources}),
    )  # fmt: skip
    asked = {"variants": ["CCELLA", "MAISI"], "training_seeds": [3, 4]}
    columns = shown_volumes.same_prompts(tmp_path, asked, tmp_path / "vae")
    titles = [[panel.title for panel in column] for column in columns]
    assert titles == [[f"real, {name}", "reconstructed", "CCELLA", "MAISI"] for name in ("neg", "neg", "pos", "pos")]
    found = [[round(float(panel.volume.max()), 4) for panel in column] for column in columns]
    # Test studies of which both have made a volume: 1, 5 and 7 of neg (two are shown), 2 and 8 of pos; 9 has no class.
    assert found == [[k / 10, k / 20, k / 100, k / 1000] for k in (1, 5, 2, 8)]


def test_pairs_are_of_the_same_noise_and_the_second_class_comes_first(tmp_path, monkeypatch):
    for name in ("neg", "pos"):
        (tmp_path / "samples" / f"LAST-1-{name}").mkdir(parents=True)
    known = {
        "LAST-1-neg": {f"sample-{k}": (k / 10, "neg", None) for k in (1, 2, 3)},
        "LAST-1-pos": {f"sample-{k}": (k / 10 + 0.05, "pos", None) for k in (3, 1)},
    }
    monkeypatch.setattr(shown_volumes, "open_volumes", lambda path, *, field: volumes(path, known[path.name]))
    monkeypatch.setattr(shown_volumes, "pair_samples", lambda samples, others, *, field: others)
    found = shown_volumes.other_class(tmp_path, [("LAST", 1), ("LAST", 2), ("MAISI", 1)])
    assert list(found) == ["LAST, seed 1"]
    values = [(round(float(pair.first.max()), 3), round(float(pair.second.max()), 3)) for pair in found["LAST, seed 1"]]
    assert values == [(0.35, 0.3), (0.15, 0.1)]
    assert found["LAST, seed 1"][0].title == "Asked for pos  |  neg  |  difference"
