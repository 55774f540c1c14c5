"""Compare every solution of a run, or of an ``.npz`` file, with the exact one."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from backends.torch.settings import LoDASettings
from loda_math import rounding_unit
from loda_math.verify import LAYER_ARRAYS, Check, LayerSettings, verify_archive, verify_layer
from training.analysis.saved_tasks import Array, read_settings, saved_tasks
from training.run_dir import readable, write_atomically


def verify(path: Path, *, tolerance: float = 1e-5) -> list[Check]:
    """Check every solution in a run folder or an ``.npz`` file, in float64 NumPy.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments`` and ``keep.branches``, or a file as
        :func:`loda_math.verify.verify_archive` takes.
    tolerance : float
        As in :func:`loda_math.verify.verify_layer`.

    Returns
    -------
    list of Check
        In the order of tasks and layers.

    Raises
    ------
    FileNotFoundError
        If there is no such run or file.
    ValueError
        If nothing in it can be checked, it is damaged, or the tolerance is not positive.
    """
    # Refused here: below, a ValueError is taken for damage of the files.
    if not (math.isfinite(tolerance) and tolerance > 0):
        msg = f"tolerance must be finite and positive, got {tolerance}; the default is 1e-5"
        raise ValueError(msg)
    if not path.is_dir():
        return verify_archive(path, tolerance=tolerance)
    checks: list[Check] = []
    for solution in read_run(path):
        with readable(path, f"task {solution.task}, layer {solution.layer}"):
            found = verify_layer(solution.arrays, solution.settings, tolerance=tolerance)
        checks += [c._replace(task=solution.task, layer=solution.layer) for c in found]
    if not checks:
        msg = (
            f"{path} holds nothing to check: bases must come with the moments they were chosen from"
        )
        raise ValueError(msg)
    return checks


@dataclass(frozen=True)
class Solution:
    """What a run computed for one layer in one task.

    Parameters
    ----------
    task, layer : str
        Their names.
    arrays : dict of str to array
        As :func:`loda_math.verify.verify_layer` takes them.
    settings : LayerSettings
        Settings under which they were computed.
    """

    task: str
    layer: str
    arrays: dict[str, Array]
    settings: LayerSettings


def read_run(path: Path) -> Iterator[Solution]:
    """Solutions of a run, by task and layer; the history is summed up from the saved moments.

    Raises
    ------
    FileNotFoundError
        If the folder is no run, or kept no moments and branches.
    ValueError
        If the run used a method without subspaces, or a file is damaged.
    """
    settings = read_settings(path)
    for task in saved_tasks(path, settings, branches=True):
        own = settings.by_layer(task.layers)
        for name, layer in task.layers.items():
            arrays = {key: array for key, array in layer.items() if key in LAYER_ARRAYS}
            history, weight = task.history.get(name), settings.history_weight
            if history is not None:
                arrays["moment_old"] = history.total
            if weight == "mean":
                weight = 1.0 if history is None else 1 / history.weight
            yield Solution(str(task.number), name, arrays, _layer_settings(own[name], weight))


def export_run(path: Path, file: Path) -> None:
    """Write the solutions of a run to an ``.npz`` file that ``loda_math.verify`` reads.

    Parameters
    ----------
    path : Path
        A run trained with ``keep.moments`` and ``keep.branches``.
    file : Path
        The file to write; one that exists is replaced.

    Raises
    ------
    FileNotFoundError, ValueError
        As in :func:`read_run`.
    OSError
        If the file cannot be written.
    """
    import numpy as np

    settings = read_settings(path)
    if settings.weight_pattern:
        msg = (
            f"weight_pattern must be empty for an export, got {dict(settings.weight_pattern)} in "
            f"{path}: the file has one weight for all layers; verify the run itself"
        )
        raise ValueError(msg)
    arrays: dict[str, Array] = {}
    for solution in read_run(path):
        layer = dict(solution.arrays)
        if "moment_old" in layer:
            # The weight may differ from task to task, and the file has one set of settings.
            layer["moment_old_at_merge"] = solution.settings.history_weight * layer["moment_old"]
        arrays |= {f"{solution.task}/{solution.layer}/{key}": x for key, x in layer.items()}
    text = json.dumps(asdict(_layer_settings(settings, 1.0)))

    def write(temporary: Path) -> None:
        with temporary.open("wb") as opened:
            np.savez_compressed(opened, allow_pickle=False, settings=np.asarray(text), **arrays)

    write_atomically(file, write)


def _layer_settings(settings: LoDASettings, history_weight: float) -> LayerSettings:
    return LayerSettings(
        down_scale=settings.down_scale,
        general_weight=settings.weight("general"),
        isolated_weight=settings.weight("isolated"),
        isolated=settings.isolated,
        ridge=settings.ridge,
        ridge_scale=settings.ridge_scale,
        energy_floor=settings.energy_floor,
        form=settings.form(first_task=False),
        joint=settings.joint,
        gamma=settings.gamma,
        history_weight=history_weight,
        accumulation_eps=rounding_unit(),
    )
