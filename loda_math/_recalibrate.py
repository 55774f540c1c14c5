"""The r×r algebra behind the recalibration: everything after B, P and Q."""

from typing import Any

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    eye_like,
    is_array,
    is_concrete,
    namespace,
    result_dtype,
    safe_divide,
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

# Steps of the interior-point method: the complementarity falls to a tenth in each.
BOX_STEPS = 40


def checked(**arrays: Array) -> tuple[Namespace, Any]:
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


def reduced(
    xp: Namespace, up: Array, down: Array, new: Array, old: Array
) -> tuple[Array, Array, Array]:
    """B, P and Q in the widest dtype: everything after is r×r."""
    b, a, n, o = widen(xp, up, down, new, old)
    return b, symmetrise(a @ o @ a.mT), symmetrise(a @ n @ a.mT)


def blend(xp: Namespace, p: Array, q: Array, gamma: Any, weight: Any) -> tuple[Array, Array]:
    """γQ and hP + γQ up to a common factor, which leaves Λ as it is and keeps both in range."""
    if is_array(weight):
        weight = xp.astype(weight, p.dtype)[..., None, None]
    kept = q * (gamma / (1 + gamma) / (1 + weight))
    k = p * (weight / (1 + weight) / (1 + gamma)) + kept
    largest = peak(xp, k)
    return safe_divide(xp, kept, largest + 0 * kept), safe_divide(xp, k, largest)


def share(xp: Namespace, part: Array, whole: Array, alive: Array) -> Array:
    """``part / whole`` in [0, 1], and 0 where ``whole`` is rounding."""
    ratio = xp.clip(safe_divide(xp, part, whole), 0.0, 1.0)
    return xp.where(alive, ratio, xp.zeros_like(ratio))


def full(xp: Namespace, k: Array, kept: Array, dust: float) -> Array:
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


def peak(xp: Namespace, x: Array) -> Array:
    return xp.max(xp.abs(x), axis=(-2, -1), keepdims=True)


def output_energy(xp: Namespace, factor: Array, gram: Array) -> Array:
    return xp.sum(factor * (factor @ gram), axis=(-2, -1))


def box(xp: Namespace, matrix: Array, rhs: Array) -> Array:
    """Minimiser of ½ xᵀMx − cᵀx over 0 <= x <= 1, by a primal-dual interior-point method.

    Unknowns with a zero on the diagonal of M do not count and get 0.
    """
    size, eps = int(rhs.shape[-1]), float(xp.finfo(rhs.dtype).eps)
    diagonal = xp.linalg.diagonal(matrix)
    scale = xp.max(diagonal, axis=-1)[..., None]
    rhs = safe_divide(xp, rhs, scale + 0 * rhs)
    matrix = safe_divide(xp, matrix, scale[..., None] + 0 * matrix)
    alive = xp.astype(diagonal > 0, matrix.dtype)
    eye = eye_like(xp, matrix, size)
    # The proximal term keeps steps along the kernel of M finite; it does not move the solution.
    anchored = matrix + (1 - alive + 8 * size * eps)[..., None] * eye
    # 1 − x is followed by itself: near the bound a difference would have no digits left.
    x = room = 0.5 + 0 * rhs
    low = high = 1 + 0 * rhs  # multipliers of x >= 0 and of x <= 1
    floor = eps**1.5
    for _ in range(BOX_STEPS):
        target = 0.1 * xp.mean(x * low + room * high, axis=-1)[..., None] / 2
        target = xp.where(target > floor, target, floor + 0 * target)
        slope = (matrix @ x[..., None])[..., 0] - rhs
        system = anchored + (low / x + high / room)[..., None] * eye
        step = xp.linalg.solve(system, (target / x - target / room - slope)[..., None])[..., 0]
        d_low = target / x - low - low / x * step
        d_high = target / room - high + high / room * step
        # A step stops a hundredth of the way before a bound.
        pairs = ((x, step), (room, -step), (low, d_low), (high, d_high))
        fall = [xp.max(-change / value, axis=-1) for value, change in pairs]
        steepest = xp.max(xp.stack(fall, axis=-1), axis=-1)[..., None]
        length = 0.99 / xp.where(steepest > 0.99, steepest, 0.99 + 0 * steepest)
        x, room = x + length * step, room - length * step
        low, high = low + length * d_low, high + length * d_high
    return xp.clip(x, 0.0, 1.0) * alive


def check_weight(xp: Namespace, name: str, weight: Any) -> Any:
    """A number, or an array with one a layer; refused if negative or not finite."""
    if not is_array(weight) or tuple(weight.shape) == ():
        return check_scalar(name, weight)
    check_real(xp, **{name: weight})
    check_values(xp, {name: weight})
    if is_concrete(weight) and bool(xp.any(weight < 0)):
        msg = f"{name} must be at least 0 everywhere"
        raise ValueError(msg)
    return weight
