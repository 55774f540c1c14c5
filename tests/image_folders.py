"""Folder trees of small images in one colour each, and their settings, for the tests of data."""

from pathlib import Path

from PIL import Image

from training.data import DataConfig, ImageSet, build_stream, train_transform

CLASSES = ["ant", "bee", "cat", "dog", "eel"]
CALTECH = {"image_size": 32, "resize": 32, "train_crop": "pad", "pad": 4, "flip": True}
PLAIN = {"resize": 8, "train_crop": "none", "flip": False}


def repaint(path: Path, shade: int) -> None:
    """Give a PNG file's first pixel a shade; without compression its size is always the same."""
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.putpixel((0, 0), (shade, 0, 0))
    picture.save(path, compress_level=0)


def colour(name: str, index: int = 0, blue: int = 7) -> tuple[int, int, int]:
    return (40 * CLASSES.index(name) + 10, index, blue)


def grow(
    root: Path, counts: dict[str, int], classes: list[str] = CLASSES, *, blue: int = 7
) -> Path:
    """Images of a split and a class, numbered; those of another blue are other images."""
    for split, count in counts.items():
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                image = Image.new("RGB", (12 + index, 10), colour(name, index, blue))
                image.save(root / split / name / f"{index}.png")
    return root


def folder(root: Path, **settings: object) -> DataConfig:
    return DataConfig("folder", {"root": str(root)}, **{**PLAIN, **settings})  # type: ignore[arg-type]


def augmented(tree: Path, workers: int, *, cache: bool | None = None) -> ImageSet:
    crop = {"image_size": 8, "train_crop": "pad", "pad": 3, "flip": True}
    config = folder(tree, **crop, workers=workers, cache=cache)
    return build_stream(config, 0).train.with_transform(train_transform(config))
