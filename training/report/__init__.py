"""Reports over finished runs: tables, figures and one page that holds them all.

The numbers themselves, as a DataFrame::

    from training.report import load

    runs = load("runs/a", "docs/records/caltech101.jsonl")
    runs[runs["primary"]].groupby(["section", "group"])["last"].agg(["mean", "std"])
"""

from typing import TYPE_CHECKING

from backends.lazy import load_on_use

if TYPE_CHECKING:
    from training.report.figures import comparison_figure
    from training.report.page import Report, write_report
    from training.report.runs import find_runs, load, load_tasks, write_bundle
    from training.report.tables import Table, differences, intervals, latex, leads, markdown

__all__ = [
    "Report",
    "Table",
    "comparison_figure",
    "differences",
    "find_runs",
    "intervals",
    "latex",
    "leads",
    "load",
    "load_tasks",
    "markdown",
    "write_bundle",
    "write_report",
]

__getattr__, __dir__ = load_on_use(__name__, __all__, ["runs", "tables", "figures", "page"])
