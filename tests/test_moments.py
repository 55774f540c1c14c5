"""Second moments: a monoid, and its precision. Histories: weighted sums of them."""

import io
import tracemalloc
from fractions import Fraction
from types import ModuleType
from typing import Any

import array_api_strict as strict
import libraries
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64, widest_dtype
from strategies import EPS, dtype_name, dtypes, orthogonal, seeds, to_library, to_numpy

from loda_math import (
    History,
    Moments,
    combine,
    general_subspace,
    isolated_subspace,
    remember,
    rounding_unit,
    second_moment,
)
from loda_math.moments import GRAM_TOKENS


def tokens_of(seed: int, count: int, size: int, batch: tuple[int, ...] = ()) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((*batch, count, size))


def whole_of(moments: Moments) -> np.ndarray:
    """The sum with all its digits: without float64, the last are in the error."""
    lost = 0 if moments.error is None else to_numpy(moments.error)
    return to_numpy(moments.total) + lost


@given(seed=seeds, count=st.integers(0, 12), size=st.integers(1, 5), dtype=dtypes)
def test_equals_the_sum_of_outer_products(
    xp: ModuleType, seed: int, count: int, size: int, dtype: str
) -> None:
    x = to_library(xp, tokens_of(seed, count, size), dtype)
    moments = second_moment(x)
    exact = sum((np.outer(t, t) for t in to_numpy(x)), np.zeros((size, size)))
    assert moments.count == count
    assert dtype_name(moments.total) == widest_dtype(xp)
    np.testing.assert_allclose(to_numpy(moments.total), exact, atol=10 * count * EPS[dtype])
    np.testing.assert_array_equal(to_numpy(moments.total), to_numpy(moments.total).T)
    np.testing.assert_allclose(to_numpy(moments.mean), exact / max(count, 1), atol=20 * EPS[dtype])


@given(seed=seeds, cuts=st.tuples(st.integers(0, 9), st.integers(0, 9)), dtype=dtypes)
def test_combination_is_a_monoid(
    xp: ModuleType, seed: int, cuts: tuple[int, int], dtype: str
) -> None:
    x = to_library(xp, tokens_of(seed, 9, 3), dtype)
    low, high = sorted(cuts)
    a, b, c = second_moment(x[:low, :]), second_moment(x[low:high, :]), second_moment(x[high:, :])
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    assert left.count == right.count == 9
    np.testing.assert_allclose(whole_of(left), whole_of(right), atol=1e-13, rtol=1e-13)
    np.testing.assert_array_equal(to_numpy((a + b).total), to_numpy((b + a).total))
    np.testing.assert_array_equal(to_numpy((a + a.zero()).total), to_numpy(a.total))
    np.testing.assert_array_equal(to_numpy((a.zero() + a).mean), to_numpy(a.mean))
    assert (a + a.zero()).count == a.count
    whole = to_numpy(second_moment(x).total)
    np.testing.assert_allclose(to_numpy(left.total), whole, atol=100 * EPS[dtype])


@pytest.mark.parametrize("extra", [0, 1, GRAM_TOKENS + 3])
def test_long_inputs_are_cut_and_nothing_is_lost(xp: ModuleType, extra: int) -> None:
    count = GRAM_TOKENS + extra
    x = tokens_of(1, count, 2, (2,)).astype(np.float32)
    x[:, -1] = 1000.0  # a lost last row shows
    moments = second_moment(to_library(xp, x, "float32"))
    wide = x.astype(np.float64)
    assert moments.count == count
    np.testing.assert_allclose(
        to_numpy(moments.total), np.swapaxes(wide, 1, 2) @ wide, rtol=1e-5, atol=1
    )


def ill_conditioned(batches: int, rows: int, size: int) -> np.ndarray:
    """Float32 mini-batches whose second moment spans seven orders of magnitude."""
    rng = np.random.default_rng(5)
    basis = orthogonal(size, rng) * np.logspace(0, -3.5, size)
    return (rng.standard_normal((batches, rows, size)) @ basis.T).astype(np.float32)


def test_small_eigenvalues_survive_where_a_float32_sum_loses_them(xp: ModuleType) -> None:
    data = ill_conditioned(800, 16, 8)
    flat = data.reshape(-1, 8).astype(np.float64)
    exact = np.linalg.eigvalsh(flat.T @ flat)
    plain = np.zeros((8, 8), np.float32)
    moments = second_moment(to_library(xp, data[0], "float32")).zero()
    for batch in data:
        plain += batch.T @ batch
        moments = combine(moments, second_moment(to_library(xp, batch, "float32")))
    ours = np.linalg.eigvalsh(whole_of(moments))
    assert ours[0] == pytest.approx(exact[0], rel=0.02)
    naive = np.linalg.eigvalsh(plain.astype(np.float64))
    assert naive[0] != pytest.approx(exact[0], rel=0.2)


