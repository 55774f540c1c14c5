"""CIFAR-10 in memory, from one picture a class, and its batches: crops, flips, erased squares."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

SIDE = 32
PAD = 4


class Images(NamedTuple):
    """Pixels (N, 32, 32, 3), uint8, and labels (N,), int64: numbers of the sorted class names."""

    pixels: Tensor
    labels: Tensor

    def take(self, index: Tensor) -> "Images":
        """Return the images at ``index``."""
        return Images(self.pixels[index], self.labels[index])


def read(root: Path, split: str) -> Images:
    """Read ``<root>/<split>_<class>.webp``, each a grid of tiles of 32 x 32 pixels.

    Raises
    ------
    FileNotFoundError
        If there are no such files.
    ValueError
        If a picture is no grid of such tiles.
    """
    paths = sorted(root.glob(f"{split}_*.webp"))
    if not paths:
        msg = f"no {split}_CLASS.webp under {root}: give the folder with one picture a class."
        raise FileNotFoundError(msg)
    tiles = [_tiles(path) for path in paths]
    labels = torch.arange(len(tiles)).repeat_interleave(torch.tensor([len(t) for t in tiles]))
    return Images(torch.from_numpy(np.concatenate(tiles)), labels)


def _tiles(path: Path) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    height, width, _ = pixels.shape
    if height % SIDE or width % SIDE:
        msg = f"{path} has {width} x {height} pixels: not a grid of tiles of {SIDE} x {SIDE}."
        raise ValueError(msg)
    grid = pixels.reshape(height // SIDE, SIDE, width // SIDE, SIDE, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


def split_off(images: Images, every: int) -> tuple[Images, Images]:
    """Hold out each ``every``-th image: the others, and those held out."""
    held = torch.arange(len(images.labels)) % every == every - 1
    return images.take(~held), images.take(held)


def scaled(pixels: Tensor) -> Tensor:
    """Map bytes (N, H, W, 3) to floats (N, 3, H, W) in [-1, 1], as ``data.mean 0.5`` and ``std``.

    Examples
    --------
    >>> scaled(torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1, 1)).flatten()
    tensor([-1.,  1.])
    """
    return pixels.permute(0, 3, 1, 2).float().div_(255).sub_(0.5).div_(0.5)


def epoch(
    images: Images, batch_size: int, erase: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield one pass in random order, as (N, 3, 32, 32) floats and labels; a rest is left out.

    Each image is mirrored at its borders by 4 pixels and cut at random, flipped left to right
    with probability 0.5, and loses a square of ``erase`` pixels, which becomes grey.
    """
    count = len(images.labels)
    order = torch.randperm(count, generator=generator)
    for index in torch.split(order[: count - count % batch_size], batch_size):
        chosen = images.take(index)
        yield _vary(scaled(chosen.pixels), erase, generator), chosen.labels


def _vary(x: Tensor, erase: int, generator: torch.Generator) -> Tensor:
    def draw(high: int) -> Tensor:
        return torch.randint(high, (len(x), 1), generator=generator)

    line = torch.arange(SIDE)
    rows, columns = line + draw(2 * PAD + 1), line + draw(2 * PAD + 1)
    columns = torch.where(draw(2) == 1, columns.flip(1), columns)
    padded = functional.pad(x, (PAD,) * 4, mode="reflect").permute(0, 2, 3, 1)
    cut = padded[torch.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]
    # The square may hang over the border: then less is lost.
    top, left = draw(SIDE) - erase // 2, draw(SIDE) - erase // 2
    hit_rows = (line >= top) & (line < top + erase)
    hit_columns = (line >= left) & (line < left + erase)
    gone = hit_rows[:, :, None] & hit_columns[:, None, :]
    return cut.masked_fill_(gone[..., None], 0.0).permute(0, 3, 1, 2)
