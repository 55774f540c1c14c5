"""Images by position, in memory or decoded from files, and sets of them with their labels."""

from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import blake2b
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import (
    center_crop,
    get_size,
    pad,
    resize,
    rgb_to_grayscale,
)

from training.data.config import DataConfig, ImageSettings
from training.data.image_files import UnreadableImageError, decode, opened, reading, upright
from training.data.transforms import Transform, Unchanged, tensor_filter
from training.distributed import usable_cpus

CACHE_BYTES = 1_000_000_000
"""Decoded images are kept in memory below this size, unless ``data.cache`` decides."""

Key = tuple[int, int]
"""Position of an image, and the seed of its augmentation."""


def images_of(source: Any, config: DataConfig) -> "ArrayImages | LazyImages":
    """The images of a data set by position; see `training.data.datasets.Split`."""
    if isinstance(source, Tensor | np.ndarray):
        return ArrayImages(torch.as_tensor(source), config)
    return LazyImages(source, config)


class ArrayImages:
    """Images of one size in memory, resized on access if they would take too much of it.

    Parameters
    ----------
    pixels
        uint8, or float in [0, 1], of shape (N, C, H, W).
    config
        Gives the side of the first resize and whether to keep the resized images.
    """

    def __init__(
        self, pixels: Tensor, config: DataConfig, digests: Sequence[str] | None = None
    ) -> None:
        self.pixels, self.config, self._digests = pixels, config, digests

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return _prepared(self.pixels[index], self.config)

    def select(self, indices: Sequence[int]) -> "ArrayImages":
        """Only these images, in this order; resized now if they are small enough to be kept."""
        pixels = self.pixels[torch.as_tensor(indices, dtype=torch.int64)]
        # Before they are resized, which depends on data.cache.
        digests = [_digest(image.contiguous().numpy().tobytes()) for image in pixels]
        if _keeps(self.config, len(pixels), pixels.element_size()):
            pixels = _prepared(pixels, self.config)
        return ArrayImages(pixels, self.config, digests)

    def digests(self, indices: Sequence[int]) -> list[str]:
        """Hashes of the images at some positions, as they came; empty before a selection."""
        return [self._digests[index] for index in indices] if self._digests else []

    def files(self) -> list[Path]:
        """An empty list: these images are not separate files."""
        return []


