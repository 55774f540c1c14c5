"""The folder of a run: what is in it, and how nothing in it is lost or half-written."""

import json
import platform
from contextlib import closing, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from training.backbones import Backbone
from training.config import Experiment, as_recorded, dump_experiment, read_experiment
from training.data import Stream
from training.files import (
    append_line,
    make_folder,
    read_json,
    sync,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)
from training.state import RunState
from training.survival.checkpoints import remove_checkpoints, remove_leftovers
from training.survival.lock import LOCK, FolderLock

CONFIG, CLASSES, ENVIRONMENT = "config.yaml", "classes.json", "environment.json"
METRICS, SUMMARY, FIGURE = "metrics.jsonl", "summary.json", "accuracy.png"
MODEL, READOUTS, TASKS = "model.safetensors", "readouts.safetensors", "tasks"
ANALYSIS, CHECKPOINTS = "analysis.json", "checkpoints"
_RESULTS = (METRICS, SUMMARY, FIGURE, MODEL, READOUTS, ANALYSIS)
_FILES = (CONFIG, CLASSES, ENVIRONMENT, *_RESULTS)

_PACKAGES = (
    "loda",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
)


def choose_folder(experiment: Experiment) -> Path:
    """Folder of the run: as given, or a new one under ``runs`` named after data and method.

    Raises
    ------
    FileExistsError
        If the folder has content and ``overwrite`` is off.
    NotADirectoryError
        If the path is a file.
    """
    if experiment.out is None:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{experiment.data.name}-{experiment.method.name}-seed{experiment.seed}-{stamp}"
        return Path("runs", name)
    folder = Path(experiment.out).expanduser()
    if folder.exists() and not folder.is_dir():
        msg = f"out is {folder}, which is a file; give a folder"
        raise NotADirectoryError(msg)
    filled = folder.is_dir() and any(path.name != LOCK for path in folder.iterdir())
    if filled and not experiment.overwrite:
        begun = (folder / CONFIG).is_file() and not (folder / SUMMARY).is_file()
        unfinished = " (it holds a run that did not finish)" if begun else ""
        resume = f", --resume {folder} to go on with it" if begun else ""
        msg = (
            f"{folder} is not empty{unfinished}, and nothing is overwritten unasked: give another "
            f"--out{resume}, or --overwrite true to replace the run in it"
        )
        raise FileExistsError(msg)
    return folder


def is_finished(path: Path) -> bool:
    """Whether a folder holds a run with its results."""
    return (path / CONFIG).is_file() and (path / SUMMARY).is_file()


def tidy(path: Path) -> None:
    """Remove the checkpoints of a finished run whose process was killed before it could."""
    if (path / CHECKPOINTS).is_dir():
        with suppress(OSError), closing(RunFolder(path, resume=True)):  # no harm if it cannot be
            remove_checkpoints(path / CHECKPOINTS)


