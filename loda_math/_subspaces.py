"""The eigenproblems behind the subspaces: general, generalised and null.

Each gives directions in order of merit with their eigenvalues, one more than is asked for, so that
the gap behind the last one is known.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

from loda_math._arrays import (
    Array,
    Namespace,
    add_to_diagonal,
    coarsest_eps,
    diagonal,
    fix_signs,
    is_array,
    larger,
    require_linear_algebra,
    result_dtype,
    safe_divide,
    symmetric_part,
    trace,
    widen,
)
from loda_math._eigh import (
    is_partial,
    largest_eigenvalue,
    leading_eigh,
    lower_cholesky,
    lower_solve,
    reduced_pencil,
    trailing_eigh,
)
from loda_math._rounding import channel_noise, is_noise, noise_along
from loda_math._validation import check_scalar

RidgeScale = Literal["mean", "channels", "eigenvalues"]
# How many times the typical energy a single energy may count for, at most.
CAP = 8


class Ridge(NamedTuple):
    """What is added to the history: α times its mean energy, or times a typical one."""

    alpha: Any
    scale: RidgeScale = "mean"


class Directions(NamedTuple):
    """Directions in order of merit, k = min(r + 1, D) of them, in the widest dtype."""

    basis: Array  # (..., D, k), orthonormal
    values: Array  # (..., k)
    inert: Array  # (..., k), true where a direction is rounding noise
    largest: Array  # (..., 1), the largest eigenvalue of the problem


def normalised(xp: Namespace, *moments: Array) -> tuple[Array, Array]:
    """Mean of the moments, of trace one (a zero one stays zero), and its trace, (..., 1, 1)."""
    require_linear_algebra(xp)
    energies: Array = sum(diagonal(xp, m) / len(moments) for m in moments)
    energies = energies[..., None, :]
    # The largest entry of a moment is on its diagonal. A first division by it keeps the trace of
    # huge or tiny moments in range.
    largest = xp.max(xp.abs(energies), axis=-1, keepdims=True)
    # The trace of a true moment is positive; a negative one must not flip its sign.
    total = xp.abs(xp.sum(safe_divide(xp, energies, largest), axis=-1, keepdims=True))
    return symmetric_part(xp, largest, total, *moments), total * largest


def checked_ridge(ridge: Any, ridge_scale: RidgeScale) -> Ridge:
    """The ridge, refused if it is negative or relative to nothing that is known."""
    if ridge_scale not in get_args(RidgeScale):
        msg = f"ridge_scale must be one of {get_args(RidgeScale)}, got {ridge_scale!r}"
        raise ValueError(msg)
    return Ridge(check_scalar("ridge", ridge), ridge_scale)


def regularised(
    xp: Namespace, new: Array, old: Array, ridge: Ridge, gram_eps: Any = 0.0
) -> tuple[Array, Array]:
    """Both moments of trace one, and the history with the ridge on it, a multiple of I."""
    size = int(new.shape[-1])
    s_new, s_old = (normalised(xp, s)[0] for s in widen(xp, new, old))
    least = 4 * size * coarsest_eps(xp, new, old, gram_eps=gram_eps)
    # An array is not read: it may be on an accelerator, or stand for a value that comes later.
    alpha = larger(xp, relative_ridge(xp, s_old, ridge), least)
    alpha = alpha[..., None, None] if is_array(alpha) else alpha
    return s_new, add_to_diagonal(xp, s_old, alpha / size)


def relative_ridge(xp: Namespace, s_old: Array, ridge: Ridge) -> Any:
    """The ridge over the mean energy of a history of trace one: a number or an array (...)."""
    alpha = xp.astype(ridge.alpha, s_old.dtype) if is_array(ridge.alpha) else ridge.alpha
    if ridge.scale == "mean":
        return alpha
    is_by_channel = ridge.scale == "channels"
    energies = diagonal(xp, s_old) if is_by_channel else xp.linalg.eigvalsh(s_old)
    return alpha * typical_share(xp, energies)


def typical_share(xp: Namespace, energies: Array) -> Array:
    """Typical over mean energy, from 0 to 1 (1 if all are zero): (..., D) to (...).

    The typical energy c is the mean of min(e_i, K c) for K = CAP: no energy counts for more than K
    times the result. It is the least of (e_1 + ... + e_{D-n}) / (D - K n) over n < D / K, with
    rising e: the line for n is the mean if exactly the n largest are capped, and never below it.
    """
    size = int(energies.shape[-1])
    rising = xp.sort(xp.clip(energies, 0.0, None), axis=-1)
    # From the smallest on: what huge energies leave is not a difference of huge sums.
    sums = xp.cumulative_sum(rising, axis=-1)
    capped = size - xp.cumulative_sum(xp.ones_like(rising), axis=-1)  # D-1, ..., 1, 0
    weights = 1 - CAP / size * capped
    counts = weights > 0
    shares = safe_divide(xp, sums / xp.where(counts, weights, 1 + 0 * weights), sums[..., -1:])
    # A zero history has no typical energy: the ridge decides alone, at any size.
    is_usable = counts & (sums[..., -1:] > 0)
    return xp.min(xp.where(is_usable, shares, xp.ones_like(shares)), axis=-1)


def general(
    xp: Namespace, new: Array, old: Array | None, rank: int, gram_eps: Any = 0.0
) -> Directions:
    """Leading eigenvectors of the sum of the moments, eigenvalues in the units of the moments."""
    moments = widen(xp, new) if old is None else widen(xp, new, old)
    # The mean of two large moments is in range where their sum is not.
    s, total = normalised(xp, *moments)
    directions = leading(xp, s, rank, new, old, gram_eps=gram_eps)
    scale = len(moments) * total[..., 0]
    return directions._replace(values=directions.values * scale, largest=directions.largest * scale)


def leading(
    xp: Namespace, s: Array, rank: int, *given: Array | None, gram_eps: Any = 0.0
) -> Directions:
    """Leading eigenvectors of a moment that came from the given arrays."""
    size, eps = int(s.shape[-1]), float(xp.finfo(s.dtype).eps)

    def solve(count: int) -> tuple[Directions, Array]:
        values, vectors = leading_eigh(xp, s, count)
        largest = values[..., :1]
        noise = channel_noise(xp, s, largest, *given, gram_eps=gram_eps)
        along = noise_along(xp, noise, vectors)
        inert = is_noise(xp, values, along, size * eps * largest)
        return Directions(vectors, values, inert, largest), xp.min(noise, axis=-1, keepdims=True)

    return _first_above_noise(xp, solve, min(rank + 1, size), s)


def isolated(
    xp: Namespace, new: Array, old: Array | None, rank: int, ridge: Ridge, gram_eps: Any = 0.0
) -> Directions:
    """Leading generalised eigenvectors of (new, old + ridge), Theorem 2.2, made orthonormal."""
    if old is None:
        s_new, _ = normalised(xp, *widen(xp, new))
        return leading(xp, s_new, rank, new, gram_eps=gram_eps)
    s_new, r = regularised(xp, new, old, ridge, gram_eps)
    largest = largest_eigenvalue(xp, s_new)
    noise = channel_noise(xp, s_new, largest, new, old, gram_eps=gram_eps)
    return generalised(xp, s_new, r, min(rank + 1, int(new.shape[-1])), noise)


def generalised(xp: Namespace, s_new: Array, r: Array, count: int, noise: Array) -> Directions:
    """Leading generalised eigenvectors of (S_new, R), orthonormalised in that order.

    Both matrices may be overwritten. ``noise`` is that of S_new by channel.
    """
    size, eps = int(s_new.shape[-1]), float(xp.finfo(s_new.dtype).eps)
    # With wᵀRw = 1 the squared length of w is at least the inverse of the trace of R.
    least = xp.min(noise, axis=-1, keepdims=True) / trace(xp, r)[..., None]
    factor = lower_cholesky(xp, r, "old", overwrite=True)
    reduced = reduced_pencil(xp, s_new, factor, overwrite=True)

    def solve(several: int) -> tuple[Directions, Array]:
        values, vectors = leading_eigh(xp, reduced, several)
        largest = values[..., :1]
        rounding = size * eps * largest
        # For wᵀRw = 1 the ratio is wᵀSw: noise in S_new counts as much as the ridge magnifies it.
        directions = lower_solve(xp, factor, vectors, transpose=True)
        inert = is_noise(xp, values, noise_along(xp, noise, directions) + rounding, rounding)
        return Directions(directions, values, inert, largest), least + rounding

    first = _first_above_noise(xp, solve, count, reduced)
    # Householder QR keeps the span of the leading columns even for an ill-conditioned factor.
    basis, _ = xp.linalg.qr(first.basis)
    return first._replace(basis=basis)


def _first_above_noise(
    xp: Namespace, solve: Callable[[int], tuple[Directions, Array]], wanted: int, like: Array
) -> Directions:
    """The first directions that carry more than noise, noise only where there are no more of them.

    ``solve`` gives as many directions as are asked for, by falling eigenvalue, and the least noise
    that any direction of a matrix like this may have. Noise of a large channel may come before
    smaller directions that are sound, so the search goes on behind it.
    """
    size = int(like.shape[-1])
    # A solver of the whole spectrum gives all of it at the same price, and nothing has to be read.
    count = wanted if is_partial(like, wanted) else size
    directions, least = solve(count)
    while count < size:
        short = count - count_true(xp, directions.inert)[..., None] < wanted
        # Eigenvalues fall: below the least noise none can be sound.
        if not bool(xp.any(short & (directions.values[..., -1:] > least))):
            break
        count = min(2 * count, size)
        directions, least = solve(count)
    inert = xp.astype(directions.inert, xp.int32)
    place = xp.cumulative_sum(0 * inert + 1, axis=-1)  # 1, 2, ..., so that no two keys are equal
    order = xp.argsort(place + count * inert, axis=-1)[..., :wanted]
    return directions._replace(
        basis=xp.take_along_axis(directions.basis, order[..., None, :], axis=-1),
        values=xp.take_along_axis(directions.values, order, axis=-1),
        inert=xp.take_along_axis(directions.inert, order, axis=-1),
    )


def null(xp: Namespace, old: Array, rank: int) -> Directions:
    """Trailing eigenvectors of the history, least energy first; none counts as inert."""
    count = min(rank + 1, int(old.shape[-1]))
    s, total = normalised(xp, *widen(xp, old))
    values, vectors, largest = trailing_eigh(xp, s, count, overwrite=True)
    values, largest = (v * total[..., 0] for v in (values, largest))
    return Directions(vectors, values, xp.zeros_like(values) > 0, largest)


def finished_basis(xp: Namespace, directions: Directions, rank: int, *like: Array | None) -> Array:
    """The basis as it is returned: inert columns zero, signs fixed, in the dtype of the inputs."""
    basis = fix_signs(xp, directions.basis[..., :rank]) + 0.0  # turns -0 into 0
    inert = directions.inert[..., None, :rank]
    return xp.astype(xp.where(inert, xp.zeros_like(basis), basis), result_dtype(xp, *like))


def count_true(xp: Namespace, mask: Array) -> Array:
    """How many entries of the last axis are true."""
    return xp.sum(xp.astype(mask, xp.int32), axis=-1)
