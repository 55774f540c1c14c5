"""Decode one image file to upright RGB or grey; errors name the file.

Deep images become bytes by one rule each, whatever they show:

- 16-bit integers, signed ones too, from 0 to 65535, are divided by 257;
- floats are taken as 0 to 1, or, if one is above 1, as 0 to 255;
- 32-bit integers and all other values are refused: they have no agreed range.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

# Pillow recognises formats by content, not by name. Some that it reads start other programs (EPS
# starts Ghostscript), and many are rare.
_FORMATS = ["BMP", "DIB", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]  # JPEG reads MPO
Image.init()  # otherwise Pillow imports its readers on first use, which several threads disturb
if "avif" in features.get_supported():  # Pillow 11.3 or later
    _FORMATS.append("AVIF")
if find_spec("pillow_heif") is not None:
    import_module("pillow_heif").register_heif_opener()
    _FORMATS.append("HEIF")

_BITS = 258  # tag of a TIFF file
_KEPT_DETAIL = 3  # a reduced JPEG is at least so many times larger than what is made of it


class UnreadableImageError(ValueError):
    """An image file is missing or cannot be decoded; the message names it and says what to do.

    Examples
    --------
    >>> UnreadableImageError("there is no image file x.png.")
    UnreadableImageError('there is no image file x.png.')
    """

    @property
    def problem(self) -> str:
        """The message without the cure.

        Examples
        --------
        >>> UnreadableImageError("cannot read x.png: it is cut off. Repair it.").problem
        'cannot read x.png: it is cut off'
        """
        return str(self).rpartition(". ")[0] or str(self).rstrip(".")


def missing_reader(suffix: str) -> str | None:
    """Why files with an extension cannot be read here, and what reads them; None if they can.

    Examples
    --------
    >>> missing_reader(".png") is None
    True
    """
    if suffix in (".heic", ".heif", ".hif") and "HEIF" not in _FORMATS:
        return "pip install pillow-heif reads them"
    if suffix in (".avif", ".avifs") and "AVIF" not in _FORMATS:
        return "Pillow 11.3 or later reads them"
    jpeg_2000 = (".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf")
    if suffix in jpeg_2000 and "jpg_2000" not in features.get_supported():
        return "a Pillow with JPEG 2000 reads them"
    return None


def decode(
    file: str | Path | BinaryIO, mode: str = "RGB", *, name: object = None, least: int | None = None
) -> Image.Image:
    """Decode an image file to RGB or L, rotated according to its EXIF data.

    Parameters
    ----------
    file
        A path or an open file.
    mode
        RGB or L.
    name
        What messages call a file without a path.
    least
        The image is made this small afterwards, by its shorter side in pixels. A JPEG of many
        times that size is then decoded at a half, a quarter or an eighth of its size.

    Raises
    ------
    UnreadableImageError
        As `training.data.open_image`.
    """
    with opened(file, file if name is None else name) as image:
        if least is not None:
            factor = _KEPT_DETAIL * least / min(image.size)
            image.draft(None, (int(factor * image.width) + 1, int(factor * image.height) + 1))
        return upright(image, mode)


@contextmanager
def opened(file: str | Path | BinaryIO, name: object) -> Iterator[Image.Image]:
    """Open an image and read its header; errors in the block become UnreadableImageError."""
    with reading(name), Image.open(file, formats=_FORMATS) as image:
        # A small file can unpack to gigabytes, and Pillow might only warn. A program may set
        # another limit than 89 million pixels; None means no limit.
        pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
        if limit is not None and pixels > limit:
            msg = f"Image size ({pixels} pixels) exceeds limit of {limit} pixels"
            raise Image.DecompressionBombError(msg)
        yield image


@contextmanager
def reading(name: object) -> Iterator[None]:
    """Errors in the block become UnreadableImageError, which names the file."""
    try:
        yield
    except Exception as error:  # Pillow lets errors of its codecs through
        raise _unreadable(name, error) from error


def upright(image: Image.Image, mode: str) -> Image.Image:
    """The image as RGB or L, rotated according to its EXIF data."""
    deep = image.mode.startswith("I") or image.mode == "F"
    if deep and image.format == "TIFF":
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(_BITS, (0,))
        if image.mode == "I" and 32 in (bits if isinstance(bits, tuple) else (bits,)):
            msg = "32-bit integers have no agreed range; save it with 8 or 16 bits"
            raise ValueError(msg)
    image = ImageOps.exif_transpose(image)
    if deep:
        image = Image.fromarray(_bytes(np.asarray(image)))
    elif image.mode == "P":  # a palette may hold transparency, which a direct conversion warns of
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Values of a deep image as bytes, by the rules above."""
    low, high = values.min(), values.max()
    floats = values.dtype.kind == "f"
    limit = (1 if high <= 1 else 255) if floats else 65535
    if not (low >= 0 and high <= limit):  # not a number, too
        rule = "0 to 1 or 0 to 255 for floats" if floats else "0 to 65535 for integers"
        msg = f"values from {low:g} to {high:g}, must be {rule}; save it with 8 or 16 bits"
        raise ValueError(msg)
    if floats:
        rounded: NDArray[np.uint8] = np.rint(values * (255 / limit)).astype(np.uint8)
        return rounded
    wide: NDArray[np.int64] = values.astype(np.int64)
    return ((wide + 128) // 257).astype(np.uint8)


def _unreadable(name: object, error: Exception) -> UnreadableImageError:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return UnreadableImageError(f"there is no image file {name}.")
    if isinstance(error, OSError) and isinstance(name, str | Path) and Path(name).is_dir():
        return UnreadableImageError(f"{name} is a folder, not an image: give the files in it.")
    # The system's message repeats the path; strerror does not. Pillow's errors have no strerror.
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):  # names the object that it was given
        reason = "it is not an image of a format that can be read"
    huge = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
    cure = "Scale it down" if huge else "Repair it"
    return UnreadableImageError(
        f"cannot read the image {name}: {reason.rstrip('.')}. {cure}, or take it out."
    )
