"""Figures of what happens inside LoDA, from the analyses of its runs."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from training.figures import Curve, Panel, line_figure, spread_curves
from training.report.finished import Finished
from training.report.labels import slug

Parts = tuple[str, str, str, str, Callable[[Path], Path]]
_SUBSPACES = {"null": "null space of the old tasks", "isolated": "isolated subspace of LoDA"}
_MARKS = {"recalibrated": "recalibrated", "merged": "merged, both branches"}
_AMONG = {"own": "among the classes of the image's own task", "seen": "among all classes seen"}


def inside_drawings(label: str, runs: Sequence[Finished]) -> Iterator[Parts]:
    """Name, title, caption, words and drawing of each figure that the analyses of a group allow."""
    tasks = [task for run in runs for task in run.analysis.get("subspaces") or []]
    if tasks:
        yield from _ratios(label, tasks)
        yield _energies(label, tasks)
    found = [task for run in runs for task in run.analysis.get("losses") or []]
    for number in sorted({task["task"] for task in found}):
        # Runs that were analysed at other steps cannot be averaged with the first one.
        here = [task for task in found if task["task"] == number]
        same = [task for task in here if task["step"] == here[0]["step"]]
        yield _losses(label, number, same, left_out=len(here) - len(same))


def _ratios(label: str, tasks: Sequence[dict[str, Any]]) -> Iterator[Parts]:
    curves, missing = [], False
    for style, (name, title) in enumerate(_SUBSPACES.items()):
        curve, complete = _by_layer(tasks, name, "ratio", title, style)
        missing |= not complete
        if curve.x:
            curves.append(curve)
    if not curves:  # old tasks have no energy anywhere
        return
    panel = Panel(curves, "layer", "energy ratio r(U)", log=True, level=1)
    infinite = " Left out: layers and tasks where old tasks have no energy." if missing else ""
    yield (
        f"ratio-{slug(label)}",
        f"Energy ratio of the null space and of the isolated subspace, {label}",
        "Relative energy on the new task over that on the old tasks: 1 where both use the "
        "directions alike. Median over tasks and seeds; the band is from the smallest to the "
        f"largest.{infinite} The paper's figure 2.",
        "Energy ratio by layer. " + _medians(curves),
        partial(line_figure, [panel]),
    )


def _energies(label: str, tasks: Sequence[dict[str, Any]]) -> Parts:
    names = [n for n in ("general", "isolated") if any(n in x for x in _layers(tasks))]
    panels = []
    for measure, y in (
        ("magnitude", "projection magnitude (rms)"),
        ("energy", "relative energy"),
    ):
        curves = [
            _by_layer(tasks, name, f"{age}_{measure}", f"{name}, {age} task inputs", style)[0]
            for style, (name, age) in enumerate((n, a) for n in names for a in ("new", "old"))
        ]
        panels.append(Panel(curves, "layer", y))
    return (
        f"energy-{slug(label)}",
        f"Projection magnitude and relative energy of the branches, {label}",
        "Root mean square length of a token's projection on the directions of a branch, and its "
        "share of all energy, on inputs of the new and of the old tasks. Median over tasks and "
        "seeds; the band is from the smallest to the largest. The paper's figure 5.",
        "Two panels by layer. Relative energy: " + _medians(panels[1].curves),
        partial(line_figure, panels),
    )


def _losses(label: str, number: int, found: Sequence[dict[str, Any]], *, left_out: int) -> Parts:
    steps = found[0]["step"]
    missing = f" Left out: {left_out} analysed at other steps." if left_out else ""
    panels = []
    for among, title in _AMONG.items():
        ages = {"old tasks": "old", "new task": "new"}
        seeds = {name: [task[among][age] for task in found] for name, age in ages.items()}
        curves = [c._replace(x=steps) for c in spread_curves(seeds)]
        for style, (mark, name) in enumerate(_MARKS.items(), 2):
            marked = [task["marks"][mark] for task in found if mark in task["marks"]]
            for age in ("old", "new") if marked else ():
                place = [fmean(m["step"] for m in marked)]
                loss = [fmean(m[among][age] for m in marked)]
                curves.append(Curve(name, place, loss, style=style, line=False))
        panels.append(Panel(curves, "step α", "CosFace loss", title, whole=False))
    return (
        f"loss-{slug(label)}-task{number + 1}",
        f"Loss along the general direction, {label}, task {number + 1}",
        "Mean loss of evaluation images at W + α·w·BA of the general branch, from the weights W "
        "before the task (α = 0) past the trained branch (α = 1); heads as after the task. Marked: "
        "the recalibrated general branch, and the model as merged with both branches, above the "
        f"nearest point of the line.{missing} The paper's figure 3.",
        "Two panels of the loss of old and of new tasks along the update. "
        + " ".join(
            f"{c.label}, {panel.title}: {c.centre[0]:.3g} at 0, {c.centre[-1]:.3g} at "
            f"{steps[-1]:g}."
            for panel in panels
            for c in panel.curves
            if c.line
        ),
        partial(line_figure, panels),
    )


def _layers(tasks: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [measures for task in tasks for measures in task["layers"].values()]


def _by_layer(
    tasks: Sequence[dict[str, Any]], name: str, measure: str, label: str, style: int
) -> tuple[Curve, bool]:
    """A measure of a subspace over the layers, and whether it is there for all of them."""
    x, centre, low, high, complete = [], [], [], [], True
    for place, layer in enumerate(tasks[0]["layers"], 1):
        having = [m[name] for m in (task["layers"].get(layer, {}) for task in tasks) if name in m]
        found = [m[measure] for m in having if m[measure] is not None]
        complete &= len(found) == len(having)
        if found:
            x.append(place)
            centre.append(median(found))
            low.append(min(found))
            high.append(max(found))
    return Curve(label, x, centre, low, high, style), complete


def _medians(curves: Sequence[Curve]) -> str:
    parts = [f"{c.label} from {min(c.centre):.3g} to {max(c.centre):.3g}" for c in curves]
    return "; ".join(parts) + "."
