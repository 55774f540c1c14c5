"""A written report: tables, figures, and one HTML page that holds them all.

The page stands alone: it needs no script, no network and no other file.
"""

import re
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from jinja2 import Environment, StrictUndefined

from training.report.figures import Drawing, drawings, side_drawings
from training.report.runs import Inventory, Section, by_section, find_runs, measures, slug
from training.report.tables import (
    Table,
    escape_markdown,
    latex,
    markdown,
    report_tables,
    seeds_text,
    settings_tables,
    side_by_side,
    verdict,
)
from training.run_dir import MANIFEST, read_json, readable, write_json, write_text

MARKDOWN, LATEX, CSV, PAGE = "tables.md", "tables.tex", "runs.csv", "report.html"
FIGURES = "figures"
_ENDINGS = (".png", ".pdf", ".svg")  # the last is on the page
_PIXELS_PER_POINT = 4 / 3


class Report(NamedTuple):
    """Runs, sections and options of a report.

    Attributes
    ----------
    inventory : Inventory
        The finished runs, and what was left out.
    sections : list of Section
        Data and backbones, each with its methods.
    lead_of, baseline : str or None
        Label of the method whose lead is shown, and of the one relative to which accuracies are
        drawn.
    """

    inventory: Inventory
    sections: list[Section]
    lead_of: str | None
    baseline: str | None

    @classmethod
    def over(
        cls,
        sources: Sequence[str | Path],
        *,
        only: Sequence[str] = (),
        lead_of: str | None = None,
        baseline: str | None = None,
    ) -> "Report":
        """Read the runs in folders and bundles, as :func:`find_runs` takes them.

        Parameters
        ----------
        sources
            Folders and bundles.
        only
            Labels of the groups that are reported; by default all.
        lead_of, baseline
            Labels, as in the attributes.

        Raises
        ------
        FileNotFoundError
            If there is no finished run.
        ValueError
            If no group has a given label, or a seed occurs twice in a group.
        """
        inventory = find_runs(sources)
        sections = by_section(inventory.runs)
        for label in only:
            _require_label("only", label, sections)
        if only:
            kept = [id(run) for s in sections for label in only for run in s.groups.get(label, ())]
            inventory = inventory._replace(runs=[r for r in inventory.runs if id(r) in kept])
            # Labels may be shorter now: they say only in what the groups that are left differ.
            sections = by_section(inventory.runs)
        for option, chosen in (("lead-of", lead_of), ("baseline", baseline)):
            if chosen is not None:
                _require_label(option, chosen, sections)
        return cls(inventory, sections, lead_of, baseline)

    def notes(self) -> list[str]:
        """Notes for the top of the report: runs left out or ruined, and paths without runs."""
        _, unfinished, unreadable, others = self.inventory
        # A pattern such as runs/* also matches the logs of a sweep.
        others = [p for p in others if "logs" not in (p.name, p.parent.name)]
        notes = {
            "Unfinished runs, not counted": map(str, unfinished),
            "Unreadable runs, not counted": (f"{p} ({why})" for p, why in unreadable.items()),
            "Paths without a run": (str(path) for path in others if path.suffix != ".json"),
            "Runs with a task whose update was larger than the adapted weights (the learning rate "
            "was probably too high)": self._overgrown(),
        }
        texts = {what: ", ".join(names) for what, names in notes.items()}
        return [f"{what}: {names}." for what, names in texts.items() if names]

    def _overgrown(self) -> list[str]:
        """Labels, and the seeds whose weights some task moved by more than 100 per cent."""
        seeds: dict[str, set[int]] = {}
        groups = [group for section in self.sections for group in section.groups.items()]
        for label, runs in groups:
            if large := {run.seed for run in runs if any(x["update"] > 100 for x in run.costs)}:
                seeds.setdefault(label, set()).update(large)
        return [f"{label} ({seeds_text(sorted(own))})" for label, own in seeds.items()]

    def overview(self) -> list[Table]:
        """Tables over several data sets or backbones."""
        return side_by_side(self.sections, self.lead_of)

    def markdown(self) -> str:
        """All tables as Markdown."""
        parts = [*map(escape_markdown, self.notes()), *map(markdown, self.overview())]
        for section in self.sections:
            texts = f"## {section.title}", *verdict(section, self.lead_of)
            parts += map(escape_markdown, texts)
            parts += map(markdown, report_tables(section, self.lead_of))
        return "\n\n".join(parts) + "\n"

    def latex(self) -> str:
        """All tables as LaTeX floats; they need the package booktabs."""
        tables = self.overview()
        for section in self.sections:
            for table in report_tables(section, self.lead_of):
                tables.append(table._replace(title=f"{section.title}: {table.title}"))
        parts = [r"% In the preamble: \usepackage{booktabs}", *map(latex, tables)]
        return "\n\n".join(parts) + "\n"


def _require_label(option: str, label: str, sections: Sequence[Section]) -> None:
    labels = sections[0].styles
    if label not in labels:
        msg = f"--{option} must be one of {', '.join(labels)}, got {label}"
        raise ValueError(msg)


