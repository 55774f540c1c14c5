"""What a run folder or somebody's ``.npz`` file claims, layer by layer, ready to be checked."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from loda_math import RecalibrationForm
from loda_math.verify import Objective
from training.finished.kept import kept_tasks, read_method
from training.run_dir import require_plausible_archive

Array = NDArray[Any]

_SQUARE = ("D", "D")
# Axes of the arrays by name; a letter is one size in all of them.
_AXES = {
    "moment_new": _SQUARE,
    "moment_old": _SQUARE,
    "moment_new_trained": _SQUARE,
    "moment_old_at_merge": _SQUARE,
    "A_general_init": ("r", "D"),
    "A_general": ("r", "D"),
    "B_general": ("O", "r"),
    "A_isolated": ("s", "D"),
    "B_isolated": ("O", "s"),
    "coefficients": ("k", "k"),
    "qkv_before": ("O", "D"),
    "qkv_after": ("O", "D"),
}


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
        require_plausible_archive(path)
        # NumPy leaves a file that it cannot read open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            content = {key: arrays[key] for key in arrays.files if _is_known(key)}
    except Exception as error:  # whatever a damaged or foreign archive provokes in the readers
        msg = f"cannot read {path} as .npz: {' '.join(str(error).split()) or repr(error)}"
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
            _check_shapes(f"{path}: {task}/{layer}", arrays)
            yield Case(task, layer, arrays, claims)


def _is_known(key: str) -> bool:
    return key == "settings" or key.rpartition("/")[2] in _AXES


def _check_shapes(place: str, arrays: Mapping[str, Array]) -> None:
    """Real and finite matrices whose axes agree."""
    sizes: dict[str, int] = {}
    for name, array in arrays.items():
        if array.dtype.kind not in "fiu" or array.ndim != 2 or not np.isfinite(array).all():
            kind = f"{array.dtype} of shape {array.shape}"
            msg = f"{place}/{name} is {kind}; expected a matrix of finite real numbers"
            raise ValueError(msg)
        for axis, size in zip(_AXES[name], array.shape, strict=True):
            known = sizes.setdefault(axis, size)
            if size < 1 or known != size:
                msg = (
                    f"{place}/{name} has the shape {array.shape}, expected {_AXES[name]} of at "
                    f"least 1; {axis} is {known} in other arrays"
                )
                raise ValueError(msg)
    if "B_isolated" in arrays and "A_isolated" not in arrays:
        msg = f"{place} has B_isolated without A_isolated"
        raise ValueError(msg)


def _read_claims(path: Path, text: str) -> Claims:
    """The string ``settings`` of a file, every value checked."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
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
