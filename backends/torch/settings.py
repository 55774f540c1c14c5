"""Settings of LoDA, declared only here, command lines included; loads no torch."""

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Final, Literal, Self, TypeVar, get_args

# In quotes below, as in readouts/readout.py: a command line must not run this block.
if TYPE_CHECKING:
    from loda_math import RecalibrationForm

Target = str | Sequence[str]
"""One or several patterns over module names, such as ``"*.attn.qkv"``; see :func:`matching`."""

TIMM_QKV = "*.attn.qkv"

ALL_LINEAR = "all-linear"
"""Target that means all linear layers but convolutions and the model's own output layer."""

PRESETS: Final[Mapping[str, str]] = {
    "timm": TIMM_QKV,
    "torchvision-vit": "*.self_attention.in_proj",
    "torchvision-swin": "*.attn.qkv",
    "transformers-vit": "*.attention.[qkv]_proj",
    "transformers-dinov2": "*.attention.[qkv]_proj",
    "transformers-clip": "*.self_attn.[qkv]_proj",
    "transformers-siglip": "*.self_attn.[qkv]_proj",
    "transformers-bert": "*.attention.self.*",
    "transformers-gpt2": "*.attn.c_attn",
}
"""Pattern by name of a preset: queries, keys and values of every block, as the paper adapts."""

_Value = TypeVar("_Value")

Branches = Literal["both", "general", "isolated"]
IsolatedRule = Literal["quotient", "trace_ratio", "null"]
RidgeScale = Literal["mean", "channels", "eigenvalues"]
HistoryPasses = Literal["merged", "trained", "both"]
MomentDtype = Literal["float64", "float32"]
Recalibration = Literal["full", "diagonal", "box", "direction", "scalar", "none"]


@dataclass(frozen=True)
class LoDASettings:
    """Everything about LoDA (arXiv:2603.00191) that is not data.

    Parameters
    ----------
    target : str or sequence of str
        Names or patterns of the linear layers to adapt, all-linear, or the name of a preset. A name
        without wildcards means the layer of that name, or else all whose names end with it.
    exclude : str or sequence of str
        Names or patterns of layers that the target names and that are not adapted.
    rank : int
        Directions of each branch, r.
    rank_pattern : mapping of str to int
        Another rank for the layers that a name or pattern means; of several that fit, the first.
    weight_pattern : mapping of str to float
        Factor on the weights of both branches in the layers that a name or pattern means; of
        several that fit, the first.
    untie : bool
        Give a target layer whose weight is shared with another module a copy of its own. Without
        it such a layer is refused, for merging would change the other module too. The copy stays,
        also where a task fails or is abandoned.
    master : bool
        Keep the weights of target layers in half precision in float32 as well, so that rounding at
        the merges does not add up over the tasks.
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
    moment_dtype : {"float64", "float32"}
        Type in which the second moments of tasks and the history are stored. Sums are formed in
        float64 whatever it is; float32 halves the memory, and rounds no more than the Gram
        matrices of a float32 model do.
    heldout : bool
        Measure, from the second task on, the energy ratio of the directions on held-out images:
        chosen on one half of the images, measured on the other. Does not change the directions.
    radius : float
        Largest radius ρ of the look-ahead of a gradient-aligned step.
    freeze_statistics : bool
        Keep the running statistics of batch norms as they are during a task: these layers stay in
        evaluation mode, whatever mode the model is in.

    Examples
    --------
    >>> settings = LoDASettings(rank=8, branches="both")
    >>> settings.weight("general"), settings.names(first_task=True)
    (0.25, ('general',))
    """

    target: Target = TIMM_QKV
    exclude: Target = ()
    rank: int = 32
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    weight_pattern: Mapping[str, float] = field(default_factory=dict)
    untie: bool = False
    master: bool = False
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
    moment_dtype: MomentDtype = "float64"
    heldout: bool = False
    radius: float = 0.3
    freeze_statistics: bool = True

    def __post_init__(self) -> None:
        for name in ("target", "exclude"):
            given = getattr(self, name)
            if not isinstance(given, str):  # a file of settings has a list
                object.__setattr__(self, name, tuple(given))
            patterns = as_patterns(given)
            if not all(pattern.strip() for pattern in patterns) or (
                name == "target" and not patterns
            ):
                msg = f"{name} must be a pattern of module names, or several, got {patterns!r}"
                raise ValueError(msg)
        # A NumPy integer could not be written to a file of settings.
        object.__setattr__(self, "rank", whole("rank", self.rank))
        ranks = {p: whole("rank_pattern", rank) for p, rank in self.rank_pattern.items()}
        object.__setattr__(self, "rank_pattern", ranks)
        for pattern, factor in self.weight_pattern.items():
            if not _is_not_negative(factor):
                msg = (
                    f"weight_pattern must be finite and at least 0, got {factor!r} for {pattern!r}"
                )
                raise ValueError(msg)
        for name in ("joint", "heldout", "untie", "master", "freeze_statistics"):
            if getattr(self, name) is not True and getattr(self, name) is not False:
                msg = f"{name} must be true or false, got {getattr(self, name)!r}"
                raise ValueError(msg)
        weights = ("general_weight", "isolated_weight", "down_scale")
        for name in (*weights, "ridge", "gamma", "radius"):
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
            ("moment_dtype", MomentDtype),
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

    def by_layer(self, layers: Collection[str]) -> dict[str, Self]:
        """Settings of all target layers, with own ranks and weights in the place of the patterns.

        Examples
        --------
        >>> settings = LoDASettings(rank=8, rank_pattern={"*.1.*": 4})
        >>> {name: own.rank for name, own in settings.by_layer(["a.0.qkv", "a.1.qkv"]).items()}
        {'a.0.qkv': 8, 'a.1.qkv': 4}
        """
        ranks = by_pattern(layers, "rank_pattern", self.rank_pattern, self.rank)
        factors = by_pattern(layers, "weight_pattern", self.weight_pattern, 1.0)
        own: dict[tuple[int, float], Self] = {
            (rank, factor): replace(
                self,
                rank=rank,
                general_weight=self.general_weight * factor,
                isolated_weight=self.isolated_weight * factor,
                rank_pattern={},
                weight_pattern={},
            )
            for rank, factor in {*zip(ranks.values(), factors.values(), strict=True)}
        }
        return {name: own[ranks[name], factors[name]] for name in layers}

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


