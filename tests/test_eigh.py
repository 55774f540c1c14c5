"""The faster routes give the subspaces of the standard one; a missed eigenvector is noticed."""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

import array_api_strict as strict
import numpy as np
import pytest
import scipy.linalg
from libraries import chosen
from strategies import SPECTRA, Matrix, from_spectrum, orthogonal, to_library, to_numpy

import loda_math as lm
from loda_math import _eigh
from loda_math._arrays import namespace

COUNT = 5
# Part of a spectrum by the dense solver; and by Lanczos, which can run from 192 on for so many.
DENSE, LANCZOS = 200, _eigh.LANCZOS_SIZE
KINDS = tuple(SPECTRA)


@pytest.fixture(params=[x for x in ("numpy", "torch") if x in chosen()], scope="module")
def host(request: pytest.FixtureRequest) -> ModuleType:
    """The libraries whose arrays SciPy can read in place."""
    return import_module(request.param)


def moment(kind: str, seed: int, size: int = DENSE) -> Matrix:
    rng = np.random.default_rng(seed)
    m = from_spectrum(SPECTRA[kind](size, rng), orthogonal(size, rng))
    return m / np.trace(m)


def check(ours: Any, eigenvalues: Any, matrix: Matrix, *, tail: bool = False) -> None:
    """Eigenpairs of a symmetric matrix: energies, residuals, and the span where it is unique."""
    ours, eigenvalues = to_numpy(ours), to_numpy(eigenvalues)
    count = len(eigenvalues)
    exact, vectors = np.linalg.eigh(matrix)
    exact, vectors = (exact, vectors) if tail else (exact[::-1], vectors[:, ::-1])
    slack = 4 * len(matrix) * np.finfo(float).eps * np.abs(exact).max()
    np.testing.assert_allclose(eigenvalues, exact[:count], atol=slack)
    assert np.abs(matrix @ ours - ours * eigenvalues).max() <= slack
    np.testing.assert_allclose(ours.T @ ours, np.eye(count), atol=1e-12)
    gap = abs(exact[count - 1] - exact[count])
    if gap > 100 * slack:
        angle = scipy.linalg.subspace_angles(ours, vectors[:, :count]).max()
        assert angle <= 10 * slack / gap + 1e-7


# By bisection, by Lanczos, and by QL steps, which pay where many are wanted.
@pytest.mark.parametrize(("size", "count"), [(DENSE, COUNT), (LANCZOS, COUNT), (DENSE, 20)])
@pytest.mark.parametrize("kind", KINDS)
def test_leading_and_trailing_eigenvectors(
    host: ModuleType, kind: str, size: int, count: int
) -> None:
    m = moment(kind, 0, size)
    x = to_library(host, m)
    xp = namespace(x=x)
    assert _eigh._on_host(x, count)
    values, vectors = _eigh.leading_eigh(xp, x, count)
    check(vectors, values, m)
    values, vectors = _eigh.leading_eigh(xp, x, count, lanczos=False)
    check(vectors, values, m)
    values, vectors, largest = _eigh.trailing_eigh(xp, x, count)
    check(vectors, values, m, tail=True)
    assert float(largest[0]) == pytest.approx(np.linalg.eigvalsh(m)[-1], rel=1e-9)
    np.testing.assert_array_equal(to_numpy(x), m)
    values, vectors = _eigh.leading_eigh(xp, to_library(host, m), count, overwrite=True)
    check(vectors, values, m)
    values, vectors, _ = _eigh.trailing_eigh(xp, x, count, overwrite=True)
    check(vectors, values, m, tail=True)


PENCILS = [(new, old, DENSE) for new in KINDS for old in KINDS]
PENCILS += [("random", "random", LANCZOS), ("clustered", "deficient", LANCZOS)]


