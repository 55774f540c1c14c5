"""Derivatives in PyTorch and JAX: of the recalibration, and none of the bases.

The oracle is the closed form, differentiated by central differences in NumPy.
"""

from typing import Any

import libraries
import numpy as np
import pytest
from strategies import Matrix, from_spectrum, orthogonal

from loda_math import (
    general_solution,
    isolated_solution,
    null_solution,
    rank_for,
    recalibration,
    trace_ratio_solution,
)
from loda_math._arrays import namespace
from loda_math.verify import verify_subspace

FORMS = ("full", "diagonal", "direction", "scalar", "box")


def gradients(library: str, function: Any, *arrays: Any) -> list[Matrix]:
    """Derivatives of a scalar function with respect to all its arguments."""
    with libraries.opened(library) as xp:
        given = [xp.asarray(a, dtype=xp.float64) for a in arrays]
        if library == "jax":
            import jax

            return [np.asarray(g) for g in jax.grad(function, tuple(range(len(given))))(*given)]
        leaves = [a.requires_grad_() for a in given]
        found = xp.autograd.grad(function(*leaves), leaves, allow_unused=True)
        return [
            np.zeros(a.shape) if g is None else g.numpy()
            for a, g in zip(arrays, found, strict=True)
        ]


def closed_form(down: Matrix, new: Matrix, old: Matrix, gamma: Any) -> Matrix:
    p, q = down @ old @ down.T, down @ new @ down.T
    return gamma * q @ np.linalg.pinv(p + gamma * q, rcond=1e-9, hermitian=True)


def slope(function: Any, step: float = 1e-5) -> float:
    return float((function(step) - function(-step)) / (2 * step))


