"""Curves in panels one above the other, each with a band: over tasks, layers or a step length."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from textwrap import wrap
from typing import TYPE_CHECKING, NamedTuple

from training.figures.axes import label_ends, logarithmic, style_tasks
from training.figures.style import line_style, new_figure, plain, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WIDTH, _HEIGHT = 5.4, 3.1  # inches of a panel: legible when a phone shows the whole width
_LEGEND = 64  # letters that a line of the legend holds


class Curve(NamedTuple):
    """A curve of a panel.

    Attributes
    ----------
    label : str
        What the legend calls it; curves of one label in several panels share an entry.
    x, centre : sequence of float
        Places and values.
    low, high : sequence of float
        Edges of the band; empty for none.
    style : int
        Number of its colour, mark and dashes.
    line : bool
        Join the points.
    """

    label: str
    x: Sequence[float]
    centre: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: int = 0
    line: bool = True


class Panel(NamedTuple):
    """A pair of axes.

    Attributes
    ----------
    curves : sequence of Curve
        At least one.
    x, y : str
        Names of the axes, with their units.
    title : str
        A line above.
    ends : str
        Format of the last value, written beside the end of each curve; none if empty.
    whole : bool
        The places are whole numbers, such as tasks.
    log : bool
        Logarithmic values.
    level : float or None
        Value at which a thin line crosses the panel.
    """

    curves: Sequence[Curve]
    x: str
    y: str
    title: str = ""
    ends: str = ""
    whole: bool = True
    log: bool = False
    level: float | None = None


def spread_curves(
    values: Mapping[str, Sequence[Sequence[float]]], *, scale: float = 1.0, first: int = 1
) -> list[Curve]:
    """Mean over seeds with a band of one sample standard deviation, a curve a name.

    Parameters
    ----------
    values : mapping of str to sequence of sequences
        Name -> one list a seed, of equal lengths; a name without seeds keeps its style free.
    scale : float
        Factor of the values, 100 for shares in per cent.
    first : int
        Place of the first value. A single value, as of a method that learns all at once, is put
        at the last place of the longest curve.

    Raises
    ------
    ValueError
        If the lists of one name are empty or differ in length.
    """
    for name, seeds in values.items():
        if seeds and (not seeds[0] or any(len(seed) != len(seeds[0]) for seed in seeds)):
            lengths = [len(seed) for seed in seeds]
            msg = f"The curves of {name!r} have lengths {lengths}; give equal ones of at least 1."
            raise ValueError(msg)
    longest = max((len(seeds[0]) for seeds in values.values() if seeds), default=0)
    curves = []
    for style, (name, seeds) in enumerate(values.items()):
        if not seeds:
            continue
        columns = [[scale * x for x in column] for column in zip(*seeds, strict=True)]
        mean = [fmean(column) for column in columns]
        low: list[float] = []
        high: list[float] = []
        if len(seeds) > 1:
            spread = [stdev(column) for column in columns]
            low = [m - s for m, s in zip(mean, spread, strict=True)]
            high = [m + s for m, s in zip(mean, spread, strict=True)]
        x = [first + k for k in range(len(mean))] if len(mean) > 1 else [first + longest - 1]
        count = f" (n = {len(seeds)})" if len(seeds) > 1 else ""
        curves.append(Curve(name + count, x, mean, low, high, style))
    return curves


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
        (``AccuracyMatrix.curve``). The band is the mean ± the sample standard deviation. A
        method without seeds is not drawn, and keeps its colour free.
    path : path
        A PNG or SVG file; written whole or not at all.
    title : str
        A line above the axes.

    Raises
    ------
    ValueError
        For no method, an empty curve or seeds of one method that differ in length.
    """
    if not any(curves.values()):
        msg = "There is no curve to draw; give at least one method with a seed."
        raise ValueError(msg)
    drawn = spread_curves(curves, scale=100)
    panel = Panel(drawn, "tasks learned", "accuracy over all classes seen (%)", ends=".1f")
    return line_figure([panel], path, title=title)


def line_figure(panels: Sequence[Panel], path: str | os.PathLike[str], *, title: str = "") -> Path:
    """Draw panels one above the other with one legend; returns the path.

    Parameters
    ----------
    panels : sequence of Panel
        At least one, each with at least one curve.
    path : path
        A PNG or SVG file; written whole or not at all.
    title : str
        A line above.

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    if not panels or not all(panel.curves for panel in panels):
        msg = "There is no curve to draw; give at least one panel, each with a curve."
        raise ValueError(msg)
    labels = {curve.label: curve.style for panel in panels for curve in panel.curves}
    wrapped = {label: wrap(label, _LEGEND) or [""] for label in labels}
    widest = max(len(line) for lines in wrapped.values() for line in lines)
    columns = min(
        max(_LEGEND // (widest + 10), 1), 3
    )  # the sample of a line takes some ten letters
    below = 0.3 + 0.2 * -(-sum(map(len, wrapped.values())) // columns)
    figure = new_figure(_WIDTH, _HEIGHT * len(panels) + below)
    grid = figure.subplots(len(panels), 1, squeeze=False)
    for axes, panel in zip(grid[:, 0], panels, strict=True):
        _draw(axes, panel)
    handles = {h.get_label(): h for axes in grid[:, 0] for h in axes.get_lines()}
    figure.legend(
        [handles[plain(label)] for label in labels],
        [plain("\n".join(lines)) for lines in wrapped.values()],
        loc="outside lower center", ncols=columns, frameon=False, fontsize=8, handlelength=3,
    )  # fmt: skip
    if title:
        figure.suptitle(plain(title), fontsize=11)
    return save(figure, path)


def _draw(axes: "Axes", panel: Panel) -> None:
    for curve in panel.curves:
        style = line_style(curve.style)
        if not curve.line:
            style |= {"ls": "none", "ms": 8}
        axes.plot(curve.x, curve.centre, label=plain(curve.label), **style)
        if curve.low:
            axes.fill_between(
                curve.x, curve.low, curve.high, color=style["color"], alpha=0.16, lw=0
            )
    if panel.log:
        logarithmic(axes)
    if panel.level is not None:
        axes.axhline(panel.level, color="#555555", lw=0.8, zorder=0)
    last = max(max(curve.x) for curve in panel.curves)
    if panel.ends:
        ends = [(c.centre[-1], line_style(c.style)["color"]) for c in panel.curves]
        label_ends(axes, last, ends, panel.ends)
    if panel.whole:
        style_tasks(axes, last, min(min(curve.x) for curve in panel.curves), room=bool(panel.ends))
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.set_title(plain(panel.title), fontsize=10)
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
