"""What the tables of a section say: accuracies, leads over other methods, controls and costs."""

from collections.abc import Sequence
from statistics import fmean

from training.report.costs import controls_table, cost_table
from training.report.grouping import Section, shared_readouts, tasks_of
from training.report.measures import (
    LOWER_IS_BETTER,
    METRICS,
    lead,
    lead_text,
    measured,
    reference,
    shown,
    spread_text,
)
from training.report.tables import Cell, Table


def comparison_curves(sections: Sequence[Section]) -> dict[str, list[list[float]]]:
    """Accuracy over all classes seen after each task, a list of seeds by method.

    The read-out is the primary one of each run.

    Returns
    -------
    dict of str to list of list of float
        As :func:`training.figures.comparison_figure` takes them.
    """
    alone = len({section.base for section in sections}) == 1
    return {
        label if alone else f"{label}, {section.base}": [
            run.matrices[run.experiment.head.readout].curve for run in runs
        ]
        for section in sections
        for label, runs in section.groups.items()
    }


def report_tables(section: Section, against: str | None = None) -> list[Table]:
    """Accuracy and lead by read-out, controls, and costs.

    Parameters
    ----------
    section : Section
        What is compared.
    against : str, optional
        The label whose lead over the others is given; by default ``loda`` or else the first.
    """
    tables = []
    chosen = reference(section, against)
    for kind in section.readouts:
        tables.append(accuracy_table(section, kind))
        if chosen is not None:
            tables += [t for t in [lead_table(section, kind, chosen)] if t.rows]
    return [*tables, controls_table(section), cost_table(section)]


def accuracy_table(section: Section, kind: str) -> Table:
    """A row a method: mean and spread over seeds of every metric, for one read-out."""
    groups = {k: runs for k, runs in section.groups.items() if kind in shared_readouts(runs)}
    rivals = [k for k, runs in groups.items() if section.tasks == 1 or tasks_of(runs[0]) > 1]
    best = {}
    for name in METRICS:
        means = [fmean(v.values()) for k in rivals if (v := measured(groups[k], kind, name))]
        if means:
            best[name] = shown((min if name in LOWER_IS_BETTER else max)(means))
    rows = []
    for label, runs in groups.items():
        cells = [Cell(label)]
        for name in METRICS:
            values = list(measured(runs, kind, name).values())
            leads = label in rivals and bool(values) and shown(fmean(values)) == best[name]
            cells.append(Cell(spread_text(values), leads and len(rivals) > 1))
        rows.append([*cells, Cell(", ".join(str(run.experiment.seed) for run in runs))])
    note = "Mean ± sample standard deviation over the seeds; the best of a column in bold."
    if len(rivals) < len(groups):
        note += " A method that learns all tasks at once has the last accuracy alone, unranked."
    return Table(f"Accuracy, read-out {kind} (%)", ["method", *METRICS, "seeds"], rows, note)


def lead_table(section: Section, kind: str, against: str) -> Table:
    """Paired differences between a method and each of the others, for one read-out."""
    rows = []
    for label, runs in section.groups.items():
        found = [lead(section.groups[against], runs, kind, name) for name in METRICS]
        if label != against and found[0] is not None:
            counts = {x.size for x in found if x is not None}
            pairs = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
            rows.append([Cell(label), *(Cell(lead_text(x)) for x in found), Cell(pairs)])
    note = (
        f"{against} minus the method, over the seeds that both have; in brackets the 95 % interval "
        "of Student's t. More is better, for forgetting less."
    )
    title = f"Lead of {against}, read-out {kind} (points)"
    return Table(title, ["over", *METRICS, "pairs"], rows, note)