def test_compensation_keeps_what_a_float32_sum_loses(xp: ModuleType) -> None:
    data = ill_conditioned(800, 16, 8)
    grams = data.transpose(0, 2, 1) @ data
    grams = 0.5 * (grams + grams.transpose(0, 2, 1))
    exact = grams.astype(np.float64).sum(0)
    plain = np.zeros((8, 8), np.float32)
    moments = None
    for gram in grams:
        plain += gram
        total = to_library(xp, gram, "float32")
        part = Moments(total, 16, total * 0)
        moments = part if moments is None else combine(moments, part)
    assert moments is not None
    assert dtype_name(moments.total) == "float32"
    ours = np.abs(whole_of(moments) - exact).max()
    assert ours < 0.02 * np.abs(plain.astype(np.float64) - exact).max()
    # The other order of combination, and a neutral element, keep it.
    mean = to_numpy(combine(moments.zero(), moments).mean)
    assert np.abs(mean * moments.count - exact).max() < 1e-6 * np.abs(exact).max()


def test_moments_without_compensation_combine_with_those_that_have_it() -> None:
    one = np.ones((1, 1), np.float32)
    both = combine(Moments(one * 2**24, 1, one), Moments(one, 1))
    assert float(both.total[0, 0] + np.float64(both.error[0, 0])) == 2**24 + 2


def test_nothing_of_compensated_moments_is_compensated(xp: ModuleType) -> None:
    one = to_library(xp, np.ones((2, 2)), "float32")
    zero = Moments(one, 3, one).zero()
    assert zero.count == 0
    assert zero.error is not None
    np.testing.assert_array_equal(to_numpy(zero.error), np.zeros((2, 2)))
    assert Moments(one, 3).zero().error is None


def test_sums_in_float64_are_not_compensated(xp: ModuleType) -> None:
    needs_float64(xp)
    for dtype in ("float32", "float64"):
        assert second_moment(to_library(xp, np.ones((2, 2)), dtype)).error is None


def test_sum_and_plus_combine(xp: ModuleType) -> None:
    parts = [second_moment(to_library(xp, tokens_of(k, 4, 3), "float32")) for k in range(3)]
    whole = combine(combine(parts[0], parts[1]), parts[2])
    for summed in (sum(parts), parts[0] + parts[1] + parts[2]):
        assert isinstance(summed, Moments)
        assert summed.count == 12
        np.testing.assert_array_equal(to_numpy(summed.total), to_numpy(whole.total))
    for other in (1, 0.0, None, parts[0].total):
        with pytest.raises(TypeError, match="a must be Moments"):
            parts[0].__radd__(other)


def test_the_rounding_unit_is_that_of_the_gram_matrices_and_the_coarsest_stays(
    xp: ModuleType,
) -> None:
    single = second_moment(to_library(xp, np.ones((3, 2)), "float32"))
    assert single.unit == 2.0**-23
    assert combine(single, Moments(single.total, 1)).unit == single.unit
    if libraries.has_dtype("float64"):
        double = second_moment(to_library(xp, np.ones((3, 2)), "float64"))
        assert double.unit == 2.0**-52
        assert (double + single).unit == (single + double).unit == single.unit
        assert (single.zero() + double).unit == double.unit
        # A mean in float32 is as coarse as one that was formed in it.
        for coarse in (single, to_library(xp, np.ones((2, 2)), "float32")):
            history = remember(remember(None, double), coarse)
            assert history.unit == remember(history, double).unit == single.unit
        assert remember(None, double).unit == double.unit
    assert History(single.total, 1.0, 1.0).unit == 0


def test_units_that_are_arrays_are_compared(xp: ModuleType) -> None:
    one = to_library(xp, np.ones((2, 2)), "float32")
    units = [to_library(xp, np.asarray(u), "float32") for u in (1e-6, 3e-4, 2e-5)]
    whole = sum(Moments(one, 1, None, unit) for unit in units)
    assert isinstance(whole, Moments)
    assert float(whole.unit) == pytest.approx(3e-4)
    assert float(combine(whole, Moments(one, 1, None, 1e-3)).unit) == pytest.approx(1e-3)


def test_empty_batches_and_sets(xp: ModuleType) -> None:
    none = second_moment(to_library(xp, np.zeros((0, 3))))
    assert none.count == 0
    np.testing.assert_array_equal(to_numpy(none.mean), np.zeros((3, 3)))
    assert second_moment(to_library(xp, np.zeros((0, 4, 3)))).mean.shape == (0, 3, 3)


