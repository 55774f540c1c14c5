"""Factorisations beneath the subspaces: part of a spectrum, pencils, Cholesky, triangular solves.

The only file that may import SciPy, inside functions, for arrays that live in host memory. Every
faster route gives what the standard one gives, up to the choice of a basis among equal eigenvalues;
where a route does not apply, or its result fails its check, the standard decides.

``overwrite`` says that a matrix is the caller's own and of no further use: fresh memory for another
one costs up to a tenth of a small solve.
"""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from importlib.util import find_spec
from inspect import signature
from typing import Any

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    diagonal,
    is_concrete,
    is_jax,
    is_numpy,
    is_torch,
    mirror_tiles,
    placed_like,
)

# Below this size the standard solver is as fast as any.
PARTIAL_SIZE = 160
# From this size on Lanczos is tried first: its cost grows with the square of the size.
LANCZOS_SIZE = 256
# Least number of Lanczos vectors, and restarts before giving up. Spectra that decay need three or
# four; where more are needed, the dense solver is about as fast.
LANCZOS_LEAST, LANCZOS_RESTARTS = 48, 6
# Columns that LAPACK treats at a time, at most.
BLOCK = 64
# All eigenvalues of a tridiagonal matrix by QL steps take less time than some by bisection where
# these are more than one in so many.
QL_SHARE = 16
# Steps of the power method that bounds an eigenvalue: its order of magnitude is what counts.
POWER_STEPS = 8


def is_partial(x: Array, count: int) -> bool:
    """Whether fewer eigenpairs cost less; their values can be read then, without a wait."""
    return _on_host(x, count)


def leading_eigh(
    xp: Namespace, x: Array, count: int, *, lanczos: bool = True, overwrite: bool = False
) -> tuple[Array, Array]:
    """The ``count`` largest eigenvalues of a symmetric matrix, falling, and eigenvectors.

    ``lanczos=False`` saves the attempt where the wanted eigenvalues lie close together, compared
    to the largest magnitude.
    """
    if _on_host(x, count):
        return _solve_each(xp, lambda a: _leading(a, count, lanczos, overwrite), x)
    values, vectors = descending_eigh(xp, x)
    return values[..., :count], vectors[..., :count]


def trailing_eigh(
    xp: Namespace, x: Array, count: int, *, overwrite: bool = False
) -> tuple[Array, Array, Array]:
    """The ``count`` smallest eigenvalues, rising, eigenvectors, and the largest eigenvalue."""
    if _on_host(x, count):
        return _solve_each(xp, lambda a: _dense(a.T, 0, count, overwrite), x)
    values, vectors = descending_eigh(xp, x)
    rising = xp.flip(values[..., -count:], axis=-1)
    return rising, xp.flip(vectors[..., -count:], axis=-1), values[..., :1]


def reduced_pencil(xp: Namespace, s: Array, factor: Array, *, overwrite: bool = False) -> Array:
    """L⁻¹SL⁻ᵀ: with its eigenvectors V, those of the pencil (S, LLᵀ) are L⁻ᵀV."""
    if _on_host(s, 0):
        return _solve_each(xp, lambda a, b: (_reduced(a, b, overwrite),), s, factor)[0]
    half = lower_solve(xp, factor, s)
    return lower_solve(xp, factor, half.mT)


def lower_cholesky(xp: Namespace, x: Array, name: str, *, overwrite: bool = False) -> Array:
    """Lower Cholesky factor of an exactly symmetric matrix; a failure is reported by ``name``."""
    try:
        # A stack that fails is searched for the matrix that is the reason.
        factor = _cholesky(xp, x, overwrite=overwrite and x.ndim == 2)
    except Exception as error:
        # Each library has a class of its own for this; a lack of memory is another matter.
        if "LinAlgError" not in type(error).__name__:
            raise
        raise ValueError(_indefinite(name, _failing(xp, x))) from error
    # NumPy and torch raise. JAX and CuPy leave NaN, MLX the pivot that is not positive.
    if not (is_numpy(x) or is_torch(x)) and is_concrete(x):
        is_sound = xp.all(diagonal(xp, factor) > 0, axis=-1)
        if not bool(xp.all(is_sound)):
            first = int(xp.argmin(xp.reshape(xp.astype(is_sound, xp.int32), (-1,))))
            raise ValueError(_indefinite(name, _index(x, first)))
    return factor


def _cholesky(xp: Namespace, x: Array, *, overwrite: bool = False) -> Array:
    if _on_host(x, 0):
        return _solve_each(xp, lambda a: (_potrf(a, overwrite),), x)[0]
    # Of torch's factors the upper one is laid out as LAPACK wants it next: without a copy.
    return xp.linalg.cholesky(x, upper=True).mT if is_torch(x) else xp.linalg.cholesky(x)


