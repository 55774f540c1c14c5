"""What is special to one library: compilation, mapping, devices, precision, deferred arrays."""

import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import libraries
import numpy as np
import pytest
from calls import ALL, CASES, MATRIX, call
from libraries import widest_dtype
from strategies import Matrix, dtype_name, from_spectrum, orthogonal, to_library, to_numpy

import loda_math as lm

ROOT = Path(__file__).parents[1]
SIZE, RANK, LAYERS = 6, 2, 4

# Compared over all libraries, and compiled in both of JAX's precisions; the others in float64.
BASIC = (
    "second_moment",
    "projection_energy",
    "relative_energy",
    "energy_ratio",
    "first_order_update",
    "general_subspace",
    "isolated_subspace",
    "isolated_subspace first",
    "null_subspace",
    *(f"recalibration {form}" for form in ("full", "diagonal", "direction", "scalar")),
    "recalibration_loss",
)
# Directions are turned by rounding over the gap, energies are not.
TOLERANCE = {"float64": 1e-12, "float32": 2e-5}


def matrices(name: str, size: int = SIZE) -> dict[str, Matrix]:
    """Arguments of a function, batched over layers; spectra with clear gaps make bases unique."""
    rng = np.random.default_rng(0)

    def layers(make: Callable[[], Matrix]) -> Matrix:
        return np.stack([make() for _ in range(LAYERS)])

    moment = lambda: from_spectrum(2.0 ** -np.arange(size), orthogonal(size, rng))  # noqa: E731
    shapes = {"up": (5, RANK), "down": (RANK, size), "coefficients": (RANK, RANK)}
    shapes |= {"tokens": (7, size), "grad_output": (7, 4)}
    shapes |= dict.fromkeys(("before", "after", "change", "gradient", "weight"), (5, size))
    make = {a: lambda shape=shape: rng.standard_normal(shape) for a, shape in shapes.items()}
    make |= dict.fromkeys(("new", "old", "moment"), moment)
    make["basis"] = lambda: orthogonal(size, rng)[:, :RANK]
    return {a: layers(make[a]) for a in ALL[name][1]}


def arguments(xp: ModuleType, name: str, dtype: str) -> list[Any]:
    return [to_library(xp, x, dtype) for x in matrices(name).values()]


def fields(name: str, arrays: Sequence[Any]) -> list[Any]:
    """The arrays of a result; the mean of moments, whose sum has another dtype where it must."""
    result = ALL[name][0](*arrays)
    if name == "second_moment":
        return [result.mean, (result + result).mean]
    return list(result) if isinstance(result, tuple) else [result]


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


@pytest.mark.parametrize("name", BASIC)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_libraries_agree(xp: ModuleType, name: str, dtype: str) -> None:
    x = arguments(xp, name, dtype)
    expected = fields(name, arguments(np, name, "float64"))
    for ours, exact in zip(fields(name, x), expected, strict=True):
        assert getattr(ours, "device", None) == getattr(x[0], "device", None)
        assert dtype_name(ours) == (widest_dtype(xp) if name == "second_moment" else dtype)
        assert_close(ours, exact, dtype)


def assert_close(result: Any, expected: Any, dtype: str) -> None:
    expected = to_numpy(expected)
    atol = TOLERANCE[dtype] * max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(to_numpy(result), expected, atol=atol)


@pytest.mark.parametrize("name", BASIC)
def test_compiles_and_maps_in_jax(jnp: ModuleType, name: str) -> None:
    """Under ``jit`` no value can be read, so what compiles moves nothing to the host."""
    import jax

    dtype = widest_dtype(jnp)
    x, expected = arguments(jnp, name, dtype), fields(name, arguments(np, name, "float64"))
    function = lambda *a: fields(name, a)  # noqa: E731
    for transformed in (jax.jit(function), jax.jit(jax.vmap(function))):
        for ours, exact in zip(transformed(*x), expected, strict=True):
            assert dtype_name(ours) == dtype
            assert_close(ours, exact, dtype)


@pytest.mark.parametrize("library", ["jax"])
@pytest.mark.parametrize("name", [name for name in ALL if name not in BASIC])
def test_every_field_of_every_result_in_jax(library: str, name: str) -> None:
    import jax

    with libraries.opened(library) as jnp:
        mapped = jax.jit(jax.vmap(lambda *a: fields(name, a)))
        ours = mapped(*arguments(jnp, name, "float64"))
        host = matrices(name).values()
        apart = [fields(name, [x[i] for x in host]) for i in range(LAYERS)]
        assert len(ours) == len(apart[0])
        for found, expected in zip(ours, zip(*apart, strict=True), strict=True):
            np.testing.assert_allclose(to_numpy(found), np.stack(expected), atol=1e-9)


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

    solve = ALL["isolated_subspace"][0]
    dtype = widest_dtype(jnp)
    new, old = arguments(jnp, "isolated_subspace", dtype)
    old = old - 0.1 * jnp.eye(SIZE, dtype=dtype, device=old.device)
    with pytest.raises(ValueError, match="semi-definite"):
        solve(new, old)
    # Compiled code cannot raise; NaN is no zero column and cannot be taken for a result.
    assert jnp.isnan(jax.jit(solve)(new, old)).any()


