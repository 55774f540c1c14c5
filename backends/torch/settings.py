"""Settings of LoDA over a model, checked when they are made."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from backends.torch.adapt import TIMM_QKV, Target
from loda_math import RecalibrationForm

Branches = Literal["both", "general", "isolated"]
IsolatedRule = Literal["pencil", "null"]
History = Literal["merged", "trained", "both"]
Recalibration = Literal["full", "diagonal", "direction", "scalar", "none"]


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
    isolated : {"pencil", "null"}
        Directions of the isolated branch: the rule of Theorem 2.2, or the null space of the
        history (the ablation).
    ridge : float
        α of the isolated subspace.
    recalibration : {"full", "diagonal", "direction", "scalar", "none"}
        Form of Λ; ``"none"`` merges the general branch as trained.
    gamma : float
        Weight of new knowledge in the recalibration.
    history : {"merged", "trained", "both"}
        Which passes over a task enter the history: through the merged model, through the trained
        model before merging, or both. With ``"both"`` a task counts twice, as in the published
        code (which goes with γ = 3; γ = 1.5 recalibrates alike on a history that counts once).
    """

    target: Target = TIMM_QKV
    rank: int = 32
    general_weight: float = 0.5
    isolated_weight: float = 1.0
    down_scale: float = 1 / math.sqrt(3)
    branches: Branches = "both"
    isolated: IsolatedRule = "pencil"
    ridge: float = 1e-2
    recalibration: Recalibration = "full"
    gamma: float = 1.5
    history: History = "merged"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            msg = f"rank must be an int of at least 1, got {self.rank!r}"
            raise ValueError(msg)
        for name in ("general_weight", "isolated_weight", "down_scale", "ridge", "gamma"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
                msg = f"{name} must be finite and at least 0, got {value}"
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

    def weight(self, branch: str) -> float:
        """Weight w of a branch, after the halving."""
        weight = self.general_weight if branch == "general" else self.isolated_weight
        return weight / 2 if self.branches == "both" else weight

    def names(self, first_task: bool) -> tuple[str, ...]:
        """Branches that are trained on the first task, or on a later one."""
        if first_task or self.branches == "general":
            return ("general",)
        return ("isolated",) if self.branches == "isolated" else ("general", "isolated")

    @property
    def form(self) -> RecalibrationForm | None:
        """Form of Λ for the solver, or ``None`` for no recalibration."""
        return None if self.recalibration == "none" else self.recalibration
