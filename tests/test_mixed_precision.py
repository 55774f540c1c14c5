"""Moments of different dtypes: the coarser one says what is rounding."""

from types import ModuleType

import libraries
import numpy as np
import pytest
from strategies import dtype_name, to_library, to_numpy

import loda_math as lm

SIZE, RANK = 6, 3


def deficient() -> np.ndarray:
    """A float32 moment of three directions, with as much in the others as its rounding may be."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0]
    values = np.asarray([1.0, 0.7, 0.4, 3e-7, 3e-7, 3e-7])
    return ((basis * values) @ basis.T).astype(np.float32)


@pytest.mark.parametrize("solver", ["general", "isolated", "ratio", "rank"])
def test_rounding_of_a_float32_task_is_no_direction(xp: ModuleType, solver: str) -> None:
    libraries.needs_float64(xp)
    new, old = to_library(xp, deficient(), "float32"), to_library(xp, np.eye(SIZE))
    nothing = 0 * old
    found = {
        "general": lambda: lm.general_solution(new, nothing, SIZE).effective_rank,
        "isolated": lambda: lm.isolated_solution(new, old, SIZE).effective_rank,
        "ratio": lambda: lm.trace_ratio_solution(new, old, SIZE).effective_rank,
        "rank": lambda: lm.rank_for(new, nothing, 1.0).rank,
    }[solver]()
    assert int(found) == RANK
    # The values alone do not say so: as float64 they are directions like any other.
    wide = to_library(xp, deficient().astype(np.float64))
    assert int(lm.general_solution(wide, nothing, SIZE).effective_rank) > RANK


def test_the_check_knows_the_coarser_dtype(xp: ModuleType) -> None:
    libraries.needs_float64(xp)
    basis = to_library(xp, np.eye(SIZE))
    new, old = to_library(xp, deficient(), "float32"), to_library(xp, np.eye(SIZE))
    for task, history in ((new, old), (0 * old + to_library(xp, deficient() * 1.0), new)):
        report = lm.verify.verify_subspace(basis, task, history, "general")
        assert int(report.effective_rank) == RANK


@pytest.mark.parametrize("coarse", ["new", "old"])
def test_the_ridge_has_the_floor_of_the_coarser_dtype(xp: ModuleType, coarse: str) -> None:
    libraries.needs_float64(xp)
    rng = np.random.default_rng(0)
    new, old = (x.T @ x for x in rng.standard_normal((2, 3, SIZE)))
    arrays = {"new": to_library(xp, new), "old": to_library(xp, old)}
    arrays[coarse] = to_library(xp, {"new": new, "old": old}[coarse], "float32")
    floor = 4 * SIZE * float(np.finfo(np.float32).eps)
    solve = lambda ridge: lm.isolated_subspace(*arrays.values(), 2, ridge=ridge)  # noqa: E731
    assert dtype_name(solve(0.0)) == "float64"
    np.testing.assert_array_equal(to_numpy(solve(0.0)), to_numpy(solve(floor)))
    assert not np.array_equal(to_numpy(solve(0.0)), to_numpy(solve(10 * floor)))