def test_sums_are_compensated_where_jax_has_no_float64(jnp: ModuleType) -> None:
    moments = lm.second_moment(to_library(jnp, np.ones((4, 2)), "float32"))
    assert (moments.error is None) == (widest_dtype(jnp) == "float64")
    small = moments._replace(total=moments.total * 2.0**-24)  # half an ulp: lost on its own
    for _ in range(8):
        moments = moments + small
    total = to_numpy(moments.total) + (0 if moments.error is None else to_numpy(moments.error))
    np.testing.assert_allclose(total, 4 * (1 + 8 * 2.0**-24), rtol=1e-12)


# Devices: what is created beside the arguments lies where they lie


@pytest.mark.parametrize("name", ALL)
def test_the_default_device_of_torch_is_not_used(name: str) -> None:
    """The meta device stands for an accelerator: what ends there has no values."""
    torch = pytest.importorskip("torch")
    # 200: large enough for SciPy.
    x = [torch.from_numpy(m) for m in matrices(name, 200).values()]
    expected = fields(name, x)
    with torch.device("meta"):
        result = fields(name, x)
    for ours, alone in zip(result, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(alone))


def test_a_training_step_does_not_use_the_default_device_of_torch() -> None:
    torch = pytest.importorskip("torch")
    p, g, order = torch.ones(3), torch.asarray([3.0, 0.0, -4.0]), torch.asarray([2, 0])
    with torch.device("meta"):
        halves = lm.class_split(torch.asarray([2, 0, 2], device="cpu"), order)
        (moved,), (rest,) = lm.lookahead([p], [g], 0.5), lm.project_conflict([p], [g])
        cosine = lm.gradient_alignment([p], [g])
    for x in (*halves, moved, rest, cosine):
        assert x.device.type == "cpu"


# Slow, so run in one process: XLA aborts if its threads for sums over devices wait too long.
@pytest.mark.slow
@pytest.mark.parametrize("grid", [(2, 1), (1, 2)], ids=["layers", "features"])
@pytest.mark.parametrize("library", ["jax"])
@pytest.mark.parametrize("name", ALL)
def test_sharded_arrays_of_jax(library: str, name: str, grid: tuple[int, int]) -> None:
    """Layers, or the features of each layer, over two devices."""
    import jax

    with libraries.opened(library):
        if len(jax.devices()) < 2:
            pytest.skip("this JAX shows one CPU device only")
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:2]).reshape(grid), ("layer", "feature"))
        place = jax.sharding.NamedSharding(
            mesh, jax.sharding.PartitionSpec("layer", None, "feature")
        )
        host = list(matrices(name).values())
        ours = fields(name, [jax.device_put(m, place) for m in host])
        for found, expected in zip(ours, fields(name, host), strict=True):
            np.testing.assert_allclose(np.asarray(found), expected, atol=1e-9)


# What some library lacks, or puts on its default device, goes through _arrays.py
LACKING = re.compile(
    r"xp\.linalg\.(trace|diagonal)\(|descending=|copy=False"
    r"|xp\.(arange|asarray|empty|eye|full|linspace|ones|zeros)\((?!.*\*\*)"
)


@pytest.mark.parametrize("path", sorted((ROOT / "loda_math").rglob("*.py")), ids=lambda p: p.stem)
def test_one_door_to_what_libraries_lack(path: Path) -> None:
    if path.stem != "_arrays":
        lines = path.read_text("utf-8").splitlines()
        assert not [x for x in lines if LACKING.search(x) and not x.lstrip().startswith(">>>")]


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
    tested = doctest.testmod(importlib.import_module(module.name))
    assert tested.failed == 0, tested
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


def test_constants_inside_of_compiled_code(jnp: ModuleType) -> None:
    """Moments that a compiled function closes over have values, but nothing made of them has."""
    import jax

    new, old = arguments(jnp, "isolated_subspace", widest_dtype(jnp))
    compiled = jax.jit(lambda x: x + lm.energy_ratio(lm.isolated_subspace(new, old, 2), new, old))
    expected = lm.energy_ratio(lm.isolated_subspace(new, old, 2), new, old)
    np.testing.assert_allclose(compiled(0.0), to_numpy(expected), rtol=1e-4)


def test_moments_with_their_unit_go_through_compiled_code(jnp: ModuleType) -> None:
    import jax

    tokens = to_library(jnp, np.random.default_rng(0).standard_normal((20, 4)), "float32")
    moments = lm.second_moment(tokens)
    history = lm.remember(None, moments)
    compiled = jax.jit(lm.general_subspace, static_argnames="rank")
    basis = compiled(new=moments, old=history, rank=2)
    expected = lm.general_subspace(moments, history, 2)
    np.testing.assert_allclose(to_numpy(basis), to_numpy(expected), atol=1e-4)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_tensors_that_are_not_dense_or_not_real(name: str, argument: str) -> None:
    """One line that names the argument and the cure, before anything is computed."""
    torch = pytest.importorskip("torch")
    dense = torch.from_numpy(MATRIX[argument].copy())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that these are new
        unlike = [dense.to_sparse(), dense.to_sparse_csr(), torch.nested.nested_tensor([dense])]
    for tensor in unlike:
        with pytest.raises(TypeError, match=rf"^{argument} must be a dense array"):
            call(torch, name, **{argument: tensor})
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.bool):
        with pytest.raises(TypeError, match=rf"^{argument} must be real floating point"):
            call(torch, name, **{argument: dense.to(dtype)})
