"""The files below a folder, each folder entered once on a way, whatever links there are."""

import os
from pathlib import Path
from typing import NamedTuple

from torchvision.datasets.folder import IMG_EXTENSIONS

_Identity = tuple[int, int]


class Walk(NamedTuple):
    """What lies in a folder tree; names that start with a dot are left out.

    Attributes
    ----------
    images : list of Path
        Files with the extension of an image, by folder and name.
    others : list of Path
        All other files.
    loops : list of Path
        Links to a folder that they lie in, which are not followed.
    """

    images: list[Path]
    others: list[Path]
    loops: list[Path]


def walk_classes(folder: Path) -> tuple[dict[str, Walk], Walk]:
    """The tree below every class folder, sorted by name, and what lies beside them.

    Files beside the class folders are no images of any class: they count as others.
    """
    above = _above(folder)
    classes: dict[str, Walk] = {}
    beside = Walk([], [], [])
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            beside.others.append(path)
        elif _identity(path) in above:
            beside.loops.append(path)
        else:
            classes[path.name] = walk(path)
    return classes, beside


def walk(folder: Path) -> Walk:
    """The tree below a folder; links to other folders are followed."""
    found = Walk([], [], [])
    ways = {str(folder): _above(folder)}
    places = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        way = ways.pop(parent)
        entered = []
        for name in folders:
            if name.startswith("."):
                continue
            path = Path(parent, name)
            identity = _identity(path)
            if identity in way:
                found.loops.append(path)
            else:
                entered.append(name)
                ways[str(path)] = way | {identity}
        folders[:] = entered
        places.append((parent, names))
    for parent, names in sorted(places):
        for name in sorted(names):
            if not name.startswith("."):
                image = name.lower().endswith(IMG_EXTENSIONS)
                (found.images if image else found.others).append(Path(parent, name))
    found.loops.sort()
    return found


def _above(folder: Path) -> frozenset[_Identity]:
    """A folder and all that it lies in."""
    real = folder.resolve()
    return frozenset(_identity(path) for path in (real, *real.parents))


def _identity(path: Path) -> _Identity:
    found = path.stat()
    return found.st_dev, found.st_ino
