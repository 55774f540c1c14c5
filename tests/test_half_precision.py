"""Half precision on NumPy: read as it is, computed wide, returned as it came."""

import numpy as np
import pytest
from strategies import orthogonal

import loda_math as lm

RNG = np.random.default_rng(0)


def test_tokens_are_cast_up_before_they_are_multiplied() -> None:
    tokens = RNG.standard_normal((400, 30)).astype(np.float16)
    total = lm.second_moment(tokens).total
    assert total.dtype == np.float64
    wide = tokens.astype(np.float64)
    np.testing.assert_allclose(total, wide.T @ wide, atol=1e-3)
    huge = np.full((2, 2), 6e4, np.float16)  # its square is beyond the range of halves
    np.testing.assert_allclose(lm.second_moment(huge).total, 2 * float(huge[0, 0]) ** 2, rtol=1e-6)


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
