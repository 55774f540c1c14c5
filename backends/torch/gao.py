"""The gradient-aligned step, whole or in phases, for any model, loss and optimiser.

LoDA, Section 3.3.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from backends.torch.distributed import (
    Reduce,
    gather,
    several_processes,
    synchronisation_paused,
    unshared,
)
from loda_math import class_split

RowsLoss = Callable[[Tensor], Tensor]
"""Mean loss over the rows of the mini-batch whose indices it is given."""

Groups = Tensor | int
"""The group of every row of a mini-batch, or the number of rows if each is its own group."""


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
    source_loss : Tensor, 0-d, or None
        Mean loss over the rows before the look-ahead, at the parameters where its direction was
        taken; ``None`` for a plain step.
    alignment : Tensor, 0-d, or None
        Cosine between the gradient on the source and that on the target after the look-ahead, over
        all moved tensors; the mean of both halves. ``None`` for a plain step.
    """

    loss: Tensor
    steps: int
    source_loss: Tensor | None = None
    alignment: Tensor | None = None


class Part(NamedTuple):
    """The rows of one mini-batch that belong to a half.

    Attributes
    ----------
    batch : int
        Number of the mini-batch within the window, from 0.
    rows : Tensor, shape (n,)
        Indices of its rows, int64, on the device of its groups; at least one.
    weight : float
        Their share of all rows of the half, over the window and all processes. The mean losses
        over the parts, times their weights, add up to the mean loss over the half.
    """

    batch: int
    rows: Tensor
    weight: float


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
    others: Mapping[str, Tensor] | None = None,
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
        Classes of the mini-batch, or any other integers that group its rows; keep them on the CPU
        to save a synchronisation.
    optimizer : Optimizer
        Steps twice (once if the mini-batch has a single class).
    perturbed : sequence of Tensor
        The tensors θ that are moved: the LoRA tensors that are trained. All of them must be in the
        optimiser.
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
        holds none, the loss must still be a zero that depends on a trained tensor. Needed where
        ``torch.distributed`` has several processes; :func:`unshared` lets each step for itself.
    others : mapping of str to Tensor, optional
        Further tensors by name that are meant to be trained, such as a head.

    Returns
    -------
    AlignedStep

    Raises
    ------
    ValueError
        If the radius is negative or not finite, nothing is perturbed, a perturbed tensor is not in
        the optimiser, the permutation does not hold every class of the mini-batch once, or
        ``reduce`` is missing.
    RuntimeError
        If the loss depends on no perturbed tensor, one of ``others`` gets a gradient but is not in
        the optimiser, or ``optimizer.step()`` takes no step.

    See Also
    --------
    Halves : the same step in phases, for loops that accumulate, clip or scale gradients.

    Notes
    -----
    Weight decay sees :math:`\tilde\theta`, as in the published code. If ``loss`` or the optimiser
    raises, the parameters are put back bit for bit before the error is raised further. The cache
    of ``torch.autocast`` is emptied whenever parameters have changed, so that autocast may be
    entered inside ``loss`` or around the step.

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
    check_radius(radius)
    _require_trained([optimizer], perturbed)
    # On the CPU: a split on the device would be read several times. Labels there cost one read.
    halves = [mask.nonzero().flatten() for mask in class_split(labels.cpu(), permutation.cpu())]
    reduce, others = _require_reduce(reduce), others or {}
    if min(half.numel() for half in halves) == 0:
        # One class: there is no other half whose gradient could be aligned with.
        return _plain_step(
            loss, labels, optimizer, backward, skip_nonfinite, reduce, perturbed, others
        )
    halves = [half.to(labels.device, non_blocking=True) for half in halves]
    values, source_values, alignments, steps = [], [], [], 0
    with _own_synchronisation(reduce, [optimizer]):
        for source, target in (halves, halves[::-1]):
            torch.clear_autocast_cache()
            value = _with_graph(loss(source))
            # Not by backward(): the gradients that the optimiser sees must come only from the
            # target.
            parts = torch.autograd.grad(value, perturbed, allow_unused=True)
            value = value.detach().clone()
            gradients = _shared_gradients(perturbed, parts, reduce, value)
            source_values.append(value * (source.numel() / labels.shape[0]))
            shift = _Shift(perturbed, gradients, radius)
            stepped = False
            try:
                value = _backward_on(loss, target, optimizer, backward, reduce, others)
                # Before the step: some optimisers change the gradients.
                alignments.append(_alignment(gradients, [p.grad for p in perturbed]))
                stepped = _take_step(optimizer, skip_nonfinite, shift.moved)
            finally:
                # Bit for bit: adding the shift back would change about a tenth of the floats.
                if not stepped:
                    shift.undo()
            if stepped:
                shift.take_off()
            # The halves may differ in size; both losses are means over their own rows.
            values.append(value * (target.numel() / labels.shape[0]))
            steps += int(stepped)
    return AlignedStep(
        values[0] + values[1],
        steps,
        source_values[0] + source_values[1],
        (alignments[0] + alignments[1]) / 2,
    )


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
    return _plain_step(loss, labels, optimizer, backward, skip_nonfinite, _require_reduce(reduce))


