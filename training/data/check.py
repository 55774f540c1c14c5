"""Check a folder of images before training on it: its content and its problems."""

import warnings
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from training.components import count_of
from training.data.config import DataConfig
from training.data.datasets import (
    LAYOUT,
    Classes,
    layout,
    listed_domains,
    read_classes,
    read_lists,
    walk_classes,
)
from training.data.image_files import UnreadableImageError, decode, missing_reader
from training.distributed import usable_cpus
from training.logging import aligned
from training.spelling import some, visible

_SHOWN = 10
_HEADER = ["split", "classes", "images", "per class", "width", "height"]
_HEADER += ["unreadable", "twice", "ignored", "loops"]


@dataclass(frozen=True)
class SplitReport:
    """Content of one split.

    Parameters
    ----------
    name
        Its folder: train, test, val or validation; all without a test split.
    classes
        Number of images of each class; unreadable ones count.
    sizes
        Width and height of every image that could be read, in pixels.
    unreadable
        One line for each image that could not be read: why.
    ignored
        Files that are not read, because of their extension or for want of a reader.
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
    """Content of a folder of images; ``str`` gives a table with what is wrong below it.

    Parameters
    ----------
    root
        The folder.
    splits
        The training split, then the evaluation split; one split of all images if the folder has no
        test split.
    duplicates
        Pairs of images with the same pixels, one of each split; with one split, two of that.
    refused
        Why a training on the folder would not start.
    """

    root: Path
    splits: list[SplitReport]
    duplicates: list[tuple[Path, Path]]
    refused: list[str]

    @property
    def problems(self) -> list[str]:
        """What a training would refuse, leave out or learn twice, one line each."""
        unreadable = [line for split in self.splits for line in split.unreadable]
        twice = [f"{b} has the same pixels as {a}" for a, b in self.duplicates]
        return [*self.refused, *unreadable, *twice]

    @property
    def passed(self) -> bool:
        """Whether a training would start."""
        return not self.refused

    def __str__(self) -> str:
        rows = [_HEADER, *(self._row(split) for split in self.splits)]
        lines = aligned(rows, left=len(_HEADER)).splitlines() if self.splits else []
        if self.splits:
            lines.append("ranges are smallest/median/largest; twice: images with the same pixels")
        lines += [_ignored(split) for split in self.splits if split.ignored]
        lines += self.first_problems()
        if self.refused:
            verdict = "a training would refuse it"
        else:
            number = sum(len(split.unreadable) for split in self.splits)
            left_out = f"; {number} image{'s' * (number != 1)} would be left out" * (number > 0)
            verdict = f"a training would start{left_out}"
        return "\n".join(map(visible, [*lines, f"{self.root}: {verdict}"]))

    def first_problems(self) -> list[str]:
        """The first ten problems, and how many more there are."""
        rest = len(self.problems) - _SHOWN
        return self.problems[:_SHOWN] + [f"and {rest} more"] * (rest > 0)

    def _row(self, split: SplitReport) -> list[str]:
        column = 0 if split is self.splits[0] and len(self.splits) > 1 else 1
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
        The folder of class folders, or of ``train`` and ``test`` (or ``val``), or of DomainNet's
        lists.
    workers
        Number of decoding threads; one per core if not given.
    train_only
        Do not open the evaluation split.

    Raises
    ------
    FileNotFoundError
        If the folder is missing.
    ValueError
        If there are no workers.
    """
    count_of("workers", workers, 1)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        msg = f"no folder {folder}; {LAYOUT}"
        raise FileNotFoundError(msg)
    try:
        listing, leaves_out = _listing(folder, train_only=train_only)
    except (ValueError, FileNotFoundError) as error:
        return DataReport(folder, [], [], [str(error)])
    splits, digests, whole = [], [], []
    with ThreadPoolExecutor(workers or usable_cpus()) as pool, warnings.catch_warnings():
        # Files that Pillow warns about are refused, and the report says so.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        for name, (classes, others, loops) in listing.items():
            paths = [path for images in classes.values() for path in images]
            scans = dict(zip(paths, pool.map(_scan, paths), strict=True))
            sound = {path: scan for path, scan in scans.items() if not isinstance(scan, str)}
            splits.append(
                SplitReport(
                    name,
                    {label: len(images) for label, images in classes.items()},
                    [size for size, _ in sound.values()],
                    [scan for scan in scans.values() if isinstance(scan, str)],
                    tuple(others),
                    tuple(loops),
                )
            )
            digests.append({path: digest for path, (_, digest) in sound.items()})
            whole.append(
                {label: sum(x in sound for x in images) for label, images in classes.items()}
            )
    refused = _refused(splits, whole, one_part=len(splits) == 1 and leaves_out and not train_only)
    if not leaves_out:
        refused += [line for split in splits for line in split.unreadable]
        splits = [replace(split, unreadable=[]) for split in splits]
    return DataReport(folder, splits, _duplicates(digests), refused)


