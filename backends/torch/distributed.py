"""Sums over the processes of a run: of gradients and of second moments."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, distributed, nn

from backends.torch.lora import weight_matrix
from loda_math import Moments, second_moment

Reduce = Callable[[Sequence[Tensor]], None]
"""Replaces each tensor, in place, by its sum over all processes; called by all in one order."""


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
    # One message for each type and device: many small ones would each cost a round trip.
    alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        alike.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in alike.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in group])
        distributed.all_reduce(flat)
        pieces = torch.split(flat, [tensor.numel() for tensor in group])
        for tensor, piece in zip(group, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def sum_moments(
    moments: Mapping[str, Moments], layers: Mapping[str, nn.Module], reduce: Reduce
) -> dict[str, Moments]:
    """Moments over all processes, some of which may have seen no token of a layer.

    Parameters
    ----------
    moments : mapping of str to Moments
        What this process has seen.
    layers : mapping of str to module
        All that may be seen, in the same order in every process.
    reduce : callable
        Sums over the processes.

    Returns
    -------
    dict of str to Moments
        Of the layers that were seen anywhere.
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
