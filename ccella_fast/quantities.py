"""Quantities in messages: a number with its noun, and a number of bytes."""

from __future__ import annotations

_UNITS = ("KiB", "MiB", "GiB", "TiB")


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number with the words that it needs: `counted(1, "study is", "studies are")`.

    Args:
        count: The number.
        one: The words for 1.
        several: The words for any other number. Default: `one` with an s.
    """
    return f"{count} {one if count == 1 else several or f'{one}s'}"


def format_bytes(size: float) -> str:
    """A number of bytes in the largest unit of which there is at least one, such as `1.5 GiB`."""
    if size < 1024:
        return counted(round(size), "byte")
    power = 1
    while size >= 1024 ** (power + 1) and power < len(_UNITS):
        power += 1
    value = size / 1024**power
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {_UNITS[power - 1]}"
