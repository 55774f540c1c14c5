"""Loss and accuracy during an epoch, and accuracies of a class-incremental stream from counts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # reports read accuracies without torch
    from torch import Tensor

    from backends.torch.readouts import Classifier

__all__ = ["AccuracyMatrix", "Meter", "class_counts", "count_correct"]

Counts = tuple[tuple[int, ...], ...]


class Meter:
    """Loss and accuracy of an epoch, summed on the device and read only when asked for.

    Attributes
    ----------
    loss, right : Tensor or number
        Sum of the losses of the images, and number of correct predictions.
    images, predicted : int
        Number of images in the two sums.
    """

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.right: Tensor | int = 0
        self.images = 0
        self.predicted = 0

    def add(self, loss: "Tensor", images: int) -> None:
        """Add the mean loss of a mini-batch."""
        self.loss = self.loss + loss.detach() * images
        self.images += images

    def count(self, cosines: "Tensor", targets: "Tensor") -> None:
        """Count correct predictions among rows that went through the model with gradients on."""
        self.right = self.right + (cosines.detach().argmax(dim=1) == targets).sum()
        self.predicted += len(targets)

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy so far; waits for the device."""
        return {
            "loss": float(self.loss) / max(self.images, 1),
            "accuracy": float(self.right) / max(self.predicted, 1),
        }


def count_correct(
    classifiers: "Mapping[str, Classifier]",
    features: "Tensor",
    labels: "Tensor",
    classes: int,
    *,
    task_sizes: Sequence[int] | None = None,
) -> dict[str, tuple[list[int], list[int]]]:
    """Correct predictions and images per class, for each classifier.

    Parameters
    ----------
    classifiers : mapping of str to Classifier
        By name; anything with ``logits(features)``.
    features : Tensor, shape (N, D)
        Features of the images.
    labels : Tensor, shape (N,)
        Their classes, 0 ... ``classes`` - 1, on the CPU.
    classes : int
        Number of classes seen.
    task_sizes : sequence of int, optional
        Number of classes of each task. If they are given, the task of each image is known, and
        only its classes are candidates.

    Returns
    -------
    dict of str to (list of int, list of int)
        As `class_counts` gives them.
    """
    import torch

    excluded = torch.zeros(len(labels), classes, dtype=torch.bool)
    if task_sizes is not None:
        task_of = torch.repeat_interleave(torch.arange(len(task_sizes)), torch.tensor(task_sizes))
        excluded = task_of[labels][:, None] != task_of
    counts = {}
    for name, classifier in classifiers.items():
        logits = classifier.logits(features)
        chosen = logits.masked_fill(excluded.to(logits.device), -torch.inf).argmax(dim=1)
        counts[name] = class_counts(chosen.cpu(), labels, classes)
    return counts


