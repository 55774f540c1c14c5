"""The ratio of traces: root finding, random bases and subsets as oracles; the energy floor."""

from itertools import combinations
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
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
    _trace_ratio,
    general_subspace,
    isolated_subspace,
    trace_ratio_solution,
    trace_ratio_subspace,
)

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
RIDGE = 1e-2
floors = st.sampled_from([0.0, 0.05, 0.3, 0.7, 0.95, 1.0])
few = settings(max_examples=8)
# Eager JAX compiles each of the fifty decompositions anew for every shape: what does not concern
# the library runs on NumPy alone.


def pencil_of(new: Matrix, old: Matrix) -> tuple[Matrix, Matrix]:
    """Both moments of trace one, and the ridge on the history."""
    parts = [m / np.trace(m) if np.trace(m) > 0 else m for m in (new, old)]
    return parts[0], parts[1] + RIDGE / len(new) * np.eye(len(new))


def ratio(u: Matrix, s: Matrix, r: Matrix) -> float:
    return float(np.trace(u.T @ s @ u) / np.trace(u.T @ r @ u))


def largest_ratio(s: Matrix, r: Matrix, rank: int) -> float:
    """κ* as the root of the sum of the leading eigenvalues of S − κR, by Brent's method."""
    f = lambda k: np.linalg.eigvalsh(s - k * r)[::-1][:rank].sum()  # noqa: E731
    top = scipy.linalg.eigh(s, r, eigvals_only=True)[-1] * 1.01
    return float(scipy.optimize.brentq(f, 0.0, top, xtol=1e-14, rtol=1e-13))


def solve(
    xp: ModuleType, pencil: tuple[Matrix, Matrix, int], tau: float = 0.0, dtype: str = "float64"
) -> tuple[Any, Matrix, Matrix]:
    """The solution, and the pencil as the solver saw it."""
    new, old = (to_library(xp, m, dtype) for m in pencil[:2])
    found = trace_ratio_solution(new, old, pencil[2], ridge=RIDGE, energy_floor=tau)
    return found, *pencil_of(to_numpy(new), to_numpy(old))


def complete(found: Any, s: Matrix, r: Matrix) -> Matrix:
    """All r directions of U(κ), the inert ones included, from the multiplier alone."""
    return np.linalg.eigh(s - float(found.multiplier) * r)[1][:, ::-1][:, : found.basis.shape[-1]]


@few
@given(pencil=pencils(dead=False), dtype=dtypes)
def test_reaches_the_root_of_the_characteristic_function(
    xp: ModuleType, pencil: tuple, dtype: str
) -> None:
    found, s, r = solve(xp, pencil, dtype=dtype)
    assert dtype_name(found.ratio) == dtype_name(found.basis) == dtype
    best = largest_ratio(s, r, pencil[2])
    tolerance = 2e3 * EPS[dtype] / RIDGE
    assert float(found.ratio) == pytest.approx(best, rel=tolerance)
    assert float(found.upper) >= best * (1 - tolerance)
    assert float(found.upper) == pytest.approx(best, rel=tolerance)
    assert abs(float(found.residual)) < tolerance


@few
@given(pencil=pencils(), seed=seeds)
def test_no_other_basis_has_a_larger_ratio(pencil: tuple, seed: int) -> None:
    found, s, r = solve(np, pencil)
    rng, shape = np.random.default_rng(seed), found.basis.shape
    slack = 1e-9 * float(found.upper)
    u = to_numpy(found.basis)
    for noise in (1e-3, 0.1, 1e3):
        other = np.linalg.qr(u + noise * rng.standard_normal(shape))[0]
        assert ratio(other, s, r) <= float(found.upper) + slack
    new, old = (to_library(np, m) for m in pencil[:2])
    for rival in (isolated_subspace(new, old, pencil[2]), general_subspace(new, old, pencil[2])):
        rival = to_numpy(rival)
        if np.all(np.any(rival != 0, axis=0)):  # a smaller basis solves another problem
            assert ratio(rival, s, r) <= float(found.ratio) + slack


