"""The ratio of traces, maximised with and without a floor on the new-task energy.

All bases met on the way are U(κ), the r leading eigenvectors of S − κR. With
f(κ) = max tr(Uᵀ(S − κR)U), convex and falling, the largest ratio κ* is the root of f. The energy of
U(κ) falls with κ, in steps where eigenvalues cross.

Newton's steps on f are Dinkelbach's: the next κ is the ratio of U(κ), which is never above κ*.
Newton's steps on the energy have the derivative
dE/dκ = −2κ Σ (u_iᵀRu_j)² / (μ_i − μ_j), i ≤ r < j, for eigenpairs (μ, u) of S − κR.
"""

import math
from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    descending_eigh,
    is_array,
    is_concrete,
    rounding_share,
    safe_divide,
    span_energy,
)
from loda_math._eigh import leading_eigh, lower_cholesky, lower_solve, reduced_pencil, trailing_eigh
from loda_math._rounding import channel_noise, is_noise, noise_along
from loda_math._subspaces import Directions, Ridge, regularised

# Steps where nothing can be read on the way, as under jax.jit: from the generalised eigenvectors
# six of Newton's reach κ* to rounding at the default ridge, twelve at a ridge of 1e-11; a floor
# takes up to 28 halvings of the bracket of log(1 + κ), from 30 (a singular history) to 1e-7.
NEWTON_STEPS, FLOOR_STEPS = 16, 28
# Bound on the steps where the search stops by itself: three to five whole problems, and as many
# small ones of five to ten steps each, suffice but for ties.
MOST_STEPS = 32
# Newton's error is squared by a step: after a gain this small the next step is the last.
LAST_GAIN = 1e-7


class TraceRatio(NamedTuple):
    """U(κ) with what proves how good it is; scalars have the shape (..., 1, 1)."""

    directions: Directions
    multiplier: Array  # κ
    ratio: Array  # of U(κ), all r directions counted
    upper: Array  # no basis that meets the floor has a larger ratio
    residual: Array  # tr(Uᵀ(S − κR)U)
    energy: Array  # new-task energy of U(κ), over the most that r directions can carry
    gap: Array  # (..., 1): of the eigenvalues of S − κR around r, over those of S and κR


class _Floor(NamedTuple):
    """The new-task energy that is asked for, shape (..., 1, 1)."""

    energy: Array
    slack: Array  # what rounding may take from it

    def is_met(self, energy: Array) -> Array:
        return energy >= self.energy - self.slack


class _Bracket(NamedTuple):
    """κ lies from ``low``, which meets the floor, to ``high``, which does not (or is infinite)."""

    low: Array
    high: Array


class _Point(NamedTuple):
    """U(κ) and one direction more, energies of U(κ), and the eigenvalues of S − κR around r."""

    basis: Array
    new: Array  # (..., 1, 1)
    old: Array
    around: Array  # (..., 1, 2), or (..., 1, 1) for r = D


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
    spectrum, vectors = leading_eigh(xp, s, min(rank + 1, size))
    top = _point(xp, s, r, spectrum, vectors, rank)
    most = xp.sum(spectrum[..., :rank], axis=-1)[..., None, None]
    floor = _Floor(energy_floor * most, rounding_share(xp, size, s) * most)
    # Theorem 2.2's basis: its ratio is where the search begins.
    factor = lower_cholesky(xp, r, "old")
    _, vectors = leading_eigh(xp, reduced_pencil(xp, s, factor), rank, overwrite=True)
    start, _ = xp.linalg.qr(lower_solve(xp, factor, vectors, transpose=True))
    if is_concrete(s, r, energy_floor if is_array(energy_floor) else None):
        point, kappa, upper, is_free = _search(xp, s, r, rank, floor, top, start)
    else:
        is_floored = is_array(energy_floor) or energy_floor > 0
        steps = NEWTON_STEPS + is_floored * FLOOR_STEPS
        point, kappa, upper, is_free = _fixed_search(xp, s, r, rank, floor, start, steps)
    ratio = point.new / point.old
    residual = point.new - kappa * point.old
    if not is_concrete(is_free) or bool(xp.any(is_free)):
        least, _, r_norm = trailing_eigh(xp, r, rank)
        least = xp.sum(least, axis=-1)[..., None, None]
        # No r directions hold less old energy: what f still has at κ bounds any ratio from above.
        upper = xp.minimum(upper, kappa + xp.clip(residual, 0.0, None) / least)
    else:
        r_norm, _ = leading_eigh(xp, r, 1)
    # Rotate the basis within its span to separate inert directions from the others: dropping an
    # inert column then loses no energy.
    basis = point.basis[..., :rank]
    energies, turn = descending_eigh(xp, basis.mT @ (s @ basis))
    basis = basis @ turn
    ratios = energies / xp.sum(basis * (r @ basis), axis=-2)
    noise = channel_noise(xp, s, spectrum[..., :1], new, old, gram_eps=gram_eps)
    rounding = size * float(xp.finfo(s.dtype).eps) * spectrum[..., :1]
    inert = is_noise(xp, energies, noise_along(xp, noise, basis), rounding)
    # Not over the largest eigenvalue of S − κR: for one direction that is zero at the maximiser.
    scale = spectrum[..., :1] + kappa[..., 0] * r_norm
    gap = scale if rank == size else point.around[..., 0, :1] - point.around[..., 0, 1:]
    return TraceRatio(
        directions=Directions(basis, ratios, inert, xp.max(ratios, axis=-1, keepdims=True)),
        multiplier=kappa,
        ratio=ratio,
        # The basis is itself one of those that meet the floor.
        upper=xp.maximum(upper, ratio),
        residual=residual,
        energy=safe_divide(xp, point.new, most),
        gap=safe_divide(xp, gap, scale),
    )


