"""Finished runs, read from run folders and bundles, as tables of numbers in pandas.

A *bundle* is one text file with what a report needs of many runs; it omits weights, curves within
tasks and paths of the machine. Its first line says what the file is, and each further line holds
one run as JSON.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, product
from math import isfinite, nan
from pathlib import Path
from re import fullmatch
from statistics import fmean
from typing import Any, NamedTuple

import pandas as pd

from training.config import (
    NEUTRAL,
    READOUTS,
    Experiment,
    experiment_from,
    experiment_values,
    flat_settings,
    read_experiment,
)
from training.methods import steps_a_batch
from training.metrics import AccuracyMatrix
from training.run_dir import (
    ANALYSIS,
    CLASSES,
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SUMMARY,
    is_finished,
    read_json,
    readable,
    require_new,
    write_text,
)
from training.sweep import read_groups

OTHERS = "others"
"""Title of the section of variants that the sweep file puts in no group."""

_BUNDLE, _VERSION = "loda bundle", 2
_LONGEST_HEADER = 200

# What a report takes from the files of a run, and a bundle holds.
_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "summary": (SUMMARY, ("counts", "task_given", "stored_bytes", "trainable_parameters")),
    "classes": (CLASSES, ("class_names", "order", "tasks", "images")),
    "environment": (ENVIRONMENT, ("backbone", "packages")),
    "analysis": (ANALYSIS, ("subspaces", "losses")),
}
_EVENT, _UPDATE = ("task", "seconds", "memory"), ("relative", "changed")

# Settings that tell runs of one experiment apart without making them different experiments.
_NOT_COMPARED = ("seed", "out", "threads", "device", "keep", "tracker")

# Runs that differ in these cannot be compared: they use other images, tasks or networks. So do runs
# that differ in options of the data set or backbone, except options that only name a location.
_STREAM = (
    *("classes", "init_cls", "increment", "task_sizes", "tasks", "extension_tasks"),
    *("validation", "image_size"),
)
_PLACES = ("data.root", "data.dataset", "data.download", "backbone.weights")

# Methods in the order in which a report shows them, with their styles in figures. The first is what
# this package is for: it has the strongest one.
_STYLES = {
    "loda": 0, "inflora": 1, "sd_lora": 3, "o_lora": 4, "null_lora": 5, "seq_lora": 2,
    "first_task": 15, "frozen": 7, "ncm": 14, "ranpac_frozen": 13, "joint": 6,
}  # fmt: skip

_TIMES, _MEMORY = ("seconds", "training_seconds"), ("memory_mib", "gpu_memory_mib")
_MOVED = ("update", "changed")
_ENERGIES = ("ratio", "new_energy", "old_energy", "new_magnitude", "old_magnitude")


@dataclass(frozen=True)
class Run:
    """A finished run: its settings and what it measured.

    Attributes
    ----------
    path : Path
        The run folder, or a place in a bundle.
    name : str
        Name that the user gave to the run's group; may be empty.
    sweep_groups : dict of str to list of str
        Groups of its sweep file: variants by title.
    experiment : Experiment
        Its settings.
    content : dict
        What a report takes from its files, as JSON holds it.
    """

    path: Path
    name: str
    sweep_groups: dict[str, list[str]]
    experiment: Experiment
    content: dict[str, Any]

    def check(self) -> None:
        """Read everything once that a report needs, so that malformed files fail here.

        A run may come from anybody.

        Raises
        ------
        ValueError
            If something is not what a run writes; the message names the file.
        """
        for file, read in (
            (SUMMARY, lambda: (self.matrices, self.kept)),
            (CLASSES, lambda: (self.order_hash, self.compute)),
            (ENVIRONMENT, lambda: self.weights),
            (METRICS, lambda: self.costs),
            (ANALYSIS, lambda: (self.energies, self.losses)),
            # Last: the rows also hold what the other files say.
            (SUMMARY, lambda: [*self.readout_rows()]),
        ):
            with readable(self.path / file):
                read()

    @property
    def seed(self) -> int:
        """Seed of the class order and of the training."""
        return self.experiment.seed

    @cached_property
    def matrices(self) -> dict[str, AccuracyMatrix]:
        """Accuracies by read-out; untrained heads are left out unless they are the primary one."""
        counts, head = self.content["summary"]["counts"], self.experiment.head
        # Without an epoch the heads are untrained.
        if self.experiment.train.epochs == 0 and head.readout != "heads":
            counts = {kind: record for kind, record in counts.items() if kind != "heads"}
        matrices = {kind: AccuracyMatrix.from_dict(record) for kind, record in counts.items()}
        if not all(map(len, matrices.values())) or not matrices:
            msg = "it has no counts of correct predictions"
            raise ValueError(msg)
        return matrices

    @property
    def readout(self) -> str:
        """Its primary read-out."""
        kind = self.experiment.head.readout
        # A third-party read-out is listed under its name, not its import path; the primary one is
        # listed first.
        return kind if kind in self.matrices else next(iter(self.matrices))

    @property
    def matrix(self) -> AccuracyMatrix:
        """Accuracies of its primary read-out."""
        return self.matrices[self.readout]

    @property
    def tasks(self) -> int:
        """Number of tasks that it learned; one for a method that learns all at once."""
        return len(self.matrix)

    @cached_property
    def order_hash(self) -> str:
        """Short hash of the class names in the order of learning; empty if the run does not say."""
        names = self.content["classes"].get("class_names")
        return hashlib.sha256("\n".join(names).encode()).hexdigest()[:8] if names else ""

    @cached_property
    def weights(self) -> str | None:
        """Hash of the backbone's weights, or the exact name of those that were downloaded."""
        backbone = self.content["environment"].get("backbone", {})
        weights: str | None = backbone.get("weights_sha256") or backbone.get("tag")
        return weights

    @cached_property
    def kept(self) -> dict[str, float]:
        """Largest number of trained parameters in any task, and bytes carried between tasks."""
        summary = self.content["summary"]
        trained = max(map(_number, summary.get("trainable_parameters") or [0]))
        stored = {k: _number(size) for k, size in (summary.get("stored_bytes") or {}).items()}
        return {
            # The heads count as trained only where there were epochs.
            "trained_parameters": trained if self.experiment.train.epochs else 0,
            "method_bytes": stored.get("method", 0) if stored else nan,
            "readout_bytes": sum(v for k, v in stored.items() if k != "method") if stored else nan,
        }

    @cached_property
    def compute(self) -> dict[str, float]:
        """Optimiser steps, and forward-backward passes of images through the model.

        They are computed from the settings and the numbers of images. A mini-batch of a single
        class takes one step where others take two; this is not taken into account.
        """
        train, images = self.experiment.train, self.content["classes"].get("images")
        each = steps_a_batch(self.experiment.method)
        if not images or each is None:
            return {"steps": nan, "image_passes": nan}
        passes = train.epochs * each
        batches = sum(-(-count // train.batch_size) for count in images)
        return {"steps": _number(passes * batches), "image_passes": _number(passes * sum(images))}

    @cached_property
    def costs(self) -> list[dict[str, float]]:
        """Seconds, memory in MiB and update in per cent of each task; NaN where not logged."""
        numbers = [event["task"] for event in self.content["log"]]
        twice = next((task for task in numbers if numbers.count(task) > 1), None)
        if twice is not None:
            msg = (
                f"the end of task {twice} is logged more than once: two runs wrote to the file, or "
                "it was edited; train the run again, or leave it out"
            )
            raise ValueError(msg)
        events = dict(zip(numbers, self.content["log"], strict=True))
        if not events.keys() <= set(range(1, self.tasks + 1)):
            msg = f"it logs tasks {sorted(events)}, but the run has tasks 1 to {self.tasks}"
            raise ValueError(msg)
        rows = []
        for event in (events.get(task, {}) for task in range(1, self.tasks + 1)):
            seconds = {part: _number(x) for part, x in event.get("seconds", {}).items()}
            memory = {kind: _number(x) / 2**20 for kind, x in event.get("memory", {}).items()}
            update = {name: 100 * _number(x) for name, x in event.get("update", {}).items()}
            rows.append(
                {
                    "seconds": sum(seconds.values()) if seconds else nan,
                    "training_seconds": seconds.get("load", nan) + seconds.get("train", nan),
                    "memory_mib": memory.get("process", nan),
                    "gpu_memory_mib": memory.get("device", nan),
                    "update": update.get("relative", nan),
                    "changed": update.get("changed", nan),
                }
            )
        return rows

    @cached_property
    def energies(self) -> list[dict[str, Any]]:
        """Subspace analysis: one row per task, layer and subspace; NaN where there is no ratio."""
        return [
            {"layer": layer, "subspace": name, **{key: _number(measured[key]) for key in _ENERGIES}}
            for task in self.content["analysis"].get("subspaces") or []
            for layer, subspaces in task["layers"].items()
            for name, measured in subspaces.items()
        ]

    @cached_property
    def losses(self) -> list[dict[str, Any]]:
        """Loss analysis: one row per task, set of candidate classes and age of the images.

        Candidates are the ``own`` or ``seen`` classes, the age is ``old`` or ``new``. ``steps`` and
        ``losses`` are the curve; ``marks`` holds position and loss of the marked models.
        """
        rows = []
        for task in self.content["analysis"].get("losses") or []:
            steps = [_number(step) for step in task["step"]]
            for among, age in product(("own", "seen"), ("old", "new")):
                losses = [_number(loss) for loss in task[among][age]]
                if len(losses) != len(steps) or not steps:
                    msg = f"task {task['task']} must have one loss for each step"
                    raise ValueError(msg)
                marks = {
                    name: (_number(mark["step"]), _number(mark[among][age]))
                    for name, mark in task["marks"].items()
                }
                row = {"task": int(task["task"]), "among": among, "age": age}
                rows.append({**row, "steps": steps, "losses": losses, "marks": marks})
        return rows

    def readout_rows(self) -> Iterator[dict[str, Any]]:
        """Its results by read-out: most of the columns of :func:`load`."""
        shared = {
            **self.kept,
            **self.compute,
            # A sum with a missing task is NaN.
            **{key: sum(task[key] for task in self.costs) for key in _TIMES},
            **{key: pd.Series([task[key] for task in self.costs]).max() for key in _MEMORY},
            **{key: pd.Series([task[key] for task in self.costs]).mean() for key in _MOVED},
            "analysed": bool(self.content["analysis"]),
        }
        for kind, matrix in self.matrices.items():
            given = self.content["summary"].get("task_given", {}).get(kind, {}).get("last")
            accuracies = {
                "last": matrix.last,
                "average": matrix.average,
                "new": fmean(row[-1] for row in matrix.matrix),
                "forgetting": matrix.forgetting,
                "backward_transfer": matrix.backward_transfer,
                "task_given": _number(given),
            }
            if len(matrix) == 1:  # as of a method that learns all tasks at once
                accuracies = dict.fromkeys(accuracies, nan) | {"last": matrix.last}
            per_cent = {name: 100 * x for name, x in accuracies.items()}
            yield {**self._identity(kind), **per_cent, **shared}

    def task_rows(self) -> Iterator[dict[str, Any]]:
        """Its results by read-out and task: most of the columns of :func:`load_tasks`."""
        for kind, matrix in self.matrices.items():
            curves = {
                "accuracy": matrix.curve,
                "old": matrix.old_curve,
                "new": [row[-1] for row in matrix.matrix],
                "forgetting": [*matrix.forgetting_by_task, nan],  # of the last task, none yet
            }
            for j in range(len(matrix)):
                per_cent = {name: 100 * values[j] for name, values in curves.items()}
                yield {**self._identity(kind), "task": j + 1, **per_cent, **self.costs[j]}

    def _identity(self, kind: str) -> dict[str, Any]:
        return {
            "run": str(self.path),
            "seed": self.seed,
            "order": self.order_hash,
            "tasks": len(self.matrices[kind]),
            "readout": kind,
            "primary": kind == self.readout,
        }


class Inventory(NamedTuple):
    """What folders and bundles hold.

    Attributes
    ----------
    runs : list of Run
        Finished runs.
    unfinished : list of Path
        Folders of runs that did not finish.
    unreadable : dict of Path to str
        Folders of finished runs that cannot be read, and why.
    others : list of Path
        Paths without a run.
    """

    runs: list[Run]
    unfinished: list[Path]
    unreadable: dict[Path, str]
    others: list[Path]


def find_runs(sources: Sequence[str | Path]) -> Inventory:
    """Finished runs among folders and bundles.

    Parameters
    ----------
    sources : sequence of str or Path
        Folders, each a run or with runs somewhere below, or files that ``loda bundle`` wrote;
        ``NAME=SOURCE`` names the group. A run in a folder below a given one is named after that
        folder, and one in ``VARIANT/seedN``, as a sweep puts it, after the variant, whether the
        sweep, its variants or its runs are given; others have no name. Paths without a run (the
        logs of a sweep, say) are skipped.

    Raises
    ------
    FileNotFoundError
        If a source does not exist, or there is no finished run.
    ValueError
        If a bundle cannot be read, or none of the runs.
    """
    runs: dict[Path, Run] = {}
    unreadable: dict[Path, str] = {}
    unfinished: dict[Path, None] = {}
    others = []
    for source in sources:
        place, name = _named(source)
        if is_bundle(place):
            for run in read_bundle(place, name):
                runs.setdefault(run.path.absolute(), run)
            continue
        folders = dict(_run_folders(place, name))
        if not folders:
            others.append(place)
        for path, own_name in folders.items():
            if not is_finished(path):
                unfinished[path] = None
                continue
            try:
                runs.setdefault(path.resolve(), read_run(path, own_name))
            except ValueError as error:
                unreadable[path] = str(error)
    if not runs and unreadable:
        raise ValueError(next(iter(unreadable.values())))
    if not runs:
        what, places = ("no finished run", unfinished) if unfinished else ("no run", others)
        msg = (
            f"{what} in {', '.join(map(str, places))}: a run folder must hold {CONFIG} and, once "
            f"finished, {SUMMARY}; a file must be a bundle, as loda bundle writes it"
        )
        raise FileNotFoundError(msg)
    return Inventory(list(runs.values()), list(unfinished), unreadable, others)


def read_run(path: Path, name: str = "") -> Run:
    """Read a run folder.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished run.
    ValueError
        If something in it is not what a run writes; the message names the file.
    """
    missing = [file for file in (CONFIG, SUMMARY) if not (path / file).is_file()]
    if missing:
        msg = f"{path} holds no finished run: {', '.join(missing)} missing"
        raise FileNotFoundError(msg)
    content: dict[str, Any] = {"log": []}
    for part, (file, keys) in _FILES.items():
        values = read_json(path / file) if (path / file).is_file() else {}
        with readable(path / file):
            content[part] = _part(values, keys)
            if "backbone" in content[part]:  # only these keys: others may hold paths
                backbone = _part(values["backbone"], ("weights_sha256", "tag"))
                content[part]["backbone"] = backbone
    if (path / METRICS).is_file():
        with readable(path / METRICS):
            lines = (path / METRICS).read_text(encoding="utf-8").splitlines()
            events = [event for event in map(json.loads, lines) if event["event"] == "task"]
            content["log"] = [
                _part(event, _EVENT)
                | ({"update": _part(event["update"], _UPDATE)} if event.get("update") else {})
                for event in events
            ]
    # Only a sweep nests its runs this deep; elsewhere a file of that name is not ours.
    parts = read_groups(path.absolute().parent.parent) if _variant(path) else {}
    run = Run(path, name, parts, read_experiment(path / CONFIG), content)
    run.check()
    return run


def is_bundle(path: Path) -> bool:
    """Whether the path is a bundle, by its first line."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(file.readline(_LONGEST_HEADER))
    except (ValueError, RecursionError):
        return False
    return isinstance(header, dict) and header.get("format") == _BUNDLE


def write_bundle(runs: Sequence[Run], path: Path, *, overwrite: bool = False) -> Path:
    """Write what a report needs of finished runs to a file; returns it.

    Parameters
    ----------
    runs : sequence of Run
        The runs.
    path : Path
        The file.
    overwrite : bool
        Replace an existing bundle.

    Raises
    ------
    FileExistsError
        If the file exists and ``overwrite`` is off, or it is not a bundle.
    """
    require_new(path, overwrite=overwrite)
    if path.exists() and not is_bundle(path):
        msg = f"{path} exists and is not a bundle, so it is not replaced: choose another --out"
        raise FileExistsError(msg)
    lines: list[dict[str, Any]] = [{"format": _BUNDLE, "version": _VERSION}]
    for run, place in zip(runs, _places_in_bundle(run.path for run in runs), strict=True):
        config = _portable(experiment_values(run.experiment)) | {"out": None}
        record = {"run": place, "name": run.name, "groups": run.sweep_groups, "config": config}
        lines.append(record | run.content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def read_bundle(path: Path, name: str = "") -> Iterator[Run]:
    """Read the runs of a bundle.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        Name of their group; by default each run keeps the name that it had.

    Raises
    ------
    ValueError
        If the file holds something else, or another version of it; the message names the line.
    """
    with readable(path):
        header, *lines = path.read_text(encoding="utf-8").split("\n")
        version = json.loads(header).get("version")
    if version != _VERSION:
        msg = f"{path} is a bundle of version {version}, and this loda reads version {_VERSION}"
        raise ValueError(msg)
    places, experiments = set(), dict[str, Experiment]()
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        with readable(path, f"line {number}"):
            record = json.loads(line)
            # Parsing settings takes most of the time: it is done once for all seeds.
            seed, key = record["config"]["seed"], _key(record["config"] | {"seed": 0})
            if key not in experiments:
                experiments[key] = experiment_from(record["config"], "config")
            run = Run(
                path / record["run"],
                name or str(record["name"]),
                {str(title): list(names) for title, names in record["groups"].items()},
                replace(experiments[key], seed=seed),
                {part: record[part] for part in (*_FILES, "log")},
            )
            if run.path in places:
                msg = f"{record['run']} occurs twice"
                raise ValueError(msg)
            places.add(run.path)
        run.check()
        yield run


class RateSweep(NamedTuple):
    """Groups of a section that differ only in the learning rate.

    Attributes
    ----------
    method : str
        The method.
    style : int
        Its style in figures.
    labels : dict of float to str
        The groups, by their learning rate.
    """

    method: str
    style: int
    labels: dict[float, str]


@dataclass(frozen=True)
class Section:
    """Runs on the same data, cut into the same tasks, from the same backbone.

    If the sweep defines groups of variants, each of them, a *part*, is a section.

    Attributes
    ----------
    base : str
        Data and backbone.
    part : str
        Title of the part; empty where there is only one.
    slug : str
        Both as a file name.
    groups : dict of str to list of Run
        Label -> runs that differ only in their seed, sorted by seed.
    styles : dict of str to int
        Labels of all sections, and their styles in figures: a method has one style in all of them,
        and in other reports too.
    new_labels : tuple of str
        Labels that no earlier section on the same data and backbone has.
    """

    base: str
    part: str
    slug: str
    groups: dict[str, list[Run]]
    styles: dict[str, int]
    new_labels: tuple[str, ...]

    @property
    def title(self) -> str:
        """Data, backbone and part."""
        return f"{self.base}: {self.part}" if self.part else self.base

    @cached_property
    def sweeps(self) -> list["RateSweep"]:
        """Groups that differ only in the learning rate, where there are three rates or more."""
        sweeps: dict[str, RateSweep] = {}
        for label, runs in self.groups.items():
            experiment = runs[0].experiment
            method = experiment.method.name
            settings = {**_group_settings(experiment), "train.lr": None}
            empty = RateSweep(method, _STYLES.get(method, len(_STYLES)), {})
            sweeps.setdefault(_key(settings), empty).labels[experiment.train.lr] = label
        return [sweep for sweep in sweeps.values() if len(sweep.labels) >= 3]

    @property
    def readouts(self) -> list[str]:
        """Read-outs that every run of some group has, primary ones first."""
        groups = self.groups.values()
        primary = [run.readout for group in groups for run in group]
        shared = [k for g in groups for k in g[0].matrices if all(k in run.matrices for run in g)]
        return [kind for kind in dict.fromkeys([*primary, *shared]) if kind in shared]

    @cached_property
    def measures(self) -> pd.DataFrame:
        """One row per run and read-out, as :func:`load` describes them."""
        return _frame(self.groups, Run.readout_rows)

    @cached_property
    def task_measures(self) -> pd.DataFrame:
        """One row per run, read-out and task, as :func:`load_tasks` describes them."""
        return _frame(self.groups, Run.task_rows)


def by_section(runs: Sequence[Run]) -> list[Section]:
    """Sections in the order of their first run, each with LoDA's groups first.

    Other methods follow in an order that is the same in every report; groups of one method are in
    the order of the sweep's file or else of their first run. Parts of a sweep are in the order of
    its file.

    Raises
    ------
    ValueError
        If a seed occurs twice among runs of the same name and settings.
    """
    bases = _by_base(runs)
    styles = _styles({k: runs for groups in bases.values() for k, runs in groups.items()})
    sections: list[Section] = []
    for base, groups in bases.items():
        shown: set[str] = set()
        for part, members in _by_part(groups).items():
            new_labels = tuple(label for label in members if label not in shown)
            whole = max(
                len(r.sweep_groups.get(part, ())) for group in members.values() for r in group
            )
            if not new_labels and len(members) < whole:
                # Only some variants of the part were run, and an earlier section shows them all.
                continue
            name = slug(f"{base}: {part}" if part else base)
            if name in [section.slug for section in sections]:
                name += f"-{len(sections) + 1}"
            sections.append(Section(base, part, name, members, styles, new_labels))
            shown |= set(members)
    return sections


def load(*sources: str | Path) -> pd.DataFrame:
    """Results of finished runs: one row per run and read-out.

    Parameters
    ----------
    *sources : str or Path
        Run folders, folders that hold runs, and bundles; ``NAME=SOURCE`` names a group.

    Returns
    -------
    DataFrame
        NaN stands for what a run has not measured. Runs can be compared within a section, and
        paired where seed and order are equal. A method that learns all tasks at once has one task,
        and of the accuracies only the last.

        ============================ ==============================================================
        ``section``                  data, tasks and backbone
        ``group``                    name of the method or variant, as in the tables of a report
        ``run``                      the run folder, or a place in a bundle
        ``seed``, ``order``          the seed, and a short hash of the order of the classes
        ``tasks``                    number of tasks learned
        ``readout``, ``primary``     the read-out, and whether it is the first choice of the run
        ``last``, ``average``,       accuracy at the end, its mean over the stream, loss of accuracy
        ``forgetting``,              on old tasks and its signed version, and accuracy at the end
        ``backward_transfer``,       where the task of every image is given, all in per cent
        ``task_given``
        ``new``                      accuracy on each task when it was just learned, mean over tasks
        ``trained_parameters``       most of any task
        ``method_bytes``,            carried from task to task by the method and by the read-outs
        ``readout_bytes``
        ``steps``, ``image_passes``  optimiser steps, and images passed through the model
        ``seconds``,                 of the whole stream
        ``training_seconds``
        ``memory_mib``,              largest of any task
        ``gpu_memory_mib``
        ``update``, ``changed``      ‖ΔW‖/‖W‖ of a task, and training images of the task whose class
                                     it changed, in per cent, means over tasks
        ``analysed``                 whether ``loda analyse`` was run on it
        ``method.name``, ...         every setting under its dotted name; lists and mappings as JSON
        ============================ ==============================================================

    Raises
    ------
    FileNotFoundError, ValueError
        As :func:`find_runs` says; also if a seed occurs twice in a group.
    """
    return measures(find_runs(sources).runs)


def load_tasks(*sources: str | Path) -> pd.DataFrame:
    """Results of finished runs after each task: one row per run, read-out and task.

    Parameters
    ----------
    *sources : str or Path
        As for :func:`load`.

    Returns
    -------
    DataFrame
        The columns ``section`` to ``primary`` of :func:`load`, and

        ===================== =====================================================================
        ``task``              number of the task, from 1
        ``accuracy``,         accuracy in per cent after the task on all classes seen, on those of
        ``old``, ``new``      earlier tasks and on its own
        ``forgetting``        best accuracy ever on this task, less the one at the end, in points
        ``seconds``,          of the task
        ``training_seconds``
        ``memory_mib``,       largest during the task
        ``gpu_memory_mib``
        ``update``,           as for :func:`load`, of the task
        ``changed``
        ===================== =====================================================================

    Raises
    ------
    FileNotFoundError, ValueError
        As for :func:`load`.
    """
    return _by_section(find_runs(sources).runs, Run.task_rows)


def measures(runs: Sequence[Run]) -> pd.DataFrame:
    """Results of finished runs, as :func:`load` describes it."""
    settings = [
        {"run": str(run.path)}
        | {
            key: json.dumps(value) if isinstance(value, list | tuple | dict) else value
            for key, value in flat_settings(run.experiment).items()
            if key != "seed"
        }
        for run in runs
    ]
    return _by_section(runs, Run.readout_rows).merge(pd.DataFrame(settings), on="run")


def slug(text: str) -> str:
    """Text as part of a file name: lower-case ASCII letters and digits, joined by dashes.

    Examples
    --------
    >>> slug("loda (method.gao False)"), slug("../../etc")
    ('loda-method-gao-false', 'etc')
    """
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in text.lower()).split()
    return "-".join(words)[:100] or "runs"


def _named(source: str | Path) -> tuple[Path, str]:
    """Where to look, and the name that was given."""
    place, name = Path(source), ""
    if not place.exists() and "=" in str(source):
        name, _, rest = str(source).partition("=")
        place = Path(rest)
    if not place.exists():
        msg = f"no folder or file {place}; give run folders or bundles"
        raise FileNotFoundError(msg)
    return place, name


def _run_folders(folder: Path, name: str) -> Iterator[tuple[Path, str]]:
    """Folders of runs in a folder, each with the name of its group."""
    if (folder / CONFIG).is_file():
        yield folder, name or _variant(folder)
        return
    for path in sorted(config.parent for config in folder.glob(f"**/{CONFIG}")):
        between = path.parent.relative_to(folder).as_posix()
        yield path, name or (_variant(path) if between == "." else between)


def _variant(path: Path) -> str:
    """Name of the variant whose run is in a folder, if the folder is called as in a sweep."""
    return path.absolute().parent.name if fullmatch(r"seed\d+", path.name) else ""


def _part(values: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    return {key: values[key] for key in keys if key in values}


def _number(value: Any) -> float:
    """A finite number; NaN for None."""
    if value is None:
        return nan
    if not isfinite(number := float(value)):
        msg = f"{value} is not a finite number"
        raise ValueError(msg)
    return number


def _places_in_bundle(paths: Iterable[Path]) -> list[str]:
    """Names of run folders, below those of sweep and variant if any; numbered where equal."""
    places: list[str] = []
    for path in paths:
        top, *below = path.absolute().parts[-3 if _variant(path) else -1 :]
        place, number = "/".join([top, *below]), 1
        while place in places:
            number += 1
            place = "/".join([f"{top}-{number}", *below])
        places.append(place)
    return places


def _portable(value: Any) -> Any:
    """Settings with absolute paths cut to their last part: the rest only describes this machine."""
    if isinstance(value, dict):
        return {key: _portable(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_portable(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if Path(value).is_absolute():
        return Path(value).name
    library, _, folder = value.partition(":")
    if library in ("hf", "local-dir") and Path(folder).is_absolute():
        return f"{library}:{Path(folder).name}"
    kind, _, place = value.partition("/")
    # Two slashes: still a folder, not a data set of the hub.
    return f"{kind}//{Path(place).name}" if Path(place).is_absolute() else value


def _by_base(runs: Sequence[Run]) -> dict[str, dict[str, list[Run]]]:
    """Groups of runs by data and backbone."""
    members = _alike(runs, _section_settings)
    bases = _distinct(
        [_base_title(part[0].experiment, max(run.tasks for run in part)) for part in members],
        [_section_settings(part[0]) for part in members],
    )
    return {base: _by_label(part) for base, part in zip(bases, members, strict=True)}


def _by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Groups of runs that differ only in their seed, sorted by seed.

    The label of a group is the given name or that of the method, plus the settings in which groups
    of the same name differ.
    """
    members = _alike(runs, lambda run: [run.name, _group_settings(run.experiment)])
    for group in members:
        if len({run.seed for run in group}) < len(group):
            again = ", ".join(str(run.path) for run in group)
            msg = (
                f"these runs have the same settings, and a seed occurs twice: {again}; to compare "
                f"them, give them names: NAME={group[0].path} OTHER={group[-1].path}"
            )
            raise ValueError(msg)
    labels = _distinct(
        [group[0].name or group[0].experiment.method.name for group in members],
        [_group_settings(group[0].experiment) for group in members],
    )
    groups = dict(zip(labels, members, strict=True))
    return {
        label: sorted(groups[label], key=lambda run: run.seed)
        for label in sorted(groups, key=lambda label: _rank(groups[label]))
    }


def _rank(runs: Sequence[Run]) -> int:
    """Place of a group in a report: by its method, those of other packages last."""
    names = [*_STYLES]
    method = runs[0].experiment.method.name
    return names.index(method) if method in names else len(names)


def _styles(groups: Mapping[str, Sequence[Run]]) -> dict[str, int]:
    """A style for every label: that of its method for the first of each, free ones for others."""
    styles: dict[str, int] = {}
    for label, runs in groups.items():
        style = _STYLES.get(runs[0].experiment.method.name)
        if style is not None and style not in styles.values():
            styles[label] = style
    free = (n for n in count(1) if n not in styles.values())
    for label in groups:
        if label not in styles:
            styles[label] = next(free)
    return {label: styles[label] for label in groups}


def _alike(runs: Sequence[Run], settings: Callable[[Run], Any]) -> list[list[Run]]:
    """Lists of runs with equal settings."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(_key(settings(run)), []).append(run)
    return [*groups.values()]


def _by_part(groups: dict[str, list[Run]]) -> dict[str, dict[str, list[Run]]]:
    """Groups by part, that is by group of the sweep file; one may be in several."""
    parts = {}
    for title in dict.fromkeys(
        t for runs in groups.values() for run in runs for t in run.sweep_groups
    ):
        places = {
            label: run.sweep_groups[title].index(_variant(run.path))
            for label, runs in groups.items()
            for run in runs
            if _variant(run.path) in run.sweep_groups.get(title, ())
        }
        if places:
            parts[title] = {
                label: groups[label]
                for label in sorted(places, key=lambda k: (_rank(groups[k]), places[k]))
            }
    placed = {label for members in parts.values() for label in members}
    rest = {label: runs for label, runs in groups.items() if label not in placed}
    return parts | ({OTHERS if parts else "": rest} if rest else {})


def _section_settings(run: Run) -> dict[str, Any]:
    """Settings that distinguish sections; moved folders and files do not count."""
    experiment, keys = run.experiment, _section_keys(run.experiment)
    weights = experiment.backbone.options.get("weights")
    return {
        **{k: v for k, v in flat_settings(experiment).items() if k in keys - {*_PLACES}},
        "data": _data_name(experiment),
        "backbone.weights": run.weights or (weights and Path(weights).name),
    }


def _section_keys(experiment: Experiment) -> set[str]:
    data = ("name", *_STREAM, *experiment.data.options)
    keys = {f"data.{key}" for key in data}
    return keys | {f"backbone.{key}" for key in ("name", *experiment.backbone.options)}


def _group_settings(experiment: Experiment) -> dict[str, Any]:
    """Settings that distinguish groups of a section."""
    # A declared class order is one of many, as a drawn one: runs of several are averaged over.
    apart = {*NEUTRAL, *_PLACES, *_section_keys(experiment), "data.class_order", "head.also"}
    # A run records only the options of the read-outs that it evaluates. Evaluating more read-outs
    # does not make it a different experiment, unless their options are not the defaults.
    defaults = {
        f"head.{kind}.{option}": value
        for kind in READOUTS.paths
        for option, value in READOUTS.options(kind).items()
    }
    return {
        key: value
        for key, value in (defaults | flat_settings(experiment)).items()
        if key not in apart and key.partition(".")[0] not in _NOT_COMPARED
    }


def _base_title(experiment: Experiment, tasks: int) -> str:
    """Data, number of tasks and backbone, as a title."""
    held_out = experiment.data.validation not in (0, "auto")  # recorded runs have a number
    images = ", held-out training images" if held_out else ""
    weights = experiment.backbone.options.get("weights")
    file = f" ({Path(weights).stem})" if weights else ""
    name = experiment.backbone.name.removeprefix("hf:").rstrip("/").rpartition("/")[2]
    plural = "s" if tasks > 1 else ""
    return f"{_data_name(experiment)}{images}, {tasks} task{plural}, {name}{file}"


def _data_name(experiment: Experiment) -> str:
    data = experiment.data
    root, dataset = data.options.get("root"), data.options.get("dataset") or ""
    if data.name == "folder" and root:
        return Path(root).name
    place = Path(dataset.partition("/")[2])  # a folder, or a name on the hub
    return place.name if place.is_absolute() else dataset or data.name


def _distinct(names: Sequence[str], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names, each extended by the settings in which equal names differ."""
    labels = []
    for name, own in zip(names, settings, strict=True):
        rivals = [other for rival, other in zip(names, settings, strict=True) if rival == name]
        differing = [k for k in own if any(k in other and other[k] != own[k] for other in rivals)]
        extra = ", ".join(f"{key} {own[key]}" for key in differing)
        labels.append(f"{name} ({extra})" if extra else name)
    # A name that the user gave may equal that of a method with the same settings.
    return [
        label if labels.count(label) == 1 else f"{label} [{number}]"
        for number, label in enumerate(labels, 1)
    ]


def _key(settings: Any) -> str:
    """Settings as one string, equal where they are equal."""
    return json.dumps(settings, sort_keys=True)


def _frame(
    groups: Mapping[str, Sequence[Run]], rows: Callable[[Run], Iterable[dict[str, Any]]]
) -> pd.DataFrame:
    labelled = [(label, run) for label, runs in groups.items() for run in runs]
    return pd.DataFrame([{"group": label, **row} for label, run in labelled for row in rows(run)])


def _by_section(
    runs: Sequence[Run], rows: Callable[[Run], Iterable[dict[str, Any]]]
) -> pd.DataFrame:
    frames = {base: _frame(groups, rows) for base, groups in _by_base(runs).items()}
    return pd.concat(frames, names=["section", None]).reset_index("section").reset_index(drop=True)
