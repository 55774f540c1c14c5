"""Subspaces against SciPy: objectives, residuals and angles, never raw eigenvectors."""

from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import widest_dtype
from strategies import (
    Matrix,
    dtypes,
    from_spectrum,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
)
from subspace_oracle import EPS, angle, objective, regularised, ridges, solve, unit

from loda_math import general_subspace, isolated_subspace, null_subspace


@pytest.mark.parametrize("name", ["general", "isolated", "null"])
@given(pencil=pencils(), dtype=dtypes, ridge=ridges, data=st.data())
def test_orthonormal_whatever_the_conditioning(
    xp: ModuleType, name: str, pencil: tuple, dtype: str, ridge: float, data: st.DataObject
) -> None:
    scales = data.draw(st.tuples(*[st.sampled_from([1e-30, 1.0, 1e30])] * 2))
    pencil = (pencil[0] * scales[0], pencil[1] * scales[1], pencil[2])
    u, _, _ = solve(xp, name, pencil, dtype, **({"ridge": ridge} if name == "isolated" else {}))
    alive = np.any(u != 0, axis=0)
    assert alive[0]
    if name == "null":
        assert alive.all()
    # Solved in float64 and rounded, or solved in float32.
    rounding = 4 if widest_dtype(xp) == "float64" else 40
    np.testing.assert_allclose(u.T @ u, np.diag(alive * 1.0), atol=1e-12 + rounding * EPS[dtype])
    # The entry of largest magnitude of each column is positive.
    assert np.all(u.max(axis=0) >= -u.min(axis=0))


@given(pencil=pencils(), dtype=dtypes)
def test_general_maximises_the_common_energy(xp: ModuleType, pencil: tuple, dtype: str) -> None:
    u, new, old = solve(xp, "general", pencil, dtype)
    s, rank = new + old, pencil[2]
    values = np.linalg.eigvalsh(s)[::-1]
    slack = 1e3 * EPS[dtype] * values[0]
    assert np.trace(u.T @ s @ u) == pytest.approx(values[:rank].sum(), abs=slack)
    # Invariant: S U stays in the span of U.
    assert np.abs(s @ u - u @ (u.T @ s @ u)).max() <= slack
    energies = np.diag(u.T @ s @ u)
    assert np.all(np.diff(energies) <= slack)


@given(pencil=pencils(), dtype=dtypes)
def test_null_minimises_the_old_energy(xp: ModuleType, pencil: tuple, dtype: str) -> None:
    u, _, old = solve(xp, "null", pencil, dtype)
    values = np.linalg.eigvalsh(old)
    slack = 1e3 * EPS[dtype] * values[-1]
    assert np.trace(u.T @ old @ u) == pytest.approx(values[: pencil[2]].sum(), abs=slack)
    assert np.abs(old @ u - u @ (u.T @ old @ u)).max() <= slack
    assert np.all(np.diff(np.diag(u.T @ old @ u)) >= -slack)


