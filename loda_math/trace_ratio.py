"""The largest ratio of traces, and the certificate that it is the largest."""

from typing import NamedTuple

from loda_math import _pencil, _trace_ratio
from loda_math._arrays import Array, result_dtype
from loda_math._validation import check_eps, check_scalar, check_share
from loda_math.subspaces import isolated_subspace


class TraceRatioSolution(NamedTuple):
    r"""A basis of large ratio of traces, with the certificate of how large it could be.

    Attributes
    ----------
    basis : array, shape (..., D, r)
        Orthonormal columns by falling new-task energy; zero columns where the span holds none.
    ratio : array, shape (...)
        :math:`\operatorname{tr}(U^\top \bar S_{new} U) / \operatorname{tr}(U^\top R U)`, all r
        directions counted.
    upper : array, shape (...)
        No r orthonormal directions that meet the floor have a larger ratio.
    multiplier : array, shape (...)
        κ: the basis is made of the leading eigenvectors of :math:`\bar S_{new} - \kappa R`, and
        no basis with at least its energy has a larger ratio.
    residual : array, shape (...)
        :math:`\operatorname{tr}(U^\top (\bar S_{new} - \kappa R) U)`; zero to rounding at the
        maximiser, positive where the floor binds.
    energy : array, shape (...)
        New-task energy of the basis over the most that r directions can carry.
    effective_rank : array of int, shape (...)
        Columns that are not zero.
    gap : array, shape (...)
        :math:`(\mu_r - \mu_{r+1}) / (\|\bar S_{new}\|_2 + \kappa \|R\|_2)` for the eigenvalues of
        :math:`\bar S_{new} - \kappa R`: relative noise in the moments far below it leaves the
        span as it is. 1 for r = D.
    """

    basis: Array
    ratio: Array
    upper: Array
    multiplier: Array
    residual: Array
    energy: Array
    effective_rank: Array
    gap: Array


def trace_ratio_subspace(
    new: Array,
    old: Array | None,
    rank: int,
    /,
    *,
    ridge: float = 1e-2,
    accumulation_eps: float = 0.0,
) -> Array:
    r"""Directions with the largest ratio of new-task to old-task energy.

    Maximises :math:`\operatorname{tr}(U^\top \bar S_{new} U) / \operatorname{tr}(U^\top R U)` over
    orthonormal U, with :math:`R` as in :func:`isolated_subspace`. Theorem 2.2 maximises
    :math:`\operatorname{tr}((U^\top R U)^{-1} U^\top \bar S_{new} U)` instead; of the two, this is
    the ratio that the theorem states. The maximiser consists of the leading eigenvectors of
    :math:`\bar S_{new} - \kappa R` at the κ where they sum to zero, found by a fixed number of
    Newton steps.

    Parameters
    ----------
    new, old, rank, ridge, accumulation_eps
        As in :func:`isolated_subspace`.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling new-task energy (the span is not nested in r); zero columns
        where the span holds none.

    Raises
    ------
    TypeError, ValueError
        As in :func:`isolated_subspace`.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.2; the iteration is Dinkelbach's. It carries less new-task
    energy than :func:`isolated_subspace`: give that an energy floor for a basis to train in.

    On JAX compile the call (``jax.jit`` with the rank fixed): without, each of its hundred
    different operations is compiled by itself, which takes several times as long for every new
    shape.

    Examples
    --------
    >>> import numpy as np
    >>> trace_ratio_subspace(np.diag([4.0, 2.0, 1.0]), np.diag([8.0, 1.0, 0.1]), 1).ravel()
    array([0., 0., 1.])
    """
    return isolated_subspace(
        new, old, rank, ridge=ridge, energy_floor=0.0, accumulation_eps=accumulation_eps
    )


def trace_ratio_solution(
    new: Array,
    old: Array | None,
    rank: int,
    /,
    *,
    ridge: float = 1e-2,
    energy_floor: float = 0.0,
    accumulation_eps: float = 0.0,
) -> TraceRatioSolution:
    r"""Solve for the best ratio of traces, and return the certificate beside the basis.

    Parameters
    ----------
    new, old, rank, ridge, accumulation_eps
        As in :func:`trace_ratio_subspace`.
    energy_floor : float, default 0
        τ in [0, 1]: share of the new-task energy that r directions can carry, to be kept.

    Returns
    -------
    TraceRatioSolution
        ``upper - ratio`` bounds what is left to gain: rounding at the maximiser; where a floor
        binds, also the step of the energy at which the multiplier stopped.

    Raises
    ------
    TypeError, ValueError
        As in :func:`isolated_subspace`.

    Notes
    -----
    For any V with at least the energy of U(κ), optimality of U(κ) gives
    :math:`E_R(V) \ge E_R(U) + (E(V) - E(U)) / \kappa`, hence the bounds.

    Examples
    --------
    >>> import numpy as np
    >>> new, old = np.diag([4.0, 2.0, 1.0, 0.0]), np.diag([8.0, 1.0, 0.1, 0.0])
    >>> best = trace_ratio_solution(new, old, 2)
    >>> bool(best.upper - best.ratio < 1e-12), round(float(best.energy), 3)
    (True, 0.167)
    """
    ridge = check_scalar("ridge", ridge)
    energy_floor = check_share("energy_floor", energy_floor)
    formed = check_eps("accumulation_eps", accumulation_eps)
    xp, rank = _pencil.checked(new, old, rank)
    best = _trace_ratio.maximise(xp, new, old, rank, ridge, energy_floor, formed)
    dtype = result_dtype(xp, new, old)
    scalars = (best.ratio, best.upper, best.multiplier, best.residual, best.energy)
    ratio, upper, multiplier, residual, energy = (xp.astype(x[..., 0, 0], dtype) for x in scalars)
    return TraceRatioSolution(
        basis=_pencil.finish(xp, best.found, rank, new, old),
        ratio=ratio,
        upper=upper,
        multiplier=multiplier,
        residual=residual,
        energy=energy,
        effective_rank=_pencil.count(xp, ~best.found.inert),
        gap=xp.astype(best.gap[..., 0], dtype),
    )
