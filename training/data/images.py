"""Sources that give one image at a time, from memory or from where they are decoded."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast

import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resize_tensor

from training.config import DataConfig
from training.data.decode import read_header

CACHE_BYTES = 1_000_000_000
"""Decoded images are kept in memory below this size, unless ``data.cache`` decides."""


class Images(Protocol):
    """Images by position: uint8, or float in [0, 1], of shape (C, H, W)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Tensor: ...

    def select(self, indices: Sequence[int]) -> Self:
        """Only these images, in this order."""
        ...

    def check(self) -> None:
        """Raise UnreadableImageError for an image that cannot be read, if that shows quickly."""
        ...


class ArrayImages:
    """Images of one size in memory, resized on access if they would take too much of it.

    Parameters
    ----------
    pixels
        uint8, or float in [0, 1], of shape (N, C, H, W).
    config
        Gives the side of the first resize and whether to keep the resized images.
    """

    def __init__(self, pixels: Tensor, config: DataConfig) -> None:
        self.pixels = pixels
        self.config = config

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return _resize_square(self.pixels[index], self.config.resize)

    def select(self, indices: Sequence[int]) -> "ArrayImages":
        """Only these images, in this order; resized now if they are small enough to be kept."""
        pixels = self.pixels[torch.as_tensor(indices, dtype=torch.int64)]
        if keeps(self.config, len(pixels), pixels.shape[1] * pixels.element_size()):
            pixels = _resize_square(pixels, self.config.resize)
        return ArrayImages(pixels, self.config)

    def check(self) -> None:
        """Nothing can be wrong with them: they are in memory."""


class LazyImages:
    """Images that are decoded on access and, when they are small, kept in memory from then on.

    Parameters
    ----------
    items
        What ``opened`` makes an image of: a path, or a position in a data set.
    opened
        Decodes an item to uint8 of shape (C, H, W), the first resize included.
    config
        Gives the side of the first resize, and whether to keep the resized images.
    """

    def __init__(
        self, items: Iterable[Any], opened: Callable[[Any, DataConfig], Tensor], config: DataConfig
    ) -> None:
        self.items = list(items)
        self.opened = opened
        self.config = config
        self._cache: Tensor | None = None
        self._filled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Tensor:
        if self._cache is None or self._filled is None:
            return self.opened(self.items[index], self.config)
        if not self._filled[index]:
            self._cache[index] = self.opened(self.items[index], self.config)
            self._filled[index] = True
        return self._cache[index]

    def select(self, indices: Sequence[int]) -> "LazyImages":
        """Only these images, in this order, with a cache of their own if they are small enough."""
        chosen = LazyImages([self.items[index] for index in indices], self.opened, self.config)
        side = self.config.resize
        if side is not None and keeps(self.config, len(chosen), 3):
            chosen._cache = torch.empty(len(chosen), 3, side, side, dtype=torch.uint8)
            chosen._filled = torch.zeros(len(chosen), dtype=torch.bool)
            if self.config.workers > 0:  # what one loading process decodes serves the others
                for shared in cast("tuple[Any, Any]", (chosen._cache, chosen._filled)):
                    shared.share_memory_()
        return chosen

    def check(self) -> None:
        """Read the header of every image that lies in a file of its own.

        Raises
        ------
        UnreadableImageError
            If one is no image that Pillow can read, or is too large; the message names it.
        """
        for path in self.items:
            if isinstance(path, Path):
                read_header(path)


def keeps(config: DataConfig, count: int, pixel_bytes: int) -> bool:
    """Whether so many images are kept in memory once they are decoded and resized."""
    if config.cache is not None:
        return config.cache
    return config.resize is not None and count * config.resize**2 * pixel_bytes < CACHE_BYTES


def _resize_square(pixels: Tensor, side: int | None) -> Tensor:
    if side is None or pixels.shape[-2:] == (side, side):
        return pixels
    bicubic = InterpolationMode.BICUBIC
    resized: Tensor = resize_tensor(pixels, [side, side], interpolation=bicubic, antialias=True)
    # Bicubic weights overshoot; uint8 is clipped by torchvision, float is not.
    return resized.clamp(0, 1) if resized.is_floating_point() else resized
