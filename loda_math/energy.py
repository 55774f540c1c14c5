"""Energy of a subspace, and its relation to one step of training (LoDA, Theorem 2.1)."""

from collections.abc import Callable
from typing import Any, NamedTuple

from loda_math._arrays import (
    Array,
    Namespace,
    diagonal,
    namespace,
    result_dtype,
    safe_divide,
    span_energy,
    trace,
    widen,
)
from loda_math._rounding import channel_noise, noise_along
from loda_math._validation import (
    MomentLike,
    check_real,
    check_rows,
    check_scalar,
    check_values,
    checked_moments,
)


class HeldoutRatio(NamedTuple):
    """Energy ratio of a subspace where it was chosen, and where it was not.

    Attributes
    ----------
    chosen : array, shape (...)
        On the half of the data that the subspace was chosen on; optimistic.
    heldout : array, shape (...)
        On the other half: the ratio to expect on new images of the task.
    energy : array, shape (...)
        Relative new-task energy on the other half: what is left to learn with.
    """

    chosen: Array
    heldout: Array
    energy: Array


class FirstOrderUpdate(NamedTuple):
    """What one gradient step on an up-projection does to first order.

    Attributes
    ----------
    output : array, shape (..., N, O)
        Change of the layer's output.
    loss : array, shape (...)
        First-order change of the loss; never positive.
    lower, upper : array, shape (...)
        Bounds on ``-loss``.
    """

    output: Array
    loss: Array
    lower: Array
    upper: Array


def projection_energy(basis: Array, moment: MomentLike) -> Array:
    r"""Energy that a subspace carries, :math:`E(U; S) = \operatorname{tr}(U^\top S U)`.

    Parameters
    ----------
    basis : array, shape (..., D, r)
        Orthonormal columns (zero columns carry nothing).
    moment : array of shape (..., D, D), Moments or History
        Second moment, symmetric.

    Returns
    -------
    array, shape (...)
        In units of the moment (squared activations).

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If the shapes do not match, or values are not finite or the moment is not symmetric.

    See Also
    --------
    relative_energy : As a share of the trace.
    energy_ratio : New task over old ones.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> float(projection_energy(np.eye(3)[:, :2], np.diag([4.0, 2.0, 1.0])))
    6.0
    """
    xp, (moment,) = _checked(basis, moment=moment)
    u, s = widen(xp, basis, moment)
    return xp.astype(span_energy(xp, u, s), result_dtype(xp, basis, moment))


def relative_energy(basis: Array, moment: MomentLike) -> Array:
    r"""Share of all energy in a subspace, :math:`e(U; S) = E(U; S) / \operatorname{tr} S`.

    Parameters
    ----------
    basis : array, shape (..., D, r)
        Orthonormal columns.
    moment : array of shape (..., D, D), Moments or History
        Second moment, symmetric.

    Returns
    -------
    array, shape (...)
        Between 0 and 1; 0 for a zero moment.

    Raises
    ------
    TypeError, ValueError
        As in :func:`projection_energy`.

    See Also
    --------
    projection_energy : In units of the moment.
    energy_ratio : New task over old ones.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.

    Examples
    --------
    >>> import numpy as np
    >>> float(relative_energy(np.eye(4)[:, :1], np.eye(4)))
    0.25
    """
    xp, (moment,) = _checked(basis, moment=moment)
    u, s = widen(xp, basis, moment)
    return xp.astype(_relative(xp, u, s), result_dtype(xp, basis, moment))


