"""Folder trees of images: ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*``."""

from itertools import chain
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.config import CLASS_COUNTS, DataConfig
from training.data.decode import open_image
from training.data.images import LazyImages
from training.data.source import Source, Split
from training.data.walk import walk_classes

LAYOUT = "expected ROOT/train/CLASS/IMAGE with ROOT/test/CLASS/IMAGE or ROOT/val/CLASS/IMAGE."

Classes = dict[str, list[Path]]
"""The image files of each class, by its name."""


def folder_source(config: DataConfig) -> Source:
    """List a folder tree; classes are numbered in the order of their sorted folder names.

    Images may lie in further folders under a class; files with another extension, names that
    start with a dot and links back to a folder above are ignored. Of ``test`` and ``val``,
    ``test`` is used if both are there.

    Raises
    ------
    FileNotFoundError
        If the root or one of its splits is missing.
    ValueError
        If a class has no image, or train and test do not hold the same classes.
    """
    return tree_source(Path(config.root or "").expanduser(), config)


def named_source(config: DataConfig) -> Source:
    """List the folder of a published data set: ``root/NAME``, or ``root`` itself.

    Raises
    ------
    FileNotFoundError, ValueError
        As for any folder tree, and if it has not as many classes as the published data set.
    """
    return check_count(tree_source(named_folder(config), config), config)


def named_folder(config: DataConfig) -> Path:
    """The folder of an experiment's images: ``root/NAME`` for a published data set, else ``root``.

    Of a published data set ``root`` may also be that folder itself.

    Raises
    ------
    FileNotFoundError
        If it is neither.
    """
    root = Path(config.root or "").expanduser()
    if config.name not in CLASS_COUNTS:
        return root
    folder = root / config.name
    if folder.is_dir():
        return folder
    if not (root / "train").is_dir() and not any(root.glob("*_train.txt")):
        msg = f"data.root: no folder {folder}, and {root} itself is not {config.name}; {LAYOUT}"
        raise FileNotFoundError(msg)
    return root


def check_count(source: Source, config: DataConfig) -> Source:
    """The source, if it has as many classes as the published data set of its name.

    Raises
    ------
    ValueError
        If it has not: another number of classes would shift the whole class order.
    """
    count, expected = len(source.class_names), CLASS_COUNTS[config.name]
    if count != expected:
        msg = (
            f"{config.name} has {expected} classes, but {named_folder(config)} has {count}. "
            "Complete it, or read it as it is with data.name folder."
        )
        raise ValueError(msg)
    return source


def tree_source(root: Path, config: DataConfig) -> Source:
    """List one folder tree; see `folder_source`."""
    if not root.is_dir():
        msg = f"data.root: no folder {root}; {LAYOUT}"
        raise FileNotFoundError(msg)
    train = _list_classes(root / "train")

    def test() -> Split:
        folder = test_folder(root)
        found = _list_classes(folder)
        check_same(root, set(train), set(found), folder.name)
        return file_split(found, config)

    return Source(list(train), file_split(train, config), test)


def test_folder(root: Path) -> Path:
    """``root/test`` if it is there, else ``root/val``."""
    return root / "test" if (root / "test").is_dir() else root / "val"


# pytest would take a function of this name, imported into a test module, for a test.
test_folder.__test__ = False  # type: ignore[attr-defined]


def file_split(classes: Classes, config: DataConfig) -> Split:
    """A split of image files; classes are numbered in the order of the dictionary."""
    counts = [len(paths) for paths in classes.values()]
    targets = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return Split(LazyImages(chain.from_iterable(classes.values()), open_image, config), targets)


def class_folders(folder: Path) -> Classes:
    """The images of every class folder, sorted by name; classes without any are included."""
    return {name: found.images for name, found in walk_classes(folder)[0].items()}


def check_same(root: Path, train: set[str], test: set[str], name: str) -> None:
    """Raise ValueError unless both splits hold the same classes."""
    if train == test:
        return
    parts = []
    if train - test:
        parts.append(f"{name} lacks {some(train - test)}")
    if test - train:
        parts.append(f"train lacks {some(test - train)}")
    msg = f"{root}: train and {name} must hold the same classes, but {' and '.join(parts)}."
    raise ValueError(msg)


def some(names: set[str] | list[str]) -> str:
    """The first ten names, and how many more there are."""
    shown = sorted(names)[:10]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _list_classes(folder: Path) -> Classes:
    if not folder.is_dir():
        msg = f"data.root: no folder {folder}; {LAYOUT}"
        raise FileNotFoundError(msg)
    classes = class_folders(folder)
    if not classes:
        msg = f"data.root: {folder} holds no class folders; {LAYOUT}"
        raise ValueError(msg)
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        msg = f"{folder}: no images ({kinds}) for {some(empty)}: add some or remove the folders."
        raise ValueError(msg)
    return classes
