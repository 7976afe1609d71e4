"""The former name of `sampler_optimizations.py`; it will be removed in release 0.3."""

from __future__ import annotations

import sys

from sampler_optimizations import main

if __name__ == "__main__":
    print("benchmarks/sampler_levers.py is now benchmarks/sampler_optimizations.py", file=sys.stderr)
    sys.exit(main())
