"""Energies against their definitions on tokens, and Theorem 2.1 against finite steps."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64
from strategies import dtype_name, dtypes, moment, orthogonal, pencils, seeds, to_library, to_numpy

from loda_math import (
    energy_ratio,
    first_order_update,
    heldout_ratio,
    isolated_subspace,
    projection_energy,
    relative_energy,
)

RTOL = {"float32": 1e-5, "float64": 1e-10}


@given(seed=seeds, dtype=dtypes, rank=st.integers(1, 4))
def test_energy_is_the_mean_square_of_the_projections(
    xp: ModuleType, seed: int, dtype: str, rank: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens, basis = rng.standard_normal((9, 4)), orthogonal(4, rng)[:, :rank]
    u, s = to_library(xp, basis, dtype), to_library(xp, tokens.T @ tokens / 9, dtype)
    direct = np.mean(np.sum((tokens @ basis) ** 2, axis=1))
    share = direct / np.mean(np.sum(tokens**2, axis=1))
    assert float(projection_energy(u, s)) == pytest.approx(direct, rel=RTOL[dtype])
    assert float(relative_energy(u, s)) == pytest.approx(share, rel=RTOL[dtype])
    assert dtype_name(projection_energy(u, s)) == dtype_name(relative_energy(u, s)) == dtype


@given(pencil=pencils(), seed=seeds, dtype=dtypes)
def test_orthogonal_bases_add_up_to_the_trace(
    xp: ModuleType, pencil: tuple, seed: int, dtype: str
) -> None:
    new, _, rank = pencil
    q = orthogonal(len(new), np.random.default_rng(seed))
    s, trace = to_library(xp, new, dtype), np.trace(new)
    parts = [projection_energy(to_library(xp, p, dtype), s) for p in (q[:, :rank], q[:, rank:])]
    assert sum(float(p) for p in parts) == pytest.approx(trace, rel=RTOL[dtype])
    whole = relative_energy(to_library(xp, q, dtype), s)
    assert float(whole) == pytest.approx(1.0, rel=RTOL[dtype])


@given(pencil=pencils(), seed=seeds)
def test_ky_fan_bounds(xp: ModuleType, pencil: tuple, seed: int) -> None:
    new, _, rank = pencil
    u = to_library(xp, orthogonal(len(new), np.random.default_rng(seed))[:, :rank])
    energy = float(projection_energy(u, to_library(xp, new)))
    values = np.linalg.eigvalsh(new)
    slack = 1e-12 * values[-1]
    assert values[:rank].sum() - slack <= energy <= values[-rank:].sum() + slack
    assert -1e-12 <= float(relative_energy(u, to_library(xp, new))) <= 1 + 1e-12


@given(pencil=pencils(kinds=("random", "spiked")), exponent=st.integers(-90, 90), seed=seeds)
def test_scale(xp: ModuleType, pencil: tuple, exponent: int, seed: int) -> None:
    new, old, rank = pencil
    scale = 2.0**exponent
    u = to_library(xp, orthogonal(len(new), np.random.default_rng(seed))[:, :rank], "float32")
    n, o = (to_library(xp, m, "float32") for m in (new, old))
    n, scaled = to_library(xp, to_numpy(n)), to_library(xp, to_numpy(n) * scale)
    o = to_library(xp, to_numpy(o))
    assert float(projection_energy(u, scaled)) == float(projection_energy(u, n)) * scale
    assert float(relative_energy(u, scaled)) == float(relative_energy(u, n))
    assert float(energy_ratio(u, scaled, o)) == float(energy_ratio(u, n, o))
    assert float(energy_ratio(u, n, n)) == 1.0


@given(new=moment(5, ("random",)), old=moment(5, ("random",)), seed=seeds, dtype=dtypes)
def test_ratio_is_the_quotient_of_shares(
    xp: ModuleType, new: np.ndarray, old: np.ndarray, seed: int, dtype: str
) -> None:
    u, n, o = (
        to_library(xp, x, dtype)
        for x in (orthogonal(5, np.random.default_rng(seed))[:, :2], new, old)
    )
    quotient = float(relative_energy(u, n)) / float(relative_energy(u, o))
    ratio = energy_ratio(u, n, o)
    assert float(ratio) == pytest.approx(quotient, rel=RTOL[dtype])
    assert float(energy_ratio(u, o, n)) == pytest.approx(1 / quotient, rel=RTOL[dtype])
    assert dtype_name(ratio) == dtype


def test_ratio_without_energy(xp: ModuleType) -> None:
    first = to_library(xp, [[1.0], [0.0]])
    one, other, none = (to_library(xp, np.diag(d)) for d in ([1.0, 0.0], [0.0, 1.0], [0.0, 0.0]))
    assert float(energy_ratio(first, one, other)) == np.inf
    assert float(energy_ratio(first, one, none)) == np.inf
    assert float(energy_ratio(first, other, one)) == 0.0
    assert np.isnan(float(energy_ratio(first, other, other)))
    assert np.isnan(float(energy_ratio(first, none, none)))
    assert float(relative_energy(first, none)) == 0.0
    assert float(projection_energy(first * 0, one)) == 0.0


def test_a_small_layer_beside_a_large_one_has_energy_of_its_own(xp: ModuleType) -> None:
    """What counts as rounding of one layer says nothing about another."""
    new, old = (np.stack([1e18 * np.diag(d), np.diag(d)]) for d in ([1.0, 2, 3], [3.0, 2, 1]))
    basis = np.stack([np.eye(3)[:, :1]] * 2)
    ratio = energy_ratio(*(to_library(xp, x, "float32") for x in (basis, new, old)))
    np.testing.assert_allclose(to_numpy(ratio), 1 / 3, rtol=1e-5)


def test_bases_and_moments_broadcast(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 3, 6, 4))
    moments = (np.einsum("...ni,...nj->...ij", t, t) for t in (x, y))
    u, s, o = (to_library(xp, m, "float32") for m in (rng.standard_normal((2, 3, 4, 2)), *moments))
    at = (1, 2, ...)
    for basis, m in ((u[0, 0, :, :], s), (u, s[0, 0, :, :])):
        one = [x[at] if x.ndim == 4 else x for x in (basis, m)]
        for function in (projection_energy, relative_energy):
            many = function(basis, m)
            assert many.shape == (2, 3)
            assert float(many[at]) == pytest.approx(float(function(*one)), rel=1e-5)
    ratio = energy_ratio(u[0, 0, :, :], s, o)
    assert float(ratio[at]) == pytest.approx(
        float(energy_ratio(u[0, 0, :, :], s[at], o[at])), rel=1e-5
    )


# The held-out ratio


@settings(max_examples=10)
@given(seed=seeds)
def test_each_half_judges_the_other(xp: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2, 7, 4))
    moments = np.einsum("k...ni,k...nj->k...ij", x, x) / 7
    a, b, old = (to_library(xp, m, "float32") for m in moments)
    choose = lambda n, o: isolated_subspace(n, o, 2)  # noqa: E731
    ratio = heldout_ratio(choose, a, b, old)
    u, v = choose(a, old), choose(b, old)
    for ours, terms in (
        (ratio.chosen, (energy_ratio(u, a, old), energy_ratio(v, b, old))),
        (ratio.heldout, (energy_ratio(u, b, old), energy_ratio(v, a, old))),
        (ratio.energy, (relative_energy(u, b), relative_energy(v, a))),
    ):
        assert ours.shape == (2,)
        np.testing.assert_allclose(
            to_numpy(ours), np.mean([to_numpy(t) for t in terms], axis=0), rtol=1e-6
        )
    # The halves take part alike.
    other = heldout_ratio(choose, b, a, old)
    np.testing.assert_allclose(to_numpy(other.heldout), to_numpy(ratio.heldout), rtol=1e-6)


def test_few_images_make_the_choice_optimistic(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    size, images = 30, 20
    old = np.eye(size)
    a, b = (x.T @ x / images for x in rng.standard_normal((2, images, size)))
    # Nothing distinguishes the tasks: the ratio to expect is 1.
    arrays = [to_library(xp, m, "float32") for m in (a, b, old)]
    ratio = heldout_ratio(lambda n, o: isolated_subspace(n, o, 3), *arrays)
    assert float(ratio.chosen) > 3
    assert float(ratio.heldout) == pytest.approx(1, abs=0.4)


# Theorem 2.1


@st.composite
def steps(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Tokens, down-projection, gradient and step size, some of them degenerate."""
    rng = np.random.default_rng(draw(seeds))
    n, d, r, o = (draw(st.integers(1, 6)) for _ in range(4))
    tokens = rng.standard_normal((n, d)) * draw(st.sampled_from([1e-3, 1.0, 1e3]))
    grad = rng.standard_normal((n, o))
    if draw(st.booleans()):
        grad = np.outer(grad[:, 0], grad[0])
    if draw(st.booleans()):
        tokens = tokens[:, :1] * np.ones((1, d))
    return tokens, rng.standard_normal((r, d)), grad, draw(st.sampled_from([0.0, 1e-3, 2.0]))


