"""Energies of the subspaces that a run chose, by task and layer (the paper's figures 2 and 5)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loda_math import (
    energy_ratio,
    null_subspace,
    projection_energy,
    relative_energy,
    rounding_unit,
)
from loda_math.verify.archive import natural_sort_key
from training.analysis.saved_tasks import (
    Array,
    read_settings,
    saved_tasks,
    task_file,
)
from training.run_dir import readable


def subspace_energies(path: Path, *, allow: Sequence[str] = ()) -> list[dict[str, Any]]:
    r"""Energies of every task after the first, by layer.

    For the null space of the old tasks (the directions of least old-task energy, as many as a
    branch has) and for the branches that the run trained: the energy ratio
    :math:`r(U) = e(U; S_{new}) / e(U; S_{old})`, the relative energies e themselves, and the
    projection magnitude :math:`\sqrt{\operatorname{tr}(U^\top S U)}`, the root mean square length
    of the part of a token that lies in the subspace. Old moments are the mean over past tasks.

    Parameters
    ----------
    path : Path
        A run of LoDA with ``keep.moments`` and ``keep.branches``.
    allow : sequence of str
        As in :func:`training.load`.

    Returns
    -------
    list of dict
        One per task: its number, counted from 1, and the measures by layer and subspace. The ratio
        is None where the old tasks have no energy in the subspace, or none above rounding.

    Raises
    ------
    FileNotFoundError
        If the folder is not a run, or kept no moments and branches.
    ValueError
        If the run used a method without subspaces, or a file is damaged.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3 and Figures 2 and 5.
    """
    settings = read_settings(path, allow=allow)
    tasks = []
    for task in saved_tasks(path, settings, branches=True):
        layers, own = {}, settings.by_layer(task.layers)
        # The order of the layers in the figures; on the first task there is no history.
        for name, history in sorted(
            task.history.items(), key=lambda item: natural_sort_key(item[0])
        ):
            layer = task.layers[name]
            with readable(task_file(path, task.number, "branches"), name):
                new, old = layer["moment_new"].astype(np.float64), history.mean
                bases = {"null": null_subspace(old, own[name].rank)}
                for branch in ("general", "isolated"):
                    if f"A_{branch}" in layer:
                        down = layer[f"A_{branch}"].astype(np.float64)
                        bases[branch] = down.T / settings.down_scale
                layers[name] = {kind: _measures(basis, new, old) for kind, basis in bases.items()}
        if layers:
            tasks.append({"task": task.number, "layers": layers})
    return tasks


def _measures(basis: Array, new: Array, old: Array) -> dict[str, float | None]:
    measures: dict[str, float | None] = {"ratio": None}
    for name, moment in (("new", new), ("old", old)):
        # Rounding may leave an energy just below zero.
        measures[f"{name}_energy"] = max(float(relative_energy(basis, moment)), 0.0)
        magnitude = math.sqrt(max(float(projection_energy(basis, moment)), 0.0))
        measures[f"{name}_magnitude"] = magnitude
    ratio = float(energy_ratio(basis, new, old))
    # An energy below the rounding of the moment's Gram matrices counts as none.
    if (measures["old_energy"] or 0.0) > len(old) * rounding_unit() and math.isfinite(ratio):
        measures["ratio"] = ratio
    return measures
