"""What a report says of run folders: sections, tables, and the text of their cells."""

from pathlib import Path

from training.config import MethodConfig
from training.report import Section, Table, by_section, find_runs, report_tables

FROZEN = MethodConfig("frozen")


def sections(*sources: Path | str) -> list[Section]:
    return by_section(find_runs(sources).runs)


def table(section: Section, title: str, against: str | None = None) -> Table:
    (found,) = [t for t in report_tables(section, against) if t.title.startswith(title)]
    return found


def texts(found: Table) -> list[list[str]]:
    return [[cell.text for cell in row] for row in found.rows]
