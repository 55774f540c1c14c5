"""What every read-out offers, and rebuilding one from its tensors."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from backends.torch.readouts._checks import finite
from backends.torch.readouts.cosine import CosineReadout
from backends.torch.readouts.ridge_regression import RidgeReadout

_COSINE_KINDS = ("heads", "nearest_mean", "alignment")


class Readout(Protocol):
    """A classifier over all classes seen."""

    @property
    def kind(self) -> str:
        """Name that `load_readout` knows."""

    def logits(self, features: Tensor) -> Tensor:
        """Scores (N, C_seen) of features (N, D); the class is the highest."""

    def tensors(self) -> dict[str, Tensor]:
        """All that is needed to rebuild it, ready for safetensors."""


def load_readout(kind: str, tensors: Mapping[str, Tensor]) -> Readout:
    """The read-out whose `tensors()` were stored, with the same logits bit for bit.

    Raises
    ------
    ValueError
        For an unknown kind or tensors that are not those of this kind.
    """
    expected = {"projection", "weight"} if kind == "ridge" else {"weight"}
    if kind != "ridge" and kind not in _COSINE_KINDS:
        msg = f"Unknown read-out {kind!r}; known: {', '.join((*_COSINE_KINDS, 'ridge'))}."
        raise ValueError(msg)
    if tensors.keys() != expected:
        msg = f"A read-out {kind!r} is stored as {sorted(expected)}; given {sorted(tensors)}."
        raise ValueError(msg)
    weight = finite("weight", tensors["weight"])
    if kind == "ridge":
        return RidgeReadout(finite("projection", tensors["projection"]), weight)
    return CosineReadout(kind, weight)
