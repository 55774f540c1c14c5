"""Decode one image file to upright RGB or grey; errors name the file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

# Pillow recognises formats by content, not by name. Some that it reads start other programs (EPS
# starts Ghostscript), and many are rare.
_FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")


class UnreadableImageError(ValueError):
    """An image file is missing or cannot be decoded; the message names it and says what to do.

    The message is the same whether this process or a loading process read the file.

    Examples
    --------
    >>> UnreadableImageError("there is no image file x.png.")
    UnreadableImageError('there is no image file x.png.')
    """

    def __init__(self, message: str) -> None:
        # If a loading process fails, torch raises the class again with the whole traceback as its
        # message, which ends with the name of the class and the original message.
        name = f"{type(self).__module__}.{type(self).__qualname__}: "
        super().__init__(message.rpartition(name)[2].rstrip("\n"))


def decode(file: str | Path | BinaryIO, mode: str = "RGB", *, name: object = None) -> Image.Image:
    """Decode an image file to RGB or L, rotated according to its EXIF data.

    Raises
    ------
    UnreadableImageError
        As `open_image`; ``name`` is what the message calls a file without a path.
    """
    with opened(file, file if name is None else name) as image:
        return upright(image, mode)


@contextmanager
def opened(file: str | Path | BinaryIO, name: object) -> Iterator[Image.Image]:
    """Open an image and read its header; errors in the block become UnreadableImageError."""
    try:
        with Image.open(file, formats=_FORMATS) as image:
            # A small file can unpack to gigabytes, and Pillow might only warn. A program may set
            # another limit than 89 million pixels; None means no limit.
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                msg = f"Image size ({pixels} pixels) exceeds limit of {limit} pixels"
                raise Image.DecompressionBombError(msg)
            yield image
    except Exception as error:  # Pillow lets errors of its codecs through
        raise _unreadable(name, error) from error


def upright(image: Image.Image, mode: str) -> Image.Image:
    """The image as RGB or L, rotated according to its EXIF data."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # Pillow would cut 16-bit greys off at 255
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
    # The system's message repeats the path; strerror does not. Pillow's errors have no strerror.
    reason = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    huge = isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning)
    cure = "Scale it down" if huge else "Repair it"
    return UnreadableImageError(
        f"cannot read the image {name}: {reason.rstrip('.')}. {cure}, or take it out."
    )
