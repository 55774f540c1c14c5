"""One mini-batch of training, plain or gradient-aligned, for every method alike."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import (
    AlignedStep,
    Reduce,
    RowsLoss,
    draw_permutation,
    gradient_aligned_step,
    plain_step,
)
from training.config import MethodConfig


def look_ahead(config: MethodConfig, *, default: bool) -> float | None:
    """Largest radius of the gradient-aligned steps of a run; None where steps are plain.

    Parameters
    ----------
    config : MethodConfig
        ``gao`` decides; where it is not set, ``default`` does.
    default : bool
        Whether the method is one that takes gradient-aligned steps of itself.
    """
    wanted = default if config.gao is None else config.gao
    return config.radius if wanted else None


def take_step(
    radius: float | None,
    perturbed: Sequence[Tensor],
    loss: RowsLoss,
    labels: Tensor,
    optimizer: Optimizer,
    *,
    generator: torch.Generator,
    backward: Callable[[Tensor], None],
    reduce: Reduce | None = None,
) -> AlignedStep:
    """A gradient-aligned step with a random share of the radius, or a plain one without radius."""
    if radius is None or not perturbed:
        return plain_step(loss, labels, optimizer, backward=backward, reduce=reduce)
    permutation = draw_permutation(labels, generator).to(labels.device)
    draw = float(torch.rand((), generator=generator))
    return gradient_aligned_step(
        loss,
        labels,
        optimizer,
        perturbed,
        radius=radius * draw,
        permutation=permutation,
        backward=backward,
        reduce=reduce,
    )


class Stepper:
    """What methods without a rule of their own for a mini-batch do with it.

    Attributes
    ----------
    radius : float or None
        As :func:`look_ahead` gives it.
    reduce : callable or None
        As the context gives it.
    """

    radius: float | None
    reduce: Reduce | None = None

    def parameters(self) -> list[nn.Parameter]:
        """Tensors that are trained, and moved by the look-ahead; none, unless a method has some."""
        return []

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """A gradient-aligned step or a plain one, as ``method.gao`` says."""
        return take_step(
            self.radius,
            self.parameters(),
            loss,
            labels,
            optimizer,
            generator=generator,
            backward=backward,
            reduce=self.reduce,
        )
