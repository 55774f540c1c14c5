"""Every function that takes matrices, with sound arguments: what the checks of input run over."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from libraries import widest_dtype
from strategies import to_library

import loda_math as lm
from loda_math import verify

EYE = np.eye(3)
UP, DOWN = np.ones((2, 2)), np.eye(3)[:2]
MATRIX = {"new": EYE, "old": EYE, "moment": EYE, "up": UP, "down": DOWN, "basis": EYE[:, :2]}
MATRIX |= {"tokens": np.ones((4, 3)), "grad_output": np.ones((4, 2)), "coefficients": np.eye(2)}
MATRIX |= {name: np.ones((2, 3)) for name in ("before", "after", "change", "gradient", "weight")}

TASKS, BRANCH = ("new", "old"), ("up", "down", "new", "old")
Call = tuple[Callable[..., Any], tuple[str, ...]]


def ranked(solver: Callable[..., Any], *arguments: str, **settings: Any) -> Call:
    """A solver for two directions."""
    return lambda *a, **k: solver(*a, 2, **settings | k), arguments


def recalibration(form: Any) -> Call:
    return lambda *a, gamma=1.0, **k: lm.recalibration(*a, gamma, form, **k), BRANCH


def verified(objective: Any) -> Call:
    return lambda *a, **k: verify.verify_subspace(*a, objective, **k), ("basis", *TASKS)


def rank_for(of: Any) -> Call:
    return lambda *a, share=0.9, **k: lm.rank_for(*a, share, of=of, **k), TASKS


# Functions that take matrices and check them once: how they are called, and with which.
CALLS: dict[str, Call] = {
    "second_moment": (lm.second_moment, ("tokens",)),
    "projection_energy": (lm.projection_energy, ("basis", "moment")),
    "relative_energy": (lm.relative_energy, ("basis", "moment")),
    "energy_ratio": (lm.energy_ratio, ("basis", *TASKS)),
    "first_order_update": (
        lambda *a, step=0.1: lm.first_order_update(*a, step),
        ("tokens", "down", "grad_output"),
    ),
    "general_subspace": ranked(lm.general_subspace, *TASKS),
    "isolated_subspace": ranked(lm.isolated_subspace, *TASKS),
    "null_subspace": ranked(lm.null_subspace, "old"),
    **{
        f"recalibration {form}": recalibration(form)
        for form in ("full", "diagonal", "box", "direction", "scalar")
    },
    "trace_ratio_solution": ranked(lm.trace_ratio_solution, *TASKS),
    "isolated_solution": ranked(lm.isolated_solution, *TASKS),
    "null_solution": ranked(lm.null_solution, "old"),
    "rank_for": rank_for("energy"),
    "remember": (lambda a, **k: lm.remember(None, a, **k).total, ("moment",)),
    "update_effect": (lm.update_effect, ("coefficients", *BRANCH)),
    "verify_subspace": verified("isolated"),
    "recalibration_loss": (
        lambda *a, gamma=1.0, **k: lm.recalibration_loss(*a, gamma, **k),
        ("coefficients", *BRANCH),
    ),
}
# The other functions of matrices, which call those above or are not for steps of training.
REPORTS: dict[str, Call] = {
    "general_solution": ranked(lm.general_solution, *TASKS),
    "trace_ratio_subspace": ranked(lm.trace_ratio_subspace, *TASKS),
    "isolated_subspace floor": ranked(
        lm.isolated_subspace, *TASKS, objective="trace_ratio", energy_floor=0.5
    ),
    "isolated_solution floor": ranked(
        lm.isolated_solution, *TASKS, objective="trace_ratio", energy_floor=0.5
    ),
    "isolated_subspace channels": ranked(lm.isolated_subspace, *TASKS, ridge_scale="channels"),
    "isolated_subspace eigenvalues": ranked(
        lm.isolated_subspace, *TASKS, ridge_scale="eigenvalues"
    ),
    "isolated_subspace first": (lambda a: lm.isolated_subspace(a, None, 2), ("new",)),
    "rank_for ratio": rank_for("ratio"),
    **{f"verify_subspace {x}": verified(x) for x in ("general", "trace_ratio", "null")},
    "verify_recalibration": (
        lambda *a, gamma=1.0, **k: verify.verify_recalibration(*a, gamma, **k),
        ("coefficients", *BRANCH),
    ),
    "merge": (lm.merge, ("weight", "up", "down", "coefficients")),
    "implied_coefficients": (verify.implied_coefficients, ("change", "up", "down")),
    "verify_merge": (verify.verify_merge, ("before", "after", "up", "down")),
    "verify_perturbation": (
        lambda *a, radius=0.1, **k: verify.verify_perturbation(*a, radius, **k),
        ("before", "after", "gradient"),
    ),
}
ALL = CALLS | REPORTS
CASES = [(name, argument) for name, (_, arguments) in ALL.items() for argument in arguments]
# The first task has no history; the sum of the two moments may have one of them alone.
HISTORY_FREE = ("general_", "isolated_", "trace_ratio_", "rank_for", "verify_subspace")
OPTIONAL = {(name, "old") for name, a in CASES if a == "old" and name.startswith(HISTORY_FREE)}
OPTIONAL |= {("merge", "coefficients")}
OPTIONAL |= {(name, "new") for name in ("general_subspace", "general_solution", "rank_for")}
SQUARE = [case for case in CASES if case[1] in ("new", "old", "moment")]
every_argument = pytest.mark.parametrize(("name", "argument"), CASES)
every_moment = pytest.mark.parametrize(("name", "argument"), SQUARE)
every_call = pytest.mark.parametrize("name", CALLS)


def call(xp: ModuleType, name: str, **changed: Any) -> Any:
    """Call a function with sound arguments but the changed ones, and the settings among them."""
    function, arguments = ALL[name]
    values = {a: to_library(xp, MATRIX[a], widest_dtype(xp)) for a in arguments} | changed
    arrays = [values.pop(a) for a in arguments]
    return function(*arrays, **values)
