"""What is shown while a run goes on: bars with loss and accuracy, and the table at the end."""

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from torch import Tensor

from training.metrics import AccuracyMatrix
from training.monitoring.tables import accuracy_table, plain_table
from training.run_folder import FIGURE

_REFRESH = 0.25  # seconds between two reads of the device


class Meter:
    """Loss and accuracy of an epoch, summed on the device and read only when asked."""

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.right: Tensor | int = 0
        self.images = 0
        self.predicted = 0

    def add(self, loss: Tensor, images: int) -> None:
        """Add the mean loss of a mini-batch."""
        self.loss = self.loss + loss.detach() * images
        self.images += images

    def count(self, cosines: Tensor, targets: Tensor) -> None:
        """Count right predictions among rows that went through the model with gradients on."""
        with torch.no_grad():
            self.right = self.right + (cosines.argmax(dim=1) == targets).sum()
        self.predicted += len(targets)

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy so far; waits for the device."""
        return {
            "loss": float(self.loss) / max(self.images, 1),
            "accuracy": float(self.right) / max(self.predicted, 1),
        }


class Progress:
    """Progress bar of a run; on a terminal live, elsewhere a line a task.

    Parameters
    ----------
    tasks : int
        Tasks of the stream.
    quiet : bool
        Show nothing.
    """

    def __init__(self, tasks: int, *, quiet: bool = False) -> None:
        self.tasks = tasks
        # A path may hold what rich takes for its markup.
        self.console = Console(quiet=quiet, stderr=False, markup=False, highlight=False)
        self.trainable: list[int] = []
        self.seconds: dict[str, float] = {}
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=quiet or not self.console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._shown = 0.0

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bars.stop()

    def begin_task(self, task: int, steps: int, parameters: Sequence[Tensor]) -> None:
        """Open the bar of a task."""
        self.trainable.append(sum(p.numel() for p in parameters))
        title = f"task {task + 1}/{self.tasks}"
        self._bar = self._bars.add_task(title, total=steps, status="")

    def advance(self, meter: Meter, steps: int = 1) -> None:
        """Mini-batches are done; loss and accuracy are refreshed a few times a second."""
        if self._bar is None:
            return
        now = time.monotonic()
        if not self._bars.disable and now - self._shown > _REFRESH:
            values = meter.read()
            status = f"loss {values['loss']:.3f}  accuracy {100 * values['accuracy']:.1f} %"
            self._bars.update(self._bar, status=status)
            self._shown = now
        self._bars.advance(self._bar, steps)

    def end_task(self, task: int, accuracy: float, seconds: dict[str, float]) -> None:
        """Close the bar and print the line of the task."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        for name, value in seconds.items():
            self.seconds[name] = round(self.seconds.get(name, 0.0) + value, 3)
        total = sum(seconds.values())
        self.console.print(
            f"task {task + 1}/{self.tasks}: accuracy over all classes so far "
            f"{100 * accuracy:.2f} % ({total:.1f} s)",
            soft_wrap=True,
        )

    def table(self, matrix: AccuracyMatrix, folder: Path) -> None:
        """Print the accuracy matrix and where everything is."""
        table = accuracy_table(matrix)
        if self.console.is_terminal and self.console.measure(table).minimum <= self.console.width:
            self.console.print(table)
        else:  # whole lines, whatever the width, for logs and pipes
            self.console.print(plain_table(matrix), soft_wrap=True)
        self.console.print(f"results: {folder}", soft_wrap=True)
        self.console.print(f"figure:  {folder / FIGURE}", soft_wrap=True)
