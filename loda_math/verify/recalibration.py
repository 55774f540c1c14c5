"""Check recalibration coefficients against the exact ones."""

from typing import Any, NamedTuple

from loda_math._arrays import Array, eye_like, safe_divide, widen
from loda_math._validation import MomentLike, check_scalar
from loda_math.recalibration import (
    RecalibrationForm,
    check_weight,
    checked_update,
    recalibration,
    recalibration_loss,
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
        Whether the deviation is within the square root of the tolerance.
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
    tolerance: float = 1e-5,
) -> RecalibrationReport:
    r"""Check recalibration coefficients against the exact ones of their form.

    Parameters
    ----------
    coefficients : array, shape (..., r, r)
        Λ.
    up, down, new, old, gamma, form, history_weight
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
    (xp, _, arrays, _), dtype = checked_update(up, down, new, old, coefficients=coefficients)
    b, a, n, o = wide = widen(xp, up, down, *arrays)
    (given,) = widen(xp, coefficients)
    # Solved from the moments as given: their dtype determines which energies are rounding.
    exact = recalibration(up, down, new, old, gamma, form, history_weight=history_weight)
    exact, best = widen(
        xp, exact, recalibration(up, down, new, old, gamma, history_weight=history_weight)
    )
    weight = check_weight(xp, "history_weight", history_weight)
    eye = eye_like(xp, given, int(given.shape[-1]))
    loss, optimum, drop, keep = (
        recalibration_loss(c, b, a, n, o, gamma, history_weight=weight)
        for c in (given, best, 0 * given, 0 * given + eye)
    )
    # J without the constant: Λ − Λ* on old inputs, and on new ones.
    change = given - exact
    on_old = update_effect(change, *wide).old_change
    on_new = update_effect(change + eye, *wide).new_loss
    distance = weight * on_old + gamma * on_new
    whole = drop + keep
    deviation = xp.sqrt(safe_divide(xp, distance, whole + 0 * distance))
    gap = safe_divide(xp, loss - optimum, drop + 0 * loss)
    effect = update_effect(given, *wide)
    fields = (deviation, gap, loss, optimum, effect.old_change, effect.new_loss)
    return RecalibrationReport(
        *xp.broadcast_arrays(
            *(xp.astype(field, dtype) for field in fields), deviation <= tolerance**0.5
        )
    )