def test_on_a_plane_every_angle_is_tried(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    angles = np.linspace(0, np.pi, 20001)
    for _ in range(5):
        new, old = (m @ m.T for m in rng.standard_normal((2, 2, 2)))
        found, s, r = solve(xp, (new, old, 1))
        u = np.stack([np.cos(angles), np.sin(angles)])
        best = np.max(np.sum(u * (s @ u), 0) / np.sum(u * (r @ u), 0))
        assert float(found.ratio) == pytest.approx(best, rel=1e-6)
        assert float(found.ratio) >= best


@few
@given(pencil=pencils())
def test_the_ratio_only_rises_along_the_iterations(pencil: tuple) -> None:
    steps = []
    for count in range(5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_trace_ratio, "NEWTON_STEPS", count)
            found, s, r = solve(np, pencil)
        steps.append(float(found.multiplier))
        assert float(found.upper) >= largest_ratio(s, r, pencil[2]) * (1 - 1e-9)
    assert np.all(np.diff(steps) >= 0)
    start = isolated_subspace(*pencil)
    if np.all(np.any(start != 0, axis=0)):  # Newton starts at the ratio of Theorem 2.2's basis
        assert steps[0] >= ratio(start, s, r) * (1 - 1e-12)
    assert float(solve(np, pencil)[0].multiplier) >= steps[-1]


@few
@given(pencil=pencils(), tau=floors, dtype=dtypes)
def test_the_energy_floor_holds(pencil: tuple, tau: float, dtype: str) -> None:
    found, s, _ = solve(np, pencil, tau, dtype)
    most = np.linalg.eigvalsh(s)[::-1][: pencil[2]].sum()
    slack = 1e2 * EPS[dtype]
    u = to_numpy(found.basis)
    assert np.trace(u.T @ s @ u) >= (tau - slack) * most
    assert float(found.energy) >= tau - slack
    # No energy is given away where the unconstrained maximiser keeps enough of it.
    free, _, _ = solve(np, pencil, 0.0, dtype)
    if float(free.energy) >= tau:
        np.testing.assert_array_equal(to_numpy(free.basis), u)
    assert float(found.ratio) <= float(free.ratio) * (1 + slack)
    alive = np.any(u != 0, axis=0)
    np.testing.assert_allclose(u.T @ u, np.diag(alive * 1.0), atol=1e-12 + 8 * EPS[dtype])
    assert int(found.effective_rank) == alive.sum()


@few
@given(pencil=pencils(kinds=("random", "spiked", "conditioned")), tau=floors)
def test_the_floor_stops_at_the_last_multiplier(pencil: tuple, tau: float) -> None:
    """A scan over κ, each with an eigendecomposition of its own."""
    found, s, r = solve(np, pencil, tau)
    rank, kappa = pencil[2], float(found.multiplier)
    most = np.linalg.eigvalsh(s)[::-1][:rank].sum()
    best = largest_ratio(s, r, rank)

    def energy(k: float) -> float:
        u = np.linalg.eigh(s - k * r)[1][:, ::-1][:, :rank]
        return float(np.trace(u.T @ s @ u) / most)

    beyond = [k for k in np.geomspace(kappa + 1e-12, best, 30)[1:] if k > kappa * (1 + 1e-5) + 1e-5]
    if kappa < best * (1 - 1e-6):
        assert all(energy(k) < tau + 1e-9 for k in beyond)
    else:
        assert energy(best * (1 - 1e-9)) >= tau - 1e-6


@few
@given(seed=seeds, size=st.integers(2, 6), tau=floors, data=st.data())
def test_the_certificate_against_every_subset(
    seed: int, size: int, tau: float, data: st.DataObject
) -> None:
    """Diagonal moments: all bases of coordinate axes are enumerated."""
    rank = data.draw(st.integers(1, size))
    rng = np.random.default_rng(seed)
    new, old = np.diag(rng.uniform(0.1, 1, size)), np.diag(rng.uniform(0.1, 1, size) ** 3)
    found, s, r = solve(np, (new, old, rank), tau)
    most = np.sort(np.diag(s))[::-1][:rank].sum()
    mine = float(found.energy) * most
    for subset in combinations(range(size), rank):
        u = np.eye(size)[:, subset]
        if np.trace(u.T @ s @ u) >= mine - 1e-12:
            assert ratio(u, s, r) <= float(found.ratio) * (1 + 1e-9)
        if np.trace(u.T @ s @ u) >= tau * most:
            assert ratio(u, s, r) <= float(found.upper) * (1 + 1e-9)


@few
@given(pencil=pencils(), seed=seeds, tau=floors)
def test_the_bound_holds_for_every_basis_above_the_floor(
    pencil: tuple, seed: int, tau: float
) -> None:
    found, s, r = solve(np, pencil, tau)
    most = np.linalg.eigvalsh(s)[::-1][: pencil[2]].sum()
    rng = np.random.default_rng(seed)
    ends = [np.linalg.eigh(s)[1][:, ::-1][:, : pencil[2]], complete(found, s, r)]
    for share in np.linspace(0, 1, 12):
        mix = share * ends[0] + (1 - share) * ends[1] + 0.05 * rng.standard_normal(ends[0].shape)
        u = np.linalg.qr(mix)[0]
        if np.trace(u.T @ s @ u) >= tau * most:
            assert ratio(u, s, r) <= float(found.upper) * (1 + 1e-9)


@few
@given(pencil=pencils(), exponents=st.tuples(st.integers(-200, 200), st.integers(-200, 200)))
def test_scale_of_a_moment_does_not_matter(pencil: tuple, exponents: tuple[int, int]) -> None:
    base, _, _ = solve(np, pencil, 0.3)
    a, b = (2.0**e for e in exponents)
    scaled, _, _ = solve(np, (pencil[0] * a, pencil[1] * b, pencil[2]), 0.3)
    for one, other in zip(base, scaled, strict=True):
        np.testing.assert_array_equal(to_numpy(one), to_numpy(other))


@few
@given(seed=seeds, tau=floors, dtype=dtypes)
def test_batches_are_a_loop(xp: ModuleType, seed: int, tau: float, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((2, 2, 3, 9, 5))
    n, o = (to_library(xp, np.einsum("...ni,...nj->...ij", t, t), dtype) for t in (x, y))
    whole = trace_ratio_solution(n, o, 2, energy_floor=tau)
    assert whole.basis.shape == (2, 3, 5, 2)
    for field in ("ratio", "upper", "multiplier", "energy", "effective_rank", "gap"):
        assert getattr(whole, field).shape == (2, 3)
    for i in range(2):
        for j in range(3):
            one = trace_ratio_solution(n[i, j, :, :], o[i, j, :, :], 2, energy_floor=tau)
            assert float(whole.ratio[i, j]) == pytest.approx(float(one.ratio), rel=1e-5)
            assert float(whole.energy[i, j]) == pytest.approx(float(one.energy), rel=1e-5)


def test_no_history_and_no_energy(xp: ModuleType) -> None:
    eye, zero = (
        to_library(xp, np.diag([3.0, 2.0, 0.0]), "float32"),
        to_library(xp, np.zeros((3, 3)), "float32"),
    )
    best = np.eye(3)[:, :2]
    for tau in (0.0, 0.5, 1.0):
        for old in (None, zero):
            basis = isolated_subspace(eye, old, 2, energy_floor=tau)
            np.testing.assert_allclose(to_numpy(basis), best, atol=1e-6)
        nothing = trace_ratio_solution(zero, eye, 2, energy_floor=tau)
        np.testing.assert_array_equal(to_numpy(nothing.basis), np.zeros((3, 2)))
        assert [float(x) for x in nothing[1:4]] == [0.0, 0.0, 0.0]
        assert int(nothing.effective_rank) == 0


def test_a_shared_dead_direction_is_left_empty(xp: ModuleType) -> None:
    rng = np.random.default_rng(3)
    q = orthogonal(5, rng)
    new = from_spectrum(np.array([1.0, 0.5, 0.1, 0.05, 0.0]), q)
    inside = orthogonal(4, rng)
    old = q[:, :4] @ from_spectrum(np.array([1.0, 0.7, 0.5, 0.4]), inside) @ q[:, :4].T
    for tau in (0.0, 0.5):
        u = to_numpy(solve(xp, (new, 0.5 * (old + old.T), 5), tau)[0].basis)
        assert np.any(u != 0, axis=0).sum() == 4
        assert np.abs(q[:, 4] @ u).max() < 1e-9


def test_basis_functions_return_the_basis_alone(xp: ModuleType) -> None:
    rng = np.random.default_rng(1)
    new, old = (to_library(xp, m @ m.T, "float32") for m in rng.standard_normal((2, 5, 5)))
    whole = trace_ratio_solution(new, old, 2, ridge=1e-3)
    np.testing.assert_array_equal(
        to_numpy(trace_ratio_subspace(new, old, 2, ridge=1e-3)), to_numpy(whole.basis)
    )
    whole = trace_ratio_solution(new, old, 2, energy_floor=0.8)
    basis = isolated_subspace(new, old, 2, energy_floor=0.8)
    np.testing.assert_array_equal(to_numpy(basis), to_numpy(whole.basis))
    with pytest.raises(ValueError, match=r"energy_floor must be a share from 0 to 1, got 1\.5"):
        isolated_subspace(new, old, 2, energy_floor=1.5)


@few
@given(pencil=pencils(), tau=floors)
def test_the_gap_is_a_share_of_the_pencil(pencil: tuple, tau: float) -> None:
    """Also for one direction, whose eigenvalue of S − κR is zero at the maximiser."""
    for rank in {1, pencil[2]}:
        found, s, r = solve(np, (*pencil[:2], rank), tau)
        kappa = float(found.multiplier)
        values = np.append(np.linalg.eigvalsh(s - kappa * r)[::-1], 0)
        scale = np.linalg.norm(s, 2) + kappa * np.linalg.norm(r, 2)
        gap = 1.0 if rank == len(s) else (values[rank - 1] - values[rank]) / scale
        assert float(found.gap) == pytest.approx(gap, abs=1e-10)
        assert -1e-10 <= float(found.gap) <= 1


@pytest.mark.jax
def test_under_a_compiler() -> None:
    import jax

    rng = np.random.default_rng(2)
    new, old = (m @ np.swapaxes(m, -1, -2) for m in rng.standard_normal((2, 3, 5, 5)))
    with (jax if hasattr(jax, "enable_x64") else jax.experimental).enable_x64(True):
        solver = jax.jit(lambda n, o: trace_ratio_solution(n, o, 2, energy_floor=0.5))
        found = solver(jax.numpy.asarray(new), jax.numpy.asarray(old))
        mapped = jax.vmap(lambda n, o: trace_ratio_solution(n, o, 2, energy_floor=0.5))(
            jax.numpy.asarray(new), jax.numpy.asarray(old)
        )
    plain = trace_ratio_solution(new, old, 2, energy_floor=0.5)
    np.testing.assert_allclose(found.ratio, plain.ratio, rtol=1e-6)
    np.testing.assert_allclose(mapped.ratio, plain.ratio, rtol=1e-6)
