"""Leading dimensions: every field of every result is what the layer alone gives."""

from collections.abc import Callable
from types import ModuleType

import libraries
import numpy as np
import pytest
from calls import ALL, call
from strategies import Matrix, orthogonal, to_library, to_numpy

D, RANK = 5, 2


def moment(rng: np.random.Generator) -> Matrix:
    x = rng.standard_normal((9, D))
    return x.T @ x


def normal(*shape: int) -> Callable[[np.random.Generator], Matrix]:
    return lambda rng: rng.standard_normal(shape)


MAKE = {
    **dict.fromkeys(("new", "old", "moment"), moment),
    **dict.fromkeys(("before", "after", "change", "gradient"), normal(3, D)),
    "basis": lambda rng: orthogonal(D, rng)[:, :RANK],
    "up": normal(3, RANK),
    "down": normal(RANK, D),
    "tokens": normal(4, D),
    "grad_output": normal(4, 2),
    "coefficients": normal(RANK, RANK),
}


@pytest.mark.parametrize("name", [name for name in ALL if name != "verify_perturbation"])
def test_layers_are_independent(xp: ModuleType, name: str) -> None:
    libraries.needs_float64(xp)
    rng = np.random.default_rng(0)
    # Layers of very different size: none may lend its scale to another.
    sizes = 10.0 ** np.asarray([[0, 3], [-3, 1], [-1, 2]])[..., None, None]
    stacks = {
        a: sizes ** (a not in ("basis", "coefficients"))
        * np.stack([[MAKE[a](rng) for _ in range(2)] for _ in range(3)])
        for a in ALL[name][1]
    }
    found = call(xp, name, **{a: to_library(xp, x) for a, x in stacks.items()})
    fields = found if isinstance(found, tuple) else (found,)
    for i, j in np.ndindex(3, 2):
        one = call(xp, name, **{a: to_library(xp, x[i, j]) for a, x in stacks.items()})
        alone = one if isinstance(one, tuple) else (one,)
        for whole, single in zip(fields, alone, strict=True):
            if whole is None or isinstance(whole, int):  # what a Moments counts is one number
                assert whole == single
                continue
            assert whole.shape == (3, 2, *single.shape)
            size = np.abs(to_numpy(single)).max(initial=0)
            np.testing.assert_allclose(
                to_numpy(whole)[i, j], to_numpy(single), rtol=1e-6, atol=1e-9 * (1 + size)
            )
