"""Mean and covariance of each class's features, filled task by task and never refreshed.

Classes are numbered in the order of the stream, so a task's labels follow those of the tasks
before.
"""

import torch
from torch import Tensor

from backends.torch.readouts._checks import check_batch, check_closed, check_keys, task_end
from backends.torch.readouts.tasks import TaskStatistics


class ClassStatistics(TaskStatistics):
    """Count, mean and covariance of the features of each class.

    Sums run in float64 on the features' device, merged batch by batch in the form of Chan,
    Golub and LeVeque (1983), which has no cancellation. The covariance is the unbiased one
    (division by n - 1); a class of one image gets zero. Classifier alignment adds its ridge when
    it samples, so what is kept here is the plain estimate.

    Parameters
    ----------
    dtype : torch.dtype
        float32 (default) or float64: the type in which finished classes are kept.

    Attributes
    ----------
    count : (C,) int64
    mean : (C, D)
    covariance : (C, D, D)
    task_sizes : tuple of int
        Classes of each finished task.

    Examples
    --------
    >>> statistics = ClassStatistics()
    >>> features = torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]])
    >>> statistics.collect(features, torch.tensor([0, 0, 1]))
    >>> statistics.end_task(2)
    >>> statistics.mean.tolist(), statistics.covariance[0].tolist()
    ([[2.0, 0.0], [0.0, 5.0]], [[2.0, 0.0], [0.0, 0.0]])
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in (torch.float32, torch.float64):
            msg = f"Class statistics are kept in float32 or float64, not {dtype}."
            raise ValueError(msg)
        super().__init__()
        self.dtype = dtype
        self.count = torch.zeros(0, dtype=torch.int64)
        self.mean = torch.zeros(0, 0, dtype=dtype)
        self.covariance = torch.zeros(0, 0, 0, dtype=dtype)
        # Of the open task: class -> (images, mean, scatter), in float64.
        self._open: dict[int, tuple[int, Tensor, Tensor]] = {}

    def collect(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features (N, D) with labels (N,) of the open task.

        Raises
        ------
        ValueError
            For wrong shapes, non-finite features, or labels of finished tasks.
        """
        width = _open_width(self._open, self.mean)
        check_batch(features, labels, first=self.classes, width=width)
        labels = labels.to(features.device)
        for label in sorted(set(labels.tolist())):
            rows = features[labels == label].double()
            mean = rows.mean(0)
            centred = rows - mean
            part = (len(rows), mean, centred.mT @ centred)
            self._open[label] = _merge(self._open[label], part) if label in self._open else part

    def end_task(self, classes: int | None = None) -> None:
        """Finish the open task of `classes` classes (default: up to the highest label seen).

        Raises
        ------
        ValueError
            If a class of the task has no features or a label lies beyond its classes.
        """
        first = self.classes
        end = task_end(self._open, first, classes)
        parts = [self._open[label] for label in range(first, end)]
        device = parts[0][1].device
        count = torch.tensor([n for n, _, _ in parts], device=device)
        mean = torch.stack([m for _, m, _ in parts]).to(self.dtype)
        covariance = torch.stack([s / max(n - 1, 1) for n, _, s in parts]).to(self.dtype)
        if first:
            count = torch.cat([self.count.to(device), count])
            mean = torch.cat([self.mean.to(device), mean])
            covariance = torch.cat([self.covariance.to(device), covariance])
        self.count, self.mean, self.covariance = count, mean, covariance
        self.task_sizes = (*self.task_sizes, end - first)
        self._open = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors of the finished tasks, ready for safetensors."""
        check_closed(open_task=bool(self._open))
        return {
            "count": self.count,
            "mean": self.mean,
            "covariance": self.covariance,
            "task_sizes": torch.tensor(self.task_sizes, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when keys or shapes do not fit."""
        check_keys(state, {"count", "mean", "covariance", "task_sizes"})
        sizes = tuple(int(n) for n in state["task_sizes"])
        count, mean, covariance = state["count"], state["mean"], state["covariance"]
        expected = (sum(sizes), *mean.shape[1:], *mean.shape[1:])
        if len(count) != sum(sizes) or len(mean) != sum(sizes) or covariance.shape != expected:
            msg = (
                f"Task sizes {sizes} do not fit {len(count)} counts, means {tuple(mean.shape)} "
                f"and covariances {tuple(covariance.shape)}."
            )
            raise ValueError(msg)
        self.dtype = mean.dtype
        self.count, self.mean, self.covariance = count, mean, covariance
        self.task_sizes, self._open = sizes, {}


def _merge(
    a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]
) -> tuple[int, Tensor, Tensor]:
    n = a[0] + b[0]
    shift = b[1] - a[1]
    scatter = a[2] + b[2] + torch.outer(shift, shift) * (a[0] * b[0] / n)
    return n, a[1] + shift * (b[0] / n), scatter


def _open_width(parts: dict[int, tuple[int, Tensor, Tensor]], mean: Tensor) -> int | None:
    for _, m, _ in parts.values():
        return len(m)
    return mean.shape[1] if len(mean) else None
