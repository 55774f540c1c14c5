"""Figures of runs as PNG or SVG files: accuracies, costs and what happens inside LoDA."""

from training.figures.curves import Curve, Panel, comparison_figure, line_figure, spread_curves
from training.figures.intervals import Interval, interval_figure
from training.figures.matrix import accuracy_figure, matrix_figure

__all__ = [
    "Curve",
    "Interval",
    "Panel",
    "accuracy_figure",
    "comparison_figure",
    "interval_figure",
    "line_figure",
    "matrix_figure",
    "spread_curves",
]
