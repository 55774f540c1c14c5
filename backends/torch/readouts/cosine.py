"""Read-outs that compare features with one direction a class by their cosine."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from backends.torch.readouts._checks import check_features, check_filled, finite
from backends.torch.readouts.statistics import ClassStatistics

_EPS = 1e-6


@dataclass(frozen=True, eq=False)
class CosineReadout:
    """Cosines to one direction a class: weight (C, D), kept as given."""

    kind: str
    weight: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Cosines (N, C) in [-1, 1]."""
        check_features(features, self.weight.shape[1])
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        return cosines(features.to(dtype), self.weight.to(features.device, dtype)).clamp(-1.0, 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": self.weight}


def heads(weight: Tensor) -> CosineReadout:
    """Cosine to the concatenated head weights (C, D): the paper's own read-out.

    Examples
    --------
    >>> heads(torch.eye(2)).logits(torch.tensor([[3.0, 4.0]])).argmax().item()
    1
    """
    if weight.ndim != 2 or not len(weight):
        msg = f"Head weights have shape {tuple(weight.shape)}; give (C, D) with at least one class."
        raise ValueError(msg)
    return CosineReadout("heads", finite("head weights", weight.detach().clone()))


def nearest_mean(statistics: ClassStatistics) -> CosineReadout:
    """Cosine to the class means. Raises ValueError while no task is finished."""
    check_filled(statistics.classes)
    return CosineReadout("nearest_mean", finite("class means", statistics.mean.clone()))


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """Cosines (N, C) of features (N, D) to the rows of a weight (C, D)."""
    found: Tensor = functional.linear(
        functional.normalize(features, dim=1, eps=_EPS),
        functional.normalize(weight, dim=1, eps=_EPS),
    )
    return found
