"""Sequential LoRA: one low-rank branch trained on, task after task.

On a stream whose tasks are joined into one it is the upper bound ``joint``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch import LoRALinear, TaskRecord
from training.config import MethodConfig
from training.methods.base import Context
from training.methods.branches import FoldedLayers, freeze, kaiming
from training.methods.options import NoOptions, read_options
from training.methods.steps import Stepper, look_ahead

_BRANCH = "lora"


class SequentialLoRA(Stepper):
    """The baseline without any protection against forgetting.

    A starts Kaiming-uniform and B at zero, both are trained on every task, the weight of the
    branch is 1 and it is never dropped.
    """

    saves_open_task = True
    sums_over_processes = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        read_options(config, NoOptions)
        freeze(model, config.target, config.rank)
        self.folded = FoldedLayers(model, config.target)
        self.radius = look_ahead(config, default=False)
        self.reduce = context.reduce
        generator = torch.Generator().manual_seed(context.seed)
        for layer in self.folded.layers.values():
            layer.add_branch(_BRANCH, kaiming(config.rank, layer, generator), train_down=True)
        self.folded.fold()

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Take the branch out of the weights again."""
        del batches
        self.folded.open()

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        return self.folded.parameters([_BRANCH])

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Fold the branch into the weights until the next task."""
        del batches
        record = TaskRecord.of(self.folded.layers, {}, {}, {}, {})
        self.folded.fold()
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """The branch and the weights without it, by layer."""
        return self.folded.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a branch and the weights without it."""

        def add(layer: LoRALinear, branch: str, down: Tensor, up: Tensor) -> None:
            layer.add_branch(branch, down, up=up, train_down=True)

        self.folded.load_state_dict(state, add)
