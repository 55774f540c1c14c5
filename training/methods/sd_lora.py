"""SD-LoRA: directions of old updates are kept, their magnitudes are learned anew on every task.

Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
arXiv:2501.13198.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from training.components import check
from training.methods.base import Context
from training.methods.branches import BranchMethod, FoldedLayers, kaiming, output_rows
from training.seeds import derive

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import LoRALinear, TaskRecord


class SDLoRA(BranchMethod):
    r"""The update of task t is :math:`\sum_{i<t} α_i B_i A_i / (\|B_i\| \|A_i\|) + α_t B_t A_t`.

    A and B of the task and all α are trained, each α shared by all layers; the normalised
    directions of past tasks stay as they are, and the rank grows with the tasks.

    Parameters
    ----------
    start
        α of every branch at the start of a task.
    **settings
        The options of BranchMethod.
    """

    def __init__(self, *, start: float = 0.8, **settings: Any) -> None:
        super().__init__(**settings)
        check(math.isfinite(start), "start", start, "finite")
        self.first_magnitude = start

    def start(self, model: "nn.Module", context: Context) -> None:
        """Attach to a model."""
        super().start(model, context)
        self.folded = FoldedLayers(model, self.target)
        self.magnitudes: list[nn.Parameter] = []

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Start a new branch, and all magnitudes again."""
        import torch

        del batches
        seed = derive(self.context.seed, len(self.magnitudes), "method")
        generator = torch.Generator().manual_seed(seed)
        self.folded.open()
        layers = self.folded.layers
        self.magnitudes.append(_magnitude(layers))
        with torch.no_grad():
            for magnitude in self.magnitudes:
                magnitude.fill_(self.first_magnitude)
                magnitude.requires_grad_(True)
        for layer in layers.values():
            for part, rows in output_rows(layer.out_features, self.parts).items():
                down = kaiming(self.rank, layer, generator)
                name, scale = f"task{len(self.magnitudes)}_{part}", self.magnitudes[-1]
                layer.add_branch(name, down, rows=rows, scale=scale, train_down=True)

    def parameters(self) -> "list[nn.Parameter]":
        """A and B of the task, and every magnitude."""
        first = next(iter(self.folded.layers.values()))
        branches = [b for b in first.branches if _split(b)[0] == len(self.magnitudes)]
        return [*self.magnitudes, *self.folded.parameters(branches)]

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Freeze what was learned, normalise the direction for the tasks to come, and fold.

        The model that is evaluated holds the branch at the length that it was trained to; from
        the next task on its direction has length one.
        """
        import torch

        del batches
        with torch.no_grad():
            record = self.folded.fold()
            for layer in self.folded.layers.values():
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

        The magnitudes start again with every task, so none is carried over; those of an open task
        are in its state.
        """
        import torch

        state = {"tasks": torch.tensor(len(self.magnitudes)), **self.folded.state_dict()}
        if self.folded.is_open:
            state["magnitudes"] = torch.stack([m.detach() for m in self.magnitudes])
        return state

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Take over a state; the model holds the weights of that time already."""
        import torch

        layers = self.folded.layers
        folded = {name: layer.base.weight.detach().clone() for name, layer in layers.items()}
        self.magnitudes = [_magnitude(layers) for _ in range(int(state["tasks"]))]

        def add(layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor") -> None:
            task, part = _split(branch)
            rows, scale = (
                output_rows(layer.out_features, self.parts)[part],
                self.magnitudes[task - 1],
            )
            layer.add_branch(branch, down, up=up, rows=rows, scale=scale).requires_grad_(False)

        self.folded.load_state_dict(state, add)
        if self.folded.is_open:
            for parameter in self.parameters():
                parameter.requires_grad_(True)
        with torch.no_grad():
            if self.folded.is_open:
                for magnitude, value in zip(self.magnitudes, state["magnitudes"], strict=True):
                    magnitude.copy_(value)
            else:  # the lengths of the last task are in the folded weights alone
                for name, layer in layers.items():
                    layer.base.weight.copy_(folded[name])


def _split(branch: str) -> tuple[int, str]:
    """Number of the task of a branch, from 1, and the part of the layer that it writes to."""
    task, _, part = branch.removeprefix("task").partition("_")
    return int(task), part


def _magnitude(layers: "Mapping[str, LoRALinear]") -> "nn.Parameter":
    """A number to train, of the type and device of the layers."""
    from torch import nn

    weight = next(iter(layers.values())).base.weight
    return nn.Parameter(weight.new_zeros(()))
