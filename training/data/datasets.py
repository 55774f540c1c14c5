"""Data sets: where images and their classes are read from, chosen by name or import path.

A data set is a class whose constructor takes its options and only stores them, with one function::

    load(split) -> Split        # "train", and "test" only if the test images are evaluated on

Settings common to all data sets, from the class order to the transforms, are in `DataConfig`. Your
own class needs nothing from this module; the attributes that it may define are listed in `DataSet`.
This module does not import torch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from training.components import Registry

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Extensions of image files, in lower case; torchvision's list."""

LAYOUT = "expected ROOT/train/CLASS/IMAGE with ROOT/test/CLASS/IMAGE or ROOT/val/CLASS/IMAGE."

Classes = dict[str, list[Path]]
"""The image files of each class, by its name."""


class Split(NamedTuple):
    """The images of a split and their classes.

    Attributes
    ----------
    images : sequence
        Paths of image files; or an array or tensor (N, C, H, W), uint8 or float in [0, 1]; or any
        sequence that gives a path, a PIL image or a uint8 tensor (C, H, W) by position.
    targets : array_like
        Number of the class of each image, of shape (N,).
    classes : sequence of str
        Name of the class of each number. Those of the test split are matched to those of the
        training split by name.
    """

    images: Any
    targets: "ArrayLike"
    classes: Sequence[str]


class DataSet:
    """A data set. Your own class need not derive from it, but may define these attributes.

    Attributes
    ----------
    side : int or None
        Side of the images in pixels, if all of them are squares of one size.
    mode : str
        Pillow's name for the channels of the images: RGB, or L for grey ones. Images given to a
        trained classifier are converted to ``side`` and ``mode`` first.
    refuses : tuple of str
        Packaged backbones that were pretrained on such images: what they learn of a stream of them
        would say nothing.
    """

    side: ClassVar[int | None] = None
    mode: ClassVar[Literal["RGB", "L"]] = "RGB"
    refuses: ClassVar[tuple[str, ...]] = ()


@dataclass
class Digits(DataSet):
    """scikit-learn's handwritten digits: 1,797 grey images of 8 by 8 pixels, part of the library.

    The test split of 360 images is stratified and fixed; no seed changes it.
    """

    side = 8
    mode = "L"

    def load(self, split: str) -> Split:
        """Load a split from scikit-learn."""
        import numpy as np
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        pixels, target = load_digits(return_X_y=True)
        parts = train_test_split(
            np.arange(len(target)), test_size=360, stratify=target, random_state=0
        )
        chosen = parts[split == "test"]
        # Greys are counts from 0 to 16: sixteenths are exact in float32, bytes would not be.
        images = (pixels[chosen].astype(np.float32) / 16).reshape(-1, 1, 8, 8)
        return Split(images, target[chosen], [str(digit) for digit in range(10)])


@dataclass
class Glyphs(DataSet):
    """Characters of pen strokes on textured coloured grounds, drawn by this package: 32 by 32.

    A character has ``images`` training and 40 test images. The seed of a run chooses which
    characters its tasks are of, not what they look like: no seed changes an image.

    Parameters
    ----------
    alphabet
        choose (120 characters, to choose settings on) or test (280 others, for results).
    images
        Training images of a character.

    Raises
    ------
    ValueError
        If there are no training images.
    """

    side = 32
    refuses = ("glyphs",)

    alphabet: Literal["choose", "test"] = "choose"
    images: int = 240

    def __post_init__(self) -> None:
        """Refuse characters without images."""
        if self.images < 1:
            msg = f"data.images must be at least 1, got {self.images}"
            raise ValueError(msg)

    def load(self, split: str) -> Split:
        """List the images of a split; those of a character are drawn when one is first read."""
        import numpy as np

        from training.data.glyphs import ALPHABETS, TEST_IMAGES, Drawings

        numbers = ALPHABETS[self.alphabet]
        count = self.images if split == "train" else TEST_IMAGES
        targets = np.repeat(np.arange(len(numbers)), count)
        names = [f"{self.alphabet}-{number:03}" for number in range(len(numbers))]
        return Split(Drawings(numbers, split, count), targets, names)


