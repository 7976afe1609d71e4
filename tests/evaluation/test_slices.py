"""The Fréchet distance of slices: against a plain computation, with floors that do not separate volumes, and in blocks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation import slices as slices_of
from ccella_fast.evaluation.features.cache import FeatureCache, voxel_digest
from ccella_fast.evaluation.features.preprocessing import mean_of_slices
from ccella_fast.evaluation.frechet import frechet_distance
from ccella_fast.evaluation.run import evaluate
from evaluation_fixtures import some_volumes

DIRECTIONS = ("axial", "coronal", "sagittal")


class Slices:
    """Four numbers of each slice, as a stand-in for a network."""

    spaces = {f"fake-{name}": 4 for name in DIRECTIONS}
    sequences = None
    identity: dict[str, object] = {"extractor": "slices", "weights_sha256": "a" * 64, "preprocessing": "none"}

    def __init__(self):
        self.calls = 0

    def slices(self, volume):
        self.calls += 1
        return {space: features(volume.array, space).astype(np.float32) for space in self.spaces}

    def __call__(self, volume):
        return mean_of_slices(self.slices(volume))


def features(array: np.ndarray, space: str) -> np.ndarray:
    """Mean, deviation and mean steps of each slice, in a plain loop."""
    axis = {"axial": 2, "coronal": 1, "sagittal": 0}[space.rpartition("-")[2]]
    found = []
    for k in range(array.shape[axis]):
        x = array.take(k, axis).astype(np.float64)
        found.append([x.mean(), x.std(), np.abs(np.diff(x, axis=0)).mean(), np.abs(np.diff(x, axis=1)).mean()])
    return 100 * np.array(found)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The definition, with the root from eigenvalues of the product of covariances."""
    ca, cb = np.cov(a.T), np.cov(b.T)
    roots = np.sqrt(np.linalg.eigvals(ca @ cb).astype(complex)).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(ca) + np.trace(cb) - 2 * roots.sum())


def stacked(volumes, space: str) -> np.ndarray:
    return np.concatenate([features(volume.array, space) for volume in volumes])


@pytest.mark.parametrize("blocks", [False, True])
def test_slices_are_rows_and_volumes_are_drawn(tmp_path, monkeypatch, blocks):
    if blocks:
        monkeypatch.setattr(slices_of, "_ROWS", 1)
        monkeypatch.setattr(slices_of, "_BLOCKS", 4)
    real, synthetic = some_volumes(8, 0), some_volumes(8, 100, smooth=2)
    again = [v._replace(array=v.array * 0.9) for v in real]
    given = {"real": real, "features": [Slices()], "metrics": ["fd"], "draws": 100, "reconstructed": again}
    result = evaluate(synthetic=synthetic, cache=tmp_path, **given)
    rows = {row.features: row for row in result.rows if row.metric == "fd_slices"}
    assert list(rows) == [*Slices.spaces, "fake"]
    for space in Slices.spaces:
        row, axis = rows[space], {"axial": 2, "coronal": 1, "sagittal": 0}[space.rpartition("-")[2]]
        assert row.value == pytest.approx(frechet(stacked(real, space), stacked(synthetic, space)), rel=1e-4)
        assert row.details["slices_real"] == 8 * real[0].array.shape[axis] and (row.n_real, row.n_synthetic) == (8, 8)
        assert row.details["volumes_drawn_together"] == (2 if blocks else 1) and "dependent" in row.guards
        of_case = [features(volume.array, space) for volume in real]
        halves = [
            frechet(
                *(np.concatenate([of_case[k] for k in range(8) if (k in half) == inside]) for inside in (True, False))
            )
            for half in itertools.combinations(range(8), 4)
        ]
        if blocks:  # there are three ways to halve four blocks
            assert min(halves) * (1 - 1e-4) <= row.floor <= max(halves) * (1 + 1e-4)
        else:
            assert row.floor == pytest.approx(np.mean(halves), abs=4 * np.std(halves) / np.sqrt(row.details["draws"]))
        assert row.details["draws"] == 12 and row.value_equal_n > row.floor and row.limit_autoencoder > row.floor
        means = result["fd", space].value  # negative control: a volume is a row of the other metric
        assert means != pytest.approx(row.value, rel=0.1)
    for name in ("value", "value_equal_n", "floor", "limit_autoencoder"):
        expected = np.mean([getattr(rows[space], name) for space in Slices.spaces])
        assert getattr(rows["fake"], name) == pytest.approx(expected, rel=1e-9)
    mean = rows["fake"]
    assert blocks or mean.ratio == pytest.approx(mean.value_equal_n / mean.floor)  # four blocks have too few halves
    assert mean.ci95[0] < mean.value < mean.ci95[1]
    assert "fd_slices" not in {row.metric for row in evaluate(synthetic=synthetic, **given).rows}  # needs a folder


