"""The ratio of traces, maximised with and without a floor on the new-task energy.

All bases met on the way are U(κ), the r leading eigenvectors of S − κR. With
f(κ) = max tr(Uᵀ(S − κR)U), convex and falling, the largest ratio κ* is the root of f.
"""

from typing import Any, NamedTuple

from loda_math._arrays import Array, Namespace, descending_eigh, rounding_share, safe_divide
from loda_math._fast import leading_eigh, trailing_eigh
from loda_math._pencil import Directions, ratio_order, regularised

# Newton's steps on f are Dinkelbach's: quadratic at the end, and f·f' falls by a factor of four a
# step before. From the generalised eigenvectors six reach rounding at the default ridge, twelve
# at a ridge of 1e-11.
NEWTON_STEPS = 16
# Halvings of the bracket of log(1 + κ): from 30 (a singular history) to 1e-7.
BISECTIONS = 28


class Optimum(NamedTuple):
    """U(κ) with what proves how good it is; scalars have the shape (..., 1, 1)."""

    found: Directions
    multiplier: Array  # κ
    ratio: Array  # of U(κ), all r directions counted
    upper: Array  # no basis that meets the floor has a larger ratio
    residual: Array  # tr(Uᵀ(S − κR)U)
    energy: Array  # new-task energy of U(κ), over the most that r directions can carry
    gap: Array  # (..., 1): of the eigenvalues of S − κR around r, over those of S and κR


class _Point(NamedTuple):
    basis: Array
    new: Array
    old: Array


def maximise(
    xp: Namespace,
    new: Array,
    old: Array | None,
    rank: int,
    ridge: Any,
    energy_floor: Any,
    formed: float = 0.0,
) -> Optimum:
    """κ = min(κ*, the last κ at which U(κ) carries its share of new-task energy)."""
    size = int(new.shape[-1])
    old = xp.zeros_like(new) if old is None else old
    s, r = regularised(xp, new, old, ridge, formed)
    spectrum, _ = leading_eigh(xp, s, rank)
    share = rounding_share(xp, size, new, old, formed=formed)
    best = xp.sum(spectrum, axis=-1)[..., None, None]
    start = ratio_order(xp, s, r, rank, 0 * spectrum[..., :1]).basis
    peak, value = _newton(xp, s, r, start)
    quiet, _, loud = trailing_eigh(xp, r, rank)
    quiet = xp.sum(quiet, axis=-1)[..., None, None]
    upper = peak + xp.where(value > 0, value, xp.zeros_like(value)) / quiet
    multiplier = peak
    if not (isinstance(energy_floor, (int, float)) and energy_floor == 0):
        # At κ = 0 the floor holds by definition; rounding must not undo that.
        wanted = (energy_floor - rounding_share(xp, size, s)) * best
        multiplier, bound = _bisect(xp, s, r, rank, peak, wanted, energy_floor * best)
        upper = xp.where(multiplier < peak, bound, upper)
    values, vectors = leading_eigh(xp, s - multiplier * r, min(rank + 1, size))
    point = _measured(xp, s, r, vectors[..., :rank])
    # Turned within its span so that what is inert separates from the rest: a column that is
    # dropped then takes no energy with it.
    energies, turn = descending_eigh(xp, point.basis.mT @ (s @ point.basis))
    basis = point.basis @ turn
    ratios = energies / xp.sum(basis * (r @ basis), axis=-2)
    inert = energies <= share * spectrum[..., :1]
    # Not over the largest eigenvalue of S − κR: for one direction that is zero at the maximiser.
    scale = spectrum[..., :1] + multiplier[..., 0] * loud
    gap = scale if rank == size else values[..., rank - 1 : rank] - values[..., rank:]
    return Optimum(
        found=Directions(basis, ratios, inert, xp.max(ratios, axis=-1, keepdims=True)),
        multiplier=multiplier,
        ratio=point.new / point.old,
        upper=upper,
        residual=point.new - multiplier * point.old,
        energy=safe_divide(xp, point.new, best),
        gap=safe_divide(xp, gap, scale),
    )


def _newton(xp: Namespace, s: Array, r: Array, start: Array) -> tuple[Array, Array]:
    """κ*, and f there: zero to rounding. Starts at the ratio of a basis, and only rises."""
    rank = int(start.shape[-1])
    point = _measured(xp, s, r, start)
    peak = point.new / point.old
    peak = xp.where(peak > 0, peak, xp.zeros_like(peak))
    for _ in range(NEWTON_STEPS):
        point = _at(xp, s, r, rank, peak)
        # The new ratio is never below κ but by rounding, which must not let it drift.
        peak = xp.maximum(peak, point.new / point.old)
    point = _at(xp, s, r, rank, peak)
    return peak, point.new - peak * point.old


def _bisect(
    xp: Namespace, s: Array, r: Array, rank: int, peak: Array, wanted: Array, floor: Array
) -> tuple[Array, Array]:
    """Last κ up to κ* that carries the wanted energy, and a bound on the ratio beyond it.

    The energy of U(κ) falls with κ, in steps where eigenvalues cross, so only its sign counts.
    """
    beyond = _at(xp, s, r, rank, peak)
    free = beyond.new >= wanted
    high = xp.log1p(peak)
    low = xp.where(free, high, xp.zeros_like(high))
    carried, old = beyond.new, beyond.old
    for _ in range(BISECTIONS):
        middle = 0.5 * (low + high)
        point = _at(xp, s, r, rank, xp.expm1(middle))
        enough = point.new >= wanted
        low = xp.where(enough, middle, low)
        high = xp.where(enough, high, middle)
        carried, old = xp.where(enough, carried, point.new), xp.where(enough, old, point.old)
    # Any V with the energy has E_R(V) >= E_R(U(κ)) + (E(V) − E(U(κ))) / κ: U(κ) is optimal for κ.
    kappa = xp.expm1(high)
    missing = floor - carried
    missing = xp.where(missing > 0, missing, xp.zeros_like(missing))
    bound = (carried + missing) / (old + safe_divide(xp, missing, kappa))
    return xp.where(free, peak, xp.expm1(low)), bound


def _at(xp: Namespace, s: Array, r: Array, rank: int, kappa: Array) -> _Point:
    _, vectors = leading_eigh(xp, s - kappa * r, rank)
    return _measured(xp, s, r, vectors)


def _measured(xp: Namespace, s: Array, r: Array, basis: Array) -> _Point:
    new, old = (xp.sum(basis * (m @ basis), axis=(-2, -1), keepdims=True) for m in (s, r))
    return _Point(basis, new, old)
