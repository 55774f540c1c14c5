"""The settings of the data: which images, how they are transformed and cut into tasks."""

import math
from dataclasses import dataclass
from typing import Literal

from training.config._checks import at_least, check, check_seed, positive

NATIVE_SIDE = {"digits": 8, "cifar100": 32}
"""Image side, in pixels, of the data sets whose images all have one size."""

CLASS_COUNTS = {"imagenet-r": 200, "imagenet-a": 200, "cub": 200, "domainnet": 345}
"""Number of classes of the published data sets that are read from folders under ``data.root``."""


@dataclass
class DataConfig:
    """The images and the stream of tasks that they are cut into.

    Parameters
    ----------
    name
        digits (embedded, no download), folder (train/CLASS/* with test/ or val/), cifar100, one of
        imagenet-r, imagenet-a, cub and domainnet (the folder of that name in root), or timm (what
        data.dataset names).
    root
        The folder tree, the folder that holds such trees by name, or the one that holds (or
        receives) what is downloaded.
    dataset
        For data.name timm: a name that timm's data set factory knows, such as torch/cifar10,
        hfds/ORGANISATION/NAME or hfds/FOLDER.
    train_split
        For data.name timm: what the data set calls its training images.
    test_split
        For data.name timm: what the data set calls its evaluation images.
    image_key
        For data.dataset hfds/...: the column of the images, image when not given.
    label_key
        For data.dataset hfds/...: the column of the classes, label when not given.
    download
        For data.name timm: let torchvision download the data set to root.
    classes
        Use only the first so many classes of the random order; all when not given.
    init_cls
        Number of classes of the first task.
    increment
        Number of classes of every later task; the last task may have fewer.
    task_sizes
        Number of classes of each task, instead of init_cls and increment; later classes are left
        out.
    tasks
        Cut the stream to its first so many tasks; all when not given.
    shuffle
        Put the classes in a random order; otherwise they stay in that of their numbers.
    order_seed
        Seed of the class order; the seed of the run when not given.
    validation
        Share of each class's training images, 0 to 0.9, to evaluate on instead of the test split,
        which is then never opened; 0 evaluates on the test split.
    image_size
        Side, in pixels, of the square images that the backbone reads.
    resize
        Side of a first resize of every image to a square (bicubic, antialiased); none if not given.
    train_crop
        none, pad (reflect-pad, then a random crop) or random_resized (torchvision's).
    pad
        Pixels of reflected border on every side before the random crop, for train_crop pad.
    crop_scale
        Smallest and largest share of the image area, for train_crop random_resized.
    flip
        Mirror training images left to right with probability 0.5.
    test_crop
        none or center.
    test_resize
        Resize the shorter side of evaluation images to this (bicubic); none if not given.
    mean
        Subtracted from pixels in [0, 1].
    std
        Divides pixels after the mean is subtracted.
    cache
        Keep decoded images in memory; when not given, if resize is set and they take under 1 GB.
    workers
        Processes that load images; 0 loads them in the main process. Results do not depend on it.
    verify
        Decode every image before training, and stop at what is unreadable or in both splits.
    """

    name: Literal[
        "digits", "folder", "cifar100", "imagenet-r", "imagenet-a", "cub", "domainnet", "timm"
    ] = "digits"
    root: str | None = None
    dataset: str | None = None
    train_split: str = "train"
    test_split: str = "validation"
    image_key: str | None = None
    label_key: str | None = None
    download: bool = False
    classes: int | None = None
    init_cls: int = 2
    increment: int = 2
    task_sizes: list[int] | None = None
    tasks: int | None = None
    shuffle: bool = True
    order_seed: int | None = None
    validation: float = 0.0
    image_size: int = 8
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
        for key in ("classes", "init_cls", "increment", "tasks"):
            at_least(f"data.{key}", getattr(self, key), 1)
        for key in ("image_size", "resize", "test_resize"):
            at_least(f"data.{key}", getattr(self, key), 1)
        for key in ("pad", "workers"):
            at_least(f"data.{key}", getattr(self, key), 0)
        check_seed("data.order_seed", self.order_seed)
        check(0 <= self.validation <= 0.9, "data.validation", self.validation, "in [0, 0.9]")
        check(math.isfinite(self.mean), "data.mean", self.mean, "finite")
        positive("data.std", self.std)
        low, high = self.crop_scale
        check(0 < low <= high <= 1, "data.crop_scale", [low, high], "0 < smallest <= largest <= 1")
        sizes = self.task_sizes
        allowed = sizes is None or (bool(sizes) and min(sizes) >= 1)
        check(allowed, "data.task_sizes", sizes, "a list of sizes of at least 1")
        _check_source(self)
        _check_sides(self)