@pytest.mark.parametrize(("new", "old", "size"), PENCILS)
def test_reduced_pencil(host: ModuleType, new: str, old: str, size: int) -> None:
    s = moment(new, 1, size)
    r = moment(old, 2, size) + 1e-2 / size * np.eye(size)
    arrays = to_library(host, s), to_library(host, r)
    xp = namespace(x=arrays[0])
    factor = _eigh.lower_cholesky(xp, arrays[1], "old")
    reduced = _eigh.reduced_pencil(xp, arrays[0], factor)
    np.testing.assert_array_equal(to_numpy(reduced), to_numpy(reduced).T)
    for array, before in zip(arrays, (s, r), strict=True):
        np.testing.assert_array_equal(to_numpy(array), before)
    own = _eigh.lower_cholesky(xp, arrays[1], "old", overwrite=True)
    np.testing.assert_array_equal(to_numpy(own), to_numpy(factor))
    own = _eigh.reduced_pencil(xp, arrays[0], factor, overwrite=True)
    np.testing.assert_array_equal(to_numpy(own), to_numpy(reduced))
    values, vectors = _eigh.leading_eigh(xp, reduced, COUNT)
    directions = _eigh.lower_solve(xp, factor, vectors, transpose=True)
    eigenvalues, ours = to_numpy(values), to_numpy(directions)
    exact, vectors = scipy.linalg.eigh(s, r)
    exact, vectors = exact[::-1], vectors[:, ::-1]
    slack = 1e-10 * exact[0]
    np.testing.assert_allclose(eigenvalues, exact[:COUNT], atol=slack)
    np.testing.assert_allclose(ours.T @ r @ ours, np.eye(COUNT), atol=1e-9)
    assert np.abs(s @ ours - (r @ ours) * eigenvalues).max() <= slack
    if exact[COUNT - 1] - exact[COUNT] > 1e-4 * exact[0]:
        assert scipy.linalg.subspace_angles(ours, vectors[:, :COUNT]).max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "size"), [*((kind, DENSE) for kind in KINDS), ("random", LANCZOS)]
)
def test_solvers_do_not_depend_on_the_route(host: ModuleType, kind: str, size: int) -> None:
    """array-api-strict, whose arrays SciPy does not read, takes the standard route."""
    new = np.stack([moment(kind, 3, size), moment("random", 4, size)])
    old = np.stack([moment(kind, 5, size)] * 2)
    arrays = to_library(host, new), to_library(host, old)
    solvers = {
        "general": lambda n, o: lm.general_subspace(n, o, COUNT),
        "isolated": lambda n, o: lm.isolated_subspace(n, o, COUNT),
        "null": lambda n, o: lm.null_subspace(o, COUNT),
    }
    for name, solve in solvers.items():
        fast, again = (to_numpy(solve(*arrays)) for _ in range(2))
        np.testing.assert_array_equal(fast, again)  # deterministic
        standard = to_numpy(solve(strict.asarray(new), strict.asarray(old)))
        for ours, theirs, n, o in zip(fast, standard, new, old, strict=True):
            assert np.array_equal(ours.any(axis=0), theirs.any(axis=0))
            best = quality(name, theirs, n, o)
            assert quality(name, ours, n, o) == pytest.approx(best, rel=1e-8, abs=1e-13)


def quality(name: str, u: Matrix, new: Matrix, old: Matrix) -> float:
    """What each subspace maximises (or minimises): equal however ties are broken."""
    u = u[:, u.any(axis=0)]
    if name == "isolated":
        r = old / np.trace(old) + 1e-2 / len(old) * np.eye(len(old))
        return float(np.trace(np.linalg.solve(u.T @ r @ u, u.T @ new @ u)))
    return float(np.trace(u.T @ ((new if name == "general" else 0) + old) @ u))


