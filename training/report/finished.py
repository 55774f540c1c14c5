"""A finished run as reports see it, from whatever holds its content."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment
from training.metrics import AccuracyMatrix
from training.run_dir import ANALYSIS, CLASSES, ENVIRONMENT, METRICS, SUMMARY, readable
from training.shapes import (
    ANALYSIS_SHAPE,
    CLASSES_SHAPE,
    ENVIRONMENT_SHAPE,
    EVENT_SHAPE,
    SUMMARY_SHAPE,
    require_shape,
)


class Content(NamedTuple):
    """What was read of a run; the shapes of :mod:`training.shapes` are not checked yet.

    Attributes
    ----------
    experiment : Experiment
        Its settings.
    summary, classes, environment, analysis : dict
        Of the JSON files; empty for a file that is not there.
    log : list
        The events that end tasks.
    """

    experiment: Experiment
    summary: Any
    classes: Any
    environment: Any
    log: Any
    analysis: Any


@dataclass(frozen=True)
class Finished:
    """A finished run: its settings and what it measured.

    Parameters
    ----------
    path : Path
        The run folder, or the place in a file of records.
    name : str
        What the user calls the group that the run belongs to; may be empty.
    content : Content
        What was read of it, of the right shapes.
    groups : mapping of str to sequence of str
        The groups of the sweep that the run is one of: titles, and variants by name.
    """

    path: Path
    name: str
    content: Content
    groups: Mapping[str, Sequence[str]]

    @property
    def experiment(self) -> Experiment:
        """Its settings."""
        return self.content.experiment

    @property
    def summary(self) -> dict[str, Any]:
        """Content of ``summary.json``."""
        found: dict[str, Any] = self.content.summary
        return found

    @property
    def log(self) -> list[dict[str, Any]]:
        """What was logged at the end of each task."""
        found: list[dict[str, Any]] = self.content.log
        return found

    @property
    def analysis(self) -> dict[str, Any]:
        """Content of ``analysis.json``; empty where the run was not analysed."""
        found: dict[str, Any] = self.content.analysis
        return found

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the classes in the order of learning; empty if the run does not say."""
        return tuple(self.content.classes.get("class_names", ()))

    @property
    def images(self) -> tuple[int, ...]:
        """Training images of each task; empty if the run does not say."""
        return tuple(self.content.classes.get("images", ()))

    @property
    def weights(self) -> str | None:
        """Hash of the backbone's weights, or the exact name of those that were downloaded."""
        backbone = self.content.environment.get("backbone", {})
        found: str | None = backbone.get("weights_sha256") or backbone.get("tag")
        return found

    @property
    def places(self) -> dict[str, int]:
        """Titles of the groups that the run belongs to, and its place in each."""
        variant = variant_of(self.path)
        return {
            t: list(names).index(variant) for t, names in self.groups.items() if variant in names
        }

    @cached_property
    def matrices(self) -> dict[str, AccuracyMatrix]:
        """Accuracy matrix by read-out; heads that never trained are not one, unless asked for."""
        counts, primary = self.summary["counts"], self.experiment.head.readout
        if self.experiment.train.epochs == 0 and primary != "heads":
            counts = {kind: record for kind, record in counts.items() if kind != "heads"}
        with readable(self.path / SUMMARY):
            return {kind: AccuracyMatrix.from_dict(record) for kind, record in counts.items()}


def assemble(
    path: Path, name: str, content: Content, groups: Mapping[str, Sequence[str]]
) -> Finished:
    """A finished run from what was read of it.

    Raises
    ------
    ValueError
        If something has not the shape of what a run writes; the message names the file.
    """
    summary = content.summary
    if not isinstance(summary, dict) or not summary.get("counts"):
        msg = f"{path / SUMMARY} holds no counts of right predictions: it is no summary of a run"
        raise ValueError(msg)
    for value, shape, file in (
        (summary, SUMMARY_SHAPE, SUMMARY),
        (content.classes, {} if content.classes == {} else CLASSES_SHAPE, CLASSES),
        (content.environment, ENVIRONMENT_SHAPE, ENVIRONMENT),
        (content.log, [EVENT_SHAPE], METRICS),
        (content.analysis, ANALYSIS_SHAPE, ANALYSIS),
    ):
        require_shape(value, shape, str(path / file))
    _check_log(content.log, path / METRICS)
    _check_analysis(content.analysis, path / ANALYSIS)
    return Finished(path, name, content, groups)


def variant_of(path: Path) -> str:
    """Name of the variant whose run lies in a folder, if the folder is called as in a sweep."""
    return path.absolute().parent.name if re.fullmatch(r"seed\d+", path.name) else ""


def _check_log(events: Sequence[dict[str, Any]], path: Path) -> None:
    numbers = [event["task"] for event in events if "task" in event]
    again = sorted({number for number in numbers if numbers.count(number) > 1})
    if again:
        msg = (
            f"{path} logs the end of {'tasks' if len(again) > 1 else 'task'} "
            f"{', '.join(str(number + 1) for number in again)} more than once: two runs wrote "
            "to it, or it was edited; train the run again, or leave it out"
        )
        raise ValueError(msg)


def _check_analysis(found: dict[str, Any], path: Path) -> None:
    for task in found.get("losses") or []:
        curves = [task[among][age] for among in ("own", "seen") for age in ("old", "new")]
        if {len(task["step"])} != {len(curve) for curve in curves} or not task["step"]:
            msg = f"{path}: losses of task {task['task']} are not one for each step"
            raise ValueError(msg)