def energy_ratio(basis: Array, new: MomentLike, old: MomentLike) -> Array:
    r"""Relative energy on the new task over that on the old, :math:`e(U; S_{new}) / e(U; S_{old})`.

    About 1 for directions that old and new tasks use alike; large for directions that only the
    new task uses.

    Parameters
    ----------
    basis : array, shape (..., D, r)
        Orthonormal columns.
    new, old : array of shape (..., D, D), Moments or History
        Second moments, symmetric.

    Returns
    -------
    array, shape (...)
        Infinite where the basis carries energy of the new task only, NaN where it carries none.
        Energy that may be rounding of the moments or of the basis counts as none: give ``Moments``
        or ``History``, which know the rounding unit of their Gram matrices.

    Raises
    ------
    TypeError, ValueError
        As in :func:`projection_energy`.

    See Also
    --------
    relative_energy : The shares that are divided.
    heldout_ratio : The same where the basis was not chosen.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3 and Figure 2.

    Examples
    --------
    >>> import numpy as np
    >>> float(energy_ratio(np.eye(2)[:, :1], np.diag([3.0, 1.0]), np.diag([1.0, 3.0])))
    3.0
    """
    xp, size, (new, old), gram_eps = checked_moments({"new": new, "old": old}, basis=basis)
    check_rows("basis", basis, size)
    u, n, o = widen(xp, basis, new, old)
    top, bottom = _relative(xp, u, n), _relative(xp, u, o)
    on_new, on_old = (_carries(xp, basis, u, *pair, gram_eps) for pair in ((n, new), (o, old)))
    nothing = xp.where(on_new, xp.full_like(top, float("inf")), xp.full_like(top, float("nan")))
    ratio = xp.where(on_old, safe_divide(xp, xp.where(on_new, top, 0 * top), bottom), nothing)
    return xp.astype(ratio, result_dtype(xp, basis, new, old))


def heldout_ratio(
    choose: Callable[[MomentLike, MomentLike], Array],
    first: MomentLike,
    second: MomentLike,
    old: MomentLike,
) -> HeldoutRatio:
    r"""Cross-validate the choice of a subspace over two halves of the new task.

    The subspace is chosen on one half and measured on the other, both ways, and the two results
    are averaged: :math:`\tfrac12 \sum_{a \ne b} e(U(S_a); S_b) / e(U(S_a); S_{old})`.

    Parameters
    ----------
    choose : callable
        ``choose(new, old)`` gets moments as they are given here and returns a basis (..., D, r); a
        closure over for instance :func:`isolated_subspace`.
    first, second : array of shape (..., D, D), Moments or History
        Second moments of two halves of the task, split *by images*: tokens of one image are so
        alike that a split by tokens holds nothing out.
    old : array of shape (..., D, D), Moments or History
        History.

    Returns
    -------
    HeldoutRatio
        All three of one shape.

    Raises
    ------
    TypeError, ValueError
        As in :func:`energy_ratio`, and what ``choose`` raises.

    See Also
    --------
    energy_ratio : The ratio on given moments.
    isolated_subspace : A rule to judge.

    Notes
    -----
    The energy ratio is that of LoDA, arXiv:2603.00191, Section 3.

    Examples
    --------
    A direction that only one half has is worth nothing on the other:

    >>> import numpy as np
    >>> from loda_math import isolated_subspace
    >>> old, a, b = np.diag([2.0, 1.0, 1.0]), np.diag([2.0, 2.0, 0.0]), np.diag([2.0, 0.0, 2.0])
    >>> ratio = heldout_ratio(lambda new, old: isolated_subspace(new, old, 1), a, b, old)
    >>> float(ratio.chosen), float(ratio.heldout)
    (2.0, 0.0)
    """
    halves = []
    for chosen_on, other in ((first, second), (second, first)):
        basis = choose(chosen_on, old)
        halves.append(
            (
                energy_ratio(basis, chosen_on, old),
                energy_ratio(basis, other, old),
                relative_energy(basis, other),
            )
        )
    xp = namespace(basis=basis)
    means = (0.5 * (a + b) for a, b in zip(*halves, strict=True))
    return HeldoutRatio(*xp.broadcast_arrays(*means))