@dataclass
class Cifar100(DataSet):
    """CIFAR-100 by torchvision: 100 classes of 32 by 32 pixels, 500 training images each.

    Parameters
    ----------
    root
        The folder that holds it, or receives it: it is downloaded where it is not found.
    """

    side = 32

    root: str

    def load(self, split: str) -> Split:
        """Open a split in ``root``.

        Raises
        ------
        FileNotFoundError
            If it is neither there nor can be downloaded; the message says what to put where.
        """
        import numpy as np
        from torchvision.datasets import CIFAR100

        root, train = _folder(self.root), split == "train"
        try:
            try:
                data = CIFAR100(root, train=train, download=False)
            except RuntimeError:  # torchvision's error for missing or damaged files
                data = CIFAR100(root, train=train, download=True)
        except (OSError, RuntimeError) as error:
            msg = (
                f"CIFAR-100 is not in {root} and could not be downloaded ({error}). Put "
                f"{CIFAR100.filename} there, or its unpacked folder as "
                f"{root / CIFAR100.base_folder}."
            )
            raise FileNotFoundError(msg) from error
        pixels = np.ascontiguousarray(data.data.transpose(0, 3, 1, 2))
        return Split(pixels, data.targets, list(data.classes))


@dataclass
class Folder(DataSet):
    """Folder trees of images: train/CLASS/* with test/CLASS/* or val/CLASS/*.

    Classes are numbered in the order of their sorted folder names. A class folder may have
    subfolders. Files with other extensions, names that start with a dot and links back to a folder
    above are ignored. If ``test`` and ``val`` both exist, ``test`` is used.

    Parameters
    ----------
    root
        The folder with train/ and test/ or val/.
    """

    root: str

    def folder(self) -> Path:
        """The folder that holds the splits."""
        return _folder(self.root)

    def load(self, split: str) -> Split:
        """List the files of a split.

        Raises
        ------
        FileNotFoundError
            If the root or the split is missing.
        ValueError
            If there are no classes, or one has no image.
        """
        folder = split_folder(self.folder(), split)
        if not folder.is_dir():
            msg = f"data.root: no folder {folder}; {LAYOUT}"
            raise FileNotFoundError(msg)
        classes = {name: tree.images for name, tree in walk_classes(folder)[0].items()}
        if not classes:
            msg = f"data.root: {folder} holds no class folders; {LAYOUT}"
            raise ValueError(msg)
        empty = [name for name, paths in classes.items() if not paths]
        if empty:
            kinds = " ".join(IMAGE_SUFFIXES)
            msg = (
                f"{folder}: no images ({kinds}) for {some(empty)}: add some or remove the folders."
            )
            raise ValueError(msg)
        return _file_split(classes)


@dataclass
class Published(Folder):
    """A published data set as a folder tree, as LAMDA-PILOT has it: 200 classes.

    Parameters
    ----------
    name
        imagenet-r, imagenet-a or cub.
    root
        The folder that contains a folder of that name, or that folder itself.
    """

    count: ClassVar[int] = 200

    name: str = field(kw_only=True)

    def folder(self) -> Path:
        """``root/NAME`` if it is there, else ``root``.

        Raises
        ------
        FileNotFoundError
            If neither is a data set.
        """
        root = _folder(self.root)
        folder = root / self.name
        if folder.is_dir():
            return folder
        if not (root / "train").is_dir() and not any(root.glob("*_train.txt")):
            msg = f"data.root: no folder {folder}, and {root} itself is not {self.name}; {LAYOUT}"
            raise FileNotFoundError(msg)
        return root

    def load(self, split: str) -> Split:
        """List the files of a split.

        Raises
        ------
        FileNotFoundError, ValueError
            As for any folder tree, and if the number of classes is not that of the published data
            set: another number would shift the whole class order.
        """
        listed = self._listed(split)
        if split == "train" and len(listed.classes) != self.count:
            msg = (
                f"{self.name} has {self.count} classes, but {self.folder()} has "
                f"{len(listed.classes)}. Complete it, or read it as it is with data.name folder."
            )
            raise ValueError(msg)
        return listed

    def _listed(self, split: str) -> Split:
        return super().load(split)


