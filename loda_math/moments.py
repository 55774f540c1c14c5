"""Streaming second moments: a monoid of (sum, count), precise enough for the solvers."""

import math
from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    at_least_single,
    full_precision,
    namespace,
    symmetrise,
    transposed,
    widest,
)
from loda_math._validation import check_real, check_values

# Tokens per single-precision Gram matrix. Rounding within a Gram grows with the tokens summed in
# it, so longer inputs are cut and the pieces are summed in double precision.
GRAM_TOKENS = 16384


class Moments(NamedTuple):
    r"""Sum of outer products of tokens, and how many tokens were summed.

    Attributes
    ----------
    total : array, shape (..., D, D)
        Sum of ``x xᵀ`` over tokens, in the widest real dtype of the library.
    count : int or float
        Number of tokens in the sum.
    error : array, shape (..., D, D), optional
        What rounding took from ``total``, kept where the library has no float64 (compensated
        summation); ``None`` elsewhere.

    Examples
    --------
    >>> import numpy as np
    >>> m = second_moment(np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    >>> m.count
    2
    >>> m.mean
    array([[ 5.,  7.],
           [ 7., 10.]])
    """

    total: Array
    count: Any
    error: Array | None = None

    @property
    def mean(self) -> Array:
        """Second moment ``S = XᵀX / N``, shape (..., D, D); zero if nothing was counted."""
        total = self.total if self.error is None else self.total + self.error
        # An empty sum is zero already, so any divisor but zero will do; no branch on the count.
        return total / (self.count + (self.count == 0))

    def zero(self) -> "Moments":
        """The neutral element of ``combine`` for moments of this shape."""
        nothing = namespace(total=self.total).zeros_like(self.total)
        return Moments(nothing, 0, None if self.error is None else nothing)

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """``combine(self, other)``; a tuple would otherwise be concatenated."""
        return combine(self, other)

    def __radd__(self, other: Any) -> "Moments":
        """Let ``sum`` add moments up: it starts from the number 0."""
        return self if isinstance(other, int) and other == 0 else combine(other, self)


def second_moment(tokens: Array, /, *, check: bool = True) -> Moments:
    r"""Second moment of a set of tokens.

    Half precision is cast up first; Gram matrices are formed in the dtype of the tokens (float32
    or wider) and summed in float64, or with compensation where float64 is missing (LoDA,
    arXiv:2603.00191, notation of Section 3: :math:`S = X^\top X / N`).

    Parameters
    ----------
    tokens : array, shape (..., N, D)
        One row a token. ``N`` may be zero.
    check : bool, default True
        Read one scalar to refuse NaN and infinity. Turn it off inside a training loop on an
        accelerator, and check the sum once at the end.

    Returns
    -------
    Moments
        ``total`` of shape (..., D, D) in the widest real dtype, ``count`` = N.

    Raises
    ------
    TypeError
        If the tokens are not real floating point.
    ValueError
        If the tokens have fewer than two axes, no features, or hold NaN, infinity or values
        whose squares would overflow.

    Examples
    --------
    >>> import numpy as np
    >>> second_moment(np.ones((4, 2), dtype=np.float32)).total
    array([[4., 4.],
           [4., 4.]])
    """
    xp = namespace(tokens=tokens)
    check_real(xp, tokens=tokens)
    if tokens.ndim < 2 or tokens.shape[-1] == 0:
        msg = f"tokens must have shape (..., N, D) with D > 0, got {tuple(tokens.shape)}"
        raise ValueError(msg)
    tokens = at_least_single(xp, tokens)
    if check:
        check_values(xp, {"tokens": _guarded(xp, tokens)})
    count = int(tokens.shape[-2])
    wide = widest(xp, tokens)
    # The standard leaves slices beyond the end open, so none goes there.
    moments = _gram(xp, tokens[..., : min(GRAM_TOKENS, count), :], wide)
    for start in range(GRAM_TOKENS, count, GRAM_TOKENS):
        piece = tokens[..., start : min(start + GRAM_TOKENS, count), :]
        moments = combine(moments, _gram(xp, piece, wide))
    return moments


def combine(a: Moments, b: Moments, /) -> Moments:
    """Moments of the union of two disjoint sets of tokens.

    Associative and commutative to rounding, with ``a.zero()`` as neutral element. ``a + b`` is the
    same, and ``sum`` adds up a list of moments.

    Parameters
    ----------
    a, b : Moments
        Totals of the same shape, library and device.

    Returns
    -------
    Moments
        Totals and counts added.

    Raises
    ------
    TypeError
        If an argument is no ``Moments``, or the totals are of different libraries.
    ValueError
        If the totals differ in shape.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> parts = combine(second_moment(x[:1]), second_moment(x[1:]))
    >>> bool(np.all(parts.total == second_moment(x).total)), parts.count
    (True, 3)
    """
    sides: dict[str, Any] = {"a": a, "b": b}
    for name, side in sides.items():
        if not isinstance(side, Moments):
            msg = f"{name} must be Moments, as second_moment returns, got {type(side).__name__}"
            raise TypeError(msg)
    namespace(a=a.total, b=b.total)
    if tuple(a.total.shape) != tuple(b.total.shape):
        msg = (
            f"moments of different shapes do not combine: {tuple(a.total.shape)} and "
            f"{tuple(b.total.shape)}"
        )
        raise ValueError(msg)
    total = a.total + b.total
    if a.error is None and b.error is None:
        return Moments(total, a.count + b.count)
    # Two-sum (Knuth): the exact rounding error of the addition above, without a branch.
    shadow = total - a.total
    error = (a.total - (total - shadow)) + (b.total - shadow)
    for side in (a, b):
        if side.error is not None:
            error = error + side.error
    return Moments(total, a.count + b.count, error)


def _guarded(xp: Namespace, tokens: Array) -> Array:
    """Largest magnitude among the tokens, infinite where a product of tokens may overflow."""
    if 0 in tokens.shape:
        return xp.zeros_like(tokens)
    peak = xp.max(xp.abs(tokens))
    summed = min(int(tokens.shape[-2]), GRAM_TOKENS)
    limit = math.sqrt(float(xp.finfo(tokens.dtype).max) / summed)
    return xp.where(peak <= limit, peak, xp.full_like(peak, math.inf))


def _gram(xp: Namespace, tokens: Array, wide: Any) -> Moments:
    with full_precision(tokens):
        gram = xp.astype(symmetrise(transposed(tokens) @ tokens), wide)
    compensated = xp.finfo(wide).bits < 64
    return Moments(gram, int(tokens.shape[-2]), gram * 0 if compensated else None)
