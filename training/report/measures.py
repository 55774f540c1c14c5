"""What is measured of runs, compared seed by seed, and how numbers are written."""

from collections.abc import Hashable, Sequence
from statistics import fmean

from training.report.finished import Finished
from training.report.grouping import Section, tasks_of
from training.report.pairs import Paired, paired, spread

DASH = "–"
METRICS = ("last", "average", "forgetting", "task given")
LOWER_IS_BETTER = ("forgetting",)


def reference(section: Section, against: str | None) -> str | None:
    """Label of the method whose lead is given; None where the section lacks the named one."""
    if against is not None:
        return against if against in section.groups else None
    return "loda" if "loda" in section.groups else next(iter(section.groups))


def metric(run: Finished, kind: str, name: str) -> float | None:
    """A metric as a share; None where a run cannot have it.

    A run of one task, as of a method that learns all tasks at once, has the last accuracy alone:
    where the task is given, that is the same number.
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


def lead(
    ours: Sequence[Finished], theirs: Sequence[Finished], kind: str, name: str
) -> Paired | None:
    """A metric of some runs minus that of others, over the seeds and class orders of both."""
    return paired(measured(ours, kind, name), measured(theirs, kind, name))


def gain(
    ours: Sequence[Finished], theirs: Sequence[Finished], kind: str, name: str
) -> dict[Hashable, float]:
    """A metric of some runs minus that of others, for each seed and class order of both."""
    own, other = measured(ours, kind, name), measured(theirs, kind, name)
    return {key: value - other[key] for key, value in own.items() if key in other}


def lead_text(found: Paired | None) -> str:
    """A lead with its interval.

    Examples
    --------
    >>> lead_text(Paired(1.5, -4.853, 7.853, 2))
    '+1.50 [−4.85, +7.85]'
    """
    if found is None:
        return DASH
    if found.low is None or found.high is None:
        return signed(found.mean)
    return f"{signed(found.mean)} [{signed(found.low)}, {signed(found.high)}]"


def spread_text(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if not values:
        return DASH
    found = spread(values)
    centre = shown(found.mean)
    return centre if found.deviation is None else f"{centre} ± {found.deviation:.2f}"


def mean_text(values: Sequence[float], digits: int) -> str:
    """Mean with so many digits, thousands apart."""
    return f"{fmean(values):,.{digits}f}" if values else DASH


def shown(value: float) -> str:
    """A number with two digits."""
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")  # + 0.0: no minus before a zero


def signed(value: float) -> str:
    """The same with its sign."""
    return f"{round(value, 2) + 0.0:+.2f}".replace("-", "−")
