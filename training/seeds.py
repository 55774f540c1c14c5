"""Seeds of a run: one for each purpose and task, and code that draws from torch's generators."""

from collections.abc import Iterator
from contextlib import contextmanager

# Each use of randomness has a stream of its own, so that switching one part off (a pass over the
# data, a read-out) does not shift the draws of another. The place in the list is part of the seed.
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
    """A seed of its own for each purpose and task, from the seed of the run.

    Parameters
    ----------
    seed : int
        Seed of the run.
    task : int
        Number of the task, counted from 0; 0 for what is drawn once a run.
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
    """Seed torch's global generators for a block, and put them back as they were after it.

    For what takes no generator: the random weights of a new model, drop-out.
    """
    import torch  # not above: methods derive their seeds without it

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