def test_volumes_of_a_patient_are_not_separated(tmp_path):
    cases = some_volumes(4, 0)
    twins = [v._replace(id=f"{v.id}-{k}", array=v.array + np.float32(1e-3 * k)) for v in cases for k in range(2)]
    given = {
        "synthetic": some_volumes(8, 100),
        "features": [Slices()],
        "metrics": ["fd"],
        "cache": tmp_path,
        "draws": 20,
    }
    known = [volume._replace(patient=volume.id[:2]) for volume in twins]
    floors = [evaluate(real=real, **given)["fd_slices", "fake-axial"].floor for real in (twins, known)]
    assert floors[1] > 1.2 * floors[0]  # halves with a twin each are nearly equal


def test_blocks_change_the_draws_and_not_the_value(tmp_path, monkeypatch):
    real, synthetic = some_volumes(12, 0), some_volumes(9, 100)
    given = {"real": real, "synthetic": synthetic, "features": [Slices()], "metrics": ["fd"], "draws": 4}
    single = evaluate(cache=tmp_path, **given)
    monkeypatch.setattr(slices_of, "_ROWS", 1)
    monkeypatch.setattr(slices_of, "_BLOCKS", 4)
    extractor = given["features"][0]
    blocks = evaluate(cache=tmp_path, **given)
    assert extractor.calls == 21  # nothing is computed twice
    for space in (*Slices.spaces, "fake"):
        assert blocks["fd_slices", space].value == pytest.approx(single["fd_slices", space].value, rel=1e-5)


@pytest.mark.parametrize("constant", [False, True])
def test_products_give_what_rows_give(constant):
    random = np.random.default_rng(0)
    sets = [
        random.standard_normal((n, 6)) * [1, 2, 3, 4, 5, 0 if constant else 6] + shift
        for n, shift in ((40, 0), (30, 1))
    ]
    parts = [[x[:9], x[9:20], x[20:]] for x in sets]
    origin = np.ones(6)
    for blocks in ([0, 1, 2], [0, 0, 1], [1, 0, 1]):
        units = [slices_of._units(each, np.array(blocks), origin) for each in parts]
        assert any(unit.rows is None for unit in units[0]) == (blocks != [0, 1, 2])
        assert slices_of._distance(*units) == pytest.approx(frechet(*sets), rel=1e-9)
    assert slices_of._distance(units[0], units[0]) == 0


@pytest.mark.parametrize("joined", [False, True])
def test_a_distance_of_many_features_is_that_of_singular_values(joined):
    """float32 products and roots of eigenvalues, where the variances of the features span nine orders of magnitude."""
    random = np.random.default_rng(0)
    scale = np.logspace(0, -4.5, 64)
    sets = [
        (random.standard_normal((9000, 64)) @ random.standard_normal((64, 64)) * scale + 3).astype(np.float32)
        for _ in range(2)
    ]
    blocks, origin = np.zeros(3, int) if joined else np.arange(3), sets[0][:9].mean(0)
    distance = slices_of._distance(*(slices_of._units(np.split(x, 3), blocks, origin) for x in sets))
    truth = frechet_distance(*sets)
    traces = sum(np.trace(np.cov(x.T, dtype=np.float64)) for x in sets)
    assert abs(distance - truth) < 1e-6 * traces
    assert truth > 1e-2 * traces  # so that the bound says something


