"""Mini-batches that several processes train on together."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from training.data.dataset import ImageSet, Key, SeededSampler, loader
from training.data.shares import Share
from training.data.shielded import ShieldedLoader


class _CutBatches(Dataset[tuple[Tensor, Tensor]]):
    """Mini-batches of which this process loads its part; labels are those of all of it."""

    def __init__(self, images: ImageSet, share: Share) -> None:
        self.images, self.share = images, share

    def __getitems__(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        first, stop = self.share.bounds(len(keys))
        positions = [key if isinstance(key, int) else key[0] for key in keys]
        labels = self.images.labels[positions]
        if first == stop:  # fewer images than processes: nobody will look at these
            return torch.empty(0), labels
        pixels, _ = default_collate(self.images.__getitems__(keys[first:stop]))
        return pixels, labels


def cut_loader(
    dataset: ImageSet,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    share: Share,
) -> DataLoader[tuple[Tensor, Tensor]]:
    """The mini-batches of `loader`, each cut over the processes.

    Order, augmentations and mini-batches are those of one process. Of each, a process gets the
    pixels of its `Share.bounds` and the labels of the whole.

    Parameters
    ----------
    dataset, batch_size, shuffle, seed, workers
        As in `loader`; the batch size counts the images of all processes.
    share
        This process.
    """
    if share.count == 1:
        return loader(dataset, batch_size, shuffle=shuffle, seed=seed, workers=workers)
    return ShieldedLoader(
        _CutBatches(dataset, share),
        batch_size=batch_size,
        sampler=SeededSampler(len(dataset), shuffle=shuffle, seed=seed),
        num_workers=workers,
        collate_fn=_as_it_is,
        generator=torch.Generator().manual_seed(seed),
    )


def _as_it_is(batch: Any) -> Any:
    return batch
