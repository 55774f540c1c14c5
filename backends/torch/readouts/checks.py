"""Checks of features and of stored tensors that the read-outs share; this file loads no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, contiguous; refused if it holds NaN or infinity."""
    if not bool(tensor.isfinite().all()):
        msg = f"the {name} must be finite, got NaN or infinite values"
        raise ValueError(msg)
    # safetensors stores contiguous tensors only, and a copy later could change the last bits.
    return tensor.contiguous()


def check_features(features: Tensor, dim: int) -> None:
    """Refuse features that a classifier of width D cannot read."""
    if features.ndim != 2 or features.shape[1] != dim or not features.is_floating_point():
        msg = (
            f"features must be floating, of shape (N, {dim}), got {features.dtype} of shape "
            f"{tuple(features.shape)}"
        )
        raise ValueError(msg)
    finite("features", features)


def check_names(tensors: Mapping[str, Tensor], names: set[str], what: str) -> None:
    """Refuse stored tensors under other names than these."""
    if tensors.keys() != names:
        msg = f"the tensors of {what} must be {sorted(names)}, got {sorted(tensors)}"
        raise ValueError(msg)