@given(args=steps(), dtype=dtypes)
def test_first_order_update_is_the_gradient_step(xp: ModuleType, args: tuple, dtype: str) -> None:
    arrays = [to_library(xp, a, dtype) for a in args[:3]]
    update = first_order_update(*arrays, args[3])
    tokens, down, grad = (to_numpy(a) for a in arrays)
    # Any loss with this gradient will do; the slopes of a linear one are its values.
    loss = lambda up: np.sum(grad * (tokens @ (up @ down).T))  # noqa: E731
    shape = (grad.shape[1], len(down))
    units = np.eye(shape[0] * shape[1]).reshape(-1, *shape)
    stepped = -args[3] * np.asarray([loss(unit) for unit in units]).reshape(shape)
    output = tokens @ (stepped @ down).T
    change = np.sum(grad * output)
    scale = args[3] * (np.linalg.norm(tokens @ down.T) * np.linalg.norm(grad)) ** 2
    rtol = RTOL[dtype]
    np.testing.assert_allclose(
        to_numpy(update.output), output, rtol=rtol, atol=rtol * np.abs(output).max()
    )
    assert float(update.loss) == pytest.approx(change, rel=rtol, abs=1e-14 * scale)
    assert dtype_name(update.output) == dtype_name(update.loss) == dtype_name(update.upper) == dtype


