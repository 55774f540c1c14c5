"""What the processes that train one model share: sums of gradients and of second moments."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parallel import DistributedDataParallel

from backends.torch.lora import weight_matrix
from loda_math import Moments, second_moment

Reduce = Callable[[Sequence[Tensor]], None]
"""Replaces each tensor, in place, by its sum over all processes; called by all in one order."""


def several_processes() -> bool:
    """Whether the default group of ``torch.distributed`` has more than one process."""
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def unshared(tensors: Sequence[Tensor]) -> None:
    """Leave tensors as they are: the ``reduce`` of a process that works for itself.

    Parameters
    ----------
    tensors : sequence of Tensor
        Not changed.
    """


def default_reduce(reduce: Reduce | None) -> Reduce | None:
    """The given sum over processes; by default that of ``torch.distributed``, if it has several."""
    return sum_over_processes if reduce is None and several_processes() else reduce


@torch.no_grad()
def sum_over_processes(tensors: Sequence[Tensor]) -> None:
    """Sum tensors in place over the default group of ``torch.distributed``.

    Parameters
    ----------
    tensors : sequence of Tensor
        Of the same shapes and types, in the same order, in every process. One message is sent for
        each type and device.

    Examples
    --------
    >>> import torch
    >>> from torch import distributed
    >>> distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    >>> x = torch.ones(2)
    >>> sum_over_processes([x])
    >>> x
    tensor([1., 1.])
    >>> distributed.destroy_process_group()
    """
    # By type and device: many small messages would each cost a round trip.
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, piece in zip(group, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def gather(value: Any) -> list[Any]:
    """The values of all processes, by rank; that of this one if there are no others."""
    if not several_processes():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


@torch.no_grad()
def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors, in place, with those of the first process of the default group."""
    # One by one: side by side, the weights of a model would take its memory once more.
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).contiguous()
        distributed.broadcast(flat.view(torch.uint8), 0)  # not every type can be sent
        tensor.copy_(flat.view_as(tensor))
    torch.clear_autocast_cache()


@contextmanager
def synchronisation_paused(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Keep ``DistributedDataParallel`` around these parameters from averaging their gradients.

    Inside the block gradients are summed over the processes by the caller, who knows how much each
    process holds. A process may then make any number of forward and backward passes, also none.
    """
    trained = {id(parameter) for parameter in parameters}
    paused: dict[DistributedDataParallel, dict[str, bool]] = {}

    def pause(module: nn.Module, _: Any) -> None:
        if not isinstance(module, DistributedDataParallel):
            return
        if any(id(parameter) in trained for parameter in module.parameters()):
            paused.setdefault(module, {name: getattr(module, name) for name in _SYNCHRONISES})
            for name in _SYNCHRONISES:
                setattr(module, name, False)

    # A hook on all modules, since the wrapper is made by the caller and unknown here.
    handle = register_module_forward_pre_hook(pause)
    try:
        yield
    finally:
        handle.remove()
        for module, switches in paused.items():
            for name, value in switches.items():
                setattr(module, name, value)


_SYNCHRONISES = (
    "require_backward_grad_sync",
    # Forward would broadcast the buffers: a process without a row would not take part.
    "require_forward_param_sync",
    # These two watch for backward passes that make no gradient ready to be sent.
    "static_graph",
    "find_unused_parameters",
)
"""What ``DistributedDataParallel`` looks at to see whether a pass is to be synchronised."""


def sum_moments(
    moments: Mapping[str, Moments], layers: Mapping[str, nn.Module], reduce: Reduce
) -> dict[str, Moments]:
    """Moments over all processes, of the layers that were seen in any of them.

    ``layers`` are all that may be seen, in the same order in every process.
    """
    parts: dict[str, Moments] = {}
    for name, layer in layers.items():
        weight = weight_matrix(layer).detach()
        nothing = weight.new_zeros(0, weight.shape[1])
        part = moments[name] if name in moments else second_moment(nothing, check=False)
        # A process that saw nothing takes part with a zero, or the others would wait for ever.
        # Copies: the collector's own tensors may be in use elsewhere.
        error = None if part.error is None else part.error.clone()
        parts[name] = Moments(part.total.clone(), part.count, error, part.unit)
    device = next(iter(parts.values())).total.device
    counts = torch.tensor([part.count for part in parts.values()], device=device)
    sums = [tensor for part in parts.values() for tensor in (part.total, part.error)]
    reduce([tensor for tensor in sums if tensor is not None])
    reduce([counts])
    return {
        name: Moments(part.total, count, part.error, part.unit)
        for (name, part), count in zip(parts.items(), counts.tolist(), strict=True)
        if count
    }
