"""The stream of tasks: classes in a seeded random order, cut into a first task and increments.

A stream may have extensions: folders that brought further classes, or images of known ones, after
its first tasks were learned.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.config import HELD_OUT, DataConfig, has_test
from training.data.datasets import DATA_SETS, Folder, Split
from training.data.image_files import UnreadableImageError
from training.data.images import ImageSet, LazyImages, images_of, joined
from training.spelling import some

_VALIDATION_SEED = 0
_TASKS = 5  # unless the settings say how many
_SHOWN = 10


@dataclass(frozen=True)
class Extension:
    """What a folder added to a stream.

    Parameters
    ----------
    first_task
        Number of tasks before it.
    known
        Its training images of classes that these tasks had already.
    evaluated
        Number of evaluation images of the stream up to and including its own.
    """

    first_task: int
    known: ImageSet
    evaluated: int


@dataclass(frozen=True)
class Stream:
    """A class-incremental stream; labels are positions in its class order.

    Parameters
    ----------
    class_names
        Name of the class of each label.
    tasks
        The labels of each task, in the order of learning.
    train
        Training images of all tasks.
    test
        Evaluation images of all tasks: the test split, or held-out training images.
    order
        Original class number of each label; with extensions, which have no common numbers, the
        label itself.
    base
        Number of evaluation images of the data set itself, which come before those of the
        extensions; all of them without extensions.
    extensions
        The extensions, the first one first.
    missing
        Why images of the data set or of an extension could not be read, where that is allowed.
    left_out
        Image files that could not be decoded and are left out, as CLASS/NAME.
    notes
        What a user should know of the data: what is left out and why, what is held out, how the
        tasks were chosen.
    """

    class_names: list[str]
    tasks: list[tuple[int, ...]]
    train: ImageSet
    test: ImageSet
    order: list[int]
    base: int | None = None
    extensions: tuple[Extension, ...] = ()
    missing: tuple[str, ...] = ()
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def evaluated(self, tasks: int, extensions: int) -> ImageSet:
        """Evaluation images of the first tasks, of the data set and of the first extensions.

        An extension may have images of classes that were known before it: they do not count in
        what was measured earlier.
        """
        base = len(self.test) if self.base is None else self.base
        counts = [base, *(extension.evaluated for extension in self.extensions)]
        seen = [label for task in self.tasks[:tasks] for label in task]
        return self.test.first(counts[extensions]).subset(seen)

    def fingerprint(self, *, test_only: bool = False) -> str:
        """Hash of the content of the stream, independent of its folder.

        It covers the classes, the tasks, the labels and the images: files by their names (with
        that of their folder) and bytes, arrays by their pixels. Images that a data set gives one
        by one are not covered. All files are read.

        Parameters
        ----------
        test_only : bool
            Leave out the training images.

        Examples
        --------
        >>> one, other = (build_stream(DataConfig(), seed).fingerprint() for seed in (0, 1))
        >>> len(one), one == other
        (64, False)
        """
        content: list[Any] = [self.class_names, self.order, self.tasks]
        if not test_only:
            parts = [self.train, *(extension.known for extension in self.extensions)]
            content += [_content(part) for part in parts]
        content.append(self._test_content)
        return sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _test_content(self) -> list[Any]:
        # Part of both fingerprints of a run: its files are read once.
        return _content(self.test)

    def as_one_task(self) -> "Stream":
        """The same classes and images with all tasks in one."""
        return replace(self, tasks=[tuple(label for task in self.tasks for label in task)])

    def test_record(self) -> dict[str, Any]:
        """Number and hash of the test images, as ``classes.json`` records them."""
        return {"images": len(self.test), "fingerprint": self.fingerprint(test_only=True)}


def _content(part: ImageSet) -> list[Any]:
    """Labels, names and hashes of images."""
    positions, files = part.indices.tolist(), part.images.files()
    names = ["/".join(files[index].parts[-2:]) for index in positions] if files else []
    return [part.labels.tolist(), names, part.images.digests(positions)]


def build_stream(config: DataConfig, seed: int, *, partial: bool = False) -> Stream:
    """Open a data set and cut it into tasks.

    Files of a folder of photos are read and decoded once, and left out if that fails. Of other
    image files, the headers are read.

    The classes are put in the order ``RandomState(seed).permutation(C)`` (with ``order_seed`` if
    it is set; as they are numbered without ``shuffle``), a class's new label is its position
    there, and the tasks are consecutive labels (LoDA, arXiv:2603.00191, section 5). ``class_order``
    declares another order.

    Parameters
    ----------
    config, seed
        The section ``data``, and the seed of the run.
    partial
        Leave out the images of the data set or of extensions that are no longer there, and name
        them in `Stream.missing`; only in a stream with extensions.

    Raises
    ------
    FileNotFoundError
        If the data are not at the configured place.
    ValueError
        If there are too few classes for the tasks, a class has too few images, or an image cannot
        be read.

    Examples
    --------
    >>> stream = build_stream(DataConfig(init_cls=4, increment=4), seed=0)
    >>> stream.tasks
    [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    >>> stream.class_names[:4]
    ['2', '8', '4', '9']
    """
    if config.extensions:
        return _extended(config, partial=partial)
    data = config.build()
    train = _checked(data.load("train"), _place(config), "training")
    names = list(train.classes)
    order = _class_order(config, seed, names)
    tasks = cut_tasks(config, len(order))
    order = order[: tasks[-1][-1] + 1]
    labels = {names[number]: label for label, number in enumerate(order)}
    report = _Report()
    parts = _parts(data, train, labels, config, _place(config), config.held_out, report)
    if (config.init_cls, config.increment, config.task_sizes) == (None, None, None):
        report.notes.append(
            f"the classes are learned in {_in_words([len(task) for task in tasks])}; "
            "data.increment or data.task_sizes sets this"
        )
    return Stream(
        [names[number] for number in order],
        tasks,
        *parts,
        order,
        left_out=report.left_out,
        notes=report.notes,
    )


def _class_order(config: DataConfig, seed: int, names: Sequence[str]) -> list[int]:
    """Numbers of the classes in the order of learning: all of them, or those declared."""
    if config.class_order is not None:
        numbers = {name: number for number, name in enumerate(names)}
        unknown = [name for name in config.class_order if name not in numbers]
        if unknown:
            msg = (
                f"data.class_order must name classes of {_place(config)}, got {some(unknown)}; its "
                f"classes are {some(list(names))}"
            )
            raise ValueError(msg)
        return [numbers[name] for name in config.class_order]
    if not config.shuffle:
        return list(range(len(names)))
    chosen = seed if config.order_seed is None else config.order_seed
    # The generator of the published code: another one would give other tasks.
    order: list[int] = np.random.RandomState(chosen).permutation(len(names)).tolist()
    return order


def _extended(config: DataConfig, *, partial: bool) -> Stream:
    """The stream of a data set and of the folders that extend it, in one declared class order."""
    names = list(config.class_order or [])
    tasks = cut_tasks(config, len(names))
    # Tasks before the first extension, up to the end of each, and up to the end of all.
    ends = list(
        accumulate(config.extension_tasks, initial=len(tasks) - sum(config.extension_tasks))
    )
    train: list[ImageSet] = []
    test: list[ImageSet] = []
    read: list[ImageSet] = []
    extensions: list[Extension] = []
    missing: list[str] = []
    report = _Report()
    for number, end in enumerate(ends):
        learned = sum(len(task) for task in tasks[: ends[number - 1]]) if number else 0
        # Classes of later tasks may lie in the folder by now; they count where they were learned.
        labels = {name: label for label, name in enumerate(names[: tasks[end - 1][-1] + 1])}
        try:
            own = _source_parts(config, number, labels, learned, report)
        except FileNotFoundError as error:
            if not partial:
                raise
            missing.append(str(error))
            own = None
        if own is not None:
            # A folder may be that of the data set, to which new classes were added.
            (fresh, held_out), copies = _without(own, read)
            if copies:
                many = "a copy" if len(copies) == 1 else f"{len(copies)} copies"
                report.notes.append(
                    f"left out, {many} of images that were there before, such as {copies[0]}"
                )
            own = fresh, held_out
            read += own
            known = own[0].labels < learned
            train.append(own[0].chosen(~known))
            test.append(own[1])
        if number:
            nothing = ImageSet(images_of([], config), torch.zeros(0).long(), torch.zeros(0).long())
            update = nothing if own is None else own[0].chosen(known)
            extensions.append(Extension(ends[number - 1], update, sum(map(len, test))))
        else:
            base = sum(map(len, test))
    if not train:
        msg = "; ".join(missing)
        raise FileNotFoundError(msg)
    return Stream(
        names,
        tasks,
        joined(train),
        joined(test),
        list(range(len(names))),
        base,
        tuple(extensions),
        tuple(missing),
        report.left_out,
        report.notes,
    )


def require_outside(out: Path, config: DataConfig) -> None:
    """Refuse a folder of results inside one of photos, where its figure would become a class.

    Raises
    ------
    ValueError
        If it lies in the folder of the data set or of an extension.
    """
    added = (DATA_SETS.build("folder", {"root": root}) for root in config.extensions)
    for data in (config.build(), *added):
        if not isinstance(data, Folder):
            continue
        try:
            photos = data.folder()
        except FileNotFoundError:  # a folder that is gone holds nothing
            continue
        if photos.resolve() in out.resolve().parents:
            msg = (
                f"out must not lie in the folder of the photos, {photos}, where its figure would "
                f"be taken for one, got {out}: choose another --out"
            )
            raise ValueError(msg)


def _without(
    parts: Sequence[ImageSet], others: Sequence[ImageSet]
) -> tuple[list[ImageSet], list[Path]]:
    """The images of sets that are not among those of others, and copies that were left out.

    A file is known by whatever path it has, and a copy by its bytes and its class.
    """
    if not others:
        return list(parts), []
    taken = {path.resolve() for other in others for path in other.images.files()}
    known = {twin for other in others for twin in _twins(other)}
    rest: list[ImageSet] = []
    copies: list[Path] = []
    for part in parts:
        files, new = part.images.files(), torch.ones(len(part), dtype=torch.bool)
        twins = _twins(part)
        for position, index in enumerate(part.indices.tolist() if files else []):
            is_same = files[index].resolve() in taken
            # Files that were not read have no twins.
            is_copy = not is_same and bool(twins) and twins[position] in known
            new[position] = not (is_same or is_copy)
            copies += [files[index]] * is_copy
        rest.append(part.chosen(new))
    return rest, copies


def _twins(part: ImageSet) -> list[tuple[str, int]]:
    """What the copies of each image share with it: the bytes of the file and the class."""
    hashes = _hashes(part)
    return list(zip(hashes, part.labels.tolist(), strict=True)) if hashes else []


def _hashes(part: ImageSet) -> list[str]:
    """Hash of the file of each image; an empty list where the files have not been read."""
    images = part.images
    read = isinstance(images, LazyImages) and images.is_read
    return images.digests(part.indices.tolist()) if read else []


def _source_parts(
    config: DataConfig, number: int, labels: Mapping[str, int], learned: int, report: "_Report"
) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation images of the data set (0) or of an extension, counted from 1.

    Labels below ``learned`` are of classes that were known before.
    """
    if number == 0:
        data, place, share = config.build(), _place(config), config.held_out
    else:
        root = config.extensions[number - 1]
        data, place = DATA_SETS.build("folder", {"root": root}), f"the extension {root}"
        share = _extension_share(config, data)
    train = _checked(data.load("train"), place, "training")
    told = len(report.notes)
    parts = _parts(data, train, labels, config, place, share, report, learned=learned)
    if number:
        report.notes[told:] = [f"{place}: {note}" for note in report.notes[told:]]
    return parts


def _extension_share(config: DataConfig, extension: Any) -> float:
    """Share of the training images of an extension that is evaluated on."""
    share = 0.0 if config.validation == "auto" else config.validation
    if not has_test(extension):  # whether or not the data set itself has one
        return share or HELD_OUT
    # A data set without a test split had no choice but to hold images out.
    try:
        had_none = not has_test(config.build())
    except FileNotFoundError:
        had_none = share == HELD_OUT
    return 0.0 if had_none else share


@dataclass
class _Report:
    """What building a stream has to tell; see `Stream`."""

    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def _parts(
    data: Any,
    train: Split,
    labels: Mapping[str, int],
    config: DataConfig,
    place: str,
    share: float,
    report: _Report,
    *,
    learned: int = 0,
) -> tuple[ImageSet, ImageSet]:
    """Training and evaluation images of the classes that have a label.

    ``data`` is the instance that gave the training split: the second may depend on the first. Of a
    class with a label below ``learned`` one image is enough: it is not evaluated on.
    """
    names = list(train.classes)
    without = sorted(set(range(len(names))) - set(np.asarray(train.targets).tolist()))
    if without:
        msg = f"{place} has no training image of {some([names[n] for n in without])}"
        raise ValueError(msg)
    images, unread = _readable(_labelled(train, labels, config), data, place)
    if share == 0:
        test = _matched(_checked(data.load("test"), place, "evaluation"), names, place)
        evaluated, also = _readable(_labelled(test, labels, config), data, place)
        parts, unread = (images, evaluated), [*unread, *also]
    else:
        counts = images.labels.bincount(minlength=learned)
        by_name = not has_test(data) and data.layout().train == data.folder()
        classes = {
            # By name where classes may be added to the folder: one that is new changes no other.
            labels[name]: (name, int.from_bytes(name.encode()) if by_name else number)
            for number, name in enumerate(names)
            if name in labels and (labels[name] >= learned or counts[labels[name]] > 1)
        }
        notes = [*getattr(data, "notes", []), *([_first(unread)] if unread else [])]
        held_out = torch.from_numpy(_held_out(images.labels.numpy(), classes, share, notes))
        parts = images.chosen(~held_out), images.chosen(held_out)
    report.notes += getattr(data, "notes", [])
    if unread:
        report.left_out += [f"{path.parent.name}/{path.name}" for path, _ in unread]
        report.notes.append(
            f"left out, {len(unread)} damaged image{'s' * (len(unread) > 1)}: {_first(unread)}"
        )
    if share and not has_test(data):
        count, total = len(parts[1]), len(parts[0]) + len(parts[1])
        report.notes.append(
            f"no test split: {share:.0%} of the images of every class, {count} of {total}, are "
            "held out to be evaluated on; no seed changes which"
        )
    report.notes += _copies(*parts)
    return parts


_Unread = list[tuple[Path, UnreadableImageError]]


def _readable(part: ImageSet, data: Any, place: str) -> tuple[ImageSet, _Unread]:
    """The images without those that cannot be decoded, and these, if they may be left out.

    Raises
    ------
    UnreadableImageError
        If a file of a data set that leaves none out is not an image by its header.
    ValueError
        If no image of a class is left.
    """
    images = part.images
    if not isinstance(images, LazyImages):
        return part, []
    if not getattr(data, "leaves_out", False):
        images.check_headers()
        return part, []
    files = images.files()
    unread = [(files[index], error) for index, error in sorted(images.read().items())]
    if not unread:
        return part, []
    damaged = {path for path, _ in unread}
    rest = part.chosen(torch.tensor([path not in damaged for path in files]))
    lost = sorted({*part.labels.tolist()} - {*rest.labels.tolist()})
    if lost:
        folders = {int(label): path.parent for label, path in zip(part.labels, files, strict=True)}
        classes = some([str(folders[label]) for label in lost])
        msg = f"{place} has no readable image in {classes}: {_first(unread)}"
        raise ValueError(msg)
    return rest, unread


def _first(unread: _Unread) -> str:
    """What is wrong with the first images, and how many more there are."""
    lines = [error.problem for _, error in unread[:_SHOWN]]
    rest = len(unread) - _SHOWN
    return "; ".join([*lines, *([f"and {rest} more"] if rest > 0 else [])])


def _copies(train: ImageSet, test: ImageSet) -> list[str]:
    """A note if files of both splits have the same bytes, where these were read."""
    known = {*_hashes(train)}
    twins = [number for number, digest in enumerate(_hashes(test)) if digest in known]
    if not twins:
        return []
    first = test.images.files()[int(test.indices[twins[0]])]
    are = "is a copy" if len(twins) == 1 else "are copies"
    return [
        f"{len(twins)} of the evaluation images {are} of training images, such as {first}: "
        "accuracies are too high"
    ]


def _in_words(sizes: Sequence[int]) -> str:
    """Sizes of tasks: 5 tasks of 2; 3 tasks of 3, 2 and 2."""
    if len(sizes) == 1:
        return f"one task of {sizes[0]}"
    if len({*sizes}) == 1:
        return f"{len(sizes)} tasks of {sizes[0]}"
    return f"{len(sizes)} tasks of {', '.join(map(str, sizes[:-1]))} and {sizes[-1]}"


def _labelled(split: Split, labels: Mapping[str, int], config: DataConfig) -> ImageSet:
    """The images of the classes that have a label, in the order of the split."""
    # -1 for classes of no task.
    label_of = np.array([labels.get(name, -1) for name in split.classes], dtype=np.int64)
    every = label_of[np.asarray(split.targets)]
    positions = np.flatnonzero(every >= 0)
    return ImageSet(
        images_of(split.images, config).select(positions.tolist()),
        torch.arange(len(positions)),
        torch.from_numpy(every[positions]),
    )


def cut_tasks(config: DataConfig, available: int) -> list[tuple[int, ...]]:
    """Cut the labels of a data set with ``available`` classes into tasks, the remainder last.

    Raises
    ------
    ValueError
        If there are fewer classes, or fewer tasks, than the configuration asks for.
    """
    count = available if config.classes is None else config.classes
    if count > available:
        msg = f"data.classes is {count}, but the data set has {available} classes."
        raise ValueError(msg)
    first, further = config.init_cls or config.increment, config.increment or config.init_cls
    if config.task_sizes is not None:
        rule = f"data.task_sizes {config.task_sizes}"
        ends = list(accumulate(config.task_sizes))
        if ends[-1] > count:
            msg = f"{rule} are {ends[-1]} classes, but the stream has only {count}."
            raise ValueError(msg)
    elif first and further:
        rule = f"data.init_cls {first}, data.increment {further}"
        if first > count:
            msg = f"data.init_cls is {first}, but the stream has only {count} classes."
            raise ValueError(msg)
        ends = [*range(first, count, further), count]
    else:
        rule = "equal tasks; data.increment or data.task_sizes sets other ones"
        ends = [*accumulate(_equal_tasks(count))]
    tasks = [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
    if config.tasks is not None and config.tasks > len(tasks):
        msg = f"data.tasks is {config.tasks}, but {count} classes give {len(tasks)} tasks ({rule})."
        raise ValueError(msg)
    return tasks[: config.tasks]


def _equal_tasks(count: int) -> list[int]:
    """Sizes of equal tasks, the first ones larger by one class if there is a remainder.

    There are five, or as many as give every task two classes.
    """
    number = max(1, min(_TASKS, count // 2))
    size, more = divmod(count, number)
    return [size + 1] * more + [size] * (number - more)


def _checked(split: Any, place: str, use: str) -> Split:
    """The split that a data set returned, checked: a third-party class may be wrong."""
    if not isinstance(split, Sequence) or len(split) != 3:
        msg = (
            f"load of {place} must return images, the class number of each, and the names "
            f"of the classes, got {split!r:.40}; end it with: return images, targets, classes"
        )
        raise ValueError(msg)
    images, targets, classes = split
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) != 4:
        msg = (
            f"images of {place} must have the shape (N, C, H, W), got {tuple(shape)}; "
            "grey images need a channel too: images[:, None]"
        )
        raise ValueError(msg)
    numbers = np.asarray(targets)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or len(numbers) != len(images):
        msg = (
            f"{place} must give one class number for each of its {len(images)} {use} "
            f"images, got {numbers.dtype} of shape {numbers.shape}"
        )
        raise ValueError(msg)
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(classes):
        msg = f"{place}: {use} images must have class numbers from 0 to {len(classes) - 1}"
        raise ValueError(msg)
    if len(set(classes)) < len(classes):
        msg = f"{place} must name its classes differently, got {some(list(classes))}"
        raise ValueError(msg)
    return Split(images, numbers.astype(np.int64), classes)


def _matched(test: Split, names: Sequence[str], place: str) -> Split:
    """The test split under the class numbers of the training split.

    Raises
    ------
    ValueError
        Unless both splits hold the same classes.
    """
    own, theirs = set(names), set(test.classes)
    lacking = {"test": own - theirs, "train": theirs - own}
    parts = [f"{split} lacks {some(lost)}" for split, lost in lacking.items() if lost]
    if parts:
        msg = f"{place}: both splits must hold the same classes, but {' and '.join(parts)}"
        raise ValueError(msg)
    # The splits may number the same classes differently, as DomainNet's lists can.
    numbers = {name: number for number, name in enumerate(names)}
    renumbered = np.array([numbers[name] for name in test.classes])
    return Split(test.images, renumbered[np.asarray(test.targets)], names)


def _place(config: DataConfig) -> str:
    options = config.options
    place = options.get("dataset") or options.get("root")
    return f"data {config.name}" + (f" ({place})" if place else "")


def _held_out(
    labels: NDArray[np.int64],
    classes: Mapping[int, tuple[str, int]],
    share: float,
    notes: Sequence[str],
) -> NDArray[np.bool_]:
    """Mask of the images that are held out.

    ``classes`` are the names and own seeds, by label; ``notes`` say why a class may have too few.
    """
    # Each class draws by its own seed: another class order holds out the same images.
    mask = np.zeros(len(labels), dtype=np.bool_)
    few = [name for label, (name, _) in classes.items() if (labels == label).sum() < 2]
    if few:
        have, out = ("has", "class") if len(few) == 1 else ("have", "classes")
        msg = (
            f"a class needs two images, one to train on and one to evaluate on; {some(few)} {have} "
            f"one: add images, or take the {out} out{''.join(f'; {note}' for note in notes)}"
        )
        raise ValueError(msg)
    for label, (_, number) in classes.items():
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        rng = np.random.default_rng((_VALIDATION_SEED, number))
        mask[rng.permutation(members)[:count]] = True
    return mask
