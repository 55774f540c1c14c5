"""What is special to one library: compilation, mapping, devices, precision, deferred arrays."""

import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import libraries
import numpy as np
import pytest
from strategies import dtype_name, from_spectrum, orthogonal, to_library, to_numpy

import loda_math as lm

ROOT = Path(__file__).parents[1]
SIZE, RANK, LAYERS = 6, 2, 3


def inputs() -> dict[str, np.ndarray]:
    """Arguments of every function, batched over layers; spectra with clear gaps."""
    rng = np.random.default_rng(0)
    spread = 2.0 ** -np.arange(SIZE)
    moments = [
        np.stack([from_spectrum(spread, orthogonal(SIZE, rng)) for _ in range(LAYERS)])
        for _ in range(2)
    ]
    basis = np.stack([orthogonal(SIZE, rng)[:, :RANK] for _ in range(LAYERS)])
    return {
        "new": moments[0],
        "old": moments[1],
        "basis": basis,
        "down": np.swapaxes(basis, 1, 2).copy(),
        "up": rng.standard_normal((LAYERS, 5, RANK)),
        "tokens": rng.standard_normal((LAYERS, 7, SIZE)),
        "grad": rng.standard_normal((LAYERS, 7, 4)),
    }


# Every public function, and which of the inputs it takes.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "second_moment": (lambda x: lm.second_moment(x).mean, ("tokens",)),
    "combine": (lambda x: (lm.second_moment(x) + lm.second_moment(x)).mean, ("tokens",)),
    "projection_energy": (lm.projection_energy, ("basis", "new")),
    "relative_energy": (lm.relative_energy, ("basis", "new")),
    "energy_ratio": (lm.energy_ratio, ("basis", "new", "old")),
    "first_order_update": (
        lambda *a: lm.first_order_update(*a, 0.1).bound,
        ("tokens", "down", "grad"),
    ),
    "general_subspace": (lambda *a: lm.general_subspace(*a, RANK), ("new", "old")),
    "isolated_subspace": (lambda *a: lm.isolated_subspace(*a, RANK), ("new", "old")),
    "first isolated_subspace": (lambda n: lm.isolated_subspace(n, None, RANK), ("new",)),
    "null_subspace": (lambda o: lm.null_subspace(o, RANK), ("old",)),
    **{
        f"recalibration {form}": (
            lambda *a, form=form: lm.recalibration(*a, 2.0, form),
            ("up", "down", "new", "old"),
        )
        for form in ("full", "diagonal", "direction", "scalar")
    },
    "recalibration_loss": (
        lambda u, a, n, o: lm.recalibration_loss(a @ a.mT, u, a, n, o, 2.0),
        ("up", "down", "new", "old"),
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)
# Directions are turned by rounding over the gap, energies are not.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


def arguments(xp: ModuleType, name: str, dtype: str) -> list[Any]:
    values = inputs()
    return [to_library(xp, values[a], dtype) for a in CALLS[name][1]]


@pytest.fixture(params=["jax", "jax-x32"], scope="module")
def jnp(request: pytest.FixtureRequest) -> Any:
    """JAX, with float64 and without."""
    with libraries.opened(request.param) as namespace:
        yield namespace


@pytest.mark.parametrize("library", libraries.NAMES)
def test_library(library: str) -> None:
    """Says which libraries the suite ran over, and why the others were left out."""
    with libraries.opened(library) as xp:
        m = to_library(xp, np.diag([1.0, 3.0, 2.0]), "float32")
        basis = lm.general_subspace(m, None, 1)
        np.testing.assert_allclose(to_numpy(basis), [[0], [1], [0]], atol=1e-6)


@every_call
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_libraries_agree(xp: ModuleType, name: str, dtype: str) -> None:
    x = arguments(xp, name, dtype)
    result = CALLS[name][0](*x)
    assert getattr(result, "device", None) == getattr(x[0], "device", None)
    moments = name in ("second_moment", "combine")
    assert dtype_name(result) == (libraries.widest_dtype(xp) if moments else dtype)
    expected = CALLS[name][0](*arguments(np, name, "float64"))
    assert_close(result, expected, dtype)


def assert_close(result: Any, expected: Any, dtype: str) -> None:
    expected = to_numpy(expected)
    atol = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(to_numpy(result), expected, atol=atol)


@every_call
def test_compiles_and_maps_in_jax(jnp: ModuleType, name: str) -> None:
    """Under ``jit`` no value can be read, so what compiles moves nothing to the host."""
    import jax

    dtype = libraries.widest_dtype(jnp)
    function, x = CALLS[name][0], arguments(jnp, name, dtype)
    expected = function(*arguments(np, name, "float64"))
    for transformed in (jax.jit(function), jax.jit(jax.vmap(function))):
        result = transformed(*x)
        assert dtype_name(result) == dtype
        assert_close(result, expected, dtype)


