"""Settings of LoDA, declared only here, command lines included; loads no torch."""

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

# In quotes below, as in readouts/readout.py: a command line must not run this block.
if TYPE_CHECKING:
    from loda_math import RecalibrationForm

Target = str | Sequence[str]
"""One or several shell-style patterns over module names, such as ``"*.attn.qkv"``."""

TIMM_QKV = "*.attn.qkv"

Branches = Literal["both", "general", "isolated"]
IsolatedRule = Literal["quotient", "trace_ratio", "null"]
RidgeScale = Literal["mean", "channels", "eigenvalues"]
HistoryPasses = Literal["merged", "trained", "both"]
Recalibration = Literal["full", "diagonal", "box", "direction", "scalar", "none"]


@dataclass(frozen=True)
class LoDASettings:
    """Everything about LoDA (arXiv:2603.00191) that is not data.

    Parameters
    ----------
    target : str or sequence of str
        Pattern, or several, of the names of the linear layers to adapt.
    rank : int
        Directions of each branch, r.
    general_weight : float
        Weight w_G of the general branch. With branches both, half of it is used, also on the first
        task.
    isolated_weight : float
        Weight w_I of the isolated branch. With branches both, half of it is used.
    down_scale : float
        Fixed factor c of the down-projections A = c·Uᵀ.
    branches : {"both", "general", "isolated"}
        Branches from the second task on. The first task trains only the general branch, together
        with its down-projection.
    isolated : {"quotient", "trace_ratio", "null"}
        Directions of the isolated branch: quotient (generalised eigenvectors, the rule of
        Theorem 2.2), trace_ratio (the largest ratio of new-task to old-task energy) or null (the
        null space of the history).
    ridge : float
        Regularisation α of the isolated directions, relative to an energy of the history.
    ridge_scale : {"mean", "channels", "eigenvalues"}
        Energy that ridge is relative to: mean (the mean energy of a direction), or a typical one,
        which a few large ones do not move, of the channels or of the eigenvalues. For backbones
        with a channel a hundred times larger than the others.
    energy_floor : float
        With isolated trace_ratio: share (0 to 1) of the new-task energy within reach of rank
        directions that the chosen ones must carry. At 0 only the ratio decides.
    recalibration : {"full", "diagonal", "box", "direction", "scalar", "none"}
        Form of the factor Λ of the general branch at the merge; none merges the branch as trained.
    joint : bool
        Recalibrate all branches of a layer together instead of only the general one.
    gamma : float
        Weight γ of the new task against the old ones in the recalibration.
    history_weight : float or "mean"
        Weight of the history in the recalibration. A number h has the effect of dividing gamma by
        h; mean uses the mean over past tasks instead of their sum, so that the history weighs the
        same after any number of tasks.
    history : {"merged", "trained", "both"}
        Model through which a task's moment enters the history: merged, trained (before the merge),
        or both, which counts a task twice, as in the published code. That code has gamma 3; on a
        history that counts a task once, gamma 1.5 gives the same recalibration.
    history_decay : float
        Factor β (0 to 1) of the history before a finished task is added. 1 weighs all tasks
        equally; below 1 the history stays bounded and remembers about (1 + β) / (1 - β) tasks.
    heldout : bool
        Measure, from the second task on, the energy ratio of the directions on held-out images:
        chosen on one half of the images, measured on the other. Does not change the directions.

    Examples
    --------
    >>> settings = LoDASettings(rank=8, branches="both")
    >>> settings.weight("general"), settings.names(first_task=True)
    (0.25, ('general',))
    """

    target: Target = TIMM_QKV
    rank: int = 32
    general_weight: float = 0.5
    isolated_weight: float = 1.0
    down_scale: float = 3**-0.5
    branches: Branches = "both"
    isolated: IsolatedRule = "quotient"
    ridge: float = 1e-2
    ridge_scale: RidgeScale = "mean"
    energy_floor: float = 0.0
    recalibration: Recalibration = "full"
    joint: bool = False
    gamma: float = 1.5
    history_weight: float | Literal["mean"] = 1.0
    history: HistoryPasses = "merged"
    history_decay: float = 1.0
    heldout: bool = False

    def __post_init__(self) -> None:
        patterns = [self.target] if isinstance(self.target, str) else list(self.target)
        if not patterns or not all(pattern.strip() for pattern in patterns):
            msg = f"target must be a pattern of module names, or several, got {self.target!r}"
            raise ValueError(msg)
        integer = hasattr(self.rank, "__index__") and not isinstance(self.rank, bool)
        if not integer or operator.index(self.rank) < 1:
            msg = f"rank must be an integer of at least 1, got {self.rank!r}"
            raise ValueError(msg)
        # A NumPy integer could not be written to a file of settings.
        object.__setattr__(self, "rank", operator.index(self.rank))
        for name in ("joint", "heldout"):
            if getattr(self, name) is not True and getattr(self, name) is not False:
                msg = f"{name} must be true or false, got {getattr(self, name)!r}"
                raise ValueError(msg)
        for name in ("general_weight", "isolated_weight", "down_scale", "ridge", "gamma"):
            if not _is_not_negative(getattr(self, name)):
                msg = f"{name} must be finite and at least 0, got {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.down_scale == 0:
            msg = "down_scale must be above 0, got 0: the branches would never change the output"
            raise ValueError(msg)
        if self.history_weight != "mean" and not _is_not_negative(self.history_weight):
            msg = f"history_weight must be 'mean' or at least 0, got {self.history_weight!r}"
            raise ValueError(msg)
        for name in ("energy_floor", "history_decay"):
            value = getattr(self, name)
            if not (_is_not_negative(value) and value <= 1):
                msg = f"{name} must be a share from 0 to 1, got {value!r}"
                raise ValueError(msg)
        for name, kind in (
            ("branches", Branches),
            ("isolated", IsolatedRule),
            ("ridge_scale", RidgeScale),
            ("recalibration", Recalibration),
            ("history", HistoryPasses),
        ):
            if getattr(self, name) not in get_args(kind):
                msg = f"{name} must be one of {get_args(kind)}, got {getattr(self, name)!r}"
                raise ValueError(msg)
        if self.energy_floor > 0 and self.isolated != "trace_ratio":
            msg = (
                f"energy_floor must be 0 unless isolated is 'trace_ratio', got "
                f"{self.energy_floor} with {self.isolated!r}"
            )
            raise ValueError(msg)
        if self.joint and self.recalibration == "none":
            msg = "joint must be false if recalibration is 'none', got true"
            raise ValueError(msg)

    def weight(self, branch: str) -> float:
        """Weight w of a branch as it is used: halved if there are both branches."""
        weight = self.general_weight if branch == "general" else self.isolated_weight
        return weight / 2 if self.branches == "both" else weight

    def names(self, first_task: bool) -> tuple[str, ...]:
        """Branches that are trained on the first task, or on a later one."""
        if first_task or self.branches == "general":
            return ("general",)
        return ("isolated",) if self.branches == "isolated" else ("general", "isolated")

    def form(self, first_task: bool) -> "RecalibrationForm | None":
        """Form of Λ for the solver, or ``None`` if nothing is recalibrated."""
        if first_task or self.recalibration == "none":
            return None
        return self.recalibration if self.joint or self.branches != "isolated" else None

    def passes(self) -> tuple[str, ...]:
        """Passes over a task whose moments enter the history, in the order of the passes."""
        return ("trained", "merged") if self.history == "both" else (self.history,)


def _is_not_negative(value: object) -> bool:
    # Booleans are integers in Python, but a gamma of true is surely a mistake.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
