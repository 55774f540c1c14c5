"""Joint and weighted recalibration, and the effect predicted before merging."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recalibration_oracle import EPS, few, gammas, loss, root
from strategies import (
    Matrix,
    branches,
    dtype_name,
    dtypes,
    orthogonal,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import (
    joint_recalibration,
    recalibration,
    recalibration_loss,
    stack_branches,
    update_effect,
)

FORMS = ("full", "diagonal", "box", "direction", "scalar")


def to_arrays(xp: ModuleType, branch: tuple, dtype: str = "float64") -> list[Any]:
    return [to_library(xp, a, dtype) for a in branch]


# Weighted histories


@few
@given(
    branch=branches(),
    gamma=gammas,
    form=st.sampled_from(FORMS),
    weight=st.sampled_from([1e-3, 0.25, 1, 8.0]),
)
def test_the_history_weight_multiplies_the_history(
    xp: ModuleType, branch: tuple, gamma: float, form: str, weight: float
) -> None:
    up, down, new, old = arrays = to_arrays(xp, branch)
    heavy = (up, down, new, weight * old)
    ours = recalibration(*arrays, gamma, form, history_weight=weight)
    there = recalibration(*heavy, gamma, form)
    seen = (*branch[:3], weight * branch[3])
    worst = loss(np.eye(len(branch[1])), seen, gamma) + loss(
        0 * np.eye(len(branch[1])), seen, gamma
    )
    losses = [loss(to_numpy(c), seen, gamma) for c in (ours, there)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-9 * worst)
    value = recalibration_loss(ours, *arrays, gamma, history_weight=weight)
    assert float(value) == pytest.approx(losses[0], rel=1e-6, abs=1e-9 * worst)


@pytest.mark.parametrize("form", FORMS)
def test_a_weight_for_every_layer(xp: ModuleType, form: str) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((3, 5, 2)), rng.standard_normal((3, 2, 4))
    x, y = rng.standard_normal((2, 3, 9, 4))
    moments = [np.einsum("...ni,...nj->...ij", t, t) for t in (x, y)]
    arrays = to_arrays(xp, (up, down, *moments), "float32")
    weights = to_library(xp, np.array([0.5, 1.0, 20.0]), "float32")
    whole = recalibration(*arrays, 2.0, form, history_weight=weights)
    losses = recalibration_loss(whole, *arrays, 2.0, history_weight=weights)
    for i, w in enumerate((0.5, 1.0, 20.0)):
        one = recalibration(*(a[i, ...] for a in arrays), 2.0, form, history_weight=w)
        np.testing.assert_allclose(to_numpy(whole)[i], to_numpy(one), atol=2e-5)
        value = recalibration_loss(one, *(a[i, ...] for a in arrays), 2.0, history_weight=w)
        assert float(losses[i]) == pytest.approx(float(value), rel=1e-4)
    with pytest.raises(ValueError, match="history_weight must be at least 0"):
        recalibration(*arrays, 2.0, form, history_weight=-weights)
    with pytest.raises(ValueError, match="history_weight must be finite and at least 0"):
        recalibration(*arrays, 2.0, form, history_weight=-1.0)


def test_no_history_weight_keeps_everything_alive(xp: ModuleType) -> None:
    arrays = to_arrays(xp, (np.eye(2), np.eye(2), np.diag([1.0, 0.0]), np.eye(2)), "float32")
    for form in ("full", "diagonal", "box", "direction"):
        ours = recalibration(*arrays, 1.0, form, history_weight=0.0)
        np.testing.assert_allclose(to_numpy(ours), np.diag([1.0, 0.0]), atol=1e-5)


# Both branches


@st.composite
def two_branches(draw: st.DrawFn) -> tuple[list[Matrix], list[Matrix], list[float], Matrix, Matrix]:
    size = draw(st.integers(2, 6))
    rng = np.random.default_rng(draw(seeds))
    ranks = [draw(st.integers(1, size)) for _ in range(2)]
    ups = [rng.standard_normal((4, r)) for r in ranks]
    downs = [orthogonal(size, rng)[:r] for r in ranks]
    x, y = rng.standard_normal((2, draw(st.integers(1, 9)), size))
    return ups, downs, [0.25, draw(st.sampled_from([0.5, 1.0]))], x.T @ x, y.T @ y


@few
@given(case=two_branches(), gamma=gammas)
def test_joint_form_is_the_least_squares_optimum(xp: ModuleType, case: tuple, gamma: float) -> None:
    ups, downs, weights, new, old = case
    up, down = np.hstack([w * b for w, b in zip(weights, ups, strict=True)]), np.vstack(downs)
    lists = [[to_library(xp, a) for a in part] for part in (ups, downs)]
    moments = [to_library(xp, m) for m in (new, old)]
    ours = joint_recalibration(*lists, weights, *moments, gamma)
    stack = stack_branches(*lists, weights)
    np.testing.assert_allclose(to_numpy(stack[0]), up)
    np.testing.assert_allclose(to_numpy(stack[1]), down)
    rank = len(down)
    assert ours.shape == (rank, rank)
    sides = (down @ root(old), np.sqrt(gamma) * down @ root(new))
    # Over any r×r matrix: the Kronecker product writes BΛA as a linear map of Λ.
    system = np.concatenate([np.kron(up, side.T) for side in sides])
    target = np.concatenate([0 * (up @ sides[0]).ravel(), (up @ sides[1]).ravel()])
    best = np.sum((system @ np.linalg.lstsq(system, target, rcond=1e-12)[0] - target) ** 2)
    branch = (up, down, new, old)
    worst = loss(np.eye(rank), branch, gamma) + loss(np.zeros((rank, rank)), branch, gamma)
    joint = loss(to_numpy(ours), branch, gamma)
    assert joint <= best + 1e-9 * worst
    # Never worse than the branches one by one, or the general one alone.
    first = len(downs[0])
    apart = np.eye(rank)
    pieces = [to_numpy(recalibration(b, a, *moments, gamma)) for b, a in zip(*lists, strict=True)]
    apart[:first, :first] = pieces[0]
    assert joint <= loss(apart, branch, gamma) + 1e-9 * worst
    apart[first:, first:] = pieces[1]
    assert joint <= loss(apart, branch, gamma) + 1e-9 * worst


@pytest.mark.parametrize("form", FORMS)
def test_joint_forms_take_batches(xp: ModuleType, form: str) -> None:
    rng = np.random.default_rng(0)
    ups = [to_library(xp, rng.standard_normal((3, 5, r)), "float32") for r in (1, 2)]
    downs = [to_library(xp, rng.standard_normal((3, r, 4)), "float32") for r in (1, 2)]
    x, y = rng.standard_normal((2, 3, 9, 4))
    moments = [to_library(xp, np.swapaxes(t, 1, 2) @ t, "float32") for t in (x, y)]
    whole = joint_recalibration(ups, downs, [0.25, 0.5], *moments, 3.0, form)
    for i in range(3):
        at = lambda arrays, i=i: [a[i, ...] for a in arrays]  # noqa: E731
        one = joint_recalibration(at(ups), at(downs), [0.25, 0.5], *at(moments), 3.0, form)
        np.testing.assert_allclose(to_numpy(whole)[i], to_numpy(one), atol=1e-4)


def test_stacks_of_what_does_not_fit(xp: ModuleType) -> None:
    up, down = (
        to_library(xp, np.ones((3, 2)), "float32"),
        to_library(xp, np.ones((2, 4)), "float32"),
    )
    with pytest.raises(ValueError, match="one entry a branch, got 2, 1 and 2"):
        stack_branches([up, up], [down], [1, 1])
    with pytest.raises(ValueError, match="one entry a branch, got 0, 0 and 0"):
        stack_branches([], [])
    with pytest.raises(ValueError, match="with one O and D"):
        stack_branches([up, up], [down, to_library(xp, np.ones((2, 5)), "float32")])
    with pytest.raises(ValueError, match="with one O and D"):
        stack_branches([up], [to_library(xp, np.ones((3, 4)), "float32")])
    np.testing.assert_array_equal(to_numpy(stack_branches([up], [down])[0]), np.ones((3, 2)))


# The effect


@few
@given(branch=branches(), gamma=gammas, seed=seeds, dtype=dtypes)
def test_the_predicted_effect_is_what_the_merged_layer_does(
    xp: ModuleType, branch: tuple, gamma: float, seed: int, dtype: str
) -> None:
    up, down, _, _ = branch
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((len(up), down.shape[1]))
    x_new, x_old = rng.standard_normal((2, 9, down.shape[1]))
    c = rng.standard_normal((len(down), len(down)))
    merged, full = weight + up @ c @ down, weight + up @ down
    arrays = to_arrays(xp, (c, up, down, x_new.T @ x_new / 9, x_old.T @ x_old / 9), dtype)
    effect = update_effect(*arrays)
    power = lambda x, w: np.sum((x @ w.T) ** 2) / 9  # noqa: E731
    exact = (
        power(x_old, merged - weight),
        power(x_old, full - weight),
        power(x_new, merged - full),
        power(x_new, full - weight),
    )
    assert dtype_name(effect.old_change) == dtype
    np.testing.assert_allclose([float(e) for e in effect], exact, rtol=1e4 * EPS[dtype])
    value = float(recalibration_loss(*arrays, gamma))
    assert float(effect.old_change) + gamma * float(effect.new_loss) == pytest.approx(
        value, rel=1e-5
    )
