"""A basis against the exact optimum of the objective that it claims."""

from typing import Literal, NamedTuple, get_args

from loda_math import _pencil
from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    eye_like,
    namespace,
    result_dtype,
    rounding_share,
    safe_divide,
    widen,
)
from loda_math._validation import (
    check_eps,
    check_real,
    check_rows,
    check_scalar,
    check_share,
    check_square,
    check_values,
)
from loda_math.verify import _objectives

Objective = Literal["general", "isolated", "trace_ratio", "null"]


class SubspaceReport(NamedTuple):
    r"""What a basis achieves, and what could be achieved.

    Attributes
    ----------
    orthonormality : array, shape (...)
        Largest entry of :math:`|U^\top U - I|`, zero columns aside.
    stationarity : array, shape (...)
        Relative residual of the eigenvalue equation of the objective; 0 at every optimum. Not
        measured, and 0, for the ratio of traces of a basis with zero columns.
    optimality_gap : array, shape (...)
        Share of the optimum that the span misses; for the null space, the surplus energy as a
        share of the trace. At least 0 for the ratio of traces of a basis with zero columns, whose
        objective may exceed the optimum for r directions.
    objective, optimum : array, shape (...)
        Value of the objective at the span of the basis, and its best value for r directions.
    energy_new, energy_old : array, shape (...)
        Relative energies of the span.
    effective_rank : array of int, shape (...)
        Directions of the span with new-task energy above rounding.
    passed : array of bool, shape (...)
        Whether the first three stay within the tolerance, and what the objective asks beside
        holds: for the ratio of traces the energy floor, and that no direction is zero that carries
        energy; for the null space that none is zero.
    """

    orthonormality: Array
    stationarity: Array
    optimality_gap: Array
    objective: Array
    optimum: Array
    energy_new: Array
    energy_old: Array
    effective_rank: Array
    passed: Array