class LazyImages:
    """Images that are decoded on access and, if they are small, kept in memory from then on.

    Parameters
    ----------
    source
        Gives a path, a PIL image or a uint8 tensor (C, H, W) by position. A list or tuple holds
        paths.
    config
        Gives the side of the first resize, and whether to keep the resized images.
    indices
        The positions in ``source``; all of them if not given.
    """

    def __init__(
        self, source: Sequence[Any], config: DataConfig, indices: Sequence[int] | None = None
    ) -> None:
        self.source, self.config = source, config
        self.indices = range(len(source)) if indices is None else indices
        self._cache: tuple[Tensor, Tensor] | None = None  # images, and which of them are there
        self._digests: list[str] = []  # of every file, once `read` has read them

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Tensor:
        if self._cache is None:
            return self._decoded(index)
        images, filled = self._cache
        if not filled[index]:
            images[index] = self._decoded(index)
            filled[index] = True
        return images[index]

    def select(self, indices: Sequence[int]) -> "LazyImages":
        """Only these images, in this order, with a cache of their own if they are small enough."""
        chosen = LazyImages(self.source, self.config, [self.indices[index] for index in indices])
        side, channels = self.config.images.resize or self.config.side, self.config.images.channels
        if side is not None and _keeps(self.config, len(chosen), 1):
            # Filled when an image is first read: a run that ends early decodes only what it used.
            images: Any = torch.empty(len(chosen), channels, side, side, dtype=torch.uint8)
            filled: Any = torch.zeros(len(chosen), dtype=torch.bool)
            if self.config.workers > 0:  # loading processes share what they decode
                in_shared_memory(images, filled)
            chosen._cache = images, filled
        return chosen

    def check_headers(self) -> None:
        """Open every file.

        Raises
        ------
        UnreadableImageError
            If, by its header, a file is not an image that Pillow can read, or is too large.
        """
        for path in self.files():
            with opened(path, path):
                pass

    def read(self) -> dict[int, UnreadableImageError]:
        """Read and decode every file once, and keep its hash and, if they are small, its pixels.

        Returns
        -------
        dict
            What is wrong with the files that cannot be read, by position.
        """

        def one(item: tuple[int, Path]) -> tuple[str, UnreadableImageError | None]:
            index, path = item
            digest = ""
            try:
                with reading(path):
                    content = path.read_bytes()
                digest = _digest(content)
                image = _decoded_file(BytesIO(content), self.config, path)
            except UnreadableImageError as error:
                return digest, error
            if self._cache is not None:
                images, filled = self._cache
                images[index], filled[index] = image, True
            return digest, None

        with ThreadPoolExecutor(usable_cpus()) as pool:  # decoding and hashing hold no lock
            results = list(pool.map(one, enumerate(self.files())))
        self._digests = [digest for digest, _ in results]
        return {index: error for index, (_, error) in enumerate(results) if error is not None}

    @property
    def is_read(self) -> bool:
        """Whether `read` has read the files."""
        return bool(self._digests)

    def digests(self, indices: Sequence[int]) -> list[str]:
        """Hashes of the files at some positions; an empty list if the images are not files."""
        if self._digests:
            return [self._digests[index] for index in indices]
        files = self.files()
        chosen = [files[index] for index in indices] if files else []
        with ThreadPoolExecutor(usable_cpus()) as pool:  # hashing holds no lock
            return list(pool.map(lambda path: _digest(path.read_bytes()), chosen))

    def files(self) -> list[Path]:
        """The file of each image if the source is a list of files, otherwise an empty list."""
        if not isinstance(self.source, list | tuple):
            return []
        return [Path(self.source[index]) for index in self.indices]

    def _decoded(self, index: int) -> Tensor:
        item = self.source[self.indices[index]]
        if isinstance(item, Tensor) and item.dtype == torch.uint8:
            return _prepared(item, self.config)
        if isinstance(item, Image.Image):
            return _as_tensor(upright(item, self.config.mode), self.config)
        if isinstance(item, str | Path):
            return open_image(item, self.config)
        msg = (
            f"images by position must be paths, PIL images or uint8 tensors (C, H, W), got "
            f"{type(item).__name__}; give float images as one array"
        )
        raise TypeError(msg)


class JoinedImages:
    """Images of several sources, one after the other.

    If one source has floats, those of the others become floats too, so that a batch has one type.

    Parameters
    ----------
    parts
        The sources; none is joined itself.
    """

    def __init__(self, parts: "Sequence[Images]") -> None:
        self.parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self._floating = any(
            isinstance(part, ArrayImages) and part.pixels.is_floating_point() for part in parts
        )

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Tensor:
        number, position = self._place(index)
        pixels = self.parts[number][position]
        convert = self._floating and not pixels.is_floating_point()
        return pixels.float() / 255 if convert else pixels

    def digests(self, indices: Sequence[int]) -> list[str]:
        """Hashes of the images at some positions; those that have none are left out."""
        places = [self._place(index) for index in indices]
        hashes: list[str] = []
        for number, part in enumerate(self.parts):
            hashes += part.digests([position for owner, position in places if owner == number])
        return hashes

    def files(self) -> list[Path]:
        """The file of each image, or an empty list if some are not separate files."""
        files = [part.files() for part in self.parts]
        whole = all(len(own) == len(part) for own, part in zip(files, self.parts, strict=True))
        return [path for own in files for path in own] if whole else []

    def _place(self, index: int) -> tuple[int, int]:
        """The source of an image, and its position there."""
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)


class TokenImages:
    """Images as the tokens (T, D) that a stem made of them.

    Parameters
    ----------
    tokens
        float32 of shape (N, T, D).
    """

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]

    def digests(self, indices: Sequence[int]) -> list[str]:
        """An empty list: the images themselves are not here."""
        del indices
        return []

    def files(self) -> list[Path]:
        """An empty list, too."""
        return []


