"""How many directions a layer needs: the rank that reaches a share of the energy or the ratio."""

from typing import Literal, NamedTuple, get_args

from loda_math import _pencil
from loda_math._arrays import Array, namespace, result_dtype, safe_divide
from loda_math._validation import (
    check_eps,
    check_real,
    check_scalar,
    check_share,
    check_square,
    check_values,
)

RankMeasure = Literal["energy", "ratio"]


class RankChoice(NamedTuple):
    """Smallest sufficient ranks, and the curves that they were read from.

    Attributes
    ----------
    rank : array of int, shape (...)
        Smallest rank whose share is reached; 0 for a zero moment.
    curve : array, shape (..., D)
        Share of the whole that 1, 2, ..., D directions reach; rising, 1 at the end.
    """

    rank: Array
    curve: Array


def rank_for(
    new: Array,
    old: Array | None,
    share: float,
    /,
    *,
    of: RankMeasure = "energy",
    ridge: float = 1e-2,
    accumulation_eps: float = 0.0,
) -> RankChoice:
    r"""Smallest rank that reaches a share of what all D directions would, layer by layer.

    ========== ===========================================================================
    ``energy`` of the general subspace: :math:`\sum_{i \le r} \lambda_i / \sum_i \lambda_i`
               over the eigenvalues of :math:`S_{old} + S_{new}`
    ``ratio``  of the isolated subspace, the same over the generalised eigenvalues of
               :math:`(\bar S_{new}, R)`, the objective of Theorem 2.2
    ========== ===========================================================================

    Parameters
    ----------
    new : array, shape (..., D, D)
        Second moment of the current task.
    old : array, shape (..., D, D), or None
        History; ``None`` on the first task.
    share : float
        Share to reach, from 0 to 1. Directions at the level of rounding do not count, so that 1
        gives the numerical rank.
    of : {"energy", "ratio"}
        What is shared out.
    ridge : float, default 1e-2
        As in :func:`isolated_subspace`; for the ratio only.
    accumulation_eps : float, default 0
        As in :func:`general_subspace` and :func:`isolated_subspace`.

    Returns
    -------
    RankChoice
        ``rank`` (...) and ``curve`` (..., D): one entry a layer where moments are stacked.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array.
    ValueError
        If moments are not square, differ in shape, are not finite or not symmetric, the share is
        outside [0, 1] or the measure unknown.

    Notes
    -----
    LoDA, arXiv:2603.00191, uses one rank for all layers; the energies are those of Section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> choice = rank_for(np.diag([6.0, 3.0, 1.0, 0.0]), None, 0.9)
    >>> int(choice.rank), choice.curve
    (2, array([0.6, 0.9, 1. , 1. ]))
    """
    if of not in get_args(RankMeasure):
        msg = f"of must be one of {get_args(RankMeasure)}, got {of!r}"
        raise ValueError(msg)
    share, ridge = check_share("share", share), check_scalar("ridge", ridge)
    formed = check_eps("accumulation_eps", accumulation_eps)
    moments = {"new": new} if old is None else {"new": new, "old": old}
    xp = namespace(**moments)
    check_real(xp, **moments)
    size = check_square(**moments)
    check_values(xp, symmetric=moments)
    if of == "energy":
        found = _pencil.general(xp, new, old, size, formed)
    else:
        found = _pencil.isolated(xp, new, old, size, ridge, formed)
    values = xp.where(found.inert, xp.zeros_like(found.values), found.values)
    # Shares of the largest first: sums of huge eigenvalues stay in range.
    sums = xp.cumulative_sum(safe_divide(xp, values, found.largest + 0 * values), axis=-1)
    curve = safe_divide(xp, sums, sums[..., -1:] + 0 * sums)
    # A share written in decimals is met by a sum that misses it by rounding.
    slack = 4 * size * float(xp.finfo(curve.dtype).eps)
    short = _pencil.count(xp, curve < share - slack)
    alive = _pencil.count(xp, ~found.inert)
    rank = xp.where(short + 1 < alive, short + 1, alive)
    return RankChoice(rank, xp.astype(curve, result_dtype(xp, new, old)))
