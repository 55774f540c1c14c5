"""What statistics that are gathered task by task have in common."""

from abc import ABC, abstractmethod

from torch import Tensor


class TaskStatistics(ABC):
    """Batches of features are collected; the end of their task closes its classes for good.

    Attributes
    ----------
    task_sizes : tuple of int
        Classes of each finished task; those of the open one are numbered from their sum on.
    """

    def __init__(self) -> None:
        self.task_sizes: tuple[int, ...] = ()

    @property
    def classes(self) -> int:
        """Number of classes of the finished tasks."""
        return sum(self.task_sizes)

    @abstractmethod
    def collect(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features (N, D) with labels (N,) of the open task."""

    @abstractmethod
    def end_task(self, classes: int | None = None) -> None:
        """Finish the open task of `classes` classes (default: up to the highest label seen)."""

    def add_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """`collect` one batch and `end_task`."""
        self.collect(features, labels)
        self.end_task(classes)
