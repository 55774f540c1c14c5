"""The processes of a sweep's runs: none of them outlives it."""

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

from training.checkpoint import handle_signals, restore_signals

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")


class Children:
    """Starts processes and waits for them; within a ``with`` block, signals are passed on.

    The first SIGINT, SIGTERM or SIGHUP to this process is passed on as SIGTERM, at which a run
    saves itself and ends; so is the next one, at which it ends at once.

    Attributes
    ----------
    stopped : signal.Signals or None
        The signal that has arrived.
    """

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self._running: list[subprocess.Popen[bytes]] = []
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._before = handle_signals(_SIGNALS, self._stop)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:  # threads that are still at it begin nothing new
            self.stopped = self.stopped or signal.SIGTERM
        for child in list(self._running):
            child.terminate()
        for child in list(self._running):
            child.wait()
        restore_signals(self._before)

    def run(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, append: bool
    ) -> int:
        """Run a command to its end, its output in a log; returns its status."""
        if not append:
            log.write_bytes(b"")
        with log.open("ab") as file:
            child = subprocess.Popen(  # noqa: S603 - our own command
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                # Ctrl-C reaches a whole group: a run would get it twice, and end unsaved.
                process_group=0 if os.name == "posix" else None,
            )
        self._running.append(child)
        if self.stopped is not None:  # it arrived while the process was started
            child.terminate()
        status = child.wait()
        self._running.remove(child)
        return status

    def leave(self) -> NoReturn:
        """End as the signal asks: KeyboardInterrupt, or SystemExit with its usual status."""
        if self.stopped == signal.SIGINT or self.stopped is None:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.stopped = self.stopped or signal.Signals(number)
        for child in list(self._running):
            child.terminate()
        # Not by print: the signal may have come in the middle of one.
        said = f"{signal.Signals(number).name}: stopping as soon as every run is saved\n"
        os.write(2, said.encode())
