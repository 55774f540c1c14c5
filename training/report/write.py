"""Writing a report: tables, figures, and the page that holds them all."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from training.report.drawings import Drawing, drawings
from training.report.grouping import Section, by_section
from training.report.page import Figure, Part, embed, page
from training.report.runs import Found, find_runs
from training.report.side import lead_drawing, side_by_side, side_drawings
from training.report.summary import report_tables
from training.report.tables import Cell, Table, latex, markdown
from training.run_dir import write_text

MARKDOWN, LATEX, PAGE, FIGURES = "tables.md", "tables.tex", "report.html", "figures"
_ENDINGS = (".png", ".svg")
_TITLE = "Class-incremental learning: comparison of runs"


class Report(NamedTuple):
    """What a report is made of.

    Attributes
    ----------
    sections : list of Section
        Data and backbones, each with its methods.
    unfinished : list of Path
        Runs that are named but not counted.
    unreadable : dict of Path to str
        Those that cannot be read, and why; named too.
    others : list of Path
        What was given and holds no run.
    against, baseline : str or None
        Whose lead is given, and relative to whom accuracies are drawn.
    """

    sections: list[Section]
    unfinished: list[Path]
    unreadable: dict[Path, str]
    others: list[Path]
    against: str | None
    baseline: str | None

    @classmethod
    def over(
        cls,
        sources: Sequence[str | Path],
        *,
        against: str | None = None,
        baseline: str | None = None,
    ) -> "Report":
        """Read the runs below folders, as :func:`find_runs` takes them.

        Raises
        ------
        FileNotFoundError
            If there is no finished run.
        ValueError
            If a label is that of no group, or a seed occurs twice in one.
        """
        found: Found = find_runs(sources)
        sections = by_section(found.runs)
        labels = sections[0].labels
        for option, label in (("against", against), ("baseline", baseline)):
            if label is not None and label not in labels:
                msg = f"--{option} {label}: no such method among {', '.join(labels)}"
                raise ValueError(msg)
        return cls(sections, found.unfinished, found.unreadable, found.others, against, baseline)

    def notes(self) -> list[str]:
        """What the reader should know first."""
        # What a sweep puts beside its runs is met wherever runs are given by a pattern.
        strange = [p for p in self.others if "logs" not in (p.name, p.parent.name)]
        unreadable = [f"{path} ({why})" for path, why in self.unreadable.items()]
        found = {
            "Unfinished runs, not counted": [str(path) for path in self.unfinished],
            "Unreadable runs, not counted": unreadable,
            "No run is in": [str(path) for path in strange if path.suffix != ".json"],
        }
        return [f"{what}: {', '.join(named)}." for what, named in found.items() if named]

    def overview(self) -> list[Table]:
        """Tables over several data sets or backbones."""
        return side_by_side(self.sections, self.against)

    def markdown(self) -> str:
        """All tables as Markdown."""
        parts = self.notes()
        parts += [markdown(table) for table in self.overview()]
        for section in self.sections:
            parts.append(f"## {section.title}")
            parts += [markdown(table) for table in report_tables(section, self.against)]
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """All tables as LaTeX floats; they need the package booktabs."""
        parts = [r"% In the preamble: \usepackage{booktabs}"]
        parts += [latex(table) for table in self.overview()]
        for section in self.sections:
            for table in report_tables(section, self.against):
                parts.append(latex(table._replace(title=f"{section.title}: {table.title}")))
        return "\n\n".join(parts) + "\n"


def write_report(report: Report, out: Path, *, overwrite: bool = False) -> Path:
    """Write ``tables.md``, ``tables.tex``, ``figures/`` and ``report.html``; returns the page.

    Parameters
    ----------
    report : Report
        What to write.
    out : Path
        A new or empty folder.
    overwrite : bool
        Replace the report that is in the folder; other files stay.

    Raises
    ------
    FileExistsError
        If the folder has content and ``overwrite`` is off.
    NotADirectoryError
        If the path is a file.
    """
    if out.exists() and not out.is_dir():
        msg = f"{out} is a file; give a folder"
        raise NotADirectoryError(msg)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            msg = f"{out} is not empty, and nothing is overwritten unasked: add --overwrite"
            raise FileExistsError(msg)
        _remove_report(out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / MARKDOWN, report.markdown())
    write_text(out / LATEX, report.latex())
    overview = Part(
        "side-by-side",
        "Side by side",
        report.overview(),
        _figures(side_drawings(report.sections, report.against), out / FIGURES),
    )
    parts = [_part(report, section, out) for section in report.sections]
    runs = _runs(report.sections)
    methods = _plural(len(report.sections[0].labels), "method")
    text = page(
        _TITLE,
        f"{_plural(len(runs.rows), 'finished run')} of {methods}.",
        report.notes(),
        [*([overview] if overview.tables else []), *parts],
        runs,
    )
    write_text(out / PAGE, text)
    return out / PAGE


def _part(report: Report, section: Section, out: Path) -> Part:
    folder = out / FIGURES
    if len(report.sections) > 1:
        folder /= section.slug
    baseline = report.baseline if report.baseline in section.groups else None
    drawn = [
        *lead_drawing(section, report.against),
        *drawings(section, against=report.against, baseline=baseline),
    ]
    tables = report_tables(section, report.against)
    return Part(section.slug, section.title, tables, _figures(drawn, folder))


def _figures(drawn: Iterable[Drawing], folder: Path) -> list[Figure]:
    figures: dict[str, Figure] = {}
    for drawing in drawn:
        name = drawing.name
        while name in figures:  # labels that differ in punctuation alone
            name += "-"
        for ending in _ENDINGS:
            path = drawing.draw(folder / f"{name}{ending}")
        found = embed(path, drawing.title, drawing.caption, drawing.alt)
        figures[name] = found._replace(folded=drawing.folded)
    return list(figures.values())


def _runs(sections: Sequence[Section]) -> Table:
    rows = [
        [
            Cell(label),
            Cell(section.base),
            Cell(str(run.experiment.seed)),
            Cell("yes" if run.analysis else "no"),
            Cell(str(run.path)),
        ]
        for section in sections
        for label in section.fresh
        for run in section.groups[label]
    ]
    return Table("Finished runs", ["method", "section", "seed", "analysed", "folder"], rows)


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _remove_report(out: Path) -> None:
    for name in (MARKDOWN, LATEX, PAGE):
        (out / name).unlink(missing_ok=True)
    for ending in _ENDINGS:
        for stale in (out / FIGURES).rglob(f"*{ending}"):
            stale.unlink()
