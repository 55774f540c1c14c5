"""Bad input gives a clear error with the argument's name; settings, defaults and dtypes."""

import re
import warnings
from types import ModuleType
from typing import Any

import libraries
import numpy as np
import pytest
from calls import (
    ALL,
    CASES,
    EYE,
    MATRIX,
    OPTIONAL,
    SQUARE,
    call,
    every_argument,
    every_moment,
)
from strategies import dtype_name, to_library, to_numpy

import loda_math as lm


@every_argument
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(xp: ModuleType, name: str, argument: str, bad: float) -> None:
    x = MATRIX[argument].copy()
    x[1, 0] = x[0, 1] = bad
    for dtype in ("float32", "float64"):
        with pytest.raises(ValueError, match=rf"^{argument} holds NaN or infinite"):
            call(xp, name, **{argument: to_library(xp, x, dtype)})


@every_argument
def test_integers(xp: ModuleType, name: str, argument: str) -> None:
    x = xp.asarray(MATRIX[argument].astype(int).tolist())
    with pytest.raises(TypeError, match=rf"^{argument} must be real floating point"):
        call(xp, name, **{argument: x})


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_arrays_that_are_masked_or_not_real(name: str, argument: str) -> None:
    x = MATRIX[argument]
    with pytest.raises(TypeError, match=rf"^{argument} must be a dense array"):
        call(np, name, **{argument: np.ma.masked_less(x, 0.5)})
    with pytest.raises(TypeError, match=rf"^{argument} must be an array"):
        call(np, name, **{argument: x.view(np.matrix)})
    for kind in (x.astype(object), x.astype(complex)):
        with pytest.raises(TypeError, match=rf"^{argument} must be real floating point"):
            call(np, name, **{argument: kind})


@every_argument
def test_what_is_no_array(xp: ModuleType, name: str, argument: str) -> None:
    allows_none = (name, argument) in OPTIONAL
    for x in [MATRIX[argument].tolist(), "moment"] + [None] * (not allows_none):
        with pytest.raises(TypeError, match=rf"^{argument} must be an array"):
            call(xp, name, **{argument: x})
    moments = lm.second_moment(to_library(xp, EYE))
    if argument not in ("new", "old", "moment"):
        with pytest.raises(TypeError, match=rf"^{argument} must be an array.*pass its \.mean"):
            call(xp, name, **{argument: moments})


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if len(ALL[c[0]][1]) > 1])
def test_libraries_do_not_mix(name: str, argument: str) -> None:
    import array_api_strict as strict

    with pytest.raises(TypeError, match=rf"one library.*{argument}': 'array_api_strict'"):
        call(np, name, **{argument: strict.asarray(MATRIX[argument])})


@every_moment
def test_moments_that_are_not_square(xp: ModuleType, name: str, argument: str) -> None:
    for shape in ((3, 2), (3,), (), (2, 3, 4), (0, 0)):
        with pytest.raises(ValueError, match=rf"^{argument} must be square"):
            call(xp, name, **{argument: to_library(xp, np.ones(shape))})


@every_moment
def test_moments_that_are_not_symmetric(xp: ModuleType, name: str, argument: str) -> None:
    x = EYE.copy()
    x[0, 1] = 1e-3
    for batch in (x, np.stack([EYE, x])):
        others = {
            a: to_library(xp, np.broadcast_to(EYE, batch.shape))
            for a in ALL[name][1]
            if a in ("new", "old", "moment")
        }
        with pytest.raises(ValueError, match=rf"^{argument} must be symmetric"):
            call(xp, name, **others | {argument: to_library(xp, batch)})
    # Rounding of a float32 Gram matrix is no asymmetry.
    x[0, 1] = 1e-6
    call(xp, name, **{argument: to_library(xp, x)})


