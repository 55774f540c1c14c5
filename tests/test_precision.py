"""What counts as rounding: of the Gram matrices, of the coarser dtype, and of half precision."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64
from strategies import Matrix, dtype_name, orthogonal, seeds, to_library, to_numpy

import loda_math as lm
from loda_math.verify import verify_subspace

EPS32 = lm.rounding_unit()
few = settings(max_examples=10)


# Moments of float32 tokens in float64: rounding is the same in every function


def task(rank: int, size: int, rng: np.random.Generator) -> Matrix:
    """Tokens in a subspace of the given dimension, in float32: rounding leaves it a little."""
    span = orthogonal(size, rng)[:, :rank]
    return (rng.standard_normal((4 * size, rank)) @ span.T).astype(np.float32)


def moment(xp: ModuleType, tokens: Matrix) -> Any:
    mean = lm.second_moment(to_library(xp, tokens, "float32")).mean
    assert "float64" in str(mean.dtype)
    return mean


def columns(basis: Any) -> int:
    """How many columns are not zero."""
    return int(np.any(to_numpy(basis) != 0, axis=0).sum())


SIBLINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any], dict[str, float]]] = {
    "general": (lm.general_subspace, lm.general_solution, {}),
    # A ridge small enough for its floor (4·D·eps) to matter.
    "isolated": (lm.isolated_subspace, lm.isolated_solution, {"ridge": 1e-9}),
    "energy floor": (
        lm.isolated_subspace,
        lm.isolated_solution,
        {"ridge": 1e-9, "objective": "trace_ratio", "energy_floor": 0.4},
    ),
    "trace ratio": (lm.trace_ratio_subspace, lm.trace_ratio_solution, {"ridge": 1e-9}),
}


@pytest.mark.parametrize("name", SIBLINGS)
@few
@given(seed=seeds, size=st.integers(6, 9), data=st.data(), first=st.booleans())
def test_siblings_agree_on_what_is_rounding(
    xp: ModuleType, name: str, seed: int, size: int, data: st.DataObject, first: bool
) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, size - 2))
    new = moment(xp, task(rank, size, rng))
    old = None if first else moment(xp, task(size, size, rng))
    basis, solution, options = SIBLINGS[name]
    u = basis(new, old, size, accumulation_eps=EPS32, **options)
    found = solution(new, old, size, accumulation_eps=EPS32, **options)
    np.testing.assert_array_equal(to_numpy(found.basis), to_numpy(u))
    # The general subspace of two tasks has the directions of both.
    expected = size if name == "general" and not first else rank
    assert int(found.effective_rank) == columns(u) == expected


def test_rounding_passes_for_energy_without_the_keyword() -> None:
    """The noise is there, and once it is stored in float64 nothing shows it."""
    new = moment(np, task(3, 9, np.random.default_rng(0)))
    assert int(lm.general_solution(new, None, 9).effective_rank) > 3
    solution = lm.general_solution(new, None, 9, accumulation_eps=EPS32)
    np.testing.assert_array_equal(solution.values[3:], 0)


@pytest.mark.parametrize("of", ["energy", "ratio"])
@few
@given(seed=seeds, size=st.integers(6, 9), data=st.data())
def test_the_numerical_rank(
    xp: ModuleType, of: str, seed: int, size: int, data: st.DataObject
) -> None:
    needs_float64(xp)
    rank = data.draw(st.integers(1, size - 2))
    rng = np.random.default_rng(seed)
    new = moment(xp, task(rank, size, rng))
    old = None if of == "energy" else moment(xp, task(size, size, rng))
    found = lm.rank_for(new, old, 1.0, of=of, accumulation_eps=EPS32)
    assert int(found.rank) == rank


@few
@given(seed=seeds, size=st.integers(6, 9), objective=st.sampled_from(["isolated", "trace_ratio"]))
def test_the_check_knows_the_same_rounding(
    xp: ModuleType, seed: int, size: int, objective: str
) -> None:
    """A history without energy in some directions: below the floor the ridge decides."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    new, old = moment(xp, task(size, size, rng)), moment(xp, task(size - 3, size, rng))
    choose = lm.isolated_subspace if objective == "isolated" else lm.trace_ratio_subspace
    settings: dict[str, Any] = {"ridge": 1e-6, "tolerance": 1e-9}
    basis = choose(new, old, 2, ridge=1e-6, accumulation_eps=EPS32)
    report = verify_subspace(basis, new, old, objective, accumulation_eps=EPS32, **settings)
    assert bool(report.passed)
    assert abs(float(report.optimality_gap)) < 1e-9
    assert int(report.effective_rank) == 2
    assert not bool(verify_subspace(basis, new, old, objective, **settings).passed)