@pytest.mark.parametrize("kind", KINDS)
def test_lanczos_is_right_or_says_nothing(kind: str) -> None:
    a = moment(kind, 0)
    pair = _eigh._lanczos(a, COUNT)
    if pair is not None:
        check(pair[1], pair[0], a)
    assert pair is not None or kind in ("flat", "clustered")


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_lanczos_proves_a_spread_spectrum_at_any_scale(scale: float) -> None:
    q = orthogonal(DENSE, np.random.default_rng(0))
    values = scale * np.geomspace(1, 1e-3, DENSE)
    pair = _eigh._lanczos(from_spectrum(values, q), COUNT)
    assert pair is not None
    np.testing.assert_allclose(pair[0], values[:COUNT], rtol=1e-9)
    np.testing.assert_allclose(np.abs(np.sum(pair[1] * q[:, :COUNT], axis=0)), 1, atol=1e-9)


@pytest.mark.parametrize("filled", [COUNT + 1, 20, DENSE])
def test_lanczos_is_deterministic(filled: int) -> None:
    """Also where the vectors run out and ARPACK starts again from random ones."""
    q = orthogonal(DENSE, np.random.default_rng(0))
    a = from_spectrum(np.where(np.arange(DENSE) < filled, np.linspace(2, 1, DENSE), 0.0), q)
    first, other = (_eigh._lanczos(a, COUNT) for _ in range(2))
    assert first is not None
    assert other is not None
    np.testing.assert_array_equal(first[1], other[1])


def test_a_missed_eigenvector_is_noticed() -> None:
    values, q = np.linspace(1.0, 0.1, DENSE), orthogonal(DENSE, np.random.default_rng(0))
    a = from_spectrum(values, q)
    before = a.copy()
    assert _eigh._none_missed(a, values[:COUNT], q[:, :COUNT], 1e-12)
    for missed in range(COUNT):
        others = np.delete(np.arange(COUNT + 1), missed)
        assert not _eigh._none_missed(a, values[others], q[:, others], 1e-12)
    np.testing.assert_array_equal(a, before)  # its memory served on the way


def test_what_lanczos_cannot_prove_goes_to_the_dense_solver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from scipy.sparse.linalg import ArpackError

    a = moment("random", 0, LANCZOS)
    values, vectors = np.linalg.eigh(a)
    others = slice(LANCZOS - 1 - COUNT, LANCZOS - 1)  # all but the largest

    def failing(*_: Any, **__: Any) -> Any:
        raise ArpackError(-1)

    for eigsh in (lambda *_, **__: (values[others], vectors[:, others]), failing):
        monkeypatch.setattr("scipy.sparse.linalg.eigsh", eigsh)
        assert _eigh._lanczos(a, COUNT) is None
        eigenvalues, _ = _eigh.leading_eigh(np, a, COUNT)
        np.testing.assert_allclose(eigenvalues, values[::-1][:COUNT])


