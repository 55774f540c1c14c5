"""Closed-form recalibration of the general branch before merging (LoDA, Theorem 2.3)."""

from functools import partial
from typing import Any, Literal, get_args

from loda_math import _recalibrate as core
from loda_math._arrays import (
    Array,
    eye_like,
    is_array,
    rounding_share,
    safe_divide,
    semidefinite_solve,
    widen,
)
from loda_math._validation import check_scalar

RecalibrationForm = Literal["full", "diagonal", "box", "direction", "scalar"]


def recalibration(
    up: Array,
    down: Array,
    new: Array,
    old: Array,
    gamma: float,
    /,
    form: RecalibrationForm = "full",
    *,
    history_weight: Any = 1.0,
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
    new, old : array, shape (..., D, D)
        Second moments of the layer's inputs on the new task (through the trained model) and in
        the history.
    gamma : float
        Weight γ of new knowledge, at least 0.
    form : {"full", "diagonal", "box", "direction", "scalar"}
        Shape of Λ.
    history_weight : float or array, shape (...), default 1
        h, at least 0: multiplies P. ``1 / tasks`` turns a history that is a sum over tasks into
        their mean; an array weighs every layer by itself. The same as γ / h.

    Returns
    -------
    array, shape (..., r, r)
        Λ, always as a matrix. The full form has eigenvalues in [0, 1]; it is not symmetric.
        Directions without energy on either side get 0.

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match, values are not finite, a moment is not symmetric, γ is negative
        or the form unknown.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.3.

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
    xp, dtype = core.checked(up=up, down=down, new=new, old=old)
    weight = core.check_weight(xp, "history_weight", history_weight)
    b, p, q = core.reduced(xp, up, down, new, old)
    kept, k = core.blend(xp, p, q, gamma, weight)
    # Λ has the batch of all arguments, of ``up`` too where its form does not depend on it.
    batch = xp.zeros_like(b[..., :1, :1])
    kept, k = kept + batch, k + batch
    # Energies below this share of the largest are rounding of the moments; B and A are exact as
    # they are, be it in half precision.
    rank = int(down.shape[-2])
    dust = rounding_share(xp, rank, new, old)
    if form == "full":
        return xp.astype(core.full(xp, k, kept, dust), dtype)
    energy = xp.linalg.diagonal(k)
    alive = energy > dust * xp.max(energy, axis=-1, keepdims=True)
    if form == "direction":
        weights = core.share(xp, xp.linalg.diagonal(kept), energy, alive)
    else:
        b = safe_divide(xp, b, core.peak(xp, b))
        gram = b.mT @ b
        if form in ("diagonal", "box"):
            mask = xp.astype(alive, k.dtype)
            rhs = xp.sum(gram * kept, axis=-1) * mask
            matrix = gram * k * mask[..., :, None] * mask[..., None, :]
            solve = core.box if form == "box" else partial(semidefinite_solve, dust=dust)
            weights = solve(xp, matrix, rhs)
        else:
            part, whole = (xp.sum(gram * m, axis=(-2, -1))[..., None] for m in (kept, k))
            weights = core.share(xp, part, whole, whole > dust * xp.linalg.trace(gram)[..., None])
            weights = weights + xp.zeros_like(energy)
    return xp.astype(weights[..., None, :] * eye_like(xp, k, rank), dtype)


def recalibration_loss(
    coefficients: Array,
    up: Array,
    down: Array,
    new: Array,
    old: Array,
    gamma: float,
    /,
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
    xp, dtype = core.checked(up=up, down=down, new=new, old=old, coefficients=coefficients)
    b, p, q = core.reduced(xp, up, down, new, old)
    (c,) = widen(xp, coefficients)
    interference = b @ c
    lost = interference - b
    weight = core.check_weight(xp, "history_weight", history_weight)
    if is_array(weight):
        weight = xp.astype(weight, b.dtype)
    loss = weight * core.output_energy(xp, interference, p) + gamma * core.output_energy(
        xp, lost, q
    )
    return xp.astype(loss, dtype)
