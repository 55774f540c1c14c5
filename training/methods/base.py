"""What the training loop asks of a method, and what it tells it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import AlignedStep, Reduce, RowsLoss, TaskRecord
from training.config import MethodConfig


class Context(NamedTuple):
    """What a method may know of the run beside its settings.

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
    reduce: Reduce | None = None


class Method(Protocol):
    """A rule for adapting a backbone task by task.

    Between tasks the model has its original modules and parameter names, so that it can be
    evaluated and saved as it is.

    A class that also sets ``saves_open_task = True`` promises that its ``state_dict`` is valid
    inside a task too: loaded into a fresh method, over a model with the weights it has then, it
    puts the open task back as it was. Runs of others can be resumed at task boundaries only.

    One that sets ``sums_over_processes = True`` promises that gradients, moments and whatever else
    is a sum over images go through ``context.reduce``, and that a term of the loss which is not of
    images is divided by ``context.processes``. Only such methods run in several processes.
    """

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Prepare the model for a task; ``batches`` are its training images, walked at will."""

    def parameters(self) -> list[nn.Parameter]:
        """Tensors of the backbone that the optimiser trains in the open task; may be empty."""

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """Train on one mini-batch; ``loss(rows)`` is the mean loss over those rows of it."""

    def end_task(self, batches: Iterable[Any]) -> TaskRecord | None:
        """Fold what was learned into the model; a record of it, where there is one."""

    def state_dict(self) -> dict[str, Tensor]:
        """What the method carries from task to task, beside the weights of the model."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state made by ``state_dict`` between two tasks."""


def saves_open_task(method: Method) -> bool:
    """Whether the state of a method is complete inside a task too."""
    return bool(getattr(method, "saves_open_task", False))


def sums_over_processes(method: Method) -> bool:
    """Whether several processes may train a method together."""
    return bool(getattr(method, "sums_over_processes", False))


MethodFactory = Callable[[MethodConfig, nn.Module, Context], Method]
"""Makes a method over a model, which it may adapt in place; what an entry point names."""