# Moments of different dtypes: the coarser one says what is rounding

SIZE, RANK = 6, 3


def deficient() -> np.ndarray:
    """A float32 moment of three directions, with as much in the others as its rounding may be."""
    basis = np.linalg.qr(np.random.default_rng(0).standard_normal((SIZE, SIZE)))[0]
    values = np.asarray([1.0, 0.7, 0.4, 3e-7, 3e-7, 3e-7])
    return ((basis * values) @ basis.T).astype(np.float32)


@pytest.mark.parametrize("coarse", ["new", "old", None])
def test_rounding_of_a_float32_moment_is_no_direction(xp: ModuleType, coarse: str | None) -> None:
    """In float64 alone the values do not say so: they are directions like any other."""
    needs_float64(xp)
    dtypes = {name: "float32" if name == coarse else "float64" for name in ("new", "old")}
    new, old = (to_library(xp, deficient(), dtypes[name]) for name in ("new", "old"))
    flat = to_library(xp, np.eye(SIZE), dtypes["old"])
    branch = to_library(xp, np.eye(SIZE)), to_library(xp, np.eye(SIZE))
    ranks = {
        "general": lm.general_solution(new, old, SIZE).effective_rank,
        "isolated": lm.isolated_solution(new, flat, SIZE).effective_rank,
        "trace ratio": lm.trace_ratio_solution(new, flat, SIZE).effective_rank,
        "rank": lm.rank_for(new, old, 1.0).rank,
        "recalibration": np.linalg.matrix_rank(
            to_numpy(lm.recalibration(*branch, new, old, 1.0)), tol=1e-3
        ),
    }
    assert {name: int(rank) for name, rank in ranks.items()} == dict.fromkeys(
        ranks, SIZE if coarse is None else RANK
    )


def test_the_check_knows_the_coarser_dtype(xp: ModuleType) -> None:
    needs_float64(xp)
    basis = to_library(xp, np.eye(SIZE))
    new, old = to_library(xp, deficient(), "float32"), to_library(xp, np.eye(SIZE))
    for task, history in ((new, old), (0 * old + to_library(xp, deficient() * 1.0), new)):
        report = lm.verify.verify_subspace(basis, task, history, "general")
        assert int(report.effective_rank) == RANK


@pytest.mark.parametrize("coarse", ["new", "old"])
def test_the_ridge_has_the_floor_of_the_coarser_dtype(xp: ModuleType, coarse: str) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(0)
    new, old = (x.T @ x for x in rng.standard_normal((2, 3, SIZE)))
    arrays = {"new": to_library(xp, new), "old": to_library(xp, old)}
    arrays[coarse] = to_library(xp, {"new": new, "old": old}[coarse], "float32")
    floor = 4 * SIZE * float(np.finfo(np.float32).eps)
    solve = lambda ridge: lm.isolated_subspace(*arrays.values(), 2, ridge=ridge)  # noqa: E731
    assert dtype_name(solve(0.0)) == "float64"
    np.testing.assert_array_equal(to_numpy(solve(0.0)), to_numpy(solve(floor)))
    assert not np.array_equal(to_numpy(solve(0.0)), to_numpy(solve(10 * floor)))