class Half:
    """One optimiser step of a gradient-aligned mini-batch, in phases; made by :class:`Halves`.

    Attributes
    ----------
    source : list of Part
        Rows whose gradient gives the direction of the look-ahead; may be empty in a process that
        holds none of them.
    target : list of Part
        Rows whose gradient the optimiser steps with.
    last : bool
        Whether it is the last half of its mini-batch, whose step a trainer may take by itself.
    stepped : bool
        Whether an optimiser has stepped with it.
    alignment : Tensor, 0-d, or None
        Cosine between the two gradients; ``None`` before they are known, and where nothing is
        moved.
    """

    def __init__(
        self,
        source: list[Part],
        target: list[Part],
        *,
        perturbed: Sequence[Tensor],
        optimizers: Sequence[Optimizer],
        radius: float | None,
        reduce: Reduce | None,
        others: Mapping[str, Tensor],
        last: bool,
    ) -> None:
        self.source, self.target, self.last = source, target, last
        self.stepped = False
        self.alignment: Tensor | None = None
        self._perturbed = list(perturbed)
        self._optimizers = list(optimizers)
        self._radius = radius  # None: a mini-batch of one group, which moves nothing
        self._reduce = reduce
        self._others = others
        self._gradients: list[Tensor] = []
        self._shift: _Shift | None = None
        self._phase = "new"
        self._shared = self._may_skip = False
        self._entered = ExitStack()

    def look_ahead(self) -> None:
        """Move the branches along the gradient on the source, and clear all gradients.

        Reads the gradients of the branches from ``.grad`` and sums them over the processes. Then
        the gradients of all trained tensors are cleared, so that the optimiser sees those on the
        target alone.

        Raises
        ------
        RuntimeError
            If no branch has a gradient, or the call is out of order.
        """
        self._require_phase("source", "look_ahead")
        if self._radius is not None:
            parts = [p.grad for p in self._perturbed]
            self._gradients = _shared_gradients(self._perturbed, parts, self._reduce)
        self._clear()
        if self._radius is not None:
            self._shift = _Shift(self._perturbed, self._gradients, self._radius)
        self._phase = "target"

    def share(self) -> None:
        """Sum the gradients on the target over the processes; call it before they are clipped.

        Needed if there are several processes; with one it only measures the alignment, which
        ``optimizer.step()`` does otherwise.

        Raises
        ------
        RuntimeError
            If no branch has a gradient, a trained tensor has one but is in no optimiser, or the
            call is out of order.
        """
        self._require_phase("target", "share")
        _require_held(self._others, self._optimizers)
        parts = [p.grad for p in self._perturbed]
        if self._reduce is None:
            _require_gradients(parts)
        else:
            _share_all(_all_gradients(self._optimizers), parts, self._reduce)
        if self._gradients:
            self.alignment = _alignment(self._gradients, [p.grad for p in self._perturbed])
        self._shared = True

    def restore(self) -> None:
        """Take the shift off again, after ``optimizer.step()`` or a step that was skipped.

        Raises
        ------
        RuntimeError
            If the call is out of order.
        """
        self._require_phase("target", "restore")
        if self._shift is not None:
            # Without a step everything that was moved comes back bit for bit, also from a move
            # that was not finite. A fused optimiser may skip a step by itself, unseen by us.
            self._shift.take_off(finite_only=not self.stepped or self._may_skip)
        self._close()

    def begin(self) -> None:
        """Clear all gradients and watch the optimisers; called by :class:`Halves`."""
        self._phase = "source"
        torch.clear_autocast_cache()
        self._clear()
        self._entered.enter_context(_own_synchronisation(self._reduce, self._optimizers))
        for register, hook in (
            (register_optimizer_step_pre_hook, self._before_step),
            (register_optimizer_step_post_hook, self._after_step),
        ):
            self._entered.callback(register(hook).remove)

    def abandon(self) -> None:
        """Put everything back bit for bit, as if the half had not begun."""
        if self._shift is not None:
            self._shift.undo()
        self._close()

    @property
    def in_progress(self) -> bool:
        """Whether the half has begun and is not yet restored."""
        return self._phase in ("source", "target")

    def _close(self) -> None:
        self._shift, self._gradients, self._phase = None, [], "done"
        self._entered.close()
        torch.clear_autocast_cache()  # the optimiser has changed the parameters too

    def _clear(self) -> None:
        for tensor in (
            *self._perturbed,
            *held_parameters(self._optimizers),
            *self._others.values(),
        ):
            tensor.grad = None

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not _share_tensors(optimizer, held_parameters(self._optimizers)):
            return
        self._require_phase("target", "optimizer.step")
        # A closure computes gradients, and shares them, inside the step.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None and not self._shared:
            self._require_shared()
            self.share()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if _share_tensors(optimizer, self._perturbed):
            self.stepped = True
            self._may_skip = self._may_skip or getattr(optimizer, "found_inf", None) is not None
            self._require_shared()
            _require_held(self._others, self._optimizers)  # not known before a closure has run

    def _require_shared(self) -> None:
        if not self._shared and self._reduce is not None:
            msg = (
                "half.share() must be called before the gradients are clipped and optimizer.step() "
                "uses them, since several processes train the model"
            )
            raise RuntimeError(msg)

    def _require_phase(self, phase: str, call: str) -> None:
        if self._phase == phase:
            return
        msg = (
            f"{call} is out of order; a half is: backward on half.source, look_ahead, backward on "
            f"half.target, share, optimizer.step, restore"
        )
        raise RuntimeError(msg)


