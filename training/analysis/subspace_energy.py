"""Energies of the subspaces that a run chose, by task and layer (the paper's figures 2 and 5)."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loda_math import energy_ratio, null_subspace, projection_energy, relative_energy
from training.finished.kept import kept_tasks, read_method

Array = NDArray[Any]

# The moments are float64 sums of single-precision Gram matrices: below is rounding.
_GRAM_EPS = float(np.finfo(np.float32).eps)


def subspaces(path: Path) -> list[dict[str, Any]]:
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

    Returns
    -------
    list of dict
        A task each: its number from 0, and by layer and subspace the measures. The ratio is None
        where the old tasks have no energy in the subspace, or none above rounding.

    Raises
    ------
    FileNotFoundError
        If the folder is no run, or kept no moments and branches.
    ValueError
        If the run used a method without subspaces.

    Notes
    -----
    LoDA, arXiv:2603.00191, Section 3 and Figures 2 and 5.
    """
    method = read_method(path)
    found = []
    for kept in kept_tasks(path, method, "branches"):
        if not kept.history:  # the first task
            continue
        layers = {}
        for layer in sorted(kept.layers, key=natural):
            new = kept.moments[f"new/{layer}"].astype(np.float64)
            old = kept.history[layer].astype(np.float64) / kept.mass
            bases = {"null": null_subspace(old, method.rank)}
            for branch in ("general", "isolated"):
                down = kept.others["branches"].get(f"down/{branch}/{layer}")
                if down is not None:
                    bases[branch] = down.astype(np.float64).T / method.down_scale
            layers[layer] = {name: _measures(basis, new, old) for name, basis in bases.items()}
        found.append({"task": int(kept.task), "layers": layers})
    return found


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sorting key under which layer 10 comes after layer 2.

    Examples
    --------
    >>> sorted(["blocks.10.qkv", "blocks.2.qkv"], key=natural)
    ['blocks.2.qkv', 'blocks.10.qkv']
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in parts]


def _measures(basis: Array, new: Array, old: Array) -> dict[str, float | None]:
    found: dict[str, float | None] = {"ratio": None}
    for name, moment in (("new", new), ("old", old)):
        # Rounding may leave an energy just below zero.
        found[f"{name}_energy"] = max(float(relative_energy(basis, moment)), 0.0)
        found[f"{name}_magnitude"] = math.sqrt(max(float(projection_energy(basis, moment)), 0.0))
    ratio = float(energy_ratio(basis, new, old))
    if (found["old_energy"] or 0.0) > len(old) * _GRAM_EPS and math.isfinite(ratio):
        found["ratio"] = ratio
    return found
