"""Decoding of image files: every kind becomes upright RGB, and what cannot be read is named."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from training.config import NATIVE_SIDE, DataConfig

# Besides its own errors, Pillow lets what a damaged file provokes in a codec through as it is.
_DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    MemoryError,
    NotImplementedError,
    RecursionError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


# Pillow goes by the content of a file, not by its name. Of what it reads, some formats start other
# programs (EPS starts Ghostscript) and many are hardly ever met.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


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
        A ValueError, if the file is missing, cannot be decoded or has more pixels than
        ``PIL.Image.MAX_IMAGE_PIXELS``; the message names it.
    """
    return as_tensor(decode(path, channels(config)), config)


def decode(file: str | Path | BinaryIO, mode: str = "RGB", *, name: object = None) -> Image.Image:
    """Decode a whole image file, turned as the camera noted it, to RGB or L.

    Raises
    ------
    UnreadableImageError
        As `open_image`; ``name`` is what the message calls a file without a path.
    """
    try:
        with Image.open(file, formats=_FORMATS) as image:
            _refuse_huge(image)
            return upright(image, mode)
    except _DECODE_ERRORS as error:
        raise _unreadable(file if name is None else name, error) from error


def read_header(path: Path) -> None:
    """Read no more than the header of an image file.

    Raises
    ------
    UnreadableImageError
        If it is no image that Pillow can read, or is too large; the message names it.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            _refuse_huge(image)
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error) from error


def channels(config: DataConfig) -> str:
    """Pillow's name for the channels of an experiment's images: L for digits, else RGB."""
    return "L" if config.name == "digits" else "RGB"


def upright(image: Image.Image, mode: str) -> Image.Image:
    """The image turned as the camera noted it, as RGB or L."""
    return _to_mode(ImageOps.exif_transpose(image), mode)


def as_tensor(image: Image.Image, config: DataConfig) -> Tensor:
    """An RGB or L image after the first resize, as uint8 of shape (C, H, W)."""
    for side in (NATIVE_SIDE.get(config.name), config.resize):
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _refuse_huge(image: Image.Image) -> None:
    """Raise Image.DecompressionBombError where Pillow by itself might only warn.

    A small file can unpack to gigabytes. The limit is ``PIL.Image.MAX_IMAGE_PIXELS``, 89 million
    pixels unless a program sets another; None there means no limit.
    """
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit is not None and pixels > limit:
        msg = f"Image size ({pixels} pixels) exceeds limit of {limit} pixels"
        raise Image.DecompressionBombError(msg)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith(("I;16", "I")):  # Pillow would cut 16-bit greys off at 255
        wide: NDArray[np.int64] = np.asarray(image).astype(np.int64)
        image = Image.fromarray(((wide.clip(0, 65535) + 128) // 257).astype(np.uint8))
    elif image.mode == "P":  # a palette may hold transparency, which a direct conversion warns of
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _unreadable(name: object, error: Exception) -> UnreadableImageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadableImageError(f"there is no image file {name}.")
    if isinstance(error, OSError) and isinstance(name, str | Path) and Path(name).is_dir():
        return UnreadableImageError(f"{name} is a folder, not an image: give the files in it.")
    # What the system says repeats the path; what Pillow says has no such short form.
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    huge = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
    cure = "Scale it down" if huge else "Repair it"
    return UnreadableImageError(
        f"cannot read the image {name}: {reason.rstrip('.')}. {cure}, or take it out."
    )