class Halves:
    r"""The gradient-aligned step of :func:`gradient_aligned_step` in phases, for loops of any kind.

    Iterating gives the two halves one after the other. In each, backward passes on its source are
    followed by ``look_ahead``, backward passes on its target, ``share``, the optimiser's step and
    ``restore``. Mini-batches may be accumulated to a window, gradients clipped or scaled, and
    several processes may hold different rows.

    Parameters
    ----------
    window : Tensor of shape (N,), int, a sequence of these, or Window
        Groups of the rows of this process, such as class labels: any integers, one tensor for each
        mini-batch of the window. Rows of one group belong to one half. A number of rows instead of
        groups stands for a random split.
    optimizer : Optimizer or sequence of Optimizer
        All that step in a half. Together they hold all perturbed tensors.
    perturbed : sequence of Tensor
        The tensors that are moved.
    radius : float
        Length of the shift.
    permutation : Tensor, shape (k,)
        The groups present, over the window and all processes, in random order, the same in all
        processes.
    reduce : callable, optional
        Sums tensors over the processes of ``torch.distributed``.
    others : mapping of str to Tensor, optional
        Further tensors by name that are meant to be trained, such as a head.

    Attributes
    ----------
    steps : int
        Optimiser steps taken so far: up to 2, or 1 if there is only one group.
    alignment : Tensor, 0-d, or None
        Cosine between the two gradients, the mean of the halves so far.

    Raises
    ------
    ValueError
        If the radius is negative or not finite, nothing is perturbed, a perturbed tensor is in no
        optimiser, there are no rows, or the permutation does not hold every group once.
    TypeError
        If groups are not integers.
    RuntimeError
        If Accelerate is accumulating gradients, which would leave out steps.

    Notes
    -----
    A window of one group has no two halves. Its single `Half` has the whole window as source and
    as target and moves nothing, so that it is a plain step at the price of a backward pass.

    An error inside the loop puts the tensors back bit for bit.

    Examples
    --------
    >>> import torch
    >>> w = torch.nn.Parameter(torch.zeros(2))
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    >>> loss = lambda rows: ((x[rows] @ w - 1) ** 2).mean()
    >>> optimizer = torch.optim.SGD([w], lr=0.1)
    >>> halves = Halves(y, optimizer, [w], radius=0.1, permutation=torch.tensor([1, 0]))
    >>> for half in halves:
    ...     for part in half.source:
    ...         (part.weight * loss(part.rows)).backward()
    ...     half.look_ahead()
    ...     for part in half.target:
    ...         (part.weight * loss(part.rows)).backward()
    ...     half.share()
    ...     optimizer.step()
    ...     half.restore()
    >>> halves.steps, w.detach()
    (2, tensor([0.2000, 0.2000]))
    """

    def __init__(
        self,
        window: "Groups | Sequence[Groups] | Window",
        optimizer: Optimizer | Sequence[Optimizer],
        perturbed: Sequence[Tensor],
        *,
        radius: float,
        permutation: Tensor,
        reduce: Reduce | None = None,
        others: Mapping[str, Tensor] | None = None,
    ) -> None:
        optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
        check_radius(radius)
        _require_trained(optimizers, perturbed)
        reduce = _require_reduce(reduce)
        if not isinstance(window, Window):
            window = Window(window, shared=reduce is not None)
        first, second = window.split(permutation)
        whole, alone = first or second, not all(window.counts)
        # One group: there is nothing to align with.
        pairs = [(whole, whole)] if alone else [(first, second), (second, first)]
        self._halves = [
            Half(
                source,
                target,
                perturbed=perturbed,
                optimizers=optimizers,
                radius=None if alone else radius,
                reduce=reduce,
                others=others or {},
                last=number == len(pairs),
            )
            for number, (source, target) in enumerate(pairs, start=1)
        ]
        self._begun = False

    def __iter__(self) -> Iterator[Half]:
        if self._begun:
            msg = "halves can be iterated once; call halves(...) for every step"
            raise RuntimeError(msg)
        self._begun = True
        for half in self._halves:
            try:
                half.begin()
                yield half
                if half.in_progress:
                    msg = "half.restore() must be called after optimizer.step()"
                    raise RuntimeError(msg)
            finally:
                if half.in_progress:
                    half.abandon()

    @property
    def steps(self) -> int:
        """Optimiser steps taken so far."""
        return sum(half.stepped for half in self._halves)

    @property
    def alignment(self) -> Tensor | None:
        """Cosine between the two gradients, the mean of the halves so far."""
        known = [half.alignment for half in self._halves if half.alignment is not None]
        return torch.stack(known).mean() if known else None

    @property
    def in_progress(self) -> bool:
        """Whether a half has begun and is not yet restored."""
        return any(half.in_progress for half in self._halves)

    def abandon(self) -> None:
        """Put the tensors of a half in progress back bit for bit."""
        for half in self._halves:
            if half.in_progress:
                half.abandon()