@dataclass
class DomainNet(Published):
    """DomainNet by its official lists of path and label, or as a folder tree: 345 classes.

    A line of ``DOMAIN_train.txt`` or ``DOMAIN_test.txt`` is
    ``clipart/aircraft_carrier/clipart_001_000001.jpg 0``; paths are relative to the folder of the
    lists. All domains that have lists are joined into one data set with common classes. Classes are
    numbered as in the lists and named after the folders of their images.

    Parameters
    ----------
    name
        domainnet.
    root
        The folder with the lists, or one with a folder domainnet that contains them.
    """

    count = 345

    def _listed(self, split: str) -> Split:
        root = self.folder()
        domains = listed_domains(root)
        if not domains:
            return super()._listed(split)
        return _file_split(read_lists(root, domains, split))


@dataclass
class TimmData(DataSet):
    """Any data set that timm's factory names: torchvision's, Hugging Face's, and timm's folders.

    Parameters
    ----------
    dataset
        A name of timm's data set factory, such as torch/cifar10, hfds/ORGANISATION/NAME or
        hfds/FOLDER.
    root
        The folder of the data set, or to download it to; with hfds/, the cache of the library.
    train_split
        Name of the split of training images in the data set.
    test_split
        Name of the split of evaluation images in the data set.
    image_key
        For hfds/: the column of the images, image if not given.
    label_key
        For hfds/: the column of the classes, label if not given.
    download
        Let torchvision download the data set to root.
    """

    dataset: str
    root: str | None = None
    train_split: str = "train"
    test_split: str = "validation"
    image_key: str | None = None
    label_key: str | None = None
    download: bool = False

    def __post_init__(self) -> None:
        # Hugging Face downloads to its own cache unless a root is given.
        columns = self.dataset.lower().startswith("hfds/")
        if self.root is None and not columns:
            msg = f"data.root must be given for data.dataset {self.dataset}: the folder of the data"
            raise ValueError(msg)
        if not columns and (self.image_key, self.label_key) != (None, None):
            msg = (
                "data.image_key and data.label_key name columns, which only hfds/ data sets have; "
                f"leave them out for {self.dataset}"
            )
            raise ValueError(msg)
        self._count = 0

    def load(self, split: str) -> Split:
        """Open a split; classes are numbered as the data set numbers them.

        Raises
        ------
        FileNotFoundError
            If its files are missing.
        ValueError
            If timm has no such data set, it can only be streamed, the package that reads it is not
            installed, or an image does not have exactly one class.
        """
        data = self._open(self.train_split if split == "train" else self.test_split)
        targets = self._targets(data)
        # Evaluation images may lack classes: without names, take as many as in training.
        self._count = max(self._count, int(targets.max()) + 1)
        samples = _samples(data)
        images = _Decoded(data, self.dataset) if samples is None else [path for path, _ in samples]
        return Split(images, targets, _class_names(data, self._count))

    def _open(self, split: str) -> Any:
        name = self.dataset
        kind = name.partition("/")[0].lower() if "/" in name else ""
        if kind in ("hfids", "tfds", "wds"):
            msg = (
                f"data.dataset {name}: {kind}/ data sets can only be streamed, and a stream of "
                "tasks needs images by position. Use hfds/ or torch/, or save the images as "
                "folders."
            )
            raise ValueError(msg)
        if kind == "hfds" and find_spec("datasets") is None:
            msg = f"data.dataset {name} is read by a package that is missing: pip install datasets"
            raise ValueError(msg)
        from timm.data.dataset_factory import create_dataset

        root = None if self.root is None else str(_folder(self.root))
        # timm has its own defaults for keywords that are not given.
        columns = {"input_key": self.image_key, "target_key": self.label_key}
        named: dict[str, Any] = {k: v for k, v in columns.items() if v is not None}
        try:
            return create_dataset(name, root, split=split, download=self.download, **named)
        except Exception as error:  # every library behind the factory raises its own errors
            hint = " (data.download true fetches what torchvision offers)" * (kind == "torch")
            reason = " ".join(str(error).split()) or type(error).__name__
            msg = (
                f"data.dataset {name}, root {root}: timm cannot open split {split}: {reason}{hint}"
            )
            missing = isinstance(error, FileNotFoundError)
            raise (FileNotFoundError if missing else ValueError)(msg) from error

    def _targets(self, data: Any) -> "NDArray[Any]":
        import numpy as np

        reader: Any = getattr(data, "reader", None)
        samples = _samples(data)
        numbers: Any
        if hasattr(reader, "iter_targets"):
            self._require_columns(getattr(reader, "dataset", None))
            numbers = list(reader.iter_targets())
        elif samples is not None:
            numbers = [target for _, target in samples]
        else:
            numbers = getattr(data, "targets", None)
        targets = np.asarray([] if numbers is None else numbers)
        if targets.ndim != 1 or not len(targets) or targets.dtype.kind not in "iu":
            msg = f"data.dataset {self.dataset} does not give every image the number of one class"
            raise ValueError(msg)
        if targets.min() < 0:
            msg = f"data.dataset {self.dataset} has images without a class (number below 0)"
            raise ValueError(msg)
        return targets.astype(np.int64)

    def _require_columns(self, rows: Any) -> None:
        """Raise ValueError if the columns of a Hugging Face data set have other names."""
        if rows is None or not len(rows):
            return
        images = self.image_key or "image"
        # timm casts the image column, and creates an empty one if it is missing.
        there = [name for name, value in rows[0].items() if value is not None or name != images]
        for setting, key in (("image_key", images), ("label_key", self.label_key or "label")):
            if key not in there and key.partition("/")[0] not in there:
                msg = (
                    f"data.dataset {self.dataset} has no column {key}; it has {', '.join(there)}: "
                    f"name one by data.{setting}"
                )
                raise ValueError(msg)