@pytest.mark.parametrize(("name", "argument"), [c for c in SQUARE if len(ALL[c[0]][1]) > 1])
def test_sizes_that_do_not_match(xp: ModuleType, name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=r"^(moments must have one D|basis must have shape)"):
        call(xp, name, **{argument: to_library(xp, np.eye(4))})


def test_projections_that_do_not_fit(xp: ModuleType) -> None:
    wrong = {
        "down": ("recalibration full", ((2, 4), (3,), (0, 3))),
        "up": ("recalibration diagonal", ((2, 3), (2,))),
        "coefficients": ("recalibration_loss", ((2, 3), (2,))),
    }
    cases = [(argument, name, shapes) for argument, (name, shapes) in wrong.items()]
    cases += [("basis", name, ((2, 3), (3,))) for name in ALL if "basis" in ALL[name][1]]
    for argument, name, shapes in cases:
        for shape in shapes:
            with pytest.raises(ValueError, match=rf"^{argument} must have shape"):
                call(xp, name, **{argument: to_library(xp, np.ones(shape))})


@pytest.mark.parametrize("solver", ["general", "isolated", "null"])
def test_ranks(xp: ModuleType, solver: str) -> None:
    m = to_library(xp, EYE)
    solve = {
        "general": lambda rank: lm.general_subspace(m, m, rank),
        "isolated": lambda rank: lm.isolated_subspace(m, None, rank),
        "null": lambda rank: lm.null_subspace(m, rank),
    }[solver]
    for rank in (0, -1, 4):
        with pytest.raises(ValueError, match="rank must be from 1 to D = 3"):
            solve(rank)
    for rank in (True, np.True_, 2.0, np.float64(2), "2", None, xp.asarray(True), xp.asarray(2.0)):
        with pytest.raises(TypeError, match="rank must be an integer"):
            solve(rank)
    for rank in (np.int64(2), np.uint8(2), np.asarray(2), xp.asarray(2)):
        np.testing.assert_array_equal(to_numpy(solve(rank)), to_numpy(solve(2)))


def test_unknown_form(xp: ModuleType) -> None:
    m = to_library(xp, np.eye(2))
    with pytest.raises(ValueError, match="form must be one of"):
        lm.recalibration(m, m, m, m, 1.0, "best")


def test_a_history_that_is_not_semidefinite(xp: ModuleType) -> None:
    new = to_library(xp, EYE)
    for old in (np.diag([1.0, 1.0, -0.5]), -EYE):
        with pytest.raises(ValueError, match="old is not positive semi-definite"):
            lm.isolated_subspace(new, to_library(xp, old), 1)


def test_sound_extremes_pass_without_a_warning(xp: ModuleType) -> None:
    for name in ALL:
        for dtype, scale in (("float32", 1e18), ("float32", 1e-18), ("float64", 1e60)):
            scaled = {
                a: to_library(xp, MATRIX[a] * scale, dtype)
                for a in ALL[name][1]
                if a in ("new", "old", "moment", "up")
            }
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call(xp, name, **scaled)


@pytest.mark.parametrize("name", ALL)
def test_results_stay_with_their_device(name: str) -> None:
    import array_api_strict as strict

    device = strict.Device("device1")  # results on the default device would be refused
    changed = {
        a: strict.asarray(MATRIX[a].tolist(), dtype=strict.float64, device=device)
        for a in ALL[name][1]
    }
    result = call(strict, name, **changed)
    result = result[0] if isinstance(result, tuple) else result
    assert result.device == device


# Settings

