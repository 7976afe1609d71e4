"""The cache finds what was computed, and believes nothing else."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.errors import DiskError
from ccella_fast.evaluation.features.cache import FeatureCache, cache_key, voxel_digest
from ccella_fast.evaluation.volumes import Volume
from feature_fixtures import make_volume


class Counting:
    """An extractor that counts its calls."""

    spaces = {"b": 3, "a": 2}
    sequences = None

    def __init__(self, **identity: object):
        self.identity: dict[str, object] = {"extractor": "counting", **identity}
        self.calls = 0

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        self.calls += 1
        total = float(volume.array.sum(dtype=np.float64))
        return {"b": np.array([total, 1, 2], np.float32), "a": np.array([3, total], np.float32)}


def key_of(extractor: Counting, volume: Volume) -> str:
    return cache_key(extractor.identity, voxel_digest(volume), volume.spacing)


def same(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    return list(first) == list(second) and all(np.array_equal(first[name], second[name]) for name in first)


def test_second_call_reads_the_folder(tmp_path: Path):
    extractor, volume = Counting(), make_volume()
    first = FeatureCache(tmp_path / "cache").features(extractor, volume)
    second = FeatureCache(tmp_path / "cache").features(extractor, volume)
    assert extractor.calls == 1 and same(first, second) and same(first, extractor(volume))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]


@pytest.mark.parametrize(
    "change",
    [
        lambda volume: volume._replace(array=volume.array + np.float32(1e-7) * (volume.array > 0.9)),
        lambda volume: volume._replace(array=volume.array.reshape(22, 24, 10)),
        lambda volume: volume._replace(spacing=(2.0, 2.0, 3.0001)),
        lambda volume: volume._replace(array=volume.array[::-1]),
    ],
    ids=["voxels", "shape", "spacing", "order"],
)
def test_another_volume_has_another_key(change, tmp_path: Path):
    extractor, cache = Counting(), FeatureCache(tmp_path)
    cache.features(extractor, make_volume())
    cache.features(extractor, change(make_volume()))
    assert extractor.calls == 2 and len(list(tmp_path.iterdir())) == 2


def test_another_identity_has_another_key(tmp_path: Path):
    cache, volume = FeatureCache(tmp_path), make_volume()
    extractors = [
        Counting(),
        Counting(version=1),
        Counting(version=2),
        Counting(preprocessing={"spacing_mm": [1.0, 1.0]}),
    ]
    for extractor in extractors:
        cache.features(extractor, volume)
    assert [extractor.calls for extractor in extractors] == [1, 1, 1, 1] and len(list(tmp_path.iterdir())) == 4


def test_key_does_not_depend_on_memory_layout_or_names():
    volume = make_volume()
    others = [
        volume._replace(array=np.asfortranarray(volume.array)),
        volume._replace(array=volume.array.astype(">f4")),
        volume._replace(id="other", patient="p", pirads="pos"),
        volume._replace(spacing=tuple(np.array(volume.spacing))),
    ]
    assert {key_of(Counting(), other) for other in others} == {key_of(Counting(), volume)}
    first, second = Counting(a=1, b=2), Counting(b=2, a=1)
    assert key_of(first, volume) == key_of(second, volume) != key_of(Counting(a=2, b=1), volume)


def test_damaged_entries_are_computed_again(tmp_path: Path):
    extractor, cache, volume = Counting(), FeatureCache(tmp_path), make_volume()
    truth = cache.features(extractor, volume)
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damaged = [content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :] for place in range(len(content))]
    damaged += [content[:-1], content[: len(content) // 2], b"", content + b"\0", b"\xff" * 64]
    believed = 0
    for bad in damaged:
        path.write_bytes(bad)
        calls = extractor.calls
        assert same(cache.features(extractor, volume), truth)
        believed += extractor.calls == calls
        assert path.read_bytes() == content or extractor.calls == calls
    assert believed < 5  # spaces at the end of the header, which hold nothing


def test_entry_of_another_volume_under_its_name_is_not_believed(tmp_path: Path):
    extractor, cache = Counting(), FeatureCache(tmp_path)
    cache.features(extractor, make_volume())
    (first,) = tmp_path.iterdir()
    other = make_volume(seed=1)
    os.replace(first, tmp_path / f"{key_of(extractor, other)}.safetensors")
    assert same(cache.features(extractor, other), extractor(other))
    assert extractor.calls == 3


def test_many_writers_of_one_entry(tmp_path: Path):
    volume, extractor = make_volume(), Counting()
    truth = extractor(volume)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: FeatureCache(tmp_path).features(extractor, volume), range(40)))
    assert all(same(result, truth) for result in results)
    assert [path.name for path in tmp_path.iterdir()] == [f"{key_of(extractor, volume)}.safetensors"]


def test_a_failed_extractor_leaves_nothing(tmp_path: Path):
    class Failing(Counting):
        def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
            raise ValueError("no features")

    with pytest.raises(ValueError, match="no features"):
        FeatureCache(tmp_path).features(Failing(), make_volume())
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError, match="file"):
        FeatureCache(tmp_path / "file" / "cache").features(Counting(), make_volume())
