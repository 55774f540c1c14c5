"""What a run of LoDA kept of its tasks, with the history that each of them began with."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from training.config import Experiment, MethodConfig, read_experiment
from training.config.methods import BUILT_IN, UNTRAINED
from training.methods.loda import as_loda
from training.run_dir import CONFIG, TASKS, readable

Arrays = dict[str, NDArray[Any]]

KEEPS_MOMENTS = ("loda", "null_lora")
"""Methods that choose their directions by second moments, and keep them with ``keep.moments``."""


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
    """Settings of the method of a run, as those of LoDA: ``null_lora`` is LoDA under some of them.

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
    if method.name not in KEEPS_MOMENTS:
        msg = (
            f"{path} is a run of {method.name}; what is asked for follows from the second moments "
            f"that {' and '.join(KEEPS_MOMENTS)} alone choose their directions by and keep"
        )
        raise ValueError(msg)
    return as_loda(method)


def keeps_nothing(experiment: Experiment) -> list[str]:
    """What is said of the switches of ``keep`` that are on, but keep nothing of the method.

    Methods that other packages add are not judged.

    Examples
    --------
    >>> from training.config import KeepConfig
    >>> keep = KeepConfig(branches=True, moments=True, heads=True)
    >>> keeps_nothing(Experiment(method=MethodConfig("o_lora"), keep=keep))
    ['keep.moments keeps nothing: o_lora has no moments']
    """
    name, keep = experiment.method.name, experiment.keep
    found = []
    if keep.branches and name in UNTRAINED:
        found.append("branches")
    if keep.moments and name in set(BUILT_IN) - set(KEEPS_MOMENTS):
        found.append("moments")
    return [f"keep.{switch} keeps nothing: {name} has no {switch}" for switch in found]


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
        found = {name: _read(file) for name, file in files.items()}
        moments = found.pop("moments")
        layers = [k.removeprefix("new/") for k in moments if k.startswith("new/")]
        _check_moments(files["moments"], moments, layers, passes, history)
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


def _read(path: Path) -> Arrays:
    with readable(path):
        try:
            found: Arrays = load_file(path)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
        odd = [k for k, v in found.items() if v.dtype.kind != "f" or not np.isfinite(v).all()]
        if odd:
            msg = f"values that are no finite real numbers: {', '.join(odd[:4])}"
            raise ValueError(msg)
        return found


def _check_moments(
    path: Path, moments: Arrays, layers: list[str], passes: list[str], history: Arrays
) -> None:
    with readable(path):
        if not layers or (history and layers != list(history)):
            msg = f"moments of the layers {layers}, in earlier tasks of {list(history)}"
            raise ValueError(msg)
        for layer in layers:
            for name in ("new", *passes):
                moment = moments[f"{name}/{layer}"]
                if moment.ndim != 2 or len({*moment.shape, len(moments[f"new/{layer}"])}) != 1:
                    msg = f"{name}/{layer} has the shape {moment.shape}; expected a square matrix"
                    raise ValueError(msg)
                if history and history[layer].shape != moment.shape:
                    msg = f"{name}/{layer} is {moment.shape}, in earlier tasks another size"
                    raise ValueError(msg)