class Window:
    """Groups of the rows of all mini-batches of a step, over all processes if it is shared.

    Attributes
    ----------
    labels : Tensor, shape (N,)
        Group of every row, process by process, on the CPU.
    first, rows : int
        Place of the first row of this process, and number of its rows.
    counts : list of int
        Rows of both halves, once they are split.
    """

    def __init__(self, window: Groups | Sequence[Groups], *, shared: bool) -> None:
        batches: list[Groups] = (
            list(window) if isinstance(window, (list, tuple)) else [window]  # type: ignore[list-item]
        )
        for groups in batches:
            _check_groups(groups)
        if len(batches) > 1 and 0 in [groups for groups in batches if isinstance(groups, int)]:
            msg = (
                f"a list must hold one entry for each mini-batch, a tensor of groups or a number "
                f"of rows of at least 1, got {batches[:8]}; the labels of one mini-batch "
                f"must be a tensor"
            )
            raise ValueError(msg)
        self._devices = [
            groups.device if isinstance(groups, Tensor) else torch.device("cpu")
            for groups in batches
        ]
        own = [
            groups.detach().cpu() if isinstance(groups, Tensor) else groups for groups in batches
        ]
        everyone = gather(own) if shared else [own]
        rank = torch.distributed.get_rank() if shared else 0
        flat = [groups for rank_batches in everyone for groups in rank_batches]
        self._sizes = [_count(groups) for groups in own]
        self.rows = sum(self._sizes)
        self.first = sum(_count(groups) for before in everyone[:rank] for groups in before)
        numbers = [groups for groups in flat if isinstance(groups, int)]
        tensors = [groups for groups in flat if isinstance(groups, Tensor)]
        if numbers and tensors:
            msg = "groups must be tensors for all mini-batches or numbers of rows for all, got both"
            raise ValueError(msg)
        # Each row a group of its own: halves by rows at random.
        self.labels = torch.cat(tensors) if tensors else torch.arange(sum(numbers))
        if self.labels.numel() == 0:
            msg = "a step must have at least one row, got none"
            raise ValueError(msg)
        self.counts = [0, 0]

    def split(self, permutation: Tensor) -> tuple[list[Part], list[Part]]:
        """The parts of both halves that this process holds."""
        first, second = class_split(self.labels, permutation.cpu())
        self.counts = [int(first.sum()), int(second.sum())]
        return self._parts(first), self._parts(second)

    def _parts(self, mask: Tensor) -> list[Part]:
        total, start, parts = int(mask.sum()), self.first, []
        for batch, (size, device) in enumerate(zip(self._sizes, self._devices, strict=True)):
            rows = mask[start : start + size].nonzero().flatten()
            start += size
            if rows.numel():
                rows = rows.to(device, non_blocking=True)
                parts.append(Part(batch, rows, rows.numel() / total))
        return parts


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


