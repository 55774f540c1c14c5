"""Moments of float32 tokens in float64: what counts as rounding is the same in every function."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64
from strategies import Matrix, orthogonal, seeds, to_library, to_numpy

import loda_math as lm
from loda_math.verify import verify_subspace

EPS32 = float(np.finfo(np.float32).eps)
few = settings(max_examples=10)


def task(rank: int, size: int, rng: np.random.Generator) -> Matrix:
    """Tokens in a subspace of the given dimension, in float32: rounding leaves it a little."""
    span = orthogonal(size, rng)[:, :rank]
    return (rng.standard_normal((4 * size, rank)) @ span.T).astype(np.float32)


def moment(xp: ModuleType, tokens: Matrix) -> Any:
    mean = lm.second_moment(to_library(xp, tokens, "float32")).mean
    assert "float64" in str(mean.dtype)
    return mean


def alive(basis: Any) -> int:
    return int(np.any(to_numpy(basis) != 0, axis=0).sum())


SIBLINGS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "general": (lm.general_subspace, lm.general_solution),
    "isolated": (lm.isolated_subspace, lm.isolated_solution),
    "energy floor": (
        lambda *a, **k: lm.isolated_subspace(*a, energy_floor=0.4, **k),
        lambda *a, **k: lm.isolated_solution(*a, energy_floor=0.4, **k),
    ),
    "trace ratio": (lm.trace_ratio_subspace, lm.trace_ratio_solution),
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
    basis, solution = SIBLINGS[name]
    # Small enough for the floor on the ridge (4·D·eps) to matter.
    options = {} if name == "general" else {"ridge": 1e-9}
    u = basis(new, old, size, accumulation_eps=EPS32, **options)
    found = solution(new, old, size, accumulation_eps=EPS32, **options)
    np.testing.assert_array_equal(to_numpy(found.basis), to_numpy(u))
    assert int(found.effective_rank) == alive(u)
    # The general subspace of two tasks has the directions of both.
    assert alive(u) == (size if name == "general" and not first else rank)


def test_rounding_passes_for_energy_without_the_keyword() -> None:
    """The noise is there, and once it is stored in float64 nothing shows it."""
    new = moment(np, task(3, 9, np.random.default_rng(0)))
    assert int(lm.general_solution(new, None, 9).effective_rank) > 3
    kept = lm.general_solution(new, None, 9, accumulation_eps=EPS32)
    np.testing.assert_array_equal(kept.values[3:], 0)


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
    assert int(report.effective_rank) == 2
    assert not bool(verify_subspace(basis, new, old, objective, **settings).passed)


def test_a_negative_or_a_coarse_unit_is_refused(xp: ModuleType) -> None:
    m = to_library(xp, np.eye(3), "float32")
    for call in (
        lambda e: lm.general_subspace(m, m, 2, accumulation_eps=e),
        lambda e: lm.general_solution(m, m, 2, accumulation_eps=e),
        lambda e: lm.isolated_subspace(m, m, 2, accumulation_eps=e),
        lambda e: lm.isolated_solution(m, m, 2, accumulation_eps=e),
        lambda e: lm.trace_ratio_subspace(m, m, 2, accumulation_eps=e),
        lambda e: lm.trace_ratio_solution(m, m, 2, accumulation_eps=e),
        lambda e: lm.rank_for(m, m, 0.5, accumulation_eps=e),
        lambda e: verify_subspace(m[:, :2], m, m, "general", accumulation_eps=e),
    ):
        with pytest.raises(ValueError, match=r"accumulation_eps must be a rounding unit.*got 0.02"):
            call(0.02)
        with pytest.raises(ValueError, match="accumulation_eps must be finite and at least 0"):
            call(-1e-7)