def _failing(xp: Namespace, x: Array) -> tuple[int, ...]:
    """Index of the first matrix of a stack that has no Cholesky factor; () for a single one."""
    if x.ndim == 2:
        return ()
    flat = xp.reshape(x, (-1, *x.shape[-2:]))
    for position in range(int(flat.shape[0])):
        try:
            _cholesky(xp, flat[position, ...])
        except Exception as error:
            if "LinAlgError" not in type(error).__name__:
                raise
            return _index(x, position)
    return ()


def _index(x: Array, position: int) -> tuple[int, ...]:
    """Index into the leading dimensions for a position in their product."""
    index: list[int] = []
    for length in reversed(x.shape[:-2]):
        position, place = divmod(position, int(length))
        index.insert(0, place)
    return tuple(index)


def _indefinite(name: str, index: tuple[int, ...]) -> str:
    where = f"{name}[{', '.join(map(str, index))}]" if index else name
    return (
        f"{where} is not positive semi-definite to working precision: it has eigenvalues below "
        f"-ridge/D of its trace. Accumulate it with second_moment (float32 or wider tokens), "
        f"or raise ridge."
    )


def lower_solve(xp: Namespace, factor: Array, rhs: Array, *, transpose: bool = False) -> Array:
    """L⁻¹B, or L⁻ᵀB, for lower triangular L."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(factor, torch.Tensor):
        matrix = factor.mT if transpose else factor
        return torch.linalg.solve_triangular(matrix, rhs, upper=transpose)
    if is_jax(factor):
        solve = sys.modules["jax"].lax.linalg.triangular_solve
        return solve(factor, rhs, left_side=True, lower=True, transpose_a=transpose)
    if _on_host(factor, 0):
        flag = "T" if transpose else "N"
        return _solve_each(xp, lambda a, b: (_triangular(a, b, flag),), factor, rhs)[0]
    return xp.linalg.solve(factor.mT if transpose else factor, rhs)


def largest_eigenvalue(xp: Namespace, s: Array) -> Array:
    """Lower bound on the largest eigenvalue of a moment, seldom short by more than a tenth.

    Power steps from the column of the largest channel. It is never above the eigenvalue, so that a
    threshold relative to it marks nothing but noise.
    """
    start = xp.argmax(diagonal(xp, s), axis=-1)[..., None, None]
    x = xp.take_along_axis(s, start, axis=-1)
    bound = length = xp.sqrt(xp.sum(x * x, axis=-2, keepdims=True))
    for _ in range(POWER_STEPS):
        x = s @ (x / xp.where(length > 0, length, xp.ones_like(length)))
        length = xp.sqrt(xp.sum(x * x, axis=-2, keepdims=True))
        bound = xp.maximum(bound, length)
    return bound[..., 0]


def _on_host(x: Array, count: int) -> bool:
    """Whether SciPy can use the memory of the array, and pays: large, few of many eigenpairs."""
    size = int(x.shape[-1])
    if size < PARTIAL_SIZE or 2 * count > size or 0 in x.shape or not is_concrete(x):
        return False
    if find_spec("scipy") is None:
        return False
    if is_numpy(x):
        return bool(x.dtype.char in "fd" and x.dtype.isnative)
    torch = sys.modules.get("torch")
    if torch is None or type(x) is not torch.Tensor or x.requires_grad:
        return False
    return bool(x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64))


def _solve_each(
    xp: Namespace, solve: Callable[..., tuple[Any, ...]], *arrays: Array
) -> tuple[Array, ...]:
    """Run a solver of NumPy matrices over leading dimensions; torch tensors share their memory."""
    import numpy as np

    batch = tuple(arrays[0].shape[:-2])
    host = [a if is_numpy(a) else a.numpy() for a in arrays]
    # Row-major throughout: BLAS would copy anything else at every call.
    flat = [np.ascontiguousarray(a).reshape(-1, *a.shape[-2:]) for a in host]
    with _threads_of(arrays[0]):
        solved = [solve(*matrices) for matrices in zip(*flat, strict=True)]
    where = placed_like(arrays[0])
    if not batch:
        return tuple(xp.asarray(x, **where) for x in solved[0])
    parts = (xp.stack([xp.asarray(x, **where) for x in part]) for part in zip(*solved, strict=True))
    return tuple(xp.reshape(x, (*batch, *x.shape[1:])) for x in parts)


def _threads_of(x: Array) -> AbstractContextManager[Any]:
    """SciPy with as many threads as torch has, for tensors: its own default would be all cores."""
    torch = sys.modules.get("torch")
    if is_numpy(x) or torch is None or find_spec("threadpoolctl") is None:
        return nullcontext()
    limits: AbstractContextManager[Any] = _thread_control().limit(
        limits=torch.get_num_threads(), user_api="blas"
    )
    return limits


@cache
def _thread_control() -> Any:
    """Made once, when SciPy's BLAS is loaded: finding the libraries takes milliseconds."""
    import scipy.linalg  # noqa: F401
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def _potrf(a: Any, overwrite: bool) -> Any:
    """Lower Cholesky factor of one row-major NumPy matrix."""
    import numpy as np
    from scipy.linalg.lapack import get_lapack_funcs

    # Row-major lower is column-major upper: no transposition on the way, none back.
    functions: Any = get_lapack_funcs(("potrf",), (a,))
    upper, failed = functions[0](a.T, lower=0, overwrite_a=overwrite)
    if failed:
        msg = f"leading minor {failed} is not positive"
        raise np.linalg.LinAlgError(msg)
    return upper.T


