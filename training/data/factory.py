"""Any data set that timm's factory can name: torchvision's, Hugging Face's, and timm's folders."""

from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from training.config import DataConfig
from training.data.decode import as_tensor, channels, decode, open_image, upright
from training.data.folder import check_same, some
from training.data.images import LazyImages
from training.data.source import Source, Split

_STREAMED = ("hfids", "tfds", "wds")


def timm_source(config: DataConfig) -> Source:
    """Open ``data.dataset`` by ``timm.data.create_dataset``; classes are numbered as there.

    Raises
    ------
    FileNotFoundError
        If its files are not there.
    ValueError
        If timm has no such data set, it can only be streamed, the package that reads it is not
        installed, an image has no single class, or a class no training image.
    """
    train = _open(config, config.train_split)
    targets = _targets(train, config)
    names = _class_names(train, int(targets.max()) + 1)
    present = set(targets.tolist())
    empty = [name for number, name in enumerate(names) if number not in present]
    if empty:
        msg = f"data.dataset {config.dataset} has no image of {some(empty)} in {config.train_split}"
        raise ValueError(msg)

    def test() -> Split:
        found = _open(config, config.test_split)
        numbers = _targets(found, config)
        count = max(len(names), int(numbers.max()) + 1)
        check_same(Path(config.dataset or ""), set(names), set(_class_names(found, count)), "test")
        return Split(_images(found, config), numbers)

    return Source(names, Split(_images(train, config), targets), test)


def _open(config: DataConfig, split: str) -> Any:
    name = config.dataset or ""
    kind = name.partition("/")[0].lower() if "/" in name else ""
    if kind in _STREAMED:
        msg = (
            f"data.dataset {name}: {kind}/ data sets can only be streamed, and a stream of tasks "
            "needs images by position. Use hfds/ or torch/, or save the images as folders."
        )
        raise ValueError(msg)
    if kind == "hfds" and find_spec("datasets") is None:
        msg = f"data.dataset {name} is read by a package that is missing: pip install datasets"
        raise ValueError(msg)
    from timm.data.dataset_factory import create_dataset

    root = None if config.root is None else str(Path(config.root).expanduser())
    # Keywords of timm's own; it has defaults for those that are not given.
    columns = {"input_key": config.image_key, "target_key": config.label_key}
    named: dict[str, Any] = {key: name for key, name in columns.items() if name is not None}
    try:
        return create_dataset(name, root, split=split, download=config.download, **named)
    except FileNotFoundError as error:
        msg = f"data.dataset {name}, split {split}, root {root}: {_reason(error)}"
        raise FileNotFoundError(msg) from error
    except Exception as error:  # every library behind the factory has errors of its own
        hint = " (data.download true fetches what torchvision offers)" if kind == "torch" else ""
        msg = f"data.dataset {name}: timm cannot open split {split}: {_reason(error)}{hint}"
        raise ValueError(msg) from error


def _targets(data: Any, config: DataConfig) -> NDArray[np.int64]:
    reader: Any = getattr(data, "reader", None)
    found: Any
    if hasattr(reader, "iter_targets"):
        _require_columns(reader, config)
        found = list(reader.iter_targets())
    elif _samples(data) is not None:
        found = [target for _, target in _samples(data) or ()]
    else:
        found = getattr(data, "targets", None)
    targets = np.asarray([] if found is None else found)
    if targets.ndim != 1 or not len(targets) or targets.dtype.kind not in "iu":
        msg = f"data.dataset {config.dataset} does not give every image the number of one class"
        raise ValueError(msg)
    if targets.min() < 0:
        msg = f"data.dataset {config.dataset} has images without a class (number below 0)"
        raise ValueError(msg)
    return targets.astype(np.int64)


def _require_columns(reader: Any, config: DataConfig) -> None:
    """Raise ValueError where the columns of a Hugging Face data set have other names."""
    rows = getattr(reader, "dataset", None)
    if rows is None or not len(rows):
        return
    wanted = {
        "data.image_key": config.image_key or "image",
        "data.label_key": config.label_key or "label",
    }
    # timm casts the column of the images, which adds one of nothing where there is none.
    images = wanted["data.image_key"]
    there = [name for name, value in rows[0].items() if value is not None or name != images]
    for setting, key in wanted.items():
        if key not in there and key.partition("/")[0] not in there:
            msg = (
                f"data.dataset {config.dataset} has no column {key}; it has {', '.join(there)}: "
                f"name one by {setting}"
            )
            raise ValueError(msg)


def _samples(data: Any) -> Sequence[tuple[Any, int]] | None:
    """Pairs of path and class, where a data set has them."""
    for owner in (getattr(data, "reader", None), data):
        samples: Sequence[tuple[Any, int]] | None = getattr(owner, "samples", None)
        if samples and isinstance(samples[0][0], str | Path):
            return samples
    return None


def _class_names(data: Any, count: int) -> list[str]:
    numbers = getattr(getattr(data, "reader", data), "class_to_idx", None) or {}
    by_number = {int(number): str(name) for name, number in numbers.items()}
    # Not every data set names its classes, and some name more than they have images of.
    count = max([count, *(number + 1 for number in by_number)])
    return [by_number.get(number, str(number)) for number in range(count)]


def _images(data: Any, config: DataConfig) -> LazyImages:
    samples = _samples(data)
    if samples is not None:
        return LazyImages([Path(path) for path, _ in samples], open_image, config)
    return LazyImages(range(len(data)), partial(_opened, data), config)


def _opened(data: Any, index: int, config: DataConfig) -> Tensor:
    # Asked for an image, timm's data set would put the next one in the place of a damaged one.
    reader, mode = getattr(data, "reader", None), channels(config)
    if reader is None:
        return as_tensor(upright(data[index][0], mode), config)
    with reader[index][0] as file:
        return as_tensor(decode(file, mode, name=f"{index} of {config.dataset}"), config)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