RNG = np.random.default_rng(0)
UP, DOWN, C, G = (RNG.standard_normal(shape) for shape in ((3, 2), (2, 4), (2, 2), (5, 2)))
NEW, OLD = (x.T @ x for x in RNG.standard_normal((2, 9, 4)) * [1.0, 0.5, 0.1, 0.01])
GENERIC = {"new": NEW, "old": OLD, "moment": NEW, "up": UP, "down": DOWN, "coefficients": C}
GENERIC |= {"tokens": RNG.standard_normal((5, 4)), "grad_output": G}
GENERIC |= {"basis": np.linalg.qr(RNG.standard_normal((4, 2)))[0]}
MERGED = GENERIC | {"before": np.zeros((3, 4)), "after": UP @ DOWN}
POINT = {"before": np.ones(3), "after": np.ones(3) - 0.05, "gradient": np.ones(3)}
# What ``call`` cannot reach: lists of arrays, and a history before this task.
LISTS: dict[str, Any] = {
    "joint_recalibration": lambda xp, gamma=1.0, weights=0.5, **k: lm.joint_recalibration(
        [to_library(xp, UP)] * 2,
        [to_library(xp, DOWN)] * 2,
        [1.0, weights],
        to_library(xp, NEW),
        to_library(xp, OLD),
        gamma,
        **k,
    ),
    "lookahead": lambda xp, radius=1.0: lm.lookahead(
        [to_library(xp, np.ones(3))], [to_library(xp, np.ones(3))], radius
    ),
    "remember": lambda xp, **k: (
        lm.remember(lm.remember(None, to_library(xp, OLD)), to_library(xp, NEW), **k).total
    ),
}
ROUNDING = "accumulation_eps"
SUBSPACE = ("ridge", ROUNDING)
RECALIBRATION = ("gamma", "history_weight")
SETTINGS: dict[str, tuple[str, ...]] = {
    "general_subspace": (ROUNDING,),
    "general_solution": (ROUNDING,),
    "isolated_subspace": SUBSPACE,
    "isolated_subspace floor": (*SUBSPACE, "energy_floor"),
    "isolated_solution floor": (*SUBSPACE, "energy_floor"),
    "trace_ratio_subspace": (*SUBSPACE, "energy_floor"),
    "trace_ratio_solution": (*SUBSPACE, "energy_floor"),
    "rank_for ratio": (*SUBSPACE, "share"),
    "recalibration full": RECALIBRATION,
    "recalibration_loss": RECALIBRATION,
    "joint_recalibration": (*RECALIBRATION, "weights"),
    "remember": ("weight", "decay"),
    "first_order_update": ("step",),
    "lookahead": ("radius",),
    "verify_subspace trace_ratio": (*SUBSPACE, "energy_floor", "tolerance"),
    "verify_recalibration": (*RECALIBRATION, "tolerance"),
    "verify_merge": ("tolerance",),
    "verify_perturbation": ("radius", "tolerance"),
}
SHARES = ("energy_floor", "share", "decay")
every_setting = pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name in SETTINGS for setting in SETTINGS[name]]
)


def run(xp: ModuleType, name: str, **settings: Any) -> Any:
    """Call a function with arrays on which every setting counts."""
    if name in LISTS:
        return LISTS[name](xp, **settings)
    arrays = POINT if name == "verify_perturbation" else MERGED
    return call(xp, name, **{a: to_library(xp, arrays[a]) for a in ALL[name][1]}, **settings)


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
        with pytest.raises(ValueError, match="tolerance must be finite and positive"):
            run(xp, name, tolerance=0)
    if setting in SHARES:
        with pytest.raises(ValueError, match=rf"^{setting} must be a share"):
            run(xp, name, **{setting: 1.5})
    if setting == ROUNDING:
        with pytest.raises(ValueError, match=rf"^{setting} must be a rounding unit"):
            run(xp, name, **{setting: 0.02})
    large = (1, np.float64(0.5), np.float32(0.5)) if setting != ROUNDING else (np.float32(1e-7),)
    for value in large + (0, 0.0) * (setting != "tolerance"):
        run(xp, name, **{setting: value})