@given(pencil=pencils(), ridge=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_isolated_solves_the_generalised_problem(
    xp: ModuleType, pencil: tuple, ridge: float
) -> None:
    u, new, old = solve(xp, "isolated", pencil, "float64", ridge=ridge)
    s, r = unit(new), regularised(old, ridge)
    values = scipy.linalg.eigh(s, r, eigvals_only=True)[::-1]
    found = int(np.any(u != 0, axis=0).sum())
    # Rounding of the moments, magnified by the smallest eigenvalue of R.
    slack = 100 * EPS["float64"] * len(s) / ridge * max(1.0, values[0])
    assert objective(u, new, r) == pytest.approx(values[:found].sum(), abs=slack)
    # Zero columns stand for directions without new-task energy.
    assert np.all(values[found : pencil[2]] <= slack)
    u = u[:, :found]
    inner = np.linalg.solve(u.T @ r @ u, u.T @ s @ u)
    assert np.abs(s @ u - r @ u @ inner).max() <= slack


@given(pencil=pencils(), seed=seeds)
def test_isolated_beats_every_other_basis(xp: ModuleType, pencil: tuple, seed: int) -> None:
    u, new, old = solve(xp, "isolated", pencil, "float64")
    r, size, rng = regularised(old, 1e-2), len(new), np.random.default_rng(seed)
    u = u[:, np.any(u != 0, axis=0)]
    best = objective(u, new, r)
    slack = 1e-10 * max(1.0, best)
    for noise in (1e-4, 1e-2, np.inf):
        other = rng.standard_normal(u.shape)
        other, _ = np.linalg.qr(other if noise == np.inf else u + noise * other)
        assert objective(other, new, r) <= best + slack
    for rival in (np.linalg.eigh(new)[1][:, ::-1], np.linalg.eigh(old)[1], np.eye(size)):
        assert objective(rival[:, : u.shape[1]], new, r) <= best + slack


@st.composite
def separated(draw: st.DrawFn) -> tuple[Matrix, Matrix, Matrix, Matrix, int]:
    """Commuting moments whose optimal spans are known: rotation, both spectra, a rank."""
    size = draw(st.integers(2, 7))
    rng = np.random.default_rng(draw(seeds))
    old = np.arange(1, size + 1) / size
    ratio = rng.permutation(2.0 ** np.arange(size))
    return orthogonal(size, rng), ratio * old, old, ratio, draw(st.integers(1, size - 1))


@given(case=separated(), dtype=dtypes, scales=st.tuples(*[st.sampled_from([1e-9, 1.0, 1e9])] * 2))
def test_spans_known_in_closed_form(
    xp: ModuleType, case: tuple, dtype: str, scales: tuple[float, float]
) -> None:
    q, new, old, _, rank = case
    pencil = (from_spectrum(new * scales[0], q), from_spectrum(old * scales[1], q), rank)
    tolerance = 3e4 * EPS[dtype]
    size = len(new)
    ratio = (new / new.sum()) / (old / old.sum() + 1e-6 / size)
    u, _, _ = solve(xp, "isolated", pencil, dtype, ridge=1e-6)
    assert angle(u, q[:, np.argsort(-ratio)[:rank]]) < tolerance
    u, _, _ = solve(xp, "null", pencil, dtype)
    assert angle(u, q[:, np.argsort(old)[:rank]]) < tolerance
    u, _, _ = solve(xp, "general", (pencil[1], pencil[1], rank), dtype)
    assert angle(u, q[:, np.argsort(-old)[:rank]]) < tolerance


@given(case=separated(), seed=seeds)
def test_isolated_turns_with_the_coordinates(xp: ModuleType, case: tuple, seed: int) -> None:
    q, new, old, _, rank = case
    rng = np.random.default_rng(seed)
    # Non-commuting: another rotation for the history, but the ratio stays separated enough.
    n, o = from_spectrum(new, q), from_spectrum(old, q) + 1e-2 * np.eye(len(old))
    turn = orthogonal(len(new), rng)
    u, _, _ = solve(xp, "isolated", (n, o, rank), "float64", ridge=1e-3)
    v, _, _ = solve(xp, "isolated", (turn @ n @ turn.T, turn @ o @ turn.T, rank), "float64")
    w, _, _ = solve(xp, "isolated", (n, o, rank), "float64")
    assert angle(v, turn @ w) < 1e-9
    assert u.shape == v.shape


@given(pencil=pencils(), exponents=st.tuples(st.integers(-200, 200), st.integers(-200, 200)))
def test_scale_of_a_moment_does_not_matter(
    xp: ModuleType, pencil: tuple, exponents: tuple[int, int]
) -> None:
    new, old, rank = pencil
    # Powers of two round nothing, so the bases are the same to the last bit.
    a, b = 2.0 ** exponents[0], 2.0 ** exponents[1]
    base, _, _ = solve(xp, "isolated", pencil, "float64")
    scaled, _, _ = solve(xp, "isolated", (new * a, old * b, rank), "float64")
    np.testing.assert_array_equal(scaled, base)
    base, _, _ = solve(xp, "general", pencil, "float64")
    scaled, _, _ = solve(xp, "general", (new * a, old * a, rank), "float64")
    np.testing.assert_array_equal(scaled, base)


@given(pencil=pencils(kinds=("random", "clustered", "spiked")), dtype=dtypes)
def test_any_scale_keeps_the_objective(xp: ModuleType, pencil: tuple, dtype: str) -> None:
    base, new, old = solve(xp, "isolated", pencil, dtype)
    scaled, _, _ = solve(xp, "isolated", (pencil[0] * 3e30, pencil[1] * 7e-28, pencil[2]), dtype)
    r = regularised(old, 1e-2)
    slack = 1e5 * EPS[dtype]
    assert objective(scaled, new, r) == pytest.approx(objective(base, new, r), rel=slack)


@given(pencil=pencils(), ridge=st.sampled_from([1e-6, 1e-2, 1.0]))
def test_spans_are_nested_in_the_rank(xp: ModuleType, pencil: tuple, ridge: float) -> None:
    new, old, rank = pencil
    for name in ("general", "isolated", "null"):
        settings = {"ridge": ridge} if name == "isolated" else {}
        full, _, _ = solve(xp, name, (new, old, len(new)), "float64", **settings)
        part, _, _ = solve(xp, name, pencil, "float64", **settings)
        np.testing.assert_allclose(full[:, :rank] @ full[:, :rank].T, part @ part.T, atol=1e-9)


@settings(max_examples=10)
@given(pencil=pencils())
def test_deterministic(xp: ModuleType, pencil: tuple) -> None:
    for name in ("general", "isolated", "null"):
        one, other = (solve(xp, name, pencil, "float64")[0] for _ in range(2))
        np.testing.assert_array_equal(one, other)


@settings(max_examples=4)
@given(seed=seeds, dtype=dtypes)
def test_batches_are_a_loop(xp: ModuleType, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 2, 3, 9, 5))
    n, o = (to_library(xp, np.einsum("...ni,...nj->...ij", t, t), dtype) for t in (x, y))
    for solver in (
        lambda a, b: general_subspace(a, b, 2),
        lambda a, b: isolated_subspace(a, b, 2),
        lambda a, b: isolated_subspace(a, None, 2),
        lambda a, b: null_subspace(b, 2),
    ):
        whole = to_numpy(solver(n, o))
        assert whole.shape == (2, 3, 5, 2)
        for i in range(2):
            for j in range(3):
                one = to_numpy(solver(n[i, j, :, :], o[i, j, :, :]))
                assert angle(whole[i, j], one) < 1e4 * EPS[dtype]


@pytest.mark.parametrize("size", [0, 1])
def test_smallest_sizes(xp: ModuleType, size: int) -> None:
    one = to_library(xp, np.full((size, 1, 1), 5.0), "float32")
    for u in (general_subspace(one, one, 1), isolated_subspace(one, one, 1), null_subspace(one, 1)):
        np.testing.assert_array_equal(to_numpy(u), np.ones((size, 1, 1)))


def test_arguments_stay_as_they_are(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    m = rng.standard_normal((4, 4))
    new, old = to_library(xp, m @ m.T), to_library(xp, m.T @ m)
    before = to_numpy(new).copy(), to_numpy(old).copy()
    general_subspace(new, old, 2), isolated_subspace(new, old, 2), null_subspace(old, 2)
    np.testing.assert_array_equal(to_numpy(new), before[0])
    np.testing.assert_array_equal(to_numpy(old), before[1])
