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
    dtype_name,
    dtypes,
    from_spectrum,
    moment,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
    with_dead_direction,
)

from loda_math import general_subspace, isolated_subspace, null_subspace, second_moment

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


@given(new=moment(6), dtype=dtypes, rank=st.integers(1, 6))
def test_without_history_isolated_is_general(
    xp: ModuleType, new: Matrix, dtype: str, rank: int
) -> None:
    n = to_library(xp, new, dtype)
    first = to_numpy(general_subspace(n, None, rank))
    np.testing.assert_array_equal(to_numpy(isolated_subspace(n, None, rank)), first)
    s = to_numpy(n)
    best = np.linalg.eigvalsh(s)[::-1][:rank].sum()
    for old in (np.zeros((6, 6)), 3.0 * np.eye(6)):
        u = to_numpy(isolated_subspace(n, to_library(xp, old, dtype), rank))
        slack = 1e3 * EPS[dtype] * best
        assert np.trace(u.T @ s @ u) == pytest.approx(best, abs=slack)
        # The numerical rank may differ by directions at the level of rounding only.
        counts = [np.any(v != 0, axis=0).sum() for v in (u, first)]
        assert abs(counts[0] - counts[1]) <= np.sum(np.abs(np.linalg.eigvalsh(s)) < slack)


@given(
    seed=seeds,
    # A ridge must be above the rounding of the tokens.
    case=st.sampled_from(
        [
            ("float32", 1e-2, 1e-3),
            ("float64", 1e-2, 1e-12),
            ("float64", 1e-6, 1e-8),
            ("float64", 0.0, 0.2),
        ]
    ),
    affine=st.booleans(),
)
def test_no_dead_direction_is_chosen(
    xp: ModuleType, seed: int, case: tuple[str, float, float], affine: bool
) -> None:
    dtype, ridge, tolerance = case
    rng = np.random.default_rng(seed)
    size = 8
    dead = rng.uniform(0.5, 2.0, size) if affine else np.ones(size)
    both = []
    for _ in range(2):
        # Outputs of a layer norm: centred over features, then scaled by the affine part.
        tokens = rng.standard_normal((60, size)) @ from_spectrum(
            rng.uniform(0.5, 1, size), orthogonal(size, rng)
        )
        tokens = (tokens - tokens.mean(1, keepdims=True)) / tokens.std(1, keepdims=True) / dead
        both.append(to_numpy(second_moment(to_library(xp, tokens, dtype)).mean))
    u, _, _ = solve(xp, "isolated", (*both, size - 1), "float64", ridge=ridge)
    unit_dead = dead / np.linalg.norm(dead)
    assert np.abs(unit_dead @ u).max() < tolerance
    assert np.linalg.matrix_rank(u) == size - 1
    # Moments stored in float32, too, and asked for one direction too many.
    u, _, _ = solve(xp, "isolated", (*both, size), "float32")
    assert np.abs(unit_dead @ u[:, : size - 1]).max() < 1e-2


@pytest.mark.parametrize("name", ["general", "isolated"])
@given(
    seed=seeds,
    size=st.integers(2, 9),
    data=st.data(),
    dtype=dtypes,
    ridge=st.sampled_from([1e-6, 1e-2]),
)
def test_zero_columns_beyond_the_effective_rank(
    xp: ModuleType, name: str, seed: int, size: int, data: st.DataObject, dtype: str, ridge: float
) -> None:
    rank = data.draw(st.integers(1, size - 1))
    rng = np.random.default_rng(seed)
    q = orthogonal(size, rng)
    new = from_spectrum(np.concatenate([rng.uniform(0.5, 1, rank), np.zeros(size - rank)]), q)
    old = (
        np.zeros((size, size))
        if name == "general"
        else from_spectrum(rng.uniform(0.1, 1, size), orthogonal(size, rng))
    )
    settings = {"ridge": ridge} if name == "isolated" else {}
    u, _, _ = solve(xp, name, (new, old, size), dtype, **settings)
    np.testing.assert_array_equal(np.any(u != 0, axis=0), np.arange(size) < rank)
    dead = with_dead_direction(new, q[:, -1]), with_dead_direction(old, q[:, -1])
    u, _, _ = solve(xp, name, (*dead, size), dtype, **settings)
    assert np.any(u != 0, axis=0).sum() == rank
    # What rounding left along the dead direction is magnified by the ridge.
    assert np.abs(q[:, -1] @ u).max() < 10 * size * EPS[dtype] / ridge


