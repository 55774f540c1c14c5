"""Check look-ahead parameters against the exact ones."""

from typing import NamedTuple

from loda_math._arrays import (
    Array,
    namespace,
    norm,
    result_dtype,
    safe_divide,
    storage_error,
    widen,
)
from loda_math._validation import check_real, check_scalar, check_values


class PerturbationReport(NamedTuple):
    """Whether a parameter was shifted along its gradient by the radius.

    Attributes
    ----------
    error : array, shape ()
        Distance to the exact shifted parameter, over the radius.
    length : array, shape ()
        Length of the shift over the radius; 1 when right.
    alignment : array, shape ()
        Cosine between the shift and the descent direction; 1 when right.
    passed : array of bool, shape ()
        Whether every entry is shifted as it should be, within the tolerance and the rounding of the
        parameter's own dtype.
    """

    error: Array
    length: Array
    alignment: Array
    passed: Array


def verify_perturbation(
    before: Array, after: Array, gradient: Array, radius: float, *, tolerance: float = 1e-5
) -> PerturbationReport:
    r"""Check :math:`\tilde\theta = \theta - \rho \, g / \|g\|`, one parameter at a time.

    Parameters
    ----------
    before, after, gradient : array, all of one shape
        The parameter, the shifted parameter, and the gradient at the parameter.
    radius : float
        ρ, with the draw of the mini-batch in it. A zero gradient shifts nothing.
    tolerance : float, default 1e-5
        Of the shift of each entry, relative to the exact one.

    Returns
    -------
    PerturbationReport

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes differ or values are not finite.

    See Also
    --------
    loda_math.lookahead : A shift of our own.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> theta, gradient = np.zeros(2), np.asarray([3.0, 4.0])
    >>> bool(verify_perturbation(theta, np.asarray([-0.06, -0.08]), gradient, 0.1).passed)
    True
    """
    radius = check_scalar("radius", radius)
    tolerance = check_scalar("tolerance", tolerance, positive=True)
    arrays = {"before": before, "after": after, "gradient": gradient}
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    shapes = {name: tuple(x.shape) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1:
        msg = f"before, after and gradient must have one shape, got {shapes}"
        raise ValueError(msg)
    check_values(xp, arrays)
    x, y, g = widen(xp, before, after, gradient)
    unit = safe_divide(xp, g, norm(xp, g))
    shift, exact = x - y, radius * unit
    missed = shift - exact
    distance, length = norm(xp, missed), norm(xp, shift)
    # The shifted parameter is known to the digits that it is stored in.
    allowed = tolerance * xp.abs(exact) + storage_error(xp, after.dtype, y, exact)
    scale = radius + 0 * length
    dtype = result_dtype(xp, before, after, gradient)
    return PerturbationReport(
        error=xp.astype(safe_divide(xp, distance, scale), dtype),
        length=xp.astype(safe_divide(xp, length, scale), dtype),
        alignment=xp.astype(xp.sum(safe_divide(xp, shift, length) * unit), dtype),
        passed=xp.all(xp.abs(missed) <= allowed),
    )
