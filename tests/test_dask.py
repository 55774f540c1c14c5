"""Dask carries moments of data that do not fit, or live elsewhere, and nothing else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import loda_math as lm

da = pytest.importorskip("dask.array")
db = pytest.importorskip("dask.bag")
distributed = pytest.importorskip("distributed")


def test_dask_carries_moments() -> None:
    x = np.random.default_rng(0).standard_normal((40, 5)).astype(np.float32)
    lazy = lm.second_moment(da.from_array(x, chunks=(7, 5)))
    both = lm.combine(lazy, lm.second_moment(da.from_array(2 * x, chunks=(40, 2))))
    assert type(both.total).__module__.startswith("dask")  # nothing was computed
    expected = lm.second_moment(x) + lm.second_moment(2 * x)
    assert both.count == expected.count == 80
    total = both.total.compute()
    assert total.dtype == np.float64
    np.testing.assert_allclose(total, expected.total, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(both.mean.compute(), expected.mean, rtol=1e-5, atol=1e-6)


def test_dask_is_not_solved_for() -> None:
    m = da.from_array(np.eye(4), chunks=2)
    up, down = da.ones((3, 2), chunks=2), da.ones((2, 4), chunks=2)
    for solve in (
        lambda: lm.general_subspace(m, m, 2),
        lambda: lm.isolated_subspace(m, m, 2),
        lambda: lm.null_subspace(m, 2),
        lambda: lm.recalibration(up, down, m, m, 1.0),
    ):
        with pytest.raises(TypeError, match=r"is a dask array.*\.compute\(\)"):
            solve()


# On the workers of a cluster


@pytest.fixture(scope="module")
def client() -> Iterator[object]:
    """Two processes of their own: what they compute travels."""
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=None, host="127.0.0.1"
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def tokens(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((300, 8)) * np.arange(1, 9)[:: 1 if seed else -1]).astype("f4")


def test_a_bag_of_files_is_summed_where_they_are(client: object, tmp_path: Path) -> None:
    pieces = np.array_split(tokens(0), [10, 90, 91, 200])
    for number, piece in enumerate(pieces):
        np.save(tmp_path / f"{number}.npy", piece)
    files = db.from_sequence(sorted(map(str, tmp_path.glob("*.npy"))), npartitions=3)
    moments = files.map(np.load).map(lm.second_moment).fold(lm.combine).compute()
    expected = lm.second_moment(tokens(0))
    assert isinstance(moments, lm.Moments)
    assert moments.count == expected.count == 300
    assert moments.total.dtype == np.float64
    np.testing.assert_allclose(moments.total, expected.total, rtol=1e-5, atol=1e-2)
    # The solvers take what came back.
    old = lm.second_moment(tokens(1)).mean
    basis = lm.isolated_subspace(moments.mean, old, 3)
    ratio = lm.energy_ratio(basis, expected.mean, old)
    best = lm.energy_ratio(lm.isolated_subspace(expected.mean, old, 3), expected.mean, old)
    np.testing.assert_allclose(ratio, best, rtol=1e-4)


def test_an_array_in_pieces_is_summed_where_they_are(client: object) -> None:
    whole = da.concatenate([da.from_array(tokens(seed), chunks=(70, 8)) for seed in (0, 1)])
    mean = lm.second_moment(whole).mean.compute()
    expected = lm.second_moment(np.concatenate([tokens(0), tokens(1)])).mean
    np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-4)
    assert lm.null_subspace(mean, 2).shape == (8, 2)
