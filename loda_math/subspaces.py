"""Input directions of the branches: general, isolated and null subspaces (LoDA, Theorem 2.2)."""

from loda_math import _pencil, _trace_ratio
from loda_math._arrays import Array
from loda_math._validation import check_eps, check_scalar, check_share


def general_subspace(
    new: Array, old: Array | None, rank: int, /, *, accumulation_eps: float = 0.0
) -> Array:
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
        Number of directions r, from 1 to D. Spans are nested in the rank, but not within a tie:
        among equal eigenvalues SciPy's partial solver, which large moments in host memory go to,
        may choose otherwise for another rank.
    accumulation_eps : float, default 0
        Rounding unit of the arithmetic that formed the moments, where it was coarser than their
        dtype: 1.2e-7 for float64 sums of float32 Gram matrices, as ``second_moment`` makes of
        float32 tokens. Directions below it are rounding noise and come out as zero columns.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling energy, the entry of largest magnitude of each positive;
        zero columns beyond the numerical rank. Dtype of the inputs, solved in float64 where the
        library has it.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array, or the rank no integer.
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
    formed = check_eps("accumulation_eps", accumulation_eps)
    xp, rank = _pencil.checked(new, old, rank)
    return _pencil.finish(xp, _pencil.general(xp, new, old, rank, formed), rank, new, old)


def isolated_subspace(
    new: Array,
    old: Array | None,
    rank: int,
    /,
    *,
    ridge: float = 1e-2,
    energy_floor: float | None = None,
    accumulation_eps: float = 0.0,
) -> Array:
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
        Number of directions r, from 1 to D; spans are nested as in :func:`general_subspace`.
    ridge : float, default 1e-2
        α, relative to the mean eigenvalue of the history. Never taken below 4·D·eps of the
        arithmetic that formed the inputs, which keeps the factorisation safe.
    energy_floor : float, optional
        τ in [0, 1]: maximise the ratio of traces instead, as :func:`trace_ratio_subspace` does,
        over the bases U(κ) that carry at least τ of the new-task energy that r directions can
        carry. Without a floor the best ratio may be one of directions that carry next to none.
    accumulation_eps : float, default 0
        Rounding unit of the arithmetic that formed the moments, where it was coarser than their
        dtype: 1.2e-7 for float64 sums of float32 Gram matrices, as ``second_moment`` makes of
        float32 tokens. The ridge is not taken below 4·D times it.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling generalised eigenvalue, the entry of largest magnitude of
        each positive; zero columns where the new task has no energy left (at the level of
        rounding: float64, D·eps of its largest eigenvalue). Invariant to the scale of either
        moment.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array, or the rank no integer.
    ValueError
        If moments are not square, differ in shape, are not finite or not symmetric, the history
        has eigenvalues below -ridge/D of its trace, the rank is out of range or the ridge
        negative. Negative eigenvalues of ``new`` are not looked for.

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
    formed = check_eps("accumulation_eps", accumulation_eps)
    xp, rank = _pencil.checked(new, old, rank)
    if energy_floor is None:
        found = _pencil.isolated(xp, new, old, rank, ridge, formed)
        return _pencil.finish(xp, found, rank, new, old)
    energy_floor = check_share("energy_floor", energy_floor)
    best = _trace_ratio.maximise(xp, new, old, rank, ridge, energy_floor, formed)
    return _pencil.finish(xp, best.found, rank, new, old)


def null_subspace(old: Array, rank: int, /) -> Array:
    r"""Directions in which the old tasks have least energy.

    Minimises :math:`E(U; S_{old})` over orthonormal U: the trailing eigenvectors. What null-space
    methods train in; correlated tasks leave little new-task energy there.

    Parameters
    ----------
    old : array, shape (..., D, D)
        History, symmetric.
    rank : int
        Number of directions r, from 1 to D; spans are nested as in :func:`general_subspace`.

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
    xp, rank = _pencil.checked_history(old, rank)
    return _pencil.finish(xp, _pencil.null(xp, old, rank), rank, old)
