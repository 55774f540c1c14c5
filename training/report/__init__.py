"""Reports over finished runs: tables, figures and one page that holds them all."""

from training.report.finished import Finished
from training.report.grouping import Section, by_section
from training.report.pairs import Paired, Spread, paired, spread
from training.report.records import read_records, write_records
from training.report.runs import Found, find_runs, read_run
from training.report.summary import comparison_curves, report_tables
from training.report.tables import Cell, Table, latex, markdown
from training.report.write import Report, write_report

__all__ = [
    "Cell",
    "Finished",
    "Found",
    "Paired",
    "Report",
    "Section",
    "Spread",
    "Table",
    "by_section",
    "comparison_curves",
    "find_runs",
    "latex",
    "markdown",
    "paired",
    "read_records",
    "read_run",
    "report_tables",
    "spread",
    "write_records",
    "write_report",
]
