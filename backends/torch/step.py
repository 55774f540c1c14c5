"""An optimiser step on rows of a mini-batch: alone, or as one half of a gradient-aligned one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from backends.torch.processes import Reduce

RowsLoss = Callable[[Tensor], Tensor]
"""Mean loss over the rows of the mini-batch whose indices it is given."""


class AlignedStep(NamedTuple):
    """What a gradient-aligned step did.

    Attributes
    ----------
    loss : Tensor, 0-d
        Mean loss over the rows, at the parameters where gradients for the optimiser were taken;
        detached, on the device.
    steps : int
        Optimiser steps taken: 2, or 1 for a mini-batch of one class, fewer if gradients that were
        not finite were skipped.
    """

    loss: Tensor
    steps: int


def plain_step(
    loss: RowsLoss,
    labels: Tensor,
    optimizer: Optimizer,
    *,
    backward: Callable[[Tensor], None] | None = None,
    skip_nonfinite: bool = False,
    reduce: Reduce | None = None,
) -> AlignedStep:
    """One ordinary optimiser step on the whole mini-batch, with the same interface.

    Parameters
    ----------
    loss, labels, optimizer, backward, skip_nonfinite, reduce
        As in :func:`gradient_aligned_step`.

    Returns
    -------
    AlignedStep
    """
    rows = torch.arange(labels.shape[0], device=labels.device)
    value, stepped = step_on_rows(loss, rows, optimizer, backward, skip_nonfinite, reduce)
    return AlignedStep(value, int(stepped))


def step_on_rows(
    loss: RowsLoss,
    rows: Tensor,
    optimizer: Optimizer,
    backward: Callable[[Tensor], None] | None,
    skip_nonfinite: bool,
    reduce: Reduce | None,
    moved: Sequence[Tensor] = (),
) -> tuple[Tensor, bool]:
    """The loss on some rows of the mini-batch, and whether a step was taken with its gradients.

    ``moved`` are tensors that were moved along a gradient before; they must be finite too.
    """
    optimizer.zero_grad(set_to_none=True)
    value = loss(rows)
    if backward is None:
        value.backward()  # type: ignore[no-untyped-call]
    else:
        backward(value)
    value = value.detach()
    if reduce is not None:
        value = value.clone()
        reduce([*_all_gradients(optimizer), value])
    if skip_nonfinite and not _gradients_finite(optimizer, moved):
        optimizer.zero_grad(set_to_none=True)
        return value, False
    optimizer.step()
    return value, True


def _all_gradients(optimizer: Optimizer) -> list[Tensor]:
    """Gradients of all trained tensors; zero where this process has nothing to say."""
    found = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                found.append(parameter.grad)
    return found


def _gradients_finite(optimizer: Optimizer, moved: Sequence[Tensor]) -> bool:
    """Whether gradients, and tensors moved along a gradient, are finite: one read for all."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flags = [g.isfinite().all() for g in (*gradients, *moved) if g is not None]
    return not flags or bool(torch.stack(flags).all())
