"""Made-up features of three tasks, and the statistics of their classes."""

import torch
from torch import Tensor

from backends.torch.readouts import ClassStatistics, Readout

SIZES = (2, 3, 1)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_up(images: int = 40, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Elongated classes on a common offset: nearest mean fails where a linear rule need not."""
    g = seeded(seed)
    shapes = torch.Generator().manual_seed(99)
    classes = sum(SIZES)
    stretch = torch.randn(dim, dim, generator=shapes) * torch.logspace(0, -1.5, dim)
    means = 0.8 * torch.randn(classes, dim, generator=shapes) @ stretch + 2.0
    y = torch.arange(classes).repeat(images)
    return means[y] + torch.randn(len(y), dim, generator=g) @ stretch, y


def by_task(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, int]]:
    ends = [sum(SIZES[: k + 1]) for k in range(len(SIZES))]
    parts = []
    for end, size in zip(ends, SIZES, strict=True):
        mask = (y >= end - size) & (y < end)
        parts.append((x[mask], y[mask], size))
    return parts


def gathered(x: Tensor, y: Tensor, dtype: torch.dtype = torch.float32) -> ClassStatistics:
    statistics = ClassStatistics(dtype=dtype)
    for features, labels, size in by_task(x, y):
        statistics.add_task(features, labels, size)
    return statistics


def accuracy(readout: Readout, x: Tensor, y: Tensor) -> float:
    return (readout.logits(x).argmax(1) == y).float().mean().item()
