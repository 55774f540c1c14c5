"""scikit-learn's handwritten digits: 1,797 grey images of 8 by 8 pixels, part of the library."""

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from training.config import DataConfig
from training.data.images import ArrayImages
from training.data.source import Source, Split


def digits_source(config: DataConfig) -> Source:
    """Load the digits with a fixed, stratified test split of 360 images; no seed changes it."""
    pixels, target = load_digits(return_X_y=True)
    # Greys are counts from 0 to 16: sixteenths are exact in float32, bytes would not be.
    images = torch.from_numpy(pixels.astype(np.float32) / 16).reshape(-1, 1, 8, 8)
    target = target.astype(np.int64)
    train, test = train_test_split(
        np.arange(len(target)), test_size=360, stratify=target, random_state=0
    )

    def split(indices: NDArray[np.int64]) -> Split:
        return Split(ArrayImages(images[torch.from_numpy(indices)], config), target[indices])

    return Source([str(digit) for digit in range(10)], split(train), lambda: split(test))
