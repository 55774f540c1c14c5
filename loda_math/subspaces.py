"""Input directions of the branches: general, isolated, trace-ratio and null subspaces (LoDA, §3).

Each has a function that returns the basis, and one that returns the basis with its eigenvalues,
effective rank and gap. Where the gap is small, only the energy of the basis is meaningful, not its
directions.
"""

from typing import Any, Literal, NamedTuple, get_args

from loda_math import _subspaces, _trace_ratio
from loda_math._arrays import Array, Namespace, detached, is_array, result_dtype, safe_divide
from loda_math._subspaces import RidgeScale, checked_ridge
from loda_math._validation import MomentLike, check_rank, check_share, checked_moments

IsolatedObjective = Literal["quotient", "trace_ratio"]
RankMeasure = Literal["energy", "ratio"]


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


def general_subspace(
    new: MomentLike | None = None,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    accumulation_eps: float | None = None,
) -> Array:
    r"""Directions of most energy for old and new tasks together.

    Maximises :math:`E(U; S_{old}) + E(U; S_{new})` over orthonormal U: the leading eigenvectors
    of :math:`S_{old} + S_{new}`. The sum is taken as given, so the scale of the history counts.

    Parameters
    ----------
    new : array of shape (..., D, D), Moments or History, optional
        Second moment of the current task. Of `Moments` the mean counts, of a `History` the total,
        and their rounding unit with them. Left out, the history alone counts.
    old : array of shape (..., D, D), Moments or History, optional
        History; left out or ``None`` on the first task. Leading axes broadcast against ``new``.
    rank : int
        Number of directions r, from 1 to D. Spans are nested in the rank, except within ties:
        among equal eigenvalues SciPy's partial solver, which solves large moments in host memory,
        may choose other directions for another rank.
    accumulation_eps : float, optional
        Rounding unit of the arithmetic that formed the moments, where it was coarser than their
        dtype: 1.2e-7 for float64 sums of float32 Gram matrices, as :func:`second_moment` makes of
        float32 tokens (:func:`rounding_unit` knows it). `Moments` and `History` carry theirs, and
        need none. Directions with no more energy than rounding of their channels may leave are
        noise: others take their place, or zero columns where there are no others.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling energy, the entry of largest magnitude of each positive;
        zero columns beyond the numerical rank. Dtype of the inputs, solved in float64 where the
        library has it.

    Raises
    ------
    TypeError
        If there is no moment, a moment is not a real floating-point array, or the rank no integer.
    ValueError
        If moments are not square, differ in size, are not finite or not symmetric, or the rank
        is out of range.

    See Also
    --------
    general_solution : The same with eigenvalues, effective rank and gap.
    isolated_subspace : Directions that the old tasks use little.
    rank_for : How many directions are enough.
    verify.verify_subspace : Check a basis that came from elsewhere.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.2. Bases are constants: no derivative flows through any
    result of the solvers, since that of an eigenvector does not exist where eigenvalues tie.

    Examples
    --------
    >>> import numpy as np
    >>> general_subspace(np.diag([1.0, 2.0, 0.0]), np.diag([0.0, 0.0, 4.0]), 2)
    array([[0., 0.],
           [0., 1.],
           [1., 0.]])
    """
    return general_solution(new, old, rank, accumulation_eps=accumulation_eps).basis