def check_radius(radius: float) -> None:
    """Refuse a radius that is negative or not finite."""
    if not math.isfinite(radius) or radius < 0:
        msg = f"radius must be finite and at least 0, got {radius}"
        raise ValueError(msg)


class _Shift:
    """Moves tensors along a gradient, each by a fixed length, and takes the shift off again.

    As `loda_math.lookahead`, but for all tensors of a type and device at once: a call for each
    tensor would cost more than the arithmetic.
    """

    @torch.no_grad()
    def __init__(
        self, tensors: Sequence[Tensor], gradients: Sequence[Tensor], radius: float
    ) -> None:
        alike: dict[tuple[torch.dtype, torch.device], list[tuple[Tensor, Tensor]]] = {}
        for tensor, gradient in zip(tensors, gradients, strict=True):
            alike.setdefault((tensor.dtype, tensor.device), []).append((tensor, gradient))
        # Tensors, their values before and after the move.
        self._groups: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        for (dtype, _), pairs in alike.items():
            group = [tensor for tensor, _ in pairs]
            before = list(torch._foreach_mul(group, 1))
            wide = torch.promote_types(dtype, torch.float32)
            shifts = _unit_directions([gradient.to(wide) for _, gradient in pairs])
            torch._foreach_mul_(shifts, radius)
            moved = list(torch._foreach_sub([value.to(wide) for value in before], shifts))
            if wide != dtype:
                moved = [value.to(dtype) for value in moved]
            self._groups.append((group, before, moved))
        try:
            for group, _, moved in self._groups:
                torch._foreach_copy_(group, moved)
        except BaseException:  # Ctrl-C between two devices
            self.undo()
            raise
        # What autocast has cast before the move is out of date.
        torch.clear_autocast_cache()

    @property
    def moved(self) -> list[Tensor]:
        """The values after the move."""
        return [value for _, _, moved in self._groups for value in moved]

    @torch.no_grad()
    def undo(self) -> None:
        """Put the values from before the move back, bit for bit."""
        for group, before, _ in self._groups:
            torch._foreach_copy_(group, before)
        torch.clear_autocast_cache()

    @torch.no_grad()
    def take_off(self, *, finite_only: bool = False) -> None:
        """Keep what a step has added since the move, and take off the move.

        A value that has not changed since the move is the one before it, bit for bit. With
        ``finite_only``, so is one that the move has made NaN or infinite, whatever happened since.
        """
        for group, before, moved in self._groups:
            values = list(torch._foreach_add(before, torch._foreach_sub(group, moved)))
            if finite_only:
                triples = zip(moved, values, before, strict=True)
                values = [torch.where(m.isfinite(), v, b) for m, v, b in triples]
            torch._foreach_copy_(group, values)
        torch.clear_autocast_cache()


