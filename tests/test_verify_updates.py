"""Certificates of coefficients, merged weights and perturbed parameters."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import Matrix, branches, dtypes, orthogonal, seeds, to_library, to_numpy

from loda_math import recalibration, recalibration_loss, verify

EPS = {"float32": 1.2e-7, "float64": 2.3e-16}
FORMS = ("full", "diagonal", "box", "direction", "scalar")
few = settings(max_examples=6)

# Coefficients


@pytest.mark.parametrize("form", FORMS)
@few
@given(branch=branches(), gamma=st.sampled_from([0.5, 3.0]), weight=st.sampled_from([1.0, 0.25]))
def test_exact_coefficients_pass(
    xp: ModuleType, form: str, branch: tuple, gamma: float, weight: float
) -> None:
    arrays = [to_library(xp, a) for a in branch]
    exact = recalibration(*arrays, gamma, form, history_weight=weight)
    report = verify.verify_recalibration(exact, *arrays, gamma, form, history_weight=weight)
    assert bool(report.passed)
    assert float(report.deviation) < 1e-9
    loss = recalibration_loss(exact, *arrays, gamma, history_weight=weight)
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-9, abs=1e-300)
    assert float(report.optimality_gap) >= -1e-9
    if form == "full":
        assert float(report.optimality_gap) < 1e-9
    predicted = weight * float(report.old_change) + gamma * float(report.new_loss)
    assert predicted == pytest.approx(float(loss), rel=1e-9, abs=1e-300)


@few
@given(branch=branches(("random", "flat"), dead=False), seed=seeds)
def test_the_deviation_is_the_gap_of_the_full_form(
    xp: ModuleType, branch: tuple, seed: int
) -> None:
    up, down, new, old = branch
    down = orthogonal(len(new), np.random.default_rng(0))[: len(down)]
    arrays = [to_library(xp, a) for a in (up, down, new, old)]
    other = np.random.default_rng(seed).standard_normal((len(down), len(down)))
    report = verify.verify_recalibration(to_library(xp, other), *arrays, 3.0)
    k = down @ (old + 3 * new) @ down.T
    whole = np.trace(up @ k @ up.T)
    excess = float(report.loss) - float(report.optimum)
    assert float(report.deviation) ** 2 * whole == pytest.approx(excess, rel=1e-6)
    drop = 3 * np.trace(up @ down @ new @ down.T @ up.T)
    assert float(report.optimality_gap) == pytest.approx(excess / drop, rel=1e-6)
    assert not bool(report.passed)


def test_nothing_to_lose_is_no_gap(xp: ModuleType) -> None:
    eye, zero = (to_library(xp, m, "float32") for m in (np.eye(2), np.zeros((2, 2))))
    kept = verify.verify_recalibration(eye, eye, eye, eye, zero, 1.0)
    assert bool(kept.passed)
    assert float(kept.loss) == float(kept.optimality_gap) == float(kept.deviation) == 0
    # Nothing at all: neither inputs nor a loss.
    empty = verify.verify_recalibration(zero, eye, eye, zero, zero, 1.0)
    assert bool(empty.passed)
    assert float(empty.loss) == float(empty.optimality_gap) == float(empty.deviation) == 0


def test_the_wrong_order_of_the_factors_is_found(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    new, old = (m @ m.T for m in rng.standard_normal((2, 4, 4)))
    wrong = np.linalg.solve(old + new, new)  # (P + γQ)⁻¹γQ, the transpose of the right one
    arrays = [to_library(xp, a, "float32") for a in (np.eye(4), np.eye(4), new, old)]
    assert not bool(
        verify.verify_recalibration(to_library(xp, wrong, "float32"), *arrays, 1.0).passed
    )
    assert bool(
        verify.verify_recalibration(to_library(xp, wrong.T, "float32"), *arrays, 1.0).passed
    )


# Weights and parameters


@few
@given(seed=seeds, dtype=dtypes)
def test_merges(xp: ModuleType, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    before, up, down = (
        rng.standard_normal((5, 4)),
        rng.standard_normal((5, 2)),
        orthogonal(4, rng)[:2],
    )
    c = rng.standard_normal((2, 2))
    after = before + up @ c @ down
    put = lambda *arrays: [to_library(xp, a, dtype) for a in arrays]  # noqa: E731
    w, v, b, a, lam = put(before, after, up, down, c)
    report = verify.verify_merge(w, v, b, a, lam)
    assert bool(report.passed)
    assert float(report.error) < 1e2 * EPS[dtype]
    length = np.linalg.norm(up @ c @ down)
    assert float(report.update) == pytest.approx(length / np.linalg.norm(before), rel=1e-5)
    report = verify.verify_merge(w, v, b, a)
    missing = np.linalg.norm(up @ (c - np.eye(2)) @ down) / np.linalg.norm(up @ down)
    assert float(report.error) == pytest.approx(missing, rel=1e-4)
    assert not bool(report.passed)
    found = verify.implied_coefficients(*put(after - before, up, down))
    np.testing.assert_allclose(to_numpy(found), c, atol=1e4 * EPS[dtype])


def test_an_update_below_the_rounding_of_the_weight_passes(xp: ModuleType) -> None:
    weight = np.full((3, 3), 1.0)
    up, down = np.full((3, 1), 1e-5), np.ones((1, 3))
    after = (weight + up @ down).astype(np.float32)
    arrays = [to_library(xp, a, "float32") for a in (weight, after, up, down)]
    report = verify.verify_merge(*arrays)
    assert float(report.error) > 1e-5
    assert bool(report.passed)


def test_implied_coefficients_leave_out_what_is_not_there(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    up, down = np.ones((3, 2)) * [1.0, 0.0], orthogonal(4, rng)[:2]
    change = up @ np.diag([0.5, 0.7]) @ down
    arrays = [to_library(xp, a, "float32") for a in (change, up, down)]
    found = to_numpy(verify.implied_coefficients(*arrays))
    np.testing.assert_allclose(found, np.diag([0.5, 0.0]), atol=1e-5)


def test_updates_that_do_not_fit(xp: ModuleType) -> None:
    sound = {"change": (3, 4), "up": (3, 2), "down": (2, 4)}
    for name, shape in (
        ("change", (4, 3)),
        ("change", (3,)),
        ("up", (2, 2)),
        ("up", (3, 3)),
        ("up", (2,)),
        ("down", (2, 3)),
        ("down", (3, 4)),
        ("down", (4,)),
    ):
        arrays = [to_library(xp, np.ones(s), "float32") for s in (sound | {name: shape}).values()]
        with pytest.raises(ValueError, match=r"^shapes must be \(\.\.\., O, D\), up"):
            verify.implied_coefficients(*arrays)


def test_no_update_passes_exactly(xp: ModuleType) -> None:
    zero, up, down = (to_library(xp, np.zeros(s), "float32") for s in ((3, 4), (3, 2), (2, 4)))
    report = verify.verify_merge(zero, zero, up, down)
    assert bool(report.passed)
    assert float(report.error) == float(report.update) == 0
    still = verify.verify_perturbation(zero, zero, zero, 0.0)
    assert bool(still.passed)
    assert float(still.error) == float(still.length) == float(still.alignment) == 0


@few
@given(seed=seeds, radius=st.sampled_from([1e-3, 0.3, 2.0]), dtype=dtypes)
def test_perturbations(xp: ModuleType, seed: int, radius: float, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    theta, gradient = rng.standard_normal((2, 3, 4))
    step: Matrix = radius * gradient / np.linalg.norm(gradient)
    put = lambda *arrays: [to_library(xp, a, dtype) for a in arrays]  # noqa: E731
    right = verify.verify_perturbation(*put(theta, theta - step, gradient), radius)
    assert bool(right.passed)
    assert float(right.length) == pytest.approx(1, rel=1e-3)
    assert float(right.alignment) == pytest.approx(1, rel=1e-3)
    ascent = verify.verify_perturbation(*put(theta, theta + step, gradient), radius)
    assert not bool(ascent.passed)
    assert float(ascent.alignment) == pytest.approx(-1, rel=1e-3)
    assert float(ascent.error) == pytest.approx(2, rel=1e-3)
    half = verify.verify_perturbation(*put(theta, theta - 0.5 * step, gradient), radius)
    assert not bool(half.passed)
    assert float(half.length) == pytest.approx(0.5, rel=1e-2)


def test_a_zero_gradient_shifts_nothing(xp: ModuleType) -> None:
    theta, zero = to_library(xp, np.ones(3), "float32"), to_library(xp, np.zeros(3), "float32")
    # Radius times a unit vector that does not exist: the parameter has to stay.
    assert bool(verify.verify_perturbation(theta, theta, zero, 0.5).passed)
    assert not bool(verify.verify_perturbation(theta, theta + 0.5, zero, 0.5).passed)
    with pytest.raises(ValueError, match="must have one shape"):
        verify.verify_perturbation(theta, theta[:2], zero, 0.5)
