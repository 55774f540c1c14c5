"""Figures as PNG, SVG or PDF files: accuracies over tasks, curves with bands, intervals, heat maps.

The same numbers give the same bytes: no date, version or random name gets into a file. Nothing here
loads matplotlib before a figure is drawn.
"""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from textwrap import wrap
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from training.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from numpy.typing import NDArray
    from pandas import DataFrame

    from training.metrics import AccuracyMatrix

Paths: TypeAlias = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

# Okabe and Ito's colours can be told apart with any kind of colour vision. Their yellow is too pale
# on white, so a grey replaces it. The first is the strongest: it is for what a figure is about.
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
_MARKERS = "osD^vPX<>"
_DASHES = ("-", "--", "-.", ":")  # for prints without colour
_DPI = 150
_WIDTH, _HEIGHT = 5.4, 3.1  # inches of a panel: legible when a phone shows the whole width
_LEGEND = 64  # letters in a line of the legend
_NAME = 34  # letters of a name beside an interval
_TASK_TICKS = 12
_END_LABELS = 16
_END_NAME = 24  # letters of a name at the end of a curve
_UNNAMED = {  # what a format says besides the figure
    "png": ("Software",),
    "svg": ("Date", "Creator"),
    "pdf": ("CreationDate", "Creator", "Producer"),
}
_BANDS = 3  # more bands in a panel would hide each other
_MATRIX_TICKS = 20
_CLASS_TICKS = 60  # names beside a confusion matrix
_ANNOTATED = 20  # tasks up to which every cell of a heat map shows its number


class Curve(NamedTuple):
    """A curve of a panel.

    Attributes
    ----------
    label : str
        Its name in the legend; curves of one label in several panels share an entry.
    x, centre : sequence of float
        Places and values.
    low, high : sequence of float
        Edges of the band; empty for none.
    style : int
        Number of its colour, marker and dashes.
    joined : bool
        Join the points by a line.
    ringed : int or None
        Number of the point that gets a ring.
    """

    label: str
    x: Sequence[float]
    centre: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0
    joined: bool = True
    ringed: int | None = None


class Panel(NamedTuple):
    """A pair of axes.

    Attributes
    ----------
    curves : sequence of Curve
        At least one.
    x, y : str
        Names of the axes, with their units.
    title : str
        Heading.
    ends : bool
        Write name and last value beside the end of each curve, in place of a legend.
    integer_x : bool
        The places are integers, such as tasks.
    log, log_x : bool
        Logarithmic scale of the values, and of the places.
    reference : float or None
        Value at which a thin horizontal line is drawn.
    """

    curves: Sequence[Curve]
    x: str
    y: str
    title: str = ""
    ends: bool = False
    integer_x: bool = True
    log: bool = False
    log_x: bool = False
    reference: float | None = None


def spread_curves(
    values: Mapping[str, Sequence[Sequence[float]]],
    *,
    first: int = 1,
    styles: Mapping[str, int] | None = None,
) -> list[Curve]:
    """Mean over seeds with a band of one sample standard deviation; one curve per name.

    Parameters
    ----------
    values : mapping of str to sequence of sequences
        Name -> one list per seed, of equal lengths. A name without seeds gives no curve.
    first : int
        Place of the first value. A single value, as from a method that learns all tasks at once,
        is put at the last place of the longest curve.
    styles : mapping of str to int, optional
        Name -> style; by default they are counted.

    Raises
    ------
    ValueError
        If the lists of one name are empty or differ in length.

    Examples
    --------
    >>> (curve,) = spread_curves({"loda": [[90.0, 70.0], [94.0, 74.0]]})
    >>> curve.label, list(curve.x), curve.centre
    ('loda', [1, 2], [92.0, 72.0])
    """
    for name, seeds in values.items():
        lengths = [len(seed) for seed in seeds]
        if seeds and (0 in lengths or len(set(lengths)) > 1):
            msg = f"the curves of {name!r} must have one length of at least 1, got {lengths}"
            raise ValueError(msg)
    longest = max((len(seeds[0]) for seeds in values.values() if seeds), default=0)
    curves = []
    for number, (name, seeds) in enumerate(values.items()):
        if not seeds:
            continue
        columns = [*zip(*seeds, strict=True)]
        mean = [fmean(column) for column in columns]
        start = first if len(mean) > 1 else first + longest - 1
        style = number if styles is None else styles[name]
        curve = Curve(name, range(start, start + len(mean)), mean, [], [], style)
        if len(seeds) > 1:
            spread = [(m, stdev(column)) for m, column in zip(mean, columns, strict=True)]
            low, high = [m - s for m, s in spread], [m + s for m, s in spread]
            curve = curve._replace(low=low, high=high)
        curves.append(curve)
    return curves


