"""Figures of a run: the accuracy matrix and accuracy over tasks, as PNG files."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from training.metrics import AccuracyMatrix

__all__ = ["accuracy_figure", "comparison_figure"]

# Okabe and Ito's colours, told apart with any kind of colour vision; yellow is left out: too pale.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "osD^vPX"
_ANNOTATED = 20  # tasks up to which every cell of the matrix carries its number
_TICKS = 20  # labels on an axis at most
_DPI = 150


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
        The PNG file; written whole or not at all.
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
    names = [_shorten(label) for label in task_labels or [str(j + 1) for j in range(tasks)]]
    side = min(max(0.4 * tasks, 3.0), 7.5)  # of the square map, in inches
    below = 0.4 + 0.075 * max(len(name) for name in names) if _tilted(names) else 0.0
    figure = _figure(side + 2.3 + 4.8, side + 1.1 + below)
    left, right = figure.subplots(1, 2, width_ratios=[side + 1.6, 4.6])
    _heat_map(left, matrix, names)
    _own_curve(right, matrix)
    if title:
        figure.suptitle(_plain(title), fontsize=12)
    return _save(figure, path)


def comparison_figure(
    curves: Mapping[str, Sequence[Sequence[float]]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
) -> Path:
    """Draw accuracy over tasks of several methods: mean over seeds, band of one deviation.

    Parameters
    ----------
    curves : mapping of str to sequence of curves
        Method -> one curve a seed; a curve holds an accuracy in [0, 1] a task
        (``AccuracyMatrix.curve``). The band is the mean ± the sample standard deviation.
    path : path
        The PNG file; written whole or not at all.
    title : str
        A line above the axes.

    Raises
    ------
    ValueError
        For no method, an empty curve or seeds of one method that differ in length.
    """
    if not curves:
        msg = "There is no curve to draw; give at least one method."
        raise ValueError(msg)
    for name, seeds in curves.items():
        if not seeds or not seeds[0] or any(len(seed) != len(seeds[0]) for seed in seeds):
            lengths = [len(seed) for seed in seeds]
            msg = f"The curves of {name!r} have lengths {lengths}; give equal ones of at least 1."
            raise ValueError(msg)
    figure = _figure(6.8, 4.2)
    axes = figure.subplots()
    ends: list[tuple[float, str]] = []
    for k, (name, seeds) in enumerate(curves.items()):
        colour = _COLOURS[k % len(_COLOURS)]
        mean, spread = _mean_and_spread(seeds)
        x = list(range(1, len(mean) + 1))
        count = f" (n = {len(seeds)})" if len(seeds) > 1 else ""
        axes.plot(
            x, mean, color=colour, marker=_MARKERS[k % len(_MARKERS)], ms=5, lw=1.8,
            ls=("-", "--")[k // len(_COLOURS) % 2], label=_plain(name) + count,
        )  # fmt: skip
        if len(seeds) > 1:
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
            axes.fill_between(x, low, high, color=colour, alpha=0.16, lw=0)
        ends.append((mean[-1], colour))
    longest = max(len(seeds[0]) for seeds in curves.values())
    _label_ends(axes, longest, ends)
    _style_curve(axes, longest)
    axes.legend(frameon=False, fontsize=9)
    if title:
        axes.set_title(_plain(title), fontsize=11)
    return _save(figure, path)


def _figure(width: float, height: float) -> "Figure":
    # Imported here so that a run without figures, or `loda --help`, does not load matplotlib.
    # The object interface with its own Agg canvas leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat_map(axes: "Axes", matrix: "AccuracyMatrix", names: list[str]) -> None:
    tasks = len(matrix)
    rows = matrix.matrix
    grid = [[100 * a for a in row] + [float("nan")] * (tasks - len(row)) for row in rows]
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
    fresh = [row[-1] for row in matrix.matrix]
    axes.plot(x, matrix.curve, color=_COLOURS[0], marker="o", ms=5, lw=2, label="all classes seen")
    axes.plot(
        x, fresh, color=_COLOURS[1], marker="s", ms=4, lw=1.2, ls="--", label="task just learned"
    )
    _label_ends(axes, len(x), [(matrix.curve[-1], _COLOURS[0])])
    _style_curve(axes, len(x))
    axes.set_ylim(0, 1.04)
    axes.set_ylabel("accuracy (%)")
    axes.legend(frameon=False, fontsize=9)
    axes.set_title(
        f"last {100 * matrix.last:.1f} · average {100 * matrix.average:.1f} · "
        f"forgetting {100 * matrix.forgetting:.1f}",
        fontsize=11,
    )


def _style_curve(axes: "Axes", tasks: int) -> None:
    from matplotlib.ticker import PercentFormatter

    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=None, symbol=None))
    axes.set_xticks(range(1, tasks + 1, -(-tasks // 12)))
    # Room on the right for the numbers at the ends of the curves.
    axes.set_xlim(1 - 0.06 * max(tasks - 1, 1), tasks + 0.14 * max(tasks - 1, 1))
    axes.set_xlabel("tasks learned")
    axes.set_ylabel("accuracy over all classes seen (%)")
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label_ends(axes: "Axes", tasks: int, ends: list[tuple[float, str]]) -> None:
    """Write each curve's last value at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.055 * max(high - low, 1e-9)
    placed = -float("inf")
    for value, colour in sorted(ends):
        placed = max(value, placed + gap)
        axes.annotate(
            f"{100 * value:.1f}", (tasks, placed), xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def _mean_and_spread(seeds: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    from statistics import fmean, stdev

    columns = list(zip(*seeds, strict=True))
    return [fmean(c) for c in columns], [stdev(c) if len(c) > 1 else 0.0 for c in columns]


def _tilted(names: list[str]) -> bool:
    return max(len(name) for name in names) > 3


def _shorten(label: str, width: int = 18) -> str:
    return _plain(label if len(label) <= width else label[: width - 1] + "…")


def _plain(text: str) -> str:
    # matplotlib would read what stands between two dollars as a formula.
    return text.replace("$", r"\$")


def _save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.suffix.lower() != ".png":
        msg = f"The figure is a PNG file, but the path ends in {target.suffix!r}: {target}"
        raise ValueError(msg)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".png.part")
    os.close(handle)
    try:
        # Without the version text the file depends on the numbers alone.
        figure.savefig(temporary, format="png", dpi=_DPI, metadata={"Software": None})
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return target