@given(seed=seeds, size=st.integers(3, 8), data=st.data())
def test_a_singular_history_leads_into_its_null_space(
    xp: ModuleType, seed: int, size: int, data: st.DataObject
) -> None:
    free = data.draw(st.integers(1, size - 1))
    rank = data.draw(st.integers(1, free))
    rng = np.random.default_rng(seed)
    q = orthogonal(size, rng)
    kept = q[:, :free]
    old = from_spectrum(np.concatenate([np.zeros(free), rng.uniform(0.5, 1, size - free)]), q)
    # New-task energy inside the null space falls by factors of four: a clear optimum.
    inside = orthogonal(free, rng)
    core = from_spectrum(4.0 ** -np.arange(free), inside)
    new = kept @ core @ kept.T + 0.1 * np.eye(size)
    best = kept @ inside[:, :rank]
    angles = []
    for ridge in (1e-4, 1e-6, 1e-8):
        u, _, _ = solve(xp, "isolated", (new, old, rank), "float64", ridge=ridge)
        angles.append(angle(u, best))
    assert angles[-1] < 1e-5
    assert angles[0] > angles[-1] or angles[0] < 1e-5


@given(pencil=pencils(kinds=("conditioned", "deficient", "rank one")), dtype=dtypes)
def test_the_ridge_has_a_floor(xp: ModuleType, pencil: tuple, dtype: str) -> None:
    floor = 4 * len(pencil[0]) * {k: float(np.finfo(k).eps) for k in EPS}[dtype]
    bases = [solve(xp, "isolated", pencil, dtype, ridge=r)[0] for r in (0.0, floor / 1e6, floor)]
    np.testing.assert_array_equal(bases[0], bases[1])
    np.testing.assert_array_equal(bases[0], bases[2])


def test_a_strong_new_direction_does_not_hide_the_others(xp: ModuleType) -> None:
    """Float32 moments: D·eps of a ratio of thousands is no sign of an inert direction."""
    size = 256
    old = np.diag(np.concatenate([[0.0], np.ones(size - 1)]))
    new = np.diag(np.concatenate([[1.0, 0.3, 0.2], np.full(size - 3, 1e-2)]))
    u, _, _ = solve(xp, "isolated", (new, old, 3), "float32")
    np.testing.assert_allclose(u, np.eye(size)[:, :3], atol=1e-6)


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


def test_mixed_batches_of_dead_and_live_moments(xp: ModuleType) -> None:
    new = to_library(xp, np.stack([np.eye(3), np.zeros((3, 3)), np.diag([1.0, 0, 0])]))
    old = to_library(xp, np.stack([np.zeros((3, 3)), np.eye(3), np.diag([0, 0, 2.0])]))
    for u in (isolated_subspace(new, old, 2), general_subspace(new, None, 2)):
        np.testing.assert_array_equal(np.any(to_numpy(u) != 0, axis=1).sum(axis=1), [2, 0, 1])


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


def test_float32_moments_find_faint_directions_like_float64(xp: ModuleType) -> None:
    """D·eps of float32 is 3e-5 here: directions far fainter than that are no rounding yet."""
    size, rng = 256, np.random.default_rng(0)
    q = orthogonal(size, rng)
    spectrum = np.logspace(0, -5, size)
    old = from_spectrum(spectrum, q)
    new = from_spectrum(np.where(np.arange(size) < size - 4, spectrum, 10 * spectrum), q)
    wide, _, _ = solve(xp, "isolated", (new, old, 4), "float64", ridge=1e-4)
    narrow, _, _ = solve(xp, "isolated", (new, old, 4), "float32", ridge=1e-4)
    assert angle(wide, q[:, -4:]) < 1e-6
    assert angle(narrow, q[:, -4:]) < 0.05


@pytest.mark.parametrize("size", [64, 256])
@pytest.mark.parametrize("ridge", [0.0, 1e-9, 1e-2])
def test_no_dead_direction_from_single_precision_tokens(size: int, ridge: float) -> None:
    """Layer-norm outputs in float32, summed by ``second_moment`` into float64."""
    rng = np.random.default_rng(size)

    def moment() -> np.ndarray:
        x = rng.standard_normal((4 * size, size)) @ rng.standard_normal((size, size))
        x = x - x.mean(axis=1, keepdims=True)
        x = (x / x.std(axis=1, keepdims=True)).astype(np.float32)
        return np.asarray(second_moment(x).mean)

    eps = float(np.finfo(np.float32).eps)
    basis = isolated_subspace(moment(), moment(), 8, ridge=ridge, accumulation_eps=eps)
    assert np.max(np.abs(np.ones(size) / np.sqrt(size) @ basis)) < 0.02
    assert np.allclose(basis.T @ basis, np.eye(8), atol=1e-10)


def test_fewer_tokens_than_directions_leave_zero_columns() -> None:
    tokens = np.random.default_rng(0).standard_normal((2, 6)).astype(np.float32)
    eps = float(np.finfo(np.float32).eps)
    basis = general_subspace(second_moment(tokens).mean, None, 4, accumulation_eps=eps)
    assert np.count_nonzero(np.any(basis != 0, axis=0)) == 2
