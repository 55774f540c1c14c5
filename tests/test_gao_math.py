"""Class splits, lookahead and gradient agreement against their definitions."""

from types import ModuleType

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from strategies import EPS, dtype_name, dtypes, seeds, to_library, to_numpy

import loda_math as lm
from loda_math import (
    class_split,
    gradient_alignment,
    lookahead,
    project_conflict,
    undo_lookahead,
)

SHAPES = ((3,), (2, 4), (), (1, 2, 3))


def gradients(seed: int, scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.standard_normal(shape) * scale) for shape in SHAPES]


def to_lists(xp: ModuleType, arrays: list[np.ndarray], dtype: str) -> list:
    return [to_library(xp, a, dtype) for a in arrays]


def flat(arrays: list) -> np.ndarray:
    return np.concatenate([np.ravel(to_numpy(a)) for a in arrays])


# class_split


@given(
    labels=st.lists(st.integers(-3, 6), max_size=12),
    extra=st.sets(st.integers(7, 9)),
    seed=seeds,
)
def test_split_is_a_partition_by_class(
    xp: ModuleType, labels: list[int], extra: set[int], seed: int
) -> None:
    classes = sorted(set(labels) | extra | ({0} if not labels else set()))
    order = np.random.default_rng(seed).permutation(classes)
    first, second = class_split(
        to_library(xp, np.asarray(labels, dtype=np.int64), "int"), to_library(xp, order, "int")
    )
    assert dtype_name(first) == dtype_name(second) == "bool"
    first, second = to_numpy(first), to_numpy(second)
    np.testing.assert_array_equal(first, ~second)
    chosen = set(order[: max(1, len(classes) // 2)])
    assert {label for label, here in zip(labels, first, strict=True) if here} <= chosen
    assert not chosen & {label for label, here in zip(labels, second, strict=True) if here}


def test_split_with_one_class_leaves_the_second_half_empty(xp: ModuleType) -> None:
    first, second = class_split(xp.asarray([4, 4, 4]), xp.asarray([4]))
    assert to_numpy(first).all()
    assert not to_numpy(second).any()


def test_split_refuses_wrong_labels(xp: ModuleType) -> None:
    labels, order = xp.asarray([1, 2, 2]), xp.asarray([2, 1])
    for permutation in ([2, 2, 1], [2, 3], [1]):
        with pytest.raises(ValueError, match="permutation must hold every"):
            class_split(labels, xp.asarray(permutation))
    for error, words, pair in (
        (ValueError, "permutation is empty", (labels, order[:0])),
        (ValueError, "labels must have one axis", (labels[None, :], order)),
        (ValueError, "permutation must have one axis", (labels, order[:, None])),
        (TypeError, "labels must be integers", (xp.asarray([1.0, 2.0]), order)),
        (TypeError, "permutation must be integers", (labels, order == 1)),
        (TypeError, "permutation must be an array", (labels, [2, 1])),
        (TypeError, "labels must be an array", ([1, 2, 2], order)),
    ):
        with pytest.raises(error, match=rf"^{words}"):
            class_split(*pair)


# lookahead


@given(
    seed=seeds,
    dtype=dtypes,
    radius=st.sampled_from([0.0, 1e-3, 0.3, 5.0]),
    power=st.sampled_from([-30, -8, 0, 8, 30]),
)
def test_every_tensor_moves_by_the_radius(
    xp: ModuleType, seed: int, dtype: str, radius: float, power: int
) -> None:
    params = to_lists(xp, gradients(seed), dtype)
    raw = gradients(seed + 1)
    moved = lookahead(params, to_lists(xp, [g * 10.0**power for g in raw], dtype), radius)
    for p, q, g in zip(params, moved, raw, strict=True):
        assert dtype_name(q) == dtype
        assert q.shape == p.shape
        shift = to_numpy(q) - to_numpy(p)
        # The same direction and length whatever the size of the gradient.
        exact = -radius * g / np.linalg.norm(g)
        np.testing.assert_allclose(shift, exact, atol=20 * EPS[dtype] * (radius + 5))


def test_zero_gradients_move_nothing(xp: ModuleType) -> None:
    params = to_lists(xp, gradients(0), "float32")
    grads = [p * 0 for p in params]
    grads[0] = params[0]
    moved = lookahead(params, grads, 0.5)
    for p, q in zip(params[1:], moved[1:], strict=True):
        np.testing.assert_array_equal(to_numpy(q), to_numpy(p))
    assert not np.array_equal(to_numpy(moved[0]), to_numpy(params[0]))


@given(seed=seeds)
def test_lookahead_lowers_a_smooth_loss_to_first_order(xp: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    a, point, radius = rng.standard_normal((6, 4)), rng.standard_normal(4), 1e-5
    grad = a.T @ scipy.special.softmax(a @ point)  # of logsumexp(a x)
    (moved,) = lookahead([to_library(xp, point)], [to_library(xp, grad)], radius)
    drop = scipy.special.logsumexp(a @ to_numpy(moved)) - scipy.special.logsumexp(a @ point)
    assert drop == pytest.approx(-radius * np.linalg.norm(grad), rel=1e-3)


@given(seed=seeds, radius=st.floats(0, 10), dtype=dtypes)
def test_the_shift_is_taken_off_and_the_step_is_kept(
    xp: ModuleType, seed: int, radius: float, dtype: str
) -> None:
    before, grads, steps = (to_lists(xp, gradients(seed + i), dtype) for i in range(3))
    moved = lookahead(before, grads, radius)
    stepped = [m - s for m, s in zip(moved, steps, strict=True)]
    restored = undo_lookahead(stepped, before, moved)
    # As if the step had been taken where the parameters were.
    expected = flat(before) - flat(steps)
    slack = 8 * EPS[dtype] * (1 + radius + np.abs(flat(before)) + np.abs(flat(steps)))
    assert np.all(np.abs(flat(restored) - expected) <= slack)
    assert {dtype_name(x) for x in restored} == {dtype}
    with pytest.raises(ValueError, match="same shapes"):
        undo_lookahead(stepped, before, moved[:-1])
    with pytest.raises(ValueError, match="same shapes"):
        undo_lookahead(stepped[:-1], before, moved)


def test_empty_tensors_and_broken_gradients(xp: ModuleType) -> None:
    empty, one = to_library(xp, np.zeros((0, 2))), to_library(xp, np.ones(2))
    moved = lookahead([empty, one], [empty, one * np.nan], 0.1)
    assert moved[0].shape == (0, 2)
    assert np.isnan(to_numpy(moved[1])).all()
    assert float(gradient_alignment([empty, one], [empty, one])) == pytest.approx(1)
    assert float(gradient_alignment([empty], [empty])) == 0
    assert project_conflict([empty, one], [empty, -one])[0].shape == (0, 2)


# gradient_alignment


@given(
    seeds=st.tuples(seeds, seeds),
    dtype=dtypes,
    powers=st.tuples(*[st.sampled_from([-30, -3, 0, 30])] * 2),
)
def test_alignment_is_the_cosine_of_the_whole_list(
    xp: ModuleType, seeds: tuple[int, int], dtype: str, powers: tuple[int, int]
) -> None:
    u, v = gradients(seeds[0]), gradients(seeds[1])
    cosine = flat(u) @ flat(v) / np.linalg.norm(flat(u)) / np.linalg.norm(flat(v))
    a, b = (to_lists(xp, g, dtype) for g in (u, v))
    scaled = [
        to_lists(xp, [x * 10.0**p for x in g], dtype) for g, p in zip((u, v), powers, strict=True)
    ]
    slack = 20 * EPS[dtype]
    value = gradient_alignment(a, b)
    assert value.shape == ()
    assert -1 <= float(value) <= 1
    assert float(value) == pytest.approx(cosine, abs=slack)
    assert float(gradient_alignment(*scaled)) == pytest.approx(cosine, abs=slack)
    assert float(gradient_alignment(b, a)) == pytest.approx(float(value), abs=slack)
    assert 1 - slack <= float(gradient_alignment(a, scaled[0])) <= 1
    assert -1 <= float(gradient_alignment(a, [-x for x in a])) <= -1 + slack


def test_alignment_with_nothing_is_zero(xp: ModuleType) -> None:
    a = to_lists(xp, gradients(1), "float32")
    zero = [x * 0 for x in a]
    assert float(gradient_alignment(a, zero)) == float(gradient_alignment(zero, zero)) == 0.0


# project_conflict


@given(
    seeds=st.tuples(seeds, seeds),
    dtype=dtypes,
    power=st.sampled_from([-30, -3, 0, 30]),
    flip=st.booleans(),
)
def test_conflict_is_projected_away(
    xp: ModuleType, seeds: tuple[int, int], dtype: str, power: int, flip: bool
) -> None:
    u, v = gradients(seeds[0]), gradients(seeds[1])
    if flip:
        v = [-x for x in u]
    a, b = to_lists(xp, u, dtype), to_lists(xp, [x * 10.0**power for x in v], dtype)
    result = project_conflict(a, b)
    x, y, z = flat(a), flat(b) / 10.0**power, flat(result)
    slack = 50 * EPS[dtype] * np.linalg.norm(x)
    exact = x - min(0.0, x @ y) / (y @ y) * y
    np.testing.assert_allclose(z, exact, atol=slack)
    assert z @ y >= -slack * np.linalg.norm(y)
    assert np.linalg.norm(z) <= np.linalg.norm(x) + slack
    np.testing.assert_allclose(flat(project_conflict(result, b)), z, atol=slack)
    for p, q in zip(a, result, strict=True):
        assert dtype_name(q) == dtype
        assert q.shape == p.shape
    if x @ y >= 0:
        np.testing.assert_array_equal(z, x)


def test_agreement_and_zero_leave_the_gradient_alone(xp: ModuleType) -> None:
    a = to_lists(xp, gradients(1), "float32")
    for b in (a, [x * 0 for x in a], [x * 3 for x in a]):
        np.testing.assert_array_equal(flat(project_conflict(a, b)), flat(a))


# Lists


@pytest.mark.parametrize("name", ["lookahead", "gradient_alignment", "project_conflict"])
def test_lists_are_refused_under_their_names(xp: ModuleType, name: str) -> None:
    first, second = ("params", "grads") if name == "lookahead" else ("a", "b")

    def call(a: object, b: object) -> object:
        function = getattr(lm, name)
        return function(a, b, 0.1) if name == "lookahead" else function(a, b)

    one, whole = to_library(xp, np.ones(2), "float32"), xp.asarray([1, 2])
    for wrong, pair in ((first, (one, [one])), (second, ([one], {0: one}))):
        with pytest.raises(TypeError, match=rf"^{wrong} must be a list or tuple"):
            call(*pair)
    for bad, words in (
        (whole, "real floating"),
        ([1.0], "an array.*list"),
        (None, "an array.*None"),
    ):
        for wrong, pair in ((first, ([one, bad], [one, one])), (second, ([one, one], [one, bad]))):
            with pytest.raises(TypeError, match=rf"^{wrong}\[1\] must be {words}"):
                call(*pair)
    with pytest.raises(ValueError, match=rf"^{first} and {second} must hold at least one"):
        call([], [])
    for pair in (([one], [one[:1]]), ([one, one], [one])):
        with pytest.raises(ValueError, match=rf"^{first} and {second} .* same shapes"):
            call(*pair)
