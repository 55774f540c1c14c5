"""Second moments of the inputs of linear layers, collected while a model runs."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from backends.torch.adapt import TIMM_QKV, Target, find_layers
from backends.torch.processes import Reduce, sum_moments
from loda_math import Moments, combine, second_moment

Forward = Callable[[nn.Module, Any], Any]
"""Runs a model on one element of an iterable of batches."""


class MomentCollector:
    """Context manager that sums the second moments of the inputs of the target layers.

    Sums stay on the device of the inputs: a Gram matrix in float32 (or wider) a batch, added in
    float64 where the device has it and with compensation elsewhere. Nothing is read back during
    the run, autocast does not reach the Gram matrix, and the hooks go whatever happens.

    Parameters
    ----------
    model : nn.Module
        The model that will be run, adapted or not.
    target : str or sequence of str
        Patterns over module names.

    Attributes
    ----------
    moments : dict of str to Moments
        By layer name, over everything that went through so far.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    >>> with MomentCollector(model, "0") as collector:
    ...     _ = model(torch.ones(5, 3))
    >>> collector.moments["0"].count
    5
    """

    def __init__(self, model: nn.Module, target: Target = TIMM_QKV) -> None:
        self.layers = find_layers(model, target)
        self.moments: dict[str, Moments] = {}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, layer in self.layers.items():
            hook = self._hook(name)
            self._handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def share(self, reduce: Reduce) -> None:
        """Replace the sums by those over all processes."""
        self.moments = sum_moments(self.moments, self.layers, reduce)

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def collect(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self._add(name, args[0] if args else next(iter(kwargs.values())))

        return collect

    def _add(self, name: str, tokens: Tensor) -> None:
        accumulate(self.moments, name, tokens)


def accumulate(moments: dict[str, Moments], name: str, tokens: Tensor) -> None:
    """Add tokens of shape (..., D) to the moments of a layer, read by nobody, off the graph."""
    rows = tokens.detach().reshape(-1, tokens.shape[-1])
    with torch.no_grad(), torch.autocast(tokens.device.type, enabled=False):
        part = second_moment(rows, check=False)
        moments[name] = combine(moments[name], part) if name in moments else part


def default_forward(model: nn.Module, batch: Any) -> Any:
    """Run a model on a tensor, on the first element of a tuple, or on a dict of keywords.

    Tensors are moved to the device of the model's first parameter.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, (tuple, list)):
        batch = batch[0]
    if isinstance(batch, dict):
        return model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    return model(batch.to(device, non_blocking=True))


def collect_moments(
    model: nn.Module,
    batches: Iterable[Any],
    target: Target = TIMM_QKV,
    *,
    forward: Forward = default_forward,
    reduce: Reduce | None = None,
) -> dict[str, Moments]:
    """Second moments of the target layers over all batches, in evaluation mode.

    Parameters
    ----------
    model : nn.Module
        Run without gradients; the training flag of every submodule is put back afterwards.
    batches : iterable
        What ``forward`` takes; a ``DataLoader`` of (images, labels) works as it is.
    target : str or sequence of str
        Patterns over module names.
    forward : callable, optional
        ``forward(model, batch)``.
    reduce : callable, optional
        Sums tensors over the processes that share the batches (:func:`sum_over_processes`). Each
        walks its own; one that has none takes part all the same.

    Returns
    -------
    dict of str to Moments

    Raises
    ------
    ValueError
        If there was no batch, a layer saw no tokens, or its inputs were not finite.
    """
    collector = MomentCollector(model, target)
    walk(collector, model, batches, forward, reduce)
    return collector.moments


def walk(
    collector: MomentCollector,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward,
    reduce: Reduce | None = None,
) -> None:
    """Let a collector see all batches, as in :func:`collect_moments`."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), collector:
            for batch in batches:
                forward(model, batch)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if reduce is not None:
        collector.share(reduce)
    _check(collector)


def _check(collector: MomentCollector) -> None:
    unseen = [name for name in collector.layers if name not in collector.moments]
    if unseen:
        msg = (
            f"no tokens went through {unseen}: either there was no batch (an iterator that is "
            f"used up?), or the model does not call these layers as modules"
        )
        raise ValueError(msg)
    # One read for all layers.
    sound = torch.stack([m.total.isfinite().all() for m in collector.moments.values()]).tolist()
    broken = [name for name, good in zip(collector.moments, sound, strict=True) if not good]
    if broken:
        msg = (
            f"inputs of {broken} hold NaN or infinite values; look for the first layer of the "
            f"list, and at the images and weights before it"
        )
        raise ValueError(msg)
