"""Several data sets or backbones side by side: accuracies, and how the lead moves."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import takewhile

from training.figures import Interval, interval_figure
from training.report.drawings import Drawing
from training.report.grouping import Section
from training.report.labels import slug
from training.report.measures import gain, lead, lead_text, measured, reference, spread_text
from training.report.pairs import Paired, paired
from training.report.tables import Cell, Table


def side_by_side(sections: Sequence[Section], against: str | None = None) -> list[Table]:
    """Last accuracy by method, and the lead of one of them, with a column a section.

    Parts of a sweep are compared with the same parts of the others; where some have no parts, all
    that a sweep holds is compared with all of the others. Differences are paired within a section
    alone.
    """
    tables = []
    for part, columns in _parts(sections).items():
        labels = _in_two([section.groups for section in columns.values()])
        for kind in _readouts(columns.values()):
            rows = []
            for label in labels:
                runs = [section.groups.get(label, []) for section in columns.values()]
                texts = [spread_text(list(measured(r, kind, "last").values())) for r in runs]
                rows.append([Cell(label), *map(Cell, texts)])
            title = f"Side by side{_of(part)}: last accuracy, read-out {kind} (%)"
            note = "Mean ± sample standard deviation over the seeds."
            tables.append(Table(title, ["method", *columns], rows, note))
            tables += _lead_tables(part, columns, kind, against)
    return tables


def side_drawings(sections: Sequence[Section], against: str | None = None) -> Iterator[Drawing]:
    """Leads with their intervals, a figure for each part of the sweeps."""
    for part, columns in _parts(sections).items():
        kind = _readouts(columns.values())[0]
        shared = _in_two([section.groups for section in columns.values()])
        series = {}
        for name, section in columns.items():
            first = reference(section, against)
            leads = _leads(section, kind, first) if first is not None else {}
            found = {label: leads[label] for label in shared if label in leads}
            if found:
                series[f"{name} ({first})"] = found
        if len(series) > 1:
            yield Drawing(
                f"side-by-side-{slug(part)}" if part else "side-by-side",
                f"Lead by backbone or data{_of(part)}, read-out {kind}",
                "Last accuracy of the method in brackets minus that of the method beside the line, "
                "paired over seeds on the same data and backbone: mean, and 95 % interval of "
                "Student's t. A single pair has no interval.",
                lead_words(series),
                partial(interval_figure, _intervals(series), x="lead, last accuracy (points)"),
            )


def lead_drawing(section: Section, against: str | None) -> Iterator[Drawing]:
    """Lead of a method of a section over each of the others, by the first read-out."""
    kind, first = section.readouts[0], reference(section, against)
    found = _leads(section, kind, first) if first is not None else {}
    if first is not None and found:
        yield Drawing(
            "lead",
            f"Lead of {first}, read-out {kind}",
            f"Last accuracy of {first} minus that of the method beside the line, paired over "
            "seeds: mean, and 95 % interval of Student's t.",
            lead_words({first: found}),
            partial(interval_figure, _intervals({first: found}), x="lead, last accuracy (points)"),
        )


def lead_words(series: dict[str, dict[str, Paired]]) -> str:
    """The numbers of a figure of leads in words."""
    parts = [
        f"{name} over " + ", ".join(f"{label} {lead_text(x)}" for label, x in found.items())
        for name, found in series.items()
    ]
    return "Points with intervals. " + "; ".join(parts) + "."


def _intervals(series: dict[str, dict[str, Paired]]) -> dict[str, dict[str, Interval]]:
    return {
        name: {label: Interval(x.mean, x.low, x.high) for label, x in found.items()}
        for name, found in series.items()
    }


def _lead_tables(
    part: str, columns: dict[str, Section], kind: str, against: str | None
) -> Iterator[Table]:
    chosen = {name: reference(section, against) for name, section in columns.items()}
    found = {
        name: {} if chosen[name] is None else _leads(section, kind, str(chosen[name]))
        for name, section in columns.items()
    }
    labels = _in_two([section.groups for section in columns.values()])
    labels = [label for label in labels if any(label in leads for leads in found.values())]
    if not labels:
        return
    rows = [
        [Cell(label), *(Cell(_counted(leads.get(label))) for leads in found.values())]
        for label in labels
    ]
    names = dict.fromkeys(str(name) for name in chosen.values() if name is not None)
    header = [c if len(names) == 1 else f"{c}: {chosen[c] or ''}" for c in columns]
    note = (
        "Last accuracy less that of the method, paired over the seeds that both have on the same "
        "data and backbone; in brackets the 95 % interval of Student's t, and the number of pairs."
    )
    moves: list[Paired | None] = []
    if len(columns) == 2 and len(names) == 1:
        before, after = columns.values()
        moves = [_moved(before, after, next(iter(names)), label, kind) for label in labels]
    if any(moves):
        rows = [[*row, Cell(_counted(move))] for row, move in zip(rows, moves, strict=True)]
        header.append("change")
        note += f" Change: the lead with {header[1]} less that with {header[0]}, seed by seed."
    title = f"Side by side{_of(part)}: lead of {' or '.join(names)}, read-out {kind} (points)"
    yield Table(title, ["over", *header], rows, note)


def _moved(before: Section, after: Section, first: str, label: str, kind: str) -> Paired | None:
    """How a lead differs between two columns, over the seeds and class orders of all four."""
    then, now = (
        gain(section.groups.get(first, []), section.groups.get(label, []), kind, "last")
        for section in (before, after)
    )
    return paired(now, then)


def _leads(section: Section, kind: str, first: str) -> dict[str, Paired]:
    ours = section.groups[first]
    found = {k: lead(ours, runs, kind, "last") for k, runs in section.groups.items() if k != first}
    return {label: x for label, x in found.items() if x is not None}


def _parts(sections: Sequence[Section]) -> dict[str, dict[str, Section]]:
    """Sections by part and the name of their column, where two of them share a method."""
    words = [section.base.split(", ") for section in sections]
    alike = takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False))
    common = min(len(list(alike)), *(len(own) - 1 for own in words))
    titled = all(section.part for section in sections)
    found: dict[str, dict[str, Section]] = {}
    for section in sections:
        name = ", ".join(section.base.split(", ")[common:])
        columns = found.setdefault(section.part if titled else "", {})
        earlier = columns[name].groups if name in columns else {}
        columns[name] = section._replace(groups={**earlier, **section.groups})
    return {
        part: columns
        for part, columns in found.items()
        if _in_two([section.groups for section in columns.values()])
    }


def _in_two(columns: Sequence[Iterable[str]]) -> list[str]:
    """What at least two of the columns hold, in its order there."""
    found = [label for column in columns for label in column]
    return [label for label in dict.fromkeys(found) if found.count(label) > 1]


def _readouts(sections: Iterable[Section]) -> list[str]:
    """Read-outs that at least two of the sections have, in their order."""
    kinds = [section.readouts for section in sections]
    return _in_two(kinds) or kinds[0][:1]


def _counted(found: Paired | None) -> str:
    text = lead_text(found)
    return text if found is None else f"{text} ({found.size})"


def _of(part: str) -> str:
    return f" ({part})" if part else ""
