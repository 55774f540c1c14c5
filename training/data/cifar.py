"""CIFAR-100 by torchvision: 100 classes of 32 by 32 pixels, 500 training images each."""

from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR100

from training.config import DataConfig
from training.data.images import ArrayImages
from training.data.source import Source, Split


def cifar100_source(config: DataConfig) -> Source:
    """Open CIFAR-100 in ``data.root``, downloading it there if it is not found.

    Raises
    ------
    FileNotFoundError
        If it is neither there nor can be downloaded; the message says what to put where.
    """
    root = Path(config.root or "").expanduser()
    train = _open(root, train=True)
    return Source(
        list(train.classes), _split(train, config), lambda: _split(_open(root, train=False), config)
    )


def _open(root: Path, *, train: bool) -> CIFAR100:
    try:
        return CIFAR100(root, train=train, download=False)
    except RuntimeError:  # torchvision's way to say that files are missing or damaged
        pass
    try:
        return CIFAR100(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        msg = (
            f"CIFAR-100 is not in {root} and could not be downloaded ({error}). Put "
            f"{CIFAR100.filename} there, or its unpacked folder as {root / CIFAR100.base_folder}."
        )
        raise FileNotFoundError(msg) from error


def _split(data: CIFAR100, config: DataConfig) -> Split:
    pixels = torch.from_numpy(np.ascontiguousarray(data.data.transpose(0, 3, 1, 2)))
    return Split(ArrayImages(pixels, config), np.asarray(data.targets, dtype=np.int64))
