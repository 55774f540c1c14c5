"""Finished runs, found below folders and read back."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from training.config import Experiment, read_experiment
from training.files import read_json
from training.metrics import AccuracyMatrix
from training.run_folder import ANALYSIS, CLASSES, CONFIG, ENVIRONMENT, METRICS, SUMMARY


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
    """

    path: Path
    name: str
    experiment: Experiment
    summary: dict[str, Any]
    order: tuple[str, ...]
    weights: str | None

    @cached_property
    def matrices(self) -> dict[str, AccuracyMatrix]:
        """Accuracy matrix by read-out."""
        counts = self.summary["counts"]
        return {kind: AccuracyMatrix.from_dict(record) for kind, record in counts.items()}

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """What was logged at the end of each task."""
        path = self.path / METRICS
        if not path.is_file():
            return []
        try:
            events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except ValueError as error:
            msg = f"cannot read {path} as lines of JSON: {error}"
            raise ValueError(msg) from error
        return [event for event in events if event.get("event") == "task"]

    @cached_property
    def analysis(self) -> dict[str, Any]:
        """Content of ``analysis.json``; empty where the run was not analysed."""
        path = self.path / ANALYSIS
        found: dict[str, Any] = read_json(path) if path.is_file() else {}
        return found


class Found(NamedTuple):
    """Finished runs, and the folders of runs that did not finish."""

    runs: list[Finished]
    unfinished: list[Path]


def find_runs(sources: Sequence[str | Path]) -> Found:
    """Finished runs among folders, each a run or with runs somewhere below it.

    Parameters
    ----------
    sources : sequence of str or Path
        Folders; ``NAME=FOLDER`` names the group. A run in a folder below a given one is named
        after that folder, as ``VARIANT/seedN`` of a sweep; others have no name.

    Raises
    ------
    FileNotFoundError
        If there is no run in a folder, or none that finished.
    ValueError
        If a file of a run cannot be read.
    """
    runs: dict[Path, Finished] = {}
    unfinished: dict[Path, None] = {}
    for source in sources:
        for path, name in _run_folders(source):
            if (path / SUMMARY).is_file():
                runs.setdefault(path.resolve(), read_run(path, name))
            else:
                unfinished[path] = None
    if not runs:
        named = ", ".join(str(path) for path in unfinished)
        msg = f"no run is finished yet: {named} without {SUMMARY}"
        raise FileNotFoundError(msg)
    return Found(list(runs.values()), list(unfinished))


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
    if "counts" not in summary:
        msg = f"{path / SUMMARY} holds no counts of right predictions: it is no summary of a run"
        raise ValueError(msg)
    classes = read_json(path / CLASSES) if (path / CLASSES).is_file() else {}
    environment = read_json(path / ENVIRONMENT) if (path / ENVIRONMENT).is_file() else {}
    backbone = environment.get("backbone", {})
    return Finished(
        path,
        name,
        read_experiment(path / CONFIG),
        summary,
        tuple(classes.get("class_names", ())),
        backbone.get("weights_sha256") or backbone.get("tag"),
    )


def _run_folders(source: str | Path) -> Iterator[tuple[Path, str]]:
    folder, name = Path(source), ""
    if not folder.exists() and "=" in str(source):
        name, _, rest = str(source).partition("=")
        folder = Path(rest)
    if (folder / CONFIG).is_file():
        yield folder, name
        return
    below = sorted(path.parent for path in folder.glob(f"**/{CONFIG}"))
    if not below:
        what = "no folder" if not folder.exists() else "no run in"
        msg = f"{what} {folder}: a run folder holds {CONFIG} and, once finished, {SUMMARY}"
        raise FileNotFoundError(msg)
    for path in below:
        between = path.parent.relative_to(folder).as_posix()
        yield path, name or ("" if between == "." else between)
