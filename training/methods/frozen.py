"""The frozen backbone: only the heads are trained. What every adaptation has to beat.

With their own read-outs and no training at all it is also ``ncm`` (nearest class mean, SimpleCIL,
arXiv:2303.07338) and ``ranpac_frozen`` (ridge regression on random features, arXiv:2307.02251,
without its adapter of the first task).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from backends.torch import AlignedStep, RowsLoss, plain_step
from training.config import MethodConfig
from training.methods.base import Context
from training.methods.options import NoOptions, read_options


class Frozen:
    """No adaptation at all."""

    saves_open_task = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        del context
        read_options(config, NoOptions)
        model.requires_grad_(False)

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Nothing to prepare."""

    def parameters(self) -> list[nn.Parameter]:
        """No tensors of the backbone are trained."""
        return []

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """One plain step of the head."""
        del generator
        return plain_step(loss, labels, optimizer, backward=backward)

    def end_task(self, batches: Iterable[Any]) -> None:
        """Nothing to fold in."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is carried over."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
