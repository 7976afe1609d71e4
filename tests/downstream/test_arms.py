"""Arms differ in their data alone: the same number of updates, the same real studies in the same order."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from ccella_fast.downstream.arms import ARMS, CONTRASTS, DrawnCase, epoch_batches, matched_batches
from ccella_fast.downstream.data import LabelledCase
from ccella_fast.downstream.inputs import draw_augmentation


def cases(name: str, count: int) -> list[LabelledCase]:
    return [LabelledCase(f"{name}{n}", n % 2, f"{name}{n}", f"{name}{n}", lambda: ([], [])) for n in range(count)]  # type: ignore[arg-type,return-value]


REAL, MADE = cases("real", 10), cases("made", 10)
SETS = {
    "real": REAL,
    "reconstructed": cases("blurred", 10),
    "synthetic": MADE,
    "predicted": MADE,
    "baseline": cases("other", 7),
}


def batches(arm: str, *, seed: int = 0, updates: int = 30, size: int = 4) -> list[list[DrawnCase]]:
    sources = ARMS[arm].sources
    return list(matched_batches(sources, [SETS[s] for s in sources], batch_size=size, updates=updates, seed=seed))


def drawn(arm: str, source: str, **more: int) -> list[DrawnCase]:
    return [draw for batch in batches(arm, **more) for draw in batch if draw.case.id.startswith(source)]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_has_the_same_updates_and_equal_parts_of_its_sources(arm: str):
    found = batches(arm)
    assert [len(batch) for batch in found] == [4] * 30
    sources = ARMS[arm].sources
    per_batch = [{len([d for d in batch if d.stream == s]) for s in {d.stream for d in batch}} for batch in found]
    assert per_batch == [{4 // len(sources)}] * 30


@pytest.mark.parametrize(("arm", "source"), [("rs", "real"), ("rsl", "real"), ("rb", "real")])
def test_real_studies_come_in_the_same_order_in_every_arm_and_with_the_same_augmentation(arm: str, source: str):
    alone, together = drawn("r", source), drawn(arm, source)
    assert len(together) == len(alone) / 2 and together == alone[: len(together)]
    augmentations = [draw_augmentation(3, draw.stream, draw.number) for draw in together]
    assert augmentations == [draw_augmentation(3, draw.stream, draw.number) for draw in alone[: len(together)]]
    assert len({str(each) for each in augmentations}) > 0.8 * len(augmentations)
    assert drawn("r", source, seed=1) != alone  # negative control


def test_what_replaces_or_joins_real_studies_is_drawn_at_the_same_places():
    blurred = [draw.case.id.removeprefix("blurred") for draw in drawn("v", "blurred")]
    assert blurred == [draw.case.id.removeprefix("real") for draw in drawn("r", "real")]
    assert [draw.case for draw in drawn("rs", "made")] == [draw.case for draw in drawn("s", "made")][:60]
    second = [draw for batch in batches("rr") for draw in batch[2:]]
    assert [draw.case.id[4:] for draw in second] == [draw.case.id[4:] for draw in drawn("rs", "made")]


def test_real_twice_is_drawn_as_real_is():
    """Each stream draws all studies before one again, both are uniform, and they are independent of each other."""
    for stream in (
        [d for b in batches("rr") for d in b[:2]],
        [d for b in batches("rr") for d in b[2:]],
        drawn("r", ""),
    ):
        rounds = [Counter(draw.case.id for draw in stream[start : start + 10]) for start in range(0, len(stream), 10)]
        assert all(set(each.values()) == {1} and len(each) == 10 for each in rounds)
    first: dict[str, Counter[str]] = {"r": Counter(), "rr": Counter(), "rr second": Counter()}
    together, seeds = 0, 1000
    for seed in range(seeds):
        real, (one, _, two, _) = batches("r", seed=seed, updates=1)[0], batches("rr", seed=seed, updates=1)[0]
        first["r"][real[0].case.id] += 1
        first["rr"][one.case.id] += 1
        first["rr second"][two.case.id] += 1
        together += one.case == two.case
    for counts in first.values():  # chi-squared with 9 degrees of freedom: above 33.7 with probability 1e-4
        assert sum((counts[case.id] - seeds / 10) ** 2 / (seeds / 10) for case in REAL) < 33.7
    assert 60 < together < 145  # binomial, 100 expected


def test_seed_and_stream_decide_on_an_augmentation():
    some = [
        draw_augmentation(seed, stream, number) for seed in range(4) for stream in range(2) for number in range(100)
    ]
    assert len({str(each) for each in some}) > 700
    assert 0.4 < sum(each.flip for each in some) / 800 < 0.6
    moved = [each for each in some if any(each.shift)]
    assert 0.4 < len(moved) / 800 < 0.6 and all(abs(each.shift[2]) <= 6 and abs(each.shift[0]) <= 12.5 for each in some)
    assert all(each.rotation[:2] == (0, 0) and abs(each.rotation[2]) <= 15 for each in some)
    assert all(1 / 1.1 - 1e-9 <= each.scale[0] <= 1 / 0.9 + 1e-9 and len(set(each.scale)) == 1 for each in some)


def test_an_epoch_has_every_study_of_the_union_once_so_that_two_sources_mean_twice_the_updates():
    alone = list(epoch_batches([REAL], batch_size=4, epochs=3, seed=0))
    both = list(epoch_batches([REAL, MADE], batch_size=4, epochs=3, seed=0))
    assert [len(batch) for batch in alone] == [4, 4, 2] * 3 and [len(batch) for batch in both] == [4] * 15
    for found, union in ((alone, REAL), (both, REAL + MADE)):
        draws = [draw for batch in found for draw in batch]
        assert [draw.number for draw in draws] == list(range(3 * len(union)))
        assert Counter(draw.case.id for draw in draws) == {case.id: 3 for case in union}
    assert [draw.case for draw in alone[0]] != [case for case in islice(REAL, 4)]


def test_every_contrast_is_of_two_arms():
    assert all(first in ARMS and second in ARMS and first != second for first, second in CONTRASTS)
    assert len(set(CONTRASTS)) == len(CONTRASTS) and {name for pair in CONTRASTS for name in pair} == set(ARMS)
