"""O-LoRA: a new branch for every task, pushed to be orthogonal to the old ones.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning",
arXiv:2310.14152. It was written for language models; the port to vision transformers is ours.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from backends.torch import AlignedStep, LoRALinear, RowsLoss, TaskRecord, adapt, restore
from training.config import MethodConfig
from training.methods.base import Context
from training.methods.branches import (
    Parts,
    branch_state,
    freeze,
    kaiming,
    load_branches,
    output_rows,
)
from training.methods.options import read_options
from training.methods.steps import Stepper, look_ahead
from training.seeds import derive


@dataclass(frozen=True)
class OLoRAOptions:
    """Settings of O-LoRA.

    Parameters
    ----------
    penalty
        λ₁, weight of the overlap of new and old down-projections.
    alpha
        The branch is scaled by alpha / rank; 1 where it is None.
    parts
        Parts of a fused qkv that are adapted.
    """

    penalty: float = 0.5
    alpha: float | None = None
    parts: Parts = "all"

    def __post_init__(self) -> None:
        if not self.penalty >= 0:
            msg = f"method.options penalty is {self.penalty}; allowed: at least 0"
            raise ValueError(msg)
        if self.alpha is not None and not self.alpha > 0:
            msg = f"method.options alpha is {self.alpha}; allowed: above 0"
            raise ValueError(msg)


def overlap(new: Tensor, old: Tensor) -> Tensor:
    """Mean over the rows of ``new`` (r, D) of the sum of |cosine| to all rows of ``old`` (R, D).

    The published penalty is the plain sum of |A_old A_newᵀ| over all layers. It grows with the
    rank, the width and the depth, and shrinks with A; per direction and between unit vectors one
    λ₁ serves models of all sizes.

    Examples
    --------
    >>> eye = torch.eye(4)
    >>> float(overlap(eye[:2], eye[2:])), float(overlap(eye[:2], eye[:2]))
    (0.0, 1.0)
    """
    new, old = functional.normalize(new, dim=1), functional.normalize(old, dim=1)
    return (new @ old.mT).abs().sum() / len(new)


class OLoRA(Stepper):
    """A and B of the task are trained with a penalty; the old ones are merged, their A kept."""

    saves_open_task = True
    sums_over_processes = True

    def __init__(self, config: MethodConfig, model: nn.Module, context: Context) -> None:
        self.options = read_options(config, OLoRAOptions)
        freeze(model, config.target, config.rank, self.options.parts)
        self.model, self.config, self.context = model, config, context
        self.radius = look_ahead(config, default=False)
        self.reduce = context.reduce
        self.layers: dict[str, LoRALinear] = {}
        self.old: dict[str, Tensor] = {}  # rows of all past A, by layer and part
        self.tasks = 0

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Start a new branch."""
        del batches
        # Every task draws anew, and a run that goes on draws as the uninterrupted one.
        generator = torch.Generator().manual_seed(derive(self.context.seed, self.tasks, "method"))
        self.layers = adapt(self.model, self.config.target)
        for layer in self.layers.values():
            for part in output_rows(layer.out_features, self.options.parts):
                self._add(layer, part, kaiming(self.config.rank, layer, generator))

    def parameters(self) -> list[nn.Parameter]:
        """A and B of the task."""
        return [p for layer in self.layers.values() for p in layer.branches.parameters()]

    def penalty(self) -> Tensor:
        """λ₁ times the overlap with the old branches, averaged over the branches."""
        found = [
            overlap(layer.branch(part).down, self.old[f"{part}/{name}"])
            for name, layer in self.layers.items()
            for part in layer.branches
        ]
        return self.options.penalty * torch.stack(found).mean()

    def step(
        self,
        loss: RowsLoss,
        labels: Tensor,
        optimizer: Optimizer,
        *,
        generator: torch.Generator,
        backward: Callable[[Tensor], None],
    ) -> AlignedStep:
        """One step on the loss with the penalty; from the second task on."""
        # Losses are summed over the processes, and the penalty counts once.
        share = 1 / self.context.processes
        total = (lambda rows: loss(rows) + share * self.penalty()) if self.old else loss
        return super().step(total, labels, optimizer, generator=generator, backward=backward)

    def end_task(self, batches: Iterable[Any]) -> TaskRecord:
        """Merge the branch for good and keep its down-projection."""
        del batches
        record = TaskRecord.of(self.layers, {}, {}, {}, {})
        for layer in self.layers.values():
            layer.merge()
        for name, branches in record.downs.items():
            for part, down in branches.items():
                key = f"{part}/{name}"
                past = self.old.get(key, down[:0])
                self.old[key] = torch.cat([past, down])
        restore(self.model, self.layers)
        self.layers = {}
        self.tasks += 1
        return record

    def state_dict(self) -> dict[str, Tensor]:
        """The down-projections of all past tasks, whose rank grows; branches of an open one."""
        kept = {f"old/{key}": rows for key, rows in self.old.items()}
        return {"tasks": torch.tensor(self.tasks), **kept, **branch_state(self.layers)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over the past down-projections, and the branches of an open task."""
        device = next(self.model.parameters()).device
        self.tasks = int(state["tasks"])
        self.old = {
            key.removeprefix("old/"): rows.to(device, copy=True)
            for key, rows in state.items()
            if key.startswith("old/")
        }
        if any(key.startswith("down/") for key in state):
            self.layers = adapt(self.model, self.config.target)
            load_branches(self.layers, state, self._add)

    def _add(self, layer: LoRALinear, part: str, down: Tensor, up: Tensor | None = None) -> None:
        alpha = self.options.alpha
        scale = 1.0 if alpha is None else alpha / self.config.rank
        rows = output_rows(layer.out_features, self.options.parts)[part]
        layer.add_branch(part, down, up=up, rows=rows, scale=scale, train_down=True)
