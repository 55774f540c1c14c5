"""What the tables of a report say: accuracies, leads over other methods, and costs."""

from collections.abc import Hashable, Sequence
from statistics import fmean

from training.report.grouping import Section, shared_readouts, tasks_of
from training.report.pairs import paired, spread
from training.report.runs import Finished
from training.report.tables import Cell, Table

DASH = "–"
METRICS = ("last", "average", "forgetting", "task given")
_LOWER_IS_BETTER = ("forgetting",)


def comparison_curves(sections: Sequence[Section]) -> dict[str, list[list[float]]]:
    """Accuracy over all classes seen after each task, a list of seeds by method.

    The read-out is the primary one of each run.

    Returns
    -------
    dict of str to list of list of float
        As :func:`training.figures.comparison_figure` takes them.
    """
    return {
        label if len(sections) == 1 else f"{label}, {section.title}": [
            run.matrices[run.experiment.head.readout].curve for run in runs
        ]
        for section in sections
        for label, runs in section.groups.items()
    }


def report_tables(section: Section, against: str | None = None) -> list[Table]:
    """Accuracy and lead by read-out, and costs.

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
    return [*tables, cost_table(section)]


def reference(section: Section, against: str | None) -> str | None:
    """Label of the method whose lead is given; None where the section lacks the named one."""
    if against is not None:
        return against if against in section.groups else None
    return "loda" if "loda" in section.groups else next(iter(section.groups))


def metric(run: Finished, kind: str, name: str) -> float | None:
    """A metric as a share; None where a run cannot have it.

    A run of one task, as of a method that learns all tasks at once, has the last accuracy alone.
    """
    if name != "last" and tasks_of(run) == 1:
        return None
    if name == "task given":
        given = run.summary.get("task_given", {}).get(kind)
        return None if given is None else float(given["last"])
    return float(getattr(run.matrices[kind], name))


def measured(runs: Sequence[Finished], kind: str, name: str) -> dict[Hashable, float]:
    """A metric in per cent of the runs that have it, by seed and class order."""
    found = {
        (r.experiment.seed, r.order): metric(r, kind, name) for r in runs if kind in r.matrices
    }
    return {key: 100 * value for key, value in found.items() if value is not None}


def accuracy_table(section: Section, kind: str) -> Table:
    """A row a method: mean and spread over seeds of every metric, for one read-out."""
    groups = {k: runs for k, runs in section.groups.items() if kind in shared_readouts(runs)}
    rivals = [k for k, runs in groups.items() if section.tasks == 1 or tasks_of(runs[0]) > 1]
    best = {}
    for name in METRICS:
        means = [fmean(v.values()) for k in rivals if (v := measured(groups[k], kind, name))]
        if means:
            best[name] = _shown((min if name in _LOWER_IS_BETTER else max)(means))
    rows = []
    for label, runs in groups.items():
        cells = [Cell(label)]
        for name in METRICS:
            values = list(measured(runs, kind, name).values())
            leads = label in rivals and bool(values) and _shown(fmean(values)) == best[name]
            cells.append(Cell(_spread(values), leads and len(rivals) > 1))
        rows.append([*cells, Cell(", ".join(str(run.experiment.seed) for run in runs))])
    note = "Mean ± sample standard deviation over the seeds; the best of a column in bold."
    if len(rivals) < len(groups):
        note += " A method that learns all tasks at once has the last accuracy alone, unranked."
    return Table(f"Accuracy, read-out {kind} (%)", ["method", *METRICS, "seeds"], rows, note)


def lead_table(section: Section, kind: str, against: str) -> Table:
    """Paired differences between a method and each of the others, for one read-out."""
    rows = []
    for label, runs in section.groups.items():
        found = [_lead(section.groups[against], runs, kind, name) for name in METRICS]
        if label != against and found[0] is not None:
            counts = {count for _, count in filter(None, found)}
            texts = [DASH if lead is None else lead[0] for lead in found]
            pairs = " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
            rows.append([Cell(label), *map(Cell, texts), Cell(pairs)])
    note = (
        f"{against} minus the method, over the seeds that both have; in brackets the 95 % interval "
        "of Student's t. More is better, for forgetting less."
    )
    title = f"Lead of {against}, read-out {kind} (points)"
    return Table(title, ["over", *METRICS, "pairs"], rows, note)


def cost_table(section: Section) -> Table:
    """What a task costs, by method; means over tasks and seeds, but for the largest sizes."""
    header = [
        "method",
        "trained parameters",
        "kept by the method (MiB)",
        "kept by the read-outs (MiB)",
        "time a task (s)",
        "training alone (s)",
        "peak memory (MiB)",
        "peak GPU memory (MiB)",
    ]
    rows = []
    for label, runs in section.groups.items():
        trained = [max(run.summary.get("trainable_parameters") or [0]) for run in runs]
        kept = [run.summary.get("stored_bytes") for run in runs]
        method = [k.get("method", 0) / 2**20 for k in kept if k is not None]
        readouts = [(sum(k.values()) - k.get("method", 0)) / 2**20 for k in kept if k is not None]
        total = [fmean(s) for run in runs if (s := task_seconds(run))]
        train = [fmean(s) for run in runs if (s := task_seconds(run, "train"))]
        memory = [[m for run in runs for m in task_memory(run, k)] for k in ("process", "device")]
        sizes = [_number(values, 1) for values in (method, readouts, total, train)]
        peaks = [f"{max(m):.0f}" if m else DASH for m in memory]
        rows.append([Cell(text) for text in (label, f"{max(trained):,}", *sizes, *peaks)])
    note = (
        "Trained parameters with the head of the task, and peak memory: the largest of all tasks. "
        "Kept: what is carried from task to task beside the model and the heads, at the end."
    )
    return Table("Costs", header, rows, note)


def side_by_side(sections: Sequence[Section], against: str | None = None) -> list[Table]:
    """Last accuracy of the methods that several sections share, and the lead of one over them."""
    labels = list(dict.fromkeys(k for section in sections for k in section.groups))
    shared = [k for k in labels if sum(k in section.groups for section in sections) > 1]
    tables = []
    for kind in dict.fromkeys(kind for section in sections for kind in section.readouts):
        having = [section for section in sections if kind in section.readouts]
        chosen = {section.title: reference(section, against) for section in having}
        if len(having) < 2 or not shared:
            continue
        rows = []
        for label in shared:
            cells = [Cell(label)]
            for section in having:
                runs, first = section.groups.get(label, []), chosen[section.title]
                cells.append(Cell(_spread(list(measured(runs, kind, "last").values()))))
                lead = None
                if first is not None and label != first:
                    lead = _lead(section.groups[first], runs, kind, "last")
                cells.append(Cell(DASH if lead is None else lead[0]))
            rows.append(cells)
        columns = [c for s in having for c in (s.title, f"lead of {chosen[s.title] or DASH}")]
        title = f"Side by side: last accuracy, read-out {kind} (%)"
        note = "Leads in points, paired over seeds, with the 95 % interval of Student's t."
        tables.append(Table(title, ["method", *columns], rows, note))
    return tables


def task_seconds(run: Finished, part: str | None = None) -> list[float]:
    """Seconds of each task, in all or of one part."""
    parts = [event["seconds"] for event in run.log]
    return [sum(p.values()) if part is None else p.get(part, 0.0) for p in parts]


def task_memory(run: Finished, kind: str) -> list[float]:
    """Peak memory of each task in MiB, of the process or the device; empty if not recorded."""
    found = [event.get("memory", {}).get(kind) for event in run.log]
    return [size / 2**20 for size in found if size is not None]


def _lead(
    ours: Sequence[Finished], theirs: Sequence[Finished], kind: str, name: str
) -> tuple[str, int] | None:
    found = paired(measured(ours, kind, name), measured(theirs, kind, name))
    if found is None:
        return None
    interval = ""
    if found.low is not None and found.high is not None:
        interval = f" [{_signed(found.low)}, {_signed(found.high)}]"
    return _signed(found.mean) + interval, found.size


def _spread(values: Sequence[float]) -> str:
    if not values:
        return DASH
    found = spread(values)
    centre = _shown(found.mean)
    return centre if found.deviation is None else f"{centre} ± {found.deviation:.2f}"


def _number(values: Sequence[float], digits: int) -> str:
    return f"{fmean(values):.{digits}f}" if values else DASH


def _shown(value: float) -> str:
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus before a zero


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")