def _unit_directions(gradients: list[Tensor]) -> list[Tensor]:
    """Each gradient divided by its own length; a zero stays zero."""
    tiny = torch.finfo(gradients[0].dtype).tiny
    # Dividing by the largest entry first: the square of a small gradient underflows.
    peaks = torch._foreach_max(torch._foreach_abs(gradients))  # faster than the norm of infinity
    torch._foreach_clamp_min_(peaks, tiny)
    directions = torch._foreach_div(gradients, peaks)
    lengths = torch._foreach_norm(directions)
    torch._foreach_clamp_min_(lengths, tiny)
    torch._foreach_div_(directions, lengths)
    return list(directions)


@torch.no_grad()
def _alignment(a: Sequence[Tensor], b: Sequence[Tensor | None]) -> Tensor:
    """Cosine between two gradients over all tensors, as `loda_math.gradient_alignment`."""
    device = a[0].device
    wide = torch.promote_types(a[0].dtype, torch.float32)
    filled = [torch.zeros_like(x) if y is None else y for x, y in zip(a, b, strict=True)]
    flat = [
        torch.cat([x.flatten().to(device, wide) for x in gradients]) for gradients in (a, filled)
    ]
    tiny = torch.finfo(wide).tiny
    x, y = (gradient / gradient.abs().amax().clamp_min(tiny) for gradient in flat)
    lengths = torch.linalg.vector_norm(x) * torch.linalg.vector_norm(y)
    cosine: Tensor = (x * y).sum() / lengths.clamp_min(tiny)
    return cosine.clamp(-1, 1)


def _plain_step(
    loss: RowsLoss,
    labels: Tensor,
    optimizer: Optimizer,
    backward: Callable[[Tensor], None] | None,
    skip_nonfinite: bool,
    reduce: Reduce | None,
    branches: Sequence[Tensor] = (),
    others: Mapping[str, Tensor] | None = None,
) -> AlignedStep:
    """A step on all rows; at least one of ``branches``, if there are any, must get a gradient."""
    rows = torch.arange(labels.shape[0], device=labels.device)
    with _own_synchronisation(reduce, [optimizer]):
        value = _backward_on(loss, rows, optimizer, backward, reduce, others or {})
        if branches and reduce is None:
            _require_gradients([p.grad for p in branches])
        return AlignedStep(value, int(_take_step(optimizer, skip_nonfinite)))