def first_order_update(
    tokens: Array, down: Array, grad_output: Array, step: float
) -> FirstOrderUpdate:
    r"""Effect of one gradient step on the up-projection, to first order (Theorem 2.1).

    For :math:`Y = X (W + B A)^\top` and :math:`g = \partial L / \partial Y`, a step of size
    :math:`\eta` on B changes the output by :math:`\Delta Y = -\eta X A^\top A X^\top g` and the
    loss by :math:`\langle g, \Delta Y\rangle = -\eta \|g^\top X A^\top\|_F^2`. In size this is at
    least :math:`\eta \sigma_N(g)^2 \|X A^\top\|_F^2`, with the N-th singular value of g (zero if
    O < N), and at most
    :math:`\eta \min(\|g\|_2^2 \|X A^\top\|_F^2, \|g\|_F^2 \|X A^\top\|_2^2)`.

    Parameters
    ----------
    tokens : array, shape (..., N, D)
        Inputs X of the layer.
    down : array, shape (..., r, D)
        Down-projection A, its scale included.
    grad_output : array, shape (..., N, O)
        Gradient of the loss with respect to the output.
    step : float
        Step size η, at least 0.

    Returns
    -------
    FirstOrderUpdate
        ``output`` (..., N, O), ``loss``, ``lower`` and ``upper`` (...).

    Raises
    ------
    TypeError
        If an argument is not a real floating-point array.
    ValueError
        If shapes do not match, values are not finite, or ``step`` is negative.

    See Also
    --------
    projection_energy : The energy in the bounds.
    update_effect : The exact effect of a merge.

    Notes
    -----
    LoDA, arXiv:2603.00191, Theorem 2.1.

    Examples
    --------
    >>> import numpy as np
    >>> x, a, g = np.eye(2), np.asarray([[1.0, 0.0]]), np.ones((2, 1))
    >>> update = first_order_update(x, a, g, 0.5)
    >>> update.output[0], [float(x) for x in update[1:]]
    (array([-0.5]), [-0.5, 0.0, 1.0])
    """
    xp = namespace(tokens=tokens, down=down, grad_output=grad_output)
    check_real(xp, tokens=tokens, down=down, grad_output=grad_output)
    step = check_scalar("step", step)
    x, a, g = shapes = [tuple(m.shape) for m in (tokens, down, grad_output)]
    is_full = all(len(s) > 1 and 0 not in s[-2:] for s in shapes)
    if not is_full or x[-1] != a[-1] or x[-2] != g[-2]:
        msg = (
            f"shapes must be tokens (..., N, D), down (..., r, D) and grad_output (..., N, O), "
            f"none of them empty, got {x}, {a} and {g}"
        )
        raise ValueError(msg)
    check_values(xp, {"tokens": tokens, "down": down, "grad_output": grad_output})
    dtype = result_dtype(xp, tokens, down, grad_output)
    x, a, g = widen(xp, tokens, down, grad_output)
    z = x @ a.mT
    update = z.mT @ g
    loss = -step * xp.sum(update * update, axis=(-2, -1))
    lowest, highest = _squared_singular(xp, g)
    energy = _squared(xp, z)
    upper = xp.minimum(highest * energy, _squared(xp, g) * _squared_singular(xp, z)[1])
    scalars = xp.broadcast_arrays(loss, step * lowest * energy, step * upper)
    outputs = (-step * (z @ update), *scalars)
    return FirstOrderUpdate(*(xp.astype(part, dtype) for part in outputs))


def _checked(basis: Array, **moments: MomentLike) -> tuple[Namespace, tuple[Array, ...]]:
    xp, size, arrays, _ = checked_moments(moments, basis=basis)
    check_rows("basis", basis, size)
    return xp, arrays


def _carries(
    xp: Namespace, basis: Array, wide: Array, moment: Array, given: Array, gram_eps: Any
) -> Array:
    """Whether the energy of a basis is more than rounding of the moment and of the basis."""
    channels = xp.abs(diagonal(xp, moment))
    largest = xp.max(channels, axis=-1, keepdims=True)
    noise = channel_noise(xp, moment, largest, given, gram_eps=gram_eps)
    noise = noise + 4 * float(xp.finfo(basis.dtype).eps) ** 2 * channels
    return span_energy(xp, wide, moment) > xp.sum(noise_along(xp, noise, wide), axis=-1)


def _relative(xp: Namespace, basis: Array, moment: Array) -> Array:
    energy, whole = xp.broadcast_arrays(span_energy(xp, basis, moment), trace(xp, moment))
    return safe_divide(xp, energy, whole)


def _squared(xp: Namespace, x: Array) -> Array:
    return xp.sum(x * x, axis=(-2, -1))


def _squared_singular(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """Squares of σ_N (zero for fewer columns than rows N) and of σ_1, from the smaller Gram."""
    is_tall = x.shape[-1] < x.shape[-2]
    values = xp.linalg.eigvalsh(x.mT @ x if is_tall else x @ x.mT)
    lowest, highest = xp.min(values, axis=-1), xp.max(values, axis=-1)
    return (0 * lowest if is_tall else xp.clip(lowest, 0.0, None)), highest