def test_overflow_is_refused_like_infinity(xp: ModuleType) -> None:
    with pytest.raises(ValueError, match="tokens"):
        second_moment(to_library(xp, np.full((3, 2), 1e25), "float32"))
    huge = second_moment(to_library(xp, np.full((3, 2), 1e16), "float32"))
    np.testing.assert_allclose(to_numpy(huge.total), 3e32, rtol=1e-6)


def test_zero_of_a_broken_sum_is_zero(xp: ModuleType) -> None:
    broken = Moments(to_library(xp, [[np.nan, np.inf], [np.inf, 1.0]]), 3)
    np.testing.assert_array_equal(to_numpy(broken.zero().mean), np.zeros((2, 2)))


def test_wrong_arguments(xp: ModuleType) -> None:
    for shape in ((2,), (3, 0)):
        with pytest.raises(ValueError, match="tokens must have shape"):
            second_moment(to_library(xp, np.ones(shape)))
    a, b = (second_moment(to_library(xp, np.eye(k))) for k in (2, 3))
    with pytest.raises(ValueError, match="different shapes"):
        combine(a, b)
    with pytest.raises(TypeError, match="b must be Moments"):
        combine(a, a.total)


def test_libraries_do_not_mix() -> None:
    with pytest.raises(TypeError, match="one library"):
        combine(second_moment(np.eye(2)), second_moment(strict.asarray(np.eye(2))))


def test_masked_and_foreign_dtypes_are_refused_in_one_line() -> None:
    masked = np.ma.masked_array(np.ones((3, 2)), mask=np.zeros((3, 2), dtype=bool))
    with pytest.raises(TypeError, match="mask"):
        second_moment(masked)
    foreign = pytest.importorskip("ml_dtypes")
    for dtype in (foreign.bfloat16, foreign.float8_e4m3fn):
        with pytest.raises(TypeError, match="real floating"):
            second_moment(np.ones((3, 2), dtype))


def test_checking_tokens_makes_no_copy_of_them() -> None:
    tokens = np.ones((4000, 500), np.float32)
    tracemalloc.start()
    try:
        second_moment(tokens)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 0.9 * tokens.nbytes


@pytest.mark.parametrize("made", [lambda x: second_moment(x), lambda x: remember(None, x.mT @ x)])
def test_a_factor_is_refused_and_not_taken_for_a_repetition(xp: ModuleType, made: Any) -> None:
    moments = made(to_library(xp, np.eye(3), "float32"))
    for product in (lambda: 2 * moments, lambda: moments * 2):
        with pytest.raises(TypeError, match="multiplied"):
            product()


@given(seed=seeds, dtype=dtypes)
def test_what_is_stored_comes_back_the_same(xp: ModuleType, seed: int, dtype: str) -> None:
    x = to_library(xp, tokens_of(seed, 7, 3), dtype)
    moments = second_moment(x) + second_moment(x)
    history = remember(remember(None, moments), moments, weight=3.0, decay=0.5)
    for whole in (moments, history):
        file = io.BytesIO()
        arrays: dict[str, Any] = {n: to_numpy(a) for n, a in whole.to_arrays().items()}
        np.savez(file, **arrays)
        stored = np.load(io.BytesIO(file.getvalue()))
        for again in (type(whole).from_arrays(stored), type(whole).from_arrays(whole.to_arrays())):
            assert type(again) is type(whole)
            for name, field in zip(whole._fields, whole, strict=True):
                if field is not None:
                    np.testing.assert_array_equal(to_numpy(getattr(again, name)), to_numpy(field))
            assert again.unit == moments.unit
    assert isinstance(Moments.from_arrays(moments.to_arrays()).count, int)


def test_stored_arrays_that_do_not_fit_are_refused() -> None:
    arrays = second_moment(np.eye(2)).to_arrays()
    with pytest.raises(ValueError, match="weight"):
        Moments.from_arrays(arrays | {"weight": np.ones(())})
    with pytest.raises(ValueError, match="square"):
        Moments.from_arrays(arrays | {"total": np.ones((2, 3))})
    with pytest.raises(ValueError, match="count"):
        Moments.from_arrays({"total": arrays["total"]})