def verify_data(config: DataConfig) -> None:
    """Check the folder of an experiment; the test split only if the run evaluates on it.

    Raises
    ------
    ValueError
        If anything is wrong; the message holds the first problems.
    """
    report = check_data(
        config.build().folder(), workers=config.workers or None, train_only=config.held_out > 0
    )
    if report.problems:
        problems = "; ".join(report.first_problems())
        msg = f"data.verify: {problems}. See loda data check {report.root}"
        raise ValueError(msg)


# The images of each class, and the files and links that are not read.
_Listed = tuple[Classes, list[Path], list[Path]]


def _listing(root: Path, *, train_only: bool) -> tuple[dict[str, _Listed], bool]:
    """What each split holds, and whether a training leaves damaged images out."""
    names = ["train"] if train_only else ["train", "test"]
    domains = listed_domains(root)
    if domains:
        return {name: (read_lists(root, domains, name), [], []) for name in names}, False
    places = layout(root)
    folders = {"all" if places.train == root else places.train.name: places.train}
    if places.test is not None and not train_only:
        folders[places.test.name] = places.test
    listed = {}
    for name, folder in folders.items():
        classes, _ = read_classes(folder, nested=folder != root)
        walks, beside = walk_classes(folder)
        trees, images = [beside, *walks.values()], {x for y in classes.values() for x in y}
        files = [path for tree in trees for path in (*tree.images, *tree.others)]
        others = [path for path in files if path not in images]
        listed[name] = classes, others, [path for tree in trees for path in tree.loops]
    return listed, True


def _refused(
    splits: list[SplitReport], whole: list[dict[str, int]], *, one_part: bool
) -> list[str]:
    """Why a training would not start; ``whole`` are the images of each class that can be read."""
    lines = []
    every = {label for split in splits for label in split.classes}
    for split, counts in zip(splits, whole, strict=True):
        if empty := {label for label, count in counts.items() if count == 0}:
            lines.append(f"{split.name} has no image that can be read of {some(empty)}")
        if every - set(split.classes):
            lines.append(f"{split.name} lacks the classes {some(every - set(split.classes))}")
        if one_part and (few := {label for label, count in counts.items() if count == 1}):
            lines.append(
                f"{some(few)}: a class needs two images, one to train on and one to evaluate on"
            )
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


def _duplicates(splits: list[dict[Path, bytes]]) -> list[tuple[Path, Path]]:
    first, *second = splits
    twins: dict[bytes, list[Path]] = {}
    for path, digest in first.items():
        twins.setdefault(digest, []).append(path)
    if not second:
        return [(one, path) for one, *others in twins.values() for path in others]
    return [(x, path) for path, digest in second[0].items() for x in twins.get(digest, [])]


def _ignored(split: SplitReport) -> str:
    """Number of ignored files by extension, and the first of them."""
    kinds = Counter(path.suffix.lower() or "no extension" for path in split.ignored)
    named = ", ".join(
        f"{kind} {count}" + (f" ({cure})" if (cure := missing_reader(kind)) else "")
        for kind, count in sorted(kinds.items())
    )
    return f"{split.name}: ignored {named}, such as {split.ignored[0]}"


def _range(values: Iterable[int]) -> str:
    ordered = sorted(values)
    return f"{ordered[0]}/{median(ordered):g}/{ordered[-1]}" if ordered else "-"
