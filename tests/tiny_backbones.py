"""Tiny vision transformers, and weights for them."""

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file

from training.backbones import Backbone, BackboneConfig

NAME = "vit_tiny_patch16_224"
TINY: dict[str, Any] = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}


def tiny(weights: Path | None = None, **options: object) -> BackboneConfig:
    start = {"pretrained": False} if weights is None else {"weights": str(weights)}
    return BackboneConfig(NAME, {"options": {**TINY, **options}, **start})


def saved(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    path = folder / "weights.safetensors"
    save_file(weights, path)
    return path


def holds(backbone: Backbone, weights: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, weights[k]) for k, v in backbone.module.state_dict().items())


def trained_weights() -> dict[str, torch.Tensor]:
    """Weights of a tiny model with a classifier, as its training would save them."""
    torch.manual_seed(0)
    model = timm.create_model(NAME, num_classes=3, **TINY)
    return {key: value.clone() for key, value in model.state_dict().items()}
