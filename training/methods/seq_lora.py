"""Sequential LoRA, one branch that every task trains further, and joint training."""

from typing import TYPE_CHECKING, Any

from training.methods.base import Context
from training.methods.branches import FoldedBranches, kaiming

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import LoRALinear

_BRANCH = "lora"


class SequentialLoRA(FoldedBranches):
    """One branch for all tasks, without any protection against forgetting.

    A starts Kaiming-uniform and B at zero. Both are trained on every task. The branch has weight 1
    and is never removed.

    Parameters
    ----------
    **settings
        The options of BranchMethod except parts.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(parts="all", **settings)

    def start(self, model: "nn.Module", context: Context) -> None:
        """Add the branch to a model."""
        import torch

        super().start(model, context)
        generator = torch.Generator().manual_seed(context.seed)
        for layer in self.layers.values():
            self.add_branch(layer, _BRANCH, kaiming(self.rank, layer, generator))
        self.merge()

    def add_branch(
        self, layer: "LoRALinear", branch: str, down: "Tensor", up: "Tensor | None" = None
    ) -> None:
        """Attach the branch."""
        layer.add_branch(branch, down, up=up, train_down=True)

    def parameters(self) -> "list[nn.Parameter]":
        """A and B of every layer."""
        return self.factors([_BRANCH])


class Joint(SequentialLoRA):
    """Sequential LoRA on all tasks at once, meant as an upper bound."""

    joins_tasks = True