@given(args=steps())
def test_theorem_2_1_sandwich(xp: ModuleType, args: tuple) -> None:
    update = first_order_update(*(to_library(xp, a) for a in args[:3]), args[3])
    tokens, down, grad, step = args
    gate = tokens @ down.T
    singular = np.linalg.svd(grad, compute_uv=False)
    smallest = singular[-1] if grad.shape[1] >= len(grad) else 0.0
    lower = step * smallest**2 * np.sum(gate**2)
    upper = step * min(
        singular[0] ** 2 * np.sum(gate**2),
        np.sum(grad**2) * np.linalg.norm(gate, 2) ** 2,
    )
    drop, slack = -float(update.loss), 1e-12 * upper
    assert float(update.lower) - slack <= drop <= float(update.upper) + slack
    assert float(update.upper) == pytest.approx(upper, rel=1e-9)
    assert float(update.lower) == pytest.approx(lower, rel=1e-9, abs=slack)


@given(seed=seeds, size=st.integers(1, 5))
def test_the_bound_is_reached_by_rank_one(xp: ModuleType, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    column = rng.standard_normal((size, 1))
    tokens = column @ rng.standard_normal((1, 3))
    grad = column @ rng.standard_normal((1, 2))
    arrays = [to_library(xp, a) for a in (tokens, rng.standard_normal((2, 3)), grad)]
    update = first_order_update(*arrays, 0.1)
    assert float(update.upper) == pytest.approx(-float(update.loss), rel=1e-9)


@given(seed=seeds, size=st.integers(1, 5))
def test_the_lower_bound_is_reached_by_equal_gradients(
    xp: ModuleType, seed: int, size: int
) -> None:
    """A gradient with equal singular values passes all the energy of the gate on."""
    rng = np.random.default_rng(seed)
    tokens, down = rng.standard_normal((size, 3)), rng.standard_normal((2, 3))
    grad = 3 * np.linalg.qr(rng.standard_normal((size + 2, size)))[0].T
    update = first_order_update(*(to_library(xp, a) for a in (tokens, down, grad)), 0.1)
    expected = 0.1 * 9 * np.sum((tokens @ down.T) ** 2)
    for value in (update.lower, -update.loss):
        assert float(value) == pytest.approx(expected, rel=1e-9)


def test_updates_are_batched_like_a_loop(xp: ModuleType) -> None:
    rng = np.random.default_rng(1)
    x, a, g = (rng.standard_normal(s) for s in ((3, 5, 4), (2, 4), (3, 5, 6)))
    batched = first_order_update(*(to_library(xp, m) for m in (x, a, g)), 0.3)
    for i in range(3):
        one = first_order_update(*(to_library(xp, m) for m in (x[i], a, g[i])), 0.3)
        for whole, part in zip(batched, one, strict=True):
            np.testing.assert_allclose(to_numpy(whole)[i], to_numpy(part), rtol=1e-12)


def test_large_float32_activations_do_not_overflow(xp: ModuleType) -> None:
    needs_float64(xp)
    arrays = [to_library(xp, m, "float32") for m in (np.full((2, 2), 1e25), np.eye(2), np.eye(2))]
    update = first_order_update(*arrays, 1e-20)
    assert float(update.loss) == pytest.approx(-4e30, rel=1e-5)


def test_shapes_of_updates(xp: ModuleType) -> None:
    x, a, g = (to_library(xp, np.ones(s)) for s in ((3, 2), (1, 2), (3, 4)))
    for wrong in ((g, a, g), (x, a, x[:2, :]), (x, a[0, :], g), (x[:0, :], a, g[:0, :])):
        with pytest.raises(ValueError, match="shapes must be"):
            first_order_update(*wrong, 0.1)
    none = first_order_update(x[None, :, :][:0, :, :], a, g[None, :, :][:0, :, :], 0.1)
    assert none.output.shape == (0, 3, 4)
