"""Certificates: exact solutions pass, spoilt ones fail, and the gap is the true one."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st
from libraries import needs_float64, widest_dtype
from strategies import (
    EPS,
    Matrix,
    branches,
    dtypes,
    from_spectrum,
    orthogonal,
    pencils,
    seeds,
    to_library,
    to_numpy,
    unit,
)

from loda_math import (
    Moments,
    general_subspace,
    isolated_subspace,
    lookahead,
    null_subspace,
    recalibration,
    recalibration_loss,
    second_moment,
    trace_ratio_solution,
    trace_ratio_subspace,
)
from loda_math.verify import (
    implied_coefficients,
    verify_merge,
    verify_perturbation,
    verify_recalibration,
    verify_subspace,
)

OBJECTIVES = ("general", "isolated", "null", "trace_ratio")
FORMS = ("full", "diagonal", "box", "direction", "scalar")
few = settings(max_examples=6)


def gram(tokens: Matrix) -> Matrix:
    square = tokens.T @ tokens / len(tokens)
    return (square + square.T) / 2


def solution(objective: str, new: Any, old: Any, rank: int) -> Any:
    if objective == "null":
        return null_subspace(old, rank)
    solver = {
        "general": general_subspace,
        "isolated": isolated_subspace,
        "trace_ratio": trace_ratio_subspace,
    }[objective]
    return solver(new, old, rank)


def spare_jax(xp: ModuleType, objective: str) -> None:
    """Skip the ratio of traces where each of its fifty decompositions is compiled anew."""
    if objective == "trace_ratio" and xp.__name__.startswith("jax"):
        pytest.skip("JAX compiles the ratio of traces for every shape")


# Subspaces


@pytest.mark.parametrize("objective", OBJECTIVES)
@few
@given(pencil=pencils(), dtype=dtypes)
def test_our_own_solutions_pass(xp: ModuleType, objective: str, pencil: tuple, dtype: str) -> None:
    spare_jax(xp, objective)
    new, old = (to_library(xp, m, dtype) for m in pencil[:2])
    basis = solution(objective, new, old, pencil[2])
    report = verify_subspace(basis, new, old, objective)
    active = np.any(to_numpy(basis) != 0, axis=0)
    assert float(report.orthonormality) < 1e-12 + 8 * EPS[dtype]
    if (
        objective != "trace_ratio" or active.all()
    ):  # dropping inert directions only raises that ratio
        assert abs(float(report.optimality_gap)) < 1e3 * EPS[dtype] / 1e-2
        assert float(report.stationarity) < 1e3 * EPS[dtype] / 1e-2
    assert bool(report.passed)
    if objective != "null":
        assert int(report.effective_rank) <= active.sum()


@pytest.mark.parametrize("objective", OBJECTIVES)
@few
@given(seed=seeds, size=st.integers(3, 7), data=st.data())
def test_spoilt_solutions_fail_by_their_true_gap(
    xp: ModuleType, objective: str, seed: int, size: int, data: st.DataObject
) -> None:
    spare_jax(xp, objective)
    rank = data.draw(st.integers(1, size - 1))
    rng = np.random.default_rng(seed)
    n, o = (from_spectrum(2.0 ** -rng.permutation(size), orthogonal(size, rng)) for _ in range(2))
    new, old = to_library(xp, n), to_library(xp, o)
    other = np.linalg.qr(rng.standard_normal((size, rank)))[0]
    report = verify_subspace(to_library(xp, other), new, old, objective)
    s, p, both = unit(n), unit(o), unit(n + o)
    r = p + 1e-2 / size * np.eye(size)
    top = lambda m, k: np.linalg.eigvalsh(m)[::-1][:k].sum()  # noqa: E731
    energy = lambda m: np.trace(other.T @ m @ other)  # noqa: E731
    if objective == "general":
        value, best = energy(both), top(both, rank)
    elif objective == "isolated":
        value = np.trace(np.linalg.solve(other.T @ r @ other, other.T @ s @ other))
        best = scipy.linalg.eigh(s, r, eigvals_only=True)[::-1][:rank].sum()
    elif objective == "null":
        value, best = energy(p), -top(-p, rank)
    else:
        value = energy(s) / energy(r)
        best = scipy.optimize.brentq(lambda k: top(s - k * r, rank), 0, 1e4, xtol=1e-13)
    gap = value - best if objective == "null" else (best - value) / best
    assert float(report.objective) == pytest.approx(value)
    assert float(report.optimum) == pytest.approx(best)
    assert float(report.optimality_gap) == pytest.approx(gap, abs=1e-9)
    assert float(report.energy_new) == pytest.approx(energy(s))
    assert float(report.energy_old) == pytest.approx(energy(p))
    assert int(report.effective_rank) == rank
    assert bool(report.passed) == (gap <= 1e-5)
    assert float(report.stationarity) > 1e-6 or gap < 1e-9


@few
@given(pencil=pencils(kinds=("random",), dead=False), seed=seeds)
def test_the_objective_looks_at_the_span_alone(xp: ModuleType, pencil: tuple, seed: int) -> None:
    new, old = (to_library(xp, m) for m in pencil[:2])
    rank = pencil[2]
    basis = to_numpy(isolated_subspace(new, old, rank))
    rng = np.random.default_rng(seed)
    mixed = basis @ (orthogonal(rank, rng) * np.linspace(0.5, 1.5, rank))
    report = verify_subspace(to_library(xp, mixed), new, old, "isolated")
    assert abs(float(report.optimality_gap)) < 1e-9
    defect = np.max(np.abs(mixed.T @ mixed - np.eye(rank)))
    assert float(report.orthonormality) == pytest.approx(defect)
    assert not bool(report.passed)


def test_a_direction_of_rounding_noise_shows(xp: ModuleType) -> None:
    """What jitter does to layer-norm moments: one direction along the dead one."""
    rng = np.random.default_rng(0)
    q = orthogonal(6, rng)
    new = from_spectrum(np.array([1.0, 0.8, 0.6, 0.4, 0.2, 0.0]), q)
    old = from_spectrum(np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.0]), q)
    arrays = [to_library(xp, m, "float32") for m in (q[:, [0, 1, 5]], new, old)]
    report = verify_subspace(*arrays, "isolated")
    assert int(report.effective_rank) == 2
    assert float(report.optimality_gap) > 0.01
    assert not bool(report.passed)
    assert bool(verify_subspace(arrays[0], *arrays[1:], "isolated", tolerance=1.0).passed)


def test_a_ratio_of_traces_with_an_inert_direction_passes(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    n = from_spectrum(np.array([1.0, 0.5, 0.0]), orthogonal(3, rng))
    new, old = (to_library(xp, m, "float32") for m in (n, np.eye(3)))
    basis = trace_ratio_subspace(new, old, 3)
    assert np.any(to_numpy(basis) != 0, axis=0).sum() == 2
    assert bool(verify_subspace(basis, new, old, "trace_ratio").passed)
    # Leaving out a direction that matters is no way to pass.
    less = to_library(xp, to_numpy(basis) * [0.0, 1.0, 1.0], "float32")
    assert not bool(verify_subspace(less, new, old, "trace_ratio").passed)


def test_reports_over_layers(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 2, 3, 9, 4))
    new, old = (to_library(xp, np.swapaxes(t, -1, -2) @ t, "float32") for t in (x, y))
    for objective in OBJECTIVES:
        report = verify_subspace(solution(objective, new, old, 2), new, old, objective)
        assert all(field.shape == (2, 3) for field in report)
        assert np.all(to_numpy(report.passed))
    with pytest.raises(ValueError, match="objective must be"):
        verify_subspace(new, new, old, "best")  # type: ignore[arg-type]


def test_the_effective_rank_counts_what_is_above_rounding(xp: ModuleType) -> None:
    """A faint direction is noise beside channels that are larger, and sound in one of its own."""
    needs_float64(xp)
    eye = to_library(xp, np.eye(4))
    q = orthogonal(4, np.random.default_rng(0))
    for faint, mixed in ((3e-2, 4), (1e-4, 3)):
        values = np.array([1.0, 1.0, 1.0, faint])
        for moment, rank in ((from_spectrum(values, q), mixed), (np.diag(values), 4)):
            new = to_library(xp, moment)
            report = verify_subspace(eye, new, eye, "general", accumulation_eps=1e-4)
            assert int(report.effective_rank) == rank


def test_a_floor_is_checked_under_the_floor(xp: ModuleType) -> None:
    rng = np.random.default_rng(4)
    new, old = (to_library(xp, m @ m.T, "float32") for m in rng.standard_normal((2, 6, 6)))
    basis = isolated_subspace(new, old, 2, objective="trace_ratio", energy_floor=0.9)
    check = lambda tau: verify_subspace(basis, new, old, "trace_ratio", energy_floor=tau)  # noqa: E731
    assert bool(check(0.9).passed)
    assert not bool(check(0.0).passed)


def test_the_recorded_run(xp: ModuleType, shared: Any) -> None:
    """Its directions are the best without a ridge; with ours, and for other objectives, not."""
    with np.load(shared / "reference" / "trace.npz") as file:
        trace = {k: file[k] for k in file.files if "layer" in k}
    for key in ("task1/layer0", "task1/layer1", "task2/layer0", "task2/layer1"):
        part = {
            name: to_library(xp, trace[f"{key}/{name}"], "float32")
            for name in ("moment_new", "moment_old", "A_general_init", "A_isolated")
        }
        moments = part["moment_new"], part["moment_old"]
        general, isolated = (part[f"A_{b}"].mT * 3**0.5 for b in ("general_init", "isolated"))
        assert bool(verify_subspace(general, *moments, "general").passed)
        report = verify_subspace(isolated, *moments, "isolated", ridge=0.0)
        # Solved in float32 the least ridge is not small enough to tell.
        assert float(report.optimality_gap) < (1e-6 if widest_dtype(xp) == "float64" else 5e-4)
        assert float(report.orthonormality) < 1e-6
        assert not bool(verify_subspace(isolated, *moments, "isolated").passed)
        assert not bool(verify_subspace(isolated, *moments, "trace_ratio").passed)


@pytest.mark.parametrize("zero", [1, 2])
def test_a_null_space_of_fewer_directions_does_not_pass(xp: ModuleType, zero: int) -> None:
    """Fewer directions hold less old energy, so the objective alone would like them."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    basis = np.eye(4)[:, [2, 1]]
    assert bool(verify_subspace(to_library(xp, basis), new, old, "null").passed)
    less = basis.copy()
    less[:, -zero:] = 0.0
    both = to_library(xp, np.stack([basis, less]))
    moments = (to_library(xp, np.stack([to_numpy(m)] * 2)) for m in (new, old))
    np.testing.assert_array_equal(
        to_numpy(verify_subspace(both, *moments, "null").passed), [True, False]
    )


