"""Sequential LoRA: one low-rank branch trained on, task after task."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import (
    AlignedStep,
    LoRALinear,
    RowsLoss,
    TaskRecord,
    adapt,
    attach,
    check_rank,
    find_layers,
    plain_step,
    restore,
)
from training.config import MethodConfig

_BRANCH = "lora"


class SequentialLoRA:
    """The baseline without any protection against forgetting.

    A starts Kaiming-uniform and B at zero, both are trained on every task, the weight of the
    branch is 1 and it is never dropped. Between tasks it is folded into the model, so that the
    model can be saved; the next task starts from the exact unmerged state.
    """

    def __init__(self, config: MethodConfig, model: nn.Module, seed: int) -> None:
        model.requires_grad_(False)
        check_rank(find_layers(model, config.target), config.rank)
        self.model = model
        self.layers: dict[str, LoRALinear] = adapt(model, config.target)
        generator = torch.Generator().manual_seed(seed)
        self.weights = {
            name: layer.base.weight.detach().clone() for name, layer in self.layers.items()
        }
        for layer in self.layers.values():
            down = torch.empty(config.rank, layer.in_features)
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            layer.add_branch(_BRANCH, down, train_down=True)
        self._fold()

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Take the branch out of the weights again."""
        del batches
        attach(self.model, self.layers)
        for layer in self.layers.values():
            layer.unmerge()

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every layer."""
        branches = [layer.branch(_BRANCH) for layer in self.layers.values()]
        return [p for branch in branches for p in (branch.down, branch.up)]

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """One plain step."""
        del generator
        return plain_step(loss, labels, optimizer, backward=backward)

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Fold the branch into the weights until the next task."""
        del batches
        record = TaskRecord.of(self.layers, {}, {}, {}, {})
        self._fold()
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """The branch and the weights without it, by layer."""
        state: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            state[f"weight/{name}"] = self.weights[name]
            state[f"down/{name}"] = layer.branch(_BRANCH).down.detach()
            state[f"up/{name}"] = layer.branch(_BRANCH).up.detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a branch and the weights without it."""
        for name, layer in self.layers.items():
            layer.unmerge()
            self.weights[name].copy_(state[f"weight/{name}"])
            layer.base.weight.copy_(self.weights[name])
            layer.branch(_BRANCH).down.copy_(state[f"down/{name}"])
            layer.branch(_BRANCH).up.copy_(state[f"up/{name}"])
            layer.merge()

    def _fold(self) -> None:
        for layer in self.layers.values():
            layer.merge()
        restore(self.model, self.layers)
