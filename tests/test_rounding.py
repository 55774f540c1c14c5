"""What is a direction, and what is rounding of a Gram matrix: judged from both sides."""

from collections.abc import Callable
from types import ModuleType

import mpmath  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64
from strategies import (
    AMPLITUDES,
    PRECISIONS,
    Matrix,
    from_spectrum,
    orthogonal,
    outlier_channels,
    rounded,
    seeds,
    to_library,
    to_numpy,
)

import loda_math as lm
from loda_math import _rounding
from loda_math._arrays import namespace
from loda_math.verify import verify_subspace

UNIT = 2.0**-23
few = settings(max_examples=10)


def moments(xp: ModuleType, tokens: Matrix, dtype: str = "float32") -> lm.Moments:
    return lm.second_moment(to_library(xp, tokens, dtype))


def outlier_tokens(seed: int, amplitude: float, size: int = 32, count: int = 3000) -> Matrix:
    """Channels from 1 down to 0.1, and one that is much larger."""
    scales = np.geomspace(1, 0.1, size)
    scales[0] = amplitude
    return np.random.default_rng(seed).standard_normal((count, size)) * scales


def layer_norm(x: Matrix) -> Matrix:
    return np.asarray((x - x.mean(axis=1, keepdims=True)) / x.std(axis=1, keepdims=True))


# Real directions stay


@pytest.mark.parametrize("amplitude", [*AMPLITUDES, 1e5])
@pytest.mark.parametrize("rank", [8, 32])
def test_a_large_channel_kills_no_other_direction(
    xp: ModuleType, amplitude: float, rank: int
) -> None:
    needs_float64(xp)
    tokens = rounded(outlier_tokens(0, amplitude), "float32")
    new = moments(xp, tokens)
    old = moments(xp, outlier_tokens(1, amplitude))
    found = lm.general_solution(new, None, rank)
    assert int(found.effective_rank) == rank
    # Right to far below the size of the smallest.
    exact = np.linalg.eigvalsh(tokens.T @ tokens / len(tokens))[::-1][:rank]
    np.testing.assert_allclose(to_numpy(found.values), exact, rtol=1e-5)
    for solution in (lm.isolated_solution(new, old, rank), lm.isolated_solution(new, None, rank)):
        assert int(solution.effective_rank) == rank
    assert int(lm.trace_ratio_solution(new, old, 8).effective_rank) == 8
    assert int(lm.rank_for(new, None, 1.0).rank) == 32
    assert int(lm.rank_for(new, old, 1.0, of="ratio").rank) == 32
    assert int(verify_subspace(found.basis, new, old, "general").effective_rank) == rank
    eye = to_library(xp, np.eye(32))
    kept = to_numpy(lm.recalibration(eye, eye, new, old, 1.0))
    assert np.linalg.matrix_rank(kept, tol=1e-6) == 32


