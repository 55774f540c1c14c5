"""Seeds of a run, and what leaves torch's own generators as they were."""

import itertools

import pytest
import torch

from training.seeds import derive, seeded

PURPOSES = ("batches", "moments", "head", "steps", "alignment", "method", "ridge", "dropout")


def test_seeds_differ_between_purposes_tasks_and_runs() -> None:
    seeds = [derive(*place) for place in itertools.product(range(3), range(3), PURPOSES)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [derive(*place) for place in itertools.product(range(3), range(3), PURPOSES)]


def test_a_purpose_must_be_known() -> None:
    with pytest.raises(ValueError):
        derive(0, 0, "tea")


def test_a_seeded_block_draws_the_same_and_disturbs_nobody() -> None:
    torch.manual_seed(5)
    before, drawn = torch.get_rng_state(), []
    for _ in range(2):
        with seeded(1):
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn)
    assert torch.equal(torch.get_rng_state(), before)
