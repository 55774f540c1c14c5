"""A basis against the exact optimum of its objective."""

from typing import Any, Literal, NamedTuple, get_args

from loda_math import _subspaces
from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    descending_eigh,
    descending_eigvalsh,
    diagonal,
    eye_like,
    is_array,
    larger,
    result_dtype,
    rounding_share,
    safe_divide,
    span_energy,
    trace,
    widen,
)
from loda_math._subspaces import Ridge, RidgeScale, checked_ridge
from loda_math._trace_ratio import trace_ratio
from loda_math._validation import (
    MomentLike,
    check_rows,
    check_scalar,
    check_share,
    checked_moments,
)

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
        Whether the first three are within the tolerance and the basis is complete. For the ratio
        of traces it must meet the energy floor, and only directions without energy may be zero
        columns; for the null space no column may be zero.
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
    new: MomentLike,
    old: MomentLike | None,
    objective: Objective,
    *,
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    energy_floor: float = 0.0,
    accumulation_eps: float | None = None,
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
        U. For a down-projection with scale c, ``down.mT / c``. Objectives depend only on its span,
        so a basis that is not orthonormal is still measured.
    new, old : array of shape (..., D, D), Moments or History
        Second moments that the basis was chosen from; ``None`` or zeros where there was no history.
    objective : {"general", "isolated", "trace_ratio", "null"}
        What the basis is meant to optimise.
    ridge, ridge_scale, energy_floor, accumulation_eps
        As in :func:`isolated_subspace`. A ridge below the rounding of the moments is tried twice:
        as raised to that rounding, and as the least one that makes the float64 moments definite.
        The better result for the basis counts.
    tolerance : float, default 1e-5
        Limit of the gap and of the orthonormality; the residual may reach its square root. Where R
        is nearly singular, mere rounding moves gap and residual of the isolated subspace by
        2·eps·cond(R), which (up to a quarter) is added to both limits.

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
    strength = checked_ridge(ridge, ridge_scale)
    energy_floor = check_share("energy_floor", energy_floor)
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    given = {"new": new} if old is None else {"new": new, "old": old}
    xp, size, moments, gram_eps = checked_moments(
        given, accumulation_eps=accumulation_eps, basis=basis
    )
    new, old = moments if len(moments) > 1 else (*moments, xp.zeros_like(*moments))
    check_rows("basis", basis, size)
    (u,) = widen(xp, basis)
    span, active, orthonormality = _orthonormalised(xp, u)
    if objective == "isolated":
        quality = _isolated_at_better_ridge(xp, span, active, new, old, strength, gram_eps)
    elif objective == "trace_ratio":
        quality = _trace_ratio(
            xp, span, active, new, old, strength, energy_floor, gram_eps, tolerance
        )
    else:
        quality = _energy(xp, span, active, new, old, minimise=objective == "null")
    passed = (
        (orthonormality <= tolerance)
        & quality.is_complete
        & (quality.gap <= tolerance + quality.slack)
        & (quality.residual <= tolerance**0.5 + quality.slack)
    )
    s_new, s_old = (_subspaces.normalised(xp, m)[0] for m in widen(xp, new, old))
    carried, _ = descending_eigh(xp, span.mT @ (s_new @ span))
    noise = rounding_share(xp, size, new, old, gram_eps=gram_eps)
    noise = noise * xp.max(xp.linalg.eigvalsh(s_new), axis=-1)[..., None]
    dtype = result_dtype(xp, basis, new, old)
    fields = (
        orthonormality,
        quality.residual,
        quality.gap,
        quality.value,
        quality.optimum,
        span_energy(xp, span, s_new),
        span_energy(xp, span, s_old),
    )
    return SubspaceReport(
        *xp.broadcast_arrays(
            *(xp.astype(field, dtype) for field in fields),
            _subspaces.count_true(xp, carried > noise),
            passed,
        )
    )


class _Quality(NamedTuple):
    """What a span achieves under its objective, beside the exact optimum."""

    value: Array
    optimum: Array
    gap: Array
    residual: Array
    slack: Any = 0.0  # what rounding may add to gap and residual
    is_complete: Any = True  # the basis has every direction, and the energy, that it must have


def _orthonormalised(xp: Namespace, u: Array) -> tuple[Array, Array, Array]:
    """An orthonormal basis of the span, its columns that are not zero, and the defect of ``u``."""
    gram = u.mT @ u
    rank, eps = int(u.shape[-1]), float(xp.finfo(u.dtype).eps)
    # Zero columns stand for inert directions; a column that is merely short is a defect.
    ones = xp.astype(diagonal(xp, gram) > eps, u.dtype)
    defect = xp.max(xp.abs(gram - ones[..., None, :] * eye_like(xp, u, rank)), axis=(-2, -1))
    values, vectors = descending_eigh(xp, gram)
    active = (values > rounding_share(xp, rank, u) * values[..., :1]) & (values > eps)
    root = xp.sqrt(xp.where(active, values, xp.ones_like(values)))
    turned = (u @ vectors) / root[..., None, :]
    return xp.where(active[..., None, :], turned, xp.zeros_like(turned)), active, defect


