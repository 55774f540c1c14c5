"""Every function that takes matrices, with sound arguments: what the checks of input run over."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from libraries import widest_dtype
from strategies import to_library

import loda_math as lm

EYE = np.eye(3)
UP, DOWN = np.ones((2, 2)), np.eye(3)[:2]
MATRIX = {"new": EYE, "old": EYE, "moment": EYE, "up": UP, "down": DOWN, "basis": EYE[:, :2]}
MATRIX |= {"tokens": np.ones((4, 3)), "grad_output": np.ones((4, 2)), "coefficients": np.eye(2)}
MATRIX |= {name: np.ones((2, 3)) for name in ("before", "after", "change", "gradient")}

# Functions that take matrices and check them once: how they are called, and with which.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "second_moment": (lm.second_moment, ("tokens",)),
    "projection_energy": (lm.projection_energy, ("basis", "moment")),
    "relative_energy": (lm.relative_energy, ("basis", "moment")),
    "energy_ratio": (lm.energy_ratio, ("basis", "new", "old")),
    "first_order_update": (
        lambda *a: lm.first_order_update(*a, 0.1),
        ("tokens", "down", "grad_output"),
    ),
    "general_subspace": (lambda *a: lm.general_subspace(*a, 2), ("new", "old")),
    "isolated_subspace": (lambda *a: lm.isolated_subspace(*a, 2), ("new", "old")),
    "null_subspace": (lambda a: lm.null_subspace(a, 2), ("old",)),
    **{
        f"recalibration {form}": (
            lambda *a, form=form: lm.recalibration(*a, 1.0, form),
            ("up", "down", "new", "old"),
        )
        for form in ("full", "diagonal", "box", "direction", "scalar")
    },
    "trace_ratio_solution": (lambda *a: lm.trace_ratio_solution(*a, 2), ("new", "old")),
    "isolated_solution": (lambda *a: lm.isolated_solution(*a, 2), ("new", "old")),
    "null_solution": (lambda a: lm.null_solution(a, 2), ("old",)),
    "rank_for": (lambda *a: lm.rank_for(*a, 0.9), ("new", "old")),
    "remember": (lambda a: lm.remember(None, a).total, ("moment",)),
    "update_effect": (lm.update_effect, ("coefficients", "up", "down", "new", "old")),
    "verify_subspace": (
        lambda *a: lm.verify.verify_subspace(*a, "isolated"),
        ("basis", "new", "old"),
    ),
    "recalibration_loss": (
        lambda *a: lm.recalibration_loss(*a, 1.0),
        ("coefficients", "up", "down", "new", "old"),
    ),
}
# The other functions of matrices, which call those above or are not for steps of training.
REPORTS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "general_solution": (lambda *a: lm.general_solution(*a, 2), ("new", "old")),
    "trace_ratio_subspace": (lambda *a: lm.trace_ratio_subspace(*a, 2), ("new", "old")),
    "isolated_solution floor": (
        lambda *a: lm.isolated_solution(*a, 2, energy_floor=0.5),
        ("new", "old"),
    ),
    "rank_for ratio": (lambda *a: lm.rank_for(*a, 0.9, of="ratio"), ("new", "old")),
    **{
        f"verify_subspace {objective}": (
            lambda *a, objective=objective: lm.verify.verify_subspace(*a, objective),
            ("basis", "new", "old"),
        )
        for objective in ("general", "trace_ratio", "null")
    },
    "verify_recalibration": (
        lambda *a: lm.verify.verify_recalibration(*a, 1.0),
        ("coefficients", "up", "down", "new", "old"),
    ),
    "implied_coefficients": (lm.verify.implied_coefficients, ("change", "up", "down")),
    "verify_merge": (lm.verify.verify_merge, ("before", "after", "up", "down")),
    "verify_perturbation": (
        lambda *a: lm.verify.verify_perturbation(*a, 0.1),
        ("before", "after", "gradient"),
    ),
}
ALL = CALLS | REPORTS
CASES = [(name, argument) for name, (_, arguments) in ALL.items() for argument in arguments]
OPTIONAL = {
    (name, "old")
    for name in (
        "general_subspace",
        "isolated_subspace",
        "isolated_solution",
        "trace_ratio_solution",
        "rank_for",
        "general_solution",
        "trace_ratio_subspace",
        "isolated_solution floor",
        "rank_for ratio",
    )
}
SQUARE = [case for case in CASES if case[1] in ("new", "old", "moment")]
every_argument = pytest.mark.parametrize(("name", "argument"), CASES)
every_moment = pytest.mark.parametrize(("name", "argument"), SQUARE)
every_call = pytest.mark.parametrize("name", CALLS)


def call(xp: ModuleType, name: str, **changed: Any) -> Any:
    """Call a function with sound arguments but the changed ones."""
    function, arguments = ALL[name]
    values = {a: to_library(xp, MATRIX[a], widest_dtype(xp)) for a in arguments} | changed
    return function(*(values[a] for a in arguments))
