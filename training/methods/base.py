"""What the training loop asks of a method, what it tells it, and the methods by name.

This file and those of the methods load no torch, so that a command line can show and check their
options; what needs torch imports it when it is called. Types of torch are in quotation marks for
the same reason: where all annotations of a file are postponed, jsonargparse imports what they need.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from training.components import Component, Registry, not_negative
from training.seeds import derive

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from backends.torch import AlignedStep, Reduce, RowsLoss, TaskRecord

METHODS = Registry(
    kind="method",
    paths={
        "loda": "training.methods.loda.LoDAMethod",
        "seq_lora": "training.methods.seq_lora.SequentialLoRA",
        "joint": "training.methods.seq_lora.Joint",
        "frozen": "training.methods.frozen.Frozen",
        "ncm": "training.methods.frozen.NearestClassMean",
        "ranpac_frozen": "training.methods.frozen.RanPACFrozen",
        "null_lora": "training.methods.loda.NullLoRA",
        "o_lora": "training.methods.o_lora.OLoRA",
        "inflora": "training.methods.inflora.InfLoRA",
        "sd_lora": "training.methods.sd_lora.SDLoRA",
    },
    requires=("start", "begin_task", "parameters", "step", "end_task", "load_state_dict"),
    group="loda.methods",
)


@dataclass
class MethodConfig(Component):
    """The continual-learning method.

    Parameters
    ----------
    name
        loda; seq_lora (one plain low-rank branch, trained on); joint (the same on all tasks at
        once, the upper bound); frozen; ncm and ranpac_frozen (frozen, with nearest class means and
        ridge regression in place of training); null_lora, o_lora, inflora, sd_lora; or the import
        path of a class, my_package.MyMethod.
    """

    registry = METHODS
    section = "method"

    name: str = "loda"


def steps_a_batch(config: MethodConfig) -> int | None:
    """Optimiser steps of a mini-batch of several classes, and how often each image is passed.

    Two where steps are gradient-aligned, else one; None of a method of another package.

    Examples
    --------
    >>> steps_a_batch(MethodConfig("loda")), steps_a_batch(MethodConfig("frozen"))
    (2, 1)
    """
    if not METHODS.is_packaged(config.name):
        return None
    return 1 if config.build().radius is None else 2


class Context(NamedTuple):
    """What a method may know of the run beside its options.

    Attributes
    ----------
    seed : int
        Seed of the method's own randomness.
    tasks : int
        Number of tasks of the stream.
    processes : int
        Number of processes that train together.
    reduce : callable or None
        Sums tensors over them; None where there is one.
    """

    seed: int
    tasks: int
    processes: int = 1
    reduce: "Reduce | None" = None


class Method:
    """A rule for adapting a backbone task by task.

    A method of one's own is a subclass. The arguments of its constructor are its options; they are
    checked there. The work begins with `start`, and every task is ``begin_task``, many ``step``,
    ``end_task``. Between tasks the model has its original modules and parameter names, so that it
    can be evaluated and saved as it is.

    Attributes
    ----------
    saves_open_task : bool
        Promise that ``state_dict`` is complete inside a task too: loaded into a fresh method, over
        a model with the weights it has then, it puts the open task back as it was. Runs of other
        methods can be resumed at task boundaries only.
    sums_over_processes : bool
        Promise that gradients, moments and whatever else is a sum over images go through
        ``context.reduce``, and that a term of the loss that is not of images is divided by
        ``context.processes``. Only such methods run in several processes.
    joins_tasks : bool
        Whether all tasks are learned as one.
    readout : str or None
        Read-out of a method that trains nothing: it becomes the primary one, without any epoch.
    keeps : tuple of str
        What ``keep.branches`` and ``keep.moments`` find to keep.
    radius : float or None
        Longest look-ahead of gradient-aligned steps; None where steps are plain.
    """

    saves_open_task: ClassVar[bool] = False
    sums_over_processes: ClassVar[bool] = False
    joins_tasks: ClassVar[bool] = False
    readout: ClassVar[str | None] = None
    keeps: ClassVar[tuple[str, ...]] = ("branches", "moments")
    radius: float | None = None

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach to a model, which is frozen: a method unfreezes what it trains.

        Raises
        ------
        ValueError
            If the options do not suit the model: a pattern that matches no layer, a rank too high.
        """
        model.requires_grad_(False)
        self.model, self.context = model, context

    def generator(self, task: int) -> "torch.Generator":
        """Randomness of a task (from 0), the same whether or not the run was interrupted."""
        import torch

        return torch.Generator().manual_seed(derive(self.context.seed, task, "method"))

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Prepare the model for a task; ``batches`` are its training images, walked at will."""

    def parameters(self) -> "list[nn.Parameter]":
        """Tensors of the backbone that the optimiser trains in the open task; may be empty."""
        return []

    def objective(self, loss: "RowsLoss") -> "RowsLoss":
        """What a step minimises; a method may add a term to the loss over rows of a mini-batch."""
        return loss

    def step(
        self,
        loss: "RowsLoss",
        labels: "Tensor",
        optimizer: "Optimizer",
        *,
        generator: "torch.Generator",
        backward: "Callable[[Tensor], None]",
    ) -> "AlignedStep":
        """Train on one mini-batch; ``loss(rows)`` is the mean loss over those rows of it.

        A plain step, or with a ``radius`` a gradient-aligned one whose look-ahead has a random
        share of that length.
        """
        import torch

        from backends.torch import draw_permutation, gradient_aligned_step, plain_step

        total, reduce = self.objective(loss), self.context.reduce
        moved = self.parameters()
        if self.radius is None or not moved:
            return plain_step(total, labels, optimizer, backward=backward, reduce=reduce)
        permutation = draw_permutation(labels, generator).to(labels.device)
        share = float(torch.rand((), generator=generator))
        return gradient_aligned_step(
            total,
            labels,
            optimizer,
            moved,
            radius=self.radius * share,
            permutation=permutation,
            backward=backward,
            reduce=reduce,
        )

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord | None":
        """Fold what was learned into the model; a record of it, where there is one."""

    def state_dict(self) -> "dict[str, Tensor]":
        """What the method carries from task to task, beside the weights of the model."""
        return {}

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Take over a state made by ``state_dict`` between two tasks."""


def look_ahead(gao: bool, radius: float) -> float | None:
    """The radius of gradient-aligned steps; None where steps are plain.

    Raises
    ------
    ValueError
        If the radius is negative or not finite.
    """
    not_negative("radius", radius)
    return radius if gao else None
