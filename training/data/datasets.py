"""Data sets: where images and their classes are read from, chosen by name or import path.

A data set is a class whose constructor takes its options and only stores them, with one function::

    load(split) -> Split        # "train", and "test" only if the test images are evaluated on

Settings common to all data sets, from the class order to the transforms, are in `DataConfig`. Your
own class needs nothing from this module; the attributes that it may define are listed in `DataSet`.
This module does not import torch.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple
from unicodedata import normalize

from training.components import Registry, at_least
from training.spelling import some

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".jpf", ".avif", ".avifs", ".heic", ".heif", ".hif"),
)
"""Extensions of image files, in lower case."""

LAYOUT = (
    "expected ROOT/CLASS/IMAGE, or ROOT/train/CLASS/IMAGE with ROOT/test/CLASS/IMAGE (or val/, "
    "validation/)"
)

TRAIN_FOLDERS = ("train", "training")
TEST_FOLDERS = ("test", "testing", "val", "valid", "validation")
"""Names of the folders of a split, in lower case; of several, the first is used."""

# Folders that systems and programs leave behind, besides those whose names start with a dot.
_LEFT_BEHIND = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

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
    leaves_out : bool
        Whether image files that cannot be decoded are left out, and said; otherwise one ends the
        run. Every file is decoded once at the start.
    refuses : tuple of str
        Packaged backbones that were pretrained on such images: what they learn of a stream of them
        would say nothing.
    """

    side: ClassVar[int | None] = None
    mode: ClassVar[Literal["RGB", "L"]] = "RGB"
    refuses: ClassVar[tuple[str, ...]] = ()
    leaves_out: ClassVar[bool] = False


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
        at_least("data.images", self.images, 1)

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
    """Photos in one folder a class, with or without a split: CLASS/*, or train/CLASS/* and test/*.

    Without ``test/`` (or ``val/``, ``validation/``), a fifth of the images of every class is held
    out to be evaluated on. Classes are numbered in the order of their sorted folder names. A class
    folder may have subfolders. Hidden files and folders, files that are not images by their
    extension, links back to a folder above, and images that cannot be decoded are left out, and
    said.

    Parameters
    ----------
    root
        The folder with one folder for every class, or with train/ and test/ or val/.
    """

    leaves_out = True

    root: str
    notes: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def folder(self) -> Path:
        """The folder that holds the classes or the splits."""
        return _folder(self.root)

    def has_test(self) -> bool:
        """Whether there is a test split; raises as `layout`."""
        return self.layout().test is not None

    def layout(self) -> "Layout":
        """Where the splits are; raises as the function `layout`."""
        return layout(self.folder())

    def load(self, split: str) -> Split:
        """List the files of a split.

        Raises
        ------
        FileNotFoundError
            If the root or the split is missing.
        ValueError
            If there are no classes, one has no image, or it cannot be told which folders are
            classes.
        """
        places = self.layout()
        folder = places.train if split == "train" else places.test
        if folder is None:
            msg = f"data.root: {self.folder()} has no test split; {LAYOUT}"
            raise FileNotFoundError(msg)
        classes, notes = read_classes(folder, nested=folder != self.folder())
        self.notes += [note for note in [*places.notes, *notes] if note not in self.notes]
        return _file_split(classes)


class Layout(NamedTuple):
    """The folders of the splits: ``test`` is None without one, ``train`` then may be the root."""

    train: Path
    test: Path | None
    notes: list[str]


def layout(root: Path) -> Layout:
    """Find the splits in a folder of photos.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it cannot be told which folders are classes.
    """
    if not root.is_dir():
        msg = f"data.root: no folder {root}; {LAYOUT}"
        raise FileNotFoundError(msg)
    inside = sorted(x for x in root.iterdir() if x.is_dir() and not _is_left_behind(x.name))
    trains, tests = (
        [x for name in names for x in inside if x.name.lower() == name]
        for names in (TRAIN_FOLDERS, TEST_FOLDERS)
    )
    if tests and not trains:
        msg = (
            f"data.root: {root} has a folder {tests[0].name}, but no folder train; {LAYOUT}. If "
            f"{tests[0].name} is a class, give its folder another name"
        )
        raise ValueError(msg)
    if not trains:
        return Layout(root, None, [])
    others = [x for x in inside if x not in (*trains, *tests)]
    mixed = [x.name for x in others if _holds_images(x)]
    if len(trains) > 1 or mixed:
        beside = some(mixed or [x.name for x in trains[1:]])
        msg = (
            f"data.root: {root} has the folder {trains[0].name}, and images in folders beside it: "
            f"{beside}; {LAYOUT}. Move them into {trains[0].name}, or out of {root}"
        )
        raise ValueError(msg)
    unused = [x.name for x in tests[1:]]
    notes = [f"{tests[0].name}/ is evaluated on; {some(unused)} is not used"] if unused else []
    return Layout(trains[0], tests[0] if tests else None, notes)


def _holds_images(folder: Path) -> bool:
    classes, beside = walk_classes(folder)
    loose = any(path.suffix.lower() in IMAGE_SUFFIXES for path in beside.others)
    return loose or any(walk.images for walk in classes.values())


