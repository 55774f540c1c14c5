"""Turn photographs into drawings: pencil, ink, poster or cartoon, one style for each image.

``python docs/recipes/renditions.py PHOTOS --out DRAWINGS`` reads ``SPLIT/CLASS/*`` and writes files
of the same names as PNG. The style of an image follows from its name, so that the same folder
always gives the same drawings, and every class has all four. A backbone that was pretrained on
photographs has seen nothing like them.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from zlib import crc32

import numpy as np
from PIL import Image, ImageChops, ImageFilter, ImageOps
from pretraining import say

from training.data.datasets import IMAGE_SUFFIXES
from training.data.image_files import decode


def pencil(image: Image.Image) -> Image.Image:
    """Grey strokes on white: the image divided by its own blur."""
    grey = ImageOps.grayscale(image)
    blurred = np.asarray(grey.filter(ImageFilter.GaussianBlur(2)), np.float64)
    shade = np.minimum(1.0, (np.asarray(grey, np.float64) + 1) / (blurred + 1))
    return Image.fromarray(np.round(255 * shade**3).astype(np.uint8)).convert("RGB")


def ink(image: Image.Image) -> Image.Image:
    """Black outlines on white, and nothing else."""
    edges = ImageOps.grayscale(image).filter(ImageFilter.FIND_EDGES)
    frame = ImageOps.crop(edges, 1)  # the filter leaves the outermost pixels as they were
    lines = ImageOps.invert(ImageOps.autocontrast(ImageOps.expand(frame, 1, fill=0), cutoff=1))
    return lines.convert("RGB")


def poster(image: Image.Image) -> Image.Image:
    """Flat areas of few, loud colours."""
    smooth = ImageOps.autocontrast(image.filter(ImageFilter.MedianFilter(3)), cutoff=2)
    return ImageOps.posterize(smooth, 2)


def cartoon(image: Image.Image) -> Image.Image:
    """Six colours of the image, with dark outlines."""
    flat = image.filter(ImageFilter.MedianFilter(3)).quantize(6, dither=Image.Dither.NONE)
    return ImageChops.multiply(flat.convert("RGB"), ink(image))


STYLES: tuple[Callable[[Image.Image], Image.Image], ...] = (pencil, ink, poster, cartoon)


def style(name: str) -> Callable[[Image.Image], Image.Image]:
    """The style of the image of this name, as in ``train/altar/007.jpg``."""
    return STYLES[crc32(name.encode()) % len(STYLES)]


def write(photos: Path, out: Path) -> int:
    """Write the drawings of a folder and return their number.

    Raises
    ------
    FileNotFoundError
        If there are no images in ``<photos>/<split>/<class>``.
    FileExistsError
        If there is something at ``out``, or drawings of two photos would have the same name.
    ValueError
        If an image cannot be read.
    """
    paths = [p for p in sorted(photos.glob("*/*/*")) if p.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        msg = f"there are no images in {photos}/SPLIT/CLASS: give the folder that holds the splits."
        raise FileNotFoundError(msg)
    if out.exists():
        msg = f"{out} exists: give the name of a new folder."
        raise FileExistsError(msg)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary:
        part = Path(temporary, "drawings")  # what is cut off does not look finished
        for path in paths:
            name = path.relative_to(photos)
            place = (part / name).with_suffix(".png")
            if place.exists():
                msg = f"{name} would be written to the place of another image: rename one of them."
                raise FileExistsError(msg)
            place.parent.mkdir(parents=True, exist_ok=True)
            style(name.as_posix())(decode(path).convert("RGB")).save(place)
        part.rename(out)
    return len(paths)


def main(arguments: list[str] | None = None) -> None:
    """Run the recipe from the command line."""
    parser = argparse.ArgumentParser(
        prog="python docs/recipes/renditions.py", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("photos", type=Path, help="folder with SPLIT/CLASS/*")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the drawings")
    given = parser.parse_args(arguments)
    try:
        count = write(given.photos, given.out)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    say(f"{count} drawings in {given.out}")


if __name__ == "__main__":
    main()
