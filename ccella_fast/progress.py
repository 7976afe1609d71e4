"""How often progress bars are redrawn."""

from __future__ import annotations

import sys


def refresh_interval() -> float:
    """Seconds between two updates of a progress bar; longer if stderr is a log file, which keeps every update."""
    return 0.1 if sys.stderr.isatty() else 1.0
