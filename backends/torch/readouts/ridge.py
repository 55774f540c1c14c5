"""Ridge regression on random ReLU features: its sums over tasks, its solve, its classifier."""

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backends.torch.readouts.checks import check_features
from backends.torch.readouts.statistics import TaskStatistics

RIDGE_STRENGTHS = tuple(10.0**k for k in range(-8, 9))
_ROWS = 2048  # images projected at a time


class RidgeStatistics(TaskStatistics):
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
        Number M of random features, as `Ridge` has it.
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

    def __init__(self, dim: int, *, features: int, seed: int = 0) -> None:
        if dim < 1 or features < 1:
            msg = f"dim and features must be at least 1, got {dim} and {features}"
            raise ValueError(msg)
        super().__init__(dim)
        generator = torch.Generator().manual_seed(seed)
        self.projection = torch.randn(dim, features, generator=generator)
        self.gram = torch.zeros(features, features, dtype=torch.float64)
        self.cross = torch.zeros(features, 0, dtype=torch.float64)
        self.strength = 1.0
        self._open: list[tuple[Tensor, Tensor]] = []

    def gather(self, features: Tensor, labels: Tensor) -> None:
        """Hold a batch until its task is complete."""
        self._open.append((features, labels))

    def finish(self, first: int, end: int) -> None:
        """Choose the strength on the last fifth of the task, then add all of it to the sums."""
        features = torch.cat([x for x, _ in self._open])
        local = torch.cat([y for _, y in self._open]) - first
        device = features.device
        self.projection = self.projection.to(device)
        # Old tasks cannot be held out: only their sums are there.
        last = _last_fifth(local)
        gram, cross = self._sums(features[~last], local[~last], end - first)
        if bool(last.any()):
            self.strength = self._choose(gram, cross, features[last], local[last])
            more = self._sums(features[last], local[last], end - first)
            gram, cross = gram + more[0], cross + more[1]
        self.gram = self.gram.to(device) + gram
        self.cross = torch.cat([self.cross.to(device), cross], dim=1)
        self._open = []

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add new images of finished classes to the sums; the strength stays as it was chosen."""
        device = features.device
        self.projection = self.projection.to(device)
        gram, cross = self._sums(features, labels, self.classes)
        self.gram, self.cross = self.gram.to(device) + gram, self.cross.to(device) + cross

    def tensors(self) -> dict[str, Tensor]:
        """The projection, the sums and the strength."""
        return {
            "projection": self.projection,
            "gram": self.gram,
            "cross": self.cross,
            "strength": torch.tensor(self.strength, dtype=torch.float64),
        }

    def load(self, tensors: Mapping[str, Tensor], classes: int) -> None:
        """Load `tensors` of a number of classes."""
        projection, gram, cross = tensors["projection"], tensors["gram"], tensors["cross"]
        d, m = self.projection.shape
        expected = (d, m), (m, m), (m, classes)
        if (shapes := tuple(tuple(x.shape) for x in (projection, gram, cross))) != expected:
            msg = f"projection, gram and cross must have shapes {expected}, got {shapes}"
            raise ValueError(msg)
        self.projection, self.gram, self.cross = projection, gram, cross
        self.strength = float(tensors["strength"])
        self._open = []

    def _sums(self, features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
        m, device = self.gram.shape[0], features.device
        gram = torch.zeros(m, m, dtype=torch.float64, device=device)
        cross = torch.zeros(m, classes, dtype=torch.float64, device=device)
        for h, y in self._chunks(features, labels):
            gram += h.mT @ h
            cross += h.mT @ functional.one_hot(y, classes).double()
        return (gram + gram.mT) / 2, cross  # exactly symmetric, however the product rounds

    def _choose(self, gram: Tensor, cross: Tensor, features: Tensor, labels: Tensor) -> float:
        # Up to the least one that counts, all are one and the same; each costs a factorisation.
        least = bisect_right(RIDGE_STRENGTHS, float(_least_ridge(gram)))
        strengths = RIDGE_STRENGTHS[max(least - 1, 0) :]
        # Side by side: one product with the features serves all of them.
        weights = torch.cat([solve_ridge(gram, cross, s) for s in strengths], dim=1)
        error = torch.zeros(len(strengths), dtype=torch.float64, device=gram.device)
        for h, y in self._chunks(features, labels):
            wrong = (h @ weights).reshape(len(h), len(strengths), -1)
            wrong = wrong - functional.one_hot(y, cross.shape[1]).double()[:, None]
            error += wrong.square().sum((0, 2))
        return strengths[int(error.argmin())]

    def _chunks(self, features: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for first in range(0, len(features), _ROWS):
            rows = slice(first, first + _ROWS)
            yield random_features(features[rows], self.projection).double(), labels[rows]


@dataclass(frozen=True, eq=False)
class RidgeClassifier:
    """Linear scores of random ReLU features: projection (D, M), weight (M, C)."""

    projection: Tensor
    weight: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Scores (N, C), close to 1 for the right class and 0 for the others."""
        check_features(features, self.projection.shape[0])
        h = random_features(features, self.projection.to(features.device))
        dtype = torch.promote_types(h.dtype, self.weight.dtype)
        return h.to(dtype) @ self.weight.to(features.device, dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The projection and the weight."""
        return {"projection": self.projection, "weight": self.weight}


def random_features(features: Tensor, projection: Tensor) -> Tensor:
    """relu(x P) of features (N, D) and a projection (D, M), in float32 or better."""
    dtype = torch.promote_types(features.dtype, projection.dtype)
    return torch.relu(features.to(dtype) @ projection.to(dtype))


def solve_ridge(gram: Tensor, cross: Tensor, strength: float) -> Tensor:
    """W of (G + s·I) W = Q by Cholesky, in the arrays' own type.

    s is never below 4·M·eps·tr G: smaller strengths are lost in the rounding of G, and with the
    floor the factorisation exists however singular G is.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(_least_ridge(gram).clamp(min=strength))
    return torch.cholesky_solve(cross, torch.linalg.cholesky(shifted))


def _least_ridge(gram: Tensor) -> Tensor:
    rounding = torch.finfo(gram.dtype)
    return 4 * len(gram) * rounding.eps * gram.diagonal().sum() + rounding.tiny


def _last_fifth(labels: Tensor) -> Tensor:
    """Mask of the last fifth of each class, at least one image where a class has two."""
    last = torch.zeros(len(labels), dtype=torch.bool, device=labels.device)
    for label in sorted(set(labels.tolist())):
        rows = (labels == label).nonzero().flatten()
        start = len(rows) - max(len(rows) // 5, int(len(rows) > 1))
        last[rows[start:]] = True
    return last
