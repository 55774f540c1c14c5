"""What a run of LoDA kept of its tasks, with the history that each of them began with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from numpy.typing import NDArray
from safetensors.numpy import load_file

from training.config import MethodConfig, read_experiment
from training.run_folder import CONFIG, TASKS

Arrays = dict[str, NDArray[Any]]


class KeptTask(NamedTuple):
    """Files of one task.

    Attributes
    ----------
    task : str
        Name of its folder.
    layers : list of str
        The adapted layers.
    moments : dict of str to array, shape (D, D)
        By pass and layer, ``new/LAYER``.
    history : dict of str to array, shape (D, D)
        By layer, as it was when the task began; empty for the first task.
    mass : float
        Sum of the weights in the history.
    others : dict of str to dict of str to array
        The other files that were asked for.
    """

    task: str
    layers: list[str]
    moments: Arrays
    history: Arrays
    mass: float
    others: dict[str, Arrays]


def read_method(path: Path) -> MethodConfig:
    """Settings of the method of a run.

    Raises
    ------
    FileNotFoundError
        If the folder is no run.
    ValueError
        If the run used a method without subspaces.
    """
    if not (path / CONFIG).is_file():
        msg = f"{path} is no run folder: no {CONFIG} in it"
        raise FileNotFoundError(msg)
    method = read_experiment(path / CONFIG).method
    if method.name != "loda":
        msg = (
            f"{path} is a run of {method.name}; what is asked for is defined for runs of loda alone"
        )
        raise ValueError(msg)
    return method


def kept_tasks(path: Path, method: MethodConfig, *others: str) -> Iterator[KeptTask]:
    """Moments and further files of every task, in order.

    Raises
    ------
    FileNotFoundError
        If a task lacks one of them.
    """
    wanted = ("moments", *others)
    passes = [p for p in ("trained", "merged") if method.history in (p, "both")]
    history: Arrays = {}
    mass = 0.0
    tasks = sorted(p for p in (path / TASKS).glob("*") if p.is_dir())
    for number, folder in enumerate(tasks):
        files = {name: folder / f"{name}.safetensors" for name in wanted}
        if folder.name != f"{number:03d}" or not all(file.is_file() for file in files.values()):
            tasks = []
            break
        found = {name: load_file(file) for name, file in files.items()}
        moments = found.pop("moments")
        layers = [k.removeprefix("new/") for k in moments if k.startswith("new/")]
        yield KeptTask(folder.name, layers, moments, dict(history), mass, found)
        mass = method.history_decay * mass + len(passes)
        for layer in layers:
            parts = [moments[f"{name}/{layer}"] for name in passes]
            past = history.get(layer, 0 * parts[0])
            history[layer] = sum(parts, start=method.history_decay * past)
    if not tasks:
        switches = " ".join(f"--keep.{name} true" for name in wanted)
        msg = f"{path} did not keep {' and '.join(wanted)} of all its tasks: train with {switches}"
        raise FileNotFoundError(msg)
