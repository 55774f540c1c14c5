"""Weighted histories against explicit sums."""

from fractions import Fraction
from types import ModuleType

import libraries
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtypes, seeds, to_library, to_numpy

from loda_math import History, general_subspace, isolated_subspace, remember

few = settings(max_examples=15)


@few
@given(
    seed=seeds,
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=1, max_size=6),
    decay=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
    dtype=dtypes,
)
def test_the_recursion_is_the_weighted_sum(
    xp: ModuleType, seed: int, weights: list[float], decay: float, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(weights), 2, 4, 3))
    moments = np.einsum("t...ni,t...nj->t...ij", x, x)
    history: History | None = None
    for m, w in zip(moments, weights, strict=True):
        history = remember(history, to_library(xp, m, dtype), weight=w, decay=decay)
    assert history is not None
    ages = np.arange(len(weights))[::-1]
    w = np.asarray(weights) * decay**ages
    seen = np.stack([to_numpy(to_library(xp, m, dtype)) for m in moments])
    total = np.einsum("t,t...ij->...ij", w, seen)
    tolerance = 1e-12 if libraries.widest_dtype(xp) == "float64" else 1e-5
    np.testing.assert_allclose(to_numpy(history.total), total, rtol=tolerance, atol=tolerance)
    assert float(history.weight) == pytest.approx(w.sum())
    assert float(history.squares) == pytest.approx((w**2).sum())
    if w.sum() > 0:
        np.testing.assert_allclose(
            to_numpy(history.mean), total / w.sum(), rtol=tolerance, atol=tolerance
        )
        assert float(history.effective_tasks) == pytest.approx(w.sum() ** 2 / (w**2).sum())
    else:
        np.testing.assert_array_equal(to_numpy(history.mean), 0)
        assert history.effective_tasks == 0


def test_a_stream_of_a_thousand_tasks_stays_in_range(xp: ModuleType) -> None:
    """Old tasks fade, the total stays bounded, and the present still moves the subspace."""
    then, now = np.diag([1.0, 0.0, 0.1]), np.diag([0.0, 1.0, 0.1])
    fading = plain = None
    for t in range(1000):
        m = to_library(xp, then if t < 980 else now, "float32")
        fading = remember(fading, m, decay=0.9)
        plain = remember(plain, m)
    assert fading is not None
    assert plain is not None
    assert float(fading.total[0, 0] + fading.total[1, 1]) == pytest.approx(10, rel=1e-5)
    assert fading.effective_tasks == pytest.approx(19, rel=1e-6)
    assert plain.effective_tasks == pytest.approx(1000)
    exact = Fraction(9, 10) ** 20  # weight of everything before the change, of all weight
    assert float(fading.mean[0, 0]) == pytest.approx(float(exact), rel=1e-4)
    # The plain history still takes the second feature for free; the faded one knows better.
    new = to_library(xp, np.eye(3), "float32")
    quietest = [to_numpy(isolated_subspace(new, h.mean, 1)) for h in (fading, plain)]
    assert [int(np.argmax(u[:, 0])) for u in quietest] == [2, 1]
    ranked = [np.argmax(to_numpy(general_subspace(h.mean, None, 1))[:, 0]) for h in (fading, plain)]
    assert ranked == [1, 0]


def test_uniform_weights_are_the_plain_sum(xp: ModuleType) -> None:
    m = to_library(xp, np.diag([1.0, 2.0]), "float32")
    history = remember(remember(None, m), m)
    np.testing.assert_array_equal(to_numpy(history.total), 2 * to_numpy(m))
    np.testing.assert_array_equal(to_numpy(history.mean), to_numpy(m))
    one = remember(None, m, weight=3, decay=0.5)
    np.testing.assert_array_equal(to_numpy(one.mean), to_numpy(m))


def test_errors_name_the_argument(xp: ModuleType) -> None:
    m = to_library(xp, np.eye(2), "float32")
    with pytest.raises(TypeError, match="history must be a History or None"):
        remember(m, m)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decay must be a share"):
        remember(None, m, decay=1.1)
    with pytest.raises(ValueError, match="weight must be finite and at least 0"):
        remember(None, m, weight=-1)
    with pytest.raises(ValueError, match="moments must have one shape"):
        remember(remember(None, m), to_library(xp, np.eye(3), "float32"))
