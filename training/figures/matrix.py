"""The accuracy matrix as a heat map: of one run, or the mean over several."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from training.figures.axes import label_ends, style_tasks
from training.figures.style import COLOURS, new_figure, plain, save, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from training.metrics import AccuracyMatrix

_ANNOTATED = 20  # tasks up to which every cell of the matrix carries its number
_TICKS = 20  # labels on an axis at most


def accuracy_figure(
    matrix: "AccuracyMatrix",
    path: str | os.PathLike[str],
    *,
    title: str = "",
    task_labels: Sequence[str] | None = None,
) -> Path:
    """Draw the accuracy matrix beside the accuracy over tasks; returns the path.

    Parameters
    ----------
    matrix : AccuracyMatrix
        At least one task.
    path : path
        A PNG or SVG file; written whole or not at all.
    title : str
        A line above both parts.
    task_labels : sequence of str, optional
        One label a task, for instance the names of its classes; by default 1 ... T.

    Raises
    ------
    ValueError
        For an empty matrix or a wrong number of labels.
    """
    tasks = len(matrix)
    if not tasks:
        msg = "The accuracy matrix has no task yet; there is nothing to draw."
        raise ValueError(msg)
    if task_labels is not None and len(task_labels) != tasks:
        msg = f"{len(task_labels)} task labels for {tasks} tasks; give one a task."
        raise ValueError(msg)
    names = [shorten(label) for label in task_labels or [str(j + 1) for j in range(tasks)]]
    side = _side(tasks)
    below = 0.4 + 0.075 * max(len(name) for name in names) if _tilted(names) else 0.0
    figure = new_figure(side + 2.3 + 4.8, side + 1.1 + below)
    left, right = figure.subplots(1, 2, width_ratios=[side + 1.6, 4.6])
    _heat_map(left, matrix.matrix, names)
    _own_curve(right, matrix)
    if title:
        figure.suptitle(plain(title), fontsize=12)
    return save(figure, path)


def matrix_figure(
    rows: Sequence[Sequence[float]], path: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draw accuracies a[i][j] in [0, 1], j up to i, as a heat map; returns the path.

    Parameters
    ----------
    rows : sequence of sequences of float
        Row i holds i + 1 accuracies.
    path : path
        A PNG or SVG file.
    title : str
        A line above.

    Raises
    ------
    ValueError
        For no rows, or rows of other lengths.
    """
    lengths = [len(row) for row in rows]
    if not rows or lengths != list(range(1, len(rows) + 1)):
        msg = f"The rows of an accuracy matrix have 1, 2, ... entries; got {lengths}."
        raise ValueError(msg)
    side = _side(len(rows))
    figure = new_figure(side + 2.1, side + 1.2)
    _heat_map(figure.subplots(), rows, [str(j + 1) for j in range(len(rows))])
    if title:
        figure.suptitle(plain(title), fontsize=12)
    return save(figure, path)


def _side(tasks: int) -> float:
    """Side of the square map, in inches."""
    return min(max(0.4 * tasks, 3.0), 7.5)


def _heat_map(axes: "Axes", rows: Sequence[Sequence[float]], names: list[str]) -> None:
    tasks = len(rows)
    grid = [[*(100 * a for a in row), *[float("nan")] * (tasks - len(row))] for row in rows]
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="equal")
    if tasks <= _ANNOTATED:
        size = 10 if tasks <= 10 else 7
        for i, row in enumerate(rows):
            for j, accuracy in enumerate(row):
                colour = "black" if accuracy > 0.55 else "white"
                text = f"{100 * accuracy:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    step = -(-tasks // _TICKS)
    ticks = list(range(0, tasks, step))
    long = _tilted(names)
    axes.set_xticks(
        ticks, [names[t] for t in ticks], fontsize=9,
        rotation=40 if long else 0, ha="right" if long else "center", rotation_mode="anchor",
    )  # fmt: skip
    axes.set_yticks(ticks, [str(t + 1) for t in ticks], fontsize=9)
    if not long:
        axes.tick_params(axis="x", pad=10)
    axes.tick_params(length=0)
    if not long:  # names of classes speak for themselves
        axes.set_xlabel("evaluated on the classes of task")
    axes.set_ylabel("after learning task")
    axes.set_title("Accuracy by task (%)", fontsize=11)
    axes.spines[:].set_visible(False)
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).outline.set_visible(False)


def _own_curve(axes: "Axes", matrix: "AccuracyMatrix") -> None:
    x = list(range(1, len(matrix) + 1))
    fresh = [100 * row[-1] for row in matrix.matrix]
    curve = [100 * accuracy for accuracy in matrix.curve]
    axes.plot(x, curve, color=COLOURS[0], marker="o", ms=5, lw=2, label="all classes seen")
    axes.plot(
        x, fresh, color=COLOURS[1], marker="s", ms=4, lw=1.2, ls="--", label="task just learned"
    )
    axes.set_ylim(0, 104)
    label_ends(axes, len(x), [(curve[-1], COLOURS[0])], ".1f")
    style_tasks(axes, len(x))
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(
        f"last {100 * matrix.last:.1f} · average {100 * matrix.average:.1f} · "
        f"forgetting {100 * matrix.forgetting:.1f}",
        fontsize=11,
    )


def _tilted(names: list[str]) -> bool:
    return max(len(name) for name in names) > 3
