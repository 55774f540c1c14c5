"""Input directions of the branches: general, isolated and null subspaces (LoDA, Theorem 2.2)."""

from typing import Any

from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    descending_eigh,
    eye_like,
    fix_signs,
    lower_cholesky,
    namespace,
    result_dtype,
    rounding_share,
    safe_divide,
    symmetrise,
    trace,
    widen,
)
from loda_math._validation import check_rank, check_real, check_scalar, check_square, check_values


def general_subspace(new: Array, old: Array | None, rank: int, /) -> Array:
    r"""Directions of most energy for old and new tasks together.

    Maximises :math:`E(U; S_{old}) + E(U; S_{new})` over orthonormal U: the leading eigenvectors
    of :math:`S_{old} + S_{new}`. The sum is taken as given, so the scale of the history counts.

    Parameters
    ----------
    new : array, shape (..., D, D)
        Second moment of the current task.
    old : array, shape (..., D, D), or None
        History; ``None`` on the first task.
    rank : int
        Number of directions r, from 1 to D.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling energy, the entry of largest magnitude of each positive;
        zero columns beyond the numerical rank. Dtype of the inputs, solved in float64 where the
        library has it.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array, or the rank no int.
    ValueError
        If moments are not square, differ in shape, are not finite or not symmetric, or the rank
        is out of range.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.2. Bases are constants: do not differentiate through them.

    Examples
    --------
    >>> import numpy as np
    >>> general_subspace(np.diag([1.0, 2.0, 0.0]), np.diag([0.0, 0.0, 4.0]), 2)
    array([[0., 0.],
           [0., 1.],
           [1., 0.]])
    """
    xp = _checked(new, old, rank)
    (s,) = widen(xp, new)
    if old is not None:
        # Halving both keeps the sum of two large moments from overflowing.
        s = 0.5 * s + 0.5 * widen(xp, old)[0]
    return _leading(xp, _normalised(xp, s), new, old, rank)


def isolated_subspace(new: Array, old: Array | None, rank: int, /, *, ridge: float = 1e-2) -> Array:
    r"""Directions of high energy for the new task and low energy for the old ones (Theorem 2.2).

    With each moment divided by its trace, :math:`R = \bar S_{old} + (\alpha / D) I = L L^\top` and
    V the leading eigenvectors of :math:`L^{-1} \bar S_{new} L^{-\top}`, the basis spans
    :math:`L^{-\top} V`: it maximises
    :math:`\operatorname{tr}((U^\top R U)^{-1} U^\top \bar S_{new} U)`.

    Parameters
    ----------
    new : array, shape (..., D, D)
        Second moment of the current task.
    old : array, shape (..., D, D), or None
        History. ``None`` or zero gives the leading directions of ``new``; a singular history
        gives, as the ridge shrinks, the best directions inside its null space.
    rank : int
        Number of directions r, from 1 to D.
    ridge : float, default 1e-2
        α, relative to the mean eigenvalue of the history. Never taken below 4·D·eps of the
        inputs, which keeps the factorisation safe.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling generalised eigenvalue (the span is nested in r), the entry
        of largest magnitude of each positive; zero columns where the new task has no energy left
        (at the level of rounding: float64, D·eps of its largest eigenvalue). Invariant to the
        scale of either moment.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array, or the rank no int.
    ValueError
        If moments are not square, differ in shape, are not finite, symmetric and positive
        semi-definite, the rank is out of range or the ridge negative.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.2. Layer-norm outputs share exactly dead directions; there
    the unregularised ratio is 0/0 and jitter until Cholesky succeeds picks rounding noise. The
    relative ridge gives such directions a ratio of zero.

    Examples
    --------
    The last feature is dead for both tasks and is not chosen:

    >>> import numpy as np
    >>> isolated_subspace(np.diag([4.0, 2.0, 1.0, 0.0]), np.diag([8.0, 1.0, 0.1, 0.0]), 2)
    array([[0., 0.],
           [0., 1.],
           [1., 0.],
           [0., 0.]])
    """
    ridge = check_scalar("ridge", ridge)
    xp = _checked(new, old, rank)
    size = int(new.shape[-1])
    s_new = _normalised(xp, *widen(xp, new))
    if old is None:
        return _leading(xp, s_new, new, old, rank)
    floor = max(float(ridge), 4 * size * coarsest_eps(xp, new, old)) / size
    s_old = _normalised(xp, *widen(xp, old))
    factor = lower_cholesky(xp, s_old + floor * eye_like(xp, s_old, size), "old")
    half = xp.linalg.solve(factor, s_new)
    values, vectors = descending_eigh(xp, xp.linalg.solve(factor, half.mT))
    directions = xp.linalg.solve(factor.mT, vectors[..., :rank])
    # Householder QR keeps the span of leading columns whatever the conditioning of the factor.
    basis, _ = xp.linalg.qr(directions)
    # The ratio alone cannot tell noise: the ridge magnifies what rounding left in ``new``.
    directions = directions / xp.sqrt(xp.sum(directions * directions, axis=-2, keepdims=True))
    energy = xp.sum(directions * (s_new @ directions), axis=-2)
    largest = xp.max(xp.linalg.eigvalsh(s_new), axis=-1)[..., None]
    noise = rounding_share(xp, size, new, old) * largest
    faint = rounding_share(xp, size, s_new) * values[..., :1]
    inert = (energy <= noise) | (values[..., :rank] <= faint)
    return _finish(xp, basis, inert, result_dtype(xp, new, old))


