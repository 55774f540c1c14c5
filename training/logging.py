"""Console output of a run (progress bar, tables), trackers and peak memory."""

import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from training.metrics import AccuracyMatrix, Meter
from training.spelling import visible

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from rich.progress import TaskID
    from rich.table import Table

    from training.updates import Update

_REFRESH = 0.25  # seconds between two reads of the device


class Progress:
    """Progress bar of a run; live on a terminal, elsewhere one line per task. Tasks count from 1.

    ``images`` are the numbers of training images of the tasks.
    """

    def __init__(self, images: Sequence[int], *, quiet: bool = False) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.tasks, self.images = len(images), images
        self.clock = Clock(images)
        # A path may hold characters that rich takes for its markup.
        self.console = Console(quiet=quiet, stderr=False, markup=False, highlight=False)
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
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, *lines: str) -> None:
        """Print lines."""
        for line in lines:
            self.console.print(visible(line), soft_wrap=True)

    def say_once(self, line: str) -> None:
        """Print a line unless this was called before."""
        if not self._said:
            self.say(line)
            self._said.add(line)

    def begin_task(self, task: int, steps: int, done: int = 0) -> None:
        """Open the bar of a task with a number of mini-batches, some of them done before."""
        title = f"task {task}/{self.tasks}"
        self._bar = self._bars.add_task(title, total=steps, completed=done, status="")
        self.clock.begin_training(task, steps, done)

    def advance(self, meter: Meter) -> None:
        """Advance the bar by a step; loss and accuracy are refreshed a few times a second."""
        if self._bar is None:
            return
        now = time.monotonic()
        if not self._bars.disable and now - self._shown > _REFRESH:
            values = meter.read()
            status = f"loss {values['loss']:.3f}  accuracy {100 * values['accuracy']:.1f} %"
            self._bars.update(self._bar, status=status)
            self._shown = now
        self._bars.advance(self._bar)
        if (seconds := self.clock.step()) is not None:
            self.say(f"time      about {duration(seconds)} left")

    def end_task(
        self, task: int, accuracy: float, seconds: float, update: "Update | None" = None
    ) -> None:
        """Close the bar and print the lines of the task."""
        if self._bar is not None:
            self._bars.remove_task(self._bar)
            self._bar = None
        left = self.clock.end_task(task)
        time_left = f", about {duration(left)} left" if task < self.tasks else ""
        self.say(
            f"task {task}/{self.tasks}: accuracy over all classes so far "
            f"{100 * accuracy:.2f} % ({seconds:.1f} s{time_left})",
            *([] if update is None else [f"  {describe_update(update)}"]),
            *(
                ["  warning: probably little is left of what the backbone knew; lower train.lr"]
                if update is not None and update.relative > 1
                else []
            ),
        )

    def finish(self, matrix: AccuracyMatrix, run: Path, figure: Path | None = None) -> None:
        """Print the accuracy matrix and the paths of the results."""
        table = accuracy_table(matrix)
        if self.console.is_terminal and self.console.measure(table).minimum <= self.console.width:
            self.console.print(table)
        else:  # unbroken lines of any width, for logs and pipes
            self.console.print(plain_table(matrix), soft_wrap=True)
        self.say(f"results: {run}", *([] if figure is None else [f"figure:  {figure}"]))


class Clock:
    """Estimates how long a run will take: time grows with the number of images of a task."""

    SECONDS, STEPS = 3.0, 5  # of training, before the first estimate

    def __init__(self, images: Sequence[int], now: Callable[[], float] = time.monotonic) -> None:
        self.images, self.now = images, now
        self.started = now()
        self.learned = 0  # images of the tasks that this process has completed
        self.estimated = False

    def begin_training(self, task: int, steps: int, done: int) -> None:
        """Note the number of steps of a task, counted from 1, and how many were done before."""
        self.task, self.steps, self.done, self.first = task, steps, done, done
        self.trains_since = self.now()

    def step(self) -> float | None:
        """Note a step; seconds that are left, once, as soon as there is something to go by."""
        self.done += 1
        taken, spent = self.done - self.first, self.now() - self.trains_since
        if self.estimated or taken < self.STEPS or spent < self.SECONDS:
            return None
        self.estimated = True
        # What surrounds the training (moments, read-outs, evaluation) takes about as long after it
        # as before it.
        around = self.trains_since - self.started
        rest = (self.steps - self.done) * spent / taken + around
        whole = self.steps * spent / taken + 2 * around
        return rest + whole * sum(self.images[self.task :]) / self.images[self.task - 1]

    def end_task(self, task: int) -> float:
        """Note the end of a task, counted from 1; seconds that are left."""
        self.estimated = True
        self.learned += self.images[task - 1]
        return (self.now() - self.started) * sum(self.images[task:]) / self.learned