def test_the_energy_floor_is_part_of_the_claim(xp: ModuleType) -> None:
    """The best ratio, with a quarter of the energy: right without a floor, wrong with one."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    best = to_library(xp, np.eye(4)[:, [2]])
    for floor, passed in ((0.0, True), (0.25, True), (0.26, False)):
        report = verify_subspace(best, new, old, "trace_ratio", energy_floor=floor)
        assert bool(report.passed) == passed


def test_columns_of_no_length_are_zero_columns(xp: ModuleType) -> None:
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2, 1, 0.5], [8.0, 1, 0.1, 4]))
    basis = 1e-9 * np.eye(4)[:, 1:3]
    assert not bool(verify_subspace(to_library(xp, basis), new, old, "isolated").passed)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 12))
def test_without_a_ridge_a_singular_history_is_judged_as_finely_as_it_can_be(
    xp: ModuleType, seed: int, rank: int
) -> None:
    """Our own solution passes; one that stays outside the null space does not."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((200, 12))
    low = tokens[:, :6] @ rng.standard_normal((6, 12))
    new, old = (to_library(xp, gram(x)) for x in (tokens, low))
    own = isolated_subspace(new, old, rank, ridge=0.0)
    assert bool(verify_subspace(own, new, old, "isolated", ridge=0.0).passed)
    others = general_subspace(old, None, min(rank, 6))
    assert not bool(verify_subspace(others, new, old, "isolated", ridge=0.0).passed)


