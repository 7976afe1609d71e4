"""RUN/best: a link to the checkpoint with the smallest value of `monitoring.best_metric`, which is kept whatever its age.

The values are entries of the checkpoints' own training_state.json: a resumed run knows them, and nothing else has to be kept.
"""

from __future__ import annotations

from pathlib import Path

from ccella_fast.checkpoint import read_state
from ccella_fast.storage import replace_link

LINK = "best"


def best_checkpoint(run: Path) -> Path | None:
    """The step folder that is the best so far; None if there is none."""
    link = run / LINK
    return run / "checkpoints" / link.resolve().name if link.is_symlink() and link.is_dir() else None


def measured(folder: Path, metric: str) -> float | None:
    """The value of a metric that was measured at a checkpoint; None if it was not, as at a checkpoint after a signal."""
    return read_state(folder).get("measured", {}).get(metric)


def mark_if_best(run: Path, folder: Path, metric: str) -> bool:
    """Let the link name this published checkpoint if it is better than the one before. Returns whether it is."""
    value, best = measured(folder, metric), best_checkpoint(run)
    before = None if best is None or best == folder else measured(best, metric)
    if value is None or (before is not None and value >= before):
        return False
    replace_link(run / LINK, folder)
    return True