def duration(seconds: float) -> str:
    """A time in words, rounded.

    Examples
    --------
    >>> duration(8.4), duration(100), duration(5000), duration(200_000)
    ('8 s', '1 min 40 s', '1 h 23 min', '55 h 33 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 3600:
        return f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def describe_update(update: "Update") -> str:
    """What the update of a task did, in words.

    Examples
    --------
    >>> from training.updates import Update
    >>> describe_update(Update(0.0123, {}, 0.25, 480))
    'the update moved the weights by 1.2 % and changed the prediction of 25 % of 480 images'
    >>> describe_update(Update(1e-5, {}, 0.0, 480))
    'the update moved the weights by 0.001 % and changed no prediction of 480 images'
    """
    moved = f"the update moved the weights by {per_cent(update.relative)} and changed"
    if not update.changed:
        return f"{moved} no prediction of {update.images} images"
    return f"{moved} the prediction of {per_cent(update.changed)} of {update.images} images"


def per_cent(share: float) -> str:
    """A share as a percentage of two significant digits, or of all before the point.

    Examples
    --------
    >>> per_cent(0.0123), per_cent(0.996), per_cent(1.25)
    ('1.2 %', '100 %', '125 %')
    """
    value = 100 * share
    return f"{value:.0f} %" if value >= 99.5 else f"{value:.2g} %"  # 1e+02 is no per cent


# --- tables ---------------------------------------------------------------------------------------


def aligned(rows: Sequence[Sequence[str]], *, left: int = 0) -> str:
    """Rows as plain text with columns two spaces apart, the first ``left`` of them left-aligned.

    Examples
    --------
    >>> print(aligned([["layer", "rank"], ["a", "4"], ["b.c", "16"]], left=1))
    layer  rank
    a         4
    b.c      16
    """
    rows = [[*map(visible, row)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(w) if k < left else c.rjust(w) for k, (c, w) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def accuracy_table(matrix: AccuracyMatrix) -> "Table":
    """A `rich` table: one row per learned task, one column per task, the metrics below.

    Examples
    --------
    >>> accuracy_table(AccuracyMatrix((1,), ((9,),), ((10,),))).row_count
    1
    """
    from rich.table import Table

    header, *rows = _cells(matrix)
    table = Table(title="Accuracy (%)", caption=_caption(matrix), header_style="bold")
    for name in header:
        style = "bold" if name == header[-1] else None
        table.add_column(name, justify="right", style=style, no_wrap=True)
    for row in rows:
        table.add_row(*row)
    return table


def plain_table(matrix: AccuracyMatrix) -> str:
    """The same as aligned plain text, for logs and pipes.

    Examples
    --------
    >>> print(plain_table(AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5)))))
    after task  task 1  task 2  all seen
             1    90.0              90.0
             2    60.0    80.0      66.7
    last 66.67 · average 78.33 · forgetting 30.00 · backward transfer -30.00
    """
    return "\n".join([aligned(_cells(matrix)), _caption(matrix)])


def _cells(matrix: AccuracyMatrix) -> list[list[str]]:
    """Header and rows in per cent: task learned, accuracy on each task, accuracy on all seen."""
    tasks = len(matrix)
    rows = [["after task", *(f"task {j + 1}" for j in range(tasks)), "all seen"]]
    for i, (row, seen) in enumerate(zip(matrix.matrix, matrix.curve, strict=True)):
        blanks = [""] * (tasks - len(row))
        rows.append([str(i + 1), *(f"{100 * a:.1f}" for a in row), *blanks, f"{100 * seen:.1f}"])
    return rows


def _caption(matrix: AccuracyMatrix) -> str:
    return (
        f"last {100 * matrix.last:.2f} · average {100 * matrix.average:.2f} · "
        f"forgetting {100 * matrix.forgetting:.2f} · "
        f"backward transfer {100 * matrix.backward_transfer:+.2f}"
    )


# --- trackers -------------------------------------------------------------------------------------


def require_tracker(name: str) -> None:
    """Refuse a tracker that Accelerate does not know, or whose package is not installed.

    Raises
    ------
    ValueError
        Lists the known trackers, or names the package to install; Accelerate would continue
        without the tracker.
    """
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = sorted(kind.value for kind in LoggerType if kind.value != "all")
    if name not in known:
        msg = f"tracker must be one of {', '.join(known)}, got {name!r}"
        raise ValueError(msg)
    if name not in {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}:
        msg = f"the tracker {name} is not installed: pip install {name}"
        raise ValueError(msg)


def start_tracker(accelerator: "Accelerator", settings: Mapping[str, Any], run: Path) -> None:
    """Open the tracker that the accelerator was made for, and give it the settings of the run."""
    accelerator.project_configuration.project_dir = str(run)
    accelerator.project_configuration.logging_dir = str(run)
    # Trackers accept only numbers, booleans and text.
    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in settings.items()
    }
    accelerator.init_trackers("loda", config=plain)


# --- memory ---------------------------------------------------------------------------------------

_PROCESS = Path("/proc/self")


def reset_peak(device: "torch.device") -> None:
    """Reset the peak-memory counters; memory still in use counts."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    # Only Linux can reset its counter (proc(5), clear_refs); a container may forbid it.
    with suppress(OSError):
        (_PROCESS / "clear_refs").write_text("5\n", encoding="ascii")


def peak_memory(device: "torch.device") -> dict[str, int]:
    """Peak memory in bytes since `reset_peak`.

    Returns
    -------
    dict of str to int
        ``process``: resident memory of this process, without its data-loading workers; where the
        counter cannot be reset, the peak since the process started; absent where the system does
        not report it. ``device``: memory that torch had allocated on a CUDA device.

    Examples
    --------
    >>> import torch
    >>> "device" in peak_memory(torch.device("cpu"))
    False
    """
    peak = {}
    resident = _resident()
    if resident is not None:
        peak["process"] = resident
    if device.type == "cuda":
        import torch

        peak["device"] = torch.cuda.max_memory_allocated(device)
    return peak


def _resident() -> int | None:
    with suppress(OSError):
        status = (_PROCESS / "status").read_text(encoding="utf-8")
        if line := re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE):
            return 1024 * int(line[1])
    with suppress(ImportError):
        import resource  # not on Windows

        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else 1024 * largest
    return None
