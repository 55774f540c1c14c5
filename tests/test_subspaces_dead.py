"""Subspaces of singular moments: no dead direction, null spaces, zero columns."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Matrix,
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
from subspace_oracle import EPS, angle, solve

from loda_math import general_subspace, isolated_subspace, second_moment


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


def test_mixed_batches_of_dead_and_live_moments(xp: ModuleType) -> None:
    new = to_library(xp, np.stack([np.eye(3), np.zeros((3, 3)), np.diag([1.0, 0, 0])]))
    old = to_library(xp, np.stack([np.zeros((3, 3)), np.eye(3), np.diag([0, 0, 2.0])]))
    for u in (isolated_subspace(new, old, 2), general_subspace(new, None, 2)):
        np.testing.assert_array_equal(np.any(to_numpy(u) != 0, axis=1).sum(axis=1), [2, 0, 1])


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
