"""Pretrained networks: timm's, Hugging Face's and those of the package, and their weights.

The settings load no torch; what builds a network is loaded when it is asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from training.backbones.config import BACKBONES, BackboneConfig

if TYPE_CHECKING:
    from training.backbones.build import Backbone, build_backbone
    from training.backbones.checks import check_features, check_fits, check_target
    from training.backbones.preprocessing import Preprocessing, preprocessing_of

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneConfig",
    "Preprocessing",
    "build_backbone",
    "check_features",
    "check_fits",
    "check_target",
    "preprocessing_of",
]


_FILES = {
    "Preprocessing": "preprocessing",
    "preprocessing_of": "preprocessing",
    "check_features": "checks",
    "check_fits": "checks",
    "check_target": "checks",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"training.backbones.{_FILES.get(name, 'build')}"), name)
