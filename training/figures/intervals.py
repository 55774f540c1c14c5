"""Differences with their intervals, a line a name."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from training.figures.style import line_style, new_figure, plain, save, shorten

_WIDTH = 5.4  # inches: legible when a phone shows the whole width
_LINE, _EDGES = 0.22, 1.1
_LETTERS = 34


class Interval(NamedTuple):
    """A difference and the ends of its interval, if it has one."""

    mean: float
    low: float | None
    high: float | None


def interval_figure(
    series: Mapping[str, Mapping[str, Interval]],
    path: str | os.PathLike[str],
    *,
    x: str,
    title: str = "",
) -> Path:
    """Draw differences as points with intervals, the first name at the top; returns the path.

    Parameters
    ----------
    series : mapping of str to mapping of str to Interval
        What is compared, such as backbones, and in it the differences by name.
    path : path
        A PNG or SVG file; written whole or not at all.
    x : str
        What the differences are, with their unit.
    title : str
        A line above.

    Raises
    ------
    ValueError
        If there is no difference.
    """
    names = list(dict.fromkeys(name for found in series.values() for name in found))
    if not names:
        msg = "There is no difference to draw; give at least one."
        raise ValueError(msg)
    height = _EDGES + _LINE * len(names) * max(len(series), 1.4) + 0.2 * len(series)
    figure = new_figure(_WIDTH, height)
    axes = figure.subplots()
    for number, (label, found) in enumerate(series.items()):
        shift = (number - (len(series) - 1) / 2) * 0.7 / len(series)
        places = [names.index(name) + shift for name in found]
        style = line_style(number)
        for place, value in zip(places, found.values(), strict=True):
            if value.low is not None and value.high is not None:
                axes.plot([value.low, value.high], [place] * 2, color=style["color"], lw=1.6)
        centres = [value.mean for value in found.values()]
        style |= {"ls": "none", "ms": 5}
        axes.plot(centres, places, label=plain(label), **style)
    axes.axvline(0, color="#555555", lw=0.8, zorder=0)
    axes.set_yticks(range(len(names)), [shorten(name, _LETTERS) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(x)
    axes.grid(axis="x", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    if title:
        figure.suptitle(plain(title), fontsize=11)
    return save(figure, path)
