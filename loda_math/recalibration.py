"""Closed-form recalibration of the branches before merging, and its effect (LoDA, Theorem 2.3)."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    detached,
    diagonal,
    eye_like,
    is_array,
    is_concrete,
    namespace,
    peak,
    reciprocal,
    result_dtype,
    safe_divide,
    symmetrise,
    widen,
    with_derivative,
)
from loda_math._rounding import channel_noise, is_noise
from loda_math._validation import (
    CheckedMoments,
    MomentLike,
    check_columns,
    check_real,
    check_scalar,
    check_values,
    checked_moments,
    checked_weights,
)

RecalibrationForm = Literal["full", "diagonal", "box", "direction", "scalar"]

# Steps of the interior-point method: each reduces the complementarity to a tenth.
BOX_STEPS = 40


class UpdateEffect(NamedTuple):
    r"""Mean squared outputs that a recalibrated update adds or gives up.

    Attributes
    ----------
    old_change : array, shape (...)
        Change on old inputs, :math:`\operatorname{tr}(B \Lambda P \Lambda^\top B^\top)`.
    old_change_before : array, shape (...)
        The same for :math:`\Lambda = I`: without recalibration.
    new_loss : array, shape (...)
        What the update loses on new inputs,
        :math:`\operatorname{tr}(B (\Lambda - I) Q (\Lambda - I)^\top B^\top)`.
    new_change : array, shape (...)
        What the whole update does on new inputs, :math:`\operatorname{tr}(B Q B^\top)`.
    """

    old_change: Array
    old_change_before: Array
    new_loss: Array
    new_change: Array


def recalibration(
    up: Array,
    down: Array,
    new: MomentLike,
    old: MomentLike,
    gamma: float,
    form: RecalibrationForm = "full",
    *,
    history_weight: Any = 1.0,
    accumulation_eps: float | None = None,
) -> Array:
    r"""Coefficients Λ that trade interference with old tasks against loss of new knowledge.

    Minimises :func:`recalibration_loss` over Λ of the given form; the branch to merge is then
    :math:`B \Lambda A`. With :math:`P = A S_{old} A^\top` and :math:`Q = A S_{new} A^\top`:

    ============= ====================================================================
    ``full``      :math:`\Lambda = \gamma Q (P + \gamma Q)^{-1}`; free of B, any r×r
    ``diagonal``  :math:`((B^\top B) \circ (P + \gamma Q)) \lambda
                  = \gamma ((B^\top B) \circ Q) 1`; the best diagonal
    ``box``       the best diagonal with entries in [0, 1], which the diagonal form may leave
    ``direction`` :math:`\lambda_i = \gamma Q_{ii} / (P_{ii} + \gamma Q_{ii})`;
                  what the published code does
    ``scalar``    :math:`\lambda = \gamma \operatorname{tr}(B Q B^\top)
                  / \operatorname{tr}(B (P + \gamma Q) B^\top)`
    ============= ====================================================================

    Parameters
    ----------
    up : array, shape (..., O, r)
        Up-projection B.
    down : array, shape (..., r, D)
        Down-projection A, its scale included.
    new, old : array of shape (..., D, D), Moments or History
        Second moments of the layer's inputs on the new task (through the trained model) and in
        the history.
    gamma : float
        Weight γ of new knowledge, at least 0.
    form : {"full", "diagonal", "box", "direction", "scalar"}
        Shape of Λ.
    history_weight : float or array, shape (...), default 1
        h, at least 0: multiplies P. ``1 / tasks`` turns a history that is a sum over tasks into
        their mean; an array weighs every layer by itself. The same as γ / h.
    accumulation_eps : float, optional
        As in :func:`general_subspace`: directions of the branch whose energy on both tasks may be
        rounding of the moments get 0.

    Returns
    -------
    array, shape (..., r, r)
        Λ, always as a matrix. The full form has eigenvalues in [0, 1]; it is not symmetric.
        Directions without energy on either task get 0.

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match, values are not finite, a moment is not symmetric, γ is negative
        or the form unknown.

    See Also
    --------
    recalibration_loss : What is minimised.
    joint_recalibration : All branches of a layer together.
    merge : Fold the recalibrated branch in.
    verify.verify_recalibration : Check coefficients that came from elsewhere.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.3.

    Λ may be differentiated with respect to every argument (PyTorch, JAX), also where eigenvalues
    tie: :math:`d\Lambda = (d(\gamma Q) - \Lambda \, dK) K^{+}` with :math:`K = P + \gamma Q`,
    and no eigenvector is differentiated. Directions without energy stay without, and entries at a
    bound of the box stay there.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.ones((1, 2)), np.eye(2)
    >>> recalibration(up, down, np.diag([1.0, 0.0]), np.diag([3.0, 1.0]), 3.0)
    array([[0.5, 0. ],
           [0. , 0. ]])
    """
    if form not in get_args(RecalibrationForm):
        msg = f"form must be one of {get_args(RecalibrationForm)}, got {form!r}"
        raise ValueError(msg)
    gamma = check_scalar("gamma", gamma)
    (xp, _, (new, old), gram_eps), dtype = checked_update(
        up, down, new, old, accumulation_eps=accumulation_eps
    )
    weight = check_weight(xp, "history_weight", history_weight)
    b, p, q = projected(xp, up, down, new, old)
    noise = (projected_noise(xp, down, m, gram_eps) for m in (old, new))
    gamma_q, k, noise = scaled_system(xp, p, q, gamma, weight, *noise)
    # Λ has the batch of all arguments, of ``up`` too where its form does not depend on it.
    batch = xp.zeros_like(b[..., :1, :1])
    gamma_q, k = gamma_q + batch, k + batch
    rank = int(down.shape[-2])
    if form == "full":
        return xp.astype(_full(xp, k, gamma_q, noise), dtype)
    energy = diagonal(xp, k)
    active = energy > diagonal(xp, noise)
    if form == "direction":
        weights = _share(xp, diagonal(xp, gamma_q), energy, active)
    else:
        b = safe_divide(xp, b, detached(peak(xp, b)))  # a common factor does not matter
        gram = b.mT @ b
        if form in ("diagonal", "box"):
            mask = xp.astype(active, k.dtype)
            rhs = xp.sum(gram * gamma_q, axis=-1) * mask
            matrix = gram * k * mask[..., :, None] * mask[..., None, :]
            if form == "box":
                weights = _box(xp, matrix, rhs)
            else:
                weights = _semidefinite_solve(xp, matrix, rhs, detached(gram) * noise)
        else:
            part, whole, least = (
                xp.sum(gram * m, axis=(-2, -1))[..., None] for m in (gamma_q, k, noise)
            )
            weights = _share(xp, part, whole, whole > least)
            weights = weights + xp.zeros_like(energy)
    return xp.astype(weights[..., None, :] * eye_like(xp, k, rank), dtype)


def recalibration_loss(
    coefficients: Array,
    up: Array,
    down: Array,
    new: MomentLike,
    old: MomentLike,
    gamma: float,
    *,
    history_weight: Any = 1.0,
) -> Array:
    r"""Objective of the recalibration.

    :math:`J(\Lambda) = \operatorname{tr}(B \Lambda P \Lambda^\top B^\top)
    + \gamma \operatorname{tr}(B (\Lambda - I) Q (\Lambda - I)^\top B^\top)`: the mean squared
    change of the output on old inputs, and γ times the mean squared loss of the update on new
    ones.

    Parameters
    ----------
    coefficients : array, shape (..., r, r)
        Λ.
    up, down, new, old, gamma, history_weight
        As in :func:`recalibration`.

    Returns
    -------
    array, shape (...)
        J(Λ), at least 0, in units of squared outputs.

    Raises
    ------
    TypeError, ValueError
        As in :func:`recalibration`.

    See Also
    --------
    recalibration : Its minimiser.
    update_effect : Its two parts.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.4.

    Examples
    --------
    >>> import numpy as np
    >>> eye = np.eye(2)
    >>> float(recalibration_loss(0.5 * eye, eye, eye, eye, eye, 1.0))
    1.0
    """
    gamma = check_scalar("gamma", gamma)
    (xp, _, (new, old), _), dtype = checked_update(up, down, new, old, coefficients=coefficients)
    b, p, q = projected(xp, up, down, new, old)
    (c,) = widen(xp, coefficients)
    interference = b @ c
    lost = interference - b
    weight = check_weight(xp, "history_weight", history_weight)
    if is_array(weight):
        weight = xp.astype(weight, b.dtype)
    loss = weight * _output_energy(xp, interference, p) + gamma * _output_energy(xp, lost, q)
    return xp.astype(loss, dtype)


def stack_branches(
    ups: Sequence[Array], downs: Sequence[Array], weights: Sequence[float] | None = None
) -> tuple[Array, Array]:
    r"""One branch that does what several do: :math:`\sum_b w_b B_b A_b = B A`.

    Parameters
    ----------
    ups : sequence of array, shape (..., O, r_b)
        Up-projections.
    downs : sequence of array, shape (..., r_b, D)
        Down-projections, their scale included.
    weights : sequence of float, optional
        Weight of each branch, at least 0; 1 by default.

    Returns
    -------
    up : array, shape (..., O, R)
        :math:`[w_1 B_1, w_2 B_2, \dots]`, with R the sum of the ranks.
    down : array, shape (..., R, D)
        The :math:`A_b`, one below the other.

    Raises
    ------
    TypeError
        If an array is not real floating point.
    ValueError
        If there are no branches, not as many ups as downs and weights, or shapes do not match.

    See Also
    --------
    joint_recalibration : Recalibrate the stack.
    merge : Fold it into the weight.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = stack_branches([np.ones((2, 1))] * 2, [np.eye(3)[:1], np.eye(3)[1:2]], [0.25, 1])
    >>> up @ down
    array([[0.25, 1.  , 0.  ],
           [0.25, 1.  , 0.  ]])
    """
    weights = [1.0] * len(ups) if weights is None else weights
    if not ups or not len(ups) == len(downs) == len(weights):
        msg = (
            f"ups, downs and weights must have one entry a branch, got {len(ups)}, {len(downs)} "
            f"and {len(weights)}"
        )
        raise ValueError(msg)
    arrays = {f"ups[{i}]": b for i, b in enumerate(ups)}
    arrays |= {f"downs[{i}]": a for i, a in enumerate(downs)}
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    shapes = [(tuple(b.shape), tuple(a.shape)) for b, a in zip(ups, downs, strict=True)]
    first_up, first_down = shapes[0]
    for up, down in shapes:
        if (
            min(len(up), len(down)) < 2
            or up[-1] != down[-2]
            or (up[:-1], down[:-2], down[-1]) != (first_up[:-1], first_down[:-2], first_down[-1])
        ):
            msg = f"branches must be (..., O, r) and (..., r, D) with one O and D, got {shapes}"
            raise ValueError(msg)
    scaled = [check_scalar("weights", w) * b for w, b in zip(weights, ups, strict=True)]
    return xp.concat(scaled, axis=-1), xp.concat(list(downs), axis=-2)


def joint_recalibration(
    ups: Sequence[Array],
    downs: Sequence[Array],
    weights: Sequence[float],
    new: MomentLike,
    old: MomentLike,
    gamma: float,
    form: RecalibrationForm = "full",
    *,
    history_weight: Any = 1.0,
    accumulation_eps: float | None = None,
) -> Array:
    r"""Coefficients for all branches of a layer together: the isolated one interferes too.

    With the branches stacked, :math:`A = [A_G; A_I]` and :math:`B = [w_G B_G, w_I B_I]`, the
    update is :math:`B \Lambda A`, and the objective of Theorem 2.3 is the same function of the
    stack. So is its minimiser: :math:`\Lambda = \gamma Q (P + \gamma Q)^{-1}` with
    :math:`P = A S_{old} A^\top` and :math:`Q = A S_{new} A^\top`, now R×R with blocks that mix
    the branches. It is never worse than recalibrating the branches one by one, or only one of them.

    Parameters
    ----------
    ups, downs, weights
        As in :func:`stack_branches`.
    new, old, gamma, form, history_weight, accumulation_eps
        As in :func:`recalibration`.

    Returns
    -------
    array, shape (..., R, R)
        Λ of the stack: merge ``up @ coefficients @ down`` with the stack's ``up`` and ``down``,
        whose weights are inside ``up`` already.

    Raises
    ------
    TypeError, ValueError
        As in :func:`stack_branches` and :func:`recalibration`.

    See Also
    --------
    stack_branches : The stack.
    recalibration : One branch.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.3, recalibrates only the general branch.

    Examples
    --------
    >>> import numpy as np
    >>> ups, downs = [np.ones((1, 1))] * 2, [np.eye(2)[:1], np.eye(2)[1:]]
    >>> joint_recalibration(ups, downs, [0.25, 0.5], np.eye(2), np.diag([3.0, 0.0]), 1.0)
    array([[0.25, 0.  ],
           [0.  , 1.  ]])
    """
    up, down = stack_branches(ups, downs, weights)
    return recalibration(
        up,
        down,
        new,
        old,
        gamma,
        form,
        history_weight=history_weight,
        accumulation_eps=accumulation_eps,
    )


def update_effect(
    coefficients: Array, up: Array, down: Array, new: MomentLike, old: MomentLike
) -> UpdateEffect:
    r"""Exact mean squared effect of merging :math:`B \Lambda A`, known before merging.

    The layer is linear, so its outputs on any inputs of second moment S change by
    :math:`\operatorname{tr}(B \Lambda A S A^\top \Lambda^\top B^\top)` in mean square: no data
    are needed, and nothing is approximated (the inputs are those before the merge).

    Parameters
    ----------
    coefficients : array, shape (..., r, r)
        Λ.
    up : array, shape (..., O, r)
        Up-projection B, the weight of the branch included.
    down : array, shape (..., r, D)
        Down-projection A, its scale included.
    new, old : array of shape (..., D, D), Moments or History
        Second moments of the inputs on the new task and in the history. For a history that sums
        over tasks, the old changes are sums over tasks too.

    Returns
    -------
    UpdateEffect
        Squared output units; ``old_change + γ · new_loss`` is :func:`recalibration_loss`.

    Raises
    ------
    TypeError, ValueError
        As in :func:`recalibration_loss`.

    See Also
    --------
    recalibration_loss : Both parts in one number.
    merge : The update itself.
    first_order_update : A step of training, to first order.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.4.

    Examples
    --------
    >>> import numpy as np
    >>> eye = np.eye(2)
    >>> effect = update_effect(0.5 * eye, eye, eye, eye, 3 * eye)
    >>> [float(x) for x in effect]
    [1.5, 6.0, 0.5, 2.0]
    """
    (xp, _, (new, old), _), dtype = checked_update(up, down, new, old, coefficients=coefficients)
    b, p, q = projected(xp, up, down, new, old)
    (c,) = widen(xp, coefficients)
    update = b @ c
    parts = ((update, p), (b, p), (update - b, q), (b, q))
    energies = (xp.astype(_output_energy(xp, factor, gram), dtype) for factor, gram in parts)
    return UpdateEffect(*xp.broadcast_arrays(*energies))


def merge(weight: Array, up: Array, down: Array, coefficients: Array | None = None) -> Array:
    r"""Weight with a branch folded in, :math:`W + B \Lambda A`.

    Parameters
    ----------
    weight : array, shape (..., O, D)
        W, of a layer that maps x to :math:`W x`.
    up : array, shape (..., O, r)
        B, the weight of the branch included.
    down : array, shape (..., r, D)
        A, its scale included. Several branches go through :func:`stack_branches`.
    coefficients : array, shape (..., r, r), optional
        Λ; the identity by default.

    Returns
    -------
    array, shape (..., O, D)
        In the dtype of ``weight``, rounded once: sums are taken in the widest dtype.

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match, or values are not finite, those of the result included.

    See Also
    --------
    recalibration : The coefficients.
    stack_branches : Several branches as one.
    update_effect : What the merge will do, exactly.
    verify.verify_merge : Check a merged weight.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.4. On the first task Λ is the identity. A branch that is not
    recalibrated has the identity as its block of Λ, or is merged by a second call.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.asarray([[1.0], [2.0]]), np.asarray([[1.0, 0.0, 1.0]])
    >>> merge(np.zeros((2, 3)), up, down, np.asarray([[0.5]]))
    array([[0.5, 0. , 0.5],
           [1. , 0. , 1. ]])
    """
    xp = checked_weights(coefficients, weight=weight, up=up, down=down)
    w, b, a = widen(xp, weight, up, down)
    if coefficients is not None:
        b = b @ widen(xp, coefficients)[0]
    merged = w + b @ a
    largest = float(xp.finfo(weight.dtype).max)
    in_range = xp.where(xp.abs(merged) <= largest, merged, xp.full_like(merged, math.inf))
    check_values(xp, {"the merged weight": in_range})
    return xp.astype(merged, weight.dtype)


def checked_update(
    up: Array,
    down: Array,
    new: MomentLike,
    old: MomentLike,
    *,
    accumulation_eps: Any = None,
    **coefficients: Array,
) -> tuple[CheckedMoments, Any]:
    """Moments, and dtype of the result, for a branch and coefficients that fit together."""
    moments = checked_moments(
        {"new": new, "old": old},
        accumulation_eps=accumulation_eps,
        up=up,
        down=down,
        **coefficients,
    )
    xp, size, arrays, _ = moments
    check_columns("down", down, size)
    rank = down.shape[-2]
    if up.ndim < 2 or up.shape[-1] != rank:
        msg = f"up must have shape (..., O, {rank}) to match down, got {tuple(up.shape)}"
        raise ValueError(msg)
    for name, c in coefficients.items():
        if tuple(c.shape[-2:]) != (rank, rank):
            msg = f"{name} must have shape (..., {rank}, {rank}), got {tuple(c.shape)}"
            raise ValueError(msg)
    return moments, result_dtype(xp, up, down, *arrays, *coefficients.values())


def check_weight(xp: Namespace, name: str, weight: Any) -> Any:
    """A number, or an array with one per layer; refused if negative or not finite."""
    if not is_array(weight) or tuple(weight.shape) == ():
        return check_scalar(name, weight)
    check_real(xp, **{name: weight})
    check_values(xp, {name: weight})
    if is_concrete(weight) and bool(xp.any(weight < 0)):
        msg = f"{name} must be at least 0 everywhere"
        raise ValueError(msg)
    return weight


def projected(
    xp: Namespace, up: Array, down: Array, new: Array, old: Array
) -> tuple[Array, Array, Array]:
    """B, P and Q in the widest dtype: everything after is r×r."""
    b, a, n, o = widen(xp, up, down, new, old)
    return b, symmetrise(a @ o @ a.mT), symmetrise(a @ n @ a.mT)


def projected_noise(xp: Namespace, down: Array, moment: Array, gram_eps: Any) -> Array:
    """What rounding of a moment S may be in A S Aᵀ: A N Aᵀ. B and A are taken as exact."""
    a, s = (detached(x) for x in widen(xp, down, moment))
    channels = diagonal(xp, s)
    noise = channel_noise(xp, s, 0 * channels[..., :1], moment, gram_eps=gram_eps)
    return (a * noise[..., None, :]) @ a.mT


def scaled_system(
    xp: Namespace, p: Array, q: Array, gamma: Any, weight: Any, *noise: Array
) -> tuple[Array, Array, Array]:
    """γQ, hP + γQ and its noise up to a common factor, which leaves Λ as it is and in range."""
    if is_array(weight):
        weight = xp.astype(weight, p.dtype)[..., None, None]
    on_new, on_old = gamma / (1 + gamma) / (1 + weight), weight / (1 + weight) / (1 + gamma)
    gamma_q = q * on_new
    k = p * on_old + gamma_q
    largest = detached(peak(xp, k))
    of_old, of_new = noise
    blurred = detached(of_old * on_old + of_new * on_new)
    return (
        safe_divide(xp, gamma_q, largest + 0 * gamma_q),
        safe_divide(xp, k, largest),
        safe_divide(xp, blurred, largest + 0 * blurred),
    )


def _share(xp: Namespace, part: Array, whole: Array, active: Array) -> Array:
    """``part / whole`` in [0, 1], and 0 where ``whole`` is rounding."""
    ratio = safe_divide(xp, part, whole)
    ratio = xp.where(active, ratio, xp.zeros_like(ratio))
    # Only rounding leaves the interval: the derivative is that of the ratio, at its ends too.
    return with_derivative(xp.clip(ratio, 0.0, 1.0), lambda: ratio, ratio)


def above_noise(xp: Namespace, values: Array, vectors: Array, noise: Array) -> Array:
    """Which eigenvalues are more than the noise along their eigenvectors, and their arithmetic."""
    rounding = int(values.shape[-1]) * float(xp.finfo(values.dtype).eps) * values[..., :1]
    along = xp.sum(vectors * (noise @ vectors), axis=-2)
    return ~is_noise(xp, values, along + rounding, rounding)


def _full(xp: Namespace, k: Array, gamma_q: Array, noise: Array) -> Array:
    """γQ(P + γQ)⁺ by simultaneous diagonalisation, eigenvalues clipped to [0, 1].

    With K = V diag(k) Vᵀ, the matrix T = k^(-1/2) Vᵀ γQ V k^(-1/2) is symmetric with the
    eigenvalues of Λ, and Λ = V k^(1/2) T k^(-1/2) Vᵀ. No inverse of K is formed.
    """
    values, vectors = descending_eigh(xp, detached(k))
    active = above_noise(xp, values, vectors, noise)
    root = xp.sqrt(xp.where(active, values, xp.ones_like(values)))
    shrink = xp.where(active, 1 / root, xp.zeros_like(root))[..., None, :]
    stretch = xp.where(active, root, xp.zeros_like(root))[..., None, :]
    whitening = vectors * shrink
    inner = whitening.mT @ detached(gamma_q) @ whitening
    weights, rotation = descending_eigh(xp, inner)
    weights = xp.clip(weights, 0.0, 1.0)[..., None, :]
    inner = (rotation * weights) @ rotation.mT
    exact = (vectors * stretch) @ inner @ whitening.mT

    def smooth() -> Array:
        """γQ W (Wᵀ K W)⁻¹ Wᵀ with W held fixed: the derivative needs no eigenvectors."""
        quotient = _whitened_solve(xp, k, whitening, active, gamma_q).mT
        # How the directions without energy turn, as far as the others allow.
        idle = vectors * xp.astype(~active, k.dtype)[..., None, :]
        return quotient + exact @ whitening @ (whitening.mT @ k @ idle) @ idle.mT

    return with_derivative(exact, smooth, k, gamma_q)


def _whitened_solve(
    xp: Namespace, matrix: Array, whitening: Array, active: Array, rhs: Array
) -> Array:
    """M⁺ times a matrix as W (Wᵀ M W)⁻¹ Wᵀ, W being fixed with Wᵀ M W = I on its active columns.

    The value is known beforehand: this is for the derivative with respect to M, ties or not.
    """
    idle = xp.astype(~active, matrix.dtype)[..., None, :]
    gram = whitening.mT @ matrix @ whitening + idle * eye_like(xp, matrix, int(matrix.shape[-1]))
    return whitening @ xp.linalg.solve(gram, whitening.mT @ rhs)


def _semidefinite_solve(xp: Namespace, matrix: Array, rhs: Array, noise: Array) -> Array:
    """Solve a consistent positive semi-definite system; directions of noise alone get 0."""
    fixed = detached(matrix)
    # Unit diagonal first: unknowns may differ in size by orders of magnitude.
    scale = xp.sqrt(xp.clip(diagonal(xp, fixed), 0.0, None))
    shrink = safe_divide(xp, xp.ones_like(scale), scale)
    rows, columns = shrink[..., :, None], shrink[..., None, :]
    values, vectors = descending_eigh(xp, fixed * rows * columns)
    active = above_noise(xp, values, vectors, noise * rows * columns)
    inverse = reciprocal(xp, values, active)
    part = vectors.mT @ (detached(rhs) * shrink)[..., None]
    exact = (vectors @ (inverse[..., None] * part))[..., 0] * shrink

    def smooth() -> Array:
        whitening = shrink[..., :, None] * vectors * xp.sqrt(inverse)[..., None, :]
        return _whitened_solve(xp, matrix, whitening, active, rhs[..., None])[..., 0]

    return with_derivative(exact, smooth, matrix, rhs)


def _output_energy(xp: Namespace, factor: Array, gram: Array) -> Array:
    """Mean squared output ``tr(F S Fᵀ)`` of a linear map F on inputs of second moment S."""
    return xp.sum(factor * (factor @ gram), axis=(-2, -1))


def _box(xp: Namespace, matrix: Array, rhs: Array) -> Array:
    """Minimiser of ½ xᵀMx − cᵀx over 0 <= x <= 1, by a primal-dual interior-point method.

    Unknowns with a zero on the diagonal of M do not count and get 0.
    """
    size, eps = int(rhs.shape[-1]), float(xp.finfo(rhs.dtype).eps)
    given = matrix, rhs
    matrix, rhs = detached(matrix), detached(rhs)
    energy = diagonal(xp, matrix)
    scale = xp.max(energy, axis=-1)[..., None]
    rhs = safe_divide(xp, rhs, scale + 0 * rhs)
    matrix = safe_divide(xp, matrix, scale[..., None] + 0 * matrix)
    active = xp.astype(energy > 0, matrix.dtype)
    eye = eye_like(xp, matrix, size)
    # The proximal term keeps steps along the kernel of M finite; it does not move the solution.
    anchored = matrix + (1 - active + 8 * size * eps)[..., None] * eye
    # 1 − x is a variable of its own: near the bound the difference would lose all its digits.
    x = slack = 0.5 + 0 * rhs
    low = high = 1 + 0 * rhs  # multipliers of x >= 0 and of x <= 1
    floor = eps**1.5
    for _ in range(BOX_STEPS):
        target = 0.1 * xp.mean(x * low + slack * high, axis=-1)[..., None] / 2
        target = xp.where(target > floor, target, floor + 0 * target)
        slope = (matrix @ x[..., None])[..., 0] - rhs
        system = anchored + (low / x + high / slack)[..., None] * eye
        step = xp.linalg.solve(system, (target / x - target / slack - slope)[..., None])[..., 0]
        d_low = target / x - low - low / x * step
        d_high = target / slack - high + high / slack * step
        # A step stops a hundredth of the way before a bound.
        pairs = ((x, step), (slack, -step), (low, d_low), (high, d_high))
        fall = [xp.max(-change / value, axis=-1) for value, change in pairs]
        steepest = xp.max(xp.stack(fall, axis=-1), axis=-1)[..., None]
        length = 0.99 / xp.where(steepest > 0.99, steepest, 0.99 + 0 * steepest)
        x, slack = x + length * step, slack - length * step
        low, high = low + length * d_low, high + length * d_high
    exact = xp.clip(x, 0.0, 1.0) * active
    # Unknowns at a bound stay there, and the others solve what is left of the system.
    free = xp.astype((x > low) & (slack > high), matrix.dtype) * active
    bound = exact * (1 - free)

    def smooth() -> Array:
        matrix, rhs = given
        rest = (rhs - (matrix @ bound[..., None])[..., 0]) * free
        part = matrix * free[..., :, None] * free[..., None, :]
        return bound + _semidefinite_solve(xp, part, rest, 8 * size * eps * detached(part) * eye)

    return with_derivative(exact, smooth, *given)
