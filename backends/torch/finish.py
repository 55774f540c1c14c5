"""The end of a task: recalibrate, merge, and add it to the history; or leave it as it was."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from backends.torch.merging import MergePlan, plan_merge, remember
from backends.torch.record import TaskRecord
from backends.torch.session import OpenTask


def finish(
    task: OpenTask, history: Mapping[str, Tensor], tasks: int, batches: Iterable[Any]
) -> tuple[TaskRecord, dict[str, Tensor]]:
    """Merge the branches of an open task; whatever goes wrong, the weights are as before.

    Parameters
    ----------
    task : OpenTask
        Not closed here.
    history : mapping of str to Tensor, shape (D, D)
        Before the task.
    tasks : int
        Tasks in it.
    batches : iterable
        The task's training inputs, walked up to twice.

    Returns
    -------
    record : TaskRecord
    history : dict of str to Tensor, shape (D, D)
        With the task.

    Raises
    ------
    ValueError, FloatingPointError
        If there is no batch, or moments or merged weights are not finite.
    """
    settings, first = task.settings, tasks == 0
    passes = settings.passes()
    needs_trained = settings.form(first) is not None or "trained" in passes
    if needs_trained and "merged" in passes and isinstance(batches, Iterator):
        msg = (
            f"end_task walks the batches twice, but a {type(batches).__name__} is used up "
            f"after one pass; pass a DataLoader or a list (the task stays open)"
        )
        raise ValueError(msg)
    trained = task.collect(batches) if needs_trained else {}
    plan = MergePlan()
    if not first:
        plan = plan_merge(settings, task.layers, trained or task.new, history, tasks)
    try:
        task.merge(plan.coefficients)
        merged = task.collect(batches) if "merged" in passes else {}
        record = TaskRecord.of(
            task.layers,
            task.new,
            trained,
            merged,
            plan.coefficients,
            task.heldout,
            plan.effects,
        )
        return record, remember(settings, history, {"trained": trained, "merged": merged})
    except BaseException:
        task.unmerge()
        raise
