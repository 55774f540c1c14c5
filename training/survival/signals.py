"""SIGTERM and Ctrl-C as a wish that is granted where the run can be saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

Handler = Callable[[int, FrameType | None], None]


def handle(names: Iterable[str], handler: Handler) -> dict[signal.Signals, Any]:
    """Install a handler for those signals that this system has; returns the handlers before it.

    Nothing is done outside the main thread, where Python allows no handlers.
    """
    found: dict[signal.Signals, Any] = {}
    if threading.current_thread() is not threading.main_thread():
        return found
    for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
        before = signal.getsignal(number)
        # One that is ignored (nohup, a job in the background) stays so.
        if before is not None and before != signal.SIG_IGN:
            found[number] = before
            signal.signal(number, handler)
    return found


def restore(found: dict[signal.Signals, Any]) -> None:
    """Put the handlers back that :func:`handle` returned, and empty the mapping: once is enough."""
    while found:
        signal.signal(*found.popitem())


class StopSignals:
    """Within a ``with`` block, notes the first of the two signals; the second acts at once.

    Attributes
    ----------
    wish : signal.Signals or None
        The signal that has arrived.
    """

    def __init__(self) -> None:
        self.wish: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = handle(("SIGINT", "SIGTERM"), self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        restore(self._before)

    def leave(self, said: str) -> NoReturn:
        """End as the signal asks: KeyboardInterrupt, or SystemExit with status 143."""
        if self.wish == signal.SIGTERM:
            os.write(2, f"{said}\n".encode())
            raise SystemExit(128 + signal.SIGTERM)
        raise KeyboardInterrupt(said)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.wish = signal.Signals(number)
        restore(self._before)
        # Not by print: the signal may have come in the middle of one.
        os.write(2, f"{self.wish.name}: stopping as soon as the run is saved\n".encode())
