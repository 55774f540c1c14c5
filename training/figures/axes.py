"""Axes of figures over tasks: their scales, ticks, and values at the ends of curves."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_TICKS = 12


def logarithmic(axes: "Axes") -> None:
    """Values in decades, with plain numbers beside the ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def style_tasks(axes: "Axes", last: float, first: float = 1, *, room: bool = True) -> None:
    """Whole numbers along the bottom, and room on the right for the values at the ends."""
    low, high = int(first), int(last)
    axes.set_xticks(range(low, high + 1, -(-(high - low + 1) // _TICKS)))
    width = max(high - low, 1)
    axes.set_xlim(low - 0.06 * width, high + (0.14 if room else 0.06) * width)
    axes.set_xlabel("tasks learned")
    axes.grid(axis="y", color="#dddddd", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_ends(axes: "Axes", last: float, ends: list[tuple[float, str]], form: str) -> None:
    """Write each curve's last value at its end, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    gap = 0.06 * max(high - low, 1e-9)
    placed = -float("inf")
    for value, colour in sorted(ends):
        placed = max(value, placed + gap)
        axes.annotate(
            f"{value:{form}}", (last, placed), xytext=(8, 0), textcoords="offset points",
            va="center", color=colour, fontsize=9, fontweight="bold", annotation_clip=False,
        )  # fmt: skip