def test_a_missing_or_damaged_entry_is_named(tmp_path):
    volume, extractor, store = some_volumes(1, 0)[0], Slices(), FeatureCache(tmp_path)
    digest = voxel_digest(volume)
    with pytest.raises(DataError, match="missing or damaged"):
        store.slices(extractor, "fake-axial", digest, volume.spacing)
    with pytest.raises(DataError, match="missing or damaged"):
        store.count_slices(extractor, "fake-axial", digest, volume.spacing)
    vector = store.features(extractor, volume)
    kept = store.slices(extractor, "fake-axial", digest, volume.spacing)
    np.testing.assert_allclose(kept, features(volume.array, "fake-axial"), rtol=1e-5)
    np.testing.assert_allclose(vector["fake-axial"], kept.mean(0), rtol=1e-5)
    assert store.count_slices(extractor, "fake-axial", digest, volume.spacing) == len(kept)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(DataError, match=file.name):
        store.slices(extractor, "fake-axial", digest, volume.spacing)


def test_all_directions_are_drawn_in_the_same_blocks(tmp_path, monkeypatch):
    """Of 12 volumes, the 96 axial slices would fit in memory and the 192 sagittal ones not."""
    real, synthetic = some_volumes(12, 0), some_volumes(12, 100, smooth=2)
    monkeypatch.setattr(slices_of, "_ROWS", 100)
    monkeypatch.setattr(slices_of, "_BLOCKS", 4)
    found = evaluate(real=real, synthetic=synthetic, features=[Slices()], metrics=["fd"], draws=4, cache=tmp_path)
    rows = [found["fd_slices", space] for space in Slices.spaces]
    assert [row.details["volumes_drawn_together"] for row in rows] == [3, 3, 3]
    for name in ("value", "value_equal_n", "floor"):
        expected = np.mean([getattr(row, name) for row in rows])
        assert getattr(found["fd_slices", "fake"], name) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("slices", [(60, 62), (64, 64), (80, 80)])
def test_few_slices_in_blocks_are_as_exact_as_rows(slices):
    """No more slices than features: in float32, products of them would be off by 1e-4 of the traces."""
    random = np.random.default_rng(0)
    sets = [random.standard_normal((n, 128)).astype(np.float32) for n in (2000, sum(slices))]
    volumes = [np.split(sets[0], 10), np.split(sets[1], np.cumsum([slices[0] // 2, slices[0] // 2, slices[1] // 2]))]
    units = [slices_of._units(of_set, np.arange(len(of_set)) // 2, np.zeros(128, np.float32)) for of_set in volumes]
    traces = sum(np.trace(np.cov(x.T, dtype=np.float64)) for x in sets)
    assert slices_of._distance(*units) == pytest.approx(frechet_distance(*sets), abs=1e-6 * traces)


def test_the_first_volume_may_be_unlike_the_others():
    """Its mean is the zero of all products, which are sums in float32."""
    random = np.random.default_rng(0)
    sets = [random.standard_normal((4000, 16)).astype(np.float32) + shift for shift in (100, 100.05)]
    origin = np.zeros(16, np.float32)
    units = [slices_of._units(np.split(x, 200), np.arange(200), origin) for x in sets]
    traces = sum(np.trace(np.cov(x.T, dtype=np.float64)) for x in sets)
    assert slices_of._distance(*units) == pytest.approx(frechet_distance(*sets), abs=1e-6 * traces)


def test_the_distance_to_a_single_slice_is_no_number():
    units = [slices_of._unit(np.random.default_rng(n).standard_normal((n, 3)).astype(np.float32)) for n in (5, 1)]
    with np.errstate(all="ignore"):
        assert np.isnan(slices_of._distance(units[:1], units[1:]))
