"""Siblings of the basis functions: eigenvalues, effective rank and gap against SciPy."""

from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import (
    Matrix,
    dtype_name,
    dtypes,
    from_spectrum,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import (
    general_solution,
    general_subspace,
    isolated_solution,
    isolated_subspace,
    null_solution,
    null_subspace,
    trace_ratio_solution,
)

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
few = settings(max_examples=12)


def unit(m: Matrix) -> Matrix:
    return m / np.trace(m) if np.trace(m) > 0 else m


@few
@given(pencil=pencils(), dtype=dtypes, scale=st.sampled_from([1e-20, 1.0, 1e20]))
def test_general_eigenvalues_are_in_units_of_the_moments(
    xp: ModuleType, pencil: tuple, dtype: str, scale: float
) -> None:
    new, old = (
        to_library(xp, m * scale / 1e10 if dtype == "float32" else m, dtype) for m in pencil[:2]
    )
    rank = pencil[2]
    found = general_solution(new, old, rank)
    s = to_numpy(new) + to_numpy(old)
    values = np.linalg.eigvalsh(s)[::-1]
    slack = 1e2 * EPS[dtype] * values[0]
    e = int(found.effective_rank)
    assert dtype_name(found.values) == dtype_name(found.gap) == dtype
    np.testing.assert_allclose(to_numpy(found.values)[:e], values[:e], atol=slack)
    np.testing.assert_array_equal(to_numpy(found.values)[e:], 0)
    basis = to_numpy(found.basis)
    np.testing.assert_array_equal(basis, to_numpy(general_subspace(new, old, rank)))
    assert e == np.any(basis != 0, axis=0).sum()
    following = np.append(values, 0)[rank] if e == rank else 0.0
    gap = (values[e - 1] - max(following, 0)) / values[0]
    assert float(found.gap) == pytest.approx(gap, abs=1e3 * EPS[dtype])


@few
@given(pencil=pencils(dead=False), ridge=st.sampled_from([1e-4, 1e-2, 1.0]))
def test_isolated_eigenvalues_are_those_of_the_pencil(
    xp: ModuleType, pencil: tuple, ridge: float
) -> None:
    new, old = (to_library(xp, m) for m in pencil[:2])
    rank, size = pencil[2], len(pencil[0])
    found = isolated_solution(new, old, rank, ridge=ridge)
    r = unit(pencil[1]) + ridge / size * np.eye(size)
    values = scipy.linalg.eigh(unit(pencil[0]), r, eigvals_only=True)[::-1]
    e = int(found.effective_rank)
    slack = 1e3 * EPS["float64"] * size / ridge * max(1.0, values[0])
    np.testing.assert_allclose(to_numpy(found.values)[:e], values[:e], atol=slack)
    np.testing.assert_array_equal(to_numpy(found.values)[e:], 0)
    basis = to_numpy(isolated_subspace(new, old, rank, ridge=ridge))
    np.testing.assert_array_equal(to_numpy(found.basis), basis)
    assert e == np.any(basis != 0, axis=0).sum()
    following = np.append(values, 0)[rank] if e == rank else 0.0
    gap = (values[e - 1] - max(following, 0)) / values[0]
    assert float(found.gap) == pytest.approx(gap, abs=1e-6)


@few
@given(pencil=pencils(), dtype=dtypes)
def test_null_eigenvalues_rise(xp: ModuleType, pencil: tuple, dtype: str) -> None:
    old = to_library(xp, pencil[1], dtype)
    rank, size = pencil[2], len(pencil[1])
    found = null_solution(old, rank)
    values = np.linalg.eigvalsh(to_numpy(old))
    slack = 1e2 * EPS[dtype] * values[-1]
    np.testing.assert_allclose(to_numpy(found.values), values[:rank], atol=slack)
    np.testing.assert_array_equal(to_numpy(found.basis), to_numpy(null_subspace(old, rank)))
    assert int(found.effective_rank) == rank
    gap = 1.0 if rank == size else (values[rank] - values[rank - 1]) / values[-1]
    assert float(found.gap) == pytest.approx(gap, abs=1e2 * EPS[dtype])


@few
@given(seed=seeds, size=st.integers(3, 8), data=st.data())
def test_the_gap_says_whether_the_basis_is_meaningful(
    xp: ModuleType, seed: int, size: int, data: st.DataObject
) -> None:
    """A perturbation far below the gap keeps the span (Davis and Kahan); at a tie it need not."""
    rank = data.draw(st.integers(1, size - 1))
    rng = np.random.default_rng(seed)
    spectrum = np.sort(rng.uniform(0.1, 1, size))[::-1]
    new = from_spectrum(spectrum, orthogonal(size, rng))
    noise = rng.standard_normal((size, size))
    noise = 1e-6 * (noise + noise.T) / np.linalg.norm(noise + noise.T, 2)
    one = general_solution(to_library(xp, new), None, rank)
    other = general_subspace(to_library(xp, new + noise), None, rank)
    u, v = to_numpy(one.basis), to_numpy(other)
    sine = np.linalg.norm(v - u @ (u.T @ v), 2)
    assert sine <= 2 * 1e-6 / (float(one.gap) * spectrum[0]) + 1e-9
    tied = spectrum.copy()
    tied[rank] = tied[rank - 1]
    assert float(general_solution(to_library(xp, np.diag(tied)), None, rank).gap) < 1e-12
    flat = to_library(xp, np.eye(size))
    assert float(isolated_solution(flat, flat, rank).gap) < 1e-12


@pytest.mark.parametrize("tau", [None, 0.0, 0.5])
def test_rank_above_the_numerical_rank(xp: ModuleType, tau: float | None) -> None:
    rng = np.random.default_rng(0)
    q = orthogonal(6, rng)
    new = from_spectrum(np.array([1.0, 0.5, 0.25, 0, 0, 0]), q)
    old = from_spectrum(rng.uniform(0.5, 1, 6), orthogonal(6, rng))
    found = isolated_solution(to_library(xp, new), to_library(xp, old), 5, energy_floor=tau)
    assert int(found.effective_rank) == np.any(to_numpy(found.basis) != 0, axis=0).sum()
    if tau is None:
        assert int(found.effective_rank) == 3
        # The span of what is there is far from what is not.
        assert float(found.gap) > 0.01


def test_a_floor_changes_the_rule_in_the_sibling_too(xp: ModuleType) -> None:
    rng = np.random.default_rng(1)
    new, old = (to_library(xp, m @ m.T, "float32") for m in rng.standard_normal((2, 5, 5)))
    found = isolated_solution(new, old, 2, energy_floor=0.6)
    best = trace_ratio_solution(new, old, 2, energy_floor=0.6)
    np.testing.assert_array_equal(to_numpy(found.basis), to_numpy(best.basis))
    assert float(found.gap) == float(best.gap)
    u, s = to_numpy(found.basis), unit(to_numpy(new))
    r = unit(to_numpy(old)) + 1e-2 / 5 * np.eye(5)
    expected = np.diag(u.T @ s @ u) / np.diag(u.T @ r @ u)
    np.testing.assert_allclose(to_numpy(found.values), expected, rtol=1e-5)
    assert np.all(np.diff(np.diag(u.T @ s @ u)) < 0)


def test_nothing_at_all(xp: ModuleType) -> None:
    zero = to_library(xp, np.zeros((2, 3, 3)), "float32")
    for found in (
        general_solution(zero, zero, 2),
        isolated_solution(zero, None, 2),
        isolated_solution(zero, zero, 2),
        isolated_solution(zero, zero, 2, energy_floor=0.5),
    ):
        np.testing.assert_array_equal(to_numpy(found.basis), np.zeros((2, 3, 2)))
        np.testing.assert_array_equal(to_numpy(found.values), np.zeros((2, 2)))
        np.testing.assert_array_equal(to_numpy(found.effective_rank), [0, 0])
        np.testing.assert_array_equal(to_numpy(found.gap), [0, 0])
    assert null_solution(zero, 2).values.shape == (2, 2)
