"""Settings: each is checked under its name, its default is the documented one, dtypes promote."""

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

import libraries
import numpy as np
import pytest
from calls import ALL, CASES, EYE, MATRIX, OPTIONAL, call
from strategies import dtype_name, to_library, to_numpy

import loda_math as lm

RNG = np.random.default_rng(0)
FACTORS = RNG.standard_normal((2, 9, 4)) * [1.0, 0.5, 0.1, 0.01]
NEW, OLD = (x.T @ x for x in FACTORS)
BASIS = np.linalg.qr(RNG.standard_normal((4, 2)))[0]
BRANCH = (RNG.standard_normal((3, 2)), RNG.standard_normal((2, 4)), NEW, OLD)
SQUARE = RNG.standard_normal((2, 2))
PAIR, UPS, DOWNS = (NEW, OLD), [BRANCH[0]] * 2, [BRANCH[1]] * 2
POINT = (np.ones(3), np.ones(3) - 0.05, np.ones(3))

# Every function with a setting: its arrays, and the call with the settings that are given.
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Callable[..., Any]]] = {
    "general_subspace": (PAIR, lambda *a, **k: lm.general_subspace(*a, 2, **k)),
    "general_solution": (PAIR, lambda *a, **k: lm.general_solution(*a, 2, **k)),
    "isolated_subspace": (PAIR, lambda *a, **k: lm.isolated_subspace(*a, 2, **k)),
    "isolated_solution": (PAIR, lambda *a, **k: lm.isolated_solution(*a, 2, **k)),
    "trace_ratio_subspace": (PAIR, lambda *a, **k: lm.trace_ratio_subspace(*a, 2, **k)),
    "trace_ratio_solution": (PAIR, lambda *a, **k: lm.trace_ratio_solution(*a, 2, **k)),
    "rank_for": (PAIR, lambda *a, share=0.9, **k: lm.rank_for(*a, share, of="ratio", **k)),
    "recalibration": (BRANCH, lambda *a, gamma=1.0, **k: lm.recalibration(*a, gamma, **k)),
    "recalibration_loss": (
        (SQUARE, *BRANCH),
        lambda *a, gamma=1.0, **k: lm.recalibration_loss(*a, gamma, **k),
    ),
    "joint_recalibration": (
        (*UPS, *DOWNS, NEW, OLD),
        lambda a, b, c, d, *m, gamma=1.0, weights=0.5, **k: lm.joint_recalibration(
            [a, b], [c, d], [1.0, weights], *m, gamma, **k
        ),
    ),
    "remember": (
        (OLD, NEW),
        lambda a, b, **k: lm.remember(lm.remember(None, a), b, **k).total,
    ),
    "first_order_update": (
        (BRANCH[0], RNG.standard_normal((1, 2)), BRANCH[0]),
        lambda *a, step=0.5: lm.first_order_update(*a, step),
    ),
    "lookahead": (POINT[:2], lambda a, b, radius=1.0: lm.lookahead([a], [b], radius)),
    "verify_subspace": (
        (BASIS, *PAIR),
        lambda *a, **k: lm.verify.verify_subspace(*a, "trace_ratio", **k),
    ),
    "verify_recalibration": (
        (SQUARE, *BRANCH),
        lambda *a, gamma=1.0, **k: lm.verify.verify_recalibration(*a, gamma, **k),
    ),
    "verify_merge": (
        (np.zeros((3, 4)), BRANCH[0] @ BRANCH[1], *BRANCH[:2]),
        lm.verify.verify_merge,
    ),
    "verify_perturbation": (
        POINT,
        lambda *a, radius=0.1, **k: lm.verify.verify_perturbation(*a, radius, **k),
    ),
}
ROUNDING = "accumulation_eps"
SUBSPACE = ("ridge", ROUNDING)
SETTINGS: dict[str, tuple[str, ...]] = {
    "general_subspace": (ROUNDING,),
    "general_solution": (ROUNDING,),
    "isolated_subspace": (*SUBSPACE, "energy_floor"),
    "isolated_solution": (*SUBSPACE, "energy_floor"),
    "trace_ratio_subspace": SUBSPACE,
    "trace_ratio_solution": (*SUBSPACE, "energy_floor"),
    "rank_for": (*SUBSPACE, "share"),
    "recalibration": ("gamma", "history_weight"),
    "recalibration_loss": ("gamma", "history_weight"),
    "joint_recalibration": ("gamma", "history_weight", "weights"),
    "remember": ("weight", "decay"),
    "first_order_update": ("step",),
    "lookahead": ("radius",),
    "verify_subspace": (*SUBSPACE, "energy_floor", "tolerance"),
    "verify_recalibration": ("gamma", "history_weight", "tolerance"),
    "verify_merge": ("tolerance",),
    "verify_perturbation": ("radius", "tolerance"),
}
SHARES = ("energy_floor", "share", "decay")
every_setting = pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in SETTINGS for setting in SETTINGS[name]]
)


def run(xp: ModuleType, name: str, **settings: Any) -> Any:
    arrays, function = FUNCTIONS[name]
    return function(*(to_library(xp, a) for a in arrays), **settings)


