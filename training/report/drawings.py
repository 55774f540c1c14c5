"""Which figures a section of a report has, each with what it shows in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from training.figures import Panel, comparison_figure, line_figure, matrix_figure, spread_curves
from training.metrics import AccuracyMatrix
from training.report.costs import task_memory, task_seconds
from training.report.finished import Finished
from training.report.grouping import Section, tasks_of
from training.report.inside import inside_drawings
from training.report.labels import slug
from training.report.measures import reference, signed

Seeds = dict[str, list[list[float]]]
_AGES = {"old": "old tasks", "new": "the new task", "all": "all classes seen"}


class Drawing(NamedTuple):
    """A figure to be drawn.

    Attributes
    ----------
    name : str
        File name without its ending.
    title, caption : str
        What it is, and how to read it.
    alt : str
        What it shows, in words.
    draw : callable
        Draws it to a path.
    folded : bool
        The page shows it when it is asked for: there is one for every method.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Path], Path]
    folded: bool = False


def drawings(
    section: Section, *, against: str | None = None, baseline: str | None = None
) -> Iterator[Drawing]:
    """Every figure that the runs of a section allow.

    Parameters
    ----------
    section : Section
        What is compared.
    against, baseline : str, optional
        Labels: whose lead is given, and relative to whom accuracies are drawn; by default a method
        without LoDA's ideas, ``seq_lora`` or ``frozen``, if there is one.
    """
    for kind in section.readouts:
        curves = {
            label: [run.matrices[kind].curve for run in runs if kind in run.matrices]
            for label, runs in section.all_groups().items()
        }
        yield Drawing(
            f"accuracy-{kind}",
            f"Accuracy over tasks, read-out {kind}",
            "Accuracy over all classes seen so far. Mean over seeds; the band is one sample "
            "standard deviation. A method that learns all tasks at once is a single point.",
            f"Lines of accuracy over the tasks learned. At the end: {_ends(curves)}.",
            partial(comparison_figure, curves),
        )
    yield from _relative(section, baseline or _baseline(section, against))
    yield from _forgetting(section)
    yield from _costs(section)
    yield from _matrices(section)
    for label in section.fresh:
        yield from (Drawing(*x) for x in inside_drawings(label, section.groups[label]))


def age_curves(matrix: AccuracyMatrix) -> dict[str, list[float]]:
    """Accuracy on old tasks (from the second task on), on the new task and on all, per image.

    Examples
    --------
    >>> age_curves(AccuracyMatrix((1, 1), ((9,), (6, 4)), ((10,), (10, 5))))
    {'old': [0.6], 'new': [0.9, 0.8], 'all': [0.9, 0.6666666666666666]}
    """
    rows = list(zip(matrix.sizes, matrix.correct, matrix.total, strict=True))
    old = [sum(right[:-size]) / sum(count[:-size]) for size, right, count in rows[1:]]
    new = [sum(right[-size:]) / sum(count[-size:]) for size, right, count in rows]
    return {"old": old, "new": new, "all": matrix.curve}


def _relative(section: Section, baseline: str | None) -> Iterator[Drawing]:
    kind = section.readouts[0]
    if baseline is None or tasks_of(section.groups[baseline][0]) < 2:
        return
    base = {(r.experiment.seed, r.order): r for r in section.groups[baseline]}
    panels = []
    for age, name in _AGES.items():
        values: Seeds = {}
        for label, runs in section.all_groups().items():
            pairs = [(r, base.get((r.experiment.seed, r.order))) for r in runs]
            values[label] = [
                [x - y for x, y in zip(_age(run, kind, age), _age(other, kind, age), strict=True)]
                for run, other in pairs
                if label != baseline
                and other is not None
                and kind in run.matrices
                and kind in other.matrices
                and tasks_of(run) == tasks_of(other)
            ]
        curves = spread_curves(values, scale=100, first=2 if age == "old" else 1)
        if not curves:
            return
        panels.append(Panel(curves, "tasks learned", "difference (points)", f"On {name}", level=0))
    yield Drawing(
        "relative",
        f"Accuracy relative to {baseline}, read-out {kind}",
        f"Accuracy minus that of {baseline} with the same seed, on the old tasks, the task just "
        "learned and all classes seen. Mean over seeds; the band is one sample standard deviation. "
        "The paper's figure 4.",
        f"Three panels of accuracy differences to {baseline} over the tasks learned. At the end: "
        + "; ".join(
            f"{panel.title.lower()} "
            + ", ".join(f"{c.label} {signed(c.centre[-1])}" for c in panel.curves)
            for panel in panels
        )
        + ".",
        partial(line_figure, panels),
    )


