"""The model as training calls it: as it is, or compiled by torch."""

import platform
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

_COMPILERS = ("c++", "g++", "clang++", "cl")


def require_compiler(device: torch.device) -> None:
    """Raise if `torch.compile` cannot work here, before any training.

    Raises
    ------
    ValueError
        If there is no C++ compiler, which torch needs for every device.
    """
    if not any(shutil.which(name) for name in _COMPILERS):
        msg = (
            f"train.compile is true, but torch.compile needs a C++ compiler for {device.type} on "
            f"{platform.system()}, and none of {', '.join(_COMPILERS)} is there: install one, or "
            "leave train.compile false"
        )
        raise ValueError(msg)


def training_model(model: nn.Module, *, compiled: bool) -> Callable[[Tensor], Tensor]:
    """What maps images to features in training; moments and evaluation call the model itself."""
    # The halves of a mini-batch have any size: one graph serves them all.
    return torch.compile(model, dynamic=True) if compiled else model