def line_figure(panels: Sequence[Panel], path: Paths, *, title: str = "") -> Path:
    """Draw panels one above the other with one legend; returns the path.

    Parameters
    ----------
    panels : sequence of Panel
        At least one, each with at least one curve.
    path : path
        A PNG, SVG or PDF file, or several; each is written whole or not at all.
    title : str
        Heading.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not panels or not all(panel.curves for panel in panels):
        msg = "a figure must have at least one panel, and each panel at least one curve"
        raise ValueError(msg)
    # Names at the ends of all curves of a single panel need no legend.
    named = len(panels) == 1 and panels[0].ends and len(panels[0].curves) <= _END_LABELS
    labels = [] if named else [curve.label for panel in panels for curve in panel.curves]
    labels = list(dict.fromkeys(labels))
    wrapped = {label: wrap(label, _LEGEND) or [""] for label in labels}
    widest = max((len(line) for lines in wrapped.values() for line in lines), default=0)
    # The sample of a line takes the room of some ten letters.
    columns = min(max(_LEGEND // (widest + 10), 1), 3)
    legend = 0.3 + 0.2 * -(-sum(map(len, wrapped.values())) // columns)
    figure = _new_figure(_WIDTH, _HEIGHT * len(panels) + legend)
    grid = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw_panel(axes, panel)
    handles = {h.get_label(): h for axes in grid for h in axes.get_lines()}
    if labels:
        figure.legend(
            [handles[_plain(label)] for label in labels],
            [_plain("\n".join(lines)) for lines in wrapped.values()],
            loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=3,
        )  # fmt: skip
    return _save(figure, path, title)


def interval_figure(series: "Mapping[str, DataFrame]", path: Paths, *, x: str) -> Path:
    """Draw differences as points with intervals, the first name at the top; returns the path.

    Parameters
    ----------
    series : mapping of str to DataFrame
        What is compared, such as backbones -> one row per name: the difference ``lead`` and the
        ends of its interval, ``low`` and ``high``, which are NaN where there is none.
    path : path
        A PNG, SVG or PDF file, or several; each is written whole or not at all.
    x : str
        What the differences are, with their unit.

    Raises
    ------
    ValueError
        If there is no difference.
    """
    names = list(dict.fromkeys(name for ahead in series.values() for name in ahead.index))
    if not names:
        msg = "a figure of intervals must have at least one difference, got none"
        raise ValueError(msg)
    # The axis and its name, a line for each name and series, a line of the legend for each series.
    height = 1.1 + 0.22 * len(names) * max(len(series), 1.4) + 0.2 * len(series)
    figure = _new_figure(_WIDTH, height)
    axes = figure.subplots()
    for number, (label, differences) in enumerate(series.items()):
        style = line_style(number) | {"ls": "none"}
        shift = (number - (len(series) - 1) / 2) * 0.7 / len(series)
        places = [names.index(name) + shift for name in differences.index]
        axes.plot(differences[["low", "high"]].T, [places] * 2, color=style["color"], lw=1.6)
        axes.plot(differences["lead"], places, label=_plain(label), **style)
    axes.axvline(0, color="#555555", lw=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [_plain(_shortened(name)) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(x)
    _open_frame(axes, grid="x")
    if len(series) > 1:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    return _save(figure, path)


def accuracy_figure(matrix: "AccuracyMatrix", path: Paths, *, title: str = "") -> Path:
    """Draw the accuracy matrix beside the accuracy over tasks; returns the path.

    Parameters
    ----------
    matrix : AccuracyMatrix
        At least one task.
    path : path
        A PNG, SVG or PDF file, or several; each is written whole or not at all.
    title : str
        Heading of both parts.

    Raises
    ------
    ValueError
        For an empty matrix.
    """
    tasks = len(matrix)
    if not tasks:
        msg = "an accuracy matrix must have at least one task to be drawn, got none"
        raise ValueError(msg)
    side = _matrix_side(tasks)
    figure = _new_figure(side + 2.3 + 5.6, side + 1.1)
    left, right = figure.subplots(1, 2, width_ratios=[side + 1.6, 5.4])
    _draw_matrix(figure, left, matrix.matrix)
    learned = range(1, tasks + 1)
    curves = [
        Curve("all classes seen", learned, [100 * x for x in matrix.curve]),
        Curve("task just learned", learned, [100 * row[-1] for row in matrix.matrix], style=1),
    ]
    summary = (
        f"last {100 * matrix.last:.1f} · average {100 * matrix.average:.1f} · "
        f"forgetting {100 * matrix.forgetting:.1f}"
    )
    right.set_ylim(0, 104)
    _draw_panel(right, Panel(curves, "tasks learned", "accuracy (%)", summary, ends=True))
    return _save(figure, path, title)


def confusion_figure(
    confusion: "NDArray[Any]",
    classes: Sequence[str],
    path: Paths,
    *,
    starts: Sequence[int] = (),
    title: str = "",
) -> Path:
    """Draw how often each class is taken for each other as a heat map; returns the path.

    Cells are shares of the images of a class, in percent. Up to 20 classes every cell of at least
    half a percent shows its number; of many classes only some are named beside the axes.

    Parameters
    ----------
    confusion : array of int, shape (C, C)
        Images by their class (row) and by the class that they are taken for (column).
    classes : sequence of str
        Names of the classes.
    path : path
        A PNG or SVG file; written whole or not at all.
    starts : sequence of int
        First class of each task: a line is drawn before it.
    title : str
        Heading.

    Raises
    ------
    ValueError
        If the matrix does not have a row and a column for every class, or no image.
    """
    from matplotlib.colors import PowerNorm

    count = len(classes)
    if confusion.shape != (count, count) or not confusion.any():
        msg = (
            f"a confusion matrix must have images and a row for each of the {count} classes, got "
            f"{confusion.sum()} images and shape {confusion.shape}"
        )
        raise ValueError(msg)
    # The row of a class without images is all zero.
    shares = 100 * confusion / confusion.sum(axis=1, keepdims=True).clip(min=1)
    step = -(-count // _CLASS_TICKS)
    ticks = range(0, count, step)
    names = [_plain(_shortened(classes[tick])) for tick in ticks]
    side, beside = min(max(0.36 * count, 3.0), 11.0), 0.08 * max(map(len, names))
    figure = _new_figure(side + beside + 3.2, side + beside + 1.6)
    axes = figure.subplots()
    # Rare confusions count, too: the root spreads low shares over more of the colours.
    image = axes.imshow(shares, cmap="cividis", norm=PowerNorm(0.5, vmin=0, vmax=100))
    if count <= _ANNOTATED:
        for row in range(count):
            for column in range(count):
                share = shares[row, column]
                if share >= 0.5:
                    colour = "black" if share > 30 else "white"  # on a light or a dark cell
                    axes.text(
                        column, row, f"{share:.0f}", ha="center", va="center", color=colour,
                        fontsize=9 if count <= 12 else 7,
                    )  # fmt: skip
    size = 9 if len(names) <= _MATRIX_TICKS else 6
    axes.set_xticks(ticks, names, fontsize=size, rotation=90)
    axes.set_yticks(ticks, names, fontsize=size)
    axes.tick_params(length=0 if step == 1 else 3)
    for start in starts:
        if start:
            for draw in (axes.axhline, axes.axvline):
                draw(start - 0.5, color="#ffffff", lw=0.8 if count <= _ANNOTATED else 0.4)
    few = "" if step == 1 else f" (every {step}{_ordinal(step)} class named)"
    axes.set_xlabel(f"taken for{few}")
    axes.set_ylabel("class of the image, in the order of learning")
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03, label="% of the class's images")
    bar.outline.set_visible(False)
    return _save(figure, path, title)


def _ordinal(number: int) -> str:
    if number % 100 in (11, 12, 13):
        return "th"
    return {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")


def matrix_figure(rows: Sequence[Sequence[float]], path: Paths) -> Path:
    """Draw accuracies a[i][j] in [0, 1], j up to i, as a heat map; returns the path.

    Parameters
    ----------
    rows : sequence of sequences of float
        Row i holds i + 1 accuracies.
    path : path
        A PNG, SVG or PDF file, or several.

    Raises
    ------
    ValueError
        If there are no rows, or their lengths are not 1, 2, and so on.
    """
    lengths = [len(row) for row in rows]
    if not rows or lengths != list(range(1, len(rows) + 1)):
        msg = f"the rows of an accuracy matrix must have 1, 2, ... entries, got {lengths}"
        raise ValueError(msg)
    side = _matrix_side(len(rows))
    figure = _new_figure(side + 2.1, side + 1.2)
    _draw_matrix(figure, figure.subplots(), rows)
    return _save(figure, path)


def line_style(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of a curve; 36 of them differ even without colour.

    Style 0 is for what a figure is about: a strong colour and a thick line.

    Examples
    --------
    >>> line_style(1)["marker"], line_style(1)["ls"]
    ('s', '--')
    """
    return {
        # Shifted by one a round: equal dashes would come back with the colour otherwise.
        "color": _COLOURS[(number + number // len(_COLOURS)) % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "ls": _DASHES[number % len(_DASHES)],
        "ms": 4 if number else 6,
        "lw": 1.4 if number else 2.8,
        "zorder": 2 if number else 3,
    }


def _draw_panel(axes: "Axes", panel: Panel) -> None:
    places = [x for curve in panel.curves for x in curve.x]
    banded, whiskers = sum(bool(curve.low) for curve in panel.curves), 0
    for curve in panel.curves:
        style = line_style(curve.style)
        if not curve.joined:
            style |= {"ls": "none", "ms": 8}
        axes.plot(curve.x, curve.centre, label=_plain(curve.label), **style)
        if curve.ringed is not None:
            point = curve.x[curve.ringed], curve.centre[curve.ringed]
            axes.scatter(*point, s=130, facecolors="none", edgecolors=style["color"], zorder=4)
        if not curve.low:
            continue
        colour = style["color"]
        if banded <= _BANDS or curve.style == 0:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.18, lw=0)
        else:  # the spread of the last value, beside it
            width = (max(places) - min(places)) or 1
            whiskers += 1
            end = max(curve.x) + 0.012 * width * whiskers
            axes.vlines(end, curve.low[-1], curve.high[-1], color=colour, lw=1.4)
    if panel.log_x:
        axes.set_xscale("log")
        _show_numbers(axes.xaxis)
    if panel.log:
        axes.set_yscale("log")
        _show_numbers(axes.yaxis)
    if panel.reference is not None:
        axes.axhline(panel.reference, color="#555555", lw=0.8, zorder=0)
    if panel.ends:
        _label_ends(axes, panel.curves)
    if panel.integer_x:
        _whole_numbers(axes, int(min(places)), int(max(places)), room=bool(whiskers))
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(_plain(panel.title), fontsize=10)
    _open_frame(axes, grid="y")


def _show_numbers(axis: "Axis") -> None:
    """Plain numbers beside the ticks of a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    low, high = sorted(axis.get_view_interval())
    # Three numbers a decade would run into each other over more than three decades.
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _draw_matrix(figure: "Figure", axes: "Axes", rows: Sequence[Sequence[float]]) -> None:
    tasks = len(rows)
    grid = [[*(100 * a for a in row), *[float("nan")] * (tasks - len(row))] for row in rows]
    image = axes.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="equal")
    if tasks <= _ANNOTATED:
        size = 10 if tasks <= 10 else 7
        for i, row in enumerate(rows):
            for j, accuracy in enumerate(row):
                colour = "black" if accuracy > 0.55 else "white"  # on a light or a dark cell
                text = f"{100 * accuracy:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=size)
    ticks = range(0, tasks, -(-tasks // _MATRIX_TICKS))
    numbers = [str(t + 1) for t in ticks]
    axes.set_xticks(ticks, numbers, fontsize=9)
    axes.set_yticks(ticks, numbers, fontsize=9)
    axes.tick_params(axis="x", pad=10)
    axes.set_xlabel("evaluated on the classes of task")
    axes.tick_params(length=0)
    axes.set_ylabel("after learning task")
    axes.set_title("Accuracy by task (%)", fontsize=11)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, fraction=0.046, pad=0.03).outline.set_visible(False)


def _matrix_side(tasks: int) -> float:
    """Side of a square heat map, in inches."""
    return min(max(0.4 * tasks, 3.0), 7.5)


def _whole_numbers(axes: "Axes", low: int, high: int, *, room: bool) -> None:
    """Whole numbers along the bottom; room on the right for the bars beside the ends of curves."""
    axes.set_xticks(range(low, high + 1, -(-(high - low + 1) // _TASK_TICKS)))
    width = max(high - low, 1)
    axes.set_xlim(low - 0.06 * width, high + (0.12 if room else 0.04) * width)


def _label_ends(axes: "Axes", curves: Sequence[Curve]) -> None:
    """Write each curve's name and last value at its end, moved apart where they would overlap."""
    if len(curves) > _END_LABELS:  # they would need more room than the curves
        return
    low, high = axes.get_ylim()
    gap = 0.065 * max(high - low, 1e-9)
    values = sorted((curve.centre[-1], curve.style, curve.label) for curve in curves)
    for (value, style, name), place in zip(
        values, _apart([value for value, *_ in values], gap), strict=True
    ):
        axes.annotate(
            _plain(f"{value:.1f}  {_shortened(name, _END_NAME)}"), (1, place),
            xycoords=("axes fraction", "data"), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9,
            color=line_style(style)["color"], fontweight="normal" if style else "bold",
        )  # fmt: skip


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Places at least a gap apart for values in order, as near to them as can be.

    Values that come too close share a block, which is centred on their mean.

    Examples
    --------
    >>> _apart([0.0, 0.1, 5.0], 1.0)
    [-0.45, 0.55, 5.0]
    """
    blocks: list[tuple[float, int]] = []  # the mean of its values, and how many they are
    for value in values:
        mean, count = value, 1
        while blocks and mean - blocks[-1][0] < gap * (count + blocks[-1][1]) / 2:
            before, members = blocks.pop()
            mean = (mean * count + before * members) / (count + members)
            count += members
        blocks.append((mean, count))
    return [mean + gap * (k - (count - 1) / 2) for mean, count in blocks for k in range(count)]


def _open_frame(axes: "Axes", *, grid: Literal["x", "y"]) -> None:
    """A faint grid along one axis, and no frame at the top and on the right."""
    axes.grid(axis=grid, color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _shortened(name: str, letters: int = _NAME) -> str:
    return name if len(name) <= letters else name[: letters - 1] + "…"


def _plain(text: str) -> str:
    """Text with dollars escaped: matplotlib would read what is between two as a formula."""
    return text.replace("$", r"\$")


def _new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    # Imported here so that a run without figures, or `loda --help`, does not load matplotlib.
    # The object interface with its own Agg canvas leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: "Figure", path: Paths, title: str = "") -> Path:
    """Write a figure under its title as PNG, SVG or PDF, by the ending of each path.

    Returns the path of the last.
    """
    from matplotlib import rc_context

    targets = [Path(path)] if isinstance(path, (str, os.PathLike)) else [Path(p) for p in path]
    if title:
        figure.suptitle(_plain(title), fontsize=12)
    for target in targets:
        kind = target.suffix.lower().removeprefix(".")
        if kind not in _UNNAMED:
            msg = f"the path of a figure must end in .png, .svg or .pdf, got {target}"
            raise ValueError(msg)
        target.parent.mkdir(parents=True, exist_ok=True)
        # Without version, date and random names the file depends only on the numbers.
        unnamed: Any = dict.fromkeys(_UNNAMED[kind])
        with rc_context({"svg.hashsalt": "loda"}):
            write = partial(figure.savefig, format=kind, dpi=_DPI, metadata=unnamed)
            write_atomically(target, write)
        # The layout has done its work: again for every format it took a quarter of a report's time.
        figure.set_layout_engine("none")
    return targets[-1]
