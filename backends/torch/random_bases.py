"""Random orthonormal directions: the control that shows what choosing directions is worth."""

from collections.abc import Mapping

import torch
from torch import nn

from backends.torch.lora import LoRALinear
from backends.torch.settings import LoDASettings
from backends.torch.solve import Bases


def random_bases(
    settings: LoDASettings,
    layers: Mapping[str, nn.Linear | LoRALinear],
    *,
    first_task: bool,
    generator: torch.Generator,
) -> Bases:
    """Bases for ``LoDA.begin_task(bases=...)`` that know nothing of the data.

    Parameters
    ----------
    settings : LoDASettings
        Rank and branches.
    layers : mapping of str to module
        As :func:`find_layers` returns them.
    first_task : bool
        Whether it is the first task, which has a general branch alone.
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
    return {
        name: {
            branch: torch.linalg.qr(
                torch.randn(layer.in_features, settings.rank, generator=generator)
            ).Q
            for branch in settings.names(first_task=first_task)
        }
        for name, layer in layers.items()
    }
