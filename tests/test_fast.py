"""The faster routes give the subspaces of the standard one; a missed eigenvector is noticed."""

from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import scipy.linalg
from libraries import chosen
from strategies import SPECTRA, Matrix, from_spectrum, orthogonal, to_library, to_numpy

import loda_math as lm
from loda_math import _fast, _lanczos
from loda_math._arrays import namespace

SIZE, COUNT = 200, 5  # the smallest size at which Lanczos runs for so many
KINDS = tuple(SPECTRA)
ROUTES = ("dense", "lanczos")


@pytest.fixture(params=[x for x in ("numpy", "torch") if x in chosen()], scope="module")
def host(request: pytest.FixtureRequest) -> ModuleType:
    """The libraries whose arrays SciPy can read in place."""
    return import_module(request.param)


@pytest.fixture(params=ROUTES)
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """One of the fast routes at a small size; the list holds what ran."""
    ran: list[str] = []
    monkeypatch.setattr(_fast, "PARTIAL_SIZE", 1)
    monkeypatch.setattr(_fast, "LANCZOS_SIZE", 1 if request.param == "lanczos" else 10**9)
    for module, name in ((_fast, "_dense"), (_lanczos, "leading")):
        monkeypatch.setattr(module, name, spy(getattr(module, name), name, ran))
    yield ran
    assert ("leading" in ran) == (request.param == "lanczos")
    assert ran, "no fast route was taken"


