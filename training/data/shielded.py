"""A loader whose processes leave signals to the process that trains."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch.utils.data import DataLoader

T = TypeVar("T")


class ShieldedLoader(DataLoader[T]):
    """torch's loader, with workers that SIGINT and SIGTERM do not reach.

    A terminal and most schedulers send them to every process of a run. The one that trains then
    still has to finish its step, for which it needs its workers; they end with it.
    """

    def __iter__(self) -> Any:
        """Start a pass; its workers are forked with the signals blocked."""
        with _blocked():
            return super().__iter__()


@contextmanager
def _blocked() -> Iterator[None]:
    # A signal that comes meanwhile is delivered afterwards. Windows has no masks, and other
    # threads no say in what the main one does.
    if not hasattr(signal, "pthread_sigmask") or (
        threading.current_thread() is not threading.main_thread()
    ):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