def begun_experiment(path: Path) -> Experiment:
    """The settings of a run that began in a folder.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    if not (path / CONFIG).is_file():
        msg = f"{path} is no run folder: no {CONFIG} in it"
        raise FileNotFoundError(msg)
    return read_experiment(path / CONFIG)


class RunFolder:
    """Writes the files of one run; no other process can do so until it is closed.

    Parameters
    ----------
    path : Path
        Made if it is not there. What an earlier run left under the same names is removed first.
    fresh : bool
        Make a new folder in any case, numbered if the name is taken: runs that begin in the same
        second get one each.
    resume : bool
        Go on with the run in the folder: nothing is removed.

    Raises
    ------
    OSError
        If the folder cannot be written to, or another process is writing to it.
    """

    def __init__(self, path: Path, *, fresh: bool = False, resume: bool = False) -> None:
        try:
            self.path = _new_folder(path) if fresh else path
            self.path.mkdir(parents=True, exist_ok=True)
            sync(self.path.parent)
            self._lock = FolderLock(self.path)
            _refuse_links(self.path)
        except BlockingIOError:
            raise
        except OSError as error:
            msg = f"cannot write to the run folder {path}: {error.strerror or error}"
            raise OSError(msg) from error
        _remove_half_written(self.path)
        if not resume:
            _remove_results(self.path)
            remove_checkpoints(self.path / CHECKPOINTS)
        remove_leftovers(self.path / CHECKPOINTS)

    def close(self) -> None:
        """Let other processes write to the folder."""
        self._lock.release()

    def begin(self, experiment: Experiment, stream: Stream, backbone: Backbone) -> None:
        """Write what is known before training: configuration, classes and environment."""
        write_text(self.path / CONFIG, dump_experiment(as_recorded(experiment)))
        write_json(self.path / CLASSES, _classes(stream))
        write_json(self.path / ENVIRONMENT, _environment(backbone))

    def check_stream(self, stream: Stream) -> None:
        """Refuse to go on with other classes than the run began with."""
        recorded, now = read_json(self.path / CLASSES), _classes(stream)
        # An older version did not count the images.
        if {**now, **recorded} != now:
            msg = (
                f"the classes or tasks of the data are not those in {self.path / CLASSES}: the "
                f"data have changed since the run began, and it cannot go on"
            )
            raise ValueError(msg)

    def log(self, event: str, **values: Any) -> None:
        """Append one line to the metrics, for all to read at once; checkpoints hold what counts."""
        line = json.dumps({"event": event, **values}, ensure_ascii=False)
        append_line(self.path / METRICS, line)

    def read_log(self) -> bytes:
        """The metrics so far."""
        path = self.path / METRICS
        return path.read_bytes() if path.is_file() else b""

    def restore_log(self, content: bytes) -> None:
        """Make the metrics what they were at a checkpoint."""
        write_bytes(self.path / METRICS, content)

    def keep(self, task: int, **groups: dict[str, torch.Tensor]) -> None:
        """Write groups of tensors of a task, a file a group; empty groups are left out."""
        folder = self.path / TASKS / f"{task:03d}"
        for name, tensors in groups.items():
            if tensors:
                make_folder(folder.parent)
                make_folder(folder)
                write_tensors(folder / f"{name}.safetensors", tensors)

    def finish(self, state: RunState, summary: dict[str, Any]) -> None:
        """Write the merged model, the read-outs and the summary; drop the checkpoints then."""
        write_tensors(self.path / MODEL, state.model.state_dict())
        write_tensors(self.path / READOUTS, state.readouts.tensors())
        sync(self.path / METRICS)
        write_json(self.path / SUMMARY, summary)
        remove_checkpoints(self.path / CHECKPOINTS)


def _refuse_links(path: Path) -> None:
    """Nothing outside the folder is written or removed by way of a link that somebody put in it."""
    folders = [inner for inner in path.iterdir() if inner.is_dir()]  # a tracker has one of its own
    inside = [inner for name in (TASKS, CHECKPOINTS) for inner in (path / name).glob("*")]
    for inner in (path / TASKS, path / CHECKPOINTS, *folders, *inside):
        if inner.is_symlink():
            msg = f"{inner} is a link; put what it stands for there, or give another folder"
            raise OSError(msg)


def _new_folder(path: Path) -> Path:
    candidate, number = path, 1
    while True:
        try:
            candidate.mkdir(parents=True)
        except FileExistsError:
            number += 1
            candidate = path.with_name(f"{path.name}-{number}")
        else:
            return candidate


def _remove_results(path: Path) -> None:
    for name in _RESULTS:
        (path / name).unlink(missing_ok=True)
    for stale in (path / TASKS).glob("*/*.safetensors"):
        stale.unlink()
    for folder in [*(path / TASKS).glob("*"), path / TASKS]:
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def _remove_half_written(path: Path) -> None:
    """Remove what a process that was killed was just writing."""
    half_written = [half for name in _FILES for half in path.glob(f".{name}.*.tmp")]
    for half in [*half_written, *(path / TASKS).glob("*/.*.safetensors.*.tmp")]:
        half.unlink()


def _classes(stream: Stream) -> dict[str, Any]:
    labels = stream.train.labels
    images = [int(torch.isin(labels, torch.tensor(task)).sum()) for task in stream.tasks]
    return {
        "class_names": list(stream.class_names),
        "order": list(stream.order),
        "tasks": [list(task) for task in stream.tasks],
        "images": images,
    }


def _environment(backbone: Backbone) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "threads": torch.get_num_threads(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "backbone": {
            "timm_name": backbone.timm_name,
            "options": backbone.timm_options,
            "tag": backbone.tag,
            "weights_sha256": backbone.weights_sha256,
            "tensors_sha256": backbone.tensors_sha256,
        },
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
