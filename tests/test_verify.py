"""Certificates: exact solutions pass, spoilt ones fail, and the gap is the true one."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64, widest_dtype
from strategies import (
    dtypes,
    from_spectrum,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
)

from loda_math import (
    general_subspace,
    isolated_subspace,
    null_subspace,
    trace_ratio_subspace,
    verify,
)

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
OBJECTIVES = ("general", "isolated", "trace_ratio", "null")
FORMS = ("full", "diagonal", "box", "direction", "scalar")
# The ratio of traces takes fifty decompositions, which eager JAX compiles for every shape: it has
# tests of its own, on NumPy.
CHEAP = ("general", "isolated", "null")
few = settings(max_examples=6)


def solution(objective: str, new: Any, old: Any, rank: int) -> Any:
    if objective == "null":
        return null_subspace(old, rank)
    solver = {
        "general": general_subspace,
        "isolated": isolated_subspace,
        "trace_ratio": trace_ratio_subspace,
    }[objective]
    return solver(new, old, rank)


def check_own_solution(xp: ModuleType, objective: str, pencil: tuple, dtype: str) -> None:
    new, old = (to_library(xp, m, dtype) for m in pencil[:2])
    basis = solution(objective, new, old, pencil[2])
    report = verify.verify_subspace(basis, new, old, objective)
    whole = np.all(np.any(to_numpy(basis) != 0, axis=0))
    assert float(report.orthonormality) < 1e-12 + 8 * EPS[dtype]
    if objective != "trace_ratio" or whole:  # dropping inert directions only raises that ratio
        assert abs(float(report.optimality_gap)) < 1e3 * EPS[dtype] / 1e-2
        assert float(report.stationarity) < 1e3 * EPS[dtype] / 1e-2
    assert bool(report.passed)
    if objective != "null":
        assert int(report.effective_rank) <= np.any(to_numpy(basis) != 0, axis=0).sum()


@pytest.mark.parametrize("objective", CHEAP)
@few
@given(pencil=pencils(), dtype=dtypes)
def test_our_own_solutions_pass(xp: ModuleType, objective: str, pencil: tuple, dtype: str) -> None:
    check_own_solution(xp, objective, pencil, dtype)


@few
@given(pencil=pencils(), dtype=dtypes)
def test_our_own_ratios_of_traces_pass(pencil: tuple, dtype: str) -> None:
    check_own_solution(np, "trace_ratio", pencil, dtype)


def check_spoilt(xp: ModuleType, objective: str, seed: int, size: int, rank: int) -> None:
    rng = np.random.default_rng(seed)
    n, o = (from_spectrum(2.0 ** -rng.permutation(size), orthogonal(size, rng)) for _ in range(2))
    new, old = to_library(xp, n), to_library(xp, o)
    other = np.linalg.qr(rng.standard_normal((size, rank)))[0]
    report = verify.verify_subspace(to_library(xp, other), new, old, objective)
    s, p = n / np.trace(n), o / np.trace(o)
    r = p + 1e-2 / size * np.eye(size)
    both = (n + o) / np.trace(n + o)
    top = lambda m, k: np.linalg.eigvalsh(m)[::-1][:k].sum()  # noqa: E731
    energy = lambda m: np.trace(other.T @ m @ other)  # noqa: E731
    if objective == "general":
        value, best = energy(both), top(both, rank)
    elif objective == "isolated":
        value = np.trace(np.linalg.solve(other.T @ r @ other, other.T @ s @ other))
        best = scipy.linalg.eigh(s, r, eigvals_only=True)[::-1][:rank].sum()
    elif objective == "null":
        value, best = energy(p), -top(-p, rank)
    else:
        value = energy(s) / energy(r)
        best = scipy.optimize.brentq(lambda k: top(s - k * r, rank), 0, 1e4, xtol=1e-13)
    gap = value - best if objective == "null" else (best - value) / best
    assert float(report.objective) == pytest.approx(value)
    assert float(report.optimum) == pytest.approx(best)
    assert float(report.optimality_gap) == pytest.approx(gap, abs=1e-9)
    assert float(report.energy_new) == pytest.approx(energy(s))
    assert float(report.energy_old) == pytest.approx(energy(p))
    assert int(report.effective_rank) == rank
    assert bool(report.passed) == (gap <= 1e-5)
    assert float(report.stationarity) > 1e-6 or gap < 1e-9


@pytest.mark.parametrize("objective", CHEAP)
@few
@given(seed=seeds, size=st.integers(3, 7), data=st.data())
def test_spoilt_solutions_fail_by_their_true_gap(
    xp: ModuleType, objective: str, seed: int, size: int, data: st.DataObject
) -> None:
    check_spoilt(xp, objective, seed, size, data.draw(st.integers(1, size - 1)))


@few
@given(seed=seeds, size=st.integers(3, 7), data=st.data())
def test_spoilt_ratios_of_traces_fail_by_their_true_gap(
    seed: int, size: int, data: st.DataObject
) -> None:
    check_spoilt(np, "trace_ratio", seed, size, data.draw(st.integers(1, size - 1)))


@few
@given(pencil=pencils(kinds=("random",), dead=False), seed=seeds)
def test_the_objective_looks_at_the_span_alone(xp: ModuleType, pencil: tuple, seed: int) -> None:
    new, old = (to_library(xp, m) for m in pencil[:2])
    rank = pencil[2]
    basis = to_numpy(isolated_subspace(new, old, rank))
    rng = np.random.default_rng(seed)
    mixed = basis @ (orthogonal(rank, rng) * np.linspace(0.5, 1.5, rank))
    report = verify.verify_subspace(to_library(xp, mixed), new, old, "isolated")
    assert abs(float(report.optimality_gap)) < 1e-9
    defect = np.max(np.abs(mixed.T @ mixed - np.eye(rank)))
    assert float(report.orthonormality) == pytest.approx(defect)
    assert not bool(report.passed)


def test_a_direction_of_rounding_noise_shows(xp: ModuleType) -> None:
    """What jitter does to layer-norm moments: one direction along the dead one."""
    rng = np.random.default_rng(0)
    q = orthogonal(6, rng)
    new = from_spectrum(np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), q)
    old = from_spectrum(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.0]), q)
    arrays = [to_library(xp, m, "float32") for m in (q[:, [0, 1, 5]], new, old)]
    report = verify.verify_subspace(*arrays, "isolated")
    assert int(report.effective_rank) == 2
    assert float(report.optimality_gap) > 0.01
    assert not bool(report.passed)
    assert bool(verify.verify_subspace(arrays[0], *arrays[1:], "isolated", tolerance=1.0).passed)


def test_a_ratio_of_traces_with_an_inert_direction_passes(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    n = from_spectrum(np.array([1.0, 0.5, 0.0]), orthogonal(3, rng))
    new, old = (
        to_library(xp, n, "float32"),
        to_library(xp, from_spectrum(np.ones(3), np.eye(3)), "float32"),
    )
    basis = trace_ratio_subspace(new, old, 3)
    assert np.any(to_numpy(basis) != 0, axis=0).sum() == 2
    assert bool(verify.verify_subspace(basis, new, old, "trace_ratio").passed)
    # Leaving out a direction that matters is no way to pass.
    less = to_numpy(basis) * [0.0, 1.0, 1.0]
    assert not bool(
        verify.verify_subspace(to_library(xp, less, "float32"), new, old, "trace_ratio").passed
    )


def test_reports_over_layers(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 3, 9, 4))
    new, old = (to_library(xp, np.swapaxes(t, -1, -2) @ t, "float32") for t in (x, y))
    for objective in OBJECTIVES:
        report = verify.verify_subspace(solution(objective, new, old, 2), new, old, objective)
        assert all(field.shape == (2, 3) for field in report)
        assert np.all(to_numpy(report.passed))
    with pytest.raises(ValueError, match="objective must be one of"):
        verify.verify_subspace(new, new, old, "best")  # type: ignore[arg-type]


def test_the_effective_rank_counts_what_is_above_rounding(xp: ModuleType) -> None:
    """Rounding is a share of the largest eigenvalue: here 4e-4 of it, by what made the moment."""
    needs_float64(xp)
    eye = to_library(xp, np.eye(4))
    for faint, rank in ((1e-3, 4), (1e-4, 3)):
        new = to_library(xp, np.diag([1.0, 1.0, 1.0, faint]))
        report = verify.verify_subspace(eye, new, eye, "general", accumulation_eps=1e-4)
        assert int(report.effective_rank) == rank


def test_a_floor_is_checked_under_the_floor(xp: ModuleType) -> None:
    rng = np.random.default_rng(4)
    new, old = (to_library(xp, m @ m.T, "float32") for m in rng.standard_normal((2, 6, 6)))
    basis = isolated_subspace(new, old, 2, energy_floor=0.9)
    check = lambda tau: verify.verify_subspace(basis, new, old, "trace_ratio", energy_floor=tau)  # noqa: E731
    assert bool(check(0.9).passed)
    assert not bool(check(0.0).passed)


def test_the_recorded_run(xp: ModuleType, shared: Any) -> None:
    """Its directions are the best without a ridge; with ours, and for other objectives, not."""
    with np.load(shared / "reference" / "trace.npz") as file:
        trace = {k: file[k] for k in file.files if "layer" in k}
    for key in ("task1/layer0", "task1/layer1", "task2/layer0", "task2/layer1"):
        part = {
            name: to_library(xp, trace[f"{key}/{name}"], "float32")
            for name in ("moment_new", "moment_old", "A_general_init", "A_isolated")
        }
        moments = part["moment_new"], part["moment_old"]
        general, isolated = (part[f"A_{b}"].mT * 3**0.5 for b in ("general_init", "isolated"))
        assert bool(verify.verify_subspace(general, *moments, "general").passed)
        report = verify.verify_subspace(isolated, *moments, "isolated", ridge=0.0)
        # Solved in float32 the least ridge is not small enough to tell.
        assert float(report.optimality_gap) < (1e-6 if widest_dtype(xp) == "float64" else 5e-4)
        assert float(report.orthonormality) < 1e-6
        assert not bool(verify.verify_subspace(isolated, *moments, "isolated").passed)
        assert not bool(verify.verify_subspace(isolated, *moments, "trace_ratio").passed)
