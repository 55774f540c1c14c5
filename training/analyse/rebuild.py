"""The weights of a run before one of its tasks, and the update that the task made, as kept."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from training.config import MethodConfig
from training.run_dir import TASKS, nested, read_tensors


class TaskUpdate(NamedTuple):
    """What a task did to the weights of the adapted layers, each by layer, in float64.

    Attributes
    ----------
    task : int
        Counted from 0.
    before : dict of str to Tensor, shape (O, D)
        Weights before the task.
    general : dict of str to Tensor, shape (O, D)
        w_G·B_G A_G, the general branch as trained; empty without one.
    recalibrated : dict of str to Tensor, shape (O, D)
        w_G·B_G Λ A_G; empty where Λ belongs to both branches together.
    whole : dict of str to Tensor, shape (O, D)
        Everything that was merged.
    """

    task: int
    before: dict[str, Tensor]
    general: dict[str, Tensor]
    recalibrated: dict[str, Tensor]
    whole: dict[str, Tensor]


def task_updates(
    path: Path, method: MethodConfig, weights: Mapping[str, Tensor], tasks: int
) -> Iterator[TaskUpdate]:
    """Updates of the tasks from the last to the first, each taken off the weights in turn.

    Parameters
    ----------
    path : Path
        A run of LoDA with ``keep.branches``.
    method : MethodConfig
        Its settings.
    weights : mapping of str to Tensor, shape (O, D)
        Final weights by name of the adapted layer; other layers may be there too.
    tasks : int
        Number of tasks.

    Raises
    ------
    FileNotFoundError
        If the branches of a task are not there.
    """
    now: dict[str, Tensor] = {}
    for task in reversed(range(tasks)):
        branches = read_tensors(path / TASKS / f"{task:03d}" / "branches.safetensors")
        layers = list(dict.fromkeys(k.split("/", 2)[2] for k in branches if k.startswith("down/")))
        if not now:
            now = {name: weights[name].detach().to("cpu", torch.float64) for name in layers}
        made = {name: _layer_update(method, branches, name) for name in layers}
        general, recalibrated, whole = (
            {name: parts[k] for name, parts in made.items() if k in parts}
            for k in ("general", "recalibrated", "whole")
        )
        now = {name: now[name] - whole[name] for name in layers}
        yield TaskUpdate(task, dict(now), general, recalibrated, whole)


def _layer_update(
    method: MethodConfig, branches: Mapping[str, Tensor], layer: str
) -> dict[str, Tensor]:
    halved = 0.5 if method.branches == "both" else 1.0
    weights = {"general": method.general_weight, "isolated": method.isolated_weight}
    downs, ups = {}, {}
    for name, weight in weights.items():
        down = nested(branches, f"down/{name}").get(layer)
        if down is not None:
            downs[name] = down.double()
            ups[name] = halved * weight * nested(branches, f"up/{name}")[layer].double()
    middle = nested(branches, "coefficients").get(layer)
    found = {}
    if "general" in downs:
        found["general"] = ups["general"] @ downs["general"]
    if middle is not None and method.joint:
        up, down = torch.cat(list(ups.values()), dim=1), torch.cat(list(downs.values()))
        return {**found, "whole": up @ middle.double() @ down}
    parts = {name: ups[name] @ downs[name] for name in downs}
    if "general" in downs:
        if middle is not None:
            parts["general"] = ups["general"] @ middle.double() @ downs["general"]
        found["recalibrated"] = parts["general"]
    return {**found, "whole": torch.stack(list(parts.values())).sum(dim=0)}