@few
@given(seed=seeds, size=st.integers(4, 9), precision=st.sampled_from(PRECISIONS), data=st.data())
def test_what_the_tokens_have_is_found_and_no_more(
    xp: ModuleType, seed: int, size: int, precision: str, data: st.DataObject
) -> None:
    """Duplicated and silent channels, beside outliers: their number is known exactly."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((300, size)) * data.draw(outlier_channels(size))[0]
    tokens = rounded(tokens, precision)
    lost = data.draw(st.integers(0, size - 2))
    for channel in range(lost):
        # Exact in any precision: a copy, or nothing at all.
        tokens[:, channel] = tokens[:, -1] if channel % 2 else 0.0
    dtype = "float64" if precision == "float64" else "float32"
    new = moments(xp, tokens, dtype)
    assert int(lm.general_solution(new, None, size).effective_rank) == size - lost
    assert int(lm.rank_for(new, None, 1.0).rank) == size - lost
    old = moments(xp, rng.standard_normal((300, size)), dtype)
    for ridge in (1e-2, 1e-9):
        solution = lm.isolated_solution(new, old, size, ridge=ridge)
        assert int(solution.effective_rank) == size - lost


# Noise is refused


@pytest.mark.parametrize("seed", range(10))
def test_the_dead_direction_of_layer_norm_is_noise(xp: ModuleType, seed: int) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    x, y = (
        layer_norm(rng.standard_normal((2000, 32)) * rng.uniform(0.3, 3, 32) + shift)
        for shift in rng.standard_normal((2, 1, 32))
    )
    new, old = moments(xp, x), moments(xp, y)
    dead = np.ones(32) / 32**0.5
    for solution in (
        lm.general_solution(new, None, 32),
        lm.general_solution(new, old, 32),
        lm.isolated_solution(new, old, 32),
    ):
        assert int(solution.effective_rank) == 31
        assert np.abs(dead @ to_numpy(solution.basis)).max() < 1e-2
    assert int(lm.isolated_solution(new, old, 32, ridge=0.0).effective_rank) == 31
    # The energy ratio of nothing to nothing is not a number, whatever rounding makes of it.
    line = to_library(xp, dead[:, None])
    assert np.isnan(float(lm.energy_ratio(line, new, old)))
    flat = to_library(xp, np.eye(32))
    assert float(lm.energy_ratio(line, new, flat)) == 0
    assert float(lm.energy_ratio(line, flat, old)) == np.inf


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("amplitude", [1.0, 1e3, 1e6])
def test_a_copied_channel_is_no_direction_beside_an_outlier(
    xp: ModuleType, dtype: str, amplitude: float
) -> None:
    """What the eigensolver leaves there is relative to the outlier, not to the channel."""
    needs_float64(xp)
    tokens = outlier_tokens(0, amplitude)
    tokens[:, 5] = tokens[:, 6]
    found = lm.general_solution(moments(xp, tokens, dtype), None, 32)
    assert int(found.effective_rank) == 31


def test_sound_directions_are_found_behind_noise(xp: ModuleType) -> None:
    """The difference of two equal outliers is all rounding, and larger than what comes after it."""
    needs_float64(xp)
    for size in (12, 200):  # of the second SciPy computes a part of the spectrum at a time
        rng = np.random.default_rng(size)
        tokens = rng.standard_normal((600, size)) * np.geomspace(1e-1, 1e-2, size)
        tokens[:, 0] = 1e3 * rng.standard_normal(600)
        total = tokens.T @ tokens
        # A moment as a Gram matrix in single precision may leave it: 3 units off in one entry.
        total[1, :] = total[:, 1] = total[0, :]
        total[1, 1] = total[0, 0]
        total[0, 1] = total[1, 0] = total[0, 0] * (1 - 3 * UNIT)
        new = lm.Moments(to_library(xp, total), 600, None, UNIT)
        apart = np.eye(size)[0] - np.eye(size)[1]
        assert apart @ total @ apart / 2 > total[-1, -1]
        found = lm.general_solution(new, None, 5)
        assert int(found.effective_rank) == 5
        assert np.abs(apart @ to_numpy(found.basis)).max() < 1e-3
        exact = np.linalg.eigvalsh(total)[::-1]
        sound = exact[np.abs(exact - apart @ total @ apart / 2) > 1e-3 * exact[1]][:5] / 600
        np.testing.assert_allclose(to_numpy(found.values), sound, rtol=1e-3)
        flat = to_library(xp, np.eye(size))
        behind = to_numpy(lm.isolated_subspace(new, flat, 5))
        assert np.all(np.any(behind != 0, axis=0))
        assert np.abs(apart @ behind).max() < 1e-3


def test_rotated_tokens_have_their_noise_everywhere(xp: ModuleType) -> None:
    """Once an outlier is spread over all channels, what is below its rounding is lost."""
    needs_float64(xp)
    tokens = outlier_tokens(0, 1e4)
    q = orthogonal(32, np.random.default_rng(1))
    straight, turned = moments(xp, tokens), moments(xp, tokens @ q)
    assert int(lm.general_solution(straight, None, 32).effective_rank) == 32
    assert int(lm.general_solution(turned, None, 32).effective_rank) == 1
    # In float64 rotation takes nothing.
    assert (
        int(lm.general_solution(moments(xp, tokens @ q, "float64"), None, 32).effective_rank) == 32
    )


# The bound

FAMILIES: dict[str, Callable[[np.random.Generator, int, int], Matrix]] = {
    "normal": lambda rng, n, d: rng.standard_normal((n, d)),
    "positive": lambda rng, n, d: rng.uniform(0.5, 1, (n, d)),
    "rectified": lambda rng, n, d: np.maximum(rng.standard_normal((n, d)), 0),
    "heavy": lambda rng, n, d: rng.standard_cauchy((n, d)),
    "low rank": lambda rng, n, d: rng.standard_normal((n, 2)) @ rng.standard_normal((2, d)),
    "outlier": lambda rng, n, d: rng.standard_normal((n, d)) * np.r_[1e3, np.ones(d - 1)],
    "three tokens": lambda rng, n, d: rng.standard_normal((3, d))[rng.integers(0, 3, n)],
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("count", "size"), [(16, 48), (300, 48), (5000, 48), (20000, 16)])
def test_gram_matrices_stay_within_the_bound(
    xp: ModuleType, family: str, count: int, size: int
) -> None:
    """N − E and N + E are positive semi-definite: no direction has more noise than said."""
    needs_float64(xp)
    x = FAMILIES[family](np.random.default_rng(count), count, size).astype(np.float32)
    wide = x.astype(np.float64)
    exact = wide.T @ wide / count
    mean = lm.second_moment(to_library(xp, x, "float32")).mean
    noise = to_numpy(
        _rounding.channel_noise(namespace(x=mean), mean, 0 * mean[..., :1, 0], mean, gram_eps=UNIT)
    )
    root = 1 / np.sqrt(noise)
    share = np.linalg.norm((to_numpy(mean) - exact) * np.outer(root, root), 2)
    assert share < 1


@few
@given(seed=seeds, data=st.data())
def test_the_verdict_on_a_cluster_does_not_turn_with_its_basis(
    xp: ModuleType, seed: int, data: st.DataObject
) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    size = data.draw(st.integers(3, 8))
    first = data.draw(st.integers(0, size - 2))
    last = data.draw(st.integers(first + 2, size))
    values = np.sort(10.0 ** rng.uniform(-6, 0, size))[::-1].copy()
    values[first:last] = values[first]
    basis = orthogonal(size, rng)
    noise = 10.0 ** rng.uniform(-6, 0, size)
    verdicts = []
    for turn in (np.eye(last - first), orthogonal(last - first, rng)):
        turned = basis.copy()
        turned[:, first:last] = basis[:, first:last] @ turn
        arrays = [to_library(xp, a) for a in (values, noise, turned, np.full(1, 1e-15))]
        library = namespace(x=arrays[0])
        along = _rounding.noise_along(library, arrays[1], arrays[2])
        verdicts.append(to_numpy(_rounding.is_noise(library, arrays[0], along, arrays[3])))
    np.testing.assert_array_equal(verdicts[0], verdicts[1])
    assert len(set(verdicts[0][first:last])) == 1


@few
@given(seed=seeds, size=st.integers(2, 8), data=st.data())
def test_what_a_span_carries_does_not_depend_on_its_basis(
    xp: ModuleType, seed: int, size: int, data: st.DataObject
) -> None:
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    rank = data.draw(st.integers(1, size))
    s = from_spectrum(10.0 ** rng.uniform(-8, 0, size), orthogonal(size, rng))
    noise, span = np.diag(s) * 1e-4, orthogonal(size, rng)[:, :rank]
    counts = []
    for u in (span, span @ orthogonal(rank, rng)):
        arrays = [to_library(xp, a) for a in (u, s, noise)]
        counts.append(int(_rounding.carrying(namespace(x=arrays[0]), *arrays)))
    assert counts[0] == counts[1]


# An oracle of sixty digits


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("amplitude", AMPLITUDES)
def test_verdicts_of_an_oracle_of_sixty_digits(
    xp: ModuleType, amplitude: float, precision: str
) -> None:
    """Eigenvalues of the exact Gram matrix of the tokens: dead ones are exactly zero."""
    needs_float64(xp)
    rng = np.random.default_rng(int(amplitude))
    size, count = 7, 40
    tokens = rng.standard_normal((count, size)) * np.r_[amplitude, np.geomspace(1, 0.05, size - 1)]
    tokens = rounded(tokens, precision)
    tokens[:, 4], tokens[:, 5] = tokens[:, 2], 0.5 * tokens[:, 3]  # two dead directions
    with mpmath.workdps(60):
        x = mpmath.matrix(tokens.tolist())
        exact, vectors = mpmath.eigsy(x.T * x / count)
        values = np.array([float(v) for v in exact])
        basis = np.array(vectors.tolist(), dtype=float)
    dtype = "float64" if precision == "float64" else "float32"
    new = moments(xp, tokens, dtype)
    mean = to_numpy(new.mean)
    noise = _rounding.channel_noise(np, mean, mean.max(keepdims=True)[0], mean, gram_eps=new.unit)
    along = _rounding.noise_along(np, noise, basis)
    real = values > along
    assert real.sum() == size - 2
    assert np.all(np.abs(values[~real]) < 1e-40)
    found = lm.general_solution(new, None, size)
    assert int(found.effective_rank) == real.sum()
    np.testing.assert_allclose(
        to_numpy(found.values)[: real.sum()],
        np.sort(values[real])[::-1],
        rtol=1e-4,
    )
    reached = to_numpy(found.basis)[:, : real.sum()]
    np.testing.assert_allclose(reached @ reached.T, basis[:, real] @ basis[:, real].T, atol=1e-3)
