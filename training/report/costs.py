"""What a method costs: its controls (parameters, memory, compute), and the time of its tasks."""

from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from training.data.walk import walk_classes
from training.methods import steps_a_batch
from training.report.finished import Finished
from training.report.grouping import Section
from training.report.measures import DASH, mean_text
from training.report.tables import Cell, Table

TRAINING = ("load", "train")
"""Parts of a task that are its training; older runs have the first in the second."""


class Compute(NamedTuple):
    """How often a run has stepped, and how many images went forth and back through the model."""

    steps: int
    images: int


def compute(run: Finished) -> Compute | None:
    """Counted from the settings and the training images; None where nothing tells them.

    A mini-batch of one class takes one step where others take two; that is not counted.
    """
    each, train = steps_a_batch(run.experiment.method), run.experiment.train
    images = run.images or _counted(run)
    if not images or each is None:
        return None
    batches = sum(-(-count // train.batch_size) for count in images)
    return Compute(train.epochs * each * batches, train.epochs * each * sum(images))


def controls_table(section: Section) -> Table:
    """What a method may train, keep and spend beside the others; means over seeds."""
    header = [
        "method",
        "trained parameters",
        "kept by the method (bytes)",
        "kept by the read-outs (bytes)",
        "training (s)",
        "optimiser steps",
        "image passes",
    ]
    rows = []
    for label, runs in section.groups.items():
        kept = [k for run in runs if (k := run.summary.get("stored_bytes")) is not None]
        method = [k.get("method", 0) for k in kept]
        readouts = [sum(k.values()) - k.get("method", 0) for k in kept]
        seconds = [sum(s) for run in runs if (s := task_seconds(run, *TRAINING))]
        spent = [c for run in runs if (c := compute(run)) is not None]
        texts = [
            label,
            f"{max(map(_trained, runs)):,}",
            mean_text(method, 0),
            mean_text(readouts, 0),
            mean_text(seconds, 1),
            mean_text([c.steps for c in spent], 0),
            mean_text([c.images for c in spent], 0),
        ]
        rows.append([Cell(text) for text in texts])
    note = (
        "Trained parameters, those of the head of the task among them: the most of any task. Kept: "
        "what is carried from task to task beside the model and the heads, at the end. Steps and "
        "passes (an image forth, and back as far as something is trained) of the whole stream: a "
        "gradient-aligned mini-batch takes two steps and passes each of its images twice. Means "
        "over the seeds."
    )
    return Table("Controls", header, rows, note)


def cost_table(section: Section) -> Table:
    """Time and memory of a task by method; the time is the mean over tasks and seeds."""
    header = ["method", "time a task (s)", "training alone (s)"]
    header += ["peak memory (MiB)", "peak GPU memory (MiB)"]
    rows = []
    for label, runs in section.groups.items():
        total = [fmean(s) for run in runs if (s := task_seconds(run))]
        train = [fmean(s) for run in runs if (s := task_seconds(run, *TRAINING))]
        memory = [[m for run in runs for m in task_memory(run, k)] for k in ("process", "device")]
        peaks = [f"{max(m):.0f}" if m else DASH for m in memory]
        texts = [label, mean_text(total, 1), mean_text(train, 1), *peaks]
        rows.append([Cell(text) for text in texts])
    return Table("Costs", header, rows, "Peak memory: the largest of all tasks.")


def task_seconds(run: Finished, *parts: str) -> list[float]:
    """Seconds of each task, in all or of some parts."""
    logged = [event["seconds"] for event in run.log]
    return [sum(s for name, s in found.items() if not parts or name in parts) for found in logged]


def task_memory(run: Finished, kind: str) -> list[float]:
    """Peak memory of each task in MiB, of the process or the device; empty if not recorded."""
    found = [event.get("memory", {}).get(kind) for event in run.log]
    return [size / 2**20 for size in found if size is not None]


def _counted(run: Finished) -> tuple[int, ...]:
    """Training images of each task, by the folders of an older run that did not write them down."""
    data = run.experiment.data
    folder = Path(data.root or "") / "train"
    if data.name != "folder" or data.validation or not folder.is_dir():
        return ()
    there, names = _images_of(folder), iter(run.order)
    sizes = next(iter(run.matrices.values())).sizes
    tasks = [[there.get(name) for name in islice(names, size)] for size in sizes]
    if not all(task and all(task) for task in tasks):
        return ()
    return tuple(sum(count or 0 for count in task) for task in tasks)


@lru_cache(maxsize=8)
def _images_of(folder: Path) -> dict[str, int]:
    return {name: len(found.images) for name, found in walk_classes(folder)[0].items()}


def _trained(run: Finished) -> int:
    """Parameters that training moved: none, where there were no epochs."""
    given = run.summary.get("trainable_parameters") or [0]
    return max(given) if run.experiment.train.epochs else 0
