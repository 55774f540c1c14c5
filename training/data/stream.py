"""The stream of tasks: classes in a seeded random order, cut into a first task and increments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training.data.config import DataConfig
from training.data.datasets import Split, some
from training.data.image_files import UnreadableImageError
from training.data.images import ArrayImages, Images, ImageSet, LazyImages, images_of

_VALIDATION_SEED = 0
_TASKS = 5  # unless the settings say how many
_SHOWN = 10


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
        Original class number of each label.
    left_out
        Image files that could not be read and are left out, as CLASS/NAME.
    notes
        What a user should know of the data: what is left out and why, what is held out, how the
        tasks were chosen.
    """

    class_names: list[str]
    tasks: list[tuple[int, ...]]
    train: ImageSet
    test: ImageSet
    order: list[int]
    left_out: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
            content.append(_content(self.train))
        content.append(self._test_content)
        return sha256(json.dumps(content).encode()).hexdigest()

    @cached_property
    def _test_content(self) -> list[Any]:
        # Part of both fingerprints of a run: its files are read once.
        return _content(self.test)

    def test_record(self) -> dict[str, Any]:
        """Number and hash of the test images, as ``classes.json`` records them."""
        return {"images": len(self.test), "fingerprint": self.fingerprint(test_only=True)}


def _content(part: ImageSet) -> list[Any]:
    """Labels, names and hashes of images."""
    positions, files = part.indices.tolist(), part.images.files()
    names = ["/".join(files[index].parts[-2:]) for index in positions] if files else []
    return [part.labels.tolist(), names, part.images.digests(positions)]