def test_training_step_compiles_in_jax(jnp: ModuleType) -> None:
    import jax

    p, g = to_library(jnp, np.ones(3), "float32"), to_library(jnp, [3.0, 0.0, 4.0], "float32")
    for function in (
        lambda a, b: lm.lookahead([a], [b], 0.5)[0],
        lambda a, b: lm.lookahead([a], [b], jnp.max(b))[0],
        lambda a, b: lm.gradient_alignment([a], [b]),
        lambda a, b: lm.project_conflict([a], [-b])[0],
    ):
        assert_close(jax.jit(function)(p, g), function(p, g), "float32")
    labels, order = jnp.asarray([2, 0, 2]), jnp.asarray([2, 0])
    first, _ = jax.jit(lm.class_split)(labels, order)
    np.testing.assert_array_equal(np.asarray(first), [True, False, True])


def test_a_failed_factorisation_is_reported_by_jax_too(jnp: ModuleType) -> None:
    import jax

    solve = CALLS["isolated_subspace"][0]
    dtype = libraries.widest_dtype(jnp)
    new, old = arguments(jnp, "isolated_subspace", dtype)
    old = old - 0.1 * jnp.eye(SIZE, dtype=dtype, device=old.device)
    with pytest.raises(ValueError, match="old is not positive semi-definite"):
        solve(new, old)
    # Compiled code cannot raise; NaN is no zero column and cannot be taken for a result.
    assert jnp.isnan(jax.jit(solve)(new, old)).any()


def test_sums_are_compensated_where_jax_has_no_float64(jnp: ModuleType) -> None:
    moments = lm.second_moment(to_library(jnp, np.ones((4, 2)), "float32"))
    assert (moments.error is None) == (libraries.widest_dtype(jnp) == "float64")
    small = moments._replace(total=moments.total * 2.0**-24)  # half an ulp: lost on its own
    for _ in range(8):
        moments = moments + small
    kept = to_numpy(moments.total) + (0 if moments.error is None else to_numpy(moments.error))
    np.testing.assert_allclose(kept, 4 * (1 + 8 * 2.0**-24), rtol=1e-12)


# Dask: moments of data that does not fit, and nothing else


def test_dask_carries_moments() -> None:
    da = pytest.importorskip("dask.array")
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    lazy = lm.second_moment(da.from_array(x, chunks=(7, 5)))
    both = lm.combine(lazy, lm.second_moment(da.from_array(2 * x, chunks=(40, 2))))
    assert type(both.total).__module__.startswith("dask")  # nothing was computed
    expected = lm.second_moment(x) + lm.second_moment(2 * x)
    assert both.count == expected.count == 80
    total = both.total.compute()
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, expected.total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both.mean.compute(), expected.mean, rtol=1e-5, atol=1e-6)


def test_dask_is_not_solved_for() -> None:
    da = pytest.importorskip("dask.array")
    m = da.from_array(np.eye(4), chunks=2)
    up, down = da.ones((3, 2), chunks=2), da.ones((2, 4), chunks=2)
    for solve in (
        lambda: lm.general_subspace(m, m, 2),
        lambda: lm.isolated_subspace(m, m, 2),
        lambda: lm.null_subspace(m, 2),
        lambda: lm.recalibration(up, down, m, m, 1.0),
    ):
        with pytest.raises(TypeError, match=r"is a dask array.*\.compute\(\)"):
            solve()


# The base install: this package, array-api-compat and one array library


def test_the_base_install_is_enough(tmp_path: Path) -> None:
    """In an interpreter that sees nothing but NumPy and what the base install brings."""
    for name in ("numpy", "array_api_compat"):
        folder = Path(next(iter(find_spec(name).submodule_search_locations)))
        (tmp_path / name).symlink_to(folder, target_is_directory=True)
        for libs in folder.parent.glob(f"{name}.libs"):
            (tmp_path / libs.name).symlink_to(libs, target_is_directory=True)
    (tmp_path / "loda_math").symlink_to(ROOT / "loda_math", target_is_directory=True)
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import doctest, importlib, pkgutil
import numpy as np
import loda_math as lm
for module in pkgutil.walk_packages(lm.__path__, "loda_math."):
    found = doctest.testmod(importlib.import_module(module.name))
    assert found.failed == 0, found
rng = np.random.default_rng(0)
x, y = rng.standard_normal((2, 600, 300))
new, old = lm.second_moment(x).mean, lm.second_moment(y).mean
for solve in (lm.general_subspace, lm.isolated_subspace, lambda n, o, r: lm.null_subspace(o, r)):
    u = solve(new, old, 3)
    np.testing.assert_allclose(u.T @ u, np.eye(3), atol=1e-12)
    lm.recalibration(u[:5], u.T, new, old, 1.0)
print(*sorted({{name.partition(".")[0] for name in sys.modules}}))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & {"scipy", "torch", "jax", "cupy", "dask", "threadpoolctl"}
