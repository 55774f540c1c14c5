"""Argument checks: shapes, dtypes and scalars always, values only if they can be read now."""

import math
import operator
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import zip_longest
from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    diagonal,
    has_linear_algebra,
    is_array,
    is_concrete,
    is_deferred,
    is_numpy,
    is_torch,
    larger,
    mirror_tiles,
    namespace,
    peak,
    placed_like,
    python_number,
)

MomentLike = Any
"""A second moment as an array, as `Moments` (their mean counts) or as a `History` (its total)."""

# Relative asymmetry that a Gram matrix formed in single precision stays well below.
SYMMETRY_TOLERANCE = 1e-4
# Above the rounding unit of every floating-point type that tokens come in.
COARSEST = 1e-2


def check_dense(**arrays: Array) -> None:
    """Refuse arrays that do not hold a value at every place."""
    for name, x in arrays.items():
        if is_numpy(x) and type(x).__name__ == "MaskedArray":
            msg = (
                f"{name} must be a dense array, got a masked one; fill what is masked with "
                ".filled(...), or leave those rows out"
            )
            raise TypeError(msg)
        if is_torch(x) and (x.is_nested or str(x.layout) != "torch.strided"):
            layout = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
            cure = "pad it" if x.is_nested else "call .to_dense() on it"
            msg = f"{name} must be a dense array, got layout {layout}; {cure}"
            raise TypeError(msg)


def check_real(xp: Namespace, **arrays: Array) -> None:
    """Refuse arrays that are not dense, not real floating point, or of eight bits or fewer."""
    check_dense(**arrays)
    for name, x in arrays.items():
        try:
            is_real = xp.isdtype(x.dtype, "real floating")
        except TypeError:  # a dtype from outside the library, as bfloat16 is for NumPy
            is_real = False
        # Eight bits hold no moment, and no library computes in them.
        if not is_real or getattr(x.dtype, "itemsize", 2) < 2:
            msg = (
                f"{name} must be real floating point of at least 16 bits, got dtype {x.dtype}; "
                "cast it first"
            )
            raise TypeError(msg)


def check_square(**moments: Array) -> int:
    """Refuse moments that are not square, or not all of one shape; returns their size D."""
    for name, m in moments.items():
        if m.ndim < 2 or m.shape[-1] != m.shape[-2] or m.shape[-1] == 0:
            msg = f"{name} must be square, of shape (..., D, D) with D > 0, got {tuple(m.shape)}"
            raise ValueError(msg)
    shapes = {name: tuple(m.shape) for name, m in moments.items()}
    if len(set(shapes.values())) > 1:
        msg = f"moments must have one shape, got {shapes}"
        raise ValueError(msg)
    return int(next(iter(shapes.values()))[-1])


def check_broadcast(**moments: Array) -> int:
    """Refuse moments that are not square, of one size and broadcastable; returns their size D."""
    size = max(check_square(**{name: m}) for name, m in moments.items())
    shapes = {name: tuple(m.shape) for name, m in moments.items()}
    axes = zip_longest(*(reversed(shape[:-2]) for shape in shapes.values()), fillvalue=1)
    fit = all(len(set(lengths) - {1}) < 2 for lengths in axes)
    if not fit or any(shape[-1] != size for shape in shapes.values()):
        msg = f"moments must have one D, and leading axes that broadcast, got {shapes}"
        raise ValueError(msg)
    return size


class CheckedMoments(NamedTuple):
    """Second moments of one task or of several, as the solvers take them."""

    xp: Namespace
    size: int  # D
    moments: tuple[Array, ...]  # in the order given, of one shape
    gram_eps: Any  # rounding unit of the arithmetic that formed them; 0 where only dtypes count


def checked_moments(
    moments: Mapping[str, MomentLike], *, accumulation_eps: Any = None, **matrices: Array
) -> CheckedMoments:
    """Second moments given as arrays, `Moments` or `History`, and the matrices that come with them.

    Refuses what is not real, finite and of one library, and moments that are not square, symmetric
    and of one size. Moments are broadcast against each other. The shapes of the matrices are left
    to the caller. Without ``accumulation_eps`` the coarsest unit that a moment carries counts.
    """
    arrays = {name: _as_array(moment) for name, moment in moments.items()}
    eps = check_eps("accumulation_eps", accumulation_eps)
    xp = namespace(**matrices, **arrays)
    if eps is None:
        eps = coarsest_unit(xp, *filter(_is_accumulated, moments.values()))
    check_real(xp, **matrices, **arrays)
    size = check_broadcast(**arrays)
    check_values(xp, matrices, arrays)
    values = tuple(arrays.values())
    if len({tuple(m.shape) for m in values}) > 1:
        values = tuple(xp.broadcast_arrays(*values))
    return CheckedMoments(xp, size, values, eps)


