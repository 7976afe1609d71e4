"""Diversity of a set as a row of the results: MS-SSIM of pairs, kept in the cache and shared among processes."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ccella_fast.evaluation.collecting import FeatureTable
from ccella_fast.evaluation.images import Diversity, draw_pairs, ms_ssim_of_pairs, ms_ssim_scales, summarize_pairs
from ccella_fast.evaluation.metrics import Sets
from ccella_fast.evaluation.results import Row
from ccella_fast.evaluation.volumes import Volume
from ccella_fast.processes import DistributedContext
from ccella_fast.progress import refresh_interval
from ccella_fast.storage import write_json

PAIRS = 200  # of a set


def diversity_row(
    real: Sequence[Volume],
    synthetic: Sequence[Volume],
    sets: Sets,
    *,
    shape: Sequence[int],
    seed: int,
    cache: str | Path | None,
    processes: DistributedContext,
    progress: bool,
) -> Iterator[Row]:
    """MS-SSIM between synthetic volumes next to that between real volumes; nothing if a set has one patient only.

    Args:
        real: the volumes of `sets.real`.
        synthetic: the volumes of `sets.synthetic`.
        sets: what is known of them.
        shape: of all volumes.
        seed: of the pairs.
        cache: folder of values that have been computed.
        processes: that share the pairs.
        progress: whether a bar is shown.
    """
    start = time.perf_counter()
    if len(set(sets.real.patients) - {None}) < 2 and None not in sets.real.patients:
        return
    of_real, of_synthetic = (
        _diversity(volumes, table, shape, seed, cache, processes, progress)
        for volumes, table in ((real, sets.real), (synthetic, sets.synthetic))
    )
    words = ("few",) if min(len(sets.real), len(sets.synthetic)) < 20 else ()
    yield Row(
        "msssim", None, sets.real.sequence, sets.synthetic.name, sets.real.name, of_synthetic.mean, len(sets.real),
        len(sets.synthetic), "floor", of_synthetic.mean, of_synthetic.ci95, of_real.mean,
        of_synthetic.mean / of_real.mean if of_real.mean else None, guards=words,
        details={"real": of_real._asdict(), "synthetic": of_synthetic._asdict()},
        seconds=round(time.perf_counter() - start, 3),
    )  # fmt: skip


def _diversity(
    volumes: Sequence[Volume],
    table: FeatureTable,
    shape: Sequence[int],
    seed: int,
    cache: str | Path | None,
    processes: DistributedContext,
    progress: bool,
) -> Diversity:
    pairs = draw_pairs(table.patients, PAIRS, seed)
    values = np.zeros(len(pairs))
    shown = progress and processes.rank == 0
    title = f"pairs of {table.name}"
    with tqdm(total=len(pairs), desc=title, unit="pair", mininterval=refresh_interval(), disable=not shown) as bar:
        for first in processes.shard(np.unique(pairs[:, 0]).tolist()):
            rows = np.flatnonzero(pairs[:, 0] == first)
            path = None if cache is None else Path(cache) / f"{_key(table, pairs[rows])}.json"
            kept = _read(path, len(rows))
            if kept is None:
                kept = ms_ssim_of_pairs(volumes, pairs[rows])[0].tolist()
                if path is not None:
                    write_json(path, kept)
            values[rows] = kept
            bar.update(len(rows) * processes.world_size)
    levels, kernel_size = ms_ssim_scales(shape)
    return summarize_pairs(processes.sum(values), pairs, table.classes, levels, kernel_size)


def _key(table: FeatureTable, pairs: np.ndarray) -> str:
    """The SHA-256 of the contents of the pairs' volumes, in order."""
    digest = hashlib.sha256(b"ms-ssim 1")
    for row in pairs.ravel():
        digest.update(table.digests[int(row)])
    return digest.hexdigest()


def _read(path: Path | None, count: int) -> list[float] | None:
    """The values in a file; None if there is none, or if it is not as it was written."""
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    good = isinstance(values, list) and len(values) == count and all(isinstance(value, float) for value in values)
    return values if good else None
