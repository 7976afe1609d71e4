"""The former name of `op_counts.py`; will be removed in release 0.3."""

from __future__ import annotations

import sys

from op_counts import main

if __name__ == "__main__":
    print("benchmarks/model_counts.py is now benchmarks/op_counts.py", file=sys.stderr)
    sys.exit(main())
