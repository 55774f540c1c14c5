"""Finished runs, found below folders and read back."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment, read_experiment
from training.files import read_json, understanding
from training.metrics import AccuracyMatrix
from training.run_folder import ANALYSIS, CLASSES, CONFIG, ENVIRONMENT, METRICS, SUMMARY
from training.shapes import (
    ANALYSIS_SHAPE,
    CLASSES_SHAPE,
    ENVIRONMENT_SHAPE,
    EVENT_SHAPE,
    SUMMARY_SHAPE,
    read_shaped,
    require_shape,
)
from training.sweeps.groups import read_groups


@dataclass(frozen=True)
class Finished:
    """A finished run: its settings and what it measured.

    Parameters
    ----------
    path : Path
        The run folder.
    name : str
        What the user calls the group that the run belongs to; may be empty.
    experiment : Experiment
        Its settings.
    summary : dict
        Content of ``summary.json``.
    order : tuple of str
        Names of the classes in the order of learning; empty if the run does not say.
    weights : str or None
        Hash of the backbone's weights, or the exact name of those that were downloaded.
    images : tuple of int
        Training images of each task; empty if the run does not say.
    groups : mapping of str to sequence of str
        The groups of the sweep that the run is one of: titles, and variants by name.
    """

    path: Path
    name: str
    experiment: Experiment
    summary: dict[str, Any]
    order: tuple[str, ...]
    weights: str | None
    images: tuple[int, ...] = ()
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def places(self) -> dict[str, int]:
        """Titles of the groups that the run belongs to, and its place in each."""
        variant = _variant(self.path)
        return {
            t: list(names).index(variant) for t, names in self.groups.items() if variant in names
        }

    @cached_property
    def matrices(self) -> dict[str, AccuracyMatrix]:
        """Accuracy matrix by read-out; heads that never trained are not one, unless asked for."""
        counts, primary = self.summary["counts"], self.experiment.head.readout
        if self.experiment.train.epochs == 0 and primary != "heads":
            counts = {kind: record for kind, record in counts.items() if kind != "heads"}
        with understanding(self.path / SUMMARY):
            return {kind: AccuracyMatrix.from_dict(record) for kind, record in counts.items()}

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """What was logged at the end of each task."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        try:
            events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (ValueError, RecursionError) as error:
            msg = f"cannot read {path} as lines of JSON: {error}"
            raise ValueError(msg) from error
        tasks = [e for e in events if isinstance(e, dict) and e.get("event") == "task"]
        require_shape(tasks, [EVENT_SHAPE], str(path))
        numbers = [event["task"] for event in tasks if "task" in event]
        again = sorted({number for number in numbers if numbers.count(number) > 1})
        if again:
            msg = (
                f"{path} logs the end of {'tasks' if len(again) > 1 else 'task'} "
                f"{', '.join(str(number + 1) for number in again)} more than once: two runs wrote "
                "to it, or it was edited; train the run again, or leave it out"
            )
            raise ValueError(msg)
        return tasks

    @cached_property
    def analysis(self) -> dict[str, Any]:
        """Content of ``analysis.json``; empty where the run was not analysed."""
        path = self.path / ANALYSIS
        found: dict[str, Any] = read_shaped(path, ANALYSIS_SHAPE) if path.is_file() else {}
        for task in found.get("losses") or []:
            curves = [task[among][age] for among in ("own", "seen") for age in ("old", "new")]
            if {len(task["step"])} != {len(curve) for curve in curves} or not task["step"]:
                msg = f"{path}: losses of task {task['task']} are not one for each step"
                raise ValueError(msg)
        return found


class Found(NamedTuple):
    """Finished runs, the folders of runs that did not finish, and what holds no run."""

    runs: list[Finished]
    unfinished: list[Path]
    others: list[Path]


def find_runs(sources: Sequence[str | Path]) -> Found:
    """Finished runs among folders, each a run or with runs somewhere below it.

    Parameters
    ----------
    sources : sequence of str or Path
        Folders; ``NAME=FOLDER`` names the group. A run in a folder below a given one is named
        after that folder, and one in ``VARIANT/seedN``, as a sweep puts it, after the variant,
        whether the sweep, its variants or its runs are given; others have no name. What is there
        but holds no run (the logs of a sweep, say) is passed over beside folders that do.

    Raises
    ------
    FileNotFoundError
        If a source is not there, or there is no run, or none that finished.
    ValueError
        If a file of a run cannot be read.
    """
    runs: dict[Path, Finished] = {}
    unfinished: dict[Path, None] = {}
    others = []
    for source in sources:
        below = list(_run_folders(source))
        if not below:
            others.append(Path(source))
        for path, name in below:
            if (path / SUMMARY).is_file():
                runs.setdefault(path.resolve(), read_run(path, name))
            else:
                unfinished[path] = None
    if not runs and not unfinished:
        named = ", ".join(map(str, others))
        msg = f"no run in {named}: a run folder holds {CONFIG} and, once finished, {SUMMARY}"
        raise FileNotFoundError(msg)
    if not runs:
        named = ", ".join(str(path) for path in unfinished)
        msg = f"no run is finished yet: {named} without {SUMMARY}"
        raise FileNotFoundError(msg)
    return Found(list(runs.values()), list(unfinished), others)


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
    summary = read_json(path / SUMMARY)
    if not isinstance(summary, dict) or not summary.get("counts"):
        msg = f"{path / SUMMARY} holds no counts of right predictions: it is no summary of a run"
        raise ValueError(msg)
    require_shape(summary, SUMMARY_SHAPE, str(path / SUMMARY))
    classes, environment = (
        read_shaped(path / name, shape) if (path / name).is_file() else {}
        for name, shape in ((CLASSES, CLASSES_SHAPE), (ENVIRONMENT, ENVIRONMENT_SHAPE))
    )
    backbone = environment.get("backbone", {})
    return Finished(
        path,
        name,
        read_experiment(path / CONFIG),
        summary,
        tuple(classes.get("class_names", ())),
        backbone.get("weights_sha256") or backbone.get("tag"),
        tuple(classes.get("images", ())),
        # Only a sweep puts its runs so deep; elsewhere a file of that name is somebody else's.
        read_groups(path.absolute().parent.parent) if _variant(path) else {},
    )


def _run_folders(source: str | Path) -> Iterator[tuple[Path, str]]:
    folder, name = Path(source), ""
    if not folder.exists() and "=" in str(source):
        name, _, rest = str(source).partition("=")
        folder = Path(rest)
    if not folder.exists():
        msg = f"no folder {folder}: a run folder holds {CONFIG} and, once finished, {SUMMARY}"
        raise FileNotFoundError(msg)
    if (folder / CONFIG).is_file():
        yield folder, name or _variant(folder)
        return
    for path in sorted(found.parent for found in folder.glob(f"**/{CONFIG}")):
        between = path.parent.relative_to(folder).as_posix()
        yield path, name or (_variant(path) if between == "." else between)


def _variant(path: Path) -> str:
    """Name of the variant whose run lies in a folder, if the folder is called as in a sweep."""
    return path.absolute().parent.name if re.fullmatch(r"seed\d+", path.name) else ""
