"""Finished runs, found below folders and in files of records, and read back."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from training.config import read_experiment
from training.report.finished import Content, Finished, assemble, variant_of
from training.report.records import is_records, read_records
from training.run_dir import ANALYSIS, CLASSES, CONFIG, ENVIRONMENT, METRICS, SUMMARY, read_json
from training.sweeps.groups import read_groups


class Found(NamedTuple):
    """What was found below folders.

    Attributes
    ----------
    runs : list of Finished
        Finished runs.
    unfinished : list of Path
        Folders of runs that did not finish.
    unreadable : dict of Path to str
        Folders of finished runs that cannot be read, and why: damaged, or of a method or version
        that is not here.
    others : list of Path
        What holds no run.
    """

    runs: list[Finished]
    unfinished: list[Path]
    unreadable: dict[Path, str]
    others: list[Path]


def find_runs(sources: Sequence[str | Path]) -> Found:
    """Finished runs among folders and files of records.

    Parameters
    ----------
    sources : sequence of str or Path
        Folders, each a run or with runs somewhere below, or files that ``loda export`` wrote;
        ``NAME=SOURCE`` names the group. A run in a folder below a given one is named
        after that folder, and one in ``VARIANT/seedN``, as a sweep puts it, after the variant,
        whether the sweep, its variants or its runs are given; others have no name. What is there
        but holds no run (the logs of a sweep, say) is passed over beside folders that do.

    Raises
    ------
    FileNotFoundError
        If a source is not there, or there is no run, or none that finished.
    ValueError
        If a file of records cannot be read, or none of the runs.
    """
    runs: dict[Path, Finished] = {}
    unreadable: dict[Path, str] = {}
    unfinished: dict[Path, None] = {}
    others = []
    for source in sources:
        place, name = _named(source)
        if is_records(place):
            for run in read_records(place, name):
                runs.setdefault(run.path.absolute(), run)
            continue
        below = list(_run_folders(place, name))
        if not below:
            others.append(place)
        for path, name in below:
            if (path / SUMMARY).is_file():
                try:
                    runs.setdefault(path.resolve(), read_run(path, name))
                except ValueError as error:
                    unreadable[path] = str(error)
            else:
                unfinished[path] = None
    if not runs and unreadable:
        raise ValueError(next(iter(unreadable.values())))
    if not runs and not unfinished:
        named = ", ".join(map(str, others))
        msg = (
            f"no run in {named}: a run folder holds {CONFIG} and, once finished, {SUMMARY}; files "
            "are those of loda export"
        )
        raise FileNotFoundError(msg)
    if not runs:
        named = ", ".join(str(path) for path in unfinished)
        msg = f"no run is finished yet: {named} without {SUMMARY}"
        raise FileNotFoundError(msg)
    return Found(list(runs.values()), list(unfinished), unreadable, others)


def read_run(path: Path, name: str = "") -> Finished:
    """Read a run folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If its summary is not that of a run.
    """
    missing = [file for file in (CONFIG, SUMMARY) if not (path / file).is_file()]
    if missing:
        msg = f"{path} holds no finished run: {', '.join(missing)} not there"
        raise FileNotFoundError(msg)
    classes, environment, analysis = (
        read_json(path / file) if (path / file).is_file() else {}
        for file in (CLASSES, ENVIRONMENT, ANALYSIS)
    )
    content = Content(
        read_experiment(path / CONFIG),
        read_json(path / SUMMARY),
        classes,
        environment,
        _task_events(path / METRICS),
        analysis,
    )
    # Only a sweep puts its runs so deep; elsewhere a file of that name is somebody else's.
    groups = read_groups(path.absolute().parent.parent) if variant_of(path) else {}
    return assemble(path, name, content, groups)


def _task_events(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    try:
        events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, RecursionError) as error:
        msg = f"cannot read {path} as lines of JSON: {error}"
        raise ValueError(msg) from error
    return [event for event in events if isinstance(event, dict) and event.get("event") == "task"]


def _named(source: str | Path) -> tuple[Path, str]:
    """Where to look, and the name that was given."""
    place, name = Path(source), ""
    if not place.exists() and "=" in str(source):
        name, _, rest = str(source).partition("=")
        place = Path(rest)
    if not place.exists():
        msg = (
            f"no folder or file {place}: a run folder holds {CONFIG} and, once finished, {SUMMARY}"
        )
        raise FileNotFoundError(msg)
    return place, name


def _run_folders(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    if (folder / CONFIG).is_file():
        yield folder, name or variant_of(folder)
        return
    for path in sorted(found.parent for found in folder.glob(f"**/{CONFIG}")):
        between = path.parent.relative_to(folder).as_posix()
        yield path, name or (variant_of(path) if between == "." else between)
