"""What must not change the answer: coordinates, order of tasks, basis of a branch, other layers."""

from collections.abc import Callable
from itertools import permutations
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.special
from calls import ALL, call
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64
from strategies import (
    Matrix,
    branches,
    from_spectrum,
    gammas,
    moment,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
)

import loda_math as lm

few = settings(max_examples=12)
regular = ("random", "spiked")

SOLVERS: dict[str, Callable[..., Any]] = {
    "general": lm.general_solution,
    "isolated": lm.isolated_solution,
    "null": lambda new, old, rank: lm.null_solution(old, rank),
    "trace ratio": lm.trace_ratio_solution,
}


def same_span(one: Any, other: Any, gap: Any, slack: float = 1e-10) -> None:
    """Equal up to what rounding may turn a span by: it grows as the gap closes."""
    u, v = to_numpy(one), to_numpy(other)
    np.testing.assert_allclose(u @ u.T, v @ v.T, atol=slack + slack / max(float(gap), slack))


@pytest.mark.parametrize("name", SOLVERS)
@few
@given(pencil=pencils(kinds=regular, dead=False), seed=seeds)
def test_bases_turn_with_the_coordinates(
    xp: ModuleType, name: str, pencil: tuple, seed: int
) -> None:
    new, old, rank = pencil
    turn = orthogonal(len(new), np.random.default_rng(seed))
    turned = [turn @ m @ turn.T for m in (new, old)]
    turned = [0.5 * (m + m.T) for m in turned]
    here = SOLVERS[name](to_library(xp, new), to_library(xp, old), rank)
    there = SOLVERS[name](*(to_library(xp, m) for m in turned), rank)
    same_span(turn @ to_numpy(here.basis), there.basis, here.gap)
    assert float(there.gap) == pytest.approx(float(here.gap), abs=1e-9)


@few
@given(seed=seeds, size=st.integers(2, 5), rank=st.integers(1, 2))
def test_the_order_of_tasks_does_not_matter(
    xp: ModuleType, seed: int, size: int, rank: int
) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    tasks = [lm.second_moment(to_library(xp, x)) for x in rng.standard_normal((3, 7, size))]
    new = to_library(xp, from_spectrum(rng.uniform(0.1, 1, size), orthogonal(size, rng)))
    first = lm.isolated_solution(new, sum(tasks).mean, rank)
    for order in permutations(tasks):
        whole = lm.combine(lm.combine(order[0], order[1]), order[2])
        np.testing.assert_allclose(to_numpy(whole.total), to_numpy(sum(tasks).total), rtol=1e-12)
        assert whole.count == 21
        same_span(lm.isolated_subspace(new, whole.mean, rank), first.basis, first.gap)
        history = None
        for task in order:
            history = lm.remember(history, task.mean)
        # Tasks of one size: the sum of their means is a multiple of the mean over all.
        np.testing.assert_allclose(to_numpy(history.mean), to_numpy(whole.mean), rtol=1e-12)


@few
@given(
    old=moment(6, ("random",)),
    scale=st.sampled_from([1e-9, 1.0, 1e9]),
    rank=st.integers(1, 6),
    ridge=st.sampled_from([0.0, 1e-4, 1e-2, 1.0]),
)
def test_a_flat_new_task_leaves_the_null_space(
    xp: ModuleType, old: Matrix, scale: float, rank: int, ridge: float
) -> None:
    new = to_library(xp, scale * np.eye(6))
    solution = lm.isolated_solution(new, to_library(xp, old), rank, ridge=ridge)
    quiet = lm.null_solution(to_library(xp, old), rank)
    same_span(solution.basis, quiet.basis, min(float(solution.gap), float(quiet.gap)))
    values, vectors = np.linalg.eigh(old / np.trace(old))
    same_span(solution.basis, vectors[:, :rank], min(float(solution.gap), float(quiet.gap)))
    # The generalised eigenvalues are the inverse eigenvalues of R.
    expected = (1 / 6) / (values[:rank] + max(ridge, 24 * np.finfo(float).eps) / 6)
    np.testing.assert_allclose(to_numpy(solution.values), expected, rtol=1e-9)


@few
@given(pencil=pencils(), ridge=st.sampled_from([0.0, 1e-20, 1e-4, 1.0]))
def test_a_ridge_may_be_an_array(xp: ModuleType, pencil: tuple, ridge: float) -> None:
    new, old = (to_library(xp, m) for m in pencil[:2])
    number, array = (
        lm.isolated_subspace(new, old, pencil[2], ridge=r)
        for r in (ridge, to_library(xp, np.asarray(ridge)))
    )
    np.testing.assert_array_equal(to_numpy(number), to_numpy(array))


