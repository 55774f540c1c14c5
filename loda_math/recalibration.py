"""Closed-form recalibration of the general branch before merging (LoDA, Theorem 2.3)."""

from typing import Any, Literal, get_args

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    eye_like,
    namespace,
    result_dtype,
    rounding_share,
    safe_divide,
    semidefinite_solve,
    symmetrise,
    widen,
)
from loda_math._validation import (
    check_columns,
    check_real,
    check_scalar,
    check_square,
    check_values,
)

RecalibrationForm = Literal["full", "diagonal", "direction", "scalar"]


def recalibration(
    up: Array,
    down: Array,
    new: Array,
    old: Array,
    gamma: float,
    /,
    form: RecalibrationForm = "full",
) -> Array:
    r"""Coefficients Λ that trade interference with old tasks against loss of new knowledge.

    Minimises :func:`recalibration_loss` over Λ of the given form; the branch to merge is then
    :math:`B \Lambda A`. With :math:`P = A S_{old} A^\top` and :math:`Q = A S_{new} A^\top`:

    ============= ====================================================================
    ``full``      :math:`\Lambda = \gamma Q (P + \gamma Q)^{-1}`; free of B, any r×r
    ``diagonal``  :math:`((B^\top B) \circ (P + \gamma Q)) \lambda
                  = \gamma ((B^\top B) \circ Q) 1`; the best diagonal
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
    form : {"full", "diagonal", "direction", "scalar"}
        Shape of Λ.

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
    xp, dtype = _checked(up=up, down=down, new=new, old=old)
    b, p, q = _reduced(xp, up, down, new, old)
    kept, k = _blend(xp, p, q, gamma)
    # Energies below this share of the largest are rounding of the moments; B and A are exact as
    # they are, be it in half precision.
    dust = rounding_share(xp, int(down.shape[-2]), new, old)
    if form == "full":
        return xp.astype(_full(xp, k, kept, dust), dtype)
    energy = _diagonal(xp, k)
    alive = energy > dust * xp.max(energy, axis=-1, keepdims=True)
    if form == "direction":
        weights = _share(xp, _diagonal(xp, kept), energy, alive)
    else:
        b = safe_divide(xp, b, _peak(xp, b))
        gram = b.mT @ b
        if form == "diagonal":
            mask = xp.astype(alive, k.dtype)
            rhs = xp.sum(gram * kept, axis=-1) * mask
            matrix = gram * k * mask[..., :, None] * mask[..., None, :]
            weights = semidefinite_solve(xp, matrix, rhs, dust)
        else:
            part, whole = (xp.sum(gram * m, axis=(-2, -1))[..., None] for m in (kept, k))
            weights = _share(xp, part, whole, whole > dust * xp.linalg.trace(gram)[..., None])
            weights = weights + xp.zeros_like(energy)
    return xp.astype(weights[..., None, :] * eye_like(xp, k, int(k.shape[-1])), dtype)


def recalibration_loss(
    coefficients: Array, up: Array, down: Array, new: Array, old: Array, gamma: float, /
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
    up, down, new, old, gamma
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
    xp, dtype = _checked(up=up, down=down, new=new, old=old, coefficients=coefficients)
    b, p, q = _reduced(xp, up, down, new, old)
    (c,) = widen(xp, coefficients)
    interference = b @ c
    lost = interference - b
    loss = _output_energy(xp, interference, p) + gamma * _output_energy(xp, lost, q)
    return xp.astype(loss, dtype)


def _checked(**arrays: Array) -> tuple[Namespace, Any]:
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    up, down = arrays["up"], arrays["down"]
    moments = {name: arrays[name] for name in ("new", "old")}
    check_columns("down", down, check_square(**moments))
    rank = down.shape[-2]
    if up.ndim < 2 or up.shape[-1] != rank:
        msg = f"up must have shape (..., O, {rank}) to match down, got {tuple(up.shape)}"
        raise ValueError(msg)
    others = {name: x for name, x in arrays.items() if name not in moments}
    coefficients = others.get("coefficients")
    if coefficients is not None and tuple(coefficients.shape[-2:]) != (rank, rank):
        msg = f"coefficients must have shape (..., {rank}, {rank}), got {tuple(coefficients.shape)}"
        raise ValueError(msg)
    check_values(xp, others, moments)
    return xp, result_dtype(xp, *arrays.values())


def _reduced(
    xp: Namespace, up: Array, down: Array, new: Array, old: Array
) -> tuple[Array, Array, Array]:
    """B, P and Q in the widest dtype: everything after is r×r."""
    b, a, n, o = widen(xp, up, down, new, old)
    return b, symmetrise(a @ o @ a.mT), symmetrise(a @ n @ a.mT)


def _blend(xp: Namespace, p: Array, q: Array, gamma: Any) -> tuple[Array, Array]:
    """γQ and P + γQ up to a common factor, which leaves Λ as it is and keeps both in range."""
    kept = q * (gamma / (1 + gamma))
    k = p * (1 / (1 + gamma)) + kept
    peak = _peak(xp, k)
    return safe_divide(xp, kept, peak), safe_divide(xp, k, peak)


def _share(xp: Namespace, part: Array, whole: Array, alive: Array) -> Array:
    """``part / whole`` in [0, 1], and 0 where ``whole`` is rounding."""
    ratio = xp.clip(safe_divide(xp, part, whole), 0.0, 1.0)
    return xp.where(alive, ratio, xp.zeros_like(ratio))


def _full(xp: Namespace, k: Array, kept: Array, dust: float) -> Array:
    """γQ(P + γQ)⁺ by simultaneous diagonalisation, eigenvalues clipped to [0, 1].

    With K = V diag(k) Vᵀ, the matrix T = k^(-1/2) Vᵀ γQ V k^(-1/2) is symmetric with the
    eigenvalues of Λ, and Λ = V k^(1/2) T k^(-1/2) Vᵀ. No inverse of K is formed.
    """
    values, vectors = descending_eigh(xp, k)
    alive = values > dust * values[..., :1]
    root = xp.sqrt(xp.where(alive, values, xp.ones_like(values)))
    shrink = xp.where(alive, 1 / root, xp.zeros_like(root))[..., None, :]
    stretch = xp.where(alive, root, xp.zeros_like(root))[..., None, :]
    inner = (vectors * shrink).mT @ kept @ (vectors * shrink)
    weights, rotation = descending_eigh(xp, inner)
    weights = xp.clip(weights, 0.0, 1.0)[..., None, :]
    inner = (rotation * weights) @ rotation.mT
    return (vectors * stretch) @ inner @ (vectors * shrink).mT


def _peak(xp: Namespace, x: Array) -> Array:
    return xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)


def _diagonal(xp: Namespace, matrix: Array) -> Array:
    return xp.linalg.diagonal(matrix)


def _output_energy(xp: Namespace, factor: Array, gram: Array) -> Array:
    return xp.sum(factor * (factor @ gram), axis=(-2, -1))
