"""Student's distribution, without SciPy."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)
_NORMAL = 1e5  # degrees of freedom from which the normal distribution is as good, to 1e-5


def student_tail(t: float, df: float) -> float:
    """The probability that a variable with this distribution exceeds `t`.

    With t = sqrt(df) tan(a), the density is proportional to cos(a)^(df - 1), a smooth function on a bounded interval.

    Args:
        t: any number, or an infinite one.
        df: degrees of freedom, at least 1, not necessarily whole; infinity for the normal distribution.
    """
    if t < 0:
        return 1 - student_tail(-t, df)
    if df > _NORMAL or math.isinf(t):
        return 0.5 * math.erfc(t / math.sqrt(2))
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - 0.5 * math.log(math.pi)
    # Beyond this angle the density is below 1e-17 of its largest value, and further nodes would be wasted there.
    start, end = math.atan(t / math.sqrt(df)), math.acos(10 ** (-17 / df)) if df > 1 else math.pi / 2
    if start >= end:
        end = math.pi / 2
    angles = start + (end - start) * (_NODES + 1) / 2
    values = np.exp(log_scale + (df - 1) * np.log(np.cos(angles)))
    return float((end - start) / 2 * _WEIGHTS @ values)


@lru_cache
def student_quantile(tail: float, df: float) -> float:
    """The value that is exceeded with the probability `tail`, which is at most 0.5."""
    low, high = 0.0, 1.0
    while student_tail(high, df) > tail:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, df) > tail else (low, middle)
    return (low + high) / 2