def _check_source(data: DataConfig) -> None:
    if (data.name == "timm") != (data.dataset is not None):
        msg = (
            f"data.name is {data.name} and data.dataset is {data.dataset}: data.dataset names the "
            "data set for data.name timm, and for no other."
        )
        raise ValueError(msg)
    # Hugging Face keeps what it downloads in a cache of its own, unless a root is given.
    columns = (data.dataset or "").lower().startswith("hfds/")
    if data.root is None and data.name != "digits" and not columns:
        msg = f"data.root must be given for data.name {data.name}: the folder with the images."
        raise ValueError(msg)
    if not columns and (data.image_key, data.label_key) != (None, None):
        msg = "data.image_key and data.label_key name columns, which hfds/ data sets alone have."
        raise ValueError(msg)
    if data.cache and data.resize is None and data.name not in NATIVE_SIDE:
        msg = "data.cache true needs images of one size: set data.resize."
        raise ValueError(msg)
    if data.verify and data.name in {*NATIVE_SIDE, "timm"}:
        msg = f"data.verify reads image folders, and data.name {data.name} is none."
        raise ValueError(msg)


def _check_sides(data: DataConfig) -> None:
    # Sizes that do not meet would only show when the first batch is stacked, or not at all.
    side = data.resize or NATIVE_SIDE.get(data.name)
    size, given = data.image_size, f"data.resize {data.resize}"
    if data.train_crop == "none" and side != size:
        msg = (
            f"training images would not have data.image_size {size} ({given}, data.train_crop "
            f"none): set both to the side that the backbone reads, {_example(data, side)}, or "
            "choose a data.train_crop."
        )
        raise ValueError(msg)
    if data.train_crop == "pad":
        if side is None:
            msg = "data.train_crop pad needs images of one size: set data.resize."
            raise ValueError(msg)
        if data.pad >= side or side + 2 * data.pad < size:
            msg = (
                f"data.pad {data.pad} does not fit: it must be below the side of the images "
                f"({side}), and a crop of data.image_size {size} must fit into {side} + 2 * pad."
            )
            raise ValueError(msg)
    shorter = data.test_resize or side
    if data.test_crop == "center" and (shorter is None or shorter < size):
        msg = (
            f"data.test_crop center cannot cut data.image_size {size} from evaluation images "
            f"({given}, data.test_resize {data.test_resize}): set a data.test_resize of at least "
            f"{size}."
        )
        raise ValueError(msg)
    if data.test_crop == "none" and (side is None or shorter != size):
        msg = (
            f"evaluation images would not have data.image_size {size} ({given}, data.test_resize "
            f"{data.test_resize}, data.test_crop none): set the side that the backbone reads, "
            f"{_example(data, side)}, or cut it out by --data.test_resize and "
            "--data.test_crop center."
        )
        raise ValueError(msg)


def _example(data: DataConfig, side: int | None) -> str:
    # The default image_size is that of the digits: no user of a folder has chosen it.
    unchosen = data.name != "digits" and data.image_size == NATIVE_SIDE["digits"]
    wanted = (side or 224) if unchosen else data.image_size
    return f"for instance --data.resize {wanted} --data.image_size {wanted}"
