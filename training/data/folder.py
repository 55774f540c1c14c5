"""Folder trees of images: ``train/CLASS/*`` with ``test/CLASS/*`` or ``val/CLASS/*``."""

import os
from itertools import chain
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS

from training.config import DataConfig
from training.data.images import FileImages
from training.data.source import Source, Split

LAYOUT = "expected ROOT/train/CLASS/IMAGE with ROOT/test/CLASS/IMAGE or ROOT/val/CLASS/IMAGE."


def folder_source(config: DataConfig) -> Source:
    """List a folder tree; classes are numbered in the order of their sorted folder names.

    Images may lie in further folders under a class; files with another extension and names that
    start with a dot are ignored. Of ``test`` and ``val``, ``test`` is used if both are there.

    Raises
    ------
    FileNotFoundError
        If the root or one of its splits is missing.
    ValueError
        If a class has no image, or train and test do not hold the same classes.
    """
    root = Path(config.root or "").expanduser()
    if not root.is_dir():
        msg = f"data.root: no folder {root}; {LAYOUT}"
        raise FileNotFoundError(msg)
    train = _list_classes(root / "train")

    def test() -> Split:
        folder = root / "test" if (root / "test").is_dir() else root / "val"
        found = _list_classes(folder)
        _check_same(root, set(train), set(found), folder.name)
        return _split(found, config)

    return Source(list(train), _split(train, config), test)


def _list_classes(folder: Path) -> dict[str, list[Path]]:
    if not folder.is_dir():
        msg = f"data.root: no folder {folder}; {LAYOUT}"
        raise FileNotFoundError(msg)
    names = sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    if not names:
        msg = f"data.root: {folder} holds no class folders; {LAYOUT}"
        raise ValueError(msg)
    classes = {name: _list_images(folder / name) for name in names}
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        kinds = " ".join(IMG_EXTENSIONS)
        msg = f"{folder}: no images ({kinds}) for {_some(empty)}: add some or remove the folders."
        raise ValueError(msg)
    return classes


def _list_images(folder: Path) -> list[Path]:
    return [
        Path(parent, name)
        for parent, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
    ]


def _check_same(root: Path, train: set[str], test: set[str], name: str) -> None:
    if train == test:
        return
    parts = []
    if train - test:
        parts.append(f"{name} lacks {_some(train - test)}")
    if test - train:
        parts.append(f"train lacks {_some(test - train)}")
    msg = f"{root}: train and {name} must hold the same classes, but {' and '.join(parts)}."
    raise ValueError(msg)


def _some(names: set[str] | list[str]) -> str:
    shown = sorted(names)[:10]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _split(classes: dict[str, list[Path]], config: DataConfig) -> Split:
    counts = [len(paths) for paths in classes.values()]
    targets = np.repeat(np.arange(len(counts), dtype=np.int64), counts)
    return Split(FileImages(chain.from_iterable(classes.values()), config), targets)