def documented_defaults(name: str) -> dict[str, float]:
    """What the documentation says, the functions referred to by "As in" included."""
    function = getattr(lm, name.split()[0], None) or getattr(lm.verify, name.split()[0])
    defaults: dict[str, float] = {}
    pattern = r"^    ([\w, ]+) : .*default ([\d.e-]+)$|^    ([\w, ]+)\n        As in :func:`(\w+)`"
    for own, value, others, source in re.findall(pattern, function.__doc__, re.M):
        if own:
            defaults |= {word: float(value) for word in own.split(", ")}
        else:
            known = documented_defaults(source)
            defaults |= {word: known[word] for word in others.split(", ") if word in known}
    return defaults


def flat(result: Any) -> list[Any]:
    return [to_numpy(x) for x in (result if isinstance(result, (tuple, list)) else (result,))]


@pytest.mark.parametrize(
    "name",
    [name for name in SETTINGS if documented_defaults(name) and not name.endswith(" floor")],
)
def test_defaults_are_the_documented_ones(name: str) -> None:
    defaults = documented_defaults(name)
    for a, b in zip(flat(run(np, name)), flat(run(np, name, **defaults)), strict=True):
        np.testing.assert_array_equal(a, b)
    for setting, value in defaults.items():
        # The tolerance needs a case at its edge, and the quotient takes no floor.
        if setting in SETTINGS[name] and setting != "tolerance":
            other = flat(run(np, name, **{setting: 0.5 * value or 1.0}))
            default = flat(run(np, name))
            assert any(np.any(a != b) for a, b in zip(default, other, strict=True)), setting


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


# Sums are kept in the widest dtype, and a merged weight has the dtype of the weight.
WIDE = ("second_moment", "remember", "merge")


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
def test_one_moment_alone_gives_the_result_its_dtype(
    xp: ModuleType, name: str, argument: str
) -> None:
    narrow = {a: to_library(xp, MATRIX[a], "float32") for a in ALL[name][1]}
    result = call(xp, name, **narrow | {argument: None})
    fields = result if isinstance(result, tuple) else (result,)
    assert "float32" in {dtype_name(x) for x in fields}
    assert "float64" not in {dtype_name(x) for x in fields}


# Moments as they are given

TOKENS = RNG.standard_normal((2, 40, 4)) * [1.0, 0.5, 0.1, 0.0]  # the last feature is dead
SOLVERS: dict[str, Any] = {
    "general": lm.general_solution,
    "isolated": lm.isolated_solution,
    "trace ratio": lm.trace_ratio_solution,
    "rank": lambda new, old, rank, **k: lm.rank_for(new, old, 0.3 * rank, of="ratio", **k),
}
UPDATES: dict[str, Any] = {
    "projection_energy": lambda n, o, **k: lm.projection_energy(k["basis"], n),
    "relative_energy": lambda n, o, **k: lm.relative_energy(k["basis"], o),
    "energy_ratio": lambda n, o, **k: lm.energy_ratio(k["basis"], n, o),
    "heldout_ratio": lambda n, o, **k: lm.heldout_ratio(lambda *_: k["basis"], n, n, o),
    "recalibration": lambda n, o, **k: lm.recalibration(k["up"], k["down"], n, o, 1.5),
    "recalibration_loss": lambda n, o, **k: lm.recalibration_loss(
        k["coefficients"], k["up"], k["down"], n, o, 1.5
    ),
    "update_effect": lambda n, o, **k: lm.update_effect(
        k["coefficients"], k["up"], k["down"], n, o
    ),
    "verify_subspace": lambda n, o, **k: lm.verify.verify_subspace(
        k["basis"], n, o, "isolated", accumulation_eps=k.get("accumulation_eps")
    ),
    "verify_recalibration": lambda n, o, **k: lm.verify.verify_recalibration(
        k["coefficients"], k["up"], k["down"], n, o, 1.5
    ),
}


def streamed(xp: ModuleType) -> tuple[lm.Moments, lm.History]:
    """Moments of a new task, and a history, both formed of float32 tokens."""
    new, old = (lm.second_moment(to_library(xp, x, "float32")) for x in TOKENS)
    return new, lm.remember(lm.remember(None, old), old)


