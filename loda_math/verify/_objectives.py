"""What a span achieves under each objective, beside the exact optimum."""

from typing import Any

from loda_math import _pencil, _trace_ratio
from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    eye_like,
    safe_divide,
    widen,
)


def energy(
    xp: Namespace, span: Array, new: Array, old: Array, *, minimise: bool
) -> tuple[Array, Array, Array, Array]:
    n, o = widen(xp, new, old)
    s, _ = _pencil.normalised(xp, o if minimise else 0.5 * n + 0.5 * o)
    rank = int(span.shape[-1])
    values = xp.linalg.eigvalsh(s)
    value = xp.sum(span * (s @ span), axis=(-2, -1))
    image = s @ span
    residual = _relative(xp, image - span @ (span.mT @ image), s)
    # eigvalsh of the standard need not sort: the order is set here.
    values = xp.sort(values, axis=-1, descending=not minimise)
    best = xp.sum(values[..., :rank], axis=-1)
    gap = value - best if minimise else safe_divide(xp, best - value, best)
    return value, best, gap, residual


def kindest(
    xp: Namespace,
    span: Array,
    alive: Array,
    new: Array,
    old: Array,
    *,
    ridge: float,
    formed: float,
) -> tuple[Array, ...]:
    """Value, optimum, gap, residual and slack, at the ridge that speaks for the basis."""
    found = _isolated(xp, span, alive, new, old, ridge, formed)
    size = int(new.shape[-1])
    if ridge >= 4 * size * coarsest_eps(xp, new, old, formed=formed):
        return found
    n, o = widen(xp, new, old)
    # Rounding can leave small eigenvalues of a history negative: the least ridge lifts them all.
    lowest = xp.min(xp.linalg.eigvalsh(_pencil.normalised(xp, o)[0]))
    least = xp.clip(-4 * size * lowest, ridge, None)
    other = _isolated(xp, span, alive, n, o, least, 0.0)
    better = other[2] < found[2]
    return tuple(xp.where(better, b, a) for a, b in zip(found, other, strict=True))


def _isolated(
    xp: Namespace, span: Array, alive: Array, new: Array, old: Array, ridge: Any, formed: float
) -> tuple[Array, ...]:
    s, r = _pencil.regularised(xp, new, old, ridge, formed)
    rank = int(span.shape[-1])
    # A one on the diagonal for zero columns leaves their part of the pencil at zero.
    dead = xp.astype(~alive, span.dtype)[..., None] * eye_like(xp, span, rank)
    image = s @ span
    inner = xp.linalg.solve(span.mT @ (r @ span) + dead, span.mT @ image)
    found = _pencil.isolated(xp, new, old, rank, ridge, formed)
    values = xp.where(found.inert, xp.zeros_like(found.values), found.values)
    residual = _relative(xp, image - r @ (span @ inner), s)
    value, best = xp.linalg.trace(inner), xp.sum(values[..., :rank], axis=-1)
    spectrum = xp.linalg.eigvalsh(r)
    worst = xp.max(spectrum, axis=-1) / xp.min(spectrum, axis=-1)
    slack = xp.clip(2 * float(xp.finfo(r.dtype).eps) * worst, 0.0, 0.25)
    return value, best, safe_divide(xp, best - value, best), residual, slack


def ratio(
    xp: Namespace,
    span: Array,
    alive: Array,
    new: Array,
    old: Array,
    ridge: float,
    floor: float,
    formed: float,
    tolerance: float,
) -> tuple[Array, Array, Array, Array]:
    s, r = _pencil.regularised(xp, new, old, ridge, formed)
    rank = int(span.shape[-1])
    best = _trace_ratio.maximise(xp, new, old, rank, ridge, floor, formed)
    top, bottom = (xp.sum(span * (m @ span), axis=(-2, -1), keepdims=True) for m in (s, r))
    kappa = best.multiplier
    image = s @ span - kappa * (r @ span)
    residual = _relative(xp, image - span @ (span.mT @ image), s)
    # A basis of fewer directions has a larger ratio: only inert ones may be left out.
    enough = _pencil.count(xp, alive) >= _pencil.count(xp, ~best.found.inert)
    within = xp.sort(xp.linalg.eigvalsh(s), axis=-1, descending=True)[..., :rank]
    enough = enough & (top[..., 0, 0] >= (floor - tolerance) * xp.sum(within, axis=-1))
    return safe_divide(xp, top, bottom)[..., 0, 0], best.ratio[..., 0, 0], residual, enough


def _relative(xp: Namespace, residual: Array, s: Array) -> Array:
    """Norm of a residual as a share of the norm of the moment that it came from."""
    size = xp.sqrt(xp.sum(residual * residual, axis=(-2, -1)))
    return safe_divide(xp, size, xp.sqrt(xp.sum(s * s, axis=(-2, -1))) + 0 * size)
