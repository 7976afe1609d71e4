"""Planted copies are recovered without false alarms; what only resembles a copy is not called one."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation import memorisation
from ccella_fast.evaluation.copying import (
    _weibull_tail,
    data_copying,
    k_means,
    mann_whitney_z,
    memorisation_of_distances,
    own_study_retrieval,
)

SIZE = 32
FREQUENCY = np.fft.fftfreq(SIZE)
WINDOW = np.sqrt(np.hanning(SIZE)[:, None] * np.hanning(SIZE)) * np.linspace(0.9, 1.1, SIZE)[:, None]  # not symmetric
RADIUS = np.hypot(FREQUENCY[:, None], np.fft.rfftfreq(SIZE))


def images(n: int, rng: np.random.Generator) -> np.ndarray:
    """Random textures, each with a spectrum and an intensity distribution of its own, as patients have."""
    noise = np.fft.rfft2(rng.normal(size=(n, SIZE, SIZE)))
    bands = np.exp(rng.normal(0, 0.7, (n, 12)))
    gain = np.stack([np.interp(RADIUS, np.linspace(0, 0.71, 12), each) for each in bands])
    texture = np.fft.irfft2(noise * gain / (0.1 + RADIUS), s=(SIZE, SIZE))
    return rng.uniform(0.5, 2, (n, 1, 1)) * texture / texture.std(axis=(1, 2), keepdims=True) + rng.normal(
        5, 1, (n, 1, 1)
    )


def features(x: np.ndarray) -> np.ndarray:
    """Logarithms of the windowed power in 15 rings and 9 quantiles of the intensities: nearly blind to shifts and flips."""
    power = np.abs(np.fft.rfft2(WINDOW * (x - x.mean(axis=(1, 2), keepdims=True)))) ** 2
    rings = [power[:, (radius <= RADIUS) & (radius + 0.032 > RADIUS)] for radius in np.arange(16) * 0.032]
    quantiles = np.quantile(x, np.linspace(0.1, 0.9, 9), axis=(1, 2)).T
    return np.concatenate(
        [np.stack([np.log(ring.mean(axis=1) + 1e-9) for ring in rings[1:]], axis=1), quantiles], axis=1
    )


def blurred(x: np.ndarray) -> np.ndarray:
    return 0.9 * x + 0.025 * sum(np.roll(x, step, axis) for step in (-1, 1) for axis in (1, 2))


CHANGES = {
    "exact": lambda x: x,
    "blurred": blurred,
    "shifted": lambda x: np.roll(x, 1, axis=2),
    "flipped": lambda x: x[:, ::-1],
    "gain +5 %": lambda x: 1.05 * (x - 5) + 5,
    "gain -5 %": lambda x: 0.95 * (x - 5) + 5,
}


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(1)
    train = images(300, rng)
    return train, features(train), features(images(500, rng)), features(images(200, rng))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("share", [0.01, 0.05, 0.2])
def test_planted_copies_are_recovered(world, change, share):
    train, train_features, held_out, fresh = world
    count, rows = round(share * 200), np.random.default_rng(2).permutation(300)
    planted = features(CHANGES[change](train[rows[:count]]))
    synthetic = np.concatenate([planted, fresh[count:]])
    found = memorisation(train_features, held_out, synthetic)
    assert found.copies == pytest.approx(share, abs=0.02)
    assert found.nearest.is_copy[:count].mean() >= 0.9 and not found.nearest.is_copy[count:].any()
    called = found.nearest.is_copy
    assert (found.nearest.distance[called] < found.null.min()).all()
    assert (found.nearest.row[:count][called[:count]] == rows[:count][called[:count]]).all()
    assert found.share_below_1pct == pytest.approx(share + 0.01 * (1 - share), abs=0.02)
    assert found.share_below_5pct == pytest.approx(share + 0.05 * (1 - share), abs=0.035)
    assert found.copies_ci95[0] < share < found.copies_ci95[1]
    assert found.nearest.calibrated[called].min() > 2 and (found.nearest.percentile[called] == 0).all()
    if share == 0.2:
        assert found.ct < -1.5


def test_held_out_volumes_are_never_called_copies(world):
    """The held-out volumes themselves and as many others: no false alarm. The 1 % threshold has two."""
    _, train, held_out, fresh = world
    held_out = held_out[:200]
    itself, new = memorisation(train, held_out, held_out), memorisation(train, held_out, fresh)
    assert itself.copies == new.copies == 0 and not itself.nearest.is_copy.any()
    assert itself.share_below_1pct * 200 == 2
    assert abs(new.share_below_1pct - 0.01) <= 0.02 and abs(new.share_below_5pct - 0.05) <= 0.035
    assert abs(new.ct) < 1.5 and itself.ct == 0 and itself.index == pytest.approx(0, abs=1e-12)
    assert itself.nearest.percentile == pytest.approx(100 * (1 + held_out_ranks(itself)) / 200)
    assert itself.guards == [] and memorisation(train, held_out[:98], fresh).guards == ["few_held_out"]


def held_out_ranks(found) -> np.ndarray:
    return np.array([(found.nearest.distance < distance).sum() for distance in found.nearest.distance])


@pytest.mark.parametrize(("n", "h", "m", "d"), [(200, 200, 200, 64), (100, 20, 100, 8), (40, 10, 24, 16)])
def test_false_alarms_are_rare_also_with_few_held_out_volumes(n, h, m, d):
    """At most one simulated study in ten has any call; the smallest null value alone gives calls in nearly every one."""
    alarms = simple = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        found = memorisation(rng.normal(size=(n, d)), rng.normal(size=(h, d)), rng.normal(size=(m, d)))
        alarms += found.copies > 0
        simple += bool((found.nearest.distance < found.null.min()).any())
    assert alarms <= 6 and simple >= 20


def test_an_average_volume_is_near_to_all_and_copies_none():
    """A generator without detail: nearer to the training set than any real volume, and yet not a copy."""
    rng = np.random.default_rng(1)
    train, held_out = rng.normal(size=(100, 64)), rng.normal(size=(100, 64))
    found = memorisation(train, held_out, 0.3 * rng.normal(size=(50, 64)))
    assert (found.nearest.distance < found.null.min()).all() and found.share_below_1pct == 1
    assert found.copies == 0
    assert memorisation(train, held_out, train[:50] + 0.3 * rng.normal(size=(50, 64))).copies == 1  # negative control


def test_a_copy_is_nearer_than_every_held_out_volume():
    """Here one held-out volume repeats a training volume even more closely, as a second study of a patient would."""
    rng = np.random.default_rng(1)
    train, held_out = rng.normal(size=(100, 64)), rng.normal(size=(500, 64))
    synthetic = train[:20] + 0.01 * rng.normal(size=(20, 64))
    assert memorisation(train, held_out, synthetic).copies == 1
    held_out[0] = train[0] + 0.001 * rng.normal(size=64)
    found = memorisation(train, held_out, synthetic)
    assert found.copies == 0 and found.share_below_1pct == 1
    assert memorisation(train, held_out, train[:20]).copies == 1


def test_percentiles_of_the_null_are_those_that_a_new_volume_is_below_with_their_probability():
    """Of 99 null values 1 to 99, a new value is below the smallest with a probability of 1 %, and below the fifth with 5 %."""
    train = np.linspace(200, 300, 12)
    null = np.stack([np.append(train, nearest) for nearest in range(1, 100)])
    synthetic = np.stack([np.append(train, nearest) for nearest in (0.9, 1.1, 4.9, 5.1)])
    found = memorisation_of_distances(null, synthetic)
    assert found.share_below_1pct == 0.25 and found.share_below_5pct == 0.75
    assert found.nearest.percentile == pytest.approx(np.array([0, 1, 4, 5]) / 0.99)
    assert found.nearest.row.tolist() == [12] * 4 and found.ct is None


def test_repeated_training_volumes_do_not_hide_copies():
    rng = np.random.default_rng(1)
    train = np.repeat(rng.normal(size=(60, 32)), 2, axis=0) + 0.01 * rng.normal(size=(120, 32))
    found = memorisation(train, rng.normal(size=(100, 32)), train[:20] + 0.1 * rng.normal(size=(20, 32)))
    assert found.copies == 1


def test_distances_and_index_equal_the_loops(world):
    _, train, held_out, fresh = world
    found = memorisation(train, held_out, fresh)
    table = [[np.linalg.norm(x - y) for y in train] for x in fresh[:40]]
    null = np.array([min(np.linalg.norm(x - y) for y in train) for x in held_out])
    assert found.nearest.distance[:40] == pytest.approx([min(row) for row in table])
    assert found.nearest.row[:40].tolist() == [row.index(min(row)) for row in table]
    assert found.null == pytest.approx(np.sort(null))
    assert found.nearest.calibrated[:40] == pytest.approx(
        [(null.mean() - min(row)) / null.std(ddof=1) for row in table]
    )


def test_held_out_volumes_at_one_distance_give_a_finite_index():
    train, held_out = np.zeros((10, 3)), np.eye(3)
    assert memorisation(train, held_out, held_out).index == 0
    found = memorisation(train, held_out, np.concatenate([2 * held_out, held_out / 2]))
    assert np.isfinite(found.index) and (np.sign(found.nearest.calibrated) == [-1, -1, -1, 1, 1, 1]).all()


def test_an_outlier_of_the_training_set_hides_no_copy(world):
    _, train, held_out, fresh = world
    train = np.concatenate([train, np.full((1, train.shape[1]), 1e10)])
    found = memorisation(train, held_out, np.concatenate([train[:5], fresh]))
    assert found.nearest.is_copy[:5].all() and not found.nearest.is_copy[5:].any()


def test_a_held_out_volume_of_the_training_set_is_refused(world):
    _, train, held_out, fresh = world
    with pytest.raises(DataError, match="2 held-out volumes are also training volumes; the first is row 5"):
        memorisation(train, np.concatenate([held_out[:5], train[7:9]]), fresh)
    with pytest.raises(DataError, match="held-out set has 2 volumes; this needs at least 3"):
        memorisation(train, held_out[:2], fresh)
    with pytest.raises(DataError, match="different numbers of features"):
        memorisation(train, held_out, fresh[:, :3])
    with pytest.raises(DataError, match="training set has 2 volumes; this needs at least 3"):
        memorisation(train[:2], held_out, fresh)
    assert memorisation(train[:3], held_out, fresh[:1]).copies == 0
    assert memorisation(train, held_out, train[:1]).copies == 1


def test_the_tail_is_that_of_the_fitted_weibull_distribution():
    rng = np.random.default_rng(1)
    null = 3 * rng.weibull(8, 100_000)
    values = np.array([0.0, 1, 1.5, 2, 3, 9])
    assert _weibull_tail(values, null) == pytest.approx(1 - np.exp(-((values / 3) ** 8)), rel=0.06)
    few = _weibull_tail(values[1:3], null[:20])
    assert (few > _weibull_tail(values[1:3], null)).all()  # more careful with fewer values


def test_mann_whitney_equals_the_pairs_and_its_null_is_standard_normal():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 6, 9), rng.integers(0, 5, 7)
    pairs = sum((x > y) + 0.5 * (x == y) for x in a for y in b)
    assert mann_whitney_z(a, b) == pytest.approx((pairs - 31.5) / np.sqrt(63 * 17 / 12))
    null = [mann_whitney_z(rng.normal(size=12), rng.normal(size=20)) for _ in range(500)]
    assert np.mean(null) == pytest.approx(0, abs=0.12) and np.std(null) == pytest.approx(1, abs=0.1)


def test_c_t_is_the_weighted_mean_over_cells():
    """Two distant clusters: copies in one, new volumes in the other; three quarters of the real volumes are in the first."""
    rng = np.random.default_rng(1)

    def two(first, second):
        return np.concatenate([rng.normal(size=(first, 4)), 50 + rng.normal(size=(second, 4))])

    train, held_out = two(60, 60), two(60, 20)
    synthetic = np.concatenate([train[:40] + 0.01, 50 + rng.normal(size=(30, 4))])
    z = []
    for cell in (0, 1):
        inside = [x[(x.mean(axis=1) > 25) == cell] for x in (train, held_out, synthetic)]
        near = [np.array([min(np.linalg.norm(x - y) for y in inside[0]) for x in each]) for each in inside[1:]]
        z.append(mann_whitney_z(near[1], near[0]))
    found = data_copying(train, held_out, synthetic, cells=2)
    assert found == pytest.approx((60 * z[0] + 20 * z[1]) / 80) and z[0] < -5 < z[1]
    assert data_copying(train, held_out, synthetic, cells=2, least=35) == pytest.approx(z[0])
    assert data_copying(train, held_out, synthetic[:10]) is None


def test_k_means_finds_separate_clusters_and_ends_for_equal_points():
    rng = np.random.default_rng(1)
    points = np.concatenate([centre + rng.normal(size=(20, 3)) for centre in (0, 20, 40)])
    centres = k_means(points, 3)
    assert np.sort(centres.mean(axis=1)) == pytest.approx([0, 20, 40], abs=0.6)
    assert (k_means(points, 3) == centres).all()
    assert len(k_means(np.ones((10, 3)), 3)) == 1


def test_own_study_retrieval():
    rng = np.random.default_rng(1)
    train = rng.normal(size=(50, 16))
    own = rng.integers(0, 50, 40)
    copies, new = train[own] + 0.1 * rng.normal(size=(40, 16)), rng.normal(size=(40, 16))
    found = own_study_retrieval(train, np.concatenate([copies[:20], new[20:]]), own.tolist(), new, own.tolist())
    assert found.rate == pytest.approx(0.5, abs=0.1) and found.ci95[0] < found.rate < found.ci95[1]
    assert found.held_out_rate < 0.15 and found.chance == 0.02
    ranks = [
        1 + sum(np.linalg.norm(x - y) < np.linalg.norm(x - train[i]) for y in train)
        for x, i in zip(new, own, strict=True)
    ]
    alone = own_study_retrieval(train, new, own)
    assert alone.median_rank == np.median(ranks) and alone.held_out_rate is None
    with pytest.raises(DataError, match="one row of the training set per volume, from 0 to 49"):
        own_study_retrieval(train, new, [50] * 40)
