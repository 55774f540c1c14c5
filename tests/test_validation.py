"""Bad input gives a clear error with the argument's name, and checking costs one scalar read."""

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from libraries import widest_dtype
from strategies import to_library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import loda_math as lm

EYE = np.eye(3)
UP, DOWN = np.ones((2, 2)), np.eye(3)[:2]
MATRIX = {"new": EYE, "old": EYE, "moment": EYE, "up": UP, "down": DOWN, "basis": EYE[:, :2]}
MATRIX |= {"tokens": np.ones((4, 3)), "grad_output": np.ones((4, 2)), "coefficients": np.eye(2)}

# Every function that takes matrices: how it is called, and with which of them.
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
CASES = [(name, argument) for name, (_, arguments) in CALLS.items() for argument in arguments]
OPTIONAL = {
    (name, "old")
    for name in (
        "general_subspace",
        "isolated_subspace",
        "isolated_solution",
        "trace_ratio_solution",
        "rank_for",
    )
}
SQUARE = [case for case in CASES if case[1] in ("new", "old", "moment")]
every_argument = pytest.mark.parametrize(("name", "argument"), CASES)
every_moment = pytest.mark.parametrize(("name", "argument"), SQUARE)
every_call = pytest.mark.parametrize("name", CALLS)


def call(xp: ModuleType, name: str, **changed: Any) -> Any:
    """Call a function with sound arguments but the changed ones."""
    function, arguments = CALLS[name]
    values = {a: to_library(xp, MATRIX[a], widest_dtype(xp)) for a in arguments} | changed
    return function(*(values[a] for a in arguments))


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


@pytest.mark.parametrize(("name", "argument"), [c for c in CASES if len(CALLS[c[0]][1]) > 1])
def test_libraries_do_not_mix(name: str, argument: str) -> None:
    with pytest.raises(TypeError, match=rf"one library.*{argument}': 'torch'"):
        call(np, name, **{argument: torch.from_numpy(MATRIX[argument])})


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
            for a in CALLS[name][1]
            if a in ("new", "old", "moment")
        }
        with pytest.raises(ValueError, match=rf"^{argument} must be symmetric"):
            call(xp, name, **others | {argument: to_library(xp, batch)})
    # Rounding of a float32 Gram matrix is no asymmetry.
    x[0, 1] = 1e-6
    call(xp, name, **{argument: to_library(xp, x)})


@pytest.mark.parametrize(("name", "argument"), [c for c in SQUARE if len(CALLS[c[0]][1]) > 1])
def test_sizes_that_do_not_match(xp: ModuleType, name: str, argument: str) -> None:
    with pytest.raises(ValueError, match=r"moments|basis must have shape \(\.\.\., 4, r\)"):
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
    with pytest.raises(ValueError, match=r"^basis must have shape \(\.\.\., 3, r\)"):
        call(xp, "energy_ratio", basis=to_library(xp, np.ones((2, 3))))


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
    for rank in (True, 2.0, "2", None):
        with pytest.raises(TypeError, match=f"rank must be.*{type(rank).__name__}"):
            solve(rank)


@pytest.mark.parametrize("argument", ["gamma", "gamma of the loss", "radius", "ridge", "step"])
def test_settings(xp: ModuleType, argument: str) -> None:
    def run(value: Any) -> Any:
        up, down, m = (to_library(xp, x) for x in (UP, DOWN, EYE))
        eye = to_library(xp, np.eye(2))
        return {
            "gamma": lambda: lm.recalibration(up, down, m, m, value),
            "gamma of the loss": lambda: lm.recalibration_loss(eye, up, down, m, m, value),
            "radius": lambda: lm.lookahead([m], [m], value),
            "ridge": lambda: lm.isolated_subspace(m, m, 2, ridge=value),
            "step": lambda: lm.first_order_update(m, m, m, value),
        }[argument]()

    word = argument.split()[0]
    for value in (-1, -1e-9, np.nan, np.inf, np.float32(-1)):
        with pytest.raises(ValueError, match=rf"^{word} must be finite and at least 0"):
            run(value)
    for value in ("1", None, 1j, True, [1.0]):
        with pytest.raises(TypeError, match=rf"^{word} must be a real number"):
            run(value)
    with pytest.raises(ValueError, match=rf"^{word} must be one number"):
        run(to_library(xp, np.ones(3)))
    for value in (0, 0.0, 1, np.float64(0.5), np.float32(0.5)):
        run(value)


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
    for name in CALLS:
        for dtype, scale in (("float32", 1e18), ("float32", 1e-18), ("float64", 1e60)):
            scaled = {
                a: to_library(xp, MATRIX[a] * scale, dtype)
                for a in CALLS[name][1]
                if a in ("new", "old", "moment", "up")
            }
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                call(xp, name, **scaled)


