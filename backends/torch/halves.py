"""Moments of a task and of two halves of its images, in one pass."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from backends.torch.adapt import TIMM_QKV, Target
from backends.torch.moments import (
    Forward,
    MomentCollector,
    accumulate,
    default_forward,
    walk,
)
from backends.torch.processes import Reduce, sum_moments
from loda_math import Moments

Halves = dict[str, tuple[Tensor, Tensor]]
"""Second moments (D, D) of two halves of the images, by layer."""


class HalvingCollector(MomentCollector):
    """Sums a second moment over every other image beside the one over all of them.

    The sums over all images are those of :class:`MomentCollector` bit for bit. The other half is
    the difference, which costs half a Gram matrix a batch rather than a whole one.

    Parameters
    ----------
    model : nn.Module
        Called on batches of images; images count up over all batches, and those of odd number
        form the first half.
    target : str or sequence of str
        Patterns over module names. The layers' inputs have the images along their first axis,
        each once, or several times in a row (windows of an image).
    """

    def __init__(self, model: nn.Module, target: Target = TIMM_QKV) -> None:
        super().__init__(model, target)
        self.half: dict[str, Moments] = {}
        self._model = model
        self._joined: set[str] = set()  # layers whose inputs mix the images
        self._batch = self._before = 0

    def __enter__(self) -> Self:
        super().__enter__()
        self._handles.append(self._model.register_forward_pre_hook(self._count, with_kwargs=True))
        return self

    def halves(self) -> Halves:
        """Mean second moments of both halves, of the layers that have two.

        Left out are layers that saw one image only, or in whose input the images cannot be told
        apart.
        """
        halves: Halves = {}
        for name, whole in self.moments.items():
            half = self.half.get(name)
            rest = whole.count - half.count if half is not None else 0
            if half is None or name in self._joined or half.count == 0 or rest == 0:
                continue
            other = (whole.mean * whole.count - half.mean * half.count) / rest
            halves[name] = (half.mean, other)
        return halves

    def share(self, reduce: Reduce) -> None:
        """Replace the sums by those over all processes.

        The halves are those of one process where each walks a run of images that begins at an even
        number of all of them.
        """
        super().share(reduce)
        device = next(iter(self.layers.values())).weight.device
        joined = torch.tensor([name in self._joined for name in self.layers], device=device).int()
        reduce([joined])
        pairs = zip(self.layers, joined.tolist(), strict=True)
        self._joined = {name for name, count in pairs if count}
        self.half = sum_moments(self.half, self.layers, reduce)

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._before += self._batch
        given = [*args, *kwargs.values()]
        self._batch = next((len(x) for x in given if isinstance(x, Tensor) and x.ndim), 0)

    def _add(self, name: str, tokens: Tensor) -> None:
        super()._add(name, tokens)
        rows = tokens if tokens.ndim > 1 else tokens[None]
        # A caller may run a part of the model; then the layer's own input says what a batch is.
        images = self._batch or len(rows)
        if len(rows) % images:
            self._joined.add(name)
            return
        by_image = rows.reshape(images, -1, rows.shape[-1])
        accumulate(self.half, name, by_image[self._before % 2 :: 2])


def collect_halves(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target = TIMM_QKV,
    *,
    forward: Forward = default_forward,
    reduce: Reduce | None = None,
) -> tuple[dict[str, Moments], Halves]:
    """Second moments over all batches, as by :func:`collect_moments`, and those of two halves.

    Parameters
    ----------
    model, batches, target, forward, reduce
        As in :func:`collect_moments`.

    Returns
    -------
    moments : dict of str to Moments
    halves : dict of str to two Tensors, shape (D, D)
        Of the layers that saw two images and more, along the first axis of their inputs.

    Raises
    ------
    ValueError
        As in :func:`collect_moments`.
    """
    collector = HalvingCollector(model, target)
    walk(collector, model, batches, forward, reduce)
    return collector.moments, collector.halves()