def _search(
    xp: Namespace, s: Array, r: Array, rank: int, floor: _Floor, top: _Point, start: Array
) -> tuple[_Point, Array, Array, Array]:
    """U(κ), κ, an upper bound of the ratio, and where the floor does not bind.

    Each κ is the answer for the pencil within the span of a few bases that are known already. Those
    at both ends of the bracket are among them, so that this answer lies in the bracket too, and its
    error is at least squared by a step. Where the bound proves the answer, it is final.
    """
    size, eps = int(s.shape[-1]), float(xp.finfo(s.dtype).eps)
    count, close = min(rank + 1, size), 64 * rounding_share(xp, size, s)
    best, kappa = top, _ratio_of(xp, s, r, start)
    bracket = _Bracket(xp.zeros_like(kappa), xp.full_like(kappa, math.inf))
    upper, fails = bracket.high, xp.zeros_like(kappa)
    is_last = is_done = kappa < 0
    # Three bases save a step over two, and pay where their problems are small.
    known = [start] if 16 * rank > size else [start, start]
    for _ in range(MOST_STEPS):
        span, _ = xp.linalg.qr(xp.concat([best.basis, *known], axis=-1))
        small = [span.mT @ (m @ span) for m in (s, r)]
        answer = _root(xp, small[0], small[1], rank, floor, kappa, bracket).low
        values, vectors = descending_eigh(xp, _shifted(small[0], small[1], answer))
        guess = _point(xp, small[0], small[1], values[..., :count], vectors[..., :count], rank)
        is_proven = floor.is_met(guess.new) & (upper * guess.old <= (1 + close) * guess.new)
        is_proven = is_proven & ~is_done
        best = _chosen(xp, is_proven, guess._replace(basis=span @ guess.basis), best)
        bracket = _narrowed(xp, bracket, answer, is_proven, xp.zeros_like(is_proven))
        is_done = is_done | is_proven
        if bool(xp.all(is_done)):
            break
        # Where eigenvalues cross, rounding may put one κ after the other on the far side.
        back = xp.expm1(xp.log1p(bracket.high) - 4 * eps * 64.0**fails)
        kappa = xp.where(is_done, kappa, xp.maximum(bracket.low, xp.minimum(answer, back)))
        is_stuck = kappa <= bracket.low * (1 + 4 * eps)
        values, vectors = leading_eigh(
            xp, _shifted(s, r, kappa), count, lanczos=False, overwrite=True
        )
        point = _point(xp, s, r, values, vectors, rank)
        upper = xp.minimum(upper, _bound(xp, floor, kappa, point))
        meets = floor.is_met(point.new)
        fails = xp.where(meets, xp.zeros_like(fails), fails + 1)
        known = [xp.where(meets, best.basis, point.basis), *known][: len(known)]
        best = _chosen(xp, meets & ~is_done, point, best)
        bracket = _narrowed(xp, bracket, kappa, meets & ~is_done, ~(meets | is_done))
        gain = best.new - bracket.low * best.old
        is_at_root = (gain <= close * best.new) | is_last
        is_at_floor = (best.new - floor.energy <= close * floor.energy) & (bracket.low > 0)
        is_last = meets & (gain <= LAST_GAIN * best.new)
        is_done = is_done | is_at_root | is_at_floor | (meets & is_stuck) | _is_shut(xp, bracket)
        if bool(xp.all(is_done)):
            break
    return best, bracket.low, upper, xp.isinf(bracket.high)


def _fixed_search(
    xp: Namespace, s: Array, r: Array, rank: int, floor: _Floor, start: Array, steps: int
) -> tuple[_Point, Array, Array, Array]:
    """The same by a fixed number of steps, of which none reads a value."""
    kappa = _ratio_of(xp, s, r, start)
    bracket = _Bracket(xp.zeros_like(kappa), xp.full_like(kappa, math.inf))
    bracket = _root(xp, s, r, rank, floor, kappa, bracket, steps)
    shifted = _shifted(s, r, bracket.low)
    values, vectors = leading_eigh(xp, shifted, min(rank + 1, int(s.shape[-1])))
    point = _point(xp, s, r, values, vectors, rank)
    upper = _bound(xp, floor, bracket.low, point)
    return point, bracket.low, upper, xp.isinf(bracket.high)


