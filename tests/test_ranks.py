"""Rank selection against a search over ranks with the subspaces themselves."""

from types import ModuleType

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import dtype_name, dtypes, moment, pencils, seeds, to_library, to_numpy

from loda_math import general_subspace, rank_for, relative_energy

shares = st.sampled_from([0.01, 0.3, 0.5, 0.9, 0.99])
few = settings(max_examples=15)


@few
@given(pencil=pencils(), share=shares, dtype=dtypes)
def test_the_smallest_rank_that_carries_the_energy(
    xp: ModuleType, pencil: tuple, share: float, dtype: str
) -> None:
    new, old = (to_library(xp, m, dtype) for m in pencil[:2])
    found = rank_for(new, old, share)
    assert dtype_name(found.curve) == dtype
    assert "int" in dtype_name(found.rank)
    size = len(pencil[0])
    # Each rank by itself, through the public subspace.
    energy = [
        float(relative_energy(general_subspace(new, old, r), new + old)) for r in range(1, size + 1)
    ]
    curve = to_numpy(found.curve)
    np.testing.assert_allclose(curve, energy, atol=1e-5)
    assert np.all(np.diff(curve) >= 0)
    assert curve[-1] == 1
    rank = int(found.rank)
    slack = 1e-5
    assert energy[rank - 1] >= share - slack
    assert rank == 1 or energy[rank - 2] < share + slack


@few
@given(pencil=pencils(kinds=("random", "spiked", "flat"), dead=False), share=shares)
def test_the_ratio_counts_generalised_eigenvalues(
    xp: ModuleType, pencil: tuple, share: float
) -> None:
    new, old = (to_library(xp, m) for m in pencil[:2])
    found = rank_for(new, old, share, of="ratio", ridge=0.1)
    s, o = (m / np.trace(m) for m in pencil[:2])
    values = scipy.linalg.eigh(s, o + 0.1 / len(s) * np.eye(len(s)), eigvals_only=True)[::-1]
    curve = np.cumsum(values) / values.sum()
    np.testing.assert_allclose(to_numpy(found.curve), curve, atol=1e-8)
    assert int(found.rank) == 1 + np.sum(curve < share - 1e-9)


@few
@given(new=moment(6), dtype=dtypes)
def test_a_share_of_one_is_the_numerical_rank(xp: ModuleType, new: np.ndarray, dtype: str) -> None:
    n = to_library(xp, new, dtype)
    basis = to_numpy(general_subspace(n, None, 6))
    for of in ("energy", "ratio"):
        assert int(rank_for(n, None, 1.0, of=of).rank) == np.any(basis != 0, axis=0).sum()
    assert int(rank_for(n, None, 0.0).rank) == 1


def test_decimal_shares_are_met_in_spite_of_rounding(xp: ModuleType) -> None:
    # 0.1 + 0.2 + ... misses 0.6 by one unit in the last place.
    m = to_library(xp, np.diag([0.3, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1]), "float32")
    assert int(rank_for(m, None, 0.6).rank) == 3
    assert int(rank_for(m, None, 0.61).rank) == 4


def test_a_table_over_layers(xp: ModuleType) -> None:
    layers = np.stack([np.diag([6.0, 3, 1]), np.eye(3), np.zeros((3, 3)), np.diag([1.0, 0, 0])])
    found = rank_for(to_library(xp, layers, "float32"), None, 0.9)
    np.testing.assert_array_equal(to_numpy(found.rank), [2, 3, 0, 1])
    assert found.curve.shape == (4, 3)
    np.testing.assert_array_equal(to_numpy(found.curve)[2], 0)


@few
@given(seed=seeds, scale=st.sampled_from([1e-30, 1e30]))
def test_scale_does_not_matter(xp: ModuleType, seed: int, scale: float) -> None:
    m = np.random.default_rng(seed).standard_normal((4, 5))
    one = rank_for(to_library(xp, m.T @ m, "float32"), None, 0.8)
    other = rank_for(to_library(xp, m.T @ m * scale, "float32"), None, 0.8)
    assert int(one.rank) == int(other.rank)


def test_errors_name_the_argument(xp: ModuleType) -> None:
    m = to_library(xp, np.eye(2), "float32")
    with pytest.raises(ValueError, match="share must be a share from 0 to 1"):
        rank_for(m, None, 1.5)
    with pytest.raises(ValueError, match=r"^of must be one of .*energy.*ratio.*got 'variance'"):
        rank_for(m, None, 0.5, of="variance")  # type: ignore[arg-type]
