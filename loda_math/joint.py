"""Both branches at once: their joint recalibration, and what an update does to the outputs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from loda_math import _recalibrate as core
from loda_math._arrays import Array, namespace, widen
from loda_math._validation import check_real, check_scalar
from loda_math.recalibration import RecalibrationForm, recalibration


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


def stack_branches(
    ups: Sequence[Array], downs: Sequence[Array], weights: Sequence[float] | None = None, /
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
    new: Array,
    old: Array,
    gamma: float,
    /,
    form: RecalibrationForm = "full",
    *,
    history_weight: Any = 1.0,
) -> Array:
    r"""Coefficients for all branches of a layer together: the isolated one interferes too.

    With the branches stacked, :math:`A = [A_G; A_I]` and :math:`B = [w_G B_G, w_I B_I]`, the
    update is :math:`B \Lambda A`, and the objective of Theorem 2.3 is the same function of the
    stack. So is its minimiser: :math:`\Lambda = \gamma Q (P + \gamma Q)^{-1}` with
    :math:`P = A S_{old} A^\top` and :math:`Q = A S_{new} A^\top`, now R×R with blocks that mix
    the branches. It is never worse than recalibrating the branches one by one, or one alone.

    Parameters
    ----------
    ups, downs, weights
        As in :func:`stack_branches`.
    new, old, gamma, form, history_weight
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

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.3, recalibrates the general branch alone.

    Examples
    --------
    >>> import numpy as np
    >>> ups, downs = [np.ones((1, 1))] * 2, [np.eye(2)[:1], np.eye(2)[1:]]
    >>> joint_recalibration(ups, downs, [0.25, 0.5], np.eye(2), np.diag([3.0, 0.0]), 1.0)
    array([[0.25, 0.  ],
           [0.  , 1.  ]])
    """
    up, down = stack_branches(ups, downs, weights)
    return recalibration(up, down, new, old, gamma, form, history_weight=history_weight)


def update_effect(
    coefficients: Array, up: Array, down: Array, new: Array, old: Array, /
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
    new, old : array, shape (..., D, D)
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
    xp, dtype = core.checked(up=up, down=down, new=new, old=old, coefficients=coefficients)
    b, p, q = core.reduced(xp, up, down, new, old)
    (c,) = widen(xp, coefficients)
    kept = b @ c
    parts = ((kept, p), (b, p), (kept - b, q), (b, q))
    return UpdateEffect(
        *(xp.astype(core.output_energy(xp, factor, gram), dtype) for factor, gram in parts)
    )