DATA_SETS = Registry(
    "data set",
    {
        "glyphs": f"{__name__}.Glyphs",
        "digits": f"{__name__}.Digits",
        "folder": f"{__name__}.Folder",
        "cifar100": f"{__name__}.Cifar100",
        "imagenet-r": f"{__name__}.Published",
        "imagenet-a": f"{__name__}.Published",
        "cub": f"{__name__}.Published",
        "domainnet": f"{__name__}.DomainNet",
        "timm": f"{__name__}.TimmData",
    },
    requires=("load",),
    group="loda.data",
)


class _Decoded(Sequence[Any]):
    """Images of a timm data set by position."""

    def __init__(self, data: Any, dataset: str) -> None:
        self.data, self.dataset = data, dataset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: Any) -> Any:
        from training.data.image_files import decode

        # timm's data set would return the next image in place of a damaged one.
        reader = getattr(self.data, "reader", None)
        if reader is None:
            return self.data[index][0]
        with reader[index][0] as file:
            return decode(file, name=f"{index} of {self.dataset}")


def _samples(data: Any) -> Sequence[tuple[Any, int]] | None:
    """Pairs of path and class, or None if a data set of timm has none."""
    for owner in (getattr(data, "reader", None), data):
        samples: Sequence[tuple[Any, int]] | None = getattr(owner, "samples", None)
        if samples and isinstance(samples[0][0], str | Path):
            return samples
    return None


def _class_names(data: Any, count: int) -> list[str]:
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None) or {}
    by_number = {int(number): str(name) for name, number in numbers.items()}
    # Some data sets do not name their classes, and some name classes without images.
    count = max([count, *(number + 1 for number in by_number)])
    return [by_number.get(number, str(number)) for number in range(count)]


def split_folder(root: Path, split: str) -> Path:
    """``root/train``; for the test split ``root/test`` if it exists, otherwise ``root/val``."""
    if split == "train":
        return root / "train"
    return root / "test" if (root / "test").is_dir() else root / "val"


def _file_split(classes: Classes) -> Split:
    """A split of image files; classes are numbered in the order of the dictionary."""
    targets = [number for number, paths in enumerate(classes.values()) for _ in paths]
    return Split(list(chain.from_iterable(classes.values())), targets, list(classes))


