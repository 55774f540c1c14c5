"""The interface between the training loop and a method, and the registry of methods.

This file and those of the methods do not import torch, so that a command line can show and check
their options; functions that need torch import it when they are called. Types of torch are in
quotation marks for the same reason: if all annotations of a file were postponed, jsonargparse would
import the modules that they name.
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
        "first_task": "training.methods.first_task.FirstTask",
        "ncm": "training.methods.frozen.NearestClassMean",
        "ranpac_frozen": "training.methods.frozen.RanPACFrozen",
        "null_lora": "training.methods.loda.NullLoRA",
        "o_lora": "training.methods.o_lora.OLoRA",
        "inflora": "training.methods.inflora.InfLoRA",
        "sd_lora": "training.methods.sd_lora.SDLoRA",
    },
    requires=(
        "start",
        "begin_task",
        "parameters",
        "step",
        "end_task",
        "state_dict",
        "load_state_dict",
    ),
    group="loda.methods",
    base="training.methods.Method",
)


@dataclass
class MethodConfig(Component):
    """The continual-learning method.

    Parameters
    ----------
    name
        loda; seq_lora (one plain LoRA branch that every task trains further); joint (the same on
        all tasks at once, meant as an upper bound); frozen; first_task (loda on the first task,
        frozen after it); ncm and ranpac_frozen (frozen, with nearest class means or ridge
        regression in place of training); null_lora, o_lora, inflora, sd_lora; or the import path of
        a class, my_package.MyMethod.
    """

    registry = METHODS
    section = "method"

    name: str = "loda"


def steps_a_batch(config: MethodConfig) -> int | None:
    """Optimiser steps per mini-batch of several classes, and passes of each of its images.

    Two if steps are gradient-aligned, otherwise one; None for a method of another package.

    Examples
    --------
    >>> steps_a_batch(MethodConfig("loda")), steps_a_batch(MethodConfig("frozen"))
    (2, 1)
    """
    if not METHODS.is_packaged(config.name):
        return None
    return 1 if config.build().radius is None else 2


class Context(NamedTuple):
    """What a method may know about the run besides its options.

    Attributes
    ----------
    seed : int
        Seed of the method's own randomness.
    tasks : int
        Number of tasks in the stream.
    processes : int
        Number of processes that train together.
    reduce : callable or None
        Sums tensors over the processes; None if there is only one.
    """

    seed: int
    tasks: int
    processes: int = 1
    reduce: "Reduce | None" = None


class Method:
    """A rule for adapting a backbone task by task.

    Your own method is a subclass. The arguments of its constructor, which checks them, are its
    options. `start` is called once; every task is one ``begin_task``, many ``step`` and one
    ``end_task``. Between tasks the model has its original modules and parameter names, so that it
    can be evaluated and saved as it is.

    Attributes
    ----------
    saves_open_task : bool
        Promise that ``state_dict`` is complete inside a task too: loaded into a fresh method, over
        a model with the weights of that moment, it restores the open task. Runs of other methods
        can be resumed only at task boundaries.
    sums_over_processes : bool
        Promise that gradients, moments and all other sums over images go through
        ``context.reduce``, and that a term of the loss that does not depend on images is divided
        by ``context.processes``. Only such methods run in several processes.
    joins_tasks : bool
        Whether all tasks are learned as one.
    uses_task_count : bool
        Whether the number of tasks in the stream changes what is learned in each.
    readout : str or None
        Read-out of a method that trains nothing; it becomes the primary one, with 0 epochs.
    keeps : tuple of str
        Which of ``keep.branches`` and ``keep.moments`` have something to keep.
    radius : float or None
        Largest length of the look-ahead of gradient-aligned steps; None if steps are plain.
    """

    saves_open_task: ClassVar[bool] = False
    sums_over_processes: ClassVar[bool] = False
    joins_tasks: ClassVar[bool] = False
    uses_task_count: bool = False
    readout: ClassVar[str | None] = None
    keeps: ClassVar[tuple[str, ...]] = ("branches", "moments")
    radius: float | None = None

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach to a model and freeze it; a method unfreezes what it trains.

        Raises
        ------
        ValueError
            If the options do not fit the model: a pattern matches no layer, the rank is too high.
        """
        model.requires_grad_(False)
        self.model, self.context = model, context

    def generator(self, task: int) -> "torch.Generator":
        """Generator of a task (counted from 0), the same after a resume."""
        import torch

        return torch.Generator().manual_seed(derive(self.context.seed, task, "method"))

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Prepare the model for a task; its training images can be iterated any number of times."""

    def parameters(self) -> "list[nn.Parameter]":
        """Tensors of the backbone that the optimiser trains in the open task; may be empty."""
        return []

    def objective(self, loss: "RowsLoss") -> "RowsLoss":
        """The function that a step minimises; a method may add a term to the loss over rows."""
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

        Takes a plain step or, with a ``radius``, a gradient-aligned one whose look-ahead has length
        radius · u, u uniform in [0, 1). `LoDA.step` is that step for LoDA without this package.
        """
        import torch

        from backends.torch import draw_permutation, gradient_aligned_step, plain_step

        total, reduce = self.objective(loss), self.context.reduce
        moved = self.parameters()
        if self.radius is None or not moved:
            return plain_step(total, labels, optimizer, backward=backward, reduce=reduce)
        permutation = draw_permutation(labels, generator).to(labels.device)
        # After the permutation: another order of the draws would change the results of a seed.
        draw = float(torch.rand((), generator=generator))
        return gradient_aligned_step(
            total,
            labels,
            optimizer,
            moved,
            radius=self.radius * draw,
            permutation=permutation,
            backward=backward,
            reduce=reduce,
        )

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord | None":
        """Fold the learned update into the model; returns a record of it, or None."""

    def state_dict(self) -> "dict[str, Tensor]":
        """Tensors that the method carries from task to task, besides the weights of the model."""
        return {}

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load a state made by ``state_dict`` between two tasks."""


def aligned_radius(gao: bool, radius: float) -> float | None:
    """The radius of gradient-aligned steps, or None for plain ones.

    Raises
    ------
    ValueError
        If the radius is negative or not finite.
    """
    not_negative("radius", radius)
    return radius if gao else None


def fact(method: Any, name: str) -> Any:
    """A fact of a method or its class, such as ``joins_tasks``.

    A class that has the functions of `Method` without inheriting it gets the defaults.

    Examples
    --------
    >>> fact(object(), "saves_open_task")
    False
    """
    return getattr(method, name, getattr(Method, name))
