"""Labelled images as a torch data set, and loaders whose batches depend on a seed alone."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data.images import Images
from training.data.shares import Share
from training.data.shielded import ShieldedLoader
from training.data.transforms import Transform

Key = int | tuple[int, int]
"""Position of an image, alone or with the seed of its augmentation."""


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
        Applied to an image on access; without it an image comes as it was decoded.
    """

    images: Images
    indices: Tensor
    labels: Tensor
    transform: Transform | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return (self[position] for position in range(len(self)))

    def __getitem__(self, key: Key) -> tuple[Tensor, int]:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int]]:
        """Several items at once, as torch's loader asks for them: pixels are scaled together."""
        positions = [key if isinstance(key, int) else key[0] for key in keys]
        labels = cast("list[int]", self.labels[positions].tolist())
        sources = self.indices[positions].tolist()
        if self.transform is None:
            return [
                (self.images[index], label) for index, label in zip(sources, labels, strict=True)
            ]
        cropped = self._crop(sources, keys, self.transform)
        same = len({image.shape for image in cropped}) == 1
        scaled: Tensor | list[Tensor]
        if same:
            scaled = self.transform.scale(torch.stack(cropped))
        else:  # only possible on single accesses to images of several sizes: let the caller see
            scaled = [self.transform.scale(image) for image in cropped]
        return list(zip(scaled, labels, strict=True))

    def _crop(self, sources: list[int], keys: Sequence[Key], transform: Transform) -> list[Tensor]:
        # Seeding the CPU generator itself takes 2 us, torch.manual_seed 200 us: it seeds every
        # device. The state is put back, so loading data does not disturb the training's draws.
        generator = torch.default_generator
        state = generator.get_state()
        seeded = False
        cropped = []
        try:
            for index, key in zip(sources, keys, strict=True):
                if not isinstance(key, int):
                    generator.manual_seed(key[1])
                    seeded = True
                cropped.append(transform.geometry(self.images[index]))
        finally:
            if seeded:
                generator.set_state(state)
        return cropped

    def subset(self, labels: Collection[int]) -> "ImageSet":
        """Only the images with one of these labels, in the same order."""
        wanted = torch.isin(self.labels, torch.tensor(sorted(labels), dtype=torch.int64))
        return replace(self, indices=self.indices[wanted], labels=self.labels[wanted])

    def with_transform(self, transform: Transform | None) -> "ImageSet":
        """The same images under another transform."""
        return replace(self, transform=transform)


class SeededSampler(Sampler[tuple[int, int]]):
    """Order of an epoch and a seed for each of its images, from the seed and the epoch's number.

    Each pass is the next epoch; `set_epoch` continues from a given one, and inside it. Of several
    processes each walks its `Share.even_bounds` of the order that one would walk.
    """

    def __init__(
        self, length: int, *, shuffle: bool, seed: int, share: Share | None = None
    ) -> None:
        self.length = length
        self.shuffle = shuffle
        self.seed = seed
        self.first, self.stop = (share or Share()).even_bounds(length)
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Make the next pass this epoch, counted from 0, without its first ``skip`` images."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return self.stop - self.first

    def __iter__(self) -> Iterator[tuple[int, int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        skip, self.skip = self.skip, 0
        self.epoch += 1
        order = rng.permutation(self.length) if self.shuffle else np.arange(self.length)
        seeds = rng.integers(2**63, size=self.length, dtype=np.uint64)
        mine = slice(self.first + skip, self.stop)
        return iter(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


def loader(
    dataset: ImageSet,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    share: Share | None = None,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load batches of images (B, C, H, W) and labels (B,); the last short batch is kept.

    Order and augmentations follow from ``seed`` and the number of the pass over the loader, never
    from the number of workers, and torch's global generator is left as it was. Every image gets a
    seed of its own from the sampler, so it does not matter who augments it.

    Parameters
    ----------
    dataset
        The images, with a transform that gives them one size.
    batch_size
        Images a batch.
    shuffle
        Whether every pass has an order of its own.
    seed
        Decides order and augmentations; at least 0.
    workers
        Processes that load; 0 loads in this one.
    share
        This process, where several walk a pass together, each its own part of it.
    """
    batches = ShieldedLoader(
        dataset,
        batch_size=batch_size,
        sampler=SeededSampler(len(dataset), shuffle=shuffle, seed=seed, share=share),
        num_workers=workers,
        # Without it, every pass would take one draw from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )
    return cast("DataLoader[tuple[Tensor, Tensor]]", batches)


def start_at(batches: DataLoader[tuple[Tensor, Tensor]], epoch: int, batch: int) -> None:
    """Make the next pass over a `loader` this epoch, without its first batches."""
    _sampler(batches).set_epoch(epoch, batch * (batches.batch_size or 1))


def passes_begun(batches: DataLoader[tuple[Tensor, Tensor]]) -> int:
    """Number of the epoch that the next pass over a `loader` is."""
    return _sampler(batches).epoch


def _sampler(batches: DataLoader[tuple[Tensor, Tensor]]) -> SeededSampler:
    if not isinstance(batches.sampler, SeededSampler):
        msg = "only the loaders of training.data.loader can start anywhere"
        raise TypeError(msg)
    return batches.sampler
