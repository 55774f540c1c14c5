"""What all figures share: colours, marks, labels, and files that depend on the numbers alone."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any kind of colour vision; yellow is too pale: a grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#8C8C8C")
_MARKERS = "osD^vPX<>"
_DASHES = ("-", "--", "-.", ":")  # for prints without colour
_DPI = 150


def line_style(number: int) -> dict[str, Any]:
    """Colour, mark and dashes of the curve of a number; 36 differ, without their colour too."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        "ls": _DASHES[number % len(_DASHES)],
        "ms": 5,
        "lw": 1.8,
    }


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of a size in inches."""
    # Imported here so that a run without figures, or `loda --help`, does not load matplotlib.
    # The object interface with its own Agg canvas leaves the caller's pyplot state alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plain(text: str) -> str:
    """Text as it is: matplotlib would read what stands between two dollars as a formula."""
    return text.replace("$", r"\$")


def shorten(label: str, width: int = 18) -> str:
    """A label of at most so many letters, ready to be drawn."""
    return plain(label if len(label) <= width else label[: width - 1] + "…")


def save(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    """Write a figure as PNG or SVG, by the ending of the path: whole or not at all.

    Raises
    ------
    ValueError
        For any other ending.
    """
    from matplotlib import rc_context

    target = Path(path)
    kind = target.suffix.lower().removeprefix(".")
    if kind not in {"png", "svg"}:
        msg = f"The figure is a .png or .svg file, but the path ends in {target.suffix!r}: {target}"
        raise ValueError(msg)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Without version, date and random names the file depends on the numbers alone.
    unnamed: dict[str, Any] = {"Software": None}
    if kind == "svg":
        unnamed = {"Date": None, "Creator": None}
    with rc_context({"svg.hashsalt": "loda"}):
        write_atomically(
            target, lambda file: figure.savefig(file, format=kind, dpi=_DPI, metadata=unnamed)
        )
    return target
