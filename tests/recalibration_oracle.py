"""The objective of the recalibration by its definition, and what its tests draw from."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from strategies import Matrix

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
gammas = st.sampled_from([1e-3, 0.5, 1.0, 3.0, 1e4])
few = settings(max_examples=12)


def root(m: Matrix) -> Matrix:
    """A factor whose square is the positive semi-definite part of a moment."""
    values, vectors = np.linalg.eigh(m)
    return vectors * np.sqrt(np.clip(values, 0, None))


def loss(coefficients: Matrix, branch: tuple, gamma: float) -> float:
    """J by its definition, as squared norms of matrices (never negative by rounding)."""
    up, down, new, old = branch
    interference = up @ coefficients @ down @ root(old)
    lost = up @ (coefficients - np.eye(len(coefficients))) @ down @ root(new)
    return float(np.sum(interference**2) + gamma * np.sum(lost**2))
