"""Libraries without eigh carry moments, energies and merges; solvers refuse them in one line."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
from calls import ALL, MATRIX

import loda_math as lm

# Not installed with the other tests: `make mlx` has an environment with them.
LIBRARIES = ("sparse", "marray", "cubed", "ndonnx")
CARRIED = (
    "second_moment",
    "projection_energy",
    "relative_energy",
    "energy_ratio",
    "remember",
    "recalibration direction",
    "recalibration scalar",
    "recalibration_loss",
    "update_effect",
    "merge",
)
SOLVED = ("general_subspace", "null_subspace", "recalibration full", "verify_subspace")

# ndonnx computes values without it, too.
pytestmark = pytest.mark.filterwarnings("ignore:onnxruntime is not installed:UserWarning")

Both = tuple[Callable[[Any], Any], Callable[[Any], Any]]


@pytest.fixture(params=LIBRARIES)
def through(request: pytest.FixtureRequest) -> Both:
    """The ways into the library and out of it."""
    name = request.param
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if name == "sparse":
        return import_module("sparse").asarray, lambda x: x.todense()
    if name == "marray":
        import array_api_compat.numpy as compat

        return import_module("marray").masked_namespace(compat).asarray, lambda x: x.data
    if name == "cubed":
        return import_module("cubed.array_api").asarray, lambda x: x.compute()
    return import_module("ndonnx").asarray, lambda x: x.unwrap_numpy()


@pytest.mark.parametrize("name", CARRIED)
def test_moments_and_energies(through: Both, name: str) -> None:
    enter, leave = through
    function, arguments = ALL[name]
    result = function(*[enter(MATRIX[a]) for a in arguments])
    expected = function(*[MATRIX[a] for a in arguments])
    if isinstance(expected, lm.Moments):
        result, expected = result.mean, expected.mean
    pairs = (
        zip(result, expected, strict=True) if isinstance(result, tuple) else [(result, expected)]
    )
    for ours, exact in pairs:
        np.testing.assert_allclose(leave(ours), exact, atol=1e-12)


@pytest.mark.parametrize("name", SOLVED)
def test_solvers_say_that_they_cannot(through: Both, name: str) -> None:
    enter, _ = through
    function, arguments = ALL[name]
    with pytest.raises(TypeError, match="linear algebra"):
        function(*[enter(MATRIX[a]) for a in arguments])
