"""The solves of a task for all layers: those of one size in one batched call, where that pays."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from backends.torch.settings import LoDASettings
from loda_math import (
    HeldoutRatio,
    general_subspace,
    heldout_ratio,
    isolated_subspace,
    null_subspace,
)

_LARGE = 256  # width from which a layer of a processor is solved by itself

Bases = dict[str, dict[str, Tensor]]
"""Orthonormal basis (D, r) by layer and branch."""

HeldoutRatios = dict[str, dict[str, HeldoutRatio]]
"""Ratios on data that a subspace was and was not chosen on, by layer and branch."""


def solve_bases(
    settings: LoDASettings,
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor] | None,
    gram_eps: float,
) -> Bases:
    """Bases of the branches of every layer, from second moments.

    Parameters
    ----------
    settings : LoDASettings
        Rank, branches and the rule of the isolated one.
    new : mapping of str to Tensor, shape (D, D)
        Moment of the current task by layer.
    old : mapping of str to Tensor, or None
        History by layer; ``None`` on the first task.
    gram_eps : float
        Rounding unit of the Gram matrices that were summed into the moments.

    Returns
    -------
    dict of str to dict of str to Tensor, shape (D, r)
    """
    bases: Bases = {name: {} for name in new}
    for branch in settings.names(first_task=old is None):
        choose = _rule(settings, branch, gram_eps)
        for group in _calls(new):
            s_new = torch.stack([new[name] for name in group])
            s_old = None if old is None else torch.stack([old[name] for name in group])
            for name, found in zip(group, choose(s_new, s_old), strict=True):
                bases[name][branch] = found
    return bases


def solve_heldout(
    settings: LoDASettings,
    halves: Mapping[str, tuple[Tensor, Tensor]],
    old: Mapping[str, Tensor],
    gram_eps: float,
) -> HeldoutRatios:
    """What the rule of every branch keeps on the half of a task that it did not choose on.

    Parameters
    ----------
    settings, old, gram_eps
        As in :func:`solve_bases`.
    halves : mapping of str to two Tensors, shape (D, D)
        Moments of two halves of the task's images by layer.

    Returns
    -------
    dict of str to dict of str to HeldoutRatio
        Of scalars.
    """
    ratios: HeldoutRatios = {name: {} for name in halves}
    for branch in settings.names(first_task=False):
        choose = _rule(settings, branch, gram_eps)
        for group in _calls({name: old[name] for name in halves}):
            first, second = (torch.stack([halves[n][side] for n in group]) for side in (0, 1))
            found = heldout_ratio(choose, first, second, torch.stack([old[n] for n in group]))
            for name, *values in zip(group, *found, strict=True):
                ratios[name][branch] = HeldoutRatio(*values)
    return ratios


def by_shape(*tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Layer names grouped by the shapes of all their tensors, in order of first appearance."""
    groups: dict[tuple[torch.Size, ...], list[str]] = {}
    for name in tensors[0]:
        groups.setdefault(tuple(t[name].shape for t in tensors), []).append(name)
    return list(groups.values())


def _calls(moments: Mapping[str, Tensor]) -> list[list[str]]:
    """Layers that are solved in one call: large ones of a processor by themselves.

    A stack of them would overflow its caches: twelve of width 768 take a quarter longer at once.
    """
    calls: list[list[str]] = []
    for group in by_shape(moments):
        first = moments[group[0]]
        alone = first.device.type == "cpu" and len(first) >= _LARGE
        calls += [[name] for name in group] if alone else [group]
    return calls


def _rule(
    settings: LoDASettings, branch: str, gram_eps: float
) -> Callable[[Tensor, Tensor | None], Tensor]:
    """How the directions of a branch are chosen from the new moments and the history."""
    rank = settings.rank
    floor = (settings.energy_floor or 0.0) if settings.isolated == "trace_ratio" else None

    def choose(new: Tensor, old: Tensor | None) -> Tensor:
        if branch == "general":
            basis = general_subspace(new, old, rank, accumulation_eps=gram_eps)
        elif settings.isolated == "null" and old is not None:
            basis = null_subspace(old, rank)
        else:
            basis = isolated_subspace(
                new,
                old,
                rank,
                ridge=settings.ridge,
                energy_floor=floor,
                accumulation_eps=gram_eps,
            )
        return torch.as_tensor(basis)

    return choose
