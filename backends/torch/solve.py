"""The solves of a task for all layers at once: layers of one size go through one batched call."""

from collections.abc import Mapping

import torch
from torch import Tensor

from backends.torch.settings import LoDASettings
from loda_math import (
    RecalibrationForm,
    general_subspace,
    isolated_subspace,
    null_subspace,
    recalibration,
)

Bases = dict[str, dict[str, Tensor]]
"""Orthonormal basis (D, r) by layer and branch."""


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
        for group in _by_shape(new):
            s_new = torch.stack([new[name] for name in group])
            s_old = None if old is None else torch.stack([old[name] for name in group])
            basis = _basis(settings, branch, s_new, s_old, gram_eps)
            for name, found in zip(group, basis, strict=True):
                bases[name][branch] = found
    return bases


def solve_recalibration(
    form: RecalibrationForm,
    gamma: float,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    new: Mapping[str, Tensor],
    old: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Λ of the general branch of every layer.

    Parameters
    ----------
    form, gamma
        As in :func:`loda_math.recalibration`.
    factors : mapping of str to (up, down)
        B (O, r) and A (r, D) of the general branch by layer.
    new, old : mapping of str to Tensor, shape (D, D)
        Moment through the trained model, and history, by layer.

    Returns
    -------
    dict of str to Tensor, shape (r, r)
        In the dtype of the moments.
    """
    coefficients: dict[str, Tensor] = {}
    for group in _by_shape({name: up for name, (up, _) in factors.items()}, new):
        dtype = new[group[0]].dtype
        solved = recalibration(
            torch.stack([factors[name][0].to(dtype) for name in group]),
            torch.stack([factors[name][1].to(dtype) for name in group]),
            torch.stack([new[name] for name in group]),
            torch.stack([old[name] for name in group]),
            gamma,
            form=form,
        )
        coefficients.update(zip(group, solved, strict=True))
    return coefficients


def _basis(
    settings: LoDASettings, branch: str, new: Tensor, old: Tensor | None, gram_eps: float
) -> Tensor:
    if branch == "general":
        basis = general_subspace(new, old, settings.rank, accumulation_eps=gram_eps)
    elif settings.isolated == "null" and old is not None:
        basis = null_subspace(old, settings.rank)
    else:
        basis = isolated_subspace(
            new, old, settings.rank, ridge=settings.ridge, accumulation_eps=gram_eps
        )
    return torch.as_tensor(basis)


def _by_shape(*tensors: Mapping[str, Tensor]) -> list[list[str]]:
    """Layer names grouped by the shapes of all their tensors, in order of first appearance."""
    groups: dict[tuple[torch.Size, ...], list[str]] = {}
    for name in tensors[0]:
        groups.setdefault(tuple(t[name].shape for t in tensors), []).append(name)
    return list(groups.values())
