"""The stream of tasks: classes in a seeded random order, cut into a first task and increments."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from training.config import DataConfig
from training.data.cifar import cifar100_source
from training.data.dataset import ImageSet
from training.data.digits import digits_source
from training.data.domainnet import domainnet_source
from training.data.factory import timm_source
from training.data.folder import folder_source, named_source
from training.data.images import Images
from training.data.source import Source, Split

_SOURCES = {
    "digits": digits_source,
    "folder": folder_source,
    "cifar100": cifar100_source,
    "imagenet-r": named_source,
    "imagenet-a": named_source,
    "cub": named_source,
    "domainnet": domainnet_source,
    "timm": timm_source,
}

_VALIDATION_SEED = 0


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
    """

    class_names: list[str]
    tasks: list[tuple[int, ...]]
    train: ImageSet
    test: ImageSet
    order: list[int]

    def fingerprint(self) -> str:
        """Hash of the class names, their order, and the labels of all images of both splits."""
        labels = [images.labels.numpy().tobytes() for images in (self.train, self.test)]
        parts = [json.dumps([list(self.class_names), list(self.order)]).encode(), *labels]
        return sha256(b"".join(sha256(part).digest() for part in parts)).hexdigest()


def build_stream(config: DataConfig, seed: int) -> Stream:
    """Open a data set and cut it into tasks; every image's header is read here.

    The classes are put in the order ``RandomState(seed).permutation(C)`` (with ``order_seed`` if
    it is set; as they are numbered without ``shuffle``), a class's new label is its position
    there, and the tasks are consecutive labels (LoDA, arXiv:2603.00191, section 5).

    Raises
    ------
    FileNotFoundError
        If the data are not where the configuration says.
    ValueError
        If the classes do not suffice for the tasks, a class has too few images, or an image cannot
        be read.

    Examples
    --------
    >>> stream = build_stream(DataConfig(init_cls=4, increment=4), seed=0)
    >>> stream.tasks
    [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    >>> stream.class_names[:4]
    ['2', '8', '4', '9']
    """
    source = _SOURCES[config.name](config)
    tasks = cut_tasks(config, len(source.class_names))
    chosen = seed if config.order_seed is None else config.order_seed
    count = len(source.class_names)
    permutation = (
        np.random.RandomState(chosen).permutation(count) if config.shuffle else np.arange(count)
    )
    order = permutation[: tasks[-1][-1] + 1].tolist()
    train, test = _splits(source, order, config)
    return Stream([source.class_names[index] for index in order], tasks, train, test, order)


def cut_tasks(config: DataConfig, available: int) -> list[tuple[int, ...]]:
    """Cut the labels of a data set with so many classes into tasks, the remainder last.

    Raises
    ------
    ValueError
        If there are fewer classes, or fewer tasks, than the configuration asks for.
    """
    count = available if config.classes is None else config.classes
    if count > available:
        msg = f"data.classes is {count}, but the data set has {available} classes."
        raise ValueError(msg)
    if config.task_sizes is not None:
        rule = f"data.task_sizes {config.task_sizes}"
        ends = list(accumulate(config.task_sizes))
        if ends[-1] > count:
            msg = f"{rule} are {ends[-1]} classes, but the stream has only {count}."
            raise ValueError(msg)
    else:
        rule = f"data.init_cls {config.init_cls}, data.increment {config.increment}"
        if config.init_cls > count:
            msg = f"data.init_cls is {config.init_cls}, but the stream has only {count} classes."
            raise ValueError(msg)
        ends = [*range(config.init_cls, count, config.increment), count]
    tasks = [tuple(range(a, b)) for a, b in zip([0, *ends], ends, strict=False)]
    if config.tasks is not None and config.tasks > len(tasks):
        msg = f"data.tasks is {config.tasks}, but {count} classes give {len(tasks)} tasks ({rule})."
        raise ValueError(msg)
    return tasks[: config.tasks]


def _splits(source: Source, order: list[int], config: DataConfig) -> tuple[ImageSet, ImageSet]:
    images, labels = _relabelled(source.train, order)
    if config.validation == 0:
        return _image_set(images, labels), _image_set(*_relabelled(source.test(), order))
    held_out = _held_out(labels, order, config.validation, source.class_names)
    return _image_set(images, labels, ~held_out), _image_set(images, labels, held_out)


def _relabelled(split: Split, order: list[int]) -> tuple[Images, NDArray[np.int64]]:
    positions = np.flatnonzero(np.isin(split.targets, order))
    images = split.images.select(positions.tolist())
    images.check()
    return images, np.argsort(order)[np.searchsorted(np.sort(order), split.targets[positions])]


def _held_out(
    labels: NDArray[np.int64], order: Sequence[int], share: float, names: Sequence[str]
) -> NDArray[np.bool_]:
    # Each class draws by its original number: another class order holds out the same images.
    mask = np.zeros(len(labels), dtype=np.bool_)
    for label, number in enumerate(order):
        members = np.flatnonzero(labels == label)
        if len(members) < 2:
            msg = (
                f"class {names[number]} has {len(members)} training image: data.validation needs "
                "two of each class, one to train on and one to evaluate on."
            )
            raise ValueError(msg)
        count = min(max(round(share * len(members)), 1), len(members) - 1)
        rng = np.random.default_rng((_VALIDATION_SEED, number))
        mask[rng.permutation(members)[:count]] = True
    return mask


def _image_set(
    images: Images, labels: NDArray[np.int64], chosen: NDArray[np.bool_] | None = None
) -> ImageSet:
    indices = np.arange(len(labels)) if chosen is None else np.flatnonzero(chosen)
    return ImageSet(images, torch.from_numpy(indices), torch.from_numpy(labels[indices]))
