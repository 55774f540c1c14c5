"""What a subspace keeps on data that it was not chosen on."""

from collections.abc import Callable
from typing import NamedTuple

from loda_math._arrays import Array
from loda_math.energy import energy_ratio, relative_energy


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


def heldout_ratio(
    choose: Callable[[Array, Array], Array], first: Array, second: Array, old: Array, /
) -> HeldoutRatio:
    r"""Cross-validate the choice of a subspace over two halves of the new task.

    The subspace is chosen on one half and measured on the other, both ways, and the two results
    are averaged: :math:`\tfrac12 \sum_{a \ne b} e(U(S_a); S_b) / e(U(S_a); S_{old})`.

    Parameters
    ----------
    choose : callable
        ``choose(new, old)`` returns a basis (..., D, r); a closure over
        :func:`isolated_subspace`, say.
    first, second : array, shape (..., D, D)
        Second moments of two halves of the task, split *by images*: tokens of one image are so
        alike that a split by tokens holds nothing out.
    old : array, shape (..., D, D)
        History.

    Returns
    -------
    HeldoutRatio

    Raises
    ------
    TypeError, ValueError
        As in :func:`energy_ratio`, and what ``choose`` raises.

    Notes
    -----
    The energy ratio is that of LoDA, arXiv:2603.00191, Section 3.

    Examples
    --------
    A direction that only one half has is worth nothing on the other:

    >>> import numpy as np
    >>> from loda_math import isolated_subspace
    >>> old, a, b = np.diag([2.0, 1.0, 1.0]), np.diag([2.0, 2.0, 0.0]), np.diag([2.0, 0.0, 2.0])
    >>> found = heldout_ratio(lambda new, old: isolated_subspace(new, old, 1), a, b, old)
    >>> float(found.chosen), float(found.heldout)
    (2.0, 0.0)
    """
    sides = []
    for here, there in ((first, second), (second, first)):
        basis = choose(here, old)
        sides.append(
            (
                energy_ratio(basis, here, old),
                energy_ratio(basis, there, old),
                relative_energy(basis, there),
            )
        )
    return HeldoutRatio(*(0.5 * (a + b) for a, b in zip(*sides, strict=True)))