def _energy(
    xp: Namespace, span: Array, active: Array, new: Array, old: Array, *, minimise: bool
) -> _Quality:
    """Of the general subspace, or minimised, of the null space."""
    n, o = widen(xp, new, old)
    s, _ = _subspaces.normalised(xp, o if minimise else 0.5 * n + 0.5 * o)
    image = s @ span
    value = xp.sum(span * image, axis=(-2, -1))
    values, rank = descending_eigvalsh(xp, s), int(span.shape[-1])
    best = xp.sum(values[..., -rank:] if minimise else values[..., :rank], axis=-1)
    return _Quality(
        value,
        best,
        gap=value - best if minimise else safe_divide(xp, best - value, best),
        residual=_relative(xp, image - span @ (span.mT @ image), s),
        # Fewer directions hold less energy, and are not what was asked for.
        is_complete=xp.all(active, axis=-1) if minimise else True,
    )


def _isolated_at_better_ridge(
    xp: Namespace,
    span: Array,
    active: Array,
    new: Array,
    old: Array,
    ridge: Ridge,
    gram_eps: float,
) -> _Quality:
    """Of the isolated subspace, at the ridge with the smaller gap: the given or the least one."""
    given = _isolated(xp, span, active, new, old, ridge, gram_eps)
    size = int(new.shape[-1])
    n, o = widen(xp, new, old)
    s_old, _ = _subspaces.normalised(xp, o)
    alpha = _subspaces.relative_ridge(xp, s_old, ridge)
    floor = 4 * size * coarsest_eps(xp, new, old, gram_eps=gram_eps)
    if not is_array(alpha) and not is_array(floor) and alpha >= floor:
        return given
    # Rounding can leave small eigenvalues of a history negative: the least ridge lifts them all.
    lowest = -4 * size * xp.min(xp.linalg.eigvalsh(s_old))
    least = larger(xp, lowest, alpha)
    wide = _isolated(xp, span, active, n, o, Ridge(least), 0.0)
    is_better = wide.gap < given.gap
    pairs = zip(wide[:-1], given[:-1], strict=True)
    return _Quality(*(xp.where(is_better, a, b) for a, b in pairs))


def _isolated(
    xp: Namespace, span: Array, active: Array, new: Array, old: Array, ridge: Ridge, gram_eps: float
) -> _Quality:
    """Of the isolated subspace at one ridge."""
    s, r = _subspaces.regularised(xp, new, old, ridge, gram_eps)
    rank = int(span.shape[-1])
    # A one on the diagonal for zero columns leaves their part of the pencil at zero.
    ones = xp.astype(~active, span.dtype)[..., None] * eye_like(xp, span, rank)
    image = s @ span
    inner = xp.linalg.solve(span.mT @ (r @ span) + ones, span.mT @ image)
    exact = _subspaces.isolated(xp, new, old, rank, ridge, gram_eps)
    values = xp.where(exact.inert, xp.zeros_like(exact.values), exact.values)
    value, best = trace(xp, inner), xp.sum(values[..., :rank], axis=-1)
    spectrum = xp.linalg.eigvalsh(r)
    condition = xp.max(spectrum, axis=-1) / xp.min(spectrum, axis=-1)
    return _Quality(
        value,
        best,
        gap=safe_divide(xp, best - value, best),
        residual=_relative(xp, image - r @ (span @ inner), s),
        slack=xp.clip(2 * float(xp.finfo(r.dtype).eps) * condition, 0.0, 0.25),
    )


def _trace_ratio(
    xp: Namespace,
    span: Array,
    active: Array,
    new: Array,
    old: Array,
    ridge: Ridge,
    energy_floor: float,
    gram_eps: float,
    tolerance: float,
) -> _Quality:
    """Of the ratio of traces under a floor."""
    s, r = _subspaces.regularised(xp, new, old, ridge, gram_eps)
    rank = int(span.shape[-1])
    exact = trace_ratio(xp, new, old, rank, ridge, energy_floor, gram_eps)
    carried, held = span_energy(xp, span, s), span_energy(xp, span, r)
    value, best = safe_divide(xp, carried, held), exact.ratio[..., 0, 0]
    image = s @ span - exact.multiplier * (r @ span)
    residual = _relative(xp, image - span @ (span.mT @ image), s)
    gap = safe_divide(xp, best - value, best)
    # Directions left out as inert belong to the stationary point: the others are not one. Without
    # its inert directions a span may also have more than r directions can have.
    is_full = xp.all(active, axis=-1)
    residual = xp.where(is_full, residual, xp.zeros_like(residual))
    gap = xp.where(is_full, gap, xp.maximum(gap, 0 * gap))
    # A basis of fewer directions has a larger ratio: only inert ones may be left out.
    active_needed = _subspaces.count_true(xp, ~exact.directions.inert)
    spectrum = descending_eigvalsh(xp, s)[..., :rank]
    is_complete = (_subspaces.count_true(xp, active) >= active_needed) & (
        carried >= (energy_floor - tolerance) * xp.sum(spectrum, axis=-1)
    )
    return _Quality(value, best, gap, residual, is_complete=is_complete)


def _relative(xp: Namespace, residual: Array, s: Array) -> Array:
    """Norm of a residual as a share of the norm of the moment that it came from."""
    size = xp.sqrt(xp.sum(residual * residual, axis=(-2, -1)))
    return safe_divide(xp, size, xp.sqrt(xp.sum(s * s, axis=(-2, -1))) + 0 * size)
