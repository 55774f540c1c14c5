"""Where images come from: decoding of files, and sources that give one image at a time."""

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize as resize_tensor

from training.config import NATIVE_SIDE, DataConfig

CACHE_BYTES = 1_000_000_000
"""Decoded images are kept in memory below this size, unless ``data.cache`` decides."""

# Besides its own errors, Pillow lets what a damaged file provokes in a codec through as it is.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class UnreadableImageError(ValueError):
    """An image file is missing or cannot be decoded; the message names it and says what to do.

    The message is the same whether this process or a loading one met the file.

    Examples
    --------
    >>> UnreadableImageError("there is no image file x.png.")
    UnreadableImageError('there is no image file x.png.')
    """

    def __init__(self, message: str) -> None:
        # From a loading process, torch raises the class anew with the whole traceback as message,
        # which ends with the original message behind the name of the class.
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].rstrip("\n"))


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


class FileImages:
    """Image files, decoded on access and, when they are small, kept in memory from then on.

    Parameters
    ----------
    paths
        The files.
    config
        Gives the side of the first resize, and whether to keep the resized images.
    """

    def __init__(self, paths: Iterable[Path], config: DataConfig) -> None:
        self.paths = list(paths)
        self.config = config
        self._cache: Tensor | None = None
        self._filled: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        if self._cache is None or self._filled is None:
            return open_image(self.paths[index], self.config)
        if not self._filled[index]:
            self._cache[index] = open_image(self.paths[index], self.config)
            self._filled[index] = True
        return self._cache[index]

    def select(self, indices: Sequence[int]) -> "FileImages":
        """Only these images, in this order, with a cache of their own if they are small enough."""
        chosen = FileImages([self.paths[index] for index in indices], self.config)
        side = self.config.resize
        if side is not None and keeps(self.config, len(chosen), 3):
            chosen._cache = torch.empty(len(chosen), 3, side, side, dtype=torch.uint8)
            chosen._filled = torch.zeros(len(chosen), dtype=torch.bool)
            if self.config.workers > 0:  # what one loading process decodes serves the others
                for shared in cast("tuple[Any, Any]", (chosen._cache, chosen._filled)):
                    shared.share_memory_()
        return chosen

    def check(self) -> None:
        """Read the header of every file.

        Raises
        ------
        UnreadableImageError
            If one is no image that Pillow can read, or is too large; the message names it.
        """
        for path in self.paths:
            try:
                with Image.open(path):
                    pass
            except _DECODE_ERRORS as error:
                raise _unreadable(path, error) from error


def keeps(config: DataConfig, count: int, pixel_bytes: int) -> bool:
    """Whether so many images are kept in memory once they are decoded and resized."""
    if config.cache is not None:
        return config.cache
    return config.resize is not None and count * config.resize**2 * pixel_bytes < CACHE_BYTES


def open_image(path: str | Path, config: DataConfig) -> Tensor:
    """Decode an image file as the experiment's own images are: channels, rotation, first resize.

    The rotation noted by the camera is applied, transparency is dropped, and everything becomes
    RGB (grey for digits).

    Returns
    -------
    uint8 tensor of shape (C, H, W).

    Raises
    ------
    UnreadableImageError
        A ValueError, if the file is missing, cannot be decoded or is too large; the message names
        it.
    """
    try:
        with Image.open(path) as file:
            image = _plain(ImageOps.exif_transpose(file), "L" if config.name == "digits" else "RGB")
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error
    for side in (NATIVE_SIDE.get(config.name), config.resize):
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _plain(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I;16", "I")):  # Pillow would cut 16-bit greys off at 255
        wide: NDArray[np.int64] = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((wide.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "P":  # a palette may hold transparency, which a direct conversion warns of
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _resize_square(pixels: Tensor, side: int | None) -> Tensor:
    if side is None or pixels.shape[-2:] == (side, side):
        return pixels
    bicubic = InterpolationMode.BICUBIC
    resized: Tensor = resize_tensor(pixels, [side, side], interpolation=bicubic, antialias=True)
    # Bicubic weights overshoot; uint8 is clipped by torchvision, float is not.
    return resized.clamp(0, 1) if resized.is_floating_point() else resized


def _unreadable(path: str | Path, error: Exception) -> UnreadableImageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadableImageError(f"there is no image file {path}.")
    if isinstance(error, OSError) and Path(path).is_dir():
        return UnreadableImageError(f"{path} is a folder, not an image: give the files in it.")
    # What the system says repeats the path; what Pillow says has no such short form.
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return UnreadableImageError(
        f"cannot read the image {path}: {reason.rstrip('.')}. Repair it, or take it out."
    )
