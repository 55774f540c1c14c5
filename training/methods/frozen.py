"""The frozen backbone: only the heads are trained. What every adaptation has to beat.

With their own read-outs and no training at all it is also ``ncm`` (nearest class mean, SimpleCIL,
arXiv:2303.07338) and ``ranpac_frozen`` (ridge regression on random features, arXiv:2307.02251,
without its adapter of the first task).
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from training.config import MethodConfig
from training.methods.base import Context
from training.methods.options import NoOptions, read_options
from training.methods.steps import Stepper


class Frozen(Stepper):
    """No adaptation at all: plain steps of the head."""

    saves_open_task = True
    sums_over_processes = True
    radius = None  # no tensor of the backbone that a look-ahead could move

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        self.reduce = context.reduce
        read_options(config, NoOptions)
        model.requires_grad_(False)

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Nothing to prepare."""

    def end_task(self, batches: Iterable[Any]) -> None:
        """Nothing to fold in."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing is carried over."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""
