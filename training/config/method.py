"""The section ``method`` of an experiment; the names that it may hold are in `methods`."""

from dataclasses import dataclass, field
from typing import Any, Literal

from training.config._checks import at_least, check, not_negative, positive
from training.config.methods import method_names


@dataclass
class MethodConfig:
    """The continual-learning method and its settings (LoDA, arXiv:2603.00191).

    Parameters
    ----------
    name
        loda; seq_lora (one plain low-rank branch, trained on); joint (the same on all tasks at
        once, the upper bound); frozen; ncm and ranpac_frozen (frozen, with nearest class means and
        ridge regression in place of training); null_lora, o_lora, inflora, sd_lora; or a method
        that another package adds.
    rank
        Rank of each branch.
    general_weight
        Weight of the general branch; halved when both branches are used.
    isolated_weight
        Weight of the isolated branch; halved when both branches are used.
    down_scale
        Factor c of the down-projections A = c U'.
    ridge
        Regularisation of the isolated subspace, relative to the mean energy of a direction.
    energy_floor
        With isolated trace_ratio: share (0 to 1) of the new-task energy within reach that the
        directions must carry; no floor when not given.
    branches
        both, general or isolated.
    isolated
        Directions of the isolated branch: pencil (generalised eigenvectors), trace_ratio (largest
        ratio of new-task to old-task energy) or null (the null space of the old tasks).
    gao
        Use gradient-aligned steps, or plain ones; when not given, as the method is published.
    radius
        Largest length of the look-ahead of a gradient-aligned step.
    recalibration
        Form of the factor of the general branch at the merge; none merges the branch as trained.
    joint
        Recalibrate both branches together rather than the general one alone.
    gamma
        Weight of the new task against the old ones in the recalibration.
    history_weight
        Weight of the old tasks in the recalibration, a number (as gamma divided by it), or mean:
        the old tasks together weigh as much as one, however many there are.
    history
        The model through which a task's moment enters the history: merged, trained (before the
        merge), or both, which counts a task twice.
    history_decay
        Factor (0 to 1) of the history before a finished task is added; 1 keeps all tasks alike.
    heldout
        Log what the chosen directions keep on images that they were not chosen on.
    target
        Pattern of the names of the linear layers to adapt.
    options
        Settings that one method alone has, such as {penalty: 0.5} of o_lora.
    """

    name: str = "loda"
    rank: int = 16
    general_weight: float = 0.5
    isolated_weight: float = 1.0
    down_scale: float = 3**-0.5
    ridge: float = 1e-2
    energy_floor: float | None = None
    branches: Literal["both", "general", "isolated"] = "both"
    isolated: Literal["pencil", "trace_ratio", "null"] = "pencil"
    gao: bool | None = None
    radius: float = 0.3
    recalibration: Literal["full", "diagonal", "box", "direction", "scalar", "none"] = "full"
    joint: bool = False
    gamma: float = 1.5
    history_weight: float | Literal["mean"] = 1.0
    history: Literal["merged", "trained", "both"] = "merged"
    history_decay: float = 1.0
    heldout: bool = True
    target: str = "*.attn.qkv"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = method_names()
        check(self.name in names, "method.name", self.name, ", ".join(names))
        at_least("method.rank", self.rank, 1)
        positive("method.down_scale", self.down_scale)
        for key in ("general_weight", "isolated_weight", "ridge", "radius", "gamma"):
            not_negative(f"method.{key}", getattr(self, key))
        for key in ("energy_floor", "history_decay"):
            value = getattr(self, key)
            check(value is None or 0 <= value <= 1, f"method.{key}", value, "from 0 to 1")
        if self.history_weight != "mean":
            not_negative("method.history_weight", self.history_weight)
        fits = self.energy_floor is None or self.isolated == "trace_ratio"
        check(
            fits, "method.energy_floor", self.energy_floor, "left out without isolated trace_ratio"
        )
        fits = not self.joint or self.recalibration != "none"
        check(fits, "method.joint", self.joint, "false with recalibration none")
        check(bool(self.target.strip()), "method.target", self.target, "a pattern of module names")