def _backward_on(
    loss: RowsLoss,
    rows: Tensor,
    optimizer: Optimizer,
    backward: Callable[[Tensor], None] | None,
    reduce: Reduce | None,
    others: Mapping[str, Tensor],
) -> Tensor:
    """The loss on some rows of the mini-batch, whose gradients are then those of the tensors."""
    torch.clear_autocast_cache()
    optimizer.zero_grad(set_to_none=True)
    for tensor in others.values():
        tensor.grad = None
    value = _with_graph(loss(rows))
    if backward is None:
        value.backward()  # type: ignore[no-untyped-call]
    else:
        backward(value)
    _require_held(others, [optimizer])
    value = value.detach()
    if reduce is not None:
        value = value.clone()
        # In one message, so that every process skips the same steps and logs the same loss.
        reduce([*_all_gradients([optimizer]), value])
    return value


def _take_step(optimizer: Optimizer, skip_nonfinite: bool, moved: Sequence[Tensor] = ()) -> bool:
    """Step with the gradients, and say whether a step was taken.

    ``moved`` are tensors that were moved along a gradient before; they must be finite too.
    """
    own = held_parameters([optimizer])
    if skip_nonfinite:
        # One read for all.
        flags = [x.isfinite().all() for x in (*(p.grad for p in own), *moved) if x is not None]
        if flags and not bool(torch.stack(flags).all()):
            optimizer.zero_grad(set_to_none=True)
            return False
    taken: list[Optimizer] = []  # this optimiser, or the one that it wraps

    def note(stepping: Optimizer, *_: Any) -> None:
        if _share_tensors(stepping, own):
            taken.append(stepping)

    handle = register_optimizer_step_post_hook(note)
    try:
        optimizer.step()
    finally:
        handle.remove()
    torch.clear_autocast_cache()
    if not taken and not getattr(optimizer, "step_was_skipped", False):
        msg = (
            "optimizer.step() took no step: are gradients being accumulated? Take the step in "
            "phases with halves(...), over all mini-batches of the window"
        )
        raise RuntimeError(msg)
    return bool(taken)


def _own_synchronisation(reduce: Reduce | None, optimizers: Sequence[Optimizer]) -> Any:
    """Where we sum gradients, DistributedDataParallel must not average them as well."""
    if reduce is None:
        return nullcontext()
    return synchronisation_paused(held_parameters(optimizers))


def _require_reduce(reduce: Reduce | None) -> Reduce | None:
    """The sum over processes, or ``None`` if nothing is shared."""
    if reduce is None and several_processes():
        msg = (
            "reduce must be given where torch.distributed has several processes, got none: take "
            "the step with LoDA.step or LoDA.halves, which share it, or pass "
            "reduce=sum_over_processes with the labels of the whole mini-batch (reduce=unshared "
            "lets every process step for itself)"
        )
        raise ValueError(msg)
    return None if reduce is unshared else reduce


def _require_trained(optimizers: Sequence[Optimizer], perturbed: Sequence[Tensor]) -> None:
    """Refuse optimisers that would not step with every tensor that is moved."""
    if not perturbed:
        msg = "nothing to perturb: pass the LoRA tensors that are trained"
        raise ValueError(msg)
    trained = {id(parameter) for parameter in held_parameters(optimizers)}
    missing = sum(id(tensor) not in trained for tensor in perturbed)
    if missing:
        msg = (
            f"the optimiser must hold all {len(perturbed)} tensors of the branches, but {missing} "
            f"are missing; every task has new ones: make the optimiser after the task has begun, "
            f"from task.parameters() or loda.trainable_parameters()"
        )
        raise ValueError(msg)
    # Accelerate's wrapper takes no step, and clears no gradient, while it accumulates.
    if any(
        not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)
        for optimizer in optimizers
    ):
        msg = (
            "Accelerate is accumulating gradients and leaves out this step: make the Accelerator "
            "without gradient_accumulation_steps, do not enter accelerator.accumulate, and pass "
            "all mini-batches of the window to halves(...)"
        )
        raise RuntimeError(msg)