Images = ArrayImages | LazyImages | JoinedImages | TokenImages
"""Images by position: uint8, or float in [0, 1], of shape (C, H, W); or tokens (T, D)."""


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, int]]):
    """Images with their labels in the class order of the stream.

    Parameters
    ----------
    images
        The images, shared by all subsets.
    indices
        Positions in ``images``, int64 of shape (N,).
    labels
        The label of each position, int64 of shape (N,).
    transform
        Applied to an image on access; without it, images are returned as decoded.
    """

    images: Images
    indices: Tensor
    labels: Tensor
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> tuple[Tensor, int]:
        image, label = self.images[int(self.indices[position])], int(self.labels[position])
        return (image if self.transform is None else self.transform(image)), label

    def prepared(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor, Tensor]:
        """Images after the first half of the transform, their draws for the second, and labels.

        The draws of an image depend only on its seed, so any process may make them. torch's global
        generator is restored, so loading data does not change the draws of training.

        Parameters
        ----------
        keys
            At least one.
        """
        transform = self.required_transform()
        # Seeding the CPU generator itself takes 2 us, torch.manual_seed 200 us: it seeds every
        # device.
        generator = torch.default_generator
        state = generator.get_state()
        positions = [position for position, _ in keys]
        pixels, draws = [], []
        try:
            for index, (_, seed) in zip(self.indices[positions].tolist(), keys, strict=True):
                generator.manual_seed(seed)
                image, drawn = transform.prepare(self.images[index])
                pixels.append(image)
                draws.append(drawn)
        finally:
            generator.set_state(state)
        return torch.stack(pixels), torch.stack(draws), self.labels[positions]

    def required_transform(self) -> Transform:
        """The transform, which batches need; raises TypeError if there is none."""
        if self.transform is None:
            msg = "images are loaded in batches under a transform: use with_transform"
            raise TypeError(msg)
        return self.transform

    def subset(self, labels: Collection[int]) -> "ImageSet":
        """Only the images with one of these labels, in the same order."""
        wanted = torch.tensor(sorted(labels), dtype=torch.int64)
        return self.chosen(torch.isin(self.labels, wanted))

    def chosen(self, mask: Tensor) -> "ImageSet":
        """Only the images where a mask (N,) is true, in the same order."""
        return replace(self, indices=self.indices[mask], labels=self.labels[mask])

    def first(self, count: int) -> "ImageSet":
        """Only the first ``count`` images."""
        return replace(self, indices=self.indices[:count], labels=self.labels[:count])

    def with_transform(self, transform: Transform | None) -> "ImageSet":
        """The same images under another transform."""
        return replace(self, transform=transform)


class TokenSet(ImageSet):
    """A set of images as tokens, which no transform changes."""

    @classmethod
    def of(cls, tokens: Tensor, labels: Tensor) -> "TokenSet":
        """A set of tokens (N, T, D) with labels (N,)."""
        return cls(TokenImages(tokens), torch.arange(len(tokens)), labels, Unchanged())

    def with_transform(self, transform: Transform | None) -> "TokenSet":
        """The set itself."""
        del transform
        return self


def joined(parts: Sequence[ImageSet]) -> ImageSet:
    """One set of the images of several, in their order, without a transform."""
    if len(parts) == 1:
        return parts[0].with_transform(None)
    starts = [0, *accumulate(len(part.images) for part in parts)]
    indices = [part.indices + start for part, start in zip(parts, starts, strict=False)]
    return ImageSet(
        JoinedImages([part.images for part in parts]),
        torch.cat(indices),
        torch.cat([part.labels for part in parts]),
    )


def in_shared_memory(*tensors: Tensor) -> None:
    """Move tensors, in place, to memory that processes share.

    Raises
    ------
    OSError
        If there is too little of it, as in a container.
    """
    try:
        for tensor in tensors:
            tensor.untyped_storage().share_memory_()
    except RuntimeError as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        msg = (
            f"the processes that load images have too little shared memory (/dev/shm): give a "
            f"container more (docker run --shm-size=1g), or lower data.workers or "
            f"train.eval_batch_size, or set data.cache false; data.workers 0 needs none ({reason})"
        )
        raise OSError(msg) from error


