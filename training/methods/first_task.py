"""LoDA on the first task, then a frozen backbone: what the later tasks' adaptation is worth."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from backends.torch.settings import TIMM_QKV, LoDASettings, Target
from training.methods.loda import Directions, LoDAMethod

if TYPE_CHECKING:
    from torch import Tensor, nn

    from backends.torch import TaskRecord


class FirstTask(LoDAMethod):
    """LoDA on the first task; after it the backbone is frozen and only the heads are trained.

    The control of continual adaptation: a backbone that the first task has fitted to the images of
    a stream may already be all that the later tasks need.

    Parameters
    ----------
    gao
        Take gradient-aligned steps on the first task; false takes plain ones.
    radius
        Largest length of the look-ahead of a gradient-aligned step.
    directions
        solved (from the second moments), or random.
    rank
        Number of directions of the branch, r.
    target
        One or more patterns for the names of the linear layers to adapt.
    general_weight
        Weight w_G; half of it is used, as LoDA does with two branches.
    down_scale
        Fixed factor c of the down-projections A = c·Uᵀ.
    """

    keeps = ("branches",)

    # LoDA's other settings concern later tasks only and are not offered here.
    def __init__(
        self,
        *,
        gao: bool = True,
        radius: float = 0.3,
        directions: Directions = "solved",
        rank: int = 16,
        target: Target = TIMM_QKV,
        general_weight: float = LoDASettings.general_weight,
        down_scale: float = LoDASettings.down_scale,
    ) -> None:
        super().__init__(
            gao=gao,
            radius=radius,
            directions=directions,
            rank=rank,
            target=target,
            general_weight=general_weight,
            down_scale=down_scale,
            heldout=False,
        )
        self.adapted = False

    def begin_task(self, batches: Iterable[Any]) -> None:
        """Solve for the directions of the branch on the first task."""
        if not self.adapted:
            super().begin_task(batches)

    def parameters(self) -> "list[nn.Parameter]":
        """The tensors of the branch, on the first task."""
        return [] if self.adapted else super().parameters()

    def end_task(  # type: ignore[override]  # as Method: None if nothing was merged
        self, batches: Iterable[Any]
    ) -> "TaskRecord | None":
        """Merge the branch at the end of the first task."""
        if self.adapted:
            return None
        record = super().end_task(batches)
        self.adapted = True
        return record

    def state_dict(self) -> "dict[str, Tensor]":
        """The branch of an open first task; no history is needed afterwards."""
        import torch

        own = {} if self.adapted else super().state_dict()
        return {**own, "adapted": torch.tensor(self.adapted)}

    def load_state_dict(self, state: "Mapping[str, Tensor]") -> None:
        """Load a state, with the branch of an open first task."""
        self.adapted = bool(state["adapted"])
        if not self.adapted:
            super().load_state_dict({k: v for k, v in state.items() if k != "adapted"})
