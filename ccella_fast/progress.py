"""How often progress bars are redrawn."""

from __future__ import annotations

import sys


def refresh_interval() -> float:
    """Seconds between two updates of a progress bar: fewer where stderr is a log file, in which every update stays."""
    return 0.1 if sys.stderr.isatty() else 1.0