def test_an_unregularised_basis_of_float32_moments_passes() -> None:
    """SciPy's generalised eigenvectors, as research code would find them, without any ridge."""
    rng = np.random.default_rng(0)
    scales = 0.9 ** np.arange(24)
    new, old = (gram(rng.standard_normal((400, 24)) * scales).astype(np.float32) for _ in range(2))
    _, vectors = scipy.linalg.eigh(new.astype(np.float64), old.astype(np.float64))
    basis, _ = np.linalg.qr(vectors[:, ::-1][:, :4])
    assert verify_subspace(basis, new, old, "isolated", ridge=0.0).passed
    assert not verify_subspace(basis, new, old, "isolated").passed
    assert not verify_subspace(np.roll(basis, 1, axis=0), new, old, "isolated", ridge=0.0).passed


def test_the_residual_is_a_share_of_the_moment(xp: ModuleType) -> None:
    """Half-way between two axes: SU - U(UᵀSU) has length |a - b| / 2."""
    new, old = (to_library(xp, np.diag(d)) for d in ([4.0, 2.0], [0.0, 0.0]))
    tilted = to_library(xp, np.array([[1.0], [1.0]]) / 2**0.5)
    report = verify_subspace(tilted, new, old, "general")
    assert float(report.stationarity) == pytest.approx(1 / 20**0.5, rel=1e-6)


