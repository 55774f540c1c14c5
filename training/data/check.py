"""Check a folder of images before training on it: its content and its problems."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from training.components import count_of
from training.data.config import DataConfig
from training.data.datasets import (
    LAYOUT,
    Walk,
    listed_domains,
    read_lists,
    some,
    split_folder,
    walk_classes,
)
from training.data.image_files import UnreadableImageError, decode
from training.distributed import usable_cpus
from training.logging import aligned
from training.spelling import visible

_SHOWN = 10
_HEADER = ["split", "classes", "images", "per class", "width", "height"]
_HEADER += ["unreadable", "twice", "ignored", "loops"]


@dataclass(frozen=True)
class SplitReport:
    """Content of one split.

    Parameters
    ----------
    name
        train, test or val.
    classes
        Number of images of each class; unreadable ones count.
    sizes
        Width and height of every image that could be read, in pixels.
    unreadable
        One line for each image that could not be read: why.
    ignored
        Files that are not read, because of their extension.
    loops
        Links to a folder that they lie in, or that is read already; they are not followed.
    """

    name: str
    classes: dict[str, int]
    sizes: list[tuple[int, int]]
    unreadable: list[str]
    ignored: tuple[Path, ...] = ()
    loops: tuple[Path, ...] = ()

    @property
    def images(self) -> int:
        """Number of image files."""
        return sum(self.classes.values())


@dataclass(frozen=True)
class DataReport:
    """Content of a folder of images; ``str`` gives a table with the problems below it.

    Parameters
    ----------
    root
        The folder.
    splits
        The training split, then the evaluation split.
    duplicates
        Pairs of a training and an evaluation image with the same pixels.
    missing
        What is missing in the folders: images, classes.
    """

    root: Path
    splits: list[SplitReport]
    duplicates: list[tuple[Path, Path]]
    missing: list[str]

    @property
    def problems(self) -> list[str]:
        """All problems, one line each."""
        unreadable = [line for split in self.splits for line in split.unreadable]
        twice = [f"{b} has the same pixels as {a}" for a, b in self.duplicates]
        return [*self.missing, *unreadable, *twice]

    @property
    def passed(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def __str__(self) -> str:
        rows = [_HEADER, *(self._row(split) for split in self.splits)]
        lines = aligned(rows, left=len(_HEADER)).splitlines()
        lines.append("ranges are smallest/median/largest; twice: the same pixels in both splits")
        lines += [_ignored(split) for split in self.splits if split.ignored]
        lines += self.first_problems()
        number = len(self.problems)
        count = f"{number} problem{'s' * (number > 1)}" if number else "no problems"
        return "\n".join(map(visible, [*lines, f"{self.root}: {count}"]))

    def first_problems(self) -> list[str]:
        """The first ten problems, and how many more there are."""
        rest = len(self.problems) - _SHOWN
        return self.problems[:_SHOWN] + [f"and {rest} more"] * (rest > 0)

    def _row(self, split: SplitReport) -> list[str]:
        column = 0 if split is self.splits[0] else 1
        return [
            split.name,
            str(len(split.classes)),
            str(split.images),
            _range(split.classes.values()),
            _range(width for width, _ in split.sizes),
            _range(height for _, height in split.sizes),
            str(len(split.unreadable)),
            str(len({pair[column] for pair in self.duplicates})),
            str(len(split.ignored)),
            str(len(split.loops)),
        ]


def check_data(
    root: str | Path, *, workers: int | None = None, train_only: bool = False
) -> DataReport:
    """Decode every image of a folder tree, or of DomainNet's lists, and compare the splits.

    Parameters
    ----------
    root
        The folder with ``train`` and ``test`` (or ``val``), or with DomainNet's lists.
    workers
        Number of decoding threads; one per core if not given.
    train_only
        Do not open the evaluation split.

    Raises
    ------
    FileNotFoundError
        If the folder or its training split is missing.
    ValueError
        If DomainNet's lists are malformed, or there are no workers.
    """
    count_of("workers", workers, 1)
    folder = Path(root).expanduser()
    listing = _listing(folder, train_only=train_only)
    splits, digests = [], []
    with ThreadPoolExecutor(workers or usable_cpus()) as pool, warnings.catch_warnings():
        # Files that Pillow warns about are refused, and the report says so.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, (classes, beside) in listing.items():
            paths = [path for tree in classes.values() for path in tree.images]
            scans = dict(zip(paths, pool.map(_scan, paths), strict=True))
            sound = {path: scan for path, scan in scans.items() if not isinstance(scan, str)}
            trees = [beside, *classes.values()]
            split = SplitReport(
                name,
                {label: len(tree.images) for label, tree in classes.items()},
                [size for size, _ in sound.values()],
                [scan for scan in scans.values() if isinstance(scan, str)],
                tuple(path for tree in trees for path in tree.others),
                tuple(path for tree in trees for path in tree.loops),
            )
            splits.append(split)
            digests.append({path: digest for path, (_, digest) in sound.items()})
    return DataReport(folder, splits, _duplicates(*digests), _missing(splits))


def verify_data(config: DataConfig) -> None:
    """Check the folder of an experiment; the test split only if the run evaluates on it.

    Raises
    ------
    ValueError
        If something is wrong; the message holds the first problems.
    """
    report = check_data(
        config.build().folder(), workers=config.workers or None, train_only=config.validation > 0
    )
    if not report.passed:
        problems = "; ".join(report.first_problems())
        msg = f"data.verify: {problems}. See loda data check {report.root}"
        raise ValueError(msg)


def _listing(root: Path, *, train_only: bool) -> dict[str, tuple[dict[str, Walk], Walk]]:
    """The files of each split by class, and the files beside the class folders."""
    names, nothing = ["train"] if train_only else ["train", "test"], Walk([], [], [])
    domains = listed_domains(root)
    if domains:
        lists = {name: read_lists(root, domains, name) for name in names}
        return {
            name: ({label: Walk(paths, [], []) for label, paths in classes.items()}, nothing)
            for name, classes in lists.items()
        }
    folders = [split_folder(root, name) for name in names]
    if not folders[0].is_dir():
        msg = f"no folder {folders[0]}; {LAYOUT}"
        raise FileNotFoundError(msg)
    return {f.name: walk_classes(f) if f.is_dir() else ({}, nothing) for f in folders}


def _missing(splits: list[SplitReport]) -> list[str]:
    lines = []
    every = {label for split in splits for label in split.classes}
    for split in splits:
        empty = {label for label, count in split.classes.items() if not count}
        if empty:
            lines.append(f"{split.name} has no images of {some(empty)}")
        if every - set(split.classes):
            lines.append(f"{split.name} lacks the classes {some(every - set(split.classes))}")
    return lines


def _scan(path: Path) -> tuple[tuple[int, int], bytes] | str:
    """Size and hash of an image, or why it cannot be read."""
    try:
        image = decode(path)
    except UnreadableImageError as error:
        return str(error)
    # Decoded pixels, not bytes: this also detects an image saved again or with other metadata.
    digest = blake2b(np.asarray(image).data, digest_size=16)
    digest.update(repr(image.size).encode())
    return image.size, digest.digest()


def _duplicates(
    train: Mapping[Path, bytes], test: Mapping[Path, bytes] | None = None
) -> list[tuple[Path, Path]]:
    twins: dict[bytes, list[Path]] = {}
    for path, digest in train.items():
        twins.setdefault(digest, []).append(path)
    return [(twin, path) for path, digest in (test or {}).items() for twin in twins.get(digest, [])]


def _ignored(split: SplitReport) -> str:
    """Number of ignored files by extension, and the first of them."""
    kinds = Counter(path.suffix.lower() or "no extension" for path in split.ignored)
    named = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{split.name}: ignored {named}, such as {split.ignored[0]}"


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}/{median(ordered):g}/{ordered[-1]}" if ordered else "-"
