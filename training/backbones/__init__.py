"""Pretrained networks: timm's, Hugging Face's and those of the package, and their weights.

The settings load no torch; what builds a network is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from training.backbones.config import BACKBONES, BackboneConfig

if TYPE_CHECKING:
    from training.backbones.build import Backbone, build_backbone, check_fits
    from training.backbones.preprocessing import Preprocessing, preprocessing_of

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneConfig",
    "Preprocessing",
    "build_backbone",
    "check_fits",
    "preprocessing_of",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    file = "preprocessing" if name in {"Preprocessing", "preprocessing_of"} else "build"
    return getattr(import_module(f"training.backbones.{file}"), name)
