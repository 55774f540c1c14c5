"""What a run folder or somebody's ``.npz`` file claims, layer by layer, ready to be checked."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from loda_math import RecalibrationForm
from loda_math.verify import Objective
from training.kept import kept_tasks, read_method

Array = NDArray[Any]


class Claims(NamedTuple):
    """The settings that a solution claims to have been computed under; the paper's by default."""

    down_scale: float = 3**-0.5
    general_weight: float = 0.25
    isolated_weight: float = 0.5
    gamma: float = 3.0
    form: RecalibrationForm | Literal["none"] = "direction"
    isolated: Objective = "isolated"
    ridge: float = 0.0
    energy_floor: float = 0.0
    joint: bool = False
    history_weight: float = 1.0
    accumulation_eps: float = 0.0


class Case(NamedTuple):
    """One layer of one task: its arrays, under the names that `read_arrays` lists."""

    task: str
    layer: str
    arrays: Mapping[str, Array]
    claims: Claims


def read_run(path: Path) -> Iterator[Case]:
    """Cases of a run folder; the history is summed up from the passes that the run names.

    Raises
    ------
    FileNotFoundError
        If the folder is no run, or kept no moments and branches.
    ValueError
        If the run used a method without subspaces.
    """
    method = read_method(path)
    halved = 0.5 if method.branches == "both" else 1.0
    claims = Claims(
        method.down_scale,
        method.general_weight * halved,
        method.isolated_weight * halved,
        method.gamma,
        method.recalibration,
        "isolated" if method.isolated == "pencil" else method.isolated,
        method.ridge,
        method.energy_floor or 0.0,
        method.joint,
        # Runs are trained in float32, and so are the Gram matrices in their moments.
        accumulation_eps=float(np.finfo(np.float32).eps),
    )
    for kept in kept_tasks(path, method, "branches"):
        moments, branches, history = kept.moments, kept.others["branches"], kept.history
        weight = method.history_weight
        if weight == "mean":
            weight = 1 / (kept.mass or 1.0)
        for layer in kept.layers:
            arrays = {"moment_new": moments[f"new/{layer}"]}
            if layer in history:
                arrays |= {"moment_old": history[layer], "moment_old_at_merge": history[layer]}
            names = {"moment_new_trained": f"trained/{layer}"}
            arrays |= {new: moments[old] for new, old in names.items() if old in moments}
            names = {"coefficients": f"coefficients/{layer}"}
            for branch in ("general", "isolated"):
                names |= {f"A_{branch}": f"down/{branch}/{layer}"}
                names |= {f"B_{branch}": f"up/{branch}/{layer}"}
            arrays |= {new: branches[old] for new, old in names.items() if old in branches}
            yield Case(kept.task, layer, arrays, claims._replace(history_weight=weight))


def read_arrays(path: Path) -> Iterator[Case]:
    """Cases of an ``.npz`` file of arrays ``TASK/LAYER/NAME``, as any code can write it.

    ``docs/verify.md`` lists the names. What is not there is not checked. A string ``settings``
    (JSON) may set any field of `Claims`; other keys are ignored.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no ``.npz`` file, or its settings are unknown.
    """
    if not path.is_file():
        msg = f"no run folder and no file {path}"
        raise FileNotFoundError(msg)
    try:
        # NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            content = dict(arrays)
    except (ValueError, OSError, TypeError, EOFError, BadZipFile) as error:
        msg = f"cannot read {path} as .npz: {error}"
        raise ValueError(msg) from error
    claims = _read_claims(path, str(content.pop("settings", "{}")))
    groups: dict[tuple[str, str], dict[str, Array]] = {}
    for key, array in content.items():
        place, _, name = key.rpartition("/")
        task, _, layer = place.partition("/")
        if task and layer:
            groups.setdefault((task, layer), {})[name] = array
    for (task, layer), arrays in sorted(groups.items(), key=_natural):
        if "moment_new" in arrays:
            yield Case(task, layer, arrays, claims)


def _read_claims(path: Path, text: str) -> Claims:
    """The string ``settings`` of a file, every value checked."""
    try:
        given = json.loads(text)
    except ValueError as error:
        msg = f"{path}: settings is no JSON: {error}"
        raise ValueError(msg) from error
    if not isinstance(given, dict) or set(given) - set(Claims._fields):
        msg = f"{path}: settings must be JSON with some of {Claims._fields}, got {given}"
        raise ValueError(msg)
    words = {"form": (*get_args(RecalibrationForm), "none"), "isolated": get_args(Objective)}
    for key, value in given.items():
        if key in words:
            sound, allowed = value in words[key], ", ".join(words[key])
        elif key == "joint":
            sound, allowed = isinstance(value, bool), "true or false"
        else:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            sound, allowed = number and 0 <= value < math.inf, "a number of at least 0"
        if not sound:
            msg = f"{path}: settings has {key} {value!r}; allowed: {allowed}"
            raise ValueError(msg)
    return Claims(**given)


def _natural(item: tuple[tuple[str, str], object]) -> list[list[tuple[int, str]]]:
    """Task 2 before task 10."""
    parts = [re.split(r"(\d+)", text) for text in item[0]]
    return [[(int(x), "") if x.isdigit() else (-1, x) for x in part] for part in parts]
