"""A test of paired differences."""

from __future__ import annotations

import itertools

import numpy as np

_SIGN_FLIPS = 4096


def sign_flip_p(differences: np.ndarray, seed: int = 0) -> float:
    """p-value of a common direction of paired differences: the norm of their sum under random signs.

    Fisher's randomization test. All 2^n signs are tried if there are at most 4,096, else as many random ones.

    Args:
        differences: (n, d).
        seed: of random signs.
    """
    n = len(differences)
    products = differences @ differences.T
    if 2**n <= _SIGN_FLIPS:
        signs = np.array(list(itertools.product((1.0, -1.0), repeat=n)))
    else:
        signs = np.random.default_rng(seed).choice([1.0, -1.0], (_SIGN_FLIPS, n))
        signs[0] = 1
    norms = np.einsum("si,ij,sj->s", signs, products, signs, optimize=True)
    return float((norms >= norms[0] * (1 - 1e-9)).mean())
