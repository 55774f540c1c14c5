"""Recalibration against brute force: least squares, golden section, definitions on tokens."""

from types import ModuleType
from typing import Any

import libraries
import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    EPS,
    Matrix,
    branches,
    dtype_name,
    dtypes,
    from_spectrum,
    gammas,
    orthogonal,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import (
    joint_recalibration,
    merge,
    recalibration,
    recalibration_loss,
    stack_branches,
    update_effect,
)
from loda_math.recalibration import _box

CLOSED = ("full", "diagonal", "direction", "scalar")
FORMS = (*CLOSED, "box")
few = settings(max_examples=12)


def orthonormal_rows(branch: tuple) -> tuple:
    up, down, new, old = branch
    return up, np.linalg.qr(down.T)[0].T, new, old


# P and Q that are far from singular, and with energies of one size.
regular = branches(("random", "spiked", "flat"), dead=False).map(orthonormal_rows)
# A change of the basis mixes channels, and with them their rounding.
plain = branches(("random", "spiked", "flat"), dead=False, outliers=False).map(orthonormal_rows)
level = branches(("random", "flat"), dead=False).map(orthonormal_rows)


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


def to_arrays(xp: ModuleType, branch: tuple, dtype: str = "float64") -> list[Any]:
    return [to_library(xp, a, dtype) for a in branch]


def solve(xp: ModuleType, branch: tuple, gamma: float, form: str, dtype: str = "float64") -> Matrix:
    result = recalibration(*to_arrays(xp, branch, dtype), gamma, form)
    rank = branch[1].shape[0]
    assert tuple(result.shape) == (rank, rank)
    assert dtype_name(result) == dtype
    return to_numpy(result)


def least_squares(branch: tuple, gamma: float, shapes: list[Matrix]) -> tuple[Matrix, Matrix]:
    """System and target whose least-squares solution is the best combination of the shapes of Λ."""
    up, down, new, old = branch
    factors = down @ root(old), np.sqrt(gamma) * down @ root(new)
    stack = lambda m: np.concatenate([(up @ m @ f).ravel() for f in factors])  # noqa: E731
    target = np.concatenate([0 * (up @ factors[0]).ravel(), (up @ factors[1]).ravel()])
    return np.stack([stack(m) for m in shapes], axis=1), target


def diagonals(rank: int) -> list[Matrix]:
    return [np.diag(e) for e in np.eye(rank)]


def brute_force(branch: tuple, gamma: float, form: str) -> Matrix:
    """Least squares on explicit matrices, over a basis of the Λ of the given form."""
    rank = len(branch[1])
    shapes = {
        "full": [np.outer(i, j) for i in np.eye(rank) for j in np.eye(rank)],
        "diagonal": diagonals(rank),
        "scalar": [np.eye(rank)],
    }[form]
    weights = np.linalg.lstsq(*least_squares(branch, gamma, shapes), rcond=1e-12)[0]
    return np.einsum("k,kij->ij", weights, np.stack(shapes))


def extremes(branch: tuple, gamma: float) -> float:
    """J of keeping and of dropping everything: what a slack is a share of."""
    eye = np.eye(len(branch[1]))
    return loss(eye, branch, gamma) + loss(0 * eye, branch, gamma)


@pytest.mark.parametrize("form", ["full", "diagonal", "scalar"])
@given(branch=branches(), gamma=gammas)
def test_forms_reach_the_least_squares_optimum(
    xp: ModuleType, form: str, branch: tuple, gamma: float
) -> None:
    ours = solve(xp, branch, gamma, form)
    best = loss(brute_force(branch, gamma, form), branch, gamma)
    assert loss(ours, branch, gamma) <= best + 1e-9 * extremes(branch, gamma)
    if form == "diagonal":
        np.testing.assert_array_equal(ours, np.diag(np.diag(ours)))
    if form == "scalar":
        np.testing.assert_array_equal(ours, ours[0, 0] * np.eye(len(ours)))