# What the checks cost


class Reads(TorchDispatchMode):
    """Counts the scalars that leave the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket is torch.ops.aten._local_scalar_dense
        return func(*args, **(kwargs or {}))


@every_call
def test_one_scalar_is_read(name: str) -> None:
    with Reads() as reads:
        call(torch, name)
    assert reads.count == 1


def test_steps_read_nothing() -> None:
    one, radius = torch.ones(3), torch.tensor(0.1)
    with Reads() as reads:
        lm.lookahead([one], [one], radius)
        lm.gradient_alignment([one], [one])
        lm.project_conflict([one], [-one])
        lm.second_moment(torch.ones(4, 3), check=False)
    assert reads.count == 0


def arguments(name: str) -> list[torch.Tensor]:
    return [torch.from_numpy(MATRIX[a]) for a in CALLS[name][1]]


def plain(name: str) -> Callable[..., Any]:
    """The function, with moments reduced to their mean."""
    function = CALLS[name][0]
    return lambda *a: (
        getattr(function(*a), "mean", None) if name == "second_moment" else function(*a)
    )


def assert_same(a: Any, b: Any) -> None:
    for x, y in zip(*((r if isinstance(r, tuple) else (r,)) for r in (a, b)), strict=True):
        torch.testing.assert_close(x, y)


@every_call
def test_runs_under_vmap_without_reading(name: str) -> None:
    stacked = [torch.stack([x, 2 * x]) for x in arguments(name)]
    function = plain(name)
    with Reads() as reads:
        mapped = torch.func.vmap(function)(*stacked)
    assert reads.count == 0
    assert_same(mapped, function(*stacked))


@every_call
def test_runs_under_tracing(name: str) -> None:
    function, inputs = plain(name), arguments(name)
    for mode in ("real", "fake"):
        graph = make_fx(function, tracing_mode=mode)(*inputs)
        assert_same(graph(*inputs), function(*inputs))
    with FakeTensorMode() as fake:
        shapes = function(*(fake.from_tensor(x) for x in inputs))
    reality = function(*inputs)
    for x, y in zip(
        *((r if isinstance(r, tuple) else (r,)) for r in (shapes, reality)), strict=True
    ):
        assert x.shape == y.shape
        assert x.dtype == y.dtype


@pytest.mark.parametrize("name", ["second_moment", "isolated_subspace", "recalibration full"])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_compiles_into_one_graph(name: str) -> None:
    function, inputs = plain(name), arguments(name)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    assert_same(compiled(*inputs), function(*inputs))


def test_gradients_are_looked_ahead_under_tracing() -> None:
    x, labels = torch.ones(3), torch.tensor([1, 2, 1])
    step = make_fx(lambda p, g, r: lm.lookahead([p], [g], r)[0])(x, x.clone(), torch.tensor(0.1))
    assert_same(step(x, 2 * x, torch.tensor(0.5)), lm.lookahead([x], [x], 0.5)[0])
    split = make_fx(lm.class_split)(labels, torch.tensor([1, 2]))
    assert_same(tuple(split(labels, torch.tensor([2, 1]))), (labels == 2, labels == 1))


@every_call
def test_results_stay_with_their_device(name: str) -> None:
    import array_api_strict as strict

    device = strict.Device("device1")  # results on the default device would be refused
    changed = {
        a: strict.asarray(MATRIX[a].tolist(), dtype=strict.float64, device=device)
        for a in CALLS[name][1]
    }
    result = call(strict, name, **changed)
    result = result[0] if isinstance(result, tuple) else result
    assert result.device == device
    on_meta = {a: torch.from_numpy(MATRIX[a]).to("meta") for a in CALLS[name][1]}
    result = call(torch, name, **on_meta)
    result = result[0] if isinstance(result, tuple) else result
    assert result.device.type == "meta"