def write_report(report: Report, out: Path, *, overwrite: bool = False) -> Path:
    """Write tables, ``runs.csv``, ``figures/`` and ``report.html``; returns the page.

    Parameters
    ----------
    report : Report
        What to write.
    out : Path
        A new or empty folder.
    overwrite : bool
        Replace the report that is in the folder, by its manifest; other files stay.

    Raises
    ------
    FileExistsError
        If the folder has content and ``overwrite`` is off, or has files under the names of a
        report that its manifest does not list.
    NotADirectoryError
        If the path is a file.
    OSError
        If the folder of the figures is, or holds, a symbolic link, or a file cannot be written.
    """
    if out.exists() and not out.is_dir():
        msg = f"{out} is a file, not a folder; choose another --out"
        raise NotADirectoryError(msg)
    links = [path for path in (out / FIGURES, *(out / FIGURES).glob("*")) if path.is_symlink()]
    if links:
        msg = f"{links[0]} is a symbolic link, which is never written through: choose another --out"
        raise OSError(msg)
    filled = out.is_dir() and any(out.iterdir())
    if filled and not overwrite:
        msg = f"{out} is not empty: add --overwrite to replace the report in it"
        raise FileExistsError(msg)
    earlier = _earlier(out) if filled else set()
    foreign = {path for path in _reports_files(out) if path not in earlier}
    if foreign:
        shown = ", ".join(sorted(path.relative_to(out).as_posix() for path in foreign)[:8])
        msg = (
            f"{out} has files that no report there wrote, by its {MANIFEST}: move {shown} away, "
            "or choose another --out"
        )
        raise FileExistsError(msg)
    for path in earlier:
        path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    try:
        _write(report, out)
    finally:  # of a report that was cut off, too: another one may then replace what there is
        names = sorted(path.relative_to(out).as_posix() for path in _reports_files(out))
        write_json(out / MANIFEST, {"files": names})
    return out / PAGE


def _write(report: Report, out: Path) -> None:
    """Write the files of a report into a folder, without its manifest."""
    write_text(out / MARKDOWN, report.markdown())
    write_text(out / LATEX, report.latex())
    write_text(out / CSV, measures(report.inventory.runs).to_csv(index=False))
    parts = []
    overview = report.overview()
    if overview:
        drawn = _figures(side_drawings(report.sections, report.lead_of), out / FIGURES)
        parts.append(_Part("side-by-side", "Side by side", [], drawn, overview, []))
    for section in report.sections:
        baseline = report.baseline if report.baseline in section.groups else None
        folder = out / FIGURES / (section.slug if len(report.sections) > 1 else "")
        figures = _figures(drawings(section, lead_of=report.lead_of, baseline=baseline), folder)
        beneath = {table.title for figure in figures for table in figure["tables"]}
        tables = report_tables(section, report.lead_of)
        parts.append(
            _Part(
                section.slug,
                section.title,
                verdict(section, report.lead_of),
                figures,
                [table for table in tables if table.title not in beneath],
                settings_tables(section),
            )
        )
    write_text(out / PAGE, _page(report, parts))


def _reports_files(out: Path) -> Iterator[Path]:
    """The files in a folder that have names of a report's files."""
    for name in (MARKDOWN, LATEX, CSV, PAGE):
        if (out / name).is_file() or (out / name).is_symlink():
            yield out / name
    for pattern in ("*", "*/*"):
        for path in (out / FIGURES).glob(pattern):
            if path.suffix in _ENDINGS:
                yield path


def _earlier(out: Path) -> set[Path]:
    """The files of the report that was written to a folder, as far as they are there."""
    path = out / MANIFEST
    if not path.is_file():
        return set()
    with readable(path):
        names = set(read_json(path)["files"])
    # Only those among the names that a report can have: the file may come from anybody.
    return {path for path in _reports_files(out) if path.relative_to(out).as_posix() in names}


def _figures(drawn: Iterable[Drawing], folder: Path) -> list[dict[str, Any]]:
    """Draw figures into a folder; what the page shows of each."""
    figures: dict[str, dict[str, Any]] = {}
    for drawing in drawn:
        # Names contain labels and read-outs, which may be any text: never a path as they are.
        name = slug(drawing.name)
        while name in figures:  # labels that differ only in punctuation
            name += "-"
        path = drawing.draw([folder / f"{name}{ending}" for ending in _ENDINGS])
        figures[name] = drawing._asdict() | _embedded(path)
    return list(figures.values())


def _embedded(path: Path) -> dict[str, Any]:
    """An SVG file as a data URI, and its size in CSS pixels."""
    content = path.read_bytes()
    size = re.search(rb'viewBox="0 0 ([\d.]+) ([\d.]+)"', content)  # in points
    if size is None:
        msg = f"{path} does not say its size"
        raise ValueError(msg)
    width, height = (round(_PIXELS_PER_POINT * float(length)) for length in size.groups())
    source = f"data:image/svg+xml;base64,{b64encode(content).decode('ascii')}"
    return {"source": source, "width": width, "height": height}


class _Part(NamedTuple):
    """A section of the page: verdict, figures with their tables, other tables, settings."""

    slug: str
    title: str
    verdict: list[str]
    figures: list[dict[str, Any]]
    tables: list[Table]
    settings: list[Table]


def _page(report: Report, parts: Sequence[_Part]) -> str:
    """The page of its sections."""
    runs = [
        {
            "method": label,
            "section": section.base,
            "seed": str(run.seed),
            "analysed": "yes" if run.content["analysis"] else "no",
            "folder": str(run.path),
        }
        for section in report.sections
        for label in section.new_labels
        for run in section.groups[label]
    ]
    methods = len({run.experiment.method.name for run in report.inventory.runs})
    variants = len(report.sections[0].styles)  # a label for each
    count = f"{_plural(len(runs), 'finished run')} of {_plural(methods, 'method')}"
    count += f" in {variants} variants" * (variants > methods)
    text = files("training.report").joinpath("page.html").read_text(encoding="utf-8")
    # Labels are text, never markup.
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.from_string(text).render(
        title="Class-incremental learning: comparison of runs",
        count=f"{count}.",
        notes=report.notes(),
        parts=parts,
        runs=Table("Finished runs", pd.DataFrame(runs).set_index("method")),
    )


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
