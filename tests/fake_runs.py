"""Run folders with made-up results: what `loda report` reads of a finished run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.config import Experiment, MethodConfig, dump_experiment
from training.metrics import AccuracyMatrix
from training.report.runs import Section, by_section, find_runs
from training.report.tables import Table

FROZEN = MethodConfig("frozen")
AGES, AMONG = ("old", "new"), ("own", "seen")
IMAGES = 100  # of each class; one class a task


def fake_run(
    folder: Path, rows: Sequence[Sequence[int]] = ((90,), (60, 80)), **settings: Any
) -> Path:
    """A run whose accuracy on task j after task i is ``rows[i][j]`` per cent, on every read-out."""
    folder.mkdir(parents=True)
    experiment = Experiment(**settings)
    matrix = AccuracyMatrix()
    for row in rows:  # a first row of several is one task with all classes
        size = len(row) - sum(matrix.sizes)
        matrix = matrix.extended(size, row, [IMAGES] * len(row))
    kinds = [experiment.head.readout, *experiment.head.also]
    summary = {
        "counts": {kind: matrix.to_dict() for kind in kinds},
        "task_given": {kind: {"last": 0.95} for kind in kinds},
        "stored_bytes": {"method": 2**20, "statistics": 2**19},
        "trainable_parameters": [1000, 2000],
    }
    (folder / "config.yaml").write_text(dump_experiment(experiment), encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    log: list[dict[str, Any]] = [{"event": "epoch"}]
    for task in range(1, len(rows) + 1):
        seconds = {"load": 0.5, "train": 0.5 + task, "end": 1.0}
        memory = {"process": (299 + task) * 2**20}
        log.append({"event": "task", "task": task, "seconds": seconds, "memory": memory})
    text = "".join(json.dumps(event) + "\n" for event in log)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    return folder


def moves(run: Path, relative: float) -> Path:
    """The run, with a log in which every task moved the weights by that share of them."""
    log = run / "metrics.jsonl"
    events = [json.loads(line) for line in log.read_text("utf-8").splitlines()]
    for event in events:
        event["update"] = {"relative": relative, "changed": 0.5, "images": 10, "layers": {}}
    log.write_text("".join(json.dumps(event) + "\n" for event in events), "utf-8")
    return run


def changed_json(path: Path, **changes: Any) -> None:
    """Put other values into a JSON file, which need not be there."""
    content = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    path.write_text(json.dumps(content | changes), "utf-8")


def measures(scale: float) -> dict[str, float | None]:
    """The analysis of a subspace."""
    names = (f"{age}_{what}" for age in ("new", "old") for what in ("energy", "magnitude"))
    return {"ratio": scale} | {name: scale * k for k, name in enumerate(names, 1)}


def analysis() -> dict[str, Any]:
    """What `loda analyse` writes of three tasks and two layers; every number is another one."""
    scales = {"null": 1.0, "general": 10.0, "isolated": 100.0}
    subspaces = [
        {
            "task": task,
            "layers": {
                f"blocks.{k}": {n: measures(s * (k + 4 * task - 3)) for n, s in scales.items()}
                for k in range(2)
            },
        }
        for task in (2, 3)
    ]
    curves = {
        a: {g: [10.0 * i + j, 20.0 * i + j] for j, g in enumerate(AGES)}
        for i, a in enumerate(AMONG)
    }
    marks = {
        mark: {
            "step": step,
            **{a: {g: step + 2 * i + j for j, g in enumerate(AGES)} for i, a in enumerate(AMONG)},
        }
        for mark, step in (("recalibrated", 0.5), ("merged", 0.25))
    }
    losses = [{"task": 2, "step": [0.0, 1.5], **curves, "marks": marks}]
    return {"subspaces": subspaces, "losses": losses}


def sections(*sources: Path | str) -> list[Section]:
    """What a report compares of run folders."""
    return by_section(find_runs(sources).runs)


def texts(table: Table) -> list[list[str]]:
    """The cells of a table, with the names of its rows."""
    return [
        [str(name), *cells]
        for name, cells in zip(table.cells.index, table.cells.to_numpy().tolist(), strict=True)
    ]
