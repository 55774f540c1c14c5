"""InfLoRA: the input directions of a task avoid what the gradients of old tasks span.

Liang and Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning",
arXiv:2404.00228.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch import (
    GradientMemory,
    LoRALinear,
    TaskRecord,
    adapt,
    collect_moments,
    restore,
)
from training.config import MethodConfig
from training.methods.base import Context
from training.methods.branches import Parts, branch_state, freeze, load_branches, output_rows
from training.methods.options import read_options
from training.methods.steps import Stepper, look_ahead


@dataclass(frozen=True)
class InfLoRAOptions:
    """Settings of InfLoRA.

    Parameters
    ----------
    lamb
        Share of the energy of a task's inputs that is protected, after the first task.
    lame
        The same at the end of the stream; in between it grows linearly.
    parts
        Parts of a fused qkv that are adapted.
    """

    lamb: float = 0.95
    lame: float = 1.0
    parts: Parts = "all"

    def __post_init__(self) -> None:
        if not 0 < self.lamb <= self.lame <= 1:
            msg = (
                f"method.options lamb and lame are {self.lamb} and {self.lame}; "
                "allowed: 0 < lamb <= lame <= 1"
            )
            raise ValueError(msg)


class InfLoRA(Stepper):
    """B of the task's branch is trained; A is solved from the task's inputs and then frozen."""

    saves_open_task = True
    sums_over_processes = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        self.options = read_options(config, InfLoRAOptions)
        freeze(model, config.target, config.rank, self.options.parts)
        self.model, self.config, self.stream_tasks = model, config, context.tasks
        self.radius = look_ahead(config, default=False)
        self.reduce = context.reduce
        self.layers: dict[str, LoRALinear] = {}
        self.memories: dict[str, GradientMemory] = {}
        self.tasks = 0

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions from the task's inputs, and put the branches in place."""
        moments = collect_moments(self.model, batches, self.config.target, reduce=self.reduce)
        self.layers = adapt(self.model, self.config.target)
        for name, layer in self.layers.items():
            memory = self.memories.get(name) or GradientMemory.empty(moments[name].mean)
            basis = memory.free_directions(moments[name].mean, self.config.rank)
            for part in output_rows(layer.out_features, self.options.parts):
                self._add(layer, part, basis.mT * self.config.down_scale)

    def parameters(self) -> list[nn.Parameter]:
        """B of the task, in every layer."""
        return [layer.branch(part).up for layer in self.layers.values() for part in layer.branches]

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Merge for good, and protect the inputs of the task, taken through the trained model."""
        record = TaskRecord.of(self.layers, {}, {}, {}, {})
        for layer in self.layers.values():
            layer.merge()
        restore(self.model, self.layers)
        self.layers = {}
        moments = collect_moments(self.model, batches, self.config.target, reduce=self.reduce)
        share = self._share()
        for name, found in moments.items():
            memory = self.memories.get(name) or GradientMemory.empty(found.mean)
            self.memories[name] = memory.updated(found.mean, share)
        self.tasks += 1
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """The memory of every layer (a basis, and whether it is what is kept or what is free).

        In an open task also its branches.
        """
        state = {"tasks": torch.tensor(self.tasks)}
        for name, memory in self.memories.items():
            state[f"basis/{name}"] = memory.basis
            state[f"free/{name}"] = torch.tensor(memory.free)
        return state | branch_state(self.layers)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the memories, and the branches of an open task."""
        device = next(self.model.parameters()).device
        self.tasks = int(state["tasks"])
        self.memories = {
            name.removeprefix("basis/"): GradientMemory(
                basis.to(device, copy=True), bool(state[name.replace("basis/", "free/", 1)])
            )
            for name, basis in state.items()
            if name.startswith("basis/")
        }
        if any(key.startswith("down/") for key in state):
            self.layers = adapt(self.model, self.config.target)
            load_branches(self.layers, state, self._add)

    def _add(self, layer: LoRALinear, part: str, down: Tensor, up: Tensor | None = None) -> None:
        rows = output_rows(layer.out_features, self.options.parts)[part]
        layer.add_branch(part, down, up=up, rows=rows)

    def _share(self) -> float:
        progress = self.tasks / self.stream_tasks
        return (self.options.lame - self.options.lamb) * progress + self.options.lamb
