"""Gradient-aligned optimisation (GAO): class split, look-ahead and agreement of gradients.

Nothing here draws random numbers: permutations and radii are arguments. Apart from the labels in
:func:`class_split` no value is read, so the functions may run inside a training step.
"""

from collections.abc import Sequence
from functools import reduce
from typing import Any

from loda_math._arrays import (
    Array,
    Namespace,
    at_least_single,
    is_concrete,
    namespace,
    safe_divide,
    total_inner,
)
from loda_math._validation import check_dense, check_real, check_scalar


def class_split(labels: Array, permutation: Array) -> tuple[Array, Array]:
    """Two halves of a mini-batch with disjoint classes.

    Parameters
    ----------
    labels : integer array, shape (N,)
        Class of each image.
    permutation : integer array, shape (k,)
        The class labels present, in random order. The first ``max(1, k // 2)`` of them form the
        first half. Labels that do not occur are allowed, and make a half smaller or empty.

    Returns
    -------
    first, second : boolean array, shape (N,)
        Disjoint masks that cover the mini-batch. With one class the second is empty.

    Raises
    ------
    TypeError
        If labels or permutation are not integers.
    ValueError
        If shapes are wrong, a label repeats in the permutation, or a label of the mini-batch is
        not in it.

    See Also
    --------
    lookahead : What the halves are for.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.3.

    Examples
    --------
    >>> import numpy as np
    >>> first, second = class_split(np.asarray([5, 3, 5, 9]), np.asarray([5, 9, 3]))
    >>> first, second
    (array([ True, False,  True, False]), array([False,  True, False,  True]))
    """
    xp = namespace(labels=labels, permutation=permutation)
    check_dense(labels=labels, permutation=permutation)
    for name, x in (("labels", labels), ("permutation", permutation)):
        if not xp.isdtype(x.dtype, "integral"):
            msg = f"{name} must be integers, got dtype {x.dtype}"
            raise TypeError(msg)
        if x.ndim != 1:
            msg = f"{name} must have one axis, got shape {tuple(x.shape)}"
            raise ValueError(msg)
    classes = int(permutation.shape[0])
    if classes == 0:
        msg = "permutation is empty; it must hold the class labels present, in random order"
        raise ValueError(msg)
    member = labels[:, None] == permutation[None, :]
    if is_concrete(labels, permutation):
        _check_permutation(xp, member, permutation)
    cut = max(1, classes // 2)
    return xp.any(member[:, :cut], axis=1), xp.any(member[:, cut:], axis=1)


def lookahead(params: Sequence[Array], grads: Sequence[Array], radius: Any) -> list[Array]:
    r"""Parameters moved along descent by a fixed length each.

    :math:`\tilde\theta_k = \theta_k - \rho\, \hat g_k / \|\hat g_k\|`, every tensor normalised by
    itself. A tensor with zero gradient stays where it is.

    Parameters
    ----------
    params, grads : sequence of arrays
        As many gradients as parameters, of the same shapes.
    radius : float or 0-d array
        ρ·u, at least 0. An array is not read.

    Returns
    -------
    list of arrays
        Shapes and dtypes of ``params``. Gradients that are not finite give parameters that are
        not finite.

    Raises
    ------
    TypeError
        If a tensor is not real floating point.
    ValueError
        If the lists do not match or the radius is negative.

    See Also
    --------
    undo_lookahead : Take the shift off after the step.
    class_split : The halves that the gradients come from.
    verify.verify_perturbation : Check a shift that came from elsewhere.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.3. The shift is along descent: the opposite sign to
    sharpness-aware minimisation.

    Examples
    --------
    >>> import numpy as np
    >>> lookahead([np.asarray([1.0, 1.0])], [np.asarray([3.0, 4.0])], 0.5)
    [array([0.7, 0.6])]
    """
    radius = check_scalar("radius", radius)
    xp = _check_lists(params=params, grads=grads)
    moved = []
    for p, g in zip(params, grads, strict=True):
        (direction,) = _unit_peak(xp, [g])
        length = xp.sqrt(xp.sum(direction * direction))
        shift = radius * safe_divide(xp, direction, length)
        moved.append(xp.astype(at_least_single(xp, p) - shift, p.dtype))
    return moved


def undo_lookahead(
    params: Sequence[Array], before: Sequence[Array], moved: Sequence[Array]
) -> list[Array]:
    r"""Parameters with the shift of a look-ahead taken off, after the step taken there.

    :math:`\theta \leftarrow \tilde\theta' + (\theta - \tilde\theta)`: the optimiser steps from
    :math:`\tilde\theta` to :math:`\tilde\theta'`, and what it did is kept. Where no step was taken,
    go on from ``before`` instead: adding the shift back changes about a tenth of the floats.

    Parameters
    ----------
    params : sequence of arrays
        :math:`\tilde\theta'`, as the optimiser left them.
    before, moved : sequence of arrays
        :math:`\theta`, and :math:`\tilde\theta` as :func:`lookahead` gave it; the same shapes.

    Returns
    -------
    list of arrays
        Shapes and dtypes of ``params``.

    Raises
    ------
    TypeError
        If a tensor is not real floating point.
    ValueError
        If the lists do not match.

    See Also
    --------
    lookahead : The shift.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3.3. Weight decay has seen the shifted parameters, as in the
    published code.

    Examples
    --------
    >>> import numpy as np
    >>> theta = [np.asarray([1.0, 1.0])]
    >>> moved = lookahead(theta, [np.asarray([3.0, 4.0])], 0.5)
    >>> stepped = [moved[0] - 0.25]
    >>> undo_lookahead(stepped, theta, moved)
    [array([0.75, 0.75])]
    """
    xp = _check_lists(params=params, before=before, moved=moved)
    restored = []
    for p, start, end in zip(params, before, moved, strict=True):
        shift = at_least_single(xp, start) - at_least_single(xp, end)
        restored.append(xp.astype(at_least_single(xp, p) + shift, p.dtype))
    return restored


def gradient_alignment(a: Sequence[Array], b: Sequence[Array], /) -> Array:
    r"""Cosine agreement of two gradients, :math:`\langle a, b\rangle / (\|a\| \|b\|)`.

    Parameters
    ----------
    a, b : sequence of arrays
        Two gradients, each a list of tensors of the same shapes; the inner product runs over all.

    Returns
    -------
    0-d array
        Between -1 and 1; 0 if either gradient is zero.

    Raises
    ------
    TypeError, ValueError
        If the lists do not match or are not real floating point.

    See Also
    --------
    project_conflict : Remove what disagrees.

    Examples
    --------
    >>> import numpy as np
    >>> float(gradient_alignment([np.asarray([1.0]), np.asarray([0.0])], [np.ones(1), np.ones(1)]))
    0.7071067811865475
    """
    xp = _check_lists(a=a, b=b)
    a, b = _unit_peak(xp, a), _unit_peak(xp, b)
    lengths = xp.sqrt(total_inner(xp, a, a)) * xp.sqrt(total_inner(xp, b, b))
    return xp.clip(safe_divide(xp, total_inner(xp, a, b), lengths), -1.0, 1.0)


def project_conflict(a: Sequence[Array], b: Sequence[Array], /) -> list[Array]:
    r"""Gradient a without its component against b.

    :math:`a - \min(0, \langle a, b\rangle) / \|b\|^2 \cdot b`, with the inner product over the
    whole list. Where the two agree, a is returned as it is.

    Parameters
    ----------
    a, b : sequence of arrays
        Two gradients, each a list of tensors of the same shapes.

    Returns
    -------
    list of arrays
        Shapes and dtypes of ``a``.

    Raises
    ------
    TypeError, ValueError
        If the lists do not match or are not real floating point.

    See Also
    --------
    gradient_alignment : How far two gradients agree.

    Examples
    --------
    >>> import numpy as np
    >>> project_conflict([np.asarray([1.0, -1.0])], [np.asarray([0.0, 2.0])])
    [array([1., 0.])]
    """
    xp = _check_lists(a=a, b=b)
    scaled = _unit_peak(xp, b)
    overlap = total_inner(xp, a, scaled)
    overlap = xp.minimum(overlap, xp.zeros_like(overlap))
    weight = safe_divide(xp, overlap, total_inner(xp, scaled, scaled))
    return [
        xp.astype(at_least_single(xp, x) - weight * y, x.dtype)
        for x, y in zip(a, scaled, strict=True)
    ]


def _check_lists(**lists: Sequence[Array]) -> Namespace:
    for name, group in lists.items():
        if not isinstance(group, (list, tuple)):
            msg = f"{name} must be a list or tuple of arrays, got {type(group).__name__}"
            raise TypeError(msg)
    named = {f"{name}[{i}]": x for name, group in lists.items() for i, x in enumerate(group)}
    names = " and ".join(lists)
    if not named:
        msg = f"{names} must hold at least one tensor"
        raise ValueError(msg)
    xp = namespace(**named)
    check_real(xp, **named)
    shapes = [[tuple(x.shape) for x in group] for group in lists.values()]
    if any(others != shapes[0] for others in shapes):
        msg = f"{names} must hold tensors of the same shapes, got {shapes}"
        raise ValueError(msg)
    return xp


def _check_permutation(xp: Namespace, member: Array, permutation: Array) -> None:
    repeats = xp.sum(xp.astype(permutation[:, None] == permutation[None, :], xp.int32))
    missing = xp.sum(xp.astype(~xp.any(member, axis=1), xp.int32))
    if int(repeats) != permutation.shape[0] or int(missing) != 0:
        msg = (
            "permutation must hold every class label of the mini-batch exactly once; "
            f"got {permutation} with {int(missing)} labels missing from it"
        )
        raise ValueError(msg)


def _peak(xp: Namespace, group: Sequence[Array]) -> Array:
    """Largest magnitude in a list of arrays."""
    filled = [at_least_single(xp, x) for x in group if 0 not in x.shape]
    if not filled:
        return xp.sum(at_least_single(xp, group[0]))  # nothing to look at: zero
    return reduce(xp.maximum, [xp.max(xp.abs(x)) for x in filled])


def _unit_peak(xp: Namespace, group: Sequence[Array]) -> list[Array]:
    """The list scaled to largest magnitude one, so that squares neither under- nor overflow."""
    peak = _peak(xp, group)
    return [safe_divide(xp, at_least_single(xp, x), peak) for x in group]
