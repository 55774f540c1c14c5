"""A loader whose processes leave signals to the process that trains."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")

_SIGNALS = {signal.SIGINT, signal.SIGTERM}


class ShieldedLoader(DataLoader[T]):
    """torch's loader, with workers that heed SIGTERM from their own parent alone, and no SIGINT.

    A terminal and most schedulers send them to every process of a run. The one that trains then
    still has to finish its step, for which it needs its workers; they end with it.
    """

    def __init__(self, dataset: Dataset[T], **settings: Any) -> None:
        settings["worker_init_fn"] = _heed_parent
        super().__init__(dataset, **settings)

    def __iter__(self) -> Any:
        """Start a pass; its workers are forked with the signals blocked."""
        with _blocked():
            return super().__iter__()


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
def _blocked() -> Iterator[None]:
    # A signal that comes meanwhile is delivered afterwards. Windows has no masks, and other
    # threads no say in what the main one does.
    if not hasattr(signal, "pthread_sigmask") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