def isolated_subspace(
    new: MomentLike,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    objective: IsolatedObjective = "quotient",
    energy_floor: float = 0.0,
    accumulation_eps: float | None = None,
) -> Array:
    r"""Directions of high energy for the new task and low energy for the old ones (Theorem 2.2).

    With each moment divided by its trace, :math:`R = \bar S_{old} + (\alpha / D) I = L L^\top` and
    V the leading eigenvectors of :math:`L^{-1} \bar S_{new} L^{-\top}`, the basis spans
    :math:`L^{-\top} V`: it maximises
    :math:`\operatorname{tr}((U^\top R U)^{-1} U^\top \bar S_{new} U)`.

    Parameters
    ----------
    new : array of shape (..., D, D), Moments or History
        Second moment of the current task, as in :func:`general_subspace`.
    old : array of shape (..., D, D), Moments or History, optional
        History. ``None`` or zero gives the leading directions of ``new``; a singular history
        gives, as the ridge shrinks, the best directions inside its null space.
    rank : int
        Number of directions r, from 1 to D; spans are nested as in :func:`general_subspace`.
    ridge : float, default 1e-2
        α, relative to an energy of the history that ``ridge_scale`` names. The ridge is never
        taken below 4·D·eps of the mean energy, eps of the arithmetic that formed the inputs,
        which keeps the factorisation safe.
    ridge_scale : {"mean", "channels", "eigenvalues"}
        Energy of the history that α is relative to: the mean energy of a direction, or a typical
        one, for which no channel (or no eigenvalue) counts more than eight times the result. The
        mean drowns what the new task alone uses where the tasks share a channel a hundred times
        larger than the others; the typical energy does not (see `docs/theory.md`). Of channels it
        costs about one per cent of a solve and depends on the coordinates; of eigenvalues it is
        free of them, and nearly doubles the time of a large solve.
    objective : {"quotient", "trace_ratio"}
        What is maximised: the trace of the quotient, as above, or the ratio of traces, as
        :func:`trace_ratio_subspace` does.
    energy_floor : float, default 0
        τ in [0, 1], for the ratio of traces only: look among the bases that carry at least τ of
        the new-task energy that r directions can carry. With a floor of 0 the best ratio may come
        from directions with almost no energy.
    accumulation_eps : float, optional
        As in :func:`general_subspace`. The ridge is not taken below 4·D times it.

    Returns
    -------
    array, shape (..., D, r)
        Orthonormal columns by falling generalised eigenvalue, the entry of largest magnitude of
        each positive; zero columns where the new task has no energy beyond the rounding of the
        channels that a direction lies on. Invariant to the scale of either moment.

    Raises
    ------
    TypeError
        If a moment is not a real floating-point array, or the rank no integer.
    ValueError
        If moments are not square, differ in size, are not finite or not symmetric, the history
        has eigenvalues below -ridge/D of its trace, the rank is out of range, the ridge negative,
        the objective unknown, or a floor is given for the quotient. Negative eigenvalues of
        ``new`` are not looked for.

    See Also
    --------
    isolated_solution : The same with eigenvalues, effective rank and gap.
    trace_ratio_solution : The ratio of traces with its certificate.
    null_subspace : Least energy for the old tasks, whatever the new one needs.
    heldout_ratio : What the directions keep on unseen images.
    verify.verify_subspace : Check a basis that came from elsewhere.

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
    return isolated_solution(
        new,
        old,
        rank,
        ridge=ridge,
        ridge_scale=ridge_scale,
        objective=objective,
        energy_floor=energy_floor,
        accumulation_eps=accumulation_eps,
    ).basis


def trace_ratio_subspace(
    new: MomentLike,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    energy_floor: float = 0.0,
    accumulation_eps: float | None = None,
) -> Array:
    r"""Directions with the largest ratio of new-task to old-task energy.

    Maximises :math:`\operatorname{tr}(U^\top \bar S_{new} U) / \operatorname{tr}(U^\top R U)` over
    orthonormal U, with :math:`R` as in :func:`isolated_subspace`. Theorem 2.2 maximises
    :math:`\operatorname{tr}((U^\top R U)^{-1} U^\top \bar S_{new} U)` instead; of the two, this is
    the ratio that the theorem states. The maximiser consists of the leading eigenvectors of
    :math:`\bar S_{new} - \kappa R` at the κ where they sum to zero, found by Newton's steps: three
    or four eigenproblems where values can be read, a fixed number of sixteen in compiled code.

    Parameters
    ----------
    new, old, rank, ridge, ridge_scale, energy_floor, accumulation_eps
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

    See Also
    --------
    trace_ratio_solution : The same with a bound on what is left to gain.
    isolated_subspace : The closed form of the theorem, and both objectives under one name.

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
    return trace_ratio_solution(
        new,
        old,
        rank,
        ridge=ridge,
        ridge_scale=ridge_scale,
        energy_floor=energy_floor,
        accumulation_eps=accumulation_eps,
    ).basis


def null_subspace(old: MomentLike, rank: int) -> Array:
    r"""Directions in which the old tasks have least energy.

    Minimises :math:`E(U; S_{old})` over orthonormal U: the trailing eigenvectors. What null-space
    methods train in; correlated tasks leave little new-task energy there.

    Parameters
    ----------
    old : array of shape (..., D, D), Moments or History
        History, as in :func:`general_subspace`.
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

    See Also
    --------
    null_solution : The same with eigenvalues and gap.
    isolated_subspace : Weighs the energy of the new task against that of the old ones.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.1 (the case against null-space methods).

    Examples
    --------
    >>> import numpy as np
    >>> null_subspace(np.diag([3.0, 0.0, 1.0]), 1).ravel()
    array([0., 1., 0.])
    """
    return null_solution(old, rank).basis


