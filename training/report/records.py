"""Records: what a report needs of many finished runs, in one text file that can be shared.

The first line says what the file is, each further one holds a run as JSON. Weights, curves within
tasks and the paths of the machine are left out.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from training.config import HUGGING_FACE, Experiment, experiment_from, experiment_values
from training.report.finished import Content, Finished, assemble, variant_of
from training.run_dir import write_text
from training.shapes import (
    ANALYSIS_SHAPE,
    CLASSES_SHAPE,
    ENVIRONMENT_SHAPE,
    EVENT_SHAPE,
    SUMMARY_SHAPE,
    reduced,
    require_shape,
)

FORMAT, VERSION = "loda records", 1
_LONGEST_HEADER = 200
_RECORD = {"run": str, "name": str, "groups": {str: [str]}}
_CONTENT = ("config", "summary", "classes", "environment", "log", "analysis")


def is_records(path: Path) -> bool:
    """Whether something is a file that says it holds records."""
    if not path.is_file():
        return False
    try:
        with path.open(encoding="utf-8") as file:
            return _is_header(json.loads(file.readline(_LONGEST_HEADER)))
    except (ValueError, RecursionError):
        return False


def write_records(runs: Sequence[Finished], path: Path, *, overwrite: bool = False) -> Path:
    """Write the records of finished runs to a file; returns it.

    Parameters
    ----------
    runs : sequence of Finished
        The runs.
    path : Path
        The file.
    overwrite : bool
        Replace a file of records that is there.

    Raises
    ------
    FileExistsError
        If it is there and ``overwrite`` is off, or it is no file of records.
    """
    if path.exists():
        if not overwrite:
            msg = f"{path} is there, and nothing is overwritten unasked: add --overwrite"
            raise FileExistsError(msg)
        if not is_records(path):
            msg = f"{path} is no file of records and stays: give another --out"
            raise FileExistsError(msg)
    labels = _labels(run.path for run in runs)
    records = [_record(label, run) for label, run in zip(labels, runs, strict=True)]
    header = {"format": FORMAT, "version": VERSION}
    lines = [json.dumps(line, ensure_ascii=False) for line in (header, *records)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "\n".join(lines) + "\n")
    return path


def read_records(path: Path, name: str = "") -> Iterator[Finished]:
    """Read the runs of a file of records.

    Parameters
    ----------
    path : Path
        The file.
    name : str
        What the user calls their group; by default each keeps the name that it had.

    Raises
    ------
    ValueError
        If the file holds something else, or a newer version of it.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
        header, *records = [json.loads(line) for line in lines if line]
    except (ValueError, RecursionError) as error:
        msg = f"cannot read {path} as records of runs, which loda export writes: {error}"
        raise ValueError(msg) from error
    if not _is_header(header):
        msg = f"{path} holds no records of runs: loda export writes them"
        raise ValueError(msg)
    if header.get("version") != VERSION:
        msg = f"{path} is of version {header.get('version')}; this loda reads version {VERSION}"
        raise ValueError(msg)
    seen = set()
    for number, record in enumerate(records, 2):
        where = f"{path}, line {number}"
        require_shape(record, _RECORD, where)
        missing = [key for key in _CONTENT if key not in record]
        if missing or record["run"] in seen:
            what = f"{', '.join(missing)} not there" if missing else f"{record['run']} once more"
            msg = f"{where}: {what}; it is not what loda export writes"
            raise ValueError(msg)
        seen.add(record["run"])
        settings, *others = (record[key] for key in _CONTENT)
        content = Content(experiment_from(settings, f"{where}: config"), *others)
        yield assemble(path / record["run"], name or record["name"], content, record["groups"])


def _record(label: str, run: Finished) -> dict[str, Any]:
    found = run.content
    return {
        "run": label,
        "name": run.name,
        "groups": {title: list(names) for title, names in run.groups.items()},
        "config": experiment_values(_portable(run.experiment)),
        "summary": reduced(found.summary, SUMMARY_SHAPE),
        "classes": reduced(found.classes, CLASSES_SHAPE),
        "environment": reduced(found.environment, ENVIRONMENT_SHAPE),
        "log": reduced(found.log, [EVENT_SHAPE]),
        "analysis": reduced(found.analysis, ANALYSIS_SHAPE),
    }


def _portable(experiment: Experiment) -> Experiment:
    """The experiment with names of folders and files in place of paths of this machine."""

    def name(path: str | None) -> str | None:
        return None if path is None else Path(path).name

    data, backbone = experiment.data, experiment.backbone
    kind, _, place = (data.dataset or "").partition("/")
    if Path(place).is_absolute():
        data = replace(data, dataset=f"{kind}//{name(place)}")  # still a folder, not one of the hub
    local = backbone.name.removeprefix(HUGGING_FACE)
    if Path(local).is_absolute():
        backbone = replace(backbone, name=f"{HUGGING_FACE}{name(local)}")
    return replace(
        experiment,
        out=None,
        data=replace(data, root=name(data.root)),
        backbone=replace(backbone, weights=name(backbone.weights)),
    )


def _labels(paths: Iterable[Path]) -> list[str]:
    """Names of run folders, below sweep and variant if they are of one; numbered where equal."""
    labels: list[str] = []
    for path in paths:
        above, *below = path.absolute().parts[-3 if variant_of(path) else -1 :]
        label, number = "/".join([above, *below]), 1
        while label in labels:
            number += 1
            label = "/".join([f"{above}-{number}", *below])
        labels.append(label)
    return labels


def _is_header(value: Any) -> bool:
    return isinstance(value, dict) and value.get("format") == FORMAT
