"""O-LoRA: a new branch for every task, pushed to be orthogonal to the old ones.

Wang et al., "Orthogonal Subspace Learning for Language Model Continual Learning",
arXiv:2310.14152. It was written for language models; the port to vision transformers is ours.
"""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from training.components import not_negative, positive
from training.methods.branches import MergedBranches, kaiming

if TYPE_CHECKING:
    from torch import Tensor

    from backends.torch import RowsLoss, TaskRecord


class OLoRA(MergedBranches):
    """O-LoRA (arXiv:2310.14152): a penalty keeps the branch of a task orthogonal to the old ones.

    A and B of the task are trained; old branches are merged, but their A is kept.

    Parameters
    ----------
    penalty
        Weight λ₁ of the overlap of new and old down-projections.
    alpha
        Scale the branch by alpha / rank; by 1 if not given.
    **settings
        The options of BranchMethod.
    """

    trains_down = True

    def __init__(
        self, *, penalty: float = 0.5, alpha: float | None = None, **settings: Any
    ) -> None:
        super().__init__(**settings)
        not_negative("penalty", penalty)
        if alpha is not None:
            positive("alpha", alpha)
        self.penalty_weight = penalty
        self.scale = 1.0 if alpha is None else alpha / self.rank
        self.old: dict[str, Tensor] = {}  # rows of all past A, by part and layer

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Start a new branch."""
        del batches
        generator = self.generator(self.tasks)
        self.add_branches(lambda _, layer: kaiming(self.rank, layer, generator))

    def penalty(self) -> "Tensor":
        """λ₁ times the overlap with the old branches, averaged over the branches."""
        import torch

        overlaps = [
            overlap(layer.branch(part).down, self.old[f"{part}/{name}"])
            for name, layer in self.layers.items()
            for part in layer.branches
        ]
        return self.penalty_weight * torch.stack(overlaps).mean()

    def objective(self, loss: "RowsLoss") -> "RowsLoss":
        """The loss plus the penalty, from the second task on."""
        if not self.old:
            return loss
        # Losses are summed over the processes, but the penalty must count once.
        share = 1 / self.context.processes
        return lambda rows: loss(rows) + share * self.penalty()

    def end_task(self, batches: Iterable[Any]) -> "TaskRecord":
        """Merge the branch permanently and keep its down-projection."""
        import torch

        del batches
        record = self.merge()
        for name, branches in record.downs.items():
            for part, down in branches.items():
                key = f"{part}/{name}"
                past = self.old.get(key, down[:0])
                self.old[key] = torch.cat([past, down])
        return record

    def state_dict(self) -> "dict[str, Tensor]":
        """The down-projections of all past tasks, and the branches of an open one."""
        return {f"old/{key}": rows for key, rows in self.old.items()} | super().state_dict()

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load the past down-projections, and the branches of an open task."""
        self.old = self.carried(state, "old")
        super().load_state_dict(state)


def overlap(new: "Tensor", old: "Tensor") -> "Tensor":
    """Mean over the rows of ``new`` (r, D) of the sum of |cosine| to all rows of ``old`` (R, D).

    The published penalty is the plain sum of |A_old A_newᵀ| over all layers. It grows with the
    rank, the width and the depth, and shrinks with A. Normalised per direction and between unit
    vectors, one λ₁ serves models of all sizes.

    Examples
    --------
    >>> import torch
    >>> eye = torch.eye(4)
    >>> float(overlap(eye[:2], eye[2:])), float(overlap(eye[:2], eye[:2]))
    (0.0, 1.0)
    """
    from torch.nn import functional

    new, old = functional.normalize(new, dim=1), functional.normalize(old, dim=1)
    return (new @ old.mT).abs().sum() / len(new)