def verify_subspace(
    basis: Array,
    new: Array,
    old: Array,
    /,
    objective: Objective,
    *,
    ridge: float = 1e-2,
    energy_floor: float = 0.0,
    accumulation_eps: float = 0.0,
    tolerance: float = 1e-5,
) -> SubspaceReport:
    r"""Check a basis against the exact optimum of its objective.

    =============== =============================================================================
    ``general``     :math:`\operatorname{tr}(U^\top (S_{old} + S_{new}) U)`, over the trace
    ``isolated``    :math:`\operatorname{tr}((U^\top R U)^{-1} U^\top \bar S_{new} U)`
    ``trace_ratio`` :math:`\operatorname{tr}(U^\top \bar S_{new} U) /
                    \operatorname{tr}(U^\top R U)`, its optimum under the energy floor
    ``null``        :math:`\operatorname{tr}(U^\top S_{old} U)`, over the trace; minimised
    =============== =============================================================================

    Parameters
    ----------
    basis : array, shape (..., D, r)
        U. For a down-projection with scale c, ``down.mT / c``. Objectives look at its span alone,
        so a basis that is not orthonormal is still measured.
    new, old : array, shape (..., D, D)
        Second moments that the basis was chosen from; zeros where there was no history.
    objective : {"general", "isolated", "trace_ratio", "null"}
        What the basis claims to optimise.
    ridge, energy_floor, accumulation_eps
        As in :func:`isolated_subspace`. An isolated basis that claims less ridge than the rounding
        of the moments asks for is judged twice, with that ridge and with the least that makes
        their float64 values definite; the verdict in its favour counts.
    tolerance : float, default 1e-5
        Of gaps and orthonormality; its square root of the residual. Where R is nearly singular,
        gap and residual of the isolated subspace cannot be told apart from rounding below
        2·eps·cond(R), which (up to a quarter) then counts as the tolerance.

    Returns
    -------
    SubspaceReport

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match, values are not finite, a moment is not symmetric or the objective
        unknown.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.2 and Theorem 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> new, old = np.diag([4.0, 2.0, 1.0]), np.diag([8.0, 1.0, 0.1])
    >>> report = verify_subspace(np.eye(3)[:, 1:], new, old, "isolated")
    >>> bool(report.passed), round(float(report.energy_new), 3)
    (True, 0.429)
    >>> bool(verify_subspace(np.eye(3)[:, :2], new, old, "isolated").passed)
    False
    """
    if objective not in get_args(Objective):
        msg = f"objective must be one of {get_args(Objective)}, got {objective!r}"
        raise ValueError(msg)
    ridge = check_scalar("ridge", ridge)
    energy_floor = check_share("energy_floor", energy_floor)
    formed = check_eps("accumulation_eps", accumulation_eps)
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    xp = namespace(basis=basis, new=new, old=old)
    check_real(xp, basis=basis, new=new, old=old)
    check_rows("basis", basis, check_square(new=new, old=old))
    check_values(xp, {"basis": basis}, {"new": new, "old": old})
    (u,) = widen(xp, basis)
    span, alive, orthonormality = _orthonormalised(xp, u)
    s_new, s_old = (_pencil.normalised(xp, m)[0] for m in widen(xp, new, old))
    whole, slack = orthonormality <= tolerance, 0.0
    if objective in ("general", "null"):
        value, best, gap, residual = _objectives.energy(
            xp, span, new, old, minimise=objective == "null"
        )
        if objective == "null":  # fewer directions hold less energy, and are not what was asked
            whole = whole & xp.all(alive, axis=-1)
    elif objective == "isolated":
        value, best, gap, residual, slack = _objectives.kindest(
            xp, span, alive, new, old, ridge=ridge, formed=formed
        )
    else:
        value, best, residual, enough = _objectives.ratio(
            xp, span, alive, new, old, ridge, energy_floor, formed, tolerance
        )
        whole = whole & enough
        # What was left out as inert belongs to the stationary point: the rest alone is none.
        residual = xp.where(xp.all(alive, axis=-1), residual, xp.zeros_like(residual))
        # Without its inert directions a span may have more than r directions can have.
        gap = safe_divide(xp, best - value, best)
        gap = xp.where(xp.all(alive, axis=-1), gap, xp.maximum(gap, 0 * gap))
    energies = [xp.sum(span * (m @ span), axis=(-2, -1)) for m in (s_new, s_old)]
    carried, _ = descending_eigh(xp, span.mT @ (s_new @ span))
    noise = rounding_share(xp, int(new.shape[-1]), new, old, formed=formed)
    effective = _pencil.count(
        xp, carried > noise * xp.max(xp.linalg.eigvalsh(s_new), axis=-1)[..., None]
    )
    passed = whole & (gap <= tolerance + slack) & (residual <= tolerance**0.5 + slack)
    reals = (orthonormality, residual, gap, value, best, *energies)
    dtype = result_dtype(xp, basis, new, old)
    cast = (xp.astype(x, dtype) for x in reals)
    return SubspaceReport._make((*cast, effective, passed))


def _orthonormalised(xp: Namespace, u: Array) -> tuple[Array, Array, Array]:
    """An orthonormal basis of the span (zero columns at the end), which live, and the defect."""
    gram = u.mT @ u
    rank = int(u.shape[-1])
    # Zero columns stand for inert directions; a column that is merely short is a defect.
    whole = xp.astype(xp.linalg.diagonal(gram) > float(xp.finfo(u.dtype).eps), u.dtype)
    defect = xp.max(xp.abs(gram - whole[..., None, :] * eye_like(xp, u, rank)), axis=(-2, -1))
    values, vectors = descending_eigh(xp, gram)
    eps = float(xp.finfo(u.dtype).eps)
    alive = (values > rounding_share(xp, rank, u) * values[..., :1]) & (values > eps)
    root = xp.sqrt(xp.where(alive, values, xp.ones_like(values)))
    turned = (u @ vectors) / root[..., None, :]
    return xp.where(alive[..., None, :], turned, xp.zeros_like(turned)), alive, defect
