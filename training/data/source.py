"""What every data set gives before it becomes a stream."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from training.data.images import Images


class Split(NamedTuple):
    """Images with their original class numbers, int64 of shape (N,)."""

    images: Images
    targets: NDArray[np.int64]


class Source(NamedTuple):
    """A data set: its class names, its training split, and how to open its test split.

    The test split is a function because a run on held-out training images must not open it.
    """

    class_names: list[str]
    train: Split
    test: Callable[[], Split]
