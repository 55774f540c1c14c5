"""Seeds of a run, one per purpose and task, and a context that seeds torch's global generators."""

from collections.abc import Iterator
from contextlib import contextmanager

# Every use of randomness has its own stream, so that switching one part off (a pass over the data,
# a read-out) does not shift the draws of another. The position in the list is part of the seed.
_PURPOSES = (
    "batches",
    "moments",
    "head",
    "steps",
    "alignment",
    "method",
    "ridge",
    "backbone",
    "dropout",
)


def derive(seed: int, task: int, purpose: str) -> int:
    """A separate seed for every purpose and task, from the seed of the run.

    Parameters
    ----------
    seed : int
        Seed of the run.
    task : int
        Number of the task, counted from 0; 0 for draws that are made once per run.
    purpose : str
        One of the known purposes; anything else is a ValueError.

    Examples
    --------
    >>> derive(1993, 0, "head") == derive(1993, 1, "head")
    False
    """
    import numpy as np

    sequence = np.random.SeedSequence((seed, task, _PURPOSES.index(purpose)))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generators for a block, and restore them after it.

    For code that takes no generator: the random weights of a new model, drop-out.
    """
    import torch  # imported late: methods derive seeds without torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
