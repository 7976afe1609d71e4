"""The arms of the experiment: what each trains on, and the order in which its studies are drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Literal, NamedTuple

import numpy as np

from ccella_fast.downstream.data import LabelledCase

Source = Literal["real", "reconstructed", "synthetic", "predicted", "baseline"]
GENERATED: dict[Source, str] = {"synthetic": "--synthetic", "predicted": "--synthetic", "baseline": "--baseline"}


class TrainingArm(NamedTuple):
    """The sources that an arm trains on, and how it is described."""

    sources: tuple[Source, ...]
    about: str


ARMS = {
    "r": TrainingArm(("real",), "real"),
    "rr": TrainingArm(("real", "real"), "real twice"),
    "v": TrainingArm(("reconstructed",), "real, reconstructed by the autoencoder"),
    "s": TrainingArm(("synthetic",), "synthetic, class as asked for"),
    "sl": TrainingArm(("predicted",), "synthetic, class as predicted"),
    "rs": TrainingArm(("real", "synthetic"), "real and synthetic, class as asked for"),
    "rsl": TrainingArm(("real", "predicted"), "real and synthetic, class as predicted"),
    "rb": TrainingArm(("real", "baseline"), "real and the baseline's"),
}
# The differences that are reported, as far as their arms are there. The first two belong to the main question.
CONTRASTS = [
    ("rs", "rr"), ("rs", "r"), ("s", "r"), ("rs", "rb"), ("v", "r"), ("rr", "r"), ("s", "v"), ("rb", "rr"), ("rb", "r"),
    ("rsl", "rr"), ("rsl", "r"), ("sl", "r"), ("sl", "s"), ("rsl", "rs"),
]  # fmt: skip
# Every draw is the next one of a stream. Real studies come first; what is added to them, or replaces them, comes second. So
# arms with the same seed draw the same studies in the same order, and `rr` draws twice from the same studies independently.
_FIRST, _SECOND, _UNION = 0, 1, 2


class DrawnCase(NamedTuple):
    """A study in a batch. The stream and the number of the draw in it decide on its augmentation."""

    case: LabelledCase
    stream: int
    number: int


def streams(sources: Sequence[Source]) -> list[int]:
    """The stream that each source of an arm is drawn from."""
    return [
        _FIRST if place == 0 and source in ("real", "reconstructed") else _SECOND
        for place, source in enumerate(sources)
    ]


def matched_batches(
    sources: Sequence[Source], cases: Sequence[Sequence[LabelledCase]], *, batch_size: int, updates: int, seed: int
) -> Iterator[list[DrawnCase]]:
    """Batches with an equal part of each source, whose size and number do not depend on the number of studies."""
    orders = [_order(seed, stream, len(own)) for stream, own in zip(streams(sources), cases, strict=True)]
    part, numbers = batch_size // len(sources), count()
    for _ in range(updates):
        ahead = [next(numbers) for _ in range(part)]
        yield [
            DrawnCase(own[next(order)], stream, number)
            for stream, own, order in zip(streams(sources), cases, orders, strict=True)
            for number in ahead
        ]


def epoch_batches(
    cases: Sequence[Sequence[LabelledCase]], *, batch_size: int, epochs: int, seed: int
) -> Iterator[list[DrawnCase]]:
    """Batches of the union of all sources, each study once per epoch; the last batch of an epoch may be smaller."""
    union = [case for own in cases for case in own]
    order, numbers = _order(seed, _UNION, len(union)), count()
    for _ in range(epochs):
        epoch = [DrawnCase(union[next(order)], _UNION, next(numbers)) for _ in union]
        yield from (epoch[start : start + batch_size] for start in range(0, len(epoch), batch_size))


def _order(seed: int, stream: int, size: int) -> Iterator[int]:
    """The numbers below `size` in random order, again and again."""
    for epoch in count():
        yield from np.random.default_rng([seed, stream, epoch]).permutation(size).tolist()