@pytest.mark.jax
@pytest.mark.parametrize("x64", [False, True])
def test_moments_are_carried_through_compiled_loops(x64: bool) -> None:
    """With their unit; and with a count that is right, or stops and says so."""
    jax = pytest.importorskip("jax")
    with jax.enable_x64(x64):
        x = jax.numpy.asarray(tokens_of(0, 24, 3).astype(np.float32).reshape(4, 6, 3))
        add = jax.jit(lambda m, batch: (combine(m, second_moment(batch, check=False)), None))
        moments, _ = jax.lax.scan(add, second_moment(x[0]).zero(), x)
        assert int(moments.count) == 24
        assert float(moments.unit) == 2.0**-23
        whole = second_moment(x.reshape(24, 3))
        np.testing.assert_allclose(np.asarray(moments.mean), np.asarray(whole.mean), atol=1e-6)
        many = moments._replace(count=jax.numpy.asarray(2**31 - 10))
        for _ in range(3):
            many, _ = add(many, x[0])
        if x64:
            assert int(many.count) == 2**31 + 8
        assert bool(np.isnan(np.asarray(many.mean)).all()) == (not x64)
        stacked = jax.vmap(lambda t: second_moment(t, check=False))(x)
        np.testing.assert_allclose(
            np.asarray(stacked.mean[2]), np.asarray(second_moment(x[2]).mean), atol=1e-6
        )
        if not x64:
            with pytest.raises(ValueError, match="count"):
                whole._replace(count=2**40).to_arrays()


# Histories


def test_histories_of_different_tasks_add_up(xp: ModuleType) -> None:
    tasks = [second_moment(to_library(xp, tokens_of(k, 5, 3), "float32")) for k in range(3)]
    apart = [remember(None, tasks[0], weight=2.0), remember(remember(None, tasks[1]), tasks[2])]
    whole = remember(remember(remember(None, tasks[0], weight=2.0), tasks[1]), tasks[2])
    for added in (apart[0] + apart[1], sum(apart)):
        assert isinstance(added, History)
        np.testing.assert_allclose(to_numpy(added.total), to_numpy(whole.total), rtol=1e-6)
        assert (added.weight, added.squares) == (whole.weight, whole.squares)
        assert added.unit == whole.unit
    with pytest.raises(TypeError, match="History"):
        apart[0] + tasks[0]
    with pytest.raises(ValueError, match="shape"):
        apart[0] + remember(None, to_library(xp, np.eye(2), "float32"))


@settings(max_examples=15)
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
    with pytest.raises(TypeError, match="history must be"):
        remember(m, m)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="at least one moment"):
        remember(None)
    with pytest.raises(ValueError, match="one shape"):
        remember(remember(None, m), to_library(xp, np.eye(3), "float32"))
    with pytest.raises(ValueError, match=r"moments\[1\] must be symmetric"):
        remember(None, m, to_library(xp, [[1.0, 2.0], [0.0, 1.0]], "float32"))


def test_a_broken_moment_among_many_is_named(xp: ModuleType) -> None:
    moments = [to_library(xp, np.eye(2), "float32")] * 24
    moments[21] = to_library(xp, [[1.0, 2.0], [0.0, 1.0]], "float32")
    moments[22] = moments[22] * float("nan")
    with pytest.raises(ValueError, match=r"^moments\[21\] must be symmetric"):
        remember(None, *moments)
    moments[21] = moments[0]
    with pytest.raises(ValueError, match=r"^moments\[22\] holds NaN"):
        remember(None, *moments)


def test_the_rounding_unit_is_that_of_the_coarsest_gram_matrix(xp: ModuleType) -> None:
    single = to_library(xp, np.ones(2), "float32")
    assert rounding_unit() == rounding_unit(single) == np.finfo(np.float32).eps
    if widest_dtype(xp) == "float64":
        double = to_library(xp, np.ones(2), "float64")
        assert rounding_unit(double) == np.finfo(np.float64).eps
        assert rounding_unit(double, single, double) == np.finfo(np.float32).eps
    half = getattr(xp, "bfloat16", getattr(xp, "float16", None))
    if half is not None:  # Gram matrices of halves are formed in float32
        assert rounding_unit(xp.asarray([1.0], dtype=half)) == np.finfo(np.float32).eps
    with pytest.raises(TypeError, match="real floating"):
        rounding_unit(single, to_library(xp, [1, 2], "int64"))


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_moments_of_one_task_are_added_after_one_decay(xp: ModuleType, decay: float) -> None:
    """Bit for bit the sum β S + S₁ + S₂ from left to right; the task weighs double."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 3, 5, 4))
    moments = np.einsum("tkni,tknj->tkij", x, x)
    tasks = [[to_library(xp, m, "float32") for m in task] for task in moments]
    history = remember(remember(None, *tasks[0]), *tasks[1], decay=decay)
    wide = np.dtype(widest_dtype(xp))
    a, b, c, d, e, f = (to_numpy(m).astype(wide) for task in tasks for m in task)
    expected = (((wide.type(decay) * ((a + b) + c)) + d) + e) + f
    np.testing.assert_array_equal(to_numpy(history.total), expected)
    assert history.weight == 3 * decay + 3
    assert history.squares == 9 * decay**2 + 9
    # The number of tasks counts, not that of their moments.
    assert remember(remember(None, *tasks[0]), *tasks[1]).effective_tasks == 2