def _require_held(others: Mapping[str, Tensor], optimizers: Sequence[Optimizer]) -> None:
    """Refuse a gradient of a tensor that is meant to be trained, but that nothing steps with."""
    held = {id(parameter) for parameter in held_parameters(optimizers)}
    missing = [n for n, x in others.items() if x.grad is not None and id(x) not in held]
    if missing:
        msg = (
            f"the optimiser must hold all that is trained and gets a gradient, but {missing} are "
            f"missing: make it from task.parameters(), pass all optimisers to halves(...), or name "
            f"with trainable only what is to be trained"
        )
        raise RuntimeError(msg)


def _with_graph(value: Tensor) -> Tensor:
    """The loss, which must have been computed with gradients switched on."""
    if not getattr(value, "requires_grad", False):  # it may be a number
        _require_gradients([])
    return value


def _require_gradients(gradients: Sequence[Tensor | None]) -> None:
    if all(gradient is None for gradient in gradients):
        msg = (
            "the loss depends on no branch of the open task: no gradient has reached them. Was it "
            "computed from stored features, from detached values, from another copy of the model "
            "or under torch.no_grad or inference_mode? Reentrant gradient checkpointing needs "
            "use_reentrant=False"
        )
        raise RuntimeError(msg)


def _shared_gradients(
    tensors: Sequence[Tensor],
    parts: Sequence[Tensor | None],
    reduce: Reduce | None,
    value: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of the tensors, summed over the processes; zeros where there is none.

    ``value`` is summed in the same message.
    """
    if reduce is None:
        _require_gradients(parts)
    pairs = zip(tensors, parts, strict=True)
    gradients = [torch.zeros_like(p) if g is None else g.detach() for p, g in pairs]
    if reduce is not None:
        # Autograd may hand out views, which cannot be written to.
        gradients = [g.clone(memory_format=torch.contiguous_format) for g in gradients]
        _share_all(gradients if value is None else [*gradients, value], parts, reduce)
    return gradients


def _share_all(tensors: Sequence[Tensor], parts: Sequence[Tensor | None], reduce: Reduce) -> None:
    """Sum tensors over the processes; some process must have a gradient for the branches."""
    count = sum(part is not None for part in parts)
    counts = torch.tensor(count, dtype=tensors[0].dtype, device=tensors[0].device)
    reduce([*tensors, counts])
    # A process without a row of a half has no gradient of its own. Others do not read the device.
    if count == 0 and not bool(counts):
        _require_gradients(parts)


def held_parameters(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """All tensors that some optimisers step with."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [parameter for group in groups for parameter in group["params"]]


def _share_tensors(optimizer: Optimizer, tensors: Sequence[Tensor]) -> bool:
    """Whether the optimiser holds any of the tensors."""
    known = {id(tensor) for tensor in tensors}
    return any(id(parameter) in known for parameter in held_parameters([optimizer]))


def _all_gradients(optimizers: Sequence[Optimizer]) -> list[Tensor]:
    """Gradients of all trained tensors; zeros where this process has no row for them."""
    gradients = []
    for parameter in held_parameters(optimizers):
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
    return gradients


def _check_groups(groups: object) -> None:
    """Refuse what is neither the groups of a mini-batch nor a number of its rows."""
    if isinstance(groups, Tensor):
        if groups.ndim != 1:
            msg = f"labels must have one axis, got shape {tuple(groups.shape)}"
            raise ValueError(msg)
    elif isinstance(groups, bool) or not isinstance(groups, int):
        msg = (
            f"labels of a mini-batch must be a tensor of integers, or a number of rows, got a "
            f"{type(groups).__name__}; turn them into one with torch.as_tensor"
        )
        raise TypeError(msg)
    elif groups < 0:
        msg = f"a number of rows must be at least 0, got {groups}"
        raise ValueError(msg)


def _count(groups: Groups) -> int:
    return groups if isinstance(groups, int) else groups.shape[0]
