"""Cosine heads, one a task, and the classifier that compares features with a direction a class."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from backends.torch.readouts.checks import check_features

# Far below the norm of any real feature; keeps the gradient of a zero vector finite.
_EPS = 1e-6
_STD = 0.02


def cosines(features: Tensor, weight: Tensor) -> Tensor:
    """Cosines (..., C) of features (..., D) to the rows of a weight (C, D), up to rounding."""
    products: Tensor = functional.linear(
        functional.normalize(features, dim=-1, eps=_EPS),
        functional.normalize(weight, dim=-1, eps=_EPS),
    )
    return products


@dataclass(frozen=True, eq=False)
class CosineClassifier:
    """Cosines to one direction a class.

    Parameters
    ----------
    weight : Tensor, shape (C, D)
        Directions of any length but zero.

    Examples
    --------
    >>> CosineClassifier(torch.eye(2)).logits(torch.tensor([[3.0, 4.0]])).argmax().item()
    1
    """

    weight: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Cosines (N, C) in [-1, 1] of features (N, D), in the wider type of the two.

        Raises
        ------
        ValueError
            If the features do not fit the weight or are not finite.
        """
        check_features(features, self.weight.shape[1])
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        # Clamped: rounding leaves the cosine of equal directions a little above 1.
        return cosines(features.to(dtype), self.weight.to(features.device, dtype)).clamp(-1.0, 1.0)

    def tensors(self) -> dict[str, Tensor]:
        """The weight."""
        return {"weight": self.weight}


class CosineHead(nn.Module):
    """Cosines of features to one learned direction a class; no bias.

    Parameters
    ----------
    classes, dim : int
        Number C of classes and width D of the features, both at least 1.
    start : (C, D) tensor, optional
        Initial weight (see `class_mean_start`); by default a normal of standard deviation 0.02,
        cut at two standard deviations.
    generator : torch.Generator, optional
        Source of the random start.

    Examples
    --------
    >>> head = CosineHead(2, 3, start=torch.eye(2, 3))
    >>> head(torch.tensor([[3.0, 0.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.0]]
    """

    def __init__(
        self,
        classes: int,
        dim: int,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if classes < 1 or dim < 1:
            msg = f"classes and dim must be at least 1, got {classes} and {dim}"
            raise ValueError(msg)
        if start is None:
            weight = torch.empty(classes, dim)
            nn.init.trunc_normal_(weight, std=_STD, a=-2 * _STD, b=2 * _STD, generator=generator)
        elif start.shape != (classes, dim) or not start.is_floating_point():
            msg = (
                f"start must be floating, of shape ({classes}, {dim}), got {start.dtype} of shape "
                f"{tuple(start.shape)}"
            )
            raise ValueError(msg)
        else:
            weight = start.detach().clone()
        self.weight = nn.Parameter(weight)

    def forward(self, features: Tensor) -> Tensor:
        """Cosines (..., C) in [-1, 1] of features (..., D), in the weight's precision or better.

        Raises
        ------
        ValueError
            If the last axis of the features is not D wide.
        """
        if features.shape[-1:] != self.weight.shape[1:]:
            msg = (
                f"features must have shape (..., {self.weight.shape[1]}), got "
                f"{tuple(features.shape)}"
            )
            raise ValueError(msg)
        dtype = torch.promote_types(features.dtype, self.weight.dtype)
        # Cosines of near neighbours differ in digits that bfloat16 does not have.
        with torch.autocast(device_type=features.device.type, enabled=False):
            return cosines(features.to(dtype), self.weight.to(dtype)).clamp(-1.0, 1.0)


def class_mean_start(means: Tensor) -> Tensor:
    """Initial weight (C, D) of a head from its classes' mean features (C, D): rows of length 1.

    Heads trained apart from random starts are comparable at test time only when the features
    are nearly isotropic; this start keeps them comparable on weak backbones as well.

    Raises
    ------
    ValueError
        If the means are not a floating (C, D) matrix, not finite, or a mean is zero.

    Examples
    --------
    >>> class_mean_start(torch.tensor([[3.0, 4.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929]]
    """
    if means.ndim != 2 or not means.is_floating_point():
        msg = f"means must be floating (C, D), got {means.dtype} of shape {tuple(means.shape)}"
        raise ValueError(msg)
    wide = means.detach().double()
    norms = wide.norm(dim=-1, keepdim=True)
    bad = (~(norms.isfinite() & (norms > 0))).squeeze(-1).nonzero().flatten().tolist()
    if bad:
        msg = f"mean features must be finite and not zero, which they are not of classes {bad}"
        raise ValueError(msg)
    return torch.div(wide, norms).to(means.dtype)


class CosineHeads(nn.Module):
    """One `CosineHead` a task; only the last one is trainable; all are concatenated at test.

    Parameters
    ----------
    dim : int
        Width D of the features.
    sizes : sequence of int
        Classes of the tasks that exist already, so that a `state_dict` fits.

    Examples
    --------
    >>> heads = CosineHeads(4)
    >>> _ = heads.add(2)
    >>> current = heads.add(3)
    >>> heads(torch.ones(1, 4)).shape, heads.sizes, heads.weight().shape
    (torch.Size([1, 5]), (2, 3), torch.Size([5, 4]))
    >>> [p.requires_grad for p in heads.parameters()]
    [False, True]
    """

    def __init__(self, dim: int, sizes: Sequence[int] = ()) -> None:
        super().__init__()
        self.dim = dim
        self.tasks = nn.ModuleList()
        for size in sizes:
            self.add(size)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Classes of each task."""
        return tuple(len(weight) for weight in self.parameters())

    @property
    def current(self) -> CosineHead:
        """The head of the current task; ValueError before the first `add`."""
        return self._begun()[-1]

    def add(
        self,
        classes: int,
        *,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> CosineHead:
        """Begin a task: freeze every head so far and return a new trainable one.

        The head is made on the device and in the type of the others.
        """
        head = CosineHead(classes, self.dim, start=start, generator=generator)
        if len(self.tasks):  # drawn on the CPU first, so that the device does not matter
            head = head.to(self.current.weight)
        # Before the new head is appended: only that one is trained.
        self.requires_grad_(requires_grad=False)
        self.tasks.append(head)
        return head

    def forward(self, features: Tensor) -> Tensor:
        """Cosines (..., C_seen) to every class seen so far."""
        return torch.cat([head(features) for head in self._begun()], dim=-1)

    def weight(self) -> Tensor:
        """All weights (C_seen, D), detached: a copy."""
        return torch.cat([head.weight.detach() for head in self._begun()])

    def _begun(self) -> list[CosineHead]:
        """The heads of all tasks; ValueError before the first `add`."""
        heads = [head for head in self.tasks if isinstance(head, CosineHead)]
        if not heads:
            msg = "there is no head yet; call add(classes) when a task begins"
            raise ValueError(msg)
        return heads