@given(branch=plain, gamma=gammas)
def test_full_form_is_the_closed_form(xp: ModuleType, branch: tuple, gamma: float) -> None:
    up, down, new, old = branch
    p, q = down @ old @ down.T, gamma * down @ new @ down.T
    ours = solve(xp, branch, gamma, "full")
    np.testing.assert_allclose(ours, np.linalg.solve((p + q).T, q.T).T, atol=1e-7)
    # The minimum is the parallel sum of P and γQ.
    parallel = np.trace(up.T @ up @ p @ np.linalg.solve(p + q, q))
    assert loss(ours, branch, gamma) == pytest.approx(parallel, rel=1e-6)
    # What the old tasks gain is what the new one gives up.
    back = solve(xp, (up, down, old, new), 1 / gamma, "full")
    np.testing.assert_allclose(ours + back, np.eye(len(down)), atol=1e-7)


@given(branch=regular, gamma=gammas, dtype=dtypes)
def test_direction_form_weighs_each_row(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str
) -> None:
    _, down, new, old = branch
    p, q = (np.diag(down @ m @ down.T) for m in (old, new))
    exact = gamma * q / (p + gamma * q)
    ours = solve(xp, branch, gamma, "direction", dtype)
    np.testing.assert_allclose(ours, np.diag(exact), atol=1e4 * EPS[dtype])


@given(branch=branches(), gamma=gammas, seed=seeds)
def test_order_of_the_forms(xp: ModuleType, branch: tuple, gamma: float, seed: int) -> None:
    losses = {form: loss(solve(xp, branch, gamma, form), branch, gamma) for form in CLOSED}
    eye = np.eye(len(branch[1]))
    keep, drop = loss(eye, branch, gamma), loss(0 * eye, branch, gamma)
    slack = 1e-9 * (keep + drop)
    assert losses["full"] <= losses["diagonal"] + slack
    assert losses["diagonal"] <= min(losses["direction"], losses["scalar"]) + slack
    assert losses["scalar"] <= min(keep, drop) + slack
    other = np.random.default_rng(seed).standard_normal(eye.shape)
    assert losses["full"] <= loss(other, branch, gamma) + slack


@given(branch=branches(), gamma=gammas, dtype=dtypes)
def test_eigenvalues_lie_between_zero_and_one(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str
) -> None:
    values = np.linalg.eigvals(solve(xp, branch, gamma, "full"))
    assert np.all(values.real >= -1e-7)
    assert np.all(values.real <= 1 + 1e-7)
    assert np.all(np.abs(values.imag) <= 1e-7)
    for form in ("direction", "scalar"):
        weights = np.diag(solve(xp, branch, gamma, form, dtype))
        assert np.all((weights >= 0) & (weights <= 1))


def test_an_indefinite_history_cannot_push_coefficients_beyond_one(xp: ModuleType) -> None:
    # A running mean in single precision leaves such eigenvalues.
    turn = orthogonal(3, np.random.default_rng(0))
    old = from_spectrum(np.array([1.0, 0.5, -0.4]), turn)
    for form in FORMS:
        result = solve(xp, (np.eye(3), turn.T, np.eye(3), old), 1.0, form)
        if form != "diagonal":  # the exact diagonal form may leave [0, 1]
            assert np.max(np.linalg.eigvals(result).real) <= 1 + 1e-12