def as_patterns(target: Target) -> list[str]:
    """The patterns of a target as a list, presets replaced by their pattern.

    Examples
    --------
    >>> as_patterns("*.mlp.fc1"), as_patterns(["timm", "head"])
    (['*.mlp.fc1'], ['*.attn.qkv', 'head'])
    """
    patterns = [target] if isinstance(target, str) else list(target)
    return [PRESETS.get(pattern, pattern) for pattern in patterns]


def matching(pattern: str, names: Collection[str]) -> list[str]:
    """The names that a pattern means.

    Parameters
    ----------
    pattern : str
        A name means itself, if there is such a name. Else a pattern with wildcards (``*``, ``?``,
        ``[...]``) means all names that fit it as a whole, and one without means all names that
        end with it, from a dot on.
    names : collection of str
        Dotted names.

    Examples
    --------
    >>> names = ["blocks.0.attn.qkv", "blocks.0.mlp.fc1", "fc1"]
    >>> matching("*.fc1", names), matching("attn.qkv", names), matching("fc1", names)
    (['blocks.0.mlp.fc1'], ['blocks.0.attn.qkv'], ['fc1'])
    """
    if pattern in names:
        return [pattern]
    if any(wildcard in pattern for wildcard in "*?["):
        return [name for name in names if fnmatchcase(name, pattern)]
    return [name for name in names if name.endswith(f".{pattern}")]


def by_pattern(
    layers: Collection[str], setting: str, patterns: Mapping[str, _Value], default: _Value
) -> dict[str, _Value]:
    """A value by layer: that of the first pattern that fits it, or the default."""
    values: dict[str, _Value] = {}
    for pattern, value in patterns.items():
        fits = matching(pattern, layers)
        if not fits:
            msg = (
                f"{setting} must name layers of the target, got {pattern!r}; layers: "
                f"{', '.join(layers)}"
            )
            raise ValueError(msg)
        values = dict.fromkeys(fits, value) | values
    return {name: values.get(name, default) for name in layers}


def whole(name: str, value: object) -> int:
    """An integer of Python, of at least 1; ValueError for anything else, booleans included."""
    if not hasattr(value, "__index__") or isinstance(value, bool) or operator.index(value) < 1:
        msg = f"{name} must be an integer of at least 1, got {value!r}"
        raise ValueError(msg)
    return operator.index(value)


def _is_not_negative(value: object) -> bool:
    # Booleans are integers in Python, but a gamma of true is surely a mistake.
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value) and value >= 0  # type: ignore[arg-type, operator]
