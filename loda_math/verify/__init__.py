"""Certificates: how close a solution is to the exact optimum of its problem.

Every function takes moments and a solution as plain arrays, solves the problem again, and returns
a small report whose last field is the verdict. It does not matter who computed the solution.
Quantities of second order (gaps of an objective) must stay below the tolerance, those of first
order (residuals) below its square root.
"""

from loda_math.verify.archive import Archive, read_archive, verification_table, verify_archive
from loda_math.verify.gao import PerturbationReport, verify_perturbation
from loda_math.verify.layer import LAYER_ARRAYS, Check, LayerSettings, verify_layer
from loda_math.verify.merge import MergeReport, implied_coefficients, verify_merge
from loda_math.verify.recalibration import RecalibrationReport, verify_recalibration
from loda_math.verify.subspaces import Objective, SubspaceReport, verify_subspace

__all__ = [
    "LAYER_ARRAYS",
    "Archive",
    "Check",
    "LayerSettings",
    "MergeReport",
    "Objective",
    "PerturbationReport",
    "RecalibrationReport",
    "SubspaceReport",
    "implied_coefficients",
    "read_archive",
    "verification_table",
    "verify_archive",
    "verify_layer",
    "verify_merge",
    "verify_perturbation",
    "verify_recalibration",
    "verify_subspace",
]