def test_every_layer_has_a_verdict_of_its_own(xp: ModuleType) -> None:
    """Three layers of very different conditioning and energy, judged together and apart."""
    needs_float64(xp)
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((3, 200, 8)) * 0.5 ** np.arange(8)
    histories = rng.standard_normal((3, 200, 8)) * 0.7 ** np.arange(8)
    histories[0] = tokens[0][:, :4] @ rng.standard_normal((4, 8))
    new = np.stack([gram(x) for x in tokens])
    old = np.stack([gram(x) for x in histories])
    bases = np.stack([np.linalg.qr(rng.standard_normal((8, 2)))[0] for _ in range(3)])
    bases[1] = isolated_subspace(new[1], old[1], 2, objective="trace_ratio", energy_floor=0.9)
    for objective, options in (
        ("isolated", {"ridge": 0.0}),
        ("trace_ratio", {"energy_floor": 0.9}),
        ("null", {}),
    ):
        arrays = [to_library(xp, a) for a in (bases, new, old)]
        together = verify_subspace(*arrays, objective, **options)
        for layer in range(3):
            apart = verify_subspace(*(a[layer, ...] for a in arrays), objective, **options)
            for name in ("passed", "optimality_gap", "stationarity", "optimum"):
                found = float(getattr(together, name)[layer])
                assert found == pytest.approx(float(getattr(apart, name)), rel=1e-6, abs=1e-9)


def test_inert_directions_leave_no_negative_gap(xp: ModuleType) -> None:
    """One direction with energy and two without: alone it has a larger ratio than three have."""
    new, old = (to_library(xp, m, "float32") for m in (np.diag([1.0, 0, 0, 0]), np.eye(4)))
    report = verify_subspace(trace_ratio_subspace(new, old, 3), new, old, "trace_ratio")
    assert bool(report.passed)
    assert float(report.objective) > float(report.optimum)
    assert float(report.optimality_gap) == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_task_without_energy_passes(xp: ModuleType, objective: str) -> None:
    new, old = (to_library(xp, np.diag(d), "float32") for d in ([0.0, 0, 0], [3.0, 1, 2]))
    report = verify_subspace(solution(objective, new, old, 2), new, old, objective)
    assert bool(report.passed)


@few
@given(seed=seeds, rank=st.integers(1, 6), floor=st.sampled_from([0.0, 0.9]))
def test_a_ratio_of_traces_at_the_rounding_of_a_singular_history_passes(
    xp: ModuleType, seed: int, rank: int, floor: float
) -> None:
    """With hardly a ridge the least old energy is uncertain; directions outside are found."""
    needs_float64(xp)
    rng = np.random.default_rng(seed)
    tokens = rng.standard_normal((2, 50, 8))
    few_channels = tokens[1][:, :2] @ rng.standard_normal((2, 8))
    new, old = (to_library(xp, gram(x)) for x in (tokens[0], few_channels))
    how = {"ridge": 1e-12, "energy_floor": floor}
    own = trace_ratio_subspace(new, old, rank, **how)
    assert bool(verify_subspace(own, new, old, "trace_ratio", **how).passed)
    others = to_library(xp, orthogonal(8, rng)[:, :rank])
    assert not bool(verify_subspace(others, new, old, "trace_ratio", **how).passed)


# Every direction, at its own scale and in the digits that it is stored in


def outlier_moments(seed: int, amplitude: float, size: int = 12) -> list[Moments]:
    """A new and an old task of float32 tokens, with a large channel that they share."""
    rng = np.random.default_rng(seed)
    scales = np.geomspace(1, 0.1, size)
    scales[0] = amplitude
    return [second_moment((x * scales).astype(np.float32)) for x in rng.normal(size=(2, 900, size))]


