"""What a task did to the model: how far it moved the weights, and how many predictions it changed.

A low accuracy has two causes that look alike: a task that forgot, and a task whose update was too
small to matter. These two numbers tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from backends.torch import LoRALinear, plain_state
from backends.torch.readouts import Classifier

SAMPLE = 500
"""Training images of a task, at most, whose predictions are compared."""


class Update(NamedTuple):
    """What the update of a task did.

    Attributes
    ----------
    relative : float
        ``‖ΔW‖ / ‖W‖`` in the Frobenius norm, over all adapted weights together.
    layers : dict of str to float
        The same for each adapted weight, by its name in the model.
    changed : float
        Share of training images of the task to which the new classifier gives another class
        through the updated model than through the model before the update.
    images : int
        Number of these images, at most `SAMPLE`.
    """

    relative: float
    layers: dict[str, float]
    changed: float
    images: int


@dataclass
class Before:
    """The model before a task, as far as `Update` compares it.

    Parameters
    ----------
    weights : dict of str to Tensor
        The weights that the task adapts, by their names in the model, on the CPU.
    features : Tensor, shape (n, D)
        Features of the images chosen by `sample`.
    """

    weights: dict[str, Tensor]
    features: Tensor

    @classmethod
    def opened(
        cls,
        weights: Mapping[str, Tensor],
        model: nn.Module,
        trained: Iterable[nn.Parameter],
        features: Tensor,
    ) -> Self:
        """What to keep once a method has opened a task, in which it trains ``trained``.

        ``weights`` are what `weights_of` gave before that.
        """
        layers = [module.frozen for module in model.modules() if isinstance(module, LoRALinear)]
        # The weight of a layer may be a view of the model's tensor: they share its storage.
        places = {tensor.untyped_storage().data_ptr() for tensor in (*layers, *trained)}
        adapted = {
            name: weights[name]
            for name, tensor in plain_state(model).items()
            if name in weights and tensor.untyped_storage().data_ptr() in places
        }
        # A method with modules of its own: everything may change.
        return cls(adapted or dict(weights), features)

    def tensors(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors for a checkpoint, without weights that the open model still holds."""
        now = plain_state(model)
        return {"features": self.features} | {
            f"weights/{name}": weight
            for name, weight in self.weights.items()
            if name not in now or not torch.equal(now[name].cpu(), weight)
        }

    @classmethod
    def loaded(cls, tensors: Mapping[str, Tensor], names: Sequence[str], model: nn.Module) -> Self:
        """From what `tensors` gave, the names of the weights, and the model of the checkpoint."""
        now = plain_state(model)
        weights = {}
        for name in names:
            saved = tensors.get(f"weights/{name}")
            weights[name] = now[name].cpu().clone() if saved is None else saved
        return cls(weights, tensors["features"].to(next(model.parameters()).device))

    def compare(self, model: nn.Module, features: Tensor, classifier: Classifier) -> Update:
        """Compare the model after the task, with the features that it gives to the same images."""
        now = plain_state(model)
        change, size = {}, {}
        for name, weight in self.weights.items():
            old, new = weight.double(), now[name].cpu().double()
            change[name], size[name] = float((new - old).norm()), float(old.norm())
        one, other = (classifier.logits(f).argmax(dim=1) for f in (self.features, features))
        return Update(
            relative=_ratio(_length(change.values()), _length(size.values())),
            layers={name: _ratio(change[name], size[name]) for name in self.weights},
            changed=float((one != other).double().mean()),
            images=len(features),
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all matrices of a model between two tasks, on the CPU.

    Examples
    --------
    >>> from torch import nn
    >>> list(weights_of(nn.Linear(2, 3)))
    ['weight']
    """
    return {
        name: tensor.detach().to("cpu", copy=True)
        for name, tensor in model.state_dict().items()
        if tensor.ndim > 1 and tensor.is_floating_point()
    }


def sample(count: int) -> list[int]:
    """Positions of the images that are compared: at most `SAMPLE`, evenly spread.

    Examples
    --------
    >>> sample(3), len(sample(10_000))
    ([0, 1, 2], 500)
    """
    chosen = min(count, SAMPLE)
    return [position * count // chosen for position in range(chosen)]


def _length(lengths: Iterable[float]) -> float:
    return math.sqrt(sum(x * x for x in lengths))


def _ratio(change: float, size: float) -> float:
    return change / size if size else 0.0
