"""LoDA and its ablations."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import AlignedStep, LoDA, LoDASettings, RowsLoss, TaskRecord, plain_step
from training.config import MethodConfig


class LoDAMethod:
    """LoDA (arXiv:2603.00191); the settings of ``method`` switch its parts off one by one."""

    def __init__(self, config: MethodConfig, model: nn.Module, seed: int) -> None:
        del seed
        model.requires_grad_(False)
        settings = LoDASettings(
            target=config.target,
            rank=config.rank,
            general_weight=config.general_weight,
            isolated_weight=config.isolated_weight,
            down_scale=config.down_scale,
            branches=config.branches,
            isolated=config.isolated,
            ridge=config.ridge,
            recalibration=config.recalibration,
            gamma=config.gamma,
            history=config.history,
        )
        self.loda = LoDA(model, settings)
        self.radius = config.radius if config.gao else None

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions of the branches."""
        self.loda.begin_task(batches)

    def parameters(self) -> list[nn.Parameter]:
        """The tensors of the branches."""
        return self.loda.lora_parameters()

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """A gradient-aligned step, or a plain one with ``method.gao`` off."""
        if self.radius is None:
            return plain_step(loss, labels, optimizer, backward=backward)
        return self.loda.step(
            loss, labels, optimizer, radius=self.radius, generator=generator, backward=backward
        )

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Recalibrate and merge."""
        return self.loda.end_task(batches)

    def state_dict(self) -> dict[str, Tensor]:
        """The history of second moments."""
        return self.loda.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the history."""
        self.loda.load_state_dict(state)
