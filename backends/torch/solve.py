"""The solves of a task for all layers; layers of one size share a batched call where it pays."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from backends.torch.lora import LoRALinear, weight_matrix
from backends.torch.settings import LoDASettings
from loda_math import (
    HeldoutRatio,
    History,
    RecalibrationForm,
    UpdateEffect,
    general_subspace,
    heldout_ratio,
    isolated_subspace,
    joint_recalibration,
    null_subspace,
    recalibration,
    stack_branches,
    update_effect,
)

_ONE_BY_ONE_FROM = 256  # on a CPU, layers at least this wide are solved one at a time
_STACKED = 2**22  # elements of the moments in one call on an accelerator, if they are of several

Bases = dict[str, dict[str, Tensor]]
"""Orthonormal basis (D, r) by layer and branch."""

HeldoutRatios = dict[str, dict[str, HeldoutRatio]]
"""Ratios on data that a subspace was and was not chosen on, by layer and branch."""


def solve_bases(
    settings: LoDASettings,
    new: Mapping[str, Tensor],
    history: Mapping[str, History] | None,
    gram_eps: float,
    devices: Mapping[str, torch.device] | None = None,
) -> Bases:
    """Bases of the branches of every layer, from second moments (D, D) of the current task.

    There is no ``history`` on the first task. ``gram_eps`` is the rounding unit of the Gram
    matrices that were summed into the moments. Layers are solved on ``devices``, by default where
    the moment of the task is.
    """
    bases: Bases = {name: {} for name in new}
    own = settings.by_layer(new)
    for branch in settings.names(first_task=history is None):
        for group, device in _subspace_calls(new, own, devices):
            choose = _subspace_rule(own[group[0]], branch, gram_eps)
            old = None if history is None else _stack((history[n].total for n in group), device)
            solved = choose(_stack((new[name] for name in group), device), old)
            for name, basis in zip(group, solved, strict=True):
                bases[name][branch] = basis
    return bases


def random_bases(
    settings: LoDASettings,
    layers: Mapping[str, nn.Module],
    *,
    first_task: bool,
    generator: torch.Generator,
) -> Bases:
    """Bases for ``LoDA.begin_task(bases=...)`` that know nothing of the data.

    They are the control that shows how much choosing the directions contributes.

    Parameters
    ----------
    settings : LoDASettings
        Rank and branches.
    layers : mapping of str to module
        As :func:`find_layers` returns them.
    first_task : bool
        Whether it is the first task, which has only a general branch.
    generator : torch.Generator
        A CPU generator.

    Returns
    -------
    dict of str to dict of str to Tensor, shape (D, r)
        Orthonormal columns of uniformly distributed span, by layer and branch.

    Examples
    --------
    >>> import torch
    >>> bases = random_bases(LoDASettings(rank=2), {"a": torch.nn.Linear(6, 3)}, first_task=False,
    ...                      generator=torch.Generator().manual_seed(0))
    >>> {branch: tuple(basis.shape) for branch, basis in bases["a"].items()}
    {'general': (6, 2), 'isolated': (6, 2)}
    """
    own = settings.by_layer(layers)

    def draw(name: str, layer: nn.Module) -> Tensor:
        width = weight_matrix(layer).shape[1]
        basis: Tensor = torch.linalg.qr(torch.randn(width, own[name].rank, generator=generator)).Q
        return basis

    branches = settings.names(first_task=first_task)
    return {n: {branch: draw(n, layer) for branch in branches} for n, layer in layers.items()}


def solve_heldout(
    settings: LoDASettings,
    halves: Mapping[str, tuple[Tensor, Tensor]],
    history: Mapping[str, History],
    gram_eps: float,
    devices: Mapping[str, torch.device] | None = None,
) -> HeldoutRatios:
    """Energy ratios of every branch on images that its directions were not chosen on.

    From moments of two halves of the task's images; the others are as in :func:`solve_bases`.
    """
    ratios: HeldoutRatios = {name: {} for name in halves}
    own = settings.by_layer(history)  # some layers may have no halves
    firsts = {name: first for name, (first, _) in halves.items()}
    for branch in settings.names(first_task=False):
        for group, device in _subspace_calls(firsts, own, devices):
            choose = _subspace_rule(own[group[0]], branch, gram_eps)
            first, second = (_stack((halves[n][half] for n in group), device) for half in (0, 1))
            old = _stack((history[name].total for name in group), device)
            batched = heldout_ratio(choose, first, second, old)
            for name, *values in zip(group, *batched, strict=True):
                ratios[name][branch] = HeldoutRatio(*values)
    return ratios


def solve_recalibration(
    settings: LoDASettings,
    form: RecalibrationForm,
    layers: Mapping[str, LoRALinear],
    new: Mapping[str, Tensor],
    history: Mapping[str, History],
    gram_eps: float,
) -> dict[str, Tensor]:
    """Λ of every layer (Theorem 2.3): of the general branch, or of all branches side by side.

    From branches as trained, moments through the trained model, and the history from before the
    task; ``gram_eps`` is as in :func:`solve_bases`. Λ is (r, r), or with ``joint`` (R, R) over the
    R directions of all branches, in the dtype of the moments.
    """
    coefficients: dict[str, Tensor] = {}
    for group, device in _alike(layers):
        ups, downs, weights = _branches([layers[name] for name in group], new[group[0]].dtype)
        # The histories of all layers hold the same tasks, so one weight serves the whole group.
        h = settings.history_weight
        weight = 1 / history[group[0]].weight if h == "mean" else h
        old = _stack((history[name].total for name in group), device)
        moments = (_stack((new[name] for name in group), device), old, settings.gamma)
        rule = {"history_weight": weight, "accumulation_eps": gram_eps}
        if settings.joint:
            solved = joint_recalibration(ups, downs, weights, *moments, form, **rule)
        else:
            solved = recalibration(ups[0], downs[0], *moments, form, **rule)
        coefficients.update(zip(group, solved, strict=True))
    return coefficients


def solve_effects(
    layers: Mapping[str, LoRALinear],
    coefficients: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    history: Mapping[str, History],
) -> dict[str, UpdateEffect]:
    """Exact effect of the coming merge on the outputs of every layer, all branches together.

    A branch without Λ is merged as trained. Effects are mean squares over tokens, those on old
    inputs also over past tasks.
    """
    effects: dict[str, UpdateEffect] = {}
    for group, device in _alike(layers):
        dtype = new[group[0]].dtype
        up, down = stack_branches(*_branches([layers[name] for name in group], dtype))
        directions = up.shape[-1]
        factor = torch.eye(directions, dtype=dtype, device=up.device).repeat(len(group), 1, 1)
        for place, name in enumerate(group):
            if name in coefficients:
                # The general branch comes first; the others keep the identity.
                size = coefficients[name].shape[-1]
                factor[place, :size, :size] = coefficients[name]
        old = _stack((history[name].mean for name in group), device)
        here = _stack((new[name] for name in group), device)
        batched = update_effect(factor, up, down, here, old)
        for name, *values in zip(group, *batched, strict=True):
            effects[name] = UpdateEffect(*values)
    return effects


def _subspace_rule(
    settings: LoDASettings, branch: str, gram_eps: float
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """How the directions of a branch are chosen from the new moments and the history."""
    rank = settings.rank
    if branch == "general":
        return partial(general_subspace, rank=rank, accumulation_eps=gram_eps)
    if settings.isolated == "null":
        return lambda _, old: null_subspace(old, rank)
    return partial(
        isolated_subspace,
        rank=rank,
        ridge=settings.ridge,
        ridge_scale=settings.ridge_scale,
        objective=settings.isolated,
        energy_floor=settings.energy_floor,
        accumulation_eps=gram_eps,
    )


def _subspace_calls(
    moments: Mapping[str, Tensor],
    settings: Mapping[str, LoDASettings],
    devices: Mapping[str, torch.device] | None,
) -> list[tuple[list[str], torch.device]]:
    """Layers whose subspaces are found in one call, and where."""
    places = {name: devices[name] if devices else m.device for name, m in moments.items()}
    return _calls({n: (places[n], len(m), settings[n].rank) for n, m in moments.items()})


def _alike(layers: Mapping[str, LoRALinear]) -> list[tuple[list[str], torch.device]]:
    """Layers of one size whose branches have the same ranks and weights, and where they are."""
    return _calls(
        {
            name: (
                layer.frozen.device,
                layer.in_features,
                layer.out_features,
                *((len(b.down), float(b.scale)) for b in map(layer.branch, layer.branches)),
            )
            for name, layer in layers.items()
        }
    )


def _calls(keys: Mapping[str, tuple[Any, ...]]) -> list[tuple[list[str], torch.device]]:
    """Layers that are solved in one call: those with equal keys, of device, width and the rest.

    On a CPU, large layers are solved one at a time. A stack of them would overflow its caches:
    twelve of width 768 take a quarter longer at once. On an accelerator the size of a stack is
    bounded, or its copies of the moments would be much of the memory that the solves need.
    """
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, key in keys.items():
        groups.setdefault(key, []).append(name)
    calls: list[tuple[list[str], torch.device]] = []
    for (device, width, *_), group in groups.items():
        size = max(1, _STACKED // width**2)
        if device.type == "cpu":
            size = 1 if width >= _ONE_BY_ONE_FROM else len(group)
        calls += [(group[i : i + size], device) for i in range(0, len(group), size)]
    return calls


def _stack(tensors: Iterable[Tensor], device: torch.device | None = None) -> Tensor:
    moved = [tensor.to(device) for tensor in tensors]
    # One by itself is not copied: of a large layer that would be much memory.
    return moved[0][None] if len(moved) == 1 else torch.stack(moved)


def _branches(
    layers: Sequence[LoRALinear], dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Ups (L, O, r), downs (L, r, D) and weights by branch, for L layers of one size."""
    ups, downs, weights = [], [], []
    for name in layers[0].branches:
        branches = [layer.branch(name) for layer in layers]
        ups.append(_stack(b.up.detach().to(dtype) for b in branches))
        downs.append(_stack(b.down.detach().to(dtype) for b in branches))
        weights.append(float(branches[0].scale))
    return ups, downs, weights