def listed_domains(root: Path) -> list[str]:
    """Names of the domains with lists in a folder.

    Raises
    ------
    FileNotFoundError
        If a domain has only one of its two lists.
    """
    names = {
        split: {path.name.removesuffix(f"_{split}.txt") for path in root.glob(f"*_{split}.txt")}
        for split in ("train", "test")
    }
    incomplete = names["train"] ^ names["test"]
    if incomplete:
        lists = "DOMAIN_train.txt and DOMAIN_test.txt"
        msg = f"{root} lacks one of the lists {lists} of {some(incomplete)}"
        raise FileNotFoundError(msg)
    return sorted(names["train"])


def read_lists(root: Path, domains: list[str], split: str) -> Classes:
    """The files of a split by class, in the order of the labels.

    Raises
    ------
    ValueError
        If a line is not a path and a label, or a label belongs to folders of two names.
    """
    names: dict[int, str] = {}
    paths: dict[int, list[Path]] = {}
    for place, line in _numbered_lines(root / f"{domain}_{split}.txt" for domain in domains):
        name, _, digits = line.strip().rpartition(" ")
        if not name or not (digits.isascii() and digits.isdigit()):
            msg = f"{place}: expected a path and a label, got {line!r}"
            raise ValueError(msg)
        label, path = int(digits), root / name.strip()
        if names.setdefault(label, path.parent.name) != path.parent.name:
            msg = f"{place}: label {label} is {names[label]} elsewhere, here {path.parent.name}"
            raise ValueError(msg)
        paths.setdefault(label, []).append(path)
    if len(set(names.values())) != len(names):
        msg = f"the lists in {root} give one class two labels"
        raise ValueError(msg)
    return {names[label]: paths[label] for label in sorted(names)}


def _numbered_lines(paths: Iterator[Path]) -> Iterator[tuple[str, str]]:
    for path in paths:
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield f"{path}, line {number}", line


class Walk(NamedTuple):
    """Content of a folder tree; names that start with a dot are left out.

    Attributes
    ----------
    images : list of Path
        Files with the extension of an image, by folder and name.
    others : list of Path
        All other files.
    loops : list of Path
        Links to a folder above them, or to one of the same class that is read already. These are
        not followed; other links are.
    """

    images: list[Path]
    others: list[Path]
    loops: list[Path]


def walk_classes(folder: Path) -> tuple[dict[str, Walk], Walk]:
    """The tree below every class folder, sorted by name, and the tree beside them.

    Files beside the class folders belong to no class: they count as others.
    """
    classes: dict[str, Walk] = {}
    beside, outside = Walk([], [], []), folder.resolve().parents
    # Below one class a folder is read once: links could lead to it in millions of ways.
    read: dict[str, set[Path]] = {}
    for path, names, files in os.walk(folder, followlinks=True, onerror=_raise):
        here = Path(path)
        way = here.relative_to(folder)
        above = {*outside, *(place.resolve() for place in (here, *here.parents))}
        visible = {name for name in names if not name.startswith(".")}
        loops, to_read = [], []
        for name in sorted(visible):
            there = (here / name).resolve()
            known = read.setdefault(way.parts[0] if way.parts else name, set())
            (loops if there in above | known else to_read).append(name)
            known.add(there)
        names[:] = to_read  # os.walk descends into these
        if here == folder:
            classes = {name: Walk([], [], []) for name in names}
        tree = classes[way.parts[0]] if way.parts else beside
        tree.loops.extend(here / name for name in loops)
        for name in files:
            if not name.startswith("."):
                is_image = bool(way.parts) and name.lower().endswith(IMAGE_SUFFIXES)
                (tree.images if is_image else tree.others).append(here / name)
    for tree in (beside, *classes.values()):
        for paths in tree:  # by folder, then by name
            paths.sort(key=lambda path: (str(path.parent), path.name))
    return classes, beside


def _raise(error: OSError) -> None:
    raise error


def some(names: set[str] | list[str]) -> str:
    """The first ten names, and how many more there are."""
    shown = sorted(names)[:10]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def _folder(root: str) -> Path:
    return Path(root).expanduser()
