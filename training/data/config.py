"""The section ``data`` of an experiment: settings common to all data sets.

They say which images are used, and how these are transformed and cut into tasks. Options of a
single data set, such as its folder, belong to its class, see `training.data.datasets`.
"""

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, Self, TypeVar

from training.components import Component, at_least, check, check_seed, count_of, positive
from training.data.datasets import DATA_SETS, DataSet

T = TypeVar("T")
_DIGITS_SIDE = 8  # the default image_size; with other images it means: not chosen


@dataclass
class DataConfig(Component):
    """The images and the stream of tasks that they are cut into.

    Parameters
    ----------
    name
        glyphs (characters on coloured grounds) or digits, both without download; folder
        (train/CLASS/* with test/ or val/), cifar100, one of imagenet-r, imagenet-a, cub and
        domainnet (the folder of that name in root), timm (what data.dataset names), or the import
        path of a class with a function load.
    classes
        Use only the first N classes of the class order; all if not given.
    init_cls
        Number of classes of the first task.
    increment
        Number of classes of every later task; the last task may have fewer.
    task_sizes
        Number of classes of each task, instead of init_cls and increment; the remaining classes
        are not used.
    tasks
        Keep only the first N tasks of the stream; all if not given.
    shuffle
        Put the classes in a random order; otherwise keep the order of their numbers.
    order_seed
        Seed of the class order; the seed of the run if not given.
    class_order
        Names of the classes in the order of learning, instead of a drawn one; classes that it does
        not name are not used.
    extensions
        Folders of images that loda extend added to the stream, the first one first. The classes and
        tasks of all of them are named in class_order and task_sizes.
    extension_tasks
        Number of tasks that each of these folders added; 0 for new images of known classes only.
    validation
        Fraction of each class's training images, 0 to 0.9, to evaluate on instead of the test
        split, which is then never opened; 0 evaluates on the test split.
    image_size
        Side of the square images that the backbone takes, in pixels.
    resize
        Resize every image to a square of this side first (bicubic, antialiased); no resize if not
        given.
    train_crop
        none, pad (reflect-pad, then a random crop) or random_resized (torchvision's).
    pad
        Pixels of reflected border on every side before the random crop, for train_crop pad.
    crop_scale
        Smallest and largest fraction of the image area, for train_crop random_resized.
    flip
        Mirror training images left to right with probability 0.5.
    test_crop
        none or center.
    test_resize
        Resize the shorter side of evaluation images to this (bicubic); no resize if not given.
    mean
        Subtracted from pixels in [0, 1].
    std
        Divides pixels after the mean is subtracted.
    cache
        Keep decoded images in memory. By default they are kept if resize is set and they take less
        than 1 GB.
    workers
        Processes that load images; 0 loads them in the main process. Results do not depend on it.
    verify
        Decode every image before training, and stop if one is unreadable or in both splits.
    """

    registry = DATA_SETS
    section = "data"

    name: str = "digits"
    classes: int | None = None
    init_cls: int = 2
    increment: int = 2
    task_sizes: list[int] | None = None
    tasks: int | None = None
    shuffle: bool = True
    order_seed: int | None = None
    class_order: list[str] | None = None
    extensions: list[str] = field(default_factory=list)
    extension_tasks: list[int] = field(default_factory=list)
    validation: float = 0.0
    image_size: int = _DIGITS_SIDE
    resize: int | None = None
    train_crop: Literal["none", "pad", "random_resized"] = "none"
    pad: int = 0
    crop_scale: tuple[float, float] = (0.05, 1.0)
    flip: bool = False
    test_crop: Literal["none", "center"] = "none"
    test_resize: int | None = None
    mean: float = 0.0
    std: float = 1.0
    cache: bool | None = None
    workers: int = 0
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("classes", "init_cls", "increment", "tasks")
        for key in (*counts, "image_size", "resize", "test_resize"):
            at_least(f"data.{key}", getattr(self, key), 1)
        at_least("data.pad", self.pad, 0)
        count_of("data.workers", self.workers, 0)
        check_seed("data.order_seed", self.order_seed)
        check(0 <= self.validation <= 0.9, "data.validation", self.validation, "in [0, 0.9]")
        check(math.isfinite(self.mean), "data.mean", self.mean, "finite")
        positive("data.std", self.std)
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "data.crop_scale", [low, high], "0 < smallest <= largest <= 1")
        sizes = self.task_sizes
        allowed = sizes is None or (bool(sizes) and min(sizes) >= 1)
        check(allowed, "data.task_sizes", sizes, "a list of sizes of at least 1")
        order = self.class_order
        once = order is None or (bool(order) and len(set(order)) == len(order))
        check(once, "data.class_order", order, "a list of names, each of them once")
        self._check_extensions()
        if self.is_known:  # of a class that is not imported, not even the image size is known
            self._check_sizes()
            if self.verify and not hasattr(self.kind, "folder"):
                msg = (
                    f"data.verify must be false for data.name {self.name}, got true: only image "
                    "folders can be verified"
                )
                raise ValueError(msg)

    @cached_property  # read for every image
    def side(self) -> int | None:
        """Side of the decoded images of the data set in pixels, if they all have one size."""
        return self._fact("side", DataSet.side)

    @cached_property
    def mode(self) -> str:
        """Pillow's name for the channels of the images, RGB or L."""
        return self._fact("mode", DataSet.mode)

    def _fact(self, name: str, default: T) -> T:
        value: T = getattr(self.kind, name, default) if self.is_known else default
        return value

    def recorded(self) -> Self:
        """A copy with absolute paths, for the record of a run."""
        options = dict(self.options)
        if isinstance(options.get("root"), str):
            options["root"] = str(Path(options["root"]).expanduser().absolute())
        extensions = [str(Path(root).expanduser().absolute()) for root in self.extensions]
        kind, _, place = str(options.get("dataset") or "").partition("/")
        if kind.lower() == "hfds" and place and Path(place).is_dir():
            options["dataset"] = f"{kind}/{Path(place).absolute()}"
        return replace(self, options=options, extensions=extensions)

    def _check_extensions(self) -> None:
        added, order, sizes = self.extension_tasks, self.class_order or [], self.task_sizes or []
        fits = len(added) == len(self.extensions) and all(number >= 0 for number in added)
        rule = f"a number of tasks, 0 or more, for each of the {len(self.extensions)} extensions"
        check(fits, "data.extension_tasks", added, rule)
        if not self.extensions:
            return
        check(sum(added) < len(sizes), "data.extension_tasks", added, "fewer tasks than task_sizes")
        check(sum(sizes) == len(order), "data.class_order", order, "as many names as in the tasks")
        for key in ("classes", "tasks"):
            value = getattr(self, key)
            rule = "null in a stream with extensions, which has all classes of class_order"
            check(value is None, f"data.{key}", value, rule)

    def _check_sizes(self) -> None:
        # Mismatched sizes would surface only when the first batch is stacked, or never.
        size, side = self.image_size, self.resize or self.side
        shorter = self.test_resize or side  # of evaluation images
        images = "of several sizes" if side is None else f"{side} pixels wide"
        unchosen = self.side != _DIGITS_SIDE and size == _DIGITS_SIDE
        wanted = (side or 224) if unchosen else size
        cure = f"set what the backbone takes: --data.resize {wanted} --data.image_size {wanted}"
        one_size = "images of one size, got several; set data.resize"
        crop = self.train_crop
        rules = [
            (not self.cache or side is not None, f"data.cache needs {one_size}"),
            (
                crop != "none" or side == size,
                f"data.image_size must be that of the training images, which are {images}, got "
                f"{size}; {cure}, or choose a data.train_crop",
            ),
            (crop != "pad" or side is not None, f"data.train_crop pad needs {one_size}"),
            (
                crop != "pad" or side is None or (size - side) / 2 <= self.pad < side,
                f"data.pad must be below the side of the images, {side}, and a crop of "
                f"data.image_size {size} must fit into {side} + 2 * pad, got {self.pad}",
            ),
            (
                self.test_crop != "center" or (shorter or 0) >= size,
                f"data.test_resize must be at least data.image_size {size} for data.test_crop "
                f"center, got {self.test_resize} for images {images}; set it to {size}",
            ),
            (
                self.test_crop != "none" or (side is not None and shorter == size),
                f"data.image_size must be that of the evaluation images, which are {images} "
                f"(data.test_resize {self.test_resize}), got {size}; {cure}, or cut it out by "
                "--data.test_resize and --data.test_crop center",
            ),
        ]
        for fits, msg in rules:
            if not fits:
                raise ValueError(msg)
