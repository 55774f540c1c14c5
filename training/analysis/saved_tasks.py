"""The files that a run of LoDA keeps of its tasks: moments, branches and coefficients."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from torch import Tensor

from backends.torch.settings import LoDASettings
from loda_math import History, remember
from training.config import begun_experiment
from training.methods.loda import LoDAMethod
from training.run_dir import (
    CLASSES,
    TASKS,
    is_finished,
    nested,
    not_finite,
    read_json,
    read_tensors,
    readable,
    require_intact,
    task_folder,
)

Array = NDArray[Any]
Layer = Mapping[str, Array]
"""Arrays of an adapted layer in one task, under the names of ``docs/verify.md``."""

# From the names that backends.torch.TaskRecord gives them.
_NAMES = {
    "new": "moment_new",
    "trained": "moment_new_trained",
    "merged": "moment_new_merged",
    "down/general": "A_general",
    "up/general": "B_general",
    "down/isolated": "A_isolated",
    "up/isolated": "B_isolated",
    "coefficients": "coefficients",
}


class SavedTask(NamedTuple):
    """A task of a run.

    Attributes
    ----------
    number : int
        Counted from 1.
    layers : dict of str to Layer
        The adapted layers by name.
    history : dict of str to History
        By layer, at the start of the task; empty on the first task.
    """

    number: int
    layers: dict[str, Layer]
    history: dict[str, History]


def read_settings(path: Path, *, allow: Sequence[str] = ()) -> LoDASettings:
    """Settings of LoDA of a run; ``null_lora`` is LoDA with some of them fixed.

    Parameters
    ----------
    path : Path
        The run.
    allow : sequence of str
        Import paths of classes of other packages that the run may load.

    Raises
    ------
    FileNotFoundError
        If the folder is not a run.
    ValueError
        If the run used a method that does not choose subspaces by moments.
    """
    method = begun_experiment(path, allow).method
    if not (method.is_known and issubclass(method.kind, LoDAMethod)):
        msg = (
            f"{path} must be a run of loda or null_lora, the methods that choose their directions "
            f"by second moments, got a run of {method.name}"
        )
        raise ValueError(msg)
    settings: LoDASettings = method.build().settings
    return settings


def saved_tasks(
    path: Path, settings: LoDASettings, *, branches: bool = False
) -> Iterator[SavedTask]:
    """Read the moments of all tasks in order, each with the history at its start.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments``.
    settings : LoDASettings
        As :func:`read_settings` returns them: they say what enters the history.
    branches : bool, default False
        Read the branches too, which ``keep.branches`` saves.

    Raises
    ------
    FileNotFoundError
        If a task lacks one of the files.
    ValueError
        If a file is damaged; the message names it.
    """
    names = ("moments", "branches") if branches else ("moments",)
    if is_finished(path):
        require_intact(path, CLASSES)
        with readable(path / CLASSES):
            count = len(read_json(path / CLASSES)["tasks"])
    else:
        count = sum(folder.is_dir() for folder in (path / TASKS).glob("*"))
    tasks = range(1, 1 + count)
    if not tasks or not all(task_file(path, n, name).is_file() for n in tasks for name in names):
        switches = " ".join(f"--keep.{name} true" for name in names)
        msg = f"{path} did not keep {' and '.join(names)} of all its tasks: train with {switches}"
        raise FileNotFoundError(msg)
    passes = {"trained": "moment_new_trained", "merged": "moment_new_merged"}
    history: dict[str, History] = {}
    for number in tasks:
        layers = read_task(path, number, *names)
        with readable(task_file(path, number, "moments")):
            expected = set(history or layers)
            given = {name for name, layer in layers.items() if "moment_new" in layer}
            if not given or given != expected:
                msg = f"moments must be of the layers {sorted(expected)}, got {sorted(given)}"
                raise ValueError(msg)
            # The moments of a task enter the history of later tasks only.
            yield SavedTask(number, layers, dict(history))
            for name, layer in layers.items():
                moments = [layer[passes[through]] for through in settings.passes()]
                decay = settings.history_decay
                history[name] = remember(history.get(name), *moments, decay=decay)


def read_task(path: Path, number: int, *names: str) -> dict[str, Layer]:
    """Read ``moments`` or ``branches`` of one task, counted from 1, by layer.

    Raises
    ------
    FileNotFoundError
        If one of the files is missing.
    ValueError
        If one of them is damaged, or not as the run wrote it; the message names it.
    """
    layers: dict[str, dict[str, Array]] = {}
    for file in (task_file(path, number, name) for name in names):
        require_intact(path, file.relative_to(path).as_posix())
        tensors = read_finite(file)
        with readable(file):
            for prefix, name in _NAMES.items():
                for layer, tensor in nested(tensors, prefix).items():
                    layers.setdefault(layer, {})[name] = tensor.numpy()
    return dict(layers)


def task_file(path: Path, number: int, name: str) -> Path:
    """Path of the ``moments``, ``branches`` or ``heads`` of a task, counted from 1."""
    return task_folder(path, number) / f"{name}.safetensors"


def read_finite(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file of a run.

    Raises
    ------
    FileNotFoundError
        If it is missing.
    ValueError
        If it cannot be read or holds NaN or infinite values; the message names it.
    """
    tensors = read_tensors(path)
    with readable(path):
        broken = not_finite(tensors)
        if broken:
            msg = f"NaN or infinite values: {', '.join(broken[:8])}"
            raise ValueError(msg)
    return tensors
