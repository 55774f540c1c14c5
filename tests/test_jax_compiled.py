"""Every function of matrices under ``jax.jit`` of ``jax.vmap``: each field as NumPy finds it."""

from typing import Any

import libraries
import numpy as np
import pytest
from calls import ALL
from strategies import Matrix, from_spectrum, orthogonal, to_library, to_numpy

LAYERS, SIZE, RANK = 2, 4, 2
# Compiled and mapped in test_libraries, in both precisions.
THERE = {"recalibration_loss", "projection_energy", "relative_energy", "energy_ratio"}
THERE |= {"general_subspace", "isolated_subspace", "null_subspace"}
THERE |= {f"recalibration {form}" for form in ("full", "diagonal", "direction", "scalar")}


def matrices(name: str, rng: np.random.Generator) -> Matrix:
    """One argument, a matrix a layer; moments have clear gaps, so that bases are unique."""
    if name in ("new", "old", "moment"):
        spread = 2.0 ** -np.arange(SIZE)
        return np.stack([from_spectrum(spread, orthogonal(SIZE, rng)) for _ in range(LAYERS)])
    if name == "basis":
        return np.stack([orthogonal(SIZE, rng)[:, :RANK] for _ in range(LAYERS)])
    shapes = {"up": (3, RANK), "down": (RANK, SIZE), "coefficients": (RANK, RANK)}
    shapes |= {"tokens": (5, SIZE), "grad_output": (5, 2)}
    return rng.standard_normal((LAYERS, *shapes.get(name, (3, SIZE))))


def fields(result: Any) -> list[Any]:
    """The arrays of a result (a compiled count is an array, one a layer)."""
    return [x for x in result if hasattr(x, "shape")] if isinstance(result, tuple) else [result]


@pytest.mark.parametrize("library", ["jax"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in THERE])
def test_every_field_of_every_result(library: str, name: str) -> None:
    with libraries.opened(library) as jnp:
        import jax

        function, arguments = ALL[name]
        rng = np.random.default_rng(len(name))
        host = [matrices(a, rng) for a in arguments]
        if name == "second_moment":
            function = lambda x, second=function: second(x).total  # noqa: E731
        found = fields(jax.jit(jax.vmap(function))(*(to_library(jnp, x) for x in host)))
        layers = [fields(function(*(x[i] for x in host))) for i in range(LAYERS)]
        assert len(found) == len(layers[0])
        for i, expected in enumerate(zip(*layers, strict=True)):
            np.testing.assert_allclose(to_numpy(found[i]), np.stack(expected), atol=1e-9)
