"""Fréchet distance between the slices of two sets ("2.5D"): every slice is a row, and the features are not standardised.

So the reference of CCELLA and MAISI compare volumes, with RadImageNet, in each of three directions and on average. The slices
of a volume are not independent of each other: draws for the floor and the interval take the slices of whole volumes, and never
separate those of one patient.

The rows of one volume after the other are read from the cache. Up to 32,768 rows of a set are in memory at a time. Of more, the
volumes are gathered in blocks, of which only the sums of products are, and which are drawn as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ccella_fast.evaluation.collecting import FeatureTable
from ccella_fast.evaluation.features.cache import FeatureCache
from ccella_fast.evaluation.features.extractor import SliceExtractor
from ccella_fast.evaluation.frechet import distance_of_parts, one_thread
from ccella_fast.evaluation.metrics import Draws, Sets, autoencoder_limit, compared_row, set_names
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.statistics import Statistic, compare_with_floor, group_numbers, grouped_folds, guards

_DRAWS = 20  # with 2,048 features and as many rows, a distance takes seconds
_ROWS = 32_768  # of a set in one direction, half a gigabyte with 2,048 features
_BLOCKS = 16


class _Unit(NamedTuple):
    """Slices that are drawn together, those of a volume or of a block of volumes.

    Attributes:
        size: number of slices.
        total: (d,) sum of the features.
        rows: (size, d) features; None where there are `products`.
        products: (d, d) sum of the products of the features.
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
        draws: of the floors and intervals, of which at most 20 are made.
        about: weights_sha256 and preprocessing of the features.
    """
    few = Draws(min(draws.number, _DRAWS), draws.seed)
    found = [_direction(sets, extractor, space, store, few, about) for space in extractor.spaces]
    start = time.perf_counter()
    # All directions have the same draws in the same order, so that the means of their values are the values of the mean.
    drawn = iter(np.mean([each.values for each in found], axis=0))
    compared = compare_with_floor(
        lambda a, b: float(next(drawn)), *found[0].units, patients=found[0].patients, draws=few.number, seed=few.seed
    )
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
    sets: Sets, extractor: SliceExtractor, space: str, store: FeatureCache, draws: Draws, about: dict[str, Any]
) -> _Direction:
    start = time.perf_counter()
    given = [sets.real, sets.synthetic, *([] if sets.reconstructed is None else [sets.reconstructed])]
    read = [_Reader(table, extractor, space, store) for table in given]
    slices = [sum(len(rows) for rows in each) for each in read[:2]]
    together = 1 if max(slices) <= _ROWS else -(-max(len(table) for table in given) // _BLOCKS)
    rng = np.random.default_rng(draws.seed)
    blocks = [_blocks(table, together, rng) for table in given[:2]]
    origin = next(iter(read[0])).mean(0, dtype=np.float64)
    real, synthetic = (_units(each, of, origin) for each, of in zip(read[:2], blocks, strict=True))
    patients = sets.real.patients if together == 1 else None
    values: list[float] = []

    def distances(units: list[_Unit]) -> Statistic:
        def distance(a: np.ndarray, b: np.ndarray) -> float:
            values.append(_distance([units[row] for row in a], [units[row] for row in b]))
            return values[-1]

        return distance

    sizes = len(real), len(synthetic)
    compared = compare_with_floor(
        distances(real + synthetic), *sizes, patients=patients, draws=draws.number, seed=draws.seed
    )
    drawn, limit = list(values), None
    if sets.reconstructed is not None:
        del synthetic  # as large as what takes its place
        statistic = distances(real + _units(read[2], blocks[0], origin))
        limit = autoencoder_limit(statistic, len(real), compared, patients, draws)
    words = [word for word in guards(len(sets.real), len(sets.synthetic), 1) if word == "few"]
    words += [word for word in guards(slices[0], slices[1], extractor.spaces[space]) if word in ("n<d", "biased")]
    details = {"slices_real": slices[0], "slices_synthetic": slices[1], "volumes_drawn_together": together}
    common = {**set_names(sets), "features": space, "dim": extractor.spaces[space], **about}
    seconds = time.perf_counter() - start
    row = compared_row("fd_slices", compared, "lower", limit, [*words, "dependent"], common, seconds, details)
    return _Direction(row, drawn, sizes, patients)


class _Reader:
    """The slices of a set in one direction, a volume at a time, each (slices, d)."""

    def __init__(self, table: FeatureTable, extractor: SliceExtractor, space: str, store: FeatureCache):
        self._table, self._extractor, self._space, self._store = table, extractor, space, store

    def __iter__(self) -> Iterator[np.ndarray]:
        for digest, spacing in zip(self._table.digests, self._table.spacings, strict=True):
            yield self._store.slices(self._extractor, self._space, digest, spacing)


def _blocks(table: FeatureTable, size: int, rng: np.random.Generator) -> np.ndarray:
    """The block of each volume, of about `size` volumes; none separates the volumes of a patient."""
    if size == 1:
        return np.arange(len(table))
    groups = group_numbers(table.patients, len(table))
    return grouped_folds(groups, min(max(2, round(len(table) / size)), int(groups.max()) + 1), rng)


def _units(volumes: _Reader, blocks: np.ndarray, origin: np.ndarray) -> list[_Unit]:
    """The slices of each block, with `origin` as zero, so that sums of products do not cancel."""
    single = len(np.unique(blocks)) == len(blocks)
    units: dict[int, _Unit] = {}
    for block, rows in zip(blocks.tolist(), volumes, strict=True):
        rows = rows - origin
        own = _Unit(len(rows), rows.sum(0), rows if single else None, None if single else rows.T @ rows)
        units[block] = own if block not in units else _sum([units[block], own])
    return [units[block] for block in sorted(units)]


def _sum(units: Sequence[_Unit]) -> _Unit:
    """The slices of all units as one unit: as rows, or as products if these are smaller."""
    count, total = sum(unit.size for unit in units), np.sum([unit.total for unit in units], axis=0)
    if count < len(total) and all(unit.rows is not None for unit in units):
        return _Unit(count, total, np.concatenate([unit.rows for unit in units if unit.rows is not None]), None)
    products = np.zeros((len(total), len(total)))
    for unit in units:
        products += _products(unit)
    return _Unit(count, total, None, products)


def _products(unit: _Unit) -> np.ndarray:
    if unit.products is not None:
        return unit.products
    assert unit.rows is not None
    return unit.rows.T @ unit.rows


def _distance(a: Sequence[_Unit], b: Sequence[_Unit]) -> float:
    """The Fréchet distance between the slices of two lists of units."""
    sums = [_sum(units) for units in (a, b)]
    means = [unit.total / unit.size for unit in sums]
    roots = [_root(unit, mean) / np.sqrt(unit.size - 1) for unit, mean in zip(sums, means, strict=True)]
    traces = [float(np.square(root).sum()) for root in roots]
    between = float(np.square(means[0] - means[1]).sum())
    return distance_of_parts(between, traces[0], traces[1], roots[0] @ roots[1].T)


def _root(unit: _Unit, mean: np.ndarray) -> np.ndarray:
    """A matrix whose product with itself is the sum of the products of the centred slices, (at most d, d)."""
    if unit.rows is not None:
        return unit.rows - mean
    centred = _products(unit) - unit.size * np.outer(mean, mean)
    with one_thread():
        lower, failed = torch.linalg.cholesky_ex(torch.from_numpy(centred))
        if not failed:
            return lower.T.numpy()
        values, vectors = torch.linalg.eigh(torch.from_numpy(centred))  # features that are constant or depend on others
    return (values.clamp(min=0).sqrt()[:, None] * vectors.T).numpy()
