"""Splits by patient. A patient keeps the split that it was given first, whatever is imported later."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ccella_fast.errors import ConfigError

SPLITS = ("train", "val", "test")


def check_fractions(fractions: Sequence[float]) -> None:
    """Raise ConfigError unless these are the shares of train, val and test."""
    valid = len(fractions) == len(SPLITS) and all(0 <= each <= 1 for each in fractions)
    if not valid or abs(sum(fractions) - 1) > 1e-6 or fractions[0] == 0:
        given = " ".join(f"{each:g}" for each in fractions)
        why = (
            f"the shares of train, val and test must be between 0 and 1, sum up to 1 and leave train some, got {given}"
        )
        raise ConfigError(why, field="--split", fix="give three numbers such as 0.7 0.15 0.15")


def assign_splits(known: Sequence[str], count: int, fractions: Sequence[float]) -> list[str]:
    """The splits of `count` new patients, so that with those of `known` patients the shares are as near as possible.

    Every split that has a share gets at least one patient, if there are enough of them.
    """
    sizes, result = Counter(known), []
    wanted = [split for split, fraction in zip(SPLITS, fractions, strict=True) if fraction > 0]
    for remaining in range(count, 0, -1):
        empty = [split for split in wanted if sizes[split] == 0]
        total = sizes.total() + 1
        lacking = {split: share * total - sizes[split] for split, share in zip(SPLITS, fractions, strict=True)}
        split = empty[0] if len(empty) >= remaining else max(wanted, key=lambda name: lacking[name])
        sizes[split] += 1
        result.append(split)
    return result
