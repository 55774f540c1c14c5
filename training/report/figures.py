"""The figures of a section of a report, each with a description in words."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import pandas as pd

from training.plots import (
    Curve,
    Panel,
    Paths,
    interval_figure,
    line_figure,
    matrix_figure,
    spread_curves,
)
from training.report.runs import Run, Section
from training.report.tables import (
    Table,
    accuracy_table,
    controls_table,
    cost_table,
    in_several,
    lead_table,
    lead_texts,
    leads,
    of_readout,
    reference,
    shared_parts,
    shared_readouts,
    signed,
)

_AGES = {"old": "old tasks", "new": "the new task", "accuracy": "all classes seen"}
_SUBSPACES = {"null": "null space of the old tasks", "isolated": "isolated subspace of LoDA"}
_MARKS = {"recalibrated": "recalibrated", "merged": "merged, both branches"}
_AMONG = {"own": "among the classes of the image's own task", "seen": "among all classes seen"}
_ACCURACY = "accuracy over all classes seen (%)"
_JOINT = "A method that learns all tasks at once is a single point."


class Drawing(NamedTuple):
    """A figure to be drawn.

    Attributes
    ----------
    name : str
        Name of its file, before it is turned into a valid file name.
    title, caption : str
        Its heading, and how to read it.
    alt : str
        What it shows, in words.
    draw : callable
        Draws it to a path or several, and returns the last.
    tables : sequence of Table
        Its numbers, which the page folds beneath it.
    folded : bool
        Collapsed on the page, since there is one for every method.
    """

    name: str
    title: str
    caption: str
    alt: str
    draw: Callable[[Paths], Path]
    tables: Sequence[Table] = ()
    folded: bool = False


def drawings(
    section: Section, *, lead_of: str | None = None, baseline: str | None = None
) -> Iterator[Drawing]:
    """Every figure that the runs of a section allow.

    Parameters
    ----------
    section : Section
        What is compared.
    lead_of, baseline : str, optional
        Labels of the method whose lead is shown, and of the one relative to which accuracies are
        drawn; the latter is by default ``seq_lora`` or ``frozen`` if there, else any other method.
    """
    chosen = reference(section, lead_of)
    accuracies = [_accuracy(section, readout, chosen) for readout in section.readouts]
    yield accuracies[0]
    yield from _rates(section)
    yield from _lead(section, chosen)
    yield from _relative(section, baseline or _baseline(section, lead_of))
    yield from _forgetting(section)
    yield from _costs(section)
    yield from accuracies[1:]
    yield from _matrices(section)
    for label in section.new_labels:
        yield from analysis_drawings(label, section.groups[label])


def _accuracy(section: Section, readout: str, chosen: str | None) -> Drawing:
    drawn = _curves(section, of_readout(section.task_measures, readout), "accuracy")
    ends = [f"{curve.label} {curve.centre[-1]:.1f} per cent" for curve in drawn]
    panel = Panel(drawn, "tasks learned", _ACCURACY, ends=True)
    tables = (accuracy_table(section, readout), lead_table(section, readout, chosen))
    return Drawing(
        f"accuracy-{readout}",
        f"Accuracy over tasks, read-out {readout}",
        f"Accuracy over all classes seen so far. {_spread(section)} {_JOINT}",
        f"Lines of accuracy over the tasks learned. At the end: {', '.join(ends)}.",
        partial(line_figure, [panel]),
        [table for table in tables if len(table.cells)],
    )


def _spread(section: Section) -> str:
    """How a line and its band come from the seeds."""
    counts = sorted({len(runs) for runs in section.groups.values()})
    if counts == [1]:
        return "One seed."
    number = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    return (
        f"Mean over {number} seeds; the band, or the bar at the end of a line, is one sample "
        "standard deviation."
    )


def side_drawings(sections: Sequence[Section], lead_of: str | None = None) -> Iterator[Drawing]:
    """Leads with their intervals: one figure per part of the sweeps."""
    for part, columns in shared_parts(sections).items():
        readout = shared_readouts(columns.values())[0]
        shared = in_several(section.groups for section in columns.values())
        series = {}
        for name, section in columns.items():
            first = reference(section, lead_of)
            ahead = leads(of_readout(section.measures, readout), first, "last")
            ahead = ahead.loc[[label for label in shared if label in ahead.index]]
            if len(ahead):
                series[f"{name} ({first})"] = ahead
        if len(series) > 1:
            yield _leads_drawing(
                f"side-by-side {part}",
                f"Lead by backbone or data{f' ({part})' if part else ''}, read-out {readout}",
                "Last accuracy of the method in brackets minus that of the method beside the line, "
                "paired over seeds on the same data and backbone: mean, and 95 % interval of "
                "Student's t. A single pair has no interval.",
                series,
            )


def comparison_figure(sections: Sequence[Section], path: Paths) -> Path:
    """Draw accuracy over tasks of every method, by the primary read-out of each run.

    Parameters
    ----------
    sections : sequence of Section
        What is compared.
    path : path
        A PNG, SVG or PDF file; written whole or not at all.
    """
    one_base = len({section.base for section in sections}) == 1
    curves = {
        label if one_base else f"{label}, {section.base}": [
            [100 * accuracy for accuracy in run.matrix.curve] for run in runs
        ]
        for section in sections
        for label, runs in section.groups.items()
    }
    styles = sections[0].styles if one_base else None
    panel = Panel(spread_curves(curves, styles=styles), "tasks learned", _ACCURACY, ends=True)
    return line_figure([panel], path, title="Accuracy over all classes seen")


def _curves(section: Section, rows: pd.DataFrame, column: str, *, first: int = 1) -> list[Curve]:
    """A column over tasks, from the first one on, by label; incomplete runs are left out."""
    seeds: dict[str, list[list[float]]] = {label: [] for label in section.groups}
    for (label, _), values in rows.groupby(["group", "run"], sort=False)[column]:
        if values.notna().all():
            seeds[label].append(values.tolist())
    return spread_curves(seeds, first=first, styles=section.styles)


def _rates(section: Section) -> Iterator[Drawing]:
    """How much depends on the learning rate, where methods were run at several of them."""
    if not section.sweeps:
        return
    readout = section.readouts[0]
    rows = of_readout(section.measures, readout)
    means = rows.groupby("group")[["last", "new", "forgetting", "update"]].mean()
    frozen = means["last"].get("frozen")

    def curves(x: str, y: str, least: float = 0.0) -> list[Curve]:
        """One curve a method, of the rates that keep at least a share of its best accuracy."""
        drawn = []
        for method, style, labels in section.sweeps:
            rates = sorted(labels)
            points = means.reindex([labels[rate] for rate in rates]).assign(rate=rates)
            points = points.dropna(subset=[x, y])
            points = points[points["last"] >= least * points["last"].max()].reset_index(drop=True)
            if len(points):
                best = int(points["last"].idxmax())
                curve = Curve(method, points[x].tolist(), points[y].tolist(), style=style)
                drawn.append(curve._replace(ringed=best if least else None))
        return drawn

    def panel(drawn: list[Curve], x: str) -> Panel:
        return Panel(drawn, x, _ACCURACY, integer_x=False, log_x=True, reference=frozen)

    panels = [panel(curves("rate", "last"), "learning rate")]
    if moved := curves("update", "last"):
        panels.append(panel(moved, "relative update ‖ΔW‖/‖W‖ of a task (%)"))
    best = [f"{c.label} {max(c.centre):.1f}" for c in panels[0].curves]
    yield Drawing(
        "rates",
        f"Last accuracy by learning rate, read-out {readout}",
        "Mean over seeds. A nominal rate moves the methods by different amounts: the second panel "
        "has the update that it makes."
        + ("" if frozen is None else " The grey line is the frozen backbone."),
        f"Lines of accuracy over learning rates. Best: {', '.join(best)} per cent.",
        partial(line_figure, panels),
    )
    if plane := curves("new", "forgetting", least=0.5):
        if frozen is not None:
            at = means.loc[["frozen"]]
            place = at["new"].tolist(), at["forgetting"].tolist()
            plane.append(Curve("frozen", *place, style=section.styles["frozen"], joined=False))
        x, y = "accuracy on a task just learned (%)", "forgetting (points)"
        yield Drawing(
            "plane",
            f"Forgetting against plasticity, read-out {readout}",
            "One point for each method and learning rate, lines from the lowest rate to the "
            "highest; mean over seeds. The ring is the rate with the best last accuracy; rates "
            "that reach less than half of it are not drawn. To the right: learns new tasks "
            "better. Down: forgets less."
            + ("" if frozen is None else " The point without a line is the frozen backbone."),
            "Points of forgetting over the accuracy on tasks just learned, for "
            f"{', '.join(curve.label for curve in plane)}.",
            partial(line_figure, [Panel(plane, x, y, integer_x=False)]),
        )


def _lead(section: Section, first: str | None) -> Iterator[Drawing]:
    readout = section.readouts[0]
    ahead = leads(of_readout(section.measures, readout), first, "last")
    if first is not None and len(ahead):
        yield _leads_drawing(
            "lead",
            f"Lead of {first}, read-out {readout}",
            f"Last accuracy of {first} minus that of the method beside the line, paired over seeds"
            + (": mean, and 95 % interval of Student's t." if ahead["low"].notna().any() else "."),
            {first: ahead},
        )


def _leads_drawing(
    name: str, title: str, caption: str, series: Mapping[str, pd.DataFrame]
) -> Drawing:
    words = [
        f"{name} over " + ", ".join(map(" ".join, zip(ahead.index, lead_texts(ahead), strict=True)))
        for name, ahead in series.items()
    ]
    draw = partial(interval_figure, series, x="lead, last accuracy (points)")
    return Drawing(name, title, caption, f"Points with intervals. {'; '.join(words)}.", draw)


def _relative(section: Section, baseline: str | None) -> Iterator[Drawing]:
    readout = section.readouts[0]
    rows = of_readout(section.task_measures, readout)
    base = rows[rows["group"] == baseline]
    if not (base["tasks"] > 1).any():
        return
    pair = ["seed", "order", "tasks", "task"]
    both = rows[rows["group"] != baseline].merge(base, on=pair, suffixes=("", "_base"))
    panels = []
    for age, words in _AGES.items():
        both["difference"] = both[age] - both[f"{age}_base"]
        # There are no old tasks before the second one.
        first = 2 if age == "old" else 1
        later = both[both["task"] >= first]
        curves = _curves(section, later, "difference", first=first)
        if not curves:
            return
        panels.append(
            Panel(curves, "tasks learned", "difference (points)", f"On {words}", reference=0)
        )
    ends = [
        f"{panel.title.lower()} "
        + ", ".join(f"{curve.label} {signed(curve.centre[-1])}" for curve in panel.curves)
        for panel in panels
    ]
    yield Drawing(
        "relative",
        f"Accuracy relative to {baseline}, read-out {readout}",
        f"Accuracy minus that of {baseline} with the same seed, on the old tasks, the task just "
        f"learned and all classes seen. {_spread(section)} The paper's figure 4.",
        f"Three panels of accuracy differences to {baseline} over the tasks learned. At the end: "
        f"{'; '.join(ends)}.",
        partial(line_figure, panels),
    )


def _baseline(section: Section, lead_of: str | None) -> str | None:
    ours = reference(section, lead_of)
    others = [k for k, runs in section.groups.items() if k != ours and runs[0].tasks > 1]
    usual = [name for name in ("seq_lora", "frozen") if name in section.groups]
    return next(iter([*usual, *others]), None)


def _forgetting(section: Section) -> Iterator[Drawing]:
    rows = section.task_measures
    rows = rows[rows["primary"] & (rows["task"] < rows["tasks"])]
    if curves := _curves(section, rows, "forgetting"):
        means = ", ".join(f"{curve.label} {fmean(curve.centre):.1f}" for curve in curves)
        yield Drawing(
            "forgetting",
            "Forgetting by task",
            "Best accuracy that a task ever had, minus the accuracy at the end; each method with "
            f"its primary read-out. {_spread(section)}",
            f"Lines of forgetting by task. Mean over tasks: {means}.",
            partial(line_figure, [Panel(curves, "task", "forgetting (points)", reference=0)]),
        )


def _costs(section: Section) -> Iterator[Drawing]:
    rows = section.task_measures[section.task_measures["primary"]]
    columns = {
        "time (s)": "seconds",
        "peak memory (MiB)": "memory_mib",
        "peak GPU memory (MiB)": "gpu_memory_mib",
    }
    panels = [
        Panel(curves, "task", unit)
        for unit, column in columns.items()
        if (curves := _curves(section, rows, column))
    ]
    if panels:
        yield Drawing(
            "costs",
            "Time and memory per task",
            f"{_spread(section)} {_JOINT}",
            f"Panels of {' and '.join(panel.y for panel in panels)} by task.",
            partial(line_figure, panels),
            [controls_table(section), cost_table(section)],
        )


def _matrices(section: Section) -> Iterator[Drawing]:
    for label in section.new_labels:
        runs = section.groups[label]
        if runs[0].tasks < 2:
            continue
        mean = [
            [fmean(cells) for cells in zip(*rows, strict=True)]
            for rows in zip(*(run.matrix.matrix for run in runs), strict=True)
        ]
        last = ", ".join(f"{100 * x:.0f}" for x in mean[-1])
        yield Drawing(
            f"matrix-{label}",
            f"Accuracy matrix of {label}, read-out {runs[0].readout}",
            "Row: after learning a task; column: on the classes of a task. Mean over seeds.",
            f"Heat map of accuracies. Last row, by task: {last} per cent.",
            partial(matrix_figure, mean),
            folded=True,
        )


def analysis_drawings(label: str, runs: Sequence[Run]) -> Iterator[Drawing]:
    """What happens inside LoDA, from the analyses of the runs of a group."""
    energies = pd.DataFrame([row for run in runs for row in run.energies])
    if len(energies):
        yield from _ratios(label, energies)
        yield from _energies(label, energies)
    losses = pd.DataFrame([row for run in runs for row in run.losses])
    for number, rows in losses.groupby("task") if len(losses) else ():
        yield _losses(label, number, rows)


def _ratios(label: str, energies: pd.DataFrame) -> Iterator[Drawing]:
    lines = [
        _by_layer(energies, name, "ratio", title, style)
        for style, (name, title) in enumerate(_SUBSPACES.items())
    ]
    curves = [curve for curve in lines if curve.x]
    if not curves:  # old tasks have no energy anywhere
        return
    drawn = energies[energies["subspace"].isin(_SUBSPACES)]
    missing = " Left out: layers and tasks where old tasks have no energy."
    yield Drawing(
        f"ratio-{label}",
        f"Energy ratio of the null space and of the isolated subspace, {label}",
        "Relative energy on the new task over that on the old tasks: 1 where both use the "
        "directions equally. Median over tasks and seeds; the band spans minimum to maximum."
        f"{missing if drawn['ratio'].isna().any() else ''} The paper's figure 2.",
        f"Energy ratio by layer. {_medians(curves)}",
        partial(line_figure, [Panel(curves, "layer", "energy ratio r(U)", log=True, reference=1)]),
    )


def _energies(label: str, energies: pd.DataFrame) -> Iterator[Drawing]:
    branches = [n for n in ("general", "isolated") if n in set(energies["subspace"])]
    panels = []
    for measure, y in {
        "magnitude": "projection magnitude (rms)",
        "energy": "relative energy",
    }.items():
        curves = [
            _by_layer(energies, name, f"{age}_{measure}", f"{name}, {age} task inputs", style)
            for style, (name, age) in enumerate(product(branches, ("new", "old")))
        ]
        panels.append(Panel([curve for curve in curves if curve.x], "layer", y))
    if not all(panel.curves for panel in panels):  # only the null space, as for null_lora
        return
    yield Drawing(
        f"energy-{label}",
        f"Projection magnitude and relative energy of the branches, {label}",
        "Root mean square length of a token's projection on the directions of a branch, and its "
        "share of all energy, on inputs of the new and of the old tasks. Median over tasks and "
        "seeds; the band spans minimum to maximum. The paper's figure 5.",
        f"Two panels by layer. Relative energy: {_medians(panels[1].curves)}",
        partial(line_figure, panels),
    )


def _by_layer(energies: pd.DataFrame, subspace: str, measure: str, label: str, style: int) -> Curve:
    """A measure of a subspace over the layers: median over tasks and seeds, smallest to largest."""
    places = {layer: place for place, layer in enumerate(energies["layer"].unique(), 1)}
    rows = energies[energies["subspace"] == subspace].dropna(subset=measure)
    spread = rows.groupby("layer", sort=False)[measure].agg(["median", "min", "max"])
    x = [places[layer] for layer in spread.index]
    centre, low, high = spread.T.to_numpy().tolist()
    return Curve(label, x, centre, low, high, style)


def _medians(curves: Sequence[Curve]) -> str:
    parts = [f"{c.label} from {min(c.centre):.3g} to {max(c.centre):.3g}" for c in curves]
    return "; ".join(parts) + "."


def _losses(label: str, number: int, rows: pd.DataFrame) -> Drawing:
    """Losses of one task along its update."""
    # Runs that were analysed at other steps cannot be averaged with the first one.
    steps = rows["steps"].iloc[0]
    alike = rows[[own == steps for own in rows["steps"]]]
    missing = (len(rows) - len(alike)) // 4  # a run has four rows: own or seen, old or new
    left_out = f" Left out: {missing} analysed at other steps." if missing else ""
    panels = []
    for among, title in _AMONG.items():
        by_age = {
            age: alike[(alike["among"] == among) & (alike["age"] == age)] for age in ("old", "new")
        }
        seeds = {"old tasks": [*by_age["old"]["losses"]], "new task": [*by_age["new"]["losses"]]}
        curves = [curve._replace(x=steps) for curve in spread_curves(seeds)]
        for style, (mark, words) in enumerate(_MARKS.items(), 2):
            for own in (by_age["old"], by_age["new"]):
                points = [marks[mark] for marks in own["marks"] if mark in marks]
                if points:
                    x, y = ([fmean(values)] for values in zip(*points, strict=True))
                    curves.append(Curve(words, x, y, style=style, joined=False))
        panels.append(Panel(curves, "step α", "CosFace loss", title, integer_x=False))
    ends = [
        f"{c.label}, {panel.title}: {c.centre[0]:.3g} at 0, {c.centre[-1]:.3g} at {steps[-1]:g}."
        for panel in panels
        for c in panel.curves
        if c.joined
    ]
    return Drawing(
        f"loss-{label}-task{number}",
        f"Loss along the general direction, {label}, task {number}",
        "Mean loss of evaluation images at W + α·w·BA of the general branch, from the weights W "
        "before the task (α = 0) past the trained branch (α = 1); heads as after the task. Marked: "
        "the recalibrated general branch, and the model as merged with both branches, above the "
        f"nearest point of the line.{left_out} The paper's figure 3.",
        f"Two panels of the loss of old and of new tasks along the update. {' '.join(ends)}",
        partial(line_figure, panels),
    )