def null_subspace(old: Array, rank: int, /) -> Array:
    r"""Directions in which the old tasks have least energy.

    Minimises :math:`E(U; S_{old})` over orthonormal U: the trailing eigenvectors. What null-space
    methods train in; correlated tasks leave little new-task energy there.

    Parameters
    ----------
    old : array, shape (..., D, D)
        History, symmetric.
    rank : int
        Number of directions r, from 1 to D.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by rising energy, the entry of largest magnitude of each positive.

    Raises
    ------
    TypeError, ValueError
        As in :func:`general_subspace`.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.1 (the case against null-space methods).

    Examples
    --------
    >>> import numpy as np
    >>> null_subspace(np.diag([3.0, 0.0, 1.0]), 1).ravel()
    array([0., 1., 0.])
    """
    xp = _checked(old, None, rank, name="old")
    _, vectors = descending_eigh(xp, _normalised(xp, *widen(xp, old)))
    tail = xp.flip(vectors[..., -rank:], axis=-1)
    return xp.astype(fix_signs(xp, tail), old.dtype)


def _checked(first: Array, second: Array | None, rank: int, name: str = "new") -> Namespace:
    moments = {name: first, "old": second} if second is not None else {name: first}
    xp = namespace(**moments)
    check_real(xp, **moments)
    check_rank(rank, check_square(**moments))
    check_values(xp, symmetric=moments)
    return xp


def _normalised(xp: Namespace, moment: Array) -> Array:
    """Moment of trace one; a zero moment stays zero."""
    # A first division by the largest entry keeps the trace of huge or tiny moments in range.
    largest = xp.max(xp.abs(moment), axis=(-2, -1), keepdims=True)
    moment = safe_divide(xp, moment, largest)
    # The trace of a true moment is positive; a negative one must not flip its sign.
    return symmetrise(safe_divide(xp, moment, xp.abs(trace(xp, moment))))


def _leading(xp: Namespace, s: Array, new: Array, old: Array | None, rank: int) -> Array:
    values, vectors = descending_eigh(xp, s)
    inert = values <= rounding_share(xp, int(s.shape[-1]), new, old) * values[..., :1]
    return _finish(xp, vectors[..., :rank], inert[..., :rank], result_dtype(xp, new, old))


def _finish(xp: Namespace, basis: Array, inert: Array, dtype: Any) -> Array:
    """Zero the inert directions, fix the signs and return to the dtype of the inputs."""
    basis = fix_signs(xp, basis) + 0.0  # turns -0 into 0
    return xp.astype(xp.where(inert[..., None, :], xp.zeros_like(basis), basis), dtype)
