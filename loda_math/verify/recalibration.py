"""Check recalibration coefficients against the exact ones."""

from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    eye_like,
    norm,
    rounding_share,
    safe_divide,
    storage_error,
    widen,
)
from loda_math._validation import MomentLike, check_scalar
from loda_math.recalibration import (
    RecalibrationForm,
    above_noise,
    check_weight,
    checked_update,
    projected,
    projected_noise,
    recalibration,
    recalibration_loss,
    scaled_system,
    update_effect,
)


class RecalibrationReport(NamedTuple):
    r"""How good recalibration coefficients are.

    Attributes
    ----------
    deviation : array, shape (...)
        Distance to the exact coefficients of the same form,
        :math:`\|B (\Lambda - \Lambda^*) K^{1/2}\|_F / \|B K^{1/2}\|_F` with
        :math:`K = h P + \gamma Q`: what Λ does, free of the choice of coordinates.
    optimality_gap : array, shape (...)
        :math:`(J(\Lambda) - J^*) / J(0)` against the best Λ of any form; what a restricted form
        gives away.
    loss, optimum : array, shape (...)
        :math:`J(\Lambda)`, and :math:`J^*` of the full form.
    old_change, new_loss : array, shape (...)
        As in :class:`loda_math.UpdateEffect`.
    passed : array of bool, shape (...)
        Whether the deviation is within the square root of the tolerance and the digits that Λ is
        stored in: in the whole, for every direction of the inputs that carries more than noise, and
        for every direction of the outputs.
    """

    deviation: Array
    optimality_gap: Array
    loss: Array
    optimum: Array
    old_change: Array
    new_loss: Array
    passed: Array


def verify_recalibration(
    coefficients: Array,
    up: Array,
    down: Array,
    new: MomentLike,
    old: MomentLike,
    gamma: float,
    form: RecalibrationForm = "full",
    *,
    history_weight: Any = 1.0,
    accumulation_eps: float | None = None,
    tolerance: float = 1e-5,
) -> RecalibrationReport:
    r"""Check recalibration coefficients against the exact ones of their form.

    Parameters
    ----------
    coefficients : array, shape (..., r, r)
        Λ.
    up, down, new, old, gamma, form, history_weight, accumulation_eps
        As in :func:`recalibration`.
    tolerance : float, default 1e-5
        The deviation may reach its square root.

    Returns
    -------
    RecalibrationReport

    Raises
    ------
    TypeError, ValueError
        As in :func:`recalibration_loss`.

    See Also
    --------
    loda_math.recalibration : Coefficients of our own.
    verify_layer : Everything of a layer at once.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.3. For the full form
    :math:`J(\Lambda) - J^* = \|B (\Lambda - \Lambda^*) K^{1/2}\|_F^2`.

    Examples
    --------
    >>> import numpy as np
    >>> eye = np.eye(2)
    >>> report = verify_recalibration(0.5 * eye, eye, eye, eye, eye, 1.0)
    >>> bool(report.passed), float(report.loss), float(report.optimum)
    (True, 1.0, 1.0)
    """
    gamma = check_scalar("gamma", gamma)
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    (xp, _, arrays, gram_eps), dtype = checked_update(
        up, down, new, old, accumulation_eps=accumulation_eps, coefficients=coefficients
    )
    b, a, n, o = wide = widen(xp, up, down, *arrays)
    (given,) = widen(xp, coefficients)
    settings = {"history_weight": history_weight, "accumulation_eps": accumulation_eps}
    # Solved from the moments as given: their dtype determines which energies are rounding.
    exact = recalibration(up, down, new, old, gamma, form, **settings)
    exact, best = widen(xp, exact, recalibration(up, down, new, old, gamma, **settings))
    weight = check_weight(xp, "history_weight", history_weight)
    eye = eye_like(xp, given, int(given.shape[-1]))
    loss, optimum, drop, keep = (
        recalibration_loss(c, b, a, n, o, gamma, history_weight=weight)
        for c in (given, best, 0 * given, 0 * given + eye)
    )
    # J without the constant: Λ − Λ* on old inputs, and on new ones. The digits that Λ is stored in
    # may be as much off, and are judged by what they do as well.
    change, stored = given - exact, storage_error(xp, coefficients.dtype, given)
    distance, blur = (
        weight * update_effect(c, b, *wide[1:]).old_change
        + gamma * update_effect(c + eye, *wide).new_loss
        for c in (change, stored)
    )
    whole = drop + keep
    deviation = xp.sqrt(safe_divide(xp, distance, whole + 0 * distance))
    allowed = tolerance**0.5 + xp.sqrt(safe_divide(xp, blur, whole + 0 * blur))
    gap = safe_divide(xp, loss - optimum, drop + 0 * loss)
    noise = (projected_noise(xp, down, m, gram_eps) for m in reversed(arrays))
    _, k, noise = scaled_system(xp, *projected(xp, up, down, *arrays)[1:], gamma, weight, *noise)
    worst = _worst_direction(xp, b, k, noise, exact, change, stored)
    effect = update_effect(given, *wide)
    fields = (deviation, gap, loss, optimum, effect.old_change, effect.new_loss)
    return RecalibrationReport(
        *xp.broadcast_arrays(
            *(xp.astype(field, dtype) for field in fields),
            (deviation <= allowed) & (worst <= tolerance**0.5),
        )
    )


def _worst_direction(
    xp: Namespace, b: Array, k: Array, noise: Array, exact: Array, change: Array, stored: Array
) -> Array:
    """Largest share by which Λ is off for one direction, beyond its digits and the arithmetic.

    A direction of the inputs, an eigenvector u of K, is judged by the outputs that it has before
    and after, and a direction of the outputs, a right singular vector of B, by what it has of K.
    """
    eye = eye_like(xp, k, int(k.shape[-1]))
    values, vectors = descending_eigh(xp, k)
    active = above_noise(xp, values, vectors, noise)
    energies = xp.where(active, values, 0 * values)[..., None, :]
    floor = rounding_share(xp, int(k.shape[-1]), k)
    doubt = floor * safe_divide(xp, energies[..., :1] + 0 * energies, energies)
    off, before, after = (norm(xp, b @ x @ vectors, -2) for x in (change, eye, exact))
    blur = norm(xp, xp.abs(b) @ stored @ xp.abs(vectors), -2)
    scale = before + after
    inputs = safe_divide(xp, off - blur, scale) - doubt
    inputs = xp.where(active[..., None, :], inputs, 0 * inputs)
    gains, right = descending_eigh(xp, b.mT @ b)
    weighted = vectors * xp.sqrt(energies)
    off, scale = (norm(xp, right.mT @ x @ weighted, -1)[..., 0] for x in (change, eye))
    blur = norm(xp, xp.abs(right).mT @ stored @ xp.abs(weighted), -1)[..., 0]
    doubt = floor * safe_divide(xp, energies[..., 0, :1] + 0 * scale, scale * scale)
    outputs = safe_divide(xp, off - blur, scale) - doubt
    outputs = xp.where(gains > floor * gains[..., :1], outputs, 0 * outputs)
    return xp.maximum(xp.max(inputs, axis=(-2, -1)), xp.max(outputs, axis=-1))