def spy(function: Callable[..., Any], name: str, ran: list[str]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        ran.append(name)
        return function(*args)

    return call


def moment(kind: str, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    m = from_spectrum(SPECTRA[kind](SIZE, rng), orthogonal(SIZE, rng))
    return m / np.trace(m)


def check(ours: Matrix, found: Matrix, matrix: Matrix, *, tail: bool = False) -> None:
    """Eigenpairs of a symmetric matrix: energies, residuals, and the span where it is unique."""
    exact, vectors = np.linalg.eigh(matrix)
    exact, vectors = (exact, vectors) if tail else (exact[::-1], vectors[:, ::-1])
    slack = 4 * SIZE * np.finfo(float).eps * np.abs(exact).max()
    np.testing.assert_allclose(found, exact[:COUNT], atol=slack)
    assert np.abs(matrix @ ours - ours * found).max() <= slack
    np.testing.assert_allclose(ours.T @ ours, np.eye(COUNT), atol=1e-12)
    gap = abs(exact[COUNT - 1] - exact[COUNT])
    if gap > 100 * slack:
        angle = scipy.linalg.subspace_angles(ours, vectors[:, :COUNT]).max()
        assert angle <= 10 * slack / gap + 1e-7


@pytest.mark.parametrize("kind", KINDS)
def test_leading_and_trailing_eigenvectors(host: ModuleType, route: list[str], kind: str) -> None:
    m = moment(kind, 0)
    x = to_library(host, m)
    values, vectors = _fast.leading_eigh(namespace(x=x), x, COUNT)
    check(to_numpy(vectors), to_numpy(values), m)
    values, vectors, largest = _fast.trailing_eigh(namespace(x=x), x, COUNT)
    check(to_numpy(vectors), to_numpy(values), m, tail=True)
    assert float(largest[0]) == pytest.approx(np.linalg.eigvalsh(m)[-1], rel=1e-9)


@pytest.mark.parametrize("old", KINDS)
@pytest.mark.parametrize("new", KINDS)
def test_leading_pencil(host: ModuleType, route: list[str], new: str, old: str) -> None:
    s = moment(new, 1)
    r = moment(old, 2) + 1e-2 / SIZE * np.eye(SIZE)
    arrays = to_library(host, s), to_library(host, r)
    values, directions = _fast.leading_pencil(namespace(x=arrays[0]), *arrays, COUNT, "old")
    found, ours = to_numpy(values), to_numpy(directions)
    exact, vectors = scipy.linalg.eigh(s, r)
    exact, vectors = exact[::-1], vectors[:, ::-1]
    slack = 1e-10 * exact[0]
    np.testing.assert_allclose(found, exact[:COUNT], atol=slack)
    np.testing.assert_allclose(ours.T @ r @ ours, np.eye(COUNT), atol=1e-9)
    assert np.abs(s @ ours - (r @ ours) * found).max() <= slack
    if exact[COUNT - 1] - exact[COUNT] > 1e-4 * exact[0]:
        assert scipy.linalg.subspace_angles(ours, vectors[:, :COUNT]).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_solvers_do_not_depend_on_the_route(
    host: ModuleType, route: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = np.stack([moment(kind, 3), moment("random", 4)]), np.stack([moment(kind, 5)] * 2)
    arrays = to_library(host, new), to_library(host, old)
    solvers = {
        "general": lambda n, o: lm.general_subspace(n, o, COUNT),
        "isolated": lambda n, o: lm.isolated_subspace(n, o, COUNT),
        "null": lambda n, o: lm.null_subspace(o, COUNT),
    }
    fast = {name: to_numpy(solve(*arrays)) for name, solve in solvers.items()}
    again = {name: to_numpy(solve(*arrays)) for name, solve in solvers.items()}
    monkeypatch.setattr(_fast, "PARTIAL_SIZE", 10**9)
    for name, solve in solvers.items():
        np.testing.assert_array_equal(fast[name], again[name])  # deterministic
        standard = to_numpy(solve(*arrays))
        for ours, theirs, n, o in zip(fast[name], standard, new, old, strict=True):
            assert np.array_equal(ours.any(axis=0), theirs.any(axis=0))
            best = quality(name, theirs, n, o)
            assert quality(name, ours, n, o) == pytest.approx(best, rel=1e-8, abs=1e-13)


def quality(name: str, u: Matrix, new: Matrix, old: Matrix) -> float:
    """What each subspace maximises (or minimises): equal however ties are broken."""
    u = u[:, u.any(axis=0)]
    if name == "isolated":
        r = old / np.trace(old) + 1e-2 / SIZE * np.eye(SIZE)
        return float(np.trace(np.linalg.solve(u.T @ r @ u, u.T @ new @ u)))
    return float(np.trace(u.T @ ((new if name == "general" else 0) + old) @ u))


def test_a_missed_eigenvector_is_noticed() -> None:
    values, q = np.linspace(1.0, 0.1, SIZE), orthogonal(SIZE, np.random.default_rng(0))
    a = from_spectrum(values, q)
    kept = np.arange(COUNT)
    assert _lanczos._complete(a, values[kept], q[:, kept], 1e-12)
    for missed in range(COUNT):
        kept = np.delete(np.arange(COUNT + 1), missed)
        assert not _lanczos._complete(a, values[kept], q[:, kept], 1e-12)


def test_what_lanczos_cannot_prove_goes_to_the_dense_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = moment("random", 0)
    values, vectors = np.linalg.eigh(a)
    second = slice(SIZE - 1 - COUNT, SIZE - 1)  # all but the largest
    with monkeypatch.context() as patch:
        patch.setattr(
            "scipy.sparse.linalg.eigsh", lambda *_, **__: (values[second], vectors[:, second])
        )
        assert _lanczos.leading(a, COUNT) is None
        patch.setattr(_fast, "LANCZOS_SIZE", 1)
        found, _ = _fast.leading_eigh(np, a, COUNT)
    np.testing.assert_allclose(found, values[::-1][:COUNT])
    monkeypatch.setattr(_lanczos, "RESTARTS", 1)
    assert _lanczos.leading(np.diag(np.linspace(1, 0.99, 20 * SIZE // 8)), COUNT) is None


@pytest.mark.parametrize("filled", [COUNT + 1, 20, SIZE])
def test_lanczos_is_deterministic(filled: int) -> None:
    """Also where the vectors run out and ARPACK starts again from random ones."""
    q = orthogonal(SIZE, np.random.default_rng(0))
    a = from_spectrum(np.where(np.arange(SIZE) < filled, np.linspace(2, 1, SIZE), 0.0), q)
    first, other = (_lanczos.leading(a, COUNT) for _ in range(2))
    assert first is not None
    assert other is not None
    np.testing.assert_array_equal(first[1], other[1])


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_lanczos_proves_a_spread_spectrum_at_any_scale(scale: float) -> None:
    q = orthogonal(SIZE, np.random.default_rng(0))
    values = scale * np.geomspace(1, 1e-3, SIZE)
    found = _lanczos.leading(from_spectrum(values, q), COUNT)
    assert found is not None
    np.testing.assert_allclose(found[0], values[:COUNT], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(found[1] * q[:, :COUNT], axis=0)), 1, atol=1e-9)


def test_where_part_of_a_spectrum_fails_the_whole_is_solved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = moment("random", 0)
    solve = scipy.linalg.eigh

    def failing(*args: Any, subset_by_index: tuple[int, int] | None = None, **kwargs: Any) -> Any:
        if subset_by_index is not None:
            raise np.linalg.LinAlgError
        return solve(*args, **kwargs)

    whole, vectors = np.linalg.eigh(a)
    monkeypatch.setattr(scipy.linalg, "eigh", failing)
    for start, stop in ((0, COUNT), (SIZE - COUNT, SIZE)):
        found, basis = _fast._dense(a, start, stop)
        np.testing.assert_allclose(found, whole[start:stop], atol=1e-12)
        overlap = np.abs(np.sum(basis * vectors[:, start:stop], axis=0))
        np.testing.assert_allclose(overlap, 1, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_largest_eigenvalue_is_bounded_from_below(xp: ModuleType, kind: str) -> None:
    for size in (1, 2, 3, 60):
        rng = np.random.default_rng(size)
        values = np.stack([SPECTRA[kind](size, rng) for _ in range(3)])
        values[2] = 0.0
        stack = np.stack([from_spectrum(v, orthogonal(size, rng)) for v in values])
        s = to_library(xp, stack, "float32")
        exact = np.linalg.eigvalsh(to_numpy(s))[:, -1:]
        bound = to_numpy(_fast.largest_eigenvalue(namespace(s=s), s))
        assert np.all(bound <= exact * (1 + 1e-5))
        assert np.all(bound >= 0.5 * exact)


def test_triangular_solves(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    factor = np.tril(rng.standard_normal((2, 4, 4))) + 4 * np.eye(4)
    rhs = rng.standard_normal((2, 4, 3))
    a, b = to_library(xp, factor, "float32"), to_library(xp, rhs, "float32")
    for transpose, matrix in ((False, factor), (True, np.swapaxes(factor, 1, 2))):
        x = to_numpy(_fast.lower_solve(namespace(a=a), a, b, transpose=transpose))
        np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), atol=1e-5)


def test_small_matrices_large_parts_and_foreign_bytes_take_the_standard_route() -> None:
    large = np.eye(SIZE)
    assert _fast._on_host(large, COUNT)
    assert not _fast._on_host(large[:8, :8], 2)
    assert not _fast._on_host(large, SIZE - 1)
    assert not _fast._on_host(large.astype(">f8"), COUNT)


def test_without_scipy_the_standard_decides(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = to_library(host, moment("random", 0))
    fast = lm.general_subspace(x, x, COUNT)
    monkeypatch.setattr(_fast, "find_spec", lambda name: None)
    monkeypatch.setattr(_fast, "_dense", None)
    slow = lm.general_subspace(x, x, COUNT)
    np.testing.assert_allclose(to_numpy(fast), to_numpy(slow), atol=1e-9)
