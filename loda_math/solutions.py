"""Siblings of the basis functions: the basis with its eigenvalues, effective rank and gap.

Where the gap is small, only the energy of the basis is meaningful, not its directions.
"""

from typing import Any, NamedTuple

from loda_math import _pencil, _trace_ratio
from loda_math._arrays import Array, Namespace, result_dtype, safe_divide
from loda_math._validation import check_eps, check_scalar, check_share


class SubspaceSolution(NamedTuple):
    r"""A basis, and how far it can be trusted.

    Attributes
    ----------
    basis : array, shape (..., D, r)
        Orthonormal columns, zero beyond the effective rank.
    values : array, shape (..., r)
        Eigenvalue of each column, 0 for zero columns.
    effective_rank : array of int, shape (...)
        Columns that are not zero, e.
    gap : array, shape (...)
        :math:`(\lambda_e - \lambda_{e+1}) / \lambda_1`: how far the chosen directions are from
        the next one, as a share of the largest eigenvalue. Rounding and noise of relative size
        below it leave the span as it is.
    """

    basis: Array
    values: Array
    effective_rank: Array
    gap: Array


def general_solution(
    new: Array, old: Array | None, rank: int, /, *, accumulation_eps: float = 0.0
) -> SubspaceSolution:
    r"""Solve for the general subspace: basis, energies, effective rank and gap.

    Parameters
    ----------
    new, old, rank, accumulation_eps
        As in :func:`general_subspace`.

    Returns
    -------
    SubspaceSolution
        ``values`` are eigenvalues of :math:`S_{old} + S_{new}`, in units of the moments.

    Raises
    ------
    TypeError, ValueError
        As in :func:`general_subspace`.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> found = general_solution(np.diag([1.0, 2.0, 0.0]), np.diag([0.0, 0.0, 4.0]), 2)
    >>> found.values, int(found.effective_rank), float(found.gap)
    (array([4., 2.]), 2, 0.25)
    """
    formed = check_eps("accumulation_eps", accumulation_eps)
    xp, rank = _pencil.checked(new, old, rank)
    return _solution(xp, _pencil.general(xp, new, old, rank, formed), rank, new, old)


def isolated_solution(
    new: Array,
    old: Array | None,
    rank: int,
    /,
    *,
    ridge: float = 1e-2,
    energy_floor: float | None = None,
    accumulation_eps: float = 0.0,
) -> SubspaceSolution:
    r"""Solve for the isolated subspace: basis, generalised eigenvalues, effective rank and gap.

    Parameters
    ----------
    new, old, rank, ridge, energy_floor, accumulation_eps
        As in :func:`isolated_subspace`.

    Returns
    -------
    SubspaceSolution
        ``values`` are generalised eigenvalues of :math:`(\bar S_{new}, R)`; without history,
        eigenvalues of :math:`\bar S_{new}`. With an energy floor they are the ratio of each
        column, and the gap is that of :class:`TraceRatioSolution`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`isolated_subspace`.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> new, old = np.diag([4.0, 2.0, 1.0, 0.0]), np.diag([8.0, 1.0, 0.1, 0.0])
    >>> found = isolated_solution(new, old, 4)
    >>> found.values.round(3), int(found.effective_rank)
    (array([10.591,  2.542,  0.648,  0.   ]), 3)
    """
    ridge = check_scalar("ridge", ridge)
    formed = check_eps("accumulation_eps", accumulation_eps)
    xp, rank = _pencil.checked(new, old, rank)
    if energy_floor is None:
        return _solution(xp, _pencil.isolated(xp, new, old, rank, ridge, formed), rank, new, old)
    energy_floor = check_share("energy_floor", energy_floor)
    best = _trace_ratio.maximise(xp, new, old, rank, ridge, energy_floor, formed)
    whole = _solution(xp, best.found, rank, new, old)
    return whole._replace(gap=xp.astype(best.gap[..., 0], result_dtype(xp, new, old)))


def null_solution(old: Array, rank: int, /) -> SubspaceSolution:
    r"""Solve for the null space of old tasks: basis, energies, effective rank and gap.

    Parameters
    ----------
    old, rank
        As in :func:`null_subspace`.

    Returns
    -------
    SubspaceSolution
        ``values`` are the rising eigenvalues of the history, in its units; no column is zero; the
        gap is :math:`(\lambda_{r+1} - \lambda_r) / \lambda_{max}`, and 1 for r = D.

    Raises
    ------
    TypeError, ValueError
        As in :func:`null_subspace`.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> found = null_solution(np.diag([3.0, 0.0, 1.5]), 1)
    >>> found.values, float(found.gap)
    (array([0.]), 0.5)
    """
    xp, rank = _pencil.checked_history(old, rank)
    found = _pencil.null(xp, old, rank)
    whole = _solution(xp, found, rank, old)
    size = int(old.shape[-1])
    last, following = found.values[..., rank - 1], found.values[..., min(rank, size - 1)]
    top = found.largest[..., 0]
    gap = safe_divide(xp, following - last, top)
    gap = gap if rank < size else xp.ones_like(gap)
    return whole._replace(gap=xp.astype(gap, old.dtype))


def _solution(
    xp: Namespace, found: _pencil.Directions, rank: int, *like: Array | None
) -> SubspaceSolution:
    alive = ~found.inert
    values = xp.where(alive, found.values, xp.zeros_like(found.values))
    chosen, kept = values[..., :rank], alive[..., :rank]
    rank_found = _pencil.count(xp, kept)
    # Zero columns carry nothing: behind the last living direction there is only noise.
    last = xp.min(xp.where(kept, chosen, found.largest + 0 * chosen), axis=-1)
    if int(values.shape[-1]) > rank:
        last = last - xp.where(rank_found == rank, values[..., rank], 0 * last)
    top = found.largest[..., 0]
    gap = safe_divide(xp, xp.where(rank_found > 0, last, 0 * last), top)
    dtype: Any = result_dtype(xp, *like)
    basis = _pencil.finish(xp, found, rank, *like)
    return SubspaceSolution(basis, xp.astype(chosen, dtype), rank_found, xp.astype(gap, dtype))
