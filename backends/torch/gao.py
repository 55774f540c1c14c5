"""The gradient-aligned step, for any model, loss and optimiser (LoDA, Section 3.3)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from backends.torch.distributed import Reduce
from loda_math import class_split, lookahead

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


def gradient_aligned_step(
    loss: RowsLoss,
    labels: Tensor,
    optimizer: Optimizer,
    perturbed: Sequence[Tensor],
    *,
    radius: float,
    permutation: Tensor,
    backward: Callable[[Tensor], None] | None = None,
    skip_nonfinite: bool = False,
    reduce: Reduce | None = None,
) -> AlignedStep:
    r"""Two optimiser steps on two class-disjoint halves, each at parameters moved for the other.

    For (source, target) = (half 1, half 2) and then (half 2, half 1): with ĝ the gradient of the
    loss on the source over the perturbed tensors, move them to
    :math:`\tilde\theta = \theta - \rho\, \hat g / \|\hat g\|` (each tensor normalised by itself),
    step with the gradient on the target while :math:`\tilde\theta` is in place, then undo the
    shift. To first order a step raises the inner product of the two gradients where they
    agree. Tensors of the optimiser that are not perturbed (a classifier head) take part in the
    step only.

    Parameters
    ----------
    loss : callable
        ``loss(rows)``: mean loss over those rows of the mini-batch, a scalar tensor. ``rows`` is
        an int64 tensor on the device of ``labels``.
    labels : Tensor, shape (N,)
        Classes of the mini-batch; keep them on the CPU to save a synchronisation.
    optimizer : Optimizer
        Steps twice (once if the mini-batch has a single class).
    perturbed : sequence of Tensor
        The tensors θ that are moved: the LoRA tensors that are trained.
    radius : float
        Length of the shift, ρ·u, at least 0.
    permutation : Tensor, shape (k,)
        The classes present, in random order; the first ``max(1, k // 2)`` form half 1.
    backward : callable, optional
        Replaces ``Tensor.backward``; ``accelerator.backward``, for example.
    skip_nonfinite : bool, default False
        Check each gradient (one read of the device a step) and take no step with one that is not
        finite, the gradient of the shift included; the parameters are then put back bit for bit.
    reduce : callable, optional
        Sums tensors over the processes that share the mini-batch
        (:func:`sum_over_processes`). Every process then passes the labels of the whole
        mini-batch and the same permutation and radius, and ``loss(rows)`` is its part of the
        mean: the sum over those of the rows that it holds, divided by ``len(rows)``. If it
        holds none, the loss must still be a zero that depends on a trained tensor.

    Returns
    -------
    AlignedStep

    Raises
    ------
    ValueError
        If the radius is negative or not finite, nothing is perturbed, or the permutation does not
        hold every class of the mini-batch once.

    Notes
    -----
    Weight decay sees :math:`\tilde\theta`, as in the published code. If ``loss`` or the optimiser
    raises, the parameters are put back bit for bit before the error is raised further.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    >>> step = gradient_aligned_step(
    ...     lambda rows: ((x[rows] @ w - 1) ** 2).mean(), y, torch.optim.SGD([w], lr=0.1), [w],
    ...     radius=0.1, permutation=torch.tensor([1, 0]))
    >>> step.steps, w.detach()
    (2, tensor([0.2000, 0.2000]))
    """
    perturbed = list(perturbed)
    if not perturbed:
        msg = "nothing to perturb: pass the LoRA tensors that are trained"
        raise ValueError(msg)
    if not math.isfinite(radius) or radius < 0:
        msg = f"radius must be finite and at least 0, got {radius}"
        raise ValueError(msg)
    halves = [mask.nonzero().flatten() for mask in class_split(labels, permutation)]
    if min(half.numel() for half in halves) == 0:
        # One class: there is no other half whose gradient could be aligned with.
        return plain_step(
            loss,
            labels,
            optimizer,
            backward=backward,
            skip_nonfinite=skip_nonfinite,
            reduce=reduce,
        )
    losses, steps = [], 0
    for source, target in (halves, halves[::-1]):
        # Not by backward(): the gradients that the optimiser sees must come only from the target.
        source_gradients = torch.autograd.grad(loss(source), perturbed, allow_unused=True)
        before = [p.detach().clone() for p in perturbed]
        pairs = zip(before, source_gradients, strict=True)
        gradients = [torch.zeros_like(p) if g is None else g for p, g in pairs]
        if reduce is not None:
            # Autograd may hand out views, which cannot be written to.
            gradients = [g.clone(memory_format=torch.contiguous_format) for g in gradients]
            reduce(gradients)
        moved = lookahead(before, gradients, radius)
        stepped = False
        try:
            _copy(perturbed, moved)
            value, stepped = _step_on_rows(
                loss, target, optimizer, backward, skip_nonfinite, reduce, moved
            )
        finally:
            # Bit for bit: adding the shift back would change about a tenth of the floats.
            if not stepped:
                _copy(perturbed, before)
        if stepped:
            with torch.no_grad():
                for tensor, start, end in zip(perturbed, before, moved, strict=True):
                    tensor.add_(start - end)
        # The halves may differ in size; both losses are means over their own rows.
        losses.append(value * (target.numel() / labels.shape[0]))
        steps += int(stepped)
    return AlignedStep(losses[0] + losses[1], steps)


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
    value, stepped = _step_on_rows(loss, rows, optimizer, backward, skip_nonfinite, reduce)
    return AlignedStep(value, int(stepped))


def draw_permutation(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The classes of a mini-batch in random order, on the CPU.

    Parameters
    ----------
    labels : Tensor, shape (N,)
        Classes of the mini-batch.
    generator : torch.Generator, optional
        A CPU generator; the global one by default.

    Returns
    -------
    Tensor, shape (k,)

    Examples
    --------
    >>> import torch
    >>> sorted(draw_permutation(torch.tensor([4, 4, 2])).tolist())
    [2, 4]
    """
    # On the CPU, so that a seed gives the same numbers for labels on any device.
    classes: Tensor = labels.cpu().unique()  # type: ignore[no-untyped-call]
    return classes[torch.randperm(classes.numel(), generator=generator)]


def _step_on_rows(
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
        # In one message, so that every process skips the same steps and logs the same loss.
        reduce([*_all_gradients(optimizer), value])
    if skip_nonfinite and not _gradients_finite(optimizer, moved):
        optimizer.zero_grad(set_to_none=True)
        return value, False
    optimizer.step()
    return value, True


def _all_gradients(optimizer: Optimizer) -> list[Tensor]:
    """Gradients of all trained tensors; zeros where this process has no row for them."""
    gradients = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
    return gradients


def _gradients_finite(optimizer: Optimizer, moved: Sequence[Tensor]) -> bool:
    """Whether gradients, and tensors moved along a gradient, are finite: one read for all."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
    flags = [g.isfinite().all() for g in (*gradients, *moved) if g is not None]
    return not flags or bool(torch.stack(flags).all())


@torch.no_grad()
def _copy(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
