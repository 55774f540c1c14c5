"""The end of a task: Λ of every layer, what the merge will do to outputs, and the new history."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from backends.torch.lora import LoRALinear
from backends.torch.settings import LoDASettings
from backends.torch.solve import by_shape
from loda_math import (
    RecalibrationForm,
    UpdateEffect,
    joint_recalibration,
    recalibration,
    stack_branches,
    update_effect,
)

Stacks = tuple[list[Tensor], list[Tensor], list[float]]
"""Ups (L, O, r), downs (L, r, D) and weights by branch, for L layers of one size."""


class MergePlan(NamedTuple):
    """What will be merged, and what that will do, by layer.

    Attributes
    ----------
    coefficients : mapping of str to Tensor
        Λ, as :meth:`OpenTask.merge` takes it; empty where nothing is recalibrated.
    effects : mapping of str to UpdateEffect
        Of scalars.
    """

    coefficients: Mapping[str, Tensor] = {}
    effects: Mapping[str, UpdateEffect] = {}


def plan_merge(
    settings: LoDASettings,
    layers: Mapping[str, LoRALinear],
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    tasks: int,
) -> MergePlan:
    """Λ and the effect of the merge after a task that is not the first.

    Parameters
    ----------
    settings : LoDASettings
        The recalibration.
    layers : mapping of str to LoRALinear
        The adapted layers with their branches as trained.
    new, old : mapping of str to Tensor, shape (D, D)
        Moment through the trained model, and history, by layer.
    tasks : int
        Tasks in the history.
    """
    mass, form = settings.history_mass(tasks), settings.form(first_task=False)
    coefficients = (
        {} if form is None else solve_recalibration(form, settings, layers, new, old, mass)
    )
    return MergePlan(coefficients, predict_effects(layers, coefficients, new, old, mass))


def solve_recalibration(
    form: RecalibrationForm,
    settings: LoDASettings,
    layers: Mapping[str, LoRALinear],
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    mass: float,
) -> dict[str, Tensor]:
    """Λ of every layer: of the general branch, or of all branches side by side.

    Parameters
    ----------
    form
        As in :func:`loda_math.recalibration`.
    settings : LoDASettings
        γ, the weight of the history, and whether branches are taken jointly.
    layers : mapping of str to LoRALinear
        The adapted layers with their branches as trained.
    new, old : mapping of str to Tensor, shape (D, D)
        Moment through the trained model, and history, by layer.
    mass : float
        Sum of the weights in the history.

    Returns
    -------
    dict of str to Tensor
        (r, r), or with ``joint`` (R, R) over the R directions of all branches, in the dtype of
        the moments; as :meth:`LoRALinear.merge` takes them.
    """
    weight = 1 / mass if settings.history_weight == "mean" else settings.history_weight
    coefficients: dict[str, Tensor] = {}
    for group in by_shape({name: layer.base.weight for name, layer in layers.items()}, new):
        ups, downs, weights = _stacks([layers[name] for name in group], new[group[0]].dtype)
        s_new, s_old = (torch.stack([m[name] for name in group]) for m in (new, old))
        moments = (s_new, s_old, settings.gamma)
        if settings.joint:
            solved = joint_recalibration(ups, downs, weights, *moments, form, history_weight=weight)
        else:
            solved = recalibration(ups[0], downs[0], *moments, form, history_weight=weight)
        coefficients.update(zip(group, solved, strict=True))
    return coefficients


def predict_effects(
    layers: Mapping[str, LoRALinear],
    coefficients: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
    mass: float,
) -> dict[str, UpdateEffect]:
    """Exact effect of the coming merge on the outputs of every layer, all branches together.

    Parameters
    ----------
    layers, old, mass
        As in :func:`solve_recalibration`.
    coefficients : mapping of str to Tensor
        As it returns them; a branch without Λ is merged as trained.
    new : mapping of str to Tensor, shape (D, D)
        Moment of the new task's inputs by layer.

    Returns
    -------
    dict of str to UpdateEffect
        Of scalars: mean squares over tokens, those on old inputs also over past tasks.
    """
    effects: dict[str, UpdateEffect] = {}
    for group in by_shape({name: layer.base.weight for name, layer in layers.items()}, new):
        dtype = new[group[0]].dtype
        up, down = stack_branches(*_stacks([layers[name] for name in group], dtype))
        directions = up.shape[-1]
        middle = torch.eye(directions, dtype=dtype, device=up.device).repeat(len(group), 1, 1)
        for place, name in enumerate(group):
            if name in coefficients:
                size = coefficients[name].shape[-1]
                middle[place, :size, :size] = coefficients[name]
        s_new, s_old = (torch.stack([m[name] for name in group]) for m in (new, old))
        found = update_effect(middle, up, down, s_new, s_old / mass)
        for name, *values in zip(group, *found, strict=True):
            effects[name] = UpdateEffect(*values)
    return effects


def remember(
    settings: LoDASettings,
    past: Mapping[str, Tensor],
    passes: Mapping[str, Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """The history after a task: the decayed past plus the moments of the named passes."""
    moments = [passes[kind] for kind in settings.passes()]
    history = {}
    for name in moments[0]:
        parts = [found[name] for found in moments]
        start = past.get(name, torch.zeros_like(parts[0]))
        history[name] = sum(parts, start=settings.history_decay * start)
    return history


def _stacks(layers: list[LoRALinear], dtype: torch.dtype) -> Stacks:
    """The branches of layers of one size; the general one, where there is one, comes first."""
    ups, downs, weights = [], [], []
    for branch in layers[0].branches:
        found = [layer.branch(branch) for layer in layers]
        ups.append(torch.stack([b.up.detach().to(dtype) for b in found]))
        downs.append(torch.stack([b.down.detach().to(dtype) for b in found]))
        weights.append(float(found[0].scale))
    return ups, downs, weights
