"""Sequential LoRA: one low-rank branch trained on, task after task; and its upper bound."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from training.methods.base import Context
from training.methods.branches import BranchMethod, FoldedLayers, kaiming

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import LoRALinear, TaskRecord

_BRANCH = "lora"


class SequentialLoRA(BranchMethod):
    """One branch for all tasks, without any protection against forgetting.

    A starts Kaiming-uniform and B at zero, both are trained on every task, the weight of the
    branch is 1 and it is never dropped.

    Parameters
    ----------
    **settings
        The options of BranchMethod, parts aside.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(parts="all", **settings)

    def start(self, model: "nn.Module", context: Context) -> None:
        """Add the branch to a model."""
        import torch

        super().start(model, context)
        self.folded = FoldedLayers(model, self.target)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in self.folded.layers.values():
            layer.add_branch(_BRANCH, kaiming(self.rank, layer, generator), train_down=True)
        self.folded.fold()

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Take the branch out of the weights again."""
        del batches
        self.folded.open()

    def parameters(self) -> "list[nn.Parameter]":
        """A and B of every layer."""
        return self.folded.parameters([_BRANCH])

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Fold the branch into the weights until the next task."""
        del batches
        return self.folded.fold()

    def state_dict(self) -> "dict[str, Tensor]":
        """The branch and the weights without it, by layer."""
        return self.folded.state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Take over a branch and the weights without it."""

        def add(layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor") -> None:
            layer.add_branch(branch, down, up=up, train_down=True)

        self.folded.load_state_dict(state, add)


class Joint(SequentialLoRA):
    """Sequential LoRA on all tasks at once: the upper bound."""

    joins_tasks = True
