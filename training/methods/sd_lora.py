"""SD-LoRA: keeps the directions of old updates and relearns their magnitudes on every task.

Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
arXiv:2501.13198.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from training.components import check
from training.methods.branches import FoldedBranches, kaiming, output_rows

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import LoRALinear, TaskRecord


class SDLoRA(FoldedBranches):
    r"""SD-LoRA (arXiv:2501.13198): keeps the directions of old updates, relearns their magnitudes.

    The update of task t is :math:`\sum_{i<t} α_i B_i A_i / (\|B_i\| \|A_i\|) + α_t B_t A_t`.
    A and B of the task and all α are trained, each α shared by all layers; the normalised
    directions of past tasks stay as they are, and the rank grows with the tasks.

    Parameters
    ----------
    start
        Magnitude α of every branch at the start of a task.
    **settings
        The options of BranchMethod.
    """

    def __init__(self, *, start: float = 0.8, **settings: Any) -> None:
        super().__init__(**settings)
        check(math.isfinite(start), "start", start, "finite")
        self.first_magnitude = start
        self.magnitudes: list[nn.Parameter] = []  # α of the tasks

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Start a new branch and reset all magnitudes."""
        import torch

        generator = self.generator(len(self.magnitudes))
        super().begin_task(batches)
        self.magnitudes.append(_magnitude(self.layers))
        with torch.no_grad():
            for magnitude in self.magnitudes:
                magnitude.fill_(self.first_magnitude)
                magnitude.requires_grad_(True)
        for layer in self.layers.values():
            for part in output_rows(layer.out_features, self.parts):
                down = kaiming(self.rank, layer, generator)
                self.add_branch(layer, f"task{len(self.magnitudes)}_{part}", down)

    def add_branch(
        self, layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor | None" = None
    ) -> None:
        """Attach the branch of a task, with the magnitude of that task."""
        task, part = _split(branch)
        rows = output_rows(layer.out_features, self.parts)[part]
        scale = self.magnitudes[task - 1]
        layer.add_branch(branch, down, up=up, rows=rows, scale=scale, train_down=True)

    def parameters(self) -> "list[nn.Parameter]":
        """A and B of the task, and every magnitude."""
        first = next(iter(self.layers.values()))
        branches = [b for b in first.branches if _split(b)[0] == len(self.magnitudes)]
        return [*self.magnitudes, *self.factors(branches)]

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Freeze the branch, normalise its direction for later tasks, and fold.

        The evaluated model holds the branch with its trained length; from the next task on its
        direction has length one.
        """
        import torch

        with torch.no_grad():
            record = super().end_task(batches)
            for layer in self.layers.values():
                for name in layer.branches:
                    branch = layer.branch(name).requires_grad_(False)
                    if _split(name)[0] == len(self.magnitudes):
                        # A branch that learned nothing stays zero.
                        tiny = torch.finfo(branch.up.dtype).tiny
                        branch.down.div_(branch.down.norm().clamp(min=tiny))
                        branch.up.div_(branch.up.norm().clamp(min=tiny))
        return record

    def state_dict(self) -> "dict[str, Tensor]":
        """Weights without branches, the directions so far, and the number of tasks.

        The magnitudes are reset at every task, so none is carried over; the state of an open task
        contains its own.
        """
        import torch

        state = {"tasks": torch.tensor(len(self.magnitudes)), **super().state_dict()}
        if self.is_open:
            state["magnitudes"] = torch.stack([m.detach() for m in self.magnitudes])
        return state

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load a state; the model must already hold the weights that belong to it."""
        import torch

        trained = {name: layer.frozen.detach().clone() for name, layer in self.layers.items()}
        self.magnitudes = [_magnitude(self.layers) for _ in range(int(state["tasks"]))]
        super().load_state_dict(state)
        for layer in self.layers.values():
            layer.requires_grad_(False)
        with torch.no_grad():
            if not self.is_open:  # only the trained weights hold the lengths of the last task
                for name, layer in self.layers.items():
                    layer.frozen.copy_(trained[name])
                return
            for magnitude, value in zip(self.magnitudes, state["magnitudes"], strict=True):
                magnitude.copy_(value)
        for parameter in self.parameters():
            parameter.requires_grad_(True)


def _split(branch: str) -> tuple[int, str]:
    """Number of the task of a branch, from 1, and the part of the layer that it writes to."""
    task, _, part = branch.removeprefix("task").partition("_")
    return int(task), part


def _magnitude(layers: "Mapping[str, LoRALinear]") -> "nn.Parameter":
    """A trainable number with the dtype and on the device of the layers."""
    from torch import nn

    weight = next(iter(layers.values())).frozen
    return nn.Parameter(weight.new_zeros(()))