def read_classes(folder: Path, *, nested: bool) -> tuple[Classes, list[str]]:
    """The images of every class folder, and notes on what is left out.

    Parameters
    ----------
    folder
        Holds the class folders.
    nested
        Whether all images of all classes may lie in folders of their own.

    Raises
    ------
    ValueError
        If there are no classes, one has no image, or a name cannot be that of a class.
    """
    from training.data.image_files import missing_reader

    walks, beside = walk_classes(folder)
    if not walks:
        loose = [x for x in beside.others if x.suffix.lower() in IMAGE_SUFFIXES]
        images = f", but {len(loose)} images, such as {loose[0].name}" if loose else ""
        msg = (
            f"data.root: {folder} holds no class folders{images}; {LAYOUT}. Put the images of each "
            "class into a folder of its own"
        )
        raise ValueError(msg)
    if not nested:
        _refuse_nested(folder, walks)
    reasons = {x: why for x in IMAGE_SUFFIXES if (why := missing_reader(x)) is not None}
    classes: Classes = {}
    unread: list[Path] = []
    for name, walk in walks.items():
        label = class_name(folder / name)
        if label in classes:
            msg = (
                f"{folder} has two folders of the name {label}, in different Unicode forms of its "
                "accents; join them"
            )
            raise ValueError(msg)
        classes[label] = [path for path in walk.images if path.suffix.lower() not in reasons]
        unread += [path for path in walk.images if path.suffix.lower() in reasons]
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        at = len(folder.parts)
        kinds = {
            path.suffix.lower() for path in unread if normalize("NFC", path.parts[at]) in empty
        }
        why = "".join(f"; {kind}: {reasons[kind]}" for kind in sorted(kinds))
        hint = why or f" ({' '.join(IMAGE_SUFFIXES)})"
        msg = f"{folder}: no images for {some(empty)}{hint}: add some or remove the folders."
        raise ValueError(msg)
    others = [path for walk in (beside, *walks.values()) for path in walk.others]
    loops = [path for walk in (beside, *walks.values()) for path in walk.loops]
    notes = [f"left out: {text} ({reasons[kind]})" for kind, text in _by_kind(unread).items()]
    if others:
        counts = ", ".join(_by_kind(others).values())
        notes.append(
            f"left out, since their names are not those of images: {counts}, such as {others[0]}"
        )
    if loops:
        shown = some([str(x) for x in loops])
        notes.append(f"left out, links to a folder above or read already: {shown}")
    return classes, [f"{folder}: {note}" for note in notes]


def _refuse_nested(folder: Path, walks: Mapping[str, "Walk"]) -> None:
    """Refuse class folders that all hold nothing but folders: these may be the classes."""
    full = {name: walk.images for name, walk in walks.items() if walk.images}
    if not full or any(path.parent.name == name for name in full for path in full[name]):
        return
    name, images = next(iter(full.items()))
    root = folder / name
    cure = (
        f"give {root} instead"
        if len(full) == 1
        else f"give one of its folders, such as {root}, or move the images one level up"
    )
    msg = (
        f"data.root: the images of {folder} lie two levels deep, such as {images[0]}; {LAYOUT}; "
        f"{cure}"
    )
    raise ValueError(msg)


def class_name(folder: Path) -> str:
    """The name of a class folder, its accents in one Unicode form (NFC), as splits must share it.

    Raises
    ------
    ValueError
        If the name is not UTF-8.

    Examples
    --------
    >>> class_name(Path("cafe\u0301")) == "caf\u00e9"
    True
    """
    name = normalize("NFC", folder.name)
    try:
        name.encode()
    except UnicodeEncodeError as error:
        msg = (
            f"the name of the class folder {os.fsencode(folder.name)!r} in {folder.parent} is not "
            "UTF-8: rename it"
        )
        raise ValueError(msg) from error
    return name


def _by_kind(paths: Sequence[Path]) -> dict[str, str]:
    """Extensions of some files, with their numbers in words."""
    counts = Counter(path.suffix.lower() for path in paths)
    return {kind: f"{counts[kind]} {kind or 'without extension'}" for kind in sorted(counts)}


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
    leaves_out = False  # a missing image would make it another data set

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

    def has_test(self) -> bool:
        """Whether there is a test split: always."""
        return True

    def layout(self) -> Layout:
        """Where the splits are.

        Raises
        ------
        FileNotFoundError
            If one is missing.
        """
        root = self.folder()
        places = layout(root)
        if places.train == root or places.test is None:
            lost = root / ("train" if places.train == root else "test")
            msg = f"data.root: no folder {lost}; {LAYOUT}"
            raise FileNotFoundError(msg)
        return places

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
        visible = {name for name in names if not _is_left_behind(name)}
        loops: list[str] = []
        to_read: list[str] = []
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
            if not _is_left_behind(name):
                is_image = bool(way.parts) and name.lower().endswith(IMAGE_SUFFIXES)
                (tree.images if is_image else tree.others).append(here / name)
    for tree in (beside, *classes.values()):
        for paths in tree:  # by folder, then by name
            paths.sort(key=lambda path: (str(path.parent), path.name))
    return classes, beside


def _is_left_behind(name: str) -> bool:
    """Whether a file or folder is hidden, or left behind by a system or program."""
    return name.startswith(".") or name in _LEFT_BEHIND


def _raise(error: OSError) -> None:
    raise error


def _folder(root: str) -> Path:
    return Path(root).expanduser()
