"""Objectives, angles and one way to run a solver, for the tests of subspaces."""

from types import ModuleType

import numpy as np
import scipy.linalg
from hypothesis import strategies as st
from strategies import (
    Matrix,
    dtype_name,
    to_library,
    to_numpy,
)

from loda_math import general_subspace, isolated_subspace, null_subspace

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
ridges = st.sampled_from([0.0, 1e-10, 1e-6, 1e-2, 1.0])


def unit(m: Matrix) -> Matrix:
    """The moment over its trace."""
    return m / np.trace(m) if np.trace(m) > 0 else m


def regularised(old: Matrix, ridge: float, eps: float = EPS["float64"]) -> Matrix:
    size = len(old)
    return unit(old) + max(ridge, 4 * size * eps) / size * np.eye(size)


def objective(u: Matrix, new: Matrix, r: Matrix) -> float:
    """tr((UᵀRU)⁻¹ UᵀS̄U), over the columns that are not zero."""
    u = u[:, np.any(u != 0, axis=0)]
    return float(np.trace(np.linalg.solve(u.T @ r @ u, u.T @ unit(new) @ u)))


def angle(u: Matrix, v: Matrix) -> float:
    return float(np.max(scipy.linalg.subspace_angles(u, v), initial=0.0))


def solve(xp: ModuleType, name: str, pencil: tuple, dtype: str, **settings: float) -> tuple:
    """Run one solver; returns the basis and the moments as the solver saw them, in float64."""
    new, old, rank = pencil
    n, o = to_library(xp, new, dtype), to_library(xp, old, dtype)
    if name == "null":
        basis = null_subspace(o, rank)
    elif name == "general":
        basis = general_subspace(n, o, rank)
    else:
        basis = isolated_subspace(n, o, rank, **settings)
    assert dtype_name(basis) == dtype
    assert tuple(basis.shape) == (len(new), rank)
    return to_numpy(basis), to_numpy(n), to_numpy(o)
