"""Recalibration against brute force: least squares over Λ, golden section, definitions."""

from types import ModuleType

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from recalibration_oracle import EPS, gammas, loss, root
from strategies import (
    Matrix,
    branches,
    dtype_name,
    dtypes,
    from_spectrum,
    orthogonal,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import recalibration, recalibration_loss

FORMS = ("full", "diagonal", "direction", "scalar")
regular = branches(("random", "spiked", "flat"), dead=False)


def solve(xp: ModuleType, branch: tuple, gamma: float, form: str, dtype: str = "float64") -> Matrix:
    arrays = [to_library(xp, a, dtype) for a in branch]
    result = recalibration(*arrays, gamma, form)
    rank = branch[1].shape[0]
    assert tuple(result.shape) == (rank, rank)
    assert dtype_name(result) == dtype
    return to_numpy(result)


def brute_force(branch: tuple, gamma: float, form: str) -> Matrix:
    """Least squares on explicit matrices, over a basis of the Λ of the given form."""
    up, down, new, old = branch
    rank = len(down)
    if form == "full":
        shapes = [np.outer(i, j) for i in np.eye(rank) for j in np.eye(rank)]
    else:
        shapes = [np.diag(e) for e in np.eye(rank)] if form == "diagonal" else [np.eye(rank)]
    old_side, new_side = down @ root(old), np.sqrt(gamma) * down @ root(new)
    stack = lambda m: np.concatenate([(up @ m @ s).ravel() for s in (old_side, new_side)])  # noqa: E731
    system = np.stack([stack(m) for m in shapes], axis=1)
    target = np.concatenate([0 * (up @ old_side).ravel(), (up @ new_side).ravel()])
    weights = np.linalg.lstsq(system, target, rcond=1e-12)[0]
    return np.einsum("k,kij->ij", weights, np.stack(shapes))


@pytest.mark.parametrize("form", ["full", "diagonal", "scalar"])
@given(branch=branches(), gamma=gammas)
def test_forms_reach_the_least_squares_optimum(
    xp: ModuleType, form: str, branch: tuple, gamma: float
) -> None:
    ours = solve(xp, branch, gamma, form)
    best = loss(brute_force(branch, gamma, form), branch, gamma)
    worst = loss(np.eye(len(ours)), branch, gamma) + loss(0 * ours, branch, gamma)
    assert loss(ours, branch, gamma) <= best + 1e-9 * worst
    if form == "diagonal":
        np.testing.assert_array_equal(ours, np.diag(np.diag(ours)))
    if form == "scalar":
        np.testing.assert_array_equal(ours, ours[0, 0] * np.eye(len(ours)))


@given(branch=regular, gamma=gammas)
def test_full_form_is_the_closed_form(xp: ModuleType, branch: tuple, gamma: float) -> None:
    _, down, new, old = branch
    down = orthogonal(len(new), np.random.default_rng(0))[: len(down)]
    branch = (branch[0], down, new, old)
    p, q = down @ old @ down.T, down @ new @ down.T
    exact = np.linalg.solve((p + gamma * q).T, gamma * q.T).T
    np.testing.assert_allclose(solve(xp, branch, gamma, "full"), exact, atol=1e-7)


@given(branch=regular, gamma=gammas, dtype=dtypes)
def test_direction_form_weighs_each_row(
    xp: ModuleType, branch: tuple, gamma: float, dtype: str
) -> None:
    _, down, new, old = branch
    p, q = (np.diag(down @ m @ down.T) for m in (old, new))
    exact = gamma * q / (p + gamma * q)
    ours = solve(xp, branch, gamma, "direction", dtype)
    np.testing.assert_allclose(ours, np.diag(exact), atol=1e4 * EPS[dtype])


@given(branch=regular, gamma=gammas)
def test_scalar_form_by_golden_section(xp: ModuleType, branch: tuple, gamma: float) -> None:
    ours = solve(xp, branch, gamma, "scalar")[0, 0]
    rank = branch[1].shape[0]
    found = scipy.optimize.minimize_scalar(
        lambda x: loss(x * np.eye(rank), branch, gamma), bracket=(0, 1), method="golden"
    )
    assert ours == pytest.approx(found.x, abs=1e-5)


@given(branch=branches(), gamma=gammas, seed=seeds)
def test_order_of_the_forms(xp: ModuleType, branch: tuple, gamma: float, seed: int) -> None:
    losses = {form: loss(solve(xp, branch, gamma, form), branch, gamma) for form in FORMS}
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


@given(branch=regular, gamma=st.sampled_from([0.5, 1.0, 3.0]))
def test_exchanging_the_tasks_complements(xp: ModuleType, branch: tuple, gamma: float) -> None:
    up, _, new, old = branch
    size = len(new)
    down = orthogonal(size, np.random.default_rng(1))[: up.shape[1]]
    there = solve(xp, (up, down, new, old), gamma, "full")
    back = solve(xp, (up, down, old, new), 1 / gamma, "full")
    np.testing.assert_allclose(there + back, np.eye(len(down)), atol=1e-7)


@given(branch=regular, gamma=gammas)
def test_minimum_is_the_parallel_sum(xp: ModuleType, branch: tuple, gamma: float) -> None:
    up, _, new, old = branch
    down = orthogonal(len(new), np.random.default_rng(1))[: up.shape[1]]
    branch = (up, down, new, old)
    p, q = down @ old @ down.T, gamma * down @ new @ down.T
    parallel = p @ np.linalg.solve(p + q, q)
    ours = loss(solve(xp, branch, gamma, "full"), branch, gamma)
    assert ours == pytest.approx(np.trace(up.T @ up @ parallel), rel=1e-6)


@given(branch=regular, gamma=gammas, seed=seeds)
def test_full_form_does_not_depend_on_the_basis(
    xp: ModuleType, branch: tuple, gamma: float, seed: int
) -> None:
    up, _, new, old = branch
    rng = np.random.default_rng(seed)
    rank = up.shape[1]
    down = orthogonal(len(new), rng)[:rank]
    change = from_spectrum(rng.uniform(0.3, 3, rank), orthogonal(rank, rng)) @ orthogonal(rank, rng)
    one = up @ solve(xp, (up, down, new, old), gamma, "full") @ down
    moved = (up @ np.linalg.inv(change), change @ down, new, old)
    other = moved[0] @ solve(xp, moved, gamma, "full") @ moved[1]
    np.testing.assert_allclose(one, other, atol=1e-7 * np.abs(up).max())
    # Free of B, too.
    blank = solve(xp, (0 * up, down, new, old), gamma, "full")
    np.testing.assert_allclose(blank, solve(xp, (up, down, new, old), gamma, "full"), atol=1e-12)


@given(branch=branches(("random", "flat"), dead=False), form=st.sampled_from(FORMS), dtype=dtypes)
def test_limits_of_gamma(xp: ModuleType, branch: tuple, form: str, dtype: str) -> None:
    up, _, new, old = branch
    down = orthogonal(len(new), np.random.default_rng(2))[: up.shape[1]]
    branch = (np.eye(len(down)), down, new, old)
    np.testing.assert_array_equal(solve(xp, branch, 0.0, form, dtype), 0 * np.eye(len(down)))
    assert np.abs(solve(xp, branch, 1e-12, form, dtype)).max() < 1e-4
    for huge in (1e12, 1e200, 1e308):
        ours = solve(xp, branch, huge, form, dtype)
        np.testing.assert_allclose(ours, np.eye(len(down)), atol=1e-4)


@given(branch=branches(), gamma=gammas, form=st.sampled_from(FORMS), data=st.data())
def test_a_common_scale_does_not_matter(
    xp: ModuleType, branch: tuple, gamma: float, form: str, data: st.DataObject
) -> None:
    a, b, c = (2.0 ** data.draw(st.sampled_from([-90, 0, 90])) for _ in range(3))
    up, down, new, old = branch
    scaled = solve(xp, (up * a, down * b, new * c, old * c), gamma, form)
    np.testing.assert_array_equal(scaled, solve(xp, branch, gamma, form))


@pytest.mark.parametrize("form", FORMS)
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
    for branch in ((one, one, zero, zero), (one, zero, one, one), (one, one, zero, one)):
        np.testing.assert_array_equal(solve(xp, branch, 1.0, form), zero)
    np.testing.assert_allclose(solve(xp, (one, one, one, zero), 1.0, form), one, atol=1e-14)


@given(branch=branches(), gamma=gammas, seed=seeds, dtype=dtypes)
def test_loss_is_its_definition_on_tokens(
    xp: ModuleType, branch: tuple, gamma: float, seed: int, dtype: str
) -> None:
    up, down, new, _ = branch
    rng = np.random.default_rng(seed)
    size, rank = len(new), len(down)
    x_new, x_old = rng.standard_normal((2, 9, size))
    moments = x_new.T @ x_new / 9, x_old.T @ x_old / 9
    coefficients = rng.standard_normal((rank, rank))
    interference = x_old @ (up @ coefficients @ down).T
    lost = x_new @ (up @ coefficients @ down - up @ down).T
    direct = np.sum(interference**2) / 9 + gamma * np.sum(lost**2) / 9
    arrays = [to_library(xp, a, dtype) for a in (coefficients, up, down, *moments)]
    ours = recalibration_loss(*arrays, gamma)
    assert ours.shape == ()
    assert dtype_name(ours) == dtype
    assert float(ours) == pytest.approx(direct, rel=1e4 * EPS[dtype])


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=4)
@given(seed=seeds, dtype=dtypes)
def test_batches_are_a_loop(xp: ModuleType, form: str, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    up, down = rng.standard_normal((2, 3, 5, 2)), rng.standard_normal((2, 3, 2, 4))
    x, y = rng.standard_normal((2, 2, 3, 9, 4))
    moments = (np.einsum("...ni,...nj->...ij", t, t) for t in (x, y))
    arrays = [to_library(xp, a, dtype) for a in (up, down, *moments)]
    whole = recalibration(*arrays, 2.0, form)
    losses = recalibration_loss(whole, *arrays, 2.0)
    assert losses.shape == (2, 3)
    for i in range(2):
        for j in range(3):
            at = (i, j, ...)
            one = recalibration(*(a[at] for a in arrays), 2.0, form)
            np.testing.assert_allclose(to_numpy(whole)[i, j], to_numpy(one), atol=1e3 * EPS[dtype])
            value = float(recalibration_loss(one, *(a[at] for a in arrays), 2.0))
            assert float(losses[at]) == pytest.approx(value, rel=1e3 * EPS[dtype])


@pytest.mark.parametrize("form", FORMS)
def test_empty_batches(xp: ModuleType, form: str) -> None:
    arrays = [to_library(xp, np.zeros((0, *shape))) for shape in ((3, 2), (2, 4), (4, 4), (4, 4))]
    result = recalibration(*arrays, 1.0, form)
    assert result.shape == (0, 2, 2)
    assert recalibration_loss(result, *arrays, 1.0).shape == (0,)


@pytest.mark.parametrize("form", ["full", "diagonal", "direction", "scalar", "box"])
def test_every_form_has_the_batch_of_all_arguments(xp: ModuleType, form: str) -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((2, 3, 5, 2)), rng.standard_normal((2, 6))
    new, old = (x.T @ x for x in rng.standard_normal((2, 9, 6)))
    arrays = [to_library(xp, x, "float64") for x in (up, down, new, old)]
    found = to_numpy(recalibration(*arrays, 1.5, form=form))
    assert found.shape == (2, 3, 2, 2)
    one = [to_library(xp, x, "float64") for x in (up[1, 2], down, new, old)]
    np.testing.assert_allclose(found[1, 2], to_numpy(recalibration(*one, 1.5, form=form)), 1e-9)
