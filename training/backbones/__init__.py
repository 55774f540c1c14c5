"""Pretrained networks: timm's, Hugging Face's and those of the package, and their weights.

The settings load no torch; what builds a network is loaded when it is asked for.
"""

from typing import TYPE_CHECKING

from backends.lazy import load_on_use
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

__getattr__, __dir__ = load_on_use(__name__, __all__, ["preprocessing", "build", "checks"])