def open_image(path: str | Path, config: DataConfig) -> Tensor:
    """Decode an image file as the experiment's own images are: channels, rotation, first resize.

    EXIF rotation is applied, transparency is dropped, and everything becomes RGB or grey; see
    `training.data.image_files` for deep images.

    Returns
    -------
    uint8 tensor of shape (C, H, W).

    Raises
    ------
    UnreadableImageError
        A ValueError: if the file is missing, cannot be decoded or has more pixels than
        ``PIL.Image.MAX_IMAGE_PIXELS``; the message names it.
    """
    return _decoded_file(path, config, path)


def _decoded_file(file: str | Path | BinaryIO, config: DataConfig, name: object) -> Tensor:
    images = config.images
    # Photos are read at a fraction of their size, as JPEG allows, if the first resize makes them
    # much smaller. Squashed images keep the exact pixels of a full decode.
    least = images.resize if config.side is None and images.crop_mode != "squash" else None
    return _as_tensor(decode(file, config.mode, name=name, least=least), config)


def _as_tensor(image: Image.Image, config: DataConfig) -> Tensor:
    """An RGB or L image after the first resize, as uint8 of shape (C, H, W)."""
    side = config.side
    if side is not None and image.size != (side, side):
        image = image.resize((side, side), Image.Resampling.BICUBIC)
    pixels = np.array(_squared(image, config.images))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _prepared(pixels: Tensor, config: DataConfig) -> Tensor:
    """Images (..., C, H, W) in memory with the channels and the first resize of the settings."""
    images = config.images
    if pixels.shape[-3] == 1 and images.channels == 3:
        pixels = pixels.expand(*pixels.shape[:-3], 3, *pixels.shape[-2:])
    elif pixels.shape[-3] == 3 and images.channels == 1:
        pixels = rgb_to_grayscale(pixels)
    resized = _squared(pixels, images)
    # Bicubic weights overshoot; uint8 is clipped by torchvision, float is not.
    return resized.clamp(0, 1) if resized.is_floating_point() and resized is not pixels else resized


_Picture = TypeVar("_Picture", Image.Image, Tensor)


def _squared(picture: _Picture, images: ImageSettings) -> _Picture:
    """The square of the first resize, as `DataConfig.crop_mode` says; all of it without one."""
    side, mode = images.resize, images.crop_mode
    height, width = get_size(picture)
    if side is None or (height, width) == (side, side):
        return picture
    size = [side, side]
    if mode != "squash":
        # Where the shorter side fits, the longer is cut to a whole number, as torchvision does.
        fitted = max(height, width) if mode == "border" else min(height, width)
        size = [max(1, int(side * length / fitted)) for length in (height, width)]
    by = InterpolationMode(images.interpolation)
    if isinstance(picture, Tensor):
        by = tensor_filter(images.interpolation)
    resized = resize(picture, size, interpolation=by, antialias=True)
    if mode == "border":
        mean = images.mean if isinstance(images.mean, tuple) else (images.mean,)
        shade = sum(mean) / len(mean)
        whole = not isinstance(picture, Tensor) or not picture.is_floating_point()
        top, left = ((side - length) // 2 for length in size)
        bottom, right = side - size[0] - top, side - size[1] - left
        fill = round(255 * shade) if whole else shade
        resized = pad(resized, [left, top, right, bottom], fill=fill)
    squared: _Picture = center_crop(resized, [side, side])
    return squared


def _keeps(config: DataConfig, count: int, value_bytes: int) -> bool:
    """Whether this many decoded and resized images are kept in memory."""
    images = config.images
    size = count * images.channels * (images.resize or 0) ** 2 * value_bytes
    return fits_cache(config, size if images.resize is not None else None)


def fits_cache(config: DataConfig, size: int | None) -> bool:
    """Whether something of a size in bytes, if it is known, is kept in memory."""
    return config.cache if config.cache is not None else size is not None and size < CACHE_BYTES
