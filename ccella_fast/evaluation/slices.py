"""Fréchet distance between the slices of two sets ("2.5D"): every slice is a row, and the features are not standardised.

So the reference of CCELLA and MAISI compare volumes, with RadImageNet, in each of three directions and on average. The slices
of a volume are not independent of each other: draws for the floor and the interval take the slices of whole volumes, and never
separate those of one patient.

The rows of one volume after the other are read from the cache. Up to 32,768 rows of a set are in memory at a time. If a set has
more in one of the directions, the volumes are gathered in blocks, the same in all directions, of which only the sums of
products are, and which are drawn as a whole.

With 2,048 features, a distance is work for a second. So it takes the singular values of `frechet.py` as the roots of the
eigenvalues of a product, a third of the time, and forms the products of the rows in float32, a few thousand rows at a time that
are summed in float64. The distance changes by less than 1e-6 of the traces of the covariances.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccella_fast.evaluation.collecting import FeatureTable
from ccella_fast.evaluation.features.cache import FeatureCache
from ccella_fast.evaluation.features.extractor import SliceExtractor
from ccella_fast.evaluation.frechet import one_thread
from ccella_fast.evaluation.metrics import Draws, Sets, autoencoder_limit, compared_row, set_names
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.statistics import Statistic, compare_with_floor, group_numbers, grouped_folds, guards

_DRAWS = 12  # each of three distances
_ROWS = 32_768  # of a set in one direction, half a gigabyte with 2,048 features
_BLOCKS = 16
_PRODUCT_ROWS = 4096  # whose products are summed in float32
_THREADS = 8  # each of which holds the matrices of a distance, 200 MB with 2,048 features
_ROUNDING = 1e-9  # relative to the traces: a smaller distance is that of equal sets


class _Unit(NamedTuple):
    """Slices that are drawn together, those of a volume or of a block of volumes.

    Attributes:
        size: number of slices.
        total: (d,) sum of the features, float64.
        rows: (size, d) features, float32; None where there are `products`.
        products: (d, d) sum of the products of the features, float64.
    """

    size: int
    total: np.ndarray
    rows: np.ndarray | None
    products: np.ndarray | None


def slice_rows(
    sets: Sets, extractor: SliceExtractor, store: FeatureCache, draws: Draws, about: dict[str, Any]
) -> list[Row]:
    """A row `fd_slices` for each direction, and their mean.

    Args:
        sets: the features of volumes.
        extractor: whose spaces are the directions: `NAME-DIRECTION`.
        store: where the features of the slices are.
        draws: of the floors and intervals, of which at most 12 are made.
        about: weights_sha256 and preprocessing of the features.
    """
    few = Draws(min(draws.number, _DRAWS), draws.seed)
    tables = [sets.real, sets.synthetic, *([] if sets.reconstructed is None else [sets.reconstructed])]
    read = {space: [_Reader(table, extractor, space, store) for table in tables] for space in extractor.spaces}
    most = max(each.slices for of_space in read.values() for each in of_space[:2])
    together = 1 if most <= _ROWS else -(-max(map(len, tables)) // _BLOCKS)
    found = [_direction(sets, read[space], space, together, extractor, few, about) for space in extractor.spaces]
    start = time.perf_counter()
    # All directions have the same draws in the same order, so that the means of their values are the values of the mean.
    means = np.mean([each.values for each in found], axis=0).tolist()
    compared = compare_with_floor(
        _statistic([]), *found[0].units, patients=found[0].patients, draws=few.number, seed=few.seed,
        map_calls=lambda statistic, *rows: means,
    )  # fmt: skip
    rows = [each.row for each in found]
    limits = [row.limit_autoencoder for row in rows if row.limit_autoencoder is not None]
    words = list(dict.fromkeys(word for row in rows for word in row.guards))
    name = next(iter(extractor.spaces)).rpartition("-")[0]
    common = {**set_names(sets), "features": name, "dim": rows[0].dim, **about}
    limit, seconds = float(np.mean(limits)) if limits else None, time.perf_counter() - start
    return [*rows, compared_row("fd_slices", compared, "lower", limit, words, common, seconds, {})]


class _Direction(NamedTuple):
    """The comparison in one direction.

    Attributes:
        row: of the results.
        values: of the comparison's draws.
        units: the numbers of real and of synthetic units.
        patients: of the real units.
    """

    row: Row
    values: list[float]
    units: tuple[int, int]
    patients: Sequence[str | None] | None


def _direction(
    sets: Sets,
    read: list[_Reader],
    space: str,
    together: int,
    extractor: SliceExtractor,
    draws: Draws,
    about: dict[str, Any],
) -> _Direction:
    start = time.perf_counter()
    slices = [each.slices for each in read[:2]]
    rng = np.random.default_rng(draws.seed)
    blocks = [_blocks(table, together, rng) for table in (sets.real, sets.synthetic)]
    origin = read[0][0].mean(0)
    real, synthetic = (_units(each, of, origin) for each, of in zip(read[:2], blocks, strict=True))
    patients = sets.real.patients if together == 1 else None
    values: list[float] = []
    sizes = len(real), len(synthetic)
    given_draws: dict[str, Any] = {"patients": patients, "draws": draws.number, "seed": draws.seed}
    with one_thread() as threads, ThreadPoolExecutor(min(threads, _THREADS)) as pool:

        def kept_values(statistic: Statistic, *rows: Sequence[np.ndarray]) -> list[float]:
            values[:] = pool.map(statistic, *rows)
            return values

        compared = compare_with_floor(_statistic(real + synthetic), *sizes, **given_draws, map_calls=kept_values)
        limit = None
        if sets.reconstructed is not None:
            del synthetic  # as large as what takes its place
            statistic = _statistic(real + _units(read[2], blocks[0], origin))
            limit = autoencoder_limit(statistic, len(real), compared, patients, draws, map_calls=pool.map)
    words = [word for word in guards(len(sets.real), len(sets.synthetic), 1) if word == "few"]
    words += [word for word in guards(slices[0], slices[1], extractor.spaces[space]) if word in ("n<d", "biased")]
    details = {"slices_real": slices[0], "slices_synthetic": slices[1], "volumes_drawn_together": together}
    common = {**set_names(sets), "features": space, "dim": extractor.spaces[space], **about}
    seconds = time.perf_counter() - start
    row = compared_row("fd_slices", compared, "lower", limit, [*words, "dependent"], common, seconds, details)
    return _Direction(row, values, sizes, patients)


def _statistic(units: list[_Unit]) -> Statistic:
    return lambda a, b: _distance([units[row] for row in a], [units[row] for row in b])


class _Reader:
    """The slices of a set in one direction: item k is volume k, (slices, d)."""

    def __init__(self, table: FeatureTable, extractor: SliceExtractor, space: str, store: FeatureCache):
        self._table, self._extractor, self._space, self._store = table, extractor, space, store

    def __getitem__(self, volume: int) -> np.ndarray:
        table = self._table
        return self._store.slices(self._extractor, self._space, table.digests[volume], table.spacings[volume])

    @cached_property
    def slices(self) -> int:
        """The number of all slices."""
        keys = zip(self._table.digests, self._table.spacings, strict=True)
        return sum(self._store.count_slices(self._extractor, self._space, *key) for key in keys)


def _blocks(table: FeatureTable, size: int, rng: np.random.Generator) -> np.ndarray:
    """The block of each volume, of about `size` volumes; none separates the volumes of a patient."""
    if size == 1:
        return np.arange(len(table))
    groups = group_numbers(table.patients, len(table))
    return grouped_folds(groups, min(max(2, round(len(table) / size)), int(groups.max()) + 1), rng)


def _units(volumes: _Reader, blocks: np.ndarray, origin: np.ndarray) -> list[_Unit]:
    """The slices of each block, with `origin` as zero, so that sums of products do not cancel."""
    units: list[_Unit] = []
    for block in range(blocks.max() + 1):
        kept, waiting = [], []
        for volume in np.flatnonzero(blocks == block).tolist():
            waiting.append(_unit(volumes[volume] - origin))
            if len(waiting) > 1 and sum(unit.size for unit in waiting) >= _PRODUCT_ROWS:
                kept.append(_sum(waiting, keep_rows=False))
                waiting = []
        single = not kept and len(waiting) == 1
        units.append(waiting[0] if single else _sum([*kept, *waiting], keep_rows=_are_few([*kept, *waiting])))
    return units


def _are_few(units: Sequence[_Unit]) -> bool:
    """Whether there are at most as many slices as features. Rounding would lift the zero eigenvalues of their products."""
    return sum(unit.size for unit in units) <= len(units[0].total) and all(unit.rows is not None for unit in units)


def _unit(rows: np.ndarray) -> _Unit:
    return _Unit(len(rows), rows.sum(0, dtype=np.float64), rows, None)


def _sum(units: Sequence[_Unit], *, keep_rows: bool) -> _Unit:
    """The slices of all units as one unit, with rows or with products."""
    count, total = sum(unit.size for unit in units), np.sum([unit.total for unit in units], axis=0)
    rows = [unit.rows for unit in units if unit.rows is not None]
    if keep_rows:
        return _Unit(count, total, np.concatenate(rows), None)
    products = np.zeros((len(total), len(total)))
    for unit in units:
        if unit.products is not None:
            products += unit.products
    if rows:
        products += _products(np.concatenate(rows))
    return _Unit(count, total, None, products)


def _products(rows: np.ndarray) -> np.ndarray:
    """The sum of the products of the features of all rows, (d, d) in float64.

    The rows are centred first, since float32 would lose their spread if the first volume, the origin, is unlike the others.
    """
    mean = rows.mean(0, dtype=np.float64)
    products = len(rows) * np.outer(mean, mean)
    for start in range(0, len(rows), _PRODUCT_ROWS):
        part = rows[start : start + _PRODUCT_ROWS] - mean.astype(np.float32)
        products += part.T @ part
    return products


def _distance(a: Sequence[_Unit], b: Sequence[_Unit]) -> float:
    """The Fréchet distance between the slices of two lists of units."""
    roots, means, traces = [], [], []
    for units in (a, b):
        whole = _sum(units, keep_rows=_are_few(units))
        means.append(whole.total / whole.size)
        roots.append(_root(whole, means[-1]) / (whole.size - 1) ** 0.5)
        traces.append(float(roots[-1].square().sum()))
    cross = roots[0] @ roots[1].T
    if len(cross) > cross.shape[1]:
        cross = cross.T
    between = float(np.square(means[0] - means[1]).sum())
    shared = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).sqrt().sum()
    distance = between + sum(traces) - 2 * float(shared)
    return 0.0 if distance <= _ROUNDING * sum(traces) else distance  # NaN, as of a set of one slice, stays NaN


def _root(unit: _Unit, mean: np.ndarray) -> Tensor:
    """A matrix whose product with itself is the sum of the products of the centred slices, (at most d, d)."""
    if unit.rows is not None:
        return torch.from_numpy(unit.rows - mean)
    assert unit.products is not None
    centred = torch.from_numpy(unit.products - unit.size * np.outer(mean, mean))
    lower, failed = torch.linalg.cholesky_ex(centred)
    if not failed:
        return lower.T
    values, vectors = torch.linalg.eigh(centred)  # features that are constant or depend on others
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