def checked_weights(coefficients: Array | None = None, **arrays: Array) -> Namespace:
    """Namespace of weights (..., O, D) and of the branch, ``up`` and ``down``, that fits them."""
    if coefficients is not None:
        arrays["coefficients"] = coefficients
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    shapes = {name: tuple(x.shape) for name, x in arrays.items()}
    up, down = shapes["up"], shapes["down"]
    fit = min(len(shape) for shape in shapes.values()) > 1 and up[-1] == down[-2]
    if not fit or any(
        shape[-2:] != ((up[-1], up[-1]) if name == "coefficients" else (up[-2], down[-1]))
        for name, shape in shapes.items()
        if name not in ("up", "down")
    ):
        msg = (
            f"shapes must be (..., O, D), up (..., O, r), down (..., r, D) and coefficients "
            f"(..., r, r), got {shapes}"
        )
        raise ValueError(msg)
    check_values(xp, arrays)
    return xp


def _is_accumulated(moment: MomentLike) -> bool:
    """Whether it is `Moments` or a `History`, whose module checks its arguments here."""
    return hasattr(moment, "total") and hasattr(moment, "unit")


def _as_array(moment: MomentLike) -> Array:
    """The mean of `Moments`, the total of a `History`, and anything else as it is."""
    if not _is_accumulated(moment):
        return moment
    return moment.total if hasattr(moment, "effective_tasks") else moment.mean


def coarsest_unit(xp: Namespace, *moments: MomentLike) -> Any:
    """Coarsest rounding unit of moments, histories and arrays; an array where one of them is."""
    coarsest: Any = 0.0
    for m in moments:
        carries = _is_accumulated(m)
        own = float(xp.finfo((m.total if carries else m).dtype).eps)
        coarsest = larger(xp, coarsest, own)
        if carries:
            coarsest = larger(xp, coarsest, python_number(m.unit))
    return coarsest


def check_columns(name: str, matrix: Array, size: int) -> None:
    """Refuse a matrix whose last axis is not the D of the moments."""
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-1] != size or shape[-2] == 0:
        msg = f"{name} must have shape (..., r, {size}), r > 0, to match the moments, got {shape}"
        raise ValueError(msg)


def check_rows(name: str, matrix: Array, size: int) -> None:
    """Refuse a matrix whose second to last axis is not the D of the moments."""
    shape = tuple(matrix.shape)
    if len(shape) < 2 or shape[-2] != size:
        msg = f"{name} must have shape (..., {size}, r) to match the moments, got {shape}"
        raise ValueError(msg)


def check_rank(rank: Any, size: int) -> int:
    """The rank as a Python int; refused unless it is an integer from 1 to D."""
    msg = f"rank must be an integer, got {type(rank).__name__}"
    # Array libraries accept their booleans as an index.
    if isinstance(rank, bool) or "bool" in str(getattr(rank, "dtype", "")):
        raise TypeError(msg)
    try:
        number = operator.index(rank)
    except TypeError as error:
        raise TypeError(msg) from error
    if not 1 <= number <= size:
        msg = f"rank must be from 1 to D = {size}, got {number}"
        raise ValueError(msg)
    return number


def check_scalar(name: str, value: Any, *, positive: bool = False) -> Any:
    """The number, refused if negative (or zero), infinite or NaN; 0-d arrays pass unread."""
    value = python_number(value)
    if is_array(value):
        if tuple(value.shape) != ():
            msg = f"{name} must be one number, got an array of shape {tuple(value.shape)}"
            raise ValueError(msg)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        msg = f"{name} must be a real number, got {type(value).__name__}"
        raise TypeError(msg)
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        rule = "positive" if positive else "at least 0"
        msg = f"{name} must be finite and {rule}, got {value}"
        raise ValueError(msg)
    return value


def check_share(name: str, value: Any) -> Any:
    """The number, refused outside [0, 1]; 0-d arrays pass unread."""
    value = check_scalar(name, value)
    if not is_array(value) and value > 1:
        msg = f"{name} must be a share from 0 to 1, got {value}"
        raise ValueError(msg)
    return value


def check_eps(name: str, value: Any) -> Any:
    """The rounding unit or None, refused if coarser than any arithmetic (bfloat16 has 7.8e-3)."""
    if value is None:
        return None
    value = check_scalar(name, value)
    if not is_array(value) and value > COARSEST:
        msg = (
            f"{name} must be a rounding unit, at most {COARSEST}, got {value}; float32 has 1.2e-7 "
            "and bfloat16 7.8e-3"
        )
        raise ValueError(msg)
    return value


