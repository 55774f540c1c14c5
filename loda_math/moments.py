"""Streaming second moments, and the weighted history that many tasks leave behind.

Moments are a monoid of (sum, count), precise enough for the solvers. A history is one matrix that
stays in range over any number of tasks. Both carry the rounding unit of the arithmetic that formed
them, so that a solver can tell directions from rounding noise.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

from loda_math._arrays import (
    Array,
    Namespace,
    at_least_single,
    full_precision,
    is_array,
    namespace,
    peak,
    placed_like,
    python_number,
    symmetrise,
    transposed,
    widen,
    widest,
)
from loda_math._validation import (
    check_real,
    check_scalar,
    check_share,
    check_square,
    check_values,
    coarsest_unit,
)

# Tokens per single-precision Gram matrix. Rounding within a Gram grows with the tokens summed in
# it, so longer inputs are cut and the pieces are summed in double precision.
GRAM_TOKENS = 16384
# Gram matrices are formed in float32 at least.
SINGLE_EPS = 2.0**-23


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
    unit : float, default 0
        Rounding unit of the arithmetic that formed the outer products, where it is coarser than
        that of ``total``: 1.2e-7 for float32 Gram matrices. :func:`second_moment` sets it,
        :func:`combine` keeps the coarsest, and solvers take rounding below it for noise. Give it
        (from :func:`rounding_unit`) to moments made by hand.

    See Also
    --------
    second_moment : Moments of a set of tokens.
    combine : Moments of two sets.
    History : What several tasks leave behind.

    Examples
    --------
    >>> import numpy as np
    >>> m = second_moment(np.asarray([[1.0, 2.0], [3.0, 4.0]]))
    >>> m.count, m.unit
    (2, 2.220446049250313e-16)
    >>> m.mean
    array([[ 5.,  7.],
           [ 7., 10.]])
    """

    total: Array
    count: Any
    error: Array | None = None
    unit: Any = 0.0

    @property
    def mean(self) -> Array:
        """Second moment ``S = XᵀX / N``, shape (..., D, D); zero if nothing was counted."""
        total = self.total if self.error is None else self.total + self.error
        # An empty sum is zero already, so any divisor but zero will do; no branch on the count.
        return total / _by_matrix(_known(total, self.count) + (self.count == 0))

    def zero(self) -> "Moments":
        """The neutral element of ``combine`` for moments of this shape."""
        nothing = namespace(total=self.total).zeros_like(self.total)
        return Moments(nothing, 0, None if self.error is None else nothing, 0.0)

    def __add__(self, other: "Moments") -> "Moments":  # type: ignore[override]
        """``combine(self, other)``; a tuple would otherwise be concatenated."""
        return combine(self, other)

    def __radd__(self, other: Any) -> "Moments":
        """Let ``sum`` add moments up: it starts from the number 0."""
        return self if isinstance(other, int) and other == 0 else combine(other, self)

    def __mul__(self, other: Any) -> NoReturn:
        """Refused; a tuple would otherwise be repeated."""
        msg = (
            "Moments cannot be multiplied: a factor leaves the mean as it is; weigh them in "
            "remember(history, moments, weight=...), or multiply their mean"
        )
        raise TypeError(msg)

    def __rmul__(self, other: Any) -> NoReturn:
        """Refused, from the left too."""
        self.__mul__(other)

    def to_arrays(self) -> dict[str, Array]:
        """Fields as arrays by name, for ``np.savez`` or safetensors; ``error`` where there is one.

        Raises
        ------
        ValueError
            If the library has no integers large enough for the count.

        Examples
        --------
        >>> import io
        >>> import numpy as np
        >>> file = io.BytesIO()
        >>> np.savez(file, **second_moment(np.eye(2)).to_arrays())
        >>> again = Moments.from_arrays(np.load(io.BytesIO(file.getvalue())))
        >>> again.count, again.unit
        (2, 2.220446049250313e-16)
        """
        return _to_arrays(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "Moments":
        """Moments from the arrays that :meth:`to_arrays` gave, of any library.

        Raises
        ------
        ValueError
            If arrays are missing, there are others, or the total is not square.
        """
        return cls(**_from_arrays(cls, arrays))


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

    See Also
    --------
    combine : Moments of two sets of tokens.
    remember : Add the moments of a task to the history.
    general_subspace : What moments are for.

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
        Totals and counts added; the coarser of the two rounding units. In compiled code a count is
        an array: one of 32 bits, as of JAX without float64, stops at its largest value, and the
        mean of so many tokens is NaN.

    Raises
    ------
    TypeError
        If an argument is no ``Moments``, or the totals are of different libraries.
    ValueError
        If the totals differ in shape.

    See Also
    --------
    second_moment : Moments of a set of tokens.
    Moments : Their fields.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(6.0).reshape(3, 2)
    >>> parts = combine(second_moment(x[:1]), second_moment(x[1:]))
    >>> bool(np.all(parts.total == second_moment(x).total)), parts.count
    (True, 3)
    """
    for name, part in (("a", a), ("b", b)):
        if not isinstance(part, Moments):
            msg = f"{name} must be Moments, as second_moment returns, got {type(part).__name__}"
            raise TypeError(msg)
    xp = namespace(a=a.total, b=b.total)
    if tuple(a.total.shape) != tuple(b.total.shape):
        msg = (
            f"moments of different shapes do not combine: {tuple(a.total.shape)} and "
            f"{tuple(b.total.shape)}"
        )
        raise ValueError(msg)
    total, unit = a.total + b.total, coarsest_unit(xp, a, b)
    if a.error is None and b.error is None:
        return Moments(total, _counted(xp, a, b), None, unit)
    # Two-sum (Knuth): the exact rounding error of the addition above, without a branch.
    shadow = total - a.total
    error = (a.total - (total - shadow)) + (b.total - shadow)
    for part in (a, b):
        if part.error is not None:
            error = error + part.error
    return Moments(total, _counted(xp, a, b), error, unit)


class History(NamedTuple):
    r"""Weighted sum of the mean moments of past tasks, :math:`S_{old} = \sum_t w_t S_t`.

    :meth:`to_arrays` gives what to store, and :meth:`from_arrays` the same history again.

    Attributes
    ----------
    total : array, shape (..., D, D)
        :math:`\sum_t w_t S_t`, in the widest real dtype of the library. What the solvers take as
        ``old`` when the size of the history is to count.
    weight : float
        :math:`\sum_t w_t`; divides the total to a mean.
    squares : float
        :math:`\sum_t w_t^2`, for the number of tasks that are effectively remembered.
    unit : float, default 0
        Rounding unit of the arithmetic that formed the moments, the coarsest of all tasks, as in
        :class:`Moments`.

    See Also
    --------
    remember : Add a task.
    Moments : Of one task.

    Examples
    --------
    >>> import numpy as np
    >>> h = remember(remember(None, np.eye(2)), 3 * np.eye(2))
    >>> float(h.total[0, 0]), float(h.mean[0, 0]), h.effective_tasks
    (4.0, 2.0, 2.0)
    """

    total: Array
    weight: Any
    squares: Any
    unit: Any = 0.0

    @property
    def mean(self) -> Array:
        """Weighted mean of the moments, shape (..., D, D), for any number of tasks."""
        # Nothing of positive weight leaves a total of zero: any divisor but zero will do.
        return self.total / _by_matrix(self.weight + (self.weight == 0))

    @property
    def effective_tasks(self) -> Any:
        r"""Equally weighted tasks with the same spread of weights, :math:`(\sum w)^2/\sum w^2`."""
        return self.weight**2 / (self.squares + (self.squares == 0))

    def __add__(self, other: "History") -> "History":  # type: ignore[override]
        """History of the tasks of both; a tuple would otherwise be concatenated."""
        if not isinstance(other, History):
            msg = f"a History can only be added to a History, got {type(other).__name__}"
            raise TypeError(msg)
        xp = namespace(total=self.total, other=other.total)
        if tuple(self.total.shape) != tuple(other.total.shape):
            msg = (
                f"histories must have totals of one shape to be added, got "
                f"{tuple(self.total.shape)} and {tuple(other.total.shape)}"
            )
            raise ValueError(msg)
        return History(
            self.total + other.total,
            self.weight + other.weight,
            self.squares + other.squares,
            coarsest_unit(xp, self, other),
        )

    def __radd__(self, other: Any) -> "History":
        """Let ``sum`` add histories up: it starts from the number 0."""
        return self if isinstance(other, int) and other == 0 else self + other

    def __mul__(self, other: Any) -> NoReturn:
        """Refused; a tuple would otherwise be repeated."""
        msg = (
            "a History cannot be multiplied; weigh tasks in remember(..., weight=...), let them "
            "fade with decay=..., or multiply the total"
        )
        raise TypeError(msg)

    def __rmul__(self, other: Any) -> NoReturn:
        """Refused, from the left too."""
        self.__mul__(other)

    def to_arrays(self) -> dict[str, Array]:
        """Fields as arrays by name, for ``np.savez`` or safetensors.

        Examples
        --------
        >>> import io
        >>> import numpy as np
        >>> file = io.BytesIO()
        >>> np.savez(file, **remember(None, np.eye(2)).to_arrays())
        >>> History.from_arrays(np.load(io.BytesIO(file.getvalue()))).effective_tasks
        1.0
        """
        return _to_arrays(self)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> "History":
        """The history from the arrays that :meth:`to_arrays` gave, of any library.

        Raises
        ------
        ValueError
            If arrays are missing, there are others, or the total is not square.
        """
        return cls(**_from_arrays(cls, arrays))


def remember(
    history: History | None, /, *moments: Array | Moments, weight: float = 1.0, decay: float = 1.0
) -> History:
    r"""Add a finished task to the history: :math:`S_{old} \leftarrow \beta S_{old} + w S_t`.

    With :math:`\beta = 1` every task counts by its weight (the paper's history, where each task
    counts alike). With :math:`\beta < 1` old tasks fade: the total then stays below
    :math:`\max_t w_t S_t / (1 - \beta)` over any number of tasks, and remembers
    :math:`(1 + \beta) / (1 - \beta)` of them in the long run.

    Parameters
    ----------
    history : History or None
        The history so far; ``None`` before the first task.
    *moments : Moments, or array of shape (..., D, D)
        Second moment of the task: ``Moments``, of which the mean and the rounding unit are taken,
        or a mean as an array, with the unit of its dtype. Several moments of one task, from passes
        through different models, are added one after another after a single decay; the task then
        weighs w times their number. The published code adds two.
    weight : float, default 1
        w, at least 0: for instance 1, or the number of classes of the task.
    decay : float, default 1
        β in [0, 1]; ``0.5 ** (1 / h)`` halves the weight of a task after h further tasks.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        If there is no moment, a moment is not a real floating-point array, or the history no
        ``History``.
    ValueError
        If shapes differ, values are not finite or not symmetric, the weight is negative, or the
        decay is not from 0 to 1.

    See Also
    --------
    History : Its fields.
    second_moment : The moments of a task.

    Notes
    -----
    Generalises the history of LoDA, arXiv:2603.00191, Section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> h = None
    >>> for _ in range(1000):
    ...     h = remember(h, np.eye(2), decay=0.9)
    >>> round(float(h.total[0, 0]), 6), round(float(h.effective_tasks), 6)
    (10.0, 19.0)
    """
    if history is not None and not isinstance(history, History):
        msg = f"history must be a History or None, got {type(history).__name__}"
        raise TypeError(msg)
    if not moments:
        msg = "remember must have at least one moment of the task, got none"
        raise TypeError(msg)
    weight, decay = check_scalar("weight", weight), check_share("decay", decay)
    several = len(moments) > 1
    means = [m.mean if isinstance(m, Moments) else m for m in moments]
    added = {f"moments[{i}]" if several else "moment": m for i, m in enumerate(means)}
    arrays = added if history is None else added | {"total": history.total}
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    check_square(**arrays)
    # The total is not read: it was checked when it was formed, one task at a time.
    check_values(xp, symmetric=added)
    parts = [weight * m for m in widen(xp, *means)]
    unit = coarsest_unit(xp, *moments, *(() if history is None else (history,)))
    if history is not None:
        parts.insert(0, decay * widen(xp, history.total)[0])
    # One after another, so that a history is the same bit for bit however it was resumed.
    total = sum(parts[1:], start=parts[0])
    task_weight = python_number(len(moments) * weight)
    if history is None:
        return History(total, task_weight, task_weight * task_weight, unit)
    return History(
        total,
        decay * history.weight + task_weight,
        decay * decay * history.squares + task_weight * task_weight,
        unit,
    )


def rounding_unit(*tokens: Array) -> float:
    """Rounding unit of the Gram matrices that :func:`second_moment` forms of tokens like these.

    What solvers take as ``accumulation_eps``: a moment is summed in float64, but its Gram matrices
    are formed in the dtype of the tokens, float32 or wider, and directions whose energy is below
    that rounding are noise.

    Parameters
    ----------
    *tokens : array
        Tokens, or weights of the layers that they enter: only the dtypes count, and the coarsest
        decides. Without any, those of single precision.

    Returns
    -------
    float
        1.2e-7 for tokens of float32 or less, 2.2e-16 for float64.

    Raises
    ------
    TypeError
        If an array is not real floating point.

    See Also
    --------
    general_subspace : Takes it as ``accumulation_eps``.
    Moments : Carry it.

    Examples
    --------
    >>> import numpy as np
    >>> rounding_unit(np.ones(3)), rounding_unit(np.ones(3), np.ones(3, dtype=np.float16))
    (2.220446049250313e-16, 1.1920928955078125e-07)
    """
    if not tokens:
        return SINGLE_EPS
    named = {f"tokens[{i}]": x for i, x in enumerate(tokens)}
    xp = namespace(**named)
    check_real(xp, **named)
    return max(min(float(xp.finfo(x.dtype).eps), SINGLE_EPS) for x in tokens)


def _guarded(xp: Namespace, tokens: Array) -> Array:
    """Largest magnitude among the tokens, infinite where a product of tokens may overflow."""
    if 0 in tokens.shape:
        return xp.zeros_like(tokens)
    largest = peak(xp, tokens)
    summed = min(int(tokens.shape[-2]), GRAM_TOKENS)
    limit = math.sqrt(float(xp.finfo(tokens.dtype).max) / summed)
    return xp.where(largest <= limit, largest, xp.full_like(largest, math.inf))


def _most(xp: Namespace, count: Any) -> int | None:
    """Largest value of a count that is an array of short integers, where it stops."""
    if not is_array(count) or not xp.isdtype(count.dtype, "signed integer"):
        return None
    info = xp.iinfo(count.dtype)
    return int(info.max) if info.bits < 64 else None


def _counted(xp: Namespace, a: Moments, b: Moments) -> Any:
    """Sum of the counts. An overflow, which wraps around, becomes the largest value and stays."""
    count = a.count + b.count
    most = _most(xp, count)
    return count if most is None else xp.where(count < 0, xp.full_like(count, most), count)


def _known(total: Array, count: Any) -> Any:
    """The count, and NaN where it overflowed."""
    xp = namespace(total=total)
    most = _most(xp, count)
    if most is None:
        return count
    number = xp.astype(count, total.dtype)
    return xp.where(count == most, xp.full_like(number, math.nan), number)


def _to_arrays(fields: "Moments | History") -> dict[str, Array]:
    xp = namespace(total=fields.total)
    arrays: dict[str, Array] = {}
    for name, value in zip(fields._fields, fields, strict=True):
        number = python_number(value)
        if value is None or is_array(number):
            arrays |= {} if value is None else {name: value}
            continue
        dtype = None if isinstance(number, int) else fields.total.dtype
        try:
            arrays[name] = xp.asarray(number, dtype=dtype, **placed_like(fields.total))
        except OverflowError as error:
            msg = f"{name} must fit into an integer of {xp.__name__}, got {number}; switch on x64"
            raise ValueError(msg) from error
    return arrays


def _from_arrays(kind: Any, arrays: Mapping[str, Array]) -> dict[str, Any]:
    known, required = set(kind._fields), set(kind._fields) - set(kind._field_defaults)
    if not required <= set(arrays) <= known:
        msg = (
            f"arrays must hold {sorted(required)}, and may hold {sorted(known - required)}, got "
            f"{sorted(arrays)}"
        )
        raise ValueError(msg)
    # Not the mapping itself: an open .npz file reads an array at each look.
    fields = {name: arrays[name] for name in arrays}
    xp = namespace(total=fields["total"])
    check_square(total=fields["total"])
    for name, value in fields.items():
        if is_array(value) and value.ndim == 0:
            is_count = xp.isdtype(value.dtype, "integral")
            fields[name] = int(value) if is_count else float(value)
    return fields


def _by_matrix(number: Any) -> Any:
    """A number, or an array of one a matrix, as it meets matrices."""
    return number[..., None, None] if is_array(number) else number


def _gram(xp: Namespace, tokens: Array, wide: Any) -> Moments:
    with full_precision(tokens):
        gram = xp.astype(symmetrise(transposed(tokens) @ tokens), wide)
    error = gram * 0 if xp.finfo(wide).bits < 64 else None
    return Moments(gram, int(tokens.shape[-2]), error, float(xp.finfo(tokens.dtype).eps))
