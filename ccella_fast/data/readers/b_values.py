"""Choose one b-value of a diffusion series that holds several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ccella_fast.errors import DataError


def choose_b_value(values: Sequence[float], wanted: float | None, path: Path) -> tuple[float, tuple[str, ...]]:
    """The b-value to read, in s/mm2, and the notes of the volume that is read: which one was chosen, and out of which.

    Args:
        values: The b-values that the series holds.
        wanted: The b-value that the user names; None chooses the highest.
        path: The series, for the error message.

    Raises:
        DataError: If the series does not hold the b-value that is wanted.
    """
    known = sorted(set(values))
    names = ", ".join(f"{value:g}" for value in known)
    if wanted is not None and wanted not in known:
        why = f"the series has no image of b-value {wanted:g}, only of {names} s/mm2"
        raise DataError(why, path=path, field="b-value", fix="give one of these as --b_value")
    chosen = known[-1] if wanted is None else wanted
    return chosen, (f"b-value {chosen:g} was read, out of {names} s/mm2",) if len(known) > 1 else ()