def build_stream(config: DataConfig, seed: int) -> Stream:
    """Open a data set and cut it into tasks.

    Files of a folder of photos are read and decoded once, and left out if that fails. Of other
    image files, the headers are read.

    The classes are put in the order ``RandomState(seed).permutation(C)`` (with ``order_seed`` if
    it is set; as they are numbered without ``shuffle``), a class's new label is its position
    there, and the tasks are consecutive labels (LoDA, arXiv:2603.00191, section 5).

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
    data = config.build()  # one instance for both splits: the second may depend on the first
    train = _checked(data.load("train"), config, "training")
    names = list(train.classes)
    without = sorted(set(range(len(names))) - set(np.asarray(train.targets).tolist()))
    if without:
        msg = f"{_place(config)} has no training image of {some([names[n] for n in without])}"
        raise ValueError(msg)
    tasks = cut_tasks(config, len(names))
    chosen = seed if config.order_seed is None else config.order_seed
    # The generator of the published code: another one would give other tasks.
    permutation = (
        np.random.RandomState(chosen).permutation(len(names))
        if config.shuffle
        else np.arange(len(names))
    )
    order = permutation[: tasks[-1][-1] + 1].tolist()
    images, labels = _relabelled(train, order, config)
    unread = _unread(images, labels, data, [names[number] for number in order], config)
    share = config.held_out
    if share == 0:
        test = _matched(_checked(data.load("test"), config, "evaluation"), names, config)
        evaluated, targets = _relabelled(test, order, config)
        unread += _unread(evaluated, targets, data, [names[x] for x in order], config)
        parts = (
            _image_set(images, labels, labels >= 0),
            _image_set(evaluated, targets, targets >= 0),
        )
    else:
        held_out = _held_out(labels, order, share, names)
        parts = (
            _image_set(images, labels, ~held_out & (labels >= 0)),
            _image_set(images, labels, held_out),
        )
    notes = [*getattr(data, "notes", [])]
    if unread:
        shown = "; ".join(error.problem for _, error in unread[:_SHOWN])
        rest = f"; and {len(unread) - _SHOWN} more" if len(unread) > _SHOWN else ""
        plural = "s" if len(unread) > 1 else ""
        notes.append(f"left out, {len(unread)} damaged image{plural}: {shown}{rest}")
    if share and not getattr(data, "has_test", lambda: True)():
        notes.append(
            f"no test split: {share:.0%} of the images of every class, {len(parts[1])} of "
            f"{len(parts[0]) + len(parts[1])}, are held out to be evaluated on; no seed changes "
            "which"
        )
    notes += _copies(*parts)
    if (config.init_cls, config.increment, config.task_sizes) == (None, None, None):
        notes.append(
            f"{len(order)} classes are learned in {_in_words([len(task) for task in tasks])}; "
            "data.tasks, data.increment or data.task_sizes sets this"
        )
    return Stream(
        [names[number] for number in order],
        tasks,
        *parts,
        order,
        [f"{path.parent.name}/{path.name}" for path, _ in unread],
        notes,
    )


def _unread(
    images: Images, labels: NDArray[np.int64], data: Any, names: Sequence[str], config: DataConfig
) -> list[tuple[Path, UnreadableImageError]]:
    """Image files that are left out: their labels become -1.

    Raises
    ------
    UnreadableImageError
        If a file of a data set that leaves none out is not an image by its header.
    ValueError
        If no image of a class is left.
    """
    if isinstance(images, ArrayImages):
        return []
    if not getattr(data, "leaves_out", False):
        images.check_headers()
        return []
    errors, files = images.read(), images.files()
    counts = np.bincount(labels, minlength=len(names))
    labels[[*errors]] = -1
    left = np.bincount(labels[labels >= 0], minlength=len(names))
    if (empty := np.flatnonzero((left == 0) & (counts > 0))).size:
        reasons = "; ".join(error.problem for error in [*errors.values()][:_SHOWN])
        lost = some([names[number] for number in empty])
        msg = f"{_place(config)} has no readable image of {lost}: {reasons}"
        raise ValueError(msg)
    return [(files[index], error) for index, error in errors.items()]


def _copies(train: ImageSet, test: ImageSet) -> list[str]:
    """A note if files of both splits have the same bytes, where these were read."""
    if not all(isinstance(x.images, LazyImages) and x.images.is_read for x in (train, test)):
        return []
    learned = set(train.images.digests(train.indices.tolist()))
    twins = [x in learned for x in test.images.digests(test.indices.tolist())]
    if not any(twins):
        return []
    first = test.images.files()[int(test.indices[twins.index(True)])]
    return [
        f"{sum(twins)} of the evaluation images are copies of training images, such as {first}: "
        "accuracies are too high"
    ]


def _in_words(sizes: Sequence[int]) -> str:
    """Sizes of tasks: 5 tasks of 2, 3 tasks of 3, 2 and 2."""
    if len(sizes) == 1:
        return f"one task of {sizes[0]}"
    if len({*sizes}) == 1:
        return f"{len(sizes)} tasks of {sizes[0]}"
    first = ", ".join(map(str, sizes[:-1]))
    return f"{len(sizes)} tasks of {first} and {sizes[-1]}"


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
    first, further = (
        given if given is not None else other
        for given, other in (
            (config.init_cls, config.increment),
            (config.increment, config.init_cls),
        )
    )
    if config.task_sizes is not None:
        rule = f"data.task_sizes {config.task_sizes}"
        ends = list(accumulate(config.task_sizes))
        if ends[-1] > count:
            msg = f"{rule} are {ends[-1]} classes, but the stream has only {count}."
            raise ValueError(msg)
    elif first is not None and further is not None:
        rule = f"data.init_cls {first}, data.increment {further}"
        if first > count:
            msg = f"data.init_cls is {first}, but the stream has only {count} classes."
            raise ValueError(msg)
        ends = [*range(first, count, further), count]
    else:
        rule = "at least one class each"
        ends = [*accumulate(_equal_tasks(count, config.tasks))]
    tasks = [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
    if config.tasks is not None and config.tasks > len(tasks):
        msg = f"data.tasks is {config.tasks}, but {count} classes give {len(tasks)} tasks ({rule})."
        raise ValueError(msg)
    return tasks[: config.tasks]


def _equal_tasks(count: int, tasks: int | None) -> list[int]:
    """Sizes of equal tasks, the first ones larger by one class if there is a remainder.

    If their number is not given, it is five, or as many as give every task two classes.
    """
    number = max(1, min(_TASKS, count // 2)) if tasks is None else min(tasks, count)
    size, more = divmod(count, number)
    return [size + 1] * more + [size] * (number - more)


def _checked(split: Any, config: DataConfig, use: str) -> Split:
    """The split that a data set returned, checked: a third-party class may be wrong."""
    if not isinstance(split, Sequence) or len(split) != 3:
        msg = (
            f"load of {_place(config)} must return images, the class number of each, and the names "
            f"of the classes, got {split!r:.40}; end it with: return images, targets, classes"
        )
        raise ValueError(msg)
    images, targets, classes = split
    shape = getattr(images, "shape", None)
    if shape is not None and len(shape) != 4:
        msg = (
            f"images of {_place(config)} must have the shape (N, C, H, W), got {tuple(shape)}; "
            "grey images need a channel too: images[:, None]"
        )
        raise ValueError(msg)
    numbers = np.asarray(targets)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or len(numbers) != len(images):
        msg = (
            f"{_place(config)} must give one class number for each of its {len(images)} {use} "
            f"images, got {numbers.dtype} of shape {numbers.shape}"
        )
        raise ValueError(msg)
    if not len(numbers) or numbers.min() < 0 or numbers.max() >= len(classes):
        msg = f"{_place(config)}: {use} images must have class numbers from 0 to {len(classes) - 1}"
        raise ValueError(msg)
    if len(set(classes)) < len(classes):
        msg = f"{_place(config)} must name its classes differently, got {some(list(classes))}"
        raise ValueError(msg)
    return Split(images, numbers.astype(np.int64), classes)


def _matched(test: Split, names: Sequence[str], config: DataConfig) -> Split:
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
        msg = f"{_place(config)}: both splits must hold the same classes, but {' and '.join(parts)}"
        raise ValueError(msg)
    # The splits may number the same classes differently, as DomainNet's lists can.
    numbers = {name: number for number, name in enumerate(names)}
    renumbered = np.array([numbers[name] for name in test.classes])
    return Split(test.images, renumbered[np.asarray(test.targets)], names)


def _place(config: DataConfig) -> str:
    options = config.options
    place = options.get("dataset") or options.get("root")
    return f"data {config.name}" + (f" ({place})" if place else "")


def _relabelled(
    split: Split, order: list[int], config: DataConfig
) -> tuple[Images, NDArray[np.int64]]:
    label_of = np.full(len(split.classes), -1, dtype=np.int64)  # -1 for classes of no task
    label_of[order] = np.arange(len(order))
    labels = label_of[np.asarray(split.targets)]
    positions = np.flatnonzero(labels >= 0)
    return images_of(split.images, config).select(positions.tolist()), labels[positions]


def _held_out(
    labels: NDArray[np.int64], order: Sequence[int], share: float, names: Sequence[str]
) -> NDArray[np.bool_]:
    # Each class draws by its original number: another class order holds out the same images.
    mask = np.zeros(len(labels), dtype=np.bool_)
    counts = np.bincount(labels[labels >= 0], minlength=len(order))
    if (counts < 2).any():
        few = [names[number] for number, count in zip(order, counts, strict=True) if count < 2]
        msg = (
            f"a class needs two images, one to train on and one to evaluate on; {some(few)} "
            f"{'has' if len(few) == 1 else 'have'} one: add images or take the class out"
        )
        raise ValueError(msg)
    for label, number in enumerate(order):
        members = np.flatnonzero(labels == label)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        rng = np.random.default_rng((_VALIDATION_SEED, number))
        mask[rng.permutation(members)[:count]] = True
    return mask


def _image_set(images: Images, labels: NDArray[np.int64], chosen: NDArray[np.bool_]) -> ImageSet:
    indices = np.flatnonzero(chosen)
    return ImageSet(images, torch.from_numpy(indices), torch.from_numpy(labels[indices]))
