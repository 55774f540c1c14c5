"""Mean and covariance of each class's features, gathered task by task."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import copy
from typing import ClassVar

import torch
from torch import Tensor

from backends.torch.readouts.checks import check_names

# Of the map that old classes follow, relative to the mean square of a direction. The strongest is
# first: it is taken where all explain the drift equally well.
_RIDGES = tuple(10 ** (k / 2) for k in range(4, -5, -1))


class TaskStatistics(ABC):
    """Statistics of features that are gathered task by task.

    What was gathered of a finished class stays; `update` adds new images of it. Classes are
    numbered in the order of the stream, so a task's labels continue those of the tasks before. A
    subclass defines what is done with a batch (`gather`) and with a complete task (`finish`), and
    which `tensors` it holds; the sizes of the tasks are saved with them.

    Attributes
    ----------
    task_sizes : tuple of int
        Classes of each finished task.
    width : int or None
        Width D of the features, once it is known.
    compensates : bool
        Whether a task needs the features of its images from before it, too: see `begin`.
    """

    compensates: ClassVar[bool] = False

    def __init__(self, width: int | None = None) -> None:
        self.task_sizes: tuple[int, ...] = ()
        self.width = width
        self._labels: set[int] = set()  # of the open task

    @property
    def classes(self) -> int:
        """Number of classes of the finished tasks."""
        return sum(self.task_sizes)

    @abstractmethod
    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Add a checked batch (N, D) of the open task; labels (N,) on the features' device."""

    @abstractmethod
    def finish(self, first: int, end: int) -> None:
        """Complete the open task, all of whose classes, from first to end - 1, were gathered."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the finished tasks, under names that do not change."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], classes: int) -> None:
        """Load `tensors` of a number of classes; ValueError if their shapes do not fit.

        A subclass that knows the width of the features from them sets `width`.
        """

    def begin(self, features: Tensor) -> None:  # noqa: B027 - not every subclass needs it
        """Take features (N, D) of the images of a task, from before it; ignored by default."""

    def add(self, features: Tensor, labels: Tensor) -> None:  # noqa: ARG002
        """Add checked features (N, D) of finished classes; a subclass says how, if it can."""
        msg = f"{type(self).__name__} cannot take new images of classes that are finished"
        raise ValueError(msg)

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add new images of finished classes, between two tasks.

        Parameters
        ----------
        features : Tensor, shape (N, D)
        labels : Tensor, shape (N,)
            Integers below `classes`.

        Raises
        ------
        ValueError
            For wrong shapes, features that are not finite, labels of classes that are not finished,
            within a task, or if these statistics cannot be updated.
        """
        present = self._checked(features, labels)
        if self._labels:
            msg = "a task is being collected; call end_task before the classes are updated"
            raise ValueError(msg)
        if max(present, default=-1) >= self.classes or min(present, default=0) < 0:
            msg = (
                f"labels of an update must be from 0 to {self.classes - 1}, got "
                f"{min(present)} to {max(present)}; collect the images of new classes"
            )
            raise ValueError(msg)
        if present:
            self.add(features.detach(), labels.to(features.device, torch.int64))

    def collect(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of the open task.

        Parameters
        ----------
        features : Tensor, shape (N, D)
        labels : Tensor, shape (N,)
            Integers from `classes` on.

        Raises
        ------
        ValueError
            For wrong shapes, features that are not finite, or labels of finished tasks.
        """
        present = self._new(features, labels)
        self.width = features.shape[1]
        self._labels |= present
        self.gather(features.detach(), labels.to(features.device, torch.int64))

    def _new(self, features: Tensor, labels: Tensor) -> set[int]:
        """The labels that occur in a batch of the open task, after a check of all of it."""
        present = self._checked(features, labels)
        if min(present, default=self.classes) < self.classes:
            msg = (
                f"labels of the open task must be at least {self.classes}, got {min(present)}; "
                "new images of finished classes are added by update"
            )
            raise ValueError(msg)
        return present

    def _checked(self, features: Tensor, labels: Tensor) -> set[int]:
        """The labels that occur in a batch, after a check of its shapes and values."""
        floating = features.is_floating_point()
        if features.ndim != 2 or labels.shape != features.shape[:1] or not floating:
            msg = (
                f"features must be floating (N, D) with labels (N,), got {features.dtype} of shape "
                f"{tuple(features.shape)} and labels of shape {tuple(labels.shape)}"
            )
            raise ValueError(msg)
        if labels.is_floating_point() or labels.dtype == torch.bool:
            msg = f"labels must be integers, got {labels.dtype}"
            raise ValueError(msg)
        if self.width not in (None, features.shape[1]):
            msg = f"features must be {self.width} wide, got {features.shape[1]}"
            raise ValueError(msg)
        if not bool(features.isfinite().all()):
            bad = int((~features.isfinite().all(1)).sum())
            msg = (
                f"features must be finite, got NaN or infinity in {bad} of {len(features)} rows; "
                "check the model and the images"
            )
            raise ValueError(msg)
        return set(labels.tolist())

    def end_task(self, classes: int | None = None) -> None:
        """Finish the open task.

        Parameters
        ----------
        classes : int, optional
            Number of its classes; by default up to the highest label.

        Raises
        ------
        ValueError
            If a class of the task has no features or a label lies beyond its classes.
        """
        first, end = self._range(self._labels, classes)
        self.finish(first, end)
        self.task_sizes = (*self.task_sizes, end - first)
        self._labels = set()

    def _range(self, labels: set[int], classes: int | None) -> tuple[int, int]:
        """The first class of a task with these labels, and the one after its last."""
        first = self.classes
        end = max(labels, default=first - 1) + 1 if classes is None else first + classes
        if end <= first:
            msg = "a task must have at least one class, got none; collect features before end_task"
            raise ValueError(msg)
        missing = sorted(set(range(first, end)) - labels)
        if missing:
            msg = f"every class of the task must have features, got none of the classes {missing}"
            raise ValueError(msg)
        beyond = sorted(label for label in labels if label >= end)
        if beyond:
            msg = f"labels of the task must be from {first} to {end - 1}, got {beyond}"
            raise ValueError(msg)
        return first, end

    def add_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """`check_task`, then `collect` one batch and `end_task`."""
        self.check_task(features, labels, classes)
        self.collect(features, labels)
        self.end_task(classes)

    def check_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """Raise the ValueError of `add_task`, if it would, before anything is taken in."""
        self._range(self._labels | self._new(features, labels), classes)

    def require_classes(self) -> None:
        """Raise ValueError while no task is finished."""
        if not self.classes:
            msg = "the statistics hold no class yet; collect a task and call end_task first"
            raise ValueError(msg)

    def state_dict(self) -> dict[str, Tensor]:
        """`tensors` and the sizes of the tasks, ready for safetensors; ValueError within a task."""
        if self._labels:
            msg = "a task is being collected; call end_task before the state is taken"
            raise ValueError(msg)
        return {**self.tensors(), "task_sizes": torch.tensor(self.task_sizes, dtype=torch.int64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` gave; ValueError if names or shapes do not fit.

        Nothing has been taken over then.
        """
        check_names(state, {*self.tensors(), "task_sizes"}, type(self).__name__)
        sizes = tuple(int(n) for n in state["task_sizes"])
        loaded = copy(self)
        loaded.load(state, sum(sizes))
        if self.width not in (None, loaded.width):
            msg = f"the state must be of features {self.width} wide, got {loaded.width}"
            raise ValueError(msg)
        loaded.task_sizes, loaded._labels = sizes, set()
        vars(self).update(vars(loaded))


class ClassStatistics(TaskStatistics):
    """Count, mean and covariance of the features of each class.

    Sums run in float64 on the features' device, merged batch by batch in the form of Chan,
    Golub and LeVeque (1983), which has no cancellation. The covariance is the unbiased one
    (division by n - 1); a class of one image gets zero. Classifier alignment adds its ridge when
    it samples; stored here is the plain estimate.

    Parameters
    ----------
    dtype : torch.dtype
        float32 (default) or float64: the type in which finished classes are stored.

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
            msg = f"dtype must be torch.float32 or torch.float64, got {dtype}"
            raise ValueError(msg)
        super().__init__()
        self.dtype = dtype
        self.count = torch.zeros(0, dtype=torch.int64)
        self.mean = torch.zeros(0, 0, dtype=dtype)
        self.covariance = torch.zeros(0, 0, 0, dtype=dtype)
        # Of the open task: class -> (images, mean, scatter), in float64.
        self._open: dict[int, tuple[int, Tensor, Tensor]] = {}

    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Merge the moments of each class of a batch into those of the open task."""
        for label in sorted(set(labels.tolist())):
            part = _part(features[labels == label])
            self._open[label] = _merge(self._open[label], part) if label in self._open else part

    def finish(self, first: int, end: int) -> None:
        """Append the classes of the open task to the finished ones."""
        parts = [self._open[label] for label in range(first, end)]
        # Finished classes follow the features, should the model have moved since the last task.
        device = parts[0][1].device
        count = torch.tensor([n for n, _, _ in parts], device=device)
        mean = torch.stack([m for _, m, _ in parts]).to(self.dtype)
        covariance = torch.stack([s / max(n - 1, 1) for n, _, s in parts]).to(self.dtype)
        # Before the first task the width is not known, so there is nothing to append to.
        if first:
            count = torch.cat([self.count.to(device), count])
            mean = torch.cat([self.mean.to(device), mean])
            covariance = torch.cat([self.covariance.to(device), covariance])
        self.count, self.mean, self.covariance = count, mean, covariance
        self._open = {}

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Merge new images into the counts, means and covariances of their classes."""
        device = features.device
        count, mean, covariance = (
            x.to(device, copy=True) for x in (self.count, self.mean, self.covariance)
        )
        for label in sorted(set(labels.tolist())):
            n = int(count[label])
            scatter = covariance[label].double() * max(n - 1, 1)
            before = n, mean[label].double(), scatter
            n, centre, scatter = _merge(before, _part(features[labels == label]))
            count[label], mean[label] = n, centre.to(self.dtype)
            covariance[label] = (scatter / max(n - 1, 1)).to(self.dtype)
        self.count, self.mean, self.covariance = count, mean, covariance

    def tensors(self) -> dict[str, Tensor]:
        """Counts, means and covariances."""
        return {"count": self.count, "mean": self.mean, "covariance": self.covariance}

    def load(self, tensors: Mapping[str, Tensor], classes: int) -> None:
        """Load `tensors` of a number of classes."""
        count, mean, covariance = tensors["count"], tensors["mean"], tensors["covariance"]
        expected = (classes, *mean.shape[1:], *mean.shape[1:])
        if len(count) != classes or len(mean) != classes or covariance.shape != expected:
            msg = (
                f"counts, means and covariances must be of {classes} classes, got shapes "
                f"{tuple(count.shape)}, {tuple(mean.shape)} and {tuple(covariance.shape)}"
            )
            raise ValueError(msg)
        self.dtype = mean.dtype
        self.count, self.mean, self.covariance = count, mean, covariance
        self._open = {}
        self.width = mean.shape[1] if len(mean) else self.width


class CompensatedStatistics(ClassStatistics):
    """Class statistics that follow the features where a later task moves them.

    When a task ends, the images of old classes are gone, and their statistics are those of another
    network. But the network has seen the images of the new task before and after it. With their
    features B and A, each (N, D), centred on their means b and a, an affine map is fitted by ridge
    regression towards the identity,

        M = I + (BᵀB + τ I)⁻¹ Bᵀ(A - B),

    and old classes are moved by it: μ becomes a + (μ - b) M, and Σ becomes Mᵀ Σ M. Of nine ridges τ
    from 0.01 to 100 times tr(BᵀB) / D, the one is taken under which the drift is most likely, for
    normal M - I and noise of any size (the evidence, MacKay 1992): that with the least

        (N - 1) log(‖A - BM‖² + τ ‖M - I‖²) + log det(I + BᵀB / τ).

    It is weak where there are many more images than features, and strong where noise would be
    fitted. Cross-validation would ask how well new images of the same classes are followed, but old
    classes lie elsewhere: with fewer images than features many maps fit all new images, and
    disagree on the old classes. A task that leaves the features as they are changes nothing, bit
    for bit. Estimating the drift on new images is the idea of semantic drift compensation
    (arXiv:2004.00440); arXiv:2407.08536 learns a linear map for it. The paper of LoDA has no such
    step.

    Examples
    --------
    >>> statistics = CompensatedStatistics()
    >>> old = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    >>> statistics.add_task(old, torch.tensor([0, 0]))
    >>> before = torch.tensor([[0.0, 5.0], [1.0, 7.0], [2.0, 5.0]])
    >>> statistics.begin(before)
    >>> statistics.add_task(before + torch.tensor([10.0, 0.0]), torch.tensor([1, 1, 1]))
    >>> statistics.mean[0].tolist()  # moved as the images of the new task were
    [12.0, 0.0]
    """

    compensates = True

    def __init__(self, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dtype=dtype)
        self._before = torch.zeros(0, 0, dtype=dtype)  # features of the open task, before it
        self._after: list[Tensor] = []

    def begin(self, features: Tensor) -> None:
        """Take features (N, D) of the images of a task, from before anything of it is trained.

        Their order is that in which `collect` gets the features after it.

        Raises
        ------
        ValueError
            As `collect` does.
        """
        self._checked(features, torch.zeros(len(features), dtype=torch.int64))
        self._before = features.detach()

    def check_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """Raise the ValueError of `add_task`, if it would, before anything is taken in."""
        super().check_task(features, labels, classes)
        if self.classes:
            self._require_same(sum(len(x) for x in self._after) + len(features), features.shape[1])

    def _require_same(self, *after: int) -> None:
        """Raise ValueError unless as many features are there from before the task as after it."""
        if tuple(self._before.shape) != after:
            msg = (
                f"the features before the task must be of the same images as those after it, got "
                f"shapes {tuple(self._before.shape)} and {after}; give them to begin_task before "
                f"anything of the task is trained"
            )
            raise ValueError(msg)

    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Merge a batch into the moments of its classes, and hold it until its task is complete."""
        self._after.append(features)
        super().gather(features, labels)

    def finish(self, first: int, end: int) -> None:
        """Move the statistics of old classes, then append the new ones."""
        before, after = self._before, torch.cat(self._after)
        if first:
            self._require_same(*after.shape)
            self._follow(before.to(after.device).double(), after.double())
        super().finish(first, end)
        self._before, self._after = after.new_zeros(0, 0), []

    def _follow(self, before: Tensor, after: Tensor) -> None:
        if torch.equal(before, after):
            return
        centre, place = before.mean(0), after.mean(0)
        move = _ridge_map(before - centre, after - place)
        mean = self.mean.to(move.device).double()
        self.mean = (place + (mean - centre) @ move).to(self.dtype)
        # One class at a time: in float64 all of them may be large.
        self.covariance = torch.stack(
            [
                (move.mT @ own.to(move.device).double() @ move).to(self.dtype)
                for own in self.covariance
            ]
        )

    def tensors(self) -> dict[str, Tensor]:
        """Counts, means and covariances, and the features from before the open task."""
        return {**super().tensors(), "before": self._before}

    def load(self, tensors: Mapping[str, Tensor], classes: int) -> None:
        """Load `tensors` of a number of classes."""
        super().load(tensors, classes)
        self._before, self._after = tensors["before"], []


def _ridge_map(before: Tensor, after: Tensor) -> Tensor:
    """The map M of `CompensatedStatistics` from centred features (N, D) to others."""
    change = after - before
    squares, basis = torch.linalg.eigh(before.mT @ before)
    squares = squares.clamp(min=0)
    along = basis.mT @ (before.mT @ change)  # BᵀY in the eigenvectors of BᵀB
    move = torch.eye(len(squares), dtype=before.dtype, device=before.device)
    unit = squares.mean()
    if not unit > 0:  # all features are equal, and only the shift is known
        return move
    power, whole = along.square().sum(1), change.square().sum()
    scores = []
    for ridge in _RIDGES:
        damped = squares + ridge * unit
        left = (whole - (power / damped).sum()).clamp(min=0)
        freedom = torch.log1p(squares / (ridge * unit)).sum()
        scores.append((len(before) - 1) * left.log() + freedom)
    best = _RIDGES[int(torch.stack(scores).argmin())] * unit
    followed: Tensor = move + basis @ (along / (squares + best)[:, None])
    return followed


def _part(features: Tensor) -> tuple[int, Tensor, Tensor]:
    """Number, mean and scatter of the features (N, D) of a class, in float64."""
    rows = features.double()
    mean = rows.mean(0)
    # Centred before it is squared: sums of squares less squares of sums would cancel.
    centred = rows - mean
    return len(rows), mean, centred.mT @ centred


def _merge(
    a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]
) -> tuple[int, Tensor, Tensor]:
    n = a[0] + b[0]
    shift = b[1] - a[1]
    scatter = a[2] + b[2] + torch.outer(shift, shift) * (a[0] * b[0] / n)
    return n, a[1] + shift * (b[0] / n), scatter
