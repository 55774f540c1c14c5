"""The only access to the array libraries: namespaces, dtypes, and the small linear algebra on top.

No array library is imported here; ``array_api_compat`` finds the one that an argument belongs to.
"""

import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import array_api_compat as compat

Array = Any
"""Any array of a library that follows the Python array API standard."""

Namespace = Any

# Rows and columns of a large matrix in host memory that meet their mirror image at a time.
TILE = 96


def namespace(**arrays: Array) -> Namespace:
    """Array namespace shared by the given arguments; error messages use the keyword names."""
    for name, x in arrays.items():
        # Old versions of array-api-compat let NumPy's matrix pass, whose * is not entrywise.
        is_matrix = is_numpy(x) and isinstance(x, sys.modules["numpy"].matrix)
        if is_matrix or not compat.is_array_api_obj(x):
            hint = "; pass its .mean" if hasattr(x, "total") else ""
            msg = (
                f"{name} must be an array of a library that follows the array API standard, got "
                f"{type(x).__name__}{hint}"
            )
            raise TypeError(msg)
        # NumPy's scalars have no .mT in any version.
        is_old = (is_numpy(x) or compat.is_cupy_array(x)) and not hasattr(type(x), "mT")
        if is_old and x.ndim > 0:
            library = type(x).__module__.partition(".")[0]
            msg = (
                f"{name} must be an array of NumPy 2.0 or CuPy 14 at least, got one of {library} "
                f"{sys.modules[library].__version__}; upgrade {library}"
            )
            raise TypeError(msg)
    libraries = {name: type(x).__module__.partition(".")[0] for name, x in arrays.items()}
    try:
        xp = compat.array_namespace(*arrays.values())
    except TypeError as error:
        msg = f"all arguments must be arrays of one library, got {libraries}"
        raise TypeError(msg) from error
    can_solve = is_deferred(next(iter(arrays.values()))) or hasattr(
        getattr(xp, "linalg", None), "eigh"
    )
    return xp if can_solve else _WithoutLinearAlgebra(xp)


class _WithoutLinearAlgebra:
    """Namespace of a library that forms moments and energies, and says that it cannot solve."""

    def __init__(self, xp: Namespace) -> None:
        self._xp = xp

    def __getattr__(self, name: str) -> Any:
        part = None if name == "linalg" else getattr(self._xp, name, None)
        if part is None:
            msg = (
                f"the library must have the linear algebra of the array API standard for this, "
                f"got {self._xp.__name__} without {name}; pass the D×D moments as NumPy arrays"
            )
            raise TypeError(msg)
        return part


def has_linear_algebra(xp: Namespace) -> bool:
    """Whether the library can solve, and has all of the standard that solving takes."""
    return not isinstance(xp, _WithoutLinearAlgebra)


def require_linear_algebra(xp: Namespace) -> None:
    """Refuse a library that cannot solve, before anything is computed."""
    if not has_linear_algebra(xp):
        _ = xp.linalg  # says what is missing


def is_array(x: Any) -> bool:
    """Whether a library that follows the standard made ``x``."""
    return bool(compat.is_array_api_obj(x))


def is_numpy(x: Any) -> bool:
    """Whether ``x`` is a NumPy array."""
    return bool(compat.is_numpy_array(x))


def is_jax(x: Any) -> bool:
    """Whether ``x`` is a JAX array or stands for one."""
    return bool(compat.is_jax_array(x))


def is_torch(x: Any) -> bool:
    """Whether ``x`` is a torch tensor."""
    return bool(compat.is_torch_array(x))


def is_deferred(x: Any) -> bool:
    """Whether ``x`` is a dask array: dask can carry moments, and has no ``eigh`` to solve with."""
    return bool(compat.is_dask_array(x))


def python_number(x: Any) -> Any:
    """A NumPy scalar, which may meet arrays of any library, as a Python number; others as is."""
    return x.item() if compat.is_numpy_array(x) and x.ndim == 0 else x


