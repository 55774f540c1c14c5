"""What read-outs keep of the data: class statistics and ridge accumulators.

Both are filled task by task: `collect` batches of the task's features, then `end_task`. Classes
are numbered in the order of the stream, so a task's labels follow those of the tasks before.
What a finished task left behind is never refreshed.
"""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "RIDGE_STRENGTHS",
    "ClassStatistics",
    "RidgeStatistics",
    "random_features",
    "solve_ridge",
]

RIDGE_STRENGTHS = tuple(10.0**k for k in range(-8, 9))
_ROWS = 2048  # images projected at a time


class ClassStatistics:
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
        self.dtype = dtype
        self.count = torch.zeros(0, dtype=torch.int64)
        self.mean = torch.zeros(0, 0, dtype=dtype)
        self.covariance = torch.zeros(0, 0, 0, dtype=dtype)
        self.task_sizes: tuple[int, ...] = ()
        # Of the open task: class -> (images, mean, scatter), in float64.
        self._open: dict[int, tuple[int, Tensor, Tensor]] = {}

    @property
    def classes(self) -> int:
        """Number of classes of the finished tasks."""
        return sum(self.task_sizes)

    def collect(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features (N, D) with labels (N,) of the open task.

        Raises
        ------
        ValueError
            For wrong shapes, non-finite features, or labels of finished tasks.
        """
        width = _open_width(self._open, self.mean)
        _check_batch(features, labels, first=self.classes, width=width)
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
        end = _task_end(self._open, first, classes)
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

    def add_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """`collect` one batch and `end_task`."""
        self.collect(features, labels)
        self.end_task(classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors of the finished tasks, ready for safetensors."""
        _check_closed(open_task=bool(self._open))
        return {
            "count": self.count,
            "mean": self.mean,
            "covariance": self.covariance,
            "task_sizes": torch.tensor(self.task_sizes, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when keys or shapes do not fit."""
        _check_keys(state, {"count", "mean", "covariance", "task_sizes"})
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


class RidgeStatistics:
    """Accumulators of ridge regression on random ReLU features h = relu(x P).

    Kept are the Gram matrix Σ h hᵀ (M, M) and Σ h yᵀ (M, C), y one-hot, in float64: sums, so
    task by task equals all at once. The ridge strength is chosen among 1e-8 ... 1e8 by the mean
    squared error on the last fifth of the current task (RanPAC, McDonnell et al.,
    arXiv:2307.02251). The fifth is taken within each class, in the order given, so that features
    in order of class serve as well as shuffled ones.

    Parameters
    ----------
    dim : int
        Width D of the features.
    features : int
        Number M of random features (RanPAC: 10 000).
    seed : int
        The projection P (D, M) is drawn from N(0, 1) with this seed, on the CPU.

    Examples
    --------
    >>> statistics = RidgeStatistics(2, features=16)
    >>> x = torch.eye(2).repeat(10, 1)
    >>> statistics.add_task(x, x.argmax(1))
    >>> statistics.gram.shape, statistics.cross.shape
    (torch.Size([16, 16]), torch.Size([16, 2]))
    """

    def __init__(self, dim: int, *, features: int = 1000, seed: int = 0) -> None:
        if dim < 1 or features < 1:
            msg = f"Ridge needs at least 1 input and 1 random feature; given {dim} and {features}."
            raise ValueError(msg)
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(dim, features, generator=generator)
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.cross = torch.zeros(features, 0, dtype=torch.float64)
        self.strength = 1.0
        self.task_sizes: tuple[int, ...] = ()
        self._open: list[tuple[Tensor, Tensor]] = []

    @property
    def classes(self) -> int:
        """Number of classes of the finished tasks."""
        return sum(self.task_sizes)

    def collect(self, features: Tensor, labels: Tensor) -> None:
        """Add a batch of features (N, D) of the open task; they are held until `end_task`.

        Raises
        ------
        ValueError
            For wrong shapes, non-finite features, or labels of finished tasks.
        """
        _check_batch(features, labels, first=self.classes, width=len(self.projection))
        self._open.append((features.detach(), labels.to(features.device)))

    def end_task(self, classes: int | None = None) -> None:
        """Finish the open task: choose the strength, then add the task to the sums.

        Raises
        ------
        ValueError
            If a class of the task has no features or a label lies beyond its classes.
        """
        labels = torch.cat([y for _, y in self._open]) if self._open else torch.zeros(0)
        first = self.classes
        end = _task_end(sorted(set(labels.tolist())), first, classes)
        features = torch.cat([x for x, _ in self._open])
        device = features.device
        self.projection = self.projection.to(device)
        local = labels - first
        held = _last_fifth(local)
        gram, cross = self._sums(features[~held], local[~held], end - first)
        if bool(held.any()):
            self.strength = self._choose(gram, cross, features[held], local[held])
            more = self._sums(features[held], local[held], end - first)
            gram, cross = gram + more[0], cross + more[1]
        self.gram = self.gram.to(device) + gram
        self.cross = torch.cat([self.cross.to(device), cross], dim=1)
        self.task_sizes = (*self.task_sizes, end - first)
        self._open = []

    def add_task(self, features: Tensor, labels: Tensor, classes: int | None = None) -> None:
        """`collect` one batch and `end_task`."""
        self.collect(features, labels)
        self.end_task(classes)

    def state_dict(self) -> dict[str, Tensor]:
        """Flat tensors of the finished tasks, ready for safetensors."""
        _check_closed(open_task=bool(self._open))
        return {
            "projection": self.projection,
            "gram": self.gram,
            "cross": self.cross,
            "strength": torch.tensor(self.strength, dtype=torch.float64),
            "task_sizes": torch.tensor(self.task_sizes, dtype=torch.int64),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave. Raises ValueError when keys or shapes do not fit."""
        _check_keys(state, {"projection", "gram", "cross", "strength", "task_sizes"})
        sizes = tuple(int(n) for n in state["task_sizes"])
        m = state["projection"].shape[-1]
        if state["gram"].shape != (m, m) or state["cross"].shape != (m, sum(sizes)):
            msg = (
                f"{m} random features and {sum(sizes)} classes do not fit sums of shapes "
                f"{tuple(state['gram'].shape)} and {tuple(state['cross'].shape)}."
            )
            raise ValueError(msg)
        self.projection, self.gram, self.cross = state["projection"], state["gram"], state["cross"]
        self.strength = float(state["strength"])
        self.task_sizes, self._open = sizes, []

    def _sums(self, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        m, device = self.gram.shape[0], features.device
        gram = torch.zeros(m, m, dtype=torch.float64, device=device)
        cross = torch.zeros(m, classes, dtype=torch.float64, device=device)
        for h, y in self._chunks(features, labels):
            gram += h.mT @ h
            cross += h.mT @ functional.one_hot(y, classes).double()
        return (gram + gram.mT) / 2, cross

    def _choose(self, gram: Tensor, cross: Tensor, features: Tensor, labels: Tensor) -> float:
        weights = torch.cat([solve_ridge(gram, cross, s) for s in RIDGE_STRENGTHS], dim=1)
        error = torch.zeros(len(RIDGE_STRENGTHS), dtype=torch.float64, device=gram.device)
        for h, y in self._chunks(features, labels):
            wrong = (h @ weights).reshape(len(h), len(RIDGE_STRENGTHS), -1)
            wrong = wrong - functional.one_hot(y, cross.shape[1]).double()[:, None]
            error += wrong.square().sum((0, 2))
        return RIDGE_STRENGTHS[int(error.argmin())]

    def _chunks(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(features), _ROWS):
            rows = slice(first, first + _ROWS)
            yield random_features(features[rows], self.projection).double(), labels[rows]


def random_features(features: Tensor, projection: Tensor) -> Tensor:
    """relu(x P) of features (N, D) and a projection (D, M), in float32 or better."""
    dtype = torch.promote_types(features.dtype, projection.dtype)
    return torch.relu(features.to(dtype) @ projection.to(dtype))


def solve_ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """W of (G + s·I) W = Q by Cholesky, in the arrays' own type.

    s is never below 4·M·eps·tr G: smaller strengths are lost in the rounding of G, and with the
    floor the factorisation exists however singular G is.
    """
    eps = torch.finfo(gram.dtype).eps
    floor = 4 * len(gram) * eps * gram.diagonal().sum() + torch.finfo(gram.dtype).tiny
    shift = floor.clamp(min=strength)
    factor = torch.linalg.cholesky(gram + shift * torch.eye(len(gram)).to(gram))
    return torch.cholesky_solve(cross, factor)


def _merge(
    a: tuple[int, Tensor, Tensor], b: tuple[int, Tensor, Tensor]
) -> tuple[int, Tensor, Tensor]:
    n = a[0] + b[0]
    shift = b[1] - a[1]
    scatter = a[2] + b[2] + torch.outer(shift, shift) * (a[0] * b[0] / n)
    return n, a[1] + shift * (b[0] / n), scatter


def _last_fifth(labels: Tensor) -> Tensor:
    """Mask of the last fifth of each class, at least one image where a class has two."""
    held = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().flatten()
        keep = len(rows) - max(len(rows) // 5, int(len(rows) > 1))
        held[rows[keep:]] = True
    return held


def _open_width(parts: dict[int, tuple[int, Tensor, Tensor]], mean: Tensor) -> int | None:
    for _, m, _ in parts.values():
        return len(m)
    return mean.shape[1] if len(mean) else None


def _check_batch(features: Tensor, labels: Tensor, *, first: int, width: int | None) -> None:
    if features.ndim != 2 or labels.shape != features.shape[:1] or not features.is_floating_point():
        msg = (
            f"Features have shape {tuple(features.shape)} and type {features.dtype}, labels shape "
            f"{tuple(labels.shape)}; give floating (N, D) and (N,)."
        )
        raise ValueError(msg)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        msg = f"Labels are {labels.dtype}; give integers."
        raise ValueError(msg)
    if width is not None and features.shape[1] != width:
        msg = f"Features are {features.shape[1]} wide; those before were {width} wide."
        raise ValueError(msg)
    if not bool(features.isfinite().all()):
        bad = int((~features.isfinite().all(1)).sum())
        msg = (
            f"{bad} of {len(features)} feature rows hold NaN or infinity; "
            "check the model and the images."
        )
        raise ValueError(msg)
    if len(labels) and int(labels.min()) < first:
        msg = (
            f"Label {int(labels.min())} is not of the open task, whose labels begin at {first}; "
            "classes of finished tasks are never refreshed."
        )
        raise ValueError(msg)


def _task_end(
    present: Collection[int],
    first: int,
    classes: int | None,
) -> int:
    if classes is None:
        classes = max(present, default=first - 1) + 1 - first
    if classes < 1:
        msg = "The task has no classes; collect features of at least one class before end_task."
        raise ValueError(msg)
    end = first + classes
    missing = sorted(set(range(first, end)) - set(present))
    if missing:
        msg = f"Classes {missing} have no features; collect some of every class of the task."
        raise ValueError(msg)
    beyond = sorted(label for label in present if label >= end)
    if beyond:
        msg = f"Labels {beyond} lie beyond the task, whose labels are {first} to {end - 1}."
        raise ValueError(msg)
    return end


def _check_closed(*, open_task: bool) -> None:
    if open_task:
        msg = "A task is being collected; call end_task before the state is taken."
        raise ValueError(msg)


def _check_keys(state: dict[str, Tensor], expected: set[str]) -> None:
    if state.keys() != expected:
        msg = f"The state holds {sorted(state)}; it must hold {sorted(expected)}."
        raise ValueError(msg)