def general_solution(
    new: MomentLike | None = None,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    accumulation_eps: float | None = None,
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

    See Also
    --------
    general_subspace : The basis alone.
    isolated_solution : The isolated subspace.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> solution = general_solution(np.diag([1.0, 2.0, 0.0]), np.diag([0.0, 0.0, 4.0]), 2)
    >>> solution.values, int(solution.effective_rank), float(solution.gap)
    (array([4., 2.]), 2, 0.25)
    """
    xp, size, new, old, gram_eps = _checked(new, old, accumulation_eps)
    rank = check_rank(rank, size)
    return _solution(xp, _subspaces.general(xp, new, old, rank, gram_eps), rank, new, old)


def isolated_solution(
    new: MomentLike,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    objective: IsolatedObjective = "quotient",
    energy_floor: float = 0.0,
    accumulation_eps: float | None = None,
) -> SubspaceSolution:
    r"""Solve for the isolated subspace: basis, generalised eigenvalues, effective rank and gap.

    Parameters
    ----------
    new, old, rank, ridge, ridge_scale, objective, energy_floor, accumulation_eps
        As in :func:`isolated_subspace`.

    Returns
    -------
    SubspaceSolution
        ``values`` are generalised eigenvalues of :math:`(\bar S_{new}, R)`; without history,
        eigenvalues of :math:`\bar S_{new}`. For the ratio of traces they are the ratio of each
        column, and the gap is that of :class:`TraceRatioSolution`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`isolated_subspace`.

    See Also
    --------
    isolated_subspace : The basis alone.
    trace_ratio_solution : The certificate of the ratio of traces.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.2.

    Examples
    --------
    >>> import numpy as np
    >>> new, old = np.diag([4.0, 2.0, 1.0, 0.0]), np.diag([8.0, 1.0, 0.1, 0.0])
    >>> solution = isolated_solution(new, old, 4)
    >>> solution.values.round(3), int(solution.effective_rank)
    (array([10.591,  2.542,  0.648,  0.   ]), 3)
    """
    if objective not in get_args(IsolatedObjective):
        msg = f"objective must be one of {get_args(IsolatedObjective)}, got {objective!r}"
        raise ValueError(msg)
    strength = checked_ridge(ridge, ridge_scale)
    energy_floor = check_share("energy_floor", energy_floor)
    xp, size, new, old, gram_eps = _checked(new, old, accumulation_eps, needs_new=True)
    rank = check_rank(rank, size)
    if objective == "quotient":
        if is_array(energy_floor) or energy_floor != 0:
            msg = (
                f"energy_floor must be 0 for the objective 'quotient', got {energy_floor}; pass "
                "objective='trace_ratio'"
            )
            raise ValueError(msg)
        directions = _subspaces.isolated(xp, new, old, rank, strength, gram_eps)
        return _solution(xp, directions, rank, new, old)
    best = _trace_ratio.trace_ratio(xp, new, old, rank, strength, energy_floor, gram_eps)
    solution = _solution(xp, best.directions, rank, new, old)
    return solution._replace(gap=xp.astype(best.gap[..., 0], result_dtype(xp, new, old)))


def trace_ratio_solution(
    new: MomentLike,
    old: MomentLike | None = None,
    rank: int | None = None,
    *,
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    energy_floor: float = 0.0,
    accumulation_eps: float | None = None,
) -> TraceRatioSolution:
    r"""Solve for the best ratio of traces, and return the certificate beside the basis.

    Parameters
    ----------
    new, old, rank, ridge, ridge_scale, energy_floor, accumulation_eps
        As in :func:`isolated_subspace`.

    Returns
    -------
    TraceRatioSolution
        ``upper - ratio`` bounds what is left to gain: rounding at the maximiser; where a floor
        binds, also the step of the energy at which the multiplier stopped.

    Raises
    ------
    TypeError, ValueError
        As in :func:`isolated_subspace`.

    See Also
    --------
    trace_ratio_subspace : The basis alone.
    isolated_solution : The generalised eigenvectors.

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
    strength = checked_ridge(ridge, ridge_scale)
    energy_floor = check_share("energy_floor", energy_floor)
    xp, size, new, old, gram_eps = _checked(new, old, accumulation_eps, needs_new=True)
    rank = check_rank(rank, size)
    best = _trace_ratio.trace_ratio(xp, new, old, rank, strength, energy_floor, gram_eps)
    dtype = result_dtype(xp, new, old)
    return TraceRatioSolution(
        basis=_subspaces.finished_basis(xp, best.directions, rank, new, old),
        ratio=xp.astype(best.ratio[..., 0, 0], dtype),
        upper=xp.astype(best.upper[..., 0, 0], dtype),
        multiplier=xp.astype(best.multiplier[..., 0, 0], dtype),
        residual=xp.astype(best.residual[..., 0, 0], dtype),
        energy=xp.astype(best.energy[..., 0, 0], dtype),
        effective_rank=_subspaces.count_true(xp, ~best.directions.inert),
        gap=xp.astype(best.gap[..., 0], dtype),
    )


def null_solution(old: MomentLike, rank: int) -> SubspaceSolution:
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

    See Also
    --------
    null_subspace : The basis alone.
    general_solution : The directions of most energy.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.1.

    Examples
    --------
    >>> import numpy as np
    >>> solution = null_solution(np.diag([3.0, 0.0, 1.5]), 1)
    >>> solution.values, float(solution.gap)
    (array([0.]), 0.5)
    """
    xp, size, (history,), _ = checked_moments({"old": old})
    history = detached(history)
    rank = check_rank(rank, size)
    directions = _subspaces.null(xp, history, rank)
    solution = _solution(xp, directions, rank, history)
    # The values increase here, so the gap is on the other side; no direction is noise.
    last, following = directions.values[..., rank - 1], directions.values[..., min(rank, size - 1)]
    gap = safe_divide(xp, following - last, directions.largest[..., 0])
    gap = gap if rank < size else xp.ones_like(gap)
    return solution._replace(gap=xp.astype(gap, history.dtype))


def rank_for(
    new: MomentLike | None = None,
    old: MomentLike | None = None,
    share: float | None = None,
    *,
    of: RankMeasure = "energy",
    ridge: float = 1e-2,
    ridge_scale: RidgeScale = "mean",
    accumulation_eps: float | None = None,
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
    new, old
        As in :func:`general_subspace`; for the ratio ``new`` is needed.
    share : float
        Share to reach, from 0 to 1. Directions at the level of rounding do not count, so that 1
        gives the numerical rank.
    of : {"energy", "ratio"}
        What the share is a share of.
    ridge, ridge_scale
        As in :func:`isolated_subspace`; for the ratio only.
    accumulation_eps : float, optional
        As in :func:`general_subspace` and :func:`isolated_subspace`.

    Returns
    -------
    RankChoice
        ``rank`` (...) and ``curve`` (..., D): one entry a layer where moments are stacked.

    Raises
    ------
    TypeError
        If a moment is missing or not a real floating-point array.
    ValueError
        If moments are not square, differ in size, are not finite or not symmetric, the share is
        outside [0, 1] or the measure unknown.

    See Also
    --------
    general_solution : Eigenvalues of the energy.
    isolated_solution : Generalised eigenvalues of the ratio.

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
    share, strength = check_share("share", share), checked_ridge(ridge, ridge_scale)
    xp, size, new, old, gram_eps = _checked(new, old, accumulation_eps, needs_new=of == "ratio")
    if of == "energy":
        directions = _subspaces.general(xp, new, old, size, gram_eps)
    else:
        directions = _subspaces.isolated(xp, new, old, size, strength, gram_eps)
    values = xp.where(directions.inert, xp.zeros_like(directions.values), directions.values)
    # Shares of the largest first: sums of huge eigenvalues stay in range.
    sums = xp.cumulative_sum(safe_divide(xp, values, directions.largest + 0 * values), axis=-1)
    curve = safe_divide(xp, sums, sums[..., -1:] + 0 * sums)
    # A share written in decimals is met by a sum that misses it by rounding.
    slack = 4 * size * float(xp.finfo(curve.dtype).eps)
    short = _subspaces.count_true(xp, curve < share - slack)
    numerical_rank = _subspaces.count_true(xp, ~directions.inert)
    rank = xp.where(short + 1 < numerical_rank, short + 1, numerical_rank)
    return RankChoice(rank, xp.astype(curve, result_dtype(xp, new, old)))


def _checked(
    new: MomentLike | None,
    old: MomentLike | None,
    accumulation_eps: Any,
    *,
    needs_new: bool = False,
) -> tuple[Namespace, int, Array, Array | None, Any]:
    """Namespace, size, the moments and their rounding unit; a history alone comes as the first."""
    given = {"new": new, "old": old}
    if old is None or (new is None and not needs_new):
        del given["old" if old is None else "new"]
    xp, size, moments, gram_eps = checked_moments(given, accumulation_eps=accumulation_eps)
    new, old = (*map(detached, moments), None)[:2]
    return xp, size, new, old, gram_eps


def _solution(
    xp: Namespace, directions: _subspaces.Directions, rank: int, *like: Array | None
) -> SubspaceSolution:
    active = ~directions.inert
    values = xp.where(active, directions.values, xp.zeros_like(directions.values))
    chosen, active = values[..., :rank], active[..., :rank]
    effective_rank = _subspaces.count_true(xp, active)
    # Zero columns carry nothing: behind the last active direction there is only noise.
    last = xp.min(xp.where(active, chosen, directions.largest + 0 * chosen), axis=-1)
    if int(values.shape[-1]) > rank:
        last = last - xp.where(effective_rank == rank, values[..., rank], 0 * last)
    last = xp.where(effective_rank > 0, last, 0 * last)
    dtype = result_dtype(xp, *like)
    return SubspaceSolution(
        basis=_subspaces.finished_basis(xp, directions, rank, *like),
        values=xp.astype(chosen, dtype),
        effective_rank=effective_rank,
        gap=xp.astype(safe_divide(xp, last, directions.largest[..., 0]), dtype),
    )
