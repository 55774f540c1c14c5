"""Weighted histories: what many tasks leave behind, in one matrix that stays in range."""

from typing import Any, NamedTuple

from loda_math._arrays import Array, namespace, python_number, widen
from loda_math._validation import (
    check_real,
    check_scalar,
    check_share,
    check_square,
    check_values,
)


class History(NamedTuple):
    r"""Weighted sum of the mean moments of past tasks, :math:`S_{old} = \sum_t w_t S_t`.

    Attributes
    ----------
    total : array, shape (..., D, D)
        :math:`\sum_t w_t S_t`, in the widest real dtype of the library. What the solvers take as
        ``old`` when the size of the history is to count.
    weight : float
        :math:`\sum_t w_t`; divides the total to a mean.
    squares : float
        :math:`\sum_t w_t^2`, for the number of tasks that are effectively remembered.

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

    @property
    def mean(self) -> Array:
        """Weighted mean of the moments, shape (..., D, D), whatever the number of tasks."""
        # Nothing of positive weight leaves a total of zero: any divisor but zero will do.
        return self.total / (self.weight + (self.weight == 0))

    @property
    def effective_tasks(self) -> Any:
        r"""Equally weighted tasks with the same spread of weights, :math:`(\sum w)^2/\sum w^2`."""
        return self.weight**2 / (self.squares + (self.squares == 0))


def remember(
    history: History | None, moment: Array, /, *, weight: float = 1.0, decay: float = 1.0
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
    moment : array, shape (..., D, D)
        Mean second moment of the task.
    weight : float, default 1
        w, at least 0: the number of classes of the task, say, or 1.
    decay : float, default 1
        β in [0, 1]; ``0.5 ** (1 / h)`` halves the weight of a task after h further tasks.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        If the moment is not a real floating-point array, or the history no ``History``.
    ValueError
        If shapes differ, values are not finite or not symmetric, the weight is negative, or the
        decay is no share.

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
    weight, decay = check_scalar("weight", weight), check_share("decay", decay)
    arrays = {"moment": moment} if history is None else {"moment": moment, "total": history.total}
    xp = namespace(**arrays)
    check_real(xp, **arrays)
    check_square(**arrays)
    check_values(xp, symmetric={"moment": moment})
    (task,) = widen(xp, moment)
    if history is None:
        return History(weight * task, python_number(weight), weight * weight)
    (total,) = widen(xp, history.total)
    return History(
        decay * total + weight * task,
        decay * history.weight + weight,
        decay * decay * history.squares + weight * weight,
    )