@every_setting
def test_settings_are_refused_under_their_name(xp: ModuleType, name: str, setting: str) -> None:
    libraries.needs_float64(xp)
    rule = "positive" if setting == "tolerance" else "at least 0"
    for value in (-1, -1e-9, np.nan, np.inf, np.float32(-1)):
        with pytest.raises(ValueError, match=rf"^{setting} must be finite and {rule}"):
            run(xp, name, **{setting: value})
    for value in ("1", 1j, True, [1.0]):
        with pytest.raises(TypeError, match=rf"^{setting} must be a real number"):
            run(xp, name, **{setting: value})
    if setting != "history_weight":
        with pytest.raises(ValueError, match=rf"^{setting} must be one number"):
            run(xp, name, **{setting: to_library(xp, np.ones(3))})
    if setting == "tolerance":
        with pytest.raises(ValueError, match=r"^tolerance must be finite and positive, got 0"):
            run(xp, name, tolerance=0)
    if setting in SHARES:
        with pytest.raises(ValueError, match=rf"^{setting} must be a share from 0 to 1, got 1.5"):
            run(xp, name, **{setting: 1.5})
    if setting == ROUNDING:
        with pytest.raises(ValueError, match=rf"^{setting} must be a rounding unit, at most 0.01"):
            run(xp, name, **{setting: 0.5})
    large = (1, np.float64(0.5), np.float32(0.5)) if setting != ROUNDING else (np.float32(1e-7),)
    for value in large + (0, 0.0) * (setting != "tolerance"):
        run(xp, name, **{setting: value})


def documented_defaults(name: str) -> dict[str, float]:
    """What the documentation says, the functions referred to by "As in" included."""
    home = lm if hasattr(lm, name) else lm.verify
    found: dict[str, float] = {}
    pattern = r"^    ([\w, ]+) : .*default ([\d.e-]+)$|^    ([\w, ]+)\n        As in :func:`(\w+)`"
    for own, value, others, source in re.findall(pattern, getattr(home, name).__doc__, re.M):
        if own:
            found |= {word: float(value) for word in own.split(", ")}
        else:
            known = documented_defaults(source)
            found |= {word: known[word] for word in others.split(", ") if word in known}
    return found


def flat(result: Any) -> list[Any]:
    return [to_numpy(x) for x in (result if isinstance(result, (tuple, list)) else (result,))]


@pytest.mark.parametrize("name", [name for name in SETTINGS if documented_defaults(name)])
def test_defaults_are_the_documented_ones(name: str) -> None:
    defaults = documented_defaults(name)
    for a, b in zip(flat(run(np, name)), flat(run(np, name, **defaults)), strict=True):
        np.testing.assert_array_equal(a, b)
    for setting, value in defaults.items():
        if setting not in ("tolerance", ROUNDING):  # those need a case at their edge
            other = flat(run(np, name, **{setting: 0.5 * value or 1.0}))
            mine = flat(run(np, name))
            assert any(np.any(a != b) for a, b in zip(mine, other, strict=True)), setting


@pytest.mark.parametrize("name", ["verify_merge", "verify_perturbation"])
@pytest.mark.parametrize(("error", "passed"), [(0.9e-5, True), (1.1e-5, False)])
def test_the_default_tolerance_is_a_hundred_thousandth(
    xp: ModuleType, name: str, error: float, passed: bool
) -> None:
    libraries.needs_float64(xp)
    before, up, down = np.zeros((3, 2)), np.ones((3, 1)), np.ones((1, 2))
    if name == "verify_merge":
        arrays = before, (1 + error) * up @ down, up, down
        report = lm.verify.verify_merge(*(to_library(xp, a) for a in arrays))
    else:
        arrays = before, -(1 + error) * 0.1 * up @ down / 6**0.5, up @ down
        report = lm.verify.verify_perturbation(*(to_library(xp, a) for a in arrays), 0.1)
    assert float(report.error) == pytest.approx(error)
    assert bool(report.passed) == passed


WIDE = ("second_moment", "remember")  # sums are kept in the widest dtype


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if c[0] not in WIDE])
def test_one_wide_argument_makes_the_result_wide(xp: ModuleType, name: str, argument: str) -> None:
    libraries.needs_float64(xp)
    narrow = {a: to_library(xp, MATRIX[a], "float32") for a in ALL[name][1]}
    wide = {argument: to_library(xp, MATRIX[argument])}
    for changed, dtype in ((narrow, "float32"), (narrow | wide, "float64")):
        result = call(xp, name, **changed)
        for x in result if isinstance(result, tuple) else (result,):
            assert dtype_name(x) in (dtype, "int32", "int64", "bool", "bool_")


@pytest.mark.parametrize(("name", "argument"), sorted(OPTIONAL))
def test_without_a_history_the_result_has_the_dtype_of_the_task(
    xp: ModuleType, name: str, argument: str
) -> None:
    result = call(xp, name, new=to_library(xp, EYE, "float32"), **{argument: None})
    first = result[0] if isinstance(result, tuple) and name[:8] != "rank_for" else result
    assert dtype_name(first if name[:8] != "rank_for" else result.curve) == "float32"