def widest(xp: Namespace, x: Array) -> Any:
    """Widest real floating dtype that the library offers on the device of ``x``."""
    info = xp.__array_namespace_info__()
    try:
        known = info.dtypes(device=compat.device(x), kind="real floating")
    except (TypeError, ValueError, AttributeError):
        # Tracers may have no device of their own; the default device then decides.
        known = info.dtypes(kind="real floating")
    return known.get("float64", xp.float32)


def at_least_single(xp: Namespace, x: Array) -> Array:
    """``x``, with half precision cast up to float32: products of halves are not trustworthy."""
    return xp.astype(x, xp.float32) if xp.finfo(x.dtype).bits < 32 else x


def result_dtype(xp: Namespace, *arrays: Array | None) -> Any:
    """Dtype that the given arrays promote to; the dtype in which results are returned."""
    return xp.result_type(*(a.dtype for a in arrays if a is not None))


def larger(xp: Namespace, a: Any, b: Any) -> Any:
    """The larger of two numbers; either may be an array, as every number is in compiled code."""
    if not is_array(a) and not is_array(b):
        return max(a, b)
    a, b = a + 0 * b, b + 0 * a
    return xp.where(a > b, a, b)


def coarsest_eps(xp: Namespace, *arrays: Array | None, gram_eps: Any = 0.0) -> Any:
    """What the entries can be trusted to: the largest eps of the dtypes, and ``gram_eps``.

    ``gram_eps`` is the eps of the arithmetic that made the entries, where it was coarser. No entry
    can be trusted further than the widest dtype: what is stored in more digits loses them.
    """
    present = [a for a in arrays if a is not None]
    dtypes = [widest(xp, present[0]), *(a.dtype for a in present)]
    return larger(xp, gram_eps, max(float(xp.finfo(dtype).eps) for dtype in dtypes))


def rounding_share(xp: Namespace, size: int, *arrays: Array | None, gram_eps: Any = 0.0) -> Any:
    """Share of the largest eigenvalue below which the eigenvalues of the arrays are rounding."""
    # size·eps for the arithmetic. Storing a moment in fewer digits costs less: its errors are
    # independent, and size·eps of float32 would take real directions, that of halves all.
    arithmetic = size * float(xp.finfo(widest(xp, next(a for a in arrays if a is not None))).eps)
    storage = min(size, 16) * coarsest_eps(xp, *arrays, gram_eps=gram_eps)
    return larger(xp, storage, arithmetic)


def widen(xp: Namespace, *arrays: Array) -> tuple[Array, ...]:
    """The arrays in the widest real dtype of their library; those that have it are not copied."""
    dtype = widest(xp, arrays[0])
    # Not every library knows astype(copy=False).
    return tuple(a if a.dtype == dtype else xp.astype(a, dtype) for a in arrays)


def is_concrete(*arrays: Array | None) -> bool:
    """Whether the values can be read now: false under tracing and for deferred arrays."""
    jax = sys.modules.get("jax")
    torch = sys.modules.get("torch")
    for x in arrays:
        if x is None:
            continue
        if compat.is_dask_array(x):
            return False
        # A constant inside of compiled code is no tracer itself, but whatever is made of it is.
        made = (x, jax.lax.stop_gradient(x)) if jax is not None and compat.is_jax_array(x) else ()
        if any(isinstance(y, jax.core.Tracer) for y in made):  # type: ignore[union-attr]
            return False
        if torch is not None and isinstance(x, torch.Tensor) and _is_traced(torch, x):
            return False
    return True


def _is_traced(torch: Any, x: Array) -> bool:
    """Whether the values of a torch tensor are not known yet: compiled, exported, batched."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta:
        return True
    if torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    if torch._guards.detect_fake_mode((x,)) is not None:
        return True
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return proxies is not None and proxies.get_proxy_mode() is not None


def detached(x: Array) -> Array:
    """``x`` as a constant: no derivative flows through it."""
    if is_torch(x):
        return x.detach()
    return sys.modules["jax"].lax.stop_gradient(x) if is_jax(x) else x


def may_be_differentiated(*arrays: Array) -> bool:
    """Whether a derivative with respect to one of the arrays may be asked for."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    for x in arrays:
        if jax is not None and isinstance(x, jax.core.Tracer):
            return True
        if torch is not None and isinstance(x, torch.Tensor):
            if x.requires_grad or torch.compiler.is_compiling():
                return True
            if torch._C._functorch.is_functorch_wrapped_tensor(x):
                return True
            if torch.autograd.forward_ad._current_level >= 0:
                return True
    return False


