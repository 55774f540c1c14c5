"""The held-out ratio against its definition, and that it sees through an optimistic choice."""

from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from strategies import seeds, to_library, to_numpy

from loda_math import energy_ratio, heldout_ratio, isolated_subspace, relative_energy


@settings(max_examples=10)
@given(seed=seeds)
def test_each_half_judges_the_other(xp: ModuleType, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((3, 2, 7, 4))
    moments = np.einsum("k...ni,k...nj->k...ij", x, x) / 7
    a, b, old = (to_library(xp, m, "float32") for m in moments)
    choose = lambda n, o: isolated_subspace(n, o, 2)  # noqa: E731
    found = heldout_ratio(choose, a, b, old)
    u, v = choose(a, old), choose(b, old)
    for ours, terms in (
        (found.chosen, (energy_ratio(u, a, old), energy_ratio(v, b, old))),
        (found.heldout, (energy_ratio(u, b, old), energy_ratio(v, a, old))),
        (found.energy, (relative_energy(u, b), relative_energy(v, a))),
    ):
        assert ours.shape == (2,)
        np.testing.assert_allclose(
            to_numpy(ours), np.mean([to_numpy(t) for t in terms], axis=0), rtol=1e-6
        )
    # The halves take part alike.
    other = heldout_ratio(choose, b, a, old)
    np.testing.assert_allclose(to_numpy(other.heldout), to_numpy(found.heldout), rtol=1e-6)


def test_few_images_make_the_choice_optimistic(xp: ModuleType) -> None:
    rng = np.random.default_rng(0)
    size, images = 30, 20
    old = np.eye(size)
    a, b = (x.T @ x / images for x in rng.standard_normal((2, images, size)))
    # Nothing distinguishes the tasks: the ratio to expect is 1.
    arrays = [to_library(xp, m, "float32") for m in (a, b, old)]
    found = heldout_ratio(lambda n, o: isolated_subspace(n, o, 3), *arrays)
    assert float(found.chosen) > 3
    assert float(found.heldout) == pytest.approx(1, abs=0.4)
