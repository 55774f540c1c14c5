"""The ratio of traces, maximised with and without a floor on the new-task energy.

All bases met on the way are U(κ), the r leading eigenvectors of S − κR. With
f(κ) = max tr(Uᵀ(S − κR)U), convex and falling, the largest ratio κ* is the root of f.
"""

from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    rounding_share,
    safe_divide,
    span_energy,
)
from loda_math._eigh import leading_eigh, trailing_eigh
from loda_math._rounding import channel_noise, is_noise, noise_along
from loda_math._subspaces import Directions, Ridge, generalised, regularised

# Newton's steps on f are Dinkelbach's: quadratic at the end, and f·f' falls by a factor of four a
# step before. From the generalised eigenvectors six reach rounding at the default ridge, twelve
# at a ridge of 1e-11.
NEWTON_STEPS = 16
# Halvings of the bracket of log(1 + κ): from 30 (a singular history) to 1e-7.
BISECTIONS = 28


class TraceRatio(NamedTuple):
    """U(κ) with what proves how good it is; scalars have the shape (..., 1, 1)."""

    directions: Directions
    multiplier: Array  # κ
    ratio: Array  # of U(κ), all r directions counted
    upper: Array  # no basis that meets the floor has a larger ratio
    residual: Array  # tr(Uᵀ(S − κR)U)
    energy: Array  # new-task energy of U(κ), over the most that r directions can carry
    gap: Array  # (..., 1): of the eigenvalues of S − κR around r, over those of S and κR


class _BasisEnergies(NamedTuple):
    """A basis with its energies on the new and on the old moment."""

    basis: Array
    new: Array  # energies of the basis, (..., 1, 1)
    old: Array


def trace_ratio(
    xp: Namespace,
    new: Array,
    old: Array | None,
    rank: int,
    ridge: Ridge,
    energy_floor: Any,
    gram_eps: float = 0.0,
) -> TraceRatio:
    """κ = min(κ*, the last κ at which U(κ) carries its share of new-task energy)."""
    size = int(new.shape[-1])
    old = xp.zeros_like(new) if old is None else old
    s, r = regularised(xp, new, old, ridge, gram_eps)
    spectrum, _ = leading_eigh(xp, s, rank)
    most = xp.sum(spectrum, axis=-1)[..., None, None]
    start = generalised(xp, s, r, rank, 0 * spectrum[..., :1]).basis
    best, value = _newton(xp, s, r, start)
    least, _, r_norm = trailing_eigh(xp, r, rank)
    least = xp.sum(least, axis=-1)[..., None, None]
    # No r directions hold less old energy: what f still has at κ bounds the ratio from above.
    upper = best + xp.where(value > 0, value, xp.zeros_like(value)) / least
    multiplier = best
    if not (isinstance(energy_floor, (int, float)) and energy_floor == 0):
        # At κ = 0 the floor holds by definition; rounding must not undo that.
        wanted = (energy_floor - rounding_share(xp, size, s)) * most
        multiplier, bound = _bisect(xp, s, r, rank, best, wanted, energy_floor * most)
        upper = xp.where(multiplier < best, bound, upper)
    values, vectors = leading_eigh(xp, s - multiplier * r, min(rank + 1, size))
    point = _energies_of(xp, s, r, vectors[..., :rank])
    # Rotate the basis within its span to separate inert directions from the others: dropping an
    # inert column then loses no energy.
    energies, turn = descending_eigh(xp, point.basis.mT @ (s @ point.basis))
    basis = point.basis @ turn
    ratios = energies / xp.sum(basis * (r @ basis), axis=-2)
    noise = channel_noise(xp, s, spectrum[..., :1], new, old, gram_eps=gram_eps)
    rounding = size * float(xp.finfo(s.dtype).eps) * spectrum[..., :1]
    inert = is_noise(xp, energies, noise_along(xp, noise, basis), rounding)
    # Not over the largest eigenvalue of S − κR: for one direction that is zero at the maximiser.
    scale = spectrum[..., :1] + multiplier[..., 0] * r_norm
    gap = scale if rank == size else values[..., rank - 1 : rank] - values[..., rank:]
    return TraceRatio(
        directions=Directions(basis, ratios, inert, xp.max(ratios, axis=-1, keepdims=True)),
        multiplier=multiplier,
        ratio=point.new / point.old,
        upper=upper,
        residual=point.new - multiplier * point.old,
        energy=safe_divide(xp, point.new, most),
        gap=safe_divide(xp, gap, scale),
    )


def _newton(
    xp: Namespace, s: Array, r: Array, start: Array, steps: int = NEWTON_STEPS
) -> tuple[Array, Array]:
    """κ*, and f there: zero to rounding. Starts at the ratio of a basis, and only rises."""
    rank = int(start.shape[-1])
    point = _energies_of(xp, s, r, start)
    kappa = point.new / point.old
    kappa = xp.where(kappa > 0, kappa, xp.zeros_like(kappa))
    for _ in range(steps):
        point = _basis_for(xp, s, r, rank, kappa)
        # The new ratio is never below κ but by rounding, which must not let it drift.
        kappa = xp.maximum(kappa, point.new / point.old)
    point = _basis_for(xp, s, r, rank, kappa)
    return kappa, point.new - kappa * point.old


def _bisect(
    xp: Namespace, s: Array, r: Array, rank: int, best: Array, wanted: Array, floor: Array
) -> tuple[Array, Array]:
    """Last κ up to κ* that carries the wanted energy, and a bound on the ratio beyond it.

    The energy of U(κ) falls with κ, in steps where eigenvalues cross, so only its sign counts.
    """
    beyond = _basis_for(xp, s, r, rank, best)
    is_free = beyond.new >= wanted  # the floor does not bind at κ*
    high = xp.log1p(best)
    low = xp.where(is_free, high, xp.zeros_like(high))
    carried, old = beyond.new, beyond.old
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        point = _basis_for(xp, s, r, rank, xp.expm1(middle))
        meets = point.new >= wanted
        low = xp.where(meets, middle, low)
        high = xp.where(meets, high, middle)
        carried, old = xp.where(meets, carried, point.new), xp.where(meets, old, point.old)
    # Any V with the energy has E_R(V) >= E_R(U(κ)) + (E(V) − E(U(κ))) / κ: U(κ) is optimal for κ.
    kappa = xp.expm1(high)
    missing = floor - carried
    missing = xp.where(missing > 0, missing, xp.zeros_like(missing))
    bound = (carried + missing) / (old + safe_divide(xp, missing, kappa))
    return xp.where(is_free, best, xp.expm1(low)), bound


def _basis_for(xp: Namespace, s: Array, r: Array, rank: int, kappa: Array) -> _BasisEnergies:
    """U(κ), the basis for a multiplier, with its energies."""
    _, vectors = leading_eigh(xp, s - kappa * r, rank)
    return _energies_of(xp, s, r, vectors)


def _energies_of(xp: Namespace, s: Array, r: Array, basis: Array) -> _BasisEnergies:
    return _BasisEnergies(basis, *(span_energy(xp, basis, m, keepdims=True) for m in (s, r)))