@pytest.mark.parametrize("amplitude", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_our_bases_pass_in_any_precision(objective: str, amplitude: float) -> None:
    torch = pytest.importorskip("torch")
    new, old = outlier_moments(0, amplitude)
    means = [torch.from_numpy(m.mean) for m in (new, old)]
    for rank in (1, 4, 12):
        basis = torch.from_numpy(solution(objective, new, old, rank))
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            report = verify_subspace(basis.to(dtype), *means, objective, accumulation_eps=new.unit)
            assert bool(report.passed), (rank, dtype)


@pytest.mark.parametrize("floor", [0.5, 0.9, 0.99, 1.0])
def test_a_floor_is_met_to_the_digits_of_the_basis(floor: float) -> None:
    """Rounding the columns may take energy to first order; choosing a lower floor takes more."""
    torch = pytest.importorskip("torch")
    for seed in range(8):
        new, other = outlier_moments(seed, 100.0 if seed % 2 else 1.0, size=6)
        # Channels of little new energy have most of the old one: every floor binds.
        rising = np.linspace(0.02, 2, 6)
        old = other.mean * rising[:, None] * rising
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for tau, passed in ((floor, True), (floor - 0.2, False)):
                best = trace_ratio_solution(new, old, 2, energy_floor=tau)
                if passed or best.energy < floor - 0.1:
                    arrays = [torch.from_numpy(x) for x in (best.basis, new.mean, old)]
                    arrays[0] = arrays[0].to(dtype)
                    report = verify_subspace(
                        *arrays, "trace_ratio", energy_floor=floor, accumulation_eps=new.unit
                    )
                    assert bool(report.passed) == passed, (seed, dtype)


@pytest.mark.parametrize("amplitude", [1.0, 30.0, 1e3, 1e4])
@pytest.mark.parametrize("objective", ["general", "isolated", "null"])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_wrong_direction_is_found_however_small(
    objective: str, amplitude: float, place: int
) -> None:
    """Its energy may be a millionth of what the large channel has."""
    new, old = outlier_moments(1, amplitude)
    basis = solution(objective, new, old, 4)
    # The worst direction in place of a right one.
    worst = null_subspace(new, 1) if objective != "null" else general_subspace(old, None, 2)[:, 1:]
    rest = np.delete(basis, place, axis=1)
    worst = worst - rest @ (rest.T @ worst)
    spoilt = np.concatenate([rest, worst / np.linalg.norm(worst)], axis=1)
    report = verify_subspace(spoilt, new, old, objective)
    assert not bool(report.passed)
    assert float(report.direction_gap) > 1e-2
    # A little of it is found as well, beyond the tolerance.
    tilted = basis.copy()
    tilted[:, place] += 0.03 * spoilt[:, -1]
    tilted, _ = np.linalg.qr(tilted)
    assert not bool(verify_subspace(tilted, new, old, objective, tolerance=1e-7).passed)


def test_one_right_direction_and_seven_worst_ones_do_not_pass() -> None:
    rng = np.random.default_rng(0)
    scales = np.geomspace(1, 0.1, 32)
    scales[0] = 1000
    new = second_moment((rng.standard_normal((5000, 32)) * scales).astype(np.float32))
    right = general_subspace(new, None, 8)
    assert np.all(np.any(right != 0, axis=0))
    assert bool(verify_subspace(right, new, None, "general").passed)
    worst = np.concatenate([right[:, :1], null_subspace(new, 7)], axis=1)
    few = right * (np.arange(8) < 1)
    for basis in (worst, few):
        report = verify_subspace(basis, new, None, "general")
        assert float(report.optimality_gap) < 1e-5  # which is why the sum alone says nothing
        assert not bool(report.passed)


# Coefficients


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("amplitude", [1.0, 1e3])
def test_coefficients_are_right_to_their_digits_beside_a_large_channel(
    form: str, amplitude: float
) -> None:
    torch = pytest.importorskip("torch")
    new, old = outlier_moments(0, amplitude)
    for seed in range(12):
        rng = np.random.default_rng(seed)
        up, down = rng.standard_normal((6, 4)), orthogonal(12, rng)[:4]
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            branch = [torch.from_numpy(x).to(dtype).double().numpy() for x in (up, down)]
            exact = torch.from_numpy(recalibration(*branch, new, old, 1.3, form)).to(dtype)
            for factor, passed in ((1.0, True), (1.1, False)):
                arrays = [torch.from_numpy(x) for x in (*branch, new.mean, old.mean)]
                report = verify_recalibration(factor * exact, *arrays, 1.3, form)
                assert bool(report.passed) == passed, (seed, dtype)


@pytest.mark.parametrize("form", FORMS)
@few
@given(branch=branches(), gamma=st.sampled_from([0.5, 3.0]), weight=st.sampled_from([1.0, 0.25]))
def test_exact_coefficients_pass(
    xp: ModuleType, form: str, branch: tuple, gamma: float, weight: float
) -> None:
    arrays = [to_library(xp, a) for a in branch]
    exact = recalibration(*arrays, gamma, form, history_weight=weight)
    report = verify_recalibration(exact, *arrays, gamma, form, history_weight=weight)
    assert bool(report.passed)
    assert float(report.deviation) < 1e-9
    loss = recalibration_loss(exact, *arrays, gamma, history_weight=weight)
    assert float(report.loss) == pytest.approx(float(loss), rel=1e-9, abs=1e-300)
    assert float(report.optimality_gap) >= -1e-9
    if form == "full":
        assert float(report.optimality_gap) < 1e-9
    predicted = weight * float(report.old_change) + gamma * float(report.new_loss)
    assert predicted == pytest.approx(float(loss), rel=1e-9, abs=1e-300)


@few
@given(branch=branches(("random", "flat"), dead=False), seed=seeds)
def test_the_deviation_is_the_gap_of_the_full_form(
    xp: ModuleType, branch: tuple, seed: int
) -> None:
    up, down, new, old = branch
    down = orthogonal(len(new), np.random.default_rng(0))[: len(down)]
    arrays = [to_library(xp, a) for a in (up, down, new, old)]
    other = np.random.default_rng(seed).standard_normal((len(down), len(down)))
    report = verify_recalibration(to_library(xp, other), *arrays, 3.0)
    k = down @ (old + 3 * new) @ down.T
    whole = np.trace(up @ k @ up.T)
    excess = float(report.loss) - float(report.optimum)
    assert float(report.deviation) ** 2 * whole == pytest.approx(excess, rel=1e-6)
    drop = 3 * np.trace(up @ down @ new @ down.T @ up.T)
    assert float(report.optimality_gap) == pytest.approx(excess / drop, rel=1e-6)
    assert not bool(report.passed)


def test_nothing_to_lose_is_no_gap(xp: ModuleType) -> None:
    eye, zero = (to_library(xp, m, "float32") for m in (np.eye(2), np.zeros((2, 2))))
    # No old inputs, and no inputs at all.
    for coefficients, new in ((eye, eye), (zero, zero)):
        report = verify_recalibration(coefficients, eye, eye, new, zero, 1.0)
        assert bool(report.passed)
        assert float(report.loss) == float(report.optimality_gap) == float(report.deviation) == 0


def test_the_wrong_order_of_the_factors_is_found(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    new, old = (m @ m.T for m in rng.standard_normal((2, 4, 4)))
    wrong = np.linalg.solve(old + new, new)  # (P + γQ)⁻¹γQ, the transpose of the right one
    arrays = [to_library(xp, a, "float32") for a in (np.eye(4), np.eye(4), new, old)]
    for coefficients, passed in ((wrong, False), (wrong.T, True)):
        report = verify_recalibration(to_library(xp, coefficients, "float32"), *arrays, 1.0)
        assert bool(report.passed) == passed


@pytest.mark.parametrize("form", FORMS)
@few
@given(seed=seeds, amplitude=st.sampled_from([1.0, 30.0, 1e3, 1e4]))
def test_coefficients_are_judged_for_every_direction(
    form: str, seed: int, amplitude: float
) -> None:
    new, old = outlier_moments(seed, amplitude, 6)
    rng = np.random.default_rng(seed)
    down = general_subspace(new, old, 4).T
    # Outputs of its own for every direction, from large to small.
    up = np.linalg.qr(rng.standard_normal((5, 4)))[0] * np.geomspace(1, 1e-2, 4)
    exact = recalibration(up, down, new, old, 3.0, form)
    for dtype in (np.float64, np.float32, np.float16):
        assert bool(verify_recalibration(exact.astype(dtype), up, down, new, old, 3.0, form).passed)
    for direction in range(4):
        wrong = exact.copy()
        wrong[direction, direction] += 0.05
        assert not bool(verify_recalibration(wrong, up, down, new, old, 3.0, form).passed)


# Weights and parameters


def towards(x: Any, place: tuple[int, ...], steps: int) -> Any:
    """The tensor with one entry moved by some units in the last place."""
    torch = pytest.importorskip("torch")
    moved = x.clone()
    for _ in range(steps):
        moved[place] = torch.nextafter(moved[place], torch.tensor(9e4, dtype=x.dtype))
    return moved


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("size", [0.0, 1e-3, 1.0])
def test_merges_are_right_to_the_digits_of_the_weight(precision: str, size: float) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, precision)
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    up, down, weight = draw(24, 4), draw(4, 16), size * draw(24, 16)
    up[:, 2] *= 1e-2  # a branch beside larger ones
    up, down, weight = (x.to(dtype) for x in (up, down, weight))
    exact = (weight.double() + up.double() @ down.double()).to(dtype)
    for right in (exact, weight + (up.float() @ down.float()).to(dtype)):
        assert bool(verify_merge(weight, right, up, down).passed)
    # More than the digits allow, and more than the tolerance where there are more digits.
    few_digits = precision in ("float16", "bfloat16")
    wrong = towards(exact, (3, 5), 4) if few_digits else exact + 1e-3 * (torch.arange(16) == 5)
    assert not bool(verify_merge(weight, wrong, up, down).passed)
    part = up.double() * torch.tensor([1.0, 1.0, 0.0, 1.0])
    missing = (weight.double() + part @ down.double()).to(dtype)
    visible = float(up[:, 2].double().norm()) > 0.3 * torch.finfo(dtype).eps * 24**0.5
    if visible and not (few_digits and size == 1.0):
        assert not bool(verify_merge(weight, missing, up, down).passed)


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("start", [0.0, 1.0])
@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e2, 1e20])
def test_shifts_are_right_to_the_digits_of_the_parameter(
    precision: str, start: float, scale: float
) -> None:
    torch = pytest.importorskip("torch")
    dtype = getattr(torch, precision)
    if precision == "float16" and not 1e-4 < scale < 1e4:
        pytest.skip("beyond the range of halves")
    generator = torch.Generator().manual_seed(0)
    theta, gradient = (torch.randn(5, 4, generator=generator) for _ in range(2))
    theta, gradient = (start * theta).to(dtype), (scale * gradient.double()).to(dtype)
    (moved,) = lookahead([theta], [gradient], 0.3)
    assert bool(verify_perturbation(theta, moved, gradient, 0.3).passed)
    steps = 4 if precision in ("float16", "bfloat16") else 0
    wrong = towards(moved, (1, 1), steps) if steps else moved + 1e-4 * (torch.arange(4) == 1)
    assert not bool(verify_perturbation(theta, wrong, gradient, 0.3).passed)
    assert not bool(verify_perturbation(theta, 2 * theta - moved, gradient, 0.3).passed)


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_gradients_out_of_the_range_of_squares(xp: ModuleType, scale: float) -> None:
    """Their squares are zero or infinite in single precision."""
    gradient = to_library(xp, scale * np.array([3.0, 4.0]), "float32")
    theta = to_library(xp, np.zeros(2), "float32")
    moved = to_library(xp, [-0.3, -0.4], "float32")
    assert bool(verify_perturbation(theta, moved, gradient, 0.5).passed)
    assert not bool(verify_perturbation(theta, 1.01 * moved, gradient, 0.5).passed)