# Recalibration


def recalibrated(xp: ModuleType, branch: tuple, gamma: float, form: str = "full") -> Matrix:
    return to_numpy(lm.recalibration(*(to_library(xp, x) for x in branch), gamma, form))


@pytest.mark.parametrize("form", ["full", "diagonal", "box", "direction", "scalar"])
@few
@given(branch=branches(regular, dead=False, outliers=False), gamma=gammas, seed=seeds)
def test_coefficients_do_not_turn_with_the_inputs(
    xp: ModuleType, form: str, branch: tuple, gamma: float, seed: int
) -> None:
    up, _, new, old = branch
    size = len(new)
    down = orthogonal(size, np.random.default_rng(0))[: up.shape[1]]
    up = orthogonal(8, np.random.default_rng(seed))[:, : up.shape[1]]  # a unique optimum
    turn = orthogonal(size, np.random.default_rng(seed))
    turned = [turn @ m @ turn.T for m in (new, old)]
    turned = [0.5 * (m + m.T) for m in turned]
    here = recalibrated(xp, (up, down, new, old), gamma, form)
    there = recalibrated(xp, (up, down @ turn.T, *turned), gamma, form)
    np.testing.assert_allclose(here, there, atol=1e-7)


@few
@given(branch=branches(), seed=seeds)
def test_more_weight_keeps_more_in_every_direction(
    xp: ModuleType, branch: tuple, seed: int
) -> None:
    """Eigenvalues rise with γ; so does the change on old inputs, and the loss on new ones falls."""
    up, down, new, old = branch
    arrays = [to_library(xp, x) for x in branch]
    grid = [0.0, 1e-3, 0.1, 1.0, 3.0, 1e3]
    factors = [lm.recalibration(*arrays, gamma) for gamma in grid]
    values = [np.sort(np.linalg.eigvals(to_numpy(c)).real) for c in factors]
    assert np.all(np.diff(values, axis=0) >= -1e-7)
    effects = [lm.update_effect(c, *arrays) for c in factors]
    p, q = down @ old @ down.T, down @ new @ down.T
    slack = 1e-9 * np.sum(up**2) * (np.trace(p) + np.trace(q))
    assert np.all(np.diff([float(e.old_change) for e in effects]) >= -slack)
    assert np.all(np.diff([float(e.new_loss) for e in effects]) <= slack)


def test_the_form_by_direction_depends_on_the_basis_of_the_branch(xp: ModuleType) -> None:
    """The same branch written in two bases: one update by the full form, two by direction."""
    new, old = np.diag([1.0, 0.0]), np.diag([0.0, 1.0])
    quarter = np.array([[1.0, -1.0], [1.0, 1.0]]) / np.sqrt(2)
    for form, alike in (("full", True), ("direction", False), ("diagonal", False)):
        one = recalibrated(xp, (np.eye(2), np.eye(2), new, old), 1.0, form)
        other = quarter.T @ recalibrated(xp, (quarter.T, quarter, new, old), 1.0, form) @ quarter
        np.testing.assert_allclose(one, new, atol=1e-12)  # keeps the new direction alone
        assert (np.abs(one - other).max() < 1e-12) == alike


@few
@given(seed=seeds, rank=st.integers(1, 4), gamma=gammas)
def test_coefficients_are_a_ridge_regression_on_tokens(
    xp: ModuleType, seed: int, rank: int, gamma: float
) -> None:
    """Regress the projected new tokens on themselves; the old ones are rows with target zero."""
    rng = np.random.default_rng(seed)
    x_new, x_old = rng.standard_normal((2, 40, 5)) * rng.uniform(0.3, 2, (2, 1, 5))
    down = rng.standard_normal((rank, 5))
    z_new, z_old = np.sqrt(gamma) * x_new @ down.T, x_old @ down.T
    system = np.concatenate([z_new, z_old])
    target = np.concatenate([z_new, 0 * z_old])
    exact = np.linalg.lstsq(system, target, rcond=None)[0].T
    moments = [x.T @ x / 40 for x in (x_new, x_old)]
    ours = recalibrated(xp, (rng.standard_normal((3, rank)), down, *moments), gamma)
    np.testing.assert_allclose(ours, exact, atol=1e-8)


# Gradient-aligned steps


