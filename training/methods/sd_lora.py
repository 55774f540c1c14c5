"""SD-LoRA: directions of old updates are kept, their magnitudes are learned anew on every task.

Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning",
arXiv:2501.13198.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch import LoRALinear, TaskRecord
from training.config import MethodConfig
from training.methods.base import Context
from training.methods.branches import (
    FoldedLayers,
    Parts,
    freeze,
    kaiming,
    output_rows,
)
from training.methods.options import read_options
from training.methods.steps import Stepper, look_ahead
from training.seeds import derive


@dataclass(frozen=True)
class SDLoRAOptions:
    """Settings of SD-LoRA.

    Parameters
    ----------
    start
        α of every branch at the start of a task.
    parts
        Parts of a fused qkv that are adapted.
    """

    start: float = 0.8
    parts: Parts = "all"


class SDLoRA(Stepper):
    r"""The update of task t is :math:`\sum_{i<t} α_i B_i A_i / (\|B_i\| \|A_i\|) + α_t B_t A_t`.

    A and B of the task and all α are trained, each α shared by all layers; the normalised
    directions of past tasks stay as they are, and the rank grows with the tasks.
    """

    saves_open_task = True
    sums_over_processes = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        self.options = read_options(config, SDLoRAOptions)
        freeze(model, config.target, config.rank, self.options.parts)
        self.config, self.context = config, context
        self.radius = look_ahead(config, default=False)
        self.reduce = context.reduce
        self.folded = FoldedLayers(model, config.target)
        self.magnitudes: list[nn.Parameter] = []

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Start a new branch, and all magnitudes again."""
        del batches
        task = len(self.magnitudes)
        generator = torch.Generator().manual_seed(derive(self.context.seed, task, "method"))
        self.folded.open()
        first = next(iter(self.folded.layers.values())).base.weight
        self.magnitudes.append(nn.Parameter(first.new_zeros(())))
        with torch.no_grad():
            for magnitude in self.magnitudes:
                magnitude.fill_(self.options.start)
                magnitude.requires_grad_(True)
        for layer in self.folded.layers.values():
            for part, rows in output_rows(layer.out_features, self.options.parts).items():
                down = kaiming(self.config.rank, layer, generator)
                scale = self.magnitudes[task]
                layer.add_branch(_name(task, part), down, rows=rows, scale=scale, train_down=True)

    def parameters(self) -> list[nn.Parameter]:
        """A and B of the task, and every magnitude."""
        current = len(self.magnitudes) - 1
        branches = [b for b in self._branches() if _task(b) == current]
        return [*self.magnitudes, *self.folded.parameters(branches)]

    @torch.no_grad()
    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Freeze what was learned, normalise the direction for the tasks to come, and fold.

        The model that is evaluated holds the branch at the length that it was trained to; from
        the next task on its direction has length one.
        """
        del batches
        record = TaskRecord.of(self.folded.layers, {}, {}, {}, {})
        self.folded.fold()
        current = len(self.magnitudes) - 1
        for layer in self.folded.layers.values():
            for name in layer.branches:
                branch = layer.branch(name)
                if _task(name) == current:
                    # A branch that learned nothing stays zero.
                    tiny = torch.finfo(branch.up.dtype).tiny
                    branch.down.div_(branch.down.norm().clamp(min=tiny))
                    branch.up.div_(branch.up.norm().clamp(min=tiny))
                branch.requires_grad_(False)
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """Weights without branches, the directions so far, and the number of tasks.

        The magnitudes start again with every task, so none is carried over; those of an open task
        are in its state.
        """
        state = {"tasks": torch.tensor(len(self.magnitudes)), **self.folded.state_dict()}
        if self.folded.is_open:
            state["magnitudes"] = torch.stack([m.detach() for m in self.magnitudes])
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state; the model holds the weights of that time already."""
        tasks = int(state["tasks"])
        layers = self.folded.layers
        folded = {name: layer.base.weight.detach().clone() for name, layer in layers.items()}
        like = next(iter(folded.values()))
        self.magnitudes = [nn.Parameter(like.new_zeros(())) for _ in range(tasks)]

        def add(layer: LoRALinear, branch: str, down: Tensor, up: Tensor) -> None:
            task, _, part = branch.removeprefix("task").partition("_")
            rows = output_rows(layer.out_features, self.options.parts)[part]
            scale = self.magnitudes[int(task)]
            layer.add_branch(branch, down, up=up, rows=rows, scale=scale).requires_grad_(False)

        self.folded.load_state_dict(state, add)
        if self.folded.is_open:
            self._open_again(state["magnitudes"])
            return
        with torch.no_grad():
            # The lengths of the last task are in the folded weights alone.
            for name, layer in layers.items():
                layer.base.weight.copy_(folded[name])

    @torch.no_grad()
    def _open_again(self, values: Tensor) -> None:
        for magnitude, value in zip(self.magnitudes, values, strict=True):
            magnitude.copy_(value)
            magnitude.requires_grad_(True)
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def _branches(self) -> list[str]:
        return list(next(iter(self.folded.layers.values())).branches)


def _name(task: int, part: str) -> str:
    return f"task{task}_{part}"


def _task(branch: str) -> int:
    return int(branch.removeprefix("task").partition("_")[0])
