"""The mathematics of LoDA on any array library that follows the Python array API standard.

Functions take arrays of NumPy, PyTorch or any other conforming library, batched over leading
dimensions, and return arrays of the same library, dtype and device. They print and write nothing
and draw no random numbers; only the verifier of files reads one. Sections and theorems are those of
the paper, LoDA (arXiv:2603.00191, ICML 2026).
"""

from loda_math import verify
from loda_math._subspaces import RidgeScale
from loda_math.energy import (
    FirstOrderUpdate,
    HeldoutRatio,
    energy_ratio,
    first_order_update,
    heldout_ratio,
    projection_energy,
    relative_energy,
)
from loda_math.gao import (
    class_split,
    gradient_alignment,
    lookahead,
    project_conflict,
    undo_lookahead,
)
from loda_math.moments import History, Moments, combine, remember, rounding_unit, second_moment
from loda_math.recalibration import (
    RecalibrationForm,
    UpdateEffect,
    joint_recalibration,
    merge,
    recalibration,
    recalibration_loss,
    stack_branches,
    update_effect,
)
from loda_math.subspaces import (
    IsolatedObjective,
    RankChoice,
    RankMeasure,
    SubspaceSolution,
    TraceRatioSolution,
    general_solution,
    general_subspace,
    isolated_solution,
    isolated_subspace,
    null_solution,
    null_subspace,
    rank_for,
    trace_ratio_solution,
    trace_ratio_subspace,
)

__version__ = "0.1.0"

__all__ = [
    "FirstOrderUpdate",
    "HeldoutRatio",
    "History",
    "IsolatedObjective",
    "Moments",
    "RankChoice",
    "RankMeasure",
    "RecalibrationForm",
    "RidgeScale",
    "SubspaceSolution",
    "TraceRatioSolution",
    "UpdateEffect",
    "class_split",
    "combine",
    "energy_ratio",
    "first_order_update",
    "general_solution",
    "general_subspace",
    "gradient_alignment",
    "heldout_ratio",
    "isolated_solution",
    "isolated_subspace",
    "joint_recalibration",
    "lookahead",
    "merge",
    "null_solution",
    "null_subspace",
    "project_conflict",
    "projection_energy",
    "rank_for",
    "recalibration",
    "recalibration_loss",
    "relative_energy",
    "remember",
    "rounding_unit",
    "second_moment",
    "stack_branches",
    "trace_ratio_solution",
    "trace_ratio_subspace",
    "undo_lookahead",
    "update_effect",
    "verify",
]