@pytest.mark.parametrize("name", ["stebz", "stein", "sterf"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_where_part_of_a_spectrum_fails_the_whole_is_solved(
    monkeypatch: pytest.MonkeyPatch, name: str, overwrite: bool
) -> None:
    """Whatever routine of LAPACK says that it failed."""
    functions = scipy.linalg.lapack.get_lapack_funcs

    def failing(function: Any) -> Any:
        return lambda *args, **kwargs: (*function(*args, **kwargs)[:-1], 1)

    def some_failing(names: Any, arrays: Any) -> Any:
        return [
            failing(function) if one == name else function
            for one, function in zip(names, functions(names, arrays), strict=True)
        ]

    m = moment("random", 0)
    whole, vectors = np.linalg.eigh(m)
    monkeypatch.setattr(scipy.linalg.lapack, "get_lapack_funcs", some_failing)
    for count in (COUNT, 20):
        for start, stop in ((0, count), (DENSE - count, DENSE)):
            eigenvalues, basis, largest = _eigh._dense(m.copy().T, start, stop, overwrite)
            np.testing.assert_allclose(eigenvalues, whole[start:stop], atol=1e-12)
            assert largest == pytest.approx(whole[-1:])
            overlap = np.abs(np.sum(basis * vectors[:, start:stop], axis=0))
            np.testing.assert_allclose(overlap, 1, atol=1e-6)


def test_a_matrix_of_separate_blocks() -> None:
    """Which the tridiagonal form splits into: inverse iteration must know which is whose."""
    parts = np.linspace(3.0, 1.0, DENSE // 2), np.linspace(2.9, 1.1, DENSE // 2)
    m = scipy.linalg.block_diag(
        *(
            from_spectrum(v, orthogonal(DENSE // 2, np.random.default_rng(i)))
            for i, v in enumerate(parts)
        )
    )
    for count in (COUNT, 20):
        values, vectors = _eigh.leading_eigh(np, m, count, lanczos=False)
        check(vectors, values, m)
        values, vectors, _ = _eigh.trailing_eigh(np, m, count)
        check(vectors, values, m, tail=True)


@pytest.mark.parametrize("kind", KINDS)
def test_largest_eigenvalue_is_bounded_from_below(xp: ModuleType, kind: str) -> None:
    for size in (1, 2, 3, 60):
        rng = np.random.default_rng(size)
        values = np.stack([SPECTRA[kind](size, rng) for _ in range(3)])
        values[2] = 0.0
        stack = np.stack([from_spectrum(v, orthogonal(size, rng)) for v in values])
        s = to_library(xp, stack, "float32")
        exact = np.linalg.eigvalsh(to_numpy(s))[:, -1:]
        bound = to_numpy(_eigh.largest_eigenvalue(namespace(s=s), s))
        assert np.all(bound <= exact * (1 + 1e-5))
        assert np.all(bound >= 0.5 * exact)


@pytest.mark.parametrize("size", [4, DENSE])
def test_triangular_solves(xp: ModuleType, size: int) -> None:
    rng = np.random.default_rng(0)
    factor = np.tril(rng.standard_normal((2, size, size))) / size + np.eye(size)
    rhs = rng.standard_normal((2, size, 3))
    a, b = to_library(xp, factor, "float32"), to_library(xp, rhs, "float32")
    for transpose, matrix in ((False, factor), (True, np.swapaxes(factor, 1, 2))):
        x = to_numpy(_eigh.lower_solve(namespace(a=a), a, b, transpose=transpose))
        np.testing.assert_allclose(x, np.linalg.solve(matrix, rhs), atol=1e-5)


def test_small_matrices_large_parts_and_foreign_bytes_take_the_standard_route() -> None:
    large = np.eye(DENSE)
    assert _eigh._on_host(large, COUNT)
    assert not _eigh._on_host(large[:8, :8], 2)
    assert not _eigh._on_host(large, DENSE - 1)
    assert not _eigh._on_host(large.astype(">f8"), COUNT)


def test_without_scipy_the_standard_decides(
    host: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = to_library(host, moment("random", 0))
    fast = lm.general_subspace(x, x, COUNT)
    monkeypatch.setitem(sys.modules, "scipy", None)  # an import of it fails from here on
    assert not _eigh._on_host(x, COUNT)
    slow = lm.general_subspace(x, x, COUNT)
    np.testing.assert_allclose(to_numpy(fast), to_numpy(slow), atol=1e-9)


@pytest.mark.parametrize("size", [4, DENSE])
def test_an_indefinite_matrix_is_named_by_its_place_in_a_stack(xp: ModuleType, size: int) -> None:
    stack = np.broadcast_to(np.eye(size), (2, 3, size, size)).copy()
    stack[1, 2, 0, 0] = -1.0
    x = to_library(xp, stack, "float32")
    with pytest.raises(ValueError, match=r"old\[1, 2\]"):
        _eigh.lower_cholesky(namespace(x=x), x, "old")
    with pytest.raises(ValueError, match="old is"):
        _eigh.lower_cholesky(namespace(x=x), x[1, 2, ...], "old")
    factor = _eigh.lower_cholesky(namespace(x=x), x[0, ...], "old")
    np.testing.assert_array_equal(to_numpy(factor), stack[0])


def test_what_is_no_fault_of_the_matrix_is_raised_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(np.linalg, "cholesky", no_memory)
    with pytest.raises(MemoryError):
        _eigh.lower_cholesky(np, np.eye(3), "old")
