"""When does a model begin to learn its training studies by heart?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PATIENCE = 3  # validations in a row
_MARGIN = 0.01  # by which each of them is above the lowest


def overfits_since(validations: Sequence[Mapping[str, Any]]) -> int | None:
    """The step of the lowest validation loss, if the model overfits since then; else None.

    That is so if each of the last three validation losses is more than 1 % above the lowest one before them, while the loss of
    training studies, at the same noise levels, is now below what it was there.

    Args:
        validations: lines of metrics.jsonl with `step`, `val_loss` and `train_eval_loss`, in order. Those that are not finite
            do not count.
    """
    known = [line for line in validations if line["val_loss"] is not None and line["train_eval_loss"] is not None]
    before, last = known[:-_PATIENCE], known[-_PATIENCE:]
    if not before:
        return None
    lowest = min(before, key=lambda line: line["val_loss"])
    rises = all(line["val_loss"] > (1 + _MARGIN) * lowest["val_loss"] for line in last)
    return lowest["step"] if rises and last[-1]["train_eval_loss"] < lowest["train_eval_loss"] else None
