"""What a verdict needs beside a small gap: directions that live, a floor, moments that can tell."""

from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from libraries import needs_float64
from numpy.typing import NDArray
from strategies import to_library

from loda_math import (
    general_subspace,
    isolated_subspace,
    recalibration,
    trace_ratio_subspace,
)
from loda_math.verify import verify_subspace


def gram(tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    square = tokens.T @ tokens / len(tokens)
    return (square + square.T) / 2


@pytest.mark.parametrize("zero", [1, 2])
def test_a_null_space_of_fewer_directions_does_not_pass(xp: ModuleType, zero: int) -> None:
    """Fewer directions hold less old energy, so the objective alone would like them."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    quiet = np.eye(4)[:, [2, 1]]
    assert bool(verify_subspace(to_library(xp, quiet), new, old, "null").passed)
    quiet[:, -zero:] = 0.0
    assert not bool(verify_subspace(to_library(xp, quiet), new, old, "null").passed)


def test_the_energy_floor_is_part_of_the_claim(xp: ModuleType) -> None:
    """The best ratio, with a quarter of the energy: right without a floor, wrong with one."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    best = to_library(xp, np.eye(4)[:, [2]])
    assert bool(verify_subspace(best, new, old, "trace_ratio").passed)
    under = verify_subspace(best, new, old, "trace_ratio", energy_floor=0.25)
    assert bool(under.passed)
    over = verify_subspace(best, new, old, "trace_ratio", energy_floor=0.26)
    assert not bool(over.passed)


def test_columns_of_no_length_are_zero_columns(xp: ModuleType) -> None:
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    basis = 1e-9 * np.eye(4)[:, 1:3]
    assert not bool(verify_subspace(to_library(xp, basis), new, old, "isolated").passed)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 12))
def test_without_a_ridge_a_singular_history_is_judged_as_finely_as_it_can_be(
    xp: ModuleType, seed: int, rank: int
) -> None:
    """Our own solution passes; one that stays outside the null space does not."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((200, 12))
    low = tokens[:, :6] @ rng.standard_normal((6, 12))
    new, old = (to_library(xp, gram(x)) for x in (tokens, low))
    own = isolated_subspace(new, old, rank, ridge=0.0)
    assert bool(verify_subspace(own, new, old, "isolated", ridge=0.0).passed)
    loud = general_subspace(old, None, min(rank, 6))
    assert not bool(verify_subspace(loud, new, old, "isolated", ridge=0.0).passed)


def test_an_unregularised_basis_of_float32_moments_passes() -> None:
    """SciPy's generalised eigenvectors, as research code would find them, without any ridge."""
    rng = np.random.default_rng(0)
    scales = 0.9 ** np.arange(24)
    new, old = (gram(rng.standard_normal((400, 24)) * scales).astype(np.float32) for _ in range(2))
    _, vectors = scipy.linalg.eigh(new.astype(np.float64), old.astype(np.float64))
    basis, _ = np.linalg.qr(vectors[:, ::-1][:, :4])
    assert verify_subspace(basis, new, old, "isolated", ridge=0.0).passed
    assert not verify_subspace(basis, new, old, "isolated").passed
    assert not verify_subspace(np.roll(basis, 1, axis=0), new, old, "isolated", ridge=0.0).passed


def test_the_residual_is_a_share_of_the_moment(xp: ModuleType) -> None:
    """Half-way between two axes: SU - U(UᵀSU) has length |a - b| / 2."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2.0], [0.0, 0.0]))
    tilted = to_library(xp, np.array([[1.0], [1.0]]) / 2**0.5)
    report = verify_subspace(tilted, new, old, "general")
    assert float(report.stationarity) == pytest.approx(1 / 20**0.5, rel=1e-6)


def test_weights_that_are_no_numbers_are_refused() -> None:
    eye = np.eye(2)
    for weight in (np.asarray(np.nan), np.asarray([1.0, np.nan])):
        with pytest.raises(ValueError, match="history_weight"):
            recalibration(eye, eye, eye, eye, 1.0, history_weight=weight)


def test_a_branch_in_other_units_is_recalibrated_alike() -> None:
    """With orthogonal columns of B every coefficient is its own, however short its column."""
    rng = np.random.default_rng(0)
    down = rng.standard_normal((3, 8))
    new, old = (gram(rng.standard_normal((30, 8))) for _ in range(2))
    expected = recalibration(np.eye(3), down, new, old, 1.5, form="direction")
    found = recalibration(np.diag([1.0, 1e-9, 1e-5]), down, new, old, 1.5, form="diagonal")
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_every_layer_has_a_verdict_of_its_own(xp: ModuleType) -> None:
    """Three layers of very different conditioning and energy, judged together and apart."""
    needs_float64(xp)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((3, 200, 8)) * 0.5 ** np.arange(8)
    histories = rng.standard_normal((3, 200, 8)) * 0.7 ** np.arange(8)
    histories[0] = tokens[0][:, :4] @ rng.standard_normal((4, 8))
    new = np.stack([gram(x) for x in tokens])
    old = np.stack([gram(x) for x in histories])
    bases = np.stack([np.linalg.qr(rng.standard_normal((8, 2)))[0] for _ in range(3)])
    bases[1] = isolated_subspace(new[1], old[1], 2, energy_floor=0.9)
    for objective, settings in (
        ("isolated", {"ridge": 0.0}),
        ("trace_ratio", {"energy_floor": 0.9}),
        ("null", {}),
    ):
        arrays = [to_library(xp, a) for a in (bases, new, old)]
        together = verify_subspace(*arrays, objective, **settings)
        for layer in range(3):
            apart = verify_subspace(*(a[layer, ...] for a in arrays), objective, **settings)
            for name in ("passed", "optimality_gap", "stationarity", "optimum"):
                found = float(getattr(together, name)[layer])
                assert found == pytest.approx(float(getattr(apart, name)), rel=1e-6, abs=1e-9)


def test_inert_directions_leave_no_negative_gap(xp: ModuleType) -> None:
    """One direction with energy and two without: alone it has a larger ratio than three have."""
    new, old = (to_library(xp, m, "float32") for m in (np.diag([1.0, 0, 0, 0]), np.eye(4)))
    report = verify_subspace(trace_ratio_subspace(new, old, 3), new, old, "trace_ratio")
    assert bool(report.passed)
    assert float(report.objective) > float(report.optimum)
    assert float(report.optimality_gap) == 0
