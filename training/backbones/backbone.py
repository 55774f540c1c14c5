"""What a backbone is to the rest of the package."""

from typing import Any, NamedTuple

from torch import nn


class Backbone(NamedTuple):
    """A network that gives one feature a picture.

    Parameters
    ----------
    module
        Maps images (N, C, H, W) to features (N, D): for a ViT, the class token after the last norm.
    features
        Number of features D.
    timm_name, timm_options
        What rebuilds the module: ``timm.create_model(timm_name, num_classes=0, **timm_options)``,
        or for a name that starts with hf: the library transformers.
    weights_sha256
        Hash of the weights file; None for random weights and for those that timm downloaded.
    channels
        Channels of the images.
    image_size
        Side of the images; None if the model takes any.
    tag
        The published weights that were downloaded, with their exact tag; None for others.
    tensors_sha256
        Hash of the loaded weights themselves, from wherever they came (see `tensors_sha256`); None
        where a trained model is loaded afterwards.
    """

    module: nn.Module
    features: int
    timm_name: str
    timm_options: dict[str, Any]
    weights_sha256: str | None
    channels: int
    image_size: int | None
    tag: str | None = None
    tensors_sha256: str | None = None
