"""A basis against the exact optimum of its objective."""

from typing import Any, Literal, NamedTuple, get_args

from loda_math import _subspaces
from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    descending_eigh,
    descending_eigvalsh,
    detached,
    diagonal,
    eye_like,
    is_array,
    larger,
    reciprocal,
    result_dtype,
    rounding_share,
    safe_divide,
    span_energy,
    trace,
    widen,
)
from loda_math._rounding import carrying, channel_noise, noise_along
from loda_math._subspaces import Ridge, RidgeScale, checked_ridge
from loda_math._trace_ratio import trace_ratio
from loda_math._validation import MomentLike, check_rows, check_scalar, check_share, checked_moments

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
    direction_gap : array, shape (...)
        The same of the worst direction: the largest share of its own optimum that one of them
        misses, beyond what rounding of the moments and of the basis may take. For the null space
        the surplus energy as a share of that of the channels which the direction has weight on.
    objective, optimum : array, shape (...)
        Value of the objective at the span of the basis, and its best value for r directions.
    energy_new, energy_old : array, shape (...)
        Relative energies of the span.
    effective_rank : array of int, shape (...)
        Directions of the span with new-task energy above rounding.
    passed : array of bool, shape (...)
        Whether the first four are within the tolerance and the basis is complete. Only directions
        without energy beyond rounding may be zero columns; for the null space no column may be.
        For the ratio of traces the basis must meet the energy floor.
    """

    orthonormality: Array
    stationarity: Array
    optimality_gap: Array
    direction_gap: Array
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
        Limit of the gaps and of the orthonormality; the residual may reach its square root. What
        the digits of the stored basis take is allowed beside it: 2·eps of the orthonormality and,
        of the gaps, 4·eps² of the energy of the channels that a direction lies on. Where R
        is nearly singular, mere rounding moves gap and residual of the isolated subspace by
        2·eps·cond(R), and those of the ratio of traces by r·D·eps of the norm of R over the energy
        of the basis in it; that (up to a quarter) is added to both limits. Where a floor binds,
        rounding of the entries moves energy and ratio to first order, which is allowed too.

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

    See Also
    --------
    loda_math.isolated_solution : A basis of our own.
    verify_layer : Everything of a layer at once.

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
    # A report is no function to differentiate: it solves eigenproblems.
    basis, new, *others = map(detached, (basis, *moments))
    old = others[0] if others else xp.zeros_like(new)
    check_rows("basis", basis, size)
    span = _span_of(xp, basis)
    if objective == "isolated":
        quality = _isolated_at_better_ridge(xp, span, new, old, strength, gram_eps)
    elif objective == "trace_ratio":
        quality = _trace_ratio(xp, span, new, old, strength, energy_floor, gram_eps, tolerance)
    elif objective == "general":
        quality = _general(xp, span, new, old, gram_eps)
    else:
        quality = _null(xp, span, old, gram_eps)
    passed = (
        # Two columns of stored entries are orthogonal to the eps of the entries.
        (span.defect <= tolerance + 2 * span.eps)
        & quality.is_complete
        & (quality.gap <= tolerance + quality.slack)
        & (quality.shortfall <= tolerance)
        & (quality.residual <= tolerance**0.5 + quality.residual_slack)
    )
    s_new, s_old = (_subspaces.normalised(xp, m)[0] for m in widen(xp, new, old))
    largest = descending_eigvalsh(xp, s_new)[..., :1]
    noise = channel_noise(xp, s_new, largest, new, old, gram_eps=gram_eps)
    dtype = result_dtype(xp, basis, new, old)
    fields = (
        span.defect,
        quality.residual,
        quality.gap,
        quality.shortfall,
        quality.value,
        quality.optimum,
        span_energy(xp, span.basis, s_new),
        span_energy(xp, span.basis, s_old),
    )
    return SubspaceReport(
        *xp.broadcast_arrays(
            *(xp.astype(field, dtype) for field in fields),
            carrying(xp, span.basis, s_new, noise),
            passed,
        )
    )


class _Quality(NamedTuple):
    """What a span achieves under its objective, beside the exact optimum."""

    value: Array
    optimum: Array
    gap: Array
    residual: Array
    shortfall: Array  # of the direction that misses the largest share of what it could reach
    slack: Any = 0.0  # what rounding may add to the gap
    residual_slack: Any = 0.0
    is_complete: Any = True  # the basis has every direction, and the energy, that it must have


class _Span(NamedTuple):
    """The span of a basis, and how its basis of orthonormal vectors is made of the given columns.

    Columns that are stored in few digits are right to eps of their entries; so is a span, and what
    that costs it is of second order: eps² times the energies of the channels that its columns have
    weight on.
    """

    basis: Array  # (..., D, r), orthonormal, or zero
    turn: Array  # (..., r, r): basis = columns @ turn
    columns: Array  # as they were given, in the widest dtype
    active: Array  # (..., r), which vectors of the basis are not zero
    defect: Array  # (...), largest entry of |UᵀU − I|
    eps: float  # rounding unit of the columns

    def blur(self, xp: Namespace, channels: Array, coefficients: Array) -> Array:
        """Energy that rounding of the columns may bring into combinations of the basis."""
        energies = noise_along(xp, channels, self.columns)[..., None]
        mixture = self.turn @ coefficients
        return 4 * self.eps**2 * xp.sum(mixture * mixture * energies, axis=-2)


def _span_of(xp: Namespace, basis: Array) -> _Span:
    (u,) = widen(xp, basis)
    gram = u.mT @ u
    rank, eps = int(u.shape[-1]), float(xp.finfo(u.dtype).eps)
    # Zero columns stand for inert directions; a column that is merely short is a defect.
    ones = xp.astype(diagonal(xp, gram) > eps, u.dtype)
    defect = xp.max(xp.abs(gram - ones[..., None, :] * eye_like(xp, u, rank)), axis=(-2, -1))
    values, vectors = descending_eigh(xp, gram)
    active = (values > rounding_share(xp, rank, u) * values[..., :1]) & (values > eps)
    turn = (
        vectors
        * reciprocal(xp, xp.sqrt(xp.where(active, values, 0 * values)), active)[..., None, :]
    )
    return _Span(u @ turn, turn, u, active, defect, float(xp.finfo(basis.dtype).eps))


class _Ritz(NamedTuple):
    """Stationary values of a quadratic form on a span, falling, and where they are taken."""

    values: Array  # (..., r)
    coefficients: Array  # (..., r, r)
    directions: Array  # (..., D, r) = basis @ coefficients


def _ritz(xp: Namespace, basis: Array, image: Array, metric: Array | None = None) -> _Ritz:
    """Of UᵀMU, given the image MU; relative to UᵀRU, given the image RU."""
    inner = basis.mT @ image
    if metric is None:
        values, coefficients = descending_eigh(xp, inner)
        return _Ritz(values, coefficients, basis @ coefficients)
    weights, vectors = descending_eigh(xp, basis.mT @ metric)
    size, eps = int(basis.shape[-2]), float(xp.finfo(basis.dtype).eps)
    root = xp.sqrt(xp.where(weights > 0, weights, 0 * weights))
    # Below rounding a weight is not known, and a vector without length has none.
    whiten = (
        vectors * reciprocal(xp, root, weights > size * eps**2 * weights[..., :1])[..., None, :]
    )
    values, turned = descending_eigh(xp, whiten.mT @ inner @ whiten)
    coefficients = whiten @ turned
    return _Ritz(values, coefficients, basis @ coefficients)


def _exact_basis(xp: Namespace, directions: _subspaces.Directions, rank: int) -> Array:
    """The exact solution, with zero columns where there is only noise."""
    basis = directions.basis[..., :rank]
    return xp.where(directions.inert[..., None, :rank], xp.zeros_like(basis), basis)


def _shortfall(
    xp: Namespace,
    exact: _Ritz,
    reached: _Ritz,
    allowed: Array,
    scale: Array,
    *,
    at_least_zero: bool = False,
) -> Array:
    """Largest share of its own scale by which a direction misses what it could reach.

    Both lists fall, so that the i-th of one stands against the i-th of the other, and no large
    direction can hide that a small one is wrong.
    """
    # A direction of noise alone is worth nothing, as one that is not there.
    values = reached.values
    if at_least_zero:
        values = xp.where(values > 0, values, 0 * values)
    missing = exact.values - values - allowed
    missing = xp.where((missing > 0) & (scale > 0), missing, 0 * missing)
    return xp.max(safe_divide(xp, missing, xp.abs(scale)), axis=-1)


def _general(xp: Namespace, span: _Span, new: Array, old: Array, gram_eps: Any) -> _Quality:
    """Of the general subspace."""
    rank, eps = int(span.basis.shape[-1]), span.eps
    n, o = widen(xp, new, old)
    s, _ = _subspaces.normalised(xp, n, o)
    spectrum = descending_eigvalsh(xp, s)
    noise = channel_noise(xp, s, spectrum[..., :1], new, old, gram_eps=gram_eps)
    image = s @ span.basis
    value, best = xp.sum(span.basis * image, axis=(-2, -1)), xp.sum(spectrum[..., :rank], axis=-1)
    solution = _exact_basis(xp, _subspaces.general(xp, new, old, rank, gram_eps), rank)
    # What a direction carries beyond noise is what counts of it.
    exact, reached = (_ritz(xp, u, s @ u - noise[..., None] * u) for u in (solution, span.basis))
    allowed = noise_along(xp, noise, exact.directions) + 4 * eps**2 * xp.abs(exact.values)
    return _Quality(
        value,
        best,
        gap=safe_divide(xp, best - value, best),
        residual=_relative(xp, image - span.basis @ (span.basis.mT @ image), s),
        shortfall=_shortfall(xp, exact, reached, allowed, exact.values, at_least_zero=True),
        slack=4 * eps**2 * rank,
        residual_slack=eps * rank**0.5,
    )


def _null(xp: Namespace, span: _Span, old: Array, gram_eps: Any) -> _Quality:
    """Of the null space of the history."""
    rank = int(span.basis.shape[-1])
    s, _ = _subspaces.normalised(xp, *widen(xp, old))
    spectrum = descending_eigvalsh(xp, s)
    channels = diagonal(xp, s)
    noise = channel_noise(xp, s, spectrum[..., :1], old, gram_eps=gram_eps)
    image = s @ span.basis
    value, best = xp.sum(span.basis * image, axis=(-2, -1)), xp.sum(spectrum[..., -rank:], axis=-1)
    solution = _subspaces.null(xp, old, rank).basis[..., :rank]
    exact, reached = (_ritz(xp, u, -(s @ u)) for u in (solution, span.basis))
    blur = span.blur(xp, channels, reached.coefficients)
    allowed = noise_along(xp, noise, exact.directions) + blur
    # A direction without energy is as good as its channels let one tell.
    scale = noise_along(xp, channels, exact.directions)
    return _Quality(
        value,
        best,
        gap=value - best,
        residual=_relative(xp, image - span.basis @ (span.basis.mT @ image), s),
        shortfall=_shortfall(xp, exact, reached, allowed, scale),
        slack=xp.sum(blur, axis=-1),
        residual_slack=span.eps * rank**0.5,
        # Fewer directions hold less energy, and are not what was asked for.
        is_complete=xp.all(span.active, axis=-1),
    )


def _isolated_at_better_ridge(
    xp: Namespace, span: _Span, new: Array, old: Array, ridge: Ridge, gram_eps: Any
) -> _Quality:
    """Of the isolated subspace, at the ridge with the smaller gap: the given or the least one."""
    given = _isolated(xp, span, new, old, ridge, gram_eps)
    size = int(new.shape[-1])
    n, o = widen(xp, new, old)
    s_old, _ = _subspaces.normalised(xp, o)
    alpha = _subspaces.relative_ridge(xp, s_old, ridge)
    floor = 4 * size * coarsest_eps(xp, new, old, gram_eps=gram_eps)
    if not is_array(alpha) and not is_array(floor) and alpha >= floor:
        return given
    # Rounding can leave small eigenvalues of a history negative: the least ridge lifts them all.
    lowest = -4 * size * xp.min(xp.linalg.eigvalsh(s_old))
    wide = _isolated(xp, span, n, o, Ridge(larger(xp, lowest, alpha)), 0.0)
    is_better = wide.gap < given.gap
    pairs = zip(wide[:-1], given[:-1], strict=True)
    return _Quality(*(xp.where(is_better, a, b) for a, b in pairs))


def _isolated(
    xp: Namespace, span: _Span, new: Array, old: Array, ridge: Ridge, gram_eps: Any
) -> _Quality:
    """Of the isolated subspace at one ridge."""
    s, r = _subspaces.regularised(xp, new, old, ridge, gram_eps)
    size, rank, eps = int(s.shape[-1]), int(span.basis.shape[-1]), float(xp.finfo(s.dtype).eps)
    # A one on the diagonal for zero columns leaves their part of the pencil at zero.
    ones = xp.astype(~span.active, s.dtype)[..., None] * eye_like(xp, s, rank)
    image, metric = s @ span.basis, r @ span.basis
    inner = xp.linalg.solve(span.basis.mT @ metric + ones, span.basis.mT @ image)
    directions = _subspaces.isolated(xp, new, old, rank, ridge, gram_eps)
    values = xp.where(directions.inert, xp.zeros_like(directions.values), directions.values)
    value, best = trace(xp, inner), xp.sum(values[..., :rank], axis=-1)
    spectrum = descending_eigvalsh(xp, r)
    condition = spectrum[..., 0] / spectrum[..., -1]
    arithmetic = xp.clip(2 * eps * condition, 0.0, 0.25)
    largest = descending_eigvalsh(xp, s)[..., :1]
    noise = channel_noise(xp, s, largest, new, old, gram_eps=gram_eps)
    exact, reached = (
        _ritz(xp, u, s @ u - noise[..., None] * u, r @ u)
        for u in (_exact_basis(xp, directions, rank), span.basis)
    )
    # A direction w with wᵀRw = 1 is known to the rounding of R along it, and of the pencil.
    length = xp.sum(exact.directions * exact.directions, axis=-2)
    blur = span.blur(xp, diagonal(xp, r), reached.coefficients)
    doubt = xp.clip(blur + size * eps * spectrum[..., :1] * length, 0.0, 0.5)
    rounding = size * eps * directions.largest
    allowed = noise_along(xp, noise, exact.directions) + rounding + doubt * xp.abs(exact.values)
    residual_slack = (
        span.eps * rank**0.5 * (1 + safe_divide(xp, values * spectrum[..., :1], largest))
    )
    return _Quality(
        value,
        best,
        gap=safe_divide(xp, best - value, best),
        residual=_relative(xp, image - r @ (span.basis @ inner), s),
        shortfall=_shortfall(xp, exact, reached, allowed, exact.values, at_least_zero=True),
        slack=arithmetic + xp.max(xp.clip(blur, 0.0, 0.5), axis=-1),
        residual_slack=arithmetic + xp.max(residual_slack, axis=-1),
    )


def _trace_ratio(
    xp: Namespace,
    span: _Span,
    new: Array,
    old: Array,
    ridge: Ridge,
    energy_floor: float,
    gram_eps: Any,
    tolerance: float,
) -> _Quality:
    """Of the ratio of traces under a floor."""
    s, r = _subspaces.regularised(xp, new, old, ridge, gram_eps)
    size, rank, eps = int(s.shape[-1]), int(span.basis.shape[-1]), float(xp.finfo(s.dtype).eps)
    best_known = trace_ratio(xp, new, old, rank, ridge, energy_floor, gram_eps)
    kappa = best_known.multiplier
    carried, held = span_energy(xp, span.basis, s), span_energy(xp, span.basis, r)
    value, best = safe_divide(xp, carried, held), best_known.ratio[..., 0, 0]
    shadow = r @ span.basis
    image = s @ span.basis - kappa * shadow
    residual = _relative(xp, image - span.basis @ (span.basis.mT @ image), s)
    gap = safe_divide(xp, best - value, best)
    # Directions left out as inert belong to the stationary point: the others are not one. Without
    # its inert directions a span may also have more than r directions can have.
    is_full = xp.all(span.active, axis=-1)
    residual = xp.where(is_full, residual, xp.zeros_like(residual))
    gap = xp.where(is_full, gap, xp.maximum(gap, 0 * gap))
    # A basis of fewer directions has a larger ratio: only inert ones may be left out.
    active_needed = _subspaces.count_true(xp, ~best_known.directions.inert)
    spectrum = descending_eigvalsh(xp, s)
    # Where a floor binds, rounding of the columns counts to first order: it lets energy of both
    # kinds in, κ of the new one for one of the old one, and the ratio is not stationary.
    entries = xp.abs(span.columns) @ xp.abs(span.turn)  # of the columns that a basis is made of
    turned = span.eps * xp.sum(
        entries * xp.abs(shadow - span.basis @ (span.basis.mT @ shadow)), axis=(-2, -1)
    )
    least = (energy_floor - tolerance - 4 * span.eps**2) * xp.sum(spectrum[..., :rank], axis=-1)
    is_complete = (_subspaces.count_true(xp, span.active) >= active_needed) & (
        carried >= least - kappa[..., 0, 0] * turned
    )
    first_order = xp.clip(value - kappa[..., 0, 0], 0.0, None) * turned
    noise = channel_noise(xp, s, spectrum[..., :1], new, old, gram_eps=gram_eps)
    # What is compared has the same directions: with those that are inert, or without.
    whole = best_known.directions.basis[..., :rank]
    active = _exact_basis(xp, best_known.directions, rank)
    solution = xp.where(is_full[..., None, None], whole, active)
    exact = _ritz(xp, solution, s @ solution - kappa * (r @ solution))
    reached = _ritz(xp, span.basis, image)
    # The form is a difference: its parts are what a direction is measured by.
    parts = exact.directions * (s @ exact.directions + kappa * (r @ exact.directions))
    scale = xp.sum(parts, axis=-2)
    r_norm = descending_eigvalsh(xp, r)[..., :1]
    blur = kappa[..., 0] * span.blur(xp, diagonal(xp, r), reached.coefficients)
    # Of a nearly singular R the least energies are rounding themselves.
    arithmetic = xp.clip(safe_divide(xp, rank * size * eps * r_norm[..., 0], held), 0.0, 0.25)
    allowed = (
        noise_along(xp, noise, exact.directions)
        + size * eps * kappa[..., 0] * r_norm
        + blur
        + 4 * span.eps**2 * xp.abs(exact.values)
    )
    return _Quality(
        value,
        best,
        gap,
        residual,
        shortfall=_shortfall(xp, exact, reached, allowed, scale),
        slack=arithmetic
        + 4 * span.eps**2 * rank
        + safe_divide(xp, xp.sum(blur, axis=-1) + first_order, carried),
        residual_slack=arithmetic
        + span.eps
        * rank**0.5
        * (1 + safe_divide(xp, kappa[..., 0] * r_norm, spectrum[..., :1]))[..., 0],
        is_complete=is_complete,
    )


def _relative(xp: Namespace, residual: Array, s: Array) -> Array:
    """Norm of a residual as a share of the norm of the moment that it came from."""
    size = xp.sqrt(xp.sum(residual * residual, axis=(-2, -1)))
    return safe_divide(xp, size, xp.sqrt(xp.sum(s * s, axis=(-2, -1))) + 0 * size)
