"""Check merged weights against the exact ones."""

from typing import NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    descending_eigh,
    norm,
    reciprocal,
    result_dtype,
    rounding_share,
    safe_divide,
    storage_error,
    widen,
)
from loda_math._validation import check_scalar, checked_weights
from loda_math.moments import SINGLE_EPS


class MergeReport(NamedTuple):
    """Whether a merged weight is the old one plus the update.

    Attributes
    ----------
    error : array, shape (...)
        Norm of the unexplained part, over the norm of the update.
    update : array, shape (...)
        Norm of the update over that of the weight before.
    passed : array of bool, shape (...)
        Whether the error is within the tolerance and the rounding of the weight's own dtype: in the
        whole, in every entry and in every direction of the branch.
    """

    error: Array
    update: Array
    passed: Array


def implied_coefficients(change: Array, up: Array, down: Array) -> Array:
    r"""Recover Λ from the change of a weight, :math:`\Lambda = B^+ \, \Delta W A^+`.

    Parameters
    ----------
    change : array, shape (..., O, D)
        ΔW, what the merge of this branch added to the weight.
    up : array, shape (..., O, r)
        B, the weight of the branch included.
    down : array, shape (..., r, D)
        A.

    Returns
    -------
    array, shape (..., r, r)
        Λ of least squares; directions that B or A does not have get 0.

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match or values are not finite.

    See Also
    --------
    verify_recalibration : Check what was recovered.
    loda_math.merge : The merge.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.eye(3)[:, :2], np.eye(4)[:2]
    >>> implied_coefficients(up @ np.diag([0.5, 0.25]) @ down, up, down)
    array([[0.5 , 0.  ],
           [0.  , 0.25]])
    """
    xp = checked_weights(change=change, up=up, down=down)
    c, b, a = widen(xp, change, up, down)
    left, right = _pseudo_inverse(xp, b.mT @ b), _pseudo_inverse(xp, a @ a.mT)
    return xp.astype(left @ (b.mT @ c @ a.mT) @ right, result_dtype(xp, change, up, down))


def verify_merge(
    before: Array,
    after: Array,
    up: Array,
    down: Array,
    coefficients: Array | None = None,
    *,
    tolerance: float = 1e-5,
) -> MergeReport:
    r"""Check :math:`W' = W + B \Lambda A`.

    Parameters
    ----------
    before, after : array, shape (..., O, D)
        The weight around the merge.
    up, down : array, shape (..., O, r) and (..., r, D)
        B, the weight of the branch included, and A; several branches by :func:`stack_branches`.
    coefficients : array, shape (..., r, r), optional
        Λ; the identity by default.
    tolerance : float, default 1e-5
        Of the error.

    Returns
    -------
    MergeReport

    Raises
    ------
    TypeError, ValueError
        As in :func:`implied_coefficients`.

    See Also
    --------
    loda_math.merge : A merge of our own.
    implied_coefficients : Recover Λ from the weights.
    verify_layer : Everything of a layer at once.

    Examples
    --------
    >>> import numpy as np
    >>> up, down = np.ones((3, 1)), np.ones((1, 2))
    >>> bool(verify_merge(np.zeros((3, 2)), np.ones((3, 2)), up, down).passed)
    True
    """
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    xp = checked_weights(coefficients, before=before, after=after, up=up, down=down)
    w, v, b, a = widen(xp, before, after, up, down)
    if coefficients is not None:
        b = b @ widen(xp, coefficients)[0]
    update = b @ a
    missed = v - w - update
    # Each entry is known to the digits that it is stored in, and to those of the product.
    rows, columns = norm(xp, b, -1), norm(xp, a, -2)
    product = min(coarsest_eps(xp, after, up, down), SINGLE_EPS) * rows * columns
    rounding = storage_error(xp, after.dtype, v, update) + 2 * product
    unexplained, length, size, lost = (
        norm(xp, x, (-2, -1))[..., 0, 0] for x in (missed, update, w, rounding)
    )
    # What is missing of each column of BΛ, so that a large branch does not hide a small one.
    dual = a.mT @ _pseudo_inverse(xp, a @ a.mT)
    of_columns = norm(xp, missed @ dual, -2)
    allowed = tolerance * norm(xp, b, -2) + 4 * norm(xp, norm(xp, rounding, -2).mT * dual, -2)
    passed = (
        (unexplained <= tolerance * length + lost)
        & xp.all(xp.abs(missed) <= tolerance * rows * columns + rounding, axis=(-2, -1))
        & xp.all(of_columns <= allowed, axis=(-2, -1))
    )
    dtype = result_dtype(xp, before, after, up, down)
    return MergeReport(
        *xp.broadcast_arrays(
            xp.astype(safe_divide(xp, unexplained, length), dtype),
            xp.astype(safe_divide(xp, length, size + 0 * length), dtype),
            passed,
        )
    )


def _pseudo_inverse(xp: Namespace, gram: Array) -> Array:
    """Inverse of a Gram matrix on its range; its kernel, up to rounding, gets 0."""
    values, vectors = descending_eigh(xp, gram)
    noise = rounding_share(xp, int(gram.shape[-1]), gram) * values[..., :1]
    inverse = reciprocal(xp, values, values > noise)
    return (vectors * inverse[..., None, :]) @ vectors.mT
