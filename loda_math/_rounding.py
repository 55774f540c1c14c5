"""Rounding noise in second moments: how much of the energy of a direction may be rounding.

A moment is known up to rounding E of its entries, which is relative to the channels that meet in an
entry: a channel a thousand times larger than the rest blurs itself, not the others. So noise is
measured channel by channel, and along a direction u by the form uᵀNu with a diagonal N. The bound
is derived in docs/theory.md.
"""

from typing import Any

from loda_math._arrays import (
    Array,
    Namespace,
    coarsest_eps,
    descending_eigh,
    diagonal,
    is_array,
    larger,
)
from loda_math.moments import GRAM_TOKENS, SINGLE_EPS

# Rounding of a Gram matrix, as a norm, in rounding units and per √D channels. Products that are
# added one after another leave at most (3/8) √n; blocked sums, as most libraries form them, less.
GRAM_NOISE = 3 / 8 * GRAM_TOKENS**0.5


def channel_noise(
    xp: Namespace, s: Array, largest: Array, *given: Array | None, gram_eps: Any = 0.0
) -> Array:
    """Diagonal of N, shape (..., D): no direction u owes more than uᵀNu of uᵀSu to rounding.

    ``s`` is the moment in the widest dtype, at any scale, ``largest`` its largest eigenvalue (or a
    bound from below), shape (..., 1). ``given`` are the arrays that it came from, for their dtypes,
    and ``gram_eps`` the rounding unit of the Gram matrices that were summed in them.
    """
    size, eps = int(s.shape[-1]), float(xp.finfo(s.dtype).eps)
    stored = coarsest_eps(xp, *given)
    # Gram matrices are formed in single precision at least, whatever they are stored in.
    formed = larger(xp, gram_eps, min(stored, SINGLE_EPS))
    share = size**0.5 * (GRAM_NOISE * formed + stored)
    share = share[..., None] if is_array(share) else share
    # The eigensolver adds its own error, which is relative to the whole matrix.
    return share * xp.abs(diagonal(xp, s)) + size * eps * largest


def noise_along(xp: Namespace, noise: Array, directions: Array) -> Array:
    """The form uᵀNu of each column of (..., D, k) directions, shape (..., k)."""
    return xp.sum(noise[..., None] * directions * directions, axis=-2)


def is_noise(xp: Namespace, values: Array, noise: Array, resolution: Array) -> Array:
    """Which eigenvalues (..., k), in falling order, are no larger than the noise along them.

    Eigenvalues that follow one another by less than the resolution are a cluster, of which any
    rotation may come out of the solver. So noise is averaged over clusters: an average of a
    quadratic form does not depend on the rotation.
    """
    gaps = xp.concat([0 * values[..., :1], values[..., :-1] - values[..., 1:]], axis=-1)
    cluster = xp.cumulative_sum(xp.astype(gaps > resolution, xp.int32), axis=-1)
    together = xp.astype(cluster[..., :, None] == cluster[..., None, :], noise.dtype)
    mean = (together @ noise[..., None])[..., 0] / xp.sum(together, axis=-1)
    return values <= mean


def carrying(xp: Namespace, span: Array, s: Array, noise: Array) -> Array:
    """How many directions of an orthonormal span carry more than noise, shape (...).

    The positive eigenvalues of Uᵀ(S − N)U: free of the choice of a basis.
    """
    excess = span.mT @ (s @ span - noise[..., None] * span)
    values, _ = descending_eigh(xp, excess)
    return xp.sum(xp.astype(values > 0, xp.int32), axis=-1)
