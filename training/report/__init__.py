"""Reports over finished runs: tables, figures and one page that holds them all.

The numbers themselves, as a DataFrame::

    from training.report import load

    runs = load("runs/a", "docs/records/caltech101.jsonl")
    runs[runs["primary"]].groupby(["section", "group"])["last"].agg(["mean", "std"])
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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


def __getattr__(name: str) -> Any:
    """Import what is asked for: `loda --help` waits for neither pandas nor jinja2."""
    if name in __all__:
        for module in ("runs", "tables", "figures", "page"):
            value = vars(import_module(f"{__name__}.{module}")).get(name)
            if value is not None:
                return value
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