@few
@given(seed=seeds, radius=st.sampled_from([1e-3, 0.1, 2.0]))
def test_the_remainder_of_the_expansion_is_of_second_order(
    xp: ModuleType, seed: int, radius: float
) -> None:
    """L(θ̃) = L − ρ⟨∇L, ĝ/‖ĝ‖⟩ + R with |R| ≤ ℓρ²/2, for a loss whose gradient is ℓ-Lipschitz."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    a, theta, source = rng.standard_normal((6, 4)), rng.standard_normal(4), rng.standard_normal(4)
    loss = lambda t: scipy.special.logsumexp(a @ t)  # noqa: E731
    gradient = lambda t: a.T @ scipy.special.softmax(a @ t)  # noqa: E731
    p = scipy.special.softmax(a @ theta)
    hessian = a.T @ (np.diag(p) - np.outer(p, p)) @ a
    unit = source / np.linalg.norm(source)

    def remainders(rho: float) -> tuple[float, Matrix]:
        (moved,) = lm.lookahead([to_library(xp, theta)], [to_library(xp, source)], rho)
        there = to_numpy(moved)
        slope = gradient(there) - gradient(theta) + rho * hessian @ unit
        return loss(there) - loss(theta) + rho * gradient(theta) @ unit, slope

    lipschitz = np.linalg.norm(a, 2) ** 2
    assert abs(remainders(radius)[0]) <= 0.5 * lipschitz * radius**2 + 1e-13
    # The step's gradient too: halving a small radius quarters what the first order leaves.
    wide, narrow = (np.linalg.norm(remainders(r)[1]) for r in (2e-3, 1e-3))
    assert wide == pytest.approx(4 * narrow, rel=0.1, abs=1e-9)


@few
@given(seed=seeds)
def test_the_projection_is_the_nearest_without_conflict(xp: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = rng.standard_normal((2, 5))
    (projected,) = lm.project_conflict([to_library(xp, a)], [to_library(xp, b)])
    distance = np.linalg.norm(to_numpy(projected) - a)
    for other in a + rng.standard_normal((200, 5)) * np.logspace(-2, 1, 200)[:, None]:
        allowed = other - min(0.0, other @ b) / (b @ b) * b
        assert distance <= np.linalg.norm(allowed - a) + 1e-12


# Leading dimensions: every field of every result is what the layer alone gives

D, RANK = 5, 2


def gram(rng: np.random.Generator) -> Matrix:
    x = rng.standard_normal((9, D))
    return x.T @ x


def normal(*shape: int) -> Callable[[np.random.Generator], Matrix]:
    return lambda rng: rng.standard_normal(shape)


MAKE = {
    **dict.fromkeys(("new", "old", "moment"), gram),
    **dict.fromkeys(("before", "after", "change", "gradient", "weight"), normal(3, D)),
    "basis": lambda rng: orthogonal(D, rng)[:, :RANK],
    "up": normal(3, RANK),
    "down": normal(RANK, D),
    "tokens": normal(4, D),
    "grad_output": normal(4, 2),
    "coefficients": normal(RANK, RANK),
}


@pytest.mark.parametrize("name", [name for name in ALL if name != "verify_perturbation"])
def test_layers_are_independent(xp: ModuleType, name: str) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(0)
    # Layers of very different size: none may lend its scale to another.
    sizes = 10.0 ** np.asarray([[0, 3], [-3, 1], [-1, 2]])[..., None, None]
    stacks = {
        a: sizes ** (a not in ("basis", "coefficients"))
        * np.stack([[MAKE[a](rng) for _ in range(2)] for _ in range(3)])
        for a in ALL[name][1]
    }
    result = call(xp, name, **{a: to_library(xp, x) for a, x in stacks.items()})
    fields = result if isinstance(result, tuple) else (result,)
    for i, j in np.ndindex(3, 2):
        one = call(xp, name, **{a: to_library(xp, x[i, j]) for a, x in stacks.items()})
        parts = one if isinstance(one, tuple) else (one,)
        for whole, single in zip(fields, parts, strict=True):
            if whole is None or isinstance(whole, (int, float)):  # count and unit of Moments
                assert whole == single
                continue
            assert whole.shape == (3, 2, *single.shape)
            size = np.abs(to_numpy(single)).max(initial=0)
            np.testing.assert_allclose(
                to_numpy(whole)[i, j], to_numpy(single), rtol=1e-6, atol=1e-9 * (1 + size)
            )