def with_derivative(value: Array, formula: Callable[[], Array], *inputs: Array) -> Array:
    """The value, with the derivative of a formula for it that can be differentiated.

    The formula is evaluated only where a derivative with respect to the inputs may be asked for.
    """
    if not may_be_differentiated(*inputs):
        return value
    smooth = formula()
    return detached(value) + (smooth - detached(smooth))


def full_precision(x: Array) -> AbstractContextManager[Any]:
    """Context in which products of ``x`` keep its precision: torch's autocast would halve it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(x, torch.Tensor):
        return nullcontext()
    if not torch.amp.is_autocast_available(x.device.type):
        return nullcontext()
    autocast: AbstractContextManager[Any] = torch.autocast(x.device.type, enabled=False)
    return autocast


def placed_like(x: Array) -> dict[str, Any]:
    """Keyword that creates an array where ``x`` lies; empty where arrays go to each other.

    Everything that is created beside an argument is given it: a default device may be another one.
    """
    # JAX lets an array without a device of its own follow the others; the sharding of ``x`` would
    # not fit an array of another shape. Arrays of MLX lie in memory that its devices share.
    return {"device": compat.device(x)} if hasattr(x, "device") and not is_jax(x) else {}


def eye_like(xp: Namespace, x: Array, size: int) -> Array:
    """Identity of the given size with the dtype and device of ``x``."""
    return xp.eye(size, dtype=x.dtype, **placed_like(x))


def add_to_diagonal(xp: Namespace, x: Array, amount: Any) -> Array:
    """``x`` with an amount added to its diagonal; ``x`` must be fresh, it may be changed.

    An amount that is an array has two axes of length one behind the leading ones.
    """
    size = int(x.shape[-1])
    if (is_numpy(x) or (is_torch(x) and not x.requires_grad)) and is_concrete(x):
        # In place: two more matrices of this size cost as much as a step of the solve.
        rows = xp.arange(size, **placed_like(x))
        x[..., rows, rows] += amount[..., 0] if is_array(amount) else amount
        return x
    return x + amount * eye_like(xp, x, size)


def transposed(x: Array) -> Array:
    """Matrix transpose, for dask arrays too."""
    return x.swapaxes(-1, -2) if is_deferred(x) else x.mT


def mirror_tiles(x: Array) -> list[tuple[slice, slice]]:
    """Rows and columns of tiles that cover one triangle; one tile for all but host memory.

    A large transpose is slow to read as a whole there, since its columns share cache lines.
    """
    size = int(x.shape[-1])
    on_host = is_numpy(x) or (is_torch(x) and x.device.type == "cpu")
    step = TILE if on_host and is_concrete(x) else size
    slices = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    return [(a, b) for place, a in enumerate(slices) for b in slices[place:]]


def symmetric_part(xp: Namespace, largest: Array, total: Array, *moments: Array) -> Array:
    """Symmetric part of the mean of the moments, over ``largest`` and then over ``total``.

    Large moments are bound by memory, not by arithmetic: host memory is read and written once.
    """
    half = 0.5 / len(moments)
    divisor = xp.where(largest == 0, xp.full_like(largest, math.inf), largest)
    scale = safe_divide(xp, xp.ones_like(total), total)

    def both(rows: slice, columns: slice) -> Array:
        tile = moments[0][..., rows, columns] * half
        tile += moments[0][..., columns, rows].mT * half
        for m in moments[1:]:
            tile += m[..., rows, columns] * half
            tile += m[..., columns, rows].mT * half
        tile /= divisor
        tile *= scale
        return tile

    tiles = mirror_tiles(moments[0])
    if len(tiles) == 1 or any(is_torch(m) and m.requires_grad for m in moments):
        return both(slice(None), slice(None))
    result = xp.empty_like(moments[0])
    for rows, columns in tiles:
        tile = both(rows, columns)
        result[..., rows, columns], result[..., columns, rows] = tile, tile.mT
    return result


def symmetrise(x: Array) -> Array:
    """Symmetric part: libraries read different triangles of a nearly symmetric matrix."""
    return 0.5 * (x + transposed(x))


def peak(xp: Namespace, x: Array) -> Array:
    """Largest magnitude in each matrix, kept as two axes of length one."""
    # Two reductions that write nothing cost less than the magnitudes of a large matrix.
    largest, smallest = (f(x, axis=(-2, -1), keepdims=True) for f in (xp.max, xp.min))
    return xp.maximum(largest, -smallest)


def diagonal(xp: Namespace, x: Array) -> Array:
    """Diagonals of the last two axes, (..., D), of libraries without linear algebra too."""
    if has_linear_algebra(xp) and hasattr(xp.linalg, "diagonal"):
        return xp.linalg.diagonal(x)
    return xp.sum(x * eye_like(xp, x, int(x.shape[-1])), axis=-1)


def trace(xp: Namespace, x: Array) -> Array:
    """Traces of the last two axes, (...), of libraries without linear algebra too."""
    if has_linear_algebra(xp) and hasattr(xp.linalg, "trace"):
        return xp.linalg.trace(x)
    return xp.sum(diagonal(xp, x), axis=-1)


def norm(xp: Namespace, x: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    """Euclidean norm over axes, kept with length one, or over all; squares stay in range."""
    largest = xp.max(xp.abs(x), axis=axis, keepdims=axis is not None)
    scaled = safe_divide(xp, x, largest)
    return largest * xp.sqrt(xp.sum(scaled * scaled, axis=axis, keepdims=axis is not None))


def storage_error(xp: Namespace, dtype: Any, *magnitudes: Array) -> Array:
    """What rounding to a dtype may take from entries: eps of each magnitude, or the last digit.

    Twice what one rounding takes, so that arithmetic before it has room.
    """
    info = xp.finfo(dtype)
    total = sum(xp.abs(m) for m in magnitudes)
    return float(info.eps) * (total + float(info.smallest_normal))


def safe_divide(xp: Namespace, a: Array, b: Array) -> Array:
    """``a / b``, and 0 where ``b`` is zero (and ``a`` finite); no warning on the way."""
    # One pass over ``a``, which may be much larger than ``b``.
    return a / xp.where(b == 0, xp.full_like(b, math.inf), b)


def reciprocal(xp: Namespace, x: Array, where: Array) -> Array:
    """``1 / x`` where the mask is true, and 0 elsewhere; no warning on the way."""
    return xp.where(where, 1 / xp.where(where, x, xp.ones_like(x)), 0 * x)


def span_energy(xp: Namespace, basis: Array, moment: Array, *, keepdims: bool = False) -> Array:
    """``tr(UᵀSU)`` without forming the small matrix."""
    return xp.sum(basis * (moment @ basis), axis=(-2, -1), keepdims=keepdims)


def descending_eigh(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """Eigenvalues from largest to smallest, and eigenvectors, of a symmetric matrix."""
    values, vectors = xp.linalg.eigh(symmetrise(x))
    # The standard leaves the order open, and not every library knows descending=True.
    order = xp.argsort(-values, axis=-1)
    values = xp.take_along_axis(values, order, axis=-1)
    return values, xp.take_along_axis(vectors, order[..., None, :], axis=-1)


def descending_eigvalsh(xp: Namespace, x: Array) -> Array:
    """Eigenvalues from largest to smallest of a symmetric matrix."""
    return -xp.sort(-xp.linalg.eigvalsh(x), axis=-1)


def fix_signs(xp: Namespace, basis: Array) -> Array:
    """Flip columns so that the entry of largest magnitude is positive."""
    top = xp.max(basis, axis=-2, keepdims=True)
    bottom = xp.min(basis, axis=-2, keepdims=True)
    return xp.where(top < -bottom, -basis, basis)


def total_inner(xp: Namespace, a: Sequence[Array], b: Sequence[Array]) -> Array:
    """Inner product over two lists of arrays, summed in float32 or wider."""
    parts = [
        xp.sum(at_least_single(xp, x) * at_least_single(xp, y)) for x, y in zip(a, b, strict=True)
    ]
    return sum(parts[1:], start=parts[0])