# Half precision: read as it is, computed wide, returned as it came

RNG = np.random.default_rng(0)


def test_tokens_are_cast_up_before_they_are_multiplied() -> None:
    tokens = RNG.standard_normal((400, 30)).astype(np.float16)
    total = lm.second_moment(tokens).total
    assert total.dtype == np.float64
    wide = tokens.astype(np.float64)
    np.testing.assert_allclose(total, wide.T @ wide, atol=1e-3)
    huge = np.full((2, 2), 6e4, np.float16)  # its square is beyond the range of halves
    np.testing.assert_allclose(lm.second_moment(huge).total, 2 * float(huge[0, 0]) ** 2, rtol=1e-6)


@pytest.mark.parametrize("size", [2, 24])
def test_tokens_that_are_all_the_same_have_one_direction(xp: ModuleType, size: int) -> None:
    """Their rounding errors all have one sign, and add up where a library adds one by one."""
    needs_float64(xp)
    row = np.random.default_rng(size).standard_normal(size)
    moments = lm.second_moment(to_library(xp, np.tile(row, (5000, 1)), "float32"))
    coarse = lm.general_solution(moments, None, size, accumulation_eps=64 * EPS32)
    assert int(coarse.effective_rank) == 1
    # Where products of matrices are OpenBLAS's or MKL's; see docs/theory.md.
    if size > 9 and any(name in xp.__name__ for name in ("numpy", "torch", "strict")):
        assert int(lm.general_solution(moments, None, size).effective_rank) == 1


def test_bases_and_moments_are_summed_wide() -> None:
    basis = orthogonal(64, RNG)[:, :8].astype(np.float16)
    moment = np.diag(RNG.uniform(size=64))
    wide = basis.astype(np.float64)
    energy = lm.projection_energy(basis, moment)
    assert energy.dtype == np.float64
    assert float(energy) == pytest.approx(np.trace(wide.T @ moment @ wide))
    assert lm.projection_energy(basis, moment.astype(np.float16)).dtype == np.float16


def test_gradients_are_cast_up() -> None:
    params, grads = np.zeros(300, np.float16), np.full(300, 1e-4, np.float16)
    (moved,) = lm.lookahead([params], [grads], 0.5)
    assert moved.dtype == np.float16
    assert np.linalg.norm(moved.astype(np.float64)) == pytest.approx(0.5, rel=1e-2)
    # A sum of so many squares is beyond the range of halves.
    large = np.full(300, 100.0, np.float16)
    assert float(lm.gradient_alignment([large], [large])) == pytest.approx(1)
    assert float(lm.gradient_alignment([large], [-large])) == pytest.approx(-1)
    (free,) = lm.project_conflict([large], [-large])
    assert free.dtype == np.float16
    np.testing.assert_allclose(free, 0, atol=0.1)


@pytest.mark.parametrize("rank", [1, 3])
def test_moments_keep_their_leading_directions(rank: int) -> None:
    size = 300
    new, old = np.diag(np.linspace(0, 1, size)).astype(np.float16), np.eye(size, dtype=np.float16)
    for basis in (lm.general_subspace(new, old, rank), lm.isolated_subspace(new, old, rank)):
        assert basis.dtype == np.float16
        np.testing.assert_array_equal(basis, np.eye(size)[:, ::-1][:, :rank])


@pytest.mark.parametrize("form", ["full", "diagonal", "direction", "scalar", "box"])
def test_branches_beside_precise_moments(form: str) -> None:
    """The projections are exact as they are: quiet directions stay alive."""
    energies, eye = np.diag(np.logspace(0, -3, 8)), np.eye(8, dtype=np.float16)
    found = lm.recalibration(eye, eye, energies, energies, 3.0, form)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, 0.75 * np.eye(8), atol=1e-6)