SPECTRA = {
    "apart": ([4.0, 2.0, 1.0, 0.5, 0.1], [1.0, 3.0, 0.2, 0.3, 2.0]),
    "tied": ([1.0] * 5, [1.0] * 5),
    "nearly tied": ([1.0, 1 + 1e-13, 1 - 1e-12, 1.0, 1.0], [1.0, 1.0, 1 + 1e-12, 1.0, 1.0]),
    "none for the old task": ([4.0, 2.0, 2.0, 1.0, 1.0], [0.0] * 5),
    "none for the new task": ([0.0] * 5, [4.0, 2.0, 2.0, 1.0, 1.0]),
    "apart in space": ([1.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]),
}


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_full_form_has_the_derivative_of_the_closed_form(library: str, spectrum: str) -> None:
    rng = np.random.default_rng(3)
    q = orthogonal(5, rng)
    new, old = (from_spectrum(np.asarray(values), q) for values in SPECTRA[spectrum])
    down, probe = np.linalg.qr(rng.standard_normal((5, 3)))[0].T, rng.standard_normal((3, 3))
    up, gamma = rng.standard_normal((2, 3)), 1.5

    def probed(a: Any, n: Any, o: Any, g: Any) -> Any:
        xp = namespace(a=a)
        b, weight = (xp.asarray(x, dtype=xp.float64) for x in (up, probe))
        return xp.sum(weight * recalibration(b, a, n, o, g))

    found = gradients(library, probed, down, new, old, gamma)
    point = (down, new, old, np.asarray(gamma))
    for place, (x, gradient) in enumerate(zip(point, found, strict=True)):
        change = rng.standard_normal(x.shape)
        if place in (1, 2):
            change = change @ change.T  # moments stay symmetric and semi-definite
        if not np.any(x):
            continue  # a zero moment can only grow

        def moved(t: float, place: int = place, change: Matrix = change) -> float:
            arrays = [a + t * change if i == place else a for i, a in enumerate(point)]
            return float(np.sum(probe * closed_form(*arrays)))

        assert np.sum(gradient * change) == pytest.approx(slope(moved), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_has_a_derivative(library: str, form: str) -> None:
    rng = np.random.default_rng(1)
    up, down, probe = (rng.standard_normal(shape) for shape in ((2, 4), (4, 6), (4, 4)))
    new, old = (x.T @ x for x in rng.standard_normal((2, 9, 6)))

    def probed(b: Any, a: Any, n: Any, o: Any) -> Any:
        xp = namespace(a=a)
        weight = xp.asarray(probe, dtype=xp.float64)
        return xp.sum(weight * recalibration(b, a, n, o, 1.5, form))  # type: ignore[arg-type]

    found = gradients(library, probed, up, down, new, old)
    point = (up, down, new, old)
    for place, gradient in enumerate(found):
        change = rng.standard_normal(point[place].shape)
        change = change @ change.T if place > 1 else change

        def moved(t: float, place: int = place, change: Matrix = change) -> float:
            return float(
                probed(*(a + t * change if i == place else a for i, a in enumerate(point)))
            )

        assert np.sum(gradient * change) == pytest.approx(slope(moved, 1e-6), rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("form", FORMS)
def test_equal_energies_give_the_derivative_of_one_direction(library: str, form: str) -> None:
    eye, gamma = np.eye(3), 1.5

    def weight(n: Any) -> Any:
        xp = namespace(n=n)
        one = xp.eye(3, dtype=xp.float64)
        return xp.linalg.trace(recalibration(one, one, n, one, gamma, form))  # type: ignore[arg-type]

    (found,) = gradients(library, weight, eye)
    np.testing.assert_allclose(found, gamma / (1 + gamma) ** 2 * eye, atol=1e-14)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_dead_directions_may_turn(library: str) -> None:
    """Both moments turn together; their shared null space turns with them."""
    values, probe = ([2.0, 1.0, 0.0], [1.0, 3.0, 0.0]), np.arange(9.0).reshape(3, 3)
    axis = np.asarray([[0.0, 0, 1], [0, 0, 0], [-1, 0, 0]])

    def turned(xp: Any, t: Any, constant: Any) -> Any:
        one, k = constant(np.eye(3)), constant(axis)
        turn = one + xp.sin(t) * k + (1 - xp.cos(t)) * k @ k
        return one, *(turn @ constant(np.diag(x)) @ turn.mT for x in values)

    def probed(t: Any) -> Any:
        xp = namespace(t=t)
        constant = lambda x: xp.asarray(x, dtype=xp.float64)  # noqa: E731
        one, old, new = turned(xp, t, constant)
        return xp.sum(constant(probe) * recalibration(one, one, new, old, 1.5))

    def exact(t: float) -> float:
        one, old, new = turned(namespace(t=np.ones(1)), np.asarray(t), np.asarray)
        return float(np.sum(probe * closed_form(one, new, old, 1.5)))

    (found,) = gradients(library, probed, 0.3)
    assert float(found) == pytest.approx(slope(lambda t: exact(0.3 + t)), rel=1e-7)


@pytest.mark.parametrize("library", ["torch", "jax"])
@pytest.mark.parametrize("form", FORMS)
def test_no_energy_gives_no_derivative(library: str, form: str) -> None:
    def total(b: Any, a: Any, n: Any, o: Any) -> Any:
        return recalibration(b, a, n, o, 1.5, form).sum()  # type: ignore[arg-type]

    for new, old in ((np.zeros((4, 4)),) * 2, (np.diag([1.0, 2, 0, 0]), np.diag([3.0, 1, 0, 0]))):
        for g in gradients(library, total, np.ones((2, 3)), np.eye(4)[:3], new, old):
            assert np.all(np.isfinite(g))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch warns of itself
@pytest.mark.parametrize("library", ["torch", "jax"])
def test_derivatives_of_second_order_and_forward(library: str) -> None:
    """Λ = γ / (1 + γ) where P = Q, and what a transformation of functions makes of it."""
    with libraries.opened(library) as xp:
        one = xp.eye(2, dtype=xp.float64)
        part = lambda g: recalibration(one, one, one, one, g)[0, 0]  # noqa: E731
        g = xp.asarray(1.5, dtype=xp.float64)
        if library == "jax":
            import jax

            first, second = jax.grad(part), jax.grad(jax.grad(part))
            forward = jax.jit(lambda g: jax.jvp(part, (g,), (xp.ones_like(g),))[1])
        else:
            first, second = xp.func.grad(part), xp.func.grad(xp.func.grad(part))
            forward = lambda g: xp.func.jvp(part, (g,), (xp.ones_like(g),))[1]  # noqa: E731
        for function, expected in ((first, 2.5**-2), (forward, 2.5**-2), (second, -2 * 2.5**-3)):
            assert float(function(g)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_bases_are_constants(library: str) -> None:
    rng = np.random.default_rng(0)
    new, old = (x.T @ x for x in rng.standard_normal((2, 9, 4)))
    solvers = (
        lambda n, o: general_solution(n, o, 2),
        lambda n, o: isolated_solution(n, o, 2),
        lambda n, o: trace_ratio_solution(n, o, 2),
        lambda n, o: null_solution(o, 2),
        lambda n, o: rank_for(n, o, 0.5),
        lambda n, o: verify_subspace(0 * n[:, :2] + 1, n, o, "isolated"),
    )
    for solve in solvers:

        def tied(n: Any, o: Any, solve: Any = solve) -> Any:
            fields = [x for x in solve(n, o) if "float" in str(x.dtype)]
            # The sum of the moments leaves the library something to differentiate.
            return sum(x.sum() for x in fields) + (n + o).sum()

        for gradient in gradients(library, tied, new, old):
            np.testing.assert_array_equal(gradient, np.ones((4, 4)))