def _leading(a: Any, count: int, lanczos: bool, overwrite: bool) -> tuple[Any, Any]:
    """Leading eigenpairs of one symmetric row-major NumPy matrix."""
    proven = _lanczos(a, count) if lanczos and len(a) >= LANCZOS_SIZE else None
    if proven is not None:
        return proven
    values, vectors, _ = _dense(a.T, len(a) - count, len(a), overwrite)
    return values[::-1].copy(), vectors[:, ::-1].copy()


def _lanczos(a: Any, count: int) -> tuple[Any, Any] | None:
    """Leading eigenpairs of one row-major NumPy matrix by Lanczos; ``None`` if not certain.

    The lower triangle is read. Lanczos may miss an eigenvector, for instance one of an equal pair,
    and the residuals do not show it. So the result counts only if a Cholesky factorisation shows
    that no other eigenvalue is larger.
    """
    import numpy as np
    from scipy.linalg.blas import get_blas_funcs
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    size = len(a)
    steps = max(count + 2 * count // 3 + 1, LANCZOS_LEAST)
    if 4 * steps > size:
        return None
    # Row-major lower is column-major upper. Reading one triangle halves the traffic.
    times_vector, times_matrix = get_blas_funcs(("symv", "symm"), (a,))
    operator: Any = LinearOperator(a.shape, lambda x: times_vector(1.0, a.T, x), dtype=a.dtype)
    operator.matvec = operator._matvec  # without its checks, which take as long as a small product
    # A fixed start without structure: a constant one is dead for centred features.
    start = np.sin(np.arange(1.0, size + 1) ** 2).astype(a.dtype)
    tolerance = size * float(np.finfo(a.dtype).eps)
    options = {"v0": start, "ncv": steps, "maxiter": LANCZOS_RESTARTS, "tol": tolerance}
    if _takes_generator():
        # ARPACK draws new directions when the matrix runs out of them: seeded, for equal results.
        options["rng"] = np.random.default_rng(0)
    try:
        values, vectors = eigsh(operator, count, which="LA", **options)
    except ArpackError:
        return None
    finally:
        # The operator would hold itself, and the matrix with it until the garbage is collected.
        del operator.matvec
    values, vectors = values[::-1].copy(), vectors[:, ::-1].copy()
    residual = times_matrix(1.0, a.T, vectors) - vectors * values
    slack = tolerance * float(np.abs(values).max())
    is_proven = (
        np.linalg.norm(residual, axis=0).max() <= slack
        and np.abs(vectors.T @ vectors - np.eye(count)).max() <= tolerance
        and _none_missed(a, values, vectors, slack)
    )
    return (values, vectors) if is_proven else None


@cache
def _takes_generator() -> bool:
    """Looked up once: it takes as long as a dozen products with a small matrix."""
    from scipy.sparse.linalg import eigsh

    return "rng" in signature(eigsh).parameters


def _none_missed(a: Any, values: Any, vectors: Any, slack: float) -> bool:
    """Proof that no eigenvalue above the last one was missed: τI − A + γVVᵀ is definite.

    γ lifts the eigenvalues that were found to the largest magnitude at least. The triangle above
    the diagonal of ``a`` serves as memory, and is restored.
    """
    import numpy as np
    from scipy.linalg.blas import get_blas_funcs
    from scipy.linalg.lapack import get_lapack_funcs

    update: Any = get_blas_funcs("syrk", (a,))
    factor: Any = get_lapack_funcs("potrf", (a,))
    energies = np.diagonal(a).copy()
    lift = values[0] - values[-1] + np.abs(values).max()
    rest = update(lift, vectors, beta=-1.0, c=a.T, lower=1, overwrite_c=1)
    rest.ravel(order="K")[:: len(a) + 1] += values[-1] + slack
    _, failed = factor(rest, lower=1, clean=0, overwrite_a=1)
    np.fill_diagonal(a, energies)
    _mirror(a)
    return bool(failed == 0)


def _mirror(a: Any) -> None:
    """Put the triangle below the diagonal above it as well."""
    import numpy as np

    tiles = mirror_tiles(a)
    above = ~np.tri(tiles[0][0].stop, dtype=bool)
    for rows, columns in tiles:
        if rows == columns:
            tile = a[rows, rows]
            np.copyto(tile, tile.T.copy(), where=above[: len(tile), : len(tile)])
        else:
            a[rows, columns] = a[columns, rows].T


def _reduced(s: Any, factor: Any, overwrite: bool) -> Any:
    """L⁻¹SL⁻ᵀ for one pair of row-major NumPy matrices."""
    from scipy.linalg.lapack import get_lapack_funcs

    # Row-major L is column-major U = Lᵀ: no copy on the way to LAPACK.
    functions: Any = get_lapack_funcs(("sygst",), (s, factor))
    reduced, _ = functions[0](s.T, factor.T, lower=0, overwrite_a=overwrite)
    reduced = reduced.T
    _mirror(reduced)  # LAPACK writes one triangle
    return reduced


def _dense(a: Any, start: int, stop: int, overwrite: bool) -> tuple[Any, Any, Any]:
    """Eigenpairs ``start`` to ``stop``, rising, and the largest eigenvalue, by one reduction.

    A column-major matrix costs less, and is the only one that is overwritten.
    """
    import numpy as np
    from scipy.linalg import eigh
    from scipy.linalg.lapack import get_lapack_funcs

    size = len(a)
    functions: Any = get_lapack_funcs(("sytrd", "stein", "ormqr"), (a,))
    energies = np.diagonal(a).copy()
    reduced, diagonal, beside, scales, _ = functions[0](
        a, lower=1, lwork=BLOCK * size, overwrite_a=overwrite
    )
    values, largest, blocks, splits = _tridiagonal_values(diagonal, beside, start, stop)
    is_sound = len(values) == stop - start and len(largest) > 0
    if is_sound:
        vectors, failed = functions[1](diagonal, beside, values, blocks, splits)
        is_sound = failed == 0 and bool(np.all(np.isfinite(vectors)))
    if not is_sound:  # the part may fail among equal eigenvalues; all of them never do
        # The triangle above the diagonal is as it was.
        np.fill_diagonal(a, energies)
        values, vectors = eigh(a, lower=False, driver="evd", check_finite=False)
        return values[start:stop], vectors[:, start:stop], values[-1:]
    order = np.argsort(values)
    values, vectors = values[order], vectors[:, order]
    # The reflectors lie below the diagonal and leave the first coordinate as it is. A shift by one
    # element presents them as those of a QR decomposition, with a last row that must be zero.
    reduced[0, 1:] = 0
    reflectors = reduced.ravel(order="K")[1 : 1 - size].reshape(size, size - 1, order="F")
    shifted = np.roll(vectors, -1, axis=0)
    shifted, _, _ = functions[2](
        "L", "N", reflectors, scales, shifted, lwork=BLOCK * (stop - start)
    )
    return values, np.roll(shifted, 1, axis=0), largest


def _tridiagonal_values(
    diagonal: Any, beside: Any, start: int, stop: int
) -> tuple[Any, Any, Any, Any]:
    """Eigenvalues ``start`` to ``stop``, the largest one, and the blocks that they belong to.

    As inverse iteration wants them: block by block, rising within each. Fewer than are asked for
    where the method failed.
    """
    import numpy as np
    from scipy.linalg.lapack import get_lapack_funcs

    size, info = len(diagonal), np.finfo(diagonal.dtype)
    functions: Any = get_lapack_funcs(("sterf", "stebz"), (diagonal,))
    negligible = np.abs(diagonal[1:] * diagonal[:-1]) * info.eps**2 + info.tiny
    if size <= QL_SHARE * (stop - start) and np.all(beside * beside > negligible):  # one block
        values, failed = functions[0](diagonal, beside)
        if failed == 0:
            blocks, splits = np.ones(size, np.int32), np.full(size, size, np.int32)
            return values[start:stop], values[-1:], blocks, splits

    def bisect(first: int, last: int) -> tuple[Any, Any, Any]:
        # By index and to full precision.
        found, values, blocks, splits, failed = functions[1](
            diagonal, beside, 2, 0.0, 1.0, first, last, 0.0, "B"
        )
        return values[: found if failed == 0 else 0], blocks, splits

    values, blocks, splits = bisect(start + 1, stop)
    largest = np.sort(values)[-1:] if stop == size else bisect(size, size)[0]
    return values, largest, blocks, splits


def _triangular(a: Any, b: Any, flag: str) -> Any:
    from scipy.linalg import solve_triangular

    solve: Any = solve_triangular
    return solve(a, b, trans=flag, lower=True, check_finite=False)