@few
@given(seed=seeds, dtype=dtypes)
def test_merges(xp: ModuleType, seed: int, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    before, up, c = (rng.standard_normal(shape) for shape in ((5, 4), (5, 2), (2, 2)))
    down = orthogonal(4, rng)[:2]
    after = before + up @ c @ down
    put = lambda *arrays: [to_library(xp, a, dtype) for a in arrays]  # noqa: E731
    merged, middle = put(before, after, up, down), put(c)
    report = verify_merge(*merged, *middle)
    assert bool(report.passed)
    assert float(report.error) < 1e2 * EPS[dtype]
    length = np.linalg.norm(up @ c @ down)
    assert float(report.update) == pytest.approx(length / np.linalg.norm(before), rel=1e-5)
    report = verify_merge(*merged)
    missing = np.linalg.norm(up @ (c - np.eye(2)) @ down) / np.linalg.norm(up @ down)
    assert float(report.error) == pytest.approx(missing, rel=1e-4)
    assert not bool(report.passed)
    implied = implied_coefficients(*put(after - before, up, down))
    np.testing.assert_allclose(to_numpy(implied), c, atol=1e4 * EPS[dtype])


def test_a_missing_small_branch_fails_its_own_layer_only(xp: ModuleType) -> None:
    """A millionth of the update: the whole of it and every entry are within the tolerance."""
    needs_float64(xp)
    rng = np.random.default_rng(0)
    before, up, down = (rng.standard_normal(s) for s in ((2, 8, 6), (2, 8, 3), (2, 3, 6)))
    up[..., 2] *= 1e-6
    after = before + up @ down
    after[1] -= up[1, :, 2:] @ down[1, 2:]
    report = verify_merge(*(to_library(xp, a, "float64") for a in (before, after, up, down)))
    assert np.all(to_numpy(report.error) < 1e-5)
    assert to_numpy(report.passed).tolist() == [True, False]


def test_an_update_below_the_rounding_of_the_weight_passes(xp: ModuleType) -> None:
    weight = np.full((3, 3), 1.0)
    up, down = np.full((3, 1), 1e-5), np.ones((1, 3))
    after = (weight + up @ down).astype(np.float32)
    arrays = [to_library(xp, a, "float32") for a in (weight, after, up, down)]
    report = verify_merge(*arrays)
    assert float(report.error) > 1e-5
    assert bool(report.passed)


def test_implied_coefficients_leave_out_what_is_not_there(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    up, down = np.ones((3, 2)) * [1.0, 0.0], orthogonal(4, rng)[:2]
    change = up @ np.diag([0.5, 0.7]) @ down
    arrays = [to_library(xp, a, "float32") for a in (change, up, down)]
    implied = to_numpy(implied_coefficients(*arrays))
    np.testing.assert_allclose(implied, np.diag([0.5, 0.0]), atol=1e-5)


def test_updates_that_do_not_fit(xp: ModuleType) -> None:
    sound = {"change": (3, 4), "up": (3, 2), "down": (2, 4)}
    for name, shape in (
        ("change", (4, 3)),
        ("change", (3,)),
        ("up", (2, 2)),
        ("up", (3, 3)),
        ("up", (2,)),
        ("down", (2, 3)),
        ("down", (3, 4)),
        ("down", (4,)),
    ):
        arrays = [to_library(xp, np.ones(s), "float32") for s in (sound | {name: shape}).values()]
        with pytest.raises(ValueError, match="shapes must be"):
            implied_coefficients(*arrays)


def test_no_update_passes_exactly(xp: ModuleType) -> None:
    zero, up, down = (to_library(xp, np.zeros(s), "float32") for s in ((3, 4), (3, 2), (2, 4)))
    report = verify_merge(zero, zero, up, down)
    assert bool(report.passed)
    assert float(report.error) == float(report.update) == 0
    still = verify_perturbation(zero, zero, zero, 0.0)
    assert bool(still.passed)
    assert float(still.error) == float(still.length) == float(still.alignment) == 0


@few
@given(seed=seeds, radius=st.sampled_from([1e-3, 0.3, 2.0]), dtype=dtypes)
def test_perturbations(xp: ModuleType, seed: int, radius: float, dtype: str) -> None:
    rng = np.random.default_rng(seed)
    theta, gradient = rng.standard_normal((2, 3, 4))
    step: Matrix = radius * gradient / np.linalg.norm(gradient)
    put = lambda *arrays: [to_library(xp, a, dtype) for a in arrays]  # noqa: E731
    right = verify_perturbation(*put(theta, theta - step, gradient), radius)
    assert bool(right.passed)
    assert float(right.length) == pytest.approx(1, rel=1e-3)
    assert float(right.alignment) == pytest.approx(1, rel=1e-3)
    ascent = verify_perturbation(*put(theta, theta + step, gradient), radius)
    assert not bool(ascent.passed)
    assert float(ascent.alignment) == pytest.approx(-1, rel=1e-3)
    assert float(ascent.error) == pytest.approx(2, rel=1e-3)
    half = verify_perturbation(*put(theta, theta - 0.5 * step, gradient), radius)
    assert not bool(half.passed)
    assert float(half.length) == pytest.approx(0.5, rel=1e-2)


def test_a_zero_gradient_shifts_nothing(xp: ModuleType) -> None:
    theta, zero = to_library(xp, np.ones(3), "float32"), to_library(xp, np.zeros(3), "float32")
    # Radius times a unit vector that does not exist: the parameter has to stay.
    assert bool(verify_perturbation(theta, theta, zero, 0.5).passed)
    assert not bool(verify_perturbation(theta, theta + 0.5, zero, 0.5).passed)
    with pytest.raises(ValueError, match="must have one shape"):
        verify_perturbation(theta, theta[:2], zero, 0.5)
