"""Settings of LoDA over a model, checked when they are made."""

import math
import operator
from dataclasses import dataclass
from typing import Literal, get_args

from backends.torch.adapt import TIMM_QKV, Target
from loda_math import RecalibrationForm

Branches = Literal["both", "general", "isolated"]
IsolatedRule = Literal["pencil", "trace_ratio", "null"]
History = Literal["merged", "trained", "both"]
Recalibration = Literal["full", "diagonal", "box", "direction", "scalar", "none"]


@dataclass(frozen=True)
class LoDASettings:
    """Everything about LoDA that is not data.

    Parameters
    ----------
    target : str or tuple of str
        Patterns over module names: the linear layers to adapt.
    rank : int
        Directions a branch, r.
    general_weight, isolated_weight : float
        Weights of the branches as configured; both are halved when both branches are configured,
        on the first task too.
    down_scale : float
        Fixed scale c of the down-projections.
    branches : {"both", "general", "isolated"}
        Branches from the second task on. The first task always trains the general branch alone,
        its down-projection included.
    isolated : {"pencil", "trace_ratio", "null"}
        Directions of the isolated branch: the rule of Theorem 2.2; the ones with the largest
        ratio of new-task to old-task energy; or the null space of the history.
    ridge : float
        α of the isolated subspace.
    energy_floor : float, optional
        For ``"trace_ratio"``: share, from 0 to 1, of the new-task energy that ``rank`` directions
        can carry and that the chosen ones must. Without one the largest ratio alone decides.
    recalibration : {"full", "diagonal", "box", "direction", "scalar", "none"}
        Form of Λ; ``"none"`` merges the general branch as trained.
    joint : bool
        Recalibrate all branches of a layer together, the isolated one too; otherwise the general
        one alone.
    gamma : float
        Weight of new knowledge in the recalibration.
    history_weight : float or "mean"
        Weight of the history in the recalibration. A number h does what γ / h does;
        ``"mean"`` takes the history as the mean over its tasks rather than as their sum, so that
        it weighs alike after any number of tasks.
    history : {"merged", "trained", "both"}
        Which passes over a task enter the history: through the merged model, through the trained
        model before merging, or both. With ``"both"`` a task counts twice, as in the published
        code (which goes with γ = 3; γ = 1.5 recalibrates alike on a history that counts once).
    history_decay : float
        β, from 0 to 1: what the history is multiplied by before a finished task is added. 1
        keeps all tasks alike; below, the history stays bounded over any number of tasks and
        remembers about (1 + β) / (1 − β) of them.
    heldout : bool
        Measure, from the second task on, what the chosen subspaces keep on the half of the images
        that they were not chosen on. It only looks on: the bases are the same with it.
    """

    target: Target = TIMM_QKV
    rank: int = 32
    general_weight: float = 0.5
    isolated_weight: float = 1.0
    down_scale: float = 3**-0.5
    branches: Branches = "both"
    isolated: IsolatedRule = "pencil"
    ridge: float = 1e-2
    energy_floor: float | None = None
    recalibration: Recalibration = "full"
    joint: bool = False
    gamma: float = 1.5
    history_weight: float | Literal["mean"] = 1.0
    history: History = "merged"
    history_decay: float = 1.0
    heldout: bool = False

    def __post_init__(self) -> None:
        integer = hasattr(self.rank, "__index__") and not isinstance(self.rank, bool)
        if not integer or operator.index(self.rank) < 1:
            msg = f"rank must be an integer of at least 1, got {self.rank!r}"
            raise ValueError(msg)
        # A NumPy integer would not go into a file of settings.
        object.__setattr__(self, "rank", operator.index(self.rank))
        for name in ("general_weight", "isolated_weight", "down_scale", "ridge", "gamma"):
            if not _is_weight(getattr(self, name)):
                msg = f"{name} must be finite and at least 0, got {getattr(self, name)}"
                raise ValueError(msg)
        if self.history_weight != "mean" and not _is_weight(self.history_weight):
            msg = f"history_weight must be 'mean' or at least 0, got {self.history_weight!r}"
            raise ValueError(msg)
        for name in ("energy_floor", "history_decay"):
            value = getattr(self, name)
            if value is not None and not (_is_weight(value) and value <= 1):
                msg = f"{name} must be a share from 0 to 1, got {value}"
                raise ValueError(msg)
        for name, kind in (
            ("branches", Branches),
            ("isolated", IsolatedRule),
            ("recalibration", Recalibration),
            ("history", History),
        ):
            if getattr(self, name) not in get_args(kind):
                msg = f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.energy_floor is not None and self.isolated != "trace_ratio":
            msg = f"energy_floor must go with isolated='trace_ratio', got {self.isolated!r}"
            raise ValueError(msg)
        if self.joint and self.recalibration == "none":
            msg = "joint must go with a form of recalibration, got recalibration='none'"
            raise ValueError(msg)

    def weight(self, branch: str) -> float:
        """Weight w of a branch, after the halving."""
        weight = self.general_weight if branch == "general" else self.isolated_weight
        return weight / 2 if self.branches == "both" else weight

    def names(self, first_task: bool) -> tuple[str, ...]:
        """Branches that are trained on the first task, or on a later one."""
        if first_task or self.branches == "general":
            return ("general",)
        return ("isolated",) if self.branches == "isolated" else ("general", "isolated")

    def form(self, first_task: bool) -> RecalibrationForm | None:
        """Form of Λ for the solver, or ``None`` where nothing is recalibrated."""
        if first_task or self.recalibration == "none":
            return None
        return self.recalibration if self.joint or self.branches != "isolated" else None

    def passes(self) -> tuple[str, ...]:
        """Passes over a task that enter the history."""
        return ("trained", "merged") if self.history == "both" else (self.history,)

    def history_mass(self, tasks: int) -> float:
        """Sum of the weights in the history after some tasks: what divides it to a mean."""
        return len(self.passes()) * sum(self.history_decay**age for age in range(tasks))


def _is_weight(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0
