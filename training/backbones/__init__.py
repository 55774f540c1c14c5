"""Pretrained networks: timm's, Hugging Face's and those of the package, and their weights."""

from training.backbones.backbone import Backbone
from training.backbones.build import build_backbone, check_fits

__all__ = ["Backbone", "build_backbone", "check_fits"]
