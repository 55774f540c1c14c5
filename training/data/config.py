"""The section ``data`` of an experiment: settings common to all data sets.

They say which images are used, and how these are transformed and cut into tasks. Options of a
single data set, such as its folder, belong to its class, see `training.data.datasets`. What is left
at ``auto`` follows the backbone: `DataConfig.resolved` puts its values in.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from training.components import Component, at_least, check, check_seed, count_of
from training.data.datasets import DATA_SETS, DataSet

if TYPE_CHECKING:
    from training.backbones.preprocessing import Preprocessing

T = TypeVar("T")
Auto = Literal["auto"]
TrainCrop = Literal["none", "pad", "random_resized"]
TestCrop = Literal["none", "center"]
CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

HELD_OUT = 0.2
"""Fraction of each class that is evaluated on where a data set has no test split."""


@dataclass(frozen=True)
class ImageSettings:
    """Every setting of the images with its value: none is left to the backbone.

    The fields are those of `DataConfig`; ``mean`` and ``std`` have one number, or one a channel.
    """

    image_size: int
    channels: int
    resize: int | None
    crop_mode: CropMode
    interpolation: Interpolation
    train_crop: TrainCrop
    flip: bool
    test_crop: TestCrop
    mean: float | tuple[float, ...]
    std: float | tuple[float, ...]

    @property
    def augments(self) -> bool:
        """Whether training images are cropped or mirrored at random."""
        return self.train_crop != "none" or self.flip


@dataclass
class DataConfig(Component):
    """The images, and how their classes are divided into tasks.

    Parameters
    ----------
    name
        glyphs (characters on coloured grounds) or digits, both without download; folder (photos in
        one folder a class, with or without train/ and test/), cifar100, one of imagenet-r,
        imagenet-a, cub and domainnet (the folder of that name in root), timm (what data.dataset
        names), or the import path of a class with a function load.
    classes
        Use only the first N classes of the class order; all if not given.
    init_cls
        Number of classes of the first task; that of the later ones if not given.
    increment
        Number of classes of every later task, and the last may have fewer; that of the first if not
        given. If neither is given, the classes are shared out to five equal tasks, or to fewer of
        at least two classes.
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
        split, which is then never opened; 0 evaluates on the test split. auto is 0, or 0.2 for a
        folder without a test split.
    image_size
        Side of the square images that the backbone takes, in pixels; auto is the backbone's own.
    channels
        1 (grey) or 3 (RGB); auto is the backbone's own.
    resize
        Give every image this size first, as crop_mode says; null does not. auto is what the
        backbone was evaluated with (its image_size, or a little more and then the central crop).
    crop_mode
        How an image becomes the square of resize: center (resize the shorter side, keep the
        middle), squash (change the aspect ratio), border (resize the longer side, add a border of
        the mean colour); auto is the backbone's own.
    interpolation
        Filter of these resizes: nearest, bilinear, bicubic, lanczos, box or hamming; auto is the
        backbone's own.
    train_crop
        none, pad (reflect-pad, then a random crop) or random_resized (torchvision's). auto is
        random_resized for photos, that is for images of several sizes, and none for others.
    pad
        Pixels of reflected border on every side before the random crop, for train_crop pad.
    crop_scale
        Smallest and largest fraction of the image area, for train_crop random_resized.
    flip
        Mirror training images left to right with probability 0.5; auto does so for photos.
    test_crop
        none or center; auto cuts out the centre where images are larger than image_size.
    test_resize
        Resize the shorter side of evaluation images to this; no resize if not given.
    mean
        Subtracted from pixels in [0, 1], one number or one a channel; auto is the backbone's own.
    std
        Divides pixels after the mean is subtracted, one number or one a channel; auto is the
        backbone's own.
    cache
        Keep decoded images in memory, and the tokens that a stem of convolutions makes of those
        of a task, if they are not augmented. By default each is kept if it takes less than 1 GB,
        images only if resize is set.
    workers
        Processes that load images; 0 loads them in the main process. Results do not depend on it.
    verify
        Decode every image before training, and stop if one is unreadable or in both splits.
    """

    registry = DATA_SETS
    section = "data"

    name: str = "digits"
    classes: int | None = None
    init_cls: int | None = None
    increment: int | None = None
    task_sizes: list[int] | None = None
    tasks: int | None = None
    shuffle: bool = True
    order_seed: int | None = None
    class_order: list[str] | None = None
    extensions: list[str] = field(default_factory=list)
    extension_tasks: list[int] = field(default_factory=list)
    validation: float | Auto = "auto"
    image_size: int | Auto = "auto"
    channels: Literal[1, 3] | Auto = "auto"
    resize: int | Auto | None = "auto"
    crop_mode: CropMode | Auto = "auto"
    interpolation: Interpolation | Auto = "auto"
    train_crop: TrainCrop | Auto = "auto"
    pad: int = 0
    crop_scale: tuple[float, float] = (0.25, 1.0)
    flip: bool | Auto = "auto"
    test_crop: TestCrop | Auto = "auto"
    test_resize: int | None = None
    mean: float | list[float] | Auto = "auto"
    std: float | list[float] | Auto = "auto"
    cache: bool | None = None
    workers: int = 0
    verify: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("classes", "init_cls", "increment", "tasks", "test_resize"):
            at_least(f"data.{key}", getattr(self, key), 1)
        for key in ("image_size", "resize"):
            value = getattr(self, key)
            at_least(f"data.{key}", None if value == "auto" else value, 1)
        at_least("data.pad", self.pad, 0)
        count_of("data.workers", self.workers, 0)
        check_seed("data.order_seed", self.order_seed)
        share = self.validation
        check(share == "auto" or 0 <= share <= 0.9, "data.validation", share, "in [0, 0.9]")
        for key, low in (("mean", -math.inf), ("std", 0.0)):
            self._check_numbers(key, low)
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
            if self.image_size != "auto":  # otherwise only the backbone tells what fits
                self._check_sizes(self._image_settings(None))
            if self.verify and not hasattr(self.kind, "folder"):
                msg = (
                    f"data.verify must be false for data.name {self.name}, got true: only image "
                    "folders can be verified"
                )
                raise ValueError(msg)

    def _check_numbers(self, key: str, above: float) -> None:
        value = getattr(self, key)
        if value == "auto":
            return
        numbers = list(value) if isinstance(value, Sequence) else [value]
        rule = "finite" if above < 0 else "positive and finite"
        fits = bool(numbers) and all(math.isfinite(x) and x > above for x in numbers)
        check(fits, f"data.{key}", value, rule)
        counts = {1, 3} if self.channels == "auto" else {1, self.channels}
        check(len(numbers) in counts, f"data.{key}", value, "one number, or one for each channel")
        setattr(self, key, _shortest(numbers))

    @cached_property  # read for every image
    def side(self) -> int | None:
        """Side of the decoded images of the data set in pixels, if they all have one size."""
        return self._fact("side", DataSet.side)

    @cached_property
    def images(self) -> ImageSettings:
        """The settings of the images; without a backbone, pixels stay in [0, 1].

        Raises
        ------
        ValueError
            If ``image_size`` is left to the backbone and the images have several sizes.
        """
        return self._image_settings(None)

    @property
    def mode(self) -> Literal["RGB", "L"]:
        """Pillow's name for the channels of the images, RGB or L."""
        return "L" if self.images.channels == 1 else "RGB"

    def resolved(self, backbone: "Preprocessing | None") -> Self:
        """A copy in which every ``auto`` has its value: what a run uses and records.

        Parameters
        ----------
        backbone
            How the backbone wants its images; None if nothing is known of it.

        Raises
        ------
        ValueError
            If values do not fit together, or ``image_size`` is known to nobody.

        Examples
        --------
        >>> DataConfig().resolved(None).image_size
        8
        """
        if not self.is_known:
            return self
        values = asdict(self._image_settings(backbone))
        for key in ("mean", "std"):
            if isinstance(values[key], tuple):
                values[key] = list(values[key])
        with suppress(FileNotFoundError):  # opening the data set will say what is missing
            values["validation"] = self.held_out
        return replace(self, **values)

    @property
    def held_out(self) -> float:
        """``validation`` as a number; `HELD_OUT` for a folder without a test split.

        Raises
        ------
        ValueError, OSError
            If the folder cannot be read as one of class folders.
        """
        if self.validation != "auto":
            return self.validation
        return 0.0 if has_test(self.build()) else HELD_OUT

    def unlike(self, backbone: "Preprocessing | None") -> list[str]:
        """Settings that are set otherwise than the backbone was pretrained with, one line each.

        Examples
        --------
        >>> from training.backbones.preprocessing import Preprocessing
        >>> wanted = Preprocessing(8, (0.5,), (0.5,), "bicubic", 1.0, "center", 1)
        >>> DataConfig(mean=0.0).unlike(wanted)
        ['data.mean is 0.0, but the backbone was pretrained with 0.5']
        """
        if backbone is None:
            return []
        pretrained: dict[str, Any] = {
            "image_size": backbone.image_size,
            "channels": backbone.channels,
            "interpolation": backbone.interpolation,
            "mean": _shortest(backbone.mean),
            "std": _shortest(backbone.std),
        }
        return [
            f"data.{key} is {getattr(self, key)}, but the backbone was pretrained with {value}"
            for key, value in pretrained.items()
            if getattr(self, key) not in ("auto", value)
        ]

    def _image_settings(self, backbone: "Preprocessing | None") -> ImageSettings:
        """The settings with the values of a backbone, or without one, in place of ``auto``."""
        photos = self.side is None
        given = None if self.resize == "auto" else self.resize
        own_size = backbone.image_size if backbone else given or self.side
        size = _or(self.image_size, own_size)
        if size is None:
            msg = (
                "data.image_size must be given: neither the data set nor the backbone says how "
                "large the images are; set what the backbone takes, such as --data.image_size 224"
            )
            raise ValueError(msg)
        resize = given
        if self.resize == "auto" and self.test_resize is None:
            if photos:
                resize = int(size / (backbone.crop_pct if backbone else 1.0))
            elif self.side != size:
                resize = size  # small images of one size: nothing is cut off
        own_channels = 1 if self._fact("mode", DataSet.mode) == "L" else 3
        if backbone and backbone.channels in (1, 3):
            own_channels = backbone.channels
        shorter = self.test_resize or resize or self.side
        crop: TrainCrop = "random_resized" if photos else "none"
        mode: Any = backbone.crop_mode if backbone else "center"
        interpolation: Any = backbone.interpolation if backbone else "bicubic"
        return ImageSettings(
            image_size=size,
            channels=_or(self.channels, own_channels),
            resize=resize,
            crop_mode=_or(self.crop_mode, mode),
            interpolation=_or(self.interpolation, interpolation),
            train_crop=_or(self.train_crop, crop),
            flip=_or(self.flip, photos),
            test_crop=_or(self.test_crop, "none" if shorter == size else "center"),
            mean=_numbers(_or(self.mean, backbone.mean if backbone else 0.0)),
            std=_numbers(_or(self.std, backbone.std if backbone else 1.0)),
        )

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

    def _check_sizes(self, images: ImageSettings) -> None:
        # Mismatched sizes would surface only when the first batch is stacked, or never.
        size, side = images.image_size, images.resize or self.side
        shorter = self.test_resize or side  # of evaluation images
        are = "of several sizes" if side is None else f"{side} pixels wide"
        one_size = "images of one size, got several; set data.resize"
        pad = images.train_crop == "pad"
        rules = [
            (not self.cache or side is not None, f"data.cache needs {one_size}"),
            (not pad or side is not None, f"data.train_crop pad needs {one_size}"),
            (
                not pad or side is None or (size - side) / 2 <= self.pad < side,
                f"data.pad must be below the side of the images, {side}, and a crop of "
                f"data.image_size {size} must fit into {side} + 2 * pad, got {self.pad}",
            ),
            (
                images.test_crop != "center" or (shorter or 0) >= size,
                f"evaluation images must be at least as large as data.image_size {size}, got "
                f"images {are} (data.resize {images.resize}, data.test_resize {self.test_resize}); "
                f"set data.resize to {size} or leave it out",
            ),
            (
                images.test_crop != "none" or (side is not None and shorter == size),
                f"data.image_size must be that of the evaluation images for data.test_crop none, "
                f"which are {are} (data.test_resize {self.test_resize}), got {size}; set "
                f"data.resize to {size}, or data.test_crop to center",
            ),
        ]
        for fits, msg in rules:
            if not fits:
                raise ValueError(msg)


def has_test(data: Any) -> bool:
    """Whether a data set has a test split; only a folder of photos may lack one."""
    own = getattr(data, "has_test", None)
    return own is None or bool(own())


def _or(value: T | Auto, default: T) -> T:
    """A value, or the default where it is ``auto``."""
    return default if value == "auto" else value


def _shortest(numbers: Sequence[float]) -> float | list[float]:
    """One number if all are equal, otherwise a list."""
    first, *rest = (float(x) for x in numbers)
    return first if all(x == first for x in rest) else [first, *rest]


def _numbers(value: float | Sequence[float]) -> float | tuple[float, ...]:
    """One number, or one a channel; one if all are equal."""
    short = _shortest(value if isinstance(value, Sequence) else [value])
    return tuple(short) if isinstance(short, list) else short
