"""Loaders whose mini-batches depend on a seed alone, augmented on the device that trains."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from training.data.images import ImageSet, Key
from training.data.transforms import Transform
from training.distributed import Share

_STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM}

Prepared = tuple[Tensor, Tensor, Tensor]
"""Images of one size, their draws, and labels; no images where a process has none of a batch."""


class Batches:
    """Passes over mini-batches of images (B, C, H, W) on a device, and labels (B,) on the CPU.

    Made by `loader`. Images are decoded and given one size by the loader's processes; what they
    are, bytes mostly, goes to the device, and is augmented and scaled there.
    """

    def __init__(
        self,
        prepared: DataLoader[Prepared],
        order: "SeededBatches",
        transform: Transform,
        device: torch.device,
    ) -> None:
        self.prepared, self.order = prepared, order
        self.transform, self.device = transform, device

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        # A terminal and most schedulers send signals to every process of a run. The one that trains
        # then still has to finish its step, for which it needs its workers: they inherit the
        # blocked signals, heed SIGTERM from their own parent alone, and end with it.
        with _signals_blocked():
            loading = iter(self.prepared)
        for pixels, draws, labels in loading:
            moved, drawn = (x.to(self.device, non_blocking=True) for x in (pixels, draws))
            yield (self.transform.finish(moved, drawn) if len(moved) else moved.float()), labels


class SeededBatches(Sampler[list[Key]]):
    """Mini-batches of an epoch and a seed for each image, from the seed and the epoch's number.

    Each pass goes over the next epoch; `start_at` makes the next one go over several, and begin
    anywhere. Of several processes each walks its `Share.even_bounds` of the order of one.

    Attributes
    ----------
    epoch : int
        Number of the epoch that the next pass begins with.
    """

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool, seed: int, share: Share | None = None
    ) -> None:
        self.length, self.batch_size = length, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.first, self.stop = (share or Share()).even_bounds(length)
        self.epoch, self.skip, self.epochs = 0, 0, 1

    def start_at(self, epoch: int, batch: int, *, epochs: int = 1) -> None:
        """Make the next pass begin at this batch of this epoch, and go on over so many epochs.

        At the end of an epoch the loading processes go on, where new ones would have to start.
        """
        self.epoch, self.skip, self.epochs = epoch, batch, epochs

    def __len__(self) -> int:
        """Mini-batches of an epoch."""
        return -((self.first - self.stop) // self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        skip, epochs = self.skip, self.epochs
        self.skip, self.epochs = 0, 1
        for _ in range(epochs):
            keys = self._keys(self.epoch)
            self.epoch += 1
            for start in range(skip * self.batch_size, len(keys), self.batch_size):
                yield keys[start : start + self.batch_size]
            skip = 0

    def _keys(self, epoch: int) -> list[Key]:
        rng = np.random.default_rng((self.seed, epoch))
        order = rng.permutation(self.length) if self.shuffle else np.arange(self.length)
        # A seed for every image, also for those that another process loads: shares change nothing.
        seeds = rng.integers(2**63, size=self.length, dtype=np.uint64)
        mine = slice(self.first, self.stop)
        return list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class _PreparedBatches(Dataset[Prepared]):
    """Mini-batches, of which this process may prepare only its part; labels are those of all."""

    def __init__(self, images: ImageSet, cut: Share) -> None:
        self.images, self.cut = images, cut

    def __getitem__(self, keys: Sequence[Key]) -> Prepared:
        first, stop = self.cut.bounds(len(keys))
        labels = self.images.labels[[position for position, _ in keys]]
        if first == stop:  # fewer images than processes: nobody will look at these
            return torch.empty(0), torch.empty(0), labels
        pixels, draws, _ = self.images.prepared(keys[first:stop])
        return pixels, draws, labels


def loader(
    dataset: ImageSet,
    batch_size: int,
    *,
    shuffle: bool,
    seed: int,
    workers: int = 0,
    share: Share | None = None,
    cut: bool = False,
    device: torch.device | str = "cpu",
) -> Batches:
    """Load batches of images (B, C, H, W) and labels (B,); the last short batch is kept.

    Order and augmentations follow from ``seed`` and the number of the pass over the loader, never
    from the number of workers or the device, and torch's global generator is left as it was.

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
    cut
        Give every process the mini-batches of one process instead, and of each its `Share.bounds`
        of the pixels and the labels of the whole.
    device
        Where images are augmented and handed out; labels stay on the CPU.

    Raises
    ------
    TypeError
        If the images have no transform.
    """
    share, everything, device = share or Share(), Share(), torch.device(device)
    order = SeededBatches(
        len(dataset), batch_size, shuffle=shuffle, seed=seed, share=everything if cut else share
    )
    prepared = DataLoader(
        _PreparedBatches(dataset, share if cut else everything),
        batch_size=None,  # the sampler gives whole mini-batches, stacked where they are decoded
        sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_heed_parent,
        # Without it, every pass would take one draw from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )
    return Batches(prepared, order, dataset.required_transform(), device)


def _heed_parent(worker: int) -> None:
    """End where the parent says so, as it does when it ends with a pass still open."""
    del worker
    if hasattr(signal, "sigwaitinfo"):
        threading.Thread(target=_wait_for_parent, args=(os.getppid(),), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS does not tell who sent a signal
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _wait_for_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    # A signal that comes meanwhile is delivered afterwards. Windows has no masks, and other
    # threads no say in what the main one does.
    if not hasattr(signal, "pthread_sigmask") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