def branch(xp: ModuleType) -> dict[str, Any]:
    """A branch and a basis in the widest dtype, as moments are."""
    names = ("basis", "up", "down", "coefficients")
    return {n: to_library(xp, GENERIC[n], libraries.widest_dtype(xp)) for n in names}


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(flat(a), flat(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", SOLVERS)
def test_solvers_take_moments_and_histories_with_their_unit(xp: ModuleType, name: str) -> None:
    solve = SOLVERS[name]
    new, history = streamed(xp)
    settings = {} if name == "general" else {"ridge": 0.0}
    expected = solve(new.mean, history.total, 2, accumulation_eps=new.unit, **settings)
    assert_same(solve(new, history, 2, **settings), expected)
    assert_same(solve(new.mean, history, 2, **settings), expected)
    # What is said counts, whatever the moments carry.
    coarse = solve(new, history, 2, accumulation_eps=1e-3, **settings)
    assert_same(coarse, solve(new.mean, history.total, 2, accumulation_eps=1e-3, **settings))


@pytest.mark.parametrize("name", UPDATES)
def test_functions_of_moments_take_them_as_they_are(xp: ModuleType, name: str) -> None:
    new, history = streamed(xp)
    matrices = branch(xp)
    result = UPDATES[name](new, history, **matrices)
    # An array has no unit: it is said where a function can be told.
    said = UPDATES[name](new.mean, history.total, **matrices, accumulation_eps=new.unit)
    assert_same(result, said)


def test_moments_of_float32_tokens_need_no_ridge(xp: ModuleType) -> None:
    """The unit keeps the factorisation safe and the dead direction out."""
    for seed in range(10):
        x = np.random.default_rng(seed).standard_normal((2, 300, 6)) * [1, 1, 0.5, 0.5, 0.1, 0.0]
        new, old = (lm.second_moment(to_library(xp, tokens, "float32")) for tokens in x)
        basis = to_numpy(lm.isolated_subspace(new, lm.remember(None, old), 5, ridge=0.0))
        assert np.all(np.abs(basis[-1]) < 1e-3)


@pytest.mark.parametrize("name", ["general", "isolated", "trace ratio"])
def test_keywords_say_which_moment_is_which(xp: ModuleType, name: str) -> None:
    new, old = (to_library(xp, m, "float32") for m in (NEW, OLD))
    expected = SOLVERS[name](new, old, 2)
    assert_same(SOLVERS[name](rank=2, old=old, new=new), expected)
    assert_same(SOLVERS[name](new, old=old, rank=2), expected)
    if name != "general":
        first = SOLVERS[name](new=new, rank=2)
        assert_same(first, SOLVERS[name](new, None, 2))


@pytest.mark.parametrize("name", SOLVERS)
def test_moments_broadcast(xp: ModuleType, name: str) -> None:
    solve = SOLVERS[name]
    layers = np.stack([NEW, OLD + 1e-2 * NEW, np.eye(4)])
    many, one = to_library(xp, layers, "float32"), to_library(xp, OLD, "float32")
    for new, old in ((many, one), (one, many), (many[:, None, ...], many[:2, ...])):
        result = solve(new, old, 2)
        batch = np.broadcast_shapes(tuple(new.shape[:-2]), tuple(old.shape[:-2]))
        full = [to_numpy(m) for m in (new, old)]
        full = [np.broadcast_to(m, (*batch, 4, 4)) for m in full]
        expected = solve(*(to_library(xp, m, "float32") for m in full), 2)
        assert_same(result, expected)
        for field in result:
            assert tuple(field.shape[: len(batch)]) == batch
    with pytest.raises(ValueError, match="broadcast"):
        solve(many, many[:2, ...], 2)


@pytest.mark.parametrize("name", sorted(set(UPDATES) - {"recalibration", "recalibration_loss"}))
def test_the_fields_of_a_report_have_one_shape(xp: ModuleType, name: str) -> None:
    matrices = {a: to_library(xp, GENERIC[a], "float32") for a in branch(xp)}
    many = to_library(xp, np.stack([NEW, OLD, NEW + OLD]), "float32")
    one = to_library(xp, OLD, "float32")
    for new, old in ((many, one), (one, many)):
        result = UPDATES[name](new, old, **matrices)
        if isinstance(result, tuple):
            assert {tuple(field.shape) for field in result} == {(3,)}


def test_the_fields_of_a_report_on_weights_or_tokens_have_one_shape(xp: ModuleType) -> None:
    one = {a: to_library(xp, MERGED[a], "float32") for a in MERGED}
    many = {a: to_library(xp, np.stack([MERGED[a]] * 3), "float32") for a in MERGED}
    merged = [
        lm.verify.verify_merge(many["before"], one["after"], one["up"], one["down"]),
        lm.verify.verify_merge(one["before"], one["after"], many["up"], one["down"]),
        lm.first_order_update(many["tokens"], one["down"], one["grad_output"], 0.1)[1:],
        lm.first_order_update(one["tokens"], one["down"], many["grad_output"], 0.1)[1:],
    ]
    for report in merged:
        assert {tuple(field.shape) for field in report} == {(3,)}


def test_a_history_alone_has_a_general_subspace(xp: ModuleType) -> None:
    _, history = streamed(xp)
    assert_same(lm.general_solution(old=history, rank=2), lm.general_solution(history, None, 2))
    assert_same(lm.rank_for(old=history, share=0.9), lm.rank_for(history, share=0.9))


def test_what_is_missing_is_named(xp: ModuleType) -> None:
    m = to_library(xp, EYE)
    for solve in (lm.general_subspace, lm.isolated_subspace, lm.trace_ratio_subspace):
        with pytest.raises(TypeError, match="rank"):
            solve(m, m)
        with pytest.raises(TypeError, match="new"):
            solve(rank=1)
    with pytest.raises(TypeError, match="new"):
        lm.isolated_subspace(old=m, rank=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="new"):
        lm.rank_for(old=m, share=0.5, of="ratio")
    with pytest.raises(TypeError, match="share"):
        lm.rank_for(m)


def test_a_floor_belongs_to_the_ratio_of_traces(xp: ModuleType) -> None:
    m = to_library(xp, EYE)
    for floor in (0.5, xp.asarray(0.5)):
        with pytest.raises(ValueError, match="energy_floor"):
            lm.isolated_subspace(m, m, 1, energy_floor=floor)
    with pytest.raises(ValueError, match="objective"):
        lm.isolated_subspace(m, m, 1, objective="ratio")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [2, 40, 200])
def test_one_wrong_entry_of_a_moment_is_seen(xp: ModuleType, size: int) -> None:
    rng = np.random.default_rng(size)
    tokens = rng.standard_normal((2 * size, size)) * np.geomspace(1, 1e-3, size)
    moment = tokens.T @ tokens / len(tokens)
    moment = 0.5 * (moment + moment.T)
    largest = float(moment.max())
    lm.null_subspace(to_library(xp, moment), 1)
    for _ in range(8):
        i, j = rng.choice(size, 2, replace=False)
        for entry, rule in [
            (moment[i, j] + 2.1e-4 * largest, "symmetric"),
            (moment[i, j] - 2.1e-4 * largest, "symmetric"),
            (np.nan, "infinite"),
            (np.inf, "infinite"),
            (-np.inf, "infinite"),
        ]:
            wrong = moment.copy()
            wrong[i, j] = entry
            with pytest.raises(ValueError, match=rule):
                lm.null_subspace(to_library(xp, wrong), 1)
        # Rounding of single precision is no fault.
        rounded = moment.copy()
        rounded[i, j] += 1e-6 * largest
        lm.null_subspace(to_library(xp, rounded), 1)
