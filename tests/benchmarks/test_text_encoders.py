"""Sizes of text encoders in the documentation, compared with sums that are written out here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import text_encoders

PAGE = (Path(__file__).parents[2] / "docs/how-to/text-encoders.md").read_text()


def t5_parameters(d_model: int, d_ff: int, layers: int, heads: int) -> tuple[int, int]:
    """All parameters of a T5 1.1 encoder, and those of the linear layers but the last of each block."""
    attention = 4 * d_model * 64 * heads
    block = attention + 3 * d_model * d_ff + 2 * d_model
    embeddings = 32128 * d_model + 32 * heads + d_model  # tokens, positions by head, last norm
    return embeddings + layers * block, layers * (attention + 2 * d_model * d_ff)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("google/flan-t5-large", (1024, 2816, 24, 16)), ("google/flan-t5-xxl", (4096, 10240, 24, 64))],
)
def test_sizes_of_t5(name: str, sizes: tuple[int, ...]):
    count, in_bytes = t5_parameters(*sizes)
    found = text_encoders.parameters(text_encoders.build(name, "meta"))
    assert found == {"all": count, "in 8 bits": in_bytes}
    assert text_encoders.gigabytes(found, "int8") == pytest.approx((in_bytes + 2 * (count - in_bytes)) / 1e9)
    assert f"| {count / 1e6:,.0f} M | {2 * count / 1e9:.2g} GB |" in PAGE


def test_operations_are_two_per_weight_and_token_and_those_of_attention():
    count, _ = t5_parameters(1024, 2816, 24, 16)
    per_token = 2 * (count - 32128 * 1024)  # looking up an embedding takes no arithmetic
    attention = 24 * 2 * 2 * 512 * 512 * 1024
    found = text_encoders.operations(text_encoders.build("google/flan-t5-large", "meta"))
    assert found == pytest.approx(512 * per_token + attention, rel=1e-3)


def test_the_page_lists_every_encoder_that_is_measured():
    assert re.findall(r"^\| `([^`]+)` \|", PAGE, re.MULTILINE) == list(text_encoders.DIMENSIONS)
