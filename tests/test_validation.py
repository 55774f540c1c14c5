"""Bad input gives a clear error with the argument's name."""

import warnings
from types import ModuleType

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
from strategies import to_library, to_numpy

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


@every_argument
def test_what_is_no_array(xp: ModuleType, name: str, argument: str) -> None:
    allows_none = (name, argument) in OPTIONAL
    for x in [MATRIX[argument].tolist(), "moment"] + [None] * (not allows_none):
        with pytest.raises(TypeError, match=rf"^{argument} must be an array.*{type(x).__name__}"):
            call(xp, name, **{argument: x})
    moments = lm.second_moment(to_library(xp, EYE))
    with pytest.raises(TypeError, match=rf"^{argument} must be an array.*Moments.*\.mean"):
        call(xp, name, **{argument: moments})


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if len(ALL[c[0]][1]) > 1])
def test_libraries_do_not_mix(name: str, argument: str) -> None:
    import array_api_strict as strict

    with pytest.raises(TypeError, match=rf"one library.*{argument}': 'array_api_strict'"):
        call(np, name, **{argument: strict.asarray(MATRIX[argument])})


@every_moment
def test_moments_that_are_not_square(xp: ModuleType, name: str, argument: str) -> None:
    for shape in ((3, 2), (3,), (), (2, 3, 4), (0, 0)):
        with pytest.raises(ValueError, match=rf"^{argument} must be square.*D, D"):
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
    with pytest.raises(
        ValueError, match=r"^(moments must have one|basis must have shape \(\.\.\., [34], r\))"
    ):
        call(xp, name, **{argument: to_library(xp, np.eye(4))})


def test_projections_that_do_not_fit(xp: ModuleType) -> None:
    for down in (np.ones((2, 4)), np.ones(3), np.ones((0, 3))):
        with pytest.raises(ValueError, match=r"^down must have shape \(\.\.\., r, 3\)"):
            call(xp, "recalibration full", down=to_library(xp, down))
    for up in (np.ones((2, 3)), np.ones(2)):
        with pytest.raises(ValueError, match=r"^up must have shape \(\.\.\., O, 2\)"):
            call(xp, "recalibration diagonal", up=to_library(xp, up))
    for coefficients in (np.ones((2, 3)), np.ones(2)):
        with pytest.raises(ValueError, match=r"^coefficients must have shape \(\.\.\., 2, 2\)"):
            call(xp, "recalibration_loss", coefficients=to_library(xp, coefficients))
    for name in (name for name in ALL if "basis" in ALL[name][1]):
        for basis in (np.ones((2, 3)), np.ones(3)):
            with pytest.raises(ValueError, match=r"^basis must have shape \(\.\.\., 3, r\)"):
                call(xp, name, basis=to_library(xp, basis))


@pytest.mark.parametrize("solver", ["general", "isolated", "null"])
def test_ranks(xp: ModuleType, solver: str) -> None:
    m = to_library(xp, EYE)
    solve = {
        "general": lambda rank: lm.general_subspace(m, m, rank),
        "isolated": lambda rank: lm.isolated_subspace(m, None, rank),
        "null": lambda rank: lm.null_subspace(m, rank),
    }[solver]
    for rank in (0, -1, 4):
        with pytest.raises(ValueError, match=f"rank must be from 1 to D = 3, got {rank}"):
            solve(rank)
    for rank in (True, np.True_, 2.0, np.float64(2), "2", None, xp.asarray(True), xp.asarray(2.0)):
        with pytest.raises(TypeError, match=f"rank must be an integer, got.*{type(rank).__name__}"):
            solve(rank)
    for rank in (np.int64(2), np.uint8(2), np.asarray(2), xp.asarray(2)):
        np.testing.assert_array_equal(to_numpy(solve(rank)), to_numpy(solve(2)))


def test_unknown_form(xp: ModuleType) -> None:
    m = to_library(xp, np.eye(2))
    with pytest.raises(ValueError, match=r"form must be one of.*full.*got 'best'"):
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