def _forgetting(section: Section) -> Iterator[Drawing]:
    curves: Seeds = {}
    for label, runs in section.all_groups().items():
        curves[label] = [_forgotten(_primary(run)) for run in runs if tasks_of(run) > 1]
    if not any(curves.values()):
        return
    drawn = spread_curves(curves, scale=100)
    panel = Panel(drawn, "task", "forgetting (points)", level=0)
    yield Drawing(
        "forgetting",
        "Forgetting by task",
        "Best accuracy that a task ever had, less the accuracy at the end; each method with its "
        "primary read-out. Mean over seeds; the band is one sample standard deviation.",
        "Lines of forgetting by task. Mean over tasks: "
        + ", ".join(f"{c.label} {fmean(c.centre):.1f}" for c in drawn)
        + ".",
        partial(line_figure, [panel]),
    )


def _costs(section: Section) -> Iterator[Drawing]:
    panels = []
    for unit, read in (
        ("time (s)", task_seconds),
        ("peak memory (MiB)", lambda run: task_memory(run, "process")),
        ("peak GPU memory (MiB)", lambda run: task_memory(run, "device")),
    ):
        values = {
            # A run that went on elsewhere may have measured only some of its tasks.
            k: [x for run in runs if len(x := read(run)) == tasks_of(run)]
            for k, runs in section.all_groups().items()
        }
        if any(values.values()):
            panels.append(Panel(spread_curves(values), "task", unit))
    if panels:
        yield Drawing(
            "costs",
            "Time and memory a task",
            "Mean over seeds; the band is one sample standard deviation. A method that learns all "
            "tasks at once is a single point.",
            "Panels of " + " and ".join(panel.y for panel in panels) + " by task.",
            partial(line_figure, panels),
        )


def _matrices(section: Section) -> Iterator[Drawing]:
    for label in section.fresh:
        runs = section.groups[label]
        matrices = [_primary(run).matrix for run in runs]
        if len(matrices[0]) < 2:
            continue
        mean = [
            [fmean(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*matrices, strict=True)
        ]
        kind = runs[0].experiment.head.readout
        last = ", ".join(f"{100 * x:.0f}" for x in mean[-1])
        yield Drawing(
            f"matrix-{slug(label)}",
            f"Accuracy matrix of {label}, read-out {kind}",
            "Row: after learning a task; column: on the classes of a task. Mean over seeds.",
            f"Heat map of accuracies. Last row, by task: {last} per cent.",
            partial(matrix_figure, mean),
            folded=True,
        )


def _baseline(section: Section, against: str | None) -> str | None:
    usual = [name for name in ("seq_lora", "frozen") if name in section.groups]
    ours = reference(section, against)
    others = [k for k, runs in section.groups.items() if k != ours and tasks_of(runs[0]) > 1]
    return next(iter([*usual, *others]), None)


def _ends(curves: Mapping[str, Sequence[Sequence[float]]]) -> str:
    ends = {k: 100 * fmean(seed[-1] for seed in seeds) for k, seeds in curves.items() if seeds}
    return ", ".join(f"{label} {end:.1f} per cent" for label, end in ends.items())


def _age(run: Finished, kind: str, age: str) -> list[float]:
    return age_curves(run.matrices[kind])[age]


def _primary(run: Finished) -> AccuracyMatrix:
    return run.matrices[run.experiment.head.readout]


def _forgotten(matrix: AccuracyMatrix) -> list[float]:
    rows = matrix.matrix
    return [max(row[j] for row in rows[j:]) - rows[-1][j] for j in range(len(rows) - 1)]