@given(seed=seeds, size=st.integers(2, 6))
def test_eigenvalues_at_condition_1e12(xp: ModuleType, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    spectra = (np.logspace(0, -12, size), np.logspace(0, -12, size)[::-1], np.logspace(0, -9, size))
    eye = np.eye(size)
    for s in spectra:
        new, old = from_spectrum(s, orthogonal(size, rng)), from_spectrum(spectra[0], eye)
        values = np.linalg.eigvals(solve(xp, (eye, eye, new, old), 1.0, "full"))
        assert np.all(values.real >= -1e-9)
        assert np.all(values.real <= 1 + 1e-9)


@given(branch=plain, gamma=gammas, seed=seeds)
def test_full_form_does_not_depend_on_the_basis(
    xp: ModuleType, branch: tuple, gamma: float, seed: int
) -> None:
    up, down, new, old = branch
    rng, rank = np.random.default_rng(seed), len(down)
    change = from_spectrum(rng.uniform(0.3, 3, rank), orthogonal(rank, rng)) @ orthogonal(rank, rng)
    ours = solve(xp, branch, gamma, "full")
    moved = (up @ np.linalg.inv(change), change @ down, new, old)
    other = moved[0] @ solve(xp, moved, gamma, "full") @ moved[1]
    np.testing.assert_allclose(up @ ours @ down, other, atol=1e-7 * np.abs(up).max())
    # Free of B, too.
    blank = solve(xp, (0 * up, down, new, old), gamma, "full")
    np.testing.assert_allclose(blank, ours, atol=1e-12)


@given(branch=level, form=st.sampled_from(CLOSED), dtype=dtypes)
def test_limits_of_gamma(xp: ModuleType, branch: tuple, form: str, dtype: str) -> None:
    eye = np.eye(len(branch[1]))
    branch = (eye, *branch[1:])
    np.testing.assert_array_equal(solve(xp, branch, 0.0, form, dtype), 0 * eye)
    assert np.abs(solve(xp, branch, 1e-12, form, dtype)).max() < 1e-4
    for huge in (1e12, 1e200, 1e308):
        np.testing.assert_allclose(solve(xp, branch, huge, form, dtype), eye, atol=1e-4)


@given(branch=branches(), gamma=gammas, form=st.sampled_from(CLOSED), data=st.data())
def test_a_common_scale_does_not_matter(
    xp: ModuleType, branch: tuple, gamma: float, form: str, data: st.DataObject
) -> None:
    a, b, c = (2.0 ** data.draw(st.sampled_from([-90, 0, 90])) for _ in range(3))
    up, down, new, old = branch
    scaled = solve(xp, (up * a, down * b, new * c, old * c), gamma, form)
    np.testing.assert_array_equal(scaled, solve(xp, branch, gamma, form))


@pytest.mark.parametrize("form", CLOSED)
@given(seed=seeds, size=st.integers(3, 7), gamma=gammas)
def test_dead_directions_get_zero(
    xp: ModuleType, form: str, seed: int, size: int, gamma: float
) -> None:
    rng = np.random.default_rng(seed)
    q = orthogonal(size, rng)
    # Both moments miss the first direction, which is the first row of A: rounding is left there.
    moments = [q[:, 1:] @ np.diag(rng.uniform(0.5, 1, size - 1)) @ q[:, 1:].T for _ in range(2)]
    moments = [0.5 * (m + m.T) for m in moments]
    down = q[:, :3].T
    up = rng.standard_normal((4, 3))
    result = solve(xp, (up, down, *moments), gamma, form)
    if form == "scalar":
        dead = solve(xp, (up * [1.0, 0, 0], down, *moments), gamma, form)
        np.testing.assert_array_equal(dead, np.zeros((3, 3)))
    else:
        np.testing.assert_allclose(result[0], 0, atol=1e-7)
        np.testing.assert_allclose(result[:, 0], 0, atol=1e-7)
        assert np.all(np.diag(result)[1:] > 0)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_at_all_gives_zero(xp: ModuleType, form: str) -> None:
    zero, one = np.zeros((2, 2)), np.eye(2)
    dead = [(one, one, zero, zero), (one, zero, one, one)]
    if form not in ("full", "direction"):  # these two do not look at B
        dead.append((zero, one, one, one))
    for branch in dead:
        np.testing.assert_array_equal(solve(xp, branch, 1.0, form, "float32"), zero)
    slack = 1e-6 if form == "box" else 0.0
    np.testing.assert_allclose(solve(xp, (one, one, zero, one), 1.0, form), zero, atol=slack)
    np.testing.assert_allclose(solve(xp, (one, one, one, zero), 1.0, form), one, atol=slack + 1e-14)


@pytest.mark.parametrize("form", FORMS)
def test_empty_batches(xp: ModuleType, form: str) -> None:
    arrays = [to_library(xp, np.zeros((0, *shape))) for shape in ((3, 2), (2, 4), (4, 4), (4, 4))]
    result = recalibration(*arrays, 1.0, form)
    assert result.shape == (0, 2, 2)
    assert recalibration_loss(result, *arrays, 1.0).shape == (0,)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_the_batch_of_all_arguments(xp: ModuleType, form: str) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((2, 3, 5, 2)), rng.standard_normal((2, 6))
    new, old = (x.T @ x for x in rng.standard_normal((2, 9, 6)))
    whole = to_numpy(recalibration(*to_arrays(xp, (up, down, new, old)), 1.5, form))
    assert whole.shape == (2, 3, 2, 2)
    one = recalibration(*to_arrays(xp, (up[1, 2], down, new, old)), 1.5, form)
    np.testing.assert_allclose(whole[1, 2], to_numpy(one), 1e-9)


# The box


@few
@given(branch=branches(), gamma=gammas)
def test_box_is_the_bounded_least_squares_optimum(
    xp: ModuleType, branch: tuple, gamma: float
) -> None:
    weights = np.diag(solve(xp, branch, gamma, "box"))
    assert np.all((weights >= 0) & (weights <= 1))
    system, target = least_squares(branch, gamma, diagonals(len(weights)))
    best = scipy.optimize.lsq_linear(system, target, (0, 1), method="bvls", tol=1e-14).x
    scale = np.sum(target**2) + loss(np.eye(len(weights)), branch, gamma)
    excess = loss(np.diag(weights), branch, gamma) - loss(np.diag(best), branch, gamma)
    assert excess <= 1e-10 * scale
    # Karush, Kuhn and Tucker: no slope inside, none that points back into the box at a bound.
    slope = system.T @ (system @ weights - target)
    size = np.max(np.sum(system**2, axis=0), initial=1e-300)
    projected = weights - np.clip(weights - slope / size, 0, 1)
    active = np.sum(system**2, axis=0) > 1e-12 * size
    np.testing.assert_allclose(projected[active], 0, atol=1e-7)


@few
@given(
    branch=branches(("random", "spiked", "conditioned"), outliers=False),
    gamma=gammas,
    dtype=dtypes,
)
def test_box_is_the_diagonal_form_where_that_is_in_the_box(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str
) -> None:
    seen = tuple(to_numpy(a) for a in to_arrays(xp, branch, dtype))
    forms = ("box", "diagonal", "direction")
    weights = {form: np.diag(solve(xp, branch, gamma, form, dtype)) for form in forms}
    losses = {form: loss(np.diag(w), seen, gamma) for form, w in weights.items()}
    slack = 1e2 * EPS[dtype] * extremes(seen, gamma)
    assert losses["diagonal"] <= losses["box"] + slack
    assert losses["box"] <= losses["direction"] + slack
    if np.all((weights["diagonal"] >= 0) & (weights["diagonal"] <= 1)):
        assert losses["box"] <= losses["diagonal"] + slack


@few
@given(seed=seeds, pull=st.sampled_from([0.1, 1.0, 30.0]))
def test_the_solver_on_any_quadratic(seed: int, pull: float) -> None:
    """Far beyond what a recalibration asks for: the bounds push hard from both sides."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((6, 4))
    target = pull * rng.standard_normal(6)
    matrices = np.stack([factor.T @ factor, 1e-3 * factor.T @ factor])
    rhs = np.stack([factor.T @ target, 1e-3 * factor.T @ target])
    best = scipy.optimize.lsq_linear(factor, target, (0, 1), method="bvls", tol=1e-14).x
    np.testing.assert_allclose(_box(np, matrices, rhs), [best, best], atol=1e-9)


def test_box_where_the_diagonal_form_leaves_it(xp: ModuleType) -> None:
    up = np.array([[1.0, 0.999]])
    down, new, old = np.eye(2), np.array([[1.0, 0.9], [0.9, 1.0]]), np.diag([0.1, 20.0])
    branch = (up, down, new, old)
    assert solve(xp, branch, 1.0, "diagonal", "float32").max() > 1.05
    box = np.diag(solve(xp, branch, 1.0, "box", "float32"))
    assert box[0] == pytest.approx(1, abs=1e-5)
    # With the first weight at its bound, the second has a closed form.
    h, g = up.T @ up * (new + old), np.sum(up.T @ up * new, axis=1)
    assert box[1] == pytest.approx((g[1] - h[1, 0]) / h[1, 1], abs=1e-5)


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
    worst = extremes(seen, gamma)
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
    with pytest.raises(ValueError, match="history_weight"):
        recalibration(*arrays, 2.0, form, history_weight=-weights)


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
    rank, branch = len(down), (up, down, new, old)
    assert ours.shape == (rank, rank)
    worst = extremes(branch, gamma)
    joint = loss(to_numpy(ours), branch, gamma)
    assert joint <= loss(brute_force(branch, gamma, "full"), branch, gamma) + 1e-9 * worst
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
    for lists in (([up, up], [down], [1, 1]), ([], [])):
        with pytest.raises(ValueError, match="one entry a branch"):
            stack_branches(*lists)
    wide, tall = (to_library(xp, np.ones(shape), "float32") for shape in ((2, 5), (3, 4)))
    for lists in (([up, up], [down, wide]), ([up], [tall])):
        with pytest.raises(ValueError, match="one O and D"):
            stack_branches(*lists)
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
    value = recalibration_loss(*arrays, gamma)
    assert value.shape == ()
    assert dtype_name(value) == dtype
    assert float(value) == pytest.approx(exact[0] + gamma * exact[2], rel=1e4 * EPS[dtype])


def test_a_branch_in_other_units_is_recalibrated_alike() -> None:
    """With orthogonal columns of B every coefficient is its own, however short its column."""
    rng = np.random.default_rng(0)
    down = rng.standard_normal((3, 8))
    new, old = (x.T @ x / 30 for x in rng.standard_normal((2, 30, 8)))
    expected = recalibration(np.eye(3), down, new, old, 1.5, form="direction")
    found = recalibration(np.diag([1.0, 1e-9, 1e-5]), down, new, old, 1.5, form="diagonal")
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_weights_that_are_no_numbers_are_refused() -> None:
    eye = np.eye(2)
    for weight in (np.asarray(np.nan), np.asarray([1.0, np.nan])):
        with pytest.raises(ValueError, match="history_weight"):
            recalibration(eye, eye, eye, eye, 1.0, history_weight=weight)


# The merge


@given(branch=branches(), gamma=gammas, dtype=dtypes, seed=seeds)
def test_the_merged_layer_does_what_layer_and_branch_did(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str, seed: int
) -> None:
    up, down, new, old = to_arrays(xp, branch, dtype)
    rng = np.random.default_rng(seed)
    weight = to_library(xp, rng.standard_normal((len(branch[0]), branch[1].shape[1])), dtype)
    c = recalibration(up, down, new, old, gamma)
    merged = merge(weight, up, down, c)
    assert dtype_name(merged) == dtype
    w, b, a, m = (to_numpy(x) for x in (weight, up, down, merged))
    x = rng.standard_normal((7, a.shape[1]))
    expected = x @ w.T + x @ a.T @ to_numpy(c).T @ b.T
    scale = np.abs(w).max() + np.abs(b).max() * np.abs(a).max() * len(a)
    np.testing.assert_allclose(x @ m.T, expected, atol=100 * EPS[dtype] * scale)
    # Without coefficients the branch is merged as it was trained.
    plain = to_numpy(merge(weight, up, down))
    np.testing.assert_allclose(plain, w + b @ a, atol=10 * EPS[dtype] * scale)


def test_a_merge_is_rounded_once(xp: ModuleType) -> None:
    libraries.needs_float64(xp)
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s).astype("float32") for s in ((5, 6), (5, 3), (3, 6), (3, 3))]
    w, b, a, c = (x.astype("float64") for x in arrays)
    exact = (w + b @ c @ a).astype("float32")
    merged = to_numpy(merge(*(to_library(xp, x, "float32") for x in arrays)))
    # Half a unit in the last place, and what the order of the wide sum may change in it.
    assert np.mean(merged == exact) > 0.95
    np.testing.assert_allclose(merged, exact, rtol=1.2e-7)


def test_merging_by_parts_is_merging_the_stack(xp: ModuleType) -> None:
    rng = np.random.default_rng(1)
    w, *factors = (
        to_library(xp, rng.standard_normal(s), "float32")
        for s in ((2, 5, 6), (2, 5, 3), (2, 5, 2), (2, 3, 6), (2, 2, 6))
    )
    up, down = stack_branches(factors[:2], factors[2:], [0.25, 0.5])
    parts = merge(merge(w, 0.25 * factors[0], factors[2]), 0.5 * factors[1], factors[3])
    np.testing.assert_allclose(to_numpy(merge(w, up, down)), to_numpy(parts), atol=1e-5)
    alone = merge(w[0, ...], up[0, ...], down[0, ...])
    np.testing.assert_allclose(to_numpy(merge(w, up, down))[0], to_numpy(alone), atol=1e-6)


def test_a_merge_that_does_not_fit_or_overflows(xp: ModuleType) -> None:
    w, up, down, c = (
        to_library(xp, np.ones(s), "float32") for s in ((3, 4), (3, 2), (2, 4), (2, 2))
    )
    for wrong in ((w.mT, up, down), (w, up, down.mT), (w, up, down, w), (w, up[0, :], down)):
        with pytest.raises(ValueError, match="shapes"):
            merge(*wrong)
    with pytest.raises(ValueError, match="merged weight"):
        merge(w, 1e30 * up, 1e30 * down, c)
