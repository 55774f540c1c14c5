"""The mathematics of LoDA on any array library that follows the Python array API standard.

Functions take arrays of NumPy, PyTorch or any other conforming library, batched over leading
dimensions, and return arrays of the same library, dtype and device. Nothing here prints, reads,
writes or draws random numbers. The paper is arXiv:2603.00191.
"""

from loda_math.energy import (
    FirstOrderUpdate,
    energy_ratio,
    first_order_update,
    projection_energy,
    relative_energy,
)
from loda_math.gao import class_split, gradient_alignment, lookahead, project_conflict
from loda_math.moments import Moments, combine, second_moment
from loda_math.recalibration import RecalibrationForm, recalibration, recalibration_loss
from loda_math.subspaces import general_subspace, isolated_subspace, null_subspace

__all__ = [
    "FirstOrderUpdate",
    "Moments",
    "RecalibrationForm",
    "class_split",
    "combine",
    "energy_ratio",
    "first_order_update",
    "general_subspace",
    "gradient_alignment",
    "isolated_subspace",
    "lookahead",
    "null_subspace",
    "project_conflict",
    "projection_energy",
    "recalibration",
    "recalibration_loss",
    "relative_energy",
    "second_moment",
]
