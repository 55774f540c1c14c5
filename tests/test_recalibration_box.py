"""Box-constrained recalibration against bounded least squares and its optimality conditions."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st
from recalibration_oracle import EPS, few, gammas, loss, root
from strategies import (
    Matrix,
    branches,
    dtypes,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import _recalibrate, recalibration


def least_squares(branch: tuple, gamma: float) -> tuple[Matrix, Matrix]:
    """System and target whose least-squares solution is the best diagonal."""
    up, down, new, old = branch
    sides = (down @ root(old), np.sqrt(gamma) * down @ root(new))
    columns = [
        np.concatenate([np.outer(up[:, i], side[i]).ravel() for side in sides])
        for i in range(len(down))
    ]
    target = np.concatenate([0 * (up @ sides[0]).ravel(), (up @ sides[1]).ravel()])
    return np.stack(columns, axis=1), target


def to_arrays(xp: ModuleType, branch: tuple, dtype: str = "float64") -> list[Any]:
    return [to_library(xp, a, dtype) for a in branch]


@few
@given(branch=branches(), gamma=gammas)
def test_box_is_the_bounded_least_squares_optimum(
    xp: ModuleType, branch: tuple, gamma: float
) -> None:
    weights = np.diag(to_numpy(recalibration(*to_arrays(xp, branch), gamma, "box")))
    assert np.all((weights >= 0) & (weights <= 1))
    system, target = least_squares(branch, gamma)
    best = scipy.optimize.lsq_linear(system, target, (0, 1), method="bvls", tol=1e-14).x
    scale = np.sum(target**2) + loss(np.eye(len(weights)), branch, gamma)
    excess = loss(np.diag(weights), branch, gamma) - loss(np.diag(best), branch, gamma)
    assert excess <= 1e-10 * scale
    # Karush, Kuhn and Tucker: no slope inside, none that points back into the box at a bound.
    slope = system.T @ (system @ weights - target)
    size = np.max(np.sum(system**2, axis=0), initial=1e-300)
    projected = weights - np.clip(weights - slope / size, 0, 1)
    alive = np.sum(system**2, axis=0) > 1e-12 * size
    np.testing.assert_allclose(projected[alive], 0, atol=1e-7)


@few
@given(branch=branches(("random", "spiked", "conditioned")), gamma=gammas, dtype=dtypes)
def test_box_is_the_diagonal_form_where_that_stays_inside(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str
) -> None:
    arrays = to_arrays(xp, branch, dtype)
    box, free = (to_numpy(recalibration(*arrays, gamma, f)) for f in ("box", "diagonal"))
    direction = to_numpy(recalibration(*arrays, gamma, "direction"))
    seen = tuple(to_numpy(a) for a in arrays)
    worst = loss(np.eye(len(box)), seen, gamma) + loss(0 * box, seen, gamma)
    slack = 1e2 * EPS[dtype] * worst
    assert loss(free, seen, gamma) <= loss(box, seen, gamma) + slack
    assert loss(box, seen, gamma) <= loss(direction, seen, gamma) + slack
    if np.all((np.diag(free) >= 0) & (np.diag(free) <= 1)):
        assert loss(box, seen, gamma) <= loss(free, seen, gamma) + slack


@few
@given(seed=seeds, pull=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_solver_on_any_quadratic(seed: int, pull: float) -> None:
    """Far beyond what a recalibration asks for: the bounds push hard from both sides."""
    rng = np.random.default_rng(seed)
    root = rng.standard_normal((6, 4))
    target = pull * rng.standard_normal(6)
    matrices = np.stack([root.T @ root, 1e-3 * root.T @ root])
    sides = np.stack([root.T @ target, 1e-3 * root.T @ target])
    best = scipy.optimize.lsq_linear(root, target, (0, 1), method="bvls", tol=1e-14).x
    found = to_numpy(_recalibrate.box(np, matrices, sides))
    np.testing.assert_allclose(found, [best, best], atol=1e-9)


def test_box_where_the_diagonal_form_leaves_it(xp: ModuleType) -> None:
    up = np.array([[1.0, 0.999]])
    down, new, old = np.eye(2), np.array([[1.0, 0.9], [0.9, 1.0]]), np.diag([0.1, 20.0])
    arrays = to_arrays(xp, (up, down, new, old), "float32")
    free = np.diag(to_numpy(recalibration(*arrays, 1.0, "diagonal")))
    assert free.max() > 1.05
    box = np.diag(to_numpy(recalibration(*arrays, 1.0, "box")))
    assert box[0] == pytest.approx(1, abs=1e-5)
    # With the first weight at its bound, the second has a closed form.
    h, g = up.T @ up * (new + old), np.sum(up.T @ up * new, axis=1)
    assert box[1] == pytest.approx((g[1] - h[1, 0]) / h[1, 1], abs=1e-5)


def test_box_gives_dead_directions_zero(xp: ModuleType) -> None:
    zero, one = np.zeros((2, 2)), np.eye(2)
    for branch in ((one, one, zero, zero), (one, zero, one, one), (zero, one, one, one)):
        arrays = to_arrays(xp, branch, "float32")
        np.testing.assert_array_equal(to_numpy(recalibration(*arrays, 1.0, "box")), zero)
    arrays = to_arrays(xp, (one, one, one, zero), "float32")
    np.testing.assert_allclose(to_numpy(recalibration(*arrays, 1.0, "box")), one, atol=1e-5)
    empty = to_arrays(xp, tuple(np.zeros((0, *s)) for s in ((3, 2), (2, 4), (4, 4), (4, 4))))
    assert recalibration(*empty, 1.0, "box").shape == (0, 2, 2)