def check_values(
    xp: Namespace,
    finite: Mapping[str, Array] | None = None,
    symmetric: Mapping[str, Array] | None = None,
) -> None:
    """Refuse NaN, infinity and (for moments) asymmetry, with a single read of one scalar.

    Nothing is read while a compiler traces the call or for arrays whose values are deferred.
    """
    for name, x in (symmetric or {}).items():
        if is_deferred(x):
            msg = f"{name} is a dask array, which can carry moments only; call .compute() on it"
            raise TypeError(msg)
    groups = ((finite or {}, False), (symmetric or {}, True))
    present = [
        (name, x, is_moment)
        for group, is_moment in groups
        for name, x in group.items()
        if 0 not in x.shape
    ]
    if not present or not is_concrete(*(x for _, x, _ in present)):
        return
    if _are_plainly_sound(xp, present):
        return
    code: Any = None
    # The first fault and its place in one number, so that the device is read only once.
    for place, (_, x, is_moment) in reversed([*enumerate(present)]):
        fault = _fault(xp, x, is_moment)
        code = xp.where(fault > 0, fault + 3 * place, 0 * fault if code is None else code)
    place, fault = divmod(int(code), 3)
    name = present[place][0]
    if fault == 1:
        msg = (
            f"{name} holds NaN or infinite values (or overflowed on the way); find where they "
            f"enter, or cast half precision up first"
        )
        raise ValueError(msg)
    if fault == 2:
        msg = f"{name} must be symmetric: it differs from its transpose; pass XᵀX / N"
        raise ValueError(msg)


def _are_plainly_sound(xp: Namespace, present: list[tuple[str, Array, bool]]) -> bool:
    """Whether two quick products with each moment show that it is finite and symmetric.

    Freivalds' test: for a vector v without structure, entries of Xv and Xᵀv differ by about as much
    as the entries of X and Xᵀ, and are not finite where those are not. Where they differ too much,
    or rounding hides it, all entries are compared.
    """
    if not has_linear_algebra(xp) or any(xp.finfo(x.dtype).bits < 32 for _, x, _ in present):
        return False
    numpy = sys.modules.get("numpy")
    sound: Any = True
    with nullcontext() if numpy is None else numpy.errstate(all="ignore"):
        for _, x, is_moment in present:
            if is_moment:
                place = xp.astype(xp.arange(x.shape[-1], **placed_like(x)), x.dtype)
                probe = 1 + 0.5 * xp.sin(place * place)  # from 0.5 to 1.5
                right, left = x @ probe, probe @ x
                most = 0.5 * SYMMETRY_TOLERANCE * xp.max(xp.abs(diagonal(xp, x)), axis=-1)
                # A comparison with NaN fails; that with infinity must, too.
                gap = xp.max(xp.abs(right - left), axis=-1)
                sound = xp.all((gap <= most) & (most < math.inf)) & sound
            else:
                sound = xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x)) & sound
    return bool(sound)


def _fault(xp: Namespace, x: Array, symmetric: bool) -> Array:
    """0 for sound values, 1 for values that are not finite, 2 for an asymmetric matrix."""
    # Extremes carry NaN and infinity, and cost less than a mask of the size of x.
    finite = xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x))
    one = xp.astype(finite, xp.int32)
    fault = 1 - one
    if symmetric:
        if is_numpy(x):  # infinity minus itself warns in NumPy
            if not finite:
                return fault
        elif not is_torch(x):
            x = xp.where(xp.isfinite(x), x, xp.zeros_like(x))
        tolerance = max(SYMMETRY_TOLERANCE, 8 * float(xp.finfo(x.dtype).eps))
        uneven = xp.any(_asymmetry(xp, x) > tolerance * peak(xp, x))
        fault = fault + 2 * one * xp.astype(uneven, xp.int32)
    return fault


def _asymmetry(xp: Namespace, x: Array) -> Array:
    """Largest entry of |x - xᵀ| in each matrix, kept as two axes of length one."""
    gaps = []
    for rows, columns in mirror_tiles(x):
        difference = x[..., rows, columns] - x[..., columns, rows].mT
        largest, smallest = (f(difference, axis=(-2, -1)) for f in (xp.max, xp.min))
        gaps.append(xp.maximum(largest, -smallest))
    return xp.max(xp.stack(gaps), axis=0)[..., None, None]