def class_counts(
    predictions: "Tensor", labels: "Tensor", classes: int
) -> tuple[list[int], list[int]]:
    """Correct predictions and images of each class 0 ... classes - 1; counts of batches add up.

    Raises
    ------
    ValueError
        If the shapes differ or a label is outside the range.

    Examples
    --------
    >>> import torch
    >>> class_counts(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), 3)
    ([1, 1, 0], [2, 1, 0])
    """
    if predictions.shape != labels.shape or labels.ndim != 1:
        msg = (
            "predictions and labels must be two vectors of one length, got shapes "
            f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
        raise ValueError(msg)
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        low, high = int(labels.min()), int(labels.max())
        msg = f"labels must be from 0 to {classes - 1}, got {low} to {high}"
        raise ValueError(msg)
    correct = labels[predictions == labels].bincount(minlength=classes)
    return correct.tolist(), labels.bincount(minlength=classes).tolist()


@dataclass(frozen=True)
class AccuracyMatrix:
    """Accuracy a[i][j] on task j's classes after learning task i, and what follows from it.

    Lists of tasks begin with the first one, at index 0; T is the number of tasks learned so far.
    Accuracies are fractions in [0, 1]. Micro accuracies count images; macro accuracies (names in
    ``macro``) are the unweighted mean over classes. Averages over tasks are unweighted.

    Parameters
    ----------
    sizes : tuple of int
        Number of classes of each task learned so far.
    correct, total : tuple of tuple of int
        Row i holds, for every class seen by task i in label order, its right predictions and its
        images. A stream known only by task is given as tasks of one class each. A class may have
        no images, where those of an old task are no longer there: it counts in no mean, and the
        accuracy of a task without images is NaN.

    Raises
    ------
    ValueError
        For rows of the wrong length, counts out of order or a row without images.

    Examples
    --------
    >>> matrix = AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5)))
    >>> matrix.matrix
    [[0.9], [0.6, 0.8]]
    >>> round(matrix.last, 4), round(matrix.forgetting, 4), round(matrix.backward_transfer, 4)
    (0.6667, 0.3, -0.3)
    >>> AccuracyMatrix.from_dict(matrix.to_dict()) == matrix
    True
    """

    sizes: tuple[int, ...] = ()
    correct: Counts = ()
    total: Counts = ()

    def __post_init__(self) -> None:
        for name in ("correct", "total"):
            rows = tuple(tuple(int(n) for n in row) for row in getattr(self, name))
            object.__setattr__(self, name, rows)
        object.__setattr__(self, "sizes", tuple(int(n) for n in self.sizes))
        if len(self.correct) != len(self.sizes) or len(self.total) != len(self.sizes):
            msg = (
                f"correct and total must have one row for each of the {len(self.sizes)} tasks, got "
                f"{len(self.correct)} and {len(self.total)}"
            )
            raise ValueError(msg)
        seen = 0
        for task, size in enumerate(self.sizes):
            if size < 1:
                msg = f"task {task + 1} must have at least 1 class, got {size}"
                raise ValueError(msg)
            seen += size
            _check_row(task + 1, seen, self.correct[task], self.total[task])

    def extended(self, size: int, correct: Sequence[int], total: Sequence[int]) -> "AccuracyMatrix":
        """The matrix after one more task of `size` classes, with counts for every class seen."""
        return AccuracyMatrix(
            (*self.sizes, size), (*self.correct, tuple(correct)), (*self.total, tuple(total))
        )

    def updated(self, correct: Sequence[int], total: Sequence[int]) -> "AccuracyMatrix":
        """The matrix with other counts after the last task, for every class seen."""
        return AccuracyMatrix(
            self.sizes, (*self.correct[:-1], tuple(correct)), (*self.total[:-1], tuple(total))
        )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def matrix(self) -> list[list[float]]:
        """a[i][j] for j <= i, per image."""
        return self._matrix(macro=False)

    @property
    def curve(self) -> list[float]:
        """Accuracy over all classes seen, after each task, per image."""
        return [_accuracy(c, t, macro=False) for c, t in self._rows()]

    @property
    def old_curve(self) -> list[float]:
        """Accuracy over the classes of earlier tasks, after each task, per image; NaN at first."""
        counts = [
            (correct[:-size], total[:-size])
            for size, (correct, total) in zip(self.sizes, self._rows(), strict=True)
        ]
        return [_accuracy(c, t, macro=False) if t else nan for c, t in counts]

    @property
    def macro_curve(self) -> list[float]:
        """Accuracy over all classes seen, after each task, mean over classes."""
        return [_accuracy(c, t, macro=True) for c, t in self._rows()]

    @property
    def last(self) -> float:
        """Accuracy over all classes after the last task."""
        return _mean(self.curve[-1:])

    @property
    def average(self) -> float:
        """Unweighted mean over tasks i of the accuracy over all classes seen by i."""
        return _mean(self.curve)

    @property
    def forgetting(self) -> float:
        """Mean over old tasks j of max_i a[i][j] - a[T-1][j], last row included; 0 for T = 1."""
        return _mean(self.forgetting_by_task)

    @property
    def forgetting_by_task(self) -> list[float]:
        """max_i a[i][j] - a[T-1][j] of each old task j; `forgetting` is their mean."""
        return _forgetting_by_task(self.matrix)

    @property
    def backward_transfer(self) -> float:
        """Mean over old tasks j of a[T-1][j] - a[j][j]; 0 for T = 1."""
        return _backward_transfer(self.matrix)

    def summary(self) -> dict[str, Any]:
        """Every metric by name, ready for JSON, with None for NaN."""
        macro, curve = self._matrix(macro=True), self.macro_curve
        metrics = {
            "last": self.last,
            "average": self.average,
            "forgetting": self.forgetting,
            "backward_transfer": self.backward_transfer,
            "macro_last": _mean(curve[-1:]),
            "macro_average": _mean(curve),
            "macro_forgetting": _mean(_forgetting_by_task(macro)),
            "macro_backward_transfer": _backward_transfer(macro),
            "curve": self.curve,
            "matrix": self.matrix,
        }
        return {name: _for_json(value) for name, value in metrics.items()}

    def to_dict(self) -> dict[str, Any]:
        """The counts as lists, ready for JSON; `from_dict` reads them back."""
        return {
            "sizes": list(self.sizes),
            "correct": [list(row) for row in self.correct],
            "total": [list(row) for row in self.total],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "AccuracyMatrix":
        """The matrix that `to_dict` wrote. Raises KeyError when a part is missing."""
        return cls(record["sizes"], record["correct"], record["total"])

    def _rows(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        return zip(self.correct, self.total, strict=True)

    def _matrix(self, *, macro: bool) -> list[list[float]]:
        ends = [sum(self.sizes[: j + 1]) for j in range(len(self))]
        spans = [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]
        return [
            [_accuracy(correct[s], total[s], macro=macro) for s in spans[: i + 1]]
            for i, (correct, total) in enumerate(self._rows())
        ]


def _check_row(task: int, seen: int, correct: Sequence[int], total: Sequence[int]) -> None:
    """Refuse impossible counts after a task, counted from 1."""
    if len(correct) != seen or len(total) != seen:
        msg = (
            f"the rows of task {task} must have an entry for each of the {seen} classes seen, got "
            f"{len(correct)} and {len(total)}"
        )
        raise ValueError(msg)
    if not any(total):
        msg = f"there is no image to be evaluated on after task {task}"
        raise ValueError(msg)
    for label, (right, count) in enumerate(zip(correct, total, strict=True)):
        if count < 0 or not 0 <= right <= count:
            msg = (
                f"the right predictions of class {label} after task {task} must be from 0 to "
                f"{count}, got {right}"
            )
            raise ValueError(msg)


def _accuracy(correct: Sequence[int], total: Sequence[int], *, macro: bool) -> float:
    if macro:
        return _mean([c / t if t else nan for c, t in zip(correct, total, strict=True)])
    return sum(correct) / sum(total) if sum(total) else nan


def _mean(values: Sequence[float]) -> float:
    """The mean of what is not NaN, 0 of nothing, and NaN of nothing else."""
    numbers = [value for value in values if not isnan(value)]
    return sum(numbers) / len(numbers) if numbers else (nan if values else 0.0)


def _for_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_for_json(item) for item in value]
    return None if isnan(value) else value


def _forgetting_by_task(a: list[list[float]]) -> list[float]:
    best = [max((row[j] for row in a[j:] if not isnan(row[j])), default=nan) for j in range(len(a))]
    return [best[j] - a[-1][j] for j in range(len(a) - 1)]


def _backward_transfer(a: list[list[float]]) -> float:
    return _mean([a[-1][j] - a[j][j] for j in range(len(a) - 1)])
