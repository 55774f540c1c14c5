"""When a run is saved, what is then written, and how it is taken up again."""

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from training.config import CheckpointConfig
from training.files import flattened, nested, not_finite, understanding
from training.methods import saves_open_task
from training.monitoring.progress import Progress
from training.processes import Processes
from training.run_folder import CHECKPOINTS, RunFolder
from training.shapes import require_shape
from training.state import RunState
from training.survival.checkpoints import Checkpoint, newest_checkpoint, write_checkpoint
from training.survival.position import Position
from training.survival.signals import StopSignals

_PROGRESS = {"trainable": [int], "seconds": {str: float}}
_DTYPES = {
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.int64, torch.int32, torch.uint8, torch.bool),
}
_WORTH_SAVING = 60.0
"""Seconds of training after which a task is saved once more before what follows its last step."""


class Saver:
    """Writes the checkpoints of a run, and stops it where a signal asks for that.

    Parameters
    ----------
    config : CheckpointConfig
        How often.
    folder : RunFolder
        Gets the checkpoints.
    state : RunState
        The state of the run.
    identity : str
        What tells the checkpoints of this run from those of others.
    processes : Processes
        Those of the run. The first writes, which is enough: between two steps all have the same
        state. A signal to one stops all.

    Attributes
    ----------
    stop : StopSignals
        To be entered around the run.
    passes : int
        Passes over its images that the method has made in the open task.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        folder: RunFolder,
        state: RunState,
        identity: str,
        processes: Processes,
    ) -> None:
        self.config = config if processes.writes else replace(config, keep=0)
        self.folder, self.state, self.processes = folder, state, processes
        self.identity = identity
        self.stop = StopSignals()
        self.passes = 0
        self._open: Checkpoint | None = None
        self._useless: tuple[Path, ...] = ()
        self._progress: dict[str, Any] = {"trainable": [], "seconds": {}}
        self._steps, self._written = 0, time.monotonic()

    @property
    def resumes_in_task(self) -> bool:
        """Whether the task that comes next was open when the run was saved."""
        return self._open is not None

    def load(self) -> None:
        """Take over the newest sound checkpoint; the state must be a fresh one."""
        found = newest_checkpoint(self.folder.path / CHECKPOINTS, of=self.identity)
        self._useless = found.passed_over
        with understanding(found.path):
            _check_tensors(found.tensors)
            self.state.load(nested(found.tensors, "run"), found.record["run"])
            require_shape(found.record["progress"], _PROGRESS, "progress")
            self._progress = found.record["progress"]
            self.passes = int(found.record["passes"])
            if self.passes < 0:
                msg = f"{self.passes} passes have been made"
                raise ValueError(msg)
            if (found.record["open"] is not None) != (
                len(self.state.heads.sizes) > self.state.tasks
            ):
                msg = "it does not say where in its open task it stands"
                raise ValueError(msg)
            if found.record["open"] is not None:
                require_shape(found.record["task_seconds"], {"train": float, str: float}, "seconds")
        self.folder.restore_log(found.metrics)
        self._open = found if found.record["open"] is not None else None

    def restore_progress(self, progress: Progress) -> None:
        """Give a fresh display what it knew of the tasks that are done."""
        progress.trainable = list(self._progress["trainable"][: self.state.tasks])
        progress.seconds = dict(self._progress["seconds"])

    def restore_position(
        self, position: Position, *, epochs: int, batches: int
    ) -> dict[str, float]:
        """Put a fresh position where training stood, if it did; seconds that the task had taken.

        Parameters
        ----------
        position : Position
            In a task of so many ``epochs`` of so many ``batches``.
        """
        if self._open is None:
            return {}
        found, self._open = self._open, None
        with understanding(found.path):
            tensors, record = nested(found.tensors, "open"), found.record["open"]
            position.load(tensors, record, epochs=epochs, batches=batches)
        seconds: dict[str, float] = found.record["task_seconds"]
        return seconds

    def between_tasks(self, progress: Progress) -> None:
        """Save the run at the boundary of a task."""
        self._agree()
        self._write(progress, {}, None, {})
        self._leave_if_asked(saved=True)

    def inside_task(
        self,
        progress: Progress,
        position: Position,
        seconds: dict[str, float],
        *,
        last: bool = False,
    ) -> bool:
        """Save the run after a step, if it is time or a signal came.

        After the ``last`` step of a task it is time sooner: there is none while the task is
        merged, read out and evaluated.

        Returns
        -------
        bool
            False if it was looked at for that, and is not `Position.sound`; it is not saved then.

        Raises
        ------
        KeyboardInterrupt, SystemExit
            After it was saved, if a signal came.
        """
        self._steps += 1
        due = self._agree(last=last)
        if not (due or self.stop.wish is not None):
            return True
        sound = position.sound()
        able = saves_open_task(self.state.method) and sound
        if able:
            self._write(progress, position.tensors(), position.record(), seconds)
        else:
            self._steps, self._written = 0, time.monotonic()  # not looked at again a step later
        self._leave_if_asked(saved=able)
        return sound

    def _agree(self, *, last: bool = False) -> bool:
        """Let a signal that one process got be one to all; whether it is time for one of them."""
        own = 2 * int(self.stop.wish or 0) + self._due(last=last)
        number, due = divmod(self.processes.largest(own), 2)
        self.stop.wish = signal.Signals(number) if number else None
        return bool(due)

    def _due(self, *, last: bool) -> bool:
        steps, minutes = self.config.steps, self.config.minutes
        since = time.monotonic() - self._written
        worth = last and since >= _WORTH_SAVING and (steps, minutes) != (None, None)
        return (
            worth
            or (steps is not None and self._steps >= steps)
            or (minutes is not None and since >= 60 * minutes)
        )

    def _write(
        self,
        progress: Progress,
        position: dict[str, Tensor],
        record: dict[str, Any] | None,
        seconds: dict[str, float],
    ) -> None:
        self._steps = 0
        if self.config.keep:
            write_checkpoint(
                self.folder.path / CHECKPOINTS,
                flattened(run=self.state.tensors(), open=position),
                {
                    "of": self.identity,
                    "run": self.state.record(),
                    "open": record,
                    "passes": self.passes,
                    "progress": {"trainable": progress.trainable, "seconds": progress.seconds},
                    "task_seconds": seconds,
                },
                self.folder.read_log(),
                keep=self.config.keep,
                useless=self._useless,
            )
            self._useless = ()
        self._written = time.monotonic()

    def _leave_if_asked(self, *, saved: bool) -> None:
        if self.stop.wish is None:
            return
        self.processes.wait()  # the launcher ends the others as soon as one has ended
        what = "a checkpoint was written" if saved else "the checkpoint of the last task is there"
        self.stop.leave(f"{what}: loda train --resume {self.folder.path} goes on")


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse what no run writes: a checkpoint may come from anybody, its checksums too."""
    odd = [name for name, tensor in tensors.items() if tensor.dtype not in _DTYPES]
    if odd:
        msg = f"{odd[0]} is of {tensors[odd[0]].dtype}"
        raise ValueError(msg)
    # Ratios that were measured may be infinite, and decide nothing.
    broken = not_finite({k: t for k, t in tensors.items() if "/heldout/" not in k})
    if broken:
        msg = f"{broken[0]} holds values that are not finite"
        raise ValueError(msg)
