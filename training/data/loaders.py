"""Loaders whose mini-batches depend only on a seed; images are augmented on the device."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from training.data.images import ImageSet, Key, in_shared_memory
from training.data.transforms import Transform
from training.distributed import Share

Prepared = tuple[Tensor, Tensor, Tensor]
"""Images of one size, their augmentation draws, and labels; no images if this process has none."""


class Batches:
    """Passes over mini-batches of images (B, C, H, W) on a device, and labels (B,) on the CPU.

    Made by `loader`. The loader's processes decode the images and give them one size. The result,
    mostly bytes, goes to the device, where it is augmented and scaled.
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
        # A terminal and most schedulers send signals to every process of a run. The training
        # process then finishes its step first and needs its workers for that. So they inherit
        # blocked signals, obey SIGTERM only from their parent, and end with it.
        with _signals_blocked():
            loading = iter(self.prepared)
        while (prepared := _next(loading)) is not None:
            pixels, draws, labels = prepared
            moved, drawn = (x.to(self.device, non_blocking=True) for x in (pixels, draws))
            yield (self.transform.finish(moved, drawn) if len(moved) else moved.float()), labels


class SeededBatches(Sampler[list[Key]]):
    """Mini-batches of an epoch and a seed for each image, from the seed and the epoch's number.

    Each pass covers the next epoch; `start_at` makes the next pass cover several, from any batch
    on. With several processes, each takes its `Share.even_bounds` of the single-process order.

    Attributes
    ----------
    epoch : int
        Number of the epoch that the next pass starts with.
    """

    def __init__(
        self, length: int, batch_size: int, *, shuffle: bool, seed: int, share: Share | None = None
    ) -> None:
        self.length, self.batch_size = length, batch_size
        self.shuffle, self.seed = shuffle, seed
        self.first, self.stop = (share or Share()).even_bounds(length)
        self.epoch, self.skip, self.epochs = 0, 0, 1

    def start_at(self, epoch: int, batch: int, *, epochs: int = 1) -> None:
        """Make the next pass start at this batch of this epoch and cover ``epochs`` epochs.

        A single pass keeps its worker processes across epochs.
        """
        self.epoch, self.skip, self.epochs = epoch, batch, epochs

    def __len__(self) -> int:
        """Number of mini-batches per epoch."""
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
        # A seed for every image, even if another process loads it: results do not depend on shares.
        seeds = rng.integers(2**63, size=self.length, dtype=np.uint64)
        mine = slice(self.first, self.stop)
        return list(zip(order[mine].tolist(), seeds[mine].tolist(), strict=True))


class _PreparedBatches(Dataset[Prepared]):
    """Mini-batches of which this process may prepare only its part; it gets all labels."""

    def __init__(self, images: ImageSet, cut: Share) -> None:
        self.images, self.cut = images, cut

    def __getitem__(self, keys: Sequence[Key]) -> Prepared:
        first, stop = self.cut.bounds(len(keys))
        labels = self.images.labels[[position for position, _ in keys]]
        if first == stop:  # fewer images than processes: these are not used
            return torch.empty(0), torch.empty(0), labels
        pixels, draws, _ = self.images.prepared(keys[first:stop])
        if get_worker_info() is not None:
            # Here, where a lack of it is an error. Left to the thread that sends the batch, the
            # batch would be lost, and both processes would wait for each other.
            in_shared_memory(pixels, draws, labels)
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

    Order and augmentations depend only on ``seed`` and the number of the pass over the loader, not
    on the number of workers or the device. torch's global generator is not changed.

    Parameters
    ----------
    dataset
        The images, with a transform that gives them one size.
    batch_size
        Images per batch.
    shuffle
        Whether every pass has its own random order.
    seed
        Seed of order and augmentations; at least 0.
    workers
        Number of loading processes; 0 loads in this one.
    share
        This process among several that share a pass, each taking its own part.
    cut
        Instead, give every process the mini-batches of a single process: its `Share.bounds` of the
        images, and all labels.
    device
        Device on which images are augmented and returned; labels stay on the CPU.

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
        batch_size=None,  # the sampler yields whole mini-batches
        sampler=order,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        worker_init_fn=_obey_parent,
        # Without it, every pass would take one draw from the global generator.
        generator=torch.Generator().manual_seed(seed),
    )
    return Batches(prepared, order, dataset.required_transform(), device)


def _next(loading: Iterator[Prepared]) -> Prepared | None:
    """The next mini-batch, or None after the last one.

    Raises
    ------
    ChildProcessError
        If a process that loads images has died.
    Exception
        What went wrong in such a process, as if it had happened here.
    """
    try:
        return next(loading, None)
    except Exception as error:
        said, kind = str(error), type(error)
        if said.startswith("Caught "):  # torch adds the traceback of the other process
            if not isinstance(error, OSError | ValueError):
                raise
            raise kind(said.strip().rpartition(f"{kind.__name__}: ")[2]) from error
        workers: Sequence[Any] = getattr(loading, "_workers", ())
        ends = [worker.exitcode for worker in workers if worker.exitcode]
        # Without a worker torch has nothing to do with it. A broken connection may be noticed
        # before the system has noticed the end of the process.
        lost = isinstance(error, EOFError | OSError) or "orker" in said or "thread exited" in said
        if not workers or not (ends or lost):
            raise
        how = ", ".join(signal.Signals(-end).name for end in ends if end < 0)
        msg = (
            f"a process that loads images has died{f' ({how})' if how else ''}: if memory ran out, "
            f"lower data.workers"
        )
        raise ChildProcessError(msg) from error


def _obey_parent(worker: int) -> None:
    """End when the parent says so, which it does if it ends during a pass."""
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
    """Start processes with blocked signals; one that arrives meanwhile is delivered afterwards.

    torch's handler of SIGCHLD is taken out again: it would raise at any place, even where a run is
    saved. The loader also notices by itself, within seconds, that a process has died.
    """
    # Windows has no signal masks, and a mask of another thread does not affect the main one.
    if not hasattr(signal, "pthread_sigmask") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    # Those that stop a run, and the one that tells of the end of a process.
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None:  # set from outside Python
            signal.signal(signal.SIGCHLD, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
