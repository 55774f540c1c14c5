"""Look through a folder of images before training on it: what is there, and what is wrong."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from PIL import Image

from training.data.config import DataConfig
from training.data.datasets import (
    LAYOUT,
    Classes,
    listed_domains,
    read_lists,
    some,
    split_folder,
    walk_classes,
)
from training.data.images import UnreadableImageError, decode
from training.distributed import usable_cpus
from training.logging import aligned

_SHOWN = 10
_HEADER = ["split", "classes", "images", "a class", "width", "height"]
_HEADER += ["unreadable", "twice", "ignored", "loops"]


@dataclass(frozen=True)
class SplitReport:
    """What one split holds.

    Parameters
    ----------
    name
        train, test or val.
    classes
        Number of images of each class; unreadable ones count.
    sizes
        Width and height of every image that could be read, in pixels.
    unreadable
        What is wrong with every other image.
    ignored
        Files that are not read, since their names do not end like that of an image.
    loops
        Links to a folder that they lie in, which are not followed.
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
    """What a folder of images holds; ``str`` of it is a table with the problems below.

    Parameters
    ----------
    root
        The folder.
    splits
        The training split, then the evaluation split.
    duplicates
        Pairs of a training and an evaluation image with the same pixels.
    missing
        What the folders themselves lack.
    """

    root: Path
    splits: list[SplitReport]
    duplicates: list[tuple[Path, Path]]
    missing: list[str]

    @property
    def problems(self) -> list[str]:
        """Everything that is wrong, one line each; empty if nothing is."""
        unreadable = [line for split in self.splits for line in split.unreadable]
        twice = [f"{b} has the pixels of {a}" for a, b in self.duplicates]
        return [*self.missing, *unreadable, *twice]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        rows = [_HEADER, *(self._row(split) for split in self.splits)]
        lines = aligned(rows, left=len(_HEADER)).splitlines()
        lines.append("ranges are smallest/median/largest; twice: the same pixels in both splits")
        lines += [_ignored(split) for split in self.splits if split.ignored]
        problems = self.problems
        lines += problems[:_SHOWN]
        if len(problems) > _SHOWN:
            lines.append(f"and {len(problems) - _SHOWN} more")
        count = f"{len(problems)} problem{'s' * (len(problems) > 1)}" if problems else "sound"
        lines.append(f"{self.root}: {count}")
        return "\n".join(lines)

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


class _Scan(NamedTuple):
    size: tuple[int, int]
    digest: bytes


class _Listed(NamedTuple):
    classes: Classes
    ignored: list[Path]
    loops: list[Path]


def check_data(
    root: str | Path, *, workers: int | None = None, train_only: bool = False
) -> DataReport:
    """Decode every image of a folder tree, or of DomainNet's lists, and compare the splits.

    Parameters
    ----------
    root
        The folder with ``train`` and ``test`` (or ``val``), or with DomainNet's lists.
    workers
        Threads that decode; one a core when not given.
    train_only
        Leave the evaluation split alone.

    Raises
    ------
    FileNotFoundError
        If the folder or its training split is missing.
    ValueError
        If DomainNet's lists are malformed, or there are no workers.
    """
    if workers is not None and workers < 1:
        msg = f"workers is {workers}; allowed: at least 1"
        raise ValueError(msg)
    folder = Path(root).expanduser()
    listing, missing = _listing(folder, train_only=train_only)
    scans: dict[str, dict[Path, _Scan | str]] = {}
    with ThreadPoolExecutor(workers or usable_cpus()) as pool, warnings.catch_warnings():
        # Whatever Pillow warns of is refused, and said in the report.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, listed in listing.items():
            paths = [path for files in listed.classes.values() for path in files]
            scans[name] = dict(zip(paths, pool.map(_scan, paths), strict=True))
    splits = [
        SplitReport(
            name,
            {label: len(files) for label, files in listed.classes.items()},
            [scan.size for scan in scans[name].values() if isinstance(scan, _Scan)],
            [scan for scan in scans[name].values() if isinstance(scan, str)],
            tuple(listed.ignored),
            tuple(listed.loops),
        )
        for name, listed in listing.items()
    ]
    return DataReport(folder, splits, _duplicates(*scans.values()), missing)


def verify_data(config: DataConfig) -> None:
    """Check the folder of an experiment; a run on held-out images leaves its test split alone.

    Raises
    ------
    ValueError
        If something is wrong; the message holds the first problems.
    """
    report = check_data(
        config.build().folder(), workers=config.workers or None, train_only=config.validation > 0
    )
    if not report.passed:
        shown, rest = report.problems[:_SHOWN], len(report.problems) - _SHOWN
        more = f" and {rest} more" if rest > 0 else ""
        msg = f"data.verify: {'; '.join(shown)}{more}. See loda data check {report.root}"
        raise ValueError(msg)


def _listing(root: Path, *, train_only: bool) -> tuple[dict[str, _Listed], list[str]]:
    domains = listed_domains(root)
    if domains:
        names = ["train"] if train_only else ["train", "test"]
        listing = {name: _Listed(read_lists(root, domains, name), [], []) for name in names}
    else:
        folders = [split_folder(root, "train")]
        if not train_only:
            folders.append(split_folder(root, "test"))
        if not folders[0].is_dir():
            msg = f"no folder {folders[0]}; {LAYOUT}"
            raise FileNotFoundError(msg)
        listing = {f.name: _list_split(f) for f in folders}
    missing = []
    for name, listed in listing.items():
        empty = [label for label, files in listed.classes.items() if not files]
        others = set().union(*(x.classes for x in listing.values())) - set(listed.classes)
        if empty:
            missing.append(f"{name} has no images of {some(empty)}")
        if others:
            missing.append(f"{name} lacks the classes {some(others)}")
    return listing, missing


def _list_split(folder: Path) -> _Listed:
    if not folder.is_dir():
        return _Listed({}, [], [])
    classes, beside = walk_classes(folder)
    trees = [beside, *classes.values()]
    ignored, loops = ([p for tree in trees for p in getattr(tree, k)] for k in ("others", "loops"))
    return _Listed({name: tree.images for name, tree in classes.items()}, ignored, loops)


def _scan(path: Path) -> _Scan | str:
    try:
        image = decode(path)
    except UnreadableImageError as error:
        return str(error)
    # Decoded pixels, not bytes: the same picture saved again, or with other metadata, is found.
    digest = blake2b(np.asarray(image).data, digest_size=16)
    digest.update(repr(image.size).encode())
    return _Scan(image.size, digest.digest())


def _duplicates(
    train: Mapping[Path, _Scan | str], test: Mapping[Path, _Scan | str] | None = None
) -> list[tuple[Path, Path]]:
    known: dict[bytes, list[Path]] = {}
    for path, scan in train.items():
        if isinstance(scan, _Scan):
            known.setdefault(scan.digest, []).append(path)
    return [
        (twin, path)
        for path, scan in (test or {}).items()
        if isinstance(scan, _Scan)
        for twin in known.get(scan.digest, [])
    ]


def _ignored(split: SplitReport) -> str:
    """How many files of which kinds were not read, and the first of them."""
    kinds = Counter(path.suffix.lower() or "no extension" for path in split.ignored)
    named = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return f"{split.name}: ignored {named}, such as {split.ignored[0]}"


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}/{median(ordered):g}/{ordered[-1]}" if ordered else "-"