def _root(
    xp: Namespace,
    s: Array,
    r: Array,
    rank: int,
    floor: _Floor,
    kappa: Array,
    bracket: _Bracket,
    steps: int | None = None,
) -> _Bracket:
    """Bracket of the last κ up to κ* at which U(κ) meets the floor, from whole decompositions.

    Rises by Newton's steps on f until the floor fails, then takes Newton's steps on the energy, or
    halves the bracket where they leave it or are too long. Stops by itself unless ``steps`` says
    how many there are.
    """
    eps = float(xp.finfo(s.dtype).eps)
    stride, is_last = xp.full_like(kappa, math.inf), kappa < 0
    for _ in range(steps or MOST_STEPS):
        values, vectors = descending_eigh(xp, _shifted(s, r, kappa))
        basis = vectors[..., :rank]
        shadow = r @ basis
        old = xp.sum(basis * shadow, axis=(-2, -1), keepdims=True)
        new = span_energy(xp, basis, s, keepdims=True)
        meets = floor.is_met(new)
        bracket = _narrowed(xp, bracket, kappa, meets, ~meets)
        rises, gain = xp.isinf(bracket.high), new - kappa * old
        is_done = xp.where(
            rises,
            (gain <= 4 * eps * new) | is_last,
            (xp.abs(new - floor.energy) <= floor.slack) | _is_shut(xp, bracket),
        )
        if steps is None and bool(xp.all(is_done)):
            break
        is_last = rises & (gain <= LAST_GAIN * new)
        mixed = vectors[..., rank:].mT @ shadow
        apart = values[..., None, :rank] - values[..., rank:, None]
        largest = xp.max(xp.abs(values), axis=-1)[..., None, None]
        apart = xp.maximum(apart, xp.where(largest > 0, eps * largest, xp.ones_like(largest)))
        slope = -2 * kappa * xp.sum(mixed * mixed / apart, axis=(-2, -1), keepdims=True)
        # In t = log(1 + κ), over which the energy changes most evenly.
        low, t, high = (xp.log1p(k) for k in (bracket.low, kappa, bracket.high))
        aim = t - safe_divide(xp, new - floor.energy, (1 + kappa) * slope)
        is_sound = (aim > low) & (aim < high) & (xp.abs(aim - t) <= 0.5 * stride) & ~rises
        aim = xp.where(is_sound, aim, 0.5 * (low + high))
        following = xp.where(rises, xp.maximum(kappa, new / old), xp.expm1(aim))
        stride = xp.abs(xp.log1p(following) - t)
        kappa = xp.where(is_done, kappa, following)
    return bracket


def _shifted(s: Array, r: Array, kappa: Array) -> Array:
    """S − κR."""
    shifted = -kappa * r
    shifted += s
    return shifted


def _point(xp: Namespace, s: Array, r: Array, values: Array, vectors: Array, rank: int) -> _Point:
    """The point of the r + 1 leading eigenpairs of S − κR, or of all of them for r = D."""
    basis = vectors[..., :rank]
    new, old = (span_energy(xp, basis, m, keepdims=True) for m in (s, r))
    return _Point(vectors, new, old, values[..., None, rank - 1 :])


def _chosen(xp: Namespace, mask: Array, one: _Point, other: _Point) -> _Point:
    return _Point(*(xp.where(mask, *pair) for pair in zip(one, other, strict=True)))


def _ratio_of(xp: Namespace, s: Array, r: Array, basis: Array) -> Array:
    new, old = (span_energy(xp, basis, m, keepdims=True) for m in (s, r))
    return xp.clip(new / old, 0.0, None)


def _narrowed(
    xp: Namespace, bracket: _Bracket, kappa: Array, meets: Array, fails: Array
) -> _Bracket:
    """The bracket after one more try; rounding must not widen it."""
    return _Bracket(
        xp.where(meets, xp.maximum(bracket.low, kappa), bracket.low),
        xp.where(fails, xp.minimum(bracket.high, kappa), bracket.high),
    )


def _is_shut(xp: Namespace, bracket: _Bracket) -> Array:
    eps = float(xp.finfo(bracket.low.dtype).eps)
    return bracket.high <= bracket.low + 8 * eps * (1 + bracket.low)


def _bound(xp: Namespace, floor: _Floor, kappa: Array, point: _Point) -> Array:
    """Bound on the ratio of every V that meets the floor, by the optimality of U(κ) for its κ.

    E(V) − κE_R(V) ≤ f(κ) gives E(V) / E_R(V) ≤ κE(V) / (E(V) − f(κ)), which falls with E(V) where
    f(κ) is positive; it is negative by rounding alone, beyond κ*.
    """
    least = floor.energy - floor.slack
    rest = least - xp.clip(point.new - kappa * point.old, 0.0, None)
    bound = kappa * safe_divide(xp, least, rest)
    return xp.where((rest > 0) & (least > 0), bound, xp.full_like(bound, math.inf))
