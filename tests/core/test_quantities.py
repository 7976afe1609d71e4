"""A number in a message has the words of its grammatical number, and bytes a unit in which they can be read."""

from __future__ import annotations

import re

import pytest

from ccella_fast.quantities import counted, format_bytes


@pytest.mark.parametrize(
    ("count", "words", "text"),
    [
        (0, ("study", "studies"), "0 studies"),
        (1, ("study", "studies"), "1 study"),
        (2, ("study is", "studies are"), "2 studies are"),
        (1, ("more defect",), "1 more defect"),
        (21, ("more defect",), "21 more defects"),
    ],
)
def test_words_agree_with_their_number(count: int, words: tuple[str, ...], text: str):
    assert counted(count, *words) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1024, "1.00 KiB"), (5 * 1024, "5.00 KiB"),
        (31_000_000, "29.6 MiB"), (999 * 2**20, "999 MiB"), (2**30, "1.00 GiB"), (2.5 * 2**30, "2.50 GiB"),
        (2**50, "1024 TiB"),
    ],
)  # fmt: skip
def test_bytes_have_a_readable_unit(size: float, text: str):
    assert format_bytes(size) == text


def test_the_number_before_the_unit_is_that_of_the_unit():
    """Against a plain division, over all sizes; no size but 0 is printed as 0."""
    for size in (int(1.7**power) for power in range(1, 70)):
        number, unit = format_bytes(size).split()
        scale = {"byte": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}[unit]
        assert float(number) > 0 and abs(float(number) * scale - size) <= 0.006 * size
        assert re.fullmatch(r"[\d.]{1,5}", number)
